"""What tests of in_turn run: in threads, in processes, and where memory is measured."""

import sys
from pathlib import Path

import torch

from fastgt.distributed import Group, in_turn, load_partition, over_ranks, sync_gradients
from fastgt.models import GraphTransformer, GraphTransformerConfig


def collectives(group):
    """What each collective of a Group gives, with tensors that differ from rank to rank."""
    ranks = group if isinstance(group, Group) else Group(group)
    rank, size = ranks.rank, ranks.size
    x = torch.arange(6.0, dtype=torch.float64).view(3, 2) * (10 + rank) - 7 * rank
    counts = [(rank + other) % 3 for other in range(size)]
    letters = torch.arange(2.0 * sum(counts)).view(-1, 2) + 100 * rank
    first = ranks.all_to_all(letters, counts, counts)
    second = ranks.all_to_all(letters[:, 0].long(), counts, counts)
    found = {"rows": first.wait().clone(), "numbers": second.wait().clone()}
    letters.fill_(-1)  # they have arrived
    found |= {"sum": ranks.sum(x.clone()), "largest": ranks.largest(x)}
    found |= {"gathered": ranks.gathered(x)}
    found["sum"].add_(1)  # each has a tensor of its own
    mine = x.T.clone()
    ranks.from_first(mine.T)
    found |= {"largest of bytes": ranks.largest((x > 9).to(torch.uint8)), "first": mine}
    return found, ranks.told({"rank": rank, "size": size})


def trained(group, folder, layers):
    """Two steps of training from a folder of parts, in float32 -> the rank's losses."""
    shard, tensors = load_partition(folder, group, check=False)
    torch.manual_seed(0)
    config = GraphTransformerConfig(
        node_types=3, out_dim=4, dim=32, heads=4, layers=layers, dropout=0.1
    )
    model = over_ranks(GraphTransformer(config))
    optimizer = torch.optim.Adam(model.parameters())
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(tensors["node_type"], shard).square().sum() / shard.part.whole.rows
        loss.backward()
        sync_gradients(model, group)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def memory(name):
    """A line of Linux's account of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"no {name}")


def main(folder, parts, layers, scratch):
    """Prints the bytes that training took beside what importing took, and the sums of losses."""
    torch.set_num_threads(1)
    before = memory("VmRSS")
    parts = int(parts)
    if parts == 1:
        losses = [trained(Group(), folder, int(layers))]
    else:
        losses = in_turn(trained, parts, scratch, folder, int(layers))
    print(memory("VmHWM") - before, *map(sum, zip(*losses, strict=True)))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Which heads are active is decided alike by the ranks of a graph, as one process decides."""

import pytest
import torch
from torch import nn

from fastgt import Graph
from fastgt.distributed import DistributedGraph, Group, sync_gradients
from fastgt.nn import HardConcreteHeadGate, HeadGate, NeighborhoodAttention, TopKHeadGate
from fastgt.pruning import HeadSparsity, prune_heads

HEADS, DIM, STEPS = 8, 16, 9
PARTS = {
    "shared out": torch.tensor([0, 1, 1, 0, 1, 0]),
    "a rank without rows": torch.zeros(6, dtype=torch.int64),
}


def graph():
    ends = torch.tensor([[0, 1, 2, 3, 3, 5, 0], [1, 2, 3, 0, 1, 0, 5]])
    sizes = (5, 4), (0, 2)  # edges and nodes of two graphs
    return Graph.batch([Graph.from_edge_index(ends[:, :e], n) for e, n in sizes])


class Two(nn.Module):
    """Two layers, with gates of their own."""

    def __init__(self, gates):
        super().__init__()
        self.layers = nn.ModuleList(
            NeighborhoodAttention(DIM, HEADS, head_gate=gate, dense_gate_grad=True)
            for gate in gates
        )

    def forward(self, x, graph):
        for layer in self.layers:
            x = x + layer(x, graph).tanh()
        return x


def batch(step):
    return torch.randn(6, DIM, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def place(group, part):
    if group is None:
        ranks = Group()
        return DistributedGraph.from_graph(graph(), torch.zeros_like(part), ranks), None
    return DistributedGraph.from_graph(graph(), part, group), group


def exchanged(group, part):
    """The masks of both layers after each step, and the scores in the end."""
    shard, processes = place(group, part)
    torch.manual_seed(3)
    model = Two([HeadGate(torch.ones(HEADS)) for _ in range(2)]).double()
    # of the first draw: that of rank 0 counts
    torch.manual_seed(7 + shard.group.rank)
    heads = HeadSparsity(model, 0.5, steps=STEPS, every=3, scored=2, group=processes)
    masks = []
    for step in range(STEPS):
        model(shard.own(batch(step)), shard).square().sum().backward()
        heads.step()
        model.zero_grad()
        masks.append([layer.head_gate.mask.tolist() for layer in model.layers])
    return masks, heads.state_dict()["sums"]


@pytest.mark.parametrize("part", PARTS)
def test_ranks_exchange_the_heads_that_one_process_exchanges(ranks, part):
    masks, sums = exchanged(None, PARTS[part])
    assert len({str(mask) for mask in masks}) > 2
    first, second = ranks.run(2, exchanged, PARTS[part])
    assert first[0] == second[0] == masks
    for mine, others, alone in zip(first[1], second[1], sums, strict=True):
        assert torch.equal(mine, others)
        torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-5)


GATES = {
    "hard concrete": lambda: HardConcreteHeadGate(HEADS, logit=-2.0),
    "top k": lambda: TopKHeadGate(HEADS, k=3),
}


def trained(group, part, name):
    """The logits of learnt gates, and how many heads are left."""
    shard, _ = place(group, part)
    torch.manual_seed(5)
    model = Two([GATES[name]() for _ in range(2)]).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(shard.own(batch(step)), shard).square().sum() / 6
        if name == "hard concrete":
            penalty = sum(layer.head_gate.penalty() for layer in model.layers)
            loss = loss + penalty / shard.group.size  # which every rank has
        loss.backward()
        sync_gradients(model, shard.group)
        optimizer.step()
    smaller = prune_heads(model, allow_empty=True)
    left = [layer.heads for layer in smaller.layers]
    return [layer.head_gate.logits.detach() for layer in model.layers], left


@pytest.mark.parametrize("name", GATES)
def test_ranks_learn_the_gates_that_one_process_learns(ranks, name):
    part = PARTS["shared out"]
    logits, left = trained(None, part, name)
    for theirs, their_left in ranks.run(2, trained, part, name):
        assert their_left == left
        for found, wanted in zip(theirs, logits, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def unreached(group, part):
    """A rank that has no rows forgets its backward."""
    shard, processes = place(group, part)
    model = Two([HeadGate(torch.ones(HEADS)) for _ in range(2)]).double()
    heads = HeadSparsity(model, 0.5, steps=STEPS, every=1, scored=1, group=processes)
    if shard.group.rank == 0:
        model.layers[0].head_gate().sum().backward()
        model.layers[1].head_gate().sum().backward()
    heads.step()


def test_ranks_without_a_gradient_stop_all_of_them(ranks):
    for answer in ranks.answers(2, unreached, PARTS["shared out"]):
        assert answer.kind == "RuntimeError"
        wanted = "no backward has reached the head_gate of 'layers.0', 'layers.1' on all ranks"
        assert answer.message == wanted


def random_apart(group, part):
    """Random gates of ranks that did not seed PyTorch's generator alike."""
    shard, _ = place(group, part)
    torch.manual_seed(5)
    model = Two([HardConcreteHeadGate(HEADS) for _ in range(2)]).double()
    torch.manual_seed(shard.group.rank)
    model(shard.own(batch(0)), shard)


def test_random_gates_that_differ_are_refused(ranks):
    for answer in ranks.answers(2, random_apart, PARTS["shared out"]):
        assert answer.kind == "RuntimeError"
        assert "ranks disagree about head_gate of neighborhood_attention" in answer.message

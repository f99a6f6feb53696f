"""Pruning in a distributed training: ranks that see other data decide alike."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastgt import Graph
from fastgt.nn import HardConcreteHeadGate, HeadGate, NeighborhoodAttention, TopKHeadGate
from fastgt.pruning import GradualPruning, HeadSparsity, SkipLayer, prune_heads

RANKS, STEPS, HEADS = 2, 9, 8
GRAPH = Graph.from_edge_index(torch.tensor([[0, 1, 2, 3, 3], [1, 2, 3, 0, 1]]))
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(100 * step + rank))


def attention(gate: nn.Module | None, **options: bool) -> NeighborhoodAttention:
    torch.manual_seed(0)
    return NeighborhoodAttention(16, HEADS, head_gate=gate, **options)


def exchanged(data: list[int], model: nn.Module, layer: NeighborhoodAttention) -> list:
    """The masks after each step, trained with the batches of those ranks."""
    heads = HeadSparsity(model, 0.5, steps=STEPS, every=3, exchange=0.5, scored=2)
    masks = [layer.head_gate.mask.tolist()]  # type: ignore[union-attr]
    for step in range(STEPS):
        for rank in data:
            model(batch(rank, step), GRAPH).square().sum().backward()
        heads.step()
        model.zero_grad()
        masks.append(layer.head_gate.mask.tolist())  # type: ignore[union-attr]
    return [masks, heads.state_dict()["sums"]]


def dense() -> NeighborhoodAttention:
    return attention(HeadGate(torch.ones(HEADS)), dense_gate_grad=True)


def pruned(rank: int, gate: nn.Module) -> list:
    """Which heads are left of a model that learns its gates."""
    layer = attention(gate, dense_gate_grad=True)
    if isinstance(gate, HardConcreteHeadGate):
        gate.logits.data = torch.linspace(-3, -1, HEADS)  # some are masked below -2.4
    model = DistributedDataParallel(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    torch.manual_seed(rank)  # of the random gates
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(batch(rank, step), GRAPH).square().mean()
        if isinstance(gate, HardConcreteHeadGate):
            loss = loss + gate.penalty()
        loss.backward()
        optimizer.step()
    smaller = prune_heads(layer)
    return [smaller.heads, smaller.q.weight.tolist()]


def weights(rank: int) -> list:
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    model = DistributedDataParallel(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    pruning = GradualPruning(layer, 0.5, end=STEPS, every=2)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()
        pruning.step()
    return layer.weight_mask.tolist()


def skipped(rank: int) -> int:
    torch.manual_seed(0)
    layer = SkipLayer(nn.Linear(16, 16), p=0.5)
    model = DistributedDataParallel(
        nn.Sequential(layer, nn.Linear(16, 1)), find_unused_parameters=True
    )
    torch.manual_seed(rank)
    ran = []
    layer.block.register_forward_hook(lambda *_: ran.append(1))
    for step in range(STEPS):
        model(batch(rank, step)).square().mean().backward()
    return len(ran)


def work(rank: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS
    )
    torch.set_num_threads(1)
    layer = dense()
    torch.manual_seed(7 + rank)  # of the first draw
    found = {"alone": exchanged([rank], layer, layer)}
    layer = dense()
    torch.manual_seed(17 + rank)
    wrapped = DistributedDataParallel(layer)
    found["ddp"] = exchanged([rank], wrapped, layer)
    found["hard concrete"] = pruned(rank, HardConcreteHeadGate(HEADS))
    found["top k"] = pruned(rank, TopKHeadGate(HEADS, k=3))
    found["weights"] = weights(rank)
    found["skipped"] = skipped(rank)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    try:
        errors = [run.communicate(timeout=120)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0] * RANKS, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", ["alone", "ddp"])
def test_ranks_exchange_the_same_heads(name: str, ranks: list[dict]) -> None:
    (masks, sums), (others, other_sums) = (found[name] for found in ranks)
    assert masks == others
    assert len({tuple(mask) for mask in masks}) > 2  # heads were exchanged
    assert all(torch.equal(x, y) for x, y in zip(sums, other_sums, strict=True))


def test_they_are_those_of_one_process_with_all_batches(ranks: list[dict]) -> None:
    layer = dense()
    torch.manual_seed(7)  # as rank 0 drew
    masks, _ = exchanged([0, 1], layer, layer)
    assert ranks[0]["alone"][0] == masks


@pytest.mark.parametrize("name", ["hard concrete", "top k", "weights"])
def test_ranks_prune_the_same(name: str, ranks: list[dict]) -> None:
    assert ranks[0][name] == ranks[1][name]
    if name == "hard concrete":
        assert 0 < ranks[0][name][0] < HEADS


def test_layers_may_be_skipped_on_some_ranks_only(ranks: list[dict]) -> None:
    assert all(0 < found["skipped"] < STEPS for found in ranks)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))

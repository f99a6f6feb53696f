"""SkipLayer and DropPath: whole blocks, and branches, now and then or for good."""

from itertools import pairwise

import pytest
import torch
from attention_cases import DEVICE, FP64, close
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastgt import Graph
from fastgt.models import (
    EdgeGraphTransformer,
    EdgeGraphTransformerConfig,
    GraphTransformer,
    GraphTransformerConfig,
)
from fastgt.pruning import DropPath, SkipLayer, prune_layers


class Counted(nn.Module):
    """x + 1, and how often it was computed."""

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, e=None):
        self.calls += 1
        y = x + self.weight
        return y if e is None else (y, e * 2)


def inputs():
    edge_index = torch.randint(7, (2, 30), generator=torch.Generator().manual_seed(0))
    graph = Graph.from_edge_index(edge_index.to(DEVICE), 7)
    return torch.arange(7, device=DEVICE) % 3, torch.arange(30, device=DEVICE) % 2, graph


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_whole_blocks_are_skipped_so_often(p):
    block = Counted()
    layer = SkipLayer(block, p).train()
    torch.manual_seed(0)
    x = torch.zeros(5)
    outs = torch.stack([layer(x) for _ in range(2000)])
    # all nodes together, never one alone
    assert ((outs == 0).all(1) | (outs == 1).all(1)).all()
    assert int(outs[:, 0].sum()) == block.calls  # what is skipped is not computed
    share = 1 - block.calls / 2000
    assert abs(share - p) <= 4 * (p * (1 - p) / 2000) ** 0.5
    layer.eval()
    assert layer(x).eq(1).all()


def test_a_seed_repeats_it_and_gradients_go_around():
    layers = nn.ModuleList(SkipLayer(Counted(), 0.5) for _ in range(8))

    def run():
        torch.manual_seed(3)
        x = torch.zeros(2)
        for layer in layers:
            x = layer(x)
        return x

    x = run()
    assert 0 < x[0] < 8
    assert torch.equal(run(), x)
    run().sum().backward()
    grads = [layer.block.weight.grad for layer in layers]
    assert sum(g is not None for g in grads) == int(x[0])


@given(skipped=st.lists(st.booleans(), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_any_layers_taken_away_are_any_layers_skipped(skipped, seed):
    torch.manual_seed(seed)
    norm = nn.LayerNorm(4)  # of all blocks
    layers = nn.Sequential()
    for skip in skipped:
        layers += nn.Sequential(norm, SkipLayer(nn.Linear(4, 4), 0.5))
        layers[-1].skipped = skip
    layers = layers.to(DEVICE).eval()
    x = torch.randn(3, 4, device=DEVICE)
    wanted = x
    for skip, layer in zip(skipped, layers[1::2], strict=True):
        wanted = norm(wanted)
        wanted = wanted if skip else layer.block(wanted)
    assert torch.equal(layers(x), wanted)
    smaller = prune_layers(layers)
    assert torch.equal(smaller(x), wanted)
    left = 2 * len(skipped) - sum(skipped)
    assert list(smaller._modules) == [str(i) for i in range(left)]
    again = prune_layers(layers)
    again.load_state_dict(smaller.state_dict())
    assert torch.equal(again(x), wanted)
    # a block that is skipped for good is not read, in training either, and gets no gradient
    for layer in layers[1::2]:
        layer.p = 0.0
        if layer.skipped:
            nn.init.constant_(layer.block.weight, torch.nan)
    layers.train()(x).sum().backward()
    assert torch.equal(layers(x), wanted)
    assert [layer.block.weight.grad is None for layer in layers[1::2]] == skipped


def test_nothing_is_drawn_where_nothing_is_left_to_chance():
    always, never = SkipLayer(Counted(), 0.0), SkipLayer(Counted(), 0.5)
    never.skipped = True
    torch.manual_seed(0)
    wanted = torch.rand(())
    torch.manual_seed(0)
    never(always(torch.zeros(2)))
    assert torch.equal(torch.rand(()), wanted)


def test_the_draw_is_the_hosts():
    layer = SkipLayer(Counted(), 0.5).train()
    with torch.device("meta"):
        layer(torch.zeros(2))
        assert layer.state_dict()["_extra_state"].device.type == "cpu"


def test_blocks_of_nodes_and_edges():
    layer = SkipLayer(Counted(), passes=2)
    x, e = torch.zeros(2), torch.ones(3)
    assert layer(x, e)[1].eq(2).all()
    layer.skipped = True
    found = layer(x, e)
    assert found[0] is x
    assert found[1] is e
    assert layer.block.calls == 1


@pytest.mark.parametrize("kind", ["node", "edge"])
def test_layers_are_taken_away_for_good(kind, tmp_path):
    types, edge_types, graph = inputs()
    torch.manual_seed(0)
    if kind == "node":
        config = GraphTransformerConfig(node_types=3, out_dim=2, dim=8, heads=2, layers=4)
        model, args = GraphTransformer(config), (types, graph)
    else:
        config = EdgeGraphTransformerConfig(dim=8, heads=2, layers=4, pe_dim=0)
        model, args = EdgeGraphTransformer(config), (types, edge_types, graph)
    passes = 1 if kind == "node" else 2
    model.layers = nn.ModuleList(SkipLayer(layer, 0.5, passes=passes) for layer in model.layers)
    model = model.to(DEVICE).eval()
    everything = model(*args)
    for i in (1, 3):
        model.layers[i].skipped = True
    out = model(*args)
    assert not torch.equal(out, everything)
    smaller = prune_layers(model)
    assert len(smaller.layers) == 2
    assert not any(isinstance(m, SkipLayer) for m in smaller.modules())
    close(smaller(*args), out, "y", 1e-6)
    assert len(model.layers) == 4
    # what is skipped is kept in a file
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for layer in model.layers:
        layer.skipped = False
    model.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert [layer.skipped for layer in model.layers] == [False, True, False, True]


def test_refusals():
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="p must be from 0 to 1, got"):
            SkipLayer(nn.Linear(2, 2), p)
    with pytest.raises(ValueError, match="passes must be positive, got 0"):
        SkipLayer(nn.Linear(2, 2), passes=0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.inner.block = SkipLayer(nn.Linear(2, 2))

    for passes, args in ((1, ()), (2, (torch.zeros(2, 2),))):
        layer = SkipLayer(nn.Linear(2, 2), passes=passes)
        wanted = (
            rf"the first {passes} arguments \(passes\) must be given by position, got {len(args)}"
        )
        with pytest.raises(TypeError, match=wanted):
            layer(*args, e=torch.zeros(2, 2))

    model = Model()
    assert isinstance(prune_layers(model).inner.block, nn.Linear)
    model.inner.block.skipped = True
    with pytest.raises(ValueError, match=r"'inner\.block' is skipped, but stands in no ModuleList"):
        prune_layers(model)
    with pytest.raises(ValueError, match="model itself is skipped: nothing is left"):
        prune_layers(model.inner.block)


def test_layers_in_layers_and_names():
    block = nn.Linear(2, 2)
    twice = SkipLayer(SkipLayer(block))
    assert isinstance(prune_layers(twice), nn.Linear)
    named = nn.Sequential()
    for name in ("first", "second", "third"):
        named.add_module(name, SkipLayer(SkipLayer(nn.Linear(2, 2))))
    named.second.block.skipped = True
    assert [n for n, _ in prune_layers(named).named_children()] == ["first", "third"]
    assert isinstance(prune_layers(named).third, nn.Linear)


def test_a_path_is_dropped_for_whole_graphs():
    torch.manual_seed(0)
    sizes = torch.tensor([0, 3, 1, 7] * 500)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    y = torch.rand(int(offsets[-1]), 2, dtype=FP64).add(1).requires_grad_()
    drop = DropPath(0.25)
    out = drop(y, offsets)
    (grad,) = torch.autograd.grad(out.sum(), y)
    torch.testing.assert_close(out, grad * y)
    for a, b in pairwise(offsets.tolist()):
        assert len(grad[a:b].unique()) <= 1
    assert {round(v, 9) for v in grad.unique().tolist()} == {0, round(4 / 3, 9)}
    kept = (grad[offsets[:-1][sizes > 0], 0] > 0).double().mean()
    assert abs(kept - 0.75) < 0.04
    assert drop.eval()(y, offsets) is y
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"p must be from 0 to below 1, got {p}"):
            DropPath(p)
    with pytest.raises(ValueError, match="offsets"):
        DropPath(0.5)(y, offsets[:-1])

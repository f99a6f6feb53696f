"""GradualPruning: the schedule, exact counts, and only what is asked for."""

import copy
import math

import pytest
import torch
from attention_cases import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from fastgt.pruning import GradualPruning


def model(seed=0):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
    return made.to(DEVICE)


def train(net, pruning, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(steps):
        x = torch.randn(5, 6, generator=generator).to(DEVICE)
        loss = net(x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruning.step()


@given(
    final=st.floats(0.0, 1.0),
    initial=st.floats(0.0, 0.5),
    begin=st.integers(0, 4),
    length=st.integers(1, 9),
    every=st.integers(1, 4),
)
def test_the_cubic_schedule_to_one_weight(final, initial, begin, length, every):
    initial, end = min(initial, final), begin + length
    net = model()
    pruning = GradualPruning(net, final, initial=initial, begin=begin, end=end, every=every)
    wanted = 0 if begin else round(initial * 72)
    assert pruning.pruned() == wanted
    for t in range(1, end + 3):
        train(net, pruning, 1, t)
        if begin <= t <= end and ((t - begin) % every == 0 or t == end):
            share = final + (initial - final) * (1 - (t - begin) / length) ** 3
            wanted = max(wanted, round(share * 72))
        assert pruning.pruned() == wanted
    assert pruning.pruned() == round(final * 72)
    pruning.finish()
    assert sum(int((net[i].weight == 0).sum()) for i in (0, 3)) == round(final * 72)


def test_the_share_between_changes_and_outside():
    pruning = GradualPruning(model(), 0.8, initial=0.1, begin=2, end=6)
    found = []
    for _ in range(9):
        found.append(pruning.share())
        pruning.step()
    cubes = [0.8 - 0.7 * left**3 for left in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert found == pytest.approx([0, 0, *cubes, 0.8, 0.8])


@given(final=st.floats(0.2, 0.9), every=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_at_every_change_the_smallest_that_are_left_go(final, every, seed):
    net = model(seed)
    pruning = GradualPruning(net, final, end=6, every=every)
    alive = torch.ones(72, dtype=torch.bool, device=DEVICE)
    for t in range(6):
        train(net, pruning, 1, seed + t)
        now = torch.cat([net[i].weight_orig.detach().abs().flatten() for i in (0, 3)])
        gone = sorted(alive.nonzero().flatten().tolist(), key=lambda i: float(now[i]))
        alive[gone[: pruning.pruned() - int((~alive).sum())]] = False
        masks = torch.cat([net[i].weight_mask.flatten() for i in (0, 3)])
        assert torch.equal(masks == 1, alive)
        for i in (0, 3):
            assert torch.equal(net[i].weight, net[i].weight_orig * net[i].weight_mask)


def test_the_optimizer_is_not_stepped_and_sees_the_same_parameters():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    pruning = GradualPruning(net, 0.5, end=1)
    net(torch.ones(2, 6, device=DEVICE)).sum().backward()
    pruning.step()
    now = optimizer.param_groups[0]["params"]
    assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
    assert {id(p) for p in now} == {id(p) for p in net.parameters()}
    # what is masked gets no gradient
    net.zero_grad()
    net(torch.ones(2, 6, device=DEVICE)).square().sum().backward()
    assert not net[0].weight_orig.grad[net[0].weight_mask == 0].any()
    assert net[0].weight_orig.grad.any()


def test_one_mask_a_layer_however_many_changes():
    net = model()
    pruning = GradualPruning(net, 0.8, end=30, every=1)
    copy.deepcopy(net)
    train(net, pruning, 30)
    for i in (0, 3):
        (hook,) = net[i]._forward_pre_hooks.values()
        assert isinstance(hook, prune.Identity)
    x = torch.ones(2, 6, device=DEVICE)
    other = copy.deepcopy(net)
    assert torch.equal(other(x), net(x))


def test_the_smallest_of_all_layers_go_and_stay():
    net = model()
    with torch.no_grad():
        net[0].weight.mul_(10)  # the other layer's are the small ones
    small = torch.cat([m.weight.detach().abs().flatten() for m in (net[0], net[3])])
    cut = small.sort().values[20]
    wanted = [m.weight.detach().abs() >= cut for m in (net[0], net[3])]
    norms, biases = net[1].weight.clone(), net[0].bias.clone()
    pruning = GradualPruning(net, 20 / 72, end=1)
    pruning.step()
    for m, mask in zip((net[0], net[3]), wanted, strict=True):
        assert torch.equal(m.weight_mask.bool(), mask)
        assert torch.equal(m.weight == 0, ~mask)
    assert torch.equal(net[1].weight, norms)
    assert torch.equal(net[0].bias, biases)
    train(net, pruning, 5)
    assert all(not m.weight[~mask].any() for m, mask in zip((net[0], net[3]), wanted, strict=True))


def test_the_weights_are_those_that_the_optimizer_left():
    """Not those of the forward before its step."""
    net = nn.Linear(4, 1, bias=False).to(DEVICE)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    pruning = GradualPruning(net, 0.25, end=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    net(torch.tensor([[0.0, 0.0, 0.0, 3.9]], device=DEVICE)).sum().backward()
    optimizer.step()  # the last becomes 0.1
    pruning.step()
    assert net.weight_mask.tolist() == [[1.0, 1.0, 1.0, 0.0]]


def test_it_goes_on_where_it_stood():
    net, other = model(), model(1)
    pruning, resumed = (GradualPruning(m, 0.7, end=9, every=2) for m in (net, other))
    train(net, pruning, 5)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(pruning.state_dict())
    for m, p in ((net, pruning), (other, resumed)):
        train(m, p, 6, seed=4)
        p.finish()
    for key, x in net.state_dict().items():
        assert torch.equal(other.state_dict()[key], x), key
    assert set(net.state_dict()) == set(model().state_dict())
    assert sum(int((net[i].weight == 0).sum()) for i in (0, 3)) == round(0.7 * 72)
    assert not prune.is_pruned(net)


def test_refusals():
    for initial, final in ((-0.1, 0.5), (0.6, 0.5), (0.0, 1.1), (0.0, math.nan)):
        with pytest.raises(ValueError, match="initial and final must be from 0 to 1 and rise"):
            GradualPruning(model(), final, initial=initial, end=5)
    for begin, end, every in ((5, 5, 1), (-1, 5, 1), (0, 5, 0)):
        with pytest.raises(ValueError, match="begin must be before end, and every positive, got"):
            GradualPruning(model(), 0.5, begin=begin, end=end, every=every)
    with pytest.raises(ValueError, match=r"model has no nn\.Linear layer"):
        GradualPruning(nn.LayerNorm(3), 0.5, end=5)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="'0' and '1' share their weight"):
        GradualPruning(tied, 0.5, end=5)
    net = model()
    GradualPruning(net, 0.5, end=5)
    with pytest.raises(ValueError, match="'0' is pruned already"):
        GradualPruning(net, 0.5, end=5)
    tied = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="'0' and '1' share their weight"):
        GradualPruning(tied, 0.5, end=5)
    heads = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)})
    with pytest.raises(ValueError, match=r"'a' is an nn\.MultiheadAttention, which reads"):
        GradualPruning(heads, 0.5, end=5)
    assert not prune.is_pruned(heads)
    net = model()
    pruning = GradualPruning(net, 0.5, end=5)
    pruning.finish()
    for call in (pruning.step, pruning.pruned, pruning.finish):
        with pytest.raises(RuntimeError, match=r"finish\(\) has been called"):
            call()


def test_layers_of_transformer_conv_learn_while_their_weights_are_masked():
    """It multiplies with the weights of some layers without calling them.

    They are torch-geometric's own linear layers, which torch.nn.utils.prune masks as any.
    """
    pytest.importorskip("torch_geometric")
    from fastgt import Graph
    from fastgt.pyg import TransformerConv

    torch.manual_seed(0)
    conv = TransformerConv(8, 4, heads=2, edge_dim=3, beta=True).to(DEVICE)
    layers = [conv.lin_edge, conv.lin_beta, conv.lin_query]
    for layer in layers:
        prune.l1_unstructured(layer, "weight", 0.5)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.01)
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 2, 2], [1, 2, 0, 1]], device=DEVICE))
    x, e = torch.randn(3, 8, device=DEVICE), torch.randn(4, 3, device=DEVICE)
    for _ in range(5):
        optimizer.zero_grad()
        conv(x, graph, e).square().sum().backward()
        for layer in layers:
            assert layer.weight_orig.grad.any()
            assert not layer.weight_orig.grad[layer.weight_mask == 0].any()
        optimizer.step()
    out = conv(x, graph, e)
    assert conv.ran() == "fused"
    for layer in layers:
        prune.remove(layer, "weight")
    torch.testing.assert_close(conv(x, graph, e), out)

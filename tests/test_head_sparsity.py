"""Heads that are exchanged while a model trains."""

import copy

import pytest
import torch
from attention_cases import DEVICE, close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastgt.nn import HeadGate, LinearAttention, TopKHeadGate
from fastgt.pruning import HeadSparsity


@settings(max_examples=15, suppress_health_check=list(HealthCheck))
@given(
    heads=st.integers(1, 8),
    active=st.floats(0.2, 1.0),
    exchange=st.sampled_from([0.0, 0.3, 1.0]),
    every=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_as_many_heads_stay_active(heads, active, exchange, every, seed):
    if not round(active * heads):
        return
    torch.manual_seed(seed)
    layers = nn.ModuleList(
        LinearAttention(
            2 * heads, heads, head_gate=HeadGate(torch.ones(heads) > 0), dense_gate_grad=True
        )
        for _ in range(2)
    ).to(DEVICE)
    sparsity = HeadSparsity(layers, active, steps=8, every=every, exchange=exchange, scored=1)
    masks, x = [], torch.randn(5, 2 * heads, device=DEVICE)
    for _ in range(9):
        layers[1](layers[0](x)).square().sum().backward()
        sparsity.step()
        masks.append(torch.stack([layer.head_gate.mask for layer in layers]).clone())
        assert (masks[-1].sum(1) == round(active * heads)).all()
    # after the last step, nothing is exchanged
    assert torch.equal(masks[-1], masks[-2])
    if exchange == 0:
        assert torch.equal(masks[0], masks[-1])


@pytest.mark.parametrize("seed", range(8))
def test_the_head_that_matters_least_dies_and_the_one_that_would_help_most_grows(seed):
    torch.manual_seed(seed)
    gate = HeadGate(torch.ones(5))
    layer = LinearAttention(10, 5, head_gate=gate, dense_gate_grad=True).to(DEVICE)
    sparsity = HeadSparsity(layer, 0.6, steps=1000, every=3, exchange=0.3, scored=2)
    gate.mask.copy_(torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0]))
    before = gate.mask.clone()
    scores = []
    for step in range(3):
        x = torch.randn(6, 10, device=DEVICE)
        free = before.clone().requires_grad_()
        plain = LinearAttention(10, 5, dense_gate_grad=True).to(DEVICE)
        plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "gate" not in k})
        (grad,) = torch.autograd.grad(plain(x, head_gate=free).square().sum(), free)
        scores.append(grad if step else torch.zeros_like(grad))  # the first is not scored
        layer(x).square().sum().backward()
        sparsity.step()
    total, growth = sum(scores).abs(), sum(g.abs() for g in scores)
    dead = min((0, 2, 3), key=lambda h: total[h])
    grown = max((1, 4), key=lambda h: growth[h])
    wanted = before.clone()
    wanted[dead], wanted[grown] = 0, 1
    assert torch.equal(gate.mask, wanted)
    assert not torch.stack(sparsity.state_dict()["sums"]).any()  # the next scores are their own


def test_steps_that_are_not_scored_are_sparse():
    gate = HeadGate(torch.ones(4))
    layer = LinearAttention(8, 4, head_gate=gate, dense_gate_grad=True).to(DEVICE)
    sparsity = HeadSparsity(layer, 0.5, steps=100, every=4, scored=1)
    with torch.no_grad():
        off = (gate.mask == 0).repeat_interleave(2)
        layer.v.weight[off] = torch.nan
    x = torch.randn(6, 8, device=DEVICE)
    for _ in range(3):
        out = layer(x)
        assert out.isfinite().all()
        out.sum().backward()
        layer.zero_grad()
        sparsity.step()
    assert layer(x).isnan().any()  # the fourth is scored: all heads are computed
    layer.eval()
    assert layer(x).isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_overflows_does_not_count(bad):
    gate = HeadGate(torch.ones(8))
    layer = LinearAttention(16, 8, head_gate=gate, dense_gate_grad=True).to(DEVICE)
    sparsity = HeadSparsity(layer, 0.5, steps=300, every=2, scored=2)
    x = torch.randn(5, 16, device=DEVICE)
    for i in range(8):
        (layer(x).square().sum() * (bad if i % 3 == 0 else 1.0)).backward()
        sparsity.step()
        assert torch.stack(sparsity.state_dict()["sums"]).isfinite().all()
        assert int(gate.mask.sum()) == 4


@pytest.mark.parametrize("how", ["twice", "accumulated", "checkpointed", "compiled", "looked at"])
def test_scores_are_of_all_that_reached_the_gates(how):
    torch.manual_seed(0)
    gate = HeadGate(torch.ones(4) > 0)
    layer = LinearAttention(8, 4, head_gate=gate, dense_gate_grad=True).to(DEVICE)
    sparsity = HeadSparsity(layer, 0.5, steps=300, every=9, scored=9)
    x, y = torch.randn(2, 5, 8, device=DEVICE)
    free = gate.mask.float().requires_grad_()
    plain = LinearAttention(8, 4, dense_gate_grad=True).to(DEVICE)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "gate" not in k})
    losses = plain(x, head_gate=free).sum() + plain(y, head_gate=free).square().sum()
    (wanted,) = torch.autograd.grad(losses, free)
    if how == "compiled":
        layer_or = torch.compile(layer, backend="aot_eager", fullgraph=True)
    elif how == "checkpointed":

        def layer_or(x):
            return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    else:
        layer_or = layer
    first, second = layer_or(x.requires_grad_()).sum(), layer_or(y).square().sum()
    if how == "accumulated":
        first.backward()
        second.backward()
    else:
        (first + second).backward()
    if how == "looked at":
        layer(x)
    sparsity.step()
    close(sparsity.state_dict()["sums"][0][0], wanted * gate.mask, "scores", 1e-4)


def test_nothing_is_scored_after_the_last_exchange():
    gate = HeadGate(torch.ones(4))
    layer = LinearAttention(8, 4, head_gate=gate, dense_gate_grad=True).to(DEVICE)
    sparsity = HeadSparsity(layer, 0.5, steps=3, every=1, scored=1)
    x = torch.randn(5, 8, device=DEVICE)
    for i in range(5):
        assert layer.gate_of(None, x).dense == (i < 3)
        layer(x).sum().backward()
        sparsity.step()


def test_sparsity_goes_on_where_it_stood():
    def start():
        torch.manual_seed(1)
        gates = HeadGate(torch.ones(6))
        layer = LinearAttention(12, 6, head_gate=gates, dense_gate_grad=True).to(DEVICE)
        return layer, HeadSparsity(layer, 0.5, steps=20, every=4, scored=3)

    def go(layer, sparsity, steps, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            x = torch.randn(5, 12, generator=generator).to(DEVICE)
            layer(x).square().sum().backward()
            sparsity.step()

    layer, sparsity = start()
    go(layer, sparsity, 6, 0)
    kept = copy.deepcopy((layer.state_dict(), sparsity.state_dict()))
    go(layer, sparsity, 10, 7)
    other, resumed = start()
    other.load_state_dict(kept[0])
    resumed.load_state_dict(kept[1])
    sums = resumed.state_dict()["sums"][0]
    assert sums.any()
    assert torch.equal(sums, kept[1]["sums"][0])
    go(other, resumed, 10, 7)
    assert torch.equal(other.head_gate.mask, layer.head_gate.mask)
    assert not torch.equal(kept[0]["head_gate.mask"], layer.head_gate.mask)


def test_refusals_of_sparsity():
    def attention(gate, **more):
        return LinearAttention(8, 4, head_gate=gate, **{"dense_gate_grad": True} | more)

    good = attention(HeadGate(torch.ones(4)))
    for active in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="active must be above 0, to 1, got"):
            HeadSparsity(good, active, steps=5)
    with pytest.raises(ValueError, match=r"active=0\.1 leaves '' none of its 4 heads"):
        HeadSparsity(good, 0.1, steps=5)
    with pytest.raises(ValueError, match=r"scored must be from 1 to every.*scored=5, every=3"):
        HeadSparsity(good, 0.5, steps=5, every=3, scored=5)
    with pytest.raises(ValueError, match=r"exchange must be from 0 to 1, got 1\.5"):
        HeadSparsity(good, 0.5, steps=5, exchange=1.5)
    with pytest.raises(TypeError, match="must be a HeadGate, got TopKHeadGate"):
        HeadSparsity(attention(TopKHeadGate(4, 2)), 0.5, steps=5)
    with pytest.raises(ValueError, match="needs dense_gate_grad=True"):
        HeadSparsity(attention(HeadGate(torch.ones(4)), dense_gate_grad=False), 0.5, steps=5)
    with pytest.raises(ValueError, match="no attention module with a HeadGate"):
        HeadSparsity(nn.Linear(3, 3), 0.5, steps=5)
    shared = HeadGate(torch.ones(4))
    with pytest.raises(ValueError, match="'1' shares its head_gate"):
        HeadSparsity(nn.ModuleList([attention(shared), attention(shared)]), 0.5, steps=5)
    sparsity = HeadSparsity(good, 0.5, steps=5, every=1, scored=1)
    with pytest.raises(RuntimeError, match="no backward has reached this gate"):
        sparsity.step()

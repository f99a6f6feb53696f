"""Gates of heads: their values, gradients and probabilities."""

import copy
import math

import pytest
import torch
from attention_cases import BF16, DEVICE, FP64, close
from hypothesis import given
from hypothesis import strategies as st

from fastgt import Graph, head_projection
from fastgt.nn import HardConcreteHeadGate, HeadGate, NeighborhoodAttention, TopKHeadGate

logit_rows = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 3.0]), min_size=1, max_size=6)


def test_a_fixed_gate_is_kept_with_the_model():
    gate = HeadGate(torch.tensor([1.0, 0.0, -0.5])).to(DEVICE)
    assert gate().tolist() == [1.0, 0.0, -0.5]
    assert not list(gate.parameters())
    other = HeadGate(torch.zeros(3)).to(DEVICE)
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other(), gate())
    assert HeadGate(torch.tensor([True, False]))().tolist() == [1.0, 0.0]
    assert HeadGate(torch.ones(3, device="meta")).mask.is_meta
    mask = torch.ones(2)
    gate = HeadGate(mask)
    mask[0] = 0
    assert gate().tolist() == [1.0, 1.0]


@given(logits=logit_rows, data=st.data())
def test_top_k_are_the_largest_the_first_of_equal_ones(logits, data):
    k = data.draw(st.integers(0, len(logits)))
    order = sorted(range(len(logits)), key=lambda h: (-logits[h], h))
    wanted = [float(h in order[:k]) for h in range(len(logits))]
    gate = TopKHeadGate(len(logits), k)
    with torch.no_grad():
        gate.logits.copy_(torch.tensor(logits))
    assert gate().tolist() == wanted
    rows = torch.tensor([logits, logits[::-1]])
    found = gate(rows)
    assert found[0].tolist() == wanted
    assert found.sum(-1).tolist() == [k, k]


def test_top_k_is_trained_straight_through():
    gate = TopKHeadGate(4, 2).double().to(DEVICE)
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([0.3, -1.0, 2.0, 0.1]))
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=FP64, device=DEVICE)
    (found,) = torch.autograd.grad(gate(), gate.logits, upstream)
    s = gate.logits.detach().sigmoid()
    close(found, upstream * s * (1 - s), "dlogits")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_no_draw_is_nan(dtype, monkeypatch):
    gate = HardConcreteHeadGate(2).to(dtype)
    for end, wanted in ((0.0, 0.0), (1.0, 1.0)):
        monkeypatch.setattr(torch, "rand_like", lambda x, end=end: torch.full_like(x, end))
        assert gate().tolist() == [wanted] * 2


@pytest.mark.parametrize("logit", [-3.0, -0.7, 0.0, 2.0])
def test_hard_concrete_probabilities_are_those_of_its_draws(logit):
    torch.manual_seed(0)
    gate = HardConcreteHeadGate(1, logit=logit).double()
    draws = gate(torch.full((200_000, 1), logit, dtype=FP64))
    probability = gate.penalty().item()
    bound = 5 * math.sqrt(0.25 / len(draws))
    assert abs((draws > 0).double().mean().item() - probability) < bound
    # P(gate = 1): s > (1 - gamma) / (zeta - gamma)
    one = torch.sigmoid(torch.tensor(logit - 2 / 3 * math.log(1.1 / 0.1), dtype=FP64)).item()
    assert abs((draws == 1).double().mean().item() - one) < bound
    assert ((draws >= 0) & (draws <= 1)).all()


def test_hard_concrete_outside_training():
    gate = HardConcreteHeadGate(3).eval()
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([-4.0, 0.0, 4.0]))
    found = gate()
    assert found[0] == 0
    assert found[2] == 1
    close(found[1], torch.tensor(0.5), "gate")
    assert torch.equal(found, gate())
    rows = torch.randn(5, 3)
    close(gate(rows), (1.2 * rows.sigmoid() - 0.1).clamp(0, 1), "gate")


def test_hard_concrete_derivatives():
    gate = HardConcreteHeadGate(4).double()

    def call(logits):
        torch.manual_seed(3)
        return gate(logits)

    logits = torch.tensor([-1.0, 0.2, 0.5, 1.0], dtype=FP64, requires_grad=True)
    assert torch.autograd.gradcheck(call, logits)
    assert torch.autograd.gradcheck(gate.penalty, logits)
    with torch.no_grad():
        gate.logits.copy_(logits)
    several = torch.stack([logits, logits - 1])
    close(gate.penalty(several), (gate.penalty() + gate.penalty(logits - 1)) / 2, "penalty")
    torch.manual_seed(0)
    draws = {gate()[1].item() for _ in range(5)}
    assert len(draws) == 5


def test_a_penalty_takes_useless_heads_away():
    """Of four heads one carries the target: the others' gates go to exactly 0."""
    torch.manual_seed(0)
    gate = HardConcreteHeadGate(4).to(DEVICE)
    weight = torch.ones(1, 4, 2, device=DEVICE)
    optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
    x = torch.randn(64, 4, 2, device=DEVICE)
    target = x[:, 2].sum(1, keepdim=True)
    for _ in range(300):
        y = head_projection(x * gate()[:, None], weight)
        loss = (y - target).square().mean() + 0.5 * gate.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = gate.eval()()
    assert found[2] > 0.9
    assert found[[0, 1, 3]].tolist() == [0.0] * 3


@pytest.mark.parametrize("gate", [TopKHeadGate(3, 1), HardConcreteHeadGate(3)])
def test_copies_and_states(gate):
    with torch.no_grad():
        gate.logits.copy_(torch.tensor([0.1, 3.0, -1.0]))
    other = copy.deepcopy(gate)
    with torch.no_grad():
        other.logits.zero_()
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other.eval()(), gate.eval()())
    assert "heads=3" in repr(gate)


def test_refusals():
    with pytest.raises(TypeError, match="mask must be a tensor, got list"):
        HeadGate([1.0])
    with pytest.raises(ValueError, match=r"mask must be \[H\], got \[2, 2\]"):
        HeadGate(torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"mask must be floating point or bool, got torch\.int64"):
        HeadGate(torch.ones(2).long())
    with pytest.raises(ValueError, match=r"mask is NaN at heads \[1\]"):
        HeadGate(torch.tensor([1.0, torch.nan]))
    for k, heads in ((-1, 4), (5, 4), (0, 0)):
        with pytest.raises(ValueError, match=f"got k={k} and heads={heads}"):
            TopKHeadGate(heads, k)
    with pytest.raises(ValueError, match="heads must be positive, got 0"):
        HardConcreteHeadGate(0)
    with pytest.raises(ValueError, match="logit must be finite, got inf"):
        HardConcreteHeadGate(3, logit=math.inf)
    for gate in (TopKHeadGate(3, 1), HardConcreteHeadGate(3)):
        with pytest.raises(ValueError, match=r"logits must be \[..., H\] = \[..., 3\], got \[2\]"):
            gate(torch.zeros(2))


@pytest.mark.parametrize("autocast", [False, True])
def test_nan_of_a_node_reaches_no_other_through_the_projections_in_16_bits(autocast):
    """Every node attends to itself alone, in heads of an odd width."""
    torch.manual_seed(0)
    gate = HeadGate(torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0]))
    layer = NeighborhoodAttention(35, heads=5, head_gate=gate, bias=False)
    x = torch.randn(70, 35)
    x[1::2] = torch.nan
    loops = torch.arange(70).expand(2, -1)
    layer, x = layer.to(DEVICE), x.to(DEVICE)
    if not autocast:
        layer, x = layer.to(BF16), x.to(BF16)
    x.requires_grad_()
    with torch.autocast(DEVICE, BF16, enabled=autocast):
        out = layer(x, Graph.from_edge_index(loops.to(DEVICE), 70))
    (dx,) = torch.autograd.grad(out.float().sum(), x)
    assert out[::2].isfinite().all()
    assert dx[::2].isfinite().all()
    assert out[1::2].isnan().all()

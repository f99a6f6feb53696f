"""head_gate of linear_attention: a masked head is a head that is not there."""

import pytest
import torch
from attention_cases import BF16, DEVICE, FAST, FP32, FP64, all_close, close, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_cases import FORMS, MAPS, case, run_as
from torch._dynamo.testing import CompileCounterWithBackend

from fastgt import linear_attention

SIZES = (5, 0, 50, 18, 1)  # on both sides of the quadratic form's limit
IMPLS = ["reference", *FORMS]
GATES = st.sampled_from([0.0, 0.0, 1.0, -0.5, 2.0])


def attend(x, gate, form, **more):
    with run_as(form) as impl:
        return linear_attention(
            x.q, x.k, x.v, x.offsets, **x.options, head_gate=gate, impl=impl, **more
        )


def evaluate(x, gate, form, **more):
    """Output and gradients by name, of the gate's too where it is not bool."""
    leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]
    names = ["dq", "dk", "dv"]
    if gate.dtype != torch.bool:
        gate = gate.detach().clone().requires_grad_()
        leaves, names = [*leaves, gate], [*names, "dgate"]
    with run_as(form) as impl:
        o = linear_attention(*leaves[:3], x.offsets, **x.options, head_gate=gate, impl=impl, **more)
        grads = torch.autograd.grad(o, leaves, x.do)
    return {"o": o.detach()} | dict(zip(names, grads, strict=True))


def without(x, gate):
    """Graph by graph, from the heads alone that are active, in the order of ``evaluate``."""
    leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]
    gate = gate.detach().clone().requires_grad_()
    parts = []
    for g, (begin, end) in enumerate(x.bounds()):
        mine = gate[g] if gate.ndim == 2 else gate
        on = mine != 0
        out = torch.zeros_like(x.v[begin:end])
        if on.any() and begin < end:
            q, k, v = (t[begin:end, on] for t in leaves)
            part = linear_attention(q, k, v, **x.options, impl="reference")
            out = out.index_copy(1, on.nonzero().squeeze(1), part * mine[on][:, None])
        parts.append(out)
    o = torch.cat(parts)
    leaves = [*leaves, gate]
    grads = [torch.zeros_like(t) for t in leaves]
    if o.requires_grad:  # not where all heads are masked
        grads = torch.autograd.grad(o, leaves, x.do, materialize_grads=True)
    return {"o": o.detach()} | dict(zip(("dq", "dk", "dv", "dgate"), grads, strict=True))


@pytest.mark.parametrize("per_graph", [False, True])
@pytest.mark.parametrize("form", IMPLS)
def test_masked_is_removed(form, per_graph):
    few = form in ("triton", "pieces") and DEVICE == "cpu"

    @settings(max_examples=8 if few else 30, suppress_health_check=list(HealthCheck))
    @given(
        data=st.data(),
        seed=st.integers(0, 2**31),
        name=st.sampled_from(MAPS),
        heads=st.integers(1, 4),
        normalize=st.booleans(),
    )
    def check(data, seed, name, heads, normalize):
        x = case(seed, SIZES, heads=heads, d=9, dv=5, feature_map=name, normalize=normalize)
        rows = len(SIZES) if per_graph else 1
        gate = data.draw(st.lists(GATES, min_size=rows * heads, max_size=rows * heads))
        gate = torch.tensor(gate, dtype=FP64, device=DEVICE).view(rows, heads)
        gate = gate if per_graph else gate[0]
        all_close(evaluate(x, gate, form), without(x, gate), 1e-8)

    check()


@pytest.mark.parametrize("name", ["elu", "softmax"])
@pytest.mark.parametrize("form", IMPLS)
def test_nan_in_a_masked_head_changes_nothing(form, name):
    x = case(1, SIZES, heads=3, d=9, dv=5, feature_map=name)
    gate = torch.rand(len(SIZES), 3, dtype=FP64, device=DEVICE) + 0.5
    gate[2, 1], gate[3], gate[0, 0] = 0, 0, 0
    clean = evaluate(x, gate, form)
    sizes = torch.tensor(SIZES, device=DEVICE)
    off = (gate == 0).repeat_interleave(sizes, 0)
    for t in (x.q, x.k, x.v):
        t[off] = torch.nan
    all_close(evaluate(x, gate, form), clean)
    x.do[off] = torch.nan
    found = evaluate(x, gate != 0, form)
    assert "dgate" not in found
    for key, g in found.items():
        assert not g[off].any(), key


@pytest.mark.parametrize("shape", ["H", "GH"])
@pytest.mark.parametrize("form", IMPLS)
def test_a_gate_of_0_gets_the_exact_gradient_on_request(form, shape):
    x = case(2, SIZES, heads=3, d=9, dv=5)
    gate = torch.tensor([1.0, 0.0, -0.5], dtype=FP64, device=DEVICE)
    gate = gate if shape == "H" else gate.expand(len(SIZES), -1).clone()
    plain = linear_attention(x.q, x.k, x.v, x.offsets, **x.options, impl="reference")
    each = (x.do * plain).sum(2)  # of a node and a head
    wanted = torch.stack([each[a:b].sum(0) for a, b in x.bounds()])
    wanted = wanted.sum(0) if shape == "H" else wanted
    close(evaluate(x, gate, form, dense_gate_grad=True)["dgate"], wanted, "dgate")
    sparse = evaluate(x, gate, form)
    close(sparse["dgate"], torch.where(gate == 0, 0, wanted), "dgate")
    close(sparse["o"], evaluate(x, gate, form, dense_gate_grad=True)["o"], "o")


@pytest.mark.parametrize("form", IMPLS)
def test_all_masked_and_no_nodes(form):
    x = case(3, SIZES, heads=2, d=4, dv=3)
    gate = torch.zeros(2, dtype=FP64, device=DEVICE)
    for name, t in evaluate(x, gate, form).items():
        assert not t.any(), name
    x = case(3, (0, 0), heads=2, d=4, dv=3)
    assert attend(x, gate, form).shape == (0, 2, 3)
    x = case(3, None, heads=2, d=4, dv=3)
    same_bits({"o": attend(x, torch.ones_like(gate), form)}, {"o": attend(x, None, form)})


@pytest.mark.parametrize("impl", FAST)
def test_second_derivatives(impl):
    x = case(4, (3, 2), heads=2, d=3, dv=2)
    gate = torch.tensor([0.7, 0.0], dtype=FP64, device=DEVICE, requires_grad=True)
    leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]

    def call(*t):
        # a gate of 0 is not differentiable: it has no derivative to compare with
        return linear_attention(*t[:3], x.offsets, head_gate=t[3] * (t[3] != 0), impl=impl)

    on = torch.autograd.grad(call(*leaves, gate).sum(), gate, create_graph=True)[0]
    (second,) = torch.autograd.grad(on[0], leaves[2])
    assert second.isfinite().all()
    assert second[:, 0].any()
    assert not second[:, 1].any()
    fixed = gate.detach()
    assert torch.autograd.gradgradcheck(lambda *t: call(*t, fixed), leaves)


@pytest.mark.parametrize("impl", FAST)
def test_opcheck(impl):
    x = case(0, (3, 0, 20), heads=2, d=12, dv=9, dtype=FP32)
    fwd, bwd = torch.ops.fastgt.linear_attention_fwd, torch.ops.fastgt.linear_attention_bwd
    mask = torch.tensor([[True, False]], device=DEVICE)
    call = x.q, x.k, x.v, "elu", None, x.offsets, mask, 1e-6, True
    torch.library.opcheck(fwd.default, (impl, *call))
    o, tops = fwd(impl, *call)
    torch.library.opcheck(bwd.default, (impl, o, tops, *call, True, True, True))


@pytest.mark.parametrize("impl", FAST)
def test_compiles_once_for_all_gates(impl):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_attention, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for seed, active in enumerate([(1.0, 0.0), (0.0, 2.0), (0.0, 0.0)]):
        x = case(seed, (5, 20 + seed, 2), d=12, dv=9, dtype=FP32)
        gate = torch.tensor(active, device=DEVICE)
        out = compiled(x.q, x.k, x.v, x.offsets, head_gate=gate, impl=impl)
        expected = linear_attention(x.q, x.k, x.v, x.offsets, head_gate=gate, impl=impl)
        same_bits({"o": out}, {"o": expected})
        counts.append(counter.frame_count)
    assert counts[1] == counts[2]


@pytest.mark.parametrize("impl", FAST)
def test_16_bits_and_a_gate_of_32(impl):
    x = case(5, SIZES, heads=3, d=9, dv=5, dtype=BF16)
    gate = torch.tensor([1.0, 0.0, 0.3], dtype=FP32, device=DEVICE)
    found = evaluate(x, gate, impl)
    assert found["o"].dtype == BF16
    assert found["dgate"].dtype == FP32
    wide = case(5, SIZES, heads=3, d=9, dv=5)
    wanted = evaluate(wide, gate.double(), "reference")["dgate"]
    assert (found["dgate"] - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_refusals():
    x = case(6, (3, 2), heads=2, d=3, dv=2, dtype=FP32)

    def refused(error, message, gate):
        with pytest.raises(error, match=message):
            linear_attention(x.q, x.k, x.v, x.offsets, head_gate=gate)

    one = torch.ones(2, device=DEVICE)
    refused(TypeError, "head_gate must be a tensor, got list", [1.0, 0.0])
    refused(TypeError, r"head_gate must be float16.*got torch\.int64", one.long())
    for shape in ((3,), (1, 2), (2, 3), (2, 2, 1)):
        message = r"head_gate must be \[H\] = \[2\] or \[G, H\] = \[2, 2\], got"
        refused(ValueError, message, torch.ones(shape, device=DEVICE))
    refused(ValueError, "head_gate is on meta but the nodes are on", one.to("meta"))
    if DEVICE == "cpu":
        refused(ValueError, r"head_gate is NaN at heads \[1\]", torch.tensor([0.0, torch.nan]))
        nan = torch.tensor([[0.0, 1.0], [torch.nan, 1.0]])
        refused(ValueError, r"head_gate is NaN at graph and head \[\[1, 0\]\]", nan)

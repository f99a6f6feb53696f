"""head_projection against the layer whose masked heads are gone, in every implementation."""

import laws
import pytest
import torch
from attention_cases import (
    BF16,
    DEVICE,
    FAST,
    FP16,
    FP32,
    FP64,
    LAYOUTS,
    all_close,
    arrange,
    close,
    same_bits,
)
from hypothesis import strategies as st
from problems import OpUnderTest
from test_attention_execution import Calls
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import linear

from fastgt import head_projection
from fastgt.testing import assert_as_accurate

IMPLS = [*FAST, "reference"]


def case(seed=0, n=9, active=(1, 0, 1), d=5, c=7, *, into=True, biased=True, dtype=FP64, layout=""):
    """-> leaves x, weight and bias or None, the gate, and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    h = len(active)

    def tensor(*shape):
        x = torch.randn(shape, generator=generator, dtype=FP64)
        x = x.to(DEVICE, dtype)
        return (arrange(x, layout) if len(shape) > 1 else x).requires_grad_()

    x, weight = (tensor(n, c), tensor(h, d, c)) if into else (tensor(n, h, d), tensor(c, h, d))
    bias = (tensor(h, d) if into else tensor(c)) if biased else None
    gate = torch.tensor(active, dtype=FP32, device=DEVICE)
    do = tensor(n, h, d).detach() if into else tensor(n, c).detach()
    return x, weight, bias, gate, do


def evaluate(inputs, impl, dtype=None):
    """Output and gradients by name."""
    x, weight, bias, gate, do = inputs
    leaves = [t for t in (x, weight, bias) if t is not None]
    if dtype is not None:
        leaves = [t.detach().to(dtype).requires_grad_() for t in leaves]
    out = head_projection(*leaves[:2], *(leaves[2:] or [None]), gate, impl=impl)
    grads = torch.autograd.grad(out, leaves, do.to(out.dtype))
    names = ("dx", "dweight", "dbias")[: len(leaves)]
    return {"out": out.detach()} | dict(zip(names, grads, strict=True))


def without(inputs):
    """The same, by a plain linear layer that has the active heads only; the others get zeros."""
    x, weight, bias, gate, do = inputs
    into, on = x.ndim == 2, gate != 0
    leaves = [t for t in (x, weight, bias) if t is not None]
    if into:
        part = linear(x, weight[on].flatten(0, 1), None if bias is None else bias[on].flatten())
        out = x.new_zeros(len(x), *weight.shape[:2])
        out[:, on] = part.view(len(x), int(on.sum()), weight.shape[1])
    else:
        out = linear(x[:, on].flatten(1), weight[:, on].flatten(1), bias)
    grads = torch.autograd.grad(out, leaves, do)
    names = ("dx", "dweight", "dbias")[: len(leaves)]
    return {"out": out.detach()} | dict(zip(names, grads, strict=True))


@st.composite
def cases(draw, impl, **fixed):
    small = impl == "triton" and DEVICE == "cpu"
    choices = {
        "seed": st.integers(0, 2**31),
        "n": st.integers(0, 70 if small else 200),
        "active": st.lists(st.sampled_from([0, 1, 1, 0.5, -2]), min_size=1, max_size=6),
        "d": st.sampled_from([1, 5, 16, 24, 40]),
        "c": st.sampled_from([1, 7, 32, 50, 65]),
        "into": st.booleans(),
        "biased": st.booleans(),
        "dtype": st.sampled_from([FP64, FP32, BF16, FP16]),
        "layout": st.sampled_from(LAYOUTS),
    }
    return case(**{name: draw(s) for name, s in choices.items() if name not in fixed}, **fixed)


def results(inputs, impl):
    """The output by name, connected to the inputs."""
    return {"out": head_projection(*inputs[:4], impl=impl)}


HEAD_PROJECTION = OpUnderTest(
    "head_projection", IMPLS, cases, lambda count, impl: count, results, evaluate, without
)


test_masked_is_removed = HEAD_PROJECTION.obeys(laws.equals_its_oracle, 60, dtype=FP64)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_as_accurate_as_eager(impl, dtype):
    HEAD_PROJECTION.check(laws.as_accurate_as_eager, 25, impl, dtype=dtype)


@pytest.mark.parametrize("into", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_nan_in_a_masked_head_changes_nothing(impl, into):
    inputs = case(1, 70, (1, 0, 0.5, 0), 9, 13, into=into)
    clean = evaluate(inputs, impl)
    x, weight, bias, gate, do = (t.detach().clone() for t in inputs)
    off = gate == 0
    if into:
        weight[off], bias[off], do[:, off] = torch.nan, torch.nan, torch.nan
    else:
        x[:, off], weight[:, off] = torch.nan, torch.nan
    leaves = (t.requires_grad_() for t in (x, weight, bias))
    all_close(evaluate((*leaves, gate, do), impl), clean)


@pytest.mark.parametrize("into", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_nan_of_a_node_stays_out_of_masked_heads_and_other_nodes(impl, into):
    inputs = case(1, 70, (1, 0, 0.5, 0), 9, 13, into=into)
    clean = head_projection(*inputs[:4], impl=impl)
    x = inputs[0].detach().clone()
    x[3] = torch.nan
    found = head_projection(x, *inputs[1:4], impl=impl)
    on = inputs[3] != 0
    assert found[3, on].isnan().all() if into else found[3].isnan().all()
    assert not into or not found[3, ~on].any()
    found = found.detach().clone()
    found[3] = torch.where(found[3].isnan(), clean[3], found[3])
    close(found, clean.detach(), "out")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("into", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_nan_beside_a_row_of_16_bits_reaches_no_other(impl, dtype, into, gated):
    """Every other node is NaN, and so is what surrounds a view; the others' rows stay finite."""
    interpreted = impl == "triton" and DEVICE == "cpu"
    for n, d, c, layout in (
        (20, 3, 35, "contiguous"),
        (70, 17, 65, "sliced"),
        (70, 31, 34, "contiguous"),
        (200, 11, 47, "sliced"),
        (200, 1, 3, "contiguous"),
    )[: 1 if interpreted else 5]:
        x, weight, bias, gate, do = case(0, n, (1, 0, 1), d, c, into=into, dtype=dtype)
        gate = gate if gated else None
        laid = [arrange(spoilt(t.detach()), layout).requires_grad_() for t in (x, do)]
        out = head_projection(laid[0], weight, bias, gate, impl=impl)
        (dx,) = torch.autograd.grad(out, laid[0], laid[1])
        clean = head_projection(x, weight, bias, gate, impl=impl)
        (clean_dx,) = torch.autograd.grad(clean, x, do)
        for found, wanted in ((out, clean), (dx, clean_dx)):
            close(found[::2].double(), wanted[::2].double(), "", 0.05)


def spoilt(x):
    x = x.clone()
    x[1::2] = torch.nan
    return x


@pytest.mark.parametrize("into", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_nan_of_a_node_stays_out_of_the_gradients_of_masked_heads(impl, into):
    x, weight, bias, gate, do = case(1, 70, (1, 0, 0.5, 0), 9, 13, into=into)
    nodes = x.detach().clone()
    (nodes if into else do)[3] = torch.nan
    found = evaluate((nodes.requires_grad_(), weight, bias, gate, do), impl)
    off = gate == 0
    for name in ("dweight", "dbias") if into else ("dweight",):
        g = found[name] if into else found[name].transpose(0, 1)
        assert not g[off].any(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_all_masked_or_none(impl):
    for into in (True, False):
        x, weight, bias, gate, do = case(2, 6, (0, 0), 4, 3, into=into)
        found = evaluate((x, weight, bias, gate, do), impl)
        wanted = torch.zeros_like(do) if into else bias.detach().expand(6, -1)
        assert torch.equal(found["out"], wanted)
        assert not found["dx"].any()
        assert not found["dweight"].any()
        ones = torch.ones_like(gate)
        dense = head_projection(x, weight, bias, impl=impl)
        close(head_projection(x, weight, bias, ones, impl=impl), dense, "out")
        close(head_projection(x, weight, bias, ones != 0, impl=impl), dense, "out")


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_a_sum_over_many_nodes_is_made_in_chunks(impl, dtype):
    """Of which the last one is not full; and the same bits every time."""
    inputs = case(3, 1203, (1, 0, 1), 5, 6, dtype=dtype)
    laws.as_accurate_as_eager(HEAD_PROJECTION, impl, inputs)
    laws.the_same_bits_every_time(HEAD_PROJECTION, impl, inputs, 3)


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU path")
@pytest.mark.parametrize("into", [True, False])
@pytest.mark.parametrize("active", [(1, 0, 1, 1), (0, 1, 1, 0), (1, 1, 1, 1)], ids=str)
def test_a_cpu_takes_some_nodes_at_a_time(active, into, monkeypatch):
    monkeypatch.setattr("fastgt.cpu.head_projection._NODES", 16)
    for dtype in (FP64, FP16):
        inputs = case(3, 50, active, 5, 6, into=into, dtype=dtype)
        found, wanted = evaluate(inputs, "cpp"), evaluate(inputs, "reference")
        if dtype == FP64:
            all_close(found, wanted)
            continue
        truth = evaluate(inputs, "reference", FP64)
        for name, x in found.items():
            assert_as_accurate(x, wanted[name], truth[name], name, 2.0 + (name != "out"))


@pytest.mark.parametrize("impl", FAST)
def test_chunks_that_cancel_are_not_rounded_before(impl):
    x, weight, bias, gate, do = (t.detach() for t in case(3, 1200, (1, 0, 1), 5, 6, dtype=FP16))
    sign = torch.where(torch.arange(1200, device=DEVICE) < 600, 6.0, -6.0)
    x, do = 6 + x / 100, (sign[:, None, None] + do / 100).half()
    inputs = (*(t.requires_grad_() for t in (x, weight, bias)), gate, do)
    found, eager = evaluate(inputs, impl), evaluate(inputs, "reference")
    name = "dweight"
    assert_as_accurate(found[name], eager[name], evaluate(inputs, "reference", FP64)[name], name)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("into", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_derivatives_of_any_order(impl, into, biased):
    x, weight, bias, gate, _ = case(4, 3, (0, 1, 1), 2, 3, into=into, biased=biased)
    leaves = [t for t in (x, weight, bias) if t is not None]

    def call(x, weight, bias=None):
        return head_projection(x, weight, bias, gate, impl=impl)

    fast = {"fast_mode": True} if impl == "triton" else {}
    assert torch.autograd.gradcheck(call, leaves, **fast)
    assert torch.autograd.gradgradcheck(call, leaves, **fast)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("into", [True, False])
@pytest.mark.parametrize("impl", FAST)
def test_only_some_inputs_require_gradients(impl, into, which):
    inputs = case(5, 11, (1, 0, 1), into=into)
    full = evaluate(inputs, impl)
    leaves = [t.detach().clone().requires_grad_(i in which) for i, t in enumerate(inputs[:3])]
    out = head_projection(*leaves, inputs[3], impl=impl)
    wanted = [leaves[i] for i in which]
    for i, g in zip(which, torch.autograd.grad(out, wanted, inputs[4]), strict=True):
        close(g, full[("dx", "dweight", "dbias")[i]], str(i))


@pytest.mark.parametrize("impl", FAST)
def test_opcheck(impl):
    ops = torch.ops.fastgt
    heads = torch.tensor([0, 2, 1, 2], dtype=torch.int32, device=DEVICE)
    x, weight, bias, _, _ = case(6, 9, dtype=FP32)
    y = case(6, 9, into=False, dtype=FP32)[0]
    torch.library.opcheck(ops.head_expand.default, (impl, x, weight, bias, heads))
    torch.library.opcheck(ops.head_contract.default, (impl, y, weight, None, heads))
    torch.library.opcheck(ops.head_outer.default, (impl, y, x, heads))


@pytest.mark.parametrize("impl", FAST)
def test_compiles_once_for_all_sizes_and_gates(impl):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(head_projection, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for seed, (n, active) in enumerate([(9, (1, 0, 1)), (20, (0, 0, 1)), (33, (1, 1, 1))]):
        inputs = case(seed, n, active, dtype=FP32)
        out = compiled(*inputs[:4], impl=impl)
        grads = torch.autograd.grad(out, inputs[:3], inputs[4])
        expected = evaluate(inputs, impl)
        same_bits(dict(zip(("dx", "dweight", "dbias"), grads, strict=True)), {
            name: expected[name] for name in ("dx", "dweight", "dbias")
        })  # fmt: skip
        counts.append(counter.frame_count)
    assert counts[1] == counts[2]


def test_autocast_casts_as_linear_does():
    x, weight, bias, gate, _ = case(7, 12, dtype=FP32)
    with torch.autocast(DEVICE, dtype=BF16):
        found = head_projection(x, weight, bias, gate)
    close(found, head_projection(x.to(BF16), weight.to(BF16), bias.to(BF16), gate), "out")
    assert found.dtype == BF16


def test_nothing_waits_for_the_device():
    """Launchers allocate and launch: no value comes back, so a CUDA graph can capture them."""
    pytest.importorskip("triton")
    from fastgt.kernels import head_projection as kernels

    x, weight, bias, gate, _ = (t.detach() for t in case(8, 20, dtype=FP32))
    y = case(8, 20, into=False, dtype=FP32)[0].detach()
    from fastgt.ops.head_projection import head_order

    with Calls() as calls:
        heads = head_order(gate != 0)
    assert not {"_local_scalar_dense", "nonzero", "item", "unique"} & calls.names
    with Calls() as calls:
        kernels.head_expand(x, weight, bias, heads)
        kernels.head_contract(y, weight, None, heads)
        kernels.head_outer(y, x, heads)
    assert not {"_local_scalar_dense", "nonzero", "item", "unique", "sort"} & calls.names
    assert "new_empty" in calls.names


def test_the_gate_receives_no_gradient():
    x, weight, bias, gate, _ = case(9)
    gate.requires_grad_()
    out = head_projection(x, weight, bias, gate)
    assert torch.autograd.grad(out.sum(), gate, allow_unused=True) == (None,)


def test_does_a_published_linear_layers_work():
    layer = torch.nn.Linear(12, 8, dtype=FP64, device=DEVICE)
    x = torch.randn(5, 12, dtype=FP64, device=DEVICE)
    weight, bias = layer.weight.unflatten(0, (4, 2)), layer.bias.unflatten(0, (4, 2))
    close(head_projection(x, weight, bias).flatten(1), layer(x), "into")
    out = layer.weight.unflatten(1, (4, 3))
    close(head_projection(x.unflatten(1, (4, 3)), out, layer.bias), layer(x), "out of")


X, W, B = torch.zeros(5, 6), torch.zeros(2, 3, 6), torch.zeros(2, 3)
Y, OUT = torch.zeros(5, 2, 3), torch.zeros(6, 2, 3)
GATE = torch.ones(2)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((X[0], W), ValueError, r"x must be \[N, C\].*got \[6\]"),
        ((X.long(), W), TypeError, "x must be float16"),
        (([1], W), TypeError, "x must be a tensor, got list"),
        ((X, W.double()), TypeError, "weight is torch.float64 but x is torch.float32"),
        ((X, W[0]), ValueError, r"weight must be \[H, D, C\], got \[3, 6\]"),
        ((X, W[..., :5]), ValueError, "weight takes 5 channels but x has 6"),
        ((Y, W), ValueError, r"weight takes \[H, D\] = \[3, 6\] but x has \[2, 3\]"),
        ((X, W[:0]), ValueError, r"weight has no entries: \[0, 3, 6\]"),
        ((X, W, B[0]), ValueError, r"bias must be \[H, D\] = \[2, 3\], got \[3\]"),
        ((Y, OUT, B), ValueError, r"bias must be \[C\] = \[6\], got \[2, 3\]"),
        ((X, W, B.half()), TypeError, "bias is torch.float16"),
        ((X, W, B.to("meta")), ValueError, "bias is on meta but x is on cpu"),
        ((X, W, B, torch.ones(3)), ValueError, r"head_gate must be \[H\] = \[2\], got \[3\]"),
        ((X, W, B, torch.ones(4, 2)), ValueError, r"head_gate must be \[H\] = \[2\], got \[4, 2\]"),
        ((X, W, B, torch.ones(2).long()), TypeError, "head_gate must be float16.*int64"),
        ((X, W, B, [1, 0]), TypeError, "head_gate must be a tensor, got list"),
        ((X, W, B, torch.tensor([1, torch.nan])), ValueError, r"head_gate is NaN at heads \[1\]"),
        ((X, W, B, GATE.to("meta")), ValueError, "head_gate is on meta but the nodes are on cpu"),
    ],
)
def test_refusals(args, error, message):
    with pytest.raises(error, match=message):
        head_projection(*args)


def test_an_implementation_that_cannot_run_is_refused():
    with pytest.raises(ValueError, match="impl must be one of"):
        head_projection(X, W, impl="cuda")


@pytest.mark.skipif(DEVICE != "cpu", reason="rows are filled up on a CPU")
@pytest.mark.parametrize("into", [True, False], ids=["into", "out of"])
def test_forward_mode_and_func_transforms_without_a_gate_in_16_bits(into):
    """Rows that are no multiple of a matrix unit's step take PyTorch's product too."""
    x = torch.randn(5, 20, dtype=BF16) if into else torch.randn(5, 4, 5, dtype=BF16)
    weight = torch.randn(4, 3, 20, dtype=BF16) if into else torch.randn(12, 4, 5, dtype=BF16)
    flat = weight.reshape(12, 20)

    def call(x):
        return head_projection(x, weight).flatten(1)

    direction = torch.randn_like(x)
    tangent = torch.func.jvp(call, (x,), (direction,))[1]
    torch.testing.assert_close(tangent, direction.flatten(1) @ flat.T)
    found = torch.func.grad(lambda x: call(x).float().sum())(x)
    torch.testing.assert_close(found.flatten(1), flat.sum(0).expand(5, -1))

"""linear_attention against the quadratic form, in every implementation."""

import itertools
import math
from dataclasses import replace
from typing import get_args

import laws
import pytest
import torch
from attention_cases import BF16, DEVICE, FAST, FP16, FP32, FP64, close, same_bits
from linear_cases import FORMS, LINEAR, MAPS, attend, case, evaluate, run_as, terms
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastgt
from fastgt import (
    linear_attention,
    reference,
    segment_sum,
    sgformer_attention,
)
from fastgt.bench.memory import peak_extra_memory
from fastgt.contract import Features, Inputs, NeedQKV, Quotient, Ragged
from fastgt.cpu import linear_attention as cpu
from fastgt.ops.linear_attention import FeatureMap
from fastgt.reference.linear_attention import features
from fastgt.testing import assert_as_accurate


def feature(x, name, w, top):
    """phi of one vector, by the definition, in Python floats; ``top``: the stabiliser c."""
    if name == "identity":
        return list(x)
    if name == "relu":
        return [max(t, 0.0) for t in x]
    if name == "elu":
        return [t + 1 if t > 0 else math.exp(t) for t in x]
    if name == "sigmoid":
        return [1 / (1 + math.exp(-t)) for t in x]
    products = [sum(a * b for a, b in zip(row, x, strict=True)) for row in w]
    if name == "relu_random":
        return [max(p, 0.0) + 1e-3 for p in products]
    d, m = len(x), len(w)
    half = sum(t * t for t in x) / math.sqrt(d) / 2
    return [(math.exp(p * d**-0.25 - half - top) + 1e-4) / math.sqrt(m) for p in products]


def loops(x):
    """The quadratic form: sum_j (phi(q_i) . phi(k_j)) v_j over the same sum of weights."""
    name, w = x.options["feature_map"], x.options.get("projection")
    w = None if w is None else w.double().tolist()
    out = torch.zeros(x.v.shape, dtype=FP64)
    for (begin, end), h in itertools.product(x.bounds(), range(x.q.shape[1])):
        q, k = x.q[begin:end, h].double().tolist(), x.k[begin:end, h].double().tolist()

        def products(t):
            return [sum(a * b for a, b in zip(row, t, strict=True)) for row in w or []]

        scale = x.q.shape[2] ** -0.25
        key_top = max((p * scale for t in k for p in products(t)), default=0.0)
        keys = [feature(t, name, w, key_top) for t in k]
        for i, t in enumerate(q):
            phi = feature(t, name, w, max((p * scale for p in products(t)), default=0.0))
            a = [sum(f * g for f, g in zip(phi, key, strict=True)) for key in keys]
            total = sum(a) + x.options["eps"] if x.options["normalize"] else 1.0
            values = x.v[begin:end, h].double().tolist()
            for c in range(x.v.shape[2]):
                number = sum(p * v[c] for p, v in zip(a, values, strict=True))
                out[begin + i, h, c] = number / total
    return out


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", MAPS)
def test_reference_is_the_quadratic_form(name, normalize):
    for sizes in ((3, 0, 11, 1), (), (0,), None):
        x = case(1, sizes, feature_map=name, normalize=normalize, eps=0.01)
        close(attend(x, "reference").cpu(), loops(x), name)


test_agrees_with_the_reference_in_float64 = LINEAR.obeys(laws.equals_its_oracle, 90, dtype=FP64)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("form", FORMS)
def test_every_map_with_several_tiles_and_graphs_on_both_sides(form, name, normalize):
    """No two sizes equal, no power of two; graphs below and above the quadratic form's limit."""
    shape = {"heads": 2, "d": 21, "dv": 19, "m": 37, "layout": "sliced"}
    x = case(3, (5, 0, 50, 18, 23), feature_map=name, normalize=normalize, eps=0.1, **shape)
    laws.equals_its_oracle(LINEAR, form, x)


def as_accurate_as_eager(op, form, x):
    """But for what cancels: a row whose features are small has a large quotient."""
    laws.as_accurate_as_eager(op, form, x, terms=terms(x))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_as_accurate_as_eager(form, dtype):
    LINEAR.check(as_accurate_as_eager, 24, form, dtype=dtype)


@pytest.mark.parametrize("size", range(1, 20))
@pytest.mark.parametrize("form", FORMS)
def test_every_size_around_a_tile(form, size):
    x = case(size, (size, 15, 16 + size), heads=1, d=20, dv=17, dtype=FP64)
    laws.equals_its_oracle(LINEAR, form, x)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_is_its_graphs_alone(form, name):
    """Neighbours full of NaN change nothing, gradients included."""
    # 13 and 12, 5 and 4 share a product on a CPU, filled up
    x = case(5, (4, 13, 0, 12, 30, 5, 1), d=12, dv=9, feature_map=name, m=9)
    alone = {name: [] for name in ("o", "dq", "dk", "dv")}
    for begin, end in x.bounds():
        q, k, v, do = (t[begin:end] for t in (x.q, x.k, x.v, x.do))
        for key, t in evaluate(replace(x, q=q, k=k, v=v, do=do, offsets=None), form).items():
            alone[key].append(t)
    for number, (begin, end) in enumerate(x.bounds()):
        poisoned = [t.clone() for t in (x.q, x.k, x.v, x.do)]
        for t in poisoned:
            t[:begin], t[end:] = torch.nan, torch.nan
        q, k, v, do = poisoned
        found = evaluate(replace(x, q=q, k=k, v=v, do=do), form)
        for key, t in found.items():
            close(t[begin:end], alone[key][number], key)


@pytest.mark.parametrize("m", [1, 3, 17])
@pytest.mark.parametrize("form", FORMS)
def test_stabilisers_are_those_of_products_alone(form, m):
    """Where all products are far below 0, that of a feature which is not there would stand out."""
    x = case(7, (5, 24), d=4, dv=3, feature_map="softmax", m=m, eps=0.01)
    x = replace(x, q=-6 * x.q.abs(), k=-6 * x.k.abs())
    x.options["projection"].abs_()
    laws.equals_its_oracle(LINEAR, form, x)


def test_a_graph_is_either_small_or_in_pieces(monkeypatch):
    """Never both, or two programs would write its output."""
    pytest.importorskip("triton")
    from fastgt.kernels import linear_attention as kernels

    x = case(0, (15, 16, 17), d=16, dv=16)
    offsets = x.offsets.tolist()
    plan = kernels.linear_plan
    for small in (False, True):

        def one_pass(*args, small=small):
            found = plan(*args)
            assert found.small == 16
            return found._replace(passes=[p for p in found.passes if small == p.sizes.SMALL])

        monkeypatch.setattr(kernels, "linear_plan", one_pass)
        written = ~attend(x, "triton").isnan().any(2).any(1)
        sizes = {
            n: bool(written[b:e].all())
            for n, b, e in zip((15, 16, 17), offsets, offsets[1:], strict=False)
        }
        assert sizes == {15: small, 16: not small, 17: not small}
        assert int(written.sum()) in (15, 33)


@pytest.mark.parametrize("name", ["elu", "softmax"])
@pytest.mark.parametrize("form", FORMS)
def test_empty_graphs_change_nothing(form, name):
    sizes = (4, 21, 1)
    whole = evaluate(case(2, sizes, feature_map=name, d=12), form)
    for place in range(4):
        padded = [*sizes[:place], 0, 0, *sizes[place:]]
        same_bits(evaluate(case(2, padded, feature_map=name, d=12), form), whole)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("form", FORMS)
def test_no_nodes(form, name):
    for sizes in ((), (0,), (0, 0, 0)):
        for key, t in evaluate(case(0, sizes, feature_map=name), form).items():
            assert t.shape[0] == 0, key


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("form", FORMS)
def test_a_constant_value_comes_out_and_moves_neither_query_nor_key(form, name):
    """Numerator and denominator cancel in dk, to the last term: where others were wrong."""
    x = case(4, (3, 30), d=12, dv=5, feature_map=name, eps=0.0, m=9)
    if name == "relu":  # a query may be orthogonal to every key
        x = replace(x, q=x.q.abs(), k=x.k.abs())
    x = replace(x, v=x.v[:1].expand_as(x.v))
    found = evaluate(x, form)
    close(found["o"], x.v, tolerance=1e-12)
    scale = evaluate(replace(x, v=x.do), form)
    for key in ("dq", "dk"):
        assert found[key].abs().max() < 1e-12 * max(1.0, float(scale[key].abs().max())), key


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("form", FORMS)
def test_dk_through_the_denominator_alone(form, name):
    """With values of 1 and a large eps, out = d / (d + eps): all of dk comes through d."""
    x = case(6, (5, 25), heads=1, d=12, dv=1, feature_map=name, eps=2.0, m=9)
    x = replace(x, v=torch.ones_like(x.v))
    found, step, worst = evaluate(x, form), 1e-5, 0.0
    if name == "softmax":  # the stabilisers are constants: move a key that has not the largest
        w = x.options["projection"]
        j = int((x.k[5:, 0] @ w.T).amax(1).argmin()) + 5
    else:
        j = 11
    for c in range(12):
        outs = []
        for sign in (1, -1):
            k = x.k.clone()
            k[j, 0, c] += sign * step
            outs.append((attend(replace(x, k=k), form) * x.do).sum())
        slope = (outs[0] - outs[1]) / (2 * step)
        worst = max(worst, float((slope - found["dk"][j, 0, c]).abs()))
    assert found["dk"].abs().max() > 1e-4
    assert worst < 1e-8


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "qv", "kv"])
@pytest.mark.parametrize("form", FORMS)
def test_only_what_is_asked_for(form, wanted):
    x = case(1, (3, 25), d=12, dv=9, feature_map="softmax", m=9)
    whole = evaluate(x, form)
    leaves = {n: getattr(x, n).detach().clone().requires_grad_(n in wanted) for n in "qkv"}
    with run_as(form):
        attend(replace(x, **leaves), form).backward(x.do)
    for name, leaf in leaves.items():
        if name in wanted:
            close(leaf.grad, whole[f"d{name}"], name)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_second_derivatives(impl, name):
    x = case(2, (3, 5), heads=1, d=3, dv=2, m=4, feature_map=name, eps=0.1)
    leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]
    if name in ("softmax",):
        # stabilisers are constants, which finite differences do not know: by the reference
        found = []
        for way in (impl, "reference"):
            o = linear_attention(*leaves, x.offsets, **x.options, impl=way)
            first = torch.autograd.grad(o, leaves, x.do, create_graph=True)
            both = sum(g.square().sum() for g in first)
            found.append([*first, *torch.autograd.grad(both, leaves)])
        for a, b in zip(*found, strict=True):
            close(a, b)
        return

    def f(*leaves):
        return linear_attention(*leaves, x.offsets, **x.options, impl=impl)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_elu_passes_its_whole_gradient_at_zero(impl):
    """elu(x) + 1 has the derivative 1 at 0, from both sides."""
    q, k = torch.zeros(2, 1, 1, 1, dtype=FP64, device=DEVICE).requires_grad_().unbind()
    v = torch.ones(1, 1, 1, dtype=FP64, device=DEVICE)
    o = linear_attention(q, k, v, feature_map="elu", normalize=False, impl=impl)
    assert [float(g) for g in torch.autograd.grad(o, (q, k))] == [1.0, 1.0]


@pytest.mark.parametrize("impl", FAST)
def test_stabilised_features_reach_far(impl):
    """Products of a thousand: exp() stays in range, and the largest weights are exact."""
    x = case(3, (4, 30), d=8, dv=4, feature_map="softmax", m=16, dtype=FP32)
    x = replace(x, q=x.q * 30, k=x.k * 30)
    assert all(t.isfinite().all() for t in evaluate(x, impl).values())
    laws.as_accurate_as_eager(LINEAR, impl, x, of_outputs=3.0)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_every_time(form):
    x = case(0, (40, 3, 90), d=16, dv=16, dtype=FP32, feature_map="softmax", m=20)
    laws.the_same_bits_every_time(LINEAR, form, x, 2 if DEVICE == "cpu" else 100)


@pytest.mark.skipif(DEVICE != "cpu", reason="threads are the CPU's")
@pytest.mark.parametrize("form", ["cpp", "slices"])
def test_threads_do_not_change_a_bit(form):
    x = case(0, (400, 30, 2500), d=16, dv=16, dtype=FP32, feature_map="softmax", m=20)
    threads, whole = torch.get_num_threads(), evaluate(x, form)
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            same_bits(evaluate(x, form), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["elu", "softmax"])
@pytest.mark.parametrize("impl", FAST)
def test_opcheck(impl, name):
    x = case(0, (3, 0, 20), d=12, dv=9, dtype=FP32, feature_map=name, m=9)
    fwd, bwd = torch.ops.fastgt.linear_attention_fwd, torch.ops.fastgt.linear_attention_bwd
    call = x.q, x.k, x.v, name, x.options.get("projection"), x.offsets, None, 1e-6, True
    torch.library.opcheck(fwd.default, (impl, *call))
    o, tops = fwd(impl, *call)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(bwd.default, (impl, o, tops, *call, *needs))


@pytest.mark.parametrize("impl", FAST)
def test_compiles_once_for_all_sizes(impl):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_attention, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for seed, sizes in enumerate([(5, 20, 2), (7, 3), (11, 0, 25, 4)]):
        x = case(seed, sizes, d=12, dv=9, dtype=FP32, feature_map="softmax", m=9)
        leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]
        found = []
        for f in (compiled, linear_attention):
            o = f(*leaves, x.offsets, **x.options, impl=impl)
            found.append([o, *torch.autograd.grad(o, leaves, x.do)])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("impl", FAST)
def test_one_tensor_in_all_places(impl):
    torch._dynamo.reset()
    x = case(0, (5, 8), d=8, dv=8, dtype=FP32)

    def f(t):
        return linear_attention(t, t, t, x.offsets, impl=impl)

    found = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaf = x.q.detach().clone().requires_grad_()
        o = g(leaf)
        found.append([o, *torch.autograd.grad(o, leaf, x.do)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", FAST)
def test_autocast(impl):
    x = case(0, (5, 20), dtype=FP32, feature_map="relu_random", m=9)
    with torch.autocast(DEVICE, BF16):
        o = attend(x, impl)
    assert o.dtype == BF16
    y = replace(x, q=x.q.to(BF16), k=x.k.to(BF16), v=x.v.to(BF16))
    assert torch.equal(o, attend(y, impl))


@pytest.mark.parametrize("impl", FAST)
def test_inputs_stay_and_outputs_stand_alone(impl):
    x = case(0, (5, 20), dtype=FP32, feature_map="identity", normalize=False)
    before = [t.clone() for t in (x.q, x.k, x.v)]
    o = attend(x, impl)
    assert o.is_contiguous()
    assert o.untyped_storage().nbytes() == o.numel() * o.element_size()
    for a, b in zip((x.q, x.k, x.v), before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU path's promise")
@pytest.mark.parametrize("sizes", [(4000,) * 4, (25,) * 640, (16000,)], ids=["4", "640", "1"])
def test_memory_does_not_grow_with_the_features(sizes):
    n, h, d, m = 16000, 2, 16, 512
    x = case(0, sizes, heads=h, d=d, dv=d, m=m, feature_map="softmax", dtype=FP32)
    linear = 4 * n * h * (d + d)
    features = 4 * n * h * m
    device = torch.device("cpu")
    # the output and three gradients, and as much again to work in
    assert peak_extra_memory(lambda: evaluate(x, "cpp"), device) < 8 * linear
    assert 8 * linear < features
    assert peak_extra_memory(lambda: evaluate(x, "reference"), device) > features


def test_states_take_no_more_memory_than_the_inputs():
    """What the kernels allot, whatever the batch looks like: it hangs on N and G alone."""
    pytest.importorskip("triton")
    from fastgt.kernels.linear_states import linear_plan

    for n, graphs, heads, d, m in (
        (250_000, 10_000, 8, 64, 266),
        (1_000_000, 1, 8, 64, 266),
        (1_000_000, 1, 1, 16, 44),
        (65_000, 256, 4, 16, 44),
        (100, 1, 1, 256, 1024),
    ):
        q = torch.empty(n, heads, d, device="meta")
        offsets = torch.empty(graphs + 1, dtype=torch.int64, device="meta")
        projection = torch.empty(m, d, device="meta")
        features, ragged = Features("softmax", projection), Ragged(offsets, None)
        plan = linear_plan(Inputs(q, q, q), features, ragged)
        # but for one piece, and small being rounded
        assert (plan.pieces - 1) * m * (d + 1) <= 1.05 * n * (m + d)
        if n == 1_000_000:
            # one graph fills a device of 132 processors
            assert plan.pieces * heads >= 4 * 132


@pytest.mark.parametrize("impl", ["cpp", "triton"])
def test_shapes_beyond_two_to_the_31_on_meta_tensors(impl):
    n, h, d = 3 * 2**30, 8, 32
    q, k, v = (torch.empty(n, h, d, device="meta", requires_grad=True) for _ in range(3))
    offsets = torch.empty(2**20 + 1, dtype=torch.int64, device="meta")
    call = q, k, v, "elu", None, offsets, None, 1e-6, True
    o, tops = torch.ops.fastgt.linear_attention_fwd(impl, *call)
    assert o.shape == (n, h, d)
    args = impl, o, tops, *call, True, True, True
    assert [g.shape for g in torch.ops.fastgt.linear_attention_bwd(*args)] == [(n, h, d)] * 3


@pytest.mark.skipif(DEVICE != "cpu", reason="16 GB, of which only the interpreter touches little")
def test_addresses_beyond_two_to_the_31(tmp_path):
    """Nodes 2^29 apart: every offset of a row is a product that 32 bits do not hold."""
    pytest.importorskip("triton")
    x = case(0, (3, 5), heads=1, d=4, dv=4, dtype=FP32)
    room = torch.from_file(str(tmp_path / "sparse"), shared=True, size=9 * 2**30, dtype=FP32)
    far = []
    for i, t in enumerate((x.q, x.k, x.v)):
        wide = room[64 * i :].as_strided((8, 1, 4), (2**30, 4, 1))
        far.append(wide.copy_(t))
    y = replace(x, q=far[0], k=far[1], v=far[2])
    close(attend(y, "triton"), attend(x, "triton"))


def refused(error, match, **changes):
    x = case(0, (3, 7), d=8, dv=6, dtype=FP32)
    args = {"q": x.q, "k": x.k, "v": x.v, "offsets": x.offsets} | changes
    for impl in ("reference", *FAST):
        with pytest.raises(error, match=match):
            linear_attention(**args, impl=impl)


def test_bad_input():
    x = case(0, (3, 7), d=8, dv=6, dtype=FP32)
    refused(TypeError, "q must be a tensor, got list", q=[1.0])
    refused(TypeError, "k is torch.float64 but q is torch.float32", k=x.k.double())
    refused(TypeError, "q must be float16", q=x.q.long())
    refused(ValueError, r"v must be \[N, H, D\], got \[10, 12\]", v=x.v.flatten(1))
    refused(ValueError, "k has 9 nodes but q has 10", k=x.k[:9])
    refused(ValueError, "v has 1 heads but q has 2", v=x.v[:, :1])
    refused(ValueError, "k has head width 7 but q has 8", k=x.k[..., :7])
    wide = torch.zeros(*x.v.shape[:2], 257, device=x.v.device)
    refused(ValueError, "v has head width 257; supported are 1 to 256: .* more heads", v=wide)
    refused(ValueError, "feature_map must be one of .*'softmax'.*, got 'exp'", feature_map="exp")
    refused(ValueError, "'softmax' needs projection", feature_map="softmax")
    refused(ValueError, "'elu' takes no projection", projection=torch.zeros(3, 8))
    wrong = torch.zeros(3, 9)
    refused(
        ValueError,
        r"projection must be \[M, D\] = \[M, 8\], got \[3, 9\]",
        projection=wrong,
        feature_map="softmax",
    )
    many = torch.zeros(1025, 8)
    refused(ValueError, "1025 features", projection=many, feature_map="relu_random")
    refused(ValueError, "^eps must be finite and not negative, got -1", eps=-1.0)
    refused(TypeError, "eps must be a number, got str", eps="small")
    with pytest.raises(ValueError, match="impl must be one of"):
        linear_attention(x.q, x.k, x.v, impl="cuda")


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's offsets are not looked at")
def test_bad_offsets():
    refused(TypeError, "offsets must be a tensor of integers, got list", offsets=[0, 10])
    refused(TypeError, "offsets must be int32 or int64", offsets=torch.tensor([0.0, 10.0]))
    refused(ValueError, r"offsets must be \[G \+ 1\]", offsets=torch.tensor([[0, 10]]))
    refused(ValueError, r"offsets must be \[G \+ 1\], got \[0\]", offsets=torch.tensor([]).long())
    refused(ValueError, "offsets must start at 0, got 1", offsets=torch.tensor([1, 10]))
    refused(ValueError, "offsets decreases from 5 to 3 at 2", offsets=torch.tensor([0, 5, 3, 10]))
    refused(ValueError, "offsets ends at 9 but there are 10 nodes", offsets=torch.tensor([0, 3, 9]))
    refused(ValueError, "offsets ends at 11", offsets=torch.tensor([0, 3, 11]))


@pytest.mark.parametrize("impl", FAST)
def test_a_gradient_of_the_projection_is_refused(impl):
    x = case(0, (5,), feature_map="softmax", dtype=FP32)
    x.options["projection"].requires_grad_()
    with pytest.raises(NotImplementedError, match="projection requires a gradient"):
        attend(x, impl)
    w = x.options["projection"]
    (found,) = torch.autograd.grad(attend(x, "reference").sum(), w)
    assert found.isfinite().all()
    with torch.no_grad():
        attend(x, impl)


def test_torch_func_and_forward_mode():
    x = case(0, (5,), dtype=FP32)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.q, x.q)
        for impl in FAST:
            with pytest.raises(NotImplementedError, match="impl='reference'"):
                attend(replace(x, q=dual), impl)
        attend(replace(x, q=dual), "reference")
        x = case(0, (5,), dtype=FP32, feature_map="softmax")
        w = x.options["projection"]
        x.options["projection"] = torch.autograd.forward_ad.make_dual(w, w)
        for impl in FAST:
            with pytest.raises(NotImplementedError, match="impl='reference'"):
                attend(x, impl)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_a_virtual_node_computes_linear_attention(impl, name):
    """Cai et al., arXiv 2301.11956, section 4: nodes send [phi(k) v^T ; phi(k)] to the virtual node
    of their graph, which sums and sends the sum back; a node's update multiplies with phi(q) and
    divides."""
    x = case(1, (3, 0, 14, 1), feature_map=name, eps=0.1)
    phi, w = features, x.options.get("projection")
    parts = [[], []]
    for begin, end in x.bounds():
        if end > begin:
            parts[0].append(phi(x.q[begin:end], name, w, (2,)))
            parts[1].append(phi(x.k[begin:end], name, w, (0, 2)))
    f, g = (torch.cat(p) for p in parts)
    m = g.shape[2]
    message = torch.cat([(g[..., None] * x.v[:, :, None]).flatten(2), g], 2)  # [N, H, M Dv + M]
    sizes = x.offsets.diff()
    received = segment_sum(message, x.offsets, impl=impl).repeat_interleave(sizes, 0)
    s, z = received[..., :-m].unflatten(2, (m, -1)), received[..., -m:]
    out = torch.einsum("nhm,nhmd->nhd", f, s) / ((f * z).sum(2) + 0.1)[..., None]
    close(attend(x, impl), out)


def sgformer(q, k, v, offsets, norms="graph"):
    """The published code, or torch-geometric's norms in it, graph by graph."""
    outs = []
    for begin, end in itertools.pairwise(offsets.tolist()):
        qs, ks, vs = (t[begin:end] for t in (q, k, v))
        if norms == "graph":
            qs, ks = qs / torch.norm(qs, p=2), ks / torch.norm(ks, p=2)
        else:
            qs, ks = (t / torch.linalg.norm(t, ord=2, dim=-1, keepdim=True) for t in (qs, ks))
        n = qs.shape[0]
        kvs = torch.einsum("lhm,lhd->hmd", ks, vs)
        num = torch.einsum("nhm,hmd->nhd", qs, kvs) + n * vs
        ks_sum = torch.einsum("lhm,l->hm", ks, ks.new_ones(n))
        den = torch.einsum("nhm,hm->nh", qs, ks_sum)[..., None] + n
        outs.append(num / den)
    return torch.cat(outs)


@pytest.mark.parametrize("norms", ["graph", "node"])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_sgformer(impl, heads, norms):
    x = case(0, (3, 11, 1, 20), heads=heads, d=9, dv=7)
    found = []
    for f in (
        lambda *t: sgformer_attention(*t, x.offsets, norms=norms, impl=impl),
        lambda *t: reference.sgformer_attention(*t, x.offsets, norms=norms),
        lambda *t: sgformer(*t, x.offsets, norms),
    ):
        leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]
        o = f(*leaves)
        found.append([o, *torch.autograd.grad(o, leaves, x.do)])
    for a, b, c in zip(*found, strict=True):
        close(a, c)
        close(b, c)
    zero = torch.zeros_like(x.q).requires_grad_()
    o = sgformer_attention(zero, zero, x.v, x.offsets, norms=norms, impl=impl)
    close(o, x.v)
    assert not torch.autograd.grad(o.sum(), zero)[0].any()
    close(reference.sgformer_attention(zero, zero, x.v, norms=norms), x.v)
    q, k, v = (t.float() * 200 for t in (x.q, x.k, x.v))
    with torch.autocast(DEVICE, dtype=FP16):  # squares that 16 bits do not hold
        found = sgformer_attention(q, k, v, x.offsets, norms=norms, impl=impl).half()
    truth = sgformer(*(t.double() for t in (q, k, v)), x.offsets, norms)
    assert_as_accurate(found, sgformer(q, k, v, x.offsets, norms).half(), truth, "o")
    with pytest.raises(ValueError, match="k has 20 nodes"):
        sgformer_attention(x.q, x.k[:20], x.v, norms=norms, impl=impl)
    with pytest.raises(ValueError, match=r"norms must be one of \['graph', 'node'\], got 'head'"):
        sgformer_attention(x.q, x.k, x.v, norms="head", impl=impl)


def test_sgformer_takes_several_dtypes_within_autocast():
    x = case(0, (3, 11), heads=1, d=9, dv=7, dtype=FP32)
    with torch.autocast(DEVICE, dtype=BF16), pytest.raises(TypeError, match="k must be a tensor"):
        sgformer_attention(x.q, [1.0], x.v)
    with torch.autocast(DEVICE, dtype=BF16):
        found = sgformer_attention(x.q.to(BF16), x.k, x.v, x.offsets)
    assert found.dtype == FP32
    wanted = sgformer(x.q.to(BF16).float(), x.k, x.v, x.offsets)
    assert (found - wanted).abs().max() < 0.05


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU path")
def test_strided_inputs_are_not_copied(compiled_kernels):
    """But for those whose channels do not lie side by side."""
    q, k, v = torch.randn(200, 3, 2, 8).unbind(1)
    turned = v.mT.contiguous().mT
    copies = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.clone.default:
                copies.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    for x, count in ((v, 0), (turned, 1)):
        call = Inputs(q, k, x), Features("elu", None), Ragged(None, None), Quotient(1e-6, True)
        copies.clear()
        with Count():
            found, kept = cpu.linear_attention_fwd(*call)
        assert copies == [q.numel()] * count
        assert torch.equal(found, linear_attention(*(t.contiguous() for t in (q, k, v))))
        copies.clear()
        with Count():
            cpu.linear_attention_bwd(k, kept, *call, NeedQKV(True, True, True))
        assert copies == [q.numel()] * count


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU path")
def test_a_small_graph_of_many_features_has_no_state(compiled_kernels):
    """Its features are more numbers than a group may have, its state would be many times more."""
    q, k, v = (torch.randn(5, 64, d) for d in (4, 4, 256))
    w = torch.randn(1024, 4)

    def call():
        return linear_attention(q, k, v, feature_map="softmax", projection=w)

    call()
    assert peak_extra_memory(call, torch.device(DEVICE)) < 0.1 * 64 * 1024 * 256 * 4


@pytest.mark.skipif(DEVICE != "cpu", reason="values are checked on a CPU")
def test_offsets_are_checked_within_a_dispatch_mode():
    x = case(0, (5,), dtype=FP32)
    with FlopCounterMode(display=False), pytest.raises(ValueError, match="offsets ends at 3"):
        linear_attention(x.q, x.k, x.v, torch.tensor([0, 3]))


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_polynormer(impl):
    """Its global attention, as torch-geometric computes it on one graph."""
    x = case(0, None, heads=2, d=8, dv=8)
    q, k, v = x.q.sigmoid(), x.k.sigmoid(), x.v
    num = torch.einsum("nhd,hdm->nhm", q, torch.einsum("nhd,nhm->hdm", k, v))
    den = torch.einsum("nhd,hd->nh", q, k.sum(0))[..., None]
    close(attend(x, impl, feature_map="sigmoid"), num / (den + 1e-6))


def test_a_forced_implementation_runs():
    x = case(0, (5, 7), dtype=FP16)
    with fastgt.implementation("reference"):
        o = linear_attention(x.q, x.k, x.v, x.offsets, **x.options)
    assert torch.equal(o, attend(x, "reference"))


def test_every_map_is_tested():
    assert set(get_args(FeatureMap)) == set(MAPS)

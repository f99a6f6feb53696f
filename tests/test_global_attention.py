"""global_attention against loops over all pairs, in every implementation."""

import math
from dataclasses import replace

import laws
import pytest
import torch
import torch.nn.functional as F
from attention_cases import BF16, DEVICE, FAST, FP16, FP32, FP64, all_close, close, same_bits
from global_cases import FORMS, GLOBAL, LSE, attend, case, evaluate, loops, results, run_as
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import fastgt
from fastgt import AuxRequest, global_attention, neighborhood_attention, reference
from fastgt.bench.memory import peak_extra_memory

IMPLS = ["reference", *FORMS]
SHAPES = [
    {"sizes": (3, 0, 7, 1), "bias": "pair"},
    {"sizes": (4, 0, 6), "keys": (2, 5, 0), "bias": "key", "drop": True},
    {"sizes": (5, 2), "keys": (3, 6), "bias": "pair", "group": 3, "drop": True},
    {"sizes": (4, 0, 5), "keys": (3, 2, 6), "group": 3, "drop": True, "numbered": True},
    {"sizes": None, "scale": -0.7},
    {"sizes": ()},
]


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_reference_is_the_equations(number):
    x = case(number, **SHAPES[number])
    all_close(evaluate(x, "reference"), loops(x))


@pytest.mark.parametrize("number", range(len(SHAPES)))
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(form, number):
    x = case(number, **SHAPES[number])
    all_close(evaluate(x, form), loops(x))


test_agrees_with_the_reference_in_float64 = GLOBAL.obeys(laws.equals_its_oracle, 60, dtype=FP64)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_as_accurate_as_eager(form, dtype):
    GLOBAL.check(laws.as_accurate_as_eager, 24, form, dtype=dtype)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 15, 16, 17, 31, 33, 47])
@pytest.mark.parametrize("form", FORMS)
def test_every_size_around_a_tile(form, size):
    x = case(size, (size, 15, 16 + size), heads=1, d=20, dv=17, bias="pair")
    laws.equals_its_oracle(GLOBAL, form, x)


@pytest.mark.parametrize("sizes", [(63, 95), (64, 96), (65, 97), (200,), (130, 0, 191)], ids=str)
@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("form", ["cpp", "blocks"])
@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU path")
def test_every_size_around_a_block_of_the_compiled_kernel(form, sizes, numbered):
    x = case(1, sizes, heads=2, d=20, dv=33, bias="key", drop=True, numbered=numbered)
    laws.equals_its_oracle(GLOBAL, form, x)


@pytest.mark.parametrize("form", FORMS)
def test_wide_heads(form):
    x = case(1, (5, 18), heads=1, d=300, dv=512, bias="pair")
    laws.equals_its_oracle(GLOBAL, form, x)


@pytest.mark.parametrize("bias", ["", "key", "pair"])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_is_neighborhood_attention_on_the_complete_graph(impl, drop, bias):
    """The same dropout, too: edges in the order of pairs have their numbers."""
    x = case(2, (5, 0, 20), keys=(6, 3, 9), heads=2, group=2, bias=bias, drop=drop)
    names = [n for n in ("q", "k", "v", "bias") if getattr(x, n) is not None]
    leaves = {n: getattr(x, n).detach().clone().requires_grad_() for n in names}
    edge_bias = leaves.get("bias")
    if bias == "key":
        edge_bias = edge_bias[x.source]
    o, aux = neighborhood_attention(
        *(leaves[n] for n in "qkv"),
        x.graph,
        edge_bias=edge_bias,
        **x.options,
        return_aux=LSE,
        impl=impl,
    )
    grads = torch.autograd.grad((o, aux.lse), list(leaves.values()), (x.do, x.dlse))
    found = {f"d{n}": g for n, g in zip(names, grads, strict=True)}
    all_close(evaluate(x, impl), {"o": o.detach(), "lse": aux.lse.detach()} | found)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_is_scaled_dot_product_attention_graph_by_graph(impl):
    x = case(3, (5, 20), heads=3, bias="pair", dtype=FP64)
    leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v, x.bias)]
    q, k, v, bias = leaves
    outs, pairs = [], 0
    for begin, end, _, _ in x.bounds():
        n = end - begin
        mask = bias[pairs : pairs + n * n].view(n, n, -1).permute(2, 0, 1)
        heads = (t[begin:end].transpose(0, 1) for t in (q, k, v))
        outs.append(F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(0, 1))
        pairs += n * n
    grads = torch.autograd.grad(torch.cat(outs), leaves, x.do)
    found = evaluate(replace(x, dlse=torch.zeros_like(x.dlse)), impl)
    close(found["o"], torch.cat(outs), "o")
    for name, g in zip(("dq", "dk", "dv", "dbias"), grads, strict=True):
        close(found[name], g, name)


@pytest.mark.parametrize("form", IMPLS)
def test_nan_in_one_graph_reaches_no_other(form):
    """Gradients included, and those of its bias."""
    x = case(5, (4, 13, 0, 12, 18, 1), keys=(5, 11, 3, 0, 17, 2), d=12, dv=9, bias="pair")
    clean = evaluate(x, form)
    for spoilt, ends in enumerate(x.bounds()):
        begin, end, first, last = ends
        rows = torch.zeros(len(x.q), dtype=torch.bool, device=DEVICE)
        rows[begin:end] = True
        cols = torch.zeros(len(x.k), dtype=torch.bool, device=DEVICE)
        cols[first:last] = True
        within = {"rows": rows, "cols": cols, "edges": rows[x.target]}
        given = {}
        for name, t in x.tensors().items():
            given[name] = t.clone()
            given[name][within[x.over(name)]] = torch.nan
        for name, t in evaluate(x.having(**given), form).items():
            left = ~within[x.over(name)]
            assert torch.equal(t[left], clean[name][left]), (name, spoilt)


@pytest.mark.parametrize("where", ["q", "k", "v", "bias"])
@pytest.mark.parametrize("form", FORMS)
def test_nan_spreads_as_in_the_definition(form, where):
    x = case(6, (4, 11), d=5, dv=4, bias="pair")
    getattr(x, where)[6] = torch.nan
    found, expected = results(x, form), results(x, "reference")
    for name, t in found.items():
        assert torch.equal(t.isnan(), expected[name].isnan()), name


@pytest.mark.parametrize("form", IMPLS)
def test_graphs_without_keys_give_zero(form):
    x = case(4, (3, 5, 0, 4), keys=(0, 2, 7, 0), heads=2, bias="key")
    found = laws.rows_without_edges_give_zero(GLOBAL, form, x)
    assert x.isolated().sum() == 7
    assert x.unused().sum() == 7
    assert found["dbias"][x.unused()].eq(0).all()


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("form", IMPLS)
def test_no_nodes(form, sizes):
    for bias in ("", "key", "pair"):
        for name, t in evaluate(case(0, sizes, bias=bias), form).items():
            assert t.shape[0] == 0, name


@pytest.mark.parametrize("form", IMPLS)
def test_keys_without_queries_get_no_gradient(form):
    x = case(0, (0, 0), keys=(3, 4), bias="key")
    for name, t in evaluate(x, form).items():
        assert not t.any(), name
    assert evaluate(x, form)["dk"].shape == x.k.shape


@pytest.mark.parametrize("form", IMPLS)
def test_empty_graphs_change_nothing(form):
    sizes = (4, 21, 1)
    whole = evaluate(case(2, sizes, d=12, bias="pair"), form)
    for place in range(4):
        padded = [*sizes[:place], 0, 0, *sizes[place:]]
        same_bits(evaluate(case(2, padded, d=12, bias="pair"), form), whole)


@pytest.mark.parametrize("bias", ["key", "pair"])
@pytest.mark.parametrize("form", IMPLS)
def test_pairs_of_minus_infinity_do_not_exist(form, bias):
    """Single ones, and all of a row, which is then as one without keys."""
    x = case(7, (6, 20), heads=2, bias=bias)
    gone = torch.rand(x.bias.shape, generator=x.generator).to(DEVICE) < 0.3
    rows = slice(0, 6) if bias == "key" else slice(2, 3)
    gone[:6] |= bias == "key"
    if bias == "pair":
        gone[x.target == 2] = True
    bias = x.bias.masked_fill(gone, -math.inf)
    found = evaluate(replace(x, bias=bias), form)
    for name, t in found.items():
        assert not t.isnan().any(), name
    assert (found["o"][rows] == 0).all()
    assert (found["lse"][rows] == -math.inf).all()
    assert (found["dq"][rows] == 0).all()
    assert (found["dbias"][gone] == 0).all()
    all_close(found, evaluate(replace(x, bias=bias), "reference"))
    x.do[rows], x.dlse[rows] = torch.nan, torch.nan  # nothing reaches a row without weights
    all_close(evaluate(replace(x, bias=bias), form), found)


@pytest.mark.parametrize("dtype", [FP64, FP32])
@pytest.mark.parametrize("form", IMPLS)
def test_large_logits(form, dtype):
    x = case(8, (12, 40), heads=1, d=8, dv=4, dtype=dtype)
    x = x.having(q=x.q * 100, k=x.k * 10)
    laws.huge_logits_leave_no_nan(GLOBAL, form, x)
    bounds = {"dq": 1e-9, "dk": 1e-8} if dtype == FP64 else {"dq": 0.05, "dk": 0.5}
    laws.constant_values_give_no_gradient_to_logits(GLOBAL, form, x, bounds)


@pytest.mark.parametrize("form", FORMS)
def test_a_rounded_output_does_not_shift_the_gradient(form):
    x = case(9, (8, 30), heads=1, d=8, dv=4, dtype=BF16)
    v = 100 + (x.v.float() * 2).round() / 2
    x = x.having(v=v.to(BF16), dlse=torch.zeros_like(x.dlse))
    laws.a_rounded_output_does_not_shift_the_gradient(GLOBAL, form, x, ("dq", "dk"))


@pytest.mark.parametrize("form", FORMS)
def test_sets_of_keys_merge_through_the_lse(form):
    """o = sum_p softmax_p(lse_p) o_p, values and gradients."""
    x = case(3, (5, 13), heads=2, dtype=FP64)
    leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]
    q, k, v = leaves
    with run_as(form) as impl:
        parts = []
        for some in (slice(0, 3), slice(3, None)):
            of_graphs = [k[a:b][some] for a, b, _, _ in x.bounds()]
            values = [v[a:b][some] for a, b, _, _ in x.bounds()]
            ends = torch.tensor([0, *(len(t) for t in of_graphs)]).cumsum(0).to(DEVICE)
            call = q, torch.cat(of_graphs), torch.cat(values), x.offsets
            parts.append(global_attention(*call, key_offsets=ends, return_aux=LSE, impl=impl))
        lse = torch.stack([aux.lse for _, aux in parts])
        o = (lse.softmax(0)[..., None] * torch.stack([o for o, _ in parts])).sum(0)
        total = lse.logsumexp(0)
        grads = torch.autograd.grad((o, total), leaves, (x.do, x.dlse))
    found = {"o": o.detach(), "lse": total.detach()}
    found |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    all_close(found, evaluate(x, "reference"))


@pytest.mark.parametrize("outputs", [("o", "lse"), ("o",), ("lse",)], ids=str)
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_subset_of_gradients(form, outputs, twice):
    x = case(1, (3, 18), d=5, dv=4, bias="key" if twice else "pair")
    op = replace(GLOBAL, oracle=loops)
    laws.every_subset_of_gradients(op, form, x, outputs, twice=twice, skip=(2,))


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_second_derivatives(impl, drop):
    x = case(2, (3, 2), keys=(2, 3), heads=1, d=3, dv=2, bias="pair", drop=drop, numbered=drop)
    leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v, x.bias)]

    def f(q, k, v, bias):
        return tuple(results(replace(x, q=q, k=k, v=v, bias=bias), impl).values())

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)
    laws.double_backward_equals_the_reference(GLOBAL, impl, x)


def test_forward_mode_is_refused():
    x = case(0, (5,), dtype=FP64, bias="pair")
    for impl in FAST:
        laws.forward_mode_is_refused_not_zero(GLOBAL, impl, x)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_every_time(form):
    x = case(0, (20, 3, 30), d=16, dv=16, dtype=FP32, bias="key")
    laws.the_same_bits_every_time(GLOBAL, form, x, 2 if DEVICE == "cpu" else 100)


@pytest.mark.skipif(DEVICE != "cpu", reason="threads are the CPU's")
@pytest.mark.parametrize("form", ["cpp", "blocks"])
def test_threads_do_not_change_a_bit(form):
    x = case(0, (40, 300, 5), d=16, dv=16, dtype=FP32, bias="key", drop=True)
    with run_as(form):
        laws.threads_do_not_change_a_bit(GLOBAL, x)


@pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU path")
def test_a_graph_of_many_queries_is_shared_out():
    """Sums of several parts, which do not change a bit either."""
    q, k, v = torch.randn(3, 1100, 2, 16, generator=torch.Generator().manual_seed(0))
    whole = torch.tensor([0, 1100])
    x = replace(case(0, (3,), dtype=FP32), q=q, k=k, v=v, do=q + k, offsets=whole)
    x = replace(x, dlse=v[..., 0].clone())
    laws.threads_do_not_change_a_bit(GLOBAL, x)
    laws.as_accurate_as_eager(GLOBAL, "cpp", x)


@pytest.mark.parametrize("layout", ["transposed", "reversed", "sliced", "expanded"])
@pytest.mark.parametrize("form", FORMS)
def test_strides_do_not_change_a_bit(form, layout):
    x = laws.laid(case(0, (3, 20), dtype=FP32, bias="pair"), layout)
    laws.strides_do_not_change_a_bit(GLOBAL, form, x)


@pytest.mark.parametrize("layout", ["transposed", "scalar"])
@pytest.mark.parametrize("form", FORMS)
def test_upstream_gradients_of_any_strides(form, layout):
    x = laws.with_upstream(case(0, (3, 20), bias="key"), layout)
    laws.equals_its_oracle(GLOBAL, form, x)


@pytest.mark.parametrize("form", FORMS)
def test_inputs_stay_and_outputs_stand_alone(form):
    x = case(0, (5, 20), dtype=FP32, bias="pair", drop=True)
    laws.inputs_are_left_alone_and_outputs_alias_nothing(GLOBAL, form, x)
    x = replace(x, options=x.options | {"dropout_p": 0.0, "dropout_seed": None})
    laws.checkpointing_changes_no_gradient(GLOBAL, form, x, reentrant=False)


@pytest.mark.parametrize("impl", FAST)
def test_autocast(impl):
    laws.autocast_casts_the_inputs(GLOBAL, impl, case(0, (5, 20), dtype=FP32, bias="pair"))


@pytest.mark.parametrize("form", FORMS)
def test_dropout(form):
    """p = 1 drops all, p = 0 none; a seed repeats its mask, another one has another."""
    x = case(0, (30, 9), dtype=FP64, heads=5, drop=True)
    o = results(x, form)["o"]
    assert torch.equal(o, results(x, form)["o"])
    assert not torch.equal(o, results(x, form, dropout_seed=1)["o"])
    assert not results(x, form, dropout_p=1.0)["o"].any()
    close(results(x, form, dropout_p=0.0)["o"], results(x, "reference", dropout_p=0.0)["o"])
    seed = torch.tensor(0, device=DEVICE)
    assert torch.equal(o, results(x, form, dropout_seed=seed)["o"])
    torch.manual_seed(1)
    drawn = results(x, form, dropout_seed=None)["o"]
    assert not torch.equal(drawn, results(x, form, dropout_seed=None)["o"])
    torch.manual_seed(1)
    assert torch.equal(drawn, results(x, form, dropout_seed=None)["o"])


@pytest.mark.parametrize("impl", FAST)
def test_opcheck(impl):
    x = case(0, (3, 0, 20), keys=(4, 2, 6), d=12, dv=9, dtype=FP32, bias="pair")
    fwd, bwd = torch.ops.fastgt.global_attention_fwd, torch.ops.fastgt.global_attention_bwd
    mask = torch.tensor([[True, False]], device=DEVICE)
    seed = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    numbers = (torch.arange(len(t), device=DEVICE) * 100 for t in (x.q, x.k))
    for bias, ends, masked, drop in (
        (x.bias, x.key_offsets, None, ()),
        (None, x.key_offsets, mask, (seed, None, None, 0.25)),
        (None, x.key_offsets, None, (seed, *numbers, 0.25, 3)),
    ):
        call = x.q, x.k, x.v, 0.3, bias, False, x.offsets, ends, masked
        torch.library.opcheck(fwd.default, (impl, *call, *drop))
        o, lse = fwd(impl, *call, *drop)
        for needs in ((True, True, True, bias is not None), (False, True, False, False)):
            given = o, lse, lse, *call, *needs, *drop
            torch.library.opcheck(bwd.default, (impl, *given))


@pytest.mark.parametrize("impl", FAST)
def test_compiles_once_for_all_sizes(impl):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def f(q, k, v, bias, offsets):
        return global_attention(q, k, v, offsets, bias=bias, return_aux=LSE, impl=impl)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for seed, sizes in enumerate([(5, 12, 2), (7, 3), (11, 0, 14, 4)]):
        x = case(seed, sizes, d=12, dv=9, dtype=FP32, bias="pair")
        leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v, x.bias)]
        found = []
        for g in (compiled, f):
            o, aux = g(*leaves, x.offsets)
            grads = torch.autograd.grad((o, aux.lse), leaves, (x.do, x.dlse))
            found.append([o, aux.lse, *grads])
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
        return global_attention(t, t, t, x.offsets, key_offsets=x.offsets, impl=impl)

    found = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaf = x.q.detach().clone().requires_grad_()
        o = g(leaf)
        found.append([o, *torch.autograd.grad(o, leaf, x.do)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["cpp", "triton"])
def test_shapes_beyond_two_to_the_31_on_meta_tensors(impl):
    n, h, d = 3 * 2**30, 8, 32
    q, k, v = (torch.empty(n, h, d, device="meta") for _ in range(3))
    offsets = torch.empty(2**20 + 1, dtype=torch.int64, device="meta")
    call = q, k, v, 1.0, None, False, offsets, None, None
    o, lse = torch.ops.fastgt.global_attention_fwd(impl, *call)
    assert o.shape == (n, h, d)
    args = impl, o, None, lse, *call, True, True, True, False
    grads = torch.ops.fastgt.global_attention_bwd(*args)
    assert [None if g is None else g.shape for g in grads] == [(n, h, d)] * 3 + [None]


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU path's promise")
@pytest.mark.parametrize("sizes", [(4000,), (25,) * 160, (1000,) * 4], ids=["1", "160", "4"])
def test_memory_is_linear_in_the_nodes(sizes):
    n, h, d = 4000, 2, 16
    x = case(0, (3,), heads=h, d=d, dv=d, dtype=FP32)
    q, k, v, do = torch.randn(4, n, h, d)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    x = replace(x, q=q, k=k, v=v, do=do, dlse=q[..., 0], offsets=offsets)
    device = torch.device("cpu")
    room = torch.get_num_threads() * 4 * 2**21  # of threads, whatever the batch
    nodes = 4 * n * h * d
    pairs = 4 * h * sum(size * size for size in sizes)
    assert peak_extra_memory(lambda: evaluate(x, "cpp"), device) < 30 * nodes + room
    if len(sizes) == 1:
        assert pairs > 30 * nodes + room
        assert peak_extra_memory(lambda: evaluate(x, "reference"), device) > pairs


# ---- gates of heads


GATES = st.sampled_from([0.0, 0.0, 1.0, -0.5, 2.0])
SIZES = (5, 0, 14, 1)


def with_gate(x, gate, form, **more):
    """Outputs and gradients by name, of the gate's too where it is not bool."""
    leaves = {n: getattr(x, n).detach().clone().requires_grad_() for n in ("q", "k", "v", "bias")}
    y = x.having(**leaves)
    if gate.dtype != torch.bool:
        leaves["gate"] = gate = gate.detach().clone().requires_grad_()
    found = results(y, form, head_gate=gate, **more)
    with run_as(form):
        grads = torch.autograd.grad(
            list(found.values()), list(leaves.values()), [x.do, x.dlse], materialize_grads=True
        )
    found |= {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}
    return {name: t.detach() for name, t in found.items()}


def without(x, gate):
    """Head by head and graph by graph, of active heads alone."""
    leaves = {n: getattr(x, n).detach().clone().requires_grad_() for n in ("q", "k", "v", "bias")}
    leaves["gate"] = gate.detach().clone().requires_grad_()
    q, k, v, bias, gates = leaves.values()
    o = torch.zeros_like(x.do)
    lse = torch.full_like(x.dlse, -math.inf)
    pairs = 0
    group = q.shape[1] // k.shape[1]
    for g, (begin, end, first, last) in enumerate(x.bounds()):
        n, m = end - begin, last - first
        for h in range(q.shape[1]):
            one = gates[g, h] if gate.ndim == 2 else gates[h]
            if one == 0 or n == 0 or m == 0:
                continue
            at = slice(h, h + 1)
            kv = slice(h // group, h // group + 1)
            found, aux = global_attention(
                q[begin:end, at],
                k[first:last, kv],
                v[first:last, kv],
                key_offsets=torch.tensor([0, m], device=DEVICE),
                bias=bias[pairs : pairs + n * m, at],
                return_aux=LSE,
                impl="reference",
            )
            o = torch.index_put(
                o,
                (
                    torch.arange(begin, end, device=DEVICE)[:, None],
                    torch.tensor([h], device=DEVICE),
                ),
                found * one,
            )
            lse = torch.index_put(
                lse,
                (
                    torch.arange(begin, end, device=DEVICE)[:, None],
                    torch.tensor([h], device=DEVICE),
                ),
                aux.lse,
            )
        pairs += n * m
    grads = [torch.zeros_like(t) for t in leaves.values()]
    if o.requires_grad:
        grads = torch.autograd.grad(
            (o, lse), list(leaves.values()), (x.do, x.dlse), materialize_grads=True
        )
    found = {"o": o.detach(), "lse": lse.detach()}
    return found | {f"d{n}": g for n, g in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("per_graph", [False, True])
@pytest.mark.parametrize("form", IMPLS)
def test_masked_is_removed(form, per_graph):
    few = form == "triton" and DEVICE == "cpu"

    @settings(max_examples=5 if few else 20, suppress_health_check=list(HealthCheck))
    @given(data=st.data(), seed=st.integers(0, 2**31), heads=st.integers(1, 2))
    def check(data, seed, heads):
        x = case(seed, SIZES, keys=(4, 3, 18, 0), heads=heads, group=2, d=9, dv=5, bias="pair")
        rows = len(SIZES) if per_graph else 1
        gate = data.draw(st.lists(GATES, min_size=rows * 2 * heads, max_size=rows * 2 * heads))
        gate = torch.tensor(gate, dtype=FP64, device=DEVICE).view(rows, -1)
        gate = gate if per_graph else gate[0]
        all_close(with_gate(x, gate, form), without(x, gate))

    check()


@pytest.mark.parametrize("bias", ["key", "pair"])
@pytest.mark.parametrize("form", IMPLS)
def test_nan_in_a_masked_head_changes_nothing(form, bias):
    x = case(1, SIZES, heads=3, d=9, dv=5, bias=bias)
    gate = torch.rand(len(SIZES), 3, dtype=FP64, device=DEVICE) + 0.5
    gate[2, 1], gate[3], gate[0, 0] = 0, 0, 0
    clean = with_gate(x, gate, form)
    off = (gate == 0).repeat_interleave(torch.tensor(SIZES, device=DEVICE), 0)
    for t in (x.q, x.k, x.v):
        t[off] = torch.nan
    x.bias[off if bias == "key" else off[x.target]] = torch.nan
    all_close(with_gate(x, gate, form), clean)
    x.do[off] = x.dlse[off] = torch.nan
    found = with_gate(x, gate != 0, form)
    for name in ("o", "dq", "dk", "dv"):
        assert not found[name][off].any(), name


@pytest.mark.parametrize("shape", ["H", "GH"])
@pytest.mark.parametrize("form", IMPLS)
def test_a_gate_of_0_gets_the_exact_gradient_on_request(form, shape):
    x = case(2, SIZES, heads=3, d=9, dv=5, bias="key")
    gate = torch.tensor([1.0, 0.0, -0.5], dtype=FP64, device=DEVICE)
    gate = gate if shape == "H" else gate.expand(len(SIZES), -1).clone()
    plain = results(x, "reference")["o"]
    each = (x.do * plain).sum(2)  # of a node and a head
    wanted = torch.stack([each[a:b].sum(0) for a, b, _, _ in x.bounds()])
    wanted = wanted.sum(0) if shape == "H" else wanted
    dense = with_gate(x, gate, form, dense_gate_grad=True)
    close(dense["dgate"], wanted, "dgate")
    sparse = with_gate(x, gate, form)
    close(sparse["dgate"], torch.where(gate == 0, 0, wanted), "dgate")
    close(sparse["o"], dense["o"], "o")
    close(sparse["lse"], dense["lse"], "lse")


# ---- what is refused


def refused(error, message, **changes):
    x = case(0, (3, 7), dtype=FP32)
    call = {"q": x.q, "k": x.k, "v": x.v, "offsets": x.offsets, **changes}
    with pytest.raises(error, match=message):
        global_attention(**call)


def test_refusals():
    x = case(0, (3, 7), dtype=FP32)
    zeros = torch.zeros
    refused(TypeError, "q must be a tensor, got list", q=[1.0])
    refused(TypeError, "k must be float16.*got torch.int64", k=x.k.long())
    refused(TypeError, "v is torch.float64 but q is torch.float32", v=x.v.double())
    refused(ValueError, r"v must be \[N, H, D\], got \[10, 12\]", v=x.v.flatten(1))
    refused(ValueError, "v has 9 nodes but k has 10", v=x.v[:9])
    refused(ValueError, "k has 9 nodes but q has 10: pass key_offsets", k=x.k[:9], v=x.v[:9])
    refused(ValueError, "v has 1 heads but k has 2", v=x.v[:, :1])
    refused(ValueError, "k has head width 7 but q has 8", k=x.k[..., :7])
    refused(ValueError, "q's 2 heads must be a multiple of k's 0 heads", k=x.k[:, :0], v=x.v[:, :0])
    wide = zeros(10, 2, 513, device=DEVICE)
    refused(
        ValueError,
        "v has head width 513; supported are 1 to 512: .* scaled_dot_product_attention",
        v=wide,
    )
    ends = torch.tensor([0, 10], device=DEVICE)
    refused(ValueError, "key_offsets has 1 graphs but offsets has 2", key_offsets=ends)
    refused(
        ValueError,
        "key_offsets has 2 graphs but offsets has 1",
        key_offsets=x.offsets,
        offsets=None,
    )
    letters = r"bias must be \[M or pairs, H\] = \[10, 2\], got \[10, 3\]"
    refused(ValueError, letters, bias=zeros(10, 3, device=DEVICE))
    refused(TypeError, "bias is torch.float64 but q is torch.float32", bias=zeros(58, 2).double())
    refused(TypeError, "bias must be a tensor, got float", bias=1.0)
    message = r"bias must be \[M, H\] = \[10, 2\] or \[pairs, H\] = \[100, 2\], got \[58, 2\]"
    refused(ValueError, message, bias=zeros(58, 2, device=DEVICE), offsets=None)
    refused(ValueError, "scale must be finite, got inf", scale=math.inf)
    refused(TypeError, "scale must be a number, got Tensor: multiply q by it", scale=zeros(1))
    refused(ValueError, "dropout_p must be from 0 to 1, got 1.5", dropout_p=1.5)
    refused(ValueError, "has no weights; it has lse", return_aux=AuxRequest(weights=True))
    refused(ValueError, "has no edge_scores; it has lse", return_aux=AuxRequest(edge_scores=True))
    refused(ValueError, "impl must be one of", impl="cuda")
    message = r"head_gate must be \[H\] = \[2\] or \[G, H\] = \[2, 2\], got \[3\]"
    refused(ValueError, message, head_gate=zeros(3, device=DEVICE))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's offsets are not looked at")
def test_bad_offsets():
    refused(TypeError, "offsets must be a tensor of integers, got list", offsets=[0, 10])
    refused(ValueError, "offsets ends at 9 but there are 10 nodes", offsets=torch.tensor([0, 9]))
    keys = torch.tensor([0, 12, 10])
    refused(ValueError, "key_offsets decreases from 12 to 10 at 2", key_offsets=keys)
    refused(TypeError, "key_offsets must be int32 or int64", key_offsets=keys.double())
    message = r"bias must be \[M, H\] = \[10, 2\] or \[pairs, H\] = \[58, 2\], got \[57, 2\]"
    refused(ValueError, message, bias=torch.zeros(57, 2))


def test_a_forced_implementation_runs():
    x = case(0, (5, 7), dtype=FP16, bias="pair", drop=True)
    with fastgt.implementation("reference"):
        o = results(x, None)["o"]
    assert torch.equal(o, results(x, "reference")["o"])
    call = {**x.options, "bias": x.bias}
    assert torch.equal(o, reference.global_attention(x.q, x.k, x.v, x.offsets, **call))
    o, aux = attend(x, "reference")
    assert aux.weights is None
    assert torch.equal(o, results(x, "reference")["o"])

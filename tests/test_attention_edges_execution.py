"""neighborhood_attention with terms on edges: strides, repeatability, compiled code, memory."""

from dataclasses import replace

import laws
import pytest
import torch
from attention_cases import (
    ALL_TERMS,
    BF16,
    DEVICE,
    EDGE_TERMS,
    FAST,
    FP32,
    FP64,
    GATHERING,
    LAYOUTS,
    TERMS_BY_HEAD,
    all_close,
    arrange,
    attend,
    case,
    evaluate,
    op_arguments,
    same_bits,
    with_leaves,
)
from torch._dynamo.testing import CompileCounterWithBackend

from fastgt import AuxRequest, DropoutSeed, neighborhood_attention, philox
from fastgt.bench.memory import peak_extra_memory
from fastgt.contract import Dropout, EdgeTerms, HeadMask, Inputs, Logit, Saved, Switches, Upstream
from fastgt.testing import random_graph


@pytest.mark.parametrize("layout", [*LAYOUTS, "scalar"])
@pytest.mark.parametrize("impl", GATHERING)
def test_strides_of_upstream_gradients(impl, layout):
    x = case(6, 7, 30, heads=3, d=5, dv=6, terms="gate attr-value scores")
    laws.equals_its_oracle(EDGE_TERMS, impl, laws.with_upstream(x, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_strides_do_not_change_a_bit(impl, dtype, layout):
    for terms in (ALL_TERMS, TERMS_BY_HEAD):
        x = case(4, 9, 30, heads=2, group=2, d=16, dv=8, dtype=dtype, terms=terms)
        x = x.having(**{name: arrange(t, layout) for name, t in x.terms.items()})
        laws.strides_do_not_change_a_bit(EDGE_TERMS, impl, x)


@pytest.mark.parametrize("impl", GATHERING)
def test_inputs_are_left_alone_and_outputs_alias_nothing(impl):
    x = case(5, 8, 30, heads=1, d=4, dv=4, terms="gate key value attr-value scores drop")
    laws.inputs_are_left_alone_and_outputs_alias_nothing(EDGE_TERMS, impl, x)


@pytest.mark.parametrize("terms", [ALL_TERMS, TERMS_BY_HEAD])
@pytest.mark.parametrize("impl", GATHERING)
def test_bitwise_repeatable(impl, terms):
    interpreted = impl != "cpp" and DEVICE == "cpu"
    size = (16, 60) if interpreted else (100, 2000)
    x = case(1, *size, dtype=FP32, kind="hub", heads=1, terms=terms)
    laws.the_same_bits_every_time(EDGE_TERMS, impl, x, 2 if interpreted else 10)


@pytest.mark.skipif(DEVICE != "cpu", reason="threads are the CPU's")
@pytest.mark.parametrize("terms", [ALL_TERMS, TERMS_BY_HEAD])
def test_threads_do_not_change_a_bit(terms):
    x = case(1, 300, 4000, heads=3, kind="power_law", dtype=FP32, d=16, dv=16, terms=terms)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            found.append(evaluate(x, "cpp"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        same_bits(found[0], other)


@pytest.mark.skipif(DEVICE != "cpu", reason="threads are the CPU's")
@pytest.mark.parametrize("terms", ["attr-key attr-value", "attr-key scores"])
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=str)
@pytest.mark.parametrize(("nodes", "channels"), [(2000, 200), (30, 3), (2000, 1)])
def test_threads_do_not_change_products_with_weights_of_attributes(nodes, channels, dtype, terms):
    x = case(1, nodes, 3000, heads=1, d=17, dv=16, dtype=dtype, terms=terms)
    generator = x.generator
    sizes = {"edge_attr": (3000, channels)}
    sizes |= {name: (channels, *t.shape[1:]) for name, t in x.terms.items() if name not in sizes}
    made = {n: torch.randn(s, generator=generator, dtype=dtype) for n, s in sizes.items()}
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            found.append(evaluate(replace(x, terms=made), "cpp"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        same_bits(found[0], other)


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU path's lengths")
def test_rows_longer_than_a_chunk():
    for terms in (ALL_TERMS, TERMS_BY_HEAD):
        x = case(1, 6, 900, kind="hub", heads=3, group=2, eps=1e-6, terms=terms)
        all_close(evaluate(x, "cpp"), evaluate(x, "reference"))


@pytest.mark.parametrize("terms", ["scores gate", TERMS_BY_HEAD], ids=["gate", "others"])
@pytest.mark.parametrize("impl", FAST)
def test_compiles_whole_and_once(impl, terms):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(neighborhood_attention, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for seed, (n, e) in enumerate([(11, 20), (9, 31), (13, 15)]):
        x, leaves = with_leaves(case(seed, n, e, heads=2, d=8, dv=8, dtype=FP32, terms=terms))
        request = AuxRequest(lse=True, edge_scores=x.dscores is not None)
        options = {"return_aux": request, "impl": impl}
        if "numbered" in terms:
            key = torch.tensor([seed], device=DEVICE)
            numbers = torch.arange(e, device=DEVICE).flip(0)
            options |= {"dropout_p": 0.3, "dropout_seed": DropoutSeed(key, numbers)}
        found = []
        for f in (compiled, neighborhood_attention):
            o, aux = f(x.q, x.k, x.v, x.graph, edge_bias=x.bias, **x.terms, **options)
            y = [o, *(t for t in aux if t is not None)]
            upstream = (x.do, x.dlse, x.dscores)[: len(y)]
            found.append([*y, *torch.autograd.grad(y, list(leaves.values()), upstream)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("impl", FAST)
def test_two_layers_with_edge_terms_compile_with_dynamic_sizes(impl):
    torch._dynamo.reset()
    x = case(3, 8, 60, dv=4, d=4, dtype=FP32, terms="key")

    def f(q, k):
        for _ in range(2):
            q = neighborhood_attention(q, k, k, x.graph, edge_key=x.terms["edge_key"], impl=impl)
        return q

    q, k = (t.detach().requires_grad_() for t in (x.q, x.k))
    found = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")(q, k)
    torch.testing.assert_close(found, f(q, k))


@pytest.mark.parametrize("impl", FAST)
def test_compiled_dropout_draws_anew(impl):
    torch._dynamo.reset()
    x = case(3, 8, 60, dtype=FP32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(q):
        return neighborhood_attention(q, x.k, x.v, x.graph, dropout_p=0.5, impl=impl)

    torch.manual_seed(0)
    first, second = f(x.q), f(x.q)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("terms", [ALL_TERMS, TERMS_BY_HEAD, "shared scores"])
@pytest.mark.parametrize("impl", FAST)
def test_lazily_negated_edge_tensors(impl, terms):
    """What PyTorch's dispatcher resolves must not reach a kernel as it is stored."""
    x = case(1, 6, 20, heads=2, d=8, dv=8, terms=terms)
    lazy = {}
    for name, t in x.terms.items():
        lazy[name] = torch.complex(t, -t).conj().imag
        assert lazy[name].is_neg()
    if "shared" in terms:
        lazy["edge_value"] = lazy["edge_key"]
    all_close(evaluate(replace(x, terms=lazy), impl), evaluate(x, impl))


@pytest.mark.parametrize("impl", FAST)
def test_an_exported_module_runs_with_gradients_on(impl):
    from fastgt.nn import EdgeGatedAttention

    graph = random_graph(0, 6, 20, device=DEVICE)
    module = EdgeGatedAttention(8, 2, impl=impl).to(DEVICE)

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x, e):
            return self.inner(x, e, graph)

    x, e = torch.randn(6, 8, device=DEVICE), torch.randn(20, 8, device=DEVICE)
    exported = torch.export.export(Whole(), (x, e)).module()
    for a, b in zip(exported(x, e), module(x, e, graph), strict=True):
        torch.testing.assert_close(a, b)


def test_the_compiled_reference_drops_out_at_every_size():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(philox.kept, fullgraph=True, dynamic=True, backend=counter)
    key = torch.tensor([3])
    for edges in (9, 20, 31, 14):
        assert torch.equal(compiled(key, edges, 6, 0.4), philox.kept(key, edges, 6, 0.4))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("path", ["cpp", "gather"] if DEVICE == "cpu" else ["gather"])
def test_opcheck(path, shared):
    x = case(0, 4, 9, cols=3, heads=1, group=2, d=4, dv=4, dtype=FP32, terms="gate key value")
    graph = x.graph
    rows = [graph.row_ptr, graph.col, graph.edge]
    columns = list(graph.columns)
    if path != "cpp":
        plan = graph.plan("gather").settled
        rows, columns = list(graph.row_walk(plan)), list(graph.column_walk(plan))
    attr = torch.randn(9, 3, generator=x.generator).to(DEVICE)
    attr_q = torch.randn(4, 2, 3, generator=x.generator).to(DEVICE)
    gate, key = x.terms["edge_gate"], x.terms["edge_key"]
    gate = gate[..., 0] if shared else gate
    value = None if shared else x.terms["edge_value"]
    numbers = torch.arange(9, device=DEVICE) if shared else None
    # an edge's row and column have the same heads, as those of one graph do
    active = torch.tensor([[False, True]] * len(x.q), device=DEVICE) if shared else None
    call = {
        "inputs": Inputs(x.q, x.k, x.v),
        "terms": EdgeTerms(x.bias, gate, key, value, attr, attr_q if shared else None),
        "mask": HeadMask(active, active),
        "dropout": Dropout(torch.tensor([3], device=DEVICE), numbers, 0.3),
        "logit": Logit(0.5, -1.0, 1.0, 1e-6),
        "switches": Switches(
            key_is_value=shared, make_weights=True, make_scores=not shared, make_attr_o=True
        ),
    }
    fwd, bwd = torch.ops.fastgt.attention_fwd, torch.ops.fastgt.attention_bwd

    def check(call):
        flat = op_arguments(**call)
        torch.library.opcheck(fwd.default, (path, 0, rows, *flat))
        o, lse, _, scores, attr_o = fwd(path, 0, rows, *flat)
        upstream, saved = Upstream(o, lse, scores, attr_o), Saved(lse, None)
        needs = [t is not None for t in (*call["inputs"], *call["terms"])]
        for some in (needs, [False, True, *needs[2:6], False, True, False]):
            backward = path, 0, rows, columns, some, *upstream, *saved, *flat
            torch.library.opcheck(bwd.default, backward)

    check(call)


def test_shapes_beyond_two_to_the_31_on_meta_tensors():
    from test_attention_execution import huge_graph

    n, e, h, d, c = 3 * 2**30, 5 * 2**30, 8, 32, 16

    def tensor(*shape):
        return torch.empty(*shape, device="meta", requires_grad=True)

    q, k, v = (tensor(n, h, d) for _ in range(3))
    terms = {
        "edge_gate": tensor(e, h),
        "edge_key": tensor(e, h, d),
        "edge_attr": tensor(e, c),
        "edge_value_weight": tensor(c, h, d),
    }
    o = neighborhood_attention(q, k, v, huge_graph(n, e), **terms, dropout_p=0.5, impl="triton")
    assert o.shape == (n, h, d)
    leaves = [q, k, v, *terms.values()]
    for leaf, grad in zip(leaves, torch.autograd.grad(o, leaves, o), strict=True):
        assert leaf.shape == grad.shape


@pytest.mark.skipif(DEVICE == "cpu" and not FAST, reason="needs an implementation")
@pytest.mark.parametrize("impl", FAST)
def test_autocast_casts_every_edge_tensor(impl):
    for terms in ("gate key value attr-key scores", "factor shared attr-key attr-value"):
        x = case(3, 8, 30, dtype=FP32, d=8, dv=8, terms=terms)
        y, leaves = with_leaves(x)
        with torch.autocast(DEVICE, BF16):
            o = attend(y, impl)[0]
        assert o.dtype == BF16
        cast = {name: t.to(BF16) for name, t in x.terms.items()}
        if "shared" in terms:
            cast["edge_value"] = cast["edge_key"]
        plain = {name: getattr(x, name).to(BF16) for name in ("q", "k", "v", "bias")}
        assert torch.equal(o, attend(replace(x, **plain, terms=cast), impl)[0])
        grads = torch.autograd.grad(o, list(leaves.values()), x.do.to(BF16), materialize_grads=True)
        assert all(g.dtype == FP32 for g in grads)


@pytest.mark.parametrize("impl", ["cpp"] if DEVICE == "cpu" else ["triton"])
def test_memory_of_the_low_rank_form_does_not_grow_with_the_width(impl):
    """Peak beyond what is returned: O(N H D + E (H + C)), however wide the heads."""
    n, e, h, c = 500, 60_000, 4, 8
    graph, extra = random_graph(0, n, e, device=DEVICE), {}
    graph.columns  # noqa: B018  built once for a graph
    for d in (16, 128):
        generator = torch.Generator().manual_seed(0)
        q, k, v, do = (torch.randn(n, h, d, generator=generator).to(DEVICE) for _ in range(4))
        a = torch.randn(e, c, generator=generator).to(DEVICE)
        w = torch.randn(c, h, d, generator=generator).to(DEVICE)
        leaves = [t.requires_grad_() for t in (q, k, v, a, w)]

        def both(leaves=leaves, do=do):
            q, k, v, a, w = leaves
            terms = {"edge_attr": a, "edge_key_weight": w, "edge_value_weight": w}
            o = neighborhood_attention(q, k, v, graph, **terms, impl=impl)
            return torch.autograd.grad(o, leaves, do)

        both()
        extra[d] = peak_extra_memory(both, torch.device(DEVICE))
        assert extra[d] < e * h * d * 4 or d == 16
    # the difference is what nodes and weights have more, not edges
    assert extra[128] - extra[16] < 16 * n * h * 128 * 4
    assert extra[128] < e * h * 128 * 4 / 4

"""additive_attention: how it runs, whatever the strides, threads, tiles and compilers."""

from dataclasses import replace

import laws
import pytest
import torch
from additive_cases import ADDITIVE, ALL, EVERYTHING, WAYS, attend, case, evaluate, loops, walks
from attention_cases import BF16, DEVICE, FAST, FP16, FP32, IMPLS, LAYOUTS, all_close, same_bits
from torch._dynamo.testing import CompileCounterWithBackend

from fastgt import AuxRequest, DropoutSeed, Graph, additive_attention, reference
from fastgt.bench.memory import peak_extra_memory
from fastgt.prepared import Prepared
from fastgt.testing import with_buckets


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("d", [1, 8])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_strides_do_not_change_a_bit(impl, dtype, d, layout):
    x = case(4, 8, 24, dtype=dtype, heads=4, d=d, dv=8, layout=layout, terms=EVERYTHING)
    laws.strides_do_not_change_a_bit(ADDITIVE, impl, x)
    plain = case(4, 8, 24, dtype=dtype, heads=4, d=d, dv=8, layout=layout, terms="")
    laws.strides_do_not_change_a_bit(ADDITIVE, impl, plain)


@pytest.mark.parametrize("impl", FAST)
def test_one_tensor_in_other_strides_does_not_change_a_bit(impl):
    x, layouts = case(4, 7, 20, d=8, dtype=BF16, terms="key attr bias"), ["reversed", "sliced"]
    laws.one_tensor_in_other_strides_does_not_change_a_bit(ADDITIVE, impl, x, layouts)


@pytest.mark.parametrize("impl", ALL)
def test_inputs_are_left_alone_and_outputs_alias_nothing(impl):
    x = case(5, 7, 24, dtype=FP32, terms="key attr bias")
    laws.inputs_are_left_alone_and_outputs_alias_nothing(ADDITIVE, impl, x)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", WAYS)
def test_bitwise_repeatable(impl, dtype):
    interpreted = impl != "cpp" and DEVICE == "cpu"
    n, edges = (8, 40) if interpreted else (100, 2000)
    x = case(1, n, edges, kind="hub", dtype=dtype, terms=EVERYTHING)
    laws.the_same_bits_every_time(ADDITIVE, impl, x, 2 if interpreted else 20)


@pytest.mark.skipif(DEVICE != "cpu", reason="threads are the CPU's")
@pytest.mark.parametrize("terms", ["", EVERYTHING])
@pytest.mark.parametrize("d", [1, 8, 16])
def test_threads_do_not_change_a_bit(d, terms):
    x = case(1, 1000, 20_000, kind="power_law", dtype=FP32, heads=8, d=d, dv=8, terms=terms)
    laws.threads_do_not_change_a_bit(ADDITIVE, x)


@pytest.mark.skipif(DEVICE != "cpu", reason="groups of heads are those of the path on a CPU")
@pytest.mark.parametrize("d", [1, 16])
def test_heads_are_independent(d):
    """Alone, in a group, and in a second group, a head gets the same sums."""
    x = case(5, 40, 900, kind="hub", heads=11, d=d, dv=16, terms="", isolated=2)
    whole = evaluate(x, "cpp")
    for some in (slice(0, 1), slice(2, 4), slice(3, 11), slice(10, 11)):
        part = {name: t[some] if name == "weight" else t[:, some] for name, t in
                x.tensors().items()}  # fmt: skip
        alone = evaluate(x.having(**part), "cpp")
        expected = {name: t[some] if name == "dweight" else t[:, some] for name, t in whole.items()}
        all_close(alone, expected)


@pytest.mark.parametrize("turned", [False, True], ids=["row", "column"])
@pytest.mark.parametrize("d", [1, 4])
def test_sums_over_a_huge_hub_are_accurate(turned, d):
    edges = 100_000
    shape = {"rows": 500, "cols": 3} if turned else {"rows": 3, "cols": 500}
    x = case(0, edges=edges, dtype=FP32, d=d, terms="attr bias", **shape)
    index = x.edge_index.clone()
    index[0 if turned else 1] = 0
    laws.as_accurate_as_eager(ADDITIVE, FAST[0], x.onto(index))


@pytest.mark.parametrize("turned", [False, True], ids=["row", "column"])
def test_a_hub_beyond_one_segment(turned):
    """Rows and columns of few edges, of some, of segments that are combined in several steps."""
    pytest.importorskip("triton")
    degrees = torch.tensor([2, 50, 0, 1, 5, 9, 16])
    target = torch.arange(7).repeat_interleave(degrees)
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(5, target.shape, generator=generator)
    index = torch.stack([source, target])[:, torch.randperm(len(target), generator=generator)]
    index = index.flip(0) if turned else index
    x = case(0, 5 if turned else 7, len(target), cols=7 if turned else 5, terms=EVERYTHING)
    x = x.onto(index.to(DEVICE))
    x = replace(x, graph=with_buckets(x.graph, few=4, segment=5))
    all_close(evaluate(x, "triton"), loops(x))


@pytest.mark.skipif(DEVICE != "cpu", reason="runs on CPU tensors")
@pytest.mark.parametrize("d", [1, 16])
def test_memory_of_the_cpu_path(d):
    """Two numbers an edge and head beside outputs and gradients; with attributes too."""
    n, edges, heads = 500, 50_000, 8
    x = case(0, n, edges, heads=heads, d=d, dv=16, dtype=FP32, terms="attr")
    y, leaves = x.leaves()

    def both():
        o = additive_attention(y.q, y.k, y.v, y.graph, y.weight, **y.terms)
        return torch.autograd.grad(o, list(leaves.values()), x.do)

    both()  # the column walk and other first-time costs
    nodes, attributes = 4 * n * heads * 16, 4 * edges * 3
    allowed = 2 * 4 * edges * heads + 8 * nodes + 3 * attributes + 2**21
    assert d == 1 or allowed < 4 * edges * heads * d
    assert peak_extra_memory(both, torch.device("cpu")) <= allowed


@pytest.mark.parametrize("impl", FAST)
def test_compiles_whole_and_once(impl):
    """One compilation serves graphs of every size, forward and backward."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(additive_attention, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for seed, (n, e) in enumerate([(11, 20), (9, 31), (13, 15)]):
        x = case(seed, n, e, dtype=FP32, d=3, terms="key attr bias")
        y, leaves = x.leaves()
        numbers = torch.arange(e, device=DEVICE).flip(0)
        found, chance = [], DropoutSeed(torch.tensor(seed, device=DEVICE), numbers)
        for f in (compiled, additive_attention):
            o, aux = f(y.q, y.k, y.v, y.graph, y.weight, **y.terms, dropout_p=0.25,
                       dropout_seed=chance, impl=impl,
                       return_aux=AuxRequest(lse=True, weights=True))  # fmt: skip
            grads = torch.autograd.grad((o, aux.lse), list(leaves.values()), (x.do, x.dlse))
            found.append([o, aux.lse, aux.weights, *grads])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("impl", FAST)
def test_compiles_with_one_tensor_in_all_places(impl):
    torch._dynamo.reset()
    x = case(0, 6, 20, dtype=FP32, heads=6, d=4)

    def f(t):
        return additive_attention(t, t, t, x.graph, t[0], impl=impl)

    found = []
    for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), f):
        t = x.q.detach().requires_grad_()
        o = g(t)
        found.append([o, *torch.autograd.grad(o, t, x.do)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("edges", "layout", "terms"),
    [(9, "contiguous", EVERYTHING), (9, "reversed", "key"), (0, "contiguous", "attr")],
    ids=["plain", "strided", "empty"],
)
@pytest.mark.parametrize("impl", FAST)
def test_opcheck(impl, edges, layout, terms):
    x = case(0, 4, edges, cols=3, d=2, dtype=FP32, layout=layout, terms=terms)
    rows, columns = map(list, walks(x.graph, impl))
    mask = None, None
    if layout == "reversed":
        active = torch.rand(4, 2, device=DEVICE) < 0.6
        mask = active, active[:3]
    p = x.options.get("dropout_p", 0.0)
    seed = torch.tensor([3], device=DEVICE) if p else None
    numbers = torch.arange(edges, device=DEVICE) if edges else None
    names = ("edge_key", "edge_attr", "edge_key_weight", "edge_bias")
    terms = [x.terms.get(n) for n in names]
    inputs, rest = (x.q, x.k, x.v, x.weight), (*terms, *mask, seed, numbers, p)
    forward = torch.ops.fastgt.additive_attention_fwd.default
    for make_weights in (False, True):
        torch.library.opcheck(forward, (impl, *inputs, rows, 0.2, *rest, make_weights))
    lse = forward(impl, *inputs, rows, 0.2, *rest, False)[1]
    upstream = x.do, x.dlse if layout == "contiguous" else None, lse
    every = (True,) * 4 + tuple(n in x.terms for n in names)
    for needs in (every, (True,) + (False,) * 7):
        arguments = impl, *upstream, *inputs, rows, columns, 0.2, *needs, *rest
        torch.library.opcheck(torch.ops.fastgt.additive_attention_bwd.default, arguments)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("impl", FAST)
def test_checkpointing(impl, reentrant):
    x = case(3, 7, 24, dtype=FP32, terms=EVERYTHING)
    laws.checkpointing_changes_no_gradient(ADDITIVE, impl, x, reentrant=reentrant)


@pytest.mark.parametrize("impl", FAST)
def test_inference_never_sorts_the_column_walk(impl):
    x = case(0, 5, 12, dtype=FP32)
    laws.inference_never_sorts_the_column_walk(ADDITIVE, impl, x)
    q = x.q.detach().requires_grad_()
    additive_attention(q, x.k, x.v, x.graph, x.weight, impl=impl).sum().backward()
    assert vars(x.graph.prepared) == vars(Prepared())


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_the_inputs(impl):
    laws.autocast_casts_the_inputs(ADDITIVE, impl, case(3, 7, 24, dtype=FP32))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_the_other_half_too(impl):
    laws.autocast_casts_the_other_half_too(ADDITIVE, impl, case(3, 7, 24, dtype=FP16))


@pytest.mark.parametrize("impl", FAST)
def test_index_width_does_not_change_a_bit(impl):
    laws.index_width_does_not_change_a_bit(ADDITIVE, impl, case(3, 8, 24, kind="hub", dtype=FP32))


@pytest.mark.parametrize("impl", FAST)
def test_a_graph_planned_for_windows_is_gathered(impl):
    x = case(3, 8, 30)
    same_bits(evaluate(replace(x, graph=x.graph.plan("windows")), impl), evaluate(x, impl))


@pytest.mark.parametrize("impl", FAST)
def test_the_named_implementation_runs(monkeypatch, impl):
    """The definition serves second derivatives alone."""

    def refuse(*args, **kwargs):
        raise AssertionError("the definition ran")

    monkeypatch.setattr(reference, "masked_additive_attention", refuse)
    x = case(0, 3, 5, dtype=FP32)
    q = x.q.detach().requires_grad_()
    attend(replace(x, q=q), impl)[0].sum().backward()
    with pytest.raises(AssertionError, match="the definition ran"):
        attend(x, "reference")


def test_shapes_beyond_two_to_the_31_on_meta_tensors():
    n, e = 3 * 2**22, 5 * 2**22
    index = torch.empty(e, dtype=torch.int64, device="meta")
    bounds, ptr = (torch.empty(s, dtype=torch.int64, device="meta") for s in (2, n + 1))
    graph = Graph(n, n, ptr, index, index, bounds, bounds, Prepared())
    q, k, v = (torch.empty(n, 8, 64, device="meta") for _ in range(3))
    weight, key = (torch.empty(s, 8, 64, device="meta") for s in (1, e))
    request = AuxRequest(lse=True, weights=True)
    o, aux = additive_attention(
        q, k, v, graph, weight[0], edge_key=key, return_aux=request, impl="triton"
    )
    assert [t.shape for t in (o, aux.lse, aux.weights)] == [(n, 8, 64), (n, 8), (e, 8)]

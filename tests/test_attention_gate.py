"""head_gate of neighborhood_attention: a masked head is a head that is not there."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from attention_cases import (
    BF16,
    DEVICE,
    FAST,
    FP32,
    FP64,
    IMPLS,
    PLANS,
    all_close,
    attend,
    case,
    close,
    evaluate,
    op_arguments,
    planned,
    same_bits,
    term_words,
    with_leaves,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from fastgt import AuxRequest, Graph, neighborhood_attention, reference
from fastgt.contract import EdgeTerms, HeadMask, Inputs, Saved, Switches, Upstream

GATES = st.sampled_from([0.0, 0.0, 1.0, -0.5, 2.0])
WAYS = [*IMPLS, *PLANS[1:]]
INTERPRETED = ("triton", *PLANS) if DEVICE == "cpu" else ()
ALL_TERMS = "gate shared attr-key attr-value drop scores"


def in_graphs(x, *, plan="gather"):
    """The case on a batch of four graphs, one of them empty."""
    n = x.graph.num_rows
    ptr = torch.tensor([0, n // 3, n // 3, n * 2 // 3, n], device=DEVICE)
    source, target = x.edge_index
    if n:
        graph = torch.searchsorted(ptr, target, right=True) - 1
        source = ptr[graph] + source % ptr.diff()[graph].clamp(min=1)
    graph = Graph.from_edge_index(torch.stack([source, target]), n, graph_ptr=ptr)
    return replace(x, edge_index=torch.stack([source, target]), graph=planned(graph, plan))


def rows_of(x, gate):
    """A gate for every row and head, [N, H]."""
    if gate.ndim == 1:
        return gate.expand(x.graph.num_rows, -1)
    return gate.repeat_interleave(x.graph.graph_ptr.diff(), 0)


def evaluate_gated(x, gate, way, **more):
    """As ``evaluate``, with the gate's gradient where it is not bool."""
    if way in PLANS:
        x, way = replace(x, graph=planned(x.graph, way)), "triton"
    y, leaves = with_leaves(x)
    if gate.dtype != torch.bool:
        gate = gate.detach().clone().requires_grad_()
        leaves["gate"] = gate
    o, lse, weights, *scores = attend(y, way, head_gate=gate, **more)
    outputs = [(o, x.do), (lse, x.dlse), *((t, x.dscores) for t in scores)]
    ys, dys = zip(*outputs, strict=True)
    grads = torch.autograd.grad(ys, list(leaves.values()), dys, materialize_grads=True)
    found = {"o": o, "lse": lse, "weights": weights}
    if scores:
        found["scores"] = scores[0]
    found |= {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
    return {name: t.detach() for name, t in found.items()}


def without(x, gate):
    """By the plain definition without gates, masked heads' results and gradients taken away."""
    rows = rows_of(x, gate)
    on = rows != 0
    edges = on[x.target]
    plain = replace(
        x,
        do=torch.where(on[..., None], x.do * rows[..., None], 0),
        dlse=torch.where(on, x.dlse, 0),
        dscores=None if x.dscores is None else torch.where(edges[..., None], x.dscores, 0),
    )
    found = evaluate(plain, "reference")
    per_row = torch.where(on, (x.do * found["o"]).sum(2), 0)
    if gate.ndim == 1:
        found["dgate"] = per_row.sum(0)
    else:
        ends = x.graph.graph_ptr.tolist()
        parts = [per_row[a:b].sum(0) for a, b in itertools.pairwise(ends)]
        found["dgate"] = torch.stack(parts)
    found["o"] = torch.where(on[..., None], found["o"] * rows[..., None], 0)
    found["lse"] = torch.where(on, found["lse"], -torch.inf)
    found["weights"] = torch.where(edges, found["weights"], 0)
    if "scores" in found:
        found["scores"] = torch.where(edges[..., None], found["scores"], 0)
    return found


@pytest.mark.parametrize("per_graph", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_masked_is_removed(way, per_graph):
    few = way in INTERPRETED
    windows = way.startswith(("windows", "graphs"))

    @settings(max_examples=8 if few else 60, suppress_health_check=list(HealthCheck))
    @given(
        data=st.data(),
        seed=st.integers(0, 2**31),
        heads=st.integers(1, 3),
        group=st.sampled_from([1, 1, 2, 3]),
        rows=st.integers(0, 12 if few else 50),
        edges=st.integers(0, 40 if few else 200),
        terms=st.just("") if windows else term_words(),
        clamped=st.booleans(),
        eps=st.sampled_from([0.0, 0.5]),
    )
    def check(data, seed, heads, group, rows, edges, terms, clamped, eps):
        edges = edges if rows else 0
        x = case(
            seed, rows, edges, heads=heads, group=group, d=6, dv=5, terms=terms, eps=eps, isolated=1
        )
        x = in_graphs(x)
        if clamped:
            x.options["logit_clamp"] = (-0.7, 0.9)
        h, graphs = heads * group, 4 if per_graph else 1
        gate = data.draw(st.lists(GATES, min_size=graphs * h, max_size=graphs * h))
        gate = torch.tensor(gate, dtype=FP64, device=DEVICE).view(graphs, h)
        gate = gate if per_graph else gate[0]
        all_close(evaluate_gated(x, gate, way), without(x, gate), 1e-8)

    check()


def test_masked_is_sliced_away():
    """Heads that are not there at all, not only without upstream gradients."""
    x = case(3, heads=3, group=2, terms="gate shared attr-value scores")
    gate = torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0, 0.5], dtype=FP64, device=DEVICE)
    query, key = [0, 4, 5], [0, 2]
    # one query head reads the first key head, two the last: each pair by itself
    found = evaluate_gated(x, gate, "cpp" if DEVICE == "cpu" else "triton")
    assert not found["dk"][:, 1].any()
    for kv, mine in zip(key, ([0], [4, 5]), strict=True):
        terms = {name: t if name == "edge_attr" else t[:, mine] for name, t in x.terms.items()} | {
            "edge_value": x.terms["edge_key"][:, mine]
        }
        part = replace(
            x, q=x.q[:, mine], k=x.k[:, kv : kv + 1], v=x.v[:, kv : kv + 1],
            bias=x.bias[:, mine], terms=terms, do=x.do[:, mine], dlse=x.dlse[:, mine],
            dscores=x.dscores[:, mine],
        )  # fmt: skip
        alone = evaluate_gated(part, gate[mine], "reference")
        for name in ("o", "lse", "weights", "scores", "dq", "dbias"):
            close(found[name][:, mine], alone[name], name)
        close(found["dk"][:, kv], alone["dk"][:, 0], "dk")
        close(found["dv"][:, kv], alone["dv"][:, 0], "dv")
    assert not found["o"][:, [h for h in range(6) if h not in query]].any()


@pytest.mark.parametrize("per_graph", [False, True])
@pytest.mark.parametrize("terms", ["", ALL_TERMS, "factor key value attr-key attr-value"])
@pytest.mark.parametrize("way", WAYS)
def test_nan_in_a_masked_head_changes_nothing(way, terms, per_graph):
    if terms and way.startswith(("windows", "graphs")):
        pytest.skip("edge terms gather")
    x = in_graphs(case(1, 12, 50, heads=3, group=2, d=6, dv=5, terms=terms))
    gate = torch.rand(4, 6, dtype=FP64, device=DEVICE) + 0.5
    gate[:, 1] = 0
    if per_graph:
        gate[2, :4], gate[3], gate[0, 5] = 0, 0, 0
    else:
        gate = gate[0]
        gate[:4] = 0
    clean = evaluate_gated(x, gate, way)
    off = rows_of(x, gate) == 0  # [N, H]
    edges = off[x.target]
    key_off = off.unflatten(1, (3, 2)).all(2)
    with torch.no_grad():
        x.q[off] = torch.nan
        x.k[key_off], x.v[key_off] = torch.nan, torch.nan
        x.bias[edges] = torch.nan
        for name, t in x.terms.items():
            if name in ("edge_gate", "edge_key", "edge_value"):
                t[edges] = torch.nan
            if name.endswith("weight"):
                t[:, off.all(0)] = torch.nan
    all_close(evaluate_gated(x, gate, way), clean)
    x.do[off] = torch.nan
    x.dlse[off] = torch.nan
    if x.dscores is not None:
        x.dscores[edges] = torch.nan
    found = evaluate_gated(x, gate != 0, way)
    assert "dgate" not in found
    for name, t in found.items():
        assert not t.isnan().any(), name
        if name in ("o", "dq"):
            assert not t[off].any(), name
        if name in ("dk", "dv"):
            assert not t[key_off].any(), name
        if name in ("weights", "scores", "dbias", "dedge_gate", "dedge_key", "dedge_value"):
            assert not t[edges].any(), name


@pytest.mark.parametrize("per_graph", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_gate_of_0_gets_the_exact_gradient_on_request(impl, per_graph):
    x = in_graphs(case(2, heads=3, terms="gate key attr-value scores"))
    gate = torch.tensor([1.0, 0.0, -0.5], dtype=FP64, device=DEVICE)
    gate = gate.expand(4, -1).clone() if per_graph else gate
    each = (x.do * evaluate(x, "reference")["o"]).sum(2)
    wanted = each.sum(0)
    if per_graph:
        ends = x.graph.graph_ptr.tolist()
        wanted = torch.stack([each[a:b].sum(0) for a, b in itertools.pairwise(ends)])
    dense = evaluate_gated(x, gate, impl, dense_gate_grad=True)
    close(dense["dgate"], wanted, "dgate")
    sparse = evaluate_gated(x, gate, impl)
    close(sparse["dgate"], torch.where(gate == 0, 0, wanted), "dgate")
    for name in set(sparse) - {"dgate"}:
        close(sparse[name], dense[name], name)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_bool_gate_has_no_gradient_to_be_made_exact(impl):
    x = in_graphs(case(2, heads=3))
    gate = torch.tensor([True, False, True], device=DEVICE)
    dense = evaluate_gated(x, gate, impl, dense_gate_grad=True)
    same_bits(dense, evaluate_gated(x, gate, impl))
    assert not dense["o"][:, 1].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_upstream_of_a_masked_head_does_not_reach_its_gate(impl):
    x = in_graphs(case(2, heads=3))
    for gate in (torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 0.0, 2.0]).repeat(4, 1)):
        gate = gate.to(DEVICE, FP64)
        clean = evaluate_gated(x, gate, impl)["dgate"]
        x.do[:, 1] = torch.nan
        found = evaluate_gated(x, gate, impl)["dgate"]
        x.do[:, 1] = 1.0
        close(found, torch.where(gate == 0, 0, clean), "dgate")


@pytest.mark.parametrize("way", WAYS)
def test_all_masked(way):
    terms = "" if way.startswith(("windows", "graphs")) else ALL_TERMS
    x = in_graphs(case(3, heads=2, terms=terms))
    for name, t in evaluate_gated(x, torch.zeros(2, dtype=FP64, device=DEVICE), way).items():
        assert (t == -torch.inf).all() if name == "lse" else not t.any(), name


@pytest.mark.parametrize("way", WAYS)
def test_none_masked_is_ungated(way):
    x = in_graphs(case(4, heads=3, group=2, d=8, dtype=FP32))
    plain = evaluate(x, way)
    found = evaluate_gated(x, torch.ones(6, dtype=torch.bool, device=DEVICE), way)
    if way in ("cpp", "reference"):
        same_bits(found, plain)
    all_close(found, plain, 1e-5)


@pytest.mark.parametrize("impl", FAST)
def test_long_rows(impl):
    """Rows, and columns, that several programs share, where one of two heads is masked."""
    x = in_graphs(case(5, 6, 60, heads=2, kind="hub", plan="buckets"), plan="buckets")
    gate = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]], device=DEVICE)
    all_close(evaluate_gated(x, gate.double(), impl), without(x, gate.double()), 1e-8)


@pytest.mark.parametrize("impl", [*IMPLS, "windows 16", "graphs 64"])
def test_bipartite_graphs(impl):
    x = case(7, 5, 9, cols=4, heads=2, d=3, dv=2)
    graph = Graph.batch([x.graph, x.graph])
    twice = {name: torch.cat([getattr(x, name)] * 2) for name in ("q", "k", "v", "bias", "do")}
    both = replace(x, graph=graph, edge_index=graph.edge_index, dlse=x.dlse.repeat(2, 1), **twice)
    gate = torch.tensor([[0.5, 0.0], [0.0, -1.0]], dtype=FP64, device=DEVICE)
    found = evaluate_gated(both, gate, impl)
    all_close(found, without(both, gate), 1e-8)
    first, second = (evaluate_gated(x, g, impl) for g in gate)
    close(found["dk"], torch.cat([first["dk"], second["dk"]]), "dk")


@pytest.mark.parametrize("impl", FAST)
def test_second_derivatives(impl):
    x = in_graphs(case(6, 6, 14, heads=2, d=3, dv=2, biased=False))
    gate = torch.tensor([0.7, 0.0], dtype=FP64, device=DEVICE)
    leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]

    def call(*t):
        return neighborhood_attention(*t, x.graph, head_gate=gate, impl=impl)

    assert torch.autograd.gradgradcheck(call, leaves)
    first = torch.autograd.grad(call(*leaves).square().sum(), leaves[0], create_graph=True)[0]
    (second,) = torch.autograd.grad(first.square().sum(), leaves[2])
    assert second[:, 0].any()
    assert not second[:, 1].any()
    attr = torch.randn(14, 2, dtype=FP64, device=DEVICE, requires_grad=True)
    weight = torch.randn(2, 2, 3, dtype=FP64, device=DEVICE)

    def with_attributes(q, attr):
        more = {"edge_attr": attr, "edge_key_weight": weight}
        k, v = x.k, x.v
        return neighborhood_attention(q, k, v, x.graph, head_gate=gate, impl=impl, **more)

    assert torch.autograd.gradgradcheck(with_attributes, (leaves[0], attr))


@pytest.mark.parametrize("impl", FAST)
def test_opcheck(impl):
    x = in_graphs(case(0, heads=2, dtype=FP32))
    ops, path = torch.ops.fastgt, "cpp" if impl == "cpp" else "gather"
    active = torch.tensor([[True, False]], device=DEVICE).expand(x.graph.num_rows, -1).contiguous()
    rows = (x.graph.row_ptr, x.graph.col, x.graph.edge)
    columns = tuple(x.graph.columns)
    columns = columns if impl == "cpp" else (columns[0], columns[1], columns[3])
    changes = {"mask": HeadMask(active, active), "switches": Switches(make_weights=True)}
    flat = op_arguments(Inputs(x.q, x.k, x.v), terms=EdgeTerms(x.bias), **changes)
    torch.library.opcheck(ops.attention_fwd.default, (path, 0, rows, *flat))
    o, lse, *_ = ops.attention_fwd(path, 0, rows, *flat)
    given = *Upstream(o, lse, None, None), *Saved(lse, None)
    needs = [True] * 4 + [False] * 5
    backward = path, 0, rows, columns, needs, *given, *flat
    torch.library.opcheck(ops.attention_bwd.default, backward)


@pytest.mark.parametrize("terms", ["", "attr-key attr-value drop"])
@pytest.mark.parametrize("impl", FAST)
def test_compiles_once_for_all_gates(impl, terms):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(neighborhood_attention, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for seed, on in enumerate([(1.0, 0.0), (0.0, 2.0), (0.0, 0.0)]):
        x = in_graphs(case(seed, 12 + seed, 40 + seed, heads=2, dtype=FP32, terms=terms))
        gate = torch.tensor(on, device=DEVICE)
        options = {k: v for k, v in x.options.items() if k != "scale"} | x.terms
        if terms:
            options["dropout_seed"] = torch.tensor([seed], device=DEVICE)
        call = {"edge_bias": x.bias, "head_gate": gate, "impl": impl, **options}
        leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]
        found = []
        for attend_with in (compiled, neighborhood_attention):
            out = attend_with(*leaves, x.graph, **call)
            found.append([out, *torch.autograd.grad(out, leaves, x.do)])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
        counts.append(counter.frame_count)
    assert counts[1] == counts[2]


@pytest.mark.parametrize("impl", FAST)
def test_16_bits_and_a_gate_of_32(impl):
    x, wide = (in_graphs(case(5, heads=3, dtype=dtype)) for dtype in (BF16, FP64))
    gate = torch.tensor([1.0, 0.0, 0.3], dtype=FP32, device=DEVICE)
    found = evaluate_gated(x, gate, impl)
    assert found["o"].dtype == BF16
    assert found["dgate"].dtype == FP32
    wanted = without(wide, gate.double())["dgate"]
    assert (found["dgate"] - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("per_graph", [False, True])
def test_gradients_of_gates_are_not_summed_in_16_bits(dtype, per_graph):
    n = 20_000
    nodes = torch.arange(n, device=DEVICE)
    graph = Graph.from_edge_index(
        nodes.expand(2, -1), n, graph_ptr=torch.tensor([0, n], device=DEVICE)
    )
    v = (torch.rand(n, 2, 8, generator=torch.Generator().manual_seed(0)) + 0.5).to(DEVICE, dtype)
    gate = torch.ones((1, 2) if per_graph else (2,), device=DEVICE, requires_grad=True)
    neighborhood_attention(v, v, v, graph, head_gate=gate).float().sum().backward()
    wanted = v.double().sum((0, 2)).view_as(gate)  # beyond float16's range
    assert ((gate.grad - wanted).abs() < 1e-5 * wanted).all()


def test_a_gate_is_not_rounded_to_16_bits():
    x = in_graphs(case(5, heads=2, dtype=torch.float16, isolated=3))
    gate = torch.tensor([1e6, 1e-9], device=DEVICE)
    out = neighborhood_attention(x.q, x.k, x.v, x.graph, head_gate=gate)
    assert not out[x.isolated()].any()  # 0 * inf would be NaN


def test_vmap_over_gates_of_the_plain_definition():
    x = in_graphs(case(1, heads=2))
    gates = torch.tensor([[1.0, 0.0], [0.5, 2.0]], dtype=FP64, device=DEVICE)

    def call(gate):
        return neighborhood_attention(x.q, x.k, x.v, x.graph, head_gate=gate, impl="reference")

    close(torch.vmap(call)(gates), torch.stack([call(gate) for gate in gates]), "o")


def test_refusals():
    x = in_graphs(case(6, heads=2, dtype=FP32))

    def refused(error, message, gate):
        with pytest.raises(error, match=message):
            neighborhood_attention(x.q, x.k, x.v, x.graph, head_gate=gate)

    one = torch.ones(2, device=DEVICE)
    refused(TypeError, "head_gate must be a tensor, got list", [1.0, 0.0])
    refused(TypeError, r"head_gate must be float16.*got torch\.int64", one.long())
    for shape in ((3,), (1, 2), (4, 3), (4, 2, 1)):
        message = r"head_gate must be \[H\] = \[2\] or \[G, H\] = \[4, 2\], got"
        refused(ValueError, message, torch.ones(shape, device=DEVICE))
    refused(ValueError, "head_gate is on meta but the nodes are on", one.to("meta"))
    if DEVICE == "cpu":
        refused(ValueError, r"head_gate is NaN at heads \[1\]", torch.tensor([0.0, torch.nan]))


@pytest.mark.parametrize("terms", ["", ALL_TERMS])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("graphs", [False, True], ids=["H", "G H"])
def test_the_reference_takes_the_gate_as_the_operator_does(graphs, dense, terms):
    x = in_graphs(case(4, 11, 30, heads=2, d=4, dv=4, terms=terms, eps=0.1))
    shape = (x.graph.num_graphs, 2) if graphs else (2,)
    gate = torch.arange(1.0, 1 + 2 * shape[0], dtype=FP64, device=DEVICE)[
        : torch.Size(shape).numel()
    ]
    gate = torch.where(gate % 2 == 0, 0, gate).reshape(shape).requires_grad_()
    request = AuxRequest(lse=True, weights=True, edge_scores=True)
    options = x.options | {"dense_gate_grad": dense, "return_aux": request}
    leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v)]
    results = []
    for attention in (
        reference.neighborhood_attention,
        functools.partial(neighborhood_attention, impl="reference"),
    ):
        out, aux = attention(
            *leaves, x.graph, edge_bias=x.bias, head_gate=gate, **x.terms, **options
        )
        grads = torch.autograd.grad((out, aux.lse), (*leaves, gate), (x.do, x.dlse))
        results.append((out, *aux, *grads))
    for a, b in zip(*results, strict=True):
        close(a, b)

"""additive_attention: its values, by loops, by identities and as torch-geometric's layers."""

import itertools
from dataclasses import replace

import laws
import pytest
import torch
from additive_cases import ADDITIVE, ALL, EVERYTHING, WAYS, attend, case, evaluate, examples
from attention_cases import (
    BF16,
    DEVICE,
    FAST,
    FP16,
    FP32,
    FP64,
    IMPLS,
    LAYOUTS,
    all_close,
    close,
    same_bits,
)

from fastgt import Graph, additive_attention
from fastgt.testing import PROBLEMS

test_reference_is_the_equations = ADDITIVE.obeys(
    laws.equals_its_oracle, 40, ["reference"], dtype=FP64
)
test_implementations_agree_in_float64 = ADDITIVE.obeys(laws.equals_its_oracle, 60, FAST, dtype=FP64)


@pytest.mark.parametrize("d", [1, 2, 4, 7, 8, 16, 33])
@pytest.mark.parametrize("heads", [1, 5, 8, 11])
@pytest.mark.parametrize("impl", FAST[:1])
def test_heads_and_widths(impl, heads, d):
    """Heads that share a vector, that fill one, that have one number, and that go in two groups."""
    for terms in ("", EVERYTHING):
        x = case(7, 9, 60, cols=7, kind="hub", isolated=2, heads=heads, d=d, dv=6, terms=terms)
        laws.equals_its_oracle(ADDITIVE, impl, x)
        laws.as_accurate_as_eager(ADDITIVE, impl, x.having(**in_float32(x)))


def in_float32(x):
    return {name: t.float() for name, t in x.tensors().items()}


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[3]])
@pytest.mark.parametrize("impl", ALL)
def test_everything_at_once(impl, layout):
    """No two sizes equal, no power of two, every option in use, several blocks of channels."""
    x = case(7, 6, 30, cols=7, kind="hub", isolated=2, heads=3, d=37, dv=21, terms=EVERYTHING,
             layout=layout)  # fmt: skip
    laws.equals_its_oracle(ADDITIVE, impl, x)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_as_accurate_as_eager(impl, dtype):
    ADDITIVE.check(laws.as_accurate_as_eager, 24, impl, dtype=dtype)


@pytest.mark.parametrize("d", [1, 8])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", WAYS)
def test_half_precision_only_rounds_the_result(impl, dtype, d):
    edges = 3000 if impl == "cpp" or DEVICE == "cuda" else 90
    x = case(3, 4, edges, kind="hub", dtype=dtype, heads=2, d=d, dv=8)
    laws.half_precision_only_rounds(ADDITIVE, impl, x)


test_renumbering_nodes_renumbers_the_result = ADDITIVE.obeys(
    laws.renumbering_nodes_renumbers_the_result, 8, dtype=FP64, cols=None
)
# dropout is a function of an edge's number
test_reordering_edges_reorders_only_edge_tensors = ADDITIVE.obeys(
    laws.reordering_edges_reorders_only_edge_tensors, 8, dtype=FP64, terms="attr bias key"
)
test_a_duplicate_edge_adds_log_2_to_its_logits = ADDITIVE.obeys(
    laws.a_duplicate_edge_adds_log_2_to_its_logits, 8, dtype=FP64, terms="bias"
)
test_rows_without_edges_give_zero = ADDITIVE.obeys(
    laws.rows_without_edges_give_zero, 8, dtype=FP32, isolated=3
)
test_a_row_depends_on_its_neighbourhood_only = ADDITIVE.obeys(
    laws.a_row_depends_on_its_neighbourhood_only, 8, dtype=FP64
)
test_a_constant_added_to_a_rows_logits_changes_only_the_lse = ADDITIVE.obeys(
    laws.a_constant_added_to_a_rows_logits_changes_only_the_lse, 8, dtype=FP64, terms="bias key"
)
test_partitions_of_the_edges_merge_through_the_lse = ADDITIVE.obeys(
    laws.partitions_of_the_edges_merge_through_the_lse, 8, dtype=FP64, terms="attr bias"
)


@examples(8, dtype=FP64, terms="key bias")
def test_weights_sum_to_one_and_the_output_is_their_mean(impl, case):
    laws.weights_sum_to_one(ADDITIVE, impl, case, case.v[case.source])


@pytest.mark.parametrize("terms", ["", EVERYTHING])
@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("impl", IMPLS)
def test_no_edges_and_no_nodes(impl, rows, cols, terms, d):
    x = case(0, rows, 0, cols=cols, terms=terms, d=d)
    found = laws.without_edges_all_is_zero(ADDITIVE, impl, x)
    assert found["o"].shape == (rows, 2, 4)
    assert found["weights"].shape == (0, 2)


@pytest.mark.parametrize("d", [1, 5])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_batch_is_its_graphs_one_by_one(impl, d):
    """Empty graphs inside and at the end; the sums over all graphs are NaN, and left out."""
    sizes = [(5, 14), (0, 0), (3, 0), (4, 9), (2, 0), (0, 0)]
    singles = [case(i, n, e, d=d, terms="key bias") for i, (n, e) in enumerate(sizes)]
    weight = singles[0].weight
    parts = [replace(x, weight=weight) for x in singles]
    spoilt = parts[3]
    for name, tensor in spoilt.tensors().items():
        if name != "weight":
            tensor.fill_(torch.nan)
    graph = Graph.batch([x.graph for x in parts])
    joined = {
        name: torch.cat([x.tensors()[name] for x in parts])
        for name in spoilt.tensors()
        if name != "weight"
    }
    index = torch.cat([x.edge_index for x in parts], 1)
    whole = evaluate(replace(spoilt, graph=graph, edge_index=index).having(**joined), impl)
    del whole["dweight"]
    for i, x in enumerate(parts):
        if i == 3:
            continue
        alone = evaluate(x, impl)
        for name, y in whole.items():
            mine = y.split([part.sizes[x.over(name)] for part in parts])[i]
            close(mine, alone[name], name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "edge_key", "edge_attr", "edge_bias", "do"])
@pytest.mark.parametrize("d", [1, 4])
@pytest.mark.parametrize("impl", FAST)
def test_nan_and_infinity_stay_with_the_rows_that_use_them(impl, where, value, d):
    x = case(4, 9, 20, cols=10, dtype=FP32, isolated=1, d=d, terms="key attr bias")
    found, hit = laws.a_value_stays_with_its_rows(ADDITIVE, impl, x, where, value)
    if where != "do" and value != value:
        assert not found["o"][hit["rows"]].isfinite().all()


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e3])
@pytest.mark.parametrize("d", [1, 5])
@pytest.mark.parametrize("impl", WAYS)
def test_constant_values_give_no_gradient_to_logits(impl, size, dtype, d):
    x = case(5, 8, 40, dtype=dtype, d=d)
    x = replace(x.having(edge_bias=x.terms["edge_bias"] * size), v=torch.full_like(x.v, 1.7))
    bound = 200 * torch.finfo(FP64 if dtype == FP64 else FP32).eps
    laws.constant_values_give_no_gradient_to_logits(ADDITIVE, impl, x, {"dedge_bias": bound})


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", ALL)
def test_a_single_edge_copies_its_value(impl, dtype):
    x = case(1, 9, 9, dtype=dtype, terms="")
    laws.a_single_edge_copies_its_value(ADDITIVE, impl, x, x.v)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("impl", WAYS)
def test_huge_logits(impl, size):
    x = case(2, 7, 30, dtype=FP32, isolated=1)
    bias = x.terms["edge_bias"] + size
    bias[:, 0] = (x.terms["edge_bias"][:, 0] * size).round()
    laws.huge_logits_leave_no_nan(ADDITIVE, impl, x.having(edge_bias=bias))


@pytest.mark.parametrize("dtype", [FP64, FP32, FP16], ids=str)
@pytest.mark.parametrize("d", [1, 5])
@pytest.mark.parametrize("impl", ALL)
def test_edges_of_minus_infinity_do_not_exist(impl, dtype, d):
    """The weight's gradient has no entry for an edge or a node: it is a sum over all of them."""

    def by_entry(x, impl):
        return {name: y for name, y in evaluate(x, impl).items() if name != "dweight"}

    x = case(7, 7, 40, dtype=dtype, d=d)
    laws.edges_of_minus_infinity_do_not_exist(replace(ADDITIVE, evaluate=by_entry), impl, x)


@pytest.mark.parametrize("d", [1, 5])
@pytest.mark.parametrize("impl", WAYS)
def test_rows_that_attend_to_nothing_ignore_upstream_gradients(impl, d):
    """Without edges, or with logits that are all -inf."""
    x = case(7, 7, 30, dtype=FP32, isolated=2, d=d)
    dead, nothing = x.target == x.target[0], x.isolated()
    nothing[x.target[0]] = True
    x = x.having(edge_bias=x.terms["edge_bias"].masked_fill(dead[:, None], -torch.inf))
    clean = evaluate(x, impl)
    do, dlse = x.do.clone(), x.dlse.clone()
    do[nothing], dlse[nothing] = torch.nan, torch.nan
    same_bits(evaluate(replace(x, do=do, dlse=dlse), impl), clean)


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("impl", ALL)
def test_the_slope_at_zero_is_the_negative_one(impl, d):
    """As torch's: a sum of exactly 0 has the derivative of those below."""
    x = case(3, 5, 20, d=d, terms="")
    x = replace(x, q=torch.zeros_like(x.q), k=torch.zeros_like(x.k))
    found = evaluate(x, impl)
    all_close(found, ADDITIVE.oracle(x))
    tilted = evaluate(replace(x, options=x.options | {"negative_slope": 0.6}), impl)
    close(tilted["dk"], 3 * found["dk"])
    assert found["dk"].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_gatv2(impl):
    """Weights and bias of torch-geometric's layer, with edge features and self loops left out."""
    geometric = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    layer = geometric.GATv2Conv(
        6, 5, heads=3, edge_dim=4, add_self_loops=False, negative_slope=0.3
    ).to(DEVICE, FP64)
    x, attr, index, graph = homogeneous()
    inputs = [x.requires_grad_(), attr.requires_grad_(), layer.att, *layer.lin_l.parameters()]
    inputs += [*layer.lin_r.parameters(), layer.lin_edge.weight]
    source, target = (f(x).view(-1, 3, 5) for f in (layer.lin_l, layer.lin_r))
    edges = layer.lin_edge(attr).view(-1, 3, 5)
    by_head = layer.lin_edge.weight.t().reshape(4, 3, 5)
    call = target, source, source, graph, layer.att[0]
    expected = layer(x, index, attr)
    for more in ({"edge_key": edges}, {"edge_attr": attr, "edge_key_weight": by_head}):
        out = additive_attention(*call, negative_slope=0.3, impl=impl, **more)
        same_gradients(out.flatten(1) + layer.bias, expected, inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_gat(impl):
    """The first graph attention: of each head one number a node, and one an edge."""
    geometric = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    layer = geometric.GATConv(6, 5, heads=3, edge_dim=4, add_self_loops=False).to(DEVICE, FP64)
    x, attr, index, graph = homogeneous()
    inputs = [x.requires_grad_(), attr.requires_grad_(), layer.lin.weight, layer.lin_edge.weight]
    inputs += [layer.att_src, layer.att_dst, layer.att_edge]
    v = layer.lin(x).view(-1, 3, 5)
    k, q = ((v * a).sum(-1, keepdim=True) for a in (layer.att_src, layer.att_dst))
    edges = (layer.lin_edge(attr).view(-1, 3, 5) * layer.att_edge).sum(-1, keepdim=True)
    out = additive_attention(q, k, v, graph, torch.ones_like(q[0]), edge_key=edges, impl=impl)
    same_gradients(out.flatten(1) + layer.bias, layer(x, index, attr), inputs)


def homogeneous():
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(9, (2, 40), generator=generator).unique(dim=1).to(DEVICE)
    x = torch.randn(9, 6, generator=generator, dtype=FP64).to(DEVICE)
    attr = torch.randn(index.shape[1], 4, generator=generator, dtype=FP64).to(DEVICE)
    return x, attr, index, Graph.from_edge_index(index, 9)


def same_gradients(out, expected, inputs):
    # torch-geometric adds 1e-16 to denominators
    close(out, expected, "out", 1e-12)
    upstream = expected.detach().sin()
    grads = (torch.autograd.grad(y, inputs, upstream, retain_graph=True) for y in (out, expected))
    for a, b in zip(*grads, strict=True):
        close(a, b, "gradient", 1e-11)


@pytest.mark.parametrize("per_graph", [False, True])
@pytest.mark.parametrize("d", [1, 4])
@pytest.mark.parametrize("way", ALL)
def test_a_masked_head_is_a_head_that_is_not_there(way, d, per_graph):
    """NaN in it reaches nothing; gates that are not 0 multiply the output."""
    from test_attention_gate import in_graphs, rows_of

    x = in_graphs(case(2, 12, 50, heads=3, d=d, terms="key attr bias"))
    gate = torch.tensor([0.5, 0.0, 2.0], dtype=FP64, device=DEVICE)
    gate = gate.repeat(4, 1) if per_graph else gate
    if per_graph:
        gate[2, 0], gate[3] = 0, 0
    rows = rows_of(x, gate)
    on = rows != 0
    plain = replace(x, do=torch.where(on[..., None], x.do * rows[..., None], 0),
                    dlse=torch.where(on, x.dlse, 0))  # fmt: skip
    expected = evaluate(plain, "reference")
    expected["o"] = torch.where(on[..., None], expected["o"] * rows[..., None], 0)
    expected["lse"] = torch.where(on, expected["lse"], -torch.inf)
    expected["weights"] = torch.where(on[x.target], expected["weights"], 0)
    off = ~on
    spoilt = {name: t.clone() for name, t in x.tensors().items()}
    for name in ("q", "k", "v", "do", "dlse"):
        spoilt[name][off] = torch.nan
    for name in ("edge_key", "edge_bias"):
        spoilt[name][off[x.target]] = torch.nan
    nowhere = ~on.any(0)
    spoilt["weight"][nowhere] = torch.nan
    spoilt["edge_key_weight"][:, nowhere] = torch.nan
    all_close(evaluate(x.having(**spoilt), way, head_gate=gate), expected, 1e-8)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gate_of_0_gets_the_exact_gradient_on_request(impl):
    x = case(3, heads=3)
    gate = torch.tensor([1.0, 0.0, -0.5], dtype=FP64, device=DEVICE, requires_grad=True)
    wanted = (x.do * evaluate(x, "reference")["o"]).sum((0, 2))
    for dense in (False, True):
        o, lse, weights = attend(x, impl, head_gate=gate, dense_gate_grad=dense)
        (found,) = torch.autograd.grad(o, gate, x.do)
        close(found, wanted if dense else torch.where(gate == 0, 0, wanted))
        assert (lse[:, 1] == -torch.inf).all()
        assert not weights[:, 1].any()


@pytest.mark.parametrize("name", ["cora", "zinc"])
def test_real_graphs(name):
    try:
        graph = PROBLEMS[name].load().to(DEVICE)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    x = case(0, 3, 3, dtype=FP32, heads=4, d=8, dv=8, terms="")
    generator = torch.Generator().manual_seed(0)
    sizes = {"q": graph.num_rows, "k": graph.num_cols, "v": graph.num_cols, "do": graph.num_rows}
    made = {n: torch.randn(s, 4, 8, generator=generator).to(DEVICE) for n, s in sizes.items()}
    dlse = torch.randn(graph.num_rows, 4, generator=generator).to(DEVICE)
    x = replace(x, graph=graph, edge_index=graph.edge_index, dlse=dlse, **made)
    laws.as_accurate_as_eager(ADDITIVE, FAST[0], x)


@pytest.mark.parametrize("impl", ALL)
def test_gradcheck(impl):
    for d, terms in itertools.product((1, 2), ("key attr bias", "drop")):
        x = case(3, 3, 7, cols=4, d=d, dv=2, terms=terms)
        every = torch.arange(3, device=DEVICE).repeat(2, 1)
        more = {n: t for n, t in x.terms.items() if x.over(n) == "edges"}
        extra = {n: torch.cat([t, t[:3].cos()]) for n, t in more.items()}
        # every row needs an edge: the finite difference of an LSE of -inf is NaN
        x = x.onto(torch.cat([x.edge_index, every], 1)).having(**extra)
        _, leaves = x.leaves()

        def f(*tensors, x=x, names=tuple(leaves)):
            return attend(x.having(**dict(zip(names, tensors, strict=True))), impl)[:2]

        fast = impl in ("triton", "buckets") and DEVICE == "cpu"
        assert torch.autograd.gradcheck(f, list(leaves.values()), fast_mode=fast)
        assert torch.autograd.gradgradcheck(f, list(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("d", [1, 3])
@pytest.mark.parametrize("upstream", ["o", "lse", "both"])
@pytest.mark.parametrize("impl", FAST)
def test_every_subset_of_gradients(impl, upstream, d):
    x = case(9, 5, 14, cols=4, isolated=1, d=d, dv=2, terms="key attr bias")
    outputs = ["o", "lse"] if upstream == "both" else [upstream]
    skip = (0, 2, 3, 4, 5, 6) if DEVICE == "cpu" and impl == "triton" else (3, 4, 5)
    laws.every_subset_of_gradients(ADDITIVE, impl, x, outputs, twice=False, skip=skip)


@pytest.mark.parametrize("impl", FAST)
def test_double_backward_equals_the_reference(impl):
    x = case(2, 7, 24, cols=8, isolated=1, terms=EVERYTHING)
    laws.double_backward_equals_the_reference(ADDITIVE, impl, x)


@pytest.mark.parametrize("impl", FAST)
def test_forward_mode_is_refused_not_zero(impl):
    laws.forward_mode_is_refused_not_zero(ADDITIVE, impl, case(0, 6, 20))

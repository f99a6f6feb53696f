"""segment_softmax, aggregate and gated_aggregate: what their results must be, on every path;
and what is particular to aggregate."""

import itertools
import math
from dataclasses import replace

import laws
import pytest
import torch
from aggregate_cases import (
    AGGREGATE,
    FAST_WAYS,
    KINDS,
    OVER,
    WAYS,
    call,
    case,
    each_family,
    evaluate,
    examples,
    loops,
    zeros,
)
from attention_cases import (
    BF16,
    DEVICE,
    FAST,
    FP16,
    FP32,
    FP64,
    IMPLS,
    close,
    same_bits,
)

from fastgt import Graph, aggregate, gated_aggregate
from fastgt.testing import PROBLEMS, random_graph

test_reference_is_the_equations = AGGREGATE.obeys(
    laws.equals_its_oracle, 30, ["reference"], dtype=FP64
)


test_implementations_agree_in_float64 = AGGREGATE.obeys(
    laws.equals_its_oracle, 30, FAST, dtype=FP64
)


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize(("op", "options"), KINDS, ids=str)
def test_every_combination(impl, op, options):
    """No two sizes equal, no power of two."""
    x = case(op, 7, 6, 22, cols=5, kind="hub", isolated=2, **options)
    laws.equals_its_oracle(AGGREGATE, impl, x)


def as_accurate_as_eager(op, impl, x):
    """Gradients of maxima of quarters only: rounding must not decide which edge is the largest."""
    apart = x.op == "max" and "ties=False" in x.made_by
    gradients = [f"d{name}" for name in x.inputs] if apart else []
    laws.as_accurate_as_eager(op, impl, x, but=gradients)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_as_accurate_as_eager(impl, dtype):
    AGGREGATE.check(as_accurate_as_eager, 16, impl, dtype=dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", FAST_WAYS)
@each_family
def test_half_precision_only_rounds_the_result(impl, op, options, dtype):
    """The gradient of a softmax is taken at the rounded weights, as PyTorch's own."""
    edges = 3000 if impl == "cpp" or DEVICE == "cuda" else 30
    x = case(op, 3, 3, edges, kind="hub", dtype=dtype, ties=op == "max", **options)
    laws.half_precision_only_rounds(AGGREGATE, impl, x, but=["dlogit"])


@pytest.mark.parametrize("channels", [(1,), (12,), (13,), (130,), (2, 152)])
@pytest.mark.parametrize("impl", FAST)
def test_every_width(impl, channels):
    for op in ("softmax", "sum", "max", "gated"):
        x = case(op, 1, 4, 9, cols=6, channels=channels, dtype=FP32, ties=True)
        laws.as_accurate_as_eager(AGGREGATE, impl, x, of_outputs=3.0)


test_renumbering_nodes_renumbers_the_result = AGGREGATE.obeys(
    laws.renumbering_nodes_renumbers_the_result, 12, dtype=FP64, rows=8, cols=8
)


@examples(12, dtype=FP64, ties=False, layout="contiguous")
def test_reordering_edges_reorders_only_edge_tensors(impl, case):
    if case.op == "max" and "edge_value" not in case.inputs:
        return  # edges of one column and row are equal: the first of them takes the gradient
    laws.reordering_edges_reorders_only_edge_tensors(AGGREGATE, impl, case)


@pytest.mark.parametrize("impl", WAYS)
def test_the_first_of_the_largest_takes_the_gradient(impl):
    """By the caller's number, wherever the walk meets the edge; also in a transposed graph."""
    target = torch.tensor([1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0], device=DEVICE)
    value = torch.tensor([1.0, 2, 7, 3, 4, 7, 4, 7, 7, 0, 7], device=DEVICE, dtype=FP64)
    wanted = torch.zeros(11, dtype=FP64, device=DEVICE)
    wanted[2] = wanted[4] = 1.0
    for source in (torch.arange(11), torch.arange(11).flip(0)):
        index = torch.stack([source.to(DEVICE), target])
        graphs = (
            Graph.from_edge_index(index, (2, 11)),
            Graph.from_edge_index(index.flip(0), (11, 2)),
        )
        for graph in (graphs[0], graphs[1].transpose()):
            x = case("max", 0, 2, 11, cols=11, channels=(), takes=2)
            x = replace(x, graph=graph, do=x.do * 0 + 1).having(edge_value=value)
            found = evaluate(x, impl)
            close(found["o"], torch.tensor([7.0, 4.0], dtype=FP64, device=DEVICE))
            assert torch.equal(found["dedge_value"], wanted)


@pytest.mark.parametrize("impl", WAYS)
def test_maxima_of_minus_infinity_and_nan(impl):
    x = case("max", 3, 5, 30, cols=4, takes=2)
    value = x.inputs["edge_value"].clone()
    value[x.target == 0] = -torch.inf
    value[(x.target == 1).nonzero()[1]] = torch.nan
    found = evaluate(x.having(edge_value=value), impl)
    clean = evaluate(x, impl)
    assert (found["o"][0] == -torch.inf).all()
    assert found["o"][1].isnan().all()
    assert torch.equal(found["o"][2:], clean["o"][2:])
    first = (x.target == 0).nonzero()[0, 0]
    assert torch.equal(found["dedge_value"][first], x.do[0])
    at = (x.target == 1).nonzero()[1, 0]
    assert torch.equal(found["dedge_value"][at], x.do[1])
    left = x.target > 1
    assert torch.equal(found["dedge_value"][left], clean["dedge_value"][left])


@examples(20, dtype=FP32, isolated=3)
def test_rows_without_edges_give_zero(impl, case):
    check_unused(impl, case)


@pytest.mark.parametrize("impl", WAYS)
@each_family
def test_unused_nodes_have_no_say(impl, op, options):
    """Beside used ones in every program."""
    x = case(op, 5, 8, 14, cols=9, dtype=FP32, isolated=3, **options)
    assert x.isolated().any()
    check_unused(impl, x)


def check_unused(impl, case):
    """Nodes without edges get 0, and what belongs to them is ignored: NaN, too."""
    clean = laws.rows_without_edges_give_zero(AGGREGATE, impl, case)
    if case.op == "softmax" or impl == "reference":  # autograd multiplies 0 by NaN
        return
    none, spoilt = {"rows": case.isolated(), "cols": case.unused()}, {}
    for name, tensor in case.tensors().items():
        if case.over(name) in none:
            spoilt[name] = tensor.clone()
            spoilt[name][none[case.over(name)]] = torch.nan
    same_bits(evaluate(case.having(**spoilt), impl), clean)


@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("impl", WAYS)
@each_family
def test_no_edges_and_no_nodes(impl, op, options, rows, cols):
    for channels in ((5,), (0,), (2, 0)):
        x = case(op, 0, rows, 0, cols=cols, channels=channels, **options)
        for name, found in laws.without_edges_all_is_zero(AGGREGATE, impl, x).items():
            assert found.shape[1:] == x.tensors().get(name[1:], x.do).shape[1:]


@pytest.mark.parametrize("impl", WAYS)
@each_family
def test_a_batch_is_its_graphs_one_by_one(impl, op, options):
    """Empty graphs inside and at the end."""
    sizes = [(4, 9), (0, 0), (3, 0), (3, 7), (2, 0), (0, 0)]
    singles = [case(op, i, n, e, **options) for i, (n, e) in enumerate(sizes)]
    laws.a_batch_is_its_graphs_one_by_one(AGGREGATE, impl, singles, 3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("impl", IMPLS)
@each_family
def test_nan_and_infinity_stay_with_the_rows_that_use_them(impl, op, options, value):
    x = case(op, 4, 8, 20, cols=9, dtype=FP32, isolated=1, **options)
    for where in (*x.inputs, "do"):
        found, hit = laws.a_value_stays_with_its_rows(AGGREGATE, impl, x, where, value)
        if math.isnan(value) and where != "do":
            assert found["o"][hit[x.over("o")]].isnan().all()


test_a_row_depends_on_its_neighbourhood_only = AGGREGATE.obeys(
    laws.a_row_depends_on_its_neighbourhood_only, 10, dtype=FP64, rows=7
)


@pytest.mark.parametrize("impl", IMPLS)
@each_family
def test_gradcheck(impl, op, options):
    x = case(op, 3, 4, 9, cols=5, channels=(2,), **(options | {"ties": False}))
    names = list(x.inputs)

    def f(*inputs):
        return call(x.having(**dict(zip(names, inputs, strict=True))), impl)

    inputs = [t.detach().requires_grad_() for t in x.inputs.values()]
    assert torch.autograd.gradcheck(f, inputs, fast_mode=impl == "triton")
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "create_graph"])
@pytest.mark.parametrize("impl", FAST_WAYS)
def test_every_subset_of_gradients_of_messages(impl, twice):
    for op, relu, wanted in itertools.product(("sum", "mean", "max"), (0, 1), ("x", "edge_value")):
        x = case(op, 9, 5, 14, cols=4, isolated=1, relu=bool(relu), ties=True)
        leaf = x.inputs[wanted].detach().clone().requires_grad_()
        (o,) = call(x.having(**{wanted: leaf}), impl)
        (found,) = torch.autograd.grad(o, leaf, x.do, create_graph=twice)
        close(found, loops(x)[f"d{wanted}"])


@pytest.mark.parametrize("impl", FAST)
@each_family
def test_double_backward_equals_the_reference(impl, op, options):
    x = case(op, 2, 8, 24, cols=9, isolated=1, **options)
    laws.double_backward_equals_the_reference(AGGREGATE, impl, x)


@pytest.mark.parametrize("impl", FAST)
def test_create_graph_where_one_input_was_made_from_another(impl):
    graph = random_graph(0, 6, 20, device=DEVICE)
    key, query = graph.edge_index
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=FP64).to(DEVICE)
    for f in (
        lambda x, **impl: gated_aggregate(x, graph, gate_row=x, gate_col=x, **impl),
        lambda x, **impl: gated_aggregate(x.sin(), graph, x[query] - x[key], gate_row=x, **impl),
        lambda x, **impl: aggregate(
            x, graph, edge_value=(x[query] - x[key]).sin(), activation="relu", **impl
        ),
    ):
        laws.gradients_through_one_tensor_equal_the_reference(f, impl, start)


@pytest.mark.parametrize("impl", IMPLS)
@each_family
def test_autocast(impl, op, options):
    """Inputs are cast first; softmax is among what autocast keeps in float32."""
    to = FP32 if op == "softmax" else BF16
    x = case(op, 3, 8, 30, dtype=FP16, **options)
    with torch.autocast(DEVICE, BF16):
        found = call(x, impl)
    plain = call(x.having(**{n: t.to(to) for n, t in x.inputs.items()}), impl)
    for a, b in zip(found, plain, strict=True):
        assert a.dtype == to
        assert torch.equal(a, b)
    x = case(op, 3, 8, 30, **options)
    with torch.autocast(DEVICE, BF16):
        assert call(x, impl)[0].dtype == FP64


@pytest.mark.parametrize("impl", FAST)
@each_family
def test_forward_mode_is_refused_not_zero(impl, op, options):
    laws.forward_mode_is_refused_not_zero(AGGREGATE, impl, case(op, 0, 5, 12, **options))


@pytest.mark.parametrize("name", ["cora", "zinc"])
@each_family
def test_real_graphs(name, op, options):
    """Hubs, isolated rows and a batch, as they come."""
    try:
        graph = PROBLEMS[name].load().to(DEVICE)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    x = case(op, 0, 3, 3, **options)
    sizes = {"rows": graph.num_rows, "cols": graph.num_cols, "edges": graph.num_edges}
    generator = torch.Generator().manual_seed(0)

    def tensor(n):
        return torch.randn(n, 4, generator=generator).to(DEVICE)

    inputs = {name: tensor(sizes[OVER[name]]) for name in x.inputs}
    if op == "gated" and "edge_weight" in inputs:
        inputs["edge_weight"] = inputs["edge_weight"].abs()  # else denominators cancel
    do, de = tensor(sizes[x.over("o")]), tensor(sizes["edges"]) if op == "gated" else None
    x = replace(x, graph=graph, inputs=inputs, do=do, de=de)
    gradients = [f"d{name}" for name in x.inputs] if op == "max" else []
    laws.as_accurate_as_eager(AGGREGATE, FAST[0], x, of_outputs=3.0, but=gradients)


@pytest.mark.parametrize("impl", IMPLS)
def test_gine_is_that_of_torch_geometric(impl):
    nn = pytest.importorskip("torch_geometric.nn")
    x = case("sum", 1, 8, 40, relu=True)
    conv = nn.GINEConv(torch.nn.Identity(), eps=0.5).to(DEVICE, FP64)
    v, edge_value = x.inputs.values()
    expected = conv(v, x.edge_index, edge_value)
    close(1.5 * v + call(x, impl)[0], expected)


def same_gradients(ours, theirs, leaves, do):
    """Values, and the gradients of all leaves."""
    close(ours, theirs)
    found = torch.autograd.grad(ours, leaves, do, retain_graph=True)
    expected = torch.autograd.grad(theirs, leaves, do)
    for a, b in zip(found, expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("train_eps", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_gine_has_the_gradients_of_torch_geometric(impl, train_eps):
    """Of its parameters too, with edge features of another width."""
    nn = pytest.importorskip("torch_geometric.nn")
    x = case("sum", 2, 8, 40, relu=True, isolated=1)
    v, _ = (t.requires_grad_() for t in x.inputs.values())
    attr = torch.randn(x.graph.num_edges, 3, dtype=FP64, generator=x.generator).to(DEVICE)
    attr.requires_grad_()
    conv = nn.GINEConv(torch.nn.Linear(5, 5), eps=0.5, train_eps=train_eps, edge_dim=3)
    conv = conv.to(DEVICE, FP64)
    received = aggregate(v, x.graph, edge_value=conv.lin(attr), activation="relu", impl=impl)
    ours = conv.nn((1 + conv.eps) * v + received)
    leaves = [v, attr, *conv.parameters()]
    same_gradients(ours, conv(v, x.edge_index, attr), leaves, x.do)


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_weighted_sum_is_torch_geometrics_gcn(impl, loops):
    """Its norm is the weight; the gradient of its own weights comes through it."""
    nn = pytest.importorskip("torch_geometric.nn")
    x = case("sum", 3, 8, 40, takes=1, isolated=1)
    (v,) = (t.requires_grad_() for t in x.inputs.values())
    given = torch.rand(x.graph.num_edges, dtype=FP64, generator=x.generator).to(DEVICE) + 0.5
    given.requires_grad_()
    conv = nn.GCNConv(5, 5, add_self_loops=loops).to(DEVICE, FP64)
    index, norm = nn.conv.gcn_conv.gcn_norm(x.edge_index, given, 8, False, loops)
    graph = Graph.from_edge_index(index, 8)
    ours = aggregate(conv.lin(v), graph, edge_weight=norm, impl=impl) + conv.bias
    leaves = [v, given, *conv.parameters()]
    same_gradients(ours, conv(v, x.edge_index, given), leaves, x.do)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_weighted_sum_is_a_sparse_product_with_values(impl):
    """Of a graph whose edges stand in no order, with duplicates."""
    x = case("sum", 4, 7, 40, cols=5, takes=1, weight="edge")
    v, weight = (t.requires_grad_() for t in x.inputs.values())
    dense = v.new_zeros(7, 5).index_put((x.target, x.source), weight, accumulate=True)
    same_gradients(call(x, impl)[0], dense @ v, [v, weight], x.do)


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_come_after_the_activation_and_a_mean_counts_edges(impl):
    graph = Graph.from_edge_index(torch.tensor([[0, 1], [0, 0]], device=DEVICE), (2, 2))
    x = torch.tensor([[1.0, -3.0], [2.0, 4.0]], device=DEVICE)
    weight = torch.tensor([-3.0, 0.5], device=DEVICE)
    for reduce, wanted in (("sum", [-2.0, 2.0]), ("mean", [-1.0, 1.0]), ("max", [1.0, 2.0])):
        y = aggregate(x, graph, reduce=reduce, edge_weight=weight, activation="relu", impl=impl)
        assert y.tolist() == [wanted, [0.0, 0.0]]


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
@pytest.mark.parametrize("impl", IMPLS)
def test_reductions_are_those_of_torch_geometric(impl, reduce):
    utils = pytest.importorskip("torch_geometric.utils")
    x = case(reduce, 1, 8, 40, takes=2)
    expected = utils.scatter(x.inputs["edge_value"], x.target, 0, dim_size=8, reduce=reduce)
    close(call(x, impl)[0], expected)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_refusals_of_messages(impl):
    graph, x, edge = random_graph(0, 5, 6, cols=3, device=DEVICE), zeros(3, 2), zeros(6, 2)
    for error, message, arguments in (
        (ValueError, "reduce must be one of .*'sum'.* got 'median'", {"x": x, "reduce": "median"}),
        (ValueError, "activation must be one of .* got 'gelu'", {"x": x, "activation": "gelu"}),
        (ValueError, "x, edge_value and edge_attr are all None", {"x": None}),
        (ValueError, "edge_value has 3 rows but .* 6 edges", {"x": x, "edge_value": x}),
        (ValueError, "x has 6 rows but .* 3 columns", {"x": edge}),
        (TypeError, "edge_value is .*64 but x is", {"x": x, "edge_value": edge.double()}),
        (ValueError, "edge_attr are all None", {"x": None, "edge_weight": edge}),
        (ValueError, "edge_weight has 3 rows but .* 6 edges", {"x": x, "edge_weight": x[:, 0]}),
        (
            ValueError,
            r"edge_weight has channels \[1\] but x has \[2\]",
            {"x": x, "edge_weight": edge[:, :1]},
        ),
        (TypeError, "edge_weight is .*64 but x is", {"x": x, "edge_weight": edge[:, 0].double()}),
    ):
        with pytest.raises(error, match=message):
            aggregate(graph=graph, **arguments, impl=impl)

"""segment_softmax, aggregate and gated_aggregate: what their results must be, on every path;
and what is particular to aggregate."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from aggregate_cases import (
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
    over,
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
    all_close,
    close,
    same_bits,
)

from fastgt import Graph, aggregate, gated_aggregate
from fastgt.testing import PROBLEMS, assert_as_accurate, random_graph


@examples(30, impls=["reference"], dtype=FP64)
def test_reference_is_the_equations(impl, case):
    all_close(evaluate(case, impl), loops(case))


@examples(30, impls=FAST, dtype=FP64)
def test_implementations_agree_in_float64(impl, case):
    all_close(evaluate(case, impl), loops(case))


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize(("op", "options"), KINDS, ids=str)
def test_every_combination(impl, op, options):
    """No two sizes equal, no power of two."""
    x = case(op, 7, 6, 22, cols=5, kind="hub", isolated=2, **options)
    all_close(evaluate(x, impl), loops(x))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_as_accurate_as_eager(impl, dtype):
    """Maxima of quarters: rounding must not decide which edge is the largest."""

    @examples(16, impls=[impl], dtype=dtype)
    def check(impl, drawn):
        truth = evaluate(drawn, "reference", FP64)
        actual, eager = evaluate(drawn, impl), evaluate(drawn, "reference")
        for name, x in actual.items():
            if drawn.op == "max" and name != "o" and "ties=False" in drawn.made_by:
                continue
            factor = 3.0 if name.startswith("d") else 2.0
            assert_as_accurate(x, eager[name], truth[name], name, factor)

    check(impl)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", FAST_WAYS)
@each_family
def test_half_precision_only_rounds_the_result(impl, op, options, dtype):
    """Sums are kept in float32: a hub row must not drown in bfloat16."""
    edges = 3000 if impl == "torch" or DEVICE == "cuda" else 30
    x = case(op, 3, 3, edges, kind="hub", dtype=dtype, ties=op == "max", **options)
    half, full = evaluate(x, impl), evaluate(x, impl, FP32)
    step = torch.finfo(dtype).eps
    for name, found in half.items():
        assert found.dtype == dtype
        if name != "dlogit":  # taken at the rounded weights, as PyTorch's own
            expected = full[name].to(dtype)
            torch.testing.assert_close(found, expected, rtol=step, atol=step * 0.01, msg=name)


@pytest.mark.parametrize("channels", [(1,), (12,), (13,), (130,), (2, 152)])
@pytest.mark.parametrize("impl", FAST)
def test_every_width(impl, channels):
    for op in ("softmax", "sum", "max", "gated"):
        x = case(op, 1, 4, 9, cols=6, channels=channels, dtype=FP32, ties=True)
        truth, eager = evaluate(x, "reference", FP64), evaluate(x, "reference")
        for name, found in evaluate(x, impl).items():
            assert_as_accurate(found, eager[name], truth[name], name, 3.0)


def moved(x, order):
    """The same problem with node i renamed place[i], for a square graph."""
    place = torch.argsort(order)
    inputs = {n: t if OVER[n] == "edges" else t[order] for n, t in x.inputs.items()}
    do = x.do if x.op == "softmax" else x.do[order]
    return x.onto(place[x.edge_index], inputs=inputs, do=do)


@examples(12, dtype=FP64, rows=8, cols=8)
def test_renumbering_nodes_renumbers_the_result(impl, case):
    order = torch.randperm(8, generator=case.generator).to(DEVICE)
    found = evaluate(moved(case, order), impl)
    for name, x in evaluate(case, impl).items():
        close(found[name], x if over(case, name) == "edges" else x[order], name)


@examples(12, dtype=FP64, ties=False, layout="contiguous")
def test_reordering_edges_reorders_only_edge_tensors(impl, case):
    order = torch.randperm(case.edge_index.shape[1], generator=case.generator).to(DEVICE)
    inputs = {n: t[order] if OVER[n] == "edges" else t for n, t in case.inputs.items()}
    if case.op == "max" and "edge_value" not in inputs:
        return  # edges of one column and row are equal
    do = case.do[order] if case.op == "softmax" else case.do
    de = None if case.de is None else case.de[order]
    found = evaluate(case.onto(case.edge_index[:, order], inputs=inputs, do=do, de=de), impl)
    for name, x in evaluate(case, impl).items():
        close(found[name], x[order] if over(case, name) == "edges" else x, name)


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
    unused = torch.bincount(case.source, minlength=case.graph.num_cols) == 0
    none = {"rows": case.isolated(), "cols": unused}
    clean = evaluate(case, impl)
    for name, x in clean.items():
        assert not x.isnan().any(), name
        if over(case, name) != "edges":
            assert (x[none[over(case, name)]] == 0).all(), name
    if case.op == "softmax" or impl == "reference":  # autograd multiplies 0 by NaN
        return
    spoilt = replace(case, do=case.do.clone(), inputs=dict(case.inputs))
    spoilt.do[none["rows"]] = torch.nan
    for name, tensor in case.inputs.items():
        if OVER[name] != "edges":
            spoilt.inputs[name] = tensor.clone()
            spoilt.inputs[name][none[OVER[name]]] = torch.nan
    same_bits(evaluate(spoilt, impl), clean)


@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("impl", WAYS)
@each_family
def test_no_edges_and_no_nodes(impl, op, options, rows, cols):
    for channels in ((5,), (0,), (2, 0)):
        x = case(op, 0, rows, 0, cols=cols, channels=channels, **options)
        for name, found in evaluate(x, impl).items():
            assert (found == 0).all(), name
            sizes = {"rows": rows, "cols": cols, "edges": 0}
            assert found.shape == (sizes[over(x, name)], *channels)


@pytest.mark.parametrize("impl", WAYS)
@each_family
def test_a_batch_is_its_graphs_one_by_one(impl, op, options):
    """Empty graphs inside and at the end; one neighbour full of NaN changes nothing."""
    sizes = [(4, 9), (0, 0), (3, 0), (3, 7), (2, 0), (0, 0)]
    singles = [case(op, i, n, e, **options) for i, (n, e) in enumerate(sizes)]
    for tensor in (*singles[3].inputs.values(), singles[3].do):
        tensor.fill_(torch.nan)
    joined = {n: torch.cat([x.inputs[n] for x in singles]) for n in singles[0].inputs}
    do = torch.cat([x.do for x in singles])
    de = torch.cat([x.de for x in singles]) if op == "gated" else None
    graph = Graph.batch([x.graph for x in singles])
    whole = evaluate(replace(singles[0], graph=graph, inputs=joined, do=do, de=de), impl)
    for name, found in whole.items():
        per_edge = over(singles[0], name) == "edges"
        parts = found.split([e if per_edge else n for n, e in sizes])
        for i, x in enumerate(singles):
            if i != 3:
                close(parts[i], evaluate(x, impl)[name], name)
            elif name == "o":
                assert torch.equal(parts[i].isnan(), evaluate(x, "reference")[name].isnan())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("impl", IMPLS)
@each_family
def test_nan_and_infinity_stay_with_the_rows_that_use_them(impl, op, options, value):
    x = case(op, 4, 8, 20, cols=9, dtype=FP32, isolated=1, **options)
    clean = evaluate(x, impl)
    for where in (*x.inputs, "do"):
        kind = over(x, "o") if where == "do" else OVER[where]
        at = {"edges": 0, "rows": int(x.target[0]), "cols": int(x.source[0])}[kind]
        edges = {"edges": [0], "rows": x.target == at, "cols": x.source == at}[kind]
        rows = torch.zeros(8, dtype=torch.bool, device=DEVICE)
        rows[x.target[edges]] = True
        cols = torch.zeros(9, dtype=torch.bool, device=DEVICE)
        cols[x.source[rows[x.target]]] = True
        hit = {"rows": rows, "cols": cols, "edges": rows[x.target]}
        assert not rows.all()
        tensor = (x.do if where == "do" else x.inputs[where]).clone()
        tensor[at] = value
        spoilt = replace(x, do=tensor) if where == "do" else x.having(**{where: tensor})
        found = evaluate(spoilt, impl)
        for name, y in found.items():
            left = ~hit[over(x, name)]
            assert torch.equal(y[left], clean[name][left]), (where, name)
        if math.isnan(value) and where != "do":
            assert found["o"][hit[over(x, "o")]].isnan().all()


@examples(10, dtype=FP64, rows=7)
def test_a_row_depends_on_its_neighbourhood_only(impl, case):
    row = int(torch.randint(7, (1,), generator=case.generator))
    edges = case.target == row
    kept = edges if case.op == "softmax" else torch.arange(7, device=DEVICE) == row
    do = torch.where(kept.view(-1, *[1] * (case.do.ndim - 1)), case.do, 0.0)
    de = None if case.de is None else case.de * 0
    found = evaluate(replace(case, do=do, de=de), impl)
    near = torch.zeros(case.graph.num_cols, dtype=torch.bool, device=DEVICE)
    near[case.source[edges]] = True
    within = {"edges": edges, "cols": near, "rows": torch.arange(7, device=DEVICE) == row}
    for name, x in found.items():
        if name.startswith("d"):
            assert (x[~within[over(case, name)]] == 0).all(), name


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
    def second(impl):
        x = case(op, 2, 8, 24, cols=9, isolated=1, **options)
        leaves = [t.detach().requires_grad_() for t in (*x.inputs.values(), x.do)]
        outputs = call(x.having(**dict(zip(x.inputs, leaves, strict=False))), impl)
        loss = (outputs[0] * leaves[-1]).sum() + sum(y.square().sum() for y in outputs)
        first = torch.autograd.grad(loss, leaves[:-1], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for a, b in zip(second(impl), second("reference"), strict=True):
        close(a, b)


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
        found = []
        for chosen in (impl, "reference"):
            leaf = start.clone().requires_grad_()
            o = f(leaf, impl=chosen)
            first = torch.autograd.grad(o.square().sum(), leaf, create_graph=True)[0]
            found.append((first, torch.autograd.grad(first.cos().sum(), leaf)[0]))
        for a, b in zip(*found, strict=True):
            close(a, b)


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
    x = case(op, 0, 5, 12, **options)
    name, start = next(iter(x.inputs.items()))

    def f(t, impl):
        return call(x.having(**{name: t}), impl)[0]

    tangent = torch.func.jvp(lambda t: f(t, "reference"), (start,), (start.cos(),))[1]
    close(tangent, torch.autograd.functional.jvp(lambda t: f(t, impl), start, start.cos())[1])
    with pytest.raises(NotImplementedError, match="impl='reference' only"):
        torch.func.jvp(lambda t: f(t, impl), (start,), (start.cos(),))


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
    do, de = tensor(sizes[over(x, "o")]), tensor(sizes["edges"]) if op == "gated" else None
    x = replace(x, graph=graph, inputs=inputs, do=do, de=de)
    truth, eager = evaluate(x, "reference", FP64), evaluate(x, "reference")
    for key, found in evaluate(x, FAST[0]).items():
        if op != "max" or key == "o":
            assert_as_accurate(found, eager[key], truth[key], key, 3.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_gine_is_that_of_torch_geometric(impl):
    nn = pytest.importorskip("torch_geometric.nn")
    x = case("sum", 1, 8, 40, relu=True)
    conv = nn.GINEConv(torch.nn.Identity(), eps=0.5).to(DEVICE, FP64)
    v, edge_value = x.inputs.values()
    expected = conv(v, x.edge_index, edge_value)
    close(1.5 * v + call(x, impl)[0], expected)


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
        (ValueError, "x and edge_value are both None", {"x": None}),
        (ValueError, "edge_value has 3 rows but .* 6 edges", {"x": x, "edge_value": x}),
        (ValueError, "x has 6 rows but .* 3 columns", {"x": edge}),
        (TypeError, "edge_value is .*64 but x is", {"x": x, "edge_value": edge.double()}),
    ):
        with pytest.raises(error, match=message):
            aggregate(graph=graph, **arguments, impl=impl)

"""segment_softmax, aggregate and gated_aggregate: what their results must be, on every path."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from aggregate_cases import (
    OPS,
    OVER,
    call,
    case,
    evaluate,
    examples,
    loops,
)
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
    arrange,
    close,
    same_bits,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastgt
from fastgt import Graph, aggregate, gated_aggregate, reference, segment_softmax
from fastgt.bench.memory import peak_extra_memory
from fastgt.prepared import Prepared
from fastgt.testing import PROBLEMS, assert_as_accurate, random_graph, with_index_dtype

FAST_WAYS = [*FAST, "buckets"]
WAYS = ["reference", *FAST_WAYS]
# every combination of options that a kernel tells apart
KINDS = [
    *(
        (op, {"takes": takes, "relu": relu, "ties": op == "max"})
        for op in ("sum", "mean", "max")
        for takes in range(3)
        for relu in (False, True)
    ),
    *(
        ("gated", {"takes": takes, "normalize": normalize})
        for takes in range(7)
        for normalize in (True, False)
    ),
    ("softmax", {}),
]
# one of each family
FAMILIES = [
    ("softmax", {}),
    ("sum", {"relu": True}),
    ("mean", {}),
    ("max", {"relu": True}),
    ("gated", {}),
]
each_family = pytest.mark.parametrize(("op", "options"), FAMILIES, ids=OPS)


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


def over(x, name):
    """What an output or gradient has a row for."""
    if name in ("o", "e"):
        return "edges" if name == "e" or x.op == "softmax" else "rows"
    return OVER[name[1:]]


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


@pytest.mark.parametrize("impl", WAYS)
def test_softmax_sums_to_one_and_ignores_constants(impl):
    x = case("softmax", 1, 6, 30, isolated=1)
    y = call(x, impl)[0]
    mass = torch.zeros(6, 5, dtype=FP64, device=DEVICE).index_add(0, x.target, y)
    close(mass, (~x.isolated()).to(mass)[:, None].expand_as(mass))
    shift = 300.0 * torch.arange(6, device=DEVICE, dtype=FP64)[x.target, None]
    close(call(x.having(logit=x.inputs["logit"] + shift), impl)[0], y)


@pytest.mark.parametrize("dtype", [FP64, FP32], ids=str)
@pytest.mark.parametrize("impl", WAYS)
def test_softmax_of_minus_infinity(impl, dtype):
    """Edges of -inf do not exist; a channel of a row that has no others gives 0."""
    x = case("softmax", 1, 6, 40, dtype=dtype)
    gone = torch.rand(x.do.shape, generator=x.generator).to(DEVICE) < 0.3
    gone[x.target == 2, 1] = True
    found = evaluate(x.having(logit=x.inputs["logit"].masked_fill(gone, -torch.inf)), impl)
    for y in found.values():
        assert (y[gone] == 0).all()
        assert y.isfinite().all()
    for c in range(5):
        left = ~gone[:, c]
        less = x.onto(x.edge_index[:, left], do=x.do[left, c:])
        expected = evaluate(less.having(logit=x.inputs["logit"][left, c:]), "reference", FP64)
        for name, y in found.items():
            close(y[left, c].double(), expected[name][:, 0], name, 1e-5)


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", FAST_WAYS)
def test_a_constant_upstream_gives_a_softmax_no_gradient(impl, dtype):
    """However the weights were rounded, and their sum with them."""
    x = case("softmax", 1, 6, 60, dtype=dtype)
    dx = evaluate(replace(x, do=torch.full_like(x.do, 1024.0)), impl)["dlogit"]
    bits = FP64 if dtype == FP64 else FP32
    assert dx.abs().max() <= 1024 * 16 * torch.finfo(bits).eps


@pytest.mark.parametrize("impl", FAST_WAYS)
def test_a_rounded_output_does_not_shift_the_gates_gradient(impl):
    """Values far from 0 that differ little: the output is rounded as coarsely as they differ."""
    x = case("gated", 5, 8, 60, dtype=BF16, eps=0.0)
    v = torch.randint(2, x.inputs["x"].shape, generator=x.generator).to(DEVICE, BF16) / 2 + 64
    x = replace(x.having(x=v), do=torch.ones_like(x.do), de=x.de * 0)
    truth, found = evaluate(x, "reference", FP64), evaluate(x, impl)
    for name in ("dgate", "dgate_row", "dgate_col"):
        error = (found[name] - truth[name]).abs().max()
        assert error < 0.02 * truth[name].abs().max(), name


@pytest.mark.parametrize("impl", WAYS)
def test_gates_far_out(impl):
    """exp(-e) overflows, sigma is 0 for all edges of a row: eps = 0 divides by nothing."""
    x = case("gated", 2, 5, 30, takes=4, dtype=FP32, eps=0.0)
    assert set(x.inputs) == {"x", "gate"}
    gate = torch.where(x.target[:, None] == 1, -1e4, x.inputs["gate"] * 1e3)
    found = evaluate(x.having(gate=gate), impl)
    for name, y in found.items():
        assert y.isfinite().all(), name
    assert (found["o"][1] == 0).all()


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
@pytest.mark.parametrize("upstream", ["o", "e", "both"])
@pytest.mark.parametrize("impl", WAYS)
def test_every_subset_of_gradients_of_the_gated_mean(impl, upstream, twice):
    x = case("gated", 9, 4, 12, cols=3, isolated=1)
    zero = {"o": {"de": x.de * 0}, "e": {"do": x.do * 0}, "both": {}}[upstream]
    expected = loops(replace(x, **zero))
    for wanted in itertools.product([False, True], repeat=4):
        if impl in ("triton", "buckets") and DEVICE == "cpu" and sum(wanted) in (2, 3):
            continue
        leaves = {
            name: t.detach().clone().requires_grad_(need)
            for (name, t), need in zip(x.inputs.items(), wanted, strict=True)
        }
        inputs = {name: t for name, t in leaves.items() if t.requires_grad}
        o, e = call(replace(x, inputs=leaves), impl)
        pairs = {"o": [(o, x.do)], "e": [(e, x.de)], "both": [(o, x.do), (e, x.de)]}[upstream]
        pairs = [(y, dy) for y, dy in pairs if y.requires_grad]
        if not pairs:
            continue
        found = torch.autograd.grad(
            *(
                [y for y, _ in pairs],
                list(inputs.values()),
                [dy for _, dy in pairs],
            ),
            create_graph=twice,
            materialize_grads=True,
        )
        for name, grad in zip(inputs, found, strict=True):
            close(grad, expected[f"d{name}"], f"d{name} of {list(inputs)}")


@pytest.mark.parametrize("twice", [False, True], ids=["once", "create_graph"])
@pytest.mark.parametrize("impl", FAST_WAYS)
def test_every_subset_of_gradients_of_messages(impl, twice):
    for op, relu, wanted in itertools.product(("sum", "mean", "max"), (0, 1), ("x", "edge_value")):
        x = case(op, 9, 5, 14, cols=4, isolated=1, relu=bool(relu), ties=True)
        leaf = x.inputs[wanted].detach().clone().requires_grad_()
        (o,) = call(x.having(**{wanted: leaf}), impl)
        (found,) = torch.autograd.grad(o, leaf, x.do, create_graph=twice)
        close(found, loops(x)[f"d{wanted}"])


@pytest.mark.parametrize("path", ["torch", "gather"] if DEVICE == "cpu" else ["gather"])
def test_nothing_is_computed_for_gradients_not_asked_for(path):
    x = case("gated", 0, 5, 12)
    rows, columns = walks(x.graph, path)
    inputs = tuple(x.inputs.values())
    ops = torch.ops.fastgt
    _, _, total, mean = ops.gated_aggregate_fwd(path, *inputs, rows, 0.1, True, False, True)
    assert not mean.numel()
    mean = ops.gated_aggregate_fwd(path, *inputs, rows, 0.1, True, False, False)[0]
    for needs in itertools.product([False, True], repeat=4):
        args = x.do, None, *inputs, total, mean, rows, columns, True
        grads = ops.gated_aggregate_bwd(path, *args, *needs)
        assert tuple(bool(g.numel()) for g in grads) == needs
        assert not any(g.isnan().any() for g in grads)
    x = case("sum", 0, 5, 12)
    first = x.graph.edge.new_empty(0, 5)
    for needs in itertools.product([False, True], repeat=2):
        args = x.do, *x.inputs.values(), first, rows, columns, "sum", True
        grads = ops.aggregate_bwd(path, *args, *needs)
        assert tuple(bool(g.numel()) for g in grads) == needs
        assert not any(g.isnan().any() for g in grads)


def walks(graph, path):
    if path == "torch":
        return [graph.row_ptr, graph.col, graph.edge], list(graph.columns)
    plan = graph.plan("gather").settled
    return list(graph.row_walk(plan)), list(graph.column_walk(plan))


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


@pytest.mark.parametrize("layout", ["expanded", "scalar"])
@pytest.mark.parametrize("impl", FAST)
@each_family
def test_strides_of_upstream_gradients(impl, op, options, layout):
    x = case(op, 6, 7, 30, **options)
    if layout == "scalar":
        one = torch.ones((), dtype=FP64, device=DEVICE)
        x = replace(x, do=one.expand(x.do.shape), de=x.de if x.de is None else one.expand_as(x.de))
    else:
        x = replace(x, do=arrange(x.do, layout), de=None if x.de is None else arrange(x.de, layout))
    all_close(evaluate(x, impl), loops(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", FAST)
@each_family
def test_strides_do_not_change_a_bit(impl, op, options, dtype, layout):
    for channels in ((8,), (2, 4)) if impl == "torch" else ((8,),):
        x = case(op, 4, 8, 20, cols=7, channels=channels, dtype=dtype, **options)
        laid = {name: arrange(t, layout) for name, t in x.inputs.items()}
        do, de = (None if t is None else arrange(t, layout) for t in (x.do, x.de))
        plain = {name: t.contiguous() for name, t in laid.items()}
        straight = [None if t is None else t.contiguous() for t in (do, de)]
        expected = evaluate(replace(x, inputs=plain, do=straight[0], de=straight[1]), impl)
        same_bits(evaluate(replace(x, inputs=laid, do=do, de=de), impl), expected)


@pytest.mark.parametrize("impl", WAYS)
@each_family
def test_inputs_are_left_alone_and_outputs_alias_nothing(impl, op, options):
    x = case(op, 5, 8, 30, dtype=FP32, **options)
    if op == "gated":  # one term only, so that e would be that term
        x = case(op, 5, 8, 30, dtype=FP32, takes=4)
    kept = [x.graph.row_ptr, x.graph.col, x.graph.edge, *x.graph.columns]
    inputs = [t for t in (*x.inputs.values(), x.do, x.de, *kept) if t is not None]
    before = [t.clone() for t in inputs]
    found = evaluate(x, impl)
    for a, b in zip(inputs, before, strict=True):
        assert torch.equal(a, b)
    places = [t.untyped_storage().data_ptr() for t in (*inputs, *found.values())]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("impl", FAST_WAYS)
@each_family
def test_bitwise_repeatable(impl, op, options):
    interpreted = impl != "torch" and DEVICE == "cpu"
    size = (8, 30) if interpreted else (100, 2000)
    x = case(op, 1, *size, kind="hub", dtype=FP32, **options)
    first = evaluate(x, impl)
    for _ in range(1 if interpreted else 20):
        same_bits(evaluate(x, impl), first)
    wide = replace(x, graph=with_index_dtype(x.graph, torch.int64))
    same_bits(evaluate(wide, impl), first)


@pytest.mark.skipif(DEVICE != "cpu", reason="threads are the CPU's")
@each_family
def test_threads_do_not_change_a_bit(op, options):
    x = case(op, 1, 1000, 35_000, kind="hub", dtype=FP32, channels=(16,), **options)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(evaluate(x, "torch"))
    finally:
        torch.set_num_threads(threads)
    same_bits(*found)


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU path's choice")
@pytest.mark.parametrize("elements", [1, 30, 2**18])
@pytest.mark.parametrize(("op", "options"), KINDS, ids=str)
def test_chunks_and_pieces_of_rows_are_the_same_rows(monkeypatch, op, options, elements):
    """Rows and columns around the length of a piece, and pieces around that of a chunk."""
    monkeypatch.setattr("fastgt.cpu.sparse._LONG", 4)
    monkeypatch.setattr("fastgt.cpu.aggregate._ELEMENTS", elements)
    x = degrees(op, [0, 1, 3, 4, 5, 0, 17, 8, 0], 5, **options)
    all_close(evaluate(x, "torch"), loops(x))
    with_graph = replace(x, inputs=dict(x.inputs))
    half = {name: t.to(BF16) for name, t in x.inputs.items()}
    found = evaluate(replace(with_graph, inputs=half, do=x.do.to(BF16), de=cast(x.de)), "torch")
    assert not any(y.isnan().any() for y in found.values())


def cast(x):
    return None if x is None else x.to(BF16)


def degrees(op, counts, cols, **options):
    """Row i has counts[i] edges, shuffled; columns are random."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    source = torch.randint(cols, target.shape, generator=generator)
    order = torch.randperm(len(target), generator=generator)
    index = torch.stack([source, target])[:, order].to(DEVICE)
    return case(op, 0, len(counts), len(target), cols=cols, **options).onto(index)


@pytest.mark.parametrize("tile", [(2, 16), (8, 1)], ids=str)
@pytest.mark.parametrize("plan", ["gather", "buckets"])
@each_family
def test_any_tile_gives_the_same(monkeypatch, op, options, plan, tile):
    """Degrees at and around every block size, rows beyond a block of rows, blocks of channels."""
    pytest.importorskip("triton")
    import fastgt.kernels.aggregate as kernels
    from fastgt.kernels.configs import Tile

    monkeypatch.setattr(kernels, "attention_tile", lambda *args: Tile(*tile, 1, 4))
    monkeypatch.setattr(kernels, "_CHANNELS", 4)
    x = degrees(op, [0, 1, 4, 5, 0, 23], 4, plan=plan, **options)
    all_close(evaluate(x, "triton"), loops(x))


@pytest.mark.parametrize("turned", [False, True], ids=["row", "column"])
@pytest.mark.parametrize("impl", FAST)
@each_family
def test_a_hub_is_like_any_other_node(impl, op, options, turned):
    """More edges than a piece on the CPU, than a program's share in the kernels."""
    big = impl == "torch" or DEVICE == "cuda"
    x = degrees(op, [2, 20_000 if big else 60, 0, 1, 3], 7, dtype=FP32, **options)
    x = x if big else replace(x, plan="buckets")
    x = x.onto(x.edge_index)
    if turned:
        y = case(op, 1, 7, x.graph.num_edges, cols=5, dtype=FP32, plan=x.plan, **options)
        x = y.onto(x.edge_index.flip(0))
    truth, eager = evaluate(x, "reference", FP64), evaluate(x, "reference")
    for name, found in evaluate(x, impl).items():
        if op != "max" or name == "o":
            assert_as_accurate(found, eager[name], truth[name], name, 3.0)


@pytest.mark.skipif(DEVICE != "cpu", reason="runs on CPU tensors")
@each_family
def test_memory_of_the_cpu_path(monkeypatch, op, options):
    chunk = 2**15
    monkeypatch.setattr("fastgt.cpu.aggregate._ELEMENTS", chunk)
    n, edges, d = 50, 20_000, 64
    x = case(op, 0, n, edges, channels=(d,), dtype=FP32, **options)
    evaluate(x, "torch")  # the column walk and other first-time costs
    wide = edges * d * 4
    # results of that size: the softmax and its gradient, the gradients of edges and e
    asked = {"softmax": 2, "gated": 2}.get(op, 1) * wide
    # a few tensors of nodes, of chunks, and a few [E] vectors
    allowed = asked + 4 * (20 * n * d + 8 * chunk + 12 * edges)
    assert allowed < asked + 0.6 * wide
    device = torch.device(DEVICE)
    peak = peak_extra_memory(lambda: evaluate(x, "torch"), device)
    assert peak <= allowed, (peak - asked) / wide
    assert peak_extra_memory(lambda: evaluate(x, "reference"), device) > asked + wide
    if op == "softmax":
        return
    # without anything on edges, nothing of that size is made at all
    takes = {"gated": 3}.get(op, 1)
    x = case(op, 0, n, edges, channels=(d,), dtype=FP32, **options | {"takes": takes})
    assert not any(OVER[name] == "edges" for name in x.inputs)
    leaves = {name: t.requires_grad_() for name, t in x.inputs.items()}

    def train():
        v, rest = leaves["x"], {k: t for k, t in leaves.items() if k != "x"}
        f = gated_aggregate if op == "gated" else aggregate
        return torch.autograd.grad(f(v, x.graph, **rest, **x.options), leaves.values(), x.do)

    train()
    small = 4 * (20 * n * d + 8 * chunk + 12 * edges)
    assert peak_extra_memory(train, device) <= small
    assert small < 0.6 * wide


def huge_graph(rows, edges):
    """A graph beyond any memory: meta tensors only."""

    def index(n):
        return torch.empty(n, dtype=torch.int64, device="meta")

    ptr = index(rows + 1)
    walk = fastgt.graph.ColumnWalk(ptr, *(index(edges) for _ in range(3)))
    bounds = index(2)
    return Graph(rows, rows, ptr, index(edges), index(edges), bounds, bounds, {"columns": walk})


def test_shapes_beyond_two_to_the_31_on_meta_tensors():
    n, e, d = 3 * 2**30, 5 * 2**30, 32
    graph = huge_graph(n, e)

    def tensor(n):
        return torch.empty(n, d, device="meta", requires_grad=True)

    x, edge, row = tensor(n), tensor(e), tensor(n)
    for reduce in ("sum", "max"):
        o = aggregate(x, graph, reduce=reduce, edge_value=edge, activation="relu", impl="triton")
        assert o.shape == (n, d)
        grads = torch.autograd.grad(o, (x, edge), o)
        assert [g.shape for g in grads] == [(n, d), (e, d)]
    o, out = gated_aggregate(
        x, graph, edge, gate_row=row, gate_col=x, return_gate=True, impl="triton"
    )
    assert (o.shape, out.shape) == ((n, d), (e, d))
    grads = torch.autograd.grad((o, out), (x, edge, row), (o, out))
    assert [g.shape for g in grads] == [(n, d), (e, d), (n, d)]
    y = segment_softmax(edge, graph, impl="triton")
    assert torch.autograd.grad(y, edge, y)[0].shape == (e, d)


@pytest.mark.parametrize("axis", [0, 1], ids=["node", "channel"])
@each_family
def test_addresses_beyond_two_to_the_31(tmp_path, op, options, axis):
    """Strides reach past 2^31 elements; the memory is a sparse file, so nothing of it is paid."""
    size = 2**33 + 2**20
    if DEVICE == "cuda":
        room = torch.zeros(size, dtype=FP16, device=DEVICE)
    else:
        room = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=FP16)
    x = case(op, 2, 5, 7, channels=(4,), dtype=FP16, **options)
    # odd, or the kernel multiplies by an even factor of it at the very end, in 64 bits
    far, place, laid = 3 * 2**28 + 1, 2**31, {}
    for name, tensor in (x.inputs | {"do": x.do, "de": x.de}).items():
        if tensor is None:
            continue
        stride = [far if i == axis else n for i, n in enumerate(tensor.stride())]
        laid[name] = room.as_strided(tensor.shape, stride, place).copy_(tensor)
        place += 128
    do, de = laid.pop("do"), laid.pop("de", None)
    for impl in FAST:
        same_bits(evaluate(replace(x, inputs=laid, do=do, de=de), impl), evaluate(x, impl))


@pytest.mark.parametrize("dtype", [FP16, FP64], ids=str)
@pytest.mark.parametrize("d", [1, 16, 256, 4096])
def test_grids_stay_within_the_limits(d, dtype, monkeypatch):
    """Rows are the first axis, 2^31 - 1 long; the second one ends at 65,535."""
    pytest.importorskip("triton")
    from fastgt.kernels import aggregate as sums
    from fastgt.kernels import aggregate_gated as gated
    from fastgt.kernels import segment_softmax as softmax

    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for module in (sums, gated, softmax):
        for name in list(vars(module)):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder())
    n = 2**31 - 1
    x, ptr = (torch.empty(n, d, dtype=dtype, device="meta"), torch.empty(n + 1, device="meta"))
    for edges in (n, 40 * n):
        e = torch.empty(edges, d, dtype=dtype, device="meta")
        index = torch.empty(edges, dtype=torch.int64, device="meta")
        walk = ptr, index, index
        softmax.segment_softmax_bwd(e, softmax.segment_softmax_fwd(e, walk), walk)
        sums.aggregate_fwd(x, e, walk, "max", True)
        o, first = sums.aggregate_fwd(x, e, walk, "sum", True)
        sums.aggregate_bwd(o, x, e, first, walk, walk, "sum", True, True, True)
        o, e, total, _ = gated.gated_aggregate_fwd(x, e, x, x, walk, 0.1, True, True, True)
        args = o, e, x, e, x, x, total, total, walk, walk, True
        gated.gated_aggregate_bwd(*args, *(True,) * 4)
    assert len(grids) == 20
    for grid in grids:
        assert 0 < grid[0] < 2**31
        assert 0 < grid[1] <= 65535


@pytest.mark.parametrize("op", OPS)
def test_nothing_waits_for_the_device(op):
    """Launchers allocate and launch: no value comes back, so a CUDA graph can capture them."""
    pytest.importorskip("triton")
    x = case(op, 1, 4, 20, dtype=FP32, plan="buckets", relu=True)
    evaluate(x, "triton")
    with Calls() as calls:
        evaluate(x, "triton")
    assert not {"_local_scalar_dense", "nonzero", "item", "unique", "sort"} & calls.names


class Calls(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("edges", "layout", "dtype"),
    [(9, "contiguous", FP32), (9, "reversed", BF16), (0, "contiguous", FP32)],
    ids=["plain", "strided", "empty"],
)
@pytest.mark.parametrize("path", ["torch", "gather"] if DEVICE == "cpu" else ["gather"])
def test_opcheck(path, edges, layout, dtype):
    ops, check = torch.ops.fastgt, torch.library.opcheck
    made = {"cols": 3, "channels": (4,), "dtype": dtype, "layout": layout}
    x = case("sum", 0, 4, edges, **made)
    rows, columns = walks(x.graph, path)
    for reduce in ("sum", "max"):
        forward = (path, *x.inputs.values(), rows, reduce, True)
        check(ops.aggregate_fwd.default, forward)
        _, first = ops.aggregate_fwd(*forward)
        inputs = x.do, *x.inputs.values(), first, rows, columns, reduce, True
        check(ops.aggregate_bwd.default, (path, *inputs, True, reduce == "sum"))
    check(ops.aggregate_fwd.default, (path, None, x.inputs["edge_value"], rows, "mean", False))
    x = case("gated", 0, 4, edges, **made)
    inputs = tuple(x.inputs.values())
    for flags in ((True, True, True), (False, False, False)):
        forward = (path, *inputs, rows, 0.1, *flags)
        check(ops.gated_aggregate_fwd.default, forward)
        o, e, total, mean = ops.gated_aggregate_fwd(*forward)
        if flags[2]:
            kept = total, mean if mean.numel() else o.to(total.dtype)
            backward = o, e if flags[1] else None, *inputs, *kept, rows, columns, flags[0]
            for needs in ((True,) * 4, (False, False, True, False)):
                check(ops.gated_aggregate_bwd.default, (path, *backward, *needs))
    y = case("softmax", 0, 4, edges, **made).do
    check(ops.segment_softmax_fwd.default, (path, y, rows))
    check(ops.segment_softmax_bwd.default, (path, y, ops.segment_softmax_fwd(path, y, rows), rows))


@pytest.mark.parametrize("impl", FAST)
@each_family
def test_compiles_whole_and_once(impl, op, options):
    """One compilation serves graphs of every size, forward and backward."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def f(x):
        return call(x, impl)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    # no two sizes are equal, nor N + 1 and another: the compiler would take them for one number
    for seed, (n, e) in enumerate([(11, 20), (9, 31), (13, 15)]):
        x = case(op, seed, n, e, channels=(8,), dtype=FP32, **options)
        x = x.having(**{name: t.requires_grad_() for name, t in x.inputs.items()})
        found, leaves = [], list(x.inputs.values())
        for g in (compiled, f):
            y = g(x)
            upstream = [t for t in (x.do, x.de) if t is not None]
            found.append([*y, *torch.autograd.grad(y, leaves, upstream)])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("impl", FAST)
def test_compiles_with_one_tensor_in_all_places(impl):
    torch._dynamo.reset()
    x = case("gated", 0, 5, 12, dtype=FP32)
    found = []

    def f(t):
        return gated_aggregate(t, x.graph, gate_row=t, gate_col=t, impl=impl)

    for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), f):
        t = x.inputs["x"].detach().requires_grad_()
        o = g(t)
        found.append([o, *torch.autograd.grad(o, t, x.do)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)  # the three gradients are added in any order


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("impl", FAST)
@each_family
def test_checkpointing(impl, op, options, reentrant):
    x = case(op, 3, 8, 30, dtype=FP32, **options)
    names = list(x.inputs)
    leaves = [t.detach().requires_grad_() for t in x.inputs.values()]

    def f(*inputs):
        inputs = {name: t.tanh() for name, t in zip(names, inputs, strict=True)}
        return call(x.having(**inputs), impl)[0]

    checkpoint(f, *leaves, use_reentrant=reentrant).backward(x.do)
    plain = torch.autograd.grad(f(*leaves), leaves, x.do)
    for leaf, b in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, b)


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
def test_inference_never_sorts_the_column_walk(impl, op, options):
    x = case(op, 0, 5, 12, dtype=FP32, **options)
    call(x, impl)
    with torch.no_grad():
        call(x.having(**{n: t.requires_grad_() for n, t in x.inputs.items()}), impl)
    assert vars(x.graph.prepared) == vars(Prepared())


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
def test_softmax_is_that_of_torch_geometric(impl):
    utils = pytest.importorskip("torch_geometric.utils")
    x = case("softmax", 1, 8, 40, channels=(2, 3))
    expected = utils.softmax(x.inputs["logit"], x.target, num_nodes=8)
    close(call(x, impl)[0], expected)


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


@pytest.mark.parametrize("impl", IMPLS)
def test_without_a_denominator_it_is_torch_geometrics_resgated(impl):
    nn = pytest.importorskip("torch_geometric.nn")
    x = case("gated", 1, 8, 40)
    conv = nn.ResGatedGraphConv(5, 5, root_weight=False, bias=False).to(DEVICE, FP64)
    v = x.inputs["x"]
    found = gated_aggregate(
        conv.lin_value(v),
        x.graph,
        gate_row=conv.lin_key(v),
        gate_col=conv.lin_query(v),
        normalize=False,
        impl=impl,
    )
    close(found, conv(v, x.edge_index))


@pytest.mark.parametrize("impl", IMPLS)
def test_gated_gcn_is_that_of_graphgps(impl):
    """Its layer without norms, in its own order of operations (gather, sigmoid, two scatters)."""
    x = case("gated", 1, 8, 40)
    v, c, d, e = (x.inputs[name] for name in ("x", "gate", "gate_row", "gate_col"))
    j, i = x.edge_index
    e_ij = d[i] + e[j] + c
    sigma = torch.sigmoid(e_ij)
    zeros = torch.zeros_like(v)
    expected = zeros.index_add(0, i, sigma * v[j]) / (zeros.index_add(0, i, sigma) + 1e-6)
    found, edge = call(x, impl, eps=1e-6)
    close(found, expected)
    close(edge, e_ij)


def zeros(*shape, dtype=FP32, device=DEVICE):
    return torch.zeros(shape, dtype=dtype, device=device)


REFUSALS = {
    "rows of x": ({"x": zeros(4, 2)}, ValueError, "x has 4 rows but the graph has 3 columns"),
    "rows of gate": ({"gate": zeros(5, 2)}, ValueError, "gate has 5 rows but .* has 6 edges"),
    "rows of gate_row": ({"gate_row": zeros(3, 2)}, ValueError, "gate_row has 3 .* 5 rows"),
    "rows of gate_col": ({"gate_col": zeros(5, 2)}, ValueError, "gate_col has 5 .* 3 columns"),
    "channels": (
        {"gate": zeros(6, 3)},
        ValueError,
        r"gate has channels \[3\] but x has \[2\]",
    ),
    "more dimensions": (
        {"gate_row": zeros(5, 2, 1)},
        ValueError,
        r"gate_row has channels \[2, 1\] but x has \[2\]",
    ),
    "no dimension": ({"x": zeros()}, ValueError, r"x must have a first dimension .* got \[\]"),
    "integers": ({"x": zeros(3, 2, dtype=torch.int64)}, TypeError, "x must be float.*int64"),
    "dtype": ({"gate": zeros(6, 2, dtype=FP64)}, TypeError, "gate is .*float64 but x is .*32"),
    "device": ({"gate": zeros(6, 2, device="meta")}, ValueError, "gate is on meta but x is on"),
    "sparse": ({"x": zeros(3, 2).to_sparse()}, TypeError, "x must be a strided tensor, got"),
    "no tensor": ({"gate": [1.0]}, TypeError, "gate must be a tensor, got list"),
    "no x": ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
    "no graph": ({"graph": zeros(2, 6)}, TypeError, "graph must be a fastgt.Graph, got Tensor"),
    "no gates": (
        {"gate": None, "gate_row": None, "gate_col": None},
        ValueError,
        "gate, gate_row and gate_col are all None",
    ),
    "negative eps": ({"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1.0"),
    "eps nan": ({"eps": math.nan}, ValueError, "eps must be finite and not negative, got nan"),
    "eps none": ({"eps": None}, TypeError, "eps must be a number, got NoneType"),
}


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("refused", REFUSALS)
def test_refuses_by_name_and_numbers(refused, impl):
    changes, error, message = REFUSALS[refused]
    fitting = {
        "x": zeros(3, 2),
        "graph": random_graph(0, 5, 6, cols=3, device=DEVICE),
        "gate": zeros(6, 2),
        "gate_row": zeros(5, 2),
        "gate_col": zeros(3, 2),
    }
    gated_aggregate(**fitting, impl=impl)
    with pytest.raises(error, match=message):
        gated_aggregate(**fitting | changes, impl=impl)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_refusals_of_the_others(impl):
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
    with pytest.raises(ValueError, match="x has 3 rows but the graph has 6 edges"):
        segment_softmax(x, graph, impl=impl)
    with pytest.raises(TypeError, match="x must be a tensor, got NoneType"):
        segment_softmax(None, graph, impl=impl)
    with pytest.raises(ValueError, match=r"graph is on .* but x is on meta"):
        segment_softmax(edge.to("meta"), graph, impl=impl)
    with pytest.raises(ValueError, match="impl must be one of"):
        segment_softmax(edge, graph, impl="cuda")


def test_the_named_implementation_runs(monkeypatch):
    import fastgt.cpu.aggregate
    import fastgt.kernels.aggregate

    seen = []
    for name, module, function in (
        ("torch", fastgt.cpu.aggregate, "aggregate_fwd"),
        ("triton", fastgt.kernels.aggregate, "aggregate_fwd"),
        ("torch", fastgt.cpu.aggregate, "aggregate_bwd"),
        ("triton", fastgt.kernels.aggregate, "aggregate_bwd"),
        ("reference", reference, "aggregate"),
    ):
        real = getattr(module, function)

        def spy(*args, real=real, name=name, **kwargs):
            seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, function, spy)
    x = case("sum", 0, 3, 5, dtype=FP32)
    for impl in (None, *IMPLS):
        seen.clear()
        evaluate(x, impl)
        assert set(seen) == {impl or FAST[0]}
        with fastgt.implementation(impl):
            seen.clear()
            evaluate(x, None)
        assert set(seen) == {impl or FAST[0]}

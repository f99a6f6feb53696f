"""neighborhood_attention: what its results must be, for every implementation that runs here."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from attention_cases import (
    BF16,
    DEVICE,
    FAST,
    FAST_WAYS,
    FP16,
    FP32,
    FP64,
    IMPLS,
    LAYOUTS,
    Case,
    all_close,
    attend,
    case,
    close,
    evaluate,
    examples,
    loops,
)
from torch.nn.functional import scaled_dot_product_attention

from fastgt import AuxRequest, Graph, neighborhood_attention, reference
from fastgt.testing import PROBLEMS, assert_as_accurate


@examples(50, impls=["reference"], dtype=FP64)
def test_reference_is_the_equations(impl, case):
    all_close(evaluate(case, impl), loops(case))


@pytest.mark.parametrize("layout", LAYOUTS[:4])
@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_everything_at_once(impl, layout):
    """No two sizes equal, no power of two, every option in use."""
    shape = {"heads": 3, "group": 2, "d": 5, "dv": 10, "layout": layout}
    x = case(7, 9, 60, cols=7, kind="hub", isolated=2, clamped=True, eps=0.3, scale=0.7, **shape)
    all_close(evaluate(x, impl), loops(x))


@examples(50, impls=FAST, dtype=FP64)
def test_implementations_agree_in_float64(impl, case):
    all_close(evaluate(case, impl), loops(case))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_as_accurate_as_eager(impl, dtype):
    """Not float64: there plain PyTorch is the oracle itself, and the loops above are the judge."""

    @examples(24, impls=[impl], dtype=dtype)
    def check(impl, case):
        actual, eager = evaluate(case, impl), evaluate(case, "reference")
        truth = evaluate(case, "reference", FP64)
        for name, x in actual.items():
            factor = 3.0 if name.startswith("d") else 2.0
            assert_as_accurate(x, eager[name], truth[name], name, factor)

    check(impl)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", [*FAST, "buckets"])
def test_half_precision_only_rounds_the_result(impl, dtype):
    """Sums are kept in float32: a hub row must not drown in bfloat16.

    Windows round the weights too, before the tensor cores multiply them.
    """
    edges = 3000 if impl == "torch" or DEVICE == "cuda" else 200
    x = case(3, 6, edges, kind="hub", dtype=dtype, eps=1e-3, d=16, dv=5)
    half, full = evaluate(x, impl), evaluate(x, impl, FP32)
    assert half["lse"].dtype == FP32
    close(half["lse"], full["lse"], "lse", 1e-6)
    for name in half.keys() - {"lse"}:
        assert half[name].dtype == dtype
        one_step = torch.finfo(dtype).eps
        torch.testing.assert_close(
            half[name], full[name].to(dtype), rtol=one_step, atol=one_step * 0.01, msg=name
        )


@pytest.mark.parametrize(
    ("d", "dv"),
    [
        *itertools.pairwise([1, 5, 8, 10, 16, 17, 32, 6, 12, 13, 1]),
        (64, 100),
        (256, 80),
        (129, 256),
    ],
)
@pytest.mark.parametrize("impl", [*FAST, "windows 16"])
def test_every_width(impl, d, dv):
    x = case(d, 5, 13, cols=6, d=d, dv=dv, dtype=FP32, eps=1e-6)
    truth, eager = evaluate(x, "reference", FP64), evaluate(x, "reference")
    for name, found in evaluate(x, impl).items():
        assert_as_accurate(found, eager[name], truth[name], name, 3.0)


@examples(12, dtype=FP64, cols=None)
def test_renumbering_nodes_renumbers_the_result(impl, case):
    n = case.graph.num_rows
    order = torch.randperm(n, generator=case.generator).to(DEVICE)
    place = torch.argsort(order)
    moved = {name: getattr(case, name)[order] for name in ("q", "k", "v", "do", "dlse")}
    found = evaluate(case.onto(place[case.edge_index], **moved), impl)
    for name, x in evaluate(case, impl).items():
        close(found[name], x if name in ("weights", "dbias") else x[order], name)


@examples(12, dtype=FP64)
def test_reordering_edges_reorders_only_edge_tensors(impl, case):
    order = torch.randperm(case.edge_index.shape[1], generator=case.generator).to(DEVICE)
    bias = None if case.bias is None else case.bias[order]
    found = evaluate(case.onto(case.edge_index[:, order], bias=bias), impl)
    for name, x in evaluate(case, impl).items():
        close(found[name], x[order] if name in ("weights", "dbias") else x, name)


@examples(12, dtype=FP64, biased=True)
def test_a_duplicate_edge_adds_log_2_to_its_logit(impl, case):
    twice = torch.rand(case.edge_index.shape[1], generator=case.generator).to(DEVICE) < 0.5
    index = torch.cat([case.edge_index, case.edge_index[:, twice]], 1)
    doubled = evaluate(case.onto(index, bias=torch.cat([case.bias, case.bias[twice]])), impl)
    found = evaluate(replace(case, bias=case.bias + math.log(2) * twice[:, None].double()), impl)
    for name in ("o", "lse", "dq", "dk", "dv"):
        close(doubled[name], found[name], name)
    for name in ("weights", "dbias"):
        single = doubled[name][: len(twice)]
        single[twice] += doubled[name][len(twice) :]
        close(single, found[name], name)


@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_self_loops_and_multigraphs_denser_than_complete(impl):
    """More edges than there are pairs of nodes; a single node with nothing but self loops."""
    for rows, cols, edges in ((2, 3, 40), (1, 1, 9), (1, 4, 33), (5, 1, 20)):
        x = case(rows, rows, edges, cols=cols, eps=1e-3)
        all_close(evaluate(x, impl), loops(x))
    x = case(0, 6, 12)
    x = x.onto(torch.arange(6, device=DEVICE).repeat(2, 2))
    all_close(evaluate(x, impl), loops(x))


@examples(20, dtype=FP32, isolated=3)
def test_rows_without_edges_give_zero(impl, case):
    found, alone = evaluate(case, impl), case.isolated()
    assert (found["o"][alone] == 0).all()
    assert (found["lse"][alone] == -torch.inf).all()
    assert (found["dq"][alone] == 0).all()
    for name, x in found.items():
        assert not x.isnan().any(), name
    unused = torch.bincount(case.source, minlength=case.graph.num_cols) == 0
    assert (found["dk"][unused] == 0).all()
    assert (found["dv"][unused] == 0).all()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_no_edges_and_no_nodes(impl, rows, cols, biased):
    found = evaluate(case(0, rows, 0, cols=cols, biased=biased, eps=1e-6, clamped=True), impl)
    assert (found.pop("lse") == -torch.inf).all()
    for name, x in found.items():
        assert (x == 0).all(), name
    assert found["o"].shape == (rows, 2, 8)
    assert found["dk"].shape == (cols, 2, 8)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_batch_is_its_graphs_one_by_one(impl):
    """Empty graphs inside and at the end; one neighbour full of NaN changes nothing."""
    sizes = [(5, 14), (0, 0), (3, 0), (4, 9), (6, 20), (2, 0), (0, 0)]
    singles = [case(i, n, e, clamped=True, eps=1e-6) for i, (n, e) in enumerate(sizes)]
    for i, x in enumerate(singles):
        x.options = dict(x.options, logit_clamp=(-0.4, 0.6))
        if i == 3:
            for name in ("q", "k", "v", "bias", "do", "dlse"):
                getattr(x, name).fill_(torch.nan)
    names = ("q", "k", "v", "bias", "do", "dlse")
    joined = {name: torch.cat([getattr(x, name) for x in singles]) for name in names}
    whole = evaluate(
        replace(singles[0], graph=Graph.batch([x.graph for x in singles]), **joined), impl
    )
    for name, found in whole.items():
        per_edge = name in ("weights", "dbias")
        parts = found.split([e if per_edge else n for n, e in sizes])
        for i, x in enumerate(singles):
            if i != 3:
                close(parts[i], evaluate(x, impl)[name], name)
            elif name in ("o", "weights", "dv"):
                used = evaluate(x, "reference")[name].isnan()
                assert torch.equal(parts[i].isnan(), used)


@examples(10, dtype=FP64)
def test_a_row_depends_on_its_neighbourhood_only(impl, case):
    n, m = case.graph.num_rows, case.graph.num_cols
    if n == 0:
        return
    row = int(torch.randint(n, (1,), generator=case.generator))
    only = torch.zeros(n, 1, device=DEVICE)
    only[row] = 1.0
    do = case.do * only[:, :, None]
    found = evaluate(replace(case, do=do, dlse=case.dlse * only), impl)
    near = torch.zeros(m, dtype=torch.bool, device=DEVICE)
    near[case.source[case.target == row]] = True
    assert (found["dk"][~near] == 0).all()
    assert (found["dv"][~near] == 0).all()
    assert (found["dq"][torch.arange(n, device=DEVICE) != row] == 0).all()
    if case.bias is not None:
        assert (found["dbias"][case.target != row] == 0).all()


@examples(10, dtype=FP64, cols=None)
def test_a_sampled_hop_gives_the_rows_of_the_whole_graph(impl, case):
    n = case.graph.num_rows
    rows = torch.randperm(n, generator=case.generator)[: n // 2].to(DEVICE)
    place = torch.full((n,), -1, device=DEVICE)
    place[rows] = torch.arange(len(rows), device=DEVICE)
    kept = place[case.target] >= 0
    cols, source = case.source[kept].unique(return_inverse=True)
    index = torch.stack([source, place[case.target[kept]]])
    hop = replace(
        case,
        edge_index=index,
        graph=Graph.from_edge_index(index, (len(rows), len(cols))),
        q=case.q[rows],
        k=case.k[cols],
        v=case.v[cols],
        bias=None if case.bias is None else case.bias[kept],
        do=case.do[rows],
        dlse=case.dlse[rows],
    )
    inside = torch.zeros(n, 1, device=DEVICE)
    inside[rows] = 1.0
    whole = replace(case, do=case.do * inside[:, :, None], dlse=case.dlse * inside)
    found, expected = evaluate(hop, impl), evaluate(whole, impl)
    take = {
        "o": rows,
        "lse": rows,
        "dq": rows,
        "dk": cols,
        "dv": cols,
        "weights": kept,
        "dbias": kept,
    }
    for name, x in found.items():
        close(x, expected[name][take[name]], name)


@pytest.mark.parametrize("sizes", [(7,), (3, 1, 6)], ids=["one", "ragged"])
@pytest.mark.parametrize("impl", IMPLS)
def test_complete_graphs_are_dense_attention(impl, sizes):
    graphs = [Graph.from_dense(torch.ones(n, n, dtype=torch.bool, device=DEVICE)) for n in sizes]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, sum(sizes), 3, 8, generator=generator, dtype=FP64).to(DEVICE)
    q, k, v = (t.clone().requires_grad_() for t in x[:3])
    found = neighborhood_attention(q, k, v, Graph.batch(graphs), impl=impl)
    dense = [
        scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in part))[0].transpose(0, 1)
        for part in zip(*(t.split(sizes) for t in (q, k, v)), strict=True)
    ]
    close(found, torch.cat(dense))
    for a, b in zip(
        torch.autograd.grad(found, (q, k, v), x[3]),
        torch.autograd.grad(torch.cat(dense), (q, k, v), x[3]),
        strict=True,
    ):
        close(a, b)


@examples(15, dtype=FP64, eps=0.0)
def test_weights_sum_to_one_and_the_output_is_their_mean(impl, case):
    found = evaluate(case, impl)
    mass = torch.zeros_like(found["lse"]).index_add(0, case.target, found["weights"])
    close(mass, (~case.isolated()).to(mass)[:, None].expand_as(mass))
    group = case.q.shape[1] // case.k.shape[1]
    v = case.v.repeat_interleave(group, 1)[case.source]
    mean = torch.zeros_like(found["o"]).index_add(0, case.target, found["weights"][..., None] * v)
    close(found["o"], mean)
    index = case.target[:, None, None].expand_as(v)
    for pick, sign in (("amin", 1), ("amax", -1)):
        edge = torch.zeros_like(mean).scatter_reduce(0, index, v, pick, include_self=False)
        assert (sign * (found["o"] - edge) >= -1e-12).all()


@pytest.mark.parametrize("dtype", [FP64, FP32], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e3])
@pytest.mark.parametrize("impl", FAST_WAYS)
def test_constant_values_give_no_gradient_to_logits(impl, size, dtype):
    """However large the logits, whose rounding makes the recomputed weights miss 1."""
    x = case(5, 10, 70, dtype=dtype, scale=size / 8.0, biased=True, d=8)
    x = replace(x, v=torch.ones_like(x.v) * 1.7, dlse=torch.zeros_like(x.dlse))
    found, eps = evaluate(x, impl), torch.finfo(dtype).eps
    used = ~x.isolated()
    close(found["o"][used], torch.full_like(found["o"][used], 1.7), tolerance=8 * eps)
    # a float32 logit of 1e3 is off by 6e-5: any trace of it here would be far over the bound
    for name in ("dq", "dk", "dbias"):
        factor = 1.0 if name == "dbias" else size / 8.0
        assert found[name].abs().max() <= 200 * eps * factor, name


@pytest.mark.parametrize("impl", FAST_WAYS)
def test_a_rounded_output_does_not_shift_the_gradient(impl):
    """Values far from 0 that differ little: the output is rounded as coarsely as they differ."""
    x = case(5, 10, 70, dtype=BF16, biased=False, heads=1, d=8, dv=8)
    v = (64 + 2 * torch.randn(x.v.shape, generator=x.generator)).to(DEVICE, BF16)
    # keys that have a mean: a wrong mean of the weights' gradients would show
    x = replace(x, v=v, k=x.k + 2, do=x.do.abs())
    truth = evaluate(x, "reference", FP64)["dq"]
    error = (evaluate(x, impl)["dq"] - truth).abs().max()
    assert error < 0.02 * truth.abs().max(), float(error / truth.abs().max())


@examples(10, dtype=FP64, eps=0.0, biased=True)
def test_a_constant_added_to_a_rows_logits_changes_only_the_lse(impl, case):
    shift = torch.randn(case.dlse.shape, generator=case.generator, dtype=FP64).to(DEVICE) * 20
    moved = evaluate(replace(case, bias=case.bias + shift[case.target]), impl)
    plain = evaluate(case, impl)
    plain["lse"] = plain["lse"] + shift
    all_close(moved, plain)


@examples(10, dtype=FP64)
def test_linear_in_the_values(impl, case):
    other = torch.randn(case.v.shape, generator=case.generator, dtype=FP64).to(DEVICE)
    mixed = attend(replace(case, v=2.0 * case.v - 3.0 * other), impl)[0]
    close(mixed, 2.0 * attend(case, impl)[0] - 3.0 * attend(replace(case, v=other), impl)[0])


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_a_single_edge_copies_its_value(impl, dtype):
    x = case(1, 9, 9, heads=2, group=2, dtype=dtype, dv=10)
    order = torch.randperm(9, generator=x.generator).to(DEVICE)
    x = x.onto(torch.stack([order, torch.arange(9, device=DEVICE)]))
    o, _, weights = attend(x, impl)
    assert torch.equal(o, x.v.repeat_interleave(2, 1)[order])
    assert (weights == 1).all()


@examples(12, dtype=FP64, eps=0.0)
def test_partitions_of_the_edges_merge_through_the_lse(impl, case):
    """As partial results on several devices do; values and gradients."""
    part = torch.randint(3, (case.edge_index.shape[1],), generator=case.generator).to(DEVICE)
    part[part == 2] = 0
    leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
    bias = None if case.bias is None else case.bias.detach().requires_grad_()
    pieces = []
    for p in range(2):
        sub = case.onto(case.edge_index[:, part == p], q=leaves[0], k=leaves[1], v=leaves[2])
        pieces.append(
            attend(replace(sub, bias=None if bias is None else bias[part == p]), impl)[:2]
        )
    o, lse = (torch.stack(x) for x in zip(*pieces, strict=True))
    none = lse == -torch.inf
    finite = lse.masked_fill(none, -1e5)  # blocks the gradient where there is nothing to merge
    total = finite.logsumexp(0).masked_fill(none.all(0), -torch.inf)
    merged = (finite.softmax(0)[..., None] * o).sum(0)
    inputs = leaves if bias is None else [*leaves, bias]
    grads = torch.autograd.grad(
        (merged, total), inputs, (case.do, case.dlse), materialize_grads=True
    )
    whole = evaluate(case, impl)
    found = zip(("o", "lse", "dq", "dk", "dv", "dbias"), (merged, total, *grads), strict=False)
    for name, x in found:
        close(x, whole[name], name)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("impl", FAST_WAYS)
def test_huge_logits(impl, size, eps):
    x = case(2, 8, 40, dtype=FP32, eps=eps, isolated=1)
    x = replace(x, bias=(x.bias + size))
    truth, eager = evaluate(x, "reference", FP64), evaluate(x, "reference")
    all_close(truth, loops(x))
    for name, found in evaluate(x, impl).items():
        assert not found.isnan().any(), name
        assert_as_accurate(found, eager[name], truth[name], name, 3.0)


@pytest.mark.parametrize("twins", [1, 2, 3])
@pytest.mark.parametrize("impl", FAST_WAYS)
def test_huge_logits_far_apart(impl, twins):
    """One edge of a row takes all; where it is there twice or thrice, they share exactly.

    The logits are whole numbers, so that no order of their sums rounds them: what is judged is
    the normalisation, which must not go through an LSE rounded as a logit of 1e4 is.
    """
    x = case(2, 8, 30, dtype=FP32, biased=False, scale=1.0)
    index = x.edge_index.unique(dim=1).repeat(1, twins)
    x = x.onto(index, q=(x.q * 1e3).round(), k=(x.k * 4).round())
    truth, eager = evaluate(x, "reference", FP64), evaluate(x, "reference")
    for name, found in evaluate(x, impl).items():
        assert_as_accurate(found, eager[name], truth[name], name, 3.0)


@pytest.mark.parametrize("dtype", [FP64, FP32, FP16], ids=str)
@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_edges_of_minus_infinity_do_not_exist(impl, eps, dtype):
    """Single edges, one head of a row, and whole rows, which are then as rows without edges."""
    x = case(7, 8, 60, dtype=dtype, eps=eps, biased=True)
    gone = torch.rand(x.bias.shape, generator=x.generator).to(DEVICE) < 0.3
    gone[x.target == 2] = True
    gone[x.target == 5, 1] = True
    found = evaluate(replace(x, bias=x.bias.masked_fill(gone, -torch.inf)), impl)
    for name, value in found.items():
        assert not value.isnan().any(), name
    assert (found["weights"][gone] == 0).all()
    assert (found["dbias"][gone] == 0).all()
    assert (found["o"][2] == 0).all()
    assert (found["lse"][2] == -torch.inf).all()
    assert (found["dq"][2] == 0).all()
    assert (found["o"][5, 1] == 0).all()
    if dtype == FP64:
        for h in range(2):
            left = ~gone[:, h]
            less = x.onto(x.edge_index[:, left], bias=x.bias[left])
            expected = evaluate(less, impl)
            for name in ("o", "lse", "dq", "dk", "dv"):
                close(found[name][:, h], expected[name][:, h], name)
            close(found["dbias"][left, h], expected["dbias"][:, h], "dbias")


@examples(10, dtype=FP64, heads=3)
def test_heads_are_independent(impl, case):
    """Each alone gives the same; NaN in a key head stays with the query heads that read it."""
    group = case.q.shape[1] // case.k.shape[1]
    kv = int(torch.randint(3, (1,), generator=case.generator))
    mine = slice(kv * group, (kv + 1) * group)
    bias = None if case.bias is None else case.bias[:, mine]
    alone = replace(
        case,
        q=case.q[:, mine],
        k=case.k[:, kv : kv + 1],
        v=case.v[:, kv : kv + 1],
        bias=bias,
        do=case.do[:, mine],
        dlse=case.dlse[:, mine],
    )
    whole, found = evaluate(case, impl), evaluate(alone, impl)
    for name, x in found.items():
        part = slice(kv, kv + 1) if name in ("dk", "dv") else mine
        close(whole[name][:, part], x, name)
    spoilt = replace(case, q=case.q.clone(), k=case.k.clone(), v=case.v.clone())
    spoilt.q[:, mine], spoilt.k[:, kv], spoilt.v[:, kv] = torch.nan, torch.nan, torch.nan
    for name, x in evaluate(spoilt, impl).items():
        heads = torch.arange(x.shape[1], device=DEVICE)
        heads = heads if name in ("dk", "dv") else heads // group
        others = heads != kv
        assert torch.equal(x[:, others], whole[name][:, others]), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v", "bias", "do", "dlse"])
@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_nan_and_infinity_stay_with_the_rows_that_use_them(impl, where, value):
    x = case(4, 12, 30, cols=14, dtype=FP32, eps=1e-6, clamped=True, isolated=1)
    clean = evaluate(x, impl)
    target, source = x.target, x.source
    at = int(target[0]) if where in ("q", "do", "dlse") else int(source[0])
    if where == "bias":
        at, touched = 0, target == target[0]
        touched = target[0:1]
    else:
        touched = torch.tensor([at]) if where in ("q", "do", "dlse") else target[source == at]
    tensor = getattr(x, where).clone()
    tensor[at] = value
    found = evaluate(replace(x, **{where: tensor}), impl)
    row_hit = torch.zeros(12, dtype=torch.bool, device=DEVICE)
    row_hit[touched.to(DEVICE)] = True
    col_hit = torch.zeros(14, dtype=torch.bool, device=DEVICE)
    col_hit[source[row_hit[target]]] = True
    assert not row_hit.all()
    assert not col_hit.all()
    hit = {"o": row_hit, "lse": row_hit, "dq": row_hit, "dk": col_hit, "dv": col_hit}
    hit |= {"weights": row_hit[target], "dbias": row_hit[target]}
    for name, y in found.items():
        untouched, before = y[~hit[name]], clean[name][~hit[name]]
        if impl == "windows 64":  # computed again, column by column: the sums' order is another
            close(untouched, before, name, 1e-5)
        else:
            assert torch.equal(untouched, before), name
    if math.isnan(value) and where in ("q", "k", "v", "bias"):
        assert found["o"][row_hit].isnan().all()
    if math.isnan(value) and where in ("q", "k", "bias"):
        assert found["lse"][row_hit].isnan().all()


@pytest.mark.parametrize("clamp", [5, 5.0, (-5.0, 5.0), [-5, 5]])
@pytest.mark.parametrize("impl", IMPLS)
def test_clamp_holds_at_exactly_five(impl, clamp):
    """Whole numbers are exact: +-5 itself passes with its gradient, +-6 is 5 without one."""
    products = torch.tensor([-6.0, -5.0, -4.0, 0.0, 4.0, 5.0, 6.0, 9.0], dtype=FP64, device=DEVICE)
    m = len(products)
    graph = Graph.from_csr(torch.tensor([0, m], device=DEVICE), torch.arange(m, device=DEVICE), m)
    q = torch.ones(1, 1, 1, dtype=FP64, device=DEVICE).requires_grad_()
    k = products.reshape(m, 1, 1).clone().requires_grad_()
    v = torch.eye(m, dtype=FP64, device=DEVICE)[:, None, :].contiguous().requires_grad_()
    o, (lse, weights, _) = neighborhood_attention(
        q,
        k,
        v,
        graph,
        scale=1.0,
        logit_clamp=clamp,
        return_aux=AuxRequest(lse=True, weights=True),
        impl=impl,
    )
    logit = products.clamp(-5, 5)
    p = logit.softmax(0)
    close(o[0, 0], p)
    close(weights[:, 0], p)
    close(lse[0, 0], logit.logsumexp(0))
    do = torch.arange(m, dtype=FP64, device=DEVICE)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), do.reshape(1, 1, m))
    inside = (products >= -5) & (products <= 5)
    ds = torch.where(inside, p * (do - p @ do), 0.0)
    close(dk.flatten(), ds)
    assert (dk.flatten()[~inside] == 0).all()
    assert (dk.flatten()[inside] != 0).all()
    close(dq.flatten(), (ds @ products)[None])
    close(dv[:, 0], p[:, None] * do)


@pytest.mark.parametrize("clamp", [(-math.inf, 0.2), (-0.2, math.inf), (0.1, 0.1), 0.0])
@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_one_sided_and_closed_clamps(impl, clamp):
    x = case(6, 8, 30, biased=True)
    wanted = clamp if isinstance(clamp, tuple) else (-clamp, clamp)
    found = evaluate(replace(x, options=x.options | {"logit_clamp": clamp}), impl)
    all_close(found, loops(replace(x, options=x.options | {"logit_clamp": wanted})))


@pytest.mark.parametrize("eps", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_eps_is_added_to_the_sum_of_the_plain_exponentials(impl, eps):
    x = case(8, 7, 25, eps=eps, isolated=1)
    o, lse, weights = attend(x, impl)
    bare = attend(x, impl, denominator_eps=0.0)
    z = bare[1].exp()
    close(lse, bare[1])
    close(o, bare[0] * (z / (z + eps))[..., None])
    close(weights, bare[2] * (z / (z + eps))[x.target])


@pytest.mark.parametrize("impl", IMPLS)
def test_extras_follow_the_output(impl):
    x = case(1, 6, 15, dtype=BF16)
    args = (x.q.requires_grad_(), x.k, x.v, x.graph)
    o = neighborhood_attention(*args, impl=impl)
    assert isinstance(o, torch.Tensor)
    assert o.dtype == BF16
    first, aux = neighborhood_attention(*args, return_aux=AuxRequest(True, True), impl=impl)
    assert aux.edge_scores is None
    both = first, aux.lse, aux.weights
    assert [y.dtype for y in both] == [BF16, FP32, BF16]
    assert [list(y.shape) for y in both] == [[6, 2, 8], [6, 2], [15, 2]]
    assert [y.requires_grad for y in both] == [True, True, False]
    assert [y.is_contiguous() for y in both] == [True] * 3
    for name in ("lse", "weights"):
        request = AuxRequest(**{name: True})
        again, alone = neighborhood_attention(*args, return_aux=request, impl=impl)
        assert torch.equal(again, o)
        assert torch.equal(getattr(alone, name), getattr(aux, name))
        assert [x is not None for x in alone] == list(request)


@pytest.mark.parametrize("name", ["power_law", "cora", "zinc", "debian"])
def test_real_graphs(name):
    """Hubs of thousands, isolated rows and a batch, as they come."""
    try:
        graph = PROBLEMS[name].load().to(DEVICE)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = torch.randn(4, graph.num_rows, 2, 8, generator=generator).to(DEVICE)
    dlse = torch.randn(graph.num_rows, 2, generator=generator).to(DEVICE)
    options = {"scale": None, "denominator_eps": 0.0}
    x = Case(0, graph.edge_index, graph, q, k, v, None, do, dlse, options)
    truth, eager = evaluate(x, "reference", FP64), evaluate(x, "reference")
    for found_name, found in evaluate(x, FAST[0]).items():
        assert_as_accurate(found, eager[found_name], truth[found_name], found_name, 3.0)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_eps_with_very_negative_logits(impl, dtype):
    """exp(12) and exp(100) are within reach of neither float16 nor float32."""
    one_row = Graph.from_csr(torch.tensor([0, 2], device=DEVICE), torch.arange(2, device=DEVICE), 2)
    q = torch.ones(1, 1, 1, dtype=dtype, device=DEVICE)
    v = torch.tensor([1.0, 3.0], dtype=dtype, device=DEVICE).reshape(2, 1, 1)
    for logit, eps in ((-12.0, 1e-6), (-100.0, 1e-44)):
        k = torch.full_like(v, logit)
        options = {"scale": 1.0, "denominator_eps": eps, "impl": impl}
        z = 2 * math.exp(logit)
        found = neighborhood_attention(q, k, v, one_row, **options).item()
        assert found == pytest.approx(2 * z / (z + eps), rel=1e-2 if dtype == FP16 else 1e-4)


@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_rows_that_attend_to_nothing_ignore_their_values(impl):
    x = case(7, 8, 40, dtype=FP32)
    row = x.target[0]
    bias = x.bias.masked_fill((x.target == row)[:, None], -torch.inf)
    v = torch.full_like(x.v, torch.nan)
    found = evaluate(replace(x, bias=bias, v=v), impl)
    assert (found["o"][row] == 0).all()
    if impl != "reference":  # autograd multiplies 0 by NaN
        assert (found["dq"][row] == 0).all()


def test_the_reference_has_the_same_defaults():
    x = case(6, 8, 30)
    for options in ({}, {"logit_clamp": 0.3}, {"logit_clamp": (-0.1, 0.5)}, {"scale": 0.4}):
        args = (x.q, x.k, x.v, x.graph)
        direct = reference.neighborhood_attention(*args, **options)
        close(direct, neighborhood_attention(*args, impl=FAST[0], **options))


@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_a_scale_of_zero_is_taken_at_its_word(impl):
    x = case(6, 8, 30, scale=0.0)
    all_close(evaluate(x, impl), loops(x))

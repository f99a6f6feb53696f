"""neighborhood_attention: what its results must be, for every implementation that runs here."""

import itertools
import math
from dataclasses import replace

import laws
import pytest
import torch
from attention_cases import (
    ATTENTION,
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
from fastgt.testing import PROBLEMS

test_reference_is_the_equations = ATTENTION.obeys(
    laws.equals_its_oracle, 50, ["reference"], dtype=FP64
)


@pytest.mark.parametrize("layout", LAYOUTS[:4])
@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_everything_at_once(impl, layout):
    """No two sizes equal, no power of two, every option in use."""
    shape = {"heads": 3, "group": 2, "d": 5, "dv": 10, "layout": layout}
    x = case(7, 9, 60, cols=7, kind="hub", isolated=2, clamped=True, eps=0.3, scale=0.7, **shape)
    laws.equals_its_oracle(ATTENTION, impl, x)


test_implementations_agree_in_float64 = ATTENTION.obeys(
    laws.equals_its_oracle, 50, FAST, dtype=FP64
)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_as_accurate_as_eager(impl, dtype):
    ATTENTION.check(laws.as_accurate_as_eager, 24, impl, dtype=dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", [*FAST, "buckets"])
def test_half_precision_only_rounds_the_result(impl, dtype):
    """Windows round the weights too, before the tensor cores multiply them: they are not here."""
    edges = 3000 if impl == "cpp" or DEVICE == "cuda" else 200
    x = case(3, 6, edges, kind="hub", dtype=dtype, eps=1e-3, d=16, dv=5)
    laws.half_precision_only_rounds(ATTENTION, impl, x)


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
    laws.as_accurate_as_eager(ATTENTION, impl, x, of_outputs=3.0)


test_renumbering_nodes_renumbers_the_result = ATTENTION.obeys(
    laws.renumbering_nodes_renumbers_the_result, 12, dtype=FP64, cols=None
)


test_reordering_edges_reorders_only_edge_tensors = ATTENTION.obeys(
    laws.reordering_edges_reorders_only_edge_tensors, 12, dtype=FP64
)


test_a_duplicate_edge_adds_log_2_to_its_logit = ATTENTION.obeys(
    laws.a_duplicate_edge_adds_log_2_to_its_logits, 12, dtype=FP64, biased=True
)


@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_self_loops_and_multigraphs_denser_than_complete(impl):
    """More edges than there are pairs of nodes; a single node with nothing but self loops."""
    for rows, cols, edges in ((2, 3, 40), (1, 1, 9), (1, 4, 33), (5, 1, 20)):
        laws.equals_its_oracle(ATTENTION, impl, case(rows, rows, edges, cols=cols, eps=1e-3))
    x = case(0, 6, 12).onto(torch.arange(6, device=DEVICE).repeat(2, 2))
    laws.equals_its_oracle(ATTENTION, impl, x)


test_rows_without_edges_give_zero = ATTENTION.obeys(
    laws.rows_without_edges_give_zero, 20, dtype=FP32, isolated=3
)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_no_edges_and_no_nodes(impl, rows, cols, biased):
    x = case(0, rows, 0, cols=cols, biased=biased, eps=1e-6, clamped=True)
    found = laws.without_edges_all_is_zero(ATTENTION, impl, x)
    assert found["o"].shape == (rows, 2, 8)
    assert found["dk"].shape == (cols, 2, 8)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_batch_is_its_graphs_one_by_one(impl):
    """Empty graphs inside and at the end."""
    sizes = [(5, 14), (0, 0), (3, 0), (4, 9), (6, 20), (2, 0), (0, 0)]
    singles = [case(i, n, e, eps=1e-6) for i, (n, e) in enumerate(sizes)]
    for x in singles:
        x.options["logit_clamp"] = (-0.4, 0.6)
    spreads = ("o", "weights", "dv")
    laws.a_batch_is_its_graphs_one_by_one(ATTENTION, impl, singles, 3, spreads)


test_a_row_depends_on_its_neighbourhood_only = ATTENTION.obeys(
    laws.a_row_depends_on_its_neighbourhood_only, 10, dtype=FP64
)


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
    group = case.q.shape[1] // case.k.shape[1]
    value = case.v.repeat_interleave(group, 1)[case.source]
    laws.weights_sum_to_one(ATTENTION, impl, case, value)


@pytest.mark.parametrize("dtype", [FP64, FP32], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e3])
@pytest.mark.parametrize("impl", FAST_WAYS)
def test_constant_values_give_no_gradient_to_logits(impl, size, dtype):
    x = case(5, 10, 70, dtype=dtype, scale=size / 8.0, biased=True, d=8)
    x = replace(x, v=torch.full_like(x.v, 1.7))
    # a float32 logit of 1e3 is off by 6e-5: any trace of it here would be far over the bound
    bound = 200 * torch.finfo(dtype).eps
    bounds = {"dq": bound * size / 8.0, "dk": bound * size / 8.0, "dbias": bound}
    laws.constant_values_give_no_gradient_to_logits(ATTENTION, impl, x, bounds)


@pytest.mark.parametrize("impl", FAST_WAYS)
def test_a_rounded_output_does_not_shift_the_gradient(impl):
    x = case(5, 10, 70, dtype=BF16, biased=False, heads=1, d=8, dv=8)
    v = (64 + 2 * torch.randn(x.v.shape, generator=x.generator)).to(DEVICE, BF16)
    # keys that have a mean: a wrong mean of the weights' gradients would show
    x = replace(x, v=v, k=x.k + 2, do=x.do.abs())
    laws.a_rounded_output_does_not_shift_the_gradient(ATTENTION, impl, x, ["dq"])


test_a_constant_added_to_a_rows_logits_changes_only_the_lse = ATTENTION.obeys(
    laws.a_constant_added_to_a_rows_logits_changes_only_the_lse,
    10,
    dtype=FP64,
    eps=0.0,
    biased=True,
)


@examples(10, dtype=FP64)
def test_linear_in_the_values(impl, case):
    other = torch.randn(case.v.shape, generator=case.generator, dtype=FP64).to(DEVICE)
    mixed = attend(replace(case, v=2.0 * case.v - 3.0 * other), impl)[0]
    close(mixed, 2.0 * attend(case, impl)[0] - 3.0 * attend(replace(case, v=other), impl)[0])


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_a_single_edge_copies_its_value(impl, dtype):
    x = case(1, 9, 9, heads=2, group=2, dtype=dtype, dv=10)
    laws.a_single_edge_copies_its_value(ATTENTION, impl, x, x.v.repeat_interleave(2, 1))


test_partitions_of_the_edges_merge_through_the_lse = ATTENTION.obeys(
    laws.partitions_of_the_edges_merge_through_the_lse, 12, dtype=FP64, eps=0.0
)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("impl", FAST_WAYS)
def test_huge_logits(impl, size, eps):
    x = case(2, 8, 40, dtype=FP32, eps=eps, isolated=1)
    x = replace(x, bias=x.bias + size)
    all_close(evaluate(x, "reference", FP64), loops(x))
    laws.huge_logits_leave_no_nan(ATTENTION, impl, x, of_outputs=3.0)


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
    laws.as_accurate_as_eager(ATTENTION, impl, x, of_outputs=3.0)


@pytest.mark.parametrize("dtype", [FP64, FP32, FP16], ids=str)
@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_edges_of_minus_infinity_do_not_exist(impl, eps, dtype):
    x = case(7, 8, 60, dtype=dtype, eps=eps, biased=True)
    laws.edges_of_minus_infinity_do_not_exist(ATTENTION, impl, x)


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
    # windows compute it again, column by column: the sums' order is another
    tolerance = 1e-5 if impl == "windows 64" else 0.0
    found, hit = laws.a_value_stays_with_its_rows(
        ATTENTION, impl, x, where, value, tolerance=tolerance
    )
    assert not hit["cols"].all()
    if math.isnan(value) and where in ("q", "k", "v", "bias"):
        assert found["o"][hit["rows"]].isnan().all()
    if math.isnan(value) and where in ("q", "k", "bias"):
        assert found["lse"][hit["rows"]].isnan().all()


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
    laws.clamps(ATTENTION, impl, case(6, 8, 30, biased=True), clamp)


@pytest.mark.parametrize("eps", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("impl", ["reference", *FAST_WAYS])
def test_eps_is_added_to_the_sum_of_the_plain_exponentials(impl, eps):
    x = case(8, 7, 25, eps=eps, isolated=1)
    laws.eps_is_added_to_the_sum_of_the_plain_exponentials(ATTENTION, impl, x)


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
    laws.as_accurate_as_eager(ATTENTION, FAST[0], x, of_outputs=3.0)


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
    laws.equals_its_oracle(ATTENTION, impl, case(6, 8, 30, scale=0.0))

"""neighborhood_attention: what must hold, for every implementation that runs on this machine.

Hypothesis draws shapes, dtype, layout and a seed; arrays come from the seed. Identities between two
runs are judged in float64, where a wrong formula cannot hide; the arithmetic of the other dtypes is
judged against that of plain PyTorch.
"""

import copy
import io
import itertools
import math
import pickle
from dataclasses import dataclass, replace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import fastgt
from fastgt import Graph, neighborhood_attention, reference
from fastgt.bench.harness import peak_extra_memory
from fastgt.testing import (
    PROBLEMS,
    assert_as_accurate,
    random_batch,
    random_edge_index,
    random_graph,
    with_index_dtype,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = ["torch", "triton"] if DEVICE == "cpu" else ["triton"]
IMPLS = ["reference", *FAST]
FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NAMES = ("o", "lse", "weights", "dq", "dk", "dv", "dbias")
LAYOUTS = ("contiguous", "transposed", "reversed", "sliced", "expanded")


@dataclass(repr=False)
class Case:
    """One problem: inputs, upstream gradients and options."""

    seed: int
    edge_index: torch.Tensor
    graph: Graph
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None
    do: torch.Tensor
    dlse: torch.Tensor
    options: dict
    made_by: str = ""

    def __repr__(self):
        return self.made_by

    @property
    def generator(self):
        return torch.Generator().manual_seed(self.seed + 1)

    @property
    def source(self):
        return self.edge_index[0]

    @property
    def target(self):
        return self.edge_index[1]

    def isolated(self):
        """[N_rows], which rows have no edge."""
        return torch.bincount(self.target, minlength=self.graph.num_rows) == 0

    def onto(self, edge_index, **changes):
        """The same rows and columns joined by other edges."""
        size = self.graph.num_rows, self.graph.num_cols
        graph = Graph.from_edge_index(edge_index, size)
        return replace(self, edge_index=edge_index, graph=graph, **changes)


def case(
    seed=0,
    rows=12,
    edges=40,
    *,
    cols=None,
    heads=2,
    group=1,
    d=8,
    dv=8,
    dtype=FP64,
    index=torch.int32,
    kind="uniform",
    isolated=0,
    layout="contiguous",
    biased=True,
    clamped=False,
    eps=0.0,
    scale=None,
):
    """A random case; ``heads`` counts key heads, ``group`` the query heads of each."""
    made_by = f"case({', '.join(f'{name}={value!r}' for name, value in locals().items())})"
    m, h = rows if cols is None else cols, heads * group
    edge_index = random_edge_index(seed, rows, edges, cols=m, kind=kind, isolated=isolated)
    edge_index = edge_index.to(DEVICE)
    graph = with_index_dtype(Graph.from_edge_index(edge_index, (rows, m)), index)
    generator = torch.Generator().manual_seed(seed)
    layouts = itertools.cycle((layout, "contiguous", layout))

    def tensor(*shape, dtype=dtype):
        x = torch.randn(shape, generator=generator, dtype=FP64)
        return arrange(x.to(DEVICE, dtype), next(layouts))

    q, k, v = tensor(rows, h, d), tensor(m, heads, d), tensor(m, heads, dv)
    bias = tensor(edge_index.shape[1], h) if biased else None
    do = tensor(rows, h, dv)
    dlse = tensor(rows, h, dtype=FP64 if dtype == FP64 else FP32)
    options = {"scale": scale, "denominator_eps": eps}
    if clamped:
        s = 1 / math.sqrt(d) if scale is None else scale
        key = k.double().repeat_interleave(group, 1)[edge_index[0]]
        options["logit_clamp"] = gap(s * (q.double()[edge_index[1]] * key).sum(-1))
    return Case(seed, edge_index, graph, q, k, v, bias, do, dlse, options, made_by)


def gap(logit):
    """Clamp bounds far from every logit: rounding must not decide what the clamp lets through."""
    s = logit.flatten().sort().values
    if not len(s):
        return -0.5, 0.5
    wide = s.diff() > 1e-3 * s.abs().max().clamp(min=1.0)
    between = ((s[1:] + s[:-1]) / 2)[wide]
    low, high = s[0] - 1, s[-1] + 1
    if len(between):
        low, high = (between[(between - s.quantile(part)).abs().argmin()] for part in (0.2, 0.8))
    return float(low), float(high)


def arrange(x, layout):
    """x in other strides, amid NaN where memory is left over; "expanded" repeats its first row."""
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "reversed":
        order = tuple(range(x.ndim))[::-1]
        return x.permute(order).contiguous().permute(order)
    if layout == "sliced":
        room = x.new_full([n + 2 for n in x.shape], torch.nan)
        inner = room[tuple(slice(1, -1) for _ in x.shape)]
        return inner.copy_(x)
    if layout == "expanded" and len(x):
        return x[:1].expand_as(x)
    return x


@st.composite
def cases(draw, impl, **fixed):
    """Small where the interpreter runs it: about 8 ms a program."""
    small = impl == "triton" and DEVICE == "cpu"
    choices = {
        "seed": st.integers(0, 2**31),
        "rows": st.integers(0, 12 if small else 64),
        "edges": st.integers(0, 50 if small else 300),
        "heads": st.sampled_from([1, 2, 3] if small else [1, 2, 3, 8]),
        "group": st.sampled_from([1, 1, 2, 3]),
        "d": st.sampled_from([1, 5, 8, 10, 16, 17, 32]),
        "dv": st.sampled_from([1, 5, 8, 10, 16, 17, 32]),
        "dtype": st.sampled_from([FP64, FP32, BF16, FP16]),
        "index": st.sampled_from([torch.int32, torch.int64]),
        "kind": st.sampled_from(["uniform", "power_law", "hub"]),
        "isolated": st.integers(0, 3),
        "layout": st.sampled_from(LAYOUTS),
        "biased": st.booleans(),
        "clamped": st.booleans(),
        "eps": st.sampled_from([0.0, 1e-6, 0.5]),
        "scale": st.sampled_from([None, 0.3, -1.0]),
    }
    drawn = {name: draw(s) for name, s in choices.items() if name not in fixed}
    if "cols" not in fixed and draw(st.booleans()):
        drawn["cols"] = draw(st.integers(0, 12 if small else 64))
    return case(**drawn, **fixed)


def examples(count, impls=IMPLS, **fixed):
    """Run ``check(impl, case)`` on drawn cases: fewer of them where the interpreter runs it."""

    def wrap(check):
        def test(impl):
            few = impl == "triton" and DEVICE == "cpu"

            @settings(
                max_examples=max(3, count // 6) if few else count,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
            )
            @given(case=cases(impl, **fixed))
            def run(case):
                check(impl, case)

            run()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return pytest.mark.parametrize("impl", impls)(test)

    return wrap


def attend(case, impl, **changes):
    """The public function on a case, with its options and all extras: o, lse, weights."""
    inputs = {"q": case.q, "k": case.k, "v": case.v, "edge_bias": case.bias}
    options = dict(case.options, return_lse=True, return_weights=True, impl=impl)
    return neighborhood_attention(graph=case.graph, **inputs, **options | changes)


def evaluate(case, impl, dtype=None):
    """Outputs and gradients by name; ``dtype`` casts the inputs first."""

    def cast(x):
        return x if dtype is None or x is None else x.to(dtype)

    wide = FP64 if dtype == FP64 else case.dlse.dtype
    leaves = {
        name: cast(getattr(case, name)).detach().requires_grad_()
        for name in ("q", "k", "v", "bias")
        if getattr(case, name) is not None
    }
    o, lse, weights = attend(replace(case, **leaves), impl)
    grads = torch.autograd.grad(
        (o, lse), list(leaves.values()), (cast(case.do), case.dlse.to(wide)), materialize_grads=True
    )
    found = dict(zip(NAMES, (o, lse, weights), strict=False))
    found |= {f"d{name}": x for name, x in zip(leaves, grads, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def close(actual, expected, name="", tolerance=1e-9):
    torch.testing.assert_close(
        actual,
        expected,
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
        msg=lambda m: f"{name}: {m}",
    )


def all_close(actual, expected, tolerance=1e-9):
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        close(x, expected[name], name, tolerance)


def same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in actual.items():
        assert torch.equal(x, expected[name]), name


def loops(case):
    """The third implementation, on the caller's edge list."""
    low, high = case.options.get("logit_clamp") or (-math.inf, math.inf)
    d, scale = case.q.shape[2], case.options["scale"]
    arrays = (case.q, case.k, case.v, case.bias, case.do, case.dlse)
    found = oracle.neighborhood_attention(
        case.edge_index.tolist(),
        *(None if x is None else x.double().cpu().numpy() for x in arrays),
        scale=1 / math.sqrt(d) if scale is None else scale,
        low=low,
        high=high,
        eps=case.options["denominator_eps"],
    )
    found = {
        n: torch.from_numpy(np.asarray(x)).to(DEVICE) for n, x in zip(NAMES, found, strict=True)
    }
    if case.bias is None:
        del found["dbias"]
    return found


@examples(50, impls=["reference"], dtype=FP64)
def test_reference_is_the_equations(impl, case):
    all_close(evaluate(case, impl), loops(case))


@pytest.mark.parametrize("layout", LAYOUTS[:4])
@pytest.mark.parametrize("impl", IMPLS)
def test_everything_at_once(impl, layout):
    """No two sizes equal, no power of two, every option in use."""
    shape = {"heads": 3, "group": 2, "d": 5, "dv": 10, "layout": layout}
    x = case(7, 9, 60, cols=7, kind="hub", isolated=2, clamped=True, eps=0.3, scale=0.7, **shape)
    all_close(evaluate(x, impl), loops(x))


@examples(50, impls=FAST, dtype=FP64)
def test_implementations_agree_in_float64(impl, case):
    all_close(evaluate(case, impl), loops(case))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x + 1e-3,
        lambda x: x.clone().index_fill_(0, torch.tensor([1]), torch.nan),
        lambda x: x.clone().index_fill_(0, torch.tensor([1]), torch.inf),
    ],
    ids=["offset", "nan", "inf"],
)
def test_accuracy_gate_can_fail(spoil):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    x[3] = -torch.inf
    assert_as_accurate(x, x, x.double(), "x")
    with pytest.raises(AssertionError, match=r"x is off by .* at \[\d, \d\]"):
        assert_as_accurate(spoil(x), x, x.double(), "x")
    with pytest.raises(AssertionError, match="x is off by"):
        assert_as_accurate(x.nan_to_num(neginf=0.0), x, x.double(), "x")


def test_library_memory_is_poisoned():
    source = "import torch\ndef f(x): return x.new_empty(3), torch.empty(3, dtype=torch.int32)"
    for name, poisoned in (("fastgt.somewhere", True), ("elsewhere", False)):
        scope = {"__name__": name}
        exec(source, scope)
        x, i = scope["f"](torch.zeros(1))
        if poisoned:
            assert x.isnan().all()
            assert (i == 2**30 - 1).all()


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
@pytest.mark.parametrize("impl", FAST)
def test_half_precision_only_rounds_the_result(impl, dtype):
    """Sums are kept in float32: a hub row must not drown in bfloat16."""
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
@pytest.mark.parametrize("impl", FAST)
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


@pytest.mark.parametrize("impl", IMPLS)
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
@pytest.mark.parametrize("impl", IMPLS)
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
@pytest.mark.parametrize("impl", FAST)
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
@pytest.mark.parametrize("impl", IMPLS)
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
@pytest.mark.parametrize("impl", FAST)
def test_huge_logits(impl, size, eps):
    x = case(2, 8, 40, dtype=FP32, eps=eps, isolated=1)
    x = replace(x, bias=(x.bias + size))
    truth, eager = evaluate(x, "reference", FP64), evaluate(x, "reference")
    all_close(truth, loops(x))
    for name, found in evaluate(x, impl).items():
        assert not found.isnan().any(), name
        assert_as_accurate(found, eager[name], truth[name], name, 3.0)


@pytest.mark.parametrize("twins", [1, 2, 3])
@pytest.mark.parametrize("impl", FAST)
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
@pytest.mark.parametrize("impl", IMPLS)
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
@pytest.mark.parametrize("impl", IMPLS)
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
        assert torch.equal(y[~hit[name]], clean[name][~hit[name]]), name
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
    o, lse, weights = neighborhood_attention(
        q,
        k,
        v,
        graph,
        scale=1.0,
        logit_clamp=clamp,
        return_lse=True,
        return_weights=True,
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
@pytest.mark.parametrize("impl", IMPLS)
def test_one_sided_and_closed_clamps(impl, clamp):
    x = case(6, 8, 30, biased=True)
    wanted = clamp if isinstance(clamp, tuple) else (-clamp, clamp)
    found = evaluate(replace(x, options=x.options | {"logit_clamp": clamp}), impl)
    all_close(found, loops(replace(x, options=x.options | {"logit_clamp": wanted})))


@pytest.mark.parametrize("eps", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("impl", IMPLS)
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
    both = neighborhood_attention(*args, return_lse=True, return_weights=True, impl=impl)
    assert [y.dtype for y in both] == [BF16, FP32, BF16]
    assert [list(y.shape) for y in both] == [[6, 2, 8], [6, 2], [15, 2]]
    assert [y.requires_grad for y in both] == [True, True, False]
    assert [y.is_contiguous() for y in both] == [True] * 3
    for wanted, kept in (("return_lse", both[1]), ("return_weights", both[2])):
        found = neighborhood_attention(*args, **{wanted: True}, impl=impl)
        assert len(found) == 2
        assert torch.equal(found[0], o)
        assert torch.equal(found[1], kept)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl):
    x = case(3, 4, 9, heads=1, group=2, cols=5, d=3, dv=2, clamped=True, eps=0.1)
    # every row needs an edge: the finite difference of an LSE of -inf is NaN
    x = x.onto(torch.cat([x.edge_index, torch.arange(4, device=DEVICE).repeat(2, 1)], 1))
    generator = x.generator
    x.bias = torch.randn(x.graph.num_edges, 2, generator=generator, dtype=FP64).to(DEVICE)
    inputs = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.bias)]

    def f(q, k, v, bias):
        return attend(replace(x, q=q, k=k, v=v, bias=bias), impl)[:2]

    fast = impl == "triton" and DEVICE == "cpu"
    assert torch.autograd.gradcheck(f, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "create_graph"])
@pytest.mark.parametrize("upstream", ["o", "lse", "both"])
@pytest.mark.parametrize("impl", IMPLS)
def test_every_subset_of_gradients(impl, upstream, twice):
    """Asked for alone or together, through the output, the LSE or both: always the same."""
    x = case(9, 5, 14, heads=1, group=2, cols=4, d=4, dv=3, clamped=True, eps=0.2, isolated=1)
    zero = {"o": {"dlse": x.dlse * 0}, "lse": {"do": x.do * 0}, "both": {}}[upstream]
    expected = loops(replace(x, **zero))
    for wanted in itertools.product([False, True], repeat=4):
        few = impl == "triton" and DEVICE == "cpu" and sum(wanted) in (2, 3)
        if not any(wanted) or few:
            continue
        leaves = dict(zip(("q", "k", "v", "bias"), wanted, strict=True))
        leaves = {
            name: getattr(x, name).detach().clone().requires_grad_(need)
            for name, need in leaves.items()
        }
        o, lse, _ = attend(replace(x, **leaves), impl)
        pairs = {"o": [(o, x.do)], "lse": [(lse, x.dlse)], "both": [(o, x.do), (lse, x.dlse)]}[
            upstream
        ]
        inputs = {name: t for name, t in leaves.items() if t.requires_grad}
        if impl == "reference":  # in plain autograd the LSE has no connection to v
            pairs = [(y, dy) for y, dy in pairs if y.requires_grad]
            if not pairs:
                continue
        outputs, upstreams = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            outputs,
            list(inputs.values()),
            upstreams,
            create_graph=twice,
            materialize_grads=impl == "reference",
        )
        for name, grad in zip(inputs, found, strict=True):
            close(grad, expected[f"d{name}"], f"d{name} of {list(inputs)}")


@pytest.mark.parametrize("impl", FAST)
def test_nothing_is_computed_for_gradients_not_asked_for(impl):
    x = case(0, 5, 12)
    walk = (x.graph.row_ptr, x.graph.col, x.graph.edge)
    lse = attend(x, impl)[1]
    settings = (0.3, -math.inf, math.inf, 0.0)
    for needs in itertools.product([False, True], repeat=4):
        grads = torch.ops.fastgt.attention_bwd(
            impl,
            x.do,
            x.dlse,
            x.q,
            x.k,
            x.v,
            x.bias,
            lse,
            *walk,
            *x.graph.columns,
            *settings,
            *needs,
        )
        for need, grad in zip(needs, grads, strict=True):
            assert bool(grad.numel()) == need
            assert not grad.isnan().any()


@pytest.mark.parametrize("impl", FAST)
def test_double_backward_equals_the_reference(impl):
    def second(impl):
        x = case(2, 8, 24, cols=9, heads=2, group=2, d=5, dv=3, clamped=True, eps=0.3, isolated=1)
        leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.bias, x.do)]
        o, lse, _ = attend(replace(x, q=leaves[0], k=leaves[1], v=leaves[2], bias=leaves[3]), impl)
        loss = (o * leaves[4]).sum() + lse[~x.isolated()].square().sum()
        first = torch.autograd.grad(loss, leaves[:4], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for a, b in zip(second(impl), second("reference"), strict=True):
        close(a, b)


@pytest.mark.parametrize("layout", [*LAYOUTS, "scalar"])
@pytest.mark.parametrize("impl", FAST)
def test_strides_of_upstream_gradients(impl, layout):
    x = case(6, 7, 30, heads=3, d=5, dv=6)
    if layout == "scalar":
        one = torch.ones((), dtype=FP64, device=DEVICE)
        do, dlse = one.expand(x.do.shape), one.expand(x.dlse.shape)
    else:
        do, dlse = arrange(x.do, layout), arrange(x.dlse, layout)
    x = replace(x, do=do, dlse=dlse)
    all_close(evaluate(x, impl), loops(x))


@pytest.fixture(
    params=[(1, 2, 1), (4, 4, 1), (2, 16, 4), (16, 1, 2), (8, 2, 8)],
    ids=lambda t: f"R{t[0]}-E{t[1]}-H{t[2]}",
)
def tile(request, monkeypatch):
    """Every launch with the same tile, whatever the shape."""
    pytest.importorskip("triton")
    import fastgt.kernels.attention as kernels
    from fastgt.kernels.configs import Tile

    chosen = Tile(*request.param, num_warps=4)
    monkeypatch.setattr(kernels, "attention_tile", lambda *args, **kwargs: chosen)
    return chosen


def degrees_case(degrees, cols, **options):
    """Row i has degrees[i] edges, shuffled; columns are random."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(len(degrees)).repeat_interleave(torch.tensor(degrees))
    source = torch.randint(cols, target.shape, generator=generator)
    order = torch.randperm(len(target), generator=generator)
    index = torch.stack([source, target])[:, order].to(DEVICE)
    x = case(0, len(degrees), len(target), cols=cols, **options)
    return x.onto(index)


def test_any_tile_gives_the_same(tile):
    """Degrees at and around every block size, and rows beyond a block of rows."""
    x = degrees_case([0, 1, 3, 4, 5, 0, 17], 5, heads=2, d=5, dv=3, clamped=True)
    all_close(evaluate(x, "triton"), loops(x))
    turned = replace(x, q=x.k, k=x.q, v=x.do[:, :, :3], do=x.v, dlse=x.k[:, :, 0].clone())
    turned = replace(turned, edge_index=x.edge_index.flip(0), graph=x.graph.transpose())
    all_close(evaluate(turned, "triton"), loops(turned))


@pytest.mark.parametrize("turned", [False, True], ids=["row", "column"])
@pytest.mark.parametrize("impl", FAST)
def test_a_hub_is_like_any_other_node(impl, turned):
    hub = 120 if impl == "triton" and DEVICE == "cpu" else 5000
    x = degrees_case([2, hub, 0, 1, 3], 7, dtype=FP32, eps=1e-6)
    if turned:
        y = case(1, 7, x.graph.num_edges, cols=5, dtype=FP32, eps=1e-6)
        x = y.onto(x.edge_index.flip(0))
    truth, eager = evaluate(x, "reference", FP64), evaluate(x, "reference")
    for name, found in evaluate(x, impl).items():
        assert_as_accurate(found, eager[name], truth[name], name, 3.0)


@pytest.mark.parametrize("impl", FAST)
def test_index_width_does_not_change_a_bit(impl):
    x = case(3, 12, 40, kind="hub", dtype=FP32)
    wide = replace(x, graph=with_index_dtype(x.graph, torch.int64))
    assert wide.graph.columns.slot.dtype == torch.int64
    same_bits(evaluate(wide, impl), evaluate(x, impl))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_strides_do_not_change_a_bit(impl, dtype, layout):
    x = case(4, 9, 30, heads=2, group=2, d=16, dv=8, dtype=dtype)
    names = ("q", "k", "v", "bias", "do", "dlse")
    laid = {name: arrange(getattr(x, name), layout) for name in names}
    plain = {name: t.contiguous() for name, t in laid.items()}
    same_bits(evaluate(replace(x, **laid), impl), evaluate(replace(x, **plain), impl))


@pytest.mark.parametrize("impl", FAST)
def test_slices_of_one_projection(impl):
    """The usual [N, 3, H, D] projection, and one whose slices start off any alignment."""
    generator = torch.Generator().manual_seed(0)
    for pad in (0, 1):
        packed = torch.randn(8, 3 * 2 * 8 + pad, generator=generator, dtype=BF16).to(DEVICE)
        q, k, v = packed[:, pad:].unflatten(1, (3, 2, 8)).unbind(1)
        graph = random_graph(0, 8, 25, device=DEVICE)
        found = neighborhood_attention(q, k, v, graph, impl=impl)
        plain = (t.contiguous() for t in (q, k, v))
        assert torch.equal(found, neighborhood_attention(*plain, graph, impl=impl))


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_left_alone_and_outputs_alias_nothing(impl, dtype):
    x = case(5, 8, 30, dtype=dtype, heads=1, d=4, dv=4, clamped=True, eps=1e-6)
    walks = [x.graph.row_ptr, x.graph.col, x.graph.edge, *x.graph.columns]
    inputs = [x.q, x.k, x.v, x.bias, x.do, x.dlse, *walks]
    before = [t.clone() for t in inputs]
    found = evaluate(x, impl)
    for a, b in zip(inputs, before, strict=True):
        assert torch.equal(a, b)
    places = [t.untyped_storage().data_ptr() for t in (*inputs, *found.values())]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_bitwise_repeatable(impl, dtype):
    interpreted = impl == "triton" and DEVICE == "cpu"
    x = (
        case(1, 16, 60, dtype=dtype)
        if interpreted
        else case(1, 100, 2000, kind="hub", dtype=dtype, heads=1)
    )
    first = evaluate(x, impl)
    for _ in range(2 if interpreted else 100):
        same_bits(evaluate(x, impl), first)


@pytest.mark.skipif(DEVICE != "cpu", reason="threads are the CPU's")
def test_threads_do_not_change_a_bit():
    x = case(1, 3000, 40_000, kind="power_law", dtype=FP32, d=16, dv=16)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(evaluate(x, "torch"))
    finally:
        torch.set_num_threads(threads)
    same_bits(*found)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's memory is not the kernel's")
def test_memory_of_the_kernels():
    check_memory("triton")


@pytest.mark.skipif(DEVICE != "cpu", reason="runs on CPU tensors")
def test_memory_of_the_cpu_path():
    check_memory("torch")


def check_memory(impl):
    """Of large graphs; small ones may take up to 2^17 edges and nodes, heads counted, at once."""
    n, edges, h, d = 500, 140_000, 4, 64
    x = case(0, n, edges, heads=h, d=d, dv=d, dtype=FP32)
    evaluate(x, impl)  # the column walk and other first-time costs
    word, wide = 4, edges * h * d * 4
    # o, three gradients and their float32 copies; logits, weights, dbias and a few [E] vectors
    allowed = word * (10 * n * h * d + 6 * edges * h)
    assert allowed < wide / 4
    device = torch.device(DEVICE)
    assert peak_extra_memory(lambda: evaluate(x, impl), device) <= allowed
    assert peak_extra_memory(lambda: evaluate(x, "reference"), device) > wide


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU path's choice")
def test_heads_together_or_one_by_one_give_the_same_bits(monkeypatch):
    x = case(5, 30, 200, heads=5, group=2, dtype=FP32, clamped=True, eps=1e-6, isolated=2)
    together = evaluate(x, "torch")
    for limit in (0, 600):  # one by one; two and a rest
        monkeypatch.setattr("fastgt.cpu.attention._TOGETHER", limit)
        same_bits(evaluate(x, "torch"), together)


def test_addresses_beyond_two_to_the_31(tmp_path):
    """Strides reach past 2^31 elements; the memory is a sparse file, so nothing of it is paid.

    Every base lies 2^31 elements into the file: a wrapped offset would read zeros, not crash.
    """
    size = 2**33
    if DEVICE == "cuda":
        room = torch.zeros(size, dtype=FP16, device=DEVICE)
    else:
        room = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=FP16)
    x = case(2, 5, 14, heads=2, group=2, d=4, dv=4, dtype=FP16)
    # odd, or the kernel multiplies by an even factor of it at the very end, in 64 bits
    far, place, laid = 3 * 2**28 + 1, 2**31, {}
    for name in ("q", "k", "v", "do", "bias"):
        tensor = getattr(x, name)
        stride = (2**28 + 1, far) if name == "bias" else (far, *tensor.stride()[1:])
        laid[name] = room.as_strided(tensor.shape, stride, place).copy_(tensor)
        place += 128
    for impl in FAST:
        same_bits(evaluate(replace(x, **laid), impl), evaluate(x, impl))


def huge_graph(rows, edges):
    """A graph beyond any memory: meta tensors only."""

    def index(n):
        return torch.empty(n, dtype=torch.int64, device="meta")

    ptr = index(rows + 1)
    walk = fastgt.graph.ColumnWalk(ptr, *(index(edges) for _ in range(3)))
    bounds = index(2)
    return Graph(rows, rows, ptr, index(edges), index(edges), bounds, bounds, {"columns": walk})


def test_shapes_beyond_two_to_the_31_on_meta_tensors():
    n, e, h, d = 3 * 2**30, 5 * 2**30, 8, 32
    graph = huge_graph(n, e)
    q, k, v = (torch.empty(n, h, d, device="meta", requires_grad=True) for _ in range(3))
    bias = torch.empty(e, h, device="meta", requires_grad=True)
    o, lse, weights = neighborhood_attention(
        q, k, v, graph, edge_bias=bias, return_lse=True, return_weights=True, impl="triton"
    )
    assert [t.shape for t in (o, lse, weights)] == [(n, h, d), (n, h), (e, h)]
    grads = torch.autograd.grad((o, lse), (q, k, v, bias), (o, lse))
    assert [g.shape for g in grads] == [(n, h, d)] * 3 + [(e, h)]


@pytest.mark.parametrize("dtype", [FP16, FP64], ids=str)
@pytest.mark.parametrize(("heads", "d"), [(1, 1), (8, 16), (64, 256), (1024, 256)])
def test_grids_stay_within_the_limits(heads, d, dtype, monkeypatch):
    """Rows are the first axis, 2^31 - 1 long; the second one ends at 65,535."""
    pytest.importorskip("triton")
    import fastgt.kernels.attention as kernels

    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in list(vars(kernels)):
        if name.endswith("_kernel"):
            monkeypatch.setattr(kernels, name, Recorder())
    n = 2**31 - 1
    q = torch.empty(n, heads, d, dtype=dtype, device="meta")
    lse = torch.empty(n, heads, device="meta")
    ptr = torch.empty(n + 1, dtype=torch.int64, device="meta")
    settings = (1.0, -math.inf, math.inf, 0.0)
    for edges in (0, n, 40 * n):
        e = torch.empty(edges, dtype=torch.int64, device="meta")
        kernels.attention_fwd(q, q, q, None, ptr, e, e, *settings, False)
        walks = (ptr, e, e, ptr, e, e, e)
        kernels.attention_bwd(q, lse, q, q, q, None, lse, *walks, *settings, *(True,) * 3, False)
    assert len(grids) >= 9
    for grid in grids:
        assert 0 < grid[0] < 2**31
        assert 0 < grid[1] <= 65535


@pytest.mark.parametrize(
    ("edges", "layout", "dtype"),
    [(9, "contiguous", FP32), (9, "reversed", BF16), (0, "contiguous", FP32)],
    ids=["plain", "strided", "empty"],
)
@pytest.mark.parametrize("impl", FAST)
def test_opcheck(impl, edges, layout, dtype):
    x = case(0, 4, edges, cols=3, heads=1, group=2, d=4, dv=2, dtype=dtype, layout=layout)
    walk = (x.graph.row_ptr, x.graph.col, x.graph.edge)
    settings = (0.5, -1.0, 1.0, 1e-6)
    forward = (impl, x.q, x.k, x.v, x.bias, *walk, *settings)
    lse = attend(x, impl)[1]
    backward = (impl, x.do, x.dlse, x.q, x.k, x.v, x.bias, lse, *walk, *x.graph.columns, *settings)
    torch.library.opcheck(torch.ops.fastgt.attention_fwd.default, (*forward, edges == 9))
    needs = (True,) * 4 if layout == "contiguous" else (False, True, False, True)
    torch.library.opcheck(torch.ops.fastgt.attention_bwd.default, (*backward, *needs))


@pytest.mark.parametrize(
    "options",
    [{}, {"logit_clamp": 5.0, "denominator_eps": 1e-6, "scale": 0.3, "return_weights": True}],
    ids=["plain", "options"],
)
@pytest.mark.parametrize("impl", FAST)
def test_compiles_whole_and_once(impl, options):
    """One compilation serves graphs of every size, forward and backward."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(neighborhood_attention, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    # no two sizes are equal, nor N + 1 and another: the compiler would take them for one number
    for seed, (n, e) in enumerate([(11, 20), (9, 31), (13, 15)]):
        x = case(seed, n, e, heads=2, d=8, dtype=FP32)
        leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.bias)]
        found = []
        for f in (compiled, neighborhood_attention):
            y = f(*leaves[:3], x.graph, edge_bias=leaves[3], return_lse=True, impl=impl, **options)
            found.append([*y, *torch.autograd.grad(y[:2], leaves, (x.do, x.dlse))])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_the_inputs(impl):
    x = case(3, 8, 30, dtype=FP32)
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.bias)]
    with torch.autocast(DEVICE, BF16):
        o = neighborhood_attention(*leaves[:3], x.graph, edge_bias=leaves[3], impl=impl)
    cast = [t.detach().to(BF16).requires_grad_() for t in leaves]
    plain = neighborhood_attention(*cast[:3], x.graph, edge_bias=cast[3], impl=impl)
    assert o.dtype == BF16
    assert torch.equal(o, plain)
    grads = torch.autograd.grad(o, leaves, x.do.to(BF16))
    expected = torch.autograd.grad(plain, cast, x.do.to(BF16))
    for a, b in zip(grads, expected, strict=True):
        assert a.dtype == FP32
        assert torch.equal(a, b.float())
    with torch.autocast(DEVICE, BF16):
        double = [t.detach().double() for t in leaves]
        assert neighborhood_attention(*double[:3], x.graph, impl=impl).dtype == FP64


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("impl", FAST)
def test_a_copied_graph_gives_the_same(impl, how):
    x = case(3, 8, 30, dtype=FP32)
    first = evaluate(x, impl)  # the column walk is cached from here on
    if how == "deepcopy":
        graph = copy.deepcopy(x.graph)
    elif how == "pickle":
        graph = pickle.loads(pickle.dumps(x.graph))
    else:
        file = io.BytesIO()
        torch.save(x.graph, file)
        file.seek(0)
        graph = torch.load(file, weights_only=False)
    assert graph.col is not x.graph.col
    assert graph.col.data_ptr() != x.graph.col.data_ptr()
    same_bits(evaluate(replace(x, graph=graph), impl), first)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("impl", FAST)
def test_checkpointing(impl, reentrant):
    x = case(3, 8, 30, dtype=FP32)
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.bias)]

    def f(q, k, v, bias):
        return neighborhood_attention(q.tanh(), k, v, x.graph, edge_bias=bias, impl=impl)

    kept = checkpoint(f, *leaves, use_reentrant=reentrant)
    kept.backward(x.do)
    plain = torch.autograd.grad(f(*leaves), leaves, x.do)
    for leaf, b in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, b)


@pytest.fixture
def ran(monkeypatch):
    """The names of the implementations that ran, in order."""
    import fastgt.cpu.attention
    import fastgt.kernels.attention

    seen = []
    for name, module, function in (
        ("torch", fastgt.cpu.attention, "attention_fwd"),
        ("triton", fastgt.kernels.attention, "attention_fwd"),
        ("torch", fastgt.cpu.attention, "attention_bwd"),
        ("triton", fastgt.kernels.attention, "attention_bwd"),
        ("reference", reference, "neighborhood_attention"),
    ):
        real = getattr(module, function)

        def spy(*args, real=real, name=name, **kwargs):
            seen.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, function, spy)
    return seen


def test_the_named_implementation_runs(ran):
    x = case(0, 3, 5, dtype=FP32)
    default = FAST[0]

    def run(impl=None):
        ran.clear()
        q = x.q.detach().requires_grad_()
        neighborhood_attention(q, x.k, x.v, x.graph, impl=impl).sum().backward()
        return ran[0] if len(set(ran)) == 1 else ran

    assert run() == default
    for impl in IMPLS:
        assert run(impl) == impl
        with fastgt.implementation(impl):
            assert run() == impl
            assert run("reference") == "reference"
            with fastgt.implementation(None):
                assert run() == default
            assert run() == impl
    assert run() == default
    with pytest.raises(ZeroDivisionError), fastgt.implementation("reference"):
        raise ZeroDivisionError
    assert run() == default


def test_an_implementation_that_cannot_run_says_why(monkeypatch):
    x = case(0, 3, 5, dtype=FP32)
    for call in (
        lambda: neighborhood_attention(x.q, x.k, x.v, x.graph, impl="cuda"),
        lambda: fastgt.implementation("cuda").__enter__(),
    ):
        with pytest.raises(ValueError, match=r"impl must be one of \['triton', .* got 'cuda'"):
            call()
    meta = [t.to("meta") for t in (x.q, x.k, x.v)]
    with pytest.raises(RuntimeError, match="impl='torch' runs on CPU tensors, got meta"):
        neighborhood_attention(*meta, x.graph.to("meta"), impl="torch")
    if DEVICE == "cpu":
        import triton

        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        with pytest.raises(RuntimeError, match="impl='triton' needs tensors on a GPU, got cpu"):
            neighborhood_attention(x.q, x.k, x.v, x.graph, impl="triton")


def zeros(*shape, dtype=FP32, device=DEVICE):
    return torch.zeros(shape, dtype=dtype, device=device)


REFUSALS = {
    "rows of q": ({"q": zeros(4, 4, 8)}, ValueError, "q has 4 rows but the graph has 5 rows"),
    "rows of k": ({"k": zeros(5, 2, 8)}, ValueError, "k has 5 rows but the graph has 3 columns"),
    "rows of v": ({"v": zeros(5, 2, 6)}, ValueError, "v has 5 rows but the graph has 3 columns"),
    "width of k": ({"k": zeros(3, 2, 7)}, ValueError, "k has head width 7 but q has 8"),
    "heads of v": ({"v": zeros(3, 1, 6)}, ValueError, "v has 1 heads but k has 2"),
    "group": (
        {"q": zeros(5, 3, 8), "edge_bias": None},
        ValueError,
        "q's 3 heads must be a multiple of k's 2 heads",
    ),
    "more key heads": (
        {"q": zeros(5, 1, 8), "edge_bias": None},
        ValueError,
        "q's 1 heads must be a multiple of k's 2 heads",
    ),
    "no heads": (
        {"q": zeros(5, 0, 8), "k": zeros(3, 0, 8), "v": zeros(3, 0, 6), "edge_bias": None},
        ValueError,
        "q's 0 heads must be a multiple of k's 0 heads",
    ),
    "no width": (
        {"q": zeros(5, 4, 0), "k": zeros(3, 2, 0)},
        ValueError,
        "q has head width 0; supported are 1 to 256",
    ),
    "wide q": (
        {"q": zeros(5, 4, 257), "k": zeros(3, 2, 257)},
        ValueError,
        "q has head width 257; supported are 1 to 256",
    ),
    "wide v": ({"v": zeros(3, 2, 257)}, ValueError, "v has head width 257; supported are 1 to 256"),
    "edges of bias": (
        {"edge_bias": zeros(5, 4)},
        ValueError,
        r"edge_bias must be \[E, H\] = \[6, 4\], got \[5, 4\]",
    ),
    "heads of bias": (
        {"edge_bias": zeros(6, 2)},
        ValueError,
        r"edge_bias must be \[E, H\] = \[6, 4\], got \[6, 2\]",
    ),
    "dimensions of q": ({"q": zeros(5, 8)}, ValueError, r"q must be \[N, H, D\], got \[5, 8\]"),
    "dimensions of v": ({"v": zeros(3)}, ValueError, r"v must be \[N, H, D\], got \[3\]"),
    "integers": ({"q": zeros(5, 4, 8, dtype=torch.int64)}, TypeError, "q must be float.*int64"),
    "dtype of k": ({"k": zeros(3, 2, 8, dtype=FP64)}, TypeError, "k is .*float64 but q is .*32"),
    "dtype of v": ({"v": zeros(3, 2, 6, dtype=FP16)}, TypeError, "v is .*float16 but q is .*32"),
    "dtype of bias": (
        {"edge_bias": zeros(6, 4, dtype=BF16)},
        TypeError,
        "edge_bias is .*bfloat16 but q is .*float32",
    ),
    "device of v": ({"v": zeros(3, 2, 6, device="meta")}, ValueError, "v is on meta but q is on"),
    "device of bias": (
        {"edge_bias": zeros(6, 4, device="meta")},
        ValueError,
        "edge_bias is on meta but q is on",
    ),
    "device of the graph": (
        {
            "q": zeros(5, 4, 8, device="meta"),
            "k": zeros(3, 2, 8, device="meta"),
            "v": zeros(3, 2, 6, device="meta"),
            "edge_bias": None,
        },
        ValueError,
        "graph is on .* but q is on meta",
    ),
    "no tensor q": ({"q": None}, TypeError, "q must be a tensor, got NoneType"),
    "no tensor k": ({"k": [1.0]}, TypeError, "k must be a tensor, got list"),
    "no tensor bias": ({"edge_bias": 1.0}, TypeError, "edge_bias must be a tensor, got float"),
    "no graph": ({"graph": zeros(2, 6)}, TypeError, "graph must be a fastgt.Graph, got Tensor"),
    "scale nan": ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
    "scale inf": ({"scale": -math.inf}, ValueError, "scale must be finite, got -inf"),
    "negative eps": ({"denominator_eps": -1.0}, ValueError, "denominator_eps .* got -1.0"),
    "eps nan": ({"denominator_eps": math.nan}, ValueError, "denominator_eps .* got nan"),
    "eps inf": ({"denominator_eps": math.inf}, ValueError, "denominator_eps .* got inf"),
    "clamp upside down": (
        {"logit_clamp": (3.0, -2.0)},
        ValueError,
        r"logit_clamp must have low <= high, got \(3.0, -2.0\)",
    ),
    "clamp negative": ({"logit_clamp": -2.0}, ValueError, r"logit_clamp .* got \(2.0, -2.0\)"),
    "clamp nan": ({"logit_clamp": math.nan}, ValueError, "logit_clamp .* got .*nan"),
    "clamp of three": ({"logit_clamp": (0, 1, 2)}, ValueError, "logit_clamp .* got 3 numbers"),
}


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("refused", REFUSALS)
def test_refuses_by_name_and_numbers(refused, impl):
    changes, error, message = REFUSALS[refused]
    fitting = {
        "q": zeros(5, 4, 8),
        "k": zeros(3, 2, 8),
        "v": zeros(3, 2, 6),
        "graph": random_graph(0, 5, 6, cols=3, device=DEVICE),
        "edge_bias": zeros(6, 4),
    }
    neighborhood_attention(**fitting, impl=impl)
    with pytest.raises(error, match=message):
        neighborhood_attention(**fitting | changes, impl=impl)


@pytest.mark.parametrize("name", ["power_law", "cora", "zinc", "debian"])
def test_real_graphs(name):
    """Hubs of thousands, isolated rows and a batch, as they come."""
    if DEVICE == "cpu" and name == "debian":
        pytest.skip("the loops of plain PyTorch take too long here: it runs on a GPU")
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


def test_random_batches_have_their_graphs():
    graph = random_batch(0, [(4, 9), (0, 0), (3, 5)], device=DEVICE)
    assert graph.graph_ptr.tolist() == [0, 4, 4, 7]
    assert graph.num_edges == 14

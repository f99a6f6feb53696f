"""channelwise_attention: values, gradients, refusals, and how it runs."""

import inspect
import itertools
import math
from dataclasses import replace

import pytest
import torch
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
from channelwise_cases import (
    NAMES,
    PLANES,
    TERMS,
    Case,
    attend,
    case,
    evaluate,
    examples,
    loops,
    shared,
    walks,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastgt
from fastgt import Aux, AuxRequest, Graph, channelwise_attention, neighborhood_attention, reference
from fastgt.bench.memory import peak_extra_memory
from fastgt.contract import ChannelwiseLogit, ChannelwiseUpstream, HeadMask
from fastgt.ops.channelwise_attention import _launch_bwd, _launch_fwd
from fastgt.ops.head_mask import active_heads
from fastgt.prepared import Prepared
from fastgt.testing import PROBLEMS, assert_as_accurate, random_graph, with_buckets

WAYS = [*FAST, "buckets"]
ALL = ["reference", *WAYS]
PER_EDGE = ("weights", "dlogits", "dedge_value")


@examples(40, impls=["reference"], dtype=FP64)
def test_reference_is_the_equations(impl, case):
    all_close(evaluate(case, impl), loops(case))


@examples(40, impls=FAST, dtype=FP64)
def test_implementations_agree_in_float64(impl, case):
    all_close(evaluate(case, impl), loops(case))


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[3], *PLANES])
@pytest.mark.parametrize("impl", ALL)
def test_everything_at_once(impl, layout):
    """No two sizes equal, no power of two, every option in use, several blocks of channels."""
    channels = (5, 27) if layout in PLANES else (135,)
    x = case(7, 6, 30, cols=7, kind="hub", isolated=2, clamped=True, eps=0.3, channels=channels,
             layout=layout)  # fmt: skip
    all_close(evaluate(x, impl), loops(x))


def accurate(x, impl):
    actual, eager = evaluate(x, impl), evaluate(x, "reference")
    truth = evaluate(x, "reference", FP64)
    for name, found in actual.items():
        factor = 3.0 if name.startswith("d") else 2.0
        assert_as_accurate(found, eager[name], truth[name], name, factor)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_as_accurate_as_eager(impl, dtype):
    @examples(16, impls=[impl], dtype=dtype)
    def check(impl, case):
        accurate(case, impl)

    check(impl)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", WAYS)
def test_half_precision_only_rounds_the_result(impl, dtype):
    """Sums are kept in float32: a hub row must not drown in bfloat16."""
    edges = 3000 if impl == "torch" or DEVICE == "cuda" else 90
    x = case(3, 4, edges, kind="hub", dtype=dtype, eps=1e-3, channels=(8,))
    half, full = evaluate(x, impl), evaluate(x, impl, FP32)
    assert half["lse"].dtype == FP32
    close(half["lse"], full["lse"], "lse", 1e-6)
    for name in half.keys() - {"lse"}:
        assert half[name].dtype == dtype
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(
            half[name], full[name].to(dtype), rtol=step, atol=step * 0.01, msg=name
        )


@examples(8, dtype=FP64, cols=None)
def test_renumbering_nodes_renumbers_the_result(impl, case):
    order = torch.randperm(case.graph.num_rows, generator=case.generator).to(DEVICE)
    place = torch.argsort(order)
    moved = {"do": case.do[order], "dlse": case.dlse[order]}
    moved |= {} if case.v is None else {"v": case.v[order]}
    found = evaluate(case.onto(place[case.edge_index], **moved), impl)
    for name, x in evaluate(case, impl).items():
        close(found[name], x if name in PER_EDGE else x[order], name)


@examples(8, dtype=FP64)
def test_reordering_edges_reorders_only_edge_tensors(impl, case):
    order = torch.randperm(case.graph.num_edges, generator=case.generator).to(DEVICE)
    found = evaluate(case.taking(order), impl)
    for name, x in evaluate(case, impl).items():
        close(found[name], x[order] if name in PER_EDGE else x, name)


@examples(8, dtype=FP64, clamped=False)
def test_a_duplicate_edge_adds_log_2_to_its_logits(impl, case):
    every = torch.arange(case.graph.num_edges, device=DEVICE)
    twice = (torch.rand(len(every), generator=case.generator) < 0.5).to(DEVICE)
    doubled = evaluate(case.taking(torch.cat([every, every[twice]])), impl)
    more = math.log(2) * twice.double().view(-1, *[1] * (case.logits.ndim - 1))
    found = evaluate(replace(case, logits=case.logits + more), impl)
    for name, x in doubled.items():
        if name in PER_EDGE:
            single = x[: len(every)]
            single[twice] += x[len(every) :]
            x = single
        close(x, found[name], name)


@examples(8, dtype=FP32, isolated=3)
def test_rows_without_edges_give_zero(impl, case):
    found, alone = evaluate(case, impl), case.isolated()
    assert (found["o"][alone] == 0).all()
    assert (found["lse"][alone] == -torch.inf).all()
    for name, x in found.items():
        assert not x.isnan().any(), name
    if case.v is not None:
        unused = torch.bincount(case.source, minlength=case.graph.num_cols) == 0
        assert (found["dv"][unused] == 0).all()


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("impl", IMPLS)
def test_no_edges_and_no_nodes(impl, rows, cols, terms):
    x = case(0, rows, 0, cols=cols, terms=terms, eps=1e-6, clamped=True, channels=(2, 3))
    found = evaluate(x, impl)
    assert (found.pop("lse") == -torch.inf).all()
    for name, y in found.items():
        assert (y == 0).all(), name
    assert found["o"].shape == (rows, 2, 3)
    assert found["weights"].shape == (0, 2, 3)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_batch_is_its_graphs_one_by_one(impl):
    """Empty graphs inside and at the end; one neighbour full of NaN changes nothing."""
    sizes = [(5, 14), (0, 0), (3, 0), (4, 9), (2, 0), (0, 0)]
    singles = [case(i, n, e, eps=1e-6) for i, (n, e) in enumerate(sizes)]
    names = ("logits", "v", "edge_value", "do", "dlse")
    for name in names:
        getattr(singles[3], name).fill_(torch.nan)
    joined = {name: torch.cat([getattr(x, name) for x in singles]) for name in names}
    graph = Graph.batch([x.graph for x in singles])
    whole = evaluate(replace(singles[0], graph=graph, **joined), impl)
    for name, found in whole.items():
        parts = found.split([e if name in PER_EDGE else n for n, e in sizes])
        for i, x in enumerate(singles):
            if i != 3:
                close(parts[i], evaluate(x, impl)[name], name)


@examples(8, dtype=FP64)
def test_a_row_and_a_channel_depend_on_nothing_else(impl, case):
    """The gradient of one channel of one row, and NaN everywhere else."""
    n, shape = case.graph.num_rows, case.logits.shape[1:]
    if n == 0 or case.graph.num_edges == 0:
        return
    row = int(torch.randint(n, (1,), generator=case.generator))
    channel = int(torch.randint(shape.numel(), (1,), generator=case.generator))
    only = torch.zeros(n, shape.numel(), dtype=torch.bool, device=DEVICE)
    only[row, channel] = True
    only = only.view(n, *shape)
    clean = evaluate(replace(case, do=case.do * only, dlse=case.dlse * only), impl)
    mine = (case.target == row).view(-1, *[1] * len(shape)) & only[row]
    near = torch.zeros(case.graph.num_cols, dtype=torch.bool, device=DEVICE)
    near[case.source[case.target == row]] = True
    near = near.view(-1, *[1] * len(shape)) & only[row]
    assert (clean["dlogits"][~mine] == 0).all()
    spoilt = {"logits": case.logits.masked_fill(~mine, torch.nan)}
    if case.v is not None:
        assert (clean["dv"][~near] == 0).all()
        spoilt["v"] = case.v.masked_fill(~near, torch.nan)
    if case.edge_value is not None:
        assert (clean["dedge_value"][~mine] == 0).all()
        spoilt["edge_value"] = case.edge_value.masked_fill(~mine, torch.nan)
    found = evaluate(replace(case, **spoilt), impl)
    plain = evaluate(case, impl)
    for name in ("o", "lse"):
        close(found[name][only], plain[name][only], name)
    for name in ("weights", "dlogits"):
        close(found[name][mine], plain[name][mine], name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["logits", "v", "edge_value", "do", "dlse"])
@pytest.mark.parametrize("impl", ["torch", "triton"] if DEVICE == "cpu" else FAST)
def test_nan_and_infinity_stay_with_the_rows_and_channels_that_use_them(impl, where, value):
    x = case(4, 9, 20, cols=10, dtype=FP32, eps=1e-6, isolated=1, channels=(4,))
    clean = evaluate(x, impl)
    at = int(x.target[0]) if where in ("do", "dlse") else 0
    at = int(x.source[0]) if where == "v" else at
    spoilt = getattr(x, where).clone()
    spoilt[at, 2] = value
    found = evaluate(replace(x, **{where: spoilt}), impl)
    rows = torch.zeros(9, dtype=torch.bool, device=DEVICE)
    rows[x.target[x.source == at] if where == "v" else x.target[0]] = True
    cols = torch.zeros(10, dtype=torch.bool, device=DEVICE)
    cols[x.source[rows[x.target]]] = True
    assert not rows.all()
    for name, y in found.items():
        hit = rows[x.target] if name in PER_EDGE else cols if name == "dv" else rows
        hit = hit[:, None] & (torch.arange(4, device=DEVICE) == 2)
        assert torch.equal(y[~hit], clean[name][~hit]), name
    if where in ("logits", "v", "edge_value"):
        assert not found["o"][rows, 2].isfinite().all()


@examples(8, dtype=FP64, eps=0.0)
def test_weights_sum_to_one_and_the_output_is_their_mean(impl, case):
    found, (source, target) = evaluate(case, impl), case.edge_index
    mass = torch.zeros_like(found["o"]).index_add(0, target, found["weights"])
    used = ~case.isolated()
    close(mass, used.to(mass).view(-1, *[1] * (mass.ndim - 1)).expand_as(mass))
    value = sum(x for x in (None if case.v is None else case.v[source], case.edge_value)
                if x is not None)  # fmt: skip
    mean = torch.zeros_like(found["o"]).index_add(0, target, found["weights"] * value)
    close(found["o"], mean)
    index = target.view(-1, *[1] * (mass.ndim - 1)).expand_as(value)
    for pick, sign in (("amin", 1), ("amax", -1)):
        edge = torch.zeros_like(mean).scatter_reduce(0, index, value, pick, include_self=False)
        assert (sign * (found["o"] - edge) >= -1e-12).all()


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e3])
@pytest.mark.parametrize("impl", WAYS)
def test_constant_values_give_no_gradient_to_logits(impl, size, dtype):
    x = case(5, 8, 40, dtype=dtype, terms="v")
    v, dlse = torch.full_like(x.v, 1.7), torch.zeros_like(x.dlse)
    x = replace(x, v=v, logits=x.logits * size, dlse=dlse)
    found = evaluate(x, impl)
    used, wide = ~x.isolated(), FP64 if dtype == FP64 else FP32
    close(found["o"][used], v[:1].expand_as(found["o"][used]), "o", 8 * torch.finfo(dtype).eps)
    # a float32 logit of 1e3 is off by 6e-5: any trace of it here would be far over the bound
    assert found["dlogits"].abs().max() <= 100 * torch.finfo(wide).eps


@pytest.mark.parametrize("impl", WAYS)
def test_a_rounded_output_does_not_shift_the_gradient(impl):
    """Values far from 0 that differ little: the output is rounded as coarsely as they differ."""
    x = case(5, 8, 40, dtype=BF16, terms="v")
    v = (64 + 2 * torch.randn(x.v.shape, generator=x.generator)).to(DEVICE, BF16)
    x = replace(x, v=v, do=x.do.abs(), dlse=torch.zeros_like(x.dlse))
    truth = evaluate(x, "reference", FP64)["dlogits"]
    error = (evaluate(x, impl)["dlogits"] - truth).abs().max()
    assert error < 0.02 * truth.abs().max(), float(error / truth.abs().max())


@examples(8, dtype=FP64, eps=0.0, clamped=False)
def test_a_constant_added_to_a_rows_logits_changes_only_the_lse(impl, case):
    shift = torch.randn(case.dlse.shape, generator=case.generator, dtype=FP64).to(DEVICE) * 20
    moved = evaluate(replace(case, logits=case.logits + shift[case.target]), impl)
    plain = evaluate(case, impl)
    plain["lse"] = plain["lse"] + shift
    all_close(moved, plain)


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", ALL)
def test_a_single_edge_copies_its_value(impl, dtype):
    x = case(1, 9, 9, dtype=dtype, terms="v")
    order = torch.randperm(9, generator=x.generator).to(DEVICE)
    x = x.onto(torch.stack([order, torch.arange(9, device=DEVICE)]))
    o, _, weights = attend(x, impl)
    assert torch.equal(o, x.v[order])
    assert (weights == 1).all()


@examples(8, dtype=FP64, eps=0.0)
def test_partitions_of_the_edges_merge_through_the_lse(impl, case):
    """As partial results on several devices do; values and gradients."""
    part = torch.randint(3, (case.graph.num_edges,), generator=case.generator).to(DEVICE) == 0
    leaves = {
        name: x.detach().requires_grad_()
        for name in ("logits", "v", "edge_value")
        if (x := getattr(case, name)) is not None
    }
    whole, pieces = evaluate(case, impl), []
    for some in (part, ~part):
        edges = some.nonzero().flatten()
        pieces.append(attend(replace(case, **leaves).taking(edges), impl)[:2])
    o, lse = (torch.stack(x) for x in zip(*pieces, strict=True))
    none = lse == -torch.inf
    finite = lse.masked_fill(none, -1e5)  # blocks the gradient where there is nothing to merge
    total = finite.logsumexp(0).masked_fill(none.all(0), -torch.inf)
    merged = (finite.softmax(0) * o).sum(0)
    grads = torch.autograd.grad(
        (merged, total), list(leaves.values()), (case.do, case.dlse), materialize_grads=True
    )
    found = {"o": merged, "lse": total}
    found |= {f"d{name}": x for name, x in zip(leaves, grads, strict=True)}
    for name, x in found.items():
        close(x, whole[name], name)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("impl", WAYS)
def test_huge_logits(impl, size, eps):
    """All of one sign, whose spread float32 can just hold, and far apart: one edge takes all."""
    x = case(2, 7, 30, dtype=FP32, eps=eps, isolated=1, channels=(3,))
    logits = x.logits + size
    logits[:, 0] = (x.logits[:, 0] * size).round()
    x = replace(x, logits=logits)
    for name, found in evaluate(x, impl).items():
        assert not found.isnan().any(), name
    accurate(x, impl)


@pytest.mark.parametrize("dtype", [FP64, FP32, FP16], ids=str)
@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize("impl", ALL)
def test_edges_of_minus_infinity_do_not_exist(impl, eps, dtype):
    """Single ones, one channel of a row, and whole rows, which are then as rows without edges."""
    x = case(7, 7, 40, dtype=dtype, eps=eps, channels=(2,))
    gone = torch.rand(x.logits.shape, generator=x.generator).to(DEVICE) < 0.3
    gone[x.target == 2] = True
    gone[x.target == 5, 1] = True
    found = evaluate(replace(x, logits=x.logits.masked_fill(gone, -torch.inf)), impl)
    for name, value in found.items():
        assert not value.isnan().any(), name
    for name in PER_EDGE:
        assert (found[name][gone] == 0).all()
    assert (found["o"][2] == 0).all()
    assert (found["lse"][2] == -torch.inf).all()
    assert found["o"][5, 1] == 0
    if dtype == FP64 and impl != "buckets":
        for c in range(2):
            expected = evaluate(x.taking(~gone[:, c]), impl)
            for name in ("o", "lse", "dv"):
                close(found[name][:, c], expected[name][:, c], name)
            for name in PER_EDGE:
                close(found[name][~gone[:, c], c], expected[name][:, c], name)


@pytest.mark.parametrize("impl", WAYS)
def test_rows_that_attend_to_nothing_ignore_values_and_upstream_gradients(impl):
    """Without edges, or with logits that are all -inf."""
    x = case(7, 7, 30, dtype=FP32, isolated=2, eps=1e-6)
    dead = x.target == x.target[0]
    nothing = x.isolated()
    nothing[x.target[0]] = True
    x = replace(x, logits=x.logits.masked_fill(dead[:, None], -torch.inf))
    clean = evaluate(x, impl)
    edge_value, do, dlse = x.edge_value.clone(), x.do.clone(), x.dlse.clone()
    edge_value[dead], do[nothing], dlse[nothing] = torch.nan, torch.nan, torch.nan
    same_bits(evaluate(replace(x, edge_value=edge_value, do=do, dlse=dlse), impl), clean)


@pytest.mark.parametrize("clamp", [5, (-5.0, 5.0)])
@pytest.mark.parametrize("impl", IMPLS)
def test_clamp_holds_at_exactly_five(impl, clamp):
    logits = torch.tensor([-6.0, -5.0, -4.0, 0.0, 4.0, 5.0, 6.0, 9.0], dtype=FP64, device=DEVICE)
    m = len(logits)
    graph = Graph.from_csr(torch.tensor([0, m], device=DEVICE), torch.arange(m, device=DEVICE), m)
    leaf = logits[:, None].clone().requires_grad_()
    v = torch.arange(m, dtype=FP64, device=DEVICE)[:, None]
    request = AuxRequest(lse=True)
    o, (lse, *_) = channelwise_attention(
        leaf, v, graph, logit_clamp=clamp, return_aux=request, impl=impl
    )
    p = logits.clamp(-5, 5).softmax(0)
    close(o, (p @ v)[None])
    close(lse[0, 0], logits.clamp(-5, 5).logsumexp(0))
    inside = (logits >= -5) & (logits <= 5)
    expected = torch.where(inside, p * (v[:, 0] - p @ v), 0.0)
    (found,) = torch.autograd.grad(o, leaf)
    close(found[:, 0], expected)
    assert (found[:, 0][~inside] == 0).all()


@pytest.mark.parametrize("clamp", [(-math.inf, 0.2), (-0.2, math.inf), 0.0])
@pytest.mark.parametrize("impl", ALL)
def test_one_sided_and_closed_clamps(impl, clamp):
    x = case(6, 7, 25)
    wanted = clamp if isinstance(clamp, tuple) else (-clamp, clamp)
    found = evaluate(replace(x, options=x.options | {"logit_clamp": clamp}), impl)
    all_close(found, loops(replace(x, options=x.options | {"logit_clamp": wanted})))


@pytest.mark.parametrize("eps", [1e-6, 1e6])
@pytest.mark.parametrize("impl", ALL)
def test_eps_is_added_to_the_sum_of_the_plain_exponentials(impl, eps):
    x = case(8, 7, 25, eps=eps, isolated=1)
    o, lse, weights = attend(x, impl)
    bare = attend(x, impl, denominator_eps=0.0)
    share = bare[1].exp() / (bare[1].exp() + eps)
    close(lse, bare[1])
    close(o, bare[0] * share)
    close(weights, bare[2] * share[x.target])


@pytest.mark.parametrize("impl", IMPLS)
def test_equals_neighborhood_attention_with_one_channel_a_head(impl):
    """Queries and keys of zeros, the logits as its edge bias."""
    x = case(3, 8, 30, cols=9, terms="v", eps=0.2, channels=(5,))
    found = evaluate(x, impl)
    logits, v = x.logits.clone().requires_grad_(), x.v.clone().requires_grad_()
    q, k = (torch.zeros(n, 5, 1, dtype=FP64, device=DEVICE) for n in (8, 9))
    o, (lse, weights, _) = neighborhood_attention(
        q, k, v[:, :, None], x.graph, edge_bias=logits, denominator_eps=0.2,
        return_aux=AuxRequest(lse=True, weights=True), impl=impl,
    )  # fmt: skip
    grads = torch.autograd.grad((o, lse), (logits, v), (x.do[:, :, None], x.dlse))
    expected = (o[:, :, 0], lse, weights, *grads)
    for name, y in zip(NAMES, expected, strict=False):
        close(found[name], y, name)


class PointTransformerLayer(nn.Module):
    """Equation 3 of arXiv 2012.09164 as its authors compute it: [N, K, C] neighbourhoods, and one
    logit for every ``share`` channels."""

    def __init__(self, channels, share):
        super().__init__()
        self.phi, self.psi, self.alpha = (nn.Linear(channels, channels) for _ in range(3))
        self.theta = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, channels))
        self.gamma = nn.Sequential(nn.ReLU(), nn.Linear(channels, channels // share))
        self.share = share

    def forward(self, point, x, near):  # [N, 3], [N, C], [N, K]
        delta = self.theta(point[:, None] - point[near])
        logit = self.gamma(self.phi(x)[:, None] - self.psi(x)[near] + delta)
        weight = logit.softmax(1)[:, :, None]  # [N, K, 1, C / share]
        value = (self.alpha(x)[near] + delta).unflatten(2, (self.share, -1))
        return (weight * value).sum(1).flatten(1)

    def on_edges(self, point, x, graph, impl):
        column, row = graph.edge_index
        delta = self.theta(point[row] - point[column])
        logit = self.gamma(self.phi(x)[row] - self.psi(x)[column] + delta)
        value, edge_value = (y.unflatten(1, (self.share, -1)) for y in (self.alpha(x), delta))
        logit = logit[:, None].expand_as(edge_value)
        out = channelwise_attention(logit, value, graph, edge_value=edge_value, impl=impl)
        return out.flatten(1)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_point_transformer_layer(impl):
    generator = torch.Generator().manual_seed(0)
    n, k, channels = (12, 4, 16) if impl == "triton" and DEVICE == "cpu" else (60, 16, 32)
    point, x, do = (
        torch.randn(n, d, generator=generator, dtype=FP64).to(DEVICE)
        for d in (3, channels, channels)
    )
    near = torch.cdist(point, point).topk(k, largest=False).indices
    row = torch.arange(n, device=DEVICE).repeat_interleave(k)
    shuffled = torch.randperm(n * k, generator=generator).to(DEVICE)
    graph = Graph.from_edge_index(torch.stack([near.flatten(), row])[:, shuffled], n)
    torch.manual_seed(0)
    layer = PointTransformerLayer(channels, 8).to(DEVICE, FP64)
    point.requires_grad_(), x.requires_grad_()
    inputs = [point, x, *layer.parameters()]
    dense, sparse = layer(point, x, near), layer.on_edges(point, x, graph, impl)
    close(sparse, dense)
    for a, b in zip(
        torch.autograd.grad(sparse, inputs, do), torch.autograd.grad(dense, inputs, do), strict=True
    ):
        close(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_extras_follow_the_output(impl):
    x = case(1, 6, 15, dtype=BF16, channels=(2, 3))
    args = x.logits.requires_grad_(), x.v, x.graph
    o = channelwise_attention(*args, impl=impl)
    assert isinstance(o, torch.Tensor)
    request = AuxRequest(lse=True, weights=True)
    out, aux = channelwise_attention(*args, return_aux=request, impl=impl)
    assert aux.edge_scores is None
    both = out, aux.lse, aux.weights
    assert [y.dtype for y in both] == [BF16, FP32, BF16]
    assert [list(y.shape) for y in both] == [[6, 2, 3], [6, 2, 3], [15, 2, 3]]
    assert [y.requires_grad for y in both] == [True, True, False]
    assert [y.is_contiguous() for y in both] == [True] * 3
    for name in ("lse", "weights"):
        request = AuxRequest(**{name: True})
        found, only = channelwise_attention(*args, return_aux=request, impl=impl)
        assert torch.equal(found, o)
        assert torch.equal(getattr(only, name), getattr(aux, name))
        assert [x is None for x in only] == [not asked for asked in request]
    found, none = channelwise_attention(*args, return_aux=AuxRequest(), impl=impl)
    assert torch.equal(found, o)
    assert none == Aux()


@pytest.mark.parametrize("name", ["cora", "zinc"])
def test_real_graphs(name):
    try:
        graph = PROBLEMS[name].load().to(DEVICE)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    sizes = graph.num_edges, graph.num_cols, graph.num_edges, graph.num_rows, graph.num_rows
    tensors = [torch.randn(n, 16, generator=generator).to(DEVICE) for n in sizes]
    accurate(Case(0, graph.edge_index, graph, *tensors, {"denominator_eps": 0.0}), FAST[0])


@pytest.mark.parametrize("impl", ALL)
def test_gradcheck(impl):
    x = case(3, 3, 7, cols=4, clamped=True, eps=0.1, channels=(2,))
    # every row needs an edge: the finite difference of an LSE of -inf is NaN
    every = torch.arange(3, device=DEVICE).repeat(2, 1)
    x = x.onto(torch.cat([x.edge_index, every], 1))
    extra = [torch.randn(3, 2, generator=x.generator, dtype=FP64).to(DEVICE) for _ in range(2)]
    tensors = torch.cat([x.logits, extra[0]]), x.v, torch.cat([x.edge_value, extra[1]])
    inputs = [t.detach().requires_grad_() for t in tensors]

    def f(logits, v, edge_value):
        return attend(replace(x, logits=logits, v=v, edge_value=edge_value), impl)[:2]

    fast = impl in ("triton", "buckets") and DEVICE == "cpu"
    assert torch.autograd.gradcheck(f, inputs, fast_mode=fast)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "create_graph"])
@pytest.mark.parametrize("upstream", ["o", "lse", "both"])
@pytest.mark.parametrize("impl", ALL)
def test_every_subset_of_gradients(impl, upstream, twice):
    """Asked for alone or together, through the output, the LSE or both: always the same."""
    x = case(9, 5, 14, cols=4, clamped=True, eps=0.2, isolated=1, channels=(3,))
    zero = {"o": {"dlse": x.dlse * 0}, "lse": {"do": x.do * 0}, "both": {}}[upstream]
    expected = loops(replace(x, **zero))
    for wanted in itertools.product([False, True], repeat=3):
        if not any(wanted):
            continue
        leaves = {
            name: getattr(x, name).detach().clone().requires_grad_(need)
            for name, need in zip(("logits", "v", "edge_value"), wanted, strict=True)
        }
        o, lse, _ = attend(replace(x, **leaves), impl)
        pairs = {"o": [(o, x.do)], "lse": [(lse, x.dlse)], "both": [(o, x.do), (lse, x.dlse)]}
        pairs = pairs[upstream]
        if impl == "reference":  # in plain autograd the LSE depends on the logits alone
            pairs = [(y, dy) for y, dy in pairs if y.requires_grad]
            if not pairs:
                continue
        inputs = {name: t for name, t in leaves.items() if t.requires_grad}
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
    x = case(0, 5, 12, channels=(2,))
    rows, columns = walks(x.graph, impl)
    logit = ChannelwiseLogit(-math.inf, math.inf, 0.0)
    given = x.logits, x.v, x.edge_value, *HeadMask(None, None)
    *_, weights, nothing = _launch_fwd(impl, *given, rows, *logit, False, False)
    assert nothing.numel() == weights.numel() == 0
    *_, stat = _launch_fwd(impl, *given, rows, *logit, True, False)
    for needs in itertools.product([False, True], repeat=3):
        for dlse in (None, x.dlse):
            upstream = ChannelwiseUpstream(x.do, dlse, stat)
            grads = _launch_bwd(impl, *upstream, *given, rows, columns, *logit, *needs)
            for need, grad in zip(needs, grads, strict=True):
                assert bool(grad.numel()) == need
                assert not grad.isnan().any()


@pytest.mark.parametrize("impl", FAST)
def test_inference_never_sorts_the_column_walk(impl):
    x = case(0, 5, 12, dtype=FP32)
    channelwise_attention(x.logits, x.v, x.graph, impl=impl)
    logits = x.logits.requires_grad_()
    with torch.no_grad():
        channelwise_attention(logits, x.v, x.graph, impl=impl)
    channelwise_attention(logits, x.v, x.graph, impl=impl).sum().backward()
    assert vars(x.graph.prepared) == vars(Prepared())


@pytest.mark.parametrize("impl", FAST)
def test_double_backward_equals_the_reference(impl):
    def second(impl):
        x = case(2, 7, 24, cols=8, clamped=True, eps=0.3, isolated=1, channels=(2, 2))
        leaves = [t.detach().requires_grad_() for t in (x.logits, x.v, x.edge_value, x.do)]
        y = replace(x, logits=leaves[0], v=leaves[1], edge_value=leaves[2])
        o, lse, _ = attend(y, impl)
        loss = (o * leaves[3]).sum() + lse[~x.isolated()].square().sum()
        first = torch.autograd.grad(loss, leaves[:3], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for a, b in zip(second(impl), second("reference"), strict=True):
        close(a, b)


@pytest.mark.parametrize("impl", FAST)
def test_create_graph_where_one_input_was_made_from_another(impl):
    graph = random_graph(0, 6, 20, device=DEVICE)
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=FP64).to(DEVICE)
    found = []
    for chosen in (impl, "reference"):
        leaf = x.clone().requires_grad_()
        o = channelwise_attention(leaf, None, graph, edge_value=leaf.sin(), impl=chosen)
        first = torch.autograd.grad(o.square().sum(), leaf, create_graph=True)[0]
        found.append((first, torch.autograd.grad(first.cos().sum(), leaf)[0]))
    for a, b in zip(*found, strict=True):
        close(a, b)


@pytest.mark.parametrize("impl", FAST)
def test_forward_mode_is_refused_not_zero(impl):
    x = case(0, 6, 20)
    with pytest.raises(NotImplementedError, match="impl='reference' only"):
        torch.func.jvp(
            lambda v: channelwise_attention(x.logits, v, x.graph, impl=impl), (x.v,), (x.v,)
        )


@pytest.mark.parametrize("layout", [*LAYOUTS, *PLANES])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_strides_do_not_change_a_bit(impl, dtype, layout):
    x = case(4, 8, 24, dtype=dtype, channels=(3, 8), layout=layout)
    names = ("logits", "v", "edge_value", "do", "dlse")
    plain = {name: getattr(x, name).contiguous() for name in names}
    same_bits(evaluate(x, impl), evaluate(replace(x, **plain), impl))


@pytest.mark.parametrize("impl", FAST)
def test_one_tensor_in_other_strides_does_not_change_a_bit(impl):
    """Amid aligned ones: the kernels' vector loads rely on what each of them has."""
    x = case(4, 7, 20, channels=(2, 8), dtype=BF16)
    plain = evaluate(x, impl)
    for name in ("logits", "v", "edge_value", "do", "dlse"):
        for layout in ("reversed", "sliced"):
            laid = arrange(getattr(x, name), layout)
            same_bits(evaluate(replace(x, **{name: laid}), impl), plain)


@pytest.mark.parametrize("layout", PLANES)
@pytest.mark.parametrize("impl", FAST)
def test_shared_planes_receive_the_sum_of_their_gradients(impl, layout):
    x = case(4, 7, 20, channels=(3, 4))
    dim = 1 if layout == "planes of heads" else 2
    leaf = x.logits.narrow(dim, 0, 1).clone().requires_grad_()
    o, lse, _ = attend(replace(x, logits=leaf.expand_as(x.logits)), impl)
    (found,) = torch.autograd.grad((o, lse), leaf, (x.do, x.dlse))
    expected = loops(replace(x, logits=shared(x.logits, layout)))["dlogits"]
    close(found, expected.sum(dim, keepdim=True))


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("impl", ALL)
def test_inputs_are_left_alone_and_outputs_alias_nothing(impl, dtype):
    x = case(5, 7, 24, dtype=dtype, channels=(1,), clamped=True, eps=1e-6)
    walks = [x.graph.row_ptr, x.graph.col, x.graph.edge, *x.graph.columns]
    inputs = [x.logits, x.v, x.edge_value, x.do, x.dlse, *walks]
    before = [t.clone() for t in inputs]
    found = evaluate(x, impl)
    for a, b in zip(inputs, before, strict=True):
        assert torch.equal(a, b)
    places = [t.untyped_storage().data_ptr() for t in (*inputs, *found.values())]
    assert len(set(places)) == len(places)


def test_the_output_may_be_changed_in_place():
    """As in `out += residual`: the backward does not read it."""
    x = case(5, 7, 24, dtype=FP32)
    logits = x.logits.requires_grad_()
    o = channelwise_attention(logits, x.v, x.graph)
    expected = torch.autograd.grad(o, logits, x.do, retain_graph=True)[0]
    o.mul_(1.0)
    assert torch.equal(torch.autograd.grad(o, logits, x.do)[0], expected)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("impl", WAYS)
def test_bitwise_repeatable(impl, dtype):
    interpreted = impl != "torch" and DEVICE == "cpu"
    n, edges = (8, 40) if interpreted else (100, 2000)
    x = case(1, n, edges, kind="hub", dtype=dtype)
    first = evaluate(x, impl)
    for _ in range(2 if interpreted else 20):
        same_bits(evaluate(x, impl), first)


@pytest.mark.skipif(DEVICE != "cpu", reason="threads are the CPU's")
def test_threads_do_not_change_a_bit():
    x = case(1, 1000, 20_000, kind="power_law", dtype=FP32, channels=(24,))
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(evaluate(x, "torch"))
    finally:
        torch.set_num_threads(threads)
    same_bits(*found)


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU path's choice")
@pytest.mark.parametrize("layout", ["contiguous", *PLANES])
def test_chunks_and_blocks_do_not_change_a_bit(monkeypatch, layout):
    x = case(5, 12, 100, kind="hub", dtype=FP32, channels=(4, 6), isolated=2, eps=1e-6,
             layout=layout)  # fmt: skip
    whole = evaluate(x, "torch")
    for chunk, wide, narrow in ((2000, 8, 4), (400, 64, 5)):
        monkeypatch.setattr("fastgt.cpu.channelwise_attention._CHUNK", chunk)
        monkeypatch.setattr("fastgt.cpu.channelwise_attention._WIDE", wide)
        monkeypatch.setattr("fastgt.cpu.channelwise_attention._NARROW", narrow)
        same_bits(evaluate(x, "torch"), whole)


@pytest.mark.parametrize("turned", [False, True], ids=["row", "column"])
def test_sums_over_a_huge_hub_are_accurate(turned):
    edges = 100_000
    shape = {"rows": 500, "cols": 3} if turned else {"rows": 3, "cols": 500}
    x = case(0, edges=edges, dtype=FP32, channels=(4,), **shape)
    index = x.edge_index.clone()
    index[0 if turned else 1] = 0
    accurate(x.onto(index), FAST[0])


def test_a_huge_hub_of_equal_terms_does_not_drift():
    """Added one after the other, 200,000 times 0.1 is off by 2e-3 in float32."""
    edges = 200_000
    graph = Graph.from_edge_index(torch.zeros(2, edges, dtype=torch.int64, device=DEVICE), 1)
    logits, v = zeros(edges, 1), zeros(1, 1) + 0.1
    o = channelwise_attention(logits, v.requires_grad_(), graph)
    (dv,) = torch.autograd.grad(o, v, v.detach())
    torch.testing.assert_close(o, v, rtol=5e-4, atol=0.0)
    torch.testing.assert_close(dv, v, rtol=5e-4, atol=0.0)


@pytest.mark.parametrize("turned", [False, True], ids=["row", "column"])
def test_a_hub_beyond_one_segment(turned):
    """Rows and columns of few edges, of some, of segments that are combined in several steps."""
    pytest.importorskip("triton")
    few, segment = 4, 5
    degrees = torch.tensor([2, 50, 0, 1, 5, 9, 16])
    target = torch.arange(7).repeat_interleave(degrees)
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(5, target.shape, generator=generator)
    index = torch.stack([source, target])[:, torch.randperm(len(target), generator=generator)]
    index = index.flip(0) if turned else index
    x = case(0, 5 if turned else 7, len(target), cols=7 if turned else 5, eps=1e-3, channels=(5,))
    x = x.onto(index.to(DEVICE))
    x = replace(x, graph=with_buckets(x.graph, few=few, segment=segment))
    all_close(evaluate(x, "triton"), loops(x))


@pytest.mark.parametrize("tile", [(1, 2, 1), (4, 4, 1), (2, 16, 4), (16, 1, 2)], ids=str)
@pytest.mark.parametrize("plan", ["gather", "buckets"])
def test_any_tile_gives_the_same(monkeypatch, tile, plan):
    """Degrees at and around every block size, and rows beyond a block of rows."""
    pytest.importorskip("triton")
    import fastgt.kernels.channelwise_attention as kernels
    from fastgt.kernels.configs import Tile

    chosen = Tile(*tile, num_warps=4)
    monkeypatch.setattr(kernels, "attention_tile", lambda *args: chosen)
    monkeypatch.setattr(kernels, "_WIDEST", 4)
    target = torch.arange(6).repeat_interleave(torch.tensor([0, 1, 3, 4, 5, 17]))
    source = torch.randint(5, target.shape, generator=torch.Generator().manual_seed(0))
    x = case(0, 6, len(target), cols=5, clamped=True, channels=(6,), dtype=FP64, plan=plan)
    x = x.onto(torch.stack([source, target]).to(DEVICE))
    all_close(evaluate(x, "triton"), loops(x))


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's memory is not the kernel's")
def test_memory_of_the_kernels():
    check_memory("triton", 0)


@pytest.mark.skipif(DEVICE != "cpu", reason="runs on CPU tensors")
@pytest.mark.parametrize("kind", ["uniform", "hub"])
def test_memory_of_the_cpu_path(kind):
    check_memory("torch", 1, kind)


def check_memory(impl, temporaries, kind="uniform"):
    """Outputs and gradients, so many temporaries of their size, and what is O(N C + E)."""
    n, edges, channels = 500, 100_000, 64
    x = case(0, n, edges, channels=(channels,), dtype=FP32, kind=kind)
    leaves = [t.detach().requires_grad_() for t in (x.logits, x.v, x.edge_value)]
    device, wide = torch.device(DEVICE), 4 * edges * channels
    attention = {"graph": x.graph, "edge_value": leaves[2], "impl": impl}

    def forward():
        with torch.no_grad():
            return channelwise_attention(*leaves[:2], **attention)

    def both(impl):
        o = channelwise_attention(*leaves[:2], **attention | {"impl": impl})
        return torch.autograd.grad(o, leaves, x.do)

    both(impl)  # the column walk and other first-time costs
    small = 4 * (12 * n * channels + 16 * edges) + 2**24  # and what stays in the cache
    assert small < wide
    assert peak_extra_memory(forward, device) <= small
    assert peak_extra_memory(lambda: both(impl), device) <= (2 + temporaries) * wide + small
    if kind == "uniform":
        assert peak_extra_memory(lambda: both("reference"), device) > 6 * wide


@pytest.mark.parametrize("impl", FAST)
def test_compiles_whole_and_once(impl):
    """One compilation serves graphs of every size, forward and backward."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(channelwise_attention, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for seed, (n, e) in enumerate([(11, 20), (9, 31), (13, 15)]):
        x = case(seed, n, e, dtype=FP32, channels=(2, 3))
        leaves = [t.detach().requires_grad_() for t in (x.logits, x.v, x.edge_value)]
        found = []
        for f in (compiled, channelwise_attention):
            y = f(*leaves[:2], x.graph, edge_value=leaves[2], logit_clamp=5.0, denominator_eps=1e-6,
                  return_aux=AuxRequest(lse=True, weights=True), impl=impl)  # fmt: skip
            o, lse, weights = y[0], y[1].lse, y[1].weights
            grads = torch.autograd.grad((o, lse), leaves, (x.do, x.dlse))
            found.append([o, lse, weights, *grads])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("impl", FAST)
def test_compiles_with_one_tensor_in_all_places(impl):
    torch._dynamo.reset()
    x = case(0, 6, 6, dtype=FP32)

    def f(t):
        return channelwise_attention(t, t, x.graph, edge_value=t, impl=impl)

    found = []
    for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), f):
        t = x.logits.detach().requires_grad_()
        o = g(t)
        found.append([o, *torch.autograd.grad(o, t, x.do)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("edges", "layout", "terms"),
    [(9, "contiguous", "both"), (9, "reversed", "v"), (0, "planes of heads", "edge_value")],
    ids=["plain", "strided", "empty"],
)
@pytest.mark.parametrize("impl", FAST)
def test_opcheck(impl, edges, layout, terms):
    x = case(0, 4, edges, cols=3, channels=(2, 2), dtype=FP32, layout=layout, terms=terms)
    rows, columns = map(list, walks(x.graph, impl))
    mask, logit = HeadMask(None, None), ChannelwiseLogit(-1.0, 1.0, 1e-6)
    if layout == "reversed":
        active = torch.rand(4, 2, device=DEVICE) < 0.6
        mask = HeadMask(active, active[:3])
    given = x.logits, x.v, x.edge_value, *mask
    forward = torch.ops.fastgt.channelwise_attention_fwd.default
    *_, stat = forward(impl, *given, rows, *logit, True, False)
    for results in ((True, layout == "contiguous"), (False, False)):
        torch.library.opcheck(forward, (impl, *given, rows, *logit, *results))
    upstream = ChannelwiseUpstream(x.do, x.dlse if layout == "contiguous" else None, stat)
    for needs in ((True, x.v is not None, x.edge_value is not None), (True, False, False)):
        arguments = impl, *upstream, *given, rows, columns, *logit, *needs
        torch.library.opcheck(torch.ops.fastgt.channelwise_attention_bwd.default, arguments)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("impl", FAST)
def test_checkpointing(impl, reentrant):
    x = case(3, 7, 24, dtype=FP32)
    leaves = [t.detach().requires_grad_() for t in (x.logits, x.v, x.edge_value)]

    def f(logits, v, edge_value):
        return channelwise_attention(logits.tanh(), v, x.graph, edge_value=edge_value, impl=impl)

    checkpoint(f, *leaves, use_reentrant=reentrant).backward(x.do)
    plain = torch.autograd.grad(f(*leaves), leaves, x.do)
    for leaf, b in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_the_inputs(impl):
    x = case(3, 7, 24, dtype=FP32)
    leaves = [t.detach().requires_grad_() for t in (x.logits, x.v, x.edge_value)]
    cast = [t.detach().to(BF16).requires_grad_() for t in leaves]
    with torch.autocast(DEVICE, BF16):
        o = channelwise_attention(*leaves[:2], x.graph, edge_value=leaves[2], impl=impl)
    plain = channelwise_attention(*cast[:2], x.graph, edge_value=cast[2], impl=impl)
    assert o.dtype == BF16
    assert torch.equal(o, plain)
    grads = torch.autograd.grad(o, leaves, x.do.to(BF16))
    for a, b in zip(grads, torch.autograd.grad(plain, cast, x.do.to(BF16)), strict=True):
        assert a.dtype == FP32
        assert torch.equal(a, b.float())
    with torch.autocast(DEVICE, BF16):
        double = x.logits.double(), x.v.double()
        assert channelwise_attention(*double, x.graph, impl=impl).dtype == FP64


@pytest.mark.parametrize("impl", FAST)
def test_a_graph_planned_for_windows_is_gathered(impl):
    x = case(3, 8, 30)
    same_bits(evaluate(replace(x, graph=x.graph.plan("windows")), impl), evaluate(x, impl))


def test_shapes_beyond_two_to_the_31_on_meta_tensors():
    n, e, c = 3 * 2**26, 5 * 2**26, 64

    def index(size):
        return torch.empty(size, dtype=torch.int64, device="meta")

    walk = fastgt.graph.ColumnWalk(index(n + 1), *(index(e) for _ in range(3)))
    bounds = index(2)
    graph = Graph(n, n, walk.ptr, index(e), index(e), bounds, bounds, {"columns": walk})
    logits, v, edge_value = (
        torch.empty(size, c, device="meta", requires_grad=True) for size in (e, n, e)
    )
    request = AuxRequest(lse=True, weights=True)
    o, (lse, weights, _) = channelwise_attention(
        logits, v, graph, edge_value=edge_value, return_aux=request, impl="triton"
    )
    assert [t.shape for t in (o, lse, weights)] == [(n, c), (n, c), (e, c)]
    grads = torch.autograd.grad((o, lse), (logits, v, edge_value), (o, lse))
    assert [g.shape for g in grads] == [(e, c), (n, c), (e, c)]


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["row", "head", "channel"])
def test_addresses_beyond_two_to_the_31(tmp_path, axis):
    """Strides reach past 2^31 elements; the memory is a sparse file, so nothing of it is paid.

    Every base lies so far into the file that a wrapped offset would read zeros, not crash.
    """
    size = 2**33 + 2**20
    if DEVICE == "cuda":
        room = torch.zeros(size, dtype=FP16, device=DEVICE)
    else:
        room = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=FP16)
    x = case(2, 5, 9, channels=(4, 4), dtype=FP16)
    # odd, or the kernel multiplies by an even factor of it at the very end, in 64 bits
    far, place, laid = 2**29 + 1, 2**31, {}
    for name in ("logits", "v", "edge_value", "do"):
        tensor = getattr(x, name)
        stride = [far if i == axis else n for i, n in enumerate(tensor.stride())]
        laid[name] = room.as_strided(tensor.shape, stride, place).copy_(tensor)
        place += 256
    for impl in FAST:
        same_bits(evaluate(replace(x, **laid), impl), evaluate(x, impl))


def test_nothing_waits_for_the_device():
    """Launchers allocate and launch: no value comes back, so a CUDA graph can capture them."""
    pytest.importorskip("triton")
    from test_attention_execution import Calls

    x = case(1, 8, 40, channels=(2, 3), dtype=FP32, plan="buckets")
    rows, columns = walks(x.graph, "triton")
    logit = ChannelwiseLogit(-1.0, 1.0, 1e-6)
    gate = torch.tensor([0.0, 1.0], device=DEVICE)
    with Calls() as calls:
        for mask in (HeadMask(None, None), active_heads(gate, x.graph)):
            given = x.logits, x.v, x.edge_value, *mask
            *_, stat = _launch_fwd("triton", *given, rows, *logit, True, True)
            upstream = ChannelwiseUpstream(x.do, x.dlse, stat)
            _launch_bwd("triton", *upstream, *given, rows, columns, *logit, True, True, True)
    assert not {"_local_scalar_dense", "nonzero", "item", "unique", "sort"} & calls.names
    assert "new_empty" in calls.names


def test_the_named_implementation_runs(monkeypatch):
    import fastgt.cpu.channelwise_attention
    import fastgt.kernels.channelwise_attention

    seen = []
    for name, module, functions in (
        ("torch", fastgt.cpu.channelwise_attention, ("fwd", "bwd")),
        ("triton", fastgt.kernels.channelwise_attention, ("fwd", "bwd")),
        ("reference", reference, ("",)),
    ):
        for suffix in functions:
            function = f"channelwise_attention_{suffix}".rstrip("_")
            real = getattr(module, function)

            def spy(*args, real=real, name=name, **kwargs):
                seen.append(name)
                return real(*args, **kwargs)

            monkeypatch.setattr(module, function, spy)
    x = case(0, 3, 5, dtype=FP32)
    for impl in (None, *IMPLS):
        for chosen in (impl, None):
            seen.clear()
            logits = x.logits.detach().requires_grad_()
            with fastgt.implementation(None if chosen else impl):
                channelwise_attention(logits, x.v, x.graph, impl=chosen).sum().backward()
            assert set(seen) == {impl or FAST[0]}


def test_the_reference_has_the_public_signature():
    public, plain = map(inspect.signature, (channelwise_attention, reference.channelwise_attention))
    expected = {name: x.default for name, x in public.parameters.items() if name != "impl"}
    assert {name: x.default for name, x in plain.parameters.items()} == expected


def test_the_reference_has_the_same_defaults():
    x = case(6, 7, 25)
    for options in ({}, {"logit_clamp": 0.3}, {"logit_clamp": (-0.1, 0.5)}):
        direct = reference.channelwise_attention(x.logits, x.v, x.graph, **options)
        close(direct, channelwise_attention(x.logits, x.v, x.graph, impl=FAST[0], **options))


def zeros(*shape, dtype=FP32, device=DEVICE):
    return torch.zeros(shape, dtype=dtype, device=device)


REFUSALS = {
    "no graph": ({"graph": zeros(2, 6)}, TypeError, "graph must be a fastgt.Graph, got Tensor"),
    "no values": (
        {"v": None, "edge_value": None},
        ValueError,
        "v and edge_value are both None: give at least one of them",
    ),
    "no logits": ({"logits": None}, TypeError, "logits must be a tensor, got NoneType"),
    "no tensor v": ({"v": [1.0]}, TypeError, "v must be a tensor, got list"),
    "edges": ({"logits": zeros(5, 8)}, ValueError, "logits has 5 rows but the graph has 6 edges"),
    "columns": ({"v": zeros(5, 8)}, ValueError, "v has 5 rows but the graph has 3 columns"),
    "edges of values": (
        {"edge_value": zeros(7, 8)},
        ValueError,
        "edge_value has 7 rows but the graph has 6 edges",
    ),
    "channels of v": (
        {"v": zeros(3, 7)},
        ValueError,
        r"v has channels \[7\] but logits has \[8\]",
    ),
    "channels of values": (
        {"edge_value": zeros(6, 2, 4)},
        ValueError,
        r"edge_value has channels \[2, 4\] but logits has \[8\]",
    ),
    "no channels": (
        {"logits": zeros(6, 0), "v": zeros(3, 0), "edge_value": None},
        ValueError,
        r"logits has no channels: \[6, 0\]",
    ),
    "dimensions": (
        {"logits": zeros(6)},
        ValueError,
        r"logits must be \[E, C\] or \[E, H, D\], got \[6\]",
    ),
    "dimensions of v": (
        {"v": zeros(3, 2, 2, 2)},
        ValueError,
        r"v must be \[N_cols, C\] or \[N_cols, H, D\], got \[3, 2, 2, 2\]",
    ),
    "integers": (
        {"logits": zeros(6, 8, dtype=torch.int64)},
        TypeError,
        "logits must be float16, .* got torch.int64",
    ),
    "sparse": ({"v": zeros(3, 8).to_sparse()}, TypeError, "v must be a strided tensor, got"),
    "dtype of v": ({"v": zeros(3, 8, dtype=FP64)}, TypeError, "v is .*float64 but logits is .*32"),
    "dtype of values": (
        {"edge_value": zeros(6, 8, dtype=FP16)},
        TypeError,
        "edge_value is .*float16 but logits is .*float32",
    ),
    "device of v": (
        {"v": zeros(3, 8, device="meta")},
        ValueError,
        "v is on meta but logits is on",
    ),
    "device of the graph": (
        {"logits": zeros(6, 8, device="meta"), "v": None, "edge_value": zeros(6, 8, device="meta")},
        ValueError,
        "graph is on .* but logits is on meta",
    ),
    "negative eps": ({"denominator_eps": -1.0}, ValueError, "denominator_eps .* got -1.0"),
    "eps nan": ({"denominator_eps": math.nan}, ValueError, "denominator_eps .* got nan"),
    "eps none": ({"denominator_eps": None}, TypeError, "denominator_eps must .* got NoneType"),
    "clamp upside down": (
        {"logit_clamp": (3.0, -2.0)},
        ValueError,
        r"logit_clamp must have low <= high, got \(3.0, -2.0\)",
    ),
    "clamp of three": ({"logit_clamp": (0, 1, 2)}, ValueError, "logit_clamp .* got 3 numbers"),
    "clamp tensor": ({"logit_clamp": zeros()}, TypeError, "logit_clamp must be a number, got T"),
    "impl": ({"impl": "cuda"}, ValueError, "impl must be one of .* got 'cuda'"),
    "edge scores": (
        {"return_aux": AuxRequest(lse=True, edge_scores=True)},
        ValueError,
        "return_aux: channelwise_attention has no edge_scores; it has lse, weights",
    ),
    "no request": ({"return_aux": True}, TypeError, "return_aux must be an AuxRequest, got bool"),
}


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("refused", REFUSALS)
def test_refuses_by_name_and_numbers(refused, impl):
    changes, error, message = REFUSALS[refused]
    fitting = {
        "logits": zeros(6, 8),
        "v": zeros(3, 8),
        "graph": random_graph(0, 5, 6, cols=3, device=DEVICE),
        "edge_value": zeros(6, 8),
        "impl": impl,
    }
    channelwise_attention(**fitting)
    with pytest.raises(error, match=message):
        channelwise_attention(**fitting | changes)

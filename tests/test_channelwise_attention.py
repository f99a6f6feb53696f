"""channelwise_attention: its values, by loops, by identities and on real graphs."""

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
    close,
    same_bits,
)
from channelwise_cases import (
    ALL,
    NAMES,
    PER_EDGE,
    PLANES,
    TERMS,
    WAYS,
    Case,
    accurate,
    attend,
    case,
    evaluate,
    examples,
    loops,
)
from torch import nn

from fastgt import AuxRequest, Graph, channelwise_attention, neighborhood_attention
from fastgt.testing import PROBLEMS


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

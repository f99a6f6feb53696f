"""channelwise_attention: its values, by loops, by identities and on real graphs."""

import math
from dataclasses import replace

import laws
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
    close,
    same_bits,
)
from channelwise_cases import (
    ALL,
    CHANNELWISE,
    NAMES,
    PLANES,
    TERMS,
    WAYS,
    Case,
    case,
    evaluate,
    examples,
)
from torch import nn

from fastgt import AuxRequest, Graph, channelwise_attention, neighborhood_attention
from fastgt.testing import PROBLEMS

test_reference_is_the_equations = CHANNELWISE.obeys(
    laws.equals_its_oracle, 40, ["reference"], dtype=FP64
)


test_implementations_agree_in_float64 = CHANNELWISE.obeys(
    laws.equals_its_oracle, 40, FAST, dtype=FP64
)


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[3], *PLANES])
@pytest.mark.parametrize("impl", ALL)
def test_everything_at_once(impl, layout):
    """No two sizes equal, no power of two, every option in use, several blocks of channels."""
    channels = (5, 27) if layout in PLANES else (135,)
    x = case(7, 6, 30, cols=7, kind="hub", isolated=2, clamped=True, eps=0.3, channels=channels,
             layout=layout)  # fmt: skip
    laws.equals_its_oracle(CHANNELWISE, impl, x)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", FAST)
def test_as_accurate_as_eager(impl, dtype):
    CHANNELWISE.check(laws.as_accurate_as_eager, 16, impl, dtype=dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", WAYS)
def test_half_precision_only_rounds_the_result(impl, dtype):
    edges = 3000 if impl == "cpp" or DEVICE == "cuda" else 90
    x = case(3, 4, edges, kind="hub", dtype=dtype, eps=1e-3, channels=(8,))
    laws.half_precision_only_rounds(CHANNELWISE, impl, x)


test_renumbering_nodes_renumbers_the_result = CHANNELWISE.obeys(
    laws.renumbering_nodes_renumbers_the_result, 8, dtype=FP64, cols=None
)


test_reordering_edges_reorders_only_edge_tensors = CHANNELWISE.obeys(
    laws.reordering_edges_reorders_only_edge_tensors, 8, dtype=FP64
)


test_a_duplicate_edge_adds_log_2_to_its_logits = CHANNELWISE.obeys(
    laws.a_duplicate_edge_adds_log_2_to_its_logits, 8, dtype=FP64, clamped=False
)


test_rows_without_edges_give_zero = CHANNELWISE.obeys(
    laws.rows_without_edges_give_zero, 8, dtype=FP32, isolated=3
)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (0, 0), (0, 3), (3, 0)])
@pytest.mark.parametrize("impl", IMPLS)
def test_no_edges_and_no_nodes(impl, rows, cols, terms):
    x = case(0, rows, 0, cols=cols, terms=terms, eps=1e-6, clamped=True, channels=(2, 3))
    found = laws.without_edges_all_is_zero(CHANNELWISE, impl, x)
    assert found["o"].shape == (rows, 2, 3)
    assert found["weights"].shape == (0, 2, 3)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_batch_is_its_graphs_one_by_one(impl):
    """Empty graphs inside and at the end."""
    sizes = [(5, 14), (0, 0), (3, 0), (4, 9), (2, 0), (0, 0)]
    singles = [case(i, n, e, eps=1e-6) for i, (n, e) in enumerate(sizes)]
    laws.a_batch_is_its_graphs_one_by_one(CHANNELWISE, impl, singles, 3)


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
@pytest.mark.parametrize("impl", ["cpp", "triton"] if DEVICE == "cpu" else FAST)
def test_nan_and_infinity_stay_with_the_rows_and_channels_that_use_them(impl, where, value):
    x = case(4, 9, 20, cols=10, dtype=FP32, eps=1e-6, isolated=1, channels=(4,))
    found, hit = laws.a_value_stays_with_its_rows(CHANNELWISE, impl, x, where, value, channel=2)
    if where in ("logits", "v", "edge_value"):
        assert not found["o"][hit["rows"], 2].isfinite().all()


@examples(8, dtype=FP64, eps=0.0)
def test_weights_sum_to_one_and_the_output_is_their_mean(impl, case):
    value = (None if case.v is None else case.v[case.source]), case.edge_value
    value = sum(t for t in value if t is not None)
    laws.weights_sum_to_one(CHANNELWISE, impl, case, value)


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e3])
@pytest.mark.parametrize("impl", WAYS)
def test_constant_values_give_no_gradient_to_logits(impl, size, dtype):
    x = case(5, 8, 40, dtype=dtype, terms="v")
    x = replace(x, v=torch.full_like(x.v, 1.7), logits=x.logits * size)
    # a float32 logit of 1e3 is off by 6e-5: any trace of it here would be far over the bound
    bound = 100 * torch.finfo(FP64 if dtype == FP64 else FP32).eps
    laws.constant_values_give_no_gradient_to_logits(CHANNELWISE, impl, x, {"dlogits": bound})


@pytest.mark.parametrize("impl", WAYS)
def test_a_rounded_output_does_not_shift_the_gradient(impl):
    x = case(5, 8, 40, dtype=BF16, terms="v")
    v = (64 + 2 * torch.randn(x.v.shape, generator=x.generator)).to(DEVICE, BF16)
    x = replace(x, v=v, do=x.do.abs(), dlse=torch.zeros_like(x.dlse))
    laws.a_rounded_output_does_not_shift_the_gradient(CHANNELWISE, impl, x, ["dlogits"])


test_a_constant_added_to_a_rows_logits_changes_only_the_lse = CHANNELWISE.obeys(
    laws.a_constant_added_to_a_rows_logits_changes_only_the_lse,
    8,
    dtype=FP64,
    eps=0.0,
    clamped=False,
)


@pytest.mark.parametrize("dtype", [FP64, FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("impl", ALL)
def test_a_single_edge_copies_its_value(impl, dtype):
    x = case(1, 9, 9, dtype=dtype, terms="v")
    laws.a_single_edge_copies_its_value(CHANNELWISE, impl, x, x.v)


test_partitions_of_the_edges_merge_through_the_lse = CHANNELWISE.obeys(
    laws.partitions_of_the_edges_merge_through_the_lse, 8, dtype=FP64, eps=0.0
)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("impl", WAYS)
def test_huge_logits(impl, size, eps):
    """All of one sign, whose spread float32 can just hold, and far apart: one edge takes all."""
    x = case(2, 7, 30, dtype=FP32, eps=eps, isolated=1, channels=(3,))
    logits = x.logits + size
    logits[:, 0] = (x.logits[:, 0] * size).round()
    laws.huge_logits_leave_no_nan(CHANNELWISE, impl, replace(x, logits=logits))


@pytest.mark.parametrize("dtype", [FP64, FP32, FP16], ids=str)
@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize("impl", ALL)
def test_edges_of_minus_infinity_do_not_exist(impl, eps, dtype):
    x = case(7, 7, 40, dtype=dtype, eps=eps, channels=(2,))
    laws.edges_of_minus_infinity_do_not_exist(CHANNELWISE, impl, x)


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
    laws.clamps(CHANNELWISE, impl, case(6, 7, 25), clamp)


@pytest.mark.parametrize("eps", [1e-6, 1e6])
@pytest.mark.parametrize("impl", ALL)
def test_eps_is_added_to_the_sum_of_the_plain_exponentials(impl, eps):
    x = case(8, 7, 25, eps=eps, isolated=1)
    laws.eps_is_added_to_the_sum_of_the_plain_exponentials(CHANNELWISE, impl, x)


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
    x = Case(0, graph.edge_index, graph, *tensors, {"denominator_eps": 0.0})
    laws.as_accurate_as_eager(CHANNELWISE, FAST[0], x)

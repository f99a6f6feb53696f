"""Values and gradients near the ends of the range: what is finite in float64 is finite."""

from dataclasses import replace

import attention_cases
import channelwise_cases
import pytest
import torch
from attention_cases import BF16, DEVICE, FP16, FP32, FP64, IMPLS, WAYS

from fastgt import (
    Graph,
    aggregate,
    channelwise_attention,
    gated_aggregate,
    linear_attention,
    neighborhood_attention,
    segment_mean,
    segment_softmax,
)

# of values, and of the gradients that meet them
SCALES = [(1e30, 1e-30), (1e30, 1.0), (1e-25, 1e25)]
# of the attention's results that are neither of the size of values nor of that of both
OF_GRADIENTS = ("dv", "dedge_value", "dedge_value_weight")
OF_ONE = ("lse", "weights")


def spread(x, *channels):
    """Logits [E, ...] of +-19.5, the first of each row among the lowest."""
    row = x.edge_index[1].cpu()
    signs = torch.randint(2, (len(row), *channels), generator=x.generator) * 2 - 1
    order = row.argsort(stable=True)
    signs[order[row[order].diff(prepend=row.new_tensor([-1])) > 0]] = -1
    return (19.5 * signs).to(DEVICE, FP32)


def agree(x, impl, cases, scales):
    """With the plain definition in float64, relative to the sizes that results have."""
    value, upstream = scales
    exact = cases.evaluate(x, "reference", FP64)
    for name, found in cases.evaluate(x, impl).items():
        size = value if name == "o" else upstream if name in OF_GRADIENTS else value * upstream
        size = 1.0 if name in OF_ONE else size
        pair = found.double() / size, exact[name].double() / size
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("terms", ["", "value", "attr-key attr-value", "value drop"])
@pytest.mark.parametrize("impl", [*IMPLS, *WAYS])
def test_attention_whose_first_logit_is_far_below_the_largest(impl, terms, scales):
    value, upstream = scales
    x = attention_cases.case(3, 9, 50, heads=2, d=8, dv=8, dtype=FP32, kind="hub", terms=terms)
    big = {n: t * value for n, t in x.terms.items() if n in ("edge_value", "edge_value_weight")}
    x = replace(x, q=0.01 * x.q, bias=spread(x, 2), v=value * x.v, do=upstream * x.do)
    x = replace(x, dlse=value * upstream * x.dlse, terms=x.terms | big)
    agree(x, impl, attention_cases, scales)


@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-6])
@pytest.mark.parametrize("impl", IMPLS)
def test_channelwise_attention_whose_first_logit_is_far_below_the_largest(impl, eps, scales):
    value, upstream = scales
    x = channelwise_cases.case(3, 9, 50, dtype=FP32, kind="hub", channels=(5,), eps=eps)
    x = replace(x, logits=spread(x, 5), v=value * x.v, edge_value=value * x.edge_value)
    x = replace(x, do=upstream * x.do, dlse=value * upstream * x.dlse)
    agree(x, impl, channelwise_cases, scales)


@pytest.mark.parametrize(("dtype", "value"), [(FP32, 3e38), (BF16, 3e38), (FP16, 6e4)], ids=str)
@pytest.mark.parametrize("impl", [i for i in IMPLS if i != "triton"])
def test_mean_of_the_largest_values(impl, dtype, value):
    """Rows of 1 to 40 edges whose values are all the same: so is their mean."""
    x = attention_cases.case(0, 6, 60, heads=1, d=4, dv=4, dtype=dtype, kind="hub")
    v = torch.full_like(x.v, value)
    out = neighborhood_attention(x.q, x.k, v, x.graph, impl=impl)
    wanted = torch.where(x.isolated()[:, None, None], 0, v.new_tensor(value)).expand_as(out)
    torch.testing.assert_close(out, wanted, rtol=0.02, atol=0)
    logits = torch.randn(60, 4, generator=x.generator).to(v)
    out = channelwise_attention(logits, v[:, 0], x.graph, impl=impl)
    torch.testing.assert_close(out, wanted[:, 0], rtol=0.02, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_sums_of_float16_are_not_kept_in_it(impl):
    hub = Graph.from_edge_index(torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0]], device=DEVICE), 5)
    x = torch.tensor([0, 6e4, 6e4, 3e4, -6e4], dtype=FP16, device=DEVICE)[:, None]
    assert aggregate(x, hub, reduce="mean", impl=impl)[0].item() == 22_500 // 16 * 16
    assert aggregate(x[[0, 1, 2, 4, 4]], hub, reduce="sum", impl=impl)[0].item() == 0
    offsets = torch.tensor([0, 5], device=DEVICE)
    assert segment_mean(x.abs(), offsets, impl=impl).item() == pytest.approx(42_000, rel=1e-3)
    mean = gated_aggregate(x.abs(), hub, torch.zeros_like(x[1:]), impl=impl)
    assert mean[0].item() == pytest.approx(52_500, rel=1e-3)


@pytest.mark.parametrize("feature_map", ["elu", "relu"])
@pytest.mark.parametrize("impl", IMPLS)
def test_states_of_linear_attention_are_not_kept_in_float16(impl, feature_map):
    nodes = 60
    q, k = 9 * torch.rand(2, nodes, 1, 3, generator=torch.Generator().manual_seed(0))
    v = torch.full((nodes, 1, 2), 5e3)
    q, k, v = (x.to(DEVICE, FP16) for x in (q, k, v))
    for autocast in (False, True):
        with torch.autocast(DEVICE, FP16, enabled=autocast):
            out = linear_attention(q, k, v, feature_map=feature_map, impl=impl)
        torch.testing.assert_close(out, v, rtol=1e-2, atol=0)


# in the interpreter, triton would take minutes
@pytest.mark.parametrize("impl", ["cpp", "reference"] if DEVICE == "cpu" else IMPLS)
def test_a_row_of_more_edges_than_float16_counts(impl):
    edges = 70_000
    index = torch.stack([torch.arange(edges) % 3, torch.zeros(edges, dtype=torch.int64)])
    graph = Graph.from_edge_index(index.to(DEVICE), 3)
    x = torch.ones(3, 1, 2, dtype=FP16, device=DEVICE)
    out = neighborhood_attention(x, x, x, graph, impl=impl)
    assert out[0].flatten().tolist() == pytest.approx([1.0, 1.0], rel=0.1)
    logits = torch.zeros(edges, 2, dtype=FP16, device=DEVICE)
    out = channelwise_attention(logits, x[:, 0], graph, impl=impl)
    assert out[0].tolist() == pytest.approx([1.0, 1.0], rel=0.1)
    weights = segment_softmax(logits, graph, impl=impl)
    assert weights.double().sum(0).tolist() == pytest.approx([1.0, 1.0], rel=0.1)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_a_softmax_of_the_largest_upstream(impl):
    x = channelwise_cases.case(1, 5, 30, dtype=FP32, channels=(3,), terms="v")
    logits = x.logits.clone().requires_grad_()
    upstream = 1e38 * torch.rand(30, 3, generator=x.generator).to(DEVICE)
    (found,) = torch.autograd.grad(segment_softmax(logits, x.graph, impl=impl), logits, upstream)
    wide = logits.detach().double().requires_grad_()
    y = segment_softmax(wide, x.graph, impl="reference")
    (exact,) = torch.autograd.grad(y, wide, upstream.double())
    torch.testing.assert_close(found.double() / 1e38, exact / 1e38, rtol=1e-5, atol=1e-5)

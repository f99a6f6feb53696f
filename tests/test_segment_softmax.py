"""segment_softmax: what is particular to it. Laws that it shares are in ``test_aggregate.py``."""

from dataclasses import replace

import laws
import pytest
import torch
from aggregate_cases import FAST_WAYS, SOFTMAX, WAYS, call, case, evaluate, zeros
from attention_cases import BF16, DEVICE, FP16, FP32, FP64, IMPLS, close

from fastgt import segment_softmax
from fastgt.testing import random_graph


@pytest.mark.parametrize("impl", WAYS)
def test_softmax_sums_to_one_and_ignores_constants(impl):
    x = case("softmax", 1, 6, 30, isolated=1)
    y = call(x, impl)[0]
    mass = torch.zeros(6, 5, dtype=FP64, device=DEVICE).index_add(0, x.target, y)
    close(mass, (~x.isolated()).to(mass)[:, None].expand_as(mass))
    shift = 300.0 * torch.arange(6, device=DEVICE, dtype=FP64)[x.target, None]
    close(call(x.having(logit=x.inputs["logit"] + shift), impl)[0], y)


test_a_duplicate_edge_adds_log_2_to_its_logits = SOFTMAX.obeys(
    laws.a_duplicate_edge_adds_log_2_to_its_logits, 12, dtype=FP64, op="softmax"
)
test_a_constant_added_to_a_rows_logits_changes_nothing = SOFTMAX.obeys(
    laws.a_constant_added_to_a_rows_logits_changes_only_the_lse, 12, dtype=FP64, op="softmax"
)


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


@pytest.mark.parametrize("impl", IMPLS)
def test_softmax_is_that_of_torch_geometric(impl):
    utils = pytest.importorskip("torch_geometric.utils")
    x = case("softmax", 1, 8, 40, channels=(2, 3))
    expected = utils.softmax(x.inputs["logit"], x.target, num_nodes=8)
    close(call(x, impl)[0], expected)


@pytest.mark.parametrize("impl", [None, "reference"])
def test_refusals(impl):
    graph, x, edge = random_graph(0, 5, 6, cols=3, device=DEVICE), zeros(3, 2), zeros(6, 2)
    with pytest.raises(ValueError, match="x has 3 rows but the graph has 6 edges"):
        segment_softmax(x, graph, impl=impl)
    with pytest.raises(TypeError, match="x must be a tensor, got NoneType"):
        segment_softmax(None, graph, impl=impl)
    with pytest.raises(ValueError, match=r"graph is on .* but x is on meta"):
        segment_softmax(edge.to("meta"), graph, impl=impl)
    with pytest.raises(ValueError, match="impl must be one of"):
        segment_softmax(edge, graph, impl="cuda")

"""neighborhood_attention on a CPU: what only its compiled kernels have to take care of."""

import math

import pytest
import torch
from attention_cases import BF16, FP32, FP64, all_close, attend, case, evaluate
from torch.autograd import forward_ad

from fastgt import AuxRequest, Graph, neighborhood_attention
from fastgt.cpu.library import load

pytestmark = pytest.mark.skipif(isinstance(load(), str), reason="no compiled kernels")

MASKS = {
    "none": None,
    "first": [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    "unaligned": [0, 0, 1, 1, 1, 1, 1, 1, 1, 1],
    "scattered": [1, 0, 0, 1, 0, 1, 1, 1, 0, 1],
    "all": [0] * 10,
}
TERMS = ["", "drop", "gate scores", "factor key value drop", "attr-key attr-value", "shared scores"]


@pytest.fixture
def poisoned_memory():
    """Fresh tensors hold NaN, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("mask", MASKS)
def test_every_number_of_a_result_is_written(poisoned_memory, mask, terms, dtype):
    x = case(1, 30, 200, heads=10, d=5, dv=16, dtype=dtype, kind="hub", isolated=3, terms=terms)
    if MASKS[mask] is not None:
        x.options["head_gate"] = torch.tensor(MASKS[mask], dtype=torch.float32)
    for name, found in evaluate(x, "cpp").items():
        assert not found.isnan().any(), name


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("mask", MASKS)
def test_any_set_of_active_heads_is_computed_as_the_definition_has_it(mask, terms):
    x = case(2, 30, 200, heads=10, d=4, dv=4, dtype=FP64, kind="hub", isolated=3, terms=terms)
    if MASKS[mask] is not None:
        x.options["head_gate"] = torch.tensor(MASKS[mask], dtype=torch.float64)
    all_close(evaluate(x, "cpp"), evaluate(x, "reference"))


def test_a_row_without_weights_changes_no_bit_of_other_heads():
    x = case(4, 300, 3000, cols=4, heads=2, d=16, dv=16, dtype=FP32)
    bias = x.bias.clone()
    bias[x.edge_index[1] == 7, 0] = -math.inf
    found, expected = evaluate(x.having(bias=bias), "cpp"), evaluate(x, "cpp")
    for name in ("dk", "dv"):
        assert torch.equal(found[name][:, 1], expected[name][:, 1]), name
    column = torch.isin(torch.arange(4), x.edge_index[0][x.edge_index[1] == 7])
    assert column.any()
    assert not torch.equal(found["dv"][column, 0], expected["dv"][column, 0])


@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_gates_of_0_and_1_keep_their_tangents(impl):
    x = case(5, 6, 20, heads=2, d=4, dv=4)
    gate = torch.ones(2, dtype=FP64)
    with forward_ad.dual_level():
        x.options["head_gate"] = forward_ad.make_dual(gate, torch.tensor([2.0, 0.0], dtype=FP64))
        o, *_ = attend(x, impl)
        tangent = forward_ad.unpack_dual(o).tangent
    expected = o.detach().clone()
    expected[:, 0] *= 2
    expected[:, 1] = 0
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("group", [1, 2])
def test_a_row_without_weights_gives_its_columns_nothing_of_a_nan(group, dtype):
    x = case(3, 20, 300, heads=2, group=group, d=16, dv=16, dtype=dtype)
    dead = x.edge_index[1] == 7
    assert dead.any()
    bias = x.bias.clone()
    bias[dead, 0] = -math.inf
    do = x.do.clone()
    do[7, 0] = math.nan
    found = evaluate(x.having(bias=bias, do=do), "cpp")
    do[7, 0] = 1
    expected = evaluate(x.having(bias=bias, do=do), "cpp")
    for name in ("dq", "dk", "dv"):
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("turned", [False, True], ids=["row", "column"])
def test_sums_over_a_hub_with_vectors_on_its_edges_keep_their_digits(turned):
    n = 400_000
    index = torch.stack([torch.arange(n), torch.zeros(n, dtype=torch.int64)])
    shape = (n, 1) if turned else (1, n)
    graph = Graph.from_edge_index(index.flip(0) if turned else index, shape)
    q, k = (torch.full((size, 1, 4), 0.1, requires_grad=True) for size in shape)
    gate, request = torch.ones(n, 1, 4), AuxRequest(lse=True)
    _, aux = neighborhood_attention(
        q, k, k, graph, scale=1.0, edge_gate=gate, return_aux=request, impl="cpp"
    )
    dq, dk = torch.autograd.grad(aux.lse.sum(), [q, k])
    found, expected = (dk, 0.1 * n) if turned else (dq, 0.1)
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=3e-4, atol=0)

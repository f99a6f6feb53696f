"""neighborhood_attention on a CPU: what only its compiled kernels have to take care of."""

import math

import pytest
import torch
from attention_cases import BF16, FP32, FP64, all_close, case, evaluate

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

"""What is particular to attention by windows: rows that take several tiles of columns."""

from dataclasses import replace

import pytest
import torch
from attention_cases import all_close, case, evaluate

pytest.importorskip("triton")


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize(
    ("plan", "cols"),
    [("windows 16", 63), ("windows 16", 150), ("windows 64", 150), ("graphs 64", 64)],
)
def test_a_row_s_largest_logit_may_come_in_any_tile(plan, cols, order):
    """Sums over earlier columns shrink when a larger logit comes, tile after tile."""
    every = torch.cartesian_prod(torch.arange(cols), torch.arange(9)).T  # source, target
    x = case(3, 9, 9 * cols, cols=cols, plan=plan).onto(every)
    assert x.graph.settled.path == plan.split()[0]
    steps = torch.linspace(0, 12, cols, dtype=torch.float64).to(x.bias)
    steps = steps if order == "rising" else steps.flip(0)
    x = replace(x, bias=x.bias + steps[every[0]][:, None])
    all_close(evaluate(x, "triton"), evaluate(x, "reference"))

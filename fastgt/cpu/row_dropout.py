"""row_dropout on a CPU: ``row_dropout.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.contract import Dropout
from fastgt.cpu.library import dtype_number, kernels
from fastgt.philox import LEVELS, threshold


def row_dropout(x: Tensor, dropout: Dropout) -> Tensor:
    """-> y [R, C] of x [R, C]."""
    y, limit = x.new_empty(x.shape), threshold(dropout.p)
    kernels().run(
        "row_dropout",
        "fwd",
        dtype_number(x),
        torch.get_num_threads(),
        *x.shape,
        x.contiguous(),
        y,
        dropout.seed,
        None if dropout.numbers is None else dropout.numbers.contiguous(),
        limit,
        LEVELS / max(1, LEVELS - limit),
    )
    return y

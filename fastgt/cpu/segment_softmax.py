"""segment_softmax on a CPU: ``segment_softmax.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.cpu.library import dtype_number, kernels, rows_of, walk


def segment_softmax_fwd(x: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
    """-> y [E, D] in the caller's edge order."""
    y = x.new_empty(x.shape)
    _run("fwd", rows, rows_of(x), y, None, None)
    return y


def segment_softmax_bwd(dy: Tensor, y: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
    """-> dx [E, D] in the caller's edge order."""
    dx = y.new_empty(y.shape)
    _run("bwd", rows, None, y, rows_of(dy), dx)
    return dx


def _run(
    function: str,
    rows: tuple[Tensor, ...],
    x: Tensor | None,
    y: Tensor,
    dy: Tensor | None,
    dx: Tensor | None,
) -> None:
    row_ptr, _, edge = rows
    kernels().run(
        "segment_softmax",
        function,
        dtype_number(y),
        torch.get_num_threads(),
        y.shape[1],
        walk(row_ptr, None, edge),
        x,
        y,
        dy,
        dx,
    )

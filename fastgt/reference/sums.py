"""Sums in float32, or float64, whatever their terms are."""

from __future__ import annotations

import torch
from torch import Tensor


def row_sums(x: Tensor, row: Tensor, rows: int) -> Tensor:
    """x [E, ...] -> [N_rows, ...], in float32 (float64): as PyTorch's sums of 16 bits, rounded by
    whoever takes them. Degrees and sums of finite numbers overflow float16."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x.new_zeros(rows, *x.shape[1:]).index_add(0, row, x)


def over_channels(index: Tensor, x: Tensor) -> Tensor:
    """An index of each edge, [E], for every channel of ``x [E, ...]``."""
    return index.view(-1, *[1] * (x.ndim - 1)).expand_as(x)


def along_channels(weight: Tensor, x: Tensor) -> Tensor:
    """A number of each edge, [E], for products with ``x [E, ...]``; one of each channel as it
    is."""
    return weight if weight.ndim == x.ndim else weight.view(-1, *[1] * (x.ndim - 1))


def accumulator(x: Tensor) -> torch.dtype:
    """What sums over ``x`` are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def einsum(equation: str, x: Tensor, y: Tensor) -> Tensor:
    """``torch.einsum``; on a CPU in 16 bits of float32 operands, and rounded once, as there.

    Where a CPU multiplies 16 bits by AMX, NaN of one row reaches the rows before it.
    """
    if x.device.type != "cpu" or x.element_size() > 2:
        return torch.einsum(equation, x, y)
    with torch.autocast("cpu", enabled=False):
        return torch.einsum(equation, x.float(), y.float()).to(x.dtype)

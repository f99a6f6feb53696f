"""Products of rows with the weights of edge attributes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastgt.ops.checks import accumulator, autocasts

_PIECE = 128  # numbers that a matrix product sums at most


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, G, K] times weight [G, K, M], [N, G, M].

    In float32 (float64) whatever the inputs: sums are rounded at the end, and once. Of contiguous
    ones: matrix products sum in another order for other strides.
    """
    wide, device = accumulator(weight), x.device.type
    operands = x.to(wide).contiguous(), weight.to(wide).contiguous()
    if autocasts(device):
        with torch.autocast(device, enabled=False):
            return wide_product(*operands)
    if device == "cpu":
        return _Product.apply(*operands)
    return torch.einsum("ngk,gkm->ngm", *operands)


class _Product(torch.autograd.Function):
    """On a CPU. It cuts long sums, and a single product, by its number of threads: there are always
    several products at a time, of sums of at most _PIECE numbers, and these are added in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _row_products(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad
        dx = dweight = None
        with torch.autocast("cpu", enabled=False):
            if need_x:
                dx = _row_products(dy, weight.mT)
            if need_weight:
                pairs = zip(x.unbind(1), dy.unbind(1), strict=True)
                dweight = torch.stack([_column_products(*pair) for pair in pairs])
        return dx, dweight


def _row_products(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, G, K], weight [G, K, M] -> [N, G, M]"""
    n, groups = x.shape[:2]
    rows = x.transpose(0, 1)
    if groups == 1:
        rows = torch.nn.functional.pad(x[:, 0], (0, 0, 0, n % 2)).unflatten(0, (2, -1))
        weight = weight.expand(2, -1, -1)
    terms = zip(rows.split(_PIECE, 2), weight.split(_PIECE, 1), strict=True)
    y = functools.reduce(torch.add, (torch.bmm(*term) for term in terms))
    return y.flatten(0, 1)[:n, None] if groups == 1 else y.transpose(0, 1)


def _column_products(x: Tensor, y: Tensor) -> Tensor:
    """x [N, K], y [N, M] -> x^T y [K, M]"""
    n, size = x.shape[0], _PIECE
    whole = n // size if n >= 2 * size else 0
    pieces = [t[: whole * size].unflatten(0, (whole, size)) for t in (x, y)]
    half = (n - whole * size + 1) // 2
    room = 0, 0, 0, 2 * half - (n - whole * size)
    rest = [
        torch.nn.functional.pad(t[whole * size :], room).unflatten(0, (2, half)) for t in (x, y)
    ]
    return torch.bmm(pieces[0].mT, pieces[1]).sum(0) + torch.bmm(rest[0].mT, rest[1]).sum(0)

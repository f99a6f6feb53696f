"""Projections of active heads on a CPU: one dense product of what they have.

Active heads that stand one after another are multiplied where they are. Others are copied together
for some nodes at a time, by ``head_projection.cpp``: the copies stay in a cache. Rows of 16 bits
are filled up with zeros where the product would read on behind their end. The symbols are those of
``fastgt.ops.head_projection``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastgt.cpu.library import kernels, rows_of

_NODES = 2048
_STEP = 32  # numbers of 16 bits that a matrix unit takes of a row at once


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def head_expand(x: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor) -> Tensor:
    """-> y [N, H, D]."""
    h, d, _ = weight.shape
    active, masked = _split(heads)
    y = x.new_empty(x.shape[0], h, d)
    w = weight[active].flatten(0, 1).T
    b = None if bias is None else bias[active].flatten()
    if isinstance(active, slice):
        y[:, masked] = 0
        _product(x, w, b, out=y[:, active].flatten(1))
        return y
    for some, into in zip(x.split(_NODES), y.split(_NODES), strict=True):
        _run("put", into, _product(some, w, b).view(len(some), len(active), d), heads)
    return y


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def head_contract(y: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor) -> Tensor:
    """-> z [N, C]."""
    active, _ = _split(heads)
    w = weight[active].flatten(0, 1)
    if isinstance(active, slice):
        return _product(y[:, active].flatten(1), w, bias)
    z = y.new_empty(y.shape[0], w.shape[1])
    for some, into in zip(y.split(_NODES), z.split(_NODES), strict=True):
        _product(_together(some, active, heads), w, bias, out=into)
    return z


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def head_outer(y: Tensor, x: Tensor, heads: Tensor) -> Tensor:
    """-> g [H, D, C]."""
    active, masked = _split(heads)
    g = y.new_empty(*y.shape[1:], x.shape[1])
    g[masked] = 0
    # a sum over some nodes at a time would be rounded between them
    nodes = _NODES if y.element_size() > 2 and not isinstance(active, slice) else max(1, len(y))
    part = y.new_zeros(g[active].shape).flatten(0, 1)
    for some, of in zip(y.split(nodes), x.split(nodes), strict=True):
        part.addmm_(_together(some, active, heads).T, of)
    g[active] = part.view_as(g[active])
    return g


def keeps_rows_apart(x: Tensor, width: int) -> bool:
    """Whether PyTorch's product of ``width`` numbers of a row uses nothing behind them.

    In 16 bits it takes them in steps, on CPUs with AMX. What stands where the last step goes beyond
    the row, the next row or what is beside a view, is multiplied by 0: NaN comes out.
    """
    return x.device.type != "cpu" or x.element_size() > 2 or width % _STEP == 0


def missing(width: int) -> int:
    """How many numbers fill up a row of ``width`` numbers to whole steps."""
    return -width % _STEP


def _together(y: Tensor, active: slice | Tensor, heads: Tensor) -> Tensor:
    """The active heads of ``y [N, H, D]``, [N, active * D]."""
    if isinstance(active, slice):
        return y[:, active].flatten(1)
    x = y.new_empty(y.shape[0], len(active), y.shape[2])
    _run("take", rows_of(y), x, heads)
    return x.flatten(1)


def _run(function: str, wide: Tensor, together: Tensor, heads: Tensor) -> None:
    order = heads.long()
    kernels().run(
        "head_projection",
        function,
        torch.get_num_threads(),
        *wide.shape[:2],
        together.shape[1],
        wide.element_size(),
        wide.shape[2],
        order.data_ptr(),
        wide,
        together,
    )


def _product(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    if not keeps_rows_apart(x, x.shape[1]):
        room = missing(x.shape[1])
        x, w = pad(x, (0, room)), pad(w, (0, 0, 0, room))
    return torch.mm(x, w, out=out) if bias is None else torch.addmm(bias, x, w, out=out)


def _split(heads: Tensor) -> tuple[slice | Tensor, Tensor]:
    """-> active heads, a slice where they stand one after another, and masked ones."""
    count = int(heads[-1])
    active, masked = heads[:-1].long().split([count, len(heads) - 1 - count])
    first, last = (int(active[0]), int(active[-1]) + 1) if count else (0, 0)
    return slice(first, last) if last - first == count else active, masked

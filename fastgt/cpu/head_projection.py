"""Projections of active heads on a CPU: one dense product of what they have.

Active heads that stand one after another are multiplied where they are; of others, a copy of the
active ones is. The symbols are those of ``fastgt.ops.head_projection``.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def head_expand(x: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor) -> Tensor:
    """-> y [N, H, D]."""
    h, d, _ = weight.shape
    active, masked = _split(heads)
    y = x.new_empty(x.shape[0], h, d)
    y[:, masked] = 0
    w = weight[active].flatten(0, 1).T
    out = y[:, active].flatten(1) if isinstance(active, slice) else None
    if bias is None:
        part = torch.mm(x, w, out=out)
    else:
        part = torch.addmm(bias[active].flatten(), x, w, out=out)
    if isinstance(active, Tensor):
        y.index_copy_(1, active, part.view(len(x), len(active), d))
    return y


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def head_contract(y: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor) -> Tensor:
    """-> z [N, C]."""
    active, _ = _split(heads)
    y, w = y[:, active].flatten(1), weight[active].flatten(0, 1)
    return torch.mm(y, w) if bias is None else torch.addmm(bias, y, w)


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def head_outer(y: Tensor, x: Tensor, heads: Tensor) -> Tensor:
    """-> g [H, D, C]."""
    active, masked = _split(heads)
    g = y.new_empty(*y.shape[1:], x.shape[1])
    g[masked] = 0
    g[active] = torch.mm(y[:, active].flatten(1).T, x).view_as(g[active])
    return g


def _split(heads: Tensor) -> tuple[slice | Tensor, Tensor]:
    """-> active heads, a slice where they stand one after another, and masked ones."""
    count = int(heads[-1])
    active, masked = heads[:-1].long().split([count, len(heads) - 1 - count])
    first, last = (int(active[0]), int(active[-1]) + 1) if count else (0, 0)
    return slice(first, last) if last - first == count else active, masked

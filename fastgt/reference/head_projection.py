"""The meaning of ``head_projection``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.reference.sums import einsum


def head_projection(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, head_gate: Tensor | None = None
) -> Tensor:
    """See :func:`fastgt.head_projection`."""
    heads = weight.shape[1 if x.ndim == 3 else 0]
    gate = x.new_ones(heads, dtype=torch.bool) if head_gate is None else head_gate.detach()
    keep = (gate != 0)[:, None]
    if x.ndim == 3:
        x = torch.where(keep, x, 0)
        out = einsum("nhd,chd->nc", x, torch.where(keep, weight, 0))
        return out if bias is None else out + bias
    out = einsum("nc,hdc->nhd", x, torch.where(keep[..., None], weight, 0))
    if bias is not None:
        out = out + bias
    return torch.where(keep, out, 0)

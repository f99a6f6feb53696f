"""The meaning of every operator in plain PyTorch: same names, same signatures, slow on purpose.

Everything here is differentiable, any number of times, by autograd alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgt.graph import Graph


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph,
    *,
    scale: float | None = None,
    edge_bias: Tensor | None = None,
    logit_clamp: float | tuple[float, float] | None = None,
    denominator_eps: float = 0.0,
    return_lse: bool = False,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """See :func:`fastgt.neighborhood_attention`."""
    key, query = graph.edge_index  # [E], in the caller's order
    rows, heads, group = q.shape[0], q.shape[1], q.shape[1] // max(k.shape[1], 1)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))  # [N_cols, H, .]
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale

    logit = (q[query] * k[key]).sum(-1) * scale  # [E, H]
    if logit_clamp is not None:
        low, high = logit_clamp if isinstance(logit_clamp, tuple) else (-logit_clamp, logit_clamp)
        logit = logit.clamp(low, high)
    if edge_bias is not None:
        logit = logit + edge_bias

    # any pivot gives the same result; the row maximum keeps exp() in range
    index = query[:, None].expand_as(logit)
    pivot = logit.new_full((rows, heads), -torch.inf)
    pivot = pivot.scatter_reduce(0, index, logit.detach(), "amax")
    pivot = pivot.masked_fill(pivot == -torch.inf, 0.0)
    p = (logit - pivot[query]).exp()  # [E, H]
    total = p.new_zeros(rows, heads).index_add(0, query, p)  # [N_rows, H]
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    # through the logarithm: exp(-pivot) alone would overflow
    divisor = safe + (math.log(denominator_eps) - pivot).exp() if denominator_eps else safe
    weights = p / divisor[query]
    out = v.new_zeros(rows, heads, v.shape[2]).index_add(0, query, weights[..., None] * v[key])
    out = out.masked_fill(empty[..., None], 0.0)

    extras = []
    if return_lse:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        extras.append((pivot + safe.log()).masked_fill(empty, -torch.inf).to(wide))
    if return_weights:
        extras.append(weights.detach())
    return (out, *extras) if extras else out

"""Linear attention where a graph lies on several ranks.

A rank sums the states of its own keys, ``S_g = sum_j phi(k_j) v_j^T`` and ``z_g = sum_j phi(k_j)``,
and one all-reduce adds those of all ranks, in float32 or float64: G H M (Dv + 1) numbers, however
many nodes there are. The constant that keeps FAVOR+'s exponentials in range takes one more, of
maxima. Both are PyTorch's own products, graph by graph, whatever ``impl`` says.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastgt.distributed.collectives import sum_over_ranks
from fastgt.distributed.offsets import RankOffsets
from fastgt.distributed.segment_pool import segment_sum
from fastgt.ops.checks import accumulator, autocast, autocasts, without_autocast
from fastgt.ops.head_mask import check_head_gate, gated
from fastgt.ops.implementation import Impl, resolve_impl
from fastgt.ops.linear_attention import check_linear, check_norms
from fastgt.reference.linear_attention import features


def linear_attention(
    offsets: RankOffsets,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str,
    projection: Tensor | None,
    eps: float,
    normalize: bool,
    head_gate: Tensor | None,
    dense_gate_grad: bool,
    impl: Impl | None,
) -> Tensor:
    """See :func:`fastgt.linear_attention`: q, k, v of own rows."""
    if autocasts(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (autocast(x, dtype) for x in (q, k, v))
    check_linear(q, k, v, offsets.local, feature_map, projection)
    if head_gate is not None:
        check_head_gate(head_gate, q.shape[1], q.device, len(offsets.sizes))
    keep, dense = None, False
    if head_gate is not None:
        dense = dense_gate_grad and head_gate.dtype != torch.bool
        if not dense:
            keep = offsets.of_rows(torch.atleast_2d(head_gate.detach() != 0))[..., None]
            q, k, v = (torch.where(keep, x, 0) for x in (q, k, v))
    wide = accumulator(q)
    with without_autocast(q.device.type):
        f, g = _features(offsets, q.to(wide), k.to(wide), feature_map, projection)
        linear, share = _shared(offsets, f, g, v.to(wide))
        out = linear / (share + eps)[..., None] if normalize else linear
        out = out.to(q.dtype)
        if keep is not None:
            out = torch.where(keep, out, 0)
        if head_gate is None:
            return out
        return gated(out, head_gate, offsets.local, dense, resolve_impl(impl, q))


def sgformer_attention(
    offsets: RankOffsets, q: Tensor, k: Tensor, v: Tensor, norms: str, impl: Impl | None
) -> Tensor:
    """See :func:`fastgt.sgformer_attention`: q, k, v of own rows."""
    dtype = q.dtype
    if autocasts(q.device.type):
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    check_linear(q.to(dtype), k.to(dtype), v.to(dtype), offsets.local, "identity", None)
    check_norms(norms)
    wide = accumulator(q.to(dtype))
    with without_autocast(q.device.type):
        q, k, v = (x.to(wide) for x in (q, k, v))
        q, k = (_unit(offsets, x, norms, impl) for x in (q, k))
        linear, share = _shared(offsets, q, k, v)
        n = offsets.of_rows(offsets.sizes.to(wide))[:, None, None]
        return ((linear + n * v) / (share[..., None] + n)).to(dtype)


def _unit(offsets: RankOffsets, x: Tensor, norms: str, impl: Impl | None) -> Tensor:
    square = x.square().sum(2, keepdim=True)  # [n, H, 1]
    if norms == "graph":
        of_graphs = segment_sum(offsets, square.sum((1, 2)), impl)
        square = offsets.of_rows(of_graphs)[:, None, None]
    tiny = torch.finfo(x.dtype).tiny
    return x * torch.where(square > tiny, square.clamp(min=tiny).rsqrt(), 0)


def _features(
    offsets: RankOffsets, q: Tensor, k: Tensor, name: str, projection: Tensor | None
) -> tuple[Tensor, Tensor]:
    """phi of queries and of keys, ``[n, H, M]``."""
    top = None
    if name == "softmax":
        assert projection is not None
        product = (k @ projection.to(k.dtype).mT).detach() * projection.shape[1] ** -0.25
        tops = product.new_full((len(offsets.sizes), k.shape[1]), -torch.inf)
        for g, (begin, end) in enumerate(pairwise(offsets.local.tolist())):
            if begin < end:
                tops[g] = product[begin:end].amax((0, 2))
        top = offsets.of_rows(offsets.group.largest(tops))[..., None]  # [n, H, 1]
    return features(q, name, projection, (2,)), features(k, name, projection, (2,), top)


def _shared(offsets: RankOffsets, f: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``phi(q_i)^T S`` ``[n, H, Dv]`` and ``phi(q_i)^T z`` ``[n, H]``, with sums over all ranks."""
    ends = list(pairwise(offsets.local.tolist()))
    states = [torch.einsum("nhm,nhd->hmd", g[b:e], v[b:e]) for b, e in ends]
    sums = torch.stack([g[b:e].sum(0) for b, e in ends])  # [G, H, M]
    both = torch.cat([torch.stack(states), sums[..., None]], 3)
    both = sum_over_ranks(both, offsets.group)  # [G, H, M, Dv + 1]
    rows = [torch.einsum("nhm,hmd->nhd", f[b:e], both[i]) for i, (b, e) in enumerate(ends)]
    found = torch.cat(rows)
    return found[..., :-1], found[..., -1]

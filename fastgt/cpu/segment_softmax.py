"""segment_softmax on a CPU. The symbols are those of ``kernels/segment_softmax.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.cpu.chunks import chunks, finite, joined, largest, take
from fastgt.cpu.sparse import accumulator, bags, make_walk, segment_of


def segment_softmax_fwd(x: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
    """-> y [E, D] in the caller's edge order."""
    row_ptr, _, edge = rows
    walk, row, wide = make_walk(row_ptr, edge), segment_of(row_ptr, edge), accumulator(x)
    pieces, width = walk.cut.shape[0] - 1, x.shape[1]
    top = x.new_full((pieces, width), -torch.inf, dtype=wide)
    total = top.new_zeros(pieces, width)
    for chunk in chunks(walk.cut, width):
        s, owner = take(x, edge[chunk.edges], wide), chunk.owner()
        peak = largest(s, owner, chunk.ptr.shape[0] - 1)
        top[chunk.pieces] = peak
        s -= finite(peak).index_select(0, owner)
        total[chunk.pieces] = chunk.sum(s.exp_())
    if walk.joint is not None:
        owner = segment_of(walk.joint, top)
        peak = largest(top, owner, row_ptr.shape[0] - 1)
        total *= (top - finite(peak).index_select(0, owner)).exp_()
        top, total = peak, bags(torch.arange(pieces, dtype=row_ptr.dtype), total, walk.joint)
    pivot, norm = finite(top), 1 / total.masked_fill_(total == 0, 1.0)
    y, number = x.new_empty(x.shape), edge.long()
    for chunk in chunks(walk.cut, width):
        p, owner = take(x, edge[chunk.edges], wide), row[chunk.edges]
        p.sub_(pivot.index_select(0, owner)).exp_().mul_(norm.index_select(0, owner))
        y.index_copy_(0, number[chunk.edges], p.to(y.dtype))
    return y


def segment_softmax_bwd(dy: Tensor, y: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
    """-> dx [E, D] in the caller's edge order."""
    row_ptr, _, edge = rows
    walk, row, wide = make_walk(row_ptr, edge), segment_of(row_ptr, edge), accumulator(y)
    pieces, width = walk.cut.shape[0] - 1, y.shape[1]
    total = y.new_zeros(pieces, width, dtype=wide)
    delta = torch.zeros_like(total)
    for chunk in chunks(walk.cut, width):
        p = take(y, edge[chunk.edges], wide)
        total[chunk.pieces] = chunk.sum(p)
        delta[chunk.pieces] = chunk.sum(p.mul_(take(dy, edge[chunk.edges], wide)))
    total, delta = joined(walk.joint, total), joined(walk.joint, delta)
    delta /= total.masked_fill_(total == 0, 1.0)
    dx, number = y.new_empty(y.shape), edge.long()
    for chunk in chunks(walk.cut, width):
        p, ds = (take(t, edge[chunk.edges], wide) for t in (y, dy))
        ds.sub_(delta.index_select(0, row[chunk.edges])).mul_(p)
        dx.index_copy_(0, number[chunk.edges], ds.to(dx.dtype))
    return dx

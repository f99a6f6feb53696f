"""gated_aggregate on a CPU. The symbols are those of ``kernels/gated_aggregate.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.contract import (
    GatedKept,
    GatedMean,
    GatedMessages,
    GatedNeeds,
    GatedResults,
    GatedUpstream,
)
from fastgt.cpu.chunks import chunks, joined, take
from fastgt.cpu.sparse import accumulator, make_walk, segment_of, spmm


def gated_aggregate_fwd(
    gated: GatedMessages, rows: tuple[Tensor, ...], mean: GatedMean, results: GatedResults
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> o [N, D], e [E, D] in the caller's edge order; total and mean [N, D] to be kept."""
    x, (row_ptr, col, edge), (eps, normalize), (edge_scores, keep) = gated.x, rows, mean, results
    wide, (n, width) = accumulator(x), (row_ptr.shape[0] - 1, x.shape[1])
    o, e = x.new_empty(n, width), x.new_empty(edge.shape[0] if edge_scores else 0, width)
    walk, row, number = make_walk(row_ptr, edge), segment_of(row_ptr, edge), edge.long()
    average = x.new_zeros(walk.cut.shape[0] - 1, width, dtype=wide)
    total = average.new_zeros(average.shape if normalize else (0, width))
    for chunk in chunks(walk.cut, width):
        at = chunk.edges
        s = _gates(gated, edge[at], row[at], col[at], wide)
        if edge_scores:
            e.index_copy_(0, number[at], s.to(e.dtype))
        _sigmoid(s)
        if normalize:
            total[chunk.pieces] = chunk.sum(s)
        average[chunk.pieces] = chunk.sum(s.mul_(take(x, col[at], wide)))
    average = joined(walk.joint, average)
    if normalize:
        total = joined(walk.joint, total).add_(eps)
        average /= total.masked_fill_(total == 0, 1.0)
    o.copy_(average)
    empty = average.new_empty(0, width)
    rounded = keep and normalize and o.dtype != wide
    return o, e, total if keep and normalize else empty, average if rounded else empty.clone()


def gated_aggregate_bwd(
    upstream: GatedUpstream,
    gated: GatedMessages,
    kept: GatedKept,
    rows: tuple[Tensor, ...],
    columns: tuple[Tensor, ...],
    mean: GatedMean,
    needs: GatedNeeds,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dx [M, D], dgate [E, D], drow [N, D], dcol [M, D]; empty where not needed."""
    x, (do, de), (need_x, need_gate, need_row, need_col) = gated.x, upstream, needs
    (row_ptr, col, edge), (col_ptr, col_row, _, col_edge) = rows, columns
    (m, width), n, wide = x.shape, row_ptr.shape[0] - 1, accumulator(x)
    dx = x.new_empty((m, width) if need_x else (0,))
    dgate = x.new_empty((edge.shape[0], width) if need_gate else (0,))
    drow = x.new_empty((n, width) if need_row else (0,))
    dcol = x.new_empty((m, width) if need_col else (0,))
    w = do.to(wide)
    if mean.normalize:
        w = w / kept.total
    shift = w * kept.mean if mean.normalize else None

    def through(at: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> sigma, w and ds of some edges ij"""
        sigma = _sigmoid(_gates(gated, at, i, j, wide))
        w_i = w.index_select(0, i)
        ds = w_i * take(x, j, wide)
        if shift is not None:
            ds -= shift.index_select(0, i)
        ds.mul_(sigma).mul_(1 - sigma)
        if de is not None:
            ds += take(de, at, wide)
        return sigma, w_i, ds

    if need_x or need_gate or need_col:
        walk, owner, number = (
            make_walk(col_ptr, col_row),
            segment_of(col_ptr, col_row),
            col_edge.long(),
        )
        pieces = walk.cut.shape[0] - 1
        sum_x = w.new_zeros(pieces if need_x else 0, width)
        sum_col = w.new_zeros(pieces if need_col else 0, width)
        for chunk in chunks(walk.cut, width):
            at = chunk.edges
            sigma, w_i, ds = through(col_edge[at], col_row[at], owner[at])
            if need_x:
                sum_x[chunk.pieces] = chunk.sum(sigma.mul_(w_i))
            if need_gate:
                dgate.index_copy_(0, number[at], ds.to(dgate.dtype))
            if need_col:
                sum_col[chunk.pieces] = chunk.sum(ds)
        for out, sums, need in ((dx, sum_x, need_x), (dcol, sum_col, need_col)):
            if need:
                out.copy_(joined(walk.joint, sums))
    if need_row and need_gate and dgate.dtype == wide:
        drow.copy_(spmm(make_walk(row_ptr, edge), None, dgate))
    elif need_row:
        walk, owner = make_walk(row_ptr, edge), segment_of(row_ptr, edge)
        sum_row = w.new_zeros(walk.cut.shape[0] - 1, width)
        for chunk in chunks(walk.cut, width):
            at = chunk.edges
            _, _, ds = through(edge[at], owner[at], col[at])
            sum_row[chunk.pieces] = chunk.sum(ds)
        drow.copy_(joined(walk.joint, sum_row))
    return dx, dgate, drow, dcol


def _gates(
    gated: GatedMessages, edge: Tensor, row: Tensor, col: Tensor, wide: torch.dtype
) -> Tensor:
    """gate_ij + gate_row_i + gate_col_j of some edges."""
    places = ((gated.gate, edge), (gated.gate_row, row), (gated.gate_col, col))
    terms = [take(x, index, wide) for x, index in places if x is not None]
    for term in terms[1:]:
        terms[0] += term
    return terms[0]


def _sigmoid(x: Tensor) -> Tensor:
    """In place. PyTorch's own rounds differently where a thread's share ends."""
    return x.neg_().exp_().add_(1.0).reciprocal_()

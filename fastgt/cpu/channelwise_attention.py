"""Channelwise attention on a CPU, the edges of a few rows at a time.

Whole rows go together whose edges make temporaries of about 2^19 numbers, so that everything
between the inputs and the result stays in the processor's cache. Segment sums are embedding bags,
as in ``attention.py``: each by one thread in edge order, long ones in pieces of fixed length. The
result depends neither on the number of threads nor on what goes together. The symbols are those of
``kernels/channelwise_attention.py``, but that the pivot may be any logit of ordinary size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastgt.contract import (
    ChannelwiseInputs,
    ChannelwiseLogit,
    ChannelwiseNeeds,
    ChannelwiseResults,
    ChannelwiseUpstream,
    HeadMask,
    RowWalk,
    Walks,
)
from fastgt.cpu.sparse import Edges, accumulator, make_walk, pivots, runs, spmm, walk_edges

_CHUNK = 2**19  # numbers of a temporary
_LARGE = 8.0  # logarithm of a sum that few rows reach whose first logit is among the largest
_WIDE, _NARROW = 64, 16  # channels at a time; where a row has more edges than a chunk


@torch.no_grad()  # called by an exported module, gradients may be on
def channelwise_attention_fwd(
    inputs: ChannelwiseInputs,
    mask: HeadMask,
    rows: RowWalk,
    logit: ChannelwiseLogit,
    results: ChannelwiseResults,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> o, lse [N, C]; weights [E, C] (or [0, C]) in the caller's edge order; and, to ``keep`` for
    the backward, stat [N, 3, C] (or [0, 3, C]). C may be [H, D].

    To masked heads a row has no edges.
    """
    logits, on_rows = inputs.logits, mask.rows
    row_ptr, col, edge = rows.row_walk
    n, channels = row_ptr.shape[0] - 1, logits.shape[1:]
    wide = accumulator(logits)
    o = logits.new_empty(n, *channels)
    lse = logits.new_empty(n, *channels, dtype=wide)
    stat = lse.new_empty(n if results.keep else 0, 3, channels.numel())
    weights = logits.new_empty(edge.shape[0] if results.return_weights else 0, *channels)
    if on_rows is not None:
        o.zero_(), weights.zero_(), lse.fill_(-math.inf)
    size, (s_in, v_in, x_in, o_out, lse_out, p_out) = _views(
        *inputs, o, lse, weights, apart=on_rows is not None
    )
    stats = stat.view(-1, 3, *size)
    log_eps = math.log(logit.eps) if logit.eps else -math.inf
    every_edge = walk_edges(row_ptr, col, edge)
    for at, edges, chunks in _blocks(size, every_edge, on_rows):
        row_ptr, row, col, edge = edges.rows.ptr, edges.row, edges.rows.other, edges.edge
        for some, slots in chunks:
            ptr, number = row_ptr[some.start : some.stop + 1] - slots.start, edge[slots]
            owner = row[slots] - some.start
            p, _ = _logits(s_in, number, at, logit, wide)
            pivot = pivots(p, ptr)[0] if len(number) else p.new_zeros(len(ptr) - 1, 1)
            p.sub_(pivot.index_select(0, owner)).exp_()
            walk = make_walk(ptr, torch.arange(len(number), dtype=ptr.dtype))
            total = spmm(walk, None, p)
            x = _values(v_in, x_in, col[slots], number, at, wide)
            mean = spmm(walk, None, x.mul_(p))
            empty = total == 0.0  # without edges, or without a finite logit
            norm = total.reciprocal().masked_fill_(empty, 0.0)
            grown = total.log_()
            top = grown + pivot
            _put(lse_out, some, at, top)
            share = 1 / (1 + (log_eps - top).exp()) if logit.eps else None  # r
            rate = norm if share is None else norm * share
            mean.mul_(rate)
            if not bool(mean.sum().isfinite()):
                # weights may be large, or many: they are divided before the sum
                x = _values(v_in, x_in, col[slots], number, at, wide)
                x.mul_(p * rate.index_select(0, owner))
                torch.where(mean.isfinite(), mean, spmm(walk, None, x), out=mean)
            mean.masked_fill_(empty, 0.0)
            _put(o_out, some, at, mean)
            if results.keep:
                # where the sum is large, its reciprocal times small gradients would be lost
                moved = torch.where(grown > _LARGE, pivot + grown, pivot)
                norm = norm * (moved - pivot).exp_()
                pivot = moved.masked_fill(empty, math.inf)
                for i, y in enumerate((pivot, norm, mean)):
                    _put(stats[:, i], some, at, y)
            if results.return_weights:
                _put(p_out, number.long(), at, p.mul_(rate.index_select(0, owner)))
    return o, lse, weights, stat


@torch.no_grad()
def channelwise_attention_bwd(
    upstream: ChannelwiseUpstream,
    inputs: ChannelwiseInputs,
    mask: HeadMask,
    walks: Walks,
    logit: ChannelwiseLogit,
    needs: ChannelwiseNeeds,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dlogits [E, C], dv [M, C], dedge_value [E, C]; empty where not needed."""
    (do, dlse, stat), (logits, v, _), on_rows = upstream, inputs, mask.rows
    wide, log_eps = stat.dtype, math.log(logit.eps) if logit.eps else -math.inf
    make = logits.new_empty if on_rows is None else logits.new_zeros
    ds = make(logits.shape if needs.need_logits else (0,))
    dx = make(logits.shape if needs.need_edge_value else (0,))
    dv = make(v.shape if needs.need_v and v is not None else (0,))
    size, (s_in, v_in, x_in, do_in, dlse_in) = _views(*inputs, do, dlse, apart=on_rows is not None)
    ds_out, dx_out, dv_out = (x.view(-1, *size) for x in (ds, dx, dv))
    stats = stat.view(-1, 3, *size)
    row_ptr, col, edge = walks.row_walk
    every_edge = walk_edges(row_ptr, col, edge, columns=walks.column_walk)
    for at, edges, chunks in _blocks(size, every_edge, on_rows):
        row, col, edge, occupied = edges.row, edges.rows.other, edges.edge, edges.occupied
        # dx of all edges in row order: the one temporary that is as large as an input
        heads, inner = (len(range(*part.indices(k))) for part, k in zip(at, size, strict=True))
        every = stat.new_empty(edge.shape[0] if needs.need_v else 0, heads * inner)
        for some, slots in chunks:
            number, owner = edge[slots], row[slots] - some.start
            pivot, norm, mean = (_take(stats[:, i], some, at, wide) for i in range(3))
            dead = (norm == 0.0).logical_and_(occupied[some, None])  # no finite logit
            some_dead = bool(dead.any())
            u = _take(do_in, some, at, wide) * norm
            if logit.eps:
                u /= 1 + (log_eps - pivot + norm.log()).exp()
            if some_dead:
                u.masked_fill_(dead, 0.0)
            e, through = _logits(s_in, number, at, logit, wide)
            e.sub_(pivot.index_select(0, owner)).exp_()
            dx_some = u.index_select(0, owner)
            dx_some = torch.mul(dx_some, e, out=every[slots] if needs.need_v else dx_some)
            if needs.need_edge_value:
                _put(dx_out, number.long(), at, dx_some)
            if needs.need_logits:
                x = _values(v_in, x_in, col[slots], number, at, wide)
                x.sub_(mean.index_select(0, owner)).mul_(dx_some)
                if dlse_in is not None:
                    h = _take(dlse_in, some, at, wide) * norm
                    x.addcmul_(h.index_select(0, owner), e)
                if some_dead:
                    x.masked_fill_(dead.index_select(0, owner), 0.0)
                if through is not None:
                    x.masked_fill_(~through, 0.0)
                _put(ds_out, number.long(), at, x)
        if needs.need_v:
            columns = edges.cols._replace(other=edges.slot)
            _put(dv_out, slice(None), at, spmm(columns, None, every))
    return ds, dv, dx


def _views(*tensors: Tensor | None, apart: bool) -> tuple[tuple[int, int], list[Any]]:
    """-> (H, D), and all tensors as [N, H, D]: H is 1 where all have their heads side by side, but
    if heads are to stay ``apart``."""
    present = [x for x in tensors if x is not None]
    size = present[0].shape[1:]
    flat = all(x.ndim == 2 or x.stride(1) == x.shape[2] * x.stride(2) for x in present)
    if flat and not apart:
        views = [None if x is None else x.flatten(1)[:, None] for x in tensors]
        return (1, size.numel()), views
    return (size[0], size[1]), list(tensors)


_Block = tuple[slice, slice]  # heads, channels
_Chunk = tuple[slice, slice]  # rows, their slots


def _blocks(
    size: tuple[int, int], edges: Edges, on_rows: Tensor | None
) -> Iterator[tuple[_Block, Edges, list[_Chunk]]]:
    """Blocks of channels, the edges that they go over, and those in chunks of whole rows."""
    ptr = edges.rows.ptr
    longest = int(ptr.diff().max()) if ptr.shape[0] > 1 else 0
    width = _WIDE if longest * _WIDE <= _CHUNK else _NARROW
    together, inner = max(1, width // size[1]), min(width, size[1])
    room = _CHUNK // (min(together, size[0]) * inner)
    chunks = list(_chunks(ptr, room))
    for heads, some in runs(size[0], together, edges, on_rows):
        mine = chunks if some is edges else list(_chunks(some.rows.ptr, room))
        for d in range(0, size[1], inner):
            yield (heads, slice(d, min(d + inner, size[1]))), some, mine


def _chunks(ptr: Tensor, room: int) -> Iterator[tuple[slice, slice]]:
    """Rows of up to ``room`` edges together, and up to so many rows; one of more edges alone."""
    first, begin, n, total = 0, 0, ptr.shape[0] - 1, int(ptr[-1])
    while first < n:
        fits = int(torch.searchsorted(ptr, min(begin + room, total), right=True)) - 1
        last = min(max(fits, first + 1), first + room, n)
        end = int(ptr[last])
        yield slice(first, last), slice(begin, end)
        first, begin = last, end


def _take(x: Tensor, index: Tensor | slice, at: _Block, dtype: torch.dtype) -> Tensor:
    """Rows of some channels of ``x [N, H, D]``, [rows, channels]: a copy for an index of rows."""
    x = x[:, at[0], at[1]]
    if isinstance(index, slice):
        return x[index].flatten(1).to(dtype)
    shape = index.shape[0], *x.shape[1:]
    # channels that share a number are fetched once
    for dim in (1, 2):
        x = x.narrow(dim, 0, 1) if x.stride(dim) == 0 else x
    return x.index_select(0, index).expand(shape).contiguous().flatten(1).to(dtype)


def _put(x: Tensor, index: Tensor | slice, at: _Block, y: Tensor) -> None:
    """Write rows [rows, channels] into ``x [N, H, D]``."""
    x = x[:, at[0], at[1]]
    y = y.unflatten(1, x.shape[1:])
    if isinstance(index, slice):
        x[index] = y
    else:
        x.index_copy_(0, index, y.to(x.dtype))


def _logits(
    s: Tensor, number: Tensor, at: _Block, logit: ChannelwiseLogit, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The clamped logits of some edges, and which ones the clamp let through."""
    y, through = _take(s, number, at, dtype), None
    if logit.low > -math.inf or logit.high < math.inf:
        through = (y >= logit.low) & (y <= logit.high)
        y.clamp_(logit.low, logit.high)
    return y, through


def _values(
    v: Tensor | None,
    edge_value: Tensor | None,
    col: Tensor,
    number: Tensor,
    at: _Block,
    dtype: torch.dtype,
) -> Tensor:
    """v_j + edge_value_ij of some edges, or the one that is there."""
    if v is None:
        assert edge_value is not None
        return _take(edge_value, number, at, dtype)
    x = _take(v, col, at, dtype)
    return x if edge_value is None else x.add_(_take(edge_value, number, at, dtype))

"""Backward of channelwise attention, in the symbols of ``channelwise_attention.py``.

The edges kernel walks the rows and writes ds, dx = dedge_value (with do = 1 these are the weights),
c and u. The columns kernel sums dx into dv. Every element has one writer and every sum one order,
hence no atomics and the same bits every time.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention import on_edges
from .attention_combine import combine_columns
from .buckets import COUNTS, sum_lanes, take, wholes_and_parts
from .channelwise_tile import (
    active_channels,
    load_logits,
    load_messages,
    load_values,
    plan,
    store,
    table,
)
from .configs import log
from .edge_tile import eps_share
from .loads import scalar, sum_dtype


class EdgeResults(NamedTuple):
    """What the edges kernel writes; None where it is not needed."""

    ds: Any  # [E, C]
    dx: Any  # [E, C]
    cu: Any  # [N, 2, C]: c and u


def channelwise_attention_bwd(upstream, inputs, mask, walks, logit, needs):
    """-> dlogits [E, C], dv [M, C], dedge_value [E, C]; empty where not needed."""
    (logits, v, _), stat = inputs, upstream.stat
    n, channels = stat.shape[0], stat.shape[2]
    ds = on_edges(logits, mask.rows, *(logits.shape if needs.need_logits else (0,)))
    dv = logits.new_empty(v.shape if needs.need_v else (0,))
    dx = on_edges(logits, mask.rows, *(logits.shape if needs.need_edge_value else (0,)))
    cu = stat.new_empty(n, 2, channels) if needs.need_v else None
    if n and any(needs):
        out = EdgeResults(
            ds if needs.need_logits else None, dx if needs.need_edge_value else None, cu
        )
        fill_edges(out, upstream, inputs, mask, walks.row_walk, logit)
    if needs.need_v and v.shape[0]:
        _fill_columns(dv, cu, inputs, mask, walks.column_walk, logit)
    return ds, dv, dx


def fill_edges(out, upstream, inputs, mask, walk, logit):
    """Write those ``EdgeResults`` that are there."""
    do, dlse, stat = upstream
    call = plan(walk, stat.shape[0], mask.rows, logit, inputs, do, dlse)
    numbers = logit.low, logit.high, log(logit.eps)
    _channelwise_attention_bwd_edges_kernel[call.grid](
        call.x,
        call.do,
        call.dlse,
        call.active,
        stat,
        out,
        call.walk,
        *call.counts,
        *numbers,
        **call.meta,
    )


def _fill_columns(dv, cu, inputs, mask, walk, logit):
    """Write dv [M, C]."""
    columns, channels = dv.shape[0], cu.shape[2]
    call = plan(walk, columns, mask.cols, logit, inputs._replace(v=None, edge_value=None))
    part = None
    if call.split is not None:
        part = cu.new_empty(call.counts[2], channels, 1)
    _channelwise_attention_bwd_columns_kernel[call.grid](
        call.x.logits,
        call.active,
        cu,
        dv,
        part,
        call.walk,
        *call.counts,
        logit.low,
        logit.high,
        **call.meta,
    )
    if call.counts[2]:
        combine_columns(dv.view(columns, channels, 1), part, call.split)


@triton.jit(do_not_specialize=COUNTS)
def _channelwise_attention_bwd_edges_kernel(
    x,
    do,  # [N, C]
    dlse,  # [N, C]
    active,  # [N, H]
    stat_ptr,  # [N, 3, C]: c, n and m
    out,
    walk,
    num_rows,
    num_middle,
    num_segments,
    low: tl.float64,
    high: tl.float64,
    log_eps: tl.float64,
    T: tl.constexpr,
):
    """Grid (row groups, channel blocks): u of BLOCK_R rows, or of one, and ds and dx of their
    edges, or of those of one segment."""
    NEED_S: tl.constexpr = out.ds is not None
    row, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    channel = tl.program_id(1) * T.BLOCK_C + tl.arange(0, T.BLOCK_C)
    if active is not None:
        on = active_channels(active, row, mine, channel, T)  # [R, C]
        end = tl.where(tl.max(on.to(tl.int32), 1) > 0, end, begin)
    low, high = scalar(low, sum_dtype(T.WIDE)), scalar(high, sum_dtype(T.WIDE))

    own, there = row[:, None], mine[:, None, None]
    at, mask = table(3 * T.C, own, there, channel, T)
    pivot = tl.load(stat_ptr + at, mask=mask, other=0.0)  # [R, 1, C]
    norm = tl.load(stat_ptr + at + T.C, mask=mask, other=0.0)
    mean = tl.load(stat_ptr + at + 2 * T.C, mask=mask, other=0.0)
    u = load_values(do, own, there, channel, T.DO_ALIGN, T)
    # where no edge counts, neither do the upstream gradients, finite or not
    some = norm != 0.0
    lse = pivot - tl.log(tl.where(some, norm, 1.0))
    u = tl.where(some, norm * eps_share(lse, log_eps, sum_dtype(T.WIDE)) * u, 0.0)
    h = tl.zeros_like(u)
    if dlse is not None:
        h = tl.where(some, norm * load_values(dlse, own, there, channel, 1, T), 0.0)
    if out.cu is not None:
        # of the programs that share a row, the one that has its first edge
        first = mine & (begin == tl.load(walk.ptr + row, mask=mine, other=0))
        at, mask = table(2 * T.C, own, first[:, None, None], channel, T)
        tl.store(out.cu + at, pivot, mask=mask)
        tl.store(out.cu + at + T.C, u, mask=mask)
    if NEED_S or out.dx is not None:
        for step in range(0, tl.max(end - begin), stride):
            slot = begin[:, None] + step + tl.arange(0, T.BLOCK_E)[None, :]  # [R, E]
            live = slot < end[:, None]
            here = live[:, :, None]
            if active is not None:
                here &= on[:, None, :]
            edge = tl.load(walk.edge + slot, mask=live, other=0)
            col = edge
            if NEED_S and x.v is not None:
                col = tl.load(walk.other + slot, mask=live, other=0)
            s, through = load_logits(x.logits, edge, here, channel, low, high, T)
            e = tl.exp(s - pivot)
            dx = e * u
            edge_at, edge_mask = table(T.C, edge, here, channel, T)
            if out.dx is not None:
                tl.store(out.dx + edge_at, dx.to(out.dx.dtype.element_ty), mask=edge_mask)
            if NEED_S:
                value = load_messages(x, col, edge, here, channel, T)
                ds = tl.where(through & some, dx * (value - mean) + e * h, 0.0)
                tl.store(out.ds + edge_at, ds.to(out.ds.dtype.element_ty), mask=edge_mask)


@triton.jit(do_not_specialize=COUNTS)
def _channelwise_attention_bwd_columns_kernel(
    logits,  # [E, C]
    active,  # [M, H]
    cu_ptr,  # [N, 2, C]: c and u
    dv_ptr,  # [M, C]
    part_ptr,  # of segments: [S, C]
    walk,
    num_rows,  # of columns
    num_middle,
    num_segments,
    low: tl.float64,
    high: tl.float64,
    T: tl.constexpr,
):
    """Grid (column groups, channel blocks): dv of BLOCK_R columns, or of one, or of a segment."""
    col, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    channel = tl.program_id(1) * T.BLOCK_C + tl.arange(0, T.BLOCK_C)
    if active is not None:
        on = active_channels(active, col, mine, channel, T)  # [R, C]
        end = tl.where(tl.max(on.to(tl.int32), 1) > 0, end, begin)
    low, high = scalar(low, sum_dtype(T.WIDE)), scalar(high, sum_dtype(T.WIDE))
    acc = tl.full([T.BLOCK_R, T.BLOCK_E, T.BLOCK_C], 0.0, sum_dtype(T.WIDE))
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + tl.arange(0, T.BLOCK_E)[None, :]  # [R, E]
        live = slot < end[:, None]
        here = live[:, :, None]
        if active is not None:
            here &= on[:, None, :]
        row = tl.load(walk.other + slot, mask=live, other=0)
        edge = tl.load(walk.edge + slot, mask=live, other=0)
        at, mask = table(2 * T.C, row, here, channel, T)
        pivot = tl.load(cu_ptr + at, mask=mask, other=0.0)
        u = tl.load(cu_ptr + at + T.C, mask=mask, other=0.0)
        s, _ = load_logits(logits, edge, here, channel, low, high, T)
        acc += tl.exp(s - pivot) * u
    BUCKETS: tl.constexpr = walk.few is not None
    dv = sum_lanes(acc, num_middle, num_segments, BUCKETS)  # [R, C]
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    store(dv_ptr, T.C, col, whole, channel, dv, T)
    if BUCKETS:
        store(part_ptr, T.C, segment, part, channel, dv, T)

"""Channelwise (vector) attention: softmax over the edges of each row, channel by channel.

    s_ij = clamp(logit_ij),   x_ij = v_j + edge_value_ij
    o_i  = r_i sum_j p_ij x_ij,   p_ij = exp(s_ij) / Z_i,   Z_i = sum_j exp(s_ij) = exp(lse_i)

with r = Z / (Z + eps), all of it vectors of C channels that never meet. A program takes BLOCK_R x
BLOCK_E edges at a time, for BLOCK_C channels: of BLOCK_R rows that have few edges, of one row that
has more, or of one segment of a row that has too many for one program (see ``fastgt/tiles.py``):

    row 0 | e e e e | e e e . |          [R, E] indices
    row 1 | e . . . |         |          [R, E, C] gathered tiles: logits and edge values by the
             step 0    step 1            caller's number of the edge, values by its column

In the forward each of the R x E lanes keeps its own running maximum, sum and weighted sum, so a
step has no reduction at all; lanes meet once, after the last step, and the segments of a row in the
combine kernel. What the backward needs of a row is kept in the accumulator's precision: the pivot c
(its largest logit), n = 1 / sum_j exp(s_ij - c) and o before its rounding, here m. Unlike the lse,
which is rounded as a large logit is, they give p = n exp(s - c) without another sum over the row.
With the gradient g of the lse, u = r n do and h = n g:

    dx_ij = exp(s_ij - c_i) u_i,   ds_ij = dx_ij (x_ij - m_i) + exp(s_ij - c_i) h_i

so equal values give no logit gradient, whatever the output was rounded to. The edges kernel walks
the rows and writes ds, dx = dedge_value (with do = 1 these are the weights), c and u; the columns
kernel sums dx into dv. Every element has one writer and every sum one order, hence no atomics and
the same bits every time.
"""

import math

import triton
import triton.language as tl

from .attention import active_heads, on_edges
from .attention_combine import combine_columns
from .buckets import take_rows
from .configs import FILLERS, accumulator, attention_tile, clamps, log, power_of_2
from .edge_tile import kept_share
from .loads import scalar

_COUNTS = ["num_rows", "num_middle", "num_segments"]
_WIDEST = 128  # channels of a program
_BLOCK_S = 4
_COMBINED = 256  # channels of a program that combines: a row is split seldom


@triton.jit(do_not_specialize=_COUNTS)
def _channelwise_attention_fwd_kernel(
    s_ptr, v_ptr, x_ptr,  # [E, C] logits, [M, C], [E, C] edge values
    o_ptr, lse_ptr, stat_ptr,  # [N, C], [N, C], [N, 3, C]: c, n and m
    part_ptr,  # of segments: [S, 3, C] maximum, sum and weighted sum
    row_ptr, col_ptr, edge_ptr,  # [N + 1], [E], [E]
    few_ptr, middle_ptr, segment_ptr,
    s_stride, v_stride, x_stride,  # (row, head, channel); outputs are contiguous
    num_rows, num_middle, num_segments,
    low: tl.float64, high: tl.float64, log_eps: tl.float64,
    C: tl.constexpr, D: tl.constexpr, CLAMP: tl.constexpr, HAS_V: tl.constexpr,
    HAS_EDGE: tl.constexpr, KEEP: tl.constexpr, BUCKETS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    S_ALIGN: tl.constexpr, ALIGN: tl.constexpr,
    active_ptr=None, active_stride=None, WIDTH: tl.constexpr = 1,  # [N, H], channels of a head
):  # fmt: skip
    """Grid (row groups, channel blocks): one program owns BLOCK_R rows, or one, or a segment."""
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    row, mine, begin, end, stride = take_rows(
        row_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if active_ptr is not None:
        on = _load_active(active_ptr, active_stride, row, mine, channel, C, WIDTH)  # [R, C]
        end = tl.where(tl.max(on.to(tl.int32), 1) > 0, end, begin)
    lane = tl.arange(0, BLOCK_E)
    low, high = scalar(low, ACC), scalar(high, ACC)

    lane_max = tl.full([BLOCK_R, BLOCK_E, BLOCK_C], float("-inf"), ACC)
    lane_sum = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_C], ACC)
    acc = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_C], ACC)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]  # [R, E]
        live = slot < end[:, None]
        here = live[:, :, None]
        if active_ptr is not None:
            here &= on[:, None, :]
        edge = tl.load(edge_ptr + slot, mask=live, other=0)
        col = tl.load(col_ptr + slot, mask=live, other=0) if HAS_V else edge
        s, _ = _logits(
            s_ptr, s_stride, edge, here, channel, low, high, C, D, CLAMP, BLOCK_C, S_ALIGN, ACC
        )
        x = _values(
            v_ptr, v_stride, x_ptr, x_stride, col, edge, here, channel,
            C, D, HAS_V, HAS_EDGE, BLOCK_C, ALIGN, ACC,
        )  # fmt: skip
        new_max = tl.maximum(lane_max, s)
        # a lane without a finite logit so far keeps -inf; a finite pivot avoids inf - inf
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp(lane_max - pivot)
        p = tl.exp(s - pivot)  # [R, E, C]
        acc = acc * decay + p * x
        lane_sum = lane_sum * decay + p
        lane_max = new_max

    top = tl.max(lane_max, 1)  # [R, C]
    pivot = tl.where(top == float("-inf"), 0.0, top)
    decay = tl.exp(lane_max - pivot[:, None, :])
    total = tl.sum(lane_sum * decay, 1)
    acc = tl.sum(acc * decay, 1)
    if BUCKETS:
        if tl.program_id(0) < num_segments + num_middle:
            # the lanes of all R "rows" belong to one
            mine = mine & (tl.arange(0, BLOCK_R) == 0)
            row_top = tl.max(top, 0)
            pivot_one = tl.where(row_top == float("-inf"), 0.0, row_top)
            decay_one = tl.exp(top - pivot_one[None, :])
            total = tl.sum(total * decay_one, 0)[None, :] + tl.zeros_like(total)
            acc = tl.sum(acc * decay_one, 0)[None, :] + tl.zeros_like(acc)
            top = row_top[None, :] + tl.zeros_like(top)
        if tl.program_id(0) < num_segments:
            part = tl.program_id(0).to(tl.int64) + tl.zeros([BLOCK_R], tl.int64)
            _store(part_ptr, 3 * C, part, mine, channel, top, C, BLOCK_C)
            _store(part_ptr + C, 3 * C, part, mine, channel, total, C, BLOCK_C)
            _store(part_ptr + 2 * C, 3 * C, part, mine, channel, acc, C, BLOCK_C)
            mine = mine & (row < 0)  # nothing else is stored
    _finish_rows(
        top, total, acc, row, mine, channel, log_eps, o_ptr, lse_ptr, stat_ptr, C, KEEP, BLOCK_C
    )


@triton.jit
def _channelwise_attention_combine_kernel(
    part_ptr, split_ptr,  # [S, 3, C], [P, 3]
    o_ptr, lse_ptr, stat_ptr, log_eps: tl.float64,
    C: tl.constexpr, KEEP: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (split rows, channel blocks): one program owns one row, and takes BLOCK_S of its
    segments at a time."""
    ACC: tl.constexpr = part_ptr.dtype.element_ty
    split = split_ptr + 3 * tl.program_id(0).to(tl.int64)
    row, begin = tl.load(split).to(tl.int64), tl.load(split + 1).to(tl.int64)
    end = tl.load(split + 2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    top = tl.full([BLOCK_S, 1, BLOCK_C], float("-inf"), ACC)
    total = tl.zeros([BLOCK_S, 1, BLOCK_C], ACC)
    acc = tl.zeros([BLOCK_S, 1, BLOCK_C], ACC)
    for first in range(begin, end, BLOCK_S):
        part = (first + tl.arange(0, BLOCK_S).to(tl.int64))[:, None]
        at, mask = _address(
            (3 * C, 0, 1), part, (part < end)[:, :, None], channel, C, C, BLOCK_C, 1
        )
        part_top = tl.load(part_ptr + at, mask=mask, other=float("-inf"))
        part_total = tl.load(part_ptr + at + C, mask=mask, other=0.0)
        part_acc = tl.load(part_ptr + at + 2 * C, mask=mask, other=0.0)
        new_top = tl.maximum(top, part_top)
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay, part_decay = tl.exp(top - pivot), tl.exp(part_top - pivot)
        acc = acc * decay + part_acc * part_decay
        total = total * decay + part_total * part_decay
        top = new_top
    row_top = tl.max(top, 0)  # [1, C]
    pivot = tl.where(row_top == float("-inf"), 0.0, row_top)
    decay = tl.exp(top - pivot[None, :, :])
    total, acc = tl.sum(total * decay, 0), tl.sum(acc * decay, 0)
    one = tl.zeros([1], tl.int64) + row
    _finish_rows(
        row_top, total, acc, one, one >= 0, channel, log_eps, o_ptr, lse_ptr, stat_ptr,
        C, KEEP, BLOCK_C,
    )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def _channelwise_attention_bwd_edges_kernel(
    s_ptr, v_ptr, x_ptr, do_ptr, dlse_ptr, stat_ptr,
    ds_ptr, dx_ptr, cu_ptr,  # [E, C], [E, C], [N, 2, C]: c and u
    row_ptr, col_ptr, edge_ptr, few_ptr, middle_ptr, segment_ptr,
    s_stride, v_stride, x_stride, do_stride, dlse_stride,
    num_rows, num_middle, num_segments,
    low: tl.float64, high: tl.float64, log_eps: tl.float64,
    C: tl.constexpr, D: tl.constexpr, CLAMP: tl.constexpr, HAS_V: tl.constexpr,
    HAS_EDGE: tl.constexpr, HAS_DLSE: tl.constexpr, NEED_S: tl.constexpr, NEED_V: tl.constexpr,
    NEED_EDGE: tl.constexpr, BUCKETS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
    S_ALIGN: tl.constexpr, ALIGN: tl.constexpr, DO_ALIGN: tl.constexpr,
    active_ptr=None, active_stride=None, WIDTH: tl.constexpr = 1,
):  # fmt: skip
    """Grid (row groups, channel blocks): u of BLOCK_R rows, or of one, and ds and dx of their
    edges, or of those of one segment."""
    ACC: tl.constexpr = stat_ptr.dtype.element_ty
    row, mine, begin, end, stride = take_rows(
        row_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if active_ptr is not None:
        on = _load_active(active_ptr, active_stride, row, mine, channel, C, WIDTH)  # [R, C]
        end = tl.where(tl.max(on.to(tl.int32), 1) > 0, end, begin)
    lane = tl.arange(0, BLOCK_E)
    low, high = scalar(low, ACC), scalar(high, ACC)

    at, mask = _address((3 * C, 0, 1), row[:, None], mine[:, None, None], channel, C, C, BLOCK_C, 1)
    pivot = tl.load(stat_ptr + at, mask=mask, other=0.0)  # [R, 1, C]
    norm = tl.load(stat_ptr + at + C, mask=mask, other=0.0)
    mean = tl.load(stat_ptr + at + 2 * C, mask=mask, other=0.0)
    at, mask = _address(
        do_stride, row[:, None], mine[:, None, None], channel, C, D, BLOCK_C, DO_ALIGN
    )
    do = tl.load(do_ptr + at, mask=mask, other=0.0).to(ACC)
    # where no edge counts, neither do the upstream gradients, finite or not
    some = norm != 0.0
    lse = pivot - tl.log(tl.where(some, norm, 1.0))
    u = tl.where(some, norm * kept_share(lse, log_eps, ACC) * do, 0.0)
    h = tl.zeros_like(u)
    if HAS_DLSE:
        at, mask = _address(
            dlse_stride, row[:, None], mine[:, None, None], channel, C, D, BLOCK_C, 1
        )
        h = tl.where(some, norm * tl.load(dlse_ptr + at, mask=mask, other=0.0).to(ACC), 0.0)
    if NEED_V:
        # of the programs that share a row, the one that has its first edge
        owns = mine & (begin == tl.load(row_ptr + row, mask=mine, other=0))
        at, mask = _address(
            (2 * C, 0, 1), row[:, None], owns[:, None, None], channel, C, C, BLOCK_C, 1
        )
        tl.store(cu_ptr + at, pivot, mask=mask)
        tl.store(cu_ptr + at + C, u, mask=mask)
    if NEED_S or NEED_EDGE:
        for step in range(0, tl.max(end - begin), stride):
            slot = begin[:, None] + step + lane[None, :]
            live = slot < end[:, None]
            here = live[:, :, None]
            if active_ptr is not None:
                here &= on[:, None, :]
            edge = tl.load(edge_ptr + slot, mask=live, other=0)
            col = tl.load(col_ptr + slot, mask=live, other=0) if HAS_V and NEED_S else edge
            s, through = _logits(
                s_ptr, s_stride, edge, here, channel, low, high, C, D, CLAMP, BLOCK_C, S_ALIGN, ACC
            )
            e = tl.exp(s - pivot)
            dx = e * u
            edge_at, edge_mask = _address((C, 0, 1), edge, here, channel, C, C, BLOCK_C, 1)
            if NEED_EDGE:
                tl.store(dx_ptr + edge_at, dx.to(dx_ptr.dtype.element_ty), mask=edge_mask)
            if NEED_S:
                x = _values(
                    v_ptr, v_stride, x_ptr, x_stride, col, edge, here, channel,
                    C, D, HAS_V, HAS_EDGE, BLOCK_C, ALIGN, ACC,
                )  # fmt: skip
                ds = tl.where(through & some, dx * (x - mean) + e * h, 0.0)
                tl.store(ds_ptr + edge_at, ds.to(ds_ptr.dtype.element_ty), mask=edge_mask)


@triton.jit(do_not_specialize=_COUNTS)
def _channelwise_attention_bwd_columns_kernel(
    s_ptr, cu_ptr,
    dv_ptr, part_ptr,  # [M, C]; of segments: [S, C]
    col_ptr, row_ptr, edge_ptr,  # [M + 1], [E], [E]
    few_ptr, middle_ptr, segment_ptr,
    s_stride,
    num_rows, num_middle, num_segments,  # of columns
    low: tl.float64, high: tl.float64,
    C: tl.constexpr, D: tl.constexpr, CLAMP: tl.constexpr, BUCKETS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, S_ALIGN: tl.constexpr,
    active_ptr=None, active_stride=None, WIDTH: tl.constexpr = 1,
):  # fmt: skip
    """Grid (column groups, channel blocks): dv of BLOCK_R columns, or of one, or of a segment."""
    ACC: tl.constexpr = cu_ptr.dtype.element_ty
    col, mine, begin, end, stride = take_rows(
        col_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if active_ptr is not None:
        on = _load_active(active_ptr, active_stride, col, mine, channel, C, WIDTH)  # [R, C]
        end = tl.where(tl.max(on.to(tl.int32), 1) > 0, end, begin)
    lane = tl.arange(0, BLOCK_E)
    low, high = scalar(low, ACC), scalar(high, ACC)
    acc = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_C], ACC)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]
        live = slot < end[:, None]
        here = live[:, :, None]
        if active_ptr is not None:
            here &= on[:, None, :]
        row = tl.load(row_ptr + slot, mask=live, other=0)
        edge = tl.load(edge_ptr + slot, mask=live, other=0)
        at, mask = _address((2 * C, 0, 1), row, here, channel, C, C, BLOCK_C, 1)
        pivot = tl.load(cu_ptr + at, mask=mask, other=0.0)
        u = tl.load(cu_ptr + at + C, mask=mask, other=0.0)
        s, _ = _logits(
            s_ptr, s_stride, edge, here, channel, low, high, C, D, CLAMP, BLOCK_C, S_ALIGN, ACC
        )
        acc += tl.exp(s - pivot) * u
    dv = tl.sum(acc, 1)  # [R, C]
    if BUCKETS:
        if tl.program_id(0) < num_segments + num_middle:
            mine = mine & (tl.arange(0, BLOCK_R) == 0)
            dv = tl.sum(dv, 0)[None, :] + tl.zeros_like(dv)
        if tl.program_id(0) < num_segments:
            part = tl.program_id(0).to(tl.int64) + tl.zeros([BLOCK_R], tl.int64)
            _store(part_ptr, C, part, mine, channel, dv, C, BLOCK_C)
            mine = mine & (col < 0)  # nothing else is stored
    _store(dv_ptr, C, col, mine, channel, dv, C, BLOCK_C)


@triton.jit
def _load_active(ptr, stride, row, mine, channel, C: tl.constexpr, WIDTH: tl.constexpr):
    """Which channels [C] of ``row`` [R] belong to heads that are not masked: [R, C]."""
    at = row.to(tl.int64)[:, None] * stride[0]
    at += (channel // WIDTH).to(tl.int64)[None, :] * stride[1]
    return tl.load(ptr + at, mask=mine[:, None] & (channel < C)[None, :], other=0) != 0


@triton.jit
def _finish_rows(
    top, total, acc, row, mine, channel, log_eps, o_ptr, lse_ptr, stat_ptr,
    C: tl.constexpr, KEEP: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From the maximum, sum and weighted sum [R, C] of whole rows: o, lse and what is kept."""
    empty = total == 0.0
    pivot = tl.where(empty, 0.0, top)
    norm = 1.0 / tl.where(empty, 1.0, total)
    lse = pivot - tl.log(norm)
    o = tl.where(empty, 0.0, acc * norm * kept_share(lse, log_eps, total.dtype))
    _store(o_ptr, C, row, mine, channel, o, C, BLOCK_C)
    lse = tl.where(empty, float("-inf"), lse)
    _store(lse_ptr, C, row, mine, channel, lse, C, BLOCK_C)
    if KEEP:
        # no edge of an empty row gets a weight: exp(-inf - inf) = 0
        pivot, norm = tl.where(empty, float("inf"), pivot), tl.where(empty, 0.0, norm)
        _store(stat_ptr, 3 * C, row, mine, channel, pivot, C, BLOCK_C)
        _store(stat_ptr + C, 3 * C, row, mine, channel, norm, C, BLOCK_C)
        _store(stat_ptr + 2 * C, 3 * C, row, mine, channel, o, C, BLOCK_C)


@triton.jit
def _logits(
    ptr, stride, edge, live, channel, low, high,
    C: tl.constexpr, D: tl.constexpr, CLAMP: tl.constexpr, BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """-> clamped logits [R, E, C], -inf where not ``live`` [R, E, 1 or C]; and which the clamp let
    through."""
    at, mask = _address(stride, edge, live, channel, C, D, BLOCK_C, ALIGN)
    s = tl.load(ptr + at, mask=mask, other=0.0).to(ACC)
    through = live
    if CLAMP:
        # comparisons, not minimum and maximum: NaN must stay NaN
        through &= (s >= low) & (s <= high)
        s = tl.where(s < low, low, tl.where(s > high, high, s))
    return tl.where(live, s, float("-inf")), through


@triton.jit
def _values(
    v_ptr, v_stride, x_ptr, x_stride, col, edge, live, channel,
    C: tl.constexpr, D: tl.constexpr, HAS_V: tl.constexpr, HAS_EDGE: tl.constexpr,
    BLOCK_C: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """v_j + edge_value_ij of edges [R, E], or the one that is there: -> [R, E, C]."""
    if HAS_V:
        at, mask = _address(v_stride, col, live, channel, C, D, BLOCK_C, ALIGN)
        x = tl.load(v_ptr + at, mask=mask, other=0.0).to(ACC)
    if HAS_EDGE:
        at, mask = _address(x_stride, edge, live, channel, C, D, BLOCK_C, ALIGN)
        edge_x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
        x = x + edge_x if HAS_V else edge_x
    return x


@triton.jit
def _store(ptr, row_stride, row, mine, channel, x, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows ``row`` [R] of a tensor with contiguous channels; casts [R, C] to its dtype."""
    at, mask = _address(
        (row_stride, 0, 1), row[:, None], mine[:, None, None], channel, C, C, BLOCK_C, 1
    )
    tl.store(ptr + at, x[:, None, :].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _address(
    stride, row, live, channel,
    C: tl.constexpr, D: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Of channels [C] of the rows ``row`` [R, E]: -> offsets and mask [R, E, C].

    D < C: heads of D channels that do not stand one after the other.
    """
    # every row and head starts at a multiple of ALIGN, see _address in loads.py
    first = row.to(tl.int64)[:, :, None] * (stride[0] // ALIGN)
    c = channel.to(tl.int64)
    if D != C:
        first = first + (c // D * (stride[1] // ALIGN))[None, None, :]
        c = c % D
    mask = live
    if C % BLOCK_C != 0:
        mask &= (channel < C)[None, None, :]
    return first * ALIGN + (c * stride[2])[None, None, :], mask


def channelwise_attention_fwd(inputs, mask, rows, logit, results):
    """-> o, lse [N, C]; weights [E, C] (or [0, C]) in the caller's edge order; and, to ``keep`` for
    the backward, stat [N, 3, C] (or [0, 3, C]). C may be [H, D].

    To masked heads a row has no edges.
    """
    (logits, v, edge_value), on_rows, (low, high, eps) = inputs, mask.rows, logit
    (keep, return_weights), rows = results, rows.row_walk
    n, channels = rows[0].shape[0] - 1, logits.shape[1:]
    o = logits.new_empty(n, *channels)
    lse = logits.new_empty(n, *channels, dtype=accumulator(logits))
    kept = keep or return_weights
    stat = lse.new_empty(n if kept else 0, 3, channels.numel())
    weights = on_edges(logits, on_rows, rows[1].shape[0] if return_weights else 0, *channels)
    if not n:
        return o, lse, weights, stat
    *walk, split = _walk(rows)
    d, strides = _layout(logits, v, edge_value)
    meta, grid, counts = _plan(logits, n, walk, on_rows)
    parts = part = None
    if walk[5] is not None:
        parts = counts[2]
        part = lse.new_empty(parts, 3, meta["C"])
    _channelwise_attention_fwd_kernel[grid](
        logits, v, edge_value, o, lse, stat, part, *walk, *strides, *counts, low, high, log(eps),
        D=d, CLAMP=clamps(low, high), HAS_V=v is not None, HAS_EDGE=edge_value is not None,
        KEEP=kept, S_ALIGN=_aligned(logits, *strides[:1]), ALIGN=_aligned(logits, *strides[1:]),
        **meta,
    )  # fmt: skip
    if parts:
        block_c = min(_COMBINED, power_of_2(meta["C"]))
        grid = split.shape[0] - FILLERS, -(-meta["C"] // block_c)
        _channelwise_attention_combine_kernel[grid](
            part, split, o, lse, stat, log(eps), C=meta["C"], KEEP=kept, BLOCK_S=_BLOCK_S,
            BLOCK_C=block_c, num_warps=max(1, _BLOCK_S * block_c // 256),
        )  # fmt: skip
    if return_weights:
        one = logits.new_ones(()).expand(o.shape)
        outputs = None, weights, None
        _edges(outputs, one, None, logits, v, edge_value, on_rows, stat, walk, low, high, eps)
    return o, lse, weights, stat if keep else stat.new_empty(0, 3, meta["C"])


def channelwise_attention_bwd(upstream, inputs, mask, walks, logit, needs):
    """-> dlogits [E, C], dv [M, C], dedge_value [E, C]; empty where not needed."""
    (do, dlse, stat), (logits, v, edge_value), (on_rows, on_cols) = upstream, inputs, mask
    (rows, columns), (low, high, eps) = walks, logit
    need_logits, need_v, need_edge_value = needs
    n, channels = stat.shape[0], stat.shape[2]
    ds = on_edges(logits, on_rows, *(logits.shape if need_logits else (0,)))
    dv = logits.new_empty(v.shape if need_v else (0,))
    dx = on_edges(logits, on_rows, *(logits.shape if need_edge_value else (0,)))
    cu = stat.new_empty(n, 2, channels) if need_v else None
    if n and (need_logits or need_v or need_edge_value):
        outputs = ds if need_logits else None, dx if need_edge_value else None, cu
        *walk, _ = _walk(rows)
        _edges(outputs, do, dlse, logits, v, edge_value, on_rows, stat, walk, low, high, eps)
    if need_v and v.shape[0]:
        *walk, split = _walk(columns)
        d, strides = _layout(logits)
        meta, grid, counts = _plan(logits, v.shape[0], walk, on_cols)
        parts = part = None
        if walk[5] is not None:
            parts = counts[2]
            part = stat.new_empty(parts, channels, 1)
        _channelwise_attention_bwd_columns_kernel[grid](
            logits, cu, dv, part, *walk, *strides, *counts, low, high,
            D=d, CLAMP=clamps(low, high), S_ALIGN=_aligned(logits, *strides), **meta,
        )  # fmt: skip
        if parts:
            combine_columns(dv.view(v.shape[0], channels, 1), part, split)
    return ds, dv, dx


def _edges(outputs, do, dlse, logits, v, edge_value, on_rows, stat, walk, low, high, eps):
    """Fill those of ds, dx and cu that are there."""
    ds, dx, cu = outputs
    d, strides = _layout(logits, v, edge_value, do, dlse)
    meta, grid, counts = _plan(logits, stat.shape[0], walk, on_rows)
    _channelwise_attention_bwd_edges_kernel[grid](
        logits, v, edge_value, do, dlse, stat, ds, dx, cu, *walk, *strides,
        *counts, low, high, log(eps),
        D=d, CLAMP=clamps(low, high), HAS_V=v is not None, HAS_EDGE=edge_value is not None,
        HAS_DLSE=dlse is not None, NEED_S=ds is not None, NEED_V=cu is not None,
        NEED_EDGE=dx is not None, S_ALIGN=_aligned(logits, *strides[:1]),
        ALIGN=_aligned(logits, *strides[1:3]), DO_ALIGN=_aligned(logits, strides[3]), **meta,
    )  # fmt: skip


def _walk(walk):
    """A CSR walk with its buckets, None where rows are taken as they stand."""
    return walk if len(walk) > 3 else (*walk, None, None, None, None)


def _plan(logits, num_rows, walk, active):
    channels = logits.shape[1:].numel()
    # a program has one head, or part of one, where some may be masked
    block_c = min(_WIDEST, power_of_2(channels if active is None else logits.shape[2]))
    tile = attention_tile(1, block_c, logits.element_size())
    if logits.element_size() == 8 and tile.block_r > 1:
        # as much for each thread, but with fewer of them sm_90's compiler spills nothing
        tile = tile._replace(block_r=tile.block_r // 2, num_warps=max(1, tile.num_warps // 2))
    counts = num_rows, 0, 0
    if walk[3] is not None:
        counts = tuple(x.shape[0] - FILLERS for x in walk[3:])
    meta = {
        "C": channels,
        "BUCKETS": walk[3] is not None,
        "BLOCK_R": tile.block_r,
        "BLOCK_E": tile.block_e,
        "BLOCK_C": block_c,
        "num_warps": tile.num_warps,
    }
    if active is not None:
        meta |= {**active_heads(active), "WIDTH": logits.shape[2]}
    programs = -(-counts[0] // tile.block_r) + counts[1] + counts[2]
    return meta, (programs, -(-channels // block_c)), counts


def _layout(*tensors):
    """-> D and each one's strides (row, head, channel) for the kernels.

    Heads are there only if some tensor's do not stand one after the other, as those of shared
    planes, whose strides are 0; D is C elsewhere.
    """
    present = [x for x in tensors if x is not None]
    flat = all(x.ndim == 2 or x.stride(1) == x.shape[2] * x.stride(2) for x in present)
    if flat:
        strides = [(0, 0, 1) if x is None else (x.stride(0), 0, x.stride(-1)) for x in tensors]
        return present[0].shape[1:].numel(), strides
    return present[0].shape[2], [(0, 0, 1) if x is None else x.stride() for x in tensors]


def _aligned(x, *strides):
    """Channels that every row and head starts at a multiple of, up to 16 bytes."""
    align = 16 // x.element_size()
    for row, head, channel in strides:
        align = math.gcd(align, row, head) if channel == 1 else 1
    return align

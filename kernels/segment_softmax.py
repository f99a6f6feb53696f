"""Softmax of an edge tensor over the edges of each row, channel by channel.

    y_ij = exp(x_ij - pivot_i) / sum_j exp(x_ij - pivot_i),   pivot_i = max_j x_ij
    dx_ij = y_ij (dy_ij - delta_i),   delta_i = sum_j y_ij dy_ij / sum_j y_ij

Two passes over the row walk each way, in the tiles of ``channels.py``: what belongs to a row, then
what belongs to its edges. The sum in delta is 1 but for the rounding of y: divided by it, a
constant dy gives no gradient, however y was rounded.
"""

import triton
import triton.language as tl

from .attention_combine import _split_row
from .buckets import COUNTS, sum_lanes, take, wholes_and_parts
from .channels import (
    combining,
    gather,
    lanes,
    load_index,
    load_table,
    next_slots,
    own_channels,
    parts,
    plan,
    store_table,
)
from .configs import accumulator
from .loads import rows_of, store_channels


def segment_softmax_fwd(x, rows):
    """-> y [E, D] in the caller's edge order."""
    n, (num_edges, width) = rows[0].shape[0] - 1, x.shape
    y = x.new_empty(num_edges, width)
    if not num_edges or not width:
        return y
    call = plan(rows, n, width, (x,))
    walk, gathered = (call.walk, *call.counts), rows_of(x)
    pivot, norm = (x.new_empty(n, width, dtype=accumulator(x)) for _ in range(2))
    part, part_norm = parts(call, x), parts(call, x)
    _softmax_rows_kernel[call.grid](gathered, pivot, norm, part, part_norm, *walk, **call.meta)
    if call.counts[2]:
        grid, meta = combining(call)
        _softmax_combine_kernel[grid](part, part_norm, call.split, pivot, norm, **meta)
    _softmax_edges_kernel[call.grid](gathered, pivot, norm, y, *walk, **call.meta)
    return y


def segment_softmax_bwd(dy, y, rows):
    """-> dx [E, D] in the caller's edge order."""
    n, (num_edges, width) = rows[0].shape[0] - 1, y.shape
    dx = y.new_empty(num_edges, width)
    if not num_edges or not width:
        return dx
    call = plan(rows, n, width, (y, dy))
    walk, gathered = (call.walk, *call.counts), (rows_of(y), rows_of(dy))
    delta = y.new_empty(n, width, dtype=accumulator(y))
    part, part_norm = parts(call, y), parts(call, y)
    _softmax_bwd_rows_kernel[call.grid](*gathered, delta, part, part_norm, *walk, **call.meta)
    if call.counts[2]:
        grid, meta = combining(call)
        _softmax_bwd_combine_kernel[grid](part, part_norm, call.split, delta, **meta)
    _softmax_bwd_edges_kernel[call.grid](*gathered, delta, dx, *walk, **call.meta)
    return dx


@triton.jit(do_not_specialize=COUNTS)
def _softmax_rows_kernel(
    x,  # [E, D]
    pivot_ptr,  # [N, D]
    norm_ptr,  # [N, D]
    part_ptr,  # of segments: [S, D]
    part_norm_ptr,
    walk,
    num_rows,
    num_middle,
    num_segments,
    T: tl.constexpr,
):
    """Grid (row groups, channel blocks): pivot and factor of rows; of segments, maximum and sum."""
    row, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    channel = own_channels(T)
    lane_max = lanes(float("-inf"), T)
    lane_sum = lanes(0.0, T)
    for step in range(0, tl.max(end - begin), stride):
        slot, live = next_slots(begin, end, step, T)
        s = gather(x, load_index(walk.edge, slot, live), live, channel, T)
        s = tl.where(live[:, :, None], s, float("-inf"))
        new_max = tl.maximum(lane_max, s)
        pivot = _finite(new_max)
        lane_sum = lane_sum * tl.exp(lane_max - pivot) + tl.exp(s - pivot)
        lane_max = new_max
    top = tl.max(lane_max, 1)  # [R, C]
    BUCKETS: tl.constexpr = walk.few is not None
    if BUCKETS:
        one = tl.program_id(0) < num_segments + num_middle
        if one:
            top = tl.max(top, 0)[None, :] + tl.zeros_like(top)
    pivot = _finite(top)
    total = lane_sum * tl.exp(lane_max - pivot[:, None, :])
    total = sum_lanes(total, num_middle, num_segments, BUCKETS)
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    norm = 1.0 / tl.where(total == 0.0, 1.0, total)
    store_table(pivot_ptr, row, whole, channel, pivot, T.D)
    store_table(norm_ptr, row, whole, channel, norm, T.D)
    if BUCKETS:
        store_table(part_ptr, segment, part, channel, top, T.D)
        store_table(part_norm_ptr, segment, part, channel, total, T.D)


@triton.jit(do_not_specialize=COUNTS)
def _softmax_edges_kernel(
    x,  # [E, D]
    pivot_ptr,  # [N, D]
    norm_ptr,  # [N, D]
    y_ptr,  # [E, D]
    walk,
    num_rows,
    num_middle,
    num_segments,
    T: tl.constexpr,
):
    """Grid (row groups, channel blocks): y of the edges of BLOCK_R rows, or one, or a segment."""
    row, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    channel = own_channels(T)
    pivot = load_table(pivot_ptr, row[:, None], mine[:, None], channel, T.D)
    norm = load_table(norm_ptr, row[:, None], mine[:, None], channel, T.D)
    for step in range(0, tl.max(end - begin), stride):
        slot, live = next_slots(begin, end, step, T)
        edge = load_index(walk.edge, slot, live)
        s = gather(x, edge, live, channel, T)
        store_channels(y_ptr, edge, live, channel, tl.exp(s - pivot) * norm, T.D)


@triton.jit(do_not_specialize=COUNTS)
def _softmax_bwd_rows_kernel(
    y,  # [E, D]
    dy,  # [E, D]
    delta_ptr,  # [N, D]
    part_ptr,  # of segments: [S, D]
    part_norm_ptr,
    walk,
    num_rows,
    num_middle,
    num_segments,
    T: tl.constexpr,
):
    """Grid (row groups, channel blocks): delta of rows; of segments, its two sums."""
    row, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    channel = own_channels(T)
    sum_y = lanes(0.0, T)
    sum_ydy = lanes(0.0, T)
    for step in range(0, tl.max(end - begin), stride):
        slot, live = next_slots(begin, end, step, T)
        edge = load_index(walk.edge, slot, live)
        p = gather(y, edge, live, channel, T)
        sum_y += p
        sum_ydy += p * gather(dy, edge, live, channel, T)
    BUCKETS: tl.constexpr = walk.few is not None
    total = sum_lanes(sum_y, num_middle, num_segments, BUCKETS)
    delta = sum_lanes(sum_ydy, num_middle, num_segments, BUCKETS)
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    if BUCKETS:
        store_table(part_ptr, segment, part, channel, delta, T.D)
        store_table(part_norm_ptr, segment, part, channel, total, T.D)
    delta /= tl.where(total == 0.0, 1.0, total)
    store_table(delta_ptr, row, whole, channel, delta, T.D)


@triton.jit(do_not_specialize=COUNTS)
def _softmax_bwd_edges_kernel(
    y,  # [E, D]
    dy,  # [E, D]
    delta_ptr,  # [N, D]
    dx_ptr,  # [E, D]
    walk,
    num_rows,
    num_middle,
    num_segments,
    T: tl.constexpr,
):
    """Grid (row groups, channel blocks): dx of the edges of BLOCK_R rows, or one, or a segment."""
    row, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    channel = own_channels(T)
    delta = load_table(delta_ptr, row[:, None], mine[:, None], channel, T.D)
    for step in range(0, tl.max(end - begin), stride):
        slot, live = next_slots(begin, end, step, T)
        edge = load_index(walk.edge, slot, live)
        p = gather(y, edge, live, channel, T)
        dp = gather(dy, edge, live, channel, T)
        store_channels(dx_ptr, edge, live, channel, p * (dp - delta), T.D)


@triton.jit
def _softmax_combine_kernel(
    part_ptr,  # [S, D]
    part_norm_ptr,  # [S, D]
    split_ptr,  # [P, 3]
    pivot_ptr,  # [N, D]
    norm_ptr,  # [N, D]
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (split rows, channel blocks): pivot and factor of one row."""
    ACC: tl.constexpr = part_ptr.dtype.element_ty
    row, begin, end = _split_row(split_ptr)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lane_max = tl.full([1, BLOCK_S, BLOCK_D], float("-inf"), ACC)
    lane_sum = tl.zeros([1, BLOCK_S, BLOCK_D], ACC)
    for at in range(begin, end, BLOCK_S):
        part = at + tl.arange(0, BLOCK_S).to(tl.int64)[None, :]
        live = part < end
        top = load_table(part_ptr, part, live, channel, D)
        top = tl.where(live[:, :, None], top, float("-inf"))
        total = load_table(part_norm_ptr, part, live, channel, D)
        new_max = tl.maximum(lane_max, top)
        pivot = _finite(new_max)
        lane_sum = lane_sum * tl.exp(lane_max - pivot) + total * tl.exp(top - pivot)
        lane_max = new_max
    pivot = _finite(tl.max(lane_max, 1))  # [1, C]
    total = tl.sum(lane_sum * tl.exp(lane_max - pivot[:, None, :]), 1)
    norm = 1.0 / tl.where(total == 0.0, 1.0, total)
    one = tl.zeros([1], tl.int64) + row
    store_table(pivot_ptr, one, one >= 0, channel, pivot, D)
    store_table(norm_ptr, one, one >= 0, channel, norm, D)


@triton.jit
def _softmax_bwd_combine_kernel(
    part_ptr,  # [S, D]
    part_norm_ptr,  # [S, D]
    split_ptr,  # [P, 3]
    delta_ptr,  # [N, D]
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (split rows, channel blocks): delta of one row."""
    ACC: tl.constexpr = part_ptr.dtype.element_ty
    row, begin, end = _split_row(split_ptr)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    delta = tl.zeros([1, BLOCK_S, BLOCK_D], ACC)
    total = tl.zeros([1, BLOCK_S, BLOCK_D], ACC)
    for at in range(begin, end, BLOCK_S):
        part = at + tl.arange(0, BLOCK_S).to(tl.int64)[None, :]
        live = part < end
        delta += load_table(part_ptr, part, live, channel, D)
        total += load_table(part_norm_ptr, part, live, channel, D)
    norm = tl.sum(total, 1)
    mean = tl.sum(delta, 1) / tl.where(norm == 0.0, 1.0, norm)
    one = tl.zeros([1], tl.int64) + row
    store_table(delta_ptr, one, one >= 0, channel, mean, D)


@triton.jit
def _finite(top):
    """A pivot: 0 where nothing is finite, so that exp(-inf - pivot) is 0."""
    return tl.where(top == float("-inf"), 0.0, top)

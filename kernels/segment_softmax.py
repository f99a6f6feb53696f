"""Softmax of an edge tensor over the edges of each row, channel by channel.

    y_ij = exp(x_ij - pivot_i) / sum_j exp(x_ij - pivot_i),   pivot_i = max_j x_ij
    dx_ij = y_ij (dy_ij - delta_i),   delta_i = sum_j y_ij dy_ij / sum_j y_ij

Two passes over the row walk each way, in the tiles of ``aggregate.py``: what belongs to a row, then
what belongs to its edges. The sum in delta is 1 but for the rounding of y: divided by it, a
constant dy gives no gradient, however y was rounded.
"""

import triton
import triton.language as tl

from .aggregate import COUNTS, combining, parts, plan
from .attention_combine import _split_row
from .buckets import sum_lanes, take_rows, wholes_and_parts
from .configs import accumulator
from .loads import load_channels, store_channels


@triton.jit(do_not_specialize=COUNTS)
def _softmax_rows_kernel(
    x_ptr,  # [E, D]
    pivot_ptr, norm_ptr, part_ptr, part_norm_ptr,  # [N, D] twice; of segments: [S, D] twice
    row_ptr, col_ptr, edge_ptr, few_ptr, middle_ptr, segment_ptr,
    x_stride, num_rows, num_middle, num_segments,
    D: tl.constexpr, BUCKETS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (row groups, channel blocks): pivot and factor of rows; of segments, maximum and sum."""
    row, mine, begin, end, stride = take_rows(
        row_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_E)
    lane_max = tl.full([BLOCK_R, BLOCK_E, BLOCK_D], float("-inf"), ACC)
    lane_sum = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_D], ACC)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]
        live = slot < end[:, None]
        edge = tl.load(edge_ptr + slot, mask=live, other=0)
        x = load_channels(x_ptr, x_stride, edge, live, channel, D, ALIGN).to(ACC)
        x = tl.where(live[:, :, None], x, float("-inf"))
        new_max = tl.maximum(lane_max, x)
        pivot = _finite(new_max)
        lane_sum = lane_sum * tl.exp(lane_max - pivot) + tl.exp(x - pivot)
        lane_max = new_max
    top = tl.max(lane_max, 1)  # [R, C]
    if BUCKETS:
        one = tl.program_id(0) < num_segments + num_middle
        if one:
            top = tl.max(top, 0)[None, :] + tl.zeros_like(top)
    pivot = _finite(top)
    total = lane_sum * tl.exp(lane_max - pivot[:, None, :])
    total = sum_lanes(total, num_middle, num_segments, BUCKETS)
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    norm = 1.0 / tl.where(total == 0.0, 1.0, total)
    store_channels(pivot_ptr, row[:, None], whole[:, None], channel, pivot[:, None, :], D)
    store_channels(norm_ptr, row[:, None], whole[:, None], channel, norm[:, None, :], D)
    if BUCKETS:
        at, live = segment[:, None], part[:, None]
        store_channels(part_ptr, at, live, channel, top[:, None, :], D)
        store_channels(part_norm_ptr, at, live, channel, total[:, None, :], D)


@triton.jit(do_not_specialize=COUNTS)
def _softmax_edges_kernel(
    x_ptr, pivot_ptr, norm_ptr, y_ptr,  # [E, D], [N, D], [N, D], [E, D]
    row_ptr, col_ptr, edge_ptr, few_ptr, middle_ptr, segment_ptr,
    x_stride, num_rows, num_middle, num_segments,
    D: tl.constexpr, BUCKETS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (row groups, channel blocks): y of the edges of BLOCK_R rows, or one, or a segment."""
    row, mine, begin, end, stride = take_rows(
        row_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_E)
    pivot = load_channels(pivot_ptr, (D, 1), row[:, None], mine[:, None], channel, D, 1)
    norm = load_channels(norm_ptr, (D, 1), row[:, None], mine[:, None], channel, D, 1)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]
        live = slot < end[:, None]
        edge = tl.load(edge_ptr + slot, mask=live, other=0)
        x = load_channels(x_ptr, x_stride, edge, live, channel, D, ALIGN).to(ACC)
        store_channels(y_ptr, edge, live, channel, tl.exp(x - pivot) * norm, D)


@triton.jit(do_not_specialize=COUNTS)
def _softmax_bwd_rows_kernel(
    y_ptr, dy_ptr,  # [E, D]
    delta_ptr, part_ptr, part_norm_ptr,  # [N, D]; of segments: [S, D] twice
    row_ptr, col_ptr, edge_ptr, few_ptr, middle_ptr, segment_ptr,
    y_stride, dy_stride, num_rows, num_middle, num_segments,
    D: tl.constexpr, BUCKETS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (row groups, channel blocks): delta of rows; of segments, its two sums."""
    row, mine, begin, end, stride = take_rows(
        row_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_E)
    sum_y = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_D], ACC)
    sum_ydy = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_D], ACC)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]
        live = slot < end[:, None]
        edge = tl.load(edge_ptr + slot, mask=live, other=0)
        y = load_channels(y_ptr, y_stride, edge, live, channel, D, ALIGN).to(ACC)
        dy = load_channels(dy_ptr, dy_stride, edge, live, channel, D, ALIGN).to(ACC)
        sum_y += y
        sum_ydy += y * dy
    total = sum_lanes(sum_y, num_middle, num_segments, BUCKETS)
    delta = sum_lanes(sum_ydy, num_middle, num_segments, BUCKETS)
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    if BUCKETS:
        at, live = segment[:, None], part[:, None]
        store_channels(part_ptr, at, live, channel, delta[:, None, :], D)
        store_channels(part_norm_ptr, at, live, channel, total[:, None, :], D)
    delta /= tl.where(total == 0.0, 1.0, total)
    store_channels(delta_ptr, row[:, None], whole[:, None], channel, delta[:, None, :], D)


@triton.jit(do_not_specialize=COUNTS)
def _softmax_bwd_edges_kernel(
    y_ptr, dy_ptr, delta_ptr, dx_ptr,  # [E, D], [E, D], [N, D], [E, D]
    row_ptr, col_ptr, edge_ptr, few_ptr, middle_ptr, segment_ptr,
    y_stride, dy_stride, num_rows, num_middle, num_segments,
    D: tl.constexpr, BUCKETS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (row groups, channel blocks): dx of the edges of BLOCK_R rows, or one, or a segment."""
    row, mine, begin, end, stride = take_rows(
        row_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_E)
    delta = load_channels(delta_ptr, (D, 1), row[:, None], mine[:, None], channel, D, 1)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]
        live = slot < end[:, None]
        edge = tl.load(edge_ptr + slot, mask=live, other=0)
        y = load_channels(y_ptr, y_stride, edge, live, channel, D, ALIGN).to(ACC)
        dy = load_channels(dy_ptr, dy_stride, edge, live, channel, D, ALIGN).to(ACC)
        store_channels(dx_ptr, edge, live, channel, y * (dy - delta), D)


@triton.jit
def _softmax_combine_kernel(
    part_ptr, part_norm_ptr, split_ptr, pivot_ptr, norm_ptr,  # [S, D] twice, [P, 3], [N, D] twice
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (split rows, channel blocks): pivot and factor of one row."""
    ACC: tl.constexpr = part_ptr.dtype.element_ty
    row, begin, end = _split_row(split_ptr)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lane_max = tl.full([1, BLOCK_S, BLOCK_D], float("-inf"), ACC)
    lane_sum = tl.zeros([1, BLOCK_S, BLOCK_D], ACC)
    for at in range(begin, end, BLOCK_S):
        part = at + tl.arange(0, BLOCK_S).to(tl.int64)[None, :]
        live = part < end
        top = load_channels(part_ptr, (D, 1), part, live, channel, D, 1)
        top = tl.where(live[:, :, None], top, float("-inf"))
        total = load_channels(part_norm_ptr, (D, 1), part, live, channel, D, 1)
        new_max = tl.maximum(lane_max, top)
        pivot = _finite(new_max)
        lane_sum = lane_sum * tl.exp(lane_max - pivot) + total * tl.exp(top - pivot)
        lane_max = new_max
    pivot = _finite(tl.max(lane_max, 1))  # [1, C]
    total = tl.sum(lane_sum * tl.exp(lane_max - pivot[:, None, :]), 1)
    norm = 1.0 / tl.where(total == 0.0, 1.0, total)
    one = tl.zeros([1, 1], tl.int64) + row
    store_channels(pivot_ptr, one, one >= 0, channel, pivot[:, None, :], D)
    store_channels(norm_ptr, one, one >= 0, channel, norm[:, None, :], D)


@triton.jit
def _softmax_bwd_combine_kernel(
    part_ptr, part_norm_ptr, split_ptr, delta_ptr,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (split rows, channel blocks): delta of one row."""
    ACC: tl.constexpr = part_ptr.dtype.element_ty
    row, begin, end = _split_row(split_ptr)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    delta = tl.zeros([1, BLOCK_S, BLOCK_D], ACC)
    total = tl.zeros([1, BLOCK_S, BLOCK_D], ACC)
    for at in range(begin, end, BLOCK_S):
        part = at + tl.arange(0, BLOCK_S).to(tl.int64)[None, :]
        live = part < end
        delta += load_channels(part_ptr, (D, 1), part, live, channel, D, 1)
        total += load_channels(part_norm_ptr, (D, 1), part, live, channel, D, 1)
    norm = tl.sum(total, 1)
    mean = tl.sum(delta, 1) / tl.where(norm == 0.0, 1.0, norm)
    one = tl.zeros([1, 1], tl.int64) + row
    store_channels(delta_ptr, one, one >= 0, channel, mean[:, None, :], D)


@triton.jit
def _finite(top):
    """A pivot: 0 where nothing is finite, so that exp(-inf - pivot) is 0."""
    return tl.where(top == float("-inf"), 0.0, top)


def segment_softmax_fwd(x, rows):
    """-> y [E, D] in the caller's edge order."""
    n, (num_edges, width) = rows[0].shape[0] - 1, x.shape
    y = x.new_empty(num_edges, width)
    if not num_edges or not width:
        return y
    call = plan(rows, n, width, (x,))
    pivot, norm = (x.new_empty(n, width, dtype=accumulator(x)) for _ in range(2))
    part, part_norm = parts(call, x), parts(call, x)
    _softmax_rows_kernel[call.grid](
        x, pivot, norm, part, part_norm, *call.walk, x.stride(), *call.counts, **call.meta
    )
    if call.counts[2]:
        grid, meta = combining(call)
        _softmax_combine_kernel[grid](part, part_norm, call.split, pivot, norm, **meta)
    _softmax_edges_kernel[call.grid](
        x, pivot, norm, y, *call.walk, x.stride(), *call.counts, **call.meta
    )
    return y


def segment_softmax_bwd(dy, y, rows):
    """-> dx [E, D] in the caller's edge order."""
    n, (num_edges, width) = rows[0].shape[0] - 1, y.shape
    dx = y.new_empty(num_edges, width)
    if not num_edges or not width:
        return dx
    call = plan(rows, n, width, (y, dy))
    delta = y.new_empty(n, width, dtype=accumulator(y))
    part, part_norm = parts(call, y), parts(call, y)
    strides = y.stride(), dy.stride()
    _softmax_bwd_rows_kernel[call.grid](
        y, dy, delta, part, part_norm, *call.walk, *strides, *call.counts, **call.meta
    )
    if call.counts[2]:
        grid, meta = combining(call)
        _softmax_bwd_combine_kernel[grid](part, part_norm, call.split, delta, **meta)
    _softmax_bwd_edges_kernel[call.grid](
        y, dy, delta, dx, *call.walk, *strides, *call.counts, **call.meta
    )
    return dx

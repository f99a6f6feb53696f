"""Messages of the neighbours, summed, averaged or their maximum, without storing one.

    m_ij = act(x_j + e_ij),   o_i = sum_j m_ij   or   sum_j m_ij / n_i   or   max_j m_ij
    dm_ij = do_i   or   do_i / n_i   or   do_i where ij is the first of the largest, else 0
    de_ij = act'(x_j + e_ij) dm_ij,   dx_j = sum_i de_ij

A program takes BLOCK_R x BLOCK_E edges at a time, for BLOCK_D channels: of BLOCK_R rows that have
few edges, of one row that has more, or of one segment of a row that has too many for one program
(see ``fastgt/tiles.py``):

    row 0 | e e e e | e e e . |          [R, E] indices
    row 1 | e . . . |         |          [R, E, D] gathered tile: rows of x and of e
             step 0    step 1

Each of the R x E lanes keeps its own sum or maximum; lanes meet once, after the last step, and the
segments of a row meet in a kernel of their own. The forward walks the rows. The backward walks
the columns, where a program that owns x_j writes both dx_j and de_ij: every output element has one
writer, in a fixed order, hence no atomics and the same bits every time.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attention_combine import _split_row
from .buckets import sum_lanes, take_rows, wholes_and_parts
from .configs import FILLERS, accumulator, attention_tile, power_of_2, stride
from .loads import load_channels, store_channels

COUNTS = ["num_rows", "num_middle", "num_segments"]
BLOCK_S = 4  # segments at a time
_CHANNELS = 128  # of a program, at most


@triton.jit
def _message(
    x_ptr, value_ptr, x_stride, value_stride, col, edge, live, channel,
    D: tl.constexpr, HAS_X: tl.constexpr, HAS_VALUE: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x_j + e_ij before the activation, [R, E, C]."""
    if HAS_X:
        m = load_channels(x_ptr, x_stride, col, live, channel, D, ALIGN).to(ACC)
        if HAS_VALUE:
            m += load_channels(value_ptr, value_stride, edge, live, channel, D, ALIGN).to(ACC)
    else:
        m = load_channels(value_ptr, value_stride, edge, live, channel, D, ALIGN).to(ACC)
    return m


@triton.jit(do_not_specialize=COUNTS)
def _aggregate_fwd_kernel(
    x_ptr, value_ptr,  # [M, D], [E, D]
    o_ptr, part_ptr,  # [N, D]; of segments: [S, D]
    row_ptr, col_ptr, edge_ptr,  # [N + 1], [E], [E]
    few_ptr, middle_ptr, segment_ptr,
    x_stride, value_stride,  # (node or edge, channel); outputs are contiguous
    num_rows, num_middle, num_segments,
    D: tl.constexpr, MEAN: tl.constexpr, RELU: tl.constexpr,
    HAS_X: tl.constexpr, HAS_VALUE: tl.constexpr, BUCKETS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (row groups, channel blocks): one program owns BLOCK_R rows, or one, or a segment."""
    row, mine, begin, end, stride = take_rows(
        row_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_E)
    acc = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_D], ACC)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]  # [R, E]
        live = slot < end[:, None]
        col = tl.load(col_ptr + slot, mask=live, other=0) if HAS_X else slot
        edge = tl.load(edge_ptr + slot, mask=live, other=0) if HAS_VALUE else slot
        m = _message(
            x_ptr, value_ptr, x_stride, value_stride, col, edge, live, channel,
            D, HAS_X, HAS_VALUE, ALIGN, ACC,
        )  # fmt: skip
        if RELU:
            m = tl.where(m < 0.0, 0.0, m)  # not a maximum: NaN must stay NaN
        acc += m
    total = sum_lanes(acc, num_middle, num_segments, BUCKETS)  # [R, C]
    if MEAN:
        total /= _degree(row_ptr, row, mine, ACC)[:, None]
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    store_channels(o_ptr, row[:, None], whole[:, None], channel, total[:, None, :], D)
    if BUCKETS:
        store_channels(part_ptr, segment[:, None], part[:, None], channel, total[:, None, :], D)


@triton.jit(do_not_specialize=COUNTS)
def _aggregate_max_kernel(
    x_ptr, value_ptr,
    o_ptr, first_ptr, part_ptr, part_first_ptr,  # [N, D] twice; of segments: [S, D] twice
    row_ptr, col_ptr, edge_ptr, few_ptr, middle_ptr, segment_ptr,
    x_stride, value_stride,
    num_rows, num_middle, num_segments,
    D: tl.constexpr, RELU: tl.constexpr, NONE: tl.constexpr,
    HAS_X: tl.constexpr, HAS_VALUE: tl.constexpr, BUCKETS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (row groups, channel blocks): the largest message and the least number of its edges."""
    row, mine, begin, end, stride = take_rows(
        row_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_E)
    top = tl.full([BLOCK_R, BLOCK_E, BLOCK_D], float("-inf"), ACC)
    first = tl.full([BLOCK_R, BLOCK_E, BLOCK_D], NONE, edge_ptr.dtype.element_ty)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]
        live = slot < end[:, None]
        col = tl.load(col_ptr + slot, mask=live, other=0) if HAS_X else slot
        edge = tl.load(edge_ptr + slot, mask=live, other=0)
        m = _message(
            x_ptr, value_ptr, x_stride, value_stride, col, edge, live, channel,
            D, HAS_X, HAS_VALUE, ALIGN, ACC,
        )  # fmt: skip
        top, first = _larger(top, first, m, edge[:, :, None], live)
    row_top, row_first = _largest(top, first, NONE)  # [R, C]
    if BUCKETS:
        one = tl.program_id(0) < num_segments + num_middle
        if one:
            one_top, one_first = _largest(row_top[None, :, :], row_first[None, :, :], NONE)
            row_top = one_top + tl.zeros_like(row_top)
            row_first = one_first + tl.zeros_like(row_first)
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    if BUCKETS:
        at, live = segment[:, None], part[:, None]
        store_channels(part_ptr, at, live, channel, row_top[:, None, :], D)
        store_channels(part_first_ptr, at, live, channel, row_first[:, None, :], D)
    _store_largest(o_ptr, first_ptr, row, whole, channel, row_top, row_first, D, RELU, NONE)


@triton.jit(do_not_specialize=COUNTS)
def _aggregate_bwd_kernel(
    x_ptr, value_ptr, do_ptr, first_ptr,  # [M, D], [E, D], [N, D], [N, D]
    dx_ptr, dvalue_ptr, part_ptr,  # [M, D], [E, D]; of segments: [S, D]
    degree_ptr,  # [N + 1], the row walk's
    col_ptr, row_ptr, edge_ptr,  # [M + 1], [E], [E]
    few_ptr, middle_ptr, segment_ptr,
    x_stride, value_stride, do_stride,
    num_rows, num_middle, num_segments,  # of columns
    D: tl.constexpr, MEAN: tl.constexpr, MAX: tl.constexpr, RELU: tl.constexpr,
    HAS_X: tl.constexpr, HAS_VALUE: tl.constexpr,
    NEED_X: tl.constexpr, NEED_VALUE: tl.constexpr, BUCKETS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (column groups, channel blocks): dx and de of BLOCK_R columns, or one, or a segment."""
    col, mine, begin, end, stride = take_rows(
        col_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_E)
    if RELU and HAS_X:
        x = load_channels(x_ptr, x_stride, col[:, None], mine[:, None], channel, D, ALIGN).to(ACC)
    else:
        x = 0.0
    dx = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_D], ACC)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]
        live = slot < end[:, None]
        row = tl.load(row_ptr + slot, mask=live, other=0)
        has_edge: tl.constexpr = MAX or NEED_VALUE or (RELU and HAS_VALUE)
        edge = tl.load(edge_ptr + slot, mask=live, other=0) if has_edge else slot
        dm = load_channels(do_ptr, do_stride, row, live, channel, D, ALIGN).to(ACC)
        if MEAN:
            dm /= _degree(degree_ptr, row, live, ACC)[:, :, None]
        if MAX:
            first = load_channels(first_ptr, (D, 1), row, live, channel, D, 1)
            dm = tl.where(first == edge[:, :, None], dm, 0.0)
        if RELU:
            m = x + tl.zeros_like(dm)
            if HAS_VALUE:
                m += load_channels(value_ptr, value_stride, edge, live, channel, D, ALIGN).to(ACC)
            dm = tl.where(m <= 0.0, 0.0, dm)
        if NEED_X:
            dx += dm
        if NEED_VALUE:
            store_channels(dvalue_ptr, edge, live, channel, dm, D)
    if NEED_X:
        total = sum_lanes(dx, num_middle, num_segments, BUCKETS)
        whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
        store_channels(dx_ptr, col[:, None], whole[:, None], channel, total[:, None, :], D)
        if BUCKETS:
            store_channels(part_ptr, segment[:, None], part[:, None], channel, total[:, None, :], D)


@triton.jit
def _aggregate_combine_kernel(
    part_ptr, split_ptr, out_ptr,  # [S, D], [P, 3], [N, D]
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (split rows, channel blocks): the sum of the segments of one row."""
    row, begin, end = _split_row(split_ptr)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_S, 1, BLOCK_D], part_ptr.dtype.element_ty)
    for first in range(begin, end, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S).to(tl.int64)[:, None]
        acc += load_channels(part_ptr, (D, 1), part, part < end, channel, D, 1)
    one = tl.zeros([1, 1], tl.int64) + row
    store_channels(out_ptr, one, one >= 0, channel, tl.sum(acc, 0)[None, :, :], D)


@triton.jit
def _aggregate_combine_max_kernel(
    part_ptr, part_first_ptr, split_ptr, o_ptr, first_ptr,  # [S, D], [S, D], [P, 3], [N, D], [N, D]
    D: tl.constexpr, RELU: tl.constexpr, NONE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (split rows, channel blocks): the largest of the segments of one row."""
    row, begin, end = _split_row(split_ptr)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    top = tl.full([1, BLOCK_S, BLOCK_D], float("-inf"), part_ptr.dtype.element_ty)
    first = tl.full([1, BLOCK_S, BLOCK_D], NONE, part_first_ptr.dtype.element_ty)
    for at in range(begin, end, BLOCK_S):
        part = at + tl.arange(0, BLOCK_S).to(tl.int64)[None, :]
        live = part < end
        m = load_channels(part_ptr, (D, 1), part, live, channel, D, 1)
        edge = load_channels(part_first_ptr, (D, 1), part, live, channel, D, 1)
        top, first = _larger(top, first, m, edge, live)
    row_top, row_first = _largest(top, first, NONE)
    one = tl.zeros([1], tl.int64) + row
    _store_largest(o_ptr, first_ptr, one, one >= 0, channel, row_top, row_first, D, RELU, NONE)


@triton.jit
def _degree(ptr, row, live, ACC: tl.constexpr):
    """Edges of rows, at least 1."""
    at = ptr + row.to(tl.int64)
    end = tl.load(at + 1, mask=live, other=0)
    return tl.maximum(end - tl.load(at, mask=live, other=0), 1).to(ACC)


@triton.jit
def _larger(top, first, m, edge, live):
    """Of two values and edges [R, E, C], the larger one, NaN above all, or the lower edge."""
    new = (m > top) | ((m != m) & (top == top))
    equal = (m == top) | ((m != m) & (top != top))
    new = live[:, :, None] & (new | (equal & (edge < first)))
    return tl.where(new, m, top), tl.where(new, edge, first)


@triton.jit
def _largest(top, first, NONE: tl.constexpr):
    """``_larger`` over the lanes: [R, E, C] -> [R, C]."""
    nan = top != top
    value = tl.max(tl.where(nan, float("-inf"), top), 1)
    value = tl.where(tl.max(nan.to(tl.int32), 1) > 0, float("nan"), value)
    best = value[:, None, :]
    hit = (top == best) | (nan & (best != best))
    return value, tl.min(tl.where(hit, first, NONE), 1)


@triton.jit
def _store_largest(
    o_ptr, first_ptr, row, live, channel, top, first,
    D: tl.constexpr, RELU: tl.constexpr, NONE: tl.constexpr,
):  # fmt: skip
    """Maxima and their edges [R, C]: 0 and -1 where there is no edge."""
    none = first == NONE
    if RELU:
        none |= top <= 0.0  # as large, and without a gradient
    o, edge = tl.where(none, 0.0, top), tl.where(none, -1, first)
    store_channels(o_ptr, row[:, None], live[:, None], channel, o[:, None, :], D)
    store_channels(first_ptr, row[:, None], live[:, None], channel, edge[:, None, :], D)


def aggregate_fwd(x, edge_value, rows, reduce, relu):
    """-> o [N, D]; for a maximum the edge it was found on [N, D], -1 for none, else [0, D]."""
    like = edge_value if x is None else x
    n, width = rows[0].shape[0] - 1, like.shape[1]
    maximum = reduce == "max"
    o = like.new_empty(n, width)
    first = rows[2].new_empty(n if maximum else 0, width)
    if not n or not width:
        return o, first
    call = plan(rows, n, width, (x, edge_value))
    part = parts(call, like)
    inputs = {"RELU": relu, "HAS_X": x is not None, "HAS_VALUE": edge_value is not None}
    strides = stride(x), stride(edge_value)
    if maximum:
        none = torch.iinfo(first.dtype).max
        part_first = None if part is None else first.new_empty(part.shape)
        _aggregate_max_kernel[call.grid](
            x, edge_value, o, first, part, part_first, *call.walk, *strides, *call.counts,
            NONE=none, **inputs, **call.meta,
        )  # fmt: skip
        if call.counts[2]:
            grid, meta = combining(call)
            _aggregate_combine_max_kernel[grid](
                part, part_first, call.split, o, first, RELU=relu, NONE=none, **meta
            )
        return o, first
    _aggregate_fwd_kernel[call.grid](
        x, edge_value, o, part, *call.walk, *strides, *call.counts,
        MEAN=reduce == "mean", **inputs, **call.meta,
    )  # fmt: skip
    combine_sums(call, part, o)
    return o, first


def aggregate_bwd(do, x, edge_value, first, rows, columns, reduce, relu, need_x, need_edge):
    """-> dx [M, D], dedge [E, D] in the caller's edge order; empty where not needed."""
    m, num_edges, width = columns[0].shape[0] - 1, rows[2].shape[0], do.shape[1]
    dx = do.new_empty((m, width) if need_x else (0,))
    dedge = do.new_empty((num_edges, width) if need_edge else (0,))
    if not m or not width or not (need_x or need_edge):
        return dx, dedge
    maximum = reduce == "max"
    # a maximum that is not above 0 has no first edge
    relu = relu and not maximum
    x, edge_value = (x, edge_value) if relu else (None, None)
    call = plan(columns, m, width, (do, x, edge_value))
    part = parts(call, do) if need_x else None
    _aggregate_bwd_kernel[call.grid](
        x, edge_value, do, first if maximum else None, dx, dedge, part, rows[0], *call.walk,
        stride(x), stride(edge_value), do.stride(), *call.counts,
        MEAN=reduce == "mean", MAX=maximum, RELU=relu,
        HAS_X=x is not None, HAS_VALUE=edge_value is not None,
        NEED_X=need_x, NEED_VALUE=need_edge, **call.meta,
    )  # fmt: skip
    if need_x:
        combine_sums(call, part, dx)
    return dx, dedge


class Call(NamedTuple):
    """How the kernels of one launcher go through a walk."""

    walk: tuple  # pointers, other ends, edges; few, middle and segments, None without buckets
    split: torch.Tensor | None
    counts: tuple[int, int, int]  # of the last three; rows as they stand without buckets
    grid: tuple[int, int]
    meta: dict


def plan(walk, num_rows, width, tensors):
    """-> Call; ``tensors`` are the [N, D] ones that rows are loaded of, None for absent ones."""
    given = [x for x in tensors if x is not None]
    few, middle, segment, split = walk[3:] or (None,) * 4
    counts = num_rows, 0, 0
    if few is not None:
        counts = tuple(x.shape[0] - FILLERS for x in (few, middle, segment))
    block_d = min(power_of_2(width), _CHANNELS)
    tile = attention_tile(1, block_d, given[0].element_size())
    meta = {
        "D": width,
        "BUCKETS": few is not None,
        "BLOCK_R": tile.block_r,
        "BLOCK_E": tile.block_e,
        "BLOCK_D": block_d,
        "ALIGN": _alignment(given),
        "ACC": tl.float64 if given[0].dtype == torch.float64 else tl.float32,
        "num_warps": tile.num_warps,
    }
    grid = -(-counts[0] // tile.block_r) + counts[1] + counts[2], -(-width // block_d)
    return Call((*walk[:3], few, middle, segment), split, counts, grid, meta)


def parts(call, like):
    """Room for a result of each segment, [S, D]; None without buckets."""
    if call.split is None:
        return None
    return like.new_empty(call.counts[2], call.meta["D"], dtype=accumulator(like))


def combining(call):
    """-> grid and constants of a kernel that puts the segments of split rows together."""
    meta = {
        "D": call.meta["D"],
        "BLOCK_S": BLOCK_S,
        "BLOCK_D": call.meta["BLOCK_D"],
        "num_warps": 1,
    }
    return (call.split.shape[0] - FILLERS, call.grid[1]), meta


def combine_sums(call, part, out):
    """Complete out [N, D] in the split rows."""
    if call.counts[2]:
        grid, meta = combining(call)
        _aggregate_combine_kernel[grid](part, call.split, out, **meta)


def _alignment(tensors):
    """Channels that every row of all [N, D] tensors starts at a multiple of, up to 16 bytes."""
    align = 16 // tensors[0].element_size()
    for x in tensors:
        node, channel = x.stride()
        align = math.gcd(align, node) if channel == 1 else 1
    return align

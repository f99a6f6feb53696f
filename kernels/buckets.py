"""Rows by their length: what a program takes of them, and where its results go. R rows, E edges in
flight per row, C channels."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

COUNTS = ["num_rows", "num_middle", "num_segments"]  # of a walk, in no kernel a constant


class Walk(NamedTuple):
    """Edges grouped by one end, here called the row, as kernels go through them.

    Without buckets, the last three are None and rows are taken as they stand.
    """

    ptr: Any  # [N + 1]
    other: Any  # [E], the other end of each edge
    edge: Any  # [E], the caller's number of each edge
    few: Any
    middle: Any
    segment: Any


@triton.jit
def take(walk, num_rows, num_middle, num_segments, T: tl.constexpr):
    """``take_rows`` of a walk."""
    return take_rows(
        walk.ptr,
        walk.few,
        walk.middle,
        walk.segment,
        num_rows,
        num_middle,
        num_segments,
        walk.few is not None,
        T.BLOCK_R,
        T.BLOCK_E,
    )


@triton.jit
def next_edges(walk, begin, end, step, NUMBERED: tl.constexpr, T: tl.constexpr):
    """The edges of each row at ``step``, [R, E]: -> which there are, their other ends, and their
    numbers, if they are ``NUMBERED``."""
    slot = begin[:, None] + step + tl.arange(0, T.BLOCK_E)[None, :]
    live = slot < end[:, None]
    other = tl.load(walk.other + slot, mask=live, other=0)
    edge = slot
    if NUMBERED:
        edge = tl.load(walk.edge + slot, mask=live, other=0)
    return live, other, edge


@triton.jit
def take_rows(
    ptr_ptr,
    few_ptr,
    middle_ptr,
    segment_ptr,
    num_rows,
    num_middle,
    num_segments,
    BUCKETS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """What this program works on: -> row [R], which of them exist, begin and end [R], stride.

    Without buckets, BLOCK_R rows one after another. With them, the first programs take a segment
    each, the next ones a row each, the others BLOCK_R rows of few edges each: ``num_rows`` of
    those in all. Where there is one row, its edges are dealt to BLOCK_R "rows" in turns.
    """
    pid = tl.program_id(0)
    r = tl.arange(0, BLOCK_R)
    if BUCKETS:
        is_segment = pid < num_segments
        shared = pid >= num_segments + num_middle
        at = (pid - num_segments - num_middle) * BLOCK_R + r
        mine = (shared & (at < num_rows)) | ((not shared) & (r >= 0))
        several = tl.load(few_ptr + at, mask=shared & (at < num_rows), other=0)
        is_middle = (pid >= num_segments) & (pid < num_segments + num_middle)
        one = tl.load(middle_ptr + pid - num_segments, mask=is_middle, other=0)
        segment = segment_ptr + 3 * pid.to(tl.int64)
        one += tl.load(segment, mask=is_segment, other=0)
        row = tl.where(shared, several, one).to(tl.int64)
        begin = tl.load(ptr_ptr + row, mask=mine, other=0).to(tl.int64)
        end = tl.load(ptr_ptr + row + 1, mask=mine, other=0).to(tl.int64)
        first = tl.load(segment + 1, mask=is_segment, other=0).to(tl.int64)
        last = tl.load(segment + 2, mask=is_segment, other=0).to(tl.int64)
        begin = tl.where(is_segment, first, begin) + tl.where(shared, 0, r * BLOCK_E)
        end = tl.where(is_segment, last, end)
        stride = tl.where(shared, BLOCK_E, BLOCK_R * BLOCK_E)
    else:
        row = pid.to(tl.int64) * BLOCK_R + r
        mine = row < num_rows
        begin = tl.load(ptr_ptr + row, mask=mine, other=0).to(tl.int64)
        end = tl.load(ptr_ptr + row + 1, mask=mine, other=0).to(tl.int64)
        stride = BLOCK_E
    return row, mine, begin, end, stride


@triton.jit
def joined(x):
    """The sum over the R "rows" of [R, ...], where they are one, in the place of each of them."""
    return tl.sum(x, 0, keep_dims=True) + tl.zeros_like(x)


@triton.jit
def sum_lanes(x, num_middle, num_segments, BUCKETS: tl.constexpr):
    """[R, E, ...] -> [R, ...]; where ``take_rows`` gave one row, its sum R times."""
    return sum_one_row(tl.sum(x, 1), num_middle, num_segments, BUCKETS)


@triton.jit
def sum_one_row(x, num_middle, num_segments, BUCKETS: tl.constexpr):
    """[R, ...]; where ``take_rows`` gave one row, its sum R times."""
    if BUCKETS:
        one = tl.program_id(0) < num_segments + num_middle
        if one:
            x = joined(x)
    return x


@triton.jit
def wholes_and_parts(mine, num_middle, num_segments, BUCKETS: tl.constexpr):
    """-> which of R results are those of a whole row, which of a segment, and its number [R]."""
    pid = tl.program_id(0)
    r = tl.arange(0, mine.shape[0])
    segment = pid.to(tl.int64) + tl.zeros([mine.shape[0]], tl.int64)
    if BUCKETS:
        mine &= (pid >= num_segments + num_middle) | (r == 0)
        whole, part = mine & (pid >= num_segments), mine & (pid < num_segments)
    else:
        whole, part = mine, mine & (r < 0)
    return whole, part, segment

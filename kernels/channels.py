"""Edges taken channel by channel: what the kernels of segment_softmax, aggregate and
gated_aggregate share.

A program takes BLOCK_R x BLOCK_E edges at a time, for BLOCK_D channels: of BLOCK_R rows that have
few edges, of one row that has more, or of one segment of a row that has too many for one program
(see ``fastgt/tiles.py``):

    row 0 | e e e e | e e e . |          [R, E] indices
    row 1 | e . . . |         |          [R, E, C] gathered tile: rows of x and of e
             step 0    step 1

Each of the R x E lanes keeps its own sum or maximum; lanes meet once, after the last step, and the
segments of a row meet in a kernel of their own. Every output element has one writer, in a fixed
order, hence no atomics and the same bits every time.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .buckets import Walk, wholes_and_parts
from .configs import FILLERS, accumulator, attention_tile, power_of_2
from .loads import load_channels, store_channels, sum_dtype

_BLOCK_S = 4  # segments at a time
_CHANNELS = 128  # of a program, at most


class ChannelTile(NamedTuple):
    """What a program holds, a constant of its kernel."""

    D: int  # channels of a row
    BLOCK_R: int
    BLOCK_E: int
    BLOCK_D: int
    ALIGN: int  # channels that every gathered row starts at a multiple of
    WIDE: bool  # sums are in float64
    ONE_WEIGHT: bool  # weights are one number an edge


@triton.jit
def own_channels(T: tl.constexpr):
    """The channels of this program, [C]."""
    return tl.program_id(1) * T.BLOCK_D + tl.arange(0, T.BLOCK_D)


@triton.jit
def lanes(value, T: tl.constexpr):
    """``value`` for each lane and channel, [R, E, C]."""
    return tl.full([T.BLOCK_R, T.BLOCK_E, T.BLOCK_D], value, sum_dtype(T.WIDE))


@triton.jit
def next_slots(begin, end, step, T: tl.constexpr):
    """Places in the walk at ``step``, [R, E], and which of them have an edge of the row."""
    slot = begin[:, None] + step + tl.arange(0, T.BLOCK_E)[None, :]
    return slot, slot < end[:, None]


@triton.jit
def load_index(ptr, slot, live):
    """Numbers of nodes or edges at places of the walk, 0 where not ``live``."""
    return tl.load(ptr + slot, mask=live, other=0)


@triton.jit
def gather(x, row, live, channel, T: tl.constexpr):
    """``Rows`` of each of ``row`` [R, E], in the accumulator's dtype: -> [R, E, C]."""
    return load_channels(x.ptr, x.stride, row, live, channel, T.D, T.ALIGN).to(sum_dtype(T.WIDE))


@triton.jit
def load_weight(weight, edge, live, channel, T: tl.constexpr):
    """Weights of edges [R, E]: -> [R, E, C], or [R, E, 1] of one number an edge."""
    if T.ONE_WEIGHT:
        at = edge.to(tl.int64) * weight.stride[0]
        number = tl.load(weight.ptr + at, mask=live, other=0.0)
        return number.to(sum_dtype(T.WIDE))[:, :, None]
    else:
        return gather(weight, edge, live, channel, T)


@triton.jit
def store_weight_gradient(ptr, edge, live, channel, x, T: tl.constexpr):
    """The gradient [R, E, C] of weights, as ``weight_gradient`` has room for it."""
    if T.ONE_WEIGHT:
        at = edge.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(ptr + at, tl.sum(x, 2).to(ptr.dtype.element_ty), mask=live)
    else:
        store_channels(ptr, edge, live, channel, x, T.D)


@triton.jit
def load_table(ptr, row, live, channel, D: tl.constexpr):
    """Rows of a contiguous [N, D] tensor, for each of ``row`` [R, E], as they are: -> [R, E, C]."""
    return load_channels(ptr, (D, 1), row, live, channel, D, 1)


@triton.jit
def store_table(ptr, row, live, channel, x, D: tl.constexpr):
    """``x`` [R, C] to the rows ``row`` [R] of a contiguous [N, D] tensor."""
    store_channels(ptr, row[:, None], live[:, None], channel, x[:, None, :], D)


@triton.jit
def store_sums(
    out_ptr,  # [N, D]
    part_ptr,  # of segments: [S, D]
    walk,
    row,
    mine,
    num_middle,
    num_segments,
    channel,
    total,
    T: tl.constexpr,
):
    """Sums ``total`` [R, C] of what ``take`` gave: of whole rows, or of a segment."""
    BUCKETS: tl.constexpr = walk.few is not None
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    store_table(out_ptr, row, whole, channel, total, T.D)
    if BUCKETS:
        store_table(part_ptr, segment, part, channel, total, T.D)


class Call(NamedTuple):
    """How the kernels of one launcher go through a walk."""

    walk: Walk
    split: torch.Tensor | None
    counts: tuple[int, int, int]  # of few, middle and segments; without buckets, rows
    grid: tuple[int, int]
    meta: dict  # the tile "T" and the warps


def plan(walk, num_rows, width, tensors, weight=None):
    """-> Call; ``tensors`` are the [N, D] ones that rows are gathered of, None for absent ones, and
    ``weight`` [E, D] or [E, 1] is that of the edges."""
    one = weight is not None and weight.shape[1] == 1
    given = [x for x in (*tensors, None if one else weight) if x is not None]
    few, middle, segment, split = walk[3:] or (None,) * 4
    counts = num_rows, 0, 0
    if few is not None:
        counts = tuple(x.shape[0] - FILLERS for x in (few, middle, segment))
    block_d = min(power_of_2(width), _CHANNELS)
    tile = attention_tile(1, block_d, given[0].element_size())
    constants = ChannelTile(
        D=width,
        BLOCK_R=tile.block_r,
        BLOCK_E=tile.block_e,
        BLOCK_D=block_d,
        ALIGN=_alignment(given),
        WIDE=given[0].dtype == torch.float64,
        ONE_WEIGHT=one,
    )
    grid = -(-counts[0] // tile.block_r) + counts[1] + counts[2], -(-width // block_d)
    meta = {"T": constants, "num_warps": tile.num_warps}
    return Call(Walk(*walk[:3], few, middle, segment), split, counts, grid, meta)


def parts(call, like):
    """Room for a result of each segment, [S, D]; None without buckets."""
    if call.split is None:
        return None
    return like.new_empty(call.counts[2], call.meta["T"].D, dtype=accumulator(like))


def weight_gradient(weight, width):
    """Room for the gradient of weights [E, D]. Where they are [E, 1], a program has the sum over
    its channels: [E, B], for B blocks of channels."""
    num_edges, weights = weight.shape
    if weights != 1:
        return weight.new_empty(num_edges, weights)
    blocks = -(-width // min(power_of_2(width), _CHANNELS)) if width else 0
    if not blocks:
        return weight.new_zeros(num_edges, 1)
    dtype = weight.dtype if blocks == 1 else accumulator(weight)
    return weight.new_empty(num_edges, blocks, dtype=dtype)


def sum_of_blocks(gradient, weight):
    """What kernels wrote into ``weight_gradient``, as the weights are."""
    if gradient.shape[1] == weight.shape[1]:
        return gradient
    return gradient.sum(1, keepdim=True).to(weight.dtype)


def combining(call):
    """-> grid and constants of a kernel that puts the segments of split rows together."""
    tile = call.meta["T"]
    meta = {"D": tile.D, "BLOCK_S": _BLOCK_S, "BLOCK_D": tile.BLOCK_D, "num_warps": 1}
    return (call.split.shape[0] - FILLERS, call.grid[1]), meta


def _alignment(tensors):
    """Channels that every row of all [N, D] tensors starts at a multiple of, up to 16 bytes."""
    align = 16 // tensors[0].element_size()
    for x in tensors:
        node, channel = x.stride()
        align = math.gcd(align, node) if channel == 1 else 1
    return align

"""Tiles of channelwise attention: what its kernels load of edges and rows, and their launches.

R rows, E edges in flight per row, C channels. Channels have heads only where some tensor's heads do
not stand one after the other, or where some heads are masked.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .attention import head_rows
from .buckets import Walk
from .configs import FILLERS, attention_tile, clamps, power_of_2
from .loads import Rows, sum_dtype

_WIDEST = 128  # channels of a program


class ChannelwiseTile(NamedTuple):
    """What a program holds, a constant of its kernel."""

    C: int  # channels of a row
    D: int  # of those that stand one after the other: a head's, or all
    WIDTH: int  # of a head that may be masked
    CLAMP: bool
    BLOCK_R: int
    BLOCK_E: int
    BLOCK_C: int
    S_ALIGN: int  # channels that every row and head of the logits starts at a multiple of
    ALIGN: int  # likewise of v and edge_value
    DO_ALIGN: int  # likewise of the output's gradient
    WIDE: bool  # sums are in float64


class Gathered(NamedTuple):
    """What is gathered edge by edge: ``Rows`` of strides (row, head, channel)."""

    logits: Any  # [E, C]
    v: Any  # [M, C]
    edge_value: Any  # [E, C]


class Pass(NamedTuple):
    """How one kernel goes through a walk, and what it reads there."""

    x: Gathered
    do: Rows | None
    dlse: Rows | None
    active: Rows | None
    walk: Walk
    split: torch.Tensor | None
    counts: tuple[int, int, int]  # of few, middle and segments; without buckets, rows
    grid: tuple[int, int]
    meta: dict  # the tile "T" and the warps


@triton.jit
def active_channels(active, row, mine, channel, T: tl.constexpr):
    """Which channels [C] of ``row`` [R] belong to heads that are not masked: [R, C]."""
    at = row.to(tl.int64)[:, None] * active.stride[0]
    at += (channel // T.WIDTH).to(tl.int64)[None, :] * active.stride[1]
    return tl.load(active.ptr + at, mask=mine[:, None] & (channel < T.C)[None, :], other=0) != 0


@triton.jit
def load_logits(x, edge, live, channel, low, high, T: tl.constexpr):
    """-> clamped logits [R, E, C], -inf where not ``live`` [R, E, 1 or C]; and which the clamp let
    through."""
    s = load_values(x, edge, live, channel, T.S_ALIGN, T)
    through = live
    if T.CLAMP:
        # comparisons, not minimum and maximum: NaN must stay NaN
        through &= (s >= low) & (s <= high)
        s = tl.where(s < low, low, tl.where(s > high, high, s))
    return tl.where(live, s, float("-inf")), through


@triton.jit
def load_messages(x, col, edge, live, channel, T: tl.constexpr):
    """v_j + edge_value_ij of edges [R, E], or the one that is there: -> [R, E, C]."""
    if x.v is None:
        value = load_values(x.edge_value, edge, live, channel, T.ALIGN, T)
    else:
        value = load_values(x.v, col, live, channel, T.ALIGN, T)
        if x.edge_value is not None:
            value = value + load_values(x.edge_value, edge, live, channel, T.ALIGN, T)
    return value


@triton.jit
def load_values(x, row, live, channel, ALIGN: tl.constexpr, T: tl.constexpr):
    """Channels [C] of ``row`` [R, E] in the accumulator's dtype, 0 where not ``live``."""
    at, mask = _address(x.stride, row, live, channel, T.C, T.D, T.BLOCK_C, ALIGN)
    return tl.load(x.ptr + at, mask=mask, other=0.0).to(sum_dtype(T.WIDE))


@triton.jit
def table(size: tl.constexpr, row, live, channel, T: tl.constexpr):
    """Of channels [C] of ``row`` [R, E] in a contiguous table of ``size`` numbers a row: -> offsets
    and mask [R, E, C]."""
    return _address((size, 0, 1), row, live, channel, T.C, T.C, T.BLOCK_C, 1)


@triton.jit
def store(ptr, size: tl.constexpr, row, mine, channel, x, T: tl.constexpr):
    """Rows ``row`` [R] of a table; casts [R, C] to its dtype."""
    at, mask = table(size, row[:, None], mine[:, None, None], channel, T)
    tl.store(ptr + at, x[:, None, :].to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _address(
    stride,
    row,
    live,
    channel,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """D < C: heads of D channels that do not stand one after the other."""
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


def plan(walk, num_rows, active, logit, inputs, do=None, dlse=None):
    """-> Pass; ``active`` [1 or N, H] are the heads that are not masked, None where all are."""
    logits, channels = inputs.logits, inputs.logits.shape[1:].numel()
    d, (s, v, x, do_rows, dlse_rows) = _rows_by_head(*inputs, do, dlse)
    # a program has one head, or part of one, where some may be masked
    width = channels if active is None else logits.shape[2]
    block_c = min(_WIDEST, power_of_2(width))
    tile = attention_tile(1, block_c, logits.element_size())
    if logits.element_size() == 8 and tile.block_r > 1:
        # as much for each thread, but with fewer of them sm_90's compiler spills nothing
        tile = tile._replace(block_r=tile.block_r // 2, num_warps=max(1, tile.num_warps // 2))
    few, middle, segment, split = walk[3:] or (None,) * 4
    counts = num_rows, 0, 0
    if few is not None:
        counts = tuple(t.shape[0] - FILLERS for t in (few, middle, segment))
    constants = ChannelwiseTile(
        C=channels,
        D=d,
        WIDTH=width,
        CLAMP=clamps(logit.low, logit.high),
        BLOCK_R=tile.block_r,
        BLOCK_E=tile.block_e,
        BLOCK_C=block_c,
        S_ALIGN=_alignment(s),
        ALIGN=_alignment(v, x),
        DO_ALIGN=_alignment(do_rows),
        WIDE=logits.dtype == torch.float64,
    )
    programs = -(-counts[0] // tile.block_r) + counts[1] + counts[2]
    return Pass(
        Gathered(s, v, x),
        do_rows,
        dlse_rows,
        None if active is None else head_rows(active),
        Walk(*walk[:3], few, middle, segment),
        split,
        counts,
        (programs, -(-channels // block_c)),
        {"T": constants, "num_warps": tile.num_warps},
    )


def _rows_by_head(*tensors):
    """-> D and the ``Rows`` of each tensor, of strides (row, head, channel).

    Heads are there only if some tensor's do not stand one after the other, as those of shared
    planes, whose strides are 0; D is C elsewhere.
    """
    present = [x for x in tensors if x is not None]
    if all(x.ndim == 2 or x.stride(1) == x.shape[2] * x.stride(2) for x in present):
        rows = [None if x is None else Rows(x, (x.stride(0), 0, x.stride(-1))) for x in tensors]
        return present[0].shape[1:].numel(), rows
    return present[0].shape[2], [None if x is None else Rows(x, x.stride()) for x in tensors]


def _alignment(*rows):
    """Channels that every row and head starts at a multiple of, up to 16 bytes; 1 for none."""
    present = [x for x in rows if x is not None]
    align = 16 // present[0].ptr.element_size() if present else 1
    for x in present:
        row, head, channel = x.stride
        align = math.gcd(align, row, head) if channel == 1 else 1
    return align

"""Neighbourhood attention by windows of rows whose columns are loaded once, on tensor cores.

The equations and symbols are those of ``attention.py``. A program owns one window of up to BLOCK_M
rows and one head, and takes BLOCK_N of the window's compacted columns at a time (``Windows`` in
``fastgt/tiles.py``):

              columns 3  9 14 27 | 31 40 ...
    row 64       [ 1  .  1  1 |  .  1           bit r of a column's 64-bit word: row r of the
    row 65       [ .  1  1  . |  1  1           window has this edge
     ...                                         s = q k^T [M, N], masked; o += p v

The row pass (dq) walks the windows of rows, the column pass (dk, dv, dbias) the windows of columns,
whose entries are rows: each output has one writer, in a fixed order. A column that every row of the
window attends to stands first; tiles of such columns need no mask. Edges are found by counting
bits: the edge of (row r, entry c) is number base[c] + popcount(bits[c] below r).

Products of 16-bit tensors are summed in float32; p and ds are rounded to the inputs' dtype, as the
tensor cores take them. dq is a difference of large sums where values hardly differ, so the row
pass subtracts a first guess of gamma, from the rounded output, before it rounds, and corrects for
it at the end:

    t ds = p (r dp - gamma_0) + p (gamma_0 - t gamma),   gamma_0 = r do . o - g

Rows where a head is masked are computed with their window, unless it is masked in all of them,
and not kept.

A tile's products also meet edges that are not there: 0 * NaN would spread NaN to all rows of the
window. Where a result is not finite, the window is computed again, column by column.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastgt.contract import Results

from .attention import head_rows, on_edges
from .configs import (
    accumulator,
    alignment,
    clamps,
    dot_dtype,
    dot_precision,
    log,
    power_of_2,
    window_tile,
)
from .edge_tile import Operands, clamp_of, eps_share
from .loads import (
    dot,
    edge_slots,
    load_active,
    load_rows,
    rows_of,
    store_rows,
    sum_dtype,
    tile_mask,
)


class Table(NamedTuple):
    """Windows of rows, as ``Windows`` in ``fastgt/tiles.py`` explains them."""

    window: Any  # [W, 5]
    other: Any  # [C], the columns
    bits: Any  # [C]
    base: Any  # [C]
    edge: Any  # [E]


class Span(NamedTuple):
    """The entries of a window, from the first to the one after the last."""

    start: Any
    stop: Any


class WindowSizes(NamedTuple):
    """Sizes of attention by windows and of what a program holds, constants of its kernel."""

    H: int
    GROUP: int  # query heads that share a key head
    D: int
    DV: int
    CLAMP: bool
    DENSE: bool  # the columns stand one after another
    GATED: bool  # heads may be masked
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_DV: int
    ALIGN: int  # channels that rows of q, k, v and do start at a multiple of
    WIDE: bool  # sums are in float64
    PRODUCTS: str  # the dtype that tiles are multiplied in
    PRECISION: str


@triton.jit
def _windows_fwd_kernel(
    x,  # Operands
    o_ptr,  # [N, H, DV]
    lse_ptr,  # [N, H]
    weights_ptr,  # [E, H] or None
    table,
    scale: tl.float64,
    low: tl.float64,
    high: tl.float64,
    log_eps: tl.float64,
    active,  # [N, H], which heads are not masked
    T: tl.constexpr,
):
    """Grid (windows x heads): one program owns a window of rows and a head."""
    row, mine, read, head, span, masked_from = own_rows(table, active, T)
    clamp = clamp_of(scale, low, high, sum_dtype(T.WIDE))
    q = load_rows(x.q.ptr, x.q.stride, row, read, head, T.D, T.BLOCK_D, T.ALIGN)  # [M, D]

    top = tl.full([T.BLOCK_M], float("-inf"), sum_dtype(T.WIDE))
    total = zero_rows(T)
    acc = zero_tile(T.BLOCK_DV, T)
    for at in range(span.start, masked_from, T.BLOCK_N):
        top, total, acc = _fwd_tile(
            q, top, total, acc, at, span, head, x, table, clamp, False, False, T
        )
    for at in range(masked_from, span.stop, T.BLOCK_N):
        top, total, acc = _fwd_tile(
            q, top, total, acc, at, span, head, x, table, clamp, True, False, T
        )
    if spoilt(acc, read):
        top = tl.full([T.BLOCK_M], float("-inf"), sum_dtype(T.WIDE))
        total = zero_rows(T)
        acc = zero_tile(T.BLOCK_DV, T)
        for at in range(span.start, span.stop, 16):
            top, total, acc = _fwd_tile(
                q, top, total, acc, at, span, head, x, table, clamp, True, True, T
            )

    if active is not None:
        # rows of which others in the window have the head
        total = tl.where(read, total, 0.0)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    empty = total == 0.0
    lse = pivot + tl.log(tl.where(empty, 1.0, total))
    norm = eps_share(lse, log_eps, sum_dtype(T.WIDE)) / tl.where(empty, 1.0, total)
    o = tl.where(empty[:, None], 0.0, acc * norm[:, None])
    store_rows(o_ptr, row, mine, head, T.H, T.DV, T.BLOCK_DV, o)
    out = row * T.H + head
    tl.store(lse_ptr + out, tl.where(empty, float("-inf"), lse), mask=mine)
    if weights_ptr is not None:
        # not through the lse, which is rounded as the largest logit is
        for at in range(span.start, span.stop, T.BLOCK_N):
            entry, within, col = entries(at, span, table, T.DENSE, T.BLOCK_N)
            k = load_head(x.k, col, within, head // T.GROUP, T.D, T.BLOCK_D, T)
            s, live, _, edge = window_logits(
                q, k, entry, within, head, x.bias, table, clamp, True, True, T
            )
            p = tl.exp(s - pivot[:, None]) * norm[:, None]
            place = weights_ptr + edge.to(tl.int64) * T.H + head
            tl.store(place, p.to(weights_ptr.dtype.element_ty), mask=live & read[:, None])


@triton.jit
def _fwd_tile(
    q,
    top,
    total,
    acc,
    at,
    span,
    head,
    x,
    table,
    clamp,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
    T: tl.constexpr,
):
    """One step of the online softmax: -> top, total [M], acc [M, DV]."""
    BLOCK_N: tl.constexpr = 16 if EXACT else T.BLOCK_N
    entry, within, col = entries(at, span, table, T.DENSE, BLOCK_N)
    k = load_head(x.k, col, within, head // T.GROUP, T.D, T.BLOCK_D, T)  # [N, D]
    v = load_head(x.v, col, within, head // T.GROUP, T.DV, T.BLOCK_DV, T)
    s, live, _, _ = window_logits(q, k, entry, within, head, x.bias, table, clamp, MASKED, False, T)
    new_top = tl.maximum(top, tl.max(s, 1))
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
    decay = tl.exp(top - pivot)
    p = tl.exp(s - pivot[:, None])  # [M, N]
    total = total * decay + tl.sum(p, 1)
    acc = acc * decay[:, None]
    if EXACT:
        acc = add_columns(acc, p, live, x.v, entry, col, span, head // T.GROUP, T.DV)
    else:
        acc = dot(p.to(v.dtype), v, acc, T)
    return new_top, total, acc


@triton.jit
def zero_rows(T: tl.constexpr):
    """Zeros for each row, [M]."""
    return tl.full([T.BLOCK_M], 0.0, sum_dtype(T.WIDE))


@triton.jit
def zero_tile(BLOCK_D: tl.constexpr, T: tl.constexpr):
    """Zeros for each row and channel, [M, D]."""
    return tl.full([T.BLOCK_M, BLOCK_D], 0.0, sum_dtype(T.WIDE))


@triton.jit
def own_rows(table, active, T: tl.constexpr):
    """-> rows of this program's window [M], which exist, which to read, the head, the entries, and
    where those begin that not all rows have."""
    head = tl.program_id(0) % T.H
    first, last, span, full = own_window(table, tl.program_id(0) // T.H)
    row = first + tl.arange(0, T.BLOCK_M)
    mine = row < last
    masked_from = span.start + full // T.BLOCK_N * T.BLOCK_N
    read, stop = mine, span.stop
    if active is not None:
        read, stop = unmasked(active, row, mine, head, span)
        masked_from = tl.minimum(masked_from, stop)
    return row, mine, read, head, Span(span.start, stop), masked_from


@triton.jit
def unmasked(active, row, mine, head, span):
    """-> which rows to read, and the end of their entries: none where all mask the head."""
    read = load_active(active, row, mine, head)
    return read, tl.where(tl.max(read.to(tl.int32)) > 0, span.stop, span.start)


@triton.jit
def own_window(table, window):
    """-> first row and end, entries, how many leading entries every row has."""
    at = table.window + 5 * window.to(tl.int64)
    first, last = tl.load(at).to(tl.int64), tl.load(at + 1).to(tl.int64)
    span = Span(tl.load(at + 2).to(tl.int64), tl.load(at + 3).to(tl.int64))
    return first, last, span, tl.load(at + 4)


@triton.jit
def entries(at, span, table, DENSE: tl.constexpr, BLOCK_N: tl.constexpr):
    """-> the next entries [N], which of them exist, and their columns, int64."""
    entry = at + tl.arange(0, BLOCK_N)
    within = entry < span.stop
    if DENSE:
        # one after another, beginning with the graph's first column
        col = tl.load(table.other + span.start).to(tl.int64) + entry - span.start
    else:
        col = tl.load(table.other + entry, mask=within, other=0).to(tl.int64)
    return entry, within, col


@triton.jit
def load_head(x, row, live, head, D: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr):
    """``Rows`` of one head, [M, D]."""
    return load_rows(x.ptr, x.stride, row, live, head, D, BLOCK_D, T.ALIGN)


@triton.jit
def window_logits(
    a,
    b,
    entry,
    within,
    head,
    bias,
    table,
    clamp,
    MASKED: tl.constexpr,
    NUMBERED: tl.constexpr,
    T: tl.constexpr,
):
    """clamp(scale a b^T) + bias [M, N], -inf where there is no edge.

    -> and whether there is one, whether the clamp let it through, the edges' numbers if
    ``NUMBERED``.
    """
    s = dot(a, tl.trans(b), None, T) * clamp.scale
    live = tl.full(s.shape, True, tl.int1)
    edge = entry[None, :]
    if MASKED or bias is not None or NUMBERED:
        bits = tl.load(table.bits + entry, mask=within, other=0)  # [N]
        mask = tile_mask(bits, T.BLOCK_M)
        if bias is not None or NUMBERED:
            base = tl.load(table.base + entry, mask=within, other=0)
            edge = edge_slots(table.edge, bits, base, mask, T.BLOCK_M)
        if MASKED:
            live = mask
    through = live
    if T.CLAMP:
        # comparisons, not minimum and maximum: NaN must stay NaN
        through = live & (s >= clamp.low) & (s <= clamp.high)
        s = tl.where(s < clamp.low, clamp.low, tl.where(s > clamp.high, clamp.high, s))
    if bias is not None:
        at = edge.to(tl.int64) * bias.stride[0] + head.to(tl.int64) * bias.stride[1]
        s += tl.load(bias.ptr + at, mask=mask, other=0.0).to(s.dtype)
    if MASKED:
        s = tl.where(live, s, float("-inf"))
    return s, live, through, edge


@triton.jit
def spoilt(x, mine):
    """Whether any of my rows is not finite."""
    bad = (tl.abs(x) < float("inf")) == 0
    return tl.max((bad & mine[:, None]).to(tl.int32)) > 0


@triton.jit
def add_columns(acc, p, live, x, entry, col, span, head, D: tl.constexpr):
    """acc + p x, column by column of p [M, N], only where there is an edge: 0 * NaN is not."""
    BLOCK_N: tl.constexpr = p.shape[1]
    BLOCK_D: tl.constexpr = acc.shape[1]
    lane = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    for n in range(BLOCK_N):
        here = lane == n
        one = tl.sum(tl.where(here, col, 0))
        weight = tl.sum(tl.where(here[None, :] & live, p, 0.0), 1)  # [M]
        has = tl.sum((here[None, :] & live).to(tl.int32), 1) > 0
        exists = (tl.sum(tl.where(here, entry, 0)) < span.stop) & (d < D)
        at = x.ptr + one * x.stride[0] + head.to(tl.int64) * x.stride[1] + d * x.stride[2]
        column = tl.load(at, mask=exists, other=0.0).to(acc.dtype)  # [D]
        acc += tl.where(has[:, None], weight[:, None] * column[None, :], 0.0)
    return acc


def windows_fwd(row_walk, height, dense, inputs, logit, terms, mask, switches):
    """-> Results, weights in the caller's edge order; of ``terms``, windows take the bias."""
    q, _, v = inputs
    n, heads, _ = q.shape
    scale, low, high, eps = logit
    table = Table(*row_walk[3:])
    o = q.new_empty(n, heads, v.shape[2])
    lse = q.new_empty(n, heads, dtype=accumulator(q))
    weights = on_edges(q, mask.rows, row_walk[1].shape[0], heads) if switches.make_weights else None
    numbered = terms.bias is not None or switches.make_weights
    form = height, dense, clamps(low, high), mask.rows is not None
    _windows_fwd_kernel[(table.window.shape[0] * heads,)](
        Operands(*map(rows_of, inputs), rows_of(terms.bias)),
        o,
        lse,
        weights,
        table,
        scale,
        low,
        high,
        log(eps),
        None if mask.rows is None else head_rows(mask.rows),
        **windows_plan("fwd", inputs, inputs, form, numbered),
    )
    return Results(o, lse, weights)


def windows_plan(direction, inputs, aligned, form, numbered):
    """-> the constants of a kernel; ``form``: height of windows, whether they are dense, whether
    logits are clamped, and whether heads are masked; ``numbered``: edges are asked for their
    numbers."""
    q, k, v = inputs
    # a dot product takes at least 16 channels
    width = max(16, power_of_2(max(q.shape[2], v.shape[2])))
    tile = window_tile(direction, width, q.element_size(), numbered)
    shape = q.shape[1], k.shape[1], q.shape[2], v.shape[2]
    kind = q.dtype, dot_dtype(q), dot_precision(q)
    sizes = _sizes(tile.block_n, shape, kind, alignment(aligned), *form)
    return {"T": sizes, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


@cache
def _sizes(block_n, shape, kind, align, height, dense, clamp, gated):
    heads, kv_heads, d, dv = shape
    dtype, dot_type, precision = kind
    return WindowSizes(
        H=heads,
        GROUP=heads // kv_heads,
        D=d,
        DV=dv,
        CLAMP=clamp,
        DENSE=dense,
        GATED=gated,
        BLOCK_M=height,
        BLOCK_N=block_n,
        BLOCK_D=max(16, power_of_2(d)),
        BLOCK_DV=max(16, power_of_2(dv)),
        ALIGN=align,
        WIDE=dtype == torch.float64,
        PRODUCTS=dot_type,
        PRECISION=precision,
    )

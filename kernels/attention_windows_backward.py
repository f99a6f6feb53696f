"""Backward of neighbourhood attention by windows; equations and tiles as in
``attention_windows.py``.

The row pass subtracts a first guess of gamma before it rounds p (r dp - gamma_0), and corrects for
it at the end; the column pass takes w and gamma as the row pass stored them.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastgt.contract import PerInput

from .attention import head_rows, on_edges
from .attention_windows import (
    Table,
    add_columns,
    entries,
    load_head,
    own_rows,
    own_window,
    spoilt,
    unmasked,
    window_logits,
    windows_plan,
    zero_rows,
    zero_tile,
)
from .configs import clamps, log
from .edge_tile import Operands, clamp_of, eps_share
from .loads import dot, load_lse, load_rows, rows_of, store_rows, sum_dtype


class Stored(NamedTuple):
    """What earlier passes have stored."""

    lse: Any  # [N, H]
    wgamma: Any  # [N, H, 2]: w and gamma


class ColumnGrads(NamedTuple):
    """What the column pass writes; None where not needed."""

    dk: Any  # [M, H_kv, D]
    dv: Any  # [M, H_kv, DV]
    dbias: Any  # [E, H]


@triton.jit
def _windows_bwd_dq_kernel(
    x,  # Operands
    do,
    dlse,
    o,
    saved,  # Stored, of which w and gamma are written
    dq_ptr,  # [N, H, D] or None
    table,  # of rows
    scale: tl.float64,
    low: tl.float64,
    high: tl.float64,
    log_eps: tl.float64,
    active,  # [N, H], which heads are not masked
    T: tl.constexpr,
):
    """Grid (windows x heads): dq, w and gamma of a window's rows."""
    row, mine, read, head, span, masked_from = own_rows(table, active, T)
    clamp = clamp_of(scale, low, high, sum_dtype(T.WIDE))
    q = load_head(x.q, row, read, head, T.D, T.BLOCK_D, T)  # [M, D]
    up = load_head(do, row, read, head, T.DV, T.BLOCK_DV, T)  # [M, DV]
    out = load_rows(o.ptr, o.stride, row, mine, head, T.DV, T.BLOCK_DV, 1)
    at_row = row * T.H + head
    lse = load_lse(saved.lse + at_row, mine)  # [M]
    kept = eps_share(lse, log_eps, sum_dtype(T.WIDE))
    g = zero_rows(T)
    if dlse is not None:
        at_dlse = dlse.ptr + row * dlse.stride[0] + head.to(tl.int64) * dlse.stride[1]
        g = tl.load(at_dlse, mask=mine, other=0.0).to(sum_dtype(T.WIDE))
    guess = kept * tl.sum(up.to(sum_dtype(T.WIDE)) * out.to(sum_dtype(T.WIDE)), 1) - g
    # any finite number will do
    guess = tl.where(tl.abs(guess) < float("inf"), guess, 0.0)
    own = RowTile(q, up, lse, kept, guess)

    NEED_Q: tl.constexpr = dq_ptr is not None
    total = zero_rows(T)
    delta = zero_rows(T)
    dsk = zero_tile(T.BLOCK_D, T)
    pk = zero_tile(T.BLOCK_D, T)
    for at in range(span.start, masked_from, T.BLOCK_N):
        total, delta, dsk, pk = _dq_tile(
            own, total, delta, dsk, pk, at, span, head, x, table, clamp, NEED_Q, False, False, T
        )
    for at in range(masked_from, span.stop, T.BLOCK_N):
        total, delta, dsk, pk = _dq_tile(
            own, total, delta, dsk, pk, at, span, head, x, table, clamp, NEED_Q, True, False, T
        )
    if NEED_Q:
        if spoilt(dsk + pk, read):
            total = zero_rows(T)
            delta = zero_rows(T)
            dsk = zero_tile(T.BLOCK_D, T)
            pk = zero_tile(T.BLOCK_D, T)
            for at in range(span.start, span.stop, 16):
                total, delta, dsk, pk = _dq_tile(
                    own,
                    total,
                    delta,
                    dsk,
                    pk,
                    at,
                    span,
                    head,
                    x,
                    table,
                    clamp,
                    True,
                    True,
                    True,
                    T,
                )

    total = tl.where(total == 0.0, 1.0, total)
    w = kept / total
    gamma = (kept * w * delta - g) / total
    # where no edge counts, neither do the upstream gradients, finite or not
    empty = lse == float("inf")
    gamma = tl.where(empty, 0.0, gamma)
    tl.store(saved.wgamma + 2 * at_row, w, mask=mine)
    tl.store(saved.wgamma + 2 * at_row + 1, gamma, mask=mine)
    if NEED_Q:
        dq = (dsk + (guess - gamma * total)[:, None] * pk) / total[:, None]
        dq = tl.where(empty[:, None], 0.0, dq) * clamp.scale
        store_rows(dq_ptr, row, mine, head, T.H, T.D, T.BLOCK_D, dq)


class RowTile(NamedTuple):
    """What the row pass holds of its rows."""

    q: Any  # [M, D]
    do: Any  # [M, DV]
    lse: Any  # [M]
    kept: Any  # r, [M]
    guess: Any  # gamma_0, [M]


@triton.jit
def _dq_tile(
    own,  # RowTile
    total,
    delta,
    dsk,
    pk,
    at,
    span,
    head,
    x,
    table,
    clamp,
    NEED_Q: tl.constexpr,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
    T: tl.constexpr,
):
    """Sums over BLOCK_N more columns: p, p dp [M]; p (r dp - guess) k and p k [M, D]."""
    BLOCK_N: tl.constexpr = 16 if EXACT else T.BLOCK_N
    kv_head = head // T.GROUP
    entry, within, col = entries(at, span, table, T.DENSE, BLOCK_N)
    k = load_head(x.k, col, within, kv_head, T.D, T.BLOCK_D, T)  # [N, D]
    v = load_head(x.v, col, within, kv_head, T.DV, T.BLOCK_DV, T)
    s, live, through, _ = window_logits(
        own.q, k, entry, within, head, x.bias, table, clamp, MASKED, False, T
    )
    p = tl.exp(s - own.lse[:, None])  # [M, N]
    dp = tl.where(live, dot(own.do, tl.trans(v), None, T), 0.0)
    total += tl.sum(p, 1)
    delta += tl.sum(p * dp, 1)
    if NEED_Q:
        ds = tl.where(through, p * (own.kept[:, None] * dp - own.guess[:, None]), 0.0)
        p = tl.where(through, p, 0.0)
        if EXACT:
            dsk = add_columns(dsk, ds, live, x.k, entry, col, span, kv_head, T.D)
            pk = add_columns(pk, p, live, x.k, entry, col, span, kv_head, T.D)
        else:
            dsk = dot(ds.to(k.dtype), k, dsk, T)
            pk = dot(p.to(k.dtype), k, pk, T)
    return total, delta, dsk, pk


@triton.jit
def _windows_bwd_dkv_kernel(
    x,  # Operands
    do,
    saved,  # Stored
    out,  # ColumnGrads
    table,  # of columns
    scale: tl.float64,
    low: tl.float64,
    high: tl.float64,
    active,  # [M, H], which heads are not masked
    T: tl.constexpr,
):
    """Grid (windows of columns x key heads): dk, dv and dbias of a window's columns.

    The query heads that share a key head come one after another.
    """
    H_KV: tl.constexpr = T.H // T.GROUP
    kv_head = tl.program_id(0) % H_KV
    first, last, span, full = own_window(table, tl.program_id(0) // H_KV)
    col = first + tl.arange(0, T.BLOCK_M)
    mine = col < last
    clamp = clamp_of(scale, low, high, sum_dtype(T.WIDE))
    k = load_head(x.k, col, mine, kv_head, T.D, T.BLOCK_D, T)  # [M, D]
    v = load_head(x.v, col, mine, kv_head, T.DV, T.BLOCK_DV, T)
    masked_from = span.start + full // T.BLOCK_N * T.BLOCK_N
    if T.GATED:
        masked_from = span.start

    dk = zero_tile(T.BLOCK_D, T)
    dv = zero_tile(T.BLOCK_DV, T)
    for member in range(T.GROUP):
        head = kv_head * T.GROUP + member
        end, read = span.stop, mine
        if T.GATED:
            # heads of columns: no edge leaves its graph
            read, end = unmasked(active, col, mine, head, span)
        for at in range(span.start, masked_from, T.BLOCK_N):
            dk, dv = _dkv_tile(
                k, v, dk, dv, read, at, span, head, x, do, saved, out, table, clamp, False, False, T
            )
        for at in range(masked_from, end, T.BLOCK_N):
            dk, dv = _dkv_tile(
                k, v, dk, dv, read, at, span, head, x, do, saved, out, table, clamp, True, False, T
            )
    if spoilt(dk, mine) or spoilt(dv, mine):
        dk = zero_tile(T.BLOCK_D, T)
        dv = zero_tile(T.BLOCK_DV, T)
        for member in range(T.GROUP):
            head = kv_head * T.GROUP + member
            end, read = span.stop, mine
            if T.GATED:
                read, end = unmasked(active, col, mine, head, span)
            for at in range(span.start, end, 16):
                dk, dv = _dkv_tile(
                    k,
                    v,
                    dk,
                    dv,
                    read,
                    at,
                    span,
                    head,
                    x,
                    do,
                    saved,
                    out,
                    table,
                    clamp,
                    True,
                    True,
                    T,
                )

    if out.dk is not None:
        store_rows(out.dk, col, mine, kv_head, H_KV, T.D, T.BLOCK_D, dk * clamp.scale)
    if out.dv is not None:
        store_rows(out.dv, col, mine, kv_head, H_KV, T.DV, T.BLOCK_DV, dv)


@triton.jit
def _dkv_tile(
    k,
    v,
    dk,
    dv,
    mine,
    at,
    span,
    head,
    x,
    do,
    saved,
    out,
    table,
    clamp,
    MASKED: tl.constexpr,
    EXACT: tl.constexpr,
    T: tl.constexpr,
):
    """Sums over BLOCK_N more rows: dk [M, D] (unscaled), dv [M, DV]; stores dbias."""
    BLOCK_N: tl.constexpr = 16 if EXACT else T.BLOCK_N
    NUMBERED: tl.constexpr = out.dbias is not None
    entry, within, row = entries(at, span, table, T.DENSE, BLOCK_N)
    q = load_head(x.q, row, within, head, T.D, T.BLOCK_D, T)  # [N, D]
    up = load_head(do, row, within, head, T.DV, T.BLOCK_DV, T)
    at_row = row * T.H + head
    lse = load_lse(saved.lse + at_row, within)  # [N]
    w = tl.load(saved.wgamma + 2 * at_row, mask=within, other=0.0)
    s, live, through, edge = window_logits(
        k, q, entry, within, head, x.bias, table, clamp, MASKED, NUMBERED, T
    )
    if T.GATED:
        live &= mine[:, None]
        through &= mine[:, None]
        s = tl.where(live, s, float("-inf"))
    p = tl.exp(s - lse[None, :])  # [M, N]
    if out.dv is not None:
        a = p * w[None, :]
        if EXACT:
            dv = add_columns(dv, a, live, do, entry, row, span, head, T.DV)
        else:
            dv = dot(a.to(up.dtype), up, dv, T)
    if out.dk is not None or out.dbias is not None:
        gamma = tl.load(saved.wgamma + 2 * at_row + 1, mask=within, other=0.0)
        dp = dot(v, tl.trans(up), None, T)
        ds = tl.where(live, p * (w[None, :] * dp - gamma[None, :]), 0.0)
        if out.dbias is not None:
            place = out.dbias + edge.to(tl.int64) * T.H + head
            tl.store(place, ds.to(out.dbias.dtype.element_ty), mask=live & mine[:, None])
        if out.dk is not None:
            ds = tl.where(through, ds, 0.0)
            if EXACT:
                dk = add_columns(dk, ds, live, x.q, entry, row, span, head, T.D)
            else:
                dk = dot(ds.to(q.dtype), q, dk, T)
    return dk, dv


def windows_bwd(
    row_walk, column_walk, height, dense, needs, upstream, saved, inputs, logit, terms, mask
):
    """-> gradients of the inputs and of the bias: PerInput, None where not needed."""
    scale, low, high, eps = logit
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else None
        for x, need in zip(inputs, needs[:3], strict=True)
    )
    dbias = on_edges(terms.bias, mask.rows, *terms.bias.shape) if needs[3] else None
    x = Operands(*map(rows_of, inputs), rows_of(terms.bias))
    do, lse, table = rows_of(upstream.do), saved.lse, Table(*row_walk[3:])
    stored = Stored(lse, lse.new_empty(*lse.shape, 2))
    form = height, dense, clamps(low, high), mask.rows is not None
    aligned = *inputs, upstream.do
    meta = windows_plan("bwd", inputs, aligned, form, terms.bias is not None)
    _windows_bwd_dq_kernel[(table.window.shape[0] * inputs.q.shape[1],)](
        x,
        do,
        rows_of(upstream.dlse),
        rows_of(saved.o),
        stored,
        dq,
        table,
        scale,
        low,
        high,
        log(eps),
        None if mask.rows is None else head_rows(mask.rows),
        **meta,
    )
    if dk is not None or dv is not None or dbias is not None:
        _windows_bwd_dkv_kernel[(column_walk[0].shape[0] * inputs.k.shape[1],)](
            x,
            do,
            stored,
            ColumnGrads(dk, dv, dbias),
            Table(*column_walk),
            scale,
            low,
            high,
            None if mask.cols is None else head_rows(mask.cols),
            **meta,
        )
    return PerInput(dq, dk, dv, dbias, *[None] * (len(PerInput._fields) - 4))

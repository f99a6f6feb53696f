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

import torch
import triton
import triton.language as tl

from .attention import active_heads, on_edges
from .configs import (
    accumulator,
    alignment,
    clamps,
    dot_dtype,
    dot_precision,
    log,
    power_of_2,
    stride,
    window_tile,
)
from .edge_tile import kept_share
from .loads import dot, edge_slots, load_active, load_lse, load_rows, scalar, store_rows, tile_mask


@triton.jit
def _windows_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr,  # [N, H, D], [M, H_kv, D], [M, H_kv, DV], [E, H]
    o_ptr, lse_ptr, weights_ptr,  # [N, H, DV], [N, H], [E, H]
    window_ptr, col_ptr, bits_ptr, base_ptr, edge_ptr,  # [W, 5], [C], [C], [C], [E]
    q_stride, k_stride, v_stride, bias_stride,
    scale: tl.float64, low: tl.float64, high: tl.float64, log_eps: tl.float64,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTS: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ALIGN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    active_ptr=None, active_stride=None,  # [N, H], which heads are not masked
):  # fmt: skip
    """Grid (windows x heads): one program owns a window of rows and a head."""
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    head = tl.program_id(0) % H
    first, last, start, stop, full = _window(window_ptr, tl.program_id(0) // H)
    row = first + tl.arange(0, BLOCK_M)
    mine = row < last
    read = mine
    if active_ptr is not None:
        read = load_active(active_ptr, active_stride, row, mine, head)
        stop = tl.where(tl.max(read.to(tl.int32)) > 0, stop, start)
    low, high, scale = scalar(low, ACC), scalar(high, ACC), scalar(scale, ACC)
    q = load_rows(q_ptr, q_stride, row, read, head, D, BLOCK_D, ALIGN)  # [M, D]
    masked_from = start + full // BLOCK_N * BLOCK_N
    if active_ptr is not None:
        masked_from = tl.minimum(masked_from, stop)

    top = tl.full([BLOCK_M], float("-inf"), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    for at in range(start, masked_from, BLOCK_N):
        top, total, acc = _fwd_tile(
            q, top, total, acc, at, stop, start, head,
            k_ptr, v_ptr, bias_ptr, col_ptr, bits_ptr, base_ptr, edge_ptr,
            k_stride, v_stride, bias_stride, scale, low, high,
            GROUP, D, DV, CLAMP, HAS_BIAS, DENSE, False, False,
            BLOCK_N, BLOCK_D, BLOCK_DV, ALIGN, DOT, PRECISION,
        )  # fmt: skip
    for at in range(masked_from, stop, BLOCK_N):
        top, total, acc = _fwd_tile(
            q, top, total, acc, at, stop, start, head,
            k_ptr, v_ptr, bias_ptr, col_ptr, bits_ptr, base_ptr, edge_ptr,
            k_stride, v_stride, bias_stride, scale, low, high,
            GROUP, D, DV, CLAMP, HAS_BIAS, DENSE, True, False,
            BLOCK_N, BLOCK_D, BLOCK_DV, ALIGN, DOT, PRECISION,
        )  # fmt: skip
    if _spoilt(acc, read):
        top = tl.full([BLOCK_M], float("-inf"), ACC)
        total = tl.zeros([BLOCK_M], ACC)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
        for at in range(start, stop, 16):
            top, total, acc = _fwd_tile(
                q, top, total, acc, at, stop, start, head,
                k_ptr, v_ptr, bias_ptr, col_ptr, bits_ptr, base_ptr, edge_ptr,
                k_stride, v_stride, bias_stride, scale, low, high,
                GROUP, D, DV, CLAMP, HAS_BIAS, DENSE, True, True,
                16, BLOCK_D, BLOCK_DV, ALIGN, DOT, PRECISION,
            )  # fmt: skip

    if active_ptr is not None:
        # rows of which others in the window have the head
        total = tl.where(read, total, 0.0)
    pivot = tl.where(top == float("-inf"), 0.0, top)
    empty = total == 0.0
    lse = pivot + tl.log(tl.where(empty, 1.0, total))
    norm = kept_share(lse, log_eps, ACC) / tl.where(empty, 1.0, total)
    o = tl.where(empty[:, None], 0.0, acc * norm[:, None])
    store_rows(o_ptr, row, mine, head, H, DV, BLOCK_DV, o)
    out = row * H + head
    tl.store(lse_ptr + out, tl.where(empty, float("-inf"), lse), mask=mine)
    if WEIGHTS:
        # not through the lse, which is rounded as the largest logit is
        for at in range(start, stop, BLOCK_N):
            entry, within, col = _entries(at, stop, start, col_ptr, DENSE, BLOCK_N)
            k = load_rows(k_ptr, k_stride, col, within, head // GROUP, D, BLOCK_D, ALIGN)
            s, live, _, edge = _logits(
                dot(q, tl.trans(k), None, ACC, DOT, PRECISION), entry, within, head,
                bias_ptr, bias_stride, bits_ptr, base_ptr, edge_ptr, scale, low, high,
                CLAMP, HAS_BIAS, True, True, BLOCK_M,
            )  # fmt: skip
            p = tl.exp(s - pivot[:, None]) * norm[:, None]
            place = weights_ptr + edge.to(tl.int64) * H + head
            tl.store(place, p.to(weights_ptr.dtype.element_ty), mask=live & read[:, None])


@triton.jit
def _fwd_tile(
    q, top, total, acc, at, stop, start, head,
    k_ptr, v_ptr, bias_ptr, col_ptr, bits_ptr, base_ptr, edge_ptr,
    k_stride, v_stride, bias_stride, scale, low, high,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr, DENSE: tl.constexpr,
    MASKED: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ALIGN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: -> top, total [M], acc [M, DV]."""
    ACC: tl.constexpr = total.dtype
    BLOCK_M: tl.constexpr = q.shape[0]
    entry, within, col = _entries(at, stop, start, col_ptr, DENSE, BLOCK_N)
    k = load_rows(k_ptr, k_stride, col, within, head // GROUP, D, BLOCK_D, ALIGN)  # [N, D]
    v = load_rows(v_ptr, v_stride, col, within, head // GROUP, DV, BLOCK_DV, ALIGN)
    s, live, _, _ = _logits(
        dot(q, tl.trans(k), None, ACC, DOT, PRECISION), entry, within, head,
        bias_ptr, bias_stride, bits_ptr, base_ptr, edge_ptr, scale, low, high,
        CLAMP, HAS_BIAS, MASKED, False, BLOCK_M,
    )  # fmt: skip
    new_top = tl.maximum(top, tl.max(s, 1))
    pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
    decay = tl.exp(top - pivot)
    p = tl.exp(s - pivot[:, None])  # [M, N]
    total = total * decay + tl.sum(p, 1)
    acc = acc * decay[:, None]
    if EXACT:
        acc = _add_columns(acc, p, live, v_ptr, v_stride, entry, col, stop, head // GROUP, DV)
    else:
        acc = dot(p.to(v.dtype), v, acc, ACC, DOT, PRECISION)
    return new_top, total, acc


@triton.jit
def _windows_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, do_ptr, dlse_ptr, lse_ptr, out_ptr,
    dq_ptr, wgamma_ptr,  # [N, H, D], [N, H, 2]: w and gamma
    window_ptr, col_ptr, bits_ptr, base_ptr, edge_ptr,
    q_stride, k_stride, v_stride, bias_stride, do_stride, out_stride, dlse_stride,
    scale: tl.float64, low: tl.float64, high: tl.float64, log_eps: tl.float64,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DLSE: tl.constexpr, NEED_Q: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ALIGN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    active_ptr=None, active_stride=None,  # [N, H], which heads are not masked
):  # fmt: skip
    """Grid (windows x heads): dq, w and gamma of a window's rows."""
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    head = tl.program_id(0) % H
    first, last, start, stop, full = _window(window_ptr, tl.program_id(0) // H)
    row = first + tl.arange(0, BLOCK_M)
    mine = row < last
    read = mine
    if active_ptr is not None:
        read = load_active(active_ptr, active_stride, row, mine, head)
        stop = tl.where(tl.max(read.to(tl.int32)) > 0, stop, start)
    low, high, scale = scalar(low, ACC), scalar(high, ACC), scalar(scale, ACC)
    q = load_rows(q_ptr, q_stride, row, read, head, D, BLOCK_D, ALIGN)  # [M, D]
    do = load_rows(do_ptr, do_stride, row, read, head, DV, BLOCK_DV, ALIGN)  # [M, DV]
    o = load_rows(out_ptr, out_stride, row, mine, head, DV, BLOCK_DV, 1)
    at_row = row * H + head
    lse = load_lse(lse_ptr + at_row, mine)  # [M]
    kept = kept_share(lse, log_eps, ACC)
    g = tl.zeros([BLOCK_M], ACC)
    if HAS_DLSE:
        at_dlse = dlse_ptr + row * dlse_stride[0] + head.to(tl.int64) * dlse_stride[1]
        g = tl.load(at_dlse, mask=mine, other=0.0).to(ACC)
    guess = kept * tl.sum(do.to(ACC) * o.to(ACC), 1) - g
    # any finite number will do
    guess = tl.where(tl.abs(guess) < float("inf"), guess, 0.0)
    masked_from = start + full // BLOCK_N * BLOCK_N
    if active_ptr is not None:
        masked_from = tl.minimum(masked_from, stop)

    total = tl.zeros([BLOCK_M], ACC)
    delta = tl.zeros([BLOCK_M], ACC)
    dsk = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    pk = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for at in range(start, masked_from, BLOCK_N):
        total, delta, dsk, pk = _dq_tile(
            q, do, lse, kept, guess, total, delta, dsk, pk, at, stop, start, head,
            k_ptr, v_ptr, bias_ptr, col_ptr, bits_ptr, base_ptr, edge_ptr,
            k_stride, v_stride, bias_stride, scale, low, high,
            GROUP, D, DV, CLAMP, HAS_BIAS, DENSE, NEED_Q, False, False,
            BLOCK_N, BLOCK_D, BLOCK_DV, ALIGN, DOT, PRECISION,
        )  # fmt: skip
    for at in range(masked_from, stop, BLOCK_N):
        total, delta, dsk, pk = _dq_tile(
            q, do, lse, kept, guess, total, delta, dsk, pk, at, stop, start, head,
            k_ptr, v_ptr, bias_ptr, col_ptr, bits_ptr, base_ptr, edge_ptr,
            k_stride, v_stride, bias_stride, scale, low, high,
            GROUP, D, DV, CLAMP, HAS_BIAS, DENSE, NEED_Q, True, False,
            BLOCK_N, BLOCK_D, BLOCK_DV, ALIGN, DOT, PRECISION,
        )  # fmt: skip
    if NEED_Q:  # noqa: SIM102  (a constant: "and" would compile both)
        if _spoilt(dsk + pk, read):
            total = tl.zeros([BLOCK_M], ACC)
            delta = tl.zeros([BLOCK_M], ACC)
            dsk = tl.zeros([BLOCK_M, BLOCK_D], ACC)
            pk = tl.zeros([BLOCK_M, BLOCK_D], ACC)
            for at in range(start, stop, 16):
                total, delta, dsk, pk = _dq_tile(
                    q, do, lse, kept, guess, total, delta, dsk, pk, at, stop, start, head,
                    k_ptr, v_ptr, bias_ptr, col_ptr, bits_ptr, base_ptr, edge_ptr,
                    k_stride, v_stride, bias_stride, scale, low, high,
                    GROUP, D, DV, CLAMP, HAS_BIAS, DENSE, NEED_Q, True, True,
                    16, BLOCK_D, BLOCK_DV, ALIGN, DOT, PRECISION,
                )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)
    w = kept / total
    gamma = (kept * w * delta - g) / total
    # where no edge counts, neither do the upstream gradients, finite or not
    empty = lse == float("inf")
    gamma = tl.where(empty, 0.0, gamma)
    tl.store(wgamma_ptr + 2 * at_row, w, mask=mine)
    tl.store(wgamma_ptr + 2 * at_row + 1, gamma, mask=mine)
    if NEED_Q:
        dq = (dsk + (guess - gamma * total)[:, None] * pk) / total[:, None]
        dq = tl.where(empty[:, None], 0.0, dq) * scale
        store_rows(dq_ptr, row, mine, head, H, D, BLOCK_D, dq)


@triton.jit
def _dq_tile(
    q, do, lse, kept, guess, total, delta, dsk, pk, at, stop, start, head,
    k_ptr, v_ptr, bias_ptr, col_ptr, bits_ptr, base_ptr, edge_ptr,
    k_stride, v_stride, bias_stride, scale, low, high,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr, DENSE: tl.constexpr, NEED_Q: tl.constexpr,
    MASKED: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ALIGN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over BLOCK_N more columns: p, p dp [M]; p (r dp - guess) k and p k [M, D]."""
    ACC: tl.constexpr = total.dtype
    BLOCK_M: tl.constexpr = q.shape[0]
    entry, within, col = _entries(at, stop, start, col_ptr, DENSE, BLOCK_N)
    k = load_rows(k_ptr, k_stride, col, within, head // GROUP, D, BLOCK_D, ALIGN)  # [N, D]
    v = load_rows(v_ptr, v_stride, col, within, head // GROUP, DV, BLOCK_DV, ALIGN)
    s, live, through, _ = _logits(
        dot(q, tl.trans(k), None, ACC, DOT, PRECISION), entry, within, head,
        bias_ptr, bias_stride, bits_ptr, base_ptr, edge_ptr, scale, low, high,
        CLAMP, HAS_BIAS, MASKED, False, BLOCK_M,
    )  # fmt: skip
    p = tl.exp(s - lse[:, None])  # [M, N]
    dp = tl.where(live, dot(do, tl.trans(v), None, ACC, DOT, PRECISION), 0.0)
    total += tl.sum(p, 1)
    delta += tl.sum(p * dp, 1)
    if NEED_Q:
        ds = tl.where(through, p * (kept[:, None] * dp - guess[:, None]), 0.0)
        p = tl.where(through, p, 0.0)
        if EXACT:
            dsk = _add_columns(dsk, ds, live, k_ptr, k_stride, entry, col, stop, head // GROUP, D)
            pk = _add_columns(pk, p, live, k_ptr, k_stride, entry, col, stop, head // GROUP, D)
        else:
            dsk = dot(ds.to(k.dtype), k, dsk, ACC, DOT, PRECISION)
            pk = dot(p.to(k.dtype), k, pk, ACC, DOT, PRECISION)
    return total, delta, dsk, pk


@triton.jit
def _windows_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, do_ptr, lse_ptr, wgamma_ptr,
    dk_ptr, dv_ptr, dbias_ptr,  # [M, H_kv, D], [M, H_kv, DV], [E, H]
    window_ptr, row_ptr, bits_ptr, base_ptr, edge_ptr,
    q_stride, k_stride, v_stride, bias_stride, do_stride,
    scale: tl.float64, low: tl.float64, high: tl.float64,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, NEED_BIAS: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ALIGN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    active_ptr=None, active_stride=None,  # [N, H], which heads are not masked
):  # fmt: skip
    """Grid (windows of columns x key heads): dk, dv and dbias of a window's columns.

    The query heads that share a key head come one after another.
    """
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    H_KV: tl.constexpr = H // GROUP
    kv_head = tl.program_id(0) % H_KV
    first, last, start, stop, full = _window(window_ptr, tl.program_id(0) // H_KV)
    col = first + tl.arange(0, BLOCK_M)
    mine = col < last
    low, high, scale = scalar(low, ACC), scalar(high, ACC), scalar(scale, ACC)
    k = load_rows(k_ptr, k_stride, col, mine, kv_head, D, BLOCK_D, ALIGN)  # [M, D]
    v = load_rows(v_ptr, v_stride, col, mine, kv_head, DV, BLOCK_DV, ALIGN)
    masked_from = start + full // BLOCK_N * BLOCK_N
    GATED: tl.constexpr = active_ptr is not None
    if active_ptr is not None:
        masked_from = start

    dk = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        end, read = stop, mine
        if active_ptr is not None:
            # heads of columns: no edge leaves its graph
            read = load_active(active_ptr, active_stride, col, mine, head)
            end = tl.where(tl.max(read.to(tl.int32)) > 0, stop, start)
        for at in range(start, masked_from, BLOCK_N):
            dk, dv = _dkv_tile(
                k, v, dk, dv, read, at, stop, start, head,
                q_ptr, do_ptr, bias_ptr, lse_ptr, wgamma_ptr, dbias_ptr,
                row_ptr, bits_ptr, base_ptr, edge_ptr,
                q_stride, do_stride, bias_stride, scale, low, high,
                H, D, DV, CLAMP, HAS_BIAS, NEED_K, NEED_V, NEED_BIAS, DENSE, False, False, GATED,
                BLOCK_N, BLOCK_D, BLOCK_DV, ALIGN, DOT, PRECISION,
            )  # fmt: skip
        for at in range(masked_from, end, BLOCK_N):
            dk, dv = _dkv_tile(
                k, v, dk, dv, read, at, stop, start, head,
                q_ptr, do_ptr, bias_ptr, lse_ptr, wgamma_ptr, dbias_ptr,
                row_ptr, bits_ptr, base_ptr, edge_ptr,
                q_stride, do_stride, bias_stride, scale, low, high,
                H, D, DV, CLAMP, HAS_BIAS, NEED_K, NEED_V, NEED_BIAS, DENSE, True, False, GATED,
                BLOCK_N, BLOCK_D, BLOCK_DV, ALIGN, DOT, PRECISION,
            )  # fmt: skip
    if _spoilt(dk, mine) or _spoilt(dv, mine):
        dk = tl.zeros([BLOCK_M, BLOCK_D], ACC)
        dv = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            end, read = stop, mine
            if active_ptr is not None:
                read = load_active(active_ptr, active_stride, col, mine, head)
                end = tl.where(tl.max(read.to(tl.int32)) > 0, stop, start)
            for at in range(start, end, 16):
                dk, dv = _dkv_tile(
                    k, v, dk, dv, read, at, stop, start, head,
                    q_ptr, do_ptr, bias_ptr, lse_ptr, wgamma_ptr, dbias_ptr,
                    row_ptr, bits_ptr, base_ptr, edge_ptr,
                    q_stride, do_stride, bias_stride, scale, low, high,
                    H, D, DV, CLAMP, HAS_BIAS, NEED_K, NEED_V, NEED_BIAS, DENSE, True, True, GATED,
                    16, BLOCK_D, BLOCK_DV, ALIGN, DOT, PRECISION,
                )  # fmt: skip

    if NEED_K:
        store_rows(dk_ptr, col, mine, kv_head, H_KV, D, BLOCK_D, dk * scale)
    if NEED_V:
        store_rows(dv_ptr, col, mine, kv_head, H_KV, DV, BLOCK_DV, dv)


@triton.jit
def _dkv_tile(
    k, v, dk, dv, mine, at, stop, start, head,
    q_ptr, do_ptr, bias_ptr, lse_ptr, wgamma_ptr, dbias_ptr,
    row_ptr, bits_ptr, base_ptr, edge_ptr,
    q_stride, do_stride, bias_stride, scale, low, high,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, NEED_BIAS: tl.constexpr, DENSE: tl.constexpr,
    MASKED: tl.constexpr, EXACT: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ALIGN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over BLOCK_N more rows: dk [M, D] (unscaled), dv [M, DV]; stores dbias."""
    ACC: tl.constexpr = dk.dtype
    BLOCK_M: tl.constexpr = k.shape[0]
    entry, within, row = _entries(at, stop, start, row_ptr, DENSE, BLOCK_N)
    q = load_rows(q_ptr, q_stride, row, within, head, D, BLOCK_D, ALIGN)  # [N, D]
    do = load_rows(do_ptr, do_stride, row, within, head, DV, BLOCK_DV, ALIGN)
    at_row = row * H + head
    lse = load_lse(lse_ptr + at_row, within)  # [N]
    w = tl.load(wgamma_ptr + 2 * at_row, mask=within, other=0.0)
    s, live, through, edge = _logits(
        dot(k, tl.trans(q), None, ACC, DOT, PRECISION), entry, within, head,
        bias_ptr, bias_stride, bits_ptr, base_ptr, edge_ptr, scale, low, high,
        CLAMP, HAS_BIAS, MASKED, NEED_BIAS, BLOCK_M,
    )  # fmt: skip
    if GATED:
        live &= mine[:, None]
        through &= mine[:, None]
        s = tl.where(live, s, float("-inf"))
    p = tl.exp(s - lse[None, :])  # [M, N]
    if NEED_V:
        a = p * w[None, :]
        if EXACT:
            dv = _add_columns(dv, a, live, do_ptr, do_stride, entry, row, stop, head, DV)
        else:
            dv = dot(a.to(do.dtype), do, dv, ACC, DOT, PRECISION)
    if NEED_K or NEED_BIAS:
        gamma = tl.load(wgamma_ptr + 2 * at_row + 1, mask=within, other=0.0)
        dp = dot(v, tl.trans(do), None, ACC, DOT, PRECISION)
        ds = tl.where(live, p * (w[None, :] * dp - gamma[None, :]), 0.0)
        if NEED_BIAS:
            out = dbias_ptr + edge.to(tl.int64) * H + head
            tl.store(out, ds.to(dbias_ptr.dtype.element_ty), mask=live & mine[:, None])
        if NEED_K:
            ds = tl.where(through, ds, 0.0)
            if EXACT:
                dk = _add_columns(dk, ds, live, q_ptr, q_stride, entry, row, stop, head, D)
            else:
                dk = dot(ds.to(q.dtype), q, dk, ACC, DOT, PRECISION)
    return dk, dv


@triton.jit
def _window(window_ptr, window):
    """-> first row and end, first entry and end, how many leading entries every row has."""
    at = window_ptr + 5 * window.to(tl.int64)
    first, last = tl.load(at).to(tl.int64), tl.load(at + 1).to(tl.int64)
    start, stop = tl.load(at + 2).to(tl.int64), tl.load(at + 3).to(tl.int64)
    return first, last, start, stop, tl.load(at + 4)


@triton.jit
def _entries(at, stop, start, col_ptr, DENSE: tl.constexpr, BLOCK_N: tl.constexpr):
    """-> the next entries [N], which of them exist, and their columns, int64."""
    entry = at + tl.arange(0, BLOCK_N)
    within = entry < stop
    if DENSE:
        # one after another, beginning with the graph's first column
        col = tl.load(col_ptr + start).to(tl.int64) + entry - start
    else:
        col = tl.load(col_ptr + entry, mask=within, other=0).to(tl.int64)
    return entry, within, col


@triton.jit
def _logits(
    s, entry, within, head,
    bias_ptr, bias_stride, bits_ptr, base_ptr, edge_ptr, scale, low, high,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, EDGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """clamp(scale s) + bias [M, N], -inf where there is no edge.

    -> and whether there is one, whether the clamp let it through, the edges' numbers if needed.
    """
    s = s * scale
    live = tl.full(s.shape, True, tl.int1)
    edge = entry[None, :]
    if MASKED or HAS_BIAS or EDGES:
        bits = tl.load(bits_ptr + entry, mask=within, other=0)  # [N]
        mask = tile_mask(bits, BLOCK_M)
        if HAS_BIAS or EDGES:
            base = tl.load(base_ptr + entry, mask=within, other=0)
            edge = edge_slots(edge_ptr, bits, base, mask, BLOCK_M)
        if MASKED:
            live = mask
    through = live
    if CLAMP:
        # comparisons, not minimum and maximum: NaN must stay NaN
        through = live & (s >= low) & (s <= high)
        s = tl.where(s < low, low, tl.where(s > high, high, s))
    if HAS_BIAS:
        at = edge.to(tl.int64) * bias_stride[0] + head.to(tl.int64) * bias_stride[1]
        s += tl.load(bias_ptr + at, mask=mask, other=0.0).to(s.dtype)
    if MASKED:
        s = tl.where(live, s, float("-inf"))
    return s, live, through, edge


@triton.jit
def _spoilt(x, mine):
    """Whether any of my rows is not finite."""
    bad = (tl.abs(x) < float("inf")) == 0
    return tl.max((bad & mine[:, None]).to(tl.int32)) > 0


@triton.jit
def _add_columns(
    acc, p, live, x_ptr, x_stride, entry, col, stop, head, D: tl.constexpr
):  # fmt: skip
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
        exists = (tl.sum(tl.where(here, entry, 0)) < stop) & (d < D)
        at = x_ptr + one * x_stride[0] + head.to(tl.int64) * x_stride[1] + d * x_stride[2]
        x = tl.load(at, mask=exists, other=0.0).to(acc.dtype)  # [D]
        acc += tl.where(has[:, None], weight[:, None] * x[None, :], 0.0)
    return acc


def windows_fwd(
    q, k, v, edge_bias, on_rows, rows, height, dense, scale, low, high, eps, return_weights
):  # fmt: skip
    """-> o [N, H, DV], lse [N, H], weights [E, H] (or [0, H]) in the caller's edge order."""
    n, heads, _ = q.shape
    tables = rows[3:]
    o = q.new_empty(n, heads, v.shape[2])
    lse = q.new_empty(n, heads, dtype=accumulator(q))
    weights = on_edges(q, on_rows, rows[1].shape[0] if return_weights else 0, heads)
    edges = edge_bias is not None or return_weights
    meta = _plan("fwd", q, k, v, (q, k, v), height, dense, edges, on_rows)
    _windows_fwd_kernel[(tables[0].shape[0] * heads,)](
        q, k, v, edge_bias, o, lse, weights, *tables,
        q.stride(), k.stride(), v.stride(), stride(edge_bias),
        scale, low, high, log(eps),
        CLAMP=clamps(low, high), HAS_BIAS=edge_bias is not None, WEIGHTS=return_weights, **meta,
    )  # fmt: skip
    return o, lse, weights


def windows_bwd(
    do, dlse, q, k, v, edge_bias, on_rows, on_cols, lse, o, rows, columns, height, dense,
    scale, low, high, eps, need_q, need_k, need_v, need_bias,
):  # fmt: skip
    """-> dq [N, H, D], dk [M, H_kv, D], dv [M, H_kv, DV], dbias [E, H]; empty where not needed."""
    n, heads, _ = q.shape
    kv_heads = k.shape[1]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if need_q else q.new_empty(0)
    dk = torch.empty_like(k, memory_format=torch.contiguous_format) if need_k else q.new_empty(0)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format) if need_v else q.new_empty(0)
    dbias = on_edges(q, on_rows, rows[1].shape[0], heads) if need_bias else q.new_empty(0)
    wgamma = lse.new_empty(n, heads, 2)
    shared = {"CLAMP": clamps(low, high), "HAS_BIAS": edge_bias is not None}
    strides = q.stride(), k.stride(), v.stride(), stride(edge_bias), do.stride()
    tables = rows[3:]
    shared |= _plan("bwd", q, k, v, (q, k, v, do), height, dense, edge_bias is not None, on_rows)
    _windows_bwd_dq_kernel[(tables[0].shape[0] * heads,)](
        q, k, v, edge_bias, do, dlse, lse, o, dq, wgamma, *tables,
        *strides, o.stride(), stride(dlse),
        scale, low, high, log(eps),
        HAS_DLSE=dlse is not None, NEED_Q=need_q, **shared,
    )  # fmt: skip
    if on_cols is not None:
        shared |= active_heads(on_cols)
    if need_k or need_v or need_bias:
        _windows_bwd_dkv_kernel[(columns[0].shape[0] * kv_heads,)](
            q, k, v, edge_bias, do, lse, wgamma, dk, dv, dbias, *columns,
            *strides, scale, low, high,
            NEED_K=need_k, NEED_V=need_v, NEED_BIAS=need_bias, **shared,
        )  # fmt: skip
    return dq, dk, dv, dbias


def _plan(direction, q, k, v, aligned, height, dense, edges, active):
    # a dot product takes at least 16 channels
    block_d, block_dv = (max(16, power_of_2(x.shape[2])) for x in (q, v))
    tile = window_tile(direction, max(block_d, block_dv), q.element_size(), edges)
    return {
        "H": q.shape[1],
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "DV": v.shape[2],
        "DENSE": dense,
        "BLOCK_M": height,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "ALIGN": alignment(aligned),
        "DOT": dot_dtype(q),
        "PRECISION": dot_precision(q),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **({} if active is None else active_heads(active)),
    }

"""Backward of global attention; equations, blocks and tables as in ``global_attention.py``.

The row pass goes through the keys of its block of queries twice: for the sums of p = exp(s - lse)
and of p dp, and then, with these, for the gradients of the logits,

    a = p / sum p,   ds = a (dp - sum a dp + dlse),   dq = scale sum ds k

So nothing hangs on the output, which is rounded; and a differs from p by the rounding of the lse
alone. The column pass has blocks of keys and goes through the queries of their graph, for all query
heads of a key head one after another:

    dv = sum a do,   dk = scale sum ds q,   and the gradient of a bias per key: sum ds

A bias of pairs gets its gradient in the row pass, ds itself.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastgt.contract import GlobalUpstream, Inputs, PairDropout, PairNeeds, PairTerms, RaggedPairs

from .edge_tile import Operands, kept_share, known_heads
from .global_attention import (
    COUNTS,
    active_block,
    block_table,
    dropped_numbers,
    finish_logits,
    global_plan,
    head_active,
    hold_rows,
    load_slice,
    own_numbers,
    own_rows,
    pair_drop,
    pair_numbers,
    row_products,
    rows_where,
    slices,
    take_block,
)
from .loads import dot, load_lse, rows_of, scalar, store_rows, sum_dtype


class RowPass(NamedTuple):
    """What the row pass writes; None where not needed."""

    stat: Any  # [N, H, 2]: 1 / sum p, and sum a dp - dlse
    dq: Any  # [N, H, D]
    dbias: Any  # [pairs, H]


class KeyPass(NamedTuple):
    """What the column pass writes; None where not needed."""

    dk: Any  # [M, H_kv, D]
    dv: Any  # [M, H_kv, DV]
    dbias: Any  # [M, H]


@triton.jit(do_not_specialize=COUNTS)
def _global_bwd_dq_kernel(
    x,  # Operands
    do,
    dlse,
    lse_ptr,  # [N, H]
    out,  # RowPass
    blocks,
    drop,  # PairDrop
    threshold,
    scale: tl.float64,
    num_graphs,
    T: tl.constexpr,
):
    """Grid (blocks of queries x heads, slices): dq, gradients of pairs' bias, sums of rows."""
    ACC: tl.constexpr = sum_dtype(T.WIDE)
    head = tl.program_id(0) % T.H
    channel = tl.program_id(1) * T.BLOCK_D
    own = active_block(blocks, tl.program_id(0) // T.H, head, num_graphs, T)
    q = hold_rows(x.q, own.row, own.read, head, T.D, T.BLOCK_D, T)
    at_row = own.row * T.H + head
    lse = load_lse(lse_ptr + at_row, own.mine)  # [M]
    # where no key counts, neither do the upstream gradients, finite or not
    alive = own.read & (lse != float("inf"))
    up = hold_rows(do, own.row, alive, head, T.DV, T.BLOCK_DV, T)
    counted = own_numbers(drop.query_numbers, own)
    g = tl.full([T.BLOCK_M], 0.0, ACC)
    if dlse is not None:
        at_dlse = dlse.ptr + own.row * dlse.stride[0] + head.to(tl.int64) * dlse.stride[1]
        g = tl.load(at_dlse, mask=alive, other=0.0).to(ACC)

    total = tl.full([T.BLOCK_M], 0.0, ACC)
    delta = tl.full([T.BLOCK_M], 0.0, ACC)
    for at in range(own.first, own.last, T.BLOCK_N):
        _k, p, dp, _number, _within = row_tile(
            q, up, counted, lse, alive, own, at, head, x, do, drop, threshold, scale, T
        )
        total += tl.sum(p, 1)
        delta += tl.sum(p * dp, 1)
    norm = tl.where(alive, 1.0 / tl.where(total == 0.0, 1.0, total), 0.0)
    gamma = tl.where(alive, delta * norm - g, 0.0)
    first_slice = rows_where(own, channel == 0)
    tl.store(out.stat + 2 * at_row, norm, mask=first_slice)
    tl.store(out.stat + 2 * at_row + 1, gamma, mask=first_slice)

    if out.dq is not None or out.dbias is not None:
        dq = tl.full([T.BLOCK_M, T.BLOCK_D], 0.0, ACC)
        for at in range(own.first, own.last, T.BLOCK_N):
            k, p, dp, number, within = row_tile(
                q, up, counted, lse, alive, own, at, head, x, do, drop, threshold, scale, T
            )
            ds = tl.where(alive[:, None], p * norm[:, None] * (dp - gamma[:, None]), 0.0)
            if out.dbias is not None:
                place = out.dbias + number * T.H + head
                there = (own.read & rows_where(own, channel == 0))[:, None] & within[None, :]
                tl.store(place, ds.to(out.dbias.dtype.element_ty), mask=there)
            if out.dq is not None:
                if T.D > T.BLOCK_D:
                    key = at + tl.arange(0, T.BLOCK_N)
                    kv_head = head // T.GROUP
                    k = load_slice(x.k, key, within, kv_head, channel, T.D, T.BLOCK_D, T)
                dq = dot(ds.to(k.dtype), k, dq, T)
        if out.dq is not None:
            dq *= scalar(scale, ACC)
            store_rows(out.dq, own.row, own.mine, head, T.H, T.D, T.BLOCK_D, dq, channel)


@triton.jit
def row_tile(
    q, up, counted, lse, alive, own, at, head, x, do, drop, threshold, scale, T: tl.constexpr
):
    """-> k of BLOCK_N keys, p and dp of their pairs [M, N], these' numbers, which keys exist."""
    ACC: tl.constexpr = sum_dtype(T.WIDE)
    key = at + tl.arange(0, T.BLOCK_N)
    within = key < own.last
    kv_head = head // T.GROUP
    s, k = row_products(q, x.q, own, head, x.k, key, within, kv_head, T.D, T.BLOCK_D, T)
    number = pair_numbers(own, key, True)
    s *= scalar(scale, ACC)
    s = finish_logits(s, x.bias, number, own.read, key, within, head, T)
    p = tl.exp(s - lse[:, None])
    upstream = own_rows(own, alive)
    dp, _v = row_products(up, do, upstream, head, x.v, key, within, kv_head, T.DV, T.BLOCK_DV, T)
    if drop.seed is not None:
        known = dropped_numbers(number, counted, drop.key_numbers, key, within)
        dp *= kept_share(drop.seed, threshold, known, known_heads(drop, head), ACC)
    return k, p, dp, number, within


@triton.jit(do_not_specialize=COUNTS)
def _global_bwd_dkv_kernel(
    x,  # Operands
    do,
    lse_ptr,  # [N, H]
    stat_ptr,  # [N, H, 2], of the row pass
    out,  # KeyPass
    blocks,  # of keys
    drop,  # PairDrop
    threshold,
    scale: tl.float64,
    num_graphs,
    T: tl.constexpr,
):
    """Grid (blocks of keys x key heads, slices): dk, dv and the gradients of a bias per key."""
    ACC: tl.constexpr = sum_dtype(T.WIDE)
    H_KV: tl.constexpr = T.H // T.GROUP
    kv_head = tl.program_id(0) % H_KV
    graph, own = take_block(blocks, tl.program_id(0) // H_KV, num_graphs, T.BLOCK_M)
    any_active = kv_head < 0
    for member in range(T.GROUP):
        any_active |= head_active(blocks, graph, kv_head * T.GROUP + member)
    own = own_rows(own, rows_where(own, any_active))
    k = hold_rows(x.k, own.row, own.read, kv_head, T.D, T.BLOCK_D, T)  # [M, D]
    v = hold_rows(x.v, own.row, own.read, kv_head, T.DV, T.BLOCK_DV, T)
    counted = own_numbers(drop.key_numbers, own)
    channel, channel_v = tl.program_id(1) * T.BLOCK_D, tl.program_id(1) * T.BLOCK_DV

    dk = tl.full([T.BLOCK_M, T.BLOCK_D], 0.0, ACC)
    dv = tl.full([T.BLOCK_M, T.BLOCK_DV], 0.0, ACC)
    for member in range(T.GROUP):
        head = kv_head * T.GROUP + member
        last = tl.where(head_active(blocks, graph, head), own.last, own.first)
        bias = tl.full([T.BLOCK_M], 0.0, ACC)
        if x.bias is not None and T.PER_KEY:
            at_bias = own.row * x.bias.stride[0] + head.to(tl.int64) * x.bias.stride[1]
            asked = rows_where(own, last > own.first)
            bias = tl.load(x.bias.ptr + at_bias, mask=asked, other=0.0).to(ACC)
        dbias = tl.full([T.BLOCK_M], 0.0, ACC)
        for at in range(own.first, last, T.BLOCK_N):
            query = at + tl.arange(0, T.BLOCK_N)
            within = query < last
            at_row = query * T.H + head
            lse = load_lse(lse_ptr + at_row, within)  # [N]
            norm = tl.load(stat_ptr + 2 * at_row, mask=within, other=0.0)
            gamma = tl.load(stat_ptr + 2 * at_row + 1, mask=within, other=0.0)
            alive = within & (lse != float("inf"))
            number = pair_numbers(own, query, False)
            there = own.mine[:, None] & within[None, :]
            s, q = row_products(k, x.k, own, kv_head, x.q, query, within, head, T.D, T.BLOCK_D, T)
            s *= scalar(scale, ACC)  # [M, N]
            if x.bias is not None and T.PER_KEY:
                s += bias[:, None]
            if x.bias is not None and not T.PER_KEY:
                at_bias = number * x.bias.stride[0] + head.to(tl.int64) * x.bias.stride[1]
                s += tl.load(x.bias.ptr + at_bias, mask=there, other=0.0).to(ACC)
            s = tl.where(there, s, float("-inf"))
            a = tl.exp(s - lse[None, :]) * norm[None, :]
            share = 1.0
            if drop.seed is not None:
                known = dropped_numbers(number, counted, drop.query_numbers, query, within)
                share = kept_share(drop.seed, threshold, known, known_heads(drop, head), ACC)
            dp, up = row_products(v, x.v, own, kv_head, do, query, alive, head, T.DV, T.BLOCK_DV, T)
            if out.dv is not None:
                if T.DV > T.BLOCK_DV:
                    up = load_slice(do, query, alive, head, channel_v, T.DV, T.BLOCK_DV, T)
                dv = dot((a * share).to(up.dtype), up, dv, T)
            if out.dk is not None or out.dbias is not None:
                ds = tl.where(alive[None, :], a * (dp * share - gamma[None, :]), 0.0)
                if out.dbias is not None:
                    dbias += tl.sum(ds, 1)
                if out.dk is not None:
                    if T.D > T.BLOCK_D:
                        q = load_slice(x.q, query, within, head, channel, T.D, T.BLOCK_D, T)
                    dk = dot(ds.to(q.dtype), q, dk, T)
        if out.dbias is not None:
            place = out.dbias + own.row * T.H + head
            tl.store(
                place, dbias.to(out.dbias.dtype.element_ty), mask=rows_where(own, channel == 0)
            )

    if out.dk is not None:
        dk *= scalar(scale, ACC)
        there = rows_where(own, channel < T.D)
        store_rows(out.dk, own.row, there, kv_head, H_KV, T.D, T.BLOCK_D, dk, channel)
    if out.dv is not None:
        there = rows_where(own, channel_v < T.DV)
        store_rows(out.dv, own.row, there, kv_head, H_KV, T.DV, T.BLOCK_DV, dv, channel_v)


def global_attention_bwd(
    upstream: GlobalUpstream,
    inputs: Inputs,
    terms: PairTerms,
    graphs: RaggedPairs,
    dropout: PairDropout,
    needs: PairNeeds,
) -> tuple[torch.Tensor | None, ...]:
    """-> dq, dk, dv, dbias; None where not needed."""
    do, dlse, lse = upstream
    dq, dk, dv, dbias = (
        x.new_empty(x.shape) if x is not None and need else None
        for x, need in zip((*inputs, terms.bias), needs, strict=True)
    )
    if dbias is not None and graphs.head_mask is not None:
        dbias.zero_()  # nobody goes through the pairs of masked heads
    stat = lse.new_empty(*lse.shape, 2)
    of_pairs = terms.bias is not None and not terms.per_key
    numbered = dropout.seed is not None or of_pairs
    x, aligned = Operands(*map(rows_of, inputs), rows_of(terms.bias)), (*inputs, do)
    meta = global_plan("dq", inputs, aligned, terms, numbered)
    T = meta["T"]
    blocks, count, num_graphs = block_table(inputs, graphs, T.BLOCK_M, numbered)
    if count:
        _global_bwd_dq_kernel[count * T.H, slices(T.D, T.BLOCK_D)](
            x,
            rows_of(do),
            rows_of(dlse),
            lse,
            RowPass(stat, dq, dbias if of_pairs else None),
            blocks,
            *pair_drop(dropout),
            terms.scale,
            num_graphs,
            **meta,
        )
    out = KeyPass(dk, dv, None if of_pairs else dbias)
    if all(grad is None for grad in out):
        return dq, dk, dv, dbias
    meta = global_plan("dkv", inputs, aligned, terms, numbered)
    T = meta["T"]
    blocks, count, num_graphs = block_table(inputs, graphs, T.BLOCK_M, numbered, of_keys=True)
    parts = max(slices(T.D, T.BLOCK_D), slices(T.DV, T.BLOCK_DV))
    if count:
        _global_bwd_dkv_kernel[count * inputs.k.shape[1], parts](
            x,
            rows_of(do),
            lse,
            stat,
            out,
            blocks,
            *pair_drop(dropout),
            terms.scale,
            num_graphs,
            **meta,
        )
    return dq, dk, dv, dbias

"""Backward of neighbourhood attention by gathering; equations and tiles as in ``attention.py``.

The rows' walk gives dq, w and gamma, and the gradient of attr_q; the columns' walk gives dk and dv,
and writes the gradients of everything that stands on edges, each of which it meets once. With the
scores' own gradient h_ij, where the clamp lets ds_ij through:

    dt_ij = ds_ij + h_ij                                                             [D]
    dk_j  = scale sum_i dt_ij * q_i * g_ij,   dkey_ij = scale dt_ij * q_i * g_ij
    dg_ij = scale dt_ij * q_i * (k_j + key_ij),   dvalue_ij = m_ij a_ij do_i
    dx_ij = sum_h (scale g_ij ds_ij attr_q_i + m_ij a_ij dattr_o_i)
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastgt.contract import PerInput

from .attention import attention_plan, edge_terms, on_edges, store_pairs
from .attention_combine import RowSums, combine_columns, combine_rows, finish_row
from .buckets import COUNTS, next_edges, sum_lanes, sum_one_row, take, wholes_and_parts
from .configs import clamps, log
from .edge_tile import (
    Operands,
    add_edge,
    clamp_of,
    gather_edge,
    kept,
    lane_rows,
    lanes,
    load_attr,
    load_attr_heads,
    load_edge_rows,
    load_factor,
    load_query,
    load_shared,
    logits,
    own_heads,
    unmasked,
)
from .loads import load_active, load_heads, load_lse, rows_of, store_heads, sum_dtype


class Received(NamedTuple):
    """Gradients that the backward reads; None where absent."""

    do: Any  # Rows [N, H, DV]
    dlse: Any  # Rows [N, H]
    dscores: Any  # [E, H, D]
    attr_do: Any  # [N, H, C]


class RowGrads(NamedTuple):
    """What the rows' walk writes; None where not needed."""

    dq: Any  # [N, H, D]
    wgamma: Any  # [N, H, 2]: w and gamma
    attr_dq: Any  # [N, H, C]
    part: Any  # of segments: [S, 2 or 3, H, D] sums of p k, of p dp k, and dq through scores
    stat: Any  # of segments: [S, H, 2] sums of p and p dp
    attr_part: Any  # of segments: [S, 2, H, C]


class ColumnGrads(NamedTuple):
    """What the columns' walk writes; None where not needed."""

    dk: Any  # [M, H_kv, D]
    dv: Any  # [M, H_kv, DV]
    dbias: Any  # [E, H]
    dk_part: Any  # of segments: [S, H_kv, D]
    dv_part: Any  # of segments: [S, H_kv, DV]
    dfactor: Any  # [E, H]
    dgate: Any  # [E, H, D]
    dkey: Any  # [E, H, D]
    dvalue: Any  # [E, H, DV]
    dattr: Any  # [E, C], in the accumulator's dtype


@triton.jit(do_not_specialize=[*COUNTS, "threshold"])
def _attention_bwd_dq_kernel(
    x,  # Operands
    terms,  # Terms or None
    up,  # Received
    lse_ptr,
    out,  # RowGrads
    walk,  # of rows
    num_rows,
    num_middle,
    num_segments,
    scale: tl.float64,
    low: tl.float64,
    high: tl.float64,
    log_eps: tl.float64,
    drop,  # Drop
    threshold,
    active,  # [N, H], which heads are not masked
    T: tl.constexpr,
):
    """Grid (row groups, head blocks): dq, w and gamma of BLOCK_R rows, or one, of BLOCK_H heads.

    One walk gives all: dq = scale (w sum_j p dp k - gamma sum_j p k), and likewise for attr_q.
    """
    BUCKETS: tl.constexpr = walk.few is not None
    NUMBERED: tl.constexpr = x.bias is not None or T.TERMS
    NEED_Q: tl.constexpr = out.dq is not None
    ATTR_DQ: tl.constexpr = out.attr_dq is not None
    DSCORES: tl.constexpr = up.dscores is not None and NEED_Q
    PARTS: tl.constexpr = 3 if DSCORES else 2
    row, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    head = own_heads(T)
    read, end = unmasked(active, row, mine, head, begin, end)
    clamp = clamp_of(scale, low, high, sum_dtype(T.WIDE))
    own, reads = row[:, None], read[:, None]
    q, attr_q = load_query(x, terms, own, reads, head, T)  # [R, 1, H, D or C]
    do = load_heads(up.do, own, reads, head, T.H, T.DV, T.BLOCK_DV, T.ALIGN).to(sum_dtype(T.WIDE))
    if up.attr_do is not None:
        attr_do = load_attr_heads(up.attr_do, own, reads, head, T)
    row_at = own * T.H + head[None, :]
    lse = load_lse(lse_ptr + row_at, mine[:, None] & (head < T.H)[None, :])  # [R, H]

    sum_p, sum_pdp = lanes(0.0, T), lanes(0.0, T)
    pk, pdpk = lane_rows(T.BLOCK_D, T), lane_rows(T.BLOCK_D, T)
    if ATTR_DQ:
        pa = lane_rows(T.BLOCK_C, T)
        pdpa = lane_rows(T.BLOCK_C, T)
    if DSCORES:
        dtk = lane_rows(T.BLOCK_D, T)
    for step in range(0, tl.max(end - begin), stride):
        live, col, edge = next_edges(walk, begin, end, step, NUMBERED, T)  # [R, E]
        k, v, attr, factor = gather_edge(x, terms, col, edge, live, head, T)
        s, through, _ = logits(q, attr_q, k, attr, factor, x, terms, edge, live, head, clamp, T)
        p = tl.exp(s - lse[:, None, :])
        dp = tl.sum(do * v, 3)
        if up.attr_do is not None:
            dp += tl.sum(attr_do * attr, 3)
        pdp = p * dp * kept(drop, threshold, edge, live, head, sum_dtype(T.WIDE))
        sum_p += p
        sum_pdp += pdp
        flow, flow_dp = tl.where(through, p, 0.0) * factor, tl.where(through, pdp, 0.0) * factor
        if NEED_Q:
            pk += flow[:, :, :, None] * k
            pdpk += flow_dp[:, :, :, None] * k
        if ATTR_DQ:
            pa += flow[:, :, :, None] * attr
            pdpa += flow_dp[:, :, :, None] * attr
        if DSCORES:
            dt = load_edge_rows(up.dscores, edge, live, head, T.D, T.BLOCK_D, T)
            dtk += dt * factor[:, :, :, None] * k

    row_dtk = 0.0
    if DSCORES:
        row_dtk = sum_lanes(dtk, num_middle, num_segments, BUCKETS)
    sums = RowSums(
        sum_lanes(sum_p, num_middle, num_segments, BUCKETS),
        sum_lanes(sum_pdp, num_middle, num_segments, BUCKETS),
        sum_lanes(pk, num_middle, num_segments, BUCKETS),
        sum_lanes(pdpk, num_middle, num_segments, BUCKETS),
        row_dtk,
    )
    if ATTR_DQ:
        row_pa = sum_lanes(pa, num_middle, num_segments, BUCKETS)  # [R, H, C]
        row_pdpa = sum_lanes(pdpa, num_middle, num_segments, BUCKETS)
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    if BUCKETS:
        if tl.program_id(0) < num_segments:
            live = part[:, None]
            store_pairs(out.stat, segment, part, head, T.H, sums.total, sums.delta)
            if NEED_Q:
                at = PARTS * segment[:, None]
                store_heads(out.part, at, live, head, T.H, T.D, T.BLOCK_D, sums.pk[:, None])
                store_heads(out.part, at + 1, live, head, T.H, T.D, T.BLOCK_D, sums.pdpk[:, None])
                if DSCORES:
                    store_heads(out.part, at + 2, live, head, T.H, T.D, T.BLOCK_D, row_dtk[:, None])
            if ATTR_DQ:
                at, to = 2 * segment[:, None], out.attr_part
                store_heads(to, at, live, head, T.H, T.C, T.BLOCK_C, row_pa[:, None])
                store_heads(to, at + 1, live, head, T.H, T.C, T.BLOCK_C, row_pdpa[:, None])
    finish_row(
        sums, lse, row, whole, head, clamp.scale, log_eps, up.dlse, out.wgamma, out.dq, T.H, T.D
    )
    if ATTR_DQ:
        sums, dq = RowSums(sums.total, sums.delta, row_pa, row_pdpa, 0.0), out.attr_dq
        finish_row(
            sums, lse, row, whole, head, clamp.scale, log_eps, up.dlse, out.wgamma, dq, T.H, T.C
        )


@triton.jit(do_not_specialize=[*COUNTS, "first_block", "threshold"])
def _attention_bwd_dkv_kernel(
    x,  # Operands
    terms,  # Terms or None
    up,  # Received
    lse_ptr,
    wgamma_ptr,
    out,  # ColumnGrads
    walk,  # of columns
    num_rows,
    num_middle,
    num_segments,
    first_block,  # of heads, where there is one launch for each
    scale: tl.float64,
    low: tl.float64,
    high: tl.float64,
    drop,  # Drop
    threshold,
    active,  # [M, H], which heads are not masked
    T: tl.constexpr,
    ADD: tl.constexpr,  # to what earlier launches made of the attributes' gradient
):
    """Grid (column groups, key head blocks): dk, dv of BLOCK_R columns, or of one, and what their
    edges receive.

    The query heads that share a key head come one after another.
    """
    BUCKETS: tl.constexpr = walk.few is not None
    NUMBERED: tl.constexpr = x.bias is not None or out.dbias is not None or T.TERMS
    H_KV: tl.constexpr = T.H // T.GROUP
    col, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    kv_head = own_heads(T) + first_block * T.BLOCK_H
    clamp = clamp_of(scale, low, high, sum_dtype(T.WIDE))
    read = mine
    if active is not None:
        # no edge leaves its graph: a column has the mask of its rows
        first = tl.max(kv_head, 0) * T.GROUP
        read = load_active(active, col, mine, first)
        for member in range(1, T.GROUP):
            read |= load_active(active, col, mine, first + member)
        end = tl.where(read, end, begin)

    own, reads = col[:, None], read[:, None]
    k = load_heads(x.k, own, reads, kv_head, H_KV, T.D, T.BLOCK_D, T.ALIGN).to(sum_dtype(T.WIDE))
    v = load_heads(x.v, own, reads, kv_head, H_KV, T.DV, T.BLOCK_DV, T.ALIGN).to(sum_dtype(T.WIDE))
    dk = lane_rows(T.BLOCK_D, T)
    dv = lane_rows(T.BLOCK_DV, T)
    for step in range(0, tl.max(end - begin), stride):
        live, row, edge = next_edges(walk, begin, end, step, NUMBERED, T)  # [R, E]
        attr = load_attr(terms, edge, live, T)
        if out.dattr is not None:
            dattr = tl.full([T.BLOCK_R, T.BLOCK_E, T.BLOCK_C], 0.0, sum_dtype(T.WIDE))
        for member in range(T.GROUP):
            head = kv_head * T.GROUP + member  # H and beyond for the padded ones
            here = live
            if active is not None:
                here = live & load_active(active, col, mine, tl.max(head, 0))[:, None]
            q, attr_q = load_query(x, terms, row, here, head, T)
            do = load_heads(up.do, row, here, head, T.H, T.DV, T.BLOCK_DV, T.ALIGN).to(
                sum_dtype(T.WIDE)
            )
            key, gate, value = add_edge(k, v, terms, edge, here, head, T)
            factor = load_factor(terms, edge, here, head, T)
            at = row.to(tl.int64)[:, :, None] * T.H + head[None, None, :]
            mask = here[:, :, None] & (head < T.H)[None, None, :]
            lse = load_lse(lse_ptr + at, mask)  # [R, E, H]
            # where no edge counts, neither do upstream gradients, finite or not
            counts = (lse < float("inf"))[:, :, :, None]
            do = tl.where(counts, do, 0.0)
            w = tl.load(wgamma_ptr + 2 * at, mask=mask, other=0.0)
            gated = key * gate
            s, through, bare = logits(
                q, attr_q, gated, attr, factor, x, terms, edge, here, head, clamp, T
            )
            p = tl.exp(s - lse)
            keep = kept(drop, threshold, edge, here, head, sum_dtype(T.WIDE))
            a = (w * p * keep)[:, :, :, None]
            dvalue = a * do
            if out.dv is not None:
                dv += dvalue
            if out.dk is not None or out.dbias is not None or T.TERMS:
                gamma = tl.load(wgamma_ptr + 2 * at + 1, mask=mask, other=0.0)
                dp = tl.sum(do * value, 3)
                if up.attr_do is not None:
                    attr_do = load_attr_heads(up.attr_do, row, here, head, T)
                    attr_do = tl.where(counts, attr_do, 0.0)
                    dp += tl.sum(attr_do * attr, 3)
                ds = p * (w * dp * keep - gamma)
                edge_at = edge.to(tl.int64)[:, :, None] * T.H + head[None, None, :]
                if out.dbias is not None:
                    tl.store(out.dbias + edge_at, ds.to(out.dbias.dtype.element_ty), mask=mask)
                ds = tl.where(through, ds, 0.0)
                dt = (ds * factor)[:, :, :, None]  # the gradient of t_ij / scale
                if up.dscores is not None:
                    dscores = load_edge_rows(up.dscores, edge, here, head, T.D, T.BLOCK_D, T)
                    dt = dt + dscores * factor[:, :, :, None]
                dkey = dt * q * gate
                if out.dk is not None:
                    dk += dkey
                if out.dfactor is not None:
                    dfactor = ds * bare
                    if up.dscores is not None:
                        dfactor += tl.sum(dscores * q * gated, 3) * clamp.scale
                    dfactor = dfactor.to(out.dfactor.dtype.element_ty)
                    tl.store(out.dfactor + edge_at, dfactor, mask=mask)
                if out.dgate is not None:
                    dgate = dt * q * key * clamp.scale
                    store_heads(out.dgate, edge, here, head, T.H, T.D, T.BLOCK_D, dgate)
                if out.dkey is not None:
                    dkey = dkey * clamp.scale
                    if T.SHARED:
                        dkey += dvalue
                    store_heads(out.dkey, edge, here, head, T.H, T.D, T.BLOCK_D, dkey)
                if out.dvalue is not None:
                    store_heads(out.dvalue, edge, here, head, T.H, T.DV, T.BLOCK_DV, dvalue)
                if out.dattr is not None:
                    if terms.attr_q is not None:
                        dattr += tl.sum((ds * factor * clamp.scale)[:, :, :, None] * attr_q, 2)
                    if up.attr_do is not None:
                        dattr += tl.sum(a * attr_do, 2)
        if out.dattr is not None:
            share = dattr[:, :, None, :]
            if ADD:
                share += load_shared(out.dattr, edge, live, T, 1)
            store_heads(out.dattr, edge, live, tl.arange(0, 1), 1, T.C, T.BLOCK_C, share)

    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    if out.dk is not None:
        dk = tl.sum(dk, 1) * clamp.scale
        dk = sum_one_row(dk, num_middle, num_segments, BUCKETS)[:, None]
        store_heads(out.dk, own, whole[:, None], kv_head, H_KV, T.D, T.BLOCK_D, dk)
    if out.dv is not None:
        dv = sum_lanes(dv, num_middle, num_segments, BUCKETS)[:, None]
        store_heads(out.dv, own, whole[:, None], kv_head, H_KV, T.DV, T.BLOCK_DV, dv)
    if BUCKETS:
        if tl.program_id(0) < num_segments:
            at, parts = segment[:, None], part[:, None]
            if out.dk is not None:
                store_heads(out.dk_part, at, parts, kv_head, H_KV, T.D, T.BLOCK_D, dk)
            if out.dv is not None:
                store_heads(out.dv_part, at, parts, kv_head, H_KV, T.DV, T.BLOCK_DV, dv)


def attention_bwd(
    row_walk, column_walk, needs, upstream, saved, inputs, logit, terms, mask, dropout, switches
):
    """-> gradients of the inputs and of the edge terms: PerInput, None where not needed."""
    q, k, _ = inputs
    lse = saved.lse
    grads = PerInput(
        *[
            torch.empty_like(x, memory_format=torch.contiguous_format) if need else None
            for x, need in zip(inputs, needs[:3], strict=True)
        ],
        *[
            on_edges(x, mask.rows, *x.shape) if need else None
            for x, need in zip(terms, needs[3:], strict=True)
        ],
    )
    dattr = grads.attr
    if dattr is not None and dattr.dtype != lse.dtype:
        dattr = on_edges(lse, mask.rows, *dattr.shape)
    dscores, dattr_o = [None if x is None else x.contiguous() for x in upstream[2:]]
    edges = edge_terms(q, terms, dropout, switches, (dscores, dattr_o))
    x = Operands(*map(rows_of, (*inputs, terms.bias)))
    up = Received(rows_of(upstream.do), rows_of(upstream.dlse), dscores, dattr_o)
    wgamma = lse.new_empty(*lse.shape, 2)
    if lse.numel():
        _backward_of_rows(x, up, lse, wgamma, grads, row_walk, inputs, mask.rows, edges, logit)
    wanted = any(x is not None for x in grads[1:4]) or edges.terms is not None
    if k.shape[0] and k.shape[1] and wanted:
        out = _columns_write(grads, dattr)
        _backward_of_columns(x, up, lse, wgamma, out, column_walk, inputs, mask.cols, edges, logit)
    if dattr is not None and dattr is not grads.attr:
        grads = grads._replace(attr=dattr.to(grads.attr.dtype))
    return grads


def _backward_of_rows(x, up, lse, wgamma, grads, row_walk, inputs, mask, edges, logit):
    q, aligned = inputs.q, (*x[:3], up.do)
    dq, attr_dq, heads = grads.q, grads.attr_q, q.shape[1]
    call = attention_plan(inputs, aligned, row_walk, heads, edges, clamps(*logit[1:3]), mask)
    part = stat = attr_part = None
    if call.split is not None:
        parts, sums = call.counts[2], 2 if up.dscores is None else 3
        part = lse.new_empty(0 if dq is None else parts, sums, heads, q.shape[2])
        stat = lse.new_empty(parts, heads, 2)
        if attr_dq is not None:
            attr_part = lse.new_empty(parts, 2, heads, attr_dq.shape[2])
    _attention_bwd_dq_kernel[call.grid](
        x,
        edges.terms,
        up,
        lse,
        RowGrads(dq, wgamma, attr_dq, part, stat, attr_part),
        call.walk,
        *call.counts,
        *logit[:3],
        log(logit.eps),
        edges.drop,
        edges.threshold,
        call.active,
        **call.meta,
    )
    if call.counts[2]:
        row = stat, lse, up.dlse, call.split, logit.scale, log(logit.eps)
        combine_rows(dq, wgamma, part, *row)
        if attr_dq is not None:
            combine_rows(attr_dq, wgamma, attr_part, *row)


def _columns_write(grads, dattr):
    gate, key, value = grads.gate, grads.key, grads.value
    by_head = gate is not None and gate.ndim == 2
    factor, gate = (gate, None) if by_head else (None, gate)
    return ColumnGrads(grads.k, grads.v, grads.bias, None, None, factor, gate, key, value, dattr)


def _backward_of_columns(x, up, lse, wgamma, out, column_walk, inputs, mask, edges, logit):
    k, v, aligned = inputs.k, inputs.v, (*x[:3], up.do)
    heads = k.shape[1]
    call = attention_plan(inputs, aligned, column_walk, heads, edges, clamps(*logit[1:3]), mask)
    if call.split is not None:
        parts = call.counts[2]
        out = out._replace(
            dk_part=lse.new_empty(0 if out.dk is None else parts, heads, k.shape[2]),
            dv_part=lse.new_empty(0 if out.dv is None else parts, heads, v.shape[2]),
        )
    launches = [(0, call.grid)]
    if out.dattr is not None:
        # heads share the attributes: one launch after another adds to their gradient
        launches = [(block, (call.grid[0], 1)) for block in range(call.grid[1])]
    for first_block, grid in launches:
        _attention_bwd_dkv_kernel[grid](
            x,
            edges.terms,
            up,
            lse,
            wgamma,
            out,
            call.walk,
            *call.counts,
            first_block,
            *logit[:3],
            edges.drop,
            edges.threshold,
            call.active,
            ADD=first_block > 0,
            **call.meta,
        )
    if call.counts[2]:
        for whole, sums in ((out.dk, out.dk_part), (out.dv, out.dv_part)):
            if whole is not None:
                combine_columns(whole, sums, call.split)

"""Backward of additive attention by gathering; equations and tiles as in ``additive_attention.py``.

The rows' walk gives dq, w and gamma; the columns' walk gives dk, dv and shares of the weight's
gradient, and writes the gradients of what stands on edges, each of which it meets once.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .additive_attention import (
    Leaky,
    additive_logits,
    edges_of,
    load_own_query,
    load_weight,
    operands,
)
from .attention import attention_plan, on_edges, store_pairs
from .attention_combine import RowSums, combine_columns, combine_rows, finish_row
from .buckets import COUNTS, next_edges, sum_lanes, take, wholes_and_parts
from .edge_tile import add_edge, gather_edge, kept, lane_rows, lanes, own_heads, unmasked
from .loads import load_heads, load_lse, rows_of, scalar, store_heads, sum_dtype


class AdditiveRowGrads(NamedTuple):
    """What the rows' walk writes; None where not needed."""

    dq: Any  # [N, H, D]
    wgamma: Any  # [N, H, 2]: w and gamma
    part: Any  # of segments: [S, 2, H, D] sums of p u g and of p dp u g
    stat: Any  # of segments: [S, H, 2] sums of p and p dp


class AdditiveColumnGrads(NamedTuple):
    """What the columns' walk writes; None where not needed."""

    dk: Any  # [M, H, D]
    dv: Any  # [M, H, DV]
    dweight: Any  # [programs, H, D], in the accumulator's dtype
    dkey: Any  # [E, H, D]
    dbias: Any  # [E, H]
    dk_part: Any  # of segments: [S, H, D]
    dv_part: Any  # of segments: [S, H, DV]


@triton.jit(do_not_specialize=[*COUNTS, "threshold"])
def _additive_bwd_dq_kernel(
    x,  # Operands
    weight,  # Rows [1, H, D]
    terms,  # Terms or None
    do,  # Rows [N, H, DV]
    dlse,  # Rows [N, H] or None
    lse_ptr,
    out,  # AdditiveRowGrads
    walk,  # of rows
    num_rows,
    num_middle,
    num_segments,
    slope: tl.float64,
    log_eps: tl.float64,
    drop,  # Drop
    threshold,
    active,  # [N, H], which heads are not masked
    T: tl.constexpr,
):
    """Grid (row groups, head blocks): dq, w and gamma of BLOCK_R rows, or one, of BLOCK_H heads.

    One walk gives all: dq = u (w sum_j p dp g - gamma sum_j p g).
    """
    BUCKETS: tl.constexpr = walk.few is not None
    NUMBERED: tl.constexpr = x.bias is not None or T.TERMS
    NEED_Q: tl.constexpr = out.dq is not None
    row, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    head = own_heads(T)
    read, end = unmasked(active, row, mine, head, begin, end)
    leaky = Leaky(load_weight(weight, head, T), scalar(slope, sum_dtype(T.WIDE)))
    own, reads = row[:, None], read[:, None]
    q = load_own_query(x, own, reads, head, T)  # [R, 1, H, D]
    do_row = load_heads(do, own, reads, head, T.H, T.DV, T.BLOCK_DV, T.ALIGN)
    do_row = do_row.to(sum_dtype(T.WIDE))
    row_at = own * T.H + head[None, :]
    lse = load_lse(lse_ptr + row_at, mine[:, None] & (head < T.H)[None, :])  # [R, H]

    sum_p, sum_pdp = lanes(0.0, T), lanes(0.0, T)
    pg, pdpg = lane_rows(T.BLOCK_D, T), lane_rows(T.BLOCK_D, T)
    for step in range(0, tl.max(end - begin), stride):
        live, col, edge = next_edges(walk, begin, end, step, NUMBERED, T)  # [R, E]
        k, v, _, _ = gather_edge(x, terms, col, edge, live, head, T)
        s, g, _ = additive_logits(q + k, leaky, x, edge, live, head, T)
        p = tl.exp(s - lse[:, None, :])
        dp = tl.sum(do_row * v, 3)
        pdp = p * dp * kept(drop, threshold, edge, live, head, sum_dtype(T.WIDE))
        sum_p += p
        sum_pdp += pdp
        if NEED_Q:
            pg += p[:, :, :, None] * g
            pdpg += pdp[:, :, :, None] * g

    u = tl.sum(leaky.weight, 0)  # [1, H, D]
    sums = RowSums(
        sum_lanes(sum_p, num_middle, num_segments, BUCKETS),
        sum_lanes(sum_pdp, num_middle, num_segments, BUCKETS),
        times_weight(sum_lanes(pg, num_middle, num_segments, BUCKETS), u),
        times_weight(sum_lanes(pdpg, num_middle, num_segments, BUCKETS), u),
        0.0,
    )
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    if BUCKETS:
        if tl.program_id(0) < num_segments:
            live = part[:, None]
            store_pairs(out.stat, segment, part, head, T.H, sums.total, sums.delta)
            if NEED_Q:
                at = 2 * segment[:, None]
                store_heads(out.part, at, live, head, T.H, T.D, T.BLOCK_D, sums.pk[:, None])
                store_heads(out.part, at + 1, live, head, T.H, T.D, T.BLOCK_D, sums.pdpk[:, None])
    scale = scalar(1.0, sum_dtype(T.WIDE))
    finish_row(sums, lse, row, whole, head, scale, log_eps, dlse, out.wgamma, out.dq, T.H, T.D)


@triton.jit(do_not_specialize=[*COUNTS, "threshold"])
def _additive_bwd_dkv_kernel(
    x,  # Operands
    weight,  # Rows [1, H, D]
    terms,  # Terms
    do,  # Rows [N, H, DV]
    lse_ptr,
    wgamma_ptr,
    out,  # AdditiveColumnGrads
    walk,  # of columns
    num_rows,
    num_middle,
    num_segments,
    slope: tl.float64,
    drop,  # Drop
    threshold,
    active,  # [M, H], which heads are not masked
    T: tl.constexpr,
):
    """Grid (column groups, head blocks): dk, dv of BLOCK_R columns, or of one, what their edges
    receive, and the program's share of the weight's gradient."""
    BUCKETS: tl.constexpr = walk.few is not None
    NUMBERED: tl.constexpr = (
        x.bias is not None
        or out.dbias is not None
        or out.dkey is not None
        or terms.key is not None
        or drop.seed is not None
    )
    NEED_T: tl.constexpr = out.dk is not None or out.dkey is not None or out.dweight is not None
    col, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    head = own_heads(T)
    # no edge leaves its graph: a column has the mask of its rows
    read, end = unmasked(active, col, mine, head, begin, end)
    leaky = Leaky(load_weight(weight, head, T), scalar(slope, sum_dtype(T.WIDE)))
    own, reads = col[:, None], read[:, None]
    k = load_heads(x.k, own, reads, head, T.H, T.D, T.BLOCK_D, T.ALIGN).to(sum_dtype(T.WIDE))
    v = load_heads(x.v, own, reads, head, T.H, T.DV, T.BLOCK_DV, T.ALIGN).to(sum_dtype(T.WIDE))
    dk, dweight = lane_rows(T.BLOCK_D, T), lane_rows(T.BLOCK_D, T)
    dv = lane_rows(T.BLOCK_DV, T)
    for step in range(0, tl.max(end - begin), stride):
        live, row, edge = next_edges(walk, begin, end, step, NUMBERED, T)  # [R, E]
        q = load_own_query(x, row, live, head, T)
        do_row = load_heads(do, row, live, head, T.H, T.DV, T.BLOCK_DV, T.ALIGN)
        do_row = do_row.to(sum_dtype(T.WIDE))
        at = row.to(tl.int64)[:, :, None] * T.H + head[None, None, :]
        mask = live[:, :, None] & (head < T.H)[None, None, :]
        lse = load_lse(lse_ptr + at, mask)  # [R, E, H]
        # where no edge counts, neither do upstream gradients, finite or not
        do_row = tl.where((lse < float("inf"))[:, :, :, None], do_row, 0.0)
        w = tl.load(wgamma_ptr + 2 * at, mask=mask, other=0.0)
        key, _, _ = add_edge(k, v, terms, edge, live, head, T)
        s, g, y = additive_logits(q + key, leaky, x, edge, live, head, T)
        p = tl.exp(s - lse)
        keep = kept(drop, threshold, edge, live, head, sum_dtype(T.WIDE))
        if out.dv is not None:
            dv += (w * p * keep)[:, :, :, None] * do_row
        if NEED_T or out.dbias is not None:
            gamma = tl.load(wgamma_ptr + 2 * at + 1, mask=mask, other=0.0)
            ds = p * (w * tl.sum(do_row * v, 3) * keep - gamma)
            if out.dbias is not None:
                edge_at = edge.to(tl.int64)[:, :, None] * T.H + head[None, None, :]
                tl.store(out.dbias + edge_at, ds.to(out.dbias.dtype.element_ty), mask=mask)
            flow = ds[:, :, :, None] * g
            if out.dk is not None:
                dk += flow
            if out.dweight is not None:
                dweight += ds[:, :, :, None] * y
            if out.dkey is not None:
                dkey = flow * leaky.weight
                store_heads(out.dkey, edge, live, head, T.H, T.D, T.BLOCK_D, dkey)

    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    if out.dk is not None:
        dk = sum_lanes(dk, num_middle, num_segments, BUCKETS)
        dk = times_weight(dk, tl.sum(leaky.weight, 0))[:, None]
        store_heads(out.dk, own, whole[:, None], head, T.H, T.D, T.BLOCK_D, dk)
    if out.dv is not None:
        dv = sum_lanes(dv, num_middle, num_segments, BUCKETS)[:, None]
        store_heads(out.dv, own, whole[:, None], head, T.H, T.DV, T.BLOCK_DV, dv)
    if out.dweight is not None:
        one = tl.zeros([1, 1], tl.int64) + tl.program_id(0)
        share = tl.sum(tl.sum(dweight, 1), 0)[None, None, :, :]
        store_heads(out.dweight, one, one >= 0, head, T.H, T.D, T.BLOCK_D, share)
    if BUCKETS:
        if tl.program_id(0) < num_segments:
            at, parts = segment[:, None], part[:, None]
            if out.dk is not None:
                store_heads(out.dk_part, at, parts, head, T.H, T.D, T.BLOCK_D, dk)
            if out.dv is not None:
                store_heads(out.dv_part, at, parts, head, T.H, T.DV, T.BLOCK_DV, dv)


@triton.jit
def times_weight(x, weight):
    """Sums [R, H, D] times the weight [1, H, D]: 0 where nothing was summed, whatever that is."""
    return tl.where(x == 0.0, 0.0, x * weight)


def additive_attention_bwd(walks, upstream, inputs, slope, needs, terms, mask, dropout):
    """-> dq, dk, dv, dweight, dkey, dbias, None where not needed. ``terms`` have no attributes."""
    k, weight = inputs.k, inputs.weight
    do, dlse, lse = upstream
    dq, dk, dv = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else None
        for x, need in zip(inputs[:3], needs[:3], strict=True)
    ]
    dkey, dbias = [
        on_edges(x, mask.rows, *x.shape) if need else None
        for x, need in ((terms.key, needs.need_key), (terms.bias, needs.need_bias))
    ]
    call = (*operands(inputs, terms), rows_of(do), rows_of(dlse), lse, slope, dropout, mask)
    wgamma = lse.new_empty(*lse.shape, 2)
    if lse.numel():
        _backward_of_rows(inputs, terms, call, dq, wgamma, walks.row_walk)
    dweight = None
    if (k.shape[0] and any(x is not None for x in (dk, dv, dkey, dbias))) or needs.need_weight:
        out = AdditiveColumnGrads(dk, dv, None, dkey, dbias, None, None)
        shares = _backward_of_columns(
            inputs, terms, call, out, needs.need_weight, wgamma, walks.column_walk
        )
        if needs.need_weight:
            dweight = shares.sum(0).to(weight.dtype)
    return dq, dk, dv, dweight, dkey, dbias


def _backward_of_rows(inputs, terms, call, dq, wgamma, row_walk):
    x, weight, do, dlse, lse, slope, dropout, mask = call
    q, k, v, _ = inputs
    edges, heads = edges_of(q, terms, dropout), q.shape[1]
    aligned = *x[:3], weight, do
    plan = attention_plan((q, k, v), aligned, row_walk, heads, edges, False, mask.rows)
    part = stat = None
    if plan.split is not None:
        parts = plan.counts[2]
        part = lse.new_empty(0 if dq is None else parts, 2, heads, q.shape[2])
        stat = lse.new_empty(parts, heads, 2)
    _additive_bwd_dq_kernel[plan.grid](
        x,
        weight,
        edges.terms,
        do,
        dlse,
        lse,
        AdditiveRowGrads(dq, wgamma, part, stat),
        plan.walk,
        *plan.counts,
        slope,
        float("-inf"),
        edges.drop,
        edges.threshold,
        plan.active,
        **plan.meta,
    )
    if plan.counts[2]:
        combine_rows(dq, wgamma, part, stat, lse, dlse, plan.split, 1.0, float("-inf"))


def _backward_of_columns(inputs, terms, call, out, need_weight, wgamma, column_walk):
    """-> the programs' shares of the weight's gradient, [programs, H, D], or None."""
    x, weight, do, _, lse, slope, dropout, mask = call
    q, k, v, _ = inputs
    edges, heads = edges_of(q, terms, dropout, always=True), q.shape[1]
    aligned = *x[:3], weight, do
    plan = attention_plan((q, k, v), aligned, column_walk, heads, edges, False, mask.cols)
    programs = plan.grid[0]
    if need_weight:
        out = out._replace(dweight=lse.new_empty(programs, heads, q.shape[2]))
    if plan.split is not None:
        parts = plan.counts[2]
        out = out._replace(
            dk_part=lse.new_empty(0 if out.dk is None else parts, heads, k.shape[2]),
            dv_part=lse.new_empty(0 if out.dv is None else parts, heads, v.shape[2]),
        )
    if programs:
        _additive_bwd_dkv_kernel[plan.grid](
            x,
            weight,
            edges.terms,
            do,
            lse,
            wgamma,
            out,
            plan.walk,
            *plan.counts,
            slope,
            edges.drop,
            edges.threshold,
            plan.active,
            **plan.meta,
        )
    if plan.counts[2]:
        for whole, sums in ((out.dk, out.dk_part), (out.dv, out.dv_part)):
            if whole is not None:
                combine_columns(whole, sums, plan.split)
    return out.dweight

"""Neighbourhood attention by gathering: softmax over the edges of each row.

    s_ij = clamp(scale q_i . k_j) + bias_ij
    o_i  = sum_j a_ij v_j,   a_ij = exp(s_ij) / (Z_i + eps),   Z_i = sum_j exp(s_ij) = exp(lse_i)

With p = exp(s - lse), r = Z / (Z + eps), dp_ij = do_i . v_j, the gradient g of the lse, and
t_i = sum_j p_ij, which is 1 but for the rounding of the stored lse (that of the largest logit):

    a_ij = w_i p_ij,   w_i = r_i / t_i,   gamma_i = (r_i w_i sum_j p_ij dp_ij - g_i) / t_i
    ds_ij = p_ij (w_i dp_ij - gamma_i),   dq_i = scale sum_j ds_ij k_j
    dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i a_ij do_i,   dbias_ij = ds_ij

A program takes BLOCK_R x BLOCK_E edges at a time, for BLOCK_H heads (all of them up to 1,024
channels): of BLOCK_R rows that have few edges, of one row that has more, or of one segment of a
row that has too many for one program (see ``fastgt/tiles.py``):

    row 0 | e e e e | e e e . |          [R, E] indices, read once for all heads
    row 1 | e . . . |         |          [R, E, H, D] gathered tile, a whole row of k or v an edge
             step 0    step 1

Each of the R x E lanes keeps its own running maximum, sum and accumulator, so a step has no
reduction but the dot product; lanes meet once, after the last step, and the segments of a row
meet in ``attention_combine.py``. The forward and the dq kernel walk the rows, the dkv kernel walks
the same edges by columns, where it also writes dbias: every output element has one writer, in a
fixed order, hence no atomics and the same bits every time. w and gamma come from p and dp in the
accumulator's precision, never from a rounded output.
"""

import torch
import triton
import triton.language as tl

from .attention_combine import combine_columns, combine_outputs, combine_rows, finish_row
from .configs import (
    FILLERS,
    accumulator,
    alignment,
    attention_tile,
    clamps,
    log,
    power_of_2,
    stride,
)
from .prims import kept_share, load_heads, load_lse, logits, scalar, store_heads, take_rows

_COUNTS = ["num_rows", "num_middle", "num_segments"]


@triton.jit(do_not_specialize=_COUNTS)
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr,  # [N, H, D], [M, H_kv, D], [M, H_kv, DV], [E, H]
    o_ptr, lse_ptr, norm_ptr,  # [N, H, DV], [N, H], [N, H, 2]: pivot and factor of the weights
    part_ptr, stat_ptr,  # of segments: [S, H, DV] sums, [S, H, 2] maximum and sum
    row_ptr, col_ptr, edge_ptr,  # [N + 1], [E], [E]
    few_ptr, middle_ptr, segment_ptr,
    q_stride, k_stride, v_stride, bias_stride,  # (node, head, channel); outputs are contiguous
    num_rows, num_middle, num_segments,
    scale: tl.float64, low: tl.float64, high: tl.float64, log_eps: tl.float64,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr, NORM: tl.constexpr, BUCKETS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid (row groups, head blocks): one program owns BLOCK_R rows, or one, of BLOCK_H heads."""
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    row, mine, begin, end, stride = take_rows(
        row_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    lane = tl.arange(0, BLOCK_E)
    low, high, scale = scalar(low, ACC), scalar(high, ACC), scalar(scale, ACC)

    q = load_heads(q_ptr, q_stride, row[:, None], mine[:, None], head, H, D, BLOCK_D, ALIGN)
    q = q.to(ACC)  # [R, 1, H, D]

    lane_max = tl.full([BLOCK_R, BLOCK_E, BLOCK_H], float("-inf"), ACC)
    lane_sum = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H], ACC)
    acc = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_DV], ACC)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]  # [R, E]
        live = slot < end[:, None]
        col = tl.load(col_ptr + slot, mask=live, other=0)
        edge = tl.load(edge_ptr + slot, mask=live, other=0) if HAS_BIAS else slot
        k = load_heads(k_ptr, k_stride, col, live, head // GROUP, H // GROUP, D, BLOCK_D, ALIGN)
        v = load_heads(v_ptr, v_stride, col, live, head // GROUP, H // GROUP, DV, BLOCK_DV, ALIGN)
        k = k.to(ACC)
        s, _ = logits(
            q, k, live, edge, head, bias_ptr, bias_stride, scale, low, high, H, CLAMP, HAS_BIAS
        )
        new_max = tl.maximum(lane_max, s)
        # a lane without a finite logit so far keeps -inf; a finite pivot avoids inf - inf
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp(lane_max - pivot)
        p = tl.exp(s - pivot)  # [R, E, H]
        acc = acc * decay[:, :, :, None] + p[:, :, :, None] * v.to(ACC)
        lane_sum = lane_sum * decay + p
        lane_max = new_max

    top = tl.max(lane_max, 1)  # [R, H]
    pivot = tl.where(top == float("-inf"), 0.0, top)
    decay = tl.exp(lane_max - pivot[:, None, :])
    total = tl.sum(lane_sum * decay, 1)
    o = tl.sum(acc * decay[:, :, :, None], 1)  # [R, H, DV]
    if BUCKETS:
        first = tl.arange(0, BLOCK_R) == 0
        if tl.program_id(0) < num_segments + num_middle:
            # the lanes of all R "rows" belong to one
            mine = mine & first
            row_top = tl.max(top, 0)
            pivot_one = tl.where(row_top == float("-inf"), 0.0, row_top)
            decay_one = tl.exp(top - pivot_one[None, :])
            total = tl.sum(total * decay_one, 0)[None, :] + tl.zeros_like(total)
            o = tl.sum(o * decay_one[:, :, None], 0)[None, :, :] + tl.zeros_like(o)
            top = row_top[None, :] + tl.zeros_like(top)
            pivot = pivot_one[None, :] + tl.zeros_like(pivot)
        if tl.program_id(0) < num_segments:
            part = tl.program_id(0).to(tl.int64) + tl.zeros([BLOCK_R], tl.int64)
            store_heads(part_ptr, part[:, None], mine[:, None], head, H, DV, BLOCK_DV, o[:, None])
            at = part[:, None] * H + head[None, :]
            mask = mine[:, None] & (head < H)[None, :]
            tl.store(stat_ptr + 2 * at, top, mask=mask)
            tl.store(stat_ptr + 2 * at + 1, total, mask=mask)
            mine = mine & (row < 0)  # nothing else is stored
    empty = total == 0.0
    lse = pivot + tl.log(tl.where(empty, 1.0, total))
    norm = kept_share(lse, log_eps, ACC) / tl.where(empty, 1.0, total)
    o = tl.where(empty[:, :, None], 0.0, o * norm[:, :, None])
    store_heads(o_ptr, row[:, None], mine[:, None], head, H, DV, BLOCK_DV, o[:, None, :, :])
    at = row[:, None] * H + head[None, :]
    mask = mine[:, None] & (head < H)[None, :]
    tl.store(lse_ptr + at, tl.where(empty, float("-inf"), lse), mask=mask)
    if NORM:
        tl.store(norm_ptr + 2 * at, pivot, mask=mask)
        tl.store(norm_ptr + 2 * at + 1, norm, mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def _attention_weights_kernel(
    q_ptr, k_ptr, bias_ptr, norm_ptr,
    weights_ptr,  # [E, H]
    row_ptr, col_ptr, edge_ptr, few_ptr, middle_ptr, segment_ptr,
    q_stride, k_stride, bias_stride,
    num_rows, num_middle, num_segments,
    scale: tl.float64, low: tl.float64, high: tl.float64,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr, BUCKETS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid (row groups, head blocks): the weights of BLOCK_R rows, or one, of BLOCK_H heads.

    Not from the lse, which is rounded as the largest logit is, but from pivot and factor.
    """
    ACC: tl.constexpr = norm_ptr.dtype.element_ty
    row, mine, begin, end, stride = take_rows(
        row_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    lane = tl.arange(0, BLOCK_E)
    low, high, scale = scalar(low, ACC), scalar(high, ACC), scalar(scale, ACC)
    q = load_heads(q_ptr, q_stride, row[:, None], mine[:, None], head, H, D, BLOCK_D, ALIGN)
    q = q.to(ACC)
    at = row[:, None] * H + head[None, :]
    mask = mine[:, None] & (head < H)[None, :]
    pivot = tl.load(norm_ptr + 2 * at, mask=mask, other=0.0)
    norm = tl.load(norm_ptr + 2 * at + 1, mask=mask, other=0.0)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]
        live = slot < end[:, None]
        col = tl.load(col_ptr + slot, mask=live, other=0)
        edge = tl.load(edge_ptr + slot, mask=live, other=0)
        k = load_heads(k_ptr, k_stride, col, live, head // GROUP, H // GROUP, D, BLOCK_D, ALIGN)
        k = k.to(ACC)
        s, _ = logits(
            q, k, live, edge, head, bias_ptr, bias_stride, scale, low, high, H, CLAMP, HAS_BIAS
        )
        p = tl.exp(s - pivot[:, None, :]) * norm[:, None, :]
        edge_at = edge.to(tl.int64)[:, :, None] * H + head[None, None, :]
        edge_mask = live[:, :, None] & (head < H)[None, None, :]
        tl.store(weights_ptr + edge_at, p.to(weights_ptr.dtype.element_ty), mask=edge_mask)


@triton.jit(do_not_specialize=_COUNTS)
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, do_ptr, dlse_ptr, lse_ptr,
    dq_ptr, wgamma_ptr,  # [N, H, D], [N, H, 2]: w and gamma
    part_ptr, stat_ptr,  # of segments: [S, 2, H, D] sums of p k and p dp k, [S, H, 2] of p and p dp
    row_ptr, col_ptr, edge_ptr, few_ptr, middle_ptr, segment_ptr,
    q_stride, k_stride, v_stride, bias_stride, do_stride, dlse_stride,
    num_rows, num_middle, num_segments,
    scale: tl.float64, low: tl.float64, high: tl.float64, log_eps: tl.float64,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DLSE: tl.constexpr, NEED_Q: tl.constexpr,
    BUCKETS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid (row groups, head blocks): dq, w and gamma of BLOCK_R rows, or one, of BLOCK_H heads.

    One walk gives all: dq = scale (w sum_j p dp k - gamma sum_j p k).
    """
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    row, mine, begin, end, stride = take_rows(
        row_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    lane = tl.arange(0, BLOCK_E)
    low, high, scale = scalar(low, ACC), scalar(high, ACC), scalar(scale, ACC)

    q = load_heads(q_ptr, q_stride, row[:, None], mine[:, None], head, H, D, BLOCK_D, ALIGN)
    q = q.to(ACC)  # [R, 1, H, D]
    do = load_heads(do_ptr, do_stride, row[:, None], mine[:, None], head, H, DV, BLOCK_DV, ALIGN)
    do = do.to(ACC)  # [R, 1, H, DV]
    at = row[:, None] * H + head[None, :]
    lse = load_lse(lse_ptr + at, mine[:, None] & (head < H)[None, :])  # [R, H]

    sum_p = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H], ACC)
    sum_pdp = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H], ACC)
    pk = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_D], ACC)
    pdpk = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_D], ACC)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]
        live = slot < end[:, None]
        col = tl.load(col_ptr + slot, mask=live, other=0)
        edge = tl.load(edge_ptr + slot, mask=live, other=0) if HAS_BIAS else slot
        k = load_heads(k_ptr, k_stride, col, live, head // GROUP, H // GROUP, D, BLOCK_D, ALIGN)
        v = load_heads(v_ptr, v_stride, col, live, head // GROUP, H // GROUP, DV, BLOCK_DV, ALIGN)
        k = k.to(ACC)
        s, through = logits(
            q, k, live, edge, head, bias_ptr, bias_stride, scale, low, high, H, CLAMP, HAS_BIAS
        )
        p = tl.exp(s - lse[:, None, :])
        pdp = p * tl.sum(do * v.to(ACC), 3)
        sum_p += p
        sum_pdp += pdp
        if NEED_Q:
            pk += tl.where(through, p, 0.0)[:, :, :, None] * k
            pdpk += tl.where(through, pdp, 0.0)[:, :, :, None] * k

    total, delta = tl.sum(sum_p, 1), tl.sum(sum_pdp, 1)  # [R, H]
    row_pk, row_pdpk = tl.sum(pk, 1), tl.sum(pdpk, 1)  # [R, H, D]
    if BUCKETS:
        first = tl.arange(0, BLOCK_R) == 0
        if tl.program_id(0) < num_segments + num_middle:
            mine = mine & first
            total = tl.sum(total, 0)[None, :] + tl.zeros_like(total)
            delta = tl.sum(delta, 0)[None, :] + tl.zeros_like(delta)
            row_pk = tl.sum(row_pk, 0)[None, :, :] + tl.zeros_like(row_pk)
            row_pdpk = tl.sum(row_pdpk, 0)[None, :, :] + tl.zeros_like(row_pdpk)
        if tl.program_id(0) < num_segments:
            part = tl.program_id(0).to(tl.int64) + tl.zeros([BLOCK_R], tl.int64)
            part_at = part[:, None] * H + head[None, :]
            mask = mine[:, None] & (head < H)[None, :]
            tl.store(stat_ptr + 2 * part_at, total, mask=mask)
            tl.store(stat_ptr + 2 * part_at + 1, delta, mask=mask)
            if NEED_Q:
                two, live = 2 * part[:, None], mine[:, None]
                store_heads(part_ptr, two, live, head, H, D, BLOCK_D, row_pk[:, None])
                store_heads(part_ptr, two + 1, live, head, H, D, BLOCK_D, row_pdpk[:, None])
            mine = mine & (row < 0)  # nothing else is stored
    finish_row(
        total, delta, row_pk, row_pdpk, lse, row, mine, head, scale, log_eps,
        dlse_ptr, dlse_stride, wgamma_ptr, dq_ptr, H, D, BLOCK_D, HAS_DLSE, NEED_Q,
    )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def _attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, do_ptr, lse_ptr, wgamma_ptr,
    dk_ptr, dv_ptr, dbias_ptr,  # [M, H_kv, D], [M, H_kv, DV], [E, H]
    dk_part_ptr, dv_part_ptr,  # of segments: [S, H_kv, D], [S, H_kv, DV]
    col_ptr, row_ptr, edge_ptr,  # [M + 1], [E], [E]
    few_ptr, middle_ptr, segment_ptr,
    q_stride, k_stride, v_stride, bias_stride, do_stride,
    num_rows, num_middle, num_segments,  # of columns
    scale: tl.float64, low: tl.float64, high: tl.float64,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, NEED_BIAS: tl.constexpr, BUCKETS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid (column groups, key head blocks): dk, dv and dbias of BLOCK_R columns, or of one.

    The query heads that share a key head come one after another.
    """
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    col, mine, begin, end, stride = take_rows(
        col_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    kv_head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    lane = tl.arange(0, BLOCK_E)
    low, high, scale = scalar(low, ACC), scalar(high, ACC), scalar(scale, ACC)
    H_KV: tl.constexpr = H // GROUP

    k = load_heads(k_ptr, k_stride, col[:, None], mine[:, None], kv_head, H_KV, D, BLOCK_D, ALIGN)
    k = k.to(ACC)  # [R, 1, H, D]
    v = load_heads(v_ptr, v_stride, col[:, None], mine[:, None], kv_head, H_KV, DV, BLOCK_DV, ALIGN)
    v = v.to(ACC)  # [R, 1, H, DV]

    dk = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_DV], ACC)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]
        live = slot < end[:, None]
        row = tl.load(row_ptr + slot, mask=live, other=0)
        edge = tl.load(edge_ptr + slot, mask=live, other=0) if HAS_BIAS or NEED_BIAS else slot
        for member in range(GROUP):
            head = kv_head * GROUP + member  # H and beyond for the padded ones
            q = load_heads(q_ptr, q_stride, row, live, head, H, D, BLOCK_D, ALIGN).to(ACC)
            do = load_heads(do_ptr, do_stride, row, live, head, H, DV, BLOCK_DV, ALIGN).to(ACC)
            at = row.to(tl.int64)[:, :, None] * H + head[None, None, :]
            mask = live[:, :, None] & (head < H)[None, None, :]
            lse = load_lse(lse_ptr + at, mask)  # [R, E, H]
            w = tl.load(wgamma_ptr + 2 * at, mask=mask, other=0.0)
            s, through = logits(
                q, k, live, edge, head, bias_ptr, bias_stride, scale, low, high, H, CLAMP, HAS_BIAS
            )
            p = tl.exp(s - lse)
            if NEED_V:
                dv += (w * p)[:, :, :, None] * do
            if NEED_K or NEED_BIAS:
                gamma = tl.load(wgamma_ptr + 2 * at + 1, mask=mask, other=0.0)
                ds = p * (w * tl.sum(do * v, 3) - gamma)
                if NEED_K:
                    dk += tl.where(through, ds, 0.0)[:, :, :, None] * q
                if NEED_BIAS:
                    edge_at = edge.to(tl.int64)[:, :, None] * H + head[None, None, :]
                    tl.store(dbias_ptr + edge_at, ds.to(dbias_ptr.dtype.element_ty), mask=mask)

    col_dk, col_dv = tl.sum(dk, 1) * scale, tl.sum(dv, 1)  # [R, H, D]
    if BUCKETS:
        first = tl.arange(0, BLOCK_R) == 0
        if tl.program_id(0) < num_segments + num_middle:
            mine = mine & first
            col_dk = tl.sum(col_dk, 0)[None, :, :] + tl.zeros_like(col_dk)
            col_dv = tl.sum(col_dv, 0)[None, :, :] + tl.zeros_like(col_dv)
        if tl.program_id(0) < num_segments:
            part = (tl.program_id(0).to(tl.int64) + tl.zeros([BLOCK_R], tl.int64))[:, None]
            live = mine[:, None]
            if NEED_K:
                store_heads(dk_part_ptr, part, live, kv_head, H_KV, D, BLOCK_D, col_dk[:, None])
            if NEED_V:
                store_heads(dv_part_ptr, part, live, kv_head, H_KV, DV, BLOCK_DV, col_dv[:, None])
            mine = mine & (col < 0)  # nothing else is stored
    if NEED_K:
        store_heads(dk_ptr, col[:, None], mine[:, None], kv_head, H_KV, D, BLOCK_D, col_dk[:, None])
    if NEED_V:
        store_heads(
            dv_ptr, col[:, None], mine[:, None], kv_head, H_KV, DV, BLOCK_DV, col_dv[:, None]
        )


def attention_fwd(q, k, v, edge_bias, rows, scale, low, high, eps, return_weights):
    """-> o [N, H, DV], lse [N, H], weights [E, H] (or [0, H]) in the caller's edge order."""
    n, heads, _ = q.shape
    row_ptr, col, edge, few, middle, segment, split = _walk(rows)
    o = q.new_empty(n, heads, v.shape[2])
    lse = q.new_empty(n, heads, dtype=accumulator(q))
    norm = lse.new_empty(n, heads, 2) if return_weights else None
    parts = part = stat = None
    if segment is not None:
        parts = segment.shape[0] - FILLERS
        part = lse.new_empty(parts, heads, v.shape[2])
        stat = lse.new_empty(parts, heads, 2)
    if n and heads:
        meta, grid, counts = _plan(q, k, v, (q, k, v), n, heads, few, middle, segment)
        _attention_fwd_kernel[grid](
            q, k, v, edge_bias, o, lse, norm, part, stat, row_ptr, col, edge, few, middle, segment,
            q.stride(), k.stride(), v.stride(), stride(edge_bias),
            *counts, scale, low, high, log(eps),
            CLAMP=clamps(low, high), HAS_BIAS=edge_bias is not None, NORM=return_weights, **meta,
        )  # fmt: skip
        if parts:
            combine_outputs(o, lse, norm, part, stat, split, log(eps))
    weights = q.new_empty(col.shape[0] if return_weights else 0, heads)
    if return_weights and n and heads:
        meta, grid, counts = _plan(q, k, k, (q, k), n, heads, few, middle, segment)
        del meta["DV"], meta["BLOCK_DV"]
        _attention_weights_kernel[grid](
            q, k, edge_bias, norm, weights, row_ptr, col, edge, few, middle, segment,
            q.stride(), k.stride(), stride(edge_bias), *counts, scale, low, high,
            CLAMP=clamps(low, high), HAS_BIAS=edge_bias is not None, **meta,
        )  # fmt: skip
    return o, lse, weights


def attention_bwd(
    do, dlse, q, k, v, edge_bias, lse, rows, columns,
    scale, low, high, eps, need_q, need_k, need_v, need_bias,
):  # fmt: skip
    """-> dq [N, H, D], dk [M, H_kv, D], dv [M, H_kv, DV], dbias [E, H]; empty where not needed."""
    n, heads, width = q.shape
    m, kv_heads, _ = k.shape
    row_ptr, col, edge, few, middle, segment, split = _walk(rows)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if need_q else q.new_empty(0)
    dk = torch.empty_like(k, memory_format=torch.contiguous_format) if need_k else q.new_empty(0)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format) if need_v else q.new_empty(0)
    dbias = q.new_empty(col.shape[0], heads) if need_bias else q.new_empty(0)
    wgamma = lse.new_empty(n, heads, 2)
    shared = {"CLAMP": clamps(low, high), "HAS_BIAS": edge_bias is not None}
    strides = q.stride(), k.stride(), v.stride(), stride(edge_bias), do.stride()
    floats = scale, low, high
    if n and heads:
        meta, grid, counts = _plan(q, k, v, (q, k, v, do), n, heads, few, middle, segment)
        parts = part = stat = None
        if segment is not None:
            parts = counts[2]
            part = lse.new_empty(parts if need_q else 0, 2, heads, width)
            stat = lse.new_empty(parts, heads, 2)
        _attention_bwd_dq_kernel[grid](
            q, k, v, edge_bias, do, dlse, lse, dq, wgamma, part, stat,
            row_ptr, col, edge, few, middle, segment,
            *strides, stride(dlse), *counts, *floats, log(eps),
            HAS_DLSE=dlse is not None, NEED_Q=need_q, **shared, **meta,
        )  # fmt: skip
        if parts:
            combine_rows(
                dq, wgamma, part, stat, lse, dlse, stride(dlse), split, scale, log(eps), need_q
            )
    if m and kv_heads and (need_k or need_v or need_bias):
        col_ptr, col_row, col_edge, few, middle, segment, split = _walk(columns)
        meta, grid, counts = _plan(q, k, v, (q, k, v, do), m, kv_heads, few, middle, segment)
        parts = dk_part = dv_part = None
        if segment is not None:
            parts = counts[2]
            dk_part = lse.new_empty(parts if need_k else 0, kv_heads, width)
            dv_part = lse.new_empty(parts if need_v else 0, kv_heads, v.shape[2])
        _attention_bwd_dkv_kernel[grid](
            q, k, v, edge_bias, do, lse, wgamma, dk, dv, dbias, dk_part, dv_part,
            col_ptr, col_row, col_edge, few, middle, segment,
            *strides, *counts, *floats,
            NEED_K=need_k, NEED_V=need_v, NEED_BIAS=need_bias, **shared, **meta,
        )  # fmt: skip
        if parts:
            for out, sums, need in ((dk, dk_part, need_k), (dv, dv_part, need_v)):
                if need:
                    combine_columns(out, sums, split)
    return dq, dk, dv, dbias


def _walk(walk):
    """A CSR walk with its buckets, None where rows are taken as they stand."""
    return walk if len(walk) > 3 else (*walk, None, None, None, None)


def _plan(q, k, v, aligned, num_rows, heads, few, middle, segment):
    block_d, block_dv = power_of_2(q.shape[2]), power_of_2(v.shape[2])
    tile = attention_tile(heads, max(block_d, block_dv), q.element_size())
    counts = num_rows, 0, 0
    if few is not None:
        counts = tuple(x.shape[0] - FILLERS for x in (few, middle, segment))
    meta = {
        "H": q.shape[1],
        "GROUP": q.shape[1] // max(k.shape[1], 1),
        "D": q.shape[2],
        "DV": v.shape[2],
        "BUCKETS": few is not None,
        "BLOCK_R": tile.block_r,
        "BLOCK_E": tile.block_e,
        "BLOCK_H": tile.block_h,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "ALIGN": alignment(aligned),
        "num_warps": tile.num_warps,
    }
    programs = -(-counts[0] // tile.block_r) + counts[1] + counts[2]
    return meta, (programs, -(-heads // tile.block_h)), counts

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

from .attention import COUNTS, attention_plan, attention_terms, attention_walk, on_edges
from .attention_combine import combine_columns, combine_rows, finish_row
from .buckets import joined, take_rows
from .configs import clamps, log, stride
from .edge_tile import (
    add_edge_key,
    add_edge_value,
    kept,
    load_attr,
    load_attr_q,
    load_factor,
    load_gate,
    logits,
)
from .loads import load_active, load_heads, load_lse, scalar, store_heads

_PLAIN: dict[str, Any] = {}  # constants of a call without edge terms


@triton.jit(do_not_specialize=[*COUNTS, "threshold"])
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, do_ptr, dlse_ptr, lse_ptr,
    dq_ptr, wgamma_ptr,  # [N, H, D], [N, H, 2]: w and gamma
    part_ptr, stat_ptr,  # of segments: [S, 2, H, D] sums of p k and p dp k, [S, H, 2] of p and p dp
    row_ptr, col_ptr, edge_ptr, few_ptr, middle_ptr, segment_ptr,
    terms, grads,  # EdgeTerms and EdgeGrads, with EDGES
    q_stride, k_stride, v_stride, bias_stride, do_stride, dlse_stride,
    num_rows, num_middle, num_segments,
    scale: tl.float64, low: tl.float64, high: tl.float64, log_eps: tl.float64,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DLSE: tl.constexpr, NEED_Q: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr,
    C: tl.constexpr = 1, BLOCK_C: tl.constexpr = 1, EDGE_ALIGN: tl.constexpr = 1,
    EDGES: tl.constexpr = False, SHARED: tl.constexpr = False,
    seed_ptr=None, threshold=0,  # of dropout
    active_ptr=None, active_stride=None,  # [N, H], which heads are not masked
):  # fmt: skip
    """Grid (row groups, head blocks): dq, w and gamma of BLOCK_R rows, or one, of BLOCK_H heads.

    One walk gives all: dq = scale (w sum_j p dp k - gamma sum_j p k), and likewise for attr_q.
    """
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    BUCKETS: tl.constexpr = few_ptr is not None
    ATTR_Q: tl.constexpr = terms.attr_q is not None if EDGES else False
    ATTR_DO: tl.constexpr = grads.attr_do is not None if EDGES else False
    ATTR_DQ: tl.constexpr = grads.attr_dq is not None if EDGES else False
    DSCORES: tl.constexpr = grads.dscores is not None and NEED_Q if EDGES else False
    PARTS: tl.constexpr = 3 if DSCORES else 2
    row, mine, begin, end, stride = take_rows(
        row_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    read = mine
    if active_ptr is not None:
        read = load_active(active_ptr, active_stride, row, mine, tl.max(head, 0))
        end = tl.where(read, end, begin)
    lane = tl.arange(0, BLOCK_E)
    low, high, scale = scalar(low, ACC), scalar(high, ACC), scalar(scale, ACC)

    q = load_heads(q_ptr, q_stride, row[:, None], read[:, None], head, H, D, BLOCK_D, ALIGN)
    q = q.to(ACC)  # [R, 1, H, D]
    do = load_heads(do_ptr, do_stride, row[:, None], read[:, None], head, H, DV, BLOCK_DV, ALIGN)
    do = do.to(ACC)  # [R, 1, H, DV]
    attr_q = 0.0
    if EDGES:
        attr_q = load_attr_q(
            terms, row[:, None], read[:, None], head, H, C, BLOCK_C, EDGE_ALIGN, ACC
        )  # [R, 1, H, C]
    if ATTR_DO:
        attr_do = load_heads(
            grads.attr_do, (H * C, C, 1), row[:, None], read[:, None], head, H, C, BLOCK_C,
            EDGE_ALIGN,
        ).to(ACC)  # fmt: skip
    at = row[:, None] * H + head[None, :]
    lse = load_lse(lse_ptr + at, mine[:, None] & (head < H)[None, :])  # [R, H]

    sum_p = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H], ACC)
    sum_pdp = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H], ACC)
    pk = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_D], ACC)
    pdpk = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_D], ACC)
    if ATTR_DQ:
        pa = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_C], ACC)
        pdpa = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_C], ACC)
    if DSCORES:
        dtk = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_D], ACC)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]
        live = slot < end[:, None]
        col = tl.load(col_ptr + slot, mask=live, other=0)
        edge = tl.load(edge_ptr + slot, mask=live, other=0) if HAS_BIAS or EDGES else slot
        k = load_heads(k_ptr, k_stride, col, live, head // GROUP, H // GROUP, D, BLOCK_D, ALIGN)
        v = load_heads(v_ptr, v_stride, col, live, head // GROUP, H // GROUP, DV, BLOCK_DV, ALIGN)
        k, v, attr, factor = k.to(ACC), v.to(ACC), 0.0, 1.0
        if EDGES:
            k, edge_key = add_edge_key(k, terms, edge, live, head, H, D, BLOCK_D, EDGE_ALIGN)
            k = k * load_gate(terms, edge, live, head, H, D, BLOCK_D, EDGE_ALIGN, ACC)
            v = add_edge_value(
                v, edge_key, terms, edge, live, head, H, DV, BLOCK_DV, EDGE_ALIGN, SHARED
            )
            attr = load_attr(terms, edge, live, C, BLOCK_C, EDGE_ALIGN, ACC)
            factor = load_factor(terms, edge, live, head, H, ACC)
        s, through, _ = logits(
            q, k, attr_q, attr, factor, live, edge, head, bias_ptr, bias_stride,
            scale, low, high, H, CLAMP, HAS_BIAS, ATTR_Q,
        )  # fmt: skip
        p = tl.exp(s - lse[:, None, :])
        dp = tl.sum(do * v, 3)
        if ATTR_DO:
            dp += tl.sum(attr_do * attr, 3)
        pdp = p * dp * kept(seed_ptr, threshold, edge, head, ACC)
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
            dt = load_heads(
                grads.dscores, (H * D, D, 1), edge, live, head, H, D, BLOCK_D, EDGE_ALIGN
            )
            dtk += dt.to(ACC) * factor[:, :, :, None] * k

    total, delta = tl.sum(sum_p, 1), tl.sum(sum_pdp, 1)  # [R, H]
    row_pk, row_pdpk = tl.sum(pk, 1), tl.sum(pdpk, 1)  # [R, H, D]
    row_dtk = tl.zeros_like(row_pk)
    if DSCORES:
        row_dtk = tl.sum(dtk, 1)
    if ATTR_DQ:
        row_pa, row_pdpa = tl.sum(pa, 1), tl.sum(pdpa, 1)  # [R, H, C]
    if BUCKETS:
        first = tl.arange(0, BLOCK_R) == 0
        if tl.program_id(0) < num_segments + num_middle:
            mine = mine & first
            total = joined(total)
            delta = joined(delta)
            row_pk = joined(row_pk)
            row_pdpk = joined(row_pdpk)
            if DSCORES:
                row_dtk = joined(row_dtk)
            if ATTR_DQ:
                row_pa = joined(row_pa)
                row_pdpa = joined(row_pdpa)
        if tl.program_id(0) < num_segments:
            part = tl.program_id(0).to(tl.int64) + tl.zeros([BLOCK_R], tl.int64)
            part_at = part[:, None] * H + head[None, :]
            mask = mine[:, None] & (head < H)[None, :]
            tl.store(stat_ptr + 2 * part_at, total, mask=mask)
            tl.store(stat_ptr + 2 * part_at + 1, delta, mask=mask)
            live = mine[:, None]
            if NEED_Q:
                base = PARTS * part[:, None]
                store_heads(part_ptr, base, live, head, H, D, BLOCK_D, row_pk[:, None])
                store_heads(part_ptr, base + 1, live, head, H, D, BLOCK_D, row_pdpk[:, None])
                if DSCORES:
                    store_heads(part_ptr, base + 2, live, head, H, D, BLOCK_D, row_dtk[:, None])
            if ATTR_DQ:
                base = 2 * part[:, None]
                store_heads(grads.attr_part, base, live, head, H, C, BLOCK_C, row_pa[:, None])
                store_heads(grads.attr_part, base + 1, live, head, H, C, BLOCK_C, row_pdpa[:, None])
            mine = mine & (row < 0)  # nothing else is stored
    finish_row(
        total, delta, row_pk, row_pdpk, row_dtk, lse, row, mine, head, scale, log_eps,
        dlse_ptr, dlse_stride, wgamma_ptr, dq_ptr, H, D, BLOCK_D, HAS_DLSE, NEED_Q,
    )  # fmt: skip
    if ATTR_DQ:
        finish_row(
            total, delta, row_pa, row_pdpa, tl.zeros_like(row_pa), lse, row, mine, head, scale,
            log_eps, dlse_ptr, dlse_stride, wgamma_ptr, grads.attr_dq, H, C, BLOCK_C, HAS_DLSE,
            True,
        )  # fmt: skip


@triton.jit(do_not_specialize=[*COUNTS, "first_block", "threshold"])
def _attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, do_ptr, lse_ptr, wgamma_ptr,
    dk_ptr, dv_ptr, dbias_ptr,  # [M, H_kv, D], [M, H_kv, DV], [E, H]
    dk_part_ptr, dv_part_ptr,  # of segments: [S, H_kv, D], [S, H_kv, DV]
    col_ptr, row_ptr, edge_ptr,  # [M + 1], [E], [E]
    few_ptr, middle_ptr, segment_ptr,
    terms, grads,  # EdgeTerms and EdgeGrads, with EDGES
    q_stride, k_stride, v_stride, bias_stride, do_stride,
    num_rows, num_middle, num_segments,  # of columns
    first_block,  # of heads, where there is one launch for each
    scale: tl.float64, low: tl.float64, high: tl.float64,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, NEED_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr,
    C: tl.constexpr = 1, BLOCK_C: tl.constexpr = 1, EDGE_ALIGN: tl.constexpr = 1,
    EDGES: tl.constexpr = False, SHARED: tl.constexpr = False,
    seed_ptr=None, threshold=0,  # of dropout
    active_ptr=None, active_stride=None,  # [N, H], which heads are not masked
    ADD: tl.constexpr = False,  # to what earlier launches made of the attributes' gradient
):  # fmt: skip
    """Grid (column groups, key head blocks): dk, dv of BLOCK_R columns, or of one, and what their
    edges receive.

    The query heads that share a key head come one after another.
    """
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    BUCKETS: tl.constexpr = few_ptr is not None
    ATTR_Q: tl.constexpr = terms.attr_q is not None if EDGES else False
    ATTR_DO: tl.constexpr = grads.attr_do is not None if EDGES else False
    DATTR: tl.constexpr = grads.dattr is not None if EDGES else False
    DSCORES: tl.constexpr = grads.dscores is not None if EDGES else False
    col, mine, begin, end, stride = take_rows(
        col_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    kv_head = (tl.program_id(1) + first_block) * BLOCK_H + tl.arange(0, BLOCK_H)
    lane = tl.arange(0, BLOCK_E)
    low, high, scale = scalar(low, ACC), scalar(high, ACC), scalar(scale, ACC)
    H_KV: tl.constexpr = H // GROUP
    read = mine
    if active_ptr is not None:
        # heads of columns: no edge leaves its graph
        first = tl.max(kv_head, 0) * GROUP
        read = load_active(active_ptr, active_stride, col, mine, first)
        for member in range(1, GROUP):
            read |= load_active(active_ptr, active_stride, col, mine, first + member)
        end = tl.where(read, end, begin)

    k = load_heads(k_ptr, k_stride, col[:, None], read[:, None], kv_head, H_KV, D, BLOCK_D, ALIGN)
    k = k.to(ACC)  # [R, 1, H, D]
    v = load_heads(v_ptr, v_stride, col[:, None], read[:, None], kv_head, H_KV, DV, BLOCK_DV, ALIGN)
    v = v.to(ACC)  # [R, 1, H, DV]

    dk = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_DV], ACC)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]
        live = slot < end[:, None]
        row = tl.load(row_ptr + slot, mask=live, other=0)
        if HAS_BIAS or NEED_BIAS or EDGES:
            edge = tl.load(edge_ptr + slot, mask=live, other=0)
        else:
            edge = slot
        attr = 0.0
        if EDGES:
            attr = load_attr(terms, edge, live, C, BLOCK_C, EDGE_ALIGN, ACC)
        if DATTR:
            dattr = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_C], ACC)
        for member in range(GROUP):
            head = kv_head * GROUP + member  # H and beyond for the padded ones
            here = live
            if active_ptr is not None:
                on = load_active(active_ptr, active_stride, col, mine, tl.max(head, 0))
                here = live & on[:, None]
            q = load_heads(q_ptr, q_stride, row, here, head, H, D, BLOCK_D, ALIGN).to(ACC)
            do = load_heads(do_ptr, do_stride, row, here, head, H, DV, BLOCK_DV, ALIGN).to(ACC)
            key, value, gate, factor, attr_q = k, v, 1.0, 1.0, 0.0
            if EDGES:
                key, edge_key = add_edge_key(k, terms, edge, here, head, H, D, BLOCK_D, EDGE_ALIGN)
                gate = load_gate(terms, edge, here, head, H, D, BLOCK_D, EDGE_ALIGN, ACC)
                value = add_edge_value(
                    v, edge_key, terms, edge, here, head, H, DV, BLOCK_DV, EDGE_ALIGN, SHARED
                )
                attr_q = load_attr_q(terms, row, here, head, H, C, BLOCK_C, EDGE_ALIGN, ACC)
                factor = load_factor(terms, edge, here, head, H, ACC)
            at = row.to(tl.int64)[:, :, None] * H + head[None, None, :]
            mask = here[:, :, None] & (head < H)[None, None, :]
            lse = load_lse(lse_ptr + at, mask)  # [R, E, H]
            # where no edge counts, neither do upstream gradients, finite or not
            counts = (lse < float("inf"))[:, :, :, None]
            do = tl.where(counts, do, 0.0)
            w = tl.load(wgamma_ptr + 2 * at, mask=mask, other=0.0)
            gated = key * gate
            s, through, bare = logits(
                q, gated, attr_q, attr, factor, here, edge, head, bias_ptr, bias_stride,
                scale, low, high, H, CLAMP, HAS_BIAS, ATTR_Q,
            )  # fmt: skip
            p = tl.exp(s - lse)
            keep = kept(seed_ptr, threshold, edge, head, ACC)
            dvalue = (w * p * keep)[:, :, :, None] * do
            if NEED_V:
                dv += dvalue
            if NEED_K or NEED_BIAS or EDGES:
                gamma = tl.load(wgamma_ptr + 2 * at + 1, mask=mask, other=0.0)
                dp = tl.sum(do * value, 3)
                if ATTR_DO:
                    attr_do = load_heads(
                        grads.attr_do, (H * C, C, 1), row, here, head, H, C, BLOCK_C,
                        EDGE_ALIGN,
                    ).to(ACC)  # fmt: skip
                    attr_do = tl.where(counts, attr_do, 0.0)
                    dp += tl.sum(attr_do * attr, 3)
                ds = p * (w * dp * keep - gamma)
                edge_at = edge.to(tl.int64)[:, :, None] * H + head[None, None, :]
                if NEED_BIAS:
                    tl.store(dbias_ptr + edge_at, ds.to(dbias_ptr.dtype.element_ty), mask=mask)
                ds = tl.where(through, ds, 0.0)
                dt = (ds * factor)[:, :, :, None]  # of every product of channels, but for scale
                if DSCORES:
                    dscores = load_heads(
                        grads.dscores, (H * D, D, 1), edge, here, head, H, D, BLOCK_D,
                        EDGE_ALIGN,
                    ).to(ACC)  # fmt: skip
                    dt = dt + dscores * factor[:, :, :, None]
                dkey = dt * q * gate
                if NEED_K:
                    dk += dkey
                if EDGES:
                    if grads.dfactor is not None:
                        dfactor = ds * bare
                        if DSCORES:
                            dfactor += tl.sum(dscores * q * gated, 3) * scale
                        dfactor = dfactor.to(grads.dfactor.dtype.element_ty)
                        tl.store(grads.dfactor + edge_at, dfactor, mask=mask)
                    if grads.dgate is not None:
                        dgate = dt * q * key * scale
                        store_heads(grads.dgate, edge, here, head, H, D, BLOCK_D, dgate)
                    if grads.dkey is not None:
                        dkey = dkey * scale
                        if SHARED:
                            dkey += dvalue
                        store_heads(grads.dkey, edge, here, head, H, D, BLOCK_D, dkey)
                    if grads.dvalue is not None:
                        store_heads(grads.dvalue, edge, here, head, H, DV, BLOCK_DV, dvalue)
                if DATTR:
                    if ATTR_Q:
                        dattr += tl.sum((ds * factor * scale)[:, :, :, None] * attr_q, 2)
                    if ATTR_DO:
                        dattr += tl.sum((w * p * keep)[:, :, :, None] * attr_do, 2)
        if DATTR:
            one, share = tl.arange(0, 1), dattr[:, :, None, :]
            if ADD:
                share += load_heads(grads.dattr, (C, 0, 1), edge, live, one, 1, C, BLOCK_C, 1)
            store_heads(grads.dattr, edge, live, one, 1, C, BLOCK_C, share)

    col_dk, col_dv = tl.sum(dk, 1) * scale, tl.sum(dv, 1)  # [R, H, D]
    if BUCKETS:
        first = tl.arange(0, BLOCK_R) == 0
        if tl.program_id(0) < num_segments + num_middle:
            mine = mine & first
            col_dk = joined(col_dk)
            col_dv = joined(col_dv)
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


class EdgeGrads(NamedTuple):
    """Upstream gradients that the backward reads besides, and what it writes; None where absent."""

    dscores: Any  # [E, H, D]
    attr_do: Any  # [N, H, C]
    attr_dq: Any  # [N, H, C]
    attr_part: Any  # of segments: [S, 2, H, C]
    dfactor: Any  # [E, H]
    dgate: Any  # [E, H, D]
    dkey: Any  # [E, H, D]
    dvalue: Any  # [E, H, DV]
    dattr: Any  # [E, C], in the accumulator's dtype


def attention_bwd(
    do, dlse, q, k, v, edge_bias, on_rows, on_cols, lse, rows, columns,
    scale, low, high, eps, need_q, need_k, need_v, need_bias,
    terms=None, grads=None, edge_meta=_PLAIN,
):  # fmt: skip
    """-> dq [N, H, D], dk [M, H_kv, D], dv [M, H_kv, DV], dbias [E, H]; empty where not needed.

    With ``terms``, what ``grads`` has is read and filled.
    """
    n, heads, width = q.shape
    m, kv_heads, _ = k.shape
    row_ptr, col, edge, few, middle, segment, split = attention_walk(rows)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if need_q else q.new_empty(0)
    dk = torch.empty_like(k, memory_format=torch.contiguous_format) if need_k else q.new_empty(0)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format) if need_v else q.new_empty(0)
    dbias = on_edges(q, on_rows, col.shape[0], heads) if need_bias else q.new_empty(0)
    wgamma = lse.new_empty(n, heads, 2)
    shared = {"CLAMP": clamps(low, high), "HAS_BIAS": edge_bias is not None}
    strides = q.stride(), k.stride(), v.stride(), stride(edge_bias), do.stride()
    floats = scale, low, high
    if n and heads:
        aligned = q, k, v, do
        meta, grid, counts = attention_plan(
            q, k, v, aligned, n, heads, few, middle, segment, edge_meta, on_rows
        )
        parts = part = stat = None
        if segment is not None:
            parts = counts[2]
            sums = 3 if edge_meta and grads.dscores is not None else 2
            part = lse.new_empty(parts if need_q else 0, sums, heads, width)
            stat = lse.new_empty(parts, heads, 2)
            if edge_meta and grads.attr_dq is not None:
                attr_part = lse.new_empty(parts, 2, heads, grads.attr_dq.shape[2])
                grads = grads._replace(attr_part=attr_part)
        _attention_bwd_dq_kernel[grid](
            q, k, v, edge_bias, do, dlse, lse, dq, wgamma, part, stat,
            row_ptr, col, edge, few, middle, segment, terms, grads,
            *strides, stride(dlse), *counts, *floats, log(eps),
            HAS_DLSE=dlse is not None, NEED_Q=need_q, **shared, **meta,
        )  # fmt: skip
        if parts:
            row = stat, lse, dlse, stride(dlse), split, scale, log(eps)
            combine_rows(dq, wgamma, part, *row, need_q)
            if edge_meta and grads.attr_dq is not None:
                combine_rows(grads.attr_dq, wgamma, grads.attr_part, *row, True)
    if m and kv_heads and (need_k or need_v or need_bias or edge_meta):
        col_ptr, col_row, col_edge, few, middle, segment, split = attention_walk(columns)
        aligned = q, k, v, do
        meta, grid, counts = attention_plan(
            q, k, v, aligned, m, kv_heads, few, middle, segment, edge_meta, on_cols
        )
        parts = dk_part = dv_part = None
        if segment is not None:
            parts = counts[2]
            dk_part = lse.new_empty(parts if need_k else 0, kv_heads, width)
            dv_part = lse.new_empty(parts if need_v else 0, kv_heads, v.shape[2])
        launches = [(0, grid)]
        if edge_meta and grads.dattr is not None:
            # heads share the attributes: one launch after another adds to their gradient
            launches = [(block, (grid[0], 1)) for block in range(grid[1])]
        for first_block, part_grid in launches:
            _attention_bwd_dkv_kernel[part_grid](
                q, k, v, edge_bias, do, lse, wgamma, dk, dv, dbias, dk_part, dv_part,
                col_ptr, col_row, col_edge, few, middle, segment, terms, grads,
                *strides, *counts, first_block, *floats,
                NEED_K=need_k, NEED_V=need_v, NEED_BIAS=need_bias, ADD=first_block > 0,
                **shared, **meta,
            )  # fmt: skip
        if parts:
            for out, sums, need in ((dk, dk_part, need_k), (dv, dv_part, need_v)):
                if need:
                    combine_columns(out, sums, split)
    return dq, dk, dv, dbias


def attention_edges_bwd(
    do, dlse, dscores, dattr_o, q, k, v, edge_bias, on_rows, on_cols, terms, lse, rows, columns,
    scale, low, high, eps, dropout, shared, needs,
):  # fmt: skip
    """-> gradients of q, k, v, the bias, gate, key, value, attr, attr_q; empty where not needed."""
    gate, key, value, attr, attr_q, _ = terms
    dgate, dkey, dvalue, dattr, dattr_q = (
        q.new_empty(0) if x is None or not need else on_edges(x, on_rows, *x.shape)
        for x, need in zip((gate, key, value, attr, attr_q), needs[4:], strict=True)
    )
    dscores, dattr_o = (None if x is None else x.contiguous() for x in (dscores, dattr_o))
    terms, edge_meta = attention_terms(q, terms, dropout, shared, (dscores, dattr_o))
    by_head = gate is not None and gate.ndim == 2
    wanted = zip((dattr_q, dgate, dgate, dkey, dvalue, dattr), (8, 4, 4, 5, 6, 7), strict=True)
    dattr_to, dfactor, dgate_to, dkey_to, dvalue_to, dattr_wide = (
        grad if needs[number] else None for grad, number in wanted
    )
    if dattr_wide is not None and dattr.dtype != lse.dtype:
        dattr_wide = on_edges(lse, on_rows, *dattr.shape)
    grads = EdgeGrads(
        dscores=dscores,
        attr_do=dattr_o,
        attr_dq=dattr_to,
        attr_part=None,
        dfactor=dfactor if by_head else None,
        dgate=None if by_head else dgate_to,
        dkey=dkey_to,
        dvalue=dvalue_to,
        dattr=dattr_wide,
    )
    found = attention_bwd(
        do, dlse, q, k, v, edge_bias, on_rows, on_cols, lse, rows, columns,
        scale, low, high, eps, *needs[:4], terms, grads, edge_meta,
    )  # fmt: skip
    if dattr_wide is not None and dattr_wide is not dattr:
        dattr = dattr_wide.to(dattr.dtype)
    return [*found, dgate, dkey, dvalue, dattr, dattr_q]

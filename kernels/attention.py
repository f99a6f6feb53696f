"""Neighbourhood attention by gathering: softmax over the edges of each row.

    s_ij = clamp(scale q_i . k_j) + bias_ij
    o_i  = sum_j a_ij v_j,   a_ij = exp(s_ij) / (Z_i + eps),   Z_i = sum_j exp(s_ij) = exp(lse_i)

With p = exp(s - lse), r = Z / (Z + eps), dp_ij = do_i . v_j, the gradient g of the lse, and
t_i = sum_j p_ij, which is 1 but for the rounding of the stored lse (that of the largest logit):

    a_ij = w_i p_ij,   w_i = r_i / t_i,   gamma_i = (r_i w_i sum_j p_ij dp_ij - g_i) / t_i
    ds_ij = p_ij (w_i dp_ij - gamma_i),   dq_i = scale sum_j ds_ij k_j
    dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i a_ij do_i,   dbias_ij = ds_ij

A program owns BLOCK_R rows and BLOCK_H heads (all of them up to 1,024 channels) and takes
BLOCK_E edges of each row at a time:

    row 0 | e e e e | e e e . |          [R, E] indices, read once for all heads
    row 1 | e . . . |         |          [R, E, H, D] gathered tile, a whole row of k or v an edge
             step 0    step 1

Each of the BLOCK_E lanes keeps its own running maximum, sum and accumulator, so a step has no
reduction but the dot product; lanes meet once, after the last step. The forward and the dq kernel
walk the rows, the dkv kernel walks the same edges by columns, where it also writes dbias: every
output element has one writer, in a fixed order, hence no atomics and the same bits every time.
w and gamma come from p and dp in the accumulator's precision, never from a rounded output.
"""

import math

import torch
import triton
import triton.language as tl

from .configs import attention_tile, power_of_2
from .prims import load_heads, logits, scalar, store_heads


@triton.jit(do_not_specialize=["num_rows"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr,  # [N, H, D], [M, H_kv, D], [M, H_kv, DV], [E, H]
    o_ptr, lse_ptr, weights_ptr,  # [N, H, DV], [N, H], [E, H]
    row_ptr, col_ptr, edge_ptr,  # [N + 1], [E], [E]
    q_stride, k_stride, v_stride, bias_stride,  # (node, head, channel); outputs are contiguous
    num_rows, scale: tl.float64, low: tl.float64, high: tl.float64, log_eps: tl.float64,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr, WEIGHTS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid (row groups, head blocks): one program owns BLOCK_R rows of BLOCK_H heads."""
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    lane = tl.arange(0, BLOCK_E)
    mine = row < num_rows
    start = tl.load(row_ptr + row, mask=mine, other=0).to(tl.int64)
    end = tl.load(row_ptr + row + 1, mask=mine, other=0).to(tl.int64)
    longest = tl.max(end - start)
    low, high, scale = scalar(low, ACC), scalar(high, ACC), scalar(scale, ACC)

    q = load_heads(q_ptr, q_stride, row[:, None], mine[:, None], head, H, D, BLOCK_D, ALIGN)
    q = q.to(ACC)  # [R, 1, H, D]

    lane_max = tl.full([BLOCK_R, BLOCK_E, BLOCK_H], float("-inf"), ACC)
    lane_sum = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H], ACC)
    acc = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_DV], ACC)
    for step in range(0, longest, BLOCK_E):
        slot = start[:, None] + step + lane[None, :]  # [R, E]
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

    row_max = tl.max(lane_max, 1)  # [R, H]
    pivot = tl.where(row_max == float("-inf"), 0.0, row_max)
    decay = tl.exp(lane_max - pivot[:, None, :])
    total = tl.sum(lane_sum * decay, 1)  # [R, H]
    empty = total == 0.0
    lse = pivot + tl.log(tl.where(empty, 1.0, total))
    kept = _kept(lse, log_eps, ACC)
    o = tl.sum(acc * decay[:, :, :, None], 1)
    norm = kept / tl.where(empty, 1.0, total)
    o = tl.where(empty[:, :, None], 0.0, o * norm[:, :, None])
    store_heads(o_ptr, row[:, None], mine[:, None], head, H, DV, BLOCK_DV, o[:, None, :, :])
    at = row[:, None] * H + head[None, :]
    mask = mine[:, None] & (head < H)[None, :]
    tl.store(lse_ptr + at, tl.where(empty, float("-inf"), lse), mask=mask)

    if WEIGHTS:
        # not through the lse, which is rounded as the largest logit is
        for step in range(0, longest, BLOCK_E):
            slot = start[:, None] + step + lane[None, :]
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


@triton.jit(do_not_specialize=["num_rows"])
def _attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, do_ptr, dlse_ptr, lse_ptr,
    dq_ptr, wgamma_ptr,  # [N, H, D], [N, H, 2]: w and gamma
    row_ptr, col_ptr, edge_ptr,
    q_stride, k_stride, v_stride, bias_stride, do_stride, dlse_stride,
    num_rows, scale: tl.float64, low: tl.float64, high: tl.float64, log_eps: tl.float64,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DLSE: tl.constexpr, NEED_Q: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid (row groups, head blocks): dq, w and gamma of BLOCK_R rows of BLOCK_H heads.

    One walk gives all: dq = scale (w sum_j p dp k - gamma sum_j p k).
    """
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    lane = tl.arange(0, BLOCK_E)
    mine = row < num_rows
    start = tl.load(row_ptr + row, mask=mine, other=0).to(tl.int64)
    end = tl.load(row_ptr + row + 1, mask=mine, other=0).to(tl.int64)
    low, high, scale = scalar(low, ACC), scalar(high, ACC), scalar(scale, ACC)

    q = load_heads(q_ptr, q_stride, row[:, None], mine[:, None], head, H, D, BLOCK_D, ALIGN)
    q = q.to(ACC)  # [R, 1, H, D]
    do = load_heads(do_ptr, do_stride, row[:, None], mine[:, None], head, H, DV, BLOCK_DV, ALIGN)
    do = do.to(ACC)  # [R, 1, H, DV]
    at = row[:, None] * H + head[None, :]
    mask = mine[:, None] & (head < H)[None, :]
    lse = _load_lse(lse_ptr + at, mask)  # [R, H]

    sum_p = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H], ACC)
    sum_pdp = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H], ACC)
    pk = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_D], ACC)
    pdpk = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_D], ACC)
    for step in range(0, tl.max(end - start), BLOCK_E):
        slot = start[:, None] + step + lane[None, :]
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

    total = tl.sum(sum_p, 1)
    total = tl.where(total == 0.0, 1.0, total)
    kept = _kept(lse, log_eps, ACC)
    w = kept / total
    gamma = kept * w * tl.sum(sum_pdp, 1)
    if HAS_DLSE:
        dlse_at = row[:, None] * dlse_stride[0]
        dlse_at += head.to(tl.int64)[None, :] * dlse_stride[1]
        gamma -= tl.load(dlse_ptr + dlse_at, mask=mask, other=0.0).to(ACC)
    gamma /= total
    # where no edge counts, neither do the upstream gradients, finite or not
    empty = lse == float("inf")
    gamma = tl.where(empty, 0.0, gamma)
    tl.store(wgamma_ptr + 2 * at, w, mask=mask)
    tl.store(wgamma_ptr + 2 * at + 1, gamma, mask=mask)
    if NEED_Q:
        dq = w[:, :, None] * tl.sum(pdpk, 1) - gamma[:, :, None] * tl.sum(pk, 1)
        dq = tl.where(empty[:, :, None], 0.0, dq)[:, None, :, :] * scale
        store_heads(dq_ptr, row[:, None], mine[:, None], head, H, D, BLOCK_D, dq)


@triton.jit(do_not_specialize=["num_cols"])
def _attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, do_ptr, lse_ptr, wgamma_ptr,
    dk_ptr, dv_ptr, dbias_ptr,  # [M, H_kv, D], [M, H_kv, DV], [E, H]
    col_ptr, row_ptr, edge_ptr,  # [M + 1], [E], [E]
    q_stride, k_stride, v_stride, bias_stride, do_stride,
    num_cols, scale: tl.float64, low: tl.float64, high: tl.float64,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr,
    NEED_K: tl.constexpr, NEED_V: tl.constexpr, NEED_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Grid (column groups, key head blocks): dk, dv and dbias of BLOCK_R columns.

    The query heads that share a key head come one after another.
    """
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    col = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    kv_head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    lane = tl.arange(0, BLOCK_E)
    mine = col < num_cols
    start = tl.load(col_ptr + col, mask=mine, other=0).to(tl.int64)
    end = tl.load(col_ptr + col + 1, mask=mine, other=0).to(tl.int64)
    low, high, scale = scalar(low, ACC), scalar(high, ACC), scalar(scale, ACC)
    H_KV: tl.constexpr = H // GROUP

    k = load_heads(k_ptr, k_stride, col[:, None], mine[:, None], kv_head, H_KV, D, BLOCK_D, ALIGN)
    k = k.to(ACC)  # [R, 1, H, D]
    v = load_heads(v_ptr, v_stride, col[:, None], mine[:, None], kv_head, H_KV, DV, BLOCK_DV, ALIGN)
    v = v.to(ACC)  # [R, 1, H, DV]

    dk = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_DV], ACC)
    for step in range(0, tl.max(end - start), BLOCK_E):
        slot = start[:, None] + step + lane[None, :]
        live = slot < end[:, None]
        row = tl.load(row_ptr + slot, mask=live, other=0)
        edge = tl.load(edge_ptr + slot, mask=live, other=0) if HAS_BIAS or NEED_BIAS else slot
        for member in range(GROUP):
            head = kv_head * GROUP + member  # H and beyond for the padded ones
            q = load_heads(q_ptr, q_stride, row, live, head, H, D, BLOCK_D, ALIGN).to(ACC)
            do = load_heads(do_ptr, do_stride, row, live, head, H, DV, BLOCK_DV, ALIGN).to(ACC)
            at = row.to(tl.int64)[:, :, None] * H + head[None, None, :]
            mask = live[:, :, None] & (head < H)[None, None, :]
            lse = _load_lse(lse_ptr + at, mask)  # [R, E, H]
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

    if NEED_K:
        out = (tl.sum(dk, 1) * scale)[:, None, :, :]
        store_heads(dk_ptr, col[:, None], mine[:, None], kv_head, H_KV, D, BLOCK_D, out)
    if NEED_V:
        out = tl.sum(dv, 1)[:, None, :, :]
        store_heads(dv_ptr, col[:, None], mine[:, None], kv_head, H_KV, DV, BLOCK_DV, out)


@triton.jit
def _load_lse(ptr, mask):
    """The row's LSE; +inf for a row without a finite logit, so that exp(s - lse) is 0 there."""
    lse = tl.load(ptr, mask=mask, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _kept(lse, log_eps, ACC: tl.constexpr):
    """r = Z / (Z + eps), exactly 1 for eps = 0."""
    return 1.0 / (1.0 + tl.exp(scalar(log_eps, ACC) - lse))


def attention_fwd(
    q, k, v, edge_bias, row_ptr, col, edge, scale, low, high, eps, return_weights
):  # fmt: skip
    """-> o [N, H, DV], lse [N, H], weights [E, H] (or [0, H]) in the caller's edge order."""
    n, heads, _ = q.shape
    o = q.new_empty(n, heads, v.shape[2])
    lse = q.new_empty(n, heads, dtype=_accumulator(q))
    weights = q.new_empty(col.shape[0] if return_weights else 0, heads)
    meta, grid = _plan(q, k, v, (q, k, v), col.shape[0], n, heads)
    if n and heads:
        _attention_fwd_kernel[grid](
            q, k, v, edge_bias, o, lse, weights, row_ptr, col, edge,
            q.stride(), k.stride(), v.stride(), _stride(edge_bias),
            n, scale, low, high, _log(eps),
            CLAMP=_clamps(low, high), HAS_BIAS=edge_bias is not None, WEIGHTS=return_weights,
            **meta,
        )  # fmt: skip
    return o, lse, weights


def attention_bwd(
    do, dlse, q, k, v, edge_bias, lse, row_ptr, col, edge, col_ptr, col_row, col_slot, col_edge,
    scale, low, high, eps, need_q, need_k, need_v, need_bias,
):  # fmt: skip
    """-> dq [N, H, D], dk [M, H_kv, D], dv [M, H_kv, DV], dbias [E, H]; empty where not needed."""
    n, heads, _ = q.shape
    m, kv_heads, _ = k.shape
    num_edges = col.shape[0]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if need_q else q.new_empty(0)
    dk = torch.empty_like(k, memory_format=torch.contiguous_format) if need_k else q.new_empty(0)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format) if need_v else q.new_empty(0)
    dbias = q.new_empty(num_edges, heads) if need_bias else q.new_empty(0)
    wgamma = lse.new_empty(n, heads, 2)
    shared = {"CLAMP": _clamps(low, high), "HAS_BIAS": edge_bias is not None}
    strides = q.stride(), k.stride(), v.stride(), _stride(edge_bias), do.stride()
    floats = scale, low, high
    if n and heads:
        meta, grid = _plan(q, k, v, (q, k, v, do), num_edges, n, heads)
        _attention_bwd_dq_kernel[grid](
            q, k, v, edge_bias, do, dlse, lse, dq, wgamma, row_ptr, col, edge,
            *strides, _stride(dlse), n, *floats, _log(eps),
            HAS_DLSE=dlse is not None, NEED_Q=need_q, **shared, **meta,
        )  # fmt: skip
    if m and kv_heads and (need_k or need_v or need_bias):
        meta, grid = _plan(q, k, v, (q, k, v, do), num_edges, m, kv_heads)
        _attention_bwd_dkv_kernel[grid](
            q, k, v, edge_bias, do, lse, wgamma, dk, dv, dbias, col_ptr, col_row, col_edge,
            *strides, m, *floats,
            NEED_K=need_k, NEED_V=need_v, NEED_BIAS=need_bias, **shared, **meta,
        )  # fmt: skip
    return dq, dk, dv, dbias


def _plan(q, k, v, aligned, num_edges, num_rows, heads):
    block_d, block_dv = power_of_2(q.shape[2]), power_of_2(v.shape[2])
    tile = attention_tile(heads, max(block_d, block_dv), q.element_size(), num_edges, num_rows)
    # channels that every row and head start at a multiple of, up to 16 bytes
    align = 16 // q.element_size()
    for x in aligned:
        node, head, channel = x.stride()
        align = math.gcd(align, node, head) if channel == 1 else 1
    meta = {
        "H": q.shape[1],
        "GROUP": q.shape[1] // max(k.shape[1], 1),
        "D": q.shape[2],
        "DV": v.shape[2],
        "BLOCK_R": tile.block_r,
        "BLOCK_E": tile.block_e,
        "BLOCK_H": tile.block_h,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "ALIGN": align,
        "num_warps": tile.num_warps,
    }
    return meta, (-(-num_rows // tile.block_r), -(-heads // tile.block_h))


def _accumulator(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _clamps(low, high):
    return low > -math.inf or high < math.inf


def _log(eps):
    return math.log(eps) if eps else -math.inf


def _stride(x):
    return (0, 0) if x is None else x.stride()

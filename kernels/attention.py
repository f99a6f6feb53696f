"""Neighbourhood attention by gathering: softmax over the edges of each row.

    s_ij = clamp(scale q_i . k_j) + bias_ij
    o_i  = sum_j a_ij v_j,   a_ij = exp(s_ij) / (Z_i + eps),   Z_i = sum_j exp(s_ij) = exp(lse_i)

With p = exp(s - lse), r = Z / (Z + eps), dp_ij = do_i . v_j, the gradient g of the lse, and
t_i = sum_j p_ij, which is 1 but for the rounding of the stored lse (that of the largest logit):

    a_ij = w_i p_ij,   w_i = r_i / t_i,   gamma_i = (r_i w_i sum_j p_ij dp_ij - g_i) / t_i
    ds_ij = p_ij (w_i dp_ij - gamma_i),   dq_i = scale sum_j ds_ij k_j
    dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i a_ij do_i,   dbias_ij = ds_ij

Edges may have more (``EdgeTerms`` in ``edge_tile.py``): with a gate g, vectors added to key and
value, attributes x whose product with attr_q_i joins the logit, and what dropout multiplies, m,

    t_ij = scale q_i * (k_j + key_ij) * g_ij
    s_ij = clamp(sum_d t_ij + scale g_ij attr_q_i . x_ij) + bias_ij
    o_i  = sum_j m_ij a_ij (v_j + value_ij),   attr_o_i = sum_j m_ij a_ij x_ij

A program takes BLOCK_R x BLOCK_E edges at a time, for BLOCK_H heads (all of them up to 1,024
channels): of BLOCK_R rows that have few edges, of one row that has more, or of one segment of a
row that has too many for one program (see ``fastgt/tiles.py``):

    row 0 | e e e e | e e e . |          [R, E] indices, read once for all heads
    row 1 | e . . . |         |          [R, E, H, D] gathered tile, a whole row of k or v an edge
             step 0    step 1

Each of the R x E lanes keeps its own running maximum, sum and accumulator, so a step has no
reduction but the dot product; lanes meet once, after the last step, and the segments of a row
meet in ``attention_combine.py``. The forward and the dq kernel walk the rows, the dkv kernel walks
the same edges by columns, where it also writes what edges receive (``attention_backward.py``):
every output element has one writer, in a fixed order, hence no atomics and the same bits every
time. w and gamma come from p and dp in the accumulator's precision, never from a rounded output.

Where heads may be masked, a program has one head (BLOCK_H = 1), and rows have no edges to a masked
one. What is written edge by edge starts as zeros.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention_combine import combine_outputs
from .buckets import joined, take_rows
from .configs import (
    FILLERS,
    accumulator,
    alignment,
    attention_tile,
    clamps,
    log,
    power_of_2,
    stride,
    warp_lanes,
)
from .edge_tile import (
    EdgeTerms,
    add_edge_key,
    add_edge_value,
    kept,
    kept_share,
    load_attr,
    load_attr_q,
    load_factor,
    load_gate,
    logits,
)
from .loads import load_active, load_heads, scalar, store_heads

COUNTS = ["num_rows", "num_middle", "num_segments"]
_PLAIN: dict[str, Any] = {}  # constants of a call without edge terms


@triton.jit(do_not_specialize=[*COUNTS, "threshold"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr,  # [N, H, D], [M, H_kv, D], [M, H_kv, DV], [E, H]
    o_ptr, lse_ptr, norm_ptr,  # [N, H, DV], [N, H], [N, H, 2] or None: pivot and factor of weights
    part_ptr, stat_ptr,  # of segments: [S, H, DV] sums, [S, H, 2] maximum and sum
    row_ptr, col_ptr, edge_ptr,  # [N + 1], [E], [E]
    few_ptr, middle_ptr, segment_ptr,
    terms, made,  # EdgeTerms and EdgeResults, with EDGES
    q_stride, k_stride, v_stride, bias_stride,  # (node, head, channel); outputs are contiguous
    num_rows, num_middle, num_segments,
    scale: tl.float64, low: tl.float64, high: tl.float64, log_eps: tl.float64,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ALIGN: tl.constexpr,
    C: tl.constexpr = 1, BLOCK_C: tl.constexpr = 1, EDGE_ALIGN: tl.constexpr = 1,
    EDGES: tl.constexpr = False, SHARED: tl.constexpr = False,
    seed_ptr=None, threshold=0,  # of dropout
    active_ptr=None, active_stride=None,  # [N, H], which heads are not masked
):  # fmt: skip
    """Grid (row groups, head blocks): one program owns BLOCK_R rows, or one, of BLOCK_H heads."""
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    BUCKETS: tl.constexpr = few_ptr is not None
    ATTR_Q: tl.constexpr = terms.attr_q is not None if EDGES else False
    SCORES: tl.constexpr = made.scores is not None if EDGES else False
    WEIGH_ATTR: tl.constexpr = made.attr_o is not None if EDGES else False
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
    attr_q = 0.0
    if EDGES:
        attr_q = load_attr_q(
            terms, row[:, None], read[:, None], head, H, C, BLOCK_C, EDGE_ALIGN, ACC
        )  # [R, 1, H, C]

    lane_max = tl.full([BLOCK_R, BLOCK_E, BLOCK_H], float("-inf"), ACC)
    lane_sum = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H], ACC)
    acc = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_DV], ACC)
    if WEIGH_ATTR:
        attr_acc = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_H, BLOCK_C], ACC)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]  # [R, E]
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
        s, _, _ = logits(
            q, k, attr_q, attr, factor, live, edge, head, bias_ptr, bias_stride,
            scale, low, high, H, CLAMP, HAS_BIAS, ATTR_Q,
        )  # fmt: skip
        if SCORES:
            t = q * k * (scale * factor)[:, :, :, None]
            store_heads(made.scores, edge, live, head, H, D, BLOCK_D, t)
        new_max = tl.maximum(lane_max, s)
        # a lane without a finite logit so far keeps -inf; a finite pivot avoids inf - inf
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp(lane_max - pivot)
        p = tl.exp(s - pivot)  # [R, E, H]
        used = p * kept(seed_ptr, threshold, edge, head, ACC)
        acc = acc * decay[:, :, :, None] + used[:, :, :, None] * v
        if WEIGH_ATTR:
            attr_acc = attr_acc * decay[:, :, :, None] + used[:, :, :, None] * attr
        lane_sum = lane_sum * decay + p
        lane_max = new_max

    top = tl.max(lane_max, 1)  # [R, H]
    pivot = tl.where(top == float("-inf"), 0.0, top)
    decay = tl.exp(lane_max - pivot[:, None, :])
    total = tl.sum(lane_sum * decay, 1)
    o = tl.sum(acc * decay[:, :, :, None], 1)  # [R, H, DV]
    if WEIGH_ATTR:
        attr_o = tl.sum(attr_acc * decay[:, :, :, None], 1)  # [R, H, C]
    if BUCKETS:
        first = tl.arange(0, BLOCK_R) == 0
        if tl.program_id(0) < num_segments + num_middle:
            # the lanes of all R "rows" belong to one
            mine = mine & first
            row_top = tl.max(top, 0)
            pivot_one = tl.where(row_top == float("-inf"), 0.0, row_top)
            decay_one = tl.exp(top - pivot_one[None, :])
            total = joined(total * decay_one)
            o = joined(o * decay_one[:, :, None])
            if WEIGH_ATTR:
                attr_o = joined(attr_o * decay_one[:, :, None])
            top = row_top[None, :] + tl.zeros_like(top)
            pivot = pivot_one[None, :] + tl.zeros_like(pivot)
        if tl.program_id(0) < num_segments:
            part = tl.program_id(0).to(tl.int64) + tl.zeros([BLOCK_R], tl.int64)
            store_heads(part_ptr, part[:, None], mine[:, None], head, H, DV, BLOCK_DV, o[:, None])
            if WEIGH_ATTR:
                at_part, live_part = part[:, None], mine[:, None]
                store_heads(
                    made.attr_part, at_part, live_part, head, H, C, BLOCK_C, attr_o[:, None]
                )
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
    if WEIGH_ATTR:
        attr_o = tl.where(empty[:, :, None], 0.0, attr_o * norm[:, :, None])[:, None, :, :]
        store_heads(made.attr_o, row[:, None], mine[:, None], head, H, C, BLOCK_C, attr_o)
    at = row[:, None] * H + head[None, :]
    mask = mine[:, None] & (head < H)[None, :]
    tl.store(lse_ptr + at, tl.where(empty, float("-inf"), lse), mask=mask)
    if norm_ptr is not None:
        tl.store(norm_ptr + 2 * at, pivot, mask=mask)
        tl.store(norm_ptr + 2 * at + 1, norm, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _attention_weights_kernel(
    q_ptr, k_ptr, bias_ptr, norm_ptr,
    weights_ptr,  # [E, H]
    row_ptr, col_ptr, edge_ptr, few_ptr, middle_ptr, segment_ptr,
    terms,  # EdgeTerms, with EDGES
    q_stride, k_stride, bias_stride,
    num_rows, num_middle, num_segments,
    scale: tl.float64, low: tl.float64, high: tl.float64,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    C: tl.constexpr = 1, BLOCK_C: tl.constexpr = 1, EDGE_ALIGN: tl.constexpr = 1,
    EDGES: tl.constexpr = False,
    active_ptr=None, active_stride=None,
):  # fmt: skip
    """Grid (row groups, head blocks): the weights of BLOCK_R rows, or one, of BLOCK_H heads.

    Not from the lse, which is rounded as the largest logit is, but from pivot and factor.
    """
    ACC: tl.constexpr = norm_ptr.dtype.element_ty
    BUCKETS: tl.constexpr = few_ptr is not None
    ATTR_Q: tl.constexpr = terms.attr_q is not None if EDGES else False
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
    q = q.to(ACC)
    attr_q = 0.0
    if EDGES:
        attr_q = load_attr_q(
            terms, row[:, None], read[:, None], head, H, C, BLOCK_C, EDGE_ALIGN, ACC
        )
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
        k, attr, factor = k.to(ACC), 0.0, 1.0
        if EDGES:
            k, _ = add_edge_key(k, terms, edge, live, head, H, D, BLOCK_D, EDGE_ALIGN)
            k = k * load_gate(terms, edge, live, head, H, D, BLOCK_D, EDGE_ALIGN, ACC)
            if ATTR_Q:
                attr = load_attr(terms, edge, live, C, BLOCK_C, EDGE_ALIGN, ACC)
            factor = load_factor(terms, edge, live, head, H, ACC)
        s, _, _ = logits(
            q, k, attr_q, attr, factor, live, edge, head, bias_ptr, bias_stride,
            scale, low, high, H, CLAMP, HAS_BIAS, ATTR_Q,
        )  # fmt: skip
        p = tl.exp(s - pivot[:, None, :]) * norm[:, None, :]
        edge_at = edge.to(tl.int64)[:, :, None] * H + head[None, None, :]
        edge_mask = live[:, :, None] & (head < H)[None, None, :]
        tl.store(weights_ptr + edge_at, p.to(weights_ptr.dtype.element_ty), mask=edge_mask)


class EdgeResults(NamedTuple):
    """What the forward writes besides; None where not wanted."""

    scores: Any  # [E, H, D]
    attr_o: Any  # [N, H, C]
    attr_part: Any  # of segments: [S, H, C]


def attention_fwd(
    q, k, v, edge_bias, on_rows, rows, scale, low, high, eps, return_weights,
    scores=None, attr_o=None, terms=None, edge_meta=_PLAIN,
):  # fmt: skip
    """-> o [N, H, DV], lse [N, H], weights [E, H] (or [0, H]) in the caller's edge order.

    To heads that are not in ``on_rows`` [1 or N, H] (None: all are) a row has no edges. With
    ``terms``, ``scores [E, H, D]`` and ``attr_o [N, H, C]`` are filled where given.
    """
    n, heads, _ = q.shape
    row_ptr, col, edge, few, middle, segment, split = attention_walk(rows)
    o = q.new_empty(n, heads, v.shape[2])
    lse = q.new_empty(n, heads, dtype=accumulator(q))
    norm = lse.new_empty(n, heads, 2) if return_weights else None
    parts = part = stat = attr_part = None
    if segment is not None:
        parts = segment.shape[0] - FILLERS
        part = lse.new_empty(parts, heads, v.shape[2])
        stat = lse.new_empty(parts, heads, 2)
        attr_part = None if attr_o is None else lse.new_empty(parts, heads, attr_o.shape[2])
    made = None if terms is None else EdgeResults(scores, attr_o, attr_part)
    if n and heads:
        meta, grid, counts = attention_plan(
            q, k, v, (q, k, v), n, heads, few, middle, segment, edge_meta, on_rows
        )
        _attention_fwd_kernel[grid](
            q, k, v, edge_bias, o, lse, norm, part, stat, row_ptr, col, edge, few, middle, segment,
            terms, made, q.stride(), k.stride(), v.stride(), stride(edge_bias),
            *counts, scale, low, high, log(eps),
            CLAMP=clamps(low, high), HAS_BIAS=edge_bias is not None, **meta,
        )  # fmt: skip
        if parts:
            combine_outputs(o, lse, norm, part, stat, split, log(eps))
            if attr_o is not None:
                combine_outputs(attr_o, lse, None, attr_part, stat, split, log(eps))
    weights = on_edges(q, on_rows, col.shape[0] if return_weights else 0, heads)
    if return_weights and n and heads:
        meta, grid, counts = attention_plan(
            q, k, k, (q, k), n, heads, few, middle, segment, edge_meta, on_rows
        )
        for name in ("DV", "BLOCK_DV", "SHARED", "seed_ptr", "threshold"):
            meta.pop(name, None)
        _attention_weights_kernel[grid](
            q, k, edge_bias, norm, weights, row_ptr, col, edge, few, middle, segment, terms,
            q.stride(), k.stride(), stride(edge_bias), *counts, scale, low, high,
            CLAMP=clamps(low, high), HAS_BIAS=edge_bias is not None, **meta,
        )  # fmt: skip
    return o, lse, weights


def attention_edges_fwd(
    q, k, v, edge_bias, on_rows, terms, rows, scale, low, high, eps,
    dropout, shared, return_weights, return_scores, weigh_attr,
):  # fmt: skip
    """-> o, lse, weights, edge scores [E, H, D] (or [0, H, D]), attributes [N, H, C] (or 0)."""
    n, heads, width = q.shape
    scores = on_edges(q, on_rows, rows[1].shape[0] if return_scores else 0, heads, width)
    channels = terms[3].shape[1] if weigh_attr else 0
    attr_o = q.new_empty(n, heads, channels, dtype=accumulator(q))
    terms, edge_meta = attention_terms(q, terms, dropout, shared, ())
    found = attention_fwd(
        q, k, v, edge_bias, on_rows, rows, scale, low, high, eps, return_weights,
        scores if return_scores else None, attr_o if weigh_attr else None, terms, edge_meta,
    )  # fmt: skip
    return *found, scores, attr_o


def attention_terms(q, terms, dropout, shared, upstream):
    """-> EdgeTerms, and the constants that the kernels take with them."""
    gate, key, value, attr, attr_q, seed = terms
    by_head = gate is not None and gate.ndim == 2
    factor, gate = (gate, None) if by_head else (None, gate)
    tensors = factor, gate, key, value, attr, attr_q
    found = EdgeTerms(*(None if x is None else x.contiguous() for x in tensors))
    # rows of channels that all begin where 16 bytes do, or fewer
    channels = 1 if attr is None else attr.shape[1]
    rows = [x for x in (*found[1:], *upstream) if x is not None]
    aligned = math.gcd(16 // q.element_size(), *(x.shape[-1] for x in rows))
    meta = {
        "C": channels,
        "BLOCK_C": power_of_2(channels),
        "EDGE_ALIGN": aligned,
        "EDGES": True,
        "seed_ptr": seed,
        "threshold": round(dropout * 2**24),
        "SHARED": shared,
    }
    return found, meta


def attention_walk(walk):
    """A CSR walk with its buckets, None where rows are taken as they stand."""
    return walk if len(walk) > 3 else (*walk, None, None, None, None)


def on_edges(like, active, *shape):
    """Room for what kernels write edge by edge, in the dtype of ``like``: not where a head is
    masked."""
    return like.new_empty(shape) if active is None else like.new_zeros(shape)


def active_heads(active):
    """What kernels take with [1 or N, H]: where rows share their heads, a stride of 0."""
    rows = active.stride(0) if active.shape[0] > 1 else 0
    return {"active_ptr": active, "active_stride": (rows, active.stride(1))}


def attention_plan(q, k, v, aligned, num_rows, heads, few, middle, segment, edge_meta, active):
    block_d, block_dv = power_of_2(q.shape[2]), power_of_2(v.shape[2])
    width = max(block_d, block_dv, edge_meta.get("BLOCK_C", 1))
    together = heads if active is None else 1
    if edge_meta:
        tile = attention_tile(together, width, q.element_size(), True, warp_lanes())
    else:
        tile = attention_tile(together, width, q.element_size())
    counts = num_rows, 0, 0
    if few is not None:
        counts = tuple(x.shape[0] - FILLERS for x in (few, middle, segment))
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
        "ALIGN": alignment(aligned),
        "num_warps": tile.num_warps,
        **edge_meta,
    }
    if active is not None:
        meta |= active_heads(active)
    programs = -(-counts[0] // tile.block_r) + counts[1] + counts[2]
    return meta, (programs, -(-heads // tile.block_h)), counts

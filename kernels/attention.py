"""Neighbourhood attention by gathering: softmax over the edges of each row.

    s_ij = clamp(scale q_i . k_j) + bias_ij
    o_i  = sum_j a_ij v_j,   a_ij = exp(s_ij) / (Z_i + eps),   Z_i = sum_j exp(s_ij) = exp(lse_i)

With p = exp(s - lse), r = Z / (Z + eps), dp_ij = do_i . v_j, the gradient g of the lse, and
t_i = sum_j p_ij, which is 1 but for the rounding of the stored lse (that of the largest logit):

    a_ij = w_i p_ij,   w_i = r_i / t_i,   gamma_i = (r_i w_i sum_j p_ij dp_ij - g_i) / t_i
    ds_ij = p_ij (w_i dp_ij - gamma_i),   dq_i = scale sum_j ds_ij k_j
    dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i a_ij do_i,   dbias_ij = ds_ij

Edges may have more (``Terms`` in ``edge_tile.py``): with a gate g, vectors added to key and
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
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastgt.contract import Results

from .attention_combine import combine_outputs
from .buckets import COUNTS, Walk, joined, next_edges, take, wholes_and_parts
from .configs import (
    FILLERS,
    accumulator,
    alignment_of,
    attention_tile,
    clamps,
    log,
    power_of_2,
    warp_lanes,
)
from .edge_tile import (
    Drop,
    Operands,
    Terms,
    Tile,
    clamp_of,
    eps_share,
    gather_edge,
    kept,
    lane_rows,
    lanes,
    load_query,
    logits,
    own_heads,
    unmasked,
)
from .loads import Rows, rows_of, store_heads, sum_dtype


class Outputs(NamedTuple):
    """What the forward writes, contiguous; None where absent."""

    o: Any  # [N, H, DV]
    lse: Any  # [N, H]
    norm: Any  # [N, H, 2]: pivot of the logits, and what exp(s - pivot) is times
    scores: Any  # [E, H, D]
    attr_o: Any  # [N, H, C]
    part: Any  # of segments: [S, H, DV] sums
    stat: Any  # of segments: [S, H, 2] maximum and sum
    attr_part: Any  # of segments: [S, H, C]


@triton.jit(do_not_specialize=[*COUNTS, "threshold"])
def _attention_fwd_kernel(
    x,  # Operands
    terms,  # Terms or None
    out,  # Outputs
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
    """Grid (row groups, head blocks): one program owns BLOCK_R rows, or one, of BLOCK_H heads."""
    BUCKETS: tl.constexpr = walk.few is not None
    NUMBERED: tl.constexpr = x.bias is not None or T.TERMS
    WEIGH_ATTR: tl.constexpr = out.attr_o is not None
    row, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    head = own_heads(T)
    read, end = unmasked(active, row, mine, head, begin, end)
    clamp = clamp_of(scale, low, high, sum_dtype(T.WIDE))
    q, attr_q = load_query(x, terms, row[:, None], read[:, None], head, T)  # [R, 1, H, D or C]

    lane_max = lanes(float("-inf"), T)
    lane_sum = lanes(0.0, T)
    acc = lane_rows(T.BLOCK_DV, T)
    if WEIGH_ATTR:
        attr_acc = lane_rows(T.BLOCK_C, T)
    for step in range(0, tl.max(end - begin), stride):
        live, col, edge = next_edges(walk, begin, end, step, NUMBERED, T)  # [R, E]
        k, v, attr, factor = gather_edge(x, terms, col, edge, live, head, T)
        s, _, _ = logits(q, attr_q, k, attr, factor, x, terms, edge, live, head, clamp, T)
        if out.scores is not None:
            t = q * k * (clamp.scale * factor)[:, :, :, None]
            store_heads(out.scores, edge, live, head, T.H, T.D, T.BLOCK_D, t)
        new_max = tl.maximum(lane_max, s)
        # a lane without a finite logit so far keeps -inf; a finite pivot avoids inf - inf
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp(lane_max - pivot)
        p = tl.exp(s - pivot)  # [R, E, H]
        used = p * kept(drop, threshold, edge, live, head, sum_dtype(T.WIDE))
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
        if tl.program_id(0) < num_segments + num_middle:
            # one long row: all R x E lanes take its edges
            row_top = tl.max(top, 0)
            pivot_one = tl.where(row_top == float("-inf"), 0.0, row_top)
            decay_one = tl.exp(top - pivot_one[None, :])
            total = joined(total * decay_one)
            o = joined(o * decay_one[:, :, None])
            if WEIGH_ATTR:
                attr_o = joined(attr_o * decay_one[:, :, None])
            top = row_top[None, :] + tl.zeros_like(top)
            pivot = pivot_one[None, :] + tl.zeros_like(pivot)
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    if BUCKETS:
        if tl.program_id(0) < num_segments:
            at, live = segment[:, None], part[:, None]
            store_heads(out.part, at, live, head, T.H, T.DV, T.BLOCK_DV, o[:, None])
            if WEIGH_ATTR:
                store_heads(out.attr_part, at, live, head, T.H, T.C, T.BLOCK_C, attr_o[:, None])
            store_pairs(out.stat, segment, part, head, T.H, top, total)
    empty = total == 0.0
    lse = pivot + tl.log(tl.where(empty, 1.0, total))
    norm = eps_share(lse, log_eps, sum_dtype(T.WIDE)) / tl.where(empty, 1.0, total)
    at, live = row[:, None], whole[:, None]
    o = tl.where(empty[:, :, None], 0.0, o * norm[:, :, None])
    store_heads(out.o, at, live, head, T.H, T.DV, T.BLOCK_DV, o[:, None])
    if WEIGH_ATTR:
        attr_o = tl.where(empty[:, :, None], 0.0, attr_o * norm[:, :, None])
        store_heads(out.attr_o, at, live, head, T.H, T.C, T.BLOCK_C, attr_o[:, None])
    mask = live & (head < T.H)[None, :]
    tl.store(out.lse + (at * T.H + head[None, :]), tl.where(empty, float("-inf"), lse), mask=mask)
    if out.norm is not None:
        store_pairs(out.norm, row, whole, head, T.H, pivot, norm)


@triton.jit(do_not_specialize=COUNTS)
def _attention_weights_kernel(
    x,  # Operands
    terms,  # Terms or None
    norm_ptr,  # [N, H, 2]
    weights_ptr,  # [E, H]
    walk,  # of rows
    num_rows,
    num_middle,
    num_segments,
    scale: tl.float64,
    low: tl.float64,
    high: tl.float64,
    active,  # [N, H], which heads are not masked
    T: tl.constexpr,
):
    """Grid (row groups, head blocks): the weights of BLOCK_R rows, or one, of BLOCK_H heads.

    Not from the lse, which is rounded as the largest logit is, but from ``norm``.
    """
    row, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    head = own_heads(T)
    read, end = unmasked(active, row, mine, head, begin, end)
    clamp = clamp_of(scale, low, high, sum_dtype(T.WIDE))
    q, attr_q = load_query(x, terms, row[:, None], read[:, None], head, T)
    at = row[:, None] * T.H + head[None, :]
    mask = mine[:, None] & (head < T.H)[None, :]
    pivot = tl.load(norm_ptr + 2 * at, mask=mask, other=0.0)
    norm = tl.load(norm_ptr + 2 * at + 1, mask=mask, other=0.0)
    for step in range(0, tl.max(end - begin), stride):
        live, col, edge = next_edges(walk, begin, end, step, True, T)
        k, _, attr, factor = gather_edge(x, terms, col, edge, live, head, T)
        s, _, _ = logits(q, attr_q, k, attr, factor, x, terms, edge, live, head, clamp, T)
        p = tl.exp(s - pivot[:, None, :]) * norm[:, None, :]
        edge_at = edge.to(tl.int64)[:, :, None] * T.H + head[None, None, :]
        edge_mask = live[:, :, None] & (head < T.H)[None, None, :]
        tl.store(weights_ptr + edge_at, p.to(weights_ptr.dtype.element_ty), mask=edge_mask)


@triton.jit
def store_pairs(ptr, row, live, head, H: tl.constexpr, first, second):
    """Two numbers [R, H] of each of ``row`` [R] to an [N, H, 2] tensor."""
    at = 2 * (row[:, None] * H + head[None, :])
    mask = live[:, None] & (head < H)[None, :]
    tl.store(ptr + at, first, mask=mask)
    tl.store(ptr + at + 1, second, mask=mask)


def attention_fwd(row_walk, inputs, logit, terms, mask, dropout, switches):
    """-> Results, what stands on edges in the caller's order.

    A row has no edges to a masked head.
    """
    q, _, v = inputs
    n, heads, width = q.shape
    num_edges, wide = row_walk[1].shape[0], accumulator(q)
    channels = terms.attr.shape[1] if switches.make_attr_o else 0
    results = Results(
        q.new_empty(n, heads, v.shape[2]),
        q.new_empty(n, heads, dtype=wide),
        on_edges(q, mask.rows, num_edges, heads) if switches.make_weights else None,
        on_edges(q, mask.rows, num_edges, heads, width) if switches.make_scores else None,
        q.new_empty(n, heads, channels, dtype=wide) if switches.make_attr_o else None,
    )
    if n and heads:
        x = Operands(*map(rows_of, (*inputs, terms.bias)))
        edges = edge_terms(q, terms, dropout, switches, ())
        _forward(x, results, row_walk, inputs, mask.rows, edges, logit)
    return results


def _forward(x, results, row_walk, inputs, mask, edges, logit):
    q, k, v = inputs
    o, lse, weights, scores, attr_o = results
    scale, low, high, eps = logit
    heads, clamp = q.shape[1], clamps(low, high)
    norm = None if weights is None else lse.new_empty(*lse.shape, 2)
    call = attention_plan(inputs, x[:3], row_walk, heads, edges, clamp, mask)
    part = stat = attr_part = None
    if call.split is not None:
        parts = call.counts[2]
        part, stat = lse.new_empty(parts, heads, v.shape[2]), lse.new_empty(parts, heads, 2)
        if attr_o is not None:
            attr_part = lse.new_empty(parts, heads, attr_o.shape[2])
    _attention_fwd_kernel[call.grid](
        x,
        edges.terms,
        Outputs(o, lse, norm, scores, attr_o, part, stat, attr_part),
        call.walk,
        *call.counts,
        scale,
        low,
        high,
        log(eps),
        edges.drop,
        edges.threshold,
        call.active,
        **call.meta,
    )
    if call.counts[2]:
        combine_outputs(o, lse, norm, part, stat, call.split, log(eps))
        if attr_o is not None:
            combine_outputs(attr_o, lse, None, attr_part, stat, call.split, log(eps))
    if weights is not None:
        terms = edges.terms
        if terms is not None:
            attr = None if terms.attr_q is None else terms.attr
            terms = terms._replace(value=None, attr=attr)
        call = attention_plan((q, k, k), x[:2], row_walk, heads, edges, clamp, mask)
        _attention_weights_kernel[call.grid](
            x._replace(v=None),
            terms,
            norm,
            weights,
            call.walk,
            *call.counts,
            scale,
            low,
            high,
            call.active,
            **call.meta,
        )


class Edges(NamedTuple):
    """What edges have besides a bias, and what kernels have to know of it."""

    terms: Terms | None = None
    channels: int = 1  # of the attributes
    align: int = 1  # channels that all rows start at a multiple of
    key_is_value: bool = False
    drop: Drop = Drop()
    threshold: int = 0


_PLAIN = Edges()


def edge_terms(q, terms, dropout, switches, upstream):
    """-> Edges; ``upstream`` gradients are aligned with them."""
    given = [x for x in terms[1:] if x is not None]
    if not (given or dropout.p or switches.make_scores or switches.make_attr_o):
        return _PLAIN
    _, gate, key, value, attr, attr_q = terms
    by_head = gate is not None and gate.ndim == 2
    factor, gate = (gate, None) if by_head else (None, gate)
    tensors = factor, gate, key, value, attr, attr_q
    pointers = Terms(*(None if x is None else x.contiguous() for x in tensors))
    numbers = None if dropout.numbers is None else dropout.numbers.contiguous()
    # the most channels, of 16 bytes at most, that divide every width
    rows = [x for x in (*pointers[1:], *upstream) if x is not None]
    return Edges(
        pointers,
        channels=1 if attr is None else attr.shape[1],
        align=math.gcd(16 // q.element_size(), *(x.shape[-1] for x in rows)),
        key_is_value=switches.key_is_value,
        drop=Drop(dropout.seed, numbers, dropout.first_head or None),
        threshold=round(dropout.p * 2**24),
    )


def on_edges(like, active, *shape):
    """Room for what kernels write edge by edge, in the dtype of ``like``. Where a head is masked
    nothing is written: it holds zeros if heads may be."""
    return like.new_empty(shape) if active is None else like.new_zeros(shape)


class Call(NamedTuple):
    """How the kernels of one launcher go through a walk."""

    walk: Walk
    split: torch.Tensor | None
    counts: tuple[int, int, int]  # of few, middle and segments; without buckets, rows
    grid: tuple[int, int]
    active: Rows | None
    meta: dict[str, Any]  # the tile "T" and the warps


def attention_plan(inputs, aligned, walk, heads, edges, clamp, active):
    """-> Call, of ``heads``: those of rows, or key heads of columns; ``aligned`` are the ``Rows``
    that are loaded with what alignment they have in common."""
    q, k, v = inputs
    few, middle, segment, split = walk[3:] or (None,) * 4
    shape = q.shape[1], k.shape[1], q.shape[2], v.shape[2], edges.channels
    width, itemsize = power_of_2(max(shape[2:])), q.element_size()
    together = heads if active is None else 1
    if edges.terms is None:
        size = attention_tile(together, width, itemsize)
    else:
        size = attention_tile(together, width, itemsize, True, warp_lanes())
    align = alignment_of([rows.stride for rows in aligned], itemsize), edges.align
    switches = clamp, edges.terms is not None, edges.key_is_value
    tile = _tile(size, shape, q.dtype, align, switches)
    if few is None:
        counts = walk[0].shape[0] - 1, 0, 0
    else:
        counts = tuple([x.shape[0] - FILLERS for x in (few, middle, segment)])
    programs = -(-counts[0] // size.block_r) + counts[1] + counts[2]
    grid = programs, -(-heads // size.block_h)
    meta = {"T": tile, "num_warps": size.num_warps}
    on_heads = None if active is None else head_rows(active)
    return Call(Walk(*walk[:3], few, middle, segment), split, counts, grid, on_heads, meta)


def head_rows(active):
    """``Rows`` of [1 or N, H]: where rows share their heads, a stride of 0."""
    rows = active.stride(0) if active.shape[0] > 1 else 0
    return Rows(active, (rows, active.stride(1)))


@cache
def _tile(size, shape, dtype, align, switches):
    heads, kv_heads, d, dv, channels = shape
    clamp, terms, shared = switches
    return Tile(
        H=heads,
        GROUP=heads // max(kv_heads, 1),
        D=d,
        DV=dv,
        C=channels,
        CLAMP=clamp,
        TERMS=terms,
        SHARED=shared,
        BLOCK_R=size.block_r,
        BLOCK_E=size.block_e,
        BLOCK_H=size.block_h,
        BLOCK_D=power_of_2(d),
        BLOCK_DV=power_of_2(dv),
        BLOCK_C=power_of_2(channels),
        ALIGN=align[0],
        EDGE_ALIGN=align[1],
        WIDE=dtype == torch.float64,
    )

"""Additive attention by gathering: softmax over the edges of each row.

    t_ij = q_i + k_j + key_ij                                              [D]
    s_ij = sum_d u_d leaky(t_ij)_d + bias_ij
    o_i  = sum_j m_ij a_ij v_j,   a_ij = exp(s_ij) / Z_i,   Z_i = sum_j exp(s_ij) = exp(lse_i)

With p = exp(s - lse), dp_ij = m_ij do_i . v_j, the slope g_ij of the leaky ReLU, 1 or the negative
one, and w and gamma of each row as in ``attention.py``:

    ds_ij = p_ij (w_i dp_ij - gamma_i),   dkey_ij = ds_ij u * g_ij
    dq_i = sum_j dkey_ij,   dk_j = sum_i dkey_ij,   dv_j = sum_i m_ij a_ij do_i
    du = sum_ij ds_ij g_ij * t_ij,   dbias_ij = ds_ij

Programs, lanes, buckets, segments and masked heads are those of ``attention.py``:

    row 0 | e e e e | e e e . |          [R, E] indices, read once for all heads
    row 1 | e . . . |         |          [R, E, H, D] gathered tile, a whole row of k or v an edge
             step 0    step 1

The forward and the dq kernel walk the rows, the dkv kernel walks the same edges by columns, where
it also writes what edges receive (``additive_attention_backward.py``). t is made wherever it is
needed, so nothing of size E H D is written but the gradient of the keys on edges. Every output
element has one writer, in a fixed order, hence no atomics and the same bits every time: each
program of the dkv kernel writes its share of du, and these are added in order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastgt.contract import EdgeTerms, Switches

from .attention import Outputs, attention_plan, edge_terms, on_edges, store_pairs
from .attention_combine import combine_outputs
from .buckets import COUNTS, joined, next_edges, take, wholes_and_parts
from .configs import accumulator
from .edge_tile import (
    Operands,
    Terms,
    gather_edge,
    kept,
    lane_rows,
    lanes,
    own_heads,
    unmasked,
)
from .loads import load_edge_heads, load_heads, rows_of, scalar, store_heads, sum_dtype


class Leaky(NamedTuple):
    """How sums become logits."""

    weight: Any  # Rows [1, H, D]
    slope: Any  # of the leaky ReLU below 0


@triton.jit(do_not_specialize=[*COUNTS, "threshold"])
def _additive_fwd_kernel(
    x,  # Operands
    weight,  # Rows [1, H, D]
    terms,  # Terms or None
    out,  # Outputs
    walk,  # of rows
    num_rows,
    num_middle,
    num_segments,
    slope: tl.float64,
    drop,  # Drop
    threshold,
    active,  # [N, H], which heads are not masked
    T: tl.constexpr,
):
    """Grid (row groups, head blocks): one program owns BLOCK_R rows, or one, of BLOCK_H heads."""
    BUCKETS: tl.constexpr = walk.few is not None
    NUMBERED: tl.constexpr = x.bias is not None or T.TERMS
    row, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    head = own_heads(T)
    read, end = unmasked(active, row, mine, head, begin, end)
    leaky = Leaky(load_weight(weight, head, T), scalar(slope, sum_dtype(T.WIDE)))
    q = load_own_query(x, row[:, None], read[:, None], head, T)  # [R, 1, H, D]

    lane_max = lanes(float("-inf"), T)
    lane_sum = lanes(0.0, T)
    acc = lane_rows(T.BLOCK_DV, T)
    for step in range(0, tl.max(end - begin), stride):
        live, col, edge = next_edges(walk, begin, end, step, NUMBERED, T)  # [R, E]
        k, v, _, _ = gather_edge(x, terms, col, edge, live, head, T)
        s, _, _ = additive_logits(q + k, leaky, x, edge, live, head, T)
        new_max = tl.maximum(lane_max, s)
        # a lane without a finite logit so far keeps -inf; a finite pivot avoids inf - inf
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp(lane_max - pivot)
        p = tl.exp(s - pivot)  # [R, E, H]
        used = p * kept(drop, threshold, edge, live, head, sum_dtype(T.WIDE))
        acc = acc * decay[:, :, :, None] + used[:, :, :, None] * v
        lane_sum = lane_sum * decay + p
        lane_max = new_max

    top = tl.max(lane_max, 1)  # [R, H]
    pivot = tl.where(top == float("-inf"), 0.0, top)
    decay = tl.exp(lane_max - pivot[:, None, :])
    total = tl.sum(lane_sum * decay, 1)
    o = tl.sum(acc * decay[:, :, :, None], 1)  # [R, H, DV]
    if BUCKETS:
        if tl.program_id(0) < num_segments + num_middle:
            # one long row: all R x E lanes take its edges
            row_top = tl.max(top, 0)
            pivot_one = tl.where(row_top == float("-inf"), 0.0, row_top)
            decay_one = tl.exp(top - pivot_one[None, :])
            total = joined(total * decay_one)
            o = joined(o * decay_one[:, :, None])
            top = row_top[None, :] + tl.zeros_like(top)
            pivot = pivot_one[None, :] + tl.zeros_like(pivot)
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    if BUCKETS:
        if tl.program_id(0) < num_segments:
            at, live = segment[:, None], part[:, None]
            store_heads(out.part, at, live, head, T.H, T.DV, T.BLOCK_DV, o[:, None])
            store_pairs(out.stat, segment, part, head, T.H, top, total)
    empty = total == 0.0
    norm = 1.0 / tl.where(empty, 1.0, total)
    lse = pivot + tl.log(tl.where(empty, 1.0, total))
    at, live = row[:, None], whole[:, None]
    o = tl.where(empty[:, :, None], 0.0, o * norm[:, :, None])
    store_heads(out.o, at, live, head, T.H, T.DV, T.BLOCK_DV, o[:, None])
    mask = live & (head < T.H)[None, :]
    tl.store(out.lse + (at * T.H + head[None, :]), tl.where(empty, float("-inf"), lse), mask=mask)
    if out.norm is not None:
        store_pairs(out.norm, row, whole, head, T.H, pivot, norm)


@triton.jit(do_not_specialize=COUNTS)
def _additive_weights_kernel(
    x,  # Operands
    weight,  # Rows [1, H, D]
    terms,  # Terms or None
    norm_ptr,  # [N, H, 2]
    weights_ptr,  # [E, H]
    walk,  # of rows
    num_rows,
    num_middle,
    num_segments,
    slope: tl.float64,
    active,  # [N, H], which heads are not masked
    T: tl.constexpr,
):
    """Grid (row groups, head blocks): the weights of BLOCK_R rows, or one, of BLOCK_H heads.

    Not from the lse, which is rounded as the largest logit is, but from ``norm``.
    """
    row, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    head = own_heads(T)
    read, end = unmasked(active, row, mine, head, begin, end)
    leaky = Leaky(load_weight(weight, head, T), scalar(slope, sum_dtype(T.WIDE)))
    q = load_own_query(x, row[:, None], read[:, None], head, T)
    at = row[:, None] * T.H + head[None, :]
    mask = mine[:, None] & (head < T.H)[None, :]
    pivot = tl.load(norm_ptr + 2 * at, mask=mask, other=0.0)
    norm = tl.load(norm_ptr + 2 * at + 1, mask=mask, other=0.0)
    for step in range(0, tl.max(end - begin), stride):
        live, col, edge = next_edges(walk, begin, end, step, True, T)
        k, _, _, _ = gather_edge(x, terms, col, edge, live, head, T)
        s, _, _ = additive_logits(q + k, leaky, x, edge, live, head, T)
        p = tl.exp(s - pivot[:, None, :]) * norm[:, None, :]
        edge_at = edge.to(tl.int64)[:, :, None] * T.H + head[None, None, :]
        edge_mask = live[:, :, None] & (head < T.H)[None, None, :]
        tl.store(weights_ptr + edge_at, p.to(weights_ptr.dtype.element_ty), mask=edge_mask)


@triton.jit
def load_weight(weight, head, T: tl.constexpr):
    """What the leaky ReLU's results are multiplied with, [1, 1, H, D]."""
    one = tl.zeros([1, 1], tl.int64)
    u = load_heads(weight, one, one == 0, head, T.H, T.D, T.BLOCK_D, T.ALIGN)
    return u.to(sum_dtype(T.WIDE))


@triton.jit
def load_own_query(x, row, live, head, T: tl.constexpr):
    """Of each of ``row`` [R, E]: q [R, E, H, D]."""
    return load_heads(x.q, row, live, head, T.H, T.D, T.BLOCK_D, T.ALIGN).to(sum_dtype(T.WIDE))


@triton.jit
def additive_logits(t, leaky, x, edge, live, head, T: tl.constexpr):
    """u . leaky(t) + bias, of t [R, E, H, D]: -> logit [R, E, H], -inf where not ``live``; the
    slope of each channel; and slope * t, what the leaky ReLU gives."""
    slope = tl.where(t > 0.0, 1.0, leaky.slope)
    y = t * slope
    s = tl.sum(leaky.weight * y, 3)
    if x.bias is not None:
        s += load_edge_heads(x.bias, edge, live, head, T.H, s.dtype)
    return tl.where(live[:, :, None], s, float("-inf")), slope, y


def additive_attention_fwd(row_walk, inputs, slope, terms, mask, dropout, make_weights):
    """-> o, lse, and weights in the caller's edge order or None. ``terms`` have no attributes.

    A row has no edges to a masked head.
    """
    q, k, v, _ = inputs
    n, heads, _ = q.shape
    o, lse = q.new_empty(n, heads, v.shape[2]), q.new_empty(n, heads, dtype=accumulator(q))
    weights = on_edges(q, mask.rows, row_walk[1].shape[0], heads) if make_weights else None
    if not n:
        return o, lse, weights
    x, weight = operands(inputs, terms)
    edges = edges_of(q, terms, dropout)
    norm = None if weights is None else lse.new_empty(*lse.shape, 2)
    call = attention_plan((q, k, v), (*x[:3], weight), row_walk, heads, edges, False, mask.rows)
    part = stat = None
    if call.split is not None:
        parts = call.counts[2]
        part, stat = lse.new_empty(parts, heads, v.shape[2]), lse.new_empty(parts, heads, 2)
    _additive_fwd_kernel[call.grid](
        x,
        weight,
        edges.terms,
        Outputs(o, lse, norm, None, None, part, stat, None),
        call.walk,
        *call.counts,
        slope,
        edges.drop,
        edges.threshold,
        call.active,
        **call.meta,
    )
    if call.counts[2]:
        combine_outputs(o, lse, norm, part, stat, call.split, float("-inf"))
    if weights is not None:
        aligned = *x[:2], weight
        call = attention_plan((q, k, k), aligned, row_walk, heads, edges, False, mask.rows)
        _additive_weights_kernel[call.grid](
            x._replace(v=None),
            weight,
            edges.terms,
            norm,
            weights,
            call.walk,
            *call.counts,
            slope,
            call.active,
            **call.meta,
        )
    return o, lse, weights


def operands(inputs, terms):
    """-> Operands, and the ``Rows`` of the weight."""
    q, k, v, weight = inputs
    return Operands(*map(rows_of, (q, k, v, terms.bias))), rows_of(weight[None])


def edges_of(q, terms, dropout, always=False):
    """-> Edges, with ``Terms`` where there is a key or dropout, or ``always``."""
    edges = edge_terms(q, EdgeTerms(terms.bias, key=terms.key), dropout, Switches(), ())
    if always and edges.terms is None:
        edges = edges._replace(terms=Terms(*(None,) * len(Terms._fields)))
    return edges

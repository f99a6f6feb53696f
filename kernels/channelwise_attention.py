"""Channelwise (vector) attention: softmax over the edges of each row, channel by channel.

    s_ij = clamp(logit_ij),   x_ij = v_j + edge_value_ij
    o_i  = r_i sum_j p_ij x_ij,   p_ij = exp(s_ij) / Z_i,   Z_i = sum_j exp(s_ij) = exp(lse_i)

with r = Z / (Z + eps), all of it vectors of C channels that never meet. A program takes BLOCK_R x
BLOCK_E edges at a time, for BLOCK_C channels: of BLOCK_R rows that have few edges, of one row that
has more, or of one segment of a row that has too many for one program (see ``fastgt/tiles.py``):

    row 0 | e e e e | e e e . |          [R, E] indices
    row 1 | e . . . |         |          [R, E, C] gathered tiles: logits and edge values by the
             step 0    step 1            caller's number of the edge, values by its column

In the forward each of the R x E lanes keeps its own running maximum, sum and weighted sum, so a
step has no reduction at all; lanes meet once, after the last step, and the segments of a row in the
combine kernel. What the backward needs of a row is kept in the accumulator's precision: the pivot c
(its largest logit), n = 1 / sum_j exp(s_ij - c) and o before its rounding, here m. Unlike the lse,
which is rounded as a large logit is, they give p = n exp(s - c) without another sum over the row.
With the gradient g of the lse, u = r n do and h = n g:

    dx_ij = exp(s_ij - c_i) u_i,   ds_ij = dx_ij (x_ij - m_i) + exp(s_ij - c_i) h_i

so equal values give no logit gradient, whatever the output was rounded to. Every element has one
writer and every sum one order, hence no atomics and the same bits every time. The backward's
kernels stand in ``channelwise_attention_backward.py``, what both load in ``channelwise_tile.py``.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention import on_edges
from .attention_combine import _split_row
from .buckets import COUNTS, joined, take, wholes_and_parts
from .channelwise_attention_backward import EdgeResults, fill_edges
from .channelwise_tile import active_channels, load_logits, load_messages, plan, store, table
from .configs import FILLERS, accumulator, log, power_of_2
from .edge_tile import eps_share
from .loads import scalar, sum_dtype

_BLOCK_S = 4
_COMBINED = 256  # channels of a program that combines: a row is split seldom


class Results(NamedTuple):
    """What the forward writes."""

    o: Any  # [N, C]
    lse: Any  # [N, C]
    stat: Any  # [N, 3, C]: c, n and m; None where nothing is kept


class CombineTile(NamedTuple):
    """What a program holds that combines segments."""

    C: int
    BLOCK_S: int
    BLOCK_C: int


def channelwise_attention_fwd(inputs, mask, rows, logit, results):
    """-> o, lse [N, C]; weights [E, C] (or [0, C]) in the caller's edge order; and, to ``keep`` for
    the backward, stat [N, 3, C] (or [0, 3, C]). C may be [H, D].

    To masked heads a row has no edges.
    """
    logits, walk = inputs.logits, rows.row_walk
    n, channels = walk[0].shape[0] - 1, logits.shape[1:]
    o = logits.new_empty(n, *channels)
    lse = logits.new_empty(n, *channels, dtype=accumulator(logits))
    kept = results.keep or results.return_weights
    stat = lse.new_empty(n if kept else 0, 3, channels.numel())
    num_weights = walk[1].shape[0] if results.return_weights else 0
    weights = on_edges(logits, mask.rows, num_weights, *channels)
    if not n:
        return o, lse, weights, stat
    call = plan(walk, n, mask.rows, logit, inputs)
    out, part = Results(o, lse, stat if kept else None), None
    if call.split is not None:
        part = lse.new_empty(call.counts[2], 3, channels.numel())
    bounds, log_eps = (logit.low, logit.high), log(logit.eps)
    _channelwise_attention_fwd_kernel[call.grid](
        call.x, call.active, out, part, call.walk, *call.counts, *bounds, log_eps, **call.meta
    )
    if call.counts[2]:
        _combine(out, part, call.split, log_eps)
    if results.return_weights:
        one = logits.new_ones(()).expand(o.shape)
        fill_edges(EdgeResults(None, weights, None), (one, None, stat), inputs, mask, walk, logit)
    return o, lse, weights, stat if results.keep else stat.new_empty(0, *stat.shape[1:])


def _combine(out, part, split, log_eps):
    """Complete ``Results`` in the rows of ``split``."""
    channels = part.shape[2]
    block_c = min(_COMBINED, power_of_2(channels))
    grid = split.shape[0] - FILLERS, -(-channels // block_c)
    _channelwise_attention_combine_kernel[grid](
        part,
        split,
        out,
        log_eps,
        T=CombineTile(channels, _BLOCK_S, block_c),
        num_warps=max(1, _BLOCK_S * block_c // 256),
    )


@triton.jit(do_not_specialize=COUNTS)
def _channelwise_attention_fwd_kernel(
    x,
    active,  # [N, H]
    out,
    part_ptr,  # of segments: [S, 3, C] maximum, sum and weighted sum
    walk,
    num_rows,
    num_middle,
    num_segments,
    low: tl.float64,
    high: tl.float64,
    log_eps: tl.float64,
    T: tl.constexpr,
):
    """Grid (row groups, channel blocks): one program owns BLOCK_R rows, or one, or a segment."""
    row, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    channel = tl.program_id(1) * T.BLOCK_C + tl.arange(0, T.BLOCK_C)
    if active is not None:
        on = active_channels(active, row, mine, channel, T)  # [R, C]
        end = tl.where(tl.max(on.to(tl.int32), 1) > 0, end, begin)
    low, high = scalar(low, sum_dtype(T.WIDE)), scalar(high, sum_dtype(T.WIDE))

    lane_max = tl.full([T.BLOCK_R, T.BLOCK_E, T.BLOCK_C], float("-inf"), sum_dtype(T.WIDE))
    lane_sum = tl.full([T.BLOCK_R, T.BLOCK_E, T.BLOCK_C], 0.0, sum_dtype(T.WIDE))
    acc = tl.full([T.BLOCK_R, T.BLOCK_E, T.BLOCK_C], 0.0, sum_dtype(T.WIDE))
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + tl.arange(0, T.BLOCK_E)[None, :]  # [R, E]
        live = slot < end[:, None]
        here = live[:, :, None]
        if active is not None:
            here &= on[:, None, :]
        edge = tl.load(walk.edge + slot, mask=live, other=0)
        col = edge
        if x.v is not None:
            col = tl.load(walk.other + slot, mask=live, other=0)
        s, _ = load_logits(x.logits, edge, here, channel, low, high, T)
        value = load_messages(x, col, edge, here, channel, T)
        new_max = tl.maximum(lane_max, s)
        # a lane without a finite logit so far keeps -inf; a finite pivot avoids inf - inf
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp(lane_max - pivot)
        p = tl.exp(s - pivot)  # [R, E, C]
        acc = acc * decay + p * value
        lane_sum = lane_sum * decay + p
        lane_max = new_max

    top = tl.max(lane_max, 1)  # [R, C]
    pivot = tl.where(top == float("-inf"), 0.0, top)
    decay = tl.exp(lane_max - pivot[:, None, :])
    total = tl.sum(lane_sum * decay, 1)
    acc = tl.sum(acc * decay, 1)
    BUCKETS: tl.constexpr = walk.few is not None
    if BUCKETS:
        one = tl.program_id(0) < num_segments + num_middle
        if one:
            # the lanes of all R "rows" belong to one
            row_top = tl.max(top, 0, keep_dims=True) + tl.zeros_like(top)
            share = tl.exp(top - tl.where(row_top == float("-inf"), 0.0, row_top))
            total, acc, top = joined(total * share), joined(acc * share), row_top
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    if BUCKETS:
        store(part_ptr, 3 * T.C, segment, part, channel, top, T)
        store(part_ptr + T.C, 3 * T.C, segment, part, channel, total, T)
        store(part_ptr + 2 * T.C, 3 * T.C, segment, part, channel, acc, T)
    _finish_rows(out, top, total, acc, row, whole, channel, log_eps, T)


@triton.jit
def _channelwise_attention_combine_kernel(
    part_ptr,  # [S, 3, C]
    split_ptr,  # [P, 3]
    out,
    log_eps: tl.float64,
    T: tl.constexpr,
):
    """Grid (split rows, channel blocks): one program owns one row, and takes BLOCK_S of its
    segments at a time."""
    ACC: tl.constexpr = part_ptr.dtype.element_ty
    row, begin, end = _split_row(split_ptr)
    channel = tl.program_id(1) * T.BLOCK_C + tl.arange(0, T.BLOCK_C)
    top = tl.full([T.BLOCK_S, 1, T.BLOCK_C], float("-inf"), ACC)
    total = tl.full([T.BLOCK_S, 1, T.BLOCK_C], 0.0, ACC)
    acc = tl.full([T.BLOCK_S, 1, T.BLOCK_C], 0.0, ACC)
    for first in range(begin, end, T.BLOCK_S):
        part = (first + tl.arange(0, T.BLOCK_S).to(tl.int64))[:, None]
        at, mask = table(3 * T.C, part, (part < end)[:, :, None], channel, T)
        part_top = tl.load(part_ptr + at, mask=mask, other=float("-inf"))
        part_total = tl.load(part_ptr + at + T.C, mask=mask, other=0.0)
        part_acc = tl.load(part_ptr + at + 2 * T.C, mask=mask, other=0.0)
        new_top = tl.maximum(top, part_top)
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay, part_decay = tl.exp(top - pivot), tl.exp(part_top - pivot)
        acc = acc * decay + part_acc * part_decay
        total = total * decay + part_total * part_decay
        top = new_top
    row_top = tl.max(top, 0)  # [1, C]
    pivot = tl.where(row_top == float("-inf"), 0.0, row_top)
    decay = tl.exp(top - pivot[None, :, :])
    total, acc = tl.sum(total * decay, 0), tl.sum(acc * decay, 0)
    one = tl.zeros([1], tl.int64) + row
    _finish_rows(out, row_top, total, acc, one, one >= 0, channel, log_eps, T)


@triton.jit
def _finish_rows(out, top, total, acc, row, mine, channel, log_eps, T: tl.constexpr):
    """From the maximum, sum and weighted sum [R, C] of whole rows: o, lse and what is kept."""
    empty = total == 0.0
    pivot = tl.where(empty, 0.0, top)
    norm = 1.0 / tl.where(empty, 1.0, total)
    lse = pivot - tl.log(norm)
    o = tl.where(empty, 0.0, acc * norm * eps_share(lse, log_eps, total.dtype))
    store(out.o, T.C, row, mine, channel, o, T)
    store(out.lse, T.C, row, mine, channel, tl.where(empty, float("-inf"), lse), T)
    if out.stat is not None:
        # no edge of an empty row gets a weight: exp(-inf - inf) = 0
        pivot, norm = tl.where(empty, float("inf"), pivot), tl.where(empty, 0.0, norm)
        store(out.stat, 3 * T.C, row, mine, channel, pivot, T)
        store(out.stat + T.C, 3 * T.C, row, mine, channel, norm, T)
        store(out.stat + 2 * T.C, 3 * T.C, row, mine, channel, o, T)

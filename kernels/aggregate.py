"""Messages of the neighbours, summed, averaged or their maximum, without storing one.

    m_ij = w_ij act(x_j + e_ij),   o_i = sum_j m_ij   or   sum_j m_ij / n_i   or   max_j m_ij
    dm_ij = do_i   or   do_i / n_i   or   do_i where ij is the first of the largest, else 0
    de_ij = act'(x_j + e_ij) w_ij dm_ij,   dx_j = sum_i de_ij,   dw_ij = act(x_j + e_ij) dm_ij

The forward walks the rows, in the tiles of ``channels.py``. The backward walks the columns, where
a program that owns x_j writes dx_j, de_ij and dw_ij. Where an edge has one weight, its gradient is
the sum over the channels of a program, and over programs where these are several.
"""

import torch
import triton
import triton.language as tl

from .attention_combine import _split_row
from .buckets import COUNTS, sum_lanes, take, wholes_and_parts
from .channels import (
    combining,
    gather,
    lanes,
    load_index,
    load_table,
    load_weight,
    next_slots,
    own_channels,
    parts,
    plan,
    store_sums,
    store_table,
    store_weight_gradient,
    sum_of_blocks,
    weight_gradient,
)
from .loads import rows_of, store_channels, sum_dtype


def aggregate_fwd(messages, rows, reduction):
    """-> o [N, D]; for a maximum the edge it was found on [N, D], -1 for none, else [0, D]."""
    messages = _with_values(messages)
    x, edge_value, weight, *_ = messages
    like = edge_value if x is None else x
    n, width = rows[0].shape[0] - 1, like.shape[1]
    maximum, relu = reduction.reduce == "max", reduction.relu
    o = like.new_empty(n, width)
    first = rows[2].new_empty(n if maximum else 0, width)
    if not n or not width:
        return o, first
    call = plan(rows, n, width, (x, edge_value), weight)
    part = parts(call, like)
    gathered = messages._make(map(rows_of, messages))
    if not maximum:
        _aggregate_fwd_kernel[call.grid](
            gathered,
            o,
            part,
            call.walk,
            *call.counts,
            MEAN=reduction.reduce == "mean",
            RELU=relu,
            **call.meta,
        )
        combine_sums(call, part, o)
        return o, first
    # a maximum that is not above 0 has no first edge, unless a weight made it
    dead = relu and weight is None
    none = torch.iinfo(first.dtype).max
    part_first = None if part is None else first.new_empty(part.shape)
    _aggregate_max_kernel[call.grid](
        gathered,
        o,
        first,
        part,
        part_first,
        call.walk,
        *call.counts,
        RELU=relu,
        NONE=none,
        **call.meta,
    )
    if call.counts[2]:
        grid, meta = combining(call)
        _aggregate_combine_max_kernel[grid](
            part, part_first, call.split, o, first, DEAD=dead, NONE=none, **meta
        )
    return o, first


def aggregate_bwd(do, messages, first, rows, columns, reduction, needs):
    """-> dx [M, D], dedge [E, D] in the caller's edge order; dweight, dattr, dvalue_weight as what
    they are the gradients of. Empty where not needed."""
    _, _, _, attr, value_weight = messages
    low_rank = needs.need_edge_attr or needs.need_edge_value_weight
    asked = needs._replace(need_edge_value=needs.need_edge_value or low_rank)
    given = do, _with_values(messages), first, rows, columns, reduction, asked
    dx, dedge, dweight = _gathered_bwd(*given)
    dattr = dedge @ value_weight.T if needs.need_edge_attr else do.new_empty(0)
    dvalue = attr.T @ dedge if needs.need_edge_value_weight else do.new_empty(0)
    return dx, dedge if needs.need_edge_value else do.new_empty(0), dweight, dattr, dvalue


def _with_values(messages):
    """The messages, with values of low rank made, [E, D]."""
    if messages.edge_attr is None:
        return messages
    values = messages.edge_attr @ messages.edge_value_weight
    if messages.edge_value is not None:
        values += messages.edge_value
    return messages._replace(edge_value=values, edge_attr=None, edge_value_weight=None)


def _gathered_bwd(do, messages, first, rows, columns, reduction, needs):
    """-> dx, dedge, dweight of messages whose values are there."""
    m, num_edges, width = columns[0].shape[0] - 1, rows[2].shape[0], do.shape[1]
    dx = do.new_empty((m, width) if needs.need_x else (0,))
    dedge = do.new_empty((num_edges, width) if needs.need_edge_value else (0,))
    dweight, weight = do.new_empty(0), messages.edge_weight
    if needs.need_edge_weight:
        dweight = weight_gradient(weight, width)
    maximum = reduction.reduce == "max"
    # an unweighted maximum that is not above 0 has no first edge
    relu = reduction.relu and not (maximum and weight is None)
    if not relu and not needs.need_edge_weight:
        messages = messages._replace(x=None, edge_value=None)
    if not m or not width or not any(needs):
        return dx, dedge, sum_of_blocks(dweight, weight) if needs.need_edge_weight else dweight
    call = plan(columns, m, width, (do, messages.x, messages.edge_value), weight)
    part = parts(call, do) if needs.need_x else None
    _aggregate_bwd_kernel[call.grid](
        messages._make(map(rows_of, messages)),
        rows_of(do),
        first if maximum else None,
        dx,
        dedge,
        dweight if needs.need_edge_weight else None,
        part,
        rows[0],
        call.walk,
        *call.counts,
        MEAN=reduction.reduce == "mean",
        RELU=relu,
        NEEDS=needs,
        **call.meta,
    )
    if needs.need_x:
        combine_sums(call, part, dx)
    return dx, dedge, sum_of_blocks(dweight, weight) if needs.need_edge_weight else dweight


def combine_sums(call, part, out):
    """Complete out [N, D] in the split rows."""
    if call.counts[2]:
        grid, meta = combining(call)
        _aggregate_combine_kernel[grid](part, call.split, out, **meta)


@triton.jit(do_not_specialize=COUNTS)
def _aggregate_fwd_kernel(
    messages,
    o_ptr,  # [N, D]
    part_ptr,  # of segments: [S, D]
    walk,
    num_rows,
    num_middle,
    num_segments,
    MEAN: tl.constexpr,
    RELU: tl.constexpr,
    T: tl.constexpr,
):
    """Grid (row groups, channel blocks): one program owns BLOCK_R rows, or one, or a segment."""
    row, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    channel = own_channels(T)
    acc = lanes(0.0, T)
    for step in range(0, tl.max(end - begin), stride):
        slot, live = next_slots(begin, end, step, T)
        edge = slot
        if messages.edge_value is not None or messages.edge_weight is not None:
            edge = load_index(walk.edge, slot, live)
        m = _message(messages, walk, slot, edge, live, channel, T)
        if RELU:
            m = tl.where(m < 0.0, 0.0, m)  # not a maximum: NaN must stay NaN
        if messages.edge_weight is not None:
            m *= load_weight(messages.edge_weight, edge, live, channel, T)
        acc += m
    total = sum_lanes(acc, num_middle, num_segments, walk.few is not None)  # [R, C]
    if MEAN:
        total /= _degree(walk.ptr, row, mine, sum_dtype(T.WIDE))[:, None]
    store_sums(o_ptr, part_ptr, walk, row, mine, num_middle, num_segments, channel, total, T)


@triton.jit(do_not_specialize=COUNTS)
def _aggregate_max_kernel(
    messages,
    o_ptr,  # [N, D]
    first_ptr,  # [N, D]
    part_ptr,  # of segments: [S, D]
    part_first_ptr,
    walk,
    num_rows,
    num_middle,
    num_segments,
    RELU: tl.constexpr,
    NONE: tl.constexpr,
    T: tl.constexpr,
):
    """Grid (row groups, channel blocks): the largest message and the least number of its edges."""
    row, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    channel = own_channels(T)
    top = lanes(float("-inf"), T)
    first = tl.full(top.shape, NONE, walk.edge.dtype.element_ty)
    for step in range(0, tl.max(end - begin), stride):
        slot, live = next_slots(begin, end, step, T)
        edge = load_index(walk.edge, slot, live)
        m = _message(messages, walk, slot, edge, live, channel, T)
        if messages.edge_weight is not None:
            if RELU:
                m = tl.where(m < 0.0, 0.0, m)
            m *= load_weight(messages.edge_weight, edge, live, channel, T)
        top, first = _larger(top, first, m, edge[:, :, None], live)
    row_top, row_first = _largest(top, first, NONE)  # [R, C]
    BUCKETS: tl.constexpr = walk.few is not None
    if BUCKETS:
        one = tl.program_id(0) < num_segments + num_middle
        if one:
            one_top, one_first = _largest(row_top[None, :, :], row_first[None, :, :], NONE)
            row_top = one_top + tl.zeros_like(row_top)
            row_first = one_first + tl.zeros_like(row_first)
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    if BUCKETS:
        store_table(part_ptr, segment, part, channel, row_top, T.D)
        store_table(part_first_ptr, segment, part, channel, row_first, T.D)
    DEAD: tl.constexpr = RELU and messages.edge_weight is None
    _store_largest(o_ptr, first_ptr, row, whole, channel, row_top, row_first, T.D, DEAD, NONE)


@triton.jit(do_not_specialize=COUNTS)
def _aggregate_bwd_kernel(
    messages,  # None where the gradient does not depend on them
    do,  # [N, D]
    first_ptr,  # [N, D]; None but for a maximum
    dx_ptr,  # [M, D]
    dedge_ptr,  # [E, D]
    dweight_ptr,  # as weight_gradient makes it
    part_ptr,  # of segments: [S, D]
    degree_ptr,  # [N + 1], the row walk's
    walk,  # of columns, as are the counts
    num_rows,
    num_middle,
    num_segments,
    MEAN: tl.constexpr,
    RELU: tl.constexpr,
    NEEDS: tl.constexpr,
    T: tl.constexpr,
):
    """Grid (column groups, channel blocks): dx, de, dw of BLOCK_R columns, or one, or a segment."""
    col, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    channel = own_channels(T)
    x = 0.0
    if messages.x is not None:
        x = gather(messages.x, col[:, None], mine[:, None], channel, T)
    dx = lanes(0.0, T)
    weighted: tl.constexpr = messages.edge_weight is not None
    reads_edge: tl.constexpr = first_ptr is not None or messages.edge_value is not None or weighted
    for step in range(0, tl.max(end - begin), stride):
        slot, live = next_slots(begin, end, step, T)
        row = load_index(walk.other, slot, live)
        edge = slot
        if reads_edge or NEEDS.need_edge_value:
            edge = load_index(walk.edge, slot, live)
        dm = gather(do, row, live, channel, T)
        if MEAN:
            dm /= _degree(degree_ptr, row, live, sum_dtype(T.WIDE))[:, :, None]
        if first_ptr is not None:
            first = load_table(first_ptr, row, live, channel, T.D)
            dm = tl.where(first == edge[:, :, None], dm, 0.0)
        if RELU or NEEDS.need_edge_weight:
            m = x + tl.zeros_like(dm)
            if messages.edge_value is not None:
                m += gather(messages.edge_value, edge, live, channel, T)
        if NEEDS.need_edge_weight:
            dw = dm * m
            if RELU:
                dw = dm * tl.where(m < 0.0, 0.0, m)
            store_weight_gradient(dweight_ptr, edge, live, channel, dw, T)
        if weighted:
            dm *= load_weight(messages.edge_weight, edge, live, channel, T)
        if RELU:
            dm = tl.where(m <= 0.0, 0.0, dm)
        if NEEDS.need_x:
            dx += dm
        if NEEDS.need_edge_value:
            store_channels(dedge_ptr, edge, live, channel, dm, T.D)
    if NEEDS.need_x:
        dx = sum_lanes(dx, num_middle, num_segments, walk.few is not None)
        store_sums(dx_ptr, part_ptr, walk, col, mine, num_middle, num_segments, channel, dx, T)


@triton.jit
def _aggregate_combine_kernel(
    part_ptr,  # [S, D]
    split_ptr,  # [P, 3]
    out_ptr,  # [N, D]
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (split rows, channel blocks): the sum of the segments of one row."""
    row, begin, end = _split_row(split_ptr)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_S, 1, BLOCK_D], part_ptr.dtype.element_ty)
    for first in range(begin, end, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S).to(tl.int64)[:, None]
        acc += load_table(part_ptr, part, part < end, channel, D)
    one = tl.zeros([1], tl.int64) + row
    store_table(out_ptr, one, one >= 0, channel, tl.sum(acc, 0), D)


@triton.jit
def _aggregate_combine_max_kernel(
    part_ptr,  # [S, D]
    part_first_ptr,  # [S, D]
    split_ptr,  # [P, 3]
    o_ptr,  # [N, D]
    first_ptr,  # [N, D]
    D: tl.constexpr,
    DEAD: tl.constexpr,
    NONE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (split rows, channel blocks): the largest of the segments of one row."""
    row, begin, end = _split_row(split_ptr)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    top = tl.full([1, BLOCK_S, BLOCK_D], float("-inf"), part_ptr.dtype.element_ty)
    first = tl.full([1, BLOCK_S, BLOCK_D], NONE, part_first_ptr.dtype.element_ty)
    for at in range(begin, end, BLOCK_S):
        part = at + tl.arange(0, BLOCK_S).to(tl.int64)[None, :]
        live = part < end
        m = load_table(part_ptr, part, live, channel, D)
        edge = load_table(part_first_ptr, part, live, channel, D)
        top, first = _larger(top, first, m, edge, live)
    row_top, row_first = _largest(top, first, NONE)
    one = tl.zeros([1], tl.int64) + row
    _store_largest(o_ptr, first_ptr, one, one >= 0, channel, row_top, row_first, D, DEAD, NONE)


@triton.jit
def _message(messages, walk, slot, edge, live, channel, T: tl.constexpr):
    """x_j + e_ij before the activation, [R, E, C]."""
    if messages.x is not None:
        m = gather(messages.x, load_index(walk.other, slot, live), live, channel, T)
        if messages.edge_value is not None:
            m += gather(messages.edge_value, edge, live, channel, T)
    else:
        m = gather(messages.edge_value, edge, live, channel, T)
    return m


@triton.jit
def _degree(ptr, row, live, ACC: tl.constexpr):
    """Edges of rows, at least 1."""
    at = ptr + row.to(tl.int64)
    end = tl.load(at + 1, mask=live, other=0)
    return tl.maximum(end - tl.load(at, mask=live, other=0), 1).to(ACC)


@triton.jit
def _larger(top, first, m, edge, live):
    """Of two values and edges [R, E, C], the larger one, NaN above all, or the lower edge."""
    new = (m > top) | ((m != m) & (top == top))
    equal = (m == top) | ((m != m) & (top != top))
    new = live[:, :, None] & (new | (equal & (edge < first)))
    return tl.where(new, m, top), tl.where(new, edge, first)


@triton.jit
def _largest(top, first, NONE: tl.constexpr):
    """``_larger`` over the lanes: [R, E, C] -> [R, C]."""
    nan = top != top
    value = tl.max(tl.where(nan, float("-inf"), top), 1)
    value = tl.where(tl.max(nan.to(tl.int32), 1) > 0, float("nan"), value)
    best = value[:, None, :]
    hit = (top == best) | (nan & (best != best))
    return value, tl.min(tl.where(hit, first, NONE), 1)


@triton.jit
def _store_largest(
    o_ptr,
    first_ptr,
    row,
    live,
    channel,
    top,
    first,
    D: tl.constexpr,
    DEAD: tl.constexpr,
    NONE: tl.constexpr,
):
    """Maxima and their edges [R, C]: 0 and -1 where there is no edge, or where what is not above 0
    is ``DEAD``."""
    none = first == NONE
    if DEAD:
        none |= top <= 0.0  # as large, and without a gradient
    store_table(o_ptr, row, live, channel, tl.where(none, 0.0, top), D)
    store_table(first_ptr, row, live, channel, tl.where(none, -1, first), D)

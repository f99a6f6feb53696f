"""The mean of the neighbours under sigmoid gates, channel by channel: GatedGCN's aggregation.

    e_ij = gate_ij + gate_i + gate_j,   sigma_ij = 1 / (1 + exp(-e_ij)),   eta_ij = r_ij sigma_ij
    v_ij = x_j + value_ij,   z_i = sum_j eta_ij + eps,   o_i = sum_j eta_ij v_ij / z_i
    w_i  = do_i / z_i,       ds_ij = w_i v_ij - w_i o_i

    dx_j  = sum_i dv_ij,   dv_ij = eta_ij w_i,   dr_ij = sigma_ij ds_ij
    de_ij = eta_ij (1 - sigma_ij) ds_ij + (what comes from e's own gradient)

The gate's gradient is de, those of the rows' and columns' gates are its sums. Tiles are those of
``channels.py``: one pass by rows forward, one by columns backward, where sigma is computed again,
and one by rows for the rows' gates. o_i in de is the accumulator's, not the rounded one.
"""

import triton
import triton.language as tl

from fastgt.contract import Messages, Reduction

from .aggregate import aggregate_fwd, combine_sums
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
from .configs import accumulator
from .loads import rows_of, scalar, store_channels, sum_dtype


def gated_aggregate_fwd(gated, rows, mean, results):
    """-> o [N, D], e [E, D] in the caller's edge order; total and mean [N, D] to be kept."""
    x = gated.x
    n, width = rows[0].shape[0] - 1, x.shape[1]
    keep = results.keep and mean.normalize
    rounded = keep and x.dtype != accumulator(x)
    o = x.new_empty(n, width)
    e = x.new_empty(rows[2].shape[0] if results.edge_scores else 0, width)
    total = x.new_empty(n if keep else 0, width, dtype=accumulator(x))
    kept_mean = total.new_empty(n if rounded else 0, width)
    if not n or not width:
        return o, e, total, kept_mean
    call = plan(rows, n, width, gated._replace(edge_weight=None), gated.edge_weight)
    part = parts(call, x)
    part_total = parts(call, x) if mean.normalize else None
    outputs = o, total if keep else None, kept_mean if rounded else None
    _gated_fwd_kernel[call.grid](
        gated._make(map(rows_of, gated)),
        *outputs,
        e if results.edge_scores else None,
        part,
        part_total,
        call.walk,
        *call.counts,
        mean.eps,
        NORMALIZE=mean.normalize,
        **call.meta,
    )
    if call.counts[2]:
        grid, meta = combining(call)
        _gated_combine_kernel[grid](
            part, part_total, call.split, *outputs, mean.eps, NORMALIZE=mean.normalize, **meta
        )
    return o, e, total, kept_mean


def gated_aggregate_bwd(upstream, gated, kept, rows, columns, mean, needs):
    """-> dx [M, D], dgate [E, D], drow [N, D], dcol [M, D], dweight as the weights, dvalue [E, D];
    empty where not needed."""
    x, weight = gated.x, gated.edge_weight
    (m, width), n = x.shape, rows[0].shape[0] - 1
    dx = x.new_empty((m, width) if needs.need_x else (0,))
    dgate = x.new_empty((rows[2].shape[0], width) if needs.need_gate else (0,))
    drow = x.new_empty((n, width) if needs.need_gate_row else (0,))
    dcol = x.new_empty((m, width) if needs.need_gate_col else (0,))
    dvalue = x.new_empty((rows[2].shape[0], width) if needs.need_edge_value else (0,))
    dweight = weight_gradient(weight, width) if needs.need_edge_weight else x.new_empty(0)
    if width:
        grads = dx, dgate, drow, dcol, dweight, dvalue
        drow = _gated_bwd(upstream, gated, kept, rows, columns, mean, needs, grads)
    dweight = sum_of_blocks(dweight, weight) if needs.need_edge_weight else dweight
    return dx, dgate, drow, dcol, dweight, dvalue


def _gated_bwd(upstream, gated, kept, rows, columns, mean, needs, grads):
    """Write the gradients. -> drow."""
    x, (dx, dgate, drow, dcol, dweight, dvalue) = gated.x, grads
    (m, width), n = x.shape, rows[0].shape[0] - 1
    w = upstream.do / kept.total if mean.normalize else upstream.do
    shift = w * kept.mean if mean.normalize else None
    others = w, shift, upstream.de
    tensors = *gated._replace(edge_weight=None), *others
    gathered = gated._make(map(rows_of, gated)), *map(rows_of, others)
    if m and any(needs._replace(need_gate_row=False)):
        call = plan(columns, m, width, tensors, gated.edge_weight)
        part = parts(call, x) if needs.need_x else None
        part_col = parts(call, x) if needs.need_gate_col else None
        _gated_bwd_columns_kernel[call.grid](
            *gathered,
            dx,
            dgate,
            dcol,
            dweight if needs.need_edge_weight else None,
            dvalue if needs.need_edge_value else None,
            part,
            part_col,
            call.walk,
            *call.counts,
            NEEDS=needs,
            **call.meta,
        )
        if needs.need_x:
            combine_sums(call, part, dx)
        if needs.need_gate_col:
            combine_sums(call, part_col, dcol)
    if needs.need_gate_row and needs.need_gate and x.dtype == accumulator(x):
        # what the columns' pass has written, not rounded: summed, not computed again
        drow, _ = aggregate_fwd(Messages(None, dgate, None), rows, Reduction("sum", False))
    elif n and needs.need_gate_row:
        call = plan(rows, n, width, tensors, gated.edge_weight)
        part = parts(call, x)
        _gated_bwd_rows_kernel[call.grid](
            *gathered, drow, part, call.walk, *call.counts, **call.meta
        )
        combine_sums(call, part, drow)
    return drow


@triton.jit(do_not_specialize=COUNTS)
def _gated_fwd_kernel(
    gated,
    o_ptr,  # [N, D]
    total_ptr,  # [N, D]; None where it is not kept
    mean_ptr,  # [N, D], o before it is rounded; None where it is not kept
    e_ptr,  # [E, D]; None where it is not asked for
    part_ptr,  # of segments: [S, D]
    part_total_ptr,
    walk,
    num_rows,
    num_middle,
    num_segments,
    eps: tl.float64,
    NORMALIZE: tl.constexpr,
    T: tl.constexpr,
):
    """Grid (row groups, channel blocks): one program owns BLOCK_R rows, or one, or a segment."""
    row, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    channel = own_channels(T)
    gate_i = _own_gate(gated.gate_row, row, mine, channel, T)
    acc, acc_z = lanes(0.0, T), lanes(0.0, T)
    on_edges: tl.constexpr = gated.edge_weight is not None or gated.edge_value is not None
    reads_edge: tl.constexpr = on_edges or gated.gate is not None or e_ptr is not None
    for step in range(0, tl.max(end - begin), stride):
        slot, live = next_slots(begin, end, step, T)
        col = load_index(walk.other, slot, live)
        edge = load_index(walk.edge, slot, live) if reads_edge else slot
        e = _add_gates(gate_i, gated.gate, edge, gated.gate_col, col, live, channel, T)
        if e_ptr is not None:
            store_channels(e_ptr, edge, live, channel, e, T.D)
        eta = _sigmoid(e, live)
        if gated.edge_weight is not None:
            eta *= load_weight(gated.edge_weight, edge, live, channel, T)
        acc += eta * _values(gated, col, edge, live, channel, T)
        if NORMALIZE:
            acc_z += eta
    BUCKETS: tl.constexpr = walk.few is not None
    o = sum_lanes(acc, num_middle, num_segments, BUCKETS)
    z = sum_lanes(acc_z, num_middle, num_segments, BUCKETS)
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    if BUCKETS:
        store_table(part_ptr, segment, part, channel, o, T.D)
        if NORMALIZE:
            store_table(part_total_ptr, segment, part, channel, z, T.D)
    _store_mean(o_ptr, total_ptr, mean_ptr, row, whole, channel, o, z, eps, T.D, NORMALIZE)


@triton.jit(do_not_specialize=COUNTS)
def _gated_bwd_columns_kernel(
    gated,
    w,  # [N, D]
    shift,  # [N, D], w o; None without the denominator
    de,  # [E, D]; None where e has no gradient
    dx_ptr,  # [M, D]
    dgate_ptr,  # [E, D]
    dcol_ptr,  # [M, D]
    dweight_ptr,  # as weight_gradient makes it
    dvalue_ptr,  # [E, D]
    part_ptr,  # of segments: [S, D]
    part_col_ptr,
    walk,  # of columns, as are the counts
    num_rows,
    num_middle,
    num_segments,
    NEEDS: tl.constexpr,
    T: tl.constexpr,
):
    """Grid (column groups, channel blocks): all gradients but drow of columns, or a segment."""
    col, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    channel = own_channels(T)
    gate_j = _own_gate(gated.gate_col, col, mine, channel, T)
    x = gather(gated.x, col[:, None], mine[:, None], channel, T)
    dx, dcol = lanes(0.0, T), lanes(0.0, T)
    on_edges: tl.constexpr = gated.edge_weight is not None or gated.edge_value is not None
    reads_edge: tl.constexpr = on_edges or gated.gate is not None or de is not None
    for step in range(0, tl.max(end - begin), stride):
        slot, live = next_slots(begin, end, step, T)
        row = load_index(walk.other, slot, live)
        edge = slot
        if reads_edge or NEEDS.need_gate:
            edge = load_index(walk.edge, slot, live)
        e = _add_gates(gate_j, gated.gate, edge, gated.gate_row, row, live, channel, T)
        sigma = _sigmoid(e, live)
        eta = sigma
        if gated.edge_weight is not None:
            eta = sigma * load_weight(gated.edge_weight, edge, live, channel, T)
        w_i = gather(w, row, live, channel, T)
        if NEEDS.need_x:
            dx += eta * w_i
        if NEEDS.need_edge_value:
            store_channels(dvalue_ptr, edge, live, channel, eta * w_i, T.D)
        if NEEDS.need_gate or NEEDS.need_gate_col or NEEDS.need_edge_weight:
            value = x
            if gated.edge_value is not None:
                value = x + gather(gated.edge_value, edge, live, channel, T)
            ds = w_i * value
            if shift is not None:
                ds -= gather(shift, row, live, channel, T)
            if NEEDS.need_edge_weight:
                store_weight_gradient(dweight_ptr, edge, live, channel, ds * sigma, T)
        if NEEDS.need_gate or NEEDS.need_gate_col:
            ds *= eta * (1.0 - sigma)
            if de is not None:
                ds += gather(de, edge, live, channel, T)
            if NEEDS.need_gate_col:
                dcol += tl.where(live[:, :, None], ds, 0.0)
            if NEEDS.need_gate:
                store_channels(dgate_ptr, edge, live, channel, ds, T.D)
    if NEEDS.need_x:
        dx = sum_lanes(dx, num_middle, num_segments, walk.few is not None)
        store_sums(dx_ptr, part_ptr, walk, col, mine, num_middle, num_segments, channel, dx, T)
    if NEEDS.need_gate_col:
        dcol = sum_lanes(dcol, num_middle, num_segments, walk.few is not None)
        store_sums(
            dcol_ptr, part_col_ptr, walk, col, mine, num_middle, num_segments, channel, dcol, T
        )


@triton.jit(do_not_specialize=COUNTS)
def _gated_bwd_rows_kernel(
    gated,
    w,  # [N, D]
    shift,  # [N, D], w o; None without the denominator
    de,  # [E, D]; None where e has no gradient
    drow_ptr,  # [N, D]
    part_ptr,  # of segments: [S, D]
    walk,
    num_rows,
    num_middle,
    num_segments,
    T: tl.constexpr,
):
    """Grid (row groups, channel blocks): the gradient of the gates of BLOCK_R rows, or of one."""
    row, mine, begin, end, stride = take(walk, num_rows, num_middle, num_segments, T)
    channel = own_channels(T)
    gate_i = _own_gate(gated.gate_row, row, mine, channel, T)
    w_i = gather(w, row[:, None], mine[:, None], channel, T)
    shift_i = tl.zeros_like(w_i)
    if shift is not None:
        shift_i = gather(shift, row[:, None], mine[:, None], channel, T)
    drow = lanes(0.0, T)
    on_edges: tl.constexpr = gated.edge_weight is not None or gated.edge_value is not None
    reads_edge: tl.constexpr = on_edges or gated.gate is not None or de is not None
    for step in range(0, tl.max(end - begin), stride):
        slot, live = next_slots(begin, end, step, T)
        col = load_index(walk.other, slot, live)
        edge = load_index(walk.edge, slot, live) if reads_edge else slot
        e = _add_gates(gate_i, gated.gate, edge, gated.gate_col, col, live, channel, T)
        sigma = _sigmoid(e, live)
        eta = sigma
        if gated.edge_weight is not None:
            eta = sigma * load_weight(gated.edge_weight, edge, live, channel, T)
        x = _values(gated, col, edge, live, channel, T)
        ds = (w_i * x - shift_i) * (eta * (1.0 - sigma))
        if de is not None:
            ds += gather(de, edge, live, channel, T)
        drow += tl.where(live[:, :, None], ds, 0.0)
    drow = sum_lanes(drow, num_middle, num_segments, walk.few is not None)
    store_sums(drow_ptr, part_ptr, walk, row, mine, num_middle, num_segments, channel, drow, T)


@triton.jit
def _gated_combine_kernel(
    part_ptr,  # [S, D]
    part_total_ptr,  # [S, D]
    split_ptr,  # [P, 3]
    o_ptr,  # [N, D]
    total_ptr,
    mean_ptr,
    eps: tl.float64,
    NORMALIZE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (split rows, channel blocks): the output of one row."""
    ACC: tl.constexpr = part_ptr.dtype.element_ty
    row, begin, end = _split_row(split_ptr)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([1, BLOCK_S, BLOCK_D], ACC)
    acc_z = tl.zeros([1, BLOCK_S, BLOCK_D], ACC)
    for at in range(begin, end, BLOCK_S):
        part = at + tl.arange(0, BLOCK_S).to(tl.int64)[None, :]
        live = part < end
        acc += load_table(part_ptr, part, live, channel, D)
        if NORMALIZE:
            acc_z += load_table(part_total_ptr, part, live, channel, D)
    one = tl.zeros([1], tl.int64) + row
    o, z = tl.sum(acc, 1), tl.sum(acc_z, 1)
    _store_mean(o_ptr, total_ptr, mean_ptr, one, one >= 0, channel, o, z, eps, D, NORMALIZE)


@triton.jit
def _own_gate(gate, row, mine, channel, T: tl.constexpr):
    """The gate of the program's own rows (or columns), [R, 1, C]; 0 where there is none."""
    own = tl.full([T.BLOCK_R, 1, T.BLOCK_D], 0.0, sum_dtype(T.WIDE))
    if gate is not None:
        own += gather(gate, row[:, None], mine[:, None], channel, T)
    return own


@triton.jit
def _add_gates(own, gate, edge, gate_other, other, live, channel, T: tl.constexpr):
    """e_ij [R, E, C]: ``own`` and the gates of edges and of their other ends, where there are."""
    e = own + lanes(0.0, T)
    if gate is not None:
        e += gather(gate, edge, live, channel, T)
    if gate_other is not None:
        e += gather(gate_other, other, live, channel, T)
    return e


@triton.jit
def _values(gated, col, edge, live, channel, T: tl.constexpr):
    """x_j and the edge's value, [R, E, C]."""
    x = gather(gated.x, col, live, channel, T)
    if gated.edge_value is not None:
        x += gather(gated.edge_value, edge, live, channel, T)
    return x


@triton.jit
def _sigmoid(e, live):
    """sigma [R, E, C], 0 where not ``live``: the gates of a row without edges may be NaN."""
    return tl.where(live[:, :, None], 1.0 / (1.0 + tl.exp(-e)), 0.0)


@triton.jit
def _store_mean(
    o_ptr,
    total_ptr,
    mean_ptr,
    row,
    live,
    channel,
    o,
    z,
    eps,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """From the two sums [R, C] of whole rows: the output, and what the backward needs."""
    if NORMALIZE:
        z += scalar(eps, z.dtype)
        z = tl.where(z == 0.0, float("inf"), z)
        o /= z
        if total_ptr is not None:
            store_table(total_ptr, row, live, channel, z, D)
        if mean_ptr is not None:
            store_table(mean_ptr, row, live, channel, o, D)
    store_table(o_ptr, row, live, channel, o, D)

"""The mean of the neighbours under sigmoid gates, channel by channel: GatedGCN's aggregation.

    e_ij = gate_ij + gate_i + gate_j,   sigma_ij = 1 / (1 + exp(-e_ij))
    z_i  = sum_j sigma_ij + eps,        o_i = sum_j sigma_ij x_j / z_i,   w_i = do_i / z_i

    dx_j  = sum_i sigma_ij w_i
    de_ij = sigma_ij (1 - sigma_ij) (w_i x_j - w_i o_i) + (what comes from e's own gradient)

The gate's gradient is de, those of the rows' and columns' gates are its sums. Tiles and walks are
those of ``aggregate.py``: one pass by rows forward, one by columns backward, where sigma is
computed again, and one by rows for the rows' gates. o_i in de is the accumulator's, not the
rounded one.
"""

import triton
import triton.language as tl

from .aggregate import COUNTS, aggregate_fwd, combine_sums, combining, parts, plan
from .attention_combine import _split_row
from .buckets import sum_lanes, take_rows, wholes_and_parts
from .configs import accumulator, stride
from .loads import load_channels, scalar, store_channels


@triton.jit
def _sigmoid(e, live):
    """sigma [R, E, C], 0 where not ``live``: the gates of a row without edges may be NaN."""
    return tl.where(live[:, :, None], 1.0 / (1.0 + tl.exp(-e)), 0.0)


@triton.jit(do_not_specialize=COUNTS)
def _gated_fwd_kernel(
    x_ptr, gate_ptr, gate_row_ptr, gate_col_ptr,  # [M, D], [E, D], [N, D], [M, D]
    o_ptr, e_ptr, total_ptr, mean_ptr,  # [N, D], [E, D], [N, D], [N, D]
    part_ptr, part_total_ptr,  # of segments: [S, D] twice
    row_ptr, col_ptr, edge_ptr, few_ptr, middle_ptr, segment_ptr,
    x_stride, gate_stride, gate_row_stride, gate_col_stride,
    num_rows, num_middle, num_segments, eps: tl.float64,
    D: tl.constexpr, NORMALIZE: tl.constexpr, HAS_GATE: tl.constexpr, HAS_ROW: tl.constexpr,
    HAS_COL: tl.constexpr, STORE_E: tl.constexpr, KEEP: tl.constexpr, ROUNDED: tl.constexpr,
    BUCKETS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (row groups, channel blocks): one program owns BLOCK_R rows, or one, or a segment."""
    row, mine, begin, end, stride = take_rows(
        row_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_E)
    gate_i = tl.zeros([BLOCK_R, 1, BLOCK_D], ACC)
    if HAS_ROW:
        gate_i += load_channels(
            gate_row_ptr, gate_row_stride, row[:, None], mine[:, None], channel, D, ALIGN
        ).to(ACC)
    acc = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_D], ACC)
    acc_z = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_D], ACC)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]
        live = slot < end[:, None]
        col = tl.load(col_ptr + slot, mask=live, other=0)
        has_edge: tl.constexpr = HAS_GATE or STORE_E
        edge = tl.load(edge_ptr + slot, mask=live, other=0) if has_edge else slot
        e = gate_i + tl.zeros([BLOCK_R, BLOCK_E, BLOCK_D], ACC)
        if HAS_GATE:
            e += load_channels(gate_ptr, gate_stride, edge, live, channel, D, ALIGN).to(ACC)
        if HAS_COL:
            e += load_channels(gate_col_ptr, gate_col_stride, col, live, channel, D, ALIGN).to(ACC)
        if STORE_E:
            store_channels(e_ptr, edge, live, channel, e, D)
        sigma = _sigmoid(e, live)
        acc += sigma * load_channels(x_ptr, x_stride, col, live, channel, D, ALIGN).to(ACC)
        if NORMALIZE:
            acc_z += sigma
    o = sum_lanes(acc, num_middle, num_segments, BUCKETS)
    z = sum_lanes(acc_z, num_middle, num_segments, BUCKETS)
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    if BUCKETS:
        at, live = segment[:, None], part[:, None]
        store_channels(part_ptr, at, live, channel, o[:, None, :], D)
        if NORMALIZE:
            store_channels(part_total_ptr, at, live, channel, z[:, None, :], D)
    _store_mean(
        o_ptr, total_ptr, mean_ptr, row, whole, channel, o, z, eps,
        D, NORMALIZE, KEEP, ROUNDED, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _gated_bwd_columns_kernel(
    x_ptr, gate_ptr, gate_row_ptr, gate_col_ptr, w_ptr, shift_ptr, de_ptr,  # [N, D] w and w o
    dx_ptr, dgate_ptr, dcol_ptr, part_ptr, part_col_ptr,  # [M, D], [E, D], [M, D], [S, D] twice
    col_ptr, row_ptr, edge_ptr, few_ptr, middle_ptr, segment_ptr,
    x_stride, gate_stride, gate_row_stride, gate_col_stride, w_stride, shift_stride, de_stride,
    num_rows, num_middle, num_segments,  # of columns
    D: tl.constexpr, NORMALIZE: tl.constexpr, HAS_GATE: tl.constexpr, HAS_ROW: tl.constexpr,
    HAS_COL: tl.constexpr, HAS_DE: tl.constexpr,
    NEED_X: tl.constexpr, NEED_GATE: tl.constexpr, NEED_COL: tl.constexpr,
    BUCKETS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (column groups, channel blocks): dx and gates' gradients of columns, or a segment."""
    col, mine, begin, end, stride = take_rows(
        col_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_E)
    gate_j = tl.zeros([BLOCK_R, 1, BLOCK_D], ACC)
    if HAS_COL:
        gate_j += load_channels(
            gate_col_ptr, gate_col_stride, col[:, None], mine[:, None], channel, D, ALIGN
        ).to(ACC)
    x = load_channels(x_ptr, x_stride, col[:, None], mine[:, None], channel, D, ALIGN).to(ACC)
    dx = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_D], ACC)
    dcol = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_D], ACC)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]
        live = slot < end[:, None]
        row = tl.load(row_ptr + slot, mask=live, other=0)
        has_edge: tl.constexpr = HAS_GATE or NEED_GATE or HAS_DE
        edge = tl.load(edge_ptr + slot, mask=live, other=0) if has_edge else slot
        e = gate_j + tl.zeros([BLOCK_R, BLOCK_E, BLOCK_D], ACC)
        if HAS_GATE:
            e += load_channels(gate_ptr, gate_stride, edge, live, channel, D, ALIGN).to(ACC)
        if HAS_ROW:
            e += load_channels(gate_row_ptr, gate_row_stride, row, live, channel, D, ALIGN).to(ACC)
        sigma = _sigmoid(e, live)
        w = load_channels(w_ptr, w_stride, row, live, channel, D, ALIGN).to(ACC)
        if NEED_X:
            dx += sigma * w
        if NEED_GATE or NEED_COL:
            ds = w * x
            if NORMALIZE:
                ds -= load_channels(shift_ptr, shift_stride, row, live, channel, D, ALIGN)
            ds *= sigma * (1.0 - sigma)
            if HAS_DE:
                ds += load_channels(de_ptr, de_stride, edge, live, channel, D, ALIGN).to(ACC)
            if NEED_COL:
                dcol += tl.where(live[:, :, None], ds, 0.0)
            if NEED_GATE:
                store_channels(dgate_ptr, edge, live, channel, ds, D)
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    if NEED_X:
        total = sum_lanes(dx, num_middle, num_segments, BUCKETS)[:, None, :]
        store_channels(dx_ptr, col[:, None], whole[:, None], channel, total, D)
        if BUCKETS:
            store_channels(part_ptr, segment[:, None], part[:, None], channel, total, D)
    if NEED_COL:
        total = sum_lanes(dcol, num_middle, num_segments, BUCKETS)[:, None, :]
        store_channels(dcol_ptr, col[:, None], whole[:, None], channel, total, D)
        if BUCKETS:
            store_channels(part_col_ptr, segment[:, None], part[:, None], channel, total, D)


@triton.jit(do_not_specialize=COUNTS)
def _gated_bwd_rows_kernel(
    x_ptr, gate_ptr, gate_row_ptr, gate_col_ptr, w_ptr, shift_ptr, de_ptr,
    drow_ptr, part_ptr,  # [N, D]; of segments: [S, D]
    row_ptr, col_ptr, edge_ptr, few_ptr, middle_ptr, segment_ptr,
    x_stride, gate_stride, gate_row_stride, gate_col_stride, w_stride, shift_stride, de_stride,
    num_rows, num_middle, num_segments,
    D: tl.constexpr, NORMALIZE: tl.constexpr, HAS_GATE: tl.constexpr, HAS_ROW: tl.constexpr,
    HAS_COL: tl.constexpr, HAS_DE: tl.constexpr,
    BUCKETS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (row groups, channel blocks): the gradient of the gates of BLOCK_R rows, or of one."""
    row, mine, begin, end, stride = take_rows(
        row_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
        BUCKETS, BLOCK_R, BLOCK_E,
    )  # fmt: skip
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_E)
    at, is_mine = row[:, None], mine[:, None]
    gate_i = tl.zeros([BLOCK_R, 1, BLOCK_D], ACC)
    if HAS_ROW:
        gate_i += load_channels(gate_row_ptr, gate_row_stride, at, is_mine, channel, D, ALIGN).to(
            ACC
        )
    w = load_channels(w_ptr, w_stride, at, is_mine, channel, D, ALIGN).to(ACC)
    if NORMALIZE:
        shift = load_channels(shift_ptr, shift_stride, at, is_mine, channel, D, ALIGN)
    else:
        shift = tl.zeros_like(w)
    drow = tl.zeros([BLOCK_R, BLOCK_E, BLOCK_D], ACC)
    for step in range(0, tl.max(end - begin), stride):
        slot = begin[:, None] + step + lane[None, :]
        live = slot < end[:, None]
        col = tl.load(col_ptr + slot, mask=live, other=0)
        edge = tl.load(edge_ptr + slot, mask=live, other=0) if HAS_GATE or HAS_DE else slot
        e = gate_i + tl.zeros([BLOCK_R, BLOCK_E, BLOCK_D], ACC)
        if HAS_GATE:
            e += load_channels(gate_ptr, gate_stride, edge, live, channel, D, ALIGN).to(ACC)
        if HAS_COL:
            e += load_channels(gate_col_ptr, gate_col_stride, col, live, channel, D, ALIGN).to(ACC)
        sigma = _sigmoid(e, live)
        x = load_channels(x_ptr, x_stride, col, live, channel, D, ALIGN).to(ACC)
        ds = (w * x - shift) * (sigma * (1.0 - sigma))
        if HAS_DE:
            ds += load_channels(de_ptr, de_stride, edge, live, channel, D, ALIGN).to(ACC)
        drow += tl.where(live[:, :, None], ds, 0.0)
    whole, part, segment = wholes_and_parts(mine, num_middle, num_segments, BUCKETS)
    total = sum_lanes(drow, num_middle, num_segments, BUCKETS)[:, None, :]
    store_channels(drow_ptr, row[:, None], whole[:, None], channel, total, D)
    if BUCKETS:
        store_channels(part_ptr, segment[:, None], part[:, None], channel, total, D)


@triton.jit
def _gated_combine_kernel(
    part_ptr, part_total_ptr, split_ptr, o_ptr, total_ptr, mean_ptr, eps: tl.float64,
    D: tl.constexpr, NORMALIZE: tl.constexpr, KEEP: tl.constexpr, ROUNDED: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (split rows, channel blocks): the output of one row."""
    ACC: tl.constexpr = part_ptr.dtype.element_ty
    row, begin, end = _split_row(split_ptr)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([1, BLOCK_S, BLOCK_D], ACC)
    acc_z = tl.zeros([1, BLOCK_S, BLOCK_D], ACC)
    for at in range(begin, end, BLOCK_S):
        part = at + tl.arange(0, BLOCK_S).to(tl.int64)[None, :]
        live = part < end
        acc += load_channels(part_ptr, (D, 1), part, live, channel, D, 1)
        if NORMALIZE:
            acc_z += load_channels(part_total_ptr, (D, 1), part, live, channel, D, 1)
    one = tl.zeros([1], tl.int64) + row
    _store_mean(
        o_ptr, total_ptr, mean_ptr, one, one >= 0, channel, tl.sum(acc, 1), tl.sum(acc_z, 1), eps,
        D, NORMALIZE, KEEP, ROUNDED, ACC,
    )  # fmt: skip


@triton.jit
def _store_mean(
    o_ptr, total_ptr, mean_ptr, row, live, channel, o, z, eps,
    D: tl.constexpr, NORMALIZE: tl.constexpr, KEEP: tl.constexpr, ROUNDED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """From the two sums [R, C] of whole rows: the output, and what the backward needs."""
    at, live = row[:, None], live[:, None]
    if NORMALIZE:
        z += scalar(eps, ACC)
        z = tl.where(z == 0.0, 1.0, z)
        o /= z
        if KEEP:
            store_channels(total_ptr, at, live, channel, z[:, None, :], D)
            if ROUNDED:
                store_channels(mean_ptr, at, live, channel, o[:, None, :], D)
    store_channels(o_ptr, at, live, channel, o[:, None, :], D)


def gated_aggregate_fwd(x, gate, gate_row, gate_col, rows, eps, normalize, return_gate, keep):
    """-> o [N, D], e [E, D] in the caller's edge order; total and mean [N, D] to be kept."""
    n, width = rows[0].shape[0] - 1, x.shape[1]
    wide, keep = accumulator(x), keep and normalize
    rounded = keep and x.dtype != wide
    o = x.new_empty(n, width)
    e = x.new_empty(rows[2].shape[0] if return_gate else 0, width)
    total = x.new_empty(n if keep else 0, width, dtype=wide)
    mean = x.new_empty(n if rounded else 0, width, dtype=wide)
    if not n or not width:
        return o, e, total, mean
    gates = gate, gate_row, gate_col
    call = plan(rows, n, width, (x, *gates))
    part = parts(call, x)
    part_total = parts(call, x) if normalize else None
    kept = {"NORMALIZE": normalize, "KEEP": keep, "ROUNDED": rounded}
    _gated_fwd_kernel[call.grid](
        x, *gates, o, e, total, mean, part, part_total, *call.walk,
        *map(stride, (x, *gates)), *call.counts, eps,
        STORE_E=return_gate, **kept, **_given(*gates), **call.meta,
    )  # fmt: skip
    if call.counts[2]:
        grid, meta = combining(call)
        _gated_combine_kernel[grid](
            part, part_total, call.split, o, total, mean, eps, **kept, **meta
        )
    return o, e, total, mean


def gated_aggregate_bwd(
    do, de, x, gate, gate_row, gate_col, total, mean, rows, columns, normalize,
    need_x, need_gate, need_row, need_col,
):  # fmt: skip
    """-> dx [M, D], dgate [E, D], drow [N, D], dcol [M, D]; empty where not needed."""
    (m, width), n = x.shape, rows[0].shape[0] - 1
    dx = x.new_empty((m, width) if need_x else (0,))
    dgate = x.new_empty((rows[2].shape[0], width) if need_gate else (0,))
    drow = x.new_empty((n, width) if need_row else (0,))
    dcol = x.new_empty((m, width) if need_col else (0,))
    if not width:
        return dx, dgate, drow, dcol
    w = do / total if normalize else do
    shift = w * mean if normalize else None
    tensors = x, gate, gate_row, gate_col, w, shift, de
    shared = {"NORMALIZE": normalize, "HAS_DE": de is not None, **_given(gate, gate_row, gate_col)}
    if m and (need_x or need_gate or need_col):
        call = plan(columns, m, width, tensors)
        part = parts(call, x) if need_x else None
        part_col = parts(call, x) if need_col else None
        _gated_bwd_columns_kernel[call.grid](
            *tensors, dx, dgate, dcol, part, part_col, *call.walk,
            *map(stride, tensors), *call.counts,
            NEED_X=need_x, NEED_GATE=need_gate, NEED_COL=need_col, **shared, **call.meta,
        )  # fmt: skip
        for out, sums, need in ((dx, part, need_x), (dcol, part_col, need_col)):
            if need:
                combine_sums(call, sums, out)
    if need_row and need_gate and x.dtype == accumulator(x):
        # what the columns' pass has written, not rounded: summed, not computed again
        return dx, dgate, aggregate_fwd(None, dgate, rows, "sum", False)[0], dcol
    if n and need_row:
        call = plan(rows, n, width, tensors)
        part = parts(call, x)
        _gated_bwd_rows_kernel[call.grid](
            *tensors, drow, part, *call.walk, *map(stride, tensors), *call.counts,
            **shared, **call.meta,
        )  # fmt: skip
        combine_sums(call, part, drow)
    return dx, dgate, drow, dcol


def _given(gate, gate_row, gate_col):
    return {
        "HAS_GATE": gate is not None,
        "HAS_ROW": gate_row is not None,
        "HAS_COL": gate_col is not None,
    }

"""How rows end: ``finish_row`` makes dq and gamma of a row's sums. The kernels here put the sums of
rows that are too long for one program together, segment by segment, in a fixed order.

The symbols are those of ``attention.py``. One program owns one row (or column) of BLOCK_H heads and
takes BLOCK_S of its segments at a time.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .configs import FILLERS, power_of_2
from .edge_tile import eps_share
from .loads import load_lse, load_own_heads, scalar, store_heads

_BLOCK_S = 4
_CHANNELS = 256  # of one program: a row is split seldom, and its sums are few


@triton.jit
def _combine_outputs_kernel(
    part_ptr,  # [S, H, DV]
    stat_ptr,  # [S, H, 2]
    split_ptr,  # [P, 3]
    o_ptr,
    lse_ptr,
    norm_ptr,
    log_eps: tl.float64,
    H: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid (split rows, head blocks): output and lse of one row."""
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    row, begin, end = _split_row(split_ptr)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    top = tl.full([BLOCK_S, BLOCK_H], float("-inf"), ACC)
    total = tl.zeros([BLOCK_S, BLOCK_H], ACC)
    acc = tl.zeros([BLOCK_S, BLOCK_H, BLOCK_DV], ACC)
    for first in range(begin, end, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S).to(tl.int64)
        live = part < end
        at = part[:, None] * H + head[None, :]
        mask = live[:, None] & (head < H)[None, :]
        part_top = tl.load(stat_ptr + 2 * at, mask=mask, other=float("-inf"))
        part_total = tl.load(stat_ptr + 2 * at + 1, mask=mask, other=0.0)
        x = _load_part(part_ptr, part, live, head, H, DV, BLOCK_DV)  # [S, H, DV]
        new_top = tl.maximum(top, part_top)
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay, part_decay = tl.exp(top - pivot), tl.exp(part_top - pivot)
        acc = acc * decay[:, :, None] + x * part_decay[:, :, None]
        total = total * decay + part_total * part_decay
        top = new_top
    row_top = tl.max(top, 0)  # [H]
    pivot = tl.where(row_top == float("-inf"), 0.0, row_top)
    decay = tl.exp(top - pivot[None, :])
    total = tl.sum(total * decay, 0)
    o = tl.sum(acc * decay[:, :, None], 0)
    empty = total == 0.0
    lse = pivot + tl.log(tl.where(empty, 1.0, total))
    norm = eps_share(lse, log_eps, ACC) / tl.where(empty, 1.0, total)
    o = tl.where(empty[:, None], 0.0, o * norm[:, None])
    one = tl.zeros([1, 1], tl.int64) + row
    store_heads(o_ptr, one, one >= 0, head, H, DV, BLOCK_DV, o[None, None, :, :])
    at = row * H + head
    tl.store(lse_ptr + at, tl.where(empty, float("-inf"), lse), mask=head < H)
    if norm_ptr is not None:
        tl.store(norm_ptr + 2 * at, pivot, mask=head < H)
        tl.store(norm_ptr + 2 * at + 1, norm, mask=head < H)


class RowSums(NamedTuple):
    """Sums over the edges of whole rows."""

    total: Any  # of p, [R, H]
    delta: Any  # of p dp, [R, H]
    pk: Any  # of p k, [R, H, D]
    pdpk: Any  # of p dp k, [R, H, D]
    dtk: Any  # what dq receives through the edge scores, whatever the weights, [R, H, D]


@triton.jit
def _combine_rows_kernel(
    part_ptr,  # [S, PARTS, H, D]
    stat_ptr,  # [S, H, 2]
    split_ptr,  # [P, 3]
    lse_ptr,
    dlse,
    wgamma_ptr,
    dq_ptr,
    scale: tl.float64,
    log_eps: tl.float64,
    H: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (split rows, head blocks): dq, w and gamma of one row."""
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    row, begin, end = _split_row(split_ptr)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_S, BLOCK_H], ACC)
    delta = tl.zeros([BLOCK_S, BLOCK_H], ACC)
    pk = tl.zeros([BLOCK_S, BLOCK_H, BLOCK_D], ACC)
    pdpk = tl.zeros([BLOCK_S, BLOCK_H, BLOCK_D], ACC)
    dtk = tl.zeros([BLOCK_S, BLOCK_H, BLOCK_D], ACC)
    for first in range(begin, end, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S).to(tl.int64)
        live = part < end
        at = part[:, None] * H + head[None, :]
        mask = live[:, None] & (head < H)[None, :]
        total += tl.load(stat_ptr + 2 * at, mask=mask, other=0.0)
        delta += tl.load(stat_ptr + 2 * at + 1, mask=mask, other=0.0)
        if dq_ptr is not None:
            pk += _load_part(part_ptr, PARTS * part, live, head, H, D, BLOCK_D)
            pdpk += _load_part(part_ptr, PARTS * part + 1, live, head, H, D, BLOCK_D)
            if PARTS == 3:
                dtk += _load_part(part_ptr, PARTS * part + 2, live, head, H, D, BLOCK_D)
    at = row * H + head
    one = tl.zeros([1], tl.int64) + row
    sums = RowSums(
        tl.sum(total, 0)[None, :],
        tl.sum(delta, 0)[None, :],
        tl.sum(pk, 0)[None, :, :],
        tl.sum(pdpk, 0)[None, :, :],
        tl.sum(dtk, 0)[None, :, :],
    )
    lse = load_lse(lse_ptr + at, head < H)[None, :]
    scale = scalar(scale, ACC)
    finish_row(sums, lse, one, one >= 0, head, scale, log_eps, dlse, wgamma_ptr, dq_ptr, H, D)


@triton.jit
def _combine_columns_kernel(
    part_ptr,  # [S, H, D]
    split_ptr,  # [P, 3]
    out_ptr,  # [M, H, D]
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (split columns, head blocks): the sum of the segments of one column."""
    col, begin, end = _split_row(split_ptr)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros([BLOCK_S, BLOCK_H, BLOCK_D], part_ptr.dtype.element_ty)
    for first in range(begin, end, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S).to(tl.int64)
        acc += _load_part(part_ptr, part, part < end, head, H, D, BLOCK_D)
    one = tl.zeros([1, 1], tl.int64) + col
    out = tl.sum(acc, 0)[None, None, :, :]
    store_heads(out_ptr, one, one >= 0, head, H, D, BLOCK_D, out)


@triton.jit
def finish_row(
    sums,  # RowSums
    lse,
    row,
    mine,
    head,
    scale,
    log_eps,
    dlse,
    wgamma_ptr,
    dq_ptr,
    H: tl.constexpr,
    D: tl.constexpr,
):
    """w, gamma and dq of whole rows."""
    BLOCK_D: tl.constexpr = sums.pk.shape[2]
    at = row[:, None] * H + head[None, :]
    mask = mine[:, None] & (head < H)[None, :]
    total = tl.where(sums.total == 0.0, 1.0, sums.total)
    kept = eps_share(lse, log_eps, total.dtype)
    w = kept / total
    gamma = kept * w * sums.delta
    if dlse is not None:
        dlse_at = row[:, None] * dlse.stride[0]
        dlse_at += head.to(tl.int64)[None, :] * dlse.stride[1]
        gamma -= tl.load(dlse.ptr + dlse_at, mask=mask, other=0.0).to(total.dtype)
    gamma /= total
    # where no edge counts, neither do the upstream gradients, finite or not
    empty = lse == float("inf")
    gamma = tl.where(empty, 0.0, gamma)
    tl.store(wgamma_ptr + 2 * at, w, mask=mask)
    tl.store(wgamma_ptr + 2 * at + 1, gamma, mask=mask)
    if dq_ptr is not None:
        dq = w[:, :, None] * sums.pdpk - gamma[:, :, None] * sums.pk
        dq = (tl.where(empty[:, :, None], 0.0, dq) + sums.dtk)[:, None, :, :] * scale
        store_heads(dq_ptr, row[:, None], mine[:, None], head, H, D, BLOCK_D, dq)


@triton.jit
def _split_row(split_ptr):
    """-> the row of this program and the range of its segments."""
    at = split_ptr + 3 * tl.program_id(0).to(tl.int64)
    row, begin = tl.load(at).to(tl.int64), tl.load(at + 1).to(tl.int64)
    return row, begin, tl.load(at + 2).to(tl.int64)


@triton.jit
def _load_part(ptr, part, live, head, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums of segments ``part`` [S] of a contiguous [S, H, D] tensor: -> [S, H, D]."""
    x = load_own_heads(ptr, part[:, None], live[:, None], head, H, D, BLOCK_D, 1)
    return tl.reshape(x, [part.shape[0], head.shape[0], BLOCK_D])


def combine_outputs(o, lse, norm, part, stat, split, log_eps):
    """Complete o [N, H, DV], lse [N, H] and norm in the rows of ``split``."""
    grid, meta = _plan(split, *o.shape[1:])
    meta["BLOCK_DV"], meta["DV"] = meta.pop("BLOCK_D"), meta.pop("D")
    _combine_outputs_kernel[grid](part, stat, split, o, lse, norm, log_eps, **meta)


def combine_rows(dq, wgamma, part, stat, lse, dlse, split, scale, log_eps):
    """Complete wgamma [N, H, 2] and dq [N, H, D] (None: not needed) in the rows of ``split``."""
    grid, meta = _plan(split, lse.shape[1], part.shape[3])
    _combine_rows_kernel[grid](
        part,
        stat,
        split,
        lse,
        dlse,
        wgamma,
        dq,
        scale,
        log_eps,
        PARTS=part.shape[1],
        **meta,
    )


def combine_columns(out, part, split):
    """Complete out [M, H, D] in the columns of ``split``."""
    grid, meta = _plan(split, *out.shape[1:])
    _combine_columns_kernel[grid](part, split, out, **meta)


def _plan(split, heads, width):
    block_d = power_of_2(width)
    block_h = min(power_of_2(heads), max(1, _CHANNELS // block_d))
    meta = {
        "H": heads,
        "D": width,
        "BLOCK_S": _BLOCK_S,
        "BLOCK_H": block_h,
        "BLOCK_D": block_d,
        "num_warps": max(1, min(4, _BLOCK_S * block_h * block_d // 256)),
    }
    return (split.shape[0] - FILLERS, -(-heads // block_h)), meta

"""Projections into and out of heads as matrix products over the active heads' channels alone.

Channels of all heads are numbered with the active heads' first: number j is channel j % D of head
``heads[j // D]``. A tile takes BLOCK_J numbers, of as many heads as that is, whatever D; beyond the
active ones there is nothing to multiply, and what is written there is 0. How many are active is
read in the kernel. Symbols and shapes are those of ``fastgt.ops.head_projection``.
"""

import triton
import triton.language as tl

from .configs import accumulator, dot_dtype, dot_precision, projection_tile
from .loads import dot


@triton.jit
def head_channels(heads_ptr, first, H: tl.constexpr, D: tl.constexpr, BLOCK_J: tl.constexpr):
    """-> head and channel [J] of BLOCK_J numbers, which exist, and which are of active heads."""
    j = first + tl.arange(0, BLOCK_J)
    there = j < H * D
    head = tl.load(heads_ptr + j // D, mask=there, other=0).to(tl.int64)
    return head, j % D, there, j < tl.load(heads_ptr + H) * D


@triton.jit(do_not_specialize=["n"])
def _head_expand_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, heads_ptr,  # [N, C], [H, D, C], [H, D], [N, H, D], [H + 1]
    x_stride, weight_stride, bias_stride, n,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (node tiles, tiles of heads' channels)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = (row < n)[:, None]
    first = tl.program_id(1) * BLOCK_J
    head, d, there, active = head_channels(heads_ptr, first, H, D, BLOCK_J)
    acc = tl.zeros([BLOCK_N, BLOCK_J], ACC)
    if first < tl.load(heads_ptr + H) * D:
        weight_row = head * weight_stride[0] + d * weight_stride[1]
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            x = tl.load(
                x_ptr + row[:, None] * x_stride[0] + c[None, :] * x_stride[1],
                mask=live & (c < C)[None, :],
                other=0.0,
            )
            w = tl.load(
                weight_ptr + weight_row[None, :] + c[:, None] * weight_stride[2],
                mask=active[None, :] & (c < C)[:, None],
                other=0.0,
            )
            acc = dot(x, w, acc, ACC, DOT, PRECISION)
        if bias_ptr is not None:
            at = bias_ptr + head * bias_stride[0] + d * bias_stride[1]
            acc += tl.load(at, mask=active, other=0.0).to(ACC)[None, :]
    y = tl.where(active[None, :], acc, 0.0).to(y_ptr.dtype.element_ty)
    tl.store(
        y_ptr + row[:, None] * (H * D) + (head * D + d)[None, :], y, mask=live & there[None, :]
    )


@triton.jit(do_not_specialize=["n"])
def _head_contract_kernel(
    y_ptr, weight_ptr, bias_ptr, z_ptr, heads_ptr,  # [N, H, D], [H, D, C], [C], [N, C], [H + 1]
    y_stride, weight_stride, bias_stride, n,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (node tiles, channel tiles)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = (row < n)[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_C], ACC)
    for first in range(0, tl.load(heads_ptr + H) * D, BLOCK_J):
        head, d, _there, active = head_channels(heads_ptr, first, H, D, BLOCK_J)
        y = tl.load(
            y_ptr + row[:, None] * y_stride[0] + (head * y_stride[1] + d * y_stride[2])[None, :],
            mask=live & active[None, :],
            other=0.0,
        )
        weight_row = head * weight_stride[0] + d * weight_stride[1]
        w = tl.load(
            weight_ptr + weight_row[:, None] + c[None, :] * weight_stride[2],
            mask=active[:, None] & (c < C)[None, :],
            other=0.0,
        )
        acc = dot(y, w, acc, ACC, DOT, PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + c * bias_stride[0], mask=c < C, other=0.0).to(ACC)[None, :]
    z = acc.to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + row[:, None] * C + c[None, :], z, mask=live & (c < C)[None, :])


@triton.jit(do_not_specialize=["n", "chunk"])
def _head_outer_kernel(
    y_ptr, x_ptr, g_ptr, heads_ptr,  # [N, H, D], [N, C], [chunks, H, D, C], [H + 1]
    y_stride, x_stride, n, chunk,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of heads' channels, channel tiles, chunks of nodes)."""
    first = tl.program_id(0) * BLOCK_J
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    head, d, there, active = head_channels(heads_ptr, first, H, D, BLOCK_J)
    begin = tl.program_id(2).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, n)
    # nothing to add up where no head is active
    end = tl.where(first < tl.load(heads_ptr + H) * D, end, begin)
    acc = tl.zeros([BLOCK_J, BLOCK_C], ACC)
    for step in range(0, end - begin, BLOCK_N):
        row = begin + step + tl.arange(0, BLOCK_N)
        live = row < end
        y = tl.load(
            y_ptr + row[None, :] * y_stride[0] + (head * y_stride[1] + d * y_stride[2])[:, None],
            mask=live[None, :] & active[:, None],
            other=0.0,
        )
        x = tl.load(
            x_ptr + row[:, None] * x_stride[0] + c[None, :] * x_stride[1],
            mask=live[:, None] & (c < C)[None, :],
            other=0.0,
        )
        acc = dot(y, x, acc, ACC, DOT, PRECISION)
    g = tl.where(active[:, None], acc, 0.0).to(g_ptr.dtype.element_ty)
    at = tl.program_id(2).to(tl.int64) * (H * D) + head * D + d
    tl.store(g_ptr + at[:, None] * C + c[None, :], g, mask=there[:, None] & (c < C)[None, :])


def head_expand(x, weight, bias, heads):
    """-> y [N, H, D]."""
    n, (h, d, c) = x.shape[0], weight.shape
    y = x.new_empty(n, h, d)
    if n:
        meta = _meta(x, h, d, c)
        grid = triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(h * d, meta["BLOCK_J"])
        bias_stride = (0, 0) if bias is None else bias.stride()
        _head_expand_kernel[grid](
            x, weight, bias, y, heads, x.stride(), weight.stride(), bias_stride, n, **meta
        )
    return y


def head_contract(y, weight, bias, heads):
    """-> z [N, C]."""
    n, (h, d, c) = y.shape[0], weight.shape
    z = y.new_empty(n, c)
    if n:
        meta = _meta(y, h, d, c)
        grid = triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(c, meta["BLOCK_C"])
        bias_stride = (0,) if bias is None else bias.stride()
        _head_contract_kernel[grid](
            y, weight, bias, z, heads, y.stride(), weight.stride(), bias_stride, n, **meta
        )
    return z


# of a sum over nodes: enough to fill a device of some 150 processors a few times
_PROGRAMS = 512


def head_outer(y, x, heads):
    """-> g [H, D, C]; chunks of nodes are added in order, the same bits every time."""
    n, h, d = y.shape
    c = x.shape[1]
    meta = _meta(y, h, d, c)
    across, down = triton.cdiv(h * d, meta["BLOCK_J"]), triton.cdiv(c, meta["BLOCK_C"])
    steps = triton.cdiv(n, meta["BLOCK_N"])
    chunks = max(1, min(triton.cdiv(steps, 8), _PROGRAMS // (across * down)))
    chunk = triton.cdiv(steps, chunks) * meta["BLOCK_N"]
    parts = y.new_empty(chunks, h, d, c, dtype=y.dtype if chunks == 1 else accumulator(y))
    _head_outer_kernel[across, down, chunks](
        y, x, parts, heads, y.stride(), x.stride(), n, chunk, **meta
    )
    return parts[0] if chunks == 1 else parts.sum(0).to(y.dtype)


def _meta(x, h, d, c):
    tile = projection_tile(x.element_size())
    return {
        "H": h,
        "D": d,
        "C": c,
        "DOT": dot_dtype(x),
        "ACC": tl.float64 if x.element_size() == 8 else tl.float32,
        "PRECISION": dot_precision(x),
        "BLOCK_N": tile.block_n,
        "BLOCK_J": tile.block_j,
        "BLOCK_C": tile.block_c,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }

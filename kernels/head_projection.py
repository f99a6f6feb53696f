"""Projections into and out of heads as matrix products over the active heads' channels alone.

Channels of all heads are numbered with the active heads' first: number j is channel j % D of head
``heads[j // D]``. A tile takes BLOCK_J numbers, of as many heads as that is, whatever D; beyond the
active ones there is nothing to multiply, and what is written there is 0. How many are active is
read in the kernel. Symbols and shapes are those of ``fastgt.ops.head_projection``.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .configs import (
    ProjectionTile,
    accumulator,
    dot_dtype,
    dot_precision,
    projection_tile,
)
from .loads import Rows, dot, sum_dtype


class Sizes(NamedTuple):
    """Constants of the kernels."""

    H: int
    D: int
    C: int
    PRODUCTS: str  # the dtype that tiles are multiplied in
    WIDE: bool  # sums are in float64
    PRECISION: str
    BLOCK_N: int
    BLOCK_J: int
    BLOCK_C: int


@triton.jit
def head_channels(heads_ptr, first, S: tl.constexpr):
    """-> head and channel [J] of BLOCK_J numbers, which exist, and which are of active heads."""
    j = first + tl.arange(0, S.BLOCK_J)
    there = j < S.H * S.D
    head = tl.load(heads_ptr + j // S.D, mask=there, other=0).to(tl.int64)
    return head, j % S.D, there, j < tl.load(heads_ptr + S.H) * S.D


@triton.jit(do_not_specialize=["n"])
def _head_expand_kernel(
    x,  # [N, C]
    weight,  # [H, D, C]
    bias,  # [H, D]
    y_ptr,  # [N, H, D]
    heads_ptr,  # [H + 1]
    n,
    S: tl.constexpr,
):
    """Grid (node tiles, tiles of heads' channels)."""
    row = tl.program_id(0).to(tl.int64) * S.BLOCK_N + tl.arange(0, S.BLOCK_N)
    live = (row < n)[:, None]
    first = tl.program_id(1) * S.BLOCK_J
    head, d, there, active = head_channels(heads_ptr, first, S)
    acc = tl.full([S.BLOCK_N, S.BLOCK_J], 0.0, sum_dtype(S.WIDE))
    if first < tl.load(heads_ptr + S.H) * S.D:
        weight_row = head * weight.stride[0] + d * weight.stride[1]
        for start in range(0, S.C, S.BLOCK_C):
            c = start + tl.arange(0, S.BLOCK_C)
            a = tl.load(
                x.ptr + row[:, None] * x.stride[0] + c[None, :] * x.stride[1],
                mask=live & (c < S.C)[None, :],
                other=0.0,
            )
            w = tl.load(
                weight.ptr + weight_row[None, :] + c[:, None] * weight.stride[2],
                mask=active[None, :] & (c < S.C)[:, None],
                other=0.0,
            )
            acc = dot(a, w, acc, S)
        if bias.ptr is not None:
            at = bias.ptr + head * bias.stride[0] + d * bias.stride[1]
            acc += tl.load(at, mask=active, other=0.0).to(sum_dtype(S.WIDE))[None, :]
    y = tl.where(active[None, :], acc, 0.0).to(y_ptr.dtype.element_ty)
    tl.store(
        y_ptr + row[:, None] * (S.H * S.D) + (head * S.D + d)[None, :],
        y,
        mask=live & there[None, :],
    )


@triton.jit(do_not_specialize=["n"])
def _head_contract_kernel(
    y,  # [N, H, D]
    weight,  # [H, D, C]
    bias,  # [C]
    z_ptr,  # [N, C]
    heads_ptr,  # [H + 1]
    n,
    S: tl.constexpr,
):
    """Grid (node tiles, channel tiles)."""
    row = tl.program_id(0).to(tl.int64) * S.BLOCK_N + tl.arange(0, S.BLOCK_N)
    c = tl.program_id(1) * S.BLOCK_C + tl.arange(0, S.BLOCK_C)
    live = (row < n)[:, None]
    acc = tl.full([S.BLOCK_N, S.BLOCK_C], 0.0, sum_dtype(S.WIDE))
    for first in range(0, tl.load(heads_ptr + S.H) * S.D, S.BLOCK_J):
        head, d, _there, active = head_channels(heads_ptr, first, S)
        a = tl.load(
            y.ptr + row[:, None] * y.stride[0] + (head * y.stride[1] + d * y.stride[2])[None, :],
            mask=live & active[None, :],
            other=0.0,
        )
        weight_row = head * weight.stride[0] + d * weight.stride[1]
        w = tl.load(
            weight.ptr + weight_row[:, None] + c[None, :] * weight.stride[2],
            mask=active[:, None] & (c < S.C)[None, :],
            other=0.0,
        )
        acc = dot(a, w, acc, S)
    if bias.ptr is not None:
        acc += tl.load(bias.ptr + c * bias.stride[0], mask=c < S.C, other=0.0).to(
            sum_dtype(S.WIDE)
        )[None, :]
    z = acc.to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + row[:, None] * S.C + c[None, :], z, mask=live & (c < S.C)[None, :])


@triton.jit(do_not_specialize=["n", "chunk"])
def _head_outer_kernel(
    y,  # [N, H, D]
    x,  # [N, C]
    g_ptr,  # [chunks, H, D, C]
    heads_ptr,  # [H + 1]
    n,
    chunk,
    S: tl.constexpr,
):
    """Grid (tiles of heads' channels, channel tiles, chunks of nodes)."""
    first = tl.program_id(0) * S.BLOCK_J
    c = tl.program_id(1) * S.BLOCK_C + tl.arange(0, S.BLOCK_C)
    head, d, there, active = head_channels(heads_ptr, first, S)
    begin = tl.program_id(2).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, n)
    # nothing to add up where no head is active
    end = tl.where(first < tl.load(heads_ptr + S.H) * S.D, end, begin)
    acc = tl.full([S.BLOCK_J, S.BLOCK_C], 0.0, sum_dtype(S.WIDE))
    for step in range(0, end - begin, S.BLOCK_N):
        row = begin + step + tl.arange(0, S.BLOCK_N)
        live = row < end
        a = tl.load(
            y.ptr + row[None, :] * y.stride[0] + (head * y.stride[1] + d * y.stride[2])[:, None],
            mask=live[None, :] & active[:, None],
            other=0.0,
        )
        b = tl.load(
            x.ptr + row[:, None] * x.stride[0] + c[None, :] * x.stride[1],
            mask=live[:, None] & (c < S.C)[None, :],
            other=0.0,
        )
        acc = dot(a, b, acc, S)
    g = tl.where(active[:, None], acc, 0.0).to(g_ptr.dtype.element_ty)
    at = tl.program_id(2).to(tl.int64) * (S.H * S.D) + head * S.D + d
    tl.store(g_ptr + at[:, None] * S.C + c[None, :], g, mask=there[:, None] & (c < S.C)[None, :])


def head_expand(x, weight, bias, heads):
    """-> y [N, H, D]."""
    n, (h, d, c) = x.shape[0], weight.shape
    y = x.new_empty(n, h, d)
    if n:
        tile = projection_tile(x.element_size())
        grid = triton.cdiv(n, tile.block_n), triton.cdiv(h * d, tile.block_j)
        _head_expand_kernel[grid](
            Rows(x, x.stride()),
            Rows(weight, weight.stride()),
            Rows(bias, (0, 0) if bias is None else bias.stride()),
            y,
            heads,
            n,
            **_constants(x, h, d, c, tile),
        )
    return y


def head_contract(y, weight, bias, heads):
    """-> z [N, C]."""
    n, (h, d, c) = y.shape[0], weight.shape
    z = y.new_empty(n, c)
    if n:
        tile = projection_tile(y.element_size())
        grid = triton.cdiv(n, tile.block_n), triton.cdiv(c, tile.block_c)
        _head_contract_kernel[grid](
            Rows(y, y.stride()),
            Rows(weight, weight.stride()),
            Rows(bias, (0,) if bias is None else bias.stride()),
            z,
            heads,
            n,
            **_constants(y, h, d, c, tile),
        )
    return z


# of a sum over nodes: enough to fill a device of some 150 processors a few times
_PROGRAMS = 512


def head_outer(y, x, heads):
    """-> g [H, D, C]; chunks of nodes are added in order, the same bits every time."""
    n, h, d = y.shape
    c = x.shape[1]
    tile = projection_tile(y.element_size())
    across, down = triton.cdiv(h * d, tile.block_j), triton.cdiv(c, tile.block_c)
    steps = triton.cdiv(n, tile.block_n)
    chunks = max(1, min(triton.cdiv(steps, 8), _PROGRAMS // (across * down)))
    chunk = triton.cdiv(steps, chunks) * tile.block_n
    parts = y.new_empty(chunks, h, d, c, dtype=y.dtype if chunks == 1 else accumulator(y))
    _head_outer_kernel[across, down, chunks](
        Rows(y, y.stride()),
        Rows(x, x.stride()),
        parts,
        heads,
        n,
        chunk,
        **_constants(y, h, d, c, tile),
    )
    return parts[0] if chunks == 1 else parts.sum(0).to(y.dtype)


def _constants(x, h: int, d: int, c: int, tile: ProjectionTile) -> dict:
    blocks = tile.block_n, tile.block_j, tile.block_c
    sizes = Sizes(h, d, c, dot_dtype(x), x.element_size() == 8, dot_precision(x), *blocks)
    return {"S": sizes, "num_warps": tile.num_warps, "num_stages": tile.num_stages}

"""Tiles of tensors: addresses, loads, stores, products. R rows, E edges in flight per row, H heads,
D channels; M rows and N columns of a window."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rows(NamedTuple):
    """A tensor whose rows kernels read, of any strides. None where there is none."""

    ptr: Any
    stride: Any  # one for each dimension


@triton.jit
def load_heads(
    x, row, live, head, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr
):
    """``Rows`` of an [N, H, D] tensor, one for each element of ``row`` [R, E]: -> [R, E, H, D].

    Zero where ``live`` [R, E] is false and beyond H and D.
    """
    offset, mask = _address(x.stride, row, live, head, H, D, BLOCK_D, ALIGN)
    return tl.load(x.ptr + offset, mask=mask, other=0.0)


@triton.jit
def load_own_heads(
    ptr,
    row,
    live,
    head,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """``load_heads`` of a contiguous tensor."""
    return load_heads(Rows(ptr, (H * D, D, 1)), row, live, head, H, D, BLOCK_D, ALIGN)


@triton.jit
def store_heads(ptr, row, live, head, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, x):
    """Inverse of ``load_own_heads``; casts [R, E, H, D] to the tensor's dtype."""
    offset, mask = _address((H * D, D, 1), row, live, head, H, D, BLOCK_D, 1)
    tl.store(ptr + offset, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _address(
    stride, row, live, head, H, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr
):
    d = tl.arange(0, BLOCK_D)
    # every row and head starts at a multiple of ALIGN, which the launcher has checked: said by
    # multiplying with it, or 8 channels of 16 bits would be loaded 2 bytes at a time
    first = row.to(tl.int64)[:, :, None, None] * (stride[0] // ALIGN)
    first += head.to(tl.int64)[None, None, :, None] * (stride[1] // ALIGN)
    first *= ALIGN
    mask = live[:, :, None, None] & (head < H)[None, None, :, None]
    if D != BLOCK_D:
        mask &= (d < D)[None, None, None, :]
    return first + d.to(tl.int64)[None, None, None, :] * stride[2], mask


@triton.jit
def load_rows(
    ptr,
    stride,
    row,
    live,
    head,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
    first=0,
):
    """Rows ``row`` [M] of one head of an [N, H, D] tensor: -> [M, D], 0 where not ``live``.

    Or BLOCK_D of the channels, from the ``first`` on.
    """
    offset, mask = _row_address(stride, row, live, head, D, BLOCK_D, ALIGN, first)
    return tl.load(ptr + offset, mask=mask, other=0.0)


@triton.jit
def store_rows(
    ptr, row, live, head, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, x, first=0
):
    """Inverse of ``load_rows`` for a contiguous tensor; casts [M, D] to its dtype."""
    offset, mask = _row_address((H * D, D, 1), row, live, head, D, BLOCK_D, 1, first)
    tl.store(ptr + offset, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _row_address(
    stride, row, live, head, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, first
):
    d = first + tl.arange(0, BLOCK_D)
    start = row.to(tl.int64)[:, None] * (stride[0] // ALIGN)
    start += head.to(tl.int64) * (stride[1] // ALIGN)
    start *= ALIGN  # see _address
    mask = live[:, None]
    if D % BLOCK_D:
        mask &= (d < D)[None, :]
    return start + d.to(tl.int64)[None, :] * stride[2], mask


@triton.jit
def load_channels(ptr, stride, row, live, channel, D: tl.constexpr, ALIGN: tl.constexpr):
    """Channels [C] of rows of an [N, D] tensor, one for each element of ``row`` [R, E]: [R, E, C].

    Zero where ``live`` [R, E] is false and beyond D.
    """
    offset, mask = _channel_address(stride, row, live, channel, D, ALIGN)
    return tl.load(ptr + offset, mask=mask, other=0.0)


@triton.jit
def store_channels(ptr, row, live, channel, x, D: tl.constexpr):
    """Inverse of ``load_channels`` for a contiguous tensor; casts [R, E, C] to its dtype."""
    offset, mask = _channel_address((D, 1), row, live, channel, D, 1)
    tl.store(ptr + offset, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _channel_address(stride, row, live, channel, D: tl.constexpr, ALIGN: tl.constexpr):
    first = row.to(tl.int64)[:, :, None] * (stride[0] // ALIGN)
    first *= ALIGN  # see _address
    mask = live[:, :, None]
    if channel.shape[0] != D:
        mask &= (channel < D)[None, None, :]
    return first + channel.to(tl.int64)[None, None, :] * stride[1], mask


@triton.jit
def load_edge_heads(x, edge, live, head, H: tl.constexpr, ACC: tl.constexpr):
    """Numbers of an [E, H] tensor, for each of ``edge`` [R, E]: -> [R, E, H]."""
    at = edge.to(tl.int64)[:, :, None] * x.stride[0]
    at += head.to(tl.int64)[None, None, :] * x.stride[1]
    mask = live[:, :, None] & (head < H)[None, None, :]
    return tl.load(x.ptr + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def load_active(active, row, live, head):
    """Which of ``row``, of any shape, have that one head active, of an [N, H] tensor of bytes."""
    at = row.to(tl.int64) * active.stride[0] + head.to(tl.int64) * active.stride[1]
    return tl.load(active.ptr + at, mask=live, other=0) != 0


@triton.jit
def load_lse(ptr, mask):
    """The row's LSE; +inf for a row without a finite logit, so that exp(s - lse) is 0 there."""
    lse = tl.load(ptr, mask=mask, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def tile_mask(bits, BLOCK_M: tl.constexpr):
    """Which of BLOCK_M rows have their bit in the words ``bits`` [N]: -> [M, N]."""
    r = tl.arange(0, BLOCK_M).to(tl.int64)
    return ((bits[None, :] >> r[:, None]) & 1) == 1


@triton.jit
def edge_slots(edge_ptr, bits, base, mask, BLOCK_M: tl.constexpr):
    """The edge of every set bit, [M, N]: number base [N] + how many lower bits are set."""
    r = tl.arange(0, BLOCK_M).to(tl.int64)
    one = tl.full([BLOCK_M], 1, tl.int64)
    below = bits[None, :] & ((one << r) - 1)[:, None]
    # set bits of 64, counted in fields of 2, 4, 8, then all
    count = below - ((below >> 1) & 0x5555555555555555)
    count = (count & 0x3333333333333333) + ((count >> 2) & 0x3333333333333333)
    count = (count + (count >> 4)) & 0x0F0F0F0F0F0F0F0F
    count = (count * 0x0101010101010101) >> 56
    return tl.load(edge_ptr + base[None, :] + count, mask=mask, other=0)


# A kernel's constants have no dtype among them, since Triton's hooks write them as JSON. A tuple of
# constants has ``WIDE``, whether sums are in float64, and the name ``PRODUCTS``.
@triton.constexpr_function
def sum_dtype(wide):
    """The dtype that sums are kept in."""
    return tl.float64 if wide else tl.float32


@triton.constexpr_function
def product_dtype(name):
    """The dtype of that name."""
    return getattr(tl, name)


@triton.jit
def dot(a, b, acc, T: tl.constexpr):
    """acc + a b, multiplied in ``T.PRODUCTS``, the operands' dtype wherever the hardware has it."""
    DOT: tl.constexpr = product_dtype(T.PRODUCTS)
    ACC: tl.constexpr = sum_dtype(T.WIDE)
    return tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=T.PRECISION, out_dtype=ACC)


@triton.jit
def scalar(x, like):
    """A float argument in the dtype of ``like`` (the interpreter passes a Python float)."""
    return tl.full((), x, like)


def rows_of(x):
    """``Rows`` of a tensor that may be absent."""
    return None if x is None else Rows(x, x.stride())

"""Tile primitives shared by the kernels. R rows, E edges in flight per row, H heads, D channels."""

import triton
import triton.language as tl


@triton.jit
def load_heads(
    ptr, stride, row, live, head, H, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr
):
    """Rows of an [N, H, D] tensor, one for each element of ``row`` [R, E]: -> [R, E, H, D].

    Zero where ``live`` [R, E] is false and beyond H and D.
    """
    offset, mask = _address(stride, row, live, head, H, D, BLOCK_D, ALIGN)
    return tl.load(ptr + offset, mask=mask, other=0.0)


@triton.jit
def store_heads(ptr, row, live, head, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, x):
    """Inverse of ``load_heads`` for a contiguous tensor; casts [R, E, H, D] to its dtype."""
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
def scalar(x, like):
    """A float argument in the dtype of ``like`` (the interpreter passes a Python float)."""
    return tl.full((), x, like)


@triton.jit
def logits(
    q, k, live, edge, head, bias_ptr, bias_stride, scale, low, high, H,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """clamp(scale q . k, low, high) + bias for q [R, E, H, D] (E may be 1) and k likewise.

    -> logit [R, E, H], -inf where not ``live``; and whether the clamp let it through.
    """
    s = tl.sum(q * k, 3) * scale
    through = live[:, :, None]
    if CLAMP:
        # comparisons, not minimum and maximum: NaN must stay NaN
        through &= (s >= low) & (s <= high)
        s = tl.where(s < low, low, tl.where(s > high, high, s))
    if HAS_BIAS:
        at = edge.to(tl.int64)[:, :, None] * bias_stride[0]
        at += head.to(tl.int64)[None, None, :] * bias_stride[1]
        mask = live[:, :, None] & (head < H)[None, None, :]
        s += tl.load(bias_ptr + at, mask=mask, other=0.0).to(s.dtype)
    return tl.where(live[:, :, None], s, float("-inf")), through

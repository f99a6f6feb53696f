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
def take_rows(
    ptr_ptr, few_ptr, middle_ptr, segment_ptr, num_rows, num_middle, num_segments,
    BUCKETS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """What this program works on: -> row [R], which of them exist, begin and end [R], stride.

    Without buckets, BLOCK_R rows one after another. With them, the first programs take a segment
    each, the next ones a row each, the others BLOCK_R rows of few edges each: ``num_rows`` of
    those in all. Where there is one row, its edges are dealt to BLOCK_R "rows" in turns.
    """
    pid = tl.program_id(0)
    r = tl.arange(0, BLOCK_R)
    if BUCKETS:
        is_segment = pid < num_segments
        shared = pid >= num_segments + num_middle
        at = (pid - num_segments - num_middle) * BLOCK_R + r
        mine = (shared & (at < num_rows)) | ((not shared) & (r >= 0))
        several = tl.load(few_ptr + at, mask=shared & (at < num_rows), other=0)
        is_middle = (pid >= num_segments) & (pid < num_segments + num_middle)
        one = tl.load(middle_ptr + pid - num_segments, mask=is_middle, other=0)
        segment = segment_ptr + 3 * pid.to(tl.int64)
        one += tl.load(segment, mask=is_segment, other=0)
        row = tl.where(shared, several, one).to(tl.int64)
        begin = tl.load(ptr_ptr + row, mask=mine, other=0).to(tl.int64)
        end = tl.load(ptr_ptr + row + 1, mask=mine, other=0).to(tl.int64)
        first = tl.load(segment + 1, mask=is_segment, other=0).to(tl.int64)
        last = tl.load(segment + 2, mask=is_segment, other=0).to(tl.int64)
        begin = tl.where(is_segment, first, begin) + tl.where(shared, 0, r * BLOCK_E)
        end = tl.where(is_segment, last, end)
        stride = tl.where(shared, BLOCK_E, BLOCK_R * BLOCK_E)
    else:
        row = pid.to(tl.int64) * BLOCK_R + r
        mine = row < num_rows
        begin = tl.load(ptr_ptr + row, mask=mine, other=0).to(tl.int64)
        end = tl.load(ptr_ptr + row + 1, mask=mine, other=0).to(tl.int64)
        stride = BLOCK_E
    return row, mine, begin, end, stride


@triton.jit
def load_lse(ptr, mask):
    """The row's LSE; +inf for a row without a finite logit, so that exp(s - lse) is 0 there."""
    lse = tl.load(ptr, mask=mask, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def kept_share(lse, log_eps, ACC: tl.constexpr):
    """r = Z / (Z + eps), exactly 1 for eps = 0."""
    return 1.0 / (1.0 + tl.exp(scalar(log_eps, ACC) - lse))


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


@triton.jit
def load_rows(
    ptr, stride, row, live, head, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr
):
    """Rows ``row`` [M] of one head of an [N, H, D] tensor: -> [M, D], 0 where not ``live``."""
    offset, mask = _row_address(stride, row, live, head, D, BLOCK_D, ALIGN)
    return tl.load(ptr + offset, mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, row, live, head, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, x):
    """Inverse of ``load_rows`` for a contiguous tensor; casts [M, D] to its dtype."""
    offset, mask = _row_address((H * D, D, 1), row, live, head, D, BLOCK_D, 1)
    tl.store(ptr + offset, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _row_address(
    stride, row, live, head, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr
):
    d = tl.arange(0, BLOCK_D)
    first = row.to(tl.int64)[:, None] * (stride[0] // ALIGN)
    first += head.to(tl.int64) * (stride[1] // ALIGN)
    first *= ALIGN  # see _address
    mask = live[:, None]
    if D != BLOCK_D:
        mask &= (d < D)[None, :]
    return first + d.to(tl.int64)[None, :] * stride[2], mask


@triton.jit
def dot(a, b, acc, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b, multiplied in ``DOT``, the operands' dtype wherever the hardware has it."""
    return tl.dot(a.to(DOT), b.to(DOT), acc, input_precision=PRECISION, out_dtype=ACC)


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

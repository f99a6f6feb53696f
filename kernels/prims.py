"""Tile primitives shared by the kernels. R rows, E edges in flight per row, H heads, D channels.

What edges may have besides a bias comes as one argument, ``terms``: a tuple of pointers, each None
where it is absent. The functions that read it return what changes nothing in that case
(0.0 to add, 1.0 to multiply with), so that a kernel names every term once. Where there is none at
all the tuple itself is None, and a kernel asks its constant ``EDGES`` before it reads it.
"""

from typing import Any, NamedTuple

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
def load_active(ptr, stride, row, live, head):
    """Which of ``row``, of any shape, have that one head active, of an [N, H] tensor of bytes."""
    at = row.to(tl.int64) * stride[0] + head.to(tl.int64) * stride[1]
    return tl.load(ptr + at, mask=live, other=0) != 0


@triton.jit
def joined(x):
    """The sum over the R "rows" of [R, ...], where they are one, in the place of each of them."""
    return tl.sum(x, 0, keep_dims=True) + tl.zeros_like(x)


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
    q, k, attr_q, attr, factor, live, edge, head, bias_ptr, bias_stride, scale, low, high, H,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ATTR: tl.constexpr,
):  # fmt: skip
    """clamp(factor scale (q . k + attr_q . attr), low, high) + bias.

    For q [R, E, H, D] (E may be 1) and k likewise: -> logit [R, E, H], -inf where not ``live``;
    whether the clamp let it through; and what the factor multiplies.
    """
    bare = tl.sum(q * k, 3)
    if HAS_ATTR:
        bare += tl.sum(attr_q * attr, 3)
    bare *= scale
    s = bare * factor
    through = live[:, :, None]
    if CLAMP:
        # comparisons, not minimum and maximum: NaN must stay NaN
        through &= (s >= low) & (s <= high)
        s = tl.where(s < low, low, tl.where(s > high, high, s))
    if HAS_BIAS:
        s += load_edge_heads(bias_ptr, bias_stride, edge, live, head, H, s.dtype)
    return tl.where(live[:, :, None], s, float("-inf")), through, bare


@triton.jit
def load_edge_heads(ptr, stride, edge, live, head, H, ACC: tl.constexpr):
    """Numbers of an [E, H] tensor, for each of ``edge`` [R, E]: -> [R, E, H]."""
    at = edge.to(tl.int64)[:, :, None] * stride[0]
    at += head.to(tl.int64)[None, None, :] * stride[1]
    mask = live[:, :, None] & (head < H)[None, None, :]
    return tl.load(ptr + at, mask=mask, other=0.0).to(ACC)


class EdgeTerms(NamedTuple):
    """What kernels read of edges besides a bias, contiguous; None where absent."""

    factor: Any  # [E, H], times the products of q and k
    gate: Any  # [E, H, D], likewise channel by channel
    key: Any  # [E, H, D]
    value: Any  # [E, H, DV]
    attr: Any  # [E, C]
    attr_q: Any  # [N, H, C]


@triton.jit
def add_edge_key(
    k,
    terms,
    edge,
    live,
    head,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """-> k + edge_key [R, E, H, D], and the edge_key."""
    found = 0.0
    if terms.key is not None:
        found = load_heads(terms.key, (H * D, D, 1), edge, live, head, H, D, BLOCK_D, ALIGN).to(
            k.dtype
        )
        k = k + found
    return k, found


@triton.jit
def add_edge_value(
    v, edge_key, terms, edge, live, head, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """v + edge_value [R, E, H, D]; where ``SHARED``, the value is the key."""
    if SHARED:
        v = v + edge_key
    elif terms.value is not None:
        v = v + load_heads(terms.value, (H * D, D, 1), edge, live, head, H, D, BLOCK_D, ALIGN).to(
            v.dtype
        )
    return v


@triton.jit
def load_gate(
    terms, edge, live, head, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gate of each channel, [R, E, H, D]."""
    gate = 1.0
    if terms.gate is not None:
        gate = load_heads(terms.gate, (H * D, D, 1), edge, live, head, H, D, BLOCK_D, ALIGN).to(ACC)
    return gate


@triton.jit
def load_factor(terms, edge, live, head, H: tl.constexpr, ACC: tl.constexpr):
    """The gate of each head, [R, E, H]."""
    factor = tl.full([edge.shape[0], edge.shape[1], head.shape[0]], 1.0, ACC)
    if terms.factor is not None:
        factor = load_edge_heads(terms.factor, (H, 1), edge, live, head, H, ACC)
    return factor


@triton.jit
def load_attr(
    terms, edge, live, C: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The attributes, which all heads share: [R, E, 1, C]."""
    attr = 0.0
    if terms.attr is not None:
        one = tl.arange(0, 1)
        attr = load_heads(terms.attr, (C, 0, 1), edge, live, one, 1, C, BLOCK_C, ALIGN).to(ACC)
    return attr


@triton.jit
def load_attr_q(
    terms, row, live, head, H: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What attributes are multiplied with, of each of ``row`` [R, E]: [R, E, H, C]."""
    attr_q = 0.0
    if terms.attr_q is not None:
        attr_q = load_heads(terms.attr_q, (H * C, C, 1), row, live, head, H, C, BLOCK_C, ALIGN).to(
            ACC
        )
    return attr_q


@triton.jit
def kept(seed_ptr, threshold, edge, head, ACC: tl.constexpr):
    """What dropout multiplies the weights of ``edge`` [R, E] with: -> [R, E, H].

    A weight is kept where 24 random bits are not below ``threshold``: those of word ``head % 4`` of
    Philox at (edge, head // 4), as in ``fastgt/philox.py``.
    """
    share = 1.0
    if seed_ptr is not None:
        number = edge.to(tl.int64)[:, :, None] + tl.zeros([1, 1, head.shape[0]], tl.int64)
        low, high = (number & 0xFFFFFFFF).to(tl.uint32), (number >> 32).to(tl.uint32)
        block = (head // 4).to(tl.uint32)[None, None, :] + tl.zeros_like(low)
        a, b, c, d = tl.philox(tl.load(seed_ptr), low, high, block, tl.zeros_like(low))
        word = (head % 4)[None, None, :]
        bits = tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))
        keep = (bits >> 8).to(tl.int32) >= threshold
        levels = scalar(16777216.0, ACC)
        share = tl.where(keep, levels / tl.maximum(levels - threshold, 1.0), 0.0)
    return share


@triton.jit
def load_rows(
    ptr, stride, row, live, head, D: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
    first=0,
):  # fmt: skip
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
def sum_lanes(x, num_middle, num_segments, BUCKETS: tl.constexpr):
    """[R, E, C] -> [R, C]; where ``take_rows`` gave one row, its sum R times."""
    total = tl.sum(x, 1)
    if BUCKETS:
        one = tl.program_id(0) < num_segments + num_middle
        if one:
            total = tl.sum(total, 0)[None, :] + tl.zeros_like(total)
    return total


@triton.jit
def wholes_and_parts(mine, num_middle, num_segments, BUCKETS: tl.constexpr):
    """-> which of R results are those of a whole row, which of a segment, and its number [R]."""
    pid = tl.program_id(0)
    r = tl.arange(0, mine.shape[0])
    segment = pid.to(tl.int64) + tl.zeros([mine.shape[0]], tl.int64)
    if BUCKETS:
        mine &= (pid >= num_segments + num_middle) | (r == 0)
        whole, part = mine & (pid >= num_segments), mine & (pid < num_segments)
    else:
        whole, part = mine, mine & (r < 0)
    return whole, part, segment

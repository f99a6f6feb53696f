"""What is computed of a tile of edges. R rows, E edges in flight per row, H heads, D channels.

What edges may have besides a bias comes as one argument, ``terms``: a tuple of pointers, each None
where it is absent, or None where all are. The functions that read it return what changes nothing in
that case (0.0 to add, 1.0 to multiply with), so that a kernel names every term once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .loads import Rows, load_active, load_edge_heads, load_heads, load_own_heads, scalar, sum_dtype


class Operands(NamedTuple):
    """What attention is made of, each with its strides (``Rows``); None where absent."""

    q: Any  # [N, H, D]
    k: Any  # [M, H_kv, D]
    v: Any  # [M, H_kv, DV]
    bias: Any  # [E, H]


class Terms(NamedTuple):
    """What kernels read of edges besides a bias, contiguous; None where absent."""

    factor: Any  # [E, H], times the products of q and k
    gate: Any  # [E, H, D], likewise channel by channel
    key: Any  # [E, H, D]
    value: Any  # [E, H, DV]
    attr: Any  # [E, C]
    attr_q: Any  # [N, H, C]


class Drop(NamedTuple):
    """What decides which weights dropout keeps; None where absent."""

    seed: Any = None  # [1]; None: all are kept
    numbers: Any = None  # [E], by which edges are known; None: their own
    first_head: Any = None  # by which head 0 is known; None: 0


class Clamp(NamedTuple):
    """How a product becomes a logit: clamp(scale product, low, high)."""

    scale: Any
    low: Any
    high: Any


class Tile(NamedTuple):
    """Sizes of attention by gathering and of what a program holds, constants of its kernel."""

    H: int
    GROUP: int  # query heads that share a key head
    D: int
    DV: int
    C: int  # channels of the attributes
    CLAMP: bool
    TERMS: bool  # ``Terms`` are given; Triton 3.6 compares no tuple that holds a None
    SHARED: bool  # edge keys are edge values, too
    BLOCK_R: int
    BLOCK_E: int
    BLOCK_H: int
    BLOCK_D: int
    BLOCK_DV: int
    BLOCK_C: int
    ALIGN: int  # channels that rows of q, k, v and do start at a multiple of
    EDGE_ALIGN: int  # likewise of the contiguous tensors
    WIDE: bool  # sums are in float64


@triton.jit
def clamp_of(scale, low, high, ACC: tl.constexpr):
    """``Clamp`` in the accumulator's precision."""
    return Clamp(scalar(scale, ACC), scalar(low, ACC), scalar(high, ACC))


@triton.jit
def own_heads(T: tl.constexpr):
    """The heads of this program, [H]."""
    return tl.program_id(1) * T.BLOCK_H + tl.arange(0, T.BLOCK_H)


@triton.jit
def lanes(value, T: tl.constexpr):
    """``value`` for each lane and head, [R, E, H]."""
    return tl.full([T.BLOCK_R, T.BLOCK_E, T.BLOCK_H], value, sum_dtype(T.WIDE))


@triton.jit
def lane_rows(BLOCK_D: tl.constexpr, T: tl.constexpr):
    """Zeros for each lane, head and channel, [R, E, H, D]."""
    return tl.full([T.BLOCK_R, T.BLOCK_E, T.BLOCK_H, BLOCK_D], 0.0, sum_dtype(T.WIDE))


@triton.jit
def unmasked(active, row, mine, head, begin, end):
    """-> which rows to read, and the end of their edges: none where their one head is masked."""
    read = mine
    if active is not None:
        read = load_active(active, row, mine, tl.max(head, 0))
        end = tl.where(read, end, begin)
    return read, end


@triton.jit
def load_query(x, terms, row, live, head, T: tl.constexpr):
    """Of each of ``row`` [R, E]: -> q [R, E, H, D], and what attributes are multiplied with."""
    q = load_heads(x.q, row, live, head, T.H, T.D, T.BLOCK_D, T.ALIGN).to(sum_dtype(T.WIDE))
    attr_q = 0.0
    if T.TERMS:
        if terms.attr_q is not None:
            attr_q = load_attr_heads(terms.attr_q, row, live, head, T)
    return q, attr_q


@triton.jit
def load_attr_heads(ptr, row, live, head, T: tl.constexpr):
    """What belongs to the attributes, of a contiguous [N, H, C] tensor: -> [R, E, H, C]."""
    return load_own_heads(ptr, row, live, head, T.H, T.C, T.BLOCK_C, T.EDGE_ALIGN).to(
        sum_dtype(T.WIDE)
    )


@triton.jit
def load_edge_rows(ptr, edge, live, head, D: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr):
    """Vectors of edges, of a contiguous [E, H, D] tensor: -> [R, E, H, D]."""
    return load_own_heads(ptr, edge, live, head, T.H, D, BLOCK_D, T.EDGE_ALIGN).to(
        sum_dtype(T.WIDE)
    )


@triton.jit
def gather_edge(x, terms, col, edge, live, head, T: tl.constexpr):
    """Of the columns ``col`` [R, E] and their edges: -> gated keys [R, E, H, D], values
    [R, E, H, DV], 0.0 without ``x.v``, attributes and factors."""
    H_KV: tl.constexpr = T.H // T.GROUP
    kv_head = head // T.GROUP
    k = load_heads(x.k, col, live, kv_head, H_KV, T.D, T.BLOCK_D, T.ALIGN).to(sum_dtype(T.WIDE))
    v = 0.0
    if x.v is not None:
        v = load_heads(x.v, col, live, kv_head, H_KV, T.DV, T.BLOCK_DV, T.ALIGN).to(
            sum_dtype(T.WIDE)
        )
    k, gate, v = add_edge(k, v, terms, edge, live, head, T)
    attr = load_attr(terms, edge, live, T)
    factor = load_factor(terms, edge, live, head, T)
    return k * gate, v, attr, factor


@triton.jit
def add_edge(k, v, terms, edge, live, head, T: tl.constexpr):
    """-> k + edge_key [R, E, H, D], the gate of each channel, and v + edge_value [R, E, H, DV].

    Where ``T.SHARED``, the edge's value is its key.
    """
    gate = 1.0
    if T.TERMS:
        edge_key = 0.0
        if terms.key is not None:
            edge_key = load_edge_rows(terms.key, edge, live, head, T.D, T.BLOCK_D, T)
            k = k + edge_key
        if terms.gate is not None:
            gate = load_edge_rows(terms.gate, edge, live, head, T.D, T.BLOCK_D, T)
        if T.SHARED:
            v = v + edge_key
        elif terms.value is not None:
            v = v + load_edge_rows(terms.value, edge, live, head, T.DV, T.BLOCK_DV, T)
    return k, gate, v


@triton.jit
def load_attr(terms, edge, live, T: tl.constexpr):
    """The attributes, which all heads share: [R, E, 1, C]."""
    attr = 0.0
    if T.TERMS:
        if terms.attr is not None:
            attr = load_shared(terms.attr, edge, live, T, T.EDGE_ALIGN).to(sum_dtype(T.WIDE))
    return attr


@triton.jit
def load_shared(ptr, edge, live, T: tl.constexpr, ALIGN: tl.constexpr):
    """Vectors of a contiguous [E, C] tensor: -> [R, E, 1, C]."""
    one = tl.arange(0, 1)
    return load_own_heads(ptr, edge, live, one, 1, T.C, T.BLOCK_C, ALIGN)


@triton.jit
def load_factor(terms, edge, live, head, T: tl.constexpr):
    """The gate of each head, [R, E, H]."""
    factor = 1.0
    if T.TERMS:
        factor = tl.full([edge.shape[0], edge.shape[1], head.shape[0]], 1.0, sum_dtype(T.WIDE))
        if terms.factor is not None:
            factors = Rows(terms.factor, (T.H, 1))
            factor = load_edge_heads(factors, edge, live, head, T.H, sum_dtype(T.WIDE))
    return factor


@triton.jit
def logits(q, attr_q, k, attr, factor, x, terms, edge, live, head, clamp, T: tl.constexpr):
    """clamp(factor scale (q . k + attr_q . attr), low, high) + bias.

    For q [R, E, H, D] (E may be 1) and k likewise: -> logit [R, E, H], -inf where not ``live``;
    whether the clamp let it through; and the scaled product before the factor.
    """
    bare = tl.sum(q * k, 3)
    if T.TERMS:
        if terms.attr_q is not None:
            bare += tl.sum(attr_q * attr, 3)
    bare *= clamp.scale
    s = bare * factor
    through = live[:, :, None]
    if T.CLAMP:
        # comparisons, not minimum and maximum: NaN must stay NaN
        through &= (s >= clamp.low) & (s <= clamp.high)
        s = tl.where(s < clamp.low, clamp.low, tl.where(s > clamp.high, clamp.high, s))
    if x.bias is not None:
        s += load_edge_heads(x.bias, edge, live, head, T.H, s.dtype)
    return tl.where(live[:, :, None], s, float("-inf")), through, bare


@triton.jit
def kept(drop, threshold, edge, live, head, ACC: tl.constexpr):
    """What dropout multiplies the weights of ``edge`` [R, E] with: -> [R, E, H].

    A weight is kept where 24 random bits are not below ``threshold``: those of word ``head % 4`` of
    Philox at (number of the edge, head // 4), as in ``fastgt/philox.py``.
    """
    share = 1.0
    if drop.seed is not None:
        number = edge.to(tl.int64)
        if drop.numbers is not None:
            number = tl.load(drop.numbers + number, mask=live, other=0)
        number = number[:, :, None] + tl.zeros([1, 1, head.shape[0]], tl.int64)
        known = known_heads(drop, head)[None, None, :]
        share = kept_share(drop.seed, threshold, number, known, ACC)
    return share


@triton.jit
def known_heads(drop, head):
    """By which dropout knows heads."""
    if drop.first_head is not None:
        head += drop.first_head
    return head


@triton.jit
def kept_share(seed_ptr, threshold, number, head, ACC: tl.constexpr):
    """``kept`` of edges with these numbers, in the shape that they have, for a head of each."""
    low, high = (number & 0xFFFFFFFF).to(tl.uint32), (number >> 32).to(tl.uint32)
    block = (head // 4).to(tl.uint32) + tl.zeros_like(low)
    a, b, c, d = tl.philox(tl.load(seed_ptr), low, high, block, tl.zeros_like(low))
    word = head % 4
    bits = tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))
    keep = (bits >> 8).to(tl.int32) >= threshold
    levels = scalar(16777216.0, ACC)
    return tl.where(keep, levels / tl.maximum(levels - threshold, 1.0), 0.0)


@triton.jit
def eps_share(lse, log_eps, ACC: tl.constexpr):
    """r = Z / (Z + eps), exactly 1 for eps = 0."""
    return 1.0 / (1.0 + tl.exp(scalar(log_eps, ACC) - lse))

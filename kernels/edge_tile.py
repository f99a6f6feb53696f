"""What is computed of a tile of edges. R rows, E edges in flight per row, H heads, D channels.

What edges may have besides a bias comes as one argument, ``terms``: a tuple of pointers, each None
where it is absent. The functions that read it return what changes nothing in that case
(0.0 to add, 1.0 to multiply with), so that a kernel names every term once. Where there is none at
all the tuple itself is None, and a kernel asks its constant ``EDGES`` before it reads it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .loads import load_edge_heads, load_heads, scalar


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
def kept_share(lse, log_eps, ACC: tl.constexpr):
    """r = Z / (Z + eps), exactly 1 for eps = 0."""
    return 1.0 / (1.0 + tl.exp(scalar(log_eps, ACC) - lse))

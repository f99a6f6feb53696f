"""Feature maps of linear attention, and their gradients, tile by tile.

N nodes of one head, M features: BLOCK_M of them at a time. ``MAP`` is one of
``fastgt.linear_attention``'s; "softmax" and "relu_random" take rows of a projection [M, D], the
others as many features as there are channels.

Products over channels take at most SLICE of them at a time: of wider rows, each slice is loaded
where it is multiplied, for a tile of all of them would be held once by every warp.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .loads import load_rows, store_rows, sum_dtype


class Sizes(NamedTuple):
    """Constants of linear attention's kernels."""

    H: int
    D: int
    DV: int
    M: int
    MAP: str
    RANDOM: bool  # features have a projection
    SMALL: bool  # the pass is over small graphs, in the quadratic form
    WIDE: bool  # products and sums are in float64
    PRECISION: str
    ALIGN: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_DV: int
    BLOCK_M: int
    SLICE: int


class Nodes(NamedTuple):
    """Nodes of a graph, for one head."""

    row: Any  # [N]
    live: Any  # [N] whether there is such a node
    head: Any


class Held(NamedTuple):
    """What random features take of nodes; 0.0 for the other maps."""

    x: Any  # [N, D]; 0.0 where it is wider than a slice
    half: Any  # [N] |x|^2 D^-1/2 / 2


@triton.jit
def features(x, held, top, nodes, tile, projection_ptr, S: tl.constexpr):
    """-> phi(x) [N, BLOCK_M], 0 where there is no node or feature, and what its gradient takes:
    the channels of x themselves, or the exponentials or products.

    Random features are made of what is ``held`` of x, with its stabiliser ``top``; for the others
    channels are loaded.
    """
    m = tile * S.BLOCK_M + tl.arange(0, S.BLOCK_M)
    inside = nodes.live[:, None] & (m < S.M)[None, :]
    if S.RANDOM:
        product = times_matrix(held.x, x, nodes, projection_ptr, m, m < S.M, S.D, S.BLOCK_D, S)
    if S.MAP == "softmax":
        # beyond the last feature or node, exp() may be infinite
        inner = tl.where(inside, tl.exp(product - (held.half + top)[:, None]), 0.0)
        phi = (inner + 1e-4) * (1 / S.M**0.5)
    elif S.MAP == "relu_random":
        inner = positive(product)
        phi = inner + 1e-3
    else:
        inner = load_wide(x, nodes, S.D, S.BLOCK_M, S, tile * S.BLOCK_M)
        if S.MAP == "identity":
            phi = inner
        elif S.MAP == "relu":
            phi = positive(inner)
        elif S.MAP == "elu":
            phi = tl.where(inner > 0, inner + 1, tl.exp(inner))
        else:
            phi = 1 / (1 + tl.exp(-inner))
    return tl.where(inside, phi, 0.0), inner


@triton.jit
def before_features(dphi, phi, inner, S: tl.constexpr):
    """The gradient of channels, or of products with the projection, for that of the features."""
    if S.MAP == "identity":
        flow = dphi
    elif S.MAP == "elu":
        flow = tl.where(inner > 0, dphi, dphi * phi)
    elif S.MAP == "sigmoid":
        flow = dphi * phi * (1 - phi)
    elif S.MAP == "softmax":
        flow = dphi * inner * (1 / S.M**0.5)
    else:
        flow = tl.where(inner > 0, dphi, 0.0)
    return flow


@triton.jit
def hold(x, nodes, S: tl.constexpr):
    """-> ``Held`` of x [N, D]."""
    held, half = 0.0, 0.0
    if S.RANDOM:
        held = load_held(x, nodes, S.D, S.BLOCK_D, S)
        if S.BLOCK_D <= S.SLICE:
            half = tl.sum(held * held, 1)
        else:
            half = tl.full([nodes.row.shape[0]], 0.0, sum_dtype(S.WIDE))
            for first in range(0, S.D, S.SLICE):
                part = load_wide(x, nodes, S.D, S.SLICE, S, first)
                half += tl.sum(part * part, 1)
        half *= 0.5 / S.D**0.5
    return Held(held, half)


@triton.jit
def store_inputs(dx_ptr, x, nodes, dx, total, S: tl.constexpr):
    """The gradient of x [N, D], for those of its products with the projection."""
    if S.MAP == "softmax":
        dx -= load_wide(x, nodes, S.D, S.BLOCK_D, S) * (total * (1 / S.D**0.5))[:, None]
    store_rows(dx_ptr, nodes.row, nodes.live, nodes.head, S.H, S.D, S.BLOCK_D, dx)


@triton.jit
def hold_stabilised(x, nodes, projection_ptr, tiles, S: tl.constexpr):
    """-> ``Held``, and the largest product of each row with the projection, [N]."""
    held = hold(x, nodes, S)
    top = tl.full([S.BLOCK_N], 0.0, sum_dtype(S.WIDE))
    if S.MAP == "softmax":
        top += float("-inf")
        for tile in range(tiles):
            m = tile * S.BLOCK_M + tl.arange(0, S.BLOCK_M)
            product = times_matrix(held.x, x, nodes, projection_ptr, m, m < S.M, S.D, S.BLOCK_D, S)
            product = tl.where((m < S.M)[None, :], product, float("-inf"))
            top = tl.maximum(top, tl.max(product, 1))
    return held, top


@triton.jit
def load_wide(x, nodes, D: tl.constexpr, BLOCK_D: tl.constexpr, S: tl.constexpr, first=0):
    """BLOCK_D channels, from the ``first`` on, of rows [N, D] of one head."""
    row = load_rows(x.ptr, x.stride, nodes.row, nodes.live, nodes.head, D, BLOCK_D, S.ALIGN, first)
    return row.to(sum_dtype(S.WIDE))


@triton.jit
def load_held(x, nodes, D: tl.constexpr, BLOCK_D: tl.constexpr, S: tl.constexpr):
    """Rows [N, D] to be multiplied; 0.0 where they are wider than a slice."""
    held = 0.0
    if BLOCK_D <= S.SLICE:
        held = load_wide(x, nodes, D, BLOCK_D, S)
    return held


@triton.jit
def times_matrix(
    held, x, nodes, matrix_ptr, m, there, D: tl.constexpr, BLOCK_D: tl.constexpr, S: tl.constexpr
):
    """Rows x [N, D], of which ``load_held`` holds ``held``, times rows ``m`` [M] of a matrix:
    -> [N, M]."""
    if BLOCK_D <= S.SLICE:
        w = load_matrix(matrix_ptr, m, there, 0, D, BLOCK_D)
        product = dot(held, tl.trans(w), None, S)
    else:
        product = tl.full([nodes.row.shape[0], m.shape[0]], 0.0, sum_dtype(S.WIDE))
        for first in range(0, D, S.SLICE):
            part = load_wide(x, nodes, D, S.SLICE, S, first)
            w = load_matrix(matrix_ptr, m, there, first, D, S.SLICE)
            product = dot(part, tl.trans(w), product, S)
    return product


@triton.jit
def times_rows(held, x, nodes, y, others, D: tl.constexpr, BLOCK_D: tl.constexpr, S: tl.constexpr):
    """Rows x [N, D], of which ``load_held`` holds ``held``, times rows y [N, D] of other nodes:
    -> [N, N]."""
    if BLOCK_D <= S.SLICE:
        product = dot(held, tl.trans(load_wide(y, others, D, BLOCK_D, S)), None, S)
    else:
        product = tl.full([nodes.row.shape[0], others.row.shape[0]], 0.0, sum_dtype(S.WIDE))
        for first in range(0, D, S.SLICE):
            part = load_wide(x, nodes, D, S.SLICE, S, first)
            other_part = load_wide(y, others, D, S.SLICE, S, first)
            product = dot(part, tl.trans(other_part), product, S)
    return product


@triton.jit
def load_projection(ptr, tile, S: tl.constexpr):
    """A tile's rows of the projection, [BLOCK_M, D]."""
    m = tile * S.BLOCK_M + tl.arange(0, S.BLOCK_M)
    return load_matrix(ptr, m, m < S.M, 0, S.D, S.BLOCK_D)


@triton.jit
def load_matrix(ptr, m, there, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_D columns, from the ``first`` on, of rows ``m`` [M] of a contiguous matrix [., D]."""
    d = first + tl.arange(0, BLOCK_D)
    mask = there[:, None]
    if D % BLOCK_D:
        mask &= (d < D)[None, :]
    return tl.load(ptr + m[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def dot(a, b, acc, S: tl.constexpr):
    """acc + a b. States outgrow 16 bits, and so what is multiplied is as wide as the sums."""
    ACC: tl.constexpr = sum_dtype(S.WIDE)
    return tl.dot(a.to(ACC), b.to(ACC), acc, input_precision=S.PRECISION, out_dtype=ACC)


@triton.jit
def positive(x):
    """max(x, 0); NaN stays."""
    return tl.where(x < 0, 0.0, x)

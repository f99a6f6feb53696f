"""Feature maps of linear attention, and their gradients, tile by tile.

N nodes of one head, M features: BLOCK_M of them at a time. ``MAP`` is one of
``fastgt.linear_attention``'s; "softmax" and "relu_random" take rows of a projection [M, D], the
others as many features as there are channels.
"""

import triton
import triton.language as tl

from .prims import dot, load_rows, store_rows


@triton.jit
def features(
    x_ptr, x_stride, x, half, top, row, live, head, tile, projection_ptr,
    D: tl.constexpr, M: tl.constexpr, MAP: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """-> phi(x) [N, BLOCK_M], 0 where there is no node or feature, and what its gradient takes:
    the channels of x themselves, or the exponentials or products; and rows of the projection.

    ``x`` [N, D] with its ``half`` square and its stabiliser ``top`` are those of random features;
    for the others channels are loaded.
    """
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = live[:, None] & (m < M)[None, :]
    w = 0.0
    if MAP == "softmax":
        product, w = project(x, projection_ptr, tile, D, M, BLOCK_D, BLOCK_M, ACC, PRECISION)
        # beyond the last feature or node, exp() may be infinite
        inner = tl.where(inside, tl.exp(product - (half + top)[:, None]), 0.0)
        phi = (inner + 1e-4) * (1 / M**0.5)
    elif MAP == "relu_random":
        product, w = project(x, projection_ptr, tile, D, M, BLOCK_D, BLOCK_M, ACC, PRECISION)
        inner = positive(product)
        phi = inner + 1e-3
    else:
        inner = load_rows(x_ptr, x_stride, row, live, head, D, BLOCK_M, ALIGN, tile * BLOCK_M).to(
            ACC
        )
        if MAP == "identity":
            phi = inner
        elif MAP == "relu":
            phi = positive(inner)
        elif MAP == "elu":
            phi = tl.where(inner > 0, inner + 1, tl.exp(inner))
        else:
            phi = 1 / (1 + tl.exp(-inner))
    return tl.where(inside, phi, 0.0), inner, w


@triton.jit
def before_features(dphi, phi, inner, M: tl.constexpr, MAP: tl.constexpr):
    """The gradient of channels, or of products with the projection, for that of the features."""
    if MAP == "identity":
        flow = dphi
    elif MAP == "elu":
        flow = tl.where(inner > 0, dphi, dphi * phi)
    elif MAP == "sigmoid":
        flow = dphi * phi * (1 - phi)
    elif MAP == "softmax":
        flow = dphi * inner * (1 / M**0.5)
    else:
        flow = tl.where(inner > 0, dphi, 0.0)
    return flow


@triton.jit
def load_inputs(
    ptr, stride, row, live, head, D: tl.constexpr, RANDOM: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """-> x [N, D] and its half square, where random features take them."""
    x, half = 0.0, 0.0
    if RANDOM:
        x = load_rows(ptr, stride, row, live, head, D, BLOCK_D, ALIGN).to(ACC)
        half = half_square(x, D)
    return x, half


@triton.jit
def store_inputs(
    ptr, row, live, head, dx, x, total, H: tl.constexpr, D: tl.constexpr, MAP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of x [N, D], for those of its products with the projection."""
    if MAP == "softmax":
        dx -= x * (total * (1 / D**0.5))[:, None]
    store_rows(ptr, row, live, head, H, D, BLOCK_D, dx)


@triton.jit
def load_stabilised(
    ptr, stride, row, live, head, projection_ptr, tiles,
    D: tl.constexpr, M: tl.constexpr, MAP: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``load_inputs``, and the largest product of each row with the projection, [N]."""
    RANDOM: tl.constexpr = projection_ptr is not None
    x, half = load_inputs(ptr, stride, row, live, head, D, RANDOM, BLOCK_D, ALIGN, ACC)
    top = tl.zeros([BLOCK_N], ACC)
    if MAP == "softmax":
        top += float("-inf")
        for tile in range(tiles):
            product, _w = project(x, projection_ptr, tile, D, M, BLOCK_D, BLOCK_M, ACC, PRECISION)
            m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            product = tl.where((m < M)[None, :], product, float("-inf"))
            top = tl.maximum(top, tl.max(product, 1))
    return x, half, top


@triton.jit
def project(
    x, projection_ptr, tile, D: tl.constexpr, M: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """-> products of x [N, D] with BLOCK_M rows of the projection, and these rows [M, D]."""
    m, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    mask = (m < M)[:, None] & (d < D)[None, :]
    w = tl.load(projection_ptr + m[:, None] * D + d[None, :], mask=mask, other=0.0)
    return dot(x, tl.trans(w), None, ACC, ACC, PRECISION), w


@triton.jit
def half_square(x, D: tl.constexpr):
    """|x|^2 D^-1/2 / 2 of rows [N, D]."""
    return tl.sum(x * x, 1) * (0.5 / D**0.5)


@triton.jit
def positive(x):
    """max(x, 0); NaN stays."""
    return tl.where(x < 0, 0.0, x)

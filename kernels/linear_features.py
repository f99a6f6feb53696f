"""Feature maps of linear attention, and their gradients, tile by tile.

N nodes of one head, M features: BLOCK_M of them at a time. ``MAP`` is one of
``fastgt.linear_attention``'s; "softmax" and "relu_random" take rows of a projection [M, D], the
others as many features as there are channels.

Products over channels take at most SLICE of them at a time: of wider rows, each slice is loaded
where it is multiplied, for a tile of all of them would be held once by every warp.
"""

import triton
import triton.language as tl

from .loads import dot, load_rows, store_rows


@triton.jit
def features(
    x_ptr, x_stride, x, half, top, row, live, head, tile, projection_ptr,
    D: tl.constexpr, M: tl.constexpr, MAP: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, SLICE: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """-> phi(x) [N, BLOCK_M], 0 where there is no node or feature, and what its gradient takes:
    the channels of x themselves, or the exponentials or products.

    ``x`` [N, D], as ``load_inputs`` holds it, with its ``half`` square and its stabiliser ``top``
    are those of random features; for the others channels are loaded.
    """
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = live[:, None] & (m < M)[None, :]
    if projection_ptr is not None:
        product = times_matrix(
            x, x_ptr, x_stride, row, live, head, projection_ptr, m, m < M,
            D, ALIGN, BLOCK_D, SLICE, ACC, PRECISION,
        )  # fmt: skip
    if MAP == "softmax":
        # beyond the last feature or node, exp() may be infinite
        inner = tl.where(inside, tl.exp(product - (half + top)[:, None]), 0.0)
        phi = (inner + 1e-4) * (1 / M**0.5)
    elif MAP == "relu_random":
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
    return tl.where(inside, phi, 0.0), inner


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
    SLICE: tl.constexpr, ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """-> x [N, D] as ``load_held`` has it, and its half square |x|^2 D^-1/2 / 2, where random
    features take them."""
    x, half = 0.0, 0.0
    if RANDOM:
        x = load_held(ptr, stride, row, live, head, D, BLOCK_D, SLICE, ALIGN, ACC)
        if BLOCK_D <= SLICE:
            half = tl.sum(x * x, 1)
        else:
            half = tl.zeros([row.shape[0]], ACC)
            for first in range(0, D, SLICE):
                part = load_rows(ptr, stride, row, live, head, D, SLICE, ALIGN, first).to(ACC)
                half += tl.sum(part * part, 1)
        half *= 0.5 / D**0.5
    return x, half


@triton.jit
def store_inputs(
    dx_ptr, x_ptr, x_stride, row, live, head, dx, total, H: tl.constexpr, D: tl.constexpr,
    MAP: tl.constexpr, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of x [N, D], for those of its products with the projection."""
    if MAP == "softmax":
        x = load_rows(x_ptr, x_stride, row, live, head, D, BLOCK_D, ALIGN).to(ACC)
        dx -= x * (total * (1 / D**0.5))[:, None]
    store_rows(dx_ptr, row, live, head, H, D, BLOCK_D, dx)


@triton.jit
def load_stabilised(
    ptr, stride, row, live, head, projection_ptr, tiles,
    D: tl.constexpr, M: tl.constexpr, MAP: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, SLICE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``load_inputs``, and the largest product of each row with the projection, [N]."""
    RANDOM: tl.constexpr = projection_ptr is not None
    x, half = load_inputs(ptr, stride, row, live, head, D, RANDOM, BLOCK_D, SLICE, ALIGN, ACC)
    top = tl.zeros([BLOCK_N], ACC)
    if MAP == "softmax":
        top += float("-inf")
        for tile in range(tiles):
            m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            product = times_matrix(
                x, ptr, stride, row, live, head, projection_ptr, m, m < M,
                D, ALIGN, BLOCK_D, SLICE, ACC, PRECISION,
            )  # fmt: skip
            product = tl.where((m < M)[None, :], product, float("-inf"))
            top = tl.maximum(top, tl.max(product, 1))
    return x, half, top


@triton.jit
def load_held(
    ptr, stride, row, live, head, D: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
    ALIGN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows [N, D] to be multiplied; 0.0 where they are wider than a slice."""
    x = 0.0
    if BLOCK_D <= SLICE:
        x = load_rows(ptr, stride, row, live, head, D, BLOCK_D, ALIGN).to(ACC)
    return x


@triton.jit
def times_matrix(
    x, x_ptr, x_stride, row, live, head, matrix_ptr, m, there,
    D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows x [N, D], as ``load_held`` has them, times rows ``m`` [M] of a matrix: -> [N, M]."""
    if BLOCK_D <= SLICE:
        w = load_matrix(matrix_ptr, m, there, 0, D, BLOCK_D)
        product = dot(x, tl.trans(w), None, ACC, ACC, PRECISION)
    else:
        product = tl.zeros([row.shape[0], m.shape[0]], ACC)
        for first in range(0, D, SLICE):
            part = load_rows(x_ptr, x_stride, row, live, head, D, SLICE, ALIGN, first).to(ACC)
            w = load_matrix(matrix_ptr, m, there, first, D, SLICE)
            product = dot(part, tl.trans(w), product, ACC, ACC, PRECISION)
    return product


@triton.jit
def times_rows(
    x, x_ptr, x_stride, row, live, y_ptr, y_stride, other, there, head,
    D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, SLICE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows x [N, D], as ``load_held`` has them, times rows ``other`` of y [N, H, D]: -> [N, N]."""
    if BLOCK_D <= SLICE:
        y = load_rows(y_ptr, y_stride, other, there, head, D, BLOCK_D, ALIGN).to(ACC)
        product = dot(x, tl.trans(y), None, ACC, ACC, PRECISION)
    else:
        product = tl.zeros([row.shape[0], other.shape[0]], ACC)
        for first in range(0, D, SLICE):
            part = load_rows(x_ptr, x_stride, row, live, head, D, SLICE, ALIGN, first).to(ACC)
            y = load_rows(y_ptr, y_stride, other, there, head, D, SLICE, ALIGN, first).to(ACC)
            product = dot(part, tl.trans(y), product, ACC, ACC, PRECISION)
    return product


@triton.jit
def load_projection(
    ptr, tile, D: tl.constexpr, M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):
    """A tile's rows of the projection, [BLOCK_M, D]."""
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return load_matrix(ptr, m, m < M, 0, D, BLOCK_D)


@triton.jit
def load_matrix(ptr, m, there, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_D columns, from the ``first`` on, of rows ``m`` [M] of a contiguous matrix [., D]."""
    d = first + tl.arange(0, BLOCK_D)
    mask = there[:, None]
    if D % BLOCK_D:
        mask &= (d < D)[None, :]
    return tl.load(ptr + m[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def positive(x):
    """max(x, 0); NaN stays."""
    return tl.where(x < 0, 0.0, x)

"""Patterns of the nodes of a grid, which are numbered in row-major order."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgt.graph import Graph
from fastgt.ops.checks import integer
from fastgt.patterns.build import from_rows
from fastgt.patterns.groups import groups

Sizes = int | Sequence[int]


def windows(
    shape: Sequence[int],
    window: Sizes,
    *,
    shift: Sizes = 0,
    partial: bool = False,
    graphs: int = 1,
) -> Graph:
    """Windows side by side; inside a window all attend to all.

    With coordinates x_a of node i and y_a of node j the edges are::

        {(i, j): floor((x_a - shift_a) / window_a) = floor((y_a - shift_a) / window_a) for all a}

    Windows that the shift moves over a border are cut there, as Swin's mask does: nothing wraps
    around. On a grid of N nodes, without a shift, these are ``N prod_a window_a`` edges if the
    windows fill the grid. In general they are the product over a of the sum of the squares of the
    windows' sizes along a. The pattern is symmetric.

    Args:
        shape: Nodes along each axis: a grid of any dimension.
        window: Nodes of a window along each axis, or along all of them.
        shift: Where the first whole window begins, from 0 to ``window - 1``, in the same form.
        partial: Let the last window along an axis be smaller, which gives the same as padding with
            masked nodes. If not, ``window`` has to divide ``shape``.
        graphs: How many equal grids the batch has.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named, with both numbers.

    Source:
        Liu et al., Swin Transformer, arXiv 2103.14030, section 3.2.

    Example:
        >>> from fastgt.patterns import windows
        >>> windows((2, 4), 2).edge_index[0, :8].tolist()
        [0, 1, 4, 5, 0, 1, 4, 5]
        >>> windows((56, 56), 7, shift=3).num_edges == (7 * 7**2 + 3**2 + 4**2) ** 2
        True
    """
    shape = _shape(shape)
    window = _sizes("window", window, shape, 1)
    shift = _sizes("shift", shift, shape, 0)
    for w, s in zip(window, shift, strict=True):
        if s >= w:
            raise ValueError(f"shift must be below window={w}, got {s}")
    if not partial:
        _check_divides("window", window, shape)
    axes = zip(shape, window, shift, strict=True)
    return _groups(
        [(torch.arange(n) - s).div(w, rounding_mode="floor") for n, w, s in axes], graphs
    )


def dilated(
    shape: Sequence[int],
    window: Sizes,
    dilation: Sizes,
    *,
    partial: bool = False,
    graphs: int = 1,
) -> Graph:
    """Windows with gaps side by side; inside a window all attend to all.

    Blocks of window times dilation nodes along each axis lie side by side. Nodes of a block whose
    coordinates are equal modulo ``dilation`` attend to each other::

        {(i, j): x_a // (window_a dilation_a) = y_a // (window_a dilation_a)
                 and x_a mod dilation_a = y_a mod dilation_a for all a}

    There are ``N prod_a window_a`` edges if the blocks fill the grid. The pattern is symmetric.
    With one block it is MaxViT's grid attention, and CrossFormer's of long distances.
    :func:`neighborhood` with a dilation is another pattern: there each node has a window of its own
    around it, and here the nodes of a window share it.

    Args:
        shape: Nodes along each axis.
        window: Nodes of a window along each axis, or along all of them.
        dilation: From one node of a window to the next, in the same form.
        partial: Let windows of the last block along an axis be smaller. If not, window times
            dilation has to divide ``shape``.
        graphs: How many equal grids the batch has.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named, with both numbers.

    Source:
        Tu et al., MaxViT, arXiv 2204.01697, section 3.2; Wang et al., CrossFormer,
        arXiv 2108.00154, section 3.2.

    Example:
        >>> from fastgt.patterns import dilated
        >>> dilated((8,), 2, 2).edge_index[0].tolist()
        [0, 2, 1, 3, 0, 2, 1, 3, 4, 6, 5, 7, 4, 6, 5, 7]
    """
    shape = _shape(shape)
    window = _sizes("window", window, shape, 1)
    dilation = _sizes("dilation", dilation, shape, 1)
    blocks = zip(window, dilation, strict=True)
    block = tuple(integer("window times dilation", w * d) for w, d in blocks)
    if not partial:
        _check_divides("window times dilation", block, shape)
    labels = []
    for n, d, b in zip(shape, dilation, block, strict=True):
        x = torch.arange(n)
        labels.append(x // b * d + x % d)
    return _groups(labels, graphs)


def stripes(
    shape: Sequence[int], width: int, axis: int, *, partial: bool = False, graphs: int = 1
) -> Graph:
    """Stripes side by side; inside a stripe all attend to all.

    A stripe is ``width`` nodes thick along ``axis`` and goes through the whole grid along all other
    axes. The edges are ``{(i, j): x_axis // width = y_axis // width}``. On a grid of N nodes, n of
    them along ``axis``, these are ``N^2 width / n`` if ``width`` divides n. The pattern is
    symmetric. CSWin's horizontal stripes of an image ``(height, width)`` have the axis 0, its
    vertical ones the axis 1.

    Args:
        shape: Nodes along each axis.
        width: Nodes of a stripe along ``axis``.
        axis: Which is cut, from 0, or from the last as -1.
        partial: Let the last stripe be thinner. If not, ``width`` has to divide n.
        graphs: How many equal grids the batch has.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named, with both numbers.

    Source:
        Dong et al., CSWin Transformer, arXiv 2107.00652, section 3.2.

    Example:
        >>> from fastgt.patterns import stripes
        >>> stripes((4, 2), 2, 0).row_degree.tolist(), stripes((4, 2), 1, 1).row_degree.tolist()
        ([4, 4, 4, 4, 4, 4, 4, 4], [4, 4, 4, 4, 4, 4, 4, 4])
    """
    shape = _shape(shape)
    axis, width = _axis(axis, shape), integer("width", width, 1)
    if not partial:
        _check_divides("width", (width,), shape[axis : axis + 1])
    return windows(shape, (*shape[:axis], width, *shape[axis + 1 :]), partial=True, graphs=graphs)


def axial(shape: Sequence[int], axis: int, *, graphs: int = 1) -> Graph:
    """Lines along an axis; inside a line all attend to all.

    The edges are ``{(i, j): x_a = y_a for all a but axis}``: ``N n`` on a grid of N nodes, n of
    them along ``axis``. The pattern is symmetric.

    Args:
        shape: Nodes along each axis.
        axis: Along which nodes attend, from 0, or from the last as -1.
        graphs: How many equal grids the batch has.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named, with both numbers.

    Source:
        Ho et al., Axial Attention in Multidimensional Transformers, arXiv 1912.12180, section 3.

    Example:
        >>> from fastgt.patterns import axial
        >>> axial((2, 3), 1).col.tolist()
        [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5]
    """
    shape = _shape(shape)
    axis = _axis(axis, shape)
    window = tuple(n if a == axis else 1 for a, n in enumerate(shape))
    return windows(shape, window, graphs=graphs)


def neighborhood(
    shape: Sequence[int], window: Sizes, *, dilation: Sizes = 1, graphs: int = 1
) -> Graph:
    """A window around each node, moved inwards at the borders: all have the same size.

    Along each axis, with ``d`` the dilation and ``w`` the window, node x attends to nodes of the
    same remainder ``r = x mod d``. There are ``L = ceil((n - r) / d)`` of them, and x is number
    ``p = x // d``. It attends to those numbered ``s, ..., s + w - 1``, where::

        s = min(max(p - w // 2, 0), L - w)

    A node attends to those that fit along all axes: these are ``N prod_a window_a`` edges. At
    borders the pattern is not symmetric.

    Args:
        shape: Nodes along each axis.
        window: Neighbours along each axis, or along all of them; an even number has one more before
            a node than after it.
        dilation: From a neighbour to the next, in the same form. Window times dilation must not
            be larger than ``shape``.
        graphs: How many equal grids the batch has.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named, with both numbers.

    Source:
        Hassani et al., Neighborhood Attention Transformer, arXiv 2204.07143, section 3; Hassani
        and Shi, arXiv 2209.15001, for the dilation.

    Example:
        >>> from fastgt.patterns import neighborhood
        >>> neighborhood((5,), 3).col.view(5, 3).tolist()
        [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
        >>> neighborhood((4, 4), 3).row_degree.unique().tolist()
        [9]
    """
    shape = _shape(shape)
    window = _sizes("window", window, shape, 1)
    dilation = _sizes("dilation", dilation, shape, 1)
    graphs = integer("graphs", graphs, 1)
    total, edges = math.prod(shape), math.prod(shape) * math.prod(window)
    dtype = torch.int32 if edges < 2**31 else torch.int64
    dims = len(shape)
    col = torch.zeros((1,) * (2 * dims), dtype=dtype)
    for a, (n, w, d) in enumerate(zip(shape, window, dilation, strict=True)):
        if w * d > n:
            raise ValueError(
                f"window={w} times dilation={d} must not be larger than the grid's {n} nodes along "
                f"axis {a}"
            )
        x = torch.arange(n)
        start = torch.minimum((x // d - w // 2).clamp(min=0), (n - x % d + d - 1) // d - w)
        seen = x[:, None] % d + d * (start[:, None] + torch.arange(w))  # [n, w]
        form = [1] * (2 * dims)
        form[a], form[dims + a] = n, w
        col = col + (seen * math.prod(shape[a + 1 :])).to(dtype).view(form)
    degree = torch.full((total,), math.prod(window))
    return _batched(from_rows(degree, col.flatten(), torch.tensor([0, total])), graphs)


def _groups(labels: list[Tensor], graphs: int) -> Graph:
    """Nodes of equal labels along all axes attend to each other."""
    graphs = integer("graphs", graphs, 1)
    label = labels[0] - labels[0][0]
    for x in labels[1:]:
        x = x - x.min()
        label = (label[:, None] * (int(x.max()) + 1) + x).flatten()
    return _batched(groups(label), graphs)


def _batched(graph: Graph, graphs: int) -> Graph:
    return graph if graphs == 1 else Graph.batch([graph] * graphs)


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape must be a tuple of ints, got {type(shape).__name__}")
    if not shape:
        raise ValueError("shape must have one axis at least, got none")
    return tuple(integer(f"shape[{a}]", n, 1) for a, n in enumerate(shape))


def _sizes(name: str, sizes: Sizes, shape: tuple[int, ...], least: int) -> tuple[int, ...]:
    if not isinstance(sizes, Sequence):
        return (integer(name, sizes, least),) * len(shape)
    if len(sizes) != len(shape):
        raise ValueError(f"{name} has {len(sizes)} numbers but shape has {len(shape)}")
    return tuple(integer(f"{name}[{a}]", n, least) for a, n in enumerate(sizes))


def _axis(axis: int, shape: tuple[int, ...]) -> int:
    axis, dims = integer("axis", axis), len(shape)
    if not -dims <= axis < dims:
        raise ValueError(f"axis must be from {-dims} to {dims - 1}, got {axis}")
    return axis % dims


def _check_divides(name: str, sizes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    for size, n in zip(sizes, shape, strict=True):
        if n % size:
            raise ValueError(
                f"{name} of {size} does not divide the {n} nodes of an axis: partial=True lets the "
                "last one be smaller"
            )

"""Probabilities that random walks are back where they began."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from fastgt.encodings.size_order import Block, SizeOrder, progress_of, size_order
from fastgt.graph import Graph
from fastgt.ops.checks import integer

if TYPE_CHECKING:
    import scipy.sparse as sp

_Matrix = Any  # a NumPy array, or a csr_array of scipy while few entries are not 0
_ROOM = 2**16  # entries of small graphs at once: what a core's cache holds
_DENSE_ROOM = 2**24  # entries of the columns of a large graph that are computed at once
_SPARSE_ROOM = 2**27  # where few of them are not 0
_SPARSE = 512  # nodes from which on walks of few steps may reach a small part of a graph
_DENSITY = 0.1  # from which on a product with a dense matrix is faster


def random_walk_pe(graph: Graph, steps: int, *, progress: bool = False) -> Tensor:
    """How likely a random walk from a node is back after 1 to ``steps`` steps.

        pe_it = (P^t)_ii,    P = D^-1 A,    t = 1, ..., steps

    A_ij is the number of edges i -> j, duplicates and self loops as given, and D_ii the number of
    edges that leave i. A walk takes each of these with the same probability. It ends at a node that
    no edge leaves: such a node has zeros.

    Computed in float64 on the CPU, exactly: P^t is a product of two powers of t / 2 steps, which
    reach a small part of a large graph. Small graphs are computed many at once, large ones in
    slices of columns, in memory of O(E) and about 0.5 GB at most. The time is O(steps E n) for a
    graph of n nodes, or less where walks stay near. Needs scipy.

    Args:
        graph: Square.
        steps: 0 gives no columns.
        progress: Show a bar. Needs tqdm.

    Returns:
        ``[N, steps]`` float32 on the graph's device.

    Raises:
        TypeError, ValueError: ``steps`` is no int or negative, the graph not square.
        ImportError: scipy, or tqdm for ``progress``, is not there.

    Source:
        Dwivedi et al., arXiv 2110.07875, eq. 3, as in the code of Rampasek et al., arXiv
        2205.12454.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.encodings import random_walk_pe
        >>> path = Graph.from_edge_index(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> random_walk_pe(path, 2).tolist()
        [[0.0, 0.5], [0.0, 1.0], [0.0, 0.5]]
    """
    steps = integer("steps", steps, 0)
    order = size_order(graph, "random_walk_pe")
    a = order.a
    leaving = np.bincount(a.indices, minlength=graph.num_rows).clip(1)
    both_ways = (a - a.T).count_nonzero() == 0
    # with edges both ways, D^1/2 P D^-1/2 has the same diagonals, and is its own transpose
    row = np.repeat(np.arange(graph.num_rows), np.diff(a.indptr))
    root = np.sqrt(leaving)
    data = 1 / (root[row] * root[a.indices]) if both_ways else 1 / leaving[a.indices]
    pe = np.zeros((graph.num_rows, steps))
    with progress_of("random_walk_pe", graph.num_rows, progress and steps > 0) as done:
        for block in order.blocks(_ROOM) if steps else ():
            m = order.within(block, data)
            found = pe[block.first : block.last]
            found[:, 0] = m.diagonal()
            back = m if both_ways else m.T.tocsr()
            for x, y in _columns(order, block, m, back):
                _add_returns(found, m, back, x, y)
                done(x.shape[1] if len(found) == block.width else len(found))
    return order.given_order(pe, graph)


def _columns(
    order: SizeOrder, block: Block, m: sp.csr_array, back: sp.csr_array
) -> Iterator[tuple[_Matrix, _Matrix]]:
    """The block's columns of both matrices, those of a large graph in slices."""
    if block.width <= _SPARSE:
        x = order.own_columns(block, m).toarray()
        yield x, x if back is m else order.own_columns(block, back).toarray()
        return
    width = max(1, _SPARSE_ROOM // block.width)
    x, y = m.tocsc(), back.tocsc()
    for first in range(0, block.width, width):
        some = slice(first, first + width)
        x_some = x[:, some].tocsr()
        yield x_some, x_some if back is m else y[:, some].tocsr()


def _add_returns(
    found: np.ndarray, m: sp.csr_array, back: sp.csr_array, x: _Matrix, y: _Matrix, step: int = 2
) -> None:
    """Add what columns of m^s and back^s contribute to ``step`` = 2 s and the steps after it."""
    for t in range(step, found.shape[1] + 1):
        if t % 2 == 0:
            found[:, t - 1] += _row_products(x, y)
            continue
        further = back @ y
        found[:, t - 1] += _row_products(x, further)
        x = further if back is m else m @ x
        y = further
        if not isinstance(x, np.ndarray) and max(x.nnz, y.nnz) > _DENSITY * np.prod(x.shape):
            width = max(1, _DENSE_ROOM // len(found))
            for first in range(0, x.shape[1], width):
                some = slice(first, first + width)
                x_some = x[:, some].toarray()
                y_some = x_some if y is x else y[:, some].toarray()
                _add_returns(found, m, back, x_some, y_some, t + 1)
            return


def _row_products(x: _Matrix, y: _Matrix) -> np.ndarray:
    """sum_j x_ij y_ij."""
    if isinstance(x, np.ndarray):
        return np.einsum("ij,ij->i", x, y)
    return x.multiply(y).sum(axis=1)

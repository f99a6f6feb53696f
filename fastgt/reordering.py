"""Orders of the nodes in which neighbours stand near each other.

Rows that share columns then share a window, and what a row gathers was lately in the cache.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgt.extras import require

_PART = 16  # nodes of a METIS part: windows of 16, 32 and 64 rows are made of whole parts


def node_order(method: str, row_ptr: Tensor, col: Tensor, graph_ptr: Tensor) -> Tensor:
    """The old number of the node at each new place; every graph of a batch keeps its range.

    The same graph always gets the same order. Directions, duplicates and self loops do not matter
    but to ``"degree"``, which counts them. Computed on the CPU, wherever the graph is.

    ``"degree"``
        Most edges, in and out, first: hubs share windows. Equal ones keep their order.
    ``"rcm"``
        Reverse Cuthill-McKee: breadth first from a node of low degree, backwards; for meshes and
        roads, and the cheapest that helps most graphs.
    ``"metis"``
        Recursive bisection down to parts of 16 nodes, with few edges between any two halves. The
        numbers of parts follow the bisection, so that any run of parts is well connected.
    ``"louvain"``
        Communities of high modularity, those of each level within those of the next; in the
        smallest, most neighbours first.

    The last two need ``pip install "fastgt[reorder]"``. igraph's random numbers come from
    Python's ``random``, as by default, after ``"louvain"``.

    Args:
        method: One of the four.
        row_ptr, col: ``[N + 1]`` and ``[E]``, the row walk of a square graph.
        graph_ptr: ``[G + 1]``, the node boundaries of the graphs of a batch.

    Returns:
        ``[N]`` int64, on the device of ``row_ptr``.

    Raises:
        ValueError: There is no such method.
        ImportError: Its package is not installed.

    Sources:
        Cuthill and McKee, Reducing the bandwidth of sparse symmetric matrices, ACM 1969.
        Karypis and Kumar, A fast and high quality multilevel scheme for partitioning irregular
        graphs, SIAM J. Sci. Comput. 20(1), 1998.
        Blondel et al., Fast unfolding of communities in large networks, J. Stat. Mech. 2008.

    Example:
        >>> import torch
        >>> from fastgt.reordering import node_order
        >>> row_ptr, col = torch.tensor([0, 1, 2, 4, 6]), torch.tensor([2, 3, 0, 3, 1, 2])
        >>> node_order("rcm", row_ptr, col, torch.tensor([0, 4])).tolist()  # the path 0 2 3 1
        [1, 3, 2, 0]
    """
    if method not in _METHODS:
        raise ValueError(f"order must be a tensor or one of {list(_METHODS)}, got {method!r}")
    ptr, columns, ends = (x.cpu().numpy() for x in (row_ptr, col, graph_ptr))
    order = np.arange(len(ptr) - 1)
    if len(columns):
        order = _METHODS[method](ptr, columns)
    graph_of = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
    order = order[np.argsort(graph_of[order], kind="stable")]
    return torch.from_numpy(order.astype(np.int64)).to(row_ptr.device)


def _degree(ptr: np.ndarray, col: np.ndarray) -> np.ndarray:
    degree = np.diff(ptr) + np.bincount(col, minlength=len(ptr) - 1)
    return np.argsort(-degree, kind="stable")


def _rcm(ptr: np.ndarray, col: np.ndarray) -> np.ndarray:
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    pattern = neighbour_pattern(ptr, col)
    # scipy sorts a node's neighbours by insertion: quadratic for hubs, unless they are in order
    ascending = np.argsort(np.diff(pattern.indptr), kind="stable")
    pattern = pattern[ascending][:, ascending]
    pattern.sort_indices()
    return ascending[reverse_cuthill_mckee(pattern, symmetric_mode=True)]


def _metis(ptr: np.ndarray, col: np.ndarray) -> np.ndarray:
    pymetis = require("pymetis", "the order 'metis'", "reorder")
    pattern = neighbour_pattern(ptr, col)
    parts = pattern.shape[0] // _PART
    if parts < 2:
        return np.arange(pattern.shape[0])
    # all parts by bisection, not at once: faster here, and near numbers are near parts
    _, part = pymetis.part_graph(
        parts,
        pymetis.CSRAdjacency(pattern.indptr, pattern.indices),
        recursive=True,
        options=pymetis.Options(seed=0),
    )
    return np.argsort(part, kind="stable")


def _louvain(ptr: np.ndarray, col: np.ndarray) -> np.ndarray:
    igraph = require("igraph", "the order 'louvain'", "reorder")
    from scipy.sparse import triu

    pattern = neighbour_pattern(ptr, col)
    once = triu(pattern, format="coo")
    graph = igraph.Graph(pattern.shape[0], np.stack([once.row, once.col], 1).astype(np.int64))
    igraph.set_random_number_generator(random.Random(0))
    try:
        levels = graph.community_multilevel(return_levels=True)
    finally:
        igraph.set_random_number_generator(random)
    members = [np.asarray(level.membership) for level in levels]  # from small to large
    return np.lexsort((-np.diff(pattern.indptr), *members))


_METHODS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "degree": _degree,
    "rcm": _rcm,
    "metis": _metis,
    "louvain": _louvain,
}


def neighbour_pattern(ptr: np.ndarray, col: np.ndarray) -> Any:
    """Who is a neighbour of whom: symmetric, every edge once each way, no self loops."""
    from scipy.sparse import coo_array

    n = len(ptr) - 1
    row = np.repeat(np.arange(n), np.diff(ptr))
    other = row != col
    ends = row[other], col[other]
    one_way = coo_array((np.ones(len(ends[0]), dtype=bool), ends), shape=(n, n)).tocsr()
    pattern = one_way + one_way.T
    pattern.sort_indices()
    return pattern

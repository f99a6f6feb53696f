"""How nodes of a graph act upon each other as charges do."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fastgt.encodings.size_order import check_room, progress_of, size_order, undirected
from fastgt.graph import Graph

_ROOM = 2**17  # entries of the matrices of small graphs at once
_COPIES = 6  # of such a matrix


def electrostatic_pe(graph: Graph, *, symmetrize: bool = False, progress: bool = False) -> Tensor:
    """Statistics of the potentials between a node and all nodes of its graph.

        V_ij = G_ij - G_jj,    G = L^+,    L = D - A

    A_ij is the number of edges between i and j, D its row sums; self loops cancel. Of node j there
    are, in this order: the minimum, maximum, mean and standard deviation of V_ij over i; those of
    V_ji over i; sum_i P_ij V_ij; and sum_i P_ji V_ji, with P = D^-1 A without self loops. The
    deviation is that of a sample, and 0 for a single node; an isolated node has P_ji = 0.

    Both maxima are 0 but for rounding, for V_jj is and no V_ij is above: they stand here since the
    authors have ten numbers. There an isolated node has NaN.

    Computed in float64 on the CPU, many small graphs at once. A graph of n nodes takes memory of
    O(n^2) and time of O(n^3). Needs scipy.

    Args:
        graph: Square, A symmetric.
        symmetrize: Replace A by max(A, A^T): an edge one way goes both ways.
        progress: Show a bar. Needs tqdm.

    Returns:
        ``[N, 10]`` float32 on the graph's device.

    Raises:
        TypeError, ValueError: The graph is not square, A not symmetric; or the largest graph takes
            more memory than is free; both numbers are given.
        ImportError: scipy, or tqdm for ``progress``, is not there.

    Source:
        Rampasek et al., arXiv 2205.12454, in whose code it is ElstaticSE.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.encodings import electrostatic_pe
        >>> pair = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]))
        >>> electrostatic_pe(pair)[0, :3]
        tensor([-0.5000,  0.0000, -0.2500])
    """
    order = undirected(size_order(graph, "electrostatic_pe"), symmetrize)
    from scipy.sparse.csgraph import connected_components

    largest = int(np.diff(order.ptr).max(initial=0))
    check_room("electrostatic_pe", largest, _COPIES * 8 * largest**2)
    label = connected_components(order.a, directed=False)[1]
    size = np.bincount(label, minlength=1)
    pe = np.zeros((graph.num_rows, 10))
    with progress_of("electrostatic_pe", graph.num_rows, progress) as done:
        for block in order.blocks(_ROOM, equal=True):
            found = pe[block.first : block.last]
            labels = label[block.first : block.last].reshape(-1, block.width)
            same = (labels[:, :, None] == labels[:, None]) / size[labels][..., None]
            found[:] = _statistics(order.laplacians(block), same).reshape(found.shape)
            done(len(found))
    return order.given_order(pe, graph)


def _statistics(laplacian: np.ndarray, same: np.ndarray) -> np.ndarray:
    """``[G, n, n]`` -> ``[G, n, 10]``; ``same`` projects to what L maps to 0."""
    n = laplacian.shape[1]
    v = np.linalg.inv(laplacian + same) - same
    v -= v.diagonal(axis1=1, axis2=2)[:, None]
    degree = laplacian.diagonal(axis1=1, axis2=2)
    p = -laplacian / np.where(degree > 0, degree, 1)[..., None]
    p[:, range(n), range(n)] = 0
    p *= v
    parts = []
    for axis in (1, 2):
        deviation = v.std(axis, ddof=1) if n > 1 else np.zeros(v.shape[:2])
        parts += [v.min(axis), v.max(axis), v.mean(axis), deviation]
    return np.stack([*parts, p.sum(1), p.sum(2)], 2)

"""Shortest paths between all pairs of nodes of a graph, and how many edges a node has."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgt.encodings.size_order import check_room, progress_of
from fastgt.graph import Graph
from fastgt.ops.checks import check_square, integer

_ROOM = 2**16  # pairs at once
_TYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def shortest_paths(
    graph: Graph,
    edge_type: Tensor,
    distance: int,
    *,
    edges: int | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Lengths of shortest paths between all pairs of a graph, and the types of their edges.

    Paths go along edges, from their source to their target. Paths of ``distance`` edges or more
    count as ones of ``distance - 1``, of which the first edges are kept; pairs without a path have
    the length ``distance``. Where several are the shortest, the one is taken whose last edge has
    the lowest number. All graphs are searched at once, breadth first, on the CPU.

    Args:
        graph: Square.
        edge_type: ``[E]`` integers. The types of small dtypes take less memory.
        distance: 2 at least.
        edges: How many edges of a path are kept, from its beginning: ``distance`` at most, and if
            None.
        progress: Show a bar. Needs tqdm.

    Returns:
        ``[P]`` int64, and ``[P, edges]`` of the dtype of ``edge_type``, on the graph's device: P
        pairs, graph after graph, i after i. Type 0 stands behind a path's end.

    Raises:
        TypeError, ValueError: An argument does not fit, or the result takes more memory than is
            free; both numbers are given.

    Source:
        Ying et al., arXiv 2106.05234, section 3.1, cut off as in GraphGPS's code.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.encodings import shortest_paths
        >>> path = Graph.from_edge_index(torch.tensor([[0, 1], [1, 2]]))
        >>> lengths, types = shortest_paths(path, torch.tensor([3, 1]), 4)
        >>> lengths.view(3, 3).tolist()
        [[0, 1, 2], [4, 0, 1], [4, 4, 0]]
        >>> types[2].tolist()
        [3, 1, 0, 0]
        >>> shortest_paths(path, torch.tensor([3, 1]), 4, edges=1)[1][2].tolist()
        [3]
    """
    n = check_square(graph)
    distance = integer("distance", distance)
    if distance < 2:
        raise ValueError(f"distance must be 2 at least, got {distance}")
    kept = distance if edges is None else integer("edges", edges, 1)
    if kept > distance:
        raise ValueError(f"edges must be distance={distance} at most, got {edges}")
    kind = _types(edge_type, graph)
    ptr = graph.graph_ptr.cpu().numpy().astype(np.int64)
    sizes = np.diff(ptr)
    size, first = np.repeat(sizes, sizes), np.repeat(ptr[:-1], sizes)
    row_ptr = np.concatenate([[0], np.cumsum(size)])  # pairs of the nodes before
    pairs = int(row_ptr[-1])
    largest = int(sizes.max(initial=0))
    check_room("shortest_paths", largest, pairs * (8 + kept * kind.itemsize))
    lengths = np.full(pairs, distance, np.int64)
    paths = np.zeros((pairs, kept), kind.dtype)
    source, target = graph.edge_index.cpu().numpy().astype(np.int64)
    by = source.argsort(kind="stable")
    ends = np.concatenate([[0], np.bincount(source, minlength=n).cumsum()])
    leaving = _Leaving(target, by, ends)
    best = np.empty(max(_ROOM, largest), np.int64)
    with progress_of("shortest_paths", n, progress) as done:
        start = 0
        while start < n:
            end = int(row_ptr.searchsorted(row_ptr[start] + _ROOM, "right")) - 1
            end = max(end, start + 1)
            some = slice(row_ptr[start], row_ptr[end])
            shift = row_ptr[start:end] - row_ptr[start] - first[start:end]
            nodes = np.arange(start, end)
            _search(leaving, nodes, shift, best, kind, distance, lengths[some], paths[some])
            done(end - start)
            start = end
    length, types = (torch.from_numpy(x).to(graph.device) for x in (lengths, paths))
    return length, types


def degrees(graph: Graph) -> Tensor:
    """How many edges reach a node, and how many leave it: ``[N, 2]`` int64 on its device.

    Duplicates and self loops count as given.

    Raises:
        TypeError, ValueError: ``graph`` is no Graph, or not square.

    Source:
        Ying et al., arXiv 2106.05234, eq. 5.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.encodings import degrees
        >>> degrees(Graph.from_edge_index(torch.tensor([[0, 0], [1, 2]]))).tolist()
        [[0, 2], [1, 0], [1, 0]]
    """
    check_square(graph, shared=True)
    return torch.stack([graph.row_degree, graph.col_degree], 1).long()


class _Leaving(NamedTuple):
    """The edges that leave each node.

    Attributes:
        target: ``[E]``, of each edge.
        edge: ``[E]``, the edges' numbers, by their source.
        ptr: ``[N + 1]``; ``edge[ptr[u]:ptr[u + 1]]`` leave u.
    """

    target: np.ndarray
    edge: np.ndarray
    ptr: np.ndarray

    def of(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places in ``u`` and the edges that leave the node there, one pair an edge."""
        count = self.ptr[u + 1] - self.ptr[u]
        at = np.repeat(np.arange(len(u)), count)
        begin = np.cumsum(count) - count
        return at, self.edge[np.arange(len(at)) + (self.ptr[u] - begin)[at]]


def _search(
    leaving: _Leaving,
    node: np.ndarray,
    shift: np.ndarray,
    best: np.ndarray,
    kind: np.ndarray,
    distance: int,
    length: np.ndarray,
    path: np.ndarray,
) -> None:
    """Breadth first from each of ``node``; pairs of its row stand at ``shift`` + the other node.

    ``length`` has what stands for no path in all places, ``path`` zeros; both are filled.
    """
    kept = min(path.shape[1], distance - 1)
    best[: len(length)] = len(kind)
    pair, step = shift + node, 0
    length[pair] = 0
    while len(pair):
        at, edge = leaving.of(node)
        reached = shift[at] + leaving.target[edge]
        new = length[reached] == distance
        at, edge, reached = at[new], edge[new], reached[new]
        np.minimum.at(best, reached, edge)
        chosen = best[reached] == edge
        at, edge, reached = at[chosen], edge[chosen], reached[chosen]
        step += 1
        path[reached] = path[pair[at]]
        if step <= kept:
            path[reached, step - 1] = kind[edge]
        length[reached] = min(step, distance - 1)
        pair, node, shift = reached, leaving.target[edge], shift[at]


def _types(edge_type: object, graph: Graph) -> np.ndarray:
    if not isinstance(edge_type, Tensor):
        hint = "torch.as_tensor(edge_type) makes one"
        found = type(edge_type).__name__
        raise TypeError(f"edge_type must be a tensor of integers, got {found}: {hint}")
    if edge_type.dtype not in _TYPES:
        wanted = "integers (uint8 or int8 to int64)"
        raise TypeError(f"edge_type must hold {wanted}, got {edge_type.dtype}")
    if edge_type.shape != (graph.num_edges,):
        wanted = f"[E] = [{graph.num_edges}]"
        raise ValueError(f"edge_type must be {wanted} integers, got {list(edge_type.shape)}")
    kind = edge_type.cpu().numpy()
    if len(kind) and kind.min() < 0:
        raise ValueError(f"edge_type must not be negative, got {kind.min()}")
    return kind

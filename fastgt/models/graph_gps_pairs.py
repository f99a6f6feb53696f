"""Graphormer's encodings for a GraphGPS model: biases of pairs of nodes, and degrees.

    bias_ij = b_{d(i, j)} + (1 / max(1, d)) sum_k w_{t_k} W_k

d(i, j) is the length of a shortest path from the query i to the key j, along edges from their
source to their target, t_k the type of its k-th edge, b and w embeddings of as many channels as
there are heads, and W_k a matrix of heads.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.models.graph_transformer import check_types
from fastgt.nn.sublayers import reset_sublayers
from fastgt.ops.checks import check_graph, integer, readable


def shortest_paths(graph: Graph, edge_type: Tensor, distance: int) -> tuple[Tensor, Tensor]:
    """Lengths of shortest paths between all pairs of a graph, and the types of their edges.

    Paths of ``distance`` edges or more count as ones of ``distance - 1``, of which the first edges
    are kept; pairs without a path have the length ``distance``. Where several are the shortest,
    the one is taken whose last edge has the lowest number. Computed on the CPU, in memory of nodes
    times edges of the largest graph.

    Args:
        graph: Square.
        edge_type: ``[E]`` integers.
        distance: 2 at least.

    Returns:
        ``[P]`` and ``[P, distance]`` int64 on the graph's device, P pairs: graph after graph, i
        after i. Type 0 stands behind a path's end.

    Source:
        Ying et al., arXiv 2106.05234, section 3.1, cut off as in GraphGPS's code.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models.graph_gps_pairs import shortest_paths
        >>> path = Graph.from_edge_index(torch.tensor([[0, 1], [1, 2]]))
        >>> lengths, types = shortest_paths(path, torch.tensor([3, 1]), 4)
        >>> lengths.view(3, 3).tolist()
        [[0, 1, 2], [4, 0, 1], [4, 4, 0]]
        >>> types[2].tolist()
        [3, 1, 0, 0]
    """
    check_graph(graph)
    distance = integer("distance", distance)
    if distance < 2:
        raise ValueError(f"distance must be 2 at least, got {distance}")
    kinds = 2**62
    types = check_types("edge_type", edge_type, "E", graph.num_edges, kinds, graph)
    kind = types.cpu().numpy().astype(np.int64)
    source, target = graph.edge_index.cpu().numpy()
    bounds = graph.graph_ptr.tolist()
    lengths, paths = [np.zeros(0, np.int64)], [np.zeros((0, distance), np.int64)]
    for first, last in pairwise(bounds):
        mine = (target >= first) & (target < last)
        ends = source[mine] - first, target[mine] - first
        length, path = _paths(*ends, kind[mine], last - first, distance)
        lengths.append(length.reshape(-1))
        paths.append(path.reshape(-1, distance))
    found = [torch.from_numpy(np.concatenate(x)).to(graph.device) for x in (lengths, paths)]
    return found[0], found[1]


def _paths(
    source: np.ndarray, target: np.ndarray, kind: np.ndarray, n: int, distance: int
) -> tuple[np.ndarray, np.ndarray]:
    length = np.full((n, n), distance, np.int64)
    path = np.zeros((n, n, distance), np.int64)
    np.fill_diagonal(length, 0)
    seen = np.eye(n, dtype=bool)
    reached, step = seen.copy(), 0
    while reached.any():
        start, edge = np.nonzero(reached[:, source] & ~seen[:, target])
        # the first edge that reaches a pair
        pairs, at = np.unique(start * n + target[edge], return_index=True)
        i, j, edge = pairs // n, pairs % n, edge[at]
        path[i, j] = path[i, source[edge]]
        step += 1
        if step < distance:
            path[i, j, step - 1] = kind[edge]
        length[i, j] = min(step, distance - 1)
        reached = np.zeros_like(seen)
        reached[i, j] = True
        seen |= reached
    return length, path


class PairBias(nn.Module):
    """Biases of all pairs of nodes for every head, of lengths and edges of shortest paths.

    Source:
        Ying et al., arXiv 2106.05234, eqs. 6 and 7, with matrices as in their code.
    """

    def __init__(self, distance: int, edge_types: int, heads: int):
        super().__init__()
        self.distance, self.edge_types, self.heads = distance, edge_types, heads
        self.length = nn.Embedding(distance + 1, heads)
        self.edge = nn.Embedding(edge_types, heads)
        self.hop = nn.Embedding(distance * heads * heads, 1)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, pair_distance: Tensor, pair_edges: Tensor, graph: Graph) -> Tensor:
        """``[P]`` and ``[P, distance]`` integers, as ``shortest_paths`` gives -> ``[P, H]``."""
        k = self.distance
        if not isinstance(pair_distance, Tensor) or not isinstance(pair_edges, Tensor):
            found = f"{type(pair_distance).__name__} and {type(pair_edges).__name__}"
            raise TypeError(
                f"pair_distance and pair_edges must be tensors of integers, got {found}"
            )
        pairs = len(pair_distance)
        if readable(graph.graph_ptr):
            pairs = int(graph.graph_ptr.diff().long().square().sum())
        if pair_edges.shape != (pairs, k):
            given = list(pair_edges.shape)
            raise ValueError(f"pair_edges must be [P, distance] = [{pairs}, {k}], got {given}")
        lengths = check_types("pair_distance", pair_distance, "P", pairs, k + 1, graph)
        flat = check_types(
            "pair_edges", pair_edges.flatten(), "P * distance", pairs * k, self.edge_types, graph
        )
        edges = self.edge(flat).view(pairs, k, self.heads)
        hops = self.hop.weight.view(k, self.heads, self.heads)
        along = torch.einsum("pkh,khg->pg", edges, hops.to(edges.dtype))
        return self.length(lengths) + along / lengths.clamp(min=1)[:, None]


class DegreeEncoder(nn.Module):
    """Embeddings of how many edges reach a node, and of how many leave it.

    Source:
        Ying et al., arXiv 2106.05234, eq. 5.
    """

    def __init__(self, degrees: int, dim: int):
        super().__init__()
        self.degrees = degrees
        self.reaching, self.leaving = nn.Embedding(degrees, dim), nn.Embedding(degrees, dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, graph: Graph) -> Tensor:
        """``[N, dim]``."""
        counts = graph.row_degree, graph.col_degree
        for name, count in zip(("in", "out"), counts, strict=True):
            if readable(count) and len(count) and int(count.max()) >= self.degrees:
                raise ValueError(
                    f"degrees must be more than the largest {name}-degree {int(count.max())}, got "
                    f"{self.degrees}"
                )
        return self.reaching(counts[0]) + self.leaving(counts[1])

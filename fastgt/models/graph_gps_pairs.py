"""Graphormer's encodings for a GraphGPS model: biases of pairs of nodes, and degrees.

    bias_ij = b_{d(i, j)} + (1 / max(1, d)) sum_k w_{t_k} W_k

d(i, j) is the length of a shortest path from the query i to the key j, along edges from their
source to their target (:func:`fastgt.encodings.shortest_paths`), t_k the type of its k-th edge, b
and w embeddings of as many channels as there are heads, and W_k a matrix of heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.models.graph_transformer import check_types
from fastgt.nn.sublayers import reset_sublayers
from fastgt.ops.checks import readable


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

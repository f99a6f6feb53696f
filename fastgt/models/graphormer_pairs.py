"""Graphormer's biases of pairs of nodes, and of its virtual nodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.models.graph_transformer import check_types
from fastgt.nn.sublayers import reset_sublayers
from fastgt.ops.checks import readable


class PathBias(nn.Module):
    """Biases of all pairs of nodes for every head, of the shortest path between them.

    The pairs of each graph, i after i, have a virtual node before them, which has one bias to and
    from all, and itself.

    Args:
        distance: ``path_distance`` of :class:`GraphormerConfig`.
        edge_types: How many there are in each column; () for none.
        heads: H.
        edges, rows: ``path_edges`` and ``path_rows``.

    Source:
        Ying et al., arXiv 2106.05234, eqs. 6 and 7, with matrices as in their code, and section
        3.2.
    """

    def __init__(
        self, distance: int, edge_types: Sequence[int], heads: int, *, edges: int, rows: int
    ):
        super().__init__()
        self.distance, self.edge_types = distance, tuple(edge_types)
        self.heads, self.edges = heads, edges
        self.length = nn.Embedding(distance + 1, heads)
        self.virtual = nn.Embedding(1, heads)
        self.edge = nn.ModuleList(nn.Embedding(kinds, heads) for kinds in self.edge_types)
        self.hop = nn.Embedding(rows * heads * heads, 1) if self.edge_types else None

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, pair_distance: Tensor, pair_edges: Tensor | None, graph: Graph) -> Tensor:
        """``[P]`` and ``[P, edges]`` or ``[P, edges, columns]`` -> ``[P + 2 N + G, H]``."""
        sizes = graph.graph_ptr.diff().long()
        squares = sizes * sizes
        if not isinstance(pair_distance, Tensor):
            found = type(pair_distance).__name__
            raise TypeError(f"pair_distance must be a tensor of integers, got {found}")
        pairs = int(squares.sum()) if readable(squares) else len(pair_distance)
        length = check_types("pair_distance", pair_distance, "P", pairs, self.distance + 1, graph)
        inner = self.length(length) + self._along(length, pair_edges, graph)
        graphs = torch.arange(graph.num_graphs, device=sizes.device)
        owner = graphs.repeat_interleave(squares, output_size=pairs)  # [P]
        n = sizes[owner]
        mine = torch.arange(pairs, device=n.device) - (squares.cumsum(0) - squares)[owner]
        wider = (sizes + 1).square()
        first = (wider.cumsum(0) - wider)[owner]
        places = first + (mine // n + 1) * (n + 1) + mine % n + 1
        whole = self.virtual.weight.to(inner.dtype).expand(
            pairs + 2 * graph.num_rows + graph.num_graphs, -1
        )
        return whole.index_copy(0, places, inner)

    def _along(self, length: Tensor, pair_edges: Tensor | None, graph: Graph) -> Tensor | float:
        """What the edges of paths add, ``[P, H]``."""
        columns = len(self.edge_types)
        if self.hop is None:
            if pair_edges is not None:
                raise ValueError(
                    f"pair_edges must be None (edge_types is ()), got {list(pair_edges.shape)}"
                )
            return 0.0
        if not isinstance(pair_edges, Tensor):
            found = type(pair_edges).__name__
            raise TypeError(f"pair_edges must be a tensor of integers, got {found}")
        pairs, k = len(length), self.edges
        shape, letters = [pairs, k], "P, path_edges"
        if columns > 1:
            shape, letters = [*shape, columns], f"{letters}, columns"
        if (given := list(pair_edges.shape)) != shape:
            raise ValueError(f"pair_edges must be [{letters}] = {shape}, got {given}")
        parts = []
        by_column = pair_edges.reshape(pairs * k, columns).unbind(1)
        for i, (embed, types) in enumerate(zip(self.edge, by_column, strict=True)):
            name = "pair_edges" if columns == 1 else f"pair_edges[..., {i}]"
            kinds = self.edge_types[i]
            parts.append(embed(check_types(name, types, "P * path_edges", pairs * k, kinds, graph)))
        edges = (torch.stack(parts).mean(0) if columns > 1 else parts[0]).view(pairs, k, self.heads)
        count = length.clamp(max=k).masked_fill(length == self.distance, 0)  # of no path: no edge
        there = torch.arange(k, device=count.device) < count[:, None]
        hops = self.hop.weight.view(-1, self.heads, self.heads)[:k]
        edges = edges * there[..., None]
        along = torch.einsum("pkh,khg->pg", edges, hops.to(edges.dtype))
        return along / count.clamp(min=1)[:, None]

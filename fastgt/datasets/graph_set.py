"""Many graphs in flat arrays, and batches that are cut out of them without padding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastgt.graph import Graph

Per = Literal["node", "graph", "pair"]


class Encoded(NamedTuple):
    """One encoding of every graph of a set.

    Attributes:
        values: ``[N, ...]``, ``[G, ...]`` or ``[P, ...]``; P sums the squares of the graphs' nodes.
        per: What its rows belong to.
    """

    values: Tensor
    per: Per


class Batch(NamedTuple):
    """Some graphs as one: what a model takes, and what it should find.

    Attributes:
        graph: The batch; edges stand as :meth:`fastgt.Graph.from_edge_index` was given them.
        node: ``[N]`` or ``[N, columns]`` integer types, or ``[N, F]`` features.
        edge: As node, ``[E, ...]``; None where edges carry nothing.
        y: ``[B, ...]`` of graphs, or ``[N, ...]`` of nodes.
        encodings: Keyword arguments of the model's ``forward``.
    """

    graph: Graph
    node: Tensor
    edge: Tensor | None
    y: Tensor
    encodings: dict[str, Tensor]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on that device."""
        return Batch(
            self.graph.to(device),
            self.node.to(device),
            None if self.edge is None else self.edge.to(device),
            self.y.to(device),
            {name: x.to(device) for name, x in self.encodings.items()},
        )


@dataclass(frozen=True)
class GraphSet:
    """Graph after graph in flat arrays.

    Attributes:
        node: ``[N, ...]`` types or features.
        edge: ``[E, ...]`` types or features; None where edges carry nothing.
        edge_index: ``[2, E]`` int64, source above target, numbered within each graph.
        node_ptr, edge_ptr: ``[G + 1]`` int64; graph g owns the nodes
            ``node_ptr[g]:node_ptr[g + 1]`` and likewise its edges.
        y: ``[G, ...]`` of graphs, or ``[N, ...]`` of nodes.
        splits: Numbers of graphs in ``"train"``, ``"val"`` and ``"test"``.
        y_per: What ``y`` belongs to.
        encodings: By the name of the argument that a model takes.

    Example:
        >>> import torch
        >>> from fastgt.datasets import GraphSet
        >>> two = GraphSet(
        ...     node=torch.tensor([0, 1, 5]),
        ...     edge=torch.tensor([1, 1]),
        ...     edge_index=torch.tensor([[0, 1], [1, 0]]),
        ...     node_ptr=torch.tensor([0, 1, 3]),
        ...     edge_ptr=torch.tensor([0, 0, 2]),
        ...     y=torch.tensor([0.5, 2.0]),
        ...     splits={"train": torch.tensor([0, 1])},
        ... )
        >>> two.batch(torch.tensor([1, 0, 1])).node.tolist()
        [1, 5, 0, 1, 5]
    """

    node: Tensor
    edge: Tensor | None
    edge_index: Tensor
    node_ptr: Tensor
    edge_ptr: Tensor
    y: Tensor
    splits: dict[str, Tensor]
    y_per: Literal["node", "graph"] = "graph"
    encodings: dict[str, Encoded] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.node_ptr) - 1

    def batch(self, graphs: Tensor) -> Batch:
        """Those graphs, ``[B]`` integers, in that order; any may occur more than once."""
        node, graph_ptr = owned(self.node_ptr, graphs)
        edge, edge_ptr = owned(self.edge_ptr, graphs)
        shift = graph_ptr[:-1].repeat_interleave(edge_ptr.diff())
        graph = Graph.from_edge_index(
            self.edge_index[:, edge] + shift, len(node), graph_ptr=graph_ptr
        )
        rows = {"node": node, "graph": graphs}
        if any(x.per == "pair" for x in self.encodings.values()):
            pairs = torch.cat([self.node_ptr.new_zeros(1), self.node_ptr.diff().square().cumsum(0)])
            rows["pair"] = owned(pairs, graphs)[0]
        return Batch(
            graph,
            self.node[node],
            None if self.edge is None else self.edge[edge],
            self.y[rows[self.y_per]],
            {name: x.values[rows[x.per]] for name, x in self.encodings.items()},
        )

    def with_encodings(self, encodings: dict[str, Encoded]) -> GraphSet:
        """The set with these encodings besides its own."""
        return replace(self, encodings={**self.encodings, **encodings})


def owned(ptr: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """What the chosen graphs own: the places ``[T]``, and where each graph's begin ``[B + 1]``.

    Example:
        >>> import torch
        >>> from fastgt.datasets.graph_set import owned
        >>> owned(torch.tensor([0, 2, 2, 5]), torch.tensor([2, 0]))
        (tensor([2, 3, 4, 0, 1]), tensor([0, 3, 5]))
    """
    start = ptr[chosen]
    count = ptr[chosen + 1] - start
    begin = torch.cat([count.new_zeros(1), count.cumsum(0)])
    place = torch.arange(int(begin[-1])) + (start - begin[:-1]).repeat_interleave(count)
    return place, begin

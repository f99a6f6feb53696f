"""One graph whose nodes are classified, with the splits of its nodes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastgt.datasets.graph_set import digest
from fastgt.graph import Graph


@dataclass(frozen=True)
class NodeSet:
    """One graph, features and classes of its nodes.

    Attributes:
        graph: Square.
        node: ``[N, F]`` float32 features.
        edge: ``[E, ...]`` integer types, or features; None where edges carry nothing.
        y: ``[N]`` int64 classes, -1 where unknown; or ``[N, T]`` numbers to predict.
        splits: One or more splits: masks ``[N]`` of ``"train"``, ``"val"`` and ``"test"``.
        encodings: ``[N, ...]`` each, by the name of the argument that a model takes.
        title: What results on it are called.
        classes: How many there are; 0 where numbers are to be predicted.
        edge_types: How many types there are in each column of ``edge``.

    Raises:
        TypeError: ``graph`` is no Graph, or a mask is not of bool.
        ValueError: The arrays do not fit each other; says which.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.datasets import NodeSet
        >>> mask = torch.tensor([True, False])
        >>> pair = NodeSet(
        ...     Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]])),
        ...     node=torch.eye(2),
        ...     edge=None,
        ...     y=torch.tensor([0, 1]),
        ...     splits=[{"train": mask, "val": ~mask, "test": ~mask}],
        ...     classes=2,
        ... )
        >>> pair.y[pair.splits[0]["test"]].tolist()
        [1]
    """

    graph: Graph
    node: Tensor
    edge: Tensor | None
    y: Tensor
    splits: list[dict[str, Tensor]]
    encodings: dict[str, Tensor] = field(default_factory=dict)
    title: str = ""
    classes: int = 0
    edge_types: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.graph, Graph):
            raise TypeError(f"graph must be a Graph, got {type(self.graph).__name__}")
        n = self.graph.num_nodes
        wanted = {"node": (self.node, n), "y": (self.y, n)}
        if self.edge is not None:
            wanted["edge"] = self.edge, self.graph.num_edges
        wanted |= {f"encodings[{name!r}]": (x, n) for name, x in self.encodings.items()}
        for name, (x, count) in wanted.items():
            if len(x) != count:
                raise ValueError(f"{name} must have {count} rows, got {len(x)}")
        for i, split in enumerate(self.splits):
            for name, mask in split.items():
                if mask.dtype != torch.bool:
                    raise TypeError(f"splits[{i}][{name!r}] must be of bool, got {mask.dtype}")
                if mask.shape != (n,):
                    raise ValueError(f"splits[{i}][{name!r}] must be [{n}], got {list(mask.shape)}")
                if self.classes and bool((self.y[mask] < 0).any()):
                    raise ValueError(f"splits[{i}][{name!r}] has nodes whose class is unknown")

    @staticmethod
    def from_pyg(data: Any, **options: Any) -> NodeSet:
        """Of torch-geometric's ``Data``: see :func:`fastgt.datasets.from_pyg.node_set`."""
        from fastgt.datasets.from_pyg import node_set

        return node_set(data, **options)

    def with_encodings(self, encodings: dict[str, Tensor]) -> NodeSet:
        """The set with these encodings besides its own."""
        return replace(self, encodings={**self.encodings, **encodings})

    def to(self, device: torch.device | str) -> NodeSet:
        """The set on that device."""
        return replace(
            self,
            graph=self.graph.to(device),
            node=self.node.to(device),
            edge=None if self.edge is None else self.edge.to(device),
            y=self.y.to(device),
            splits=[{k: x.to(device) for k, x in split.items()} for split in self.splits],
            encodings={name: x.to(device) for name, x in self.encodings.items()},
        )

    def digest(self) -> str:
        """Sixteen letters that change with the data and the splits: encodings do not count."""
        masks = [(f"{i} {k}", x) for i, split in enumerate(self.splits) for k, x in split.items()]
        return digest(
            [
                ("node", self.node),
                ("edge", self.edge),
                ("edge_index", self.graph.edge_index),
                ("y", self.y),
                *masks,
            ]
        )

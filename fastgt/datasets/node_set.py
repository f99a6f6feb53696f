"""One graph whose nodes are classified, with the splits of its nodes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fastgt.graph import Graph


@dataclass(frozen=True)
class NodeSet:
    """One graph, features and classes of its nodes.

    Attributes:
        graph: Square.
        node: ``[N, F]`` float32 features.
        edge: ``[E, F]``; None where edges carry nothing.
        y: ``[N]`` int64 classes.
        splits: One or more splits: masks ``[N]`` of ``"train"``, ``"val"`` and ``"test"``.
        encodings: ``[N, ...]`` each, by the name of the argument that a model takes.
    """

    graph: Graph
    node: Tensor
    edge: Tensor | None
    y: Tensor
    splits: list[dict[str, Tensor]]
    encodings: dict[str, Tensor] = field(default_factory=dict)

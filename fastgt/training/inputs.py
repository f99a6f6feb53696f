"""A data set as a model takes it: limited, with its encodings, features in the place of types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgt.datasets import Encoded, GraphSet, NodeSet
from fastgt.encodings import laplacian_pe, random_walk_pe
from fastgt.graph import Graph
from fastgt.training.recipe import Recipe


def prepared(recipe: Recipe, data: GraphSet | NodeSet) -> GraphSet | NodeSet:
    """The set that the recipe's model takes; draws no random number of the run's.

    Encodings are those of :data:`ENCODINGS` that a field of the config asks for. Types of nodes
    become features, one for each type, where the config has ``node_features``. Edges leave what
    they carry where the config has neither types nor features of edges.
    """
    c = recipe.config
    if recipe.limit is not None:
        if isinstance(data, NodeSet):
            raise ValueError(f"--limit counts graphs, and {recipe.data} is one graph")
        splits = {**data.splits, "train": data.splits["train"][: recipe.limit]}
        data = _needed(replace(data, splits=splits))
    features = getattr(c, "node_features", 0)
    if features and not data.node.is_floating_point():
        if data.node.dim() != 1:
            raise ValueError(
                f"types of nodes must be [N] to become features, not {data.node.shape}"
            )
        data = replace(data, node=F.one_hot(data.node.long(), features).float())
    if not any(getattr(c, name, 0) for name in ("edge_types", "edge_features")):
        data = replace(data, edge=None)
    graph = data.graph if isinstance(data, NodeSet) else _joined(data)
    found: dict[str, Encoded] = {}
    for name, encode in ENCODINGS.items():
        if getattr(c, name, 0):
            found |= encode(graph, getattr(c, name))
    if isinstance(data, NodeSet):
        return data.with_encodings({name: x.values for name, x in found.items()})
    return data.with_encodings(found)


def _laplacian(graph: Graph, k: int) -> dict[str, Encoded]:
    vectors = laplacian_pe(graph, k)
    assert isinstance(vectors, Tensor)  # no eigenvalues were asked for
    return {"pe": Encoded(vectors, "node")}


def _walks(graph: Graph, steps: int) -> dict[str, Encoded]:
    return {"walk_pe": Encoded(random_walk_pe(graph, steps), "node")}


ENCODINGS: dict[str, Callable[[Graph, Any], dict[str, Encoded]]] = {
    "pe_dim": _laplacian,
    "walk_steps": _walks,
}
"""Field of a config -> what its value wants: arguments of the model, from all graphs at once."""


def _joined(data: GraphSet) -> Graph:
    return data.batch(torch.arange(len(data))).graph


def _needed(data: GraphSet) -> GraphSet:
    """Without the graphs that no split has."""
    return data.subset(torch.cat(list(data.splits.values())).unique())

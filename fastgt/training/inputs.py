"""A data set as a model takes it: limited, with its encodings, features in the place of types."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastgt.datasets import Encoded, GraphSet, NodeSet
from fastgt.encodings import (
    Cache,
    electrostatic_pe,
    heat_kernel_pe,
    laplacian_eigenpairs,
    laplacian_pe,
    random_projection_pe,
    random_walk_pe,
    shortest_paths,
)
from fastgt.graph import Graph
from fastgt.models import expander_table
from fastgt.models.graph_transformer import check_types
from fastgt.training.published_recipes import MODELS
from fastgt.training.recipe import Recipe


def prepared(recipe: Recipe, data: GraphSet | NodeSet, cache: Cache) -> GraphSet | NodeSet:
    """The set that the recipe's model takes.

    Encodings are those of :data:`ENCODINGS` that a field of the config asks for. Types of nodes
    become features, one for each type, column after column, where the config has
    ``node_features``. Edges leave what they carry where the config has neither types nor features
    of edges.
    """
    c = recipe.config
    if recipe.limit is not None:
        if isinstance(data, NodeSet):
            raise ValueError(f"--limit counts graphs, and {recipe.data} is one graph")
        splits = {**data.splits, "train": data.splits["train"][: recipe.limit]}
        data = _needed(replace(data, splits=splits))
    features = getattr(c, "node_features", 0)
    if features and not data.node.is_floating_point():
        data = replace(data, node=_features(data, features))
    if recipe.features == "binary":
        data = replace(data, node=(data.node != 0).float())
    elif recipe.features == "rows":
        data = replace(data, node=data.node / data.node.sum(1, keepdim=True).clamp(min=1))
    if not any(getattr(c, name, 0) for name in ("edge_types", "edge_features")):
        data = replace(data, edge=None)
    if MODELS[recipe.model].self_loops:
        data = _with_loops(data)
    graph, edge = (data.graph, data.edge) if isinstance(data, NodeSet) else _joined(data)
    found: dict[str, Encoded] = {}
    asks = MODELS[recipe.model].encodings
    for name in ENCODINGS if asks is None else asks(c):
        if getattr(c, name, 0):
            found |= ENCODINGS[name](cache, graph, edge, recipe)
    if isinstance(data, NodeSet):
        return data.with_encodings({name: x.values for name, x in found.items()})
    return data.with_encodings(found)


def _laplacian(cache: Cache, graph: Graph, edge: Tensor | None, r: Recipe) -> dict[str, Encoded]:
    return {"pe": Encoded(cache(laplacian_pe, graph, r.config.pe_dim), "node")}


def _walks(cache: Cache, graph: Graph, edge: Tensor | None, r: Recipe) -> dict[str, Encoded]:
    return {"walk_pe": Encoded(cache(random_walk_pe, graph, r.config.walk_steps), "node")}


def _eigenpairs(cache: Cache, graph: Graph, edge: Tensor | None, r: Recipe) -> dict[str, Encoded]:
    normalization = MODELS[r.model].laplacian
    vectors, values = cache(
        laplacian_eigenpairs, graph, r.config.lap_pe, normalization=normalization
    )
    return {"lap_vectors": Encoded(vectors, "node"), "lap_values": Encoded(values, "graph")}


def _stable(cache: Cache, graph: Graph, edge: Tensor | None, r: Recipe) -> dict[str, Encoded]:
    return _vectors(cache, graph, r.config.stable_pe)


def _sign(cache: Cache, graph: Graph, edge: Tensor | None, r: Recipe) -> dict[str, Encoded]:
    return _vectors(cache, graph, r.config.sign_pe)


def _vectors(cache: Cache, graph: Graph, k: int) -> dict[str, Encoded]:
    vectors, _ = cache(laplacian_eigenpairs, graph, k)
    return {"lap_vectors": Encoded(vectors, "node")}


def _heat(cache: Cache, graph: Graph, edge: Tensor | None, r: Recipe) -> dict[str, Encoded]:
    """At the times 1, 2, ..., as GraphGPS's configurations have them."""
    times = tuple(range(1, r.config.heat_times + 1))
    return {"heat_pe": Encoded(cache(heat_kernel_pe, graph, times), "node")}


def _electrostatic(
    cache: Cache, graph: Graph, edge: Tensor | None, r: Recipe
) -> dict[str, Encoded]:
    return {"electrostatic_pe": Encoded(cache(electrostatic_pe, graph), "node")}


def _expander(cache: Cache, graph: Graph, edge: Tensor | None, r: Recipe) -> dict[str, Encoded]:
    """The same for all seeds of a training."""
    return {"expander": Encoded(cache(expander_table, graph, r.config.expander_degree), "node")}


def _paths(cache: Cache, graph: Graph, edge: Tensor | None, r: Recipe) -> dict[str, Encoded]:
    c = r.config
    if not getattr(c, "edge_types", ()):
        none = torch.zeros(graph.num_edges, dtype=torch.uint8)
        length, _ = cache(shortest_paths, graph, none, c.path_distance, edges=1)
        return {"pair_distance": Encoded(length, "pair")}
    if edge is None or edge.dim() != 1:
        found = "nothing" if edge is None else f"{list(edge.shape)}"
        raise ValueError(f"shortest paths need edges with one column of types, got {found}")
    count = c.edge_types[0]
    kinds = check_types("edge", edge, "E", graph.num_edges, count, graph)
    if count <= 256:
        kinds = kinds.to(torch.uint8)  # types of 20 edges stand for every pair of nodes
    kept = getattr(c, "path_edges", c.path_distance)
    length, types = cache(shortest_paths, graph, kinds, c.path_distance, edges=kept)
    return {"pair_distance": Encoded(length, "pair"), "pair_edges": Encoded(types, "pair")}


def _positions(cache: Cache, graph: Graph, edge: Tensor | None, r: Recipe) -> dict[str, Encoded]:
    return {"position": Encoded(cache(random_projection_pe, graph, r.config.position_dim), "node")}


ENCODINGS: dict[str, Callable[[Cache, Graph, Tensor | None, Recipe], dict[str, Encoded]]] = {
    "pe_dim": _laplacian,
    "walk_steps": _walks,
    "lap_pe": _eigenpairs,
    "stable_pe": _stable,
    "sign_pe": _sign,
    "heat_times": _heat,
    "electrostatic_dim": _electrostatic,
    "path_distance": _paths,
    "expander_degree": _expander,
    "position_dim": _positions,
}
"""Field of a config -> what it asks for where it is not 0: the model's arguments by name.

All graphs come at once, with what their edges carry and the recipe.
"""


def _features(data: GraphSet | NodeSet, width: int) -> Tensor:
    """``[N, width]``: 1 at the type of every column, which stand beside each other, else 0."""
    types = data.node.long().reshape(len(data.node), -1)  # [N, columns]
    kinds = getattr(data, "node_types", ()) if types.shape[1] > 1 else (width,)
    if len(kinds) != types.shape[1] or sum(kinds) != width:
        raise ValueError(
            f"node_features must be the sum of the types of nodes' {types.shape[1]} columns, "
            f"{kinds}, got {width}"
        )
    if len(types) and not ((types >= 0) & (types < torch.tensor(kinds))).all():
        raise ValueError(f"types of nodes must be below {kinds}, got {int(types.max())}")
    first = torch.tensor([0, *kinds[:-1]]).cumsum(0)
    return torch.zeros(len(types), width).scatter_(1, types + first, 1.0)


def _with_loops(data: GraphSet | NodeSet) -> NodeSet:
    """One edge of every node to itself, whatever there was."""
    if not isinstance(data, NodeSet) or data.edge is not None:
        raise ValueError("self loops are added to one graph whose edges carry nothing")
    source, target = data.graph.edge_index.long()
    others = torch.stack([source, target])[:, source != target]
    graph = Graph.from_edge_index(others, data.graph.num_nodes)
    return replace(data, graph=graph.with_self_loops())


def _joined(data: GraphSet) -> tuple[Graph, Tensor | None]:
    batch = data.batch(torch.arange(len(data)))
    return batch.graph, batch.edge


def _needed(data: GraphSet) -> GraphSet:
    """Without the graphs that no split has."""
    return data.subset(torch.cat(list(data.splits.values())).unique())

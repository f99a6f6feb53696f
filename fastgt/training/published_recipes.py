"""The tables of ``fastgt train``: models, and how each is trained on which data set.

One entry of ``graph_recipes.py`` or ``node_recipes.py`` is all that a new pair takes: see
``recipe.py``. Names of data sets are those of :data:`fastgt.datasets.DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from torch import nn

from fastgt.models import (
    GTSP,
    SAN,
    CorrespondenceTransformer,
    EdgeGraphTransformer,
    Exphormer,
    GraphClassifier,
    GraphGPS,
    Graphormer,
    GraphormerConfig,
    GraphTransformer,
    GTSPConfig,
    LargeGT,
    LargeGTConfig,
    MPNNVirtualNode,
    Polynormer,
    SGFormer,
    Sparsification,
)
from fastgt.training.graph_recipes import GRAPH_RECIPES
from fastgt.training.loop import Pruning
from fastgt.training.node_recipes import NODE_RECIPES
from fastgt.training.recipe import Recipe

Prune = Callable[[nn.Module, int], Pruning]


class Model(NamedTuple):
    """How a model is made and called.

    Attributes:
        make: Of its config.
        takes_edges: Whether it is called with what edges carry.
        pairs: Whether graphs 2p and 2p + 1 of a set are one example.
        self_loops: Whether every node is to have one edge to itself.
        attention: What the names of its attention's parameters begin with, where those have a
            weight decay of their own.
        laplacian: ``normalization`` of :func:`fastgt.encodings.laplacian_eigenpairs`.
        encodings: Of a config, which of its fields ask for encodings; None for all of them.
        sampled: Whether it is called with the tokens of some nodes in the place of the graph.
        prune: Of a config, what makes the object that prunes a model in so many steps, None where
            nothing is pruned while it trains; None for models that never are.
    """

    make: Callable[[Any], nn.Module]
    takes_edges: bool = False
    pairs: bool = False
    self_loops: bool = False
    attention: tuple[str, ...] = ()
    laplacian: Literal["sym"] | None = None
    encodings: Callable[[Any], tuple[str, ...]] | None = None
    sampled: bool = False
    prune: Callable[[Any], Prune | None] | None = None


def _graphormer(config: GraphormerConfig) -> Graphormer:
    model = Graphormer(config)
    model.draw_as_published()
    return model


def _of_gtsp(config: GTSPConfig) -> tuple[str, ...]:
    return ("walk_steps",) if config.base == "gps" else ("path_distance",)


def _of_large_gt(config: LargeGTConfig) -> tuple[str, ...]:
    return () if config.parts == "local" else ("position_dim",)


def _gtsp_prune(config: GTSPConfig) -> Prune | None:
    if config.share("weights"):
        raise ValueError(
            f"prune must name none of 'weights', got {config.prune}: the epoch that is best may be "
            "one before they are gone; fastgt.models.Sparsification takes them away"
        )
    if not config.share("heads"):
        return None

    def prune(model: nn.Module, steps: int) -> Sparsification:
        assert isinstance(model, GTSP)
        return Sparsification(model, steps=steps)

    return prune


MODELS = {
    "correspondence": Model(CorrespondenceTransformer, pairs=True),
    "edge_graph_transformer": Model(EdgeGraphTransformer, takes_edges=True),
    "exphormer": Model(Exphormer, takes_edges=True),
    "graph_transformer": Model(GraphTransformer),
    "graph_classifier": Model(GraphClassifier),
    "graph_gps": Model(GraphGPS, takes_edges=True),
    "graphormer": Model(_graphormer),
    "gtsp": Model(GTSP, encodings=_of_gtsp, prune=_gtsp_prune),
    "large_gt": Model(LargeGT, encodings=_of_large_gt, sampled=True),
    "mpnn_virtual_node": Model(MPNNVirtualNode, takes_edges=True),
    "polynormer": Model(Polynormer, self_loops=True),
    "san": Model(SAN, takes_edges=True, laplacian="sym"),
    "sgformer": Model(SGFormer, attention=("embed.", "after.", "layers.")),
}

_THEIRS = {
    "zinc12k": "pyg:ZINC",
    "pattern": "pyg:PATTERN",
    "cluster": "pyg:CLUSTER",
    "molhiv": "ogb:ogbg-molhiv",
    "cora": "pyg:Cora",
    "citeseer": "pyg:CiteSeer",
    "minesweeper": "pyg:Minesweeper",
    "tolokers": "pyg:Tolokers",
}
_SMALLER = [
    replace(recipe, data=f"{recipe.data}_small", published=None)
    for recipe in GRAPH_RECIPES
    if recipe.data in ("pattern", "cluster", "molhiv")
]
"""Sets of the same kind, trained in the same way."""

_DOWNLOADED = [
    replace(recipe, data=_THEIRS[recipe.data])
    for recipe in (*GRAPH_RECIPES, *NODE_RECIPES)
    if recipe.data in _THEIRS
]
"""Sets of torch-geometric and OGB: those that were published."""

RECIPES: dict[tuple[str, str], Recipe] = {
    (x.model, x.data): x
    for x in sorted(
        [*GRAPH_RECIPES, *NODE_RECIPES, *_SMALLER, *_DOWNLOADED], key=lambda x: (x.model, x.data)
    )
}
"""(model, data set) -> recipe."""

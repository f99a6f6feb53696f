"""The tables of ``fastgt train``: models, and how each is trained on which data set.

One entry of ``RECIPES`` is all that a new pair takes: see ``recipe.py``. Names of data sets are
those of :data:`fastgt.datasets.DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from fastgt.models import (
    EdgeGraphTransformer,
    EdgeGraphTransformerConfig,
    GraphClassifier,
    GraphClassifierConfig,
    GraphGPS,
    GraphGPSConfig,
    GraphTransformer,
    GraphTransformerConfig,
)
from fastgt.training.recipe import Published, Recipe


class Model(NamedTuple):
    """A model of a config, and whether it is called with what edges carry."""

    make: Callable[[Any], nn.Module]
    takes_edges: bool


MODELS = {
    "edge_graph_transformer": Model(EdgeGraphTransformer, takes_edges=True),
    "graph_transformer": Model(GraphTransformer, takes_edges=False),
    "graph_classifier": Model(GraphClassifier, takes_edges=False),
    "graph_gps": Model(GraphGPS, takes_edges=True),
}

_DWIVEDI = "Dwivedi and Bresson, arXiv 2012.09699"
_RAMPASEK = "Rampasek et al., arXiv 2205.12454"

# Adam, halved on a plateau until below 1e-6, no decay
_GRAPH_TRANSFORMER: dict[str, Any] = {
    "loss": "class_weighted_cross_entropy",
    "metric": "class_accuracy",
    "lr": 5e-4,
    "patience": 10,
    "seed": 41,
}
_GPS: dict[str, Any] = {
    "optimizer": "adamw",
    "weight_decay": 1e-5,
    "schedule": "cosine",
    "clip": 1.0,
}

_ENTRIES = [
    Recipe(
        "edge_graph_transformer",
        "zinc12k",
        EdgeGraphTransformerConfig(),
        Published(0.226, 0.014, _DWIVEDI),
        loss="l1",
        metric="mae",
        lr=7e-4,
        patience=15,
        batch_size=128,
        seed=41,
    ),
    Recipe(
        "graph_transformer",
        "pattern",
        GraphTransformerConfig(node_types=3, out_dim=2, pe_dim=2),
        Published(0.84808, 0.00068, _DWIVEDI),
        batch_size=26,
        **_GRAPH_TRANSFORMER,
    ),
    Recipe(
        "graph_transformer",
        "cluster",
        GraphTransformerConfig(node_types=7, out_dim=6, pe_dim=10),
        Published(0.73169, 0.00622, _DWIVEDI),
        batch_size=32,
        **_GRAPH_TRANSFORMER,
    ),
    Recipe(
        "graph_classifier",
        "dd",
        GraphClassifierConfig(89, 2, dim=64, heads=8, layers=4),
        patience=5,
        batch_size=16,
        epochs=15,
    ),
    Recipe(
        "graph_gps",
        "zinc12k",
        GraphGPSConfig.published("zinc"),
        Published(0.070, 0.004, _RAMPASEK),
        loss="l1",
        metric="mae",
        lr=1e-3,
        warmup=50,
        epochs=2000,
        batch_size=32,
        **_GPS,
    ),
    Recipe(
        "graph_gps",
        "pattern",
        GraphGPSConfig.published("pattern"),
        Published(0.86685, 0.00059, _RAMPASEK),
        loss="class_weighted_cross_entropy",
        metric="class_accuracy",
        lr=5e-4,
        warmup=5,
        epochs=100,
        batch_size=32,
        **_GPS,
    ),
    Recipe(
        "graph_gps",
        "cluster",
        GraphGPSConfig.published("cluster"),
        Published(0.78016, 0.0018, _RAMPASEK),
        loss="class_weighted_cross_entropy",
        metric="class_accuracy",
        lr=5e-4,
        warmup=5,
        epochs=100,
        batch_size=16,
        **_GPS,
    ),
    Recipe(
        "graph_gps",
        "molhiv",
        GraphGPSConfig.published("ogbg_molhiv"),
        Published(0.7880, 0.0101, _RAMPASEK),
        loss="binary_cross_entropy",
        metric="roc_auc",
        lr=1e-4,
        warmup=5,
        epochs=100,
        batch_size=32,
        **_GPS,
    ),
    Recipe(
        "graph_gps",
        "dd",
        GraphGPSConfig(
            out_dim=2,
            node_types=(89,),
            edge_types=(),
            layers=4,
            local="gin",
            walk_dim=16,
            head="default",
        ),
        lr=1e-3,
        weight_decay=1e-5,
        epochs=100,
        batch_size=16,
    ),
]
"""The settings of GPS are those of the authors' configurations."""

_SMALLER = [
    replace(recipe, data=f"{recipe.data}_small", published=None)
    for recipe in _ENTRIES
    if recipe.data in ("pattern", "cluster", "molhiv")
]
"""Sets of the same kind, trained in the same way."""

RECIPES: dict[tuple[str, str], Recipe] = {
    (x.model, x.data): x for x in sorted([*_ENTRIES, *_SMALLER], key=lambda x: (x.model, x.data))
}
"""(model, data set) -> recipe."""

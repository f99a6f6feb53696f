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
    Polynormer,
    PolynormerConfig,
    SGFormer,
    SGFormerConfig,
)
from fastgt.training.recipe import Published, Recipe


class Model(NamedTuple):
    """How a model is made and called.

    Attributes:
        make: Of its config.
        takes_edges: Whether it is called with what edges carry.
        self_loops: Whether every node is to have one edge to itself.
        attention: What the names of its attention's parameters begin with, where those have a
            weight decay of their own.
    """

    make: Callable[[Any], nn.Module]
    takes_edges: bool = False
    self_loops: bool = False
    attention: tuple[str, ...] = ()


MODELS = {
    "edge_graph_transformer": Model(EdgeGraphTransformer, takes_edges=True),
    "graph_transformer": Model(GraphTransformer),
    "graph_classifier": Model(GraphClassifier),
    "graph_gps": Model(GraphGPS, takes_edges=True),
    "polynormer": Model(Polynormer, self_loops=True),
    "sgformer": Model(SGFormer, attention=("embed.", "after.", "layers.")),
}

_DWIVEDI = "Dwivedi and Bresson, arXiv 2012.09699"
_RAMPASEK = "Rampasek et al., arXiv 2205.12454"
_WU = "Wu et al., arXiv 2306.10759"
_WU_CITATIONS = f"{_WU}, on a random split of their own"
_DENG = "Deng et al., arXiv 2403.01232"

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

_PEPTIDES: dict[str, Any] = {
    **_GPS,
    "weight_decay": 0.0,
    "lr": 3e-4,
    "warmup": 10,
    "epochs": 200,
    "batch_size": 128,
}
_SGFORMER: dict[str, Any] = {"schedule": "constant", "epochs": 500, "stop_after": 200}

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
    *(
        Recipe(
            "graph_gps",
            data,
            GraphGPSConfig.published(data.rpartition(":")[2].lower()),
            Published(value, deviation, _RAMPASEK),
            lr=1e-3,
            warmup=5,
            epochs=100,
            batch_size=16,
            **_GPS,
        )
        for data, value, deviation in (
            ("pyg:MNIST", 0.98051, 0.00126),
            ("pyg:CIFAR10", 0.72298, None),
        )
    ),
    Recipe(
        "graph_gps",
        "pyg:Peptides-func",
        GraphGPSConfig.published("peptides_func"),
        Published(0.6535, 0.0041, _RAMPASEK),
        loss="binary_cross_entropy",
        metric="average_precision",
        **_PEPTIDES,
    ),
    Recipe(
        "graph_gps",
        "pyg:Peptides-struct",
        GraphGPSConfig.published("peptides_struct"),
        Published(0.2500, 0.0005, _RAMPASEK),
        loss="l1",
        metric="mae",
        **_PEPTIDES,
    ),
    Recipe(
        "sgformer",
        "cora",
        SGFormerConfig.published("cora"),
        Published(0.845, 0.008, _WU_CITATIONS),
        lr=0.01,
        attention_decay=1e-3,
        weight_decay=5e-4,
        features="binary",
        **_SGFORMER,
    ),
    Recipe(
        "sgformer",
        "citeseer",
        SGFormerConfig.published("citeseer"),
        Published(0.726, 0.002, _WU_CITATIONS),
        lr=0.005,
        weight_decay=0.01,
        features="binary",
        **_SGFORMER,
    ),
    Recipe(
        "sgformer",
        "actor",
        SGFormerConfig.published("actor"),
        Published(0.379, 0.011, _WU),
        lr=0.1,
        weight_decay=5e-4,
        features="rows",
        **{**_SGFORMER, "epochs": 200},
    ),
    Recipe(
        "sgformer",
        "squirrel_filtered",
        SGFormerConfig.published("squirrel"),
        Published(0.418, 0.022, _WU),
        lr=0.001,
        weight_decay=5e-4,
        features="rows",
        **_SGFORMER,
    ),
    Recipe(
        "polynormer",
        "minesweeper",
        PolynormerConfig.published("minesweeper"),
        Published(0.9746, 0.0036, _DENG),
        metric="roc_auc",
        schedule="constant",
        local_epochs=100,
        epochs=2100,
    ),
    Recipe(
        "polynormer",
        "tolokers",
        PolynormerConfig.published("tolokers"),
        Published(0.8591, 0.0074, _DENG),
        metric="roc_auc",
        schedule="constant",
        local_epochs=100,
        epochs=900,
    ),
    Recipe(
        "polynormer",
        "amazon_computers",
        PolynormerConfig.published("amazon_computers"),
        Published(0.9368, 0.0021, f"{_DENG}, on a split of their own"),
        weight_decay=5e-5,
        schedule="constant",
        local_epochs=200,
        epochs=1200,
        features="rows",
    ),
]
"""Settings are those of the authors' configurations and scripts."""

_THEIRS = {
    "zinc12k": "pyg:ZINC",
    "pattern": "pyg:PATTERN",
    "cluster": "pyg:CLUSTER",
    "molhiv": "ogb:ogbg-molhiv",
}
_SMALLER = [
    replace(recipe, data=f"{recipe.data}_small", published=None)
    for recipe in _ENTRIES
    if recipe.data in ("pattern", "cluster", "molhiv")
]
"""Sets of the same kind, trained in the same way."""

_DOWNLOADED = [
    replace(recipe, data=_THEIRS[recipe.data]) for recipe in _ENTRIES if recipe.data in _THEIRS
]
"""Sets of torch-geometric and OGB: those that were published."""

RECIPES: dict[tuple[str, str], Recipe] = {
    (x.model, x.data): x
    for x in sorted([*_ENTRIES, *_SMALLER, *_DOWNLOADED], key=lambda x: (x.model, x.data))
}
"""(model, data set) -> recipe."""

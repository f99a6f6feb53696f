"""Every module and model, once: how it is made of a width and heads, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fastgt.models import (
    SAN,
    EdgeGraphTransformer,
    EdgeGraphTransformerConfig,
    Exphormer,
    ExphormerConfig,
    GraphClassifier,
    GraphClassifierConfig,
    GraphGPS,
    GraphGPSConfig,
    GraphTransformer,
    GraphTransformerConfig,
    MPNNVirtualNode,
    MPNNVirtualNodeConfig,
    Polynormer,
    PolynormerConfig,
    SANConfig,
    SGFormer,
    SGFormerConfig,
)
from fastgt.models.graph_gps_layer import GlobalAttention, GraphGPSLayer
from fastgt.models.graph_transformer import GraphTransformerEdgeLayer, GraphTransformerLayer
from fastgt.models.package_classifier import PackageClassifier, PackageClassifierConfig
from fastgt.models.sgformer import SGFormerLayer
from fastgt.nn import (
    EdgeGatedAttention,
    LinearAttention,
    NeighborhoodAttention,
    VirtualNode,
)
from fastgt.pruning import SkipLayer, TokenPruning


@dataclass(frozen=True)
class Given:
    """What modules are called with; what a test refuses stands in the place of the real thing."""

    graph: Any
    offsets: Any = None
    x: Any = None  # [N, dim]
    edge: Tensor | None = None  # [E, edge_dim]
    state: Tensor | None = None  # [G, dim]
    node_type: Tensor | None = None
    edge_type: Tensor | None = None
    pe: Tensor | None = None
    word_ptr: Tensor | None = None
    word: Tensor | None = None


class Module(NamedTuple):
    """``make(dim, heads, **options)``, and ``call`` of what it made, with options of its own."""

    make: Callable[..., nn.Module]
    call: Callable[..., Any]


def _configured(model: type, config: type, **defaults: Any) -> Callable[..., nn.Module]:
    def make(dim: int, heads: int, **options: Any) -> nn.Module:
        return model(config(dim=dim, heads=heads, **defaults | options))

    return make


def _featured(model: type, config: type, **defaults: Any) -> Callable[..., nn.Module]:
    """Of a model whose nodes have features."""

    def make(dim: int, heads: int, **options: Any) -> nn.Module:
        return model(config(dim, 2, dim=dim, heads=heads, **defaults | options))

    return make


def _performer(dim: int, heads: int, **options: Any) -> nn.Module:
    pytest.importorskip("torch_geometric")
    from fastgt.pyg import PerformerAttention

    return PerformerAttention(dim, heads, **options)


def _conv(dim: int, heads: int, **options: Any) -> nn.Module:
    pytest.importorskip("torch_geometric")
    from fastgt.pyg import TransformerConv

    return TransformerConv(dim, dim // heads, heads, **options)


def _mpnn_vn(dim: int, heads: int, **options: Any) -> nn.Module:
    return MPNNVirtualNode(MPNNVirtualNodeConfig(dim=dim, node_types=3, **options))


def _spectrum(given: Given, count: int) -> dict[str, Tensor]:
    nodes = 0 if given.node_type is None else len(given.node_type)
    return {"lap_vectors": torch.ones(nodes, count), "lap_values": torch.ones(1, count)}


BARE = {"node_types": 3, "walk_steps": 0, "walk_dim": 0}
MODULES = {
    "NeighborhoodAttention": Module(
        NeighborhoodAttention, lambda m, b, **how: m(b.x, b.graph, **how)
    ),
    "EdgeGatedAttention": Module(
        EdgeGatedAttention, lambda m, b, **how: m(b.x, b.edge, b.graph, **how)
    ),
    "LinearAttention": Module(LinearAttention, lambda m, b, **how: m(b.x, b.offsets, **how)),
    "PerformerAttention": Module(_performer, lambda m, b: m(b.x, offsets=b.offsets)),
    "TransformerConv": Module(_conv, lambda m, b: m(b.x, b.graph)),
    "TransformerConv with edges": Module(_conv, lambda m, b: m(b.x, b.graph, b.edge)),
    "VirtualNode": Module(
        lambda dim, heads: VirtualNode(dim), lambda m, b: m(b.x, b.state, b.offsets)
    ),
    "GlobalAttention": Module(GlobalAttention, lambda m, b, **how: m(b.x, b.offsets, **how)),
    "GraphGPSLayer": Module(GraphGPSLayer, lambda m, b: m(b.x, b.edge, b.graph)),
    "GraphTransformerLayer": Module(GraphTransformerLayer, lambda m, b: m(b.x, b.graph)),
    "GraphTransformerEdgeLayer": Module(
        GraphTransformerEdgeLayer, lambda m, b: m(b.x, b.edge, b.graph)
    ),
    "TokenPruning": Module(lambda dim, heads: TokenPruning(dim), lambda m, b: m(b.x, b.graph)),
    "SkipLayer": Module(
        lambda dim, heads: SkipLayer(GraphTransformerLayer(dim, heads)),
        lambda m, b: m(b.x, b.graph),
    ),
    "GraphTransformer": Module(
        _configured(GraphTransformer, GraphTransformerConfig, node_types=3, out_dim=2),
        lambda m, b: m(b.node_type, b.graph, b.pe),
    ),
    "EdgeGraphTransformer": Module(
        _configured(EdgeGraphTransformer, EdgeGraphTransformerConfig, node_types=3, edge_types=2),
        lambda m, b: m(b.node_type, b.edge_type, b.graph, b.pe),
    ),
    "GraphGPS": Module(
        _configured(GraphGPS, GraphGPSConfig, edge_types=2, **BARE),
        lambda m, b: m(b.node_type, b.edge_type, b.graph),
    ),
    "GraphGPS without edges": Module(
        _configured(GraphGPS, GraphGPSConfig, edge_types=(), **BARE),
        lambda m, b: m(b.node_type, None, b.graph),
    ),
    "Polynormer": Module(_featured(Polynormer, PolynormerConfig), lambda m, b: m(b.x, b.graph)),
    "SGFormer": Module(_featured(SGFormer, SGFormerConfig), lambda m, b: m(b.x, b.graph)),
    "SGFormerLayer": Module(SGFormerLayer, lambda m, b: m(b.x, b.offsets)),
    "Exphormer": Module(
        _configured(
            Exphormer,
            ExphormerConfig,
            node_types=3,
            node_features=0,
            edge_types=2,
            edge_features=0,
            expander_degree=0,
            stable_pe=0,
        ),
        lambda m, b: m(b.node_type, b.edge_type, b.graph),
    ),
    "MPNNVirtualNode": Module(_mpnn_vn, lambda m, b: m(b.node_type, b.edge_type, b.graph)),
    "SAN": Module(
        _configured(SAN, SANConfig, node_types=3, edge_types=2, lap_pe=2, lap_dim=4),
        lambda m, b: m(b.node_type, b.edge_type, b.graph, **_spectrum(b, 2)),
    ),
    "GraphClassifier": Module(
        _configured(GraphClassifier, GraphClassifierConfig, node_types=3, out_dim=2),
        lambda m, b: m(b.node_type, b.graph),
    ),
    "PackageClassifier": Module(
        _configured(
            PackageClassifier, PackageClassifierConfig, vocabulary=5, edge_kinds=2, classes=3
        ),
        lambda m, b: m(b.word_ptr, b.word, b.graph, b.edge_type),
    ),
}

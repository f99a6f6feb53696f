"""Models on torch-geometric's layers, with the parameters of ours.

Attention is a ``MessagePassing``, a layer of GPS is a ``GPSConv``, pooling is ``global_mean_pool``
or ``global_add_pool``; the rest is ours. ``GPS`` has the layers of fastgt.pyg, with Performer.
``GraphGPS`` is the reference model, with a softmax over each graph.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgt import Graph, segment_mean
from fastgt.datasets.zinc import ATOM_TYPES, BOND_TYPES
from fastgt.models import (
    EdgeGraphTransformer,
    GraphClassifier,
    GraphGPS,
    GraphTransformer,
    gps_conv_state_dict,
)
from fastgt.models.graph_transformer import readout

_PACKED = re.compile(r"attention\.[qkv]\.")  # one matrix of all three there


def on_pyg(ours: Any, *, repaired: bool = False) -> nn.Module:
    """The same model, parameters copied, on torch-geometric's layers; ImportError without it.

    ``repaired``: GPS without padded keys in the denominators, where torch-geometric counts them.
    """
    theirs = copy.deepcopy(ours)
    if isinstance(ours, GPS):
        theirs.layers = nn.ModuleList(_gps_conv(layer, repaired) for layer in ours.layers)
    elif isinstance(ours, GraphGPS):
        theirs.layers = nn.ModuleList(_graph_gps_conv(layer) for layer in ours.layers)
    else:
        neighborhood, edge_gated = _attention_layers()
        attention = edge_gated if isinstance(ours, EdgeGraphTransformer) else neighborhood
        for layer in theirs.layers:
            layer.attention = attention(layer.attention)
    theirs.__class__ = _ON_PYG[type(ours)]
    return theirs


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with a gradient by our names, in one order, whoever's layers it has. Those of
    projections that torch-geometric keeps in one matrix come last."""
    found = {name: x for name, x in module.named_parameters() if x.requires_grad}
    if not isinstance(module, GraphGPS):
        return found
    ours = found
    if isinstance(module, OnPyG):
        ours = {name: x for name, x in found.items() if not name.startswith("layers.")}
        for i, layer in enumerate(module.layers):
            named = gps_conv_state_dict(dict(layer.named_parameters()))
            ours |= {f"layers.{i}.{name}": x for name, x in named.items() if x.is_leaf}
    alone = {name: ours[name] for name in sorted(ours) if not _PACKED.search(name)}
    known = {id(x) for x in alone.values()}
    return alone | {name: x for name, x in found.items() if id(x) not in known}


def shared(ours: nn.Module) -> tuple[str, ...]:
    """Names of our parameters that both have alone."""
    packed = isinstance(ours, GraphGPS)
    return tuple(name for name in trained(ours) if not (packed and _PACKED.search(name)))


class Edges(NamedTuple):
    """A batch's edges as torch-geometric takes them."""

    edge_index: Tensor  # [2, E]
    batch: Tensor  # [N] the graph of each node
    graphs: int


class GPSLayer(nn.Module):
    """As torch-geometric's ``GPSConv(GINEConv, attn_type="performer")``, and its parameters."""

    def __init__(self, dim: int, heads: int, width: int):
        from fastgt.pyg import GINEConv, PerformerAttention

        super().__init__()
        update = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.conv = GINEConv(update, edge_dim=dim)
        self.attn = PerformerAttention(dim, heads, width)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Dropout(0.0), nn.Linear(2 * dim, dim)
        )
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm1d(dim) for _ in range(3))

    def forward(self, x: Tensor, e: Tensor, graph: Graph) -> Tensor:
        out = self.norm1(self.conv(x, graph, e) + x)
        out = out + self.norm2(self.attn(x, offsets=graph.graph_ptr) + x)
        return self.norm3(out + self.mlp(out))


class GPS(nn.Module):
    """GPS layers (Rampasek et al., arXiv 2205.12454) between embeddings and a mean over nodes."""

    def __init__(self, dim: int, heads: int, width: int, layers: int):
        super().__init__()
        self.embed = nn.Embedding(ATOM_TYPES, dim)
        self.embed_edge = nn.Embedding(BOND_TYPES, dim)
        self.layers = nn.ModuleList(GPSLayer(dim, heads, width) for _ in range(layers))
        self.readout = readout(dim, 1)

    def forward(self, node_type: Tensor, edge_type: Tensor, graph: Graph) -> Tensor:
        x, e = self.embed(node_type), self.embed_edge(edge_type)
        for layer in self.layers:
            x = layer(x, e, graph)
        return self.readout(segment_mean(x, graph.graph_ptr))


class OnPyG:
    """Takes :class:`Edges` where our model takes a graph."""


class _PyGTransformer(OnPyG, GraphTransformer):
    def forward(self, node_type: Tensor, edges: Edges) -> Tensor:  # type: ignore[override]
        x = self.embed(node_type)
        for layer in self.layers:
            x = layer(x, edges)
        return self.readout(x)


class _PyGEdgeTransformer(OnPyG, EdgeGraphTransformer):
    def forward(  # type: ignore[override]
        self, node_type: Tensor, edge_type: Tensor, edges: Edges
    ) -> Tensor:
        x, e = self.embed(node_type), self.embed_edge(edge_type)
        for i, layer in enumerate(self.layers, 1):
            x, e = layer(x, e, edges, edge_output=i < len(self.layers))
        return self.readout(_mean(x, edges))


class _PyGClassifier(OnPyG, GraphClassifier):
    def forward(self, node_type: Tensor, edges: Edges) -> Tensor:  # type: ignore[override]
        from torch_geometric.utils import degree

        found = degree(edges.edge_index[1], len(node_type), dtype=self.embed.weight.dtype)
        x = self.embed(node_type) + self.embed_degree(found.log1p()[:, None])
        for layer in self.layers:
            x = layer(x, edges)
        return self.readout(_mean(x, edges))


class _PyGGPS(OnPyG, GPS):
    def forward(  # type: ignore[override]
        self, node_type: Tensor, edge_type: Tensor, edges: Edges
    ) -> Tensor:
        x, e = self.embed(node_type), self.embed_edge(edge_type)
        for layer in self.layers:
            x = layer(x, edges.edge_index, edges.batch, edge_attr=e)
        return self.readout(_mean(x, edges))


class _PyGGraphGPS(OnPyG, GraphGPS):
    def forward(  # type: ignore[override]
        self, node_type: Tensor, edge_type: Tensor, edges: Edges
    ) -> Tensor:
        from torch_geometric.nn import global_add_pool

        embed: Any = self.embed
        embed_edge: Any = self.embed_edge
        x, e = embed.embed[0](node_type), embed_edge.embed[0](edge_type)
        for layer in self.layers:
            x = layer(x, edges.edge_index, edges.batch, edge_attr=e)
        x = global_add_pool(x, edges.batch, edges.graphs)
        for linear in self.readout.layers[:-1]:
            x = torch.relu(linear(x))
        return self.readout.layers[-1](x)


_ON_PYG: dict[type[nn.Module], type[nn.Module]] = {
    GraphTransformer: _PyGTransformer,
    EdgeGraphTransformer: _PyGEdgeTransformer,
    GraphClassifier: _PyGClassifier,
    GPS: _PyGGPS,
    GraphGPS: _PyGGraphGPS,
}


def _mean(x: Tensor, edges: Edges) -> Tensor:
    from torch_geometric.nn import global_mean_pool

    return global_mean_pool(x, edges.batch, edges.graphs)


@functools.cache
def _attention_layers() -> tuple[type[nn.Module], type[nn.Module]]:
    """NeighborhoodAttention and EdgeGatedAttention as ``MessagePassing``."""
    from torch_geometric.nn import MessagePassing
    from torch_geometric.utils import scatter, softmax

    class Attention(MessagePassing):
        def __init__(self, ours: Any):
            super().__init__(aggr="add", node_dim=0)
            for name, child in ours.named_children():
                self.add_module(name, child)
            self.heads: int = ours.heads
            self.root = math.sqrt(ours.head_dim)
            self.clamp: float = ours.logit_clamp
            self.denominator_eps: float = ours.denominator_eps

        def into_heads(self, layer: nn.Module, x: Tensor) -> Tensor:
            return layer(x).unflatten(-1, (self.heads, -1))

    class Neighborhood(Attention):
        def forward(self, x: Tensor, edges: Edges, *, edge_bias: None = None) -> Tensor:
            q, k, v = (self.into_heads(layer, x) for layer in (self.q, self.k, self.v))
            return self.out(self.propagate(edges.edge_index, q=q, k=k, v=v).flatten(1))

        def message(
            self, q_i: Tensor, k_j: Tensor, v_j: Tensor, index: Tensor, size_i: int
        ) -> Tensor:
            logit = (q_i * k_j).sum(-1) / self.root
            weight = softmax(logit.clamp(-self.clamp, self.clamp), index, num_nodes=size_i)
            return weight[..., None] * v_j

    class EdgeGated(Attention):
        def forward(
            self, x: Tensor, e: Tensor, edges: Edges, *, edge_output: bool
        ) -> tuple[Tensor, Tensor | None]:
            q, k, v = (self.into_heads(layer, x) for layer in (self.q, self.k, self.v))
            gate = self.into_heads(self.gate, e)
            t = self.edge_updater(edges.edge_index, q=q, k=k, gate=gate)
            # utils.softmax has no eps that counts: sums as in the authors' code
            weight = t.sum(-1, keepdim=True).clamp(-self.clamp, self.clamp).exp()
            total = scatter(weight, edges.edge_index[1], dim_size=len(x))
            found = self.propagate(edges.edge_index, v=v, weight=weight)
            x = self.out((found / (total + self.denominator_eps)).flatten(1))
            return x, self.edge_out(t.flatten(1)) if edge_output else None

        def edge_update(self, q_i: Tensor, k_j: Tensor, gate: Tensor) -> Tensor:
            return q_i * k_j / self.root * gate

        def message(self, v_j: Tensor, weight: Tensor) -> Tensor:
            return weight * v_j

    return Neighborhood, EdgeGated


def _gps_conv(ours: Any, repaired: bool) -> nn.Module:
    from torch_geometric.nn import GINEConv, GPSConv

    from fastgt.bench.linear_attention import _pyg

    dim, weight = ours.attn.attn_out.out_features, ours.attn.attn_out.weight
    conv = GINEConv(copy.deepcopy(ours.conv.nn), edge_dim=dim)
    theirs = GPSConv(dim, conv, ours.attn.heads, attn_type="performer")
    theirs.attn = _pyg(ours.attn, repaired)
    # torch-geometric's norms hold torch's
    state = {re.sub(r"^(norm\d)", r"\1.module", k): x for k, x in ours.state_dict().items()}
    theirs.load_state_dict(state)
    if repaired:
        theirs.attn.register_forward_pre_hook(_tell_mask, with_kwargs=True)
    return theirs.to(weight)


def _graph_gps_conv(ours: Any) -> nn.Module:
    """Of a layer of GINE and softmax attention."""
    from torch_geometric.nn import GINEConv, GPSConv

    dim = ours.dim
    update = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))
    theirs = GPSConv(dim, GINEConv(update), ours.attention.heads, attn_type="multihead")
    state = ours.state_dict()
    # parts of matrices are views of them
    for name, x in gps_conv_state_dict(theirs.state_dict()).items():
        x.copy_(state[name])
    return theirs.to(ours.norm.weight)


def _tell_mask(attn: nn.Module, args: Any, kwargs: Any) -> None:
    attn.key_mask = kwargs["mask"][:, None, :, None]

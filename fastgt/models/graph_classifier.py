"""Graph Transformer that classifies whole graphs by the kinds and degrees of their nodes.

    h_i^0 = embedding_type(i) + W log(1 + |N(i)|)
    h_i^l = layer_l(h^{l-1})_i                         as in ``graph_transformer.py``
    y_g   = readout(mean_{i in g} h_i^L)

N(i) are the in-neighbours as given; no self loop is added. Nodes have no positions: a layer sees a
graph through its edges alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.models.graph_transformer import (
    GraphTransformerLayer,
    Norm,
    check_config,
    check_types,
    readout,
)
from fastgt.nn import HeadGate
from fastgt.nn.sublayers import reset_sublayers
from fastgt.ops.checks import check_graph
from fastgt.ops.segment_pool import segment_mean


@dataclass
class GraphClassifierConfig:
    """Settings of :class:`GraphClassifier`.

    Attributes:
        node_types: How many kinds of nodes there are.
        out_dim: Classes.
        dim: Width of a node's features; a multiple of ``heads``.
        heads: Of every attention.
        layers: Attention and feed-forward, so many times.
        norm: ``"batch"`` or ``"layer"``, after every residual. In training a batch norm needs two
            nodes, and refuses one.
        dropout: Inside the layers.
        gated: Give each layer a :class:`fastgt.nn.HeadGate`, all heads active: its mask may be
            written into, by :class:`fastgt.pruning.HeadSparsity` for example.
    """

    node_types: int
    out_dim: int
    dim: int = 64
    heads: int = 8
    layers: int = 4
    norm: Norm = "batch"
    dropout: float = 0.0
    gated: bool = False

    def __post_init__(self) -> None:
        check_config(self, "node_types", "out_dim", "dim", "heads", "layers")


class GraphClassifier(nn.Module):
    """Logits for every graph of a batch with typed nodes.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import GraphClassifier, GraphClassifierConfig
        >>> model = GraphClassifier(GraphClassifierConfig(node_types=3, out_dim=2))
        >>> edge_index = torch.tensor([[0, 1, 3, 4], [1, 0, 4, 3]])
        >>> graph = Graph.from_edge_index(edge_index, graph_ptr=torch.tensor([0, 3, 5]))
        >>> model(torch.tensor([0, 2, 1, 1, 0]), graph).shape
        torch.Size([2, 2])
    """

    def __init__(self, config: GraphClassifierConfig):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.node_types, c.dim)
        self.embed_degree = nn.Linear(1, c.dim)
        self.layers = nn.ModuleList(
            GraphTransformerLayer(
                c.dim,
                c.heads,
                norm=c.norm,
                dropout=c.dropout,
                head_gate=HeadGate(torch.ones(c.heads, dtype=torch.bool)) if c.gated else None,
            )
            for _ in range(c.layers)
        )
        self.readout = readout(c.dim, c.out_dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, node_type: Tensor, graph: Graph) -> Tensor:
        """node_type ``[N]`` integers -> logits ``[G, out_dim]``."""
        check_graph(graph)
        kinds = self.config.node_types
        node_type = check_types("node_type", node_type, "N", graph.num_rows, kinds, graph)
        x = self.embed(node_type)
        x = x + self.embed_degree(graph.row_degree.to(x.dtype).log1p()[:, None])
        for layer in self.layers:
            x = layer(x, graph)
        return self.readout(segment_mean(x, graph.graph_ptr))

"""Graph Transformer, node version (Dwivedi and Bresson, arXiv 2012.09699).

    h_i' = norm(h_i + W_o dropout(sum_{j in N(i)} w_ij v_j / sum_j w_ij))
    w_ij = exp(clamp(q_i . k_j / sqrt(d_h), -5, 5))
    h_i'' = norm(h_i' + W_2 dropout(relu(W_1 h_i')))

N(i) are the in-neighbours as given; no self loop is added. The denominator has no epsilon, and
where the authors' code gives NaN for an isolated node, here it attends to nothing and gets 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fastgt.encodings import flip_signs
from fastgt.graph import Graph
from fastgt.nn import NeighborhoodAttention


@dataclass
class GraphTransformerConfig:
    """Settings of :class:`GraphTransformer`; defaults are the authors' for PATTERN and CLUSTER.

    Attributes:
        node_types: How many kinds of nodes there are.
        out_dim: Classes.
        dim: Width of a node's features; a multiple of ``heads``.
        heads: Of every attention.
        layers: Attention and feed-forward, so many times.
        pe_dim: Laplacian eigenvectors of a node; 0 for a model without encodings.
        norm: ``"batch"`` or ``"layer"``, after every residual.
        in_dropout: Of the embedded nodes.
        dropout: Inside the layers.
    """

    node_types: int
    out_dim: int
    dim: int = 80
    heads: int = 8
    layers: int = 10
    pe_dim: int = 0
    norm: Literal["batch", "layer"] = "batch"
    in_dropout: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("node_types", "out_dim", "dim", "heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.pe_dim < 0:
            raise ValueError(f"pe_dim must not be negative, got {self.pe_dim}")


class GraphTransformerLayer(nn.Module):
    """Attention and feed-forward, each with a residual and a norm after it.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models.graph_transformer import GraphTransformerLayer
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> GraphTransformerLayer(80, heads=8)(torch.randn(3, 80), graph).shape
        torch.Size([3, 80])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        norm: Literal["batch", "layer"] = "batch",
        dropout: float = 0.0,
    ):
        super().__init__()
        if norm not in ("batch", "layer"):
            raise ValueError(f"norm must be 'batch' or 'layer', got {norm!r}")
        make_norm = nn.BatchNorm1d if norm == "batch" else nn.LayerNorm
        self.attention = NeighborhoodAttention(
            dim, heads, bias=False, dropout=dropout, logit_clamp=5.0
        )
        self.norm1 = make_norm(dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim)
        )
        self.norm2 = make_norm(dim)

    def forward(self, x: Tensor, graph: Graph, *, edge_bias: Tensor | None = None) -> Tensor:
        """x ``[N, dim]``, edge_bias ``[E, H]`` -> ``[N, dim]``."""
        x = self.norm1(x + self.attention(x, graph, edge_bias=edge_bias))
        return self.norm2(x + self.ffn(x))


class GraphTransformer(nn.Module):
    """Node classification on batches of graphs with typed nodes.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import GraphTransformer, GraphTransformerConfig
        >>> model = GraphTransformer(GraphTransformerConfig(node_types=3, out_dim=2))
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> model(torch.tensor([0, 2, 1]), graph).shape
        torch.Size([3, 2])
    """

    def __init__(self, config: GraphTransformerConfig):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.node_types, c.dim)
        self.embed_pe = nn.Linear(c.pe_dim, c.dim) if c.pe_dim else None
        self.in_dropout = nn.Dropout(c.in_dropout)
        self.layers = nn.ModuleList(
            GraphTransformerLayer(c.dim, c.heads, norm=c.norm, dropout=c.dropout)
            for _ in range(c.layers)
        )
        self.readout = nn.Sequential(
            nn.Linear(c.dim, c.dim // 2),
            nn.ReLU(),
            nn.Linear(c.dim // 2, c.dim // 4),
            nn.ReLU(),
            nn.Linear(c.dim // 4, c.out_dim),
        )

    def forward(self, node_type: Tensor, graph: Graph, pe: Tensor | None = None) -> Tensor:
        """node_type ``[N]`` integers, pe ``[N, pe_dim]`` -> logits ``[N, out_dim]``.

        In training every eigenvector gets one random sign for the whole batch.
        """
        n, pe_dim = graph.num_rows, self.config.pe_dim
        if node_type.shape != (n,) or node_type.is_floating_point():
            found = f"{list(node_type.shape)} {node_type.dtype}"
            raise ValueError(f"node_type must be [N] = [{n}] integers, got {found}")
        if (None if pe is None else tuple(pe.shape)) != ((n, pe_dim) if pe_dim else None):
            wanted = f"[N, pe_dim] = [{n}, {pe_dim}]" if pe_dim else "None (pe_dim is 0)"
            raise ValueError(f"pe must be {wanted}, got {None if pe is None else list(pe.shape)}")
        x = self.embed(node_type)
        if pe is not None and self.embed_pe is not None:
            x = x + self.embed_pe(flip_signs(pe) if self.training else pe)
        x = self.in_dropout(x)
        for layer in self.layers:
            x = layer(x, graph)
        return self.readout(x)

"""Graph Transformer, node and edge version (Dwivedi and Bresson, arXiv 2012.09699).

Node version, for graphs whose nodes are classified:

    h_i' = norm(h_i + W_o dropout(sum_{j in N(i)} w_ij v_j / sum_j w_ij))
    w_ij = exp(clamp(q_i . k_j / sqrt(d_h), -5, 5))
    h_i'' = norm(h_i' + W_2 dropout(relu(W_1 h_i')))

N(i) are the in-neighbours as given; no self loop is added. The denominator has no epsilon, and
where the authors' code gives NaN for an isolated node, here it attends to nothing and gets 0.

Edge version, for whole graphs: edges gate the products, channel by channel (*), and are updated:

    t_ij = (q_i * k_j) / sqrt(d_h) * W_e e_ij
    w_ij = exp(clamp(sum_d t_ij, -5, 5))
    h_i' = norm(h_i + W_o dropout(sum_{j in N(i)} w_ij v_j / (sum_j w_ij + 1e-6)))
    e_ij' = norm(e_ij + W_oe dropout(t_ij))

each followed by a feed-forward of its own, as above.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgt.encodings import flip_signs
from fastgt.graph import Graph
from fastgt.nn import EdgeGatedAttention, NeighborhoodAttention
from fastgt.nn.sublayers import check_rows, reset_sublayers
from fastgt.ops.checks import (
    autocasts,
    check_float,
    check_graph,
    check_square,
    integer,
    readable,
)
from fastgt.ops.segment_pool import segment_mean

Norm = Literal["batch", "layer"]
_NORM = ", or take norm='layer'"
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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
        norm: ``"batch"`` or ``"layer"``, after every residual. In training a batch norm needs two
            nodes, and refuses one.
        in_dropout: Of the embedded nodes.
        dropout: Inside the layers.
    """

    node_types: int
    out_dim: int
    dim: int = 80
    heads: int = 8
    layers: int = 10
    pe_dim: int = 0
    norm: Norm = "batch"
    in_dropout: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_config(self, "node_types", "out_dim", "dim", "heads", "layers", "pe_dim")


@dataclass
class EdgeGraphTransformerConfig:
    """Settings of :class:`EdgeGraphTransformer`; defaults are the authors' for ZINC.

    Attributes:
        node_types, edge_types: How many kinds of nodes and of edges there are.
        out_dim: Numbers to predict for a graph.
        dim: Width of a node's and of an edge's features; a multiple of ``heads``.
        heads: Of every attention.
        layers: Attention and feed-forward, so many times.
        pe_dim: Laplacian eigenvectors of a node; 0 for a model without encodings.
        norm: ``"batch"`` or ``"layer"``, after every residual. In training a batch norm needs two
            nodes and two edges, or no edge, and refuses one.
        in_dropout: Of the embedded nodes.
        dropout: Inside the layers.
        last_edges: Whether the last layer has the parameters of an edge branch, as in the authors'
            code and parameter counts. Nothing uses them: without, every parameter gets a gradient,
            as ``DistributedDataParallel`` wants it.
    """

    node_types: int = 28
    edge_types: int = 4
    out_dim: int = 1
    dim: int = 64
    heads: int = 8
    layers: int = 10
    pe_dim: int = 8
    norm: Norm = "batch"
    in_dropout: float = 0.0
    dropout: float = 0.0
    last_edges: bool = True

    def __post_init__(self) -> None:
        check_config(
            self, "node_types", "edge_types", "out_dim", "dim", "heads", "layers", "pe_dim"
        )


class GraphTransformerLayer(nn.Module):
    """Attention and feed-forward, each with a residual and a norm after it.

    ``head_gate``: a module whose heads the attention masks, :class:`fastgt.nn.HeadGate` for
    example; a gate that requires a gradient gets the exact one, of masked heads too.

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
        norm: Norm = "batch",
        dropout: float = 0.0,
        head_gate: nn.Module | None = None,
    ):
        super().__init__()
        dim = integer("dim", dim, 1)
        self.attention = NeighborhoodAttention(
            dim,
            heads,
            bias=False,
            dropout=dropout,
            logit_clamp=5.0,
            head_gate=head_gate,
            dense_gate_grad=True,
        )
        self.norm1 = _norm(norm, dim)
        self.ffn = _feed_forward(dim, dropout)
        self.norm2 = _norm(norm, dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, graph: Graph, *, edge_bias: Tensor | None = None) -> Tensor:
        """x ``[N, dim]``, edge_bias ``[E, H]`` -> ``[N, dim]``."""
        attended = self.attention(x, graph, edge_bias=edge_bias)
        check_rows(self.norm1, x, "norm1 of GraphTransformerLayer", "node", _NORM)
        x = self.norm1(x + attended)
        return self.norm2(x + self.ffn(x))


class GraphTransformerEdgeLayer(nn.Module):
    """Gated attention, then a feed-forward for nodes and one for edges; residuals, norms after.

    ``head_gate``: as of :class:`GraphTransformerLayer`. ``edge_output=False``: edges come out as
    they came, and there are no parameters for more.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models.graph_transformer import GraphTransformerEdgeLayer
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2, 0], [1, 2, 0, 2]]))
        >>> layer = GraphTransformerEdgeLayer(64, heads=8)
        >>> x, e = layer(torch.randn(3, 64), torch.randn(4, 64), graph)
        >>> x.shape, e.shape
        (torch.Size([3, 64]), torch.Size([4, 64]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        norm: Norm = "batch",
        dropout: float = 0.0,
        edge_output: bool = True,
        head_gate: nn.Module | None = None,
    ):
        super().__init__()
        dim = integer("dim", dim, 1)
        self.attention = EdgeGatedAttention(
            dim,
            heads,
            dropout=dropout,
            edge_output=edge_output,
            logit_clamp=5.0,
            denominator_eps=1e-6,
            head_gate=head_gate,
            dense_gate_grad=True,
        )
        self.norm1 = _norm(norm, dim)
        self.ffn = _feed_forward(dim, dropout)
        self.norm2 = _norm(norm, dim)
        if edge_output:
            self.edge_norm1 = _norm(norm, dim)
            self.edge_ffn = _feed_forward(dim, dropout)
            self.edge_norm2 = _norm(norm, dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(
        self, x: Tensor, e: Tensor, graph: Graph, *, edge_output: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """x ``[N, dim]``, e ``[E, dim]`` -> the same shapes; e as it came without edge_output,
        which is by default what the layer was made with."""
        attended, scores = self.attention(x, e, graph, edge_output=edge_output)
        check_rows(self.norm1, x, "norm1 of GraphTransformerEdgeLayer", "node", _NORM)
        if scores is not None:
            name = "edge_norm1 of GraphTransformerEdgeLayer"
            check_rows(self.edge_norm1, e, name, "edge", _NORM)
        x = self.norm1(x + attended)
        x = self.norm2(x + self.ffn(x))
        if scores is not None:
            e = self.edge_norm1(e + scores)
            e = self.edge_norm2(e + self.edge_ffn(e))
        return x, e


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
        self.readout = readout(c.dim, c.out_dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, node_type: Tensor, graph: Graph, pe: Tensor | None = None) -> Tensor:
        """node_type ``[N]`` integers, pe ``[N, pe_dim]`` -> logits ``[N, out_dim]``.

        In training every eigenvector gets one random sign for the whole batch.
        """
        check_graph(graph)
        c, n = self.config, graph.num_rows
        node_type = check_types("node_type", node_type, "N", n, c.node_types, graph)
        check_pe(pe, n, c.pe_dim, self.embed_pe)
        x = self.embed(node_type)
        if pe is not None and self.embed_pe is not None:
            x = x + self.embed_pe(flip_signs(pe) if self.training else pe)
        x = self.in_dropout(x)
        for layer in self.layers:
            x = layer(x, graph)
        return self.readout(x)


class EdgeLayers(nn.Module):
    """Typed nodes and typed edges, embedded, and layers of both: what stands before a head.

    Args:
        config: With ``dim``, ``heads``, ``layers``, ``pe_dim``, ``norm``, ``dropout`` and
            ``last_edges``, as of :class:`EdgeGraphTransformerConfig`.
        node_types, edge_types: How many there are.
        in_dropout: Of the embeddings of nodes.
    """

    def __init__(self, config: Any, node_types: int, edge_types: int, in_dropout: float):
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(node_types, c.dim)
        self.embed_pe = nn.Linear(c.pe_dim, c.dim) if c.pe_dim else None
        self.embed_edge = nn.Embedding(edge_types, c.dim)
        self.in_dropout = nn.Dropout(in_dropout)
        self.layers = nn.ModuleList(
            GraphTransformerEdgeLayer(
                c.dim,
                c.heads,
                norm=c.norm,
                dropout=c.dropout,
                edge_output=i < c.layers or c.last_edges,
            )
            for i in range(1, c.layers + 1)
        )

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def encode(
        self, node: Tensor, edge: Tensor, graph: Graph, pe: Tensor | None, *, suffix: str = ""
    ) -> Tensor:
        """node ``[N]``, edge ``[E]`` integers, pe ``[N, pe_dim]`` -> ``[N, dim]``.

        In training every eigenvector gets one random sign for the whole batch. ``suffix`` ends the
        names of node and edge in messages.
        """
        n = check_square(graph, shared=True)
        kinds = self.embed.num_embeddings, self.embed_edge.num_embeddings
        node = check_types(f"node{suffix}", node, "N", n, kinds[0], graph)
        edge = check_types(f"edge{suffix}", edge, "E", graph.num_edges, kinds[1], graph)
        check_pe(pe, n, self.config.pe_dim, self.embed_pe)
        x = self.in_dropout(self.embed(node))
        if pe is not None and self.embed_pe is not None:
            x = x + self.embed_pe(flip_signs(pe) if self.training else pe)
        e = self.embed_edge(edge)
        for i, layer in enumerate(self.layers, 1):
            x, e = layer(x, e, graph, edge_output=i < len(self.layers))
        return x


class EdgeGraphTransformer(EdgeLayers):
    """Numbers for every graph of a batch with typed nodes and typed edges.

    Nodes are averaged over each graph before the readout. The edges of the last layer reach no
    output: its edge branch is there, as in the authors' code and parameter counts, but is not
    computed and gets no gradient. With ``last_edges=False`` it is not there, as suits
    ``DistributedDataParallel``.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import EdgeGraphTransformer, EdgeGraphTransformerConfig
        >>> model = EdgeGraphTransformer(EdgeGraphTransformerConfig(pe_dim=0))
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> model(torch.tensor([0, 27, 1]), torch.tensor([1, 3, 2]), graph).shape
        torch.Size([1, 1])
    """

    def __init__(self, config: EdgeGraphTransformerConfig):
        super().__init__(config, config.node_types, config.edge_types, config.in_dropout)
        self.readout = readout(config.dim, config.out_dim)

    def forward(
        self, node_type: Tensor, edge_type: Tensor, graph: Graph, pe: Tensor | None = None
    ) -> Tensor:
        """node_type ``[N]``, edge_type ``[E]`` integers, pe ``[N, pe_dim]`` -> ``[G, out_dim]``.

        In training every eigenvector gets one random sign for the whole batch.
        """
        x = self.encode(node_type, edge_type, graph, pe, suffix="_type")
        return self.readout(segment_mean(x, graph.graph_ptr))


def _norm(kind: Norm, dim: int) -> nn.Module:
    if kind not in ("batch", "layer"):
        raise ValueError(f"norm must be 'batch' or 'layer', got {kind!r}")
    return nn.BatchNorm1d(dim) if kind == "batch" else nn.LayerNorm(dim)


def _feed_forward(dim: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim)
    )


def readout(dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dim, dim // 2),
        nn.ReLU(),
        nn.Linear(dim // 2, dim // 4),
        nn.ReLU(),
        nn.Linear(dim // 4, out_dim),
    )


def check_config(config: Any, *names: str) -> None:
    """Sizes become Python ints."""
    for name in names:
        setattr(config, name, integer(name, getattr(config, name), 0 if name == "pe_dim" else 1))


def check_types(name: str, x: object, letter: str, size: int, kinds: int, graph: Graph) -> Tensor:
    """Types of nodes or edges as an embedding takes them: int32 or int64.

    Their range is checked where their values are at hand: on a GPU the embedding does that.
    """
    if not isinstance(x, Tensor):
        hint = f"torch.as_tensor({name}) makes one"
        raise TypeError(f"{name} must be a tensor of integers, got {type(x).__name__}: {hint}")
    if x.dtype not in _INTEGERS or x.layout != torch.strided:
        found = f"{x.dtype} ({x.layout})"
        raise TypeError(f"{name} must hold integers (uint8 or int8 to int64), got {found}")
    if x.shape != (size,):
        raise ValueError(f"{name} must be [{letter}] = [{size}] integers, got {list(x.shape)}")
    if x.device != graph.device:
        raise ValueError(f"{name} is on {x.device} but graph is on {graph.device}")
    if readable(x):
        wide = x.long()  # a narrow type would wrap kinds
        wrong = ((wide < 0) | (wide >= kinds)).nonzero().flatten()
        if len(wrong):
            found = f"{int(x[wrong[0]])} at {int(wrong[0])}"
            raise ValueError(f"{name} must be from 0 to {kinds - 1}, got {found}")
    return x if x.dtype in (torch.int32, torch.int64) else x.long()


def check_dtype(name: str, x: Tensor, weight: Tensor) -> None:
    """Refuse numbers of another dtype than the model's, but under autocast, which casts both."""
    if x.dtype != weight.dtype and not autocasts(x.device.type):
        hint = f"{name}.to({weight.dtype}) makes it so"
        raise TypeError(f"{name} must be {weight.dtype}, as the model is, got {x.dtype}: {hint}")


def check_pe(pe: Tensor | None, n: int, pe_dim: int, embed: nn.Linear | None) -> None:
    if pe is not None:
        check_float("pe", pe)
    if (None if pe is None else tuple(pe.shape)) != ((n, pe_dim) if pe_dim else None):
        wanted = f"[N, pe_dim] = [{n}, {pe_dim}]" if pe_dim else "None (pe_dim is 0)"
        raise ValueError(f"pe must be {wanted}, got {None if pe is None else list(pe.shape)}")
    if pe is not None and embed is not None:
        check_dtype("pe", pe, embed.weight)

"""A layer of GraphGPS: its global attention, its norm of graphs, and the block around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.models.deepsets import DeepSets
from fastgt.models.graph_gps_bigbird import BigBirdAttention, check_pattern
from fastgt.models.graph_gps_encoders import check_matrix
from fastgt.models.graph_gps_local import (
    WITH_EDGES,
    WITH_FACTOR,
    Activation,
    GatedGCN,
    Local,
    edge_width,
    make_activation,
    make_local,
)
from fastgt.nn import LinearAttention
from fastgt.nn.gated_heads import GatedHeads
from fastgt.nn.sublayers import check_rows, reset_sublayers
from fastgt.ops.checks import check_float, check_graph, check_offsets, check_square, integer
from fastgt.ops.global_attention import global_attention
from fastgt.ops.segment_pool import segment_mean, virtual_node

Attention = Literal["none", "softmax", "performer", "linear", "bigbird", "deepsets"]
GPSNorm = Literal["batch", "graph", "none"]
_ATTENTION = ("none", "softmax", "performer", "linear", "bigbird", "deepsets")


class GlobalAttention(GatedHeads):
    """Softmax attention of every node over its graph, with its projections.

    ``out = W_o concat_h attention(W_q x, W_k x, W_v x)``

    Args:
        dim: Width of the input and the output.
        heads: Divides ``dim``.
        dropout: Probability of dropping a weight of the attention, in training.
        head_gate, dense_gate_grad: As for :class:`fastgt.nn.NeighborhoodAttention`.

    Example:
        >>> import torch
        >>> from fastgt.models.graph_gps_layer import GlobalAttention
        >>> GlobalAttention(64, heads=4)(torch.randn(10, 64), torch.tensor([0, 3, 10])).shape
        torch.Size([10, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        dropout: float = 0.0,
        head_gate: nn.Module | None = None,
        dense_gate_grad: bool = False,
    ):
        super().__init__(head_gate, dense_gate_grad)
        dim, heads = integer("dim", dim, 1), integer("heads", heads, 1)
        if dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, heads, dim // heads
        self.dropout, self.impl = dropout, None
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        offsets: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        head_gate: Tensor | None = None,
    ) -> Tensor:
        """x ``[N, dim]``; offsets ``[G + 1]``, None for one graph -> ``[N, dim]``.

        bias is that of :func:`fastgt.global_attention`, of keys or of pairs.
        """
        check_float("x", x)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x must be [N, {self.dim}], got {list(x.shape)}")
        gate = self.gate_of(head_gate, x)
        q, k, v = (self.into_heads(name, x, gate) for name in ("q", "k", "v"))
        if q.shape[1]:
            attended = global_attention(
                q,
                k,
                v,
                offsets,
                bias=gate.heads(bias),
                dropout_p=self.dropout if self.training else 0.0,
                head_gate=gate.values,
                dense_gate_grad=gate.dense,
            )
        else:
            if offsets is not None:
                check_offsets(offsets, len(x), x.device)
            attended = self.without_heads(q, k, v)
        return self.out_of_heads("out", gate.scaled(attended), gate)


class GraphNorm(nn.Module):
    """A norm over all nodes and channels of each graph, then a weight and a bias of channels.

    Source:
        ``torch_geometric.nn.LayerNorm`` with ``mode="graph"``.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def reset_parameters(self) -> None:
        """Weights of 1, biases of 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x ``[N, dim]``, offsets ``[G + 1]`` -> ``[N, dim]``."""
        mean = segment_mean(x.mean(1, keepdim=True), offsets)
        centred = x - _to_nodes(mean, x, offsets)
        variance = segment_mean(centred.square().mean(1, keepdim=True), offsets)
        scale = _to_nodes((variance + self.eps).rsqrt(), x, offsets)
        return centred * scale * self.weight + self.bias


class GraphGPSLayer(nn.Module):
    """Message passing beside global attention, then a feed-forward; residuals, norms after.

    Args:
        dim, heads, local, attention, performer_width, norm, activation, dropout,
            attention_dropout, learn_temperature: As of :class:`GraphGPSConfig`.
        stable: Whether messages have a factor, of the distances given to a call.
        edge_output: Whether GatedGCN has what updates edges. False: they come out as they came.
        beside: Whether every call is given a third branch, which a model computes itself.
        head_gate: As for :class:`fastgt.nn.NeighborhoodAttention`, of the global attention.
        softmax: The class of ``attention="softmax"``, or what makes one of its arguments.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models.graph_gps_layer import GraphGPSLayer
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2, 0], [1, 2, 0, 2]]))
        >>> layer = GraphGPSLayer(64, heads=4, local="gatedgcn")
        >>> x, e = layer(torch.randn(3, 64), torch.randn(4, 64), graph)
        >>> x.shape, e.shape
        (torch.Size([3, 64]), torch.Size([4, 64]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        local: Local = "gine",
        attention: Attention = "softmax",
        performer_width: int = 64,
        norm: GPSNorm = "batch",
        activation: Activation = "relu",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        stable: bool = False,
        learn_temperature: bool = False,
        edge_output: bool = True,
        beside: bool = False,
        head_gate: nn.Module | None = None,
        softmax: Callable[..., GlobalAttention] = GlobalAttention,
    ):
        super().__init__()
        dim, heads = integer("dim", dim, 1), integer("heads", heads, 1)
        if attention not in _ATTENTION:
            raise ValueError(f"attention must be one of {list(_ATTENTION)}, got {attention!r}")
        if norm not in ("batch", "graph", "none"):
            raise ValueError(f"norm must be 'batch', 'graph' or 'none', got {norm!r}")
        if local == attention == "none" and not beside:
            raise ValueError("local and attention are both 'none': a layer has one at least")
        if head_gate is not None and attention in ("none", "deepsets"):
            raise ValueError(f"head_gate must be None: attention={attention!r} has no heads")
        performer_width = integer("performer_width", performer_width, 1)
        self.dim, self.edge_output, self.beside = dim, edge_output, beside
        self.local = make_local(
            local,
            dim,
            heads,
            activation=activation,
            dropout=dropout,
            stable=stable,
            edge_output=edge_output,
            learn_temperature=learn_temperature,
        )
        self.local_kind, self.stable = local, stable
        if self.local is not None:
            # GatedGCN drops within
            self.local_dropout = None if local == "gatedgcn" else nn.Dropout(dropout)
            self.local_norm = _norm(norm, dim)
        self.attention: GlobalAttention | LinearAttention | BigBirdAttention | DeepSets | None = (
            None
        )
        if attention == "bigbird":
            self.attention = BigBirdAttention(dim, heads, dropout=dropout, head_gate=head_gate)
        elif attention == "deepsets":
            self.attention = DeepSets(dim)
        elif attention == "softmax":
            self.attention = softmax(
                dim, heads, dropout=attention_dropout, head_gate=head_gate, dense_gate_grad=True
            )
        elif attention != "none":
            performer = attention == "performer"
            self.attention = LinearAttention(
                dim,
                heads,
                head_dim=performer_width if performer else None,
                feature_map="softmax" if performer else "elu",
                eps=0.0 if performer else 1e-6,
                bias=not performer,
                head_gate=head_gate,
                dense_gate_grad=True,
            )
        if self.attention is not None:
            after = attention_dropout if attention in ("performer", "linear") else 0.0
            self.attention_dropout = nn.Sequential(nn.Dropout(after), nn.Dropout(dropout))
            self.attention_norm = _norm(norm, dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, 2 * dim),
            make_activation(activation),
            nn.Dropout(dropout),
            nn.Linear(2 * dim, dim),
            nn.Dropout(dropout),
        )
        self.norm = _norm(norm, dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(
        self,
        x: Tensor,
        e: Tensor | None,
        graph: Graph,
        *,
        distance: Tensor | None = None,
        bias: Tensor | None = None,
        pattern: Graph | None = None,
        beside: Tensor | None = None,
        edge_output: bool | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x ``[N, dim]``, e ``[E, dim]``, distance ``[E, 1]`` -> x and e of the same shapes.

        bias ``[P, H]`` is one of pairs, or ``[N, H]`` of keys, for a softmax over each graph.
        pattern is that of :func:`fastgt.models.graph_gps_bigbird.bigbird_pattern`, for BigBird.
        beside ``[N, dim]`` is added to the other branches, in a layer made for that.
        e is None where the kind of message passing takes none, distance without stable encodings.
        e comes out as it came but from GatedGCN, and without edge_output, which is by default
        what the layer was made with.
        """
        check_graph(graph)
        update = self._check(x, graph, e, distance, edge_output)
        check_rows(self.norm, x, "norm of GraphGPSLayer", "node", ", or take norm='graph'")
        offsets, parts = graph.graph_ptr, []
        if self.local is not None:
            if isinstance(self.local, GatedGCN):
                assert e is not None
                y, e = self.local(x, graph, e, distance, edge_output=update)
            else:
                assert self.local_dropout is not None
                y = x + self.local_dropout(self._received(x, graph, e, distance))
            parts.append(_normed(self.local_norm, y, offsets))
        if isinstance(self.attention, BigBirdAttention):
            pattern = check_pattern(pattern, graph)
        elif pattern is not None:
            raise ValueError("pattern must be None: only attention='bigbird' has one")
        if self.attention is not None:
            if bias is None:
                attended = self.attention(x, offsets if pattern is None else pattern)
            elif isinstance(self.attention, GlobalAttention):
                attended = self.attention(x, offsets, bias=bias)
            else:
                raise ValueError("bias must be None: only attention='softmax' has one")
            y = x + self.attention_dropout(attended)
            parts.append(_normed(self.attention_norm, y, offsets))
        if self.beside:
            check_matrix("beside", beside, "N, dim", (graph.num_rows, self.dim))
            assert beside is not None
            parts.append(beside)
        elif beside is not None:
            raise ValueError("beside must be None: the layer was made with beside=False")
        x = sum(parts[1:], parts[0])
        return _normed(self.norm, x + self.ffn(x), offsets), e

    def _received(
        self, x: Tensor, graph: Graph, e: Tensor | None, distance: Tensor | None
    ) -> Tensor:
        assert self.local is not None
        if e is None or self.local_kind not in WITH_EDGES:
            return self.local(x, graph)
        if self.local_kind in WITH_FACTOR:
            return self.local(x, graph, e, distance)
        return self.local(x, graph, e)

    def _check(
        self,
        x: Tensor,
        graph: Graph,
        e: Tensor | None,
        distance: Tensor | None,
        edge_output: bool | None,
    ) -> bool:
        n, edges, dim = check_square(graph, shared=True), graph.num_edges, self.dim
        check_matrix("x", x, "N, dim", (n, dim))
        if self.local_kind in WITH_EDGES:
            check_matrix("e", e, "E, dim", (edges, edge_width(self.local_kind, dim)))
        elif e is not None:
            raise ValueError(f"e must be None: local={self.local_kind!r} uses no edges")
        if self.stable:
            check_matrix("distance", distance, "E, 1", (edges, 1))
        elif distance is not None:
            raise ValueError("distance must be None: the layer was made with stable=False")
        if edge_output and not self.edge_output:
            raise ValueError("edge_output=True, but the module was made with edge_output=False")
        return self.edge_output if edge_output is None else edge_output

    def extra_repr(self) -> str:
        return f"local={self.local_kind!r}, stable={self.stable}"


def _norm(kind: GPSNorm, dim: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    return nn.BatchNorm1d(dim) if kind == "batch" else GraphNorm(dim)


def _normed(norm: nn.Module, x: Tensor, offsets: Tensor) -> Tensor:
    return norm(x, offsets) if isinstance(norm, GraphNorm) else norm(x)


def _to_nodes(of_graphs: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """``[G, 1]`` -> ``[N, 1]``; unlike an index, its gradient has one order on a GPU too."""
    return virtual_node(of_graphs.new_zeros(x.shape[0], 1), of_graphs, offsets)[0]

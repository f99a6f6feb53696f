"""The message passing of a GraphGPS layer: one module for each kind.

All of them take x ``[N, dim]`` and, where they use edges, e ``[E, dim]``, and give ``[N, dim]``.
PNA takes e of 128 channels at most.
N(i) are the in-neighbours as given. The factor r_ij of stable encodings is 1 without them.

GCN           W (x_i / d_i + sum_{j in N(i), j != i} x_j / sqrt(d_i d_j)) + b,  d_i = 1 + |N(i) - i|
GIN           MLP(x_i + sum_j x_j)
GINE          MLP(x_i + sum_j r_ij relu(x_j + e_ij))
GENConv       MLP(x_i + sum_j a_ij m_ij),  m_ij = relu(x_j + e_ij) + 1e-7, a_ij the softmax of
              t m_ij over j, channel by channel
GAT           sum_{j in N(i) + i} a_ij W x_j + b, a softmax of a leaky ReLU; i's own edge is the
              mean of those that reach it
PNA           W U concat(x_i, mean, max, sum of m_ij over j),  m_ij = M concat(x_i, x_j, F e_ij)
attention     softmax attention over N(i), with a bias of edges for every head
GatedGCN      A x_i + sum_j s_ij B x_j / (sum_j s_ij + 1e-6),  s_ij = r_ij sigmoid(e'_ij),
              e'_ij = C e_ij + D x_i + E x_j

The last one has norms, activations and residuals of its own, and gives new edges too. GENConv's MLP
has a batch norm.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from fastgt.contract import AuxRequest
from fastgt.graph import Graph
from fastgt.nn import NeighborhoodAttention
from fastgt.nn.sublayers import check_rows, reset_sublayers
from fastgt.ops.additive_attention import additive_attention
from fastgt.ops.aggregate import aggregate
from fastgt.ops.channelwise_attention import channelwise_attention
from fastgt.ops.gated_aggregate import gated_aggregate

Local = Literal["none", "gcn", "gin", "gine", "genconv", "gat", "pna", "attention", "gatedgcn"]
Activation = Literal["relu", "gelu"]
LOCAL = ("none", "gcn", "gin", "gine", "genconv", "gat", "pna", "attention", "gatedgcn")
WITH_EDGES = ("gine", "genconv", "gat", "pna", "attention", "gatedgcn")
WITH_FACTOR = ("gine", "gatedgcn")


def make_local(
    kind: Local,
    dim: int,
    heads: int,
    *,
    activation: Activation,
    dropout: float,
    stable: bool,
    edge_output: bool,
    learn_temperature: bool,
) -> nn.Module | None:
    """The module of that kind; None for ``"none"``."""
    if kind not in LOCAL:
        raise ValueError(f"local must be one of {list(LOCAL)}, got {kind!r}")
    if stable and kind not in WITH_FACTOR:
        raise ValueError(
            f"local must be one of {list(WITH_FACTOR)} with stable encodings, got {kind!r}"
        )
    if learn_temperature and kind != "genconv":
        raise ValueError(f"learn_temperature must be False with local={kind!r}, got True")
    if kind == "none":
        return None
    if kind == "gcn":
        return GCN(dim)
    if kind == "gin":
        return GINE(dim, activation=activation, edges=False)
    if kind == "gine":
        return GINE(dim, activation=activation, stable=stable)
    if kind == "genconv":
        return GENConv(dim, learn_temperature=learn_temperature)
    if kind == "gat":
        return GAT(dim, heads)
    if kind == "pna":
        return PNA(dim)
    if kind == "attention":
        return EdgeBiasedAttention(dim, heads)
    return GatedGCN(
        dim, activation=activation, dropout=dropout, stable=stable, edge_output=edge_output
    )


def make_activation(kind: Activation) -> nn.Module:
    if kind not in ("relu", "gelu"):
        raise ValueError(f"activation must be 'relu' or 'gelu', got {kind!r}")
    return nn.ReLU() if kind == "relu" else nn.GELU()


def edge_width(kind: Local, dim: int) -> int:
    """How wide the edges are that a kind takes in a layer of that width."""
    return min(dim, 128) if kind == "pna" else dim


def edge_distance(p: Tensor, graph: Graph) -> Tensor:
    """``|p_i - p_j|^2`` of every edge, ``[E, 1]``, from encodings ``[N, C]``."""
    # the op's gradients have one order, those of an index on a GPU do not
    request = AuxRequest(edge_scores=True)
    _, aux = gated_aggregate(p, graph, gate_row=p, gate_col=-p, return_aux=request)
    assert aux.edge_scores is not None
    return aux.edge_scores.square().sum(1, keepdim=True)


class GCN(nn.Module):
    """A graph convolution with self loops; a self loop that is there already stands for it.

    ``out_dim``: how wide the result is, as wide as the input by default.

    Source:
        Kipf and Welling, arXiv 1609.02907, eq. 2, as ``torch_geometric.nn.GCNConv`` has it.
    """

    def __init__(self, dim: int, out_dim: int | None = None):
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        self.lin = nn.Linear(dim, out_dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_dim))

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        y = self.lin(x)
        weight = _no_loops(graph, y.dtype)
        norm = (1 + aggregate(None, graph, edge_value=weight[:, None])).rsqrt()
        y = norm * y
        return norm * (y + aggregate(y, graph, edge_weight=weight)) + self.bias


class GINE(nn.Module):
    """A sum of neighbours, with edges or without them, before a network of two layers.

    Where messages have factors, the authors' class adds the second node of a batch to all sums.
    Here it is each node's own, as without factors.

    Source:
        Xu et al., arXiv 1810.00826, eq. 4.1, with eps 0; edges as in Hu et al., arXiv 1905.12265;
        the factor as in Wang et al., arXiv 2203.00199.
    """

    def __init__(
        self, dim: int, *, activation: Activation, edges: bool = True, stable: bool = False
    ):
        super().__init__()
        self.edges = edges
        self.mlp = nn.Sequential(
            nn.Linear(dim, dim), make_activation(activation), nn.Linear(dim, dim)
        )
        self.factor = _factor(dim, "relu") if stable else None

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(
        self, x: Tensor, graph: Graph, e: Tensor | None = None, distance: Tensor | None = None
    ) -> Tensor:
        weight = None if self.factor is None else self.factor(distance).squeeze(1)
        activation: Literal["relu"] | None = "relu" if self.edges else None
        received = aggregate(
            x,
            graph,
            edge_value=e if self.edges else None,
            edge_weight=weight,
            activation=activation,
        )
        return self.mlp(x + received)


class GENConv(nn.Module):
    """A softmax over the neighbours, channel by channel, before a network of two layers.

    ``learn_temperature``: t is a parameter, for all channels; else it is 1.

    Source:
        Li et al., DeeperGCN, arXiv 2006.07739, eqs. 2 to 4, as ``torch_geometric.nn.GENConv`` has
        it by default.
    """

    def __init__(self, dim: int, *, learn_temperature: bool = False):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1)) if learn_temperature else None
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim, bias=False),
            nn.BatchNorm1d(2 * dim),
            nn.ReLU(),
            nn.Linear(2 * dim, dim, bias=False),
        )

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)
        if self.temperature is not None:
            nn.init.ones_(self.temperature)

    def forward(self, x: Tensor, graph: Graph, e: Tensor) -> Tensor:
        check_rows(self.mlp, x, "mlp of GENConv", "node")
        # x_j + e_ij; the op's gradients have one order, those of an index on a GPU do not
        request = AuxRequest(edge_scores=True)
        _, aux = gated_aggregate(x, graph, e, gate_col=x, return_aux=request)
        assert aux.edge_scores is not None
        message = aux.edge_scores.relu() + 1e-7
        logit = message if self.temperature is None else self.temperature * message
        return self.mlp(x + channelwise_attention(logit, None, graph, edge_value=message))


class GAT(nn.Module):
    """Additive attention over the neighbours and the node itself.

    The node's own edge is added here, by the log-sum-exp of the others. A self loop that is there
    already is left out. The parameters are drawn as torch-geometric draws those of attention.

    Source:
        Velickovic et al., arXiv 1710.10903, eq. 3, with edges as ``torch_geometric.nn.GATConv``
        has them.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        self.heads = heads
        self.lin = nn.Linear(dim, dim, bias=False)
        self.lin_edge = nn.Linear(dim, dim, bias=False)
        self.source, self.target, self.edge = (
            nn.Parameter(torch.empty(heads, dim // heads)) for _ in range(3)
        )
        self.bias = nn.Parameter(torch.zeros(dim))
        self._draw()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)
        self._draw()

    def _draw(self) -> None:
        for x in (self.source, self.target, self.edge):
            bound = math.sqrt(6 / sum(x.shape))
            nn.init.uniform_(x, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, graph: Graph, e: Tensor) -> Tensor:
        v = self.lin(x).unflatten(1, (self.heads, -1))
        query, key = (v * self.target).sum(-1), (v * self.source).sum(-1)
        term = (self.lin_edge(e).unflatten(1, (self.heads, -1)) * self.edge).sum(-1)
        weight = _no_loops(graph, v.dtype)
        count = aggregate(None, graph, edge_value=weight[:, None])
        own = aggregate(None, graph, edge_value=term, edge_weight=weight) / count.clamp(min=1)
        others, aux = additive_attention(
            query[..., None],
            key[..., None],
            v,
            graph,
            v.new_ones(self.heads, 1),
            edge_key=term[..., None],
            edge_bias=weight.log()[:, None].expand(-1, self.heads),
            negative_slope=0.2,
            return_aux=AuxRequest(lse=True),
        )
        assert aux.lse is not None
        logit = nn.functional.leaky_relu(query + key + own, 0.2)
        share = (aux.lse.to(logit.dtype) - logit).sigmoid()[..., None]
        return (share * others + (1 - share) * v).flatten(1) + self.bias


class PNA(nn.Module):
    """Mean, maximum and sum of messages, without degrees as factors.

    The layer of messages is taken apart into its three inputs, so that none is stored. A node
    without edges gets 0 for all three.

    Source:
        Corso et al., arXiv 2004.05718, as GraphGPS sets ``torch_geometric.nn.PNAConv``.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.edge = nn.Linear(edge_width("pna", dim), dim)
        self.row, self.col = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.of_edge = nn.Linear(dim, dim, bias=False)
        self.post, self.lin = nn.Linear(4 * dim, dim), nn.Linear(dim, dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, graph: Graph, e: Tensor) -> Tensor:
        col, edge = self.col(x), self.of_edge(self.edge(e))
        degree = graph.row_degree.to(x.dtype)[:, None]
        row = self.row(x) * (degree > 0)
        mean, largest = (
            row + aggregate(col, graph, reduce=reduce, edge_value=edge)
            for reduce in ("mean", "max")
        )
        return self.lin(self.post(torch.cat([x, mean, largest, degree * mean], 1)))


class EdgeBiasedAttention(nn.Module):
    """:class:`fastgt.nn.NeighborhoodAttention` with a linear bias of edges for every head."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attention = NeighborhoodAttention(dim, heads)
        self.edge_bias = nn.Linear(dim, heads, bias=False)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, graph: Graph, e: Tensor) -> Tensor:
        return self.attention(x, graph, edge_bias=self.edge_bias(e))


class GatedGCN(nn.Module):
    """Gated message passing that updates nodes and edges, each with norm, activation, residual.

    ``edge_output=False``: edges come out as they came, and no norm of theirs is there.

    Source:
        Bresson and Laurent, arXiv 1711.07553, with the denominator of Dwivedi et al., arXiv
        2003.00982; the factor as in Wang et al., arXiv 2203.00199.
    """

    def __init__(
        self,
        dim: int,
        *,
        activation: Activation,
        dropout: float,
        stable: bool = False,
        edge_output: bool = True,
    ):
        super().__init__()
        self.own, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.gate = nn.Linear(dim, dim)
        self.gate_row, self.gate_col = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.factor = _factor(dim, activation) if stable else None
        self.norm = nn.BatchNorm1d(dim)
        self.activation = make_activation(activation)
        self.dropout = nn.Dropout(dropout)
        if edge_output:
            self.edge_norm = nn.BatchNorm1d(dim)
            self.edge_activation = make_activation(activation)
            self.edge_dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(
        self,
        x: Tensor,
        graph: Graph,
        e: Tensor,
        distance: Tensor | None = None,
        *,
        edge_output: bool = True,
    ) -> tuple[Tensor, Tensor]:
        weight = None if self.factor is None else self.factor(distance).squeeze(1)
        received, aux = gated_aggregate(
            self.value(x),
            graph,
            self.gate(e),
            gate_row=self.gate_row(x),
            gate_col=self.gate_col(x),
            edge_weight=weight,
            eps=1e-6,
            return_aux=AuxRequest(edge_scores=edge_output),
        )
        check_rows(self.norm, x, "norm of GatedGCN", "node")
        x = x + self.dropout(self.activation(self.norm(self.own(x) + received)))
        if aux.edge_scores is not None:
            check_rows(self.edge_norm, e, "edge_norm of GatedGCN", "edge")
            scores = self.edge_norm(aux.edge_scores)
            e = e + self.edge_dropout(self.edge_activation(scores))
        return x, e


def _factor(dim: int, activation: Activation) -> nn.Sequential:
    """r_ij of ``|p_i - p_j|^2``."""
    return nn.Sequential(
        nn.Linear(1, dim), make_activation(activation), nn.Linear(dim, 1), nn.Sigmoid()
    )


def _no_loops(graph: Graph, dtype: torch.dtype) -> Tensor:
    """1 on edges between two nodes, 0 on self loops, ``[E]``."""
    source, target = graph.edge_index
    return (source != target).to(dtype)

"""Exphormer: attention over edges, an expander and virtual nodes (arXiv 2303.06147).

    t_ij = (q_i * k_j) / sqrt(d_h) * W_e e_ij,      w_ij = exp(clamp(sum_d t_ij, -5, 5))
    a_i  = concat_h sum_j w_ij v_j / (sum_j w_ij + 1e-6)
    h_i  = MPNN(x, e)_i + norm(x_i + dropout(a_i))
    x_i' = norm(h_i + dropout(W_2 dropout(relu(W_1 h_i))))

with * channel by channel. j runs over the pattern of exphormer_graph.py: i's own edges, those of an
expander, for which e_ij is one learnt vector, and those from its virtual nodes, with a learnt
vector for each of these. A virtual node attends to all nodes of its graph, likewise, and what it
gets is what it is in the next layer: no residual, norm or feed-forward. The MPNN is that of
GraphGPS with its residual and norm, over the graph's own edges. GatedGCN updates them for itself;
the attention goes on with those from before the first layer, as in the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgt.graph import Graph
from fastgt.models.exphormer_config import ExphormerConfig
from fastgt.models.exphormer_graph import Pattern, exphormer_pattern
from fastgt.models.graph_gps_encoders import (
    LaplacianEncoder,
    Readout,
    StableEncoder,
    check_matrix,
    check_unused,
    make_encoder,
)
from fastgt.models.graph_gps_layer import GraphGPSLayer
from fastgt.models.graph_gps_local import WITH_EDGES, Local, edge_distance
from fastgt.nn.sublayers import check_rows, reset_sublayers
from fastgt.ops.attention import neighborhood_attention
from fastgt.ops.checks import check_graph, integer


class ExphormerAttention(nn.Module):
    """Attention over a pattern whose products are gated by edges; no projection after it.

    ``a_i = concat_h sum_j w_ij v_j / (sum_j w_ij + 1e-6)``, as above.

    Args:
        dim: Width of nodes and edges.
        heads: Divides ``dim``.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        dim, heads = integer("dim", dim, 1), integer("heads", heads, 1)
        if dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        self.dim, self.heads = dim, heads
        self.q, self.k, self.v, self.edge = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, e: Tensor, shared: Tensor, pattern: Pattern) -> Tensor:
        """x ``[N + V G, dim]``, e ``[E, dim]``, shared ``[1 + 2 V, dim]`` -> ``[N + V G, dim]``.

        shared has the vectors of the pattern's other kinds of edges, in order.
        """
        size = pattern.graph.num_rows
        check_matrix("x", x, "N + V G, dim", (size, self.dim))
        check_matrix("e", e, "E, dim", (pattern.sizes[0], self.dim))
        check_matrix("shared", shared, "1 + 2 V, dim", (len(pattern.sizes) - 1, self.dim))
        # each vector is projected once, not once an edge
        rows = zip(self.edge(shared), pattern.sizes[1:], strict=True)
        gate = torch.cat([self.edge(e), *(row.expand(count, -1) for row, count in rows)])
        q, k, v, gate = (
            y.unflatten(1, (self.heads, -1)) for y in (self.q(x), self.k(x), self.v(x), gate)
        )
        attended = neighborhood_attention(
            q, k, v, pattern.graph, edge_gate=gate, logit_clamp=5.0, denominator_eps=1e-6
        )
        return attended.flatten(1)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class ExphormerLayer(nn.Module):
    """Attention over a pattern beside message passing, then a feed-forward.

    Args:
        dim, heads, local, dropout: As of :class:`ExphormerConfig`.
        stable: Whether messages have a factor, of the distances given to a call.
        edge_output: Whether GatedGCN has what updates edges.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models.exphormer import ExphormerLayer
        >>> from fastgt.models.exphormer_graph import expander_table, exphormer_pattern
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> pattern = exphormer_pattern(graph, expander_table(graph, 3), 2)
        >>> x, e, virtual, shared = (torch.randn(n, 64) for n in (3, 3, 2, 5))
        >>> layer = ExphormerLayer(64, heads=4)
        >>> [y.shape for y in layer(x, e, virtual, graph, pattern, e, shared)]
        [torch.Size([3, 64]), torch.Size([3, 64]), torch.Size([2, 64])]
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        local: Local = "gatedgcn",
        dropout: float = 0.0,
        stable: bool = False,
        edge_output: bool = True,
    ):
        super().__init__()
        self.attention = ExphormerAttention(dim, heads)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(dim)
        self.beside = GraphGPSLayer(
            dim,
            heads,
            local=local,
            attention="none",
            dropout=dropout,
            stable=stable,
            edge_output=edge_output,
            beside=True,
        )

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        virtual: Tensor,
        graph: Graph,
        pattern: Pattern,
        attended_edges: Tensor,
        shared: Tensor,
        *,
        distance: Tensor | None = None,
        edge_output: bool | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x ``[N, dim]``, e ``[E, dim]``, virtual ``[V G, dim]`` -> the same, after the layer.

        attended_edges ``[E, dim]`` and shared ``[1 + 2 V, dim]`` are the edges of the attention.
        """
        check_graph(graph)
        n = graph.num_rows
        y = self.attention(torch.cat([x, virtual]), attended_edges, shared, pattern)
        check_rows(self.norm, x, "norm of ExphormerLayer", "node")
        third = self.norm(x + self.dropout(y[:n]))
        messages = e if self.beside.local_kind in WITH_EDGES else None
        x, updated = self.beside(
            x, messages, graph, distance=distance, beside=third, edge_output=edge_output
        )
        return x, e if updated is None else updated, y[n:]


class InLayer(nn.Module):
    """``normalize(relu(dropout(norm(W x))))``: a layer before the others.

    Source:
        GraphGym's ``GNNPreMP``, of the authors' framework.
    """

    def __init__(self, features: int, dim: int, dropout: float):
        super().__init__()
        self.lin = nn.Linear(features, dim, bias=False)
        self.norm = nn.BatchNorm1d(dim)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor) -> Tensor:
        check_rows(self.norm, x, "norm of InLayer", "node")
        return F.normalize(self.dropout(self.norm(self.lin(x))).relu(), dim=1)


class Exphormer(nn.Module):
    """Numbers for every graph of a batch, or for every node.

    An expander is drawn once for a graph (:func:`~fastgt.models.exphormer_graph.expander_table`),
    and goes in with every batch. With one layer, the vectors of edges to virtual nodes reach no
    output and get no gradient. Nor does the norm of edges of the last GatedGCN, which is not there
    with ``last_edges=False``.

    Source:
        Shirzad et al., Exphormer: Sparse Transformers for Graphs, arXiv 2303.06147.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import Exphormer, ExphormerConfig, expander_table
        >>> model = Exphormer(ExphormerConfig.published("arxiv"))
        >>> graph = Graph.from_edge_index(torch.randint(30, (2, 90)), 30)
        >>> model(torch.randn(30, 128), None, graph, expander=expander_table(graph, 3)).shape
        torch.Size([30, 40])
    """

    def __init__(self, config: ExphormerConfig):
        super().__init__()
        c = self.config = config
        width = c.dim - c.lap_dim
        self.embed: nn.Module | None = None
        if c.encode_nodes:
            self.embed = make_encoder(c.node_types, c.node_features, width)
        self.embed_norm = nn.BatchNorm1d(c.dim) if c.encode_norm else None
        self.embed_lap = LaplacianEncoder(c.lap_pe, c.lap_dim, c.lap_layers) if c.lap_pe else None
        self.embed_stable = StableEncoder(c.stable_pe, c.dim) if c.stable_pe else None
        self.embed_edge = make_encoder(c.edge_types, c.edge_features, c.dim)
        self.expander_edge = nn.Embedding(1, c.dim)
        if c.virtual_nodes:
            self.virtual = nn.Embedding(c.virtual_nodes, c.dim)
            self.to_virtual = nn.Embedding(c.virtual_nodes, c.dim)
            self.from_virtual = nn.Embedding(c.virtual_nodes, c.dim)
        first = c.dim if c.encode_nodes else c.node_features
        self.in_layers = nn.ModuleList(
            InLayer(c.dim if i else first, c.dim, c.dropout) for i in range(c.in_layers)
        )
        self.layers = nn.ModuleList(
            ExphormerLayer(
                c.dim,
                c.heads,
                local=c.local,
                dropout=c.dropout,
                stable=c.stable_pe > 0,
                edge_output=i < c.layers or c.last_edges,
            )
            for i in range(1, c.layers + 1)
        )
        self.readout = Readout(c.head, c.dim, c.out_dim, layers=c.head_layers, pooling=c.pooling)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(
        self,
        node: Tensor,
        edge: Tensor | None,
        graph: Graph,
        *,
        expander: Tensor | None = None,
        lap_vectors: Tensor | None = None,
        lap_values: Tensor | None = None,
    ) -> Tensor:
        """Nodes, edges and encodings -> ``[G, out_dim]``, or ``[N, out_dim]`` of a head of nodes.

        Args:
            node, edge, graph, lap_vectors, lap_values: As of :class:`GraphGPS`.
            expander: ``[N, W]``, as :func:`~fastgt.models.exphormer_graph.expander_table` gives;
                None where ``expander_degree`` is 0.
        """
        check_graph(graph)
        c = self.config
        check_unused("expander", expander, c.expander_degree, "expander_degree is 0")
        vectors = c.lap_pe + c.stable_pe
        check_unused("lap_vectors", lap_vectors, vectors, "lap_pe and stable_pe are 0")
        check_unused("lap_values", lap_values, c.lap_pe, "lap_pe is 0")
        if c.expander_degree and expander is None:
            raise ValueError(f"expander must be given: expander_degree is {c.expander_degree}")
        x = self._nodes(node, lap_vectors, lap_values, graph)
        e = edges = self.embed_edge("edge", edge, "E", graph.num_edges, graph)
        distance = None
        if self.embed_stable is not None:
            distance = edge_distance(self.embed_stable(lap_vectors, graph), graph)
        pattern = exphormer_pattern(graph, expander, c.virtual_nodes)
        virtual, shared = self._virtual(x, graph)
        for i, layer in enumerate(self.layers, 1):
            update = False if i == len(self.layers) else None
            x, e, virtual = layer(
                x, e, virtual, graph, pattern, edges, shared, distance=distance, edge_output=update
            )
        return self.readout(x, graph.graph_ptr)

    def _nodes(
        self, node: Tensor, vectors: Tensor | None, values: Tensor | None, graph: Graph
    ) -> Tensor:
        n = graph.num_rows
        if self.embed is None:
            features = self.config.node_features
            check_matrix("node", node, f"N, {features}", (n, features))
            x = node
        else:
            x = self.embed("node", node, "N", n, graph)
        if self.embed_lap is not None:
            x = torch.cat([x, self.embed_lap(vectors, values, graph)], 1)
        if self.embed_norm is not None:
            check_rows(self.embed_norm, x, "embed_norm of Exphormer", "node")
            x = self.embed_norm(x)
        for layer in self.in_layers:
            x = layer(x)
        return x

    def _virtual(self, x: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        """The first states ``[V G, dim]``, and the vectors of all edges but the graph's own."""
        count = self.config.virtual_nodes
        if not count:
            return x[:0], self.expander_edge.weight
        first = self.virtual.weight[:, None].expand(-1, graph.num_graphs, -1).flatten(0, 1)
        ways = torch.stack([self.to_virtual.weight, self.from_virtual.weight], 1).flatten(0, 1)
        return first, torch.cat([self.expander_edge.weight, ways])

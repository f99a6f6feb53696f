"""SAN: attention over a graph's edges and over all other pairs of its nodes (arXiv 2106.03893).

    s_ij = clamp(sum_d (q_i * k_j) / sqrt(d_h) * W_e e_ij, -5, 5)      where j -> i is an edge
    s_ij = clamp(sum_d (q'_i * k'_j) / sqrt(d_h) * W'_e f, -5, 5)      where it is none, i != j
    w_ij = exp(s_ij) / (1 + gamma)   and   gamma exp(s_ij) / (1 + gamma)
    h_i  = norm(x_i + W_o dropout(concat_h sum_j w_ij v_j / (sum_j w_ij + 1e-6)))
    x_i' = norm(h_i + W_2 dropout(relu(W_1 h_i)))

with * channel by channel: one softmax over two sets of pairs, each with queries, keys and gates of
its own. f is one vector for all pairs that are no edges, so that it gates the queries, and nothing
stands on these pairs. Each set is attended over by itself, and both are put together by their
log-sum-exps: as the logits are clamped, no maximum is subtracted. Memory is O(E d + sum_g n_g^2),
the latter for the indices of pairs, once for all layers and heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fastgt.contract import AuxRequest
from fastgt.graph import Graph
from fastgt.models.graph_gps_config import kinds_of
from fastgt.models.graph_gps_encoders import (
    Pooling,
    TypeEncoder,
    check_matrix,
    make_encoder,
    pooled,
)
from fastgt.models.graph_transformer import readout
from fastgt.models.spectral_encoder import SpectralEncoder
from fastgt.nn.sublayers import check_rows, reset_sublayers
from fastgt.ops.attention import neighborhood_attention
from fastgt.ops.checks import check_graph, check_square, integer, number

_SIZES = ("out_dim", "dim", "heads", "layers", "lap_pe", "lap_dim", "lap_heads", "lap_layers")


@dataclass
class SANConfig:
    """Settings of :class:`SAN`; defaults are the authors' for ZINC.

    Attributes:
        out_dim: Numbers to predict.
        node_types, edge_types: As of :class:`GraphGPSConfig`.
        dim: Width of nodes and edges; a multiple of ``heads``.
        heads: Of the attention.
        layers: So many times.
        full_graph: Whether nodes attend to those of their graph that they have no edge from, too.
        gamma: How much these count.
        far_type: Whether pairs without an edge have the vector of edges of type 0, as in the
            authors' code; else one of their own, as in GraphGPS's.
        dropout: Inside the layers.
        lap_pe: Laplacian eigenvectors of a node.
        lap_dim, lap_heads, lap_layers: Of the Transformer over these.
        lap_dropout: Likewise; the authors leave PyTorch's default.
        head: ``"graph"`` or ``"node"``.
        pooling: ``"add"``, ``"mean"`` or ``"max"``, of graphs.
    """

    out_dim: int = 1
    node_types: int | Sequence[int] = (28,)
    edge_types: int | Sequence[int] = (4,)
    dim: int = 56
    heads: int = 8
    layers: int = 10
    full_graph: bool = True
    gamma: float = 1e-5
    far_type: bool = True
    dropout: float = 0.0
    lap_pe: int = 10
    lap_dim: int = 8
    lap_heads: int = 4
    lap_layers: int = 2
    lap_dropout: float = 0.1
    head: Literal["graph", "node"] = "graph"
    pooling: Pooling = "add"

    def __post_init__(self) -> None:
        for name in _SIZES:
            setattr(self, name, integer(name, getattr(self, name), 1))
        self.node_types = kinds_of("node_types", self.node_types)
        self.edge_types = kinds_of("edge_types", self.edge_types)
        if not self.node_types:
            raise ValueError("node_types must not be (): SAN embeds types of nodes")
        for width, heads in (("dim", "heads"), ("lap_dim", "lap_heads")):
            of, by = getattr(self, width), getattr(self, heads)
            if of % by:
                raise ValueError(f"{heads} must divide {width}, got {width}={of} and {heads}={by}")
        if self.lap_dim >= self.dim:
            raise ValueError(f"lap_dim must be below dim={self.dim}, got {self.lap_dim}")
        if not number("gamma", self.gamma) > 0:
            raise ValueError(
                f"gamma must be positive, got {self.gamma}: full_graph=False leaves other pairs out"
            )
        if self.far_type and not self.edge_types:
            raise ValueError("far_type must be False with edge_types=(), which have no type 0")
        if self.head not in ("graph", "node"):
            raise ValueError(f"head must be 'graph' or 'node', got {self.head!r}")

    @staticmethod
    def published(name: str) -> SANConfig:
        """The model of that name.

        The authors' model for molhiv has a vector for pairs without an edge, too, but does not use
        it: there they have those of type 0 in all columns.

        Args:
            name: ``"zinc"``, ``"pattern"``, ``"cluster"`` or ``"ogbg_molhiv"`` of the authors;
                ``"zinc_gps"`` of GraphGPS.

        Raises:
            ValueError: There is no such name.

        Source:
            The optimised configurations of Kreuzer et al.'s code, arXiv 2106.03893.
        """
        if name not in _PUBLISHED:
            raise ValueError(f"name must be one of {list(_PUBLISHED)}, got {name!r}")
        return replace(_PUBLISHED[name])


_BLOCK_MODELS = SANConfig(
    out_dim=2,
    node_types=(3,),
    edge_types=(),
    dim=80,
    heads=10,
    layers=4,
    gamma=1e-2,
    far_type=False,
    lap_dim=16,
    lap_layers=3,
    head="node",
)
_PUBLISHED = {
    "zinc": SANConfig(),
    "zinc_gps": SANConfig(far_type=False),
    "pattern": _BLOCK_MODELS,
    "cluster": replace(
        _BLOCK_MODELS,
        out_dim=6,
        node_types=(7,),
        dim=48,
        heads=8,
        layers=16,
        gamma=1e-1,
        lap_layers=1,
    ),
    "ogbg_molhiv": SANConfig(
        node_types=(119, 4, 12, 12, 10, 6, 6, 2, 2),
        edge_types=(5, 6, 2),
        dim=64,
        heads=4,
        gamma=1e-6,
        dropout=0.01,
        lap_dim=16,
        lap_layers=3,
    ),
}


def complement(graph: Graph) -> Graph:
    """All pairs of two nodes of the same graph that are no edges of it; no self loops.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models.san import complement
        >>> path = Graph.from_edge_index(torch.tensor([[0, 1], [1, 2]]))
        >>> complement(path).edge_index.tolist()
        [[1, 2, 2, 0], [0, 0, 1, 2]]
    """
    check_square(graph)
    pairs = Graph.complete(graph.graph_ptr)
    source, target = pairs.edge_index
    apart = source != target
    # row by row, the first column of a row is the first node of its graph
    key, query = graph.edge_index
    begin = pairs.row_ptr.long()[query]
    sizes = graph.graph_ptr.diff()
    first = graph.graph_ptr[:-1].long().repeat_interleave(sizes, output_size=graph.num_rows)
    apart[begin + key - first[query]] = False
    return Graph.from_edge_index(pairs.edge_index[:, apart], graph_ptr=graph.graph_ptr)


class SANAttention(nn.Module):
    """Attention over edges and over the other pairs, in one softmax; no projection after it.

    Args:
        dim: Width of nodes and edges.
        heads: Divides ``dim``.
        gamma: How much pairs count that are no edges; None leaves them out.
    """

    def __init__(self, dim: int, heads: int, *, gamma: float | None):
        super().__init__()
        dim, heads = integer("dim", dim, 1), integer("heads", heads, 1)
        if dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        self.dim, self.heads, self.gamma = dim, heads, gamma
        self.q, self.k, self.edge = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        if gamma is not None:
            self.far_q, self.far_k, self.far = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.v = nn.Linear(dim, dim, bias=False)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        graph: Graph,
        far: Tensor | None = None,
        others: Graph | None = None,
    ) -> Tensor:
        """x ``[N, dim]``, e ``[E, dim]`` -> ``[N, dim]``.

        far ``[1, dim]`` stands on all edges of others, the :func:`complement` of the graph.
        """
        check_graph(graph)
        check_matrix("x", x, "N, dim", (graph.num_rows, self.dim))
        check_matrix("e", e, "E, dim", (graph.num_edges, self.dim))
        q, k, v, gate = (
            self._heads(f(y))
            for f, y in zip((self.q, self.k, self.v, self.edge), (x, x, x, e), strict=True)
        )
        if self.gamma is None:
            if far is not None or others is not None:
                raise ValueError("far and others must be None: the module was made with gamma=None")
            attended = neighborhood_attention(
                q, k, v, graph, edge_gate=gate, logit_clamp=5.0, denominator_eps=1e-6
            )
            return attended.flatten(1)
        if others is None:
            raise ValueError("others must be a Graph with a gamma: complement(graph) makes it")
        check_graph(others)
        if others.num_rows != graph.num_rows or others.num_cols != graph.num_rows:
            found = f"{others.num_rows} rows and {others.num_cols} columns"
            raise ValueError(f"others must have the graph's {graph.num_rows} nodes, got {found}")
        check_matrix("far", far, "1, dim", (1, self.dim))
        request = AuxRequest(lse=True)
        near, aux = neighborhood_attention(
            q, k, v, graph, edge_gate=gate, logit_clamp=5.0, return_aux=request
        )
        far_q, far_k = self._heads(self.far_q(x) * self.far(far)), self._heads(self.far_k(x))
        rest, rest_aux = neighborhood_attention(
            far_q, far_k, v, others, logit_clamp=5.0, return_aux=request
        )
        assert aux.lse is not None
        assert rest_aux.lse is not None
        # [N, H], at most n exp(5)
        weight = aux.lse.exp() / (1 + self.gamma)
        rest_weight = self.gamma * rest_aux.lse.exp() / (1 + self.gamma)
        total = weight + rest_weight + 1e-6
        shares = (weight / total).to(near.dtype), (rest_weight / total).to(near.dtype)
        return (shares[0][..., None] * near + shares[1][..., None] * rest).flatten(1)

    def _heads(self, y: Tensor) -> Tensor:
        return y.unflatten(1, (self.heads, -1))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, gamma={self.gamma}"


class SANLayer(nn.Module):
    """Attention over edges and other pairs, then a feed-forward; residuals, norms after.

    Args:
        dim, heads, dropout: As of :class:`SANConfig`.
        gamma: How much pairs count that are no edges; None leaves them out.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models.san import SANLayer, complement
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2, 0], [1, 2, 0, 2]]))
        >>> x, e, far = torch.randn(3, 64), torch.randn(4, 64), torch.randn(1, 64)
        >>> SANLayer(64, heads=4, gamma=1e-2)(x, e, graph, far, complement(graph)).shape
        torch.Size([3, 64])
    """

    def __init__(self, dim: int, heads: int, *, gamma: float | None, dropout: float = 0.0):
        super().__init__()
        self.attention = SANAttention(dim, heads, gamma=gamma)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(dim, dim)
        self.norm1 = nn.BatchNorm1d(dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim)
        )
        self.norm2 = nn.BatchNorm1d(dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        graph: Graph,
        far: Tensor | None = None,
        others: Graph | None = None,
    ) -> Tensor:
        """As of :class:`SANAttention`."""
        attended = self.attention(x, e, graph, far, others)
        check_rows(self.norm1, x, "norm1 of SANLayer", "node")
        x = self.norm1(x + self.out(self.dropout(attended)))
        return self.norm2(x + self.ffn(x))


class SAN(nn.Module):
    """Numbers for every graph of a batch, or for every node.

    Source:
        Kreuzer et al., Rethinking Graph Transformers with Spectral Attention, arXiv 2106.03893,
        with encodings of nodes.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import SAN, SANConfig
        >>> model = SAN(SANConfig.published("zinc"))
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> atoms, bonds = torch.tensor([0, 27, 1]), torch.tensor([1, 3, 2])
        >>> pe = {"lap_vectors": torch.randn(3, 10), "lap_values": torch.rand(1, 10)}
        >>> model(atoms, bonds, graph, **pe).shape
        torch.Size([1, 1])
    """

    def __init__(self, config: SANConfig):
        super().__init__()
        c = self.config = config
        assert not isinstance(c.node_types, int)
        self.embed = TypeEncoder(c.node_types, c.dim - c.lap_dim)
        self.embed_lap = SpectralEncoder(
            c.lap_pe, c.lap_dim, heads=c.lap_heads, layers=c.lap_layers, dropout=c.lap_dropout
        )
        self.embed_edge = make_encoder(c.edge_types, 0, c.dim)
        if c.full_graph and not c.far_type:
            self.far = nn.Embedding(1, c.dim)
        self.layers = nn.ModuleList(
            SANLayer(c.dim, c.heads, gamma=c.gamma if c.full_graph else None, dropout=c.dropout)
            for _ in range(c.layers)
        )
        self.readout = readout(c.dim, c.out_dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(
        self,
        node: Tensor,
        edge: Tensor | None,
        graph: Graph,
        *,
        lap_vectors: Tensor,
        lap_values: Tensor,
        others: Graph | None = None,
    ) -> Tensor:
        """Nodes, edges and encodings -> ``[G, out_dim]``, or ``[N, out_dim]`` of a head of nodes.

        Args:
            node: Types ``[N]``, or ``[N, columns]``, integers.
            edge: As node, of edges. None where all edges are of one kind.
            graph: The batch.
            lap_vectors, lap_values: ``[N, lap_pe]`` and ``[G, lap_pe]``; NaN stands for an
                eigenvector that a small graph does not have. In training every eigenvector gets
                one random sign for the whole batch. The authors make the ``lap_pe`` entries of
                every node of length 1, GraphGPS every eigenvector.
            others: What :func:`~fastgt.models.san.complement` gives of the graph, where it was
                made before, as for compiled calls. None makes it.
        """
        check_graph(graph)
        c = self.config
        if others is not None and not c.full_graph:
            raise ValueError("others must be None: full_graph=False leaves other pairs out")
        parts = [
            self.embed("node", node, "N", graph.num_rows, graph),
            self.embed_lap(lap_vectors, lap_values, graph),
        ]
        x = torch.cat(parts, 1)
        e = self.embed_edge("edge", edge, "E", graph.num_edges, graph)
        far = None
        if c.full_graph:
            far = self._far(graph)
            others = complement(graph) if others is None else others
        for layer in self.layers:
            x = layer(x, e, graph, far, others)
        return self.readout(x if c.head == "node" else pooled(x, graph.graph_ptr, c.pooling))

    def _far(self, graph: Graph) -> Tensor:
        if not self.config.far_type:
            return self.far.weight
        assert isinstance(self.embed_edge, TypeEncoder)
        first = torch.zeros(1, dtype=torch.long, device=graph.device)
        return torch.stack([embed(first) for embed in self.embed_edge.embed]).sum(0)

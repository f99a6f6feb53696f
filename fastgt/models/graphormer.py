"""Graphormer: attention of all nodes of a graph, whose structure stands in biases (2106.05234).

    x_i     = node_i + z_in(i) + z_out(i)                       embeddings of both degrees (eq. 5)
    bias_ij = b_{d(i, j)} + c_ij                                of the length of a path (eq. 6)
    c_ij    = (1 / max(1, n)) sum_{k <= n} mean_f(w_{f, t_kf}) W_k       of its edges (eq. 7)
    h_i     = x_i + dropout(W_o concat_h softmax_j(q_i . k_j / sqrt(d_h) + bias_ij) v_j)
    x_i'    = h_i + dropout(W_2 dropout(gelu(W_1 h_i)))

where attention and feed-forward take layer norms of x and of h (eqs. 8 and 9), d(i, j) is the
length of a shortest path from i to j, t_kf the type of its k-th edge in column f, and n the length,
or ``path_edges`` where that is less. Every graph has a virtual node before its own: its bias to and
from every node is one learnt number a head, and its last state gives the output. The second release
has its norms behind the residuals, one of the embedded nodes, and a larger head.

Graphs are not padded. The authors' code differs in three points: in what stands behind the end of a
path it adds an embedding that is never trained, where here is nothing; both degrees are the number
of edges that leave; and its second release has a linear layer that nothing uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.models.graph_gps_config import kinds_of
from fastgt.models.graph_gps_encoders import make_encoder
from fastgt.models.graph_gps_layer import GlobalAttention
from fastgt.models.graph_gps_pairs import DegreeEncoder
from fastgt.models.graphormer_pairs import PathBias
from fastgt.nn.sublayers import reset_sublayers
from fastgt.ops.checks import check_square, integer

NormPlace = Literal["pre", "post"]
GraphormerHead = Literal["linear", "transform"]
_SIZES = ("out_dim", "dim", "heads", "layers", "ffn_dim", "path_edges", "path_rows", "degrees")


@dataclass
class GraphormerConfig:
    """Settings of :class:`Graphormer`; defaults are the authors' for ZINC.

    Attributes:
        out_dim: Numbers to predict.
        node_types: How many kinds of nodes there are, or how many in each column of types; () for
            nodes with features.
        node_features: Width of these; 0 for nodes with types.
        edge_types: As of nodes; () for a model without edges' types.
        dim: Width of nodes; a multiple of ``heads``.
        heads: Of the attention.
        layers: So many times.
        ffn_dim: Width within the feed-forward.
        path_distance: Of :func:`fastgt.encodings.shortest_paths`: paths that are as
            long or longer count as ones that are by 1 shorter. 2 at least.
        path_edges: How many edges of a path count, from its beginning.
        path_rows: How many matrices W_k there are, ``path_edges`` at least. The authors' tables
            have more than their models use.
        degrees: How many degrees of nodes have embeddings.
        norm: ``"pre"``, layer norms of what goes into attention and feed-forward and one after the
            last layer; or ``"post"``, after the residuals.
        embed_norm: Whether the embedded nodes have a layer norm.
        head: ``"linear"``, or ``"transform"``: linear, GELU, layer norm, linear.
        in_dropout: Of the embedded nodes.
        dropout: Of what attention and feed-forward add.
        attention_dropout: Of the softmax's weights.
        ffn_dropout: Within the feed-forward.
    """

    out_dim: int = 1
    node_types: int | Sequence[int] = (64,)
    node_features: int = 0
    edge_types: int | Sequence[int] = (64,)
    dim: int = 80
    heads: int = 8
    layers: int = 12
    ffn_dim: int = 80
    path_distance: int = 39
    path_edges: int = 20
    path_rows: int = 40
    degrees: int = 64
    norm: NormPlace = "pre"
    embed_norm: bool = False
    head: GraphormerHead = "linear"
    in_dropout: float = 0.1
    dropout: float = 0.1
    attention_dropout: float = 0.1
    ffn_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in _SIZES:
            setattr(self, name, integer(name, getattr(self, name), 1))
        self.node_features = integer("node_features", self.node_features, 0)
        self.path_distance = integer("path_distance", self.path_distance)
        self.node_types = kinds_of("node_types", self.node_types)
        self.edge_types = kinds_of("edge_types", self.edge_types)
        if bool(self.node_types) == bool(self.node_features):
            raise ValueError(
                f"node_types is {self.node_types} and node_features is {self.node_features}: give "
                "one of them"
            )
        if self.path_distance < 2:
            raise ValueError(f"path_distance must be 2 at least, got {self.path_distance}")
        if self.path_rows < self.path_edges:
            found = f"{self.path_rows} and {self.path_edges}"
            raise ValueError(f"path_rows must be path_edges at least, got {found}")
        if self.path_edges > self.path_distance:
            found = f"{self.path_edges} and {self.path_distance}"
            raise ValueError(f"path_edges must be path_distance at most, got {found}")
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm must be 'pre' or 'post', got {self.norm!r}")
        if self.head not in ("linear", "transform"):
            raise ValueError(f"head must be 'linear' or 'transform', got {self.head!r}")

    @staticmethod
    def published(name: str) -> GraphormerConfig:
        """The authors' model of that name.

        Args:
            name: ``"zinc"`` (Graphormer-Slim), ``"pcqm4m"`` (Graphormer), ``"pcqm4m_small"``,
                ``"ogbg_molpcba"``, or ``"pcqm4mv2"`` (of the second release). All but the first
                have OGB's atoms and bonds.

        Raises:
            ValueError: There is no such name.

        Source:
            Ying et al., arXiv 2106.05234, appendix B, and their code's configurations.
        """
        if name not in _PUBLISHED:
            raise ValueError(f"name must be one of {list(_PUBLISHED)}, got {name!r}")
        return replace(_PUBLISHED[name])


class Graphormer(nn.Module):
    """Numbers for every graph of a batch, from its virtual node.

    Weights are drawn as torch's layers draw theirs; :meth:`draw_as_published` draws smaller ones.

    Args:
        config: The settings.
        softmax: As of :class:`GraphormerLayer`.

    Source:
        Ying et al., Do Transformers Really Perform Bad for Graph Representation?, arXiv 2106.05234;
        the second release Shi et al., arXiv 2203.04810.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.encodings import shortest_paths
        >>> from fastgt.models import Graphormer, GraphormerConfig
        >>> model = Graphormer(GraphormerConfig.published("zinc"))
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> atoms, bonds = torch.tensor([0, 27, 1]), torch.tensor([1, 3, 2])
        >>> c = model.config
        >>> lengths, types = shortest_paths(graph, bonds, c.path_distance, edges=c.path_edges)
        >>> model(atoms, graph, pair_distance=lengths, pair_edges=types).shape
        torch.Size([1, 1])
    """

    def __init__(
        self,
        config: GraphormerConfig,
        *,
        softmax: Callable[..., GlobalAttention] = GlobalAttention,
    ):
        super().__init__()
        c = self.config = config
        assert not isinstance(c.edge_types, int)
        self.embed = make_encoder(c.node_types, c.node_features, c.dim)
        self.embed_degree = DegreeEncoder(c.degrees, c.dim)
        self.pair_bias = PathBias(
            c.path_distance, c.edge_types, c.heads, edges=c.path_edges, rows=c.path_rows
        )
        self.virtual = nn.Embedding(1, c.dim)
        self.embed_norm = nn.LayerNorm(c.dim) if c.embed_norm else None
        self.in_dropout = nn.Dropout(c.in_dropout)
        self.layers = nn.ModuleList(
            GraphormerLayer(
                c.dim,
                c.heads,
                ffn_dim=c.ffn_dim,
                norm=c.norm,
                dropout=c.dropout,
                attention_dropout=c.attention_dropout,
                ffn_dropout=c.ffn_dropout,
                softmax=softmax,
            )
            for _ in range(c.layers)
        )
        self.norm = nn.LayerNorm(c.dim) if c.norm == "pre" else None
        self.readout: nn.Module
        if c.head == "linear":
            self.readout = nn.Linear(c.dim, c.out_dim)
        else:
            self.readout = nn.Sequential(
                nn.Linear(c.dim, c.dim),
                nn.GELU(),
                nn.LayerNorm(c.dim),
                nn.Linear(c.dim, c.out_dim),
            )

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def draw_as_published(self) -> None:
        """Draw the parameters of linear layers and embeddings anew, as the authors do.

        They are normal with deviation 0.02, in linear layers of ``norm="pre"`` with 0.02 divided by
        the root of the number of layers; biases are 0.
        """
        c = self.config
        deviation = 0.02 / c.layers**0.5 if c.norm == "pre" else 0.02
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=deviation)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(
        self,
        node: Tensor,
        graph: Graph,
        *,
        pair_distance: Tensor,
        pair_edges: Tensor | None = None,
    ) -> Tensor:
        """Nodes and shortest paths -> ``[G, out_dim]``.

        Args:
            node: Types ``[N]``, or ``[N, columns]``, integers; or features ``[N, node_features]``.
            graph: The batch. Its edges count in the degrees of nodes alone; all else is in the
                paths.
            pair_distance: ``[P]`` integers, of
                :func:`fastgt.encodings.shortest_paths` with ``path_distance``.
            pair_edges: ``[P, path_edges]`` integers, its types with ``edges=path_edges``; with
                several columns of types ``[P, path_edges, columns]``, of a call for each, stacked.
                None without types.
        """
        n = check_square(graph)
        x = self.embed("node", node, "N", n, graph) + self.embed_degree(graph)
        ptr = graph.graph_ptr.long()
        graphs = torch.arange(graph.num_graphs, device=ptr.device)
        owner = graphs.repeat_interleave(ptr.diff(), output_size=n)  # [N]
        virtual = ptr[:-1] + graphs  # [G], where virtual nodes stand: each before its graph
        places = torch.arange(1, n + 1, device=ptr.device) + owner  # [N], and the others
        whole = self.virtual.weight.to(x.dtype).expand(n + graph.num_graphs, -1)
        x = whole.index_copy(0, places, x)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        x = self.in_dropout(x)
        bias = self.pair_bias(pair_distance, pair_edges, graph)
        offsets = torch.cat([virtual, ptr[-1:] + graph.num_graphs])
        for layer in self.layers:
            x = layer(x, offsets, bias)
        x = x.index_select(0, virtual)
        return self.readout(x if self.norm is None else self.norm(x))


class GraphormerLayer(nn.Module):
    """Attention over whole graphs with biases of pairs, then a feed-forward; layer norms.

    Args:
        dim, heads, ffn_dim, norm, dropout, attention_dropout, ffn_dropout: As of
            :class:`GraphormerConfig`.
        head_gate: As for :class:`fastgt.nn.NeighborhoodAttention`.
        softmax: The class of the attention, or what makes one of its arguments.

    Example:
        >>> import torch
        >>> from fastgt.models.graphormer import GraphormerLayer
        >>> layer, offsets = GraphormerLayer(16, 4, ffn_dim=16), torch.tensor([0, 2, 5])
        >>> layer(torch.randn(5, 16), offsets, torch.randn(2 * 2 + 3 * 3, 4)).shape
        torch.Size([5, 16])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        ffn_dim: int,
        norm: NormPlace = "pre",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
        head_gate: nn.Module | None = None,
        softmax: Callable[..., GlobalAttention] = GlobalAttention,
    ):
        super().__init__()
        if norm not in ("pre", "post"):
            raise ValueError(f"norm must be 'pre' or 'post', got {norm!r}")
        dim, ffn_dim = integer("dim", dim, 1), integer("ffn_dim", ffn_dim, 1)
        self.place = norm
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = softmax(
            dim, heads, dropout=attention_dropout, head_gate=head_gate, dense_gate_grad=True
        )
        self.attention_dropout = nn.Dropout(dropout)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim),
            nn.GELU(),
            nn.Dropout(ffn_dropout),
            nn.Linear(ffn_dim, dim),
            nn.Dropout(dropout),
        )

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, offsets: Tensor, bias: Tensor) -> Tensor:
        """x ``[N, dim]``, offsets ``[G + 1]``, bias ``[P, H]`` of pairs -> ``[N, dim]``."""
        if self.place == "pre":
            x = x + self.attention_dropout(self.attention(self.norm1(x), offsets, bias=bias))
            return x + self.ffn(self.norm2(x))
        x = self.norm1(x + self.attention_dropout(self.attention(x, offsets, bias=bias)))
        return self.norm2(x + self.ffn(x))

    def extra_repr(self) -> str:
        return f"norm={self.place!r}"


_OGB = GraphormerConfig(
    node_types=(513, *8 * (512,)),
    edge_types=(513, 512, 512),
    dim=768,
    heads=32,
    ffn_dim=768,
    path_distance=511,
    path_edges=5,
    path_rows=128,
    degrees=512,
)
_PUBLISHED = {
    "zinc": GraphormerConfig(),
    "pcqm4m": _OGB,
    "pcqm4m_small": replace(_OGB, dim=512, ffn_dim=512, layers=6),
    "ogbg_molpcba": replace(
        _OGB,
        out_dim=128,
        dim=1024,
        ffn_dim=1024,
        layers=18,
        in_dropout=0.0,
        attention_dropout=0.3,
    ),
    "pcqm4mv2": replace(
        _OGB,
        norm="post",
        embed_norm=True,
        head="transform",
        in_dropout=0.0,
        dropout=0.0,
        ffn_dropout=0.1,
    ),
}

"""OpenGraph: a graph transformer without features, for graphs it never saw (arXiv 2403.01121).

    x    = sum_{l=1..L} A'^l norm(E)                       A' = D^-1/2 A D^-1/2, E of svd_tokens
    s    = 256 random rows of x
    s'   = s + MHA(s, x, x)                                the anchors look at all nodes
    h    = norm(x + MHA(x, s', s'))                        all nodes look at the anchors
    x'   = norm(h + dropout(act(W_2 act(W_1 h)))) / 10     as often as there are layers

Both attentions of a layer have the same weights, act is a leaky ReLU of slope 0.5, and the first
norm has no weights. So an attention over N nodes costs O(N anchors). The last x' are embeddings: a
dot product of two of them scores an edge. Trained on the edges of some graphs with
:meth:`OpenGraph.link_loss`, the model is used on others as it is: for links as they are, for
classes with one more node for each class (``open_graph_tasks.py``).

The released code differs where it is wrong. To hide a batch's edges from the topology encoder, it
keeps the entries that are in exactly one of two lists, the graph's edges and the batch's pairs both
ways: pairs that are no edges, as the way back of an edge that goes one way, are added. Here edges
are only taken away. It subtracts one maximum, of all scores of a batch, before the exponentials,
and adds 1e-8 to their sum, so that the loss of a node whose scores are 18 below that maximum is no
longer that of a softmax. Here it is exact: each node has a maximum of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgt.encodings.singular_vectors import adjacency_weights
from fastgt.graph import Graph
from fastgt.models.graph_gps_encoders import check_matrix
from fastgt.models.graph_transformer import check_dtype
from fastgt.models.open_graph_tasks import check_anchors, check_nodes, edges_between
from fastgt.nn.sublayers import reset_sublayers
from fastgt.ops.aggregate import aggregate
from fastgt.ops.checks import check_float, check_offsets, check_square, integer, number
from fastgt.ops.global_attention import MAX_WIDTH, global_attention


@dataclass
class OpenGraphConfig:
    """Settings of :class:`OpenGraph`; defaults are the authors' in all their experiments.

    Attributes:
        dim: Width of tokens and layers; a multiple of ``heads``.
        heads: Of the attention; each has 512 channels at most.
        layers: How many there are, one after another.
        anchors: Random nodes of each graph that the attention goes through; all nodes of a graph
            that has fewer.
        hops: Powers of the adjacency that the topology encoder sums; 0 for norm(E) alone.
        dropout: After the feed-forward.
        attention_dropout: Of the attention's weights.
        slope: Of the leaky ReLU, below 0.
        scale: What every layer's output is divided by.
    """

    dim: int = 1024
    heads: int = 4
    layers: int = 4
    anchors: int = 256
    hops: int = 3
    dropout: float = 0.1
    attention_dropout: float = 0.1
    slope: float = 0.5
    scale: float = 10.0

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "layers", "anchors"):
            setattr(self, name, integer(name, getattr(self, name), 1))
        self.hops = integer("hops", self.hops, 0)
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got dim={self.dim} and heads={self.heads}")
        if self.dim // self.heads > MAX_WIDTH:
            raise ValueError(
                f"a head must have {MAX_WIDTH} channels at most, got dim={self.dim} and "
                f"heads={self.heads}"
            )
        for name in ("dropout", "attention_dropout"):
            found = number(name, getattr(self, name))
            if not 0 <= found <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {found}")
        for name in ("slope", "scale"):
            found = number(name, getattr(self, name))
            if not 0 < found < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {found}")

    @staticmethod
    def published(name: str) -> OpenGraphConfig:
        """The authors' model of that name: 25,190,400 parameters.

        All three have the same settings; they were trained on other generated graphs.

        Args:
            name: ``"gen0"``, ``"gen1"`` or ``"gen2"``, of the graphs that it was trained on.

        Raises:
            ValueError: There is no such name.

        Source:
            Xia et al., arXiv 2403.01121, the defaults of their code's ``params.py``.
        """
        if name not in _PUBLISHED:
            raise ValueError(f"name must be one of {list(_PUBLISHED)}, got {name!r}")
        return OpenGraphConfig()


_PUBLISHED = ("gen0", "gen1", "gen2")


class Anchors(NamedTuple):
    """Nodes that an attention goes through."""

    node: Tensor  # [S], in ascending order
    ptr: Tensor  # [G + 1] boundaries of the anchors of each graph


class OpenGraph(nn.Module):
    """Embeddings of all nodes of a graph, from tokens that are made of its edges alone.

    Anchors are drawn anew for every layer of every call, in evaluation too, as the authors do.
    With the same ``anchors`` a model in evaluation gives the same embeddings.

    Source:
        Xia et al., OpenGraph: Towards Open Graph Foundation Models, arXiv 2403.01121, and their
        code's ``link_prediction/model.py``.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.encodings import svd_tokens
        >>> from fastgt.models import OpenGraph, OpenGraphConfig
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> model = OpenGraph(OpenGraphConfig(dim=64, layers=2))
        >>> model(svd_tokens(graph, 64), graph).shape
        torch.Size([3, 64])
    """

    def __init__(self, config: OpenGraphConfig):
        super().__init__()
        c = self.config = config
        self.layers = nn.ModuleList(
            OpenGraphLayer(
                c.dim,
                c.heads,
                anchors=c.anchors,
                dropout=c.dropout,
                attention_dropout=c.attention_dropout,
                slope=c.slope,
                scale=c.scale,
            )
            for _ in range(c.layers)
        )

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(
        self, node: Tensor, graph: Graph, *, anchors: Sequence[Anchors] | None = None
    ) -> Tensor:
        """Tokens node ``[N, dim]``, of :func:`fastgt.encodings.svd_tokens` -> ``[N, dim]``.

        Args:
            node: Tokens.
            graph: Square; a batch has anchors of each graph. With edges both ways, as published.
            anchors: Those of each layer, of :func:`draw_anchors`. ``torch.compile`` and
                ``torch.export`` take them as an input.
        """
        self._check(node, graph)
        return self.transform(
            topology_encoding(node, graph, self.config.hops), graph.graph_ptr, anchors=anchors
        )

    def transform(
        self,
        x: Tensor,
        offsets: Tensor | None = None,
        *,
        anchors: Sequence[Anchors] | None = None,
    ) -> Tensor:
        """The layers alone: x ``[N, dim]``; offsets ``[G + 1]``, None for one graph."""
        if anchors is not None and len(anchors) != len(self.layers):
            raise ValueError(
                f"anchors must be of {len(self.layers)} layers, got those of {len(anchors)}"
            )
        for i, layer in enumerate(self.layers):
            x = layer(x, offsets, None if anchors is None else anchors[i])
        return x

    def link_loss(
        self,
        node: Tensor,
        graph: Graph,
        row: Tensor,
        positive: Tensor,
        negative: Tensor,
        *,
        anchors: Sequence[Anchors] | None = None,
    ) -> Tensor:
        """What a step of training minimises: :func:`info_nce` of a batch of edges.

        The edges between ``row[b]`` and ``positive[b]``, both ways, are hidden from the topology
        encoder. The layers see the batch's 2 B + K nodes as one graph, a node as often as it
        stands there. Nothing is learned through the topology encoder.

        Args:
            node: Tokens ``[N, dim]``; of the whole graph, as published.
            graph: A single square one.
            row, positive: ``[B]`` integers, the ends of B edges.
            negative: ``[K]`` integers, nodes that no row should be near. As published, there are B:
                :func:`fastgt.models.draw_negatives` gives one for each row, and all rows share
                them.
            anchors: As for a call; their numbers are those of the batch's 2 B + K nodes.
        """
        self._check(node, graph)
        if graph.num_graphs != 1:
            raise ValueError(f"graph must be a single one, got a batch of {graph.num_graphs}")
        n = graph.num_nodes
        row, positive, negative = (
            check_nodes(name, x, n, node.device)
            for name, x in (("row", row), ("positive", positive), ("negative", negative))
        )
        if len(row) != len(positive):
            raise ValueError(f"positive must be [{len(row)}] as row, got [{len(positive)}]")
        for name, x in (("row", row), ("negative", negative)):
            if not len(x):
                raise ValueError(f"{name} must have a node at least, got 0")
        with torch.no_grad():
            present = ~edges_between(graph, row, positive)
            x = topology_encoding(node, graph, self.config.hops, present=present)
            x = x.index_select(0, torch.cat([row, positive, negative]))
        out = self.transform(x, anchors=anchors)
        return info_nce(*out.split([len(row), len(positive), len(negative)]))

    def _check(self, node: Tensor, graph: Graph) -> None:
        n = check_square(graph)
        check_matrix("node", node, "N, dim", (n, self.config.dim))
        check_dtype("node", node, next(self.parameters()))


def topology_encoding(
    node: Tensor, graph: Graph, hops: int = 3, *, present: Tensor | None = None
) -> Tensor:
    """Tokens, smoothed along edges: the step before the layers of OpenGraph.

        x = sum_{l=1..hops} A'^l norm(E)

    norm is a layer norm without weights. A node without edges has 0.

    Args:
        node: ``[N, dim]``, E.
        graph: Square. A' is that of :func:`fastgt.encodings.svd_tokens`.
        hops: 0 gives norm(E).
        present: ``[E]`` bool; where it is False, the edge is left out.

    Returns:
        ``[N, dim]`` in node's dtype.

    Source:
        Xia et al., arXiv 2403.01121, their code's ``TopoEncoder``.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models.open_graph import topology_encoding
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]))
        >>> topology_encoding(torch.tensor([[0.0, 2.0], [8.0, 4.0]]), graph, 1).round().tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    n = check_square(graph)
    hops = integer("hops", hops, 0)
    check_float("node", node)
    if node.ndim != 2 or len(node) != n:
        raise ValueError(f"node must be [N, dim] = [{n}, dim], got {list(node.shape)}")
    x = F.layer_norm(node, node.shape[1:])
    if not hops:
        return x
    weight = adjacency_weights(graph, present=present, dtype=x.dtype)
    total = torch.zeros_like(x)
    for _ in range(hops):
        x = aggregate(x, graph, edge_weight=weight)
        total = total + x
    return total


def info_nce(x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """The mean over b of ``log(exp(x_b . p_b) + sum_k exp(x_b . n_k)) - x_b . p_b``.

    Args:
        x, positive: ``[B, dim]``.
        negative: ``[K, dim]``, shared by all rows.

    Source:
        Xia et al., arXiv 2403.01121. The module's docstring says how the released code differs.

    Example:
        >>> import torch
        >>> from fastgt.models.open_graph import info_nce
        >>> a, p, n = torch.eye(2)[:1], torch.eye(2)[:1], torch.eye(2)[1:]
        >>> round(float(info_nce(a, p, n)), 4)  # log(e + 1) - 1
        0.3133
    """
    near = (x * positive).sum(1, keepdim=True)  # [B, 1]
    far = x @ negative.T  # [B, K]
    return (torch.cat([near, far], 1).logsumexp(1) - near[:, 0]).mean()


class OpenGraphLayer(nn.Module):
    """Attention through anchors and a feed-forward; residuals, norms after.

    Args:
        dim, heads, anchors, dropout, attention_dropout, slope, scale: As of
            :class:`OpenGraphConfig`.

    Example:
        >>> import torch
        >>> from fastgt.models.open_graph import OpenGraphLayer
        >>> OpenGraphLayer(64, 4, anchors=2)(torch.randn(10, 64), torch.tensor([0, 3, 10])).shape
        torch.Size([10, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        anchors: int = 256,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        slope: float = 0.5,
        scale: float = 10.0,
    ):
        super().__init__()
        dim, heads = integer("dim", dim, 1), integer("heads", heads, 1)
        if dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        self.dim, self.anchors, self.scale = dim, integer("anchors", anchors, 1), scale
        self.attention = SharedAttention(dim, heads, dropout=attention_dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(
            nn.Linear(dim, dim),
            nn.LeakyReLU(slope),
            nn.Linear(dim, dim),
            nn.LeakyReLU(slope),
            nn.Dropout(dropout),
        )

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(
        self, x: Tensor, offsets: Tensor | None = None, anchors: Anchors | None = None
    ) -> Tensor:
        """x ``[N, dim]``; offsets ``[G + 1]``, None for one graph -> ``[N, dim]``."""
        check_float("x", x)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x must be [N, {self.dim}], got {list(x.shape)}")
        if offsets is None:
            offsets = torch.tensor([0, len(x)], device=x.device)
        else:
            check_offsets(offsets, len(x), x.device)
        node, ptr = draw_anchors(offsets, len(x), self.anchors) if anchors is None else anchors
        if anchors is not None:
            node = check_anchors(node, ptr, offsets, len(x))
        chosen = x.index_select(0, node)  # [S, dim]
        chosen = chosen + self.attention(chosen, x, ptr, offsets)
        h = self.norm1(x + self.attention(x, chosen, offsets, ptr))
        return self.norm2(h + self.ffn(h)) / self.scale

    def extra_repr(self) -> str:
        return f"anchors={self.anchors}, scale={self.scale}"


class SharedAttention(nn.Module):
    """Softmax attention from any nodes to any others of their graph, without biases.

    ``out = W_o concat_h attention(W_q x, W_k y, W_v y)``
    """

    def __init__(self, dim: int, heads: int, *, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self._draw()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)
        self._draw()

    def _draw(self) -> None:
        # as PyTorch's attention, which draws the three as one matrix [3 dim, dim]
        for layer in (self.q, self.k, self.v):
            nn.init.xavier_uniform_(layer.weight, gain=0.5**0.5)

    def forward(self, x: Tensor, y: Tensor, x_ptr: Tensor, y_ptr: Tensor) -> Tensor:
        """Queries x ``[N, dim]``, keys y ``[M, dim]``, boundaries of each -> ``[N, dim]``."""
        q = self.q(x).unflatten(1, (self.heads, -1))  # [N, H, D]
        k, v = (layer(y).unflatten(1, (self.heads, -1)) for layer in (self.k, self.v))
        attended = global_attention(
            q,
            k,
            v,
            x_ptr,
            key_offsets=y_ptr,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(attended.flatten(1))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dropout={self.dropout}"


def draw_anchors(offsets: Tensor, nodes: int, count: int) -> Anchors:
    """``count`` random nodes of every graph, or all of a graph that has fewer.

    All sets of that size are equally likely. Drawn from PyTorch's generator.

    Args:
        offsets: ``[G + 1]`` boundaries of the graphs.
        nodes: N, where they end.
        count: Of each graph.

    Example:
        >>> import torch
        >>> from fastgt.models.open_graph import draw_anchors
        >>> node, ptr = draw_anchors(torch.tensor([0, 2, 9]), 9, 3)
        >>> node[:2].tolist(), ptr.tolist()
        ([0, 1], [0, 2, 5])
    """
    count = integer("count", count, 1)
    sizes = offsets.diff().long()
    graph = torch.arange(len(sizes), device=offsets.device)
    owner = graph.repeat_interleave(sizes, output_size=nodes)  # [N]
    # graph after graph, in each the nodes in a random order
    random = torch.rand(nodes, dtype=torch.float64, device=offsets.device)
    order = (owner + random).argsort()
    place = torch.arange(nodes, device=offsets.device) - offsets.long()[owner]
    node = order[place < count].sort().values
    return Anchors(node, F.pad(sizes.clamp(max=count).cumsum(0), (1, 0)))

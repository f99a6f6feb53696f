"""The correspondence transformer of AnimeInbet: which node of one graph is which of another.

Line drawings are graphs of vertices with positions. Two of them, s and t, are a pair. Of nodes i of
both, with positions p_i and topological encodings e_i (magnitudes of Laplacian eigenvectors)::

    x_i  = MLP(p_i) + MLP(e_i)                       and a descriptor, where one is given
    x_i += MLP(concat(x_i, Attention(x_i, x of i's own graph)))       \\ once a layer
    x_i += MLP(concat(x_i, Attention(x_i, x of the other graph)))     /
    f_i  = W x_i
    S_ij = f_i . f_j / sqrt(dim)                     i in s, j in t
    P    = Sinkhorn(S with dustbins)                 see sinkhorn.py

In every MLP an instance norm follows all linear layers but the last: each channel has mean 0 and
variance 1 over the nodes of a graph. All pairs of a batch are computed at once, without padding:
the two attentions are global attention over the graph's own nodes and over those of its partner.

The authors' code differs in this: in a batch of several pairs it pads, and its norms, and the
masses of its Sinkhorn iterations, count what is padded. Theirs and these are the same for one pair
in a batch, as they train. Their topological encodings are scikit-network's, of a graph that has a
self loop at every node. Their descriptors are of an image, by three convolutions, and are no part
of this model. Their four projections of an attention start alike; here each is drawn on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.models.correspondence_matching import pair_offsets
from fastgt.models.graph_gps_encoders import check_matrix
from fastgt.models.graph_transformer import check_config, check_dtype, check_pe
from fastgt.models.sinkhorn import log_sinkhorn
from fastgt.nn.sublayers import reset_sublayers
from fastgt.ops.checks import accumulator, integer, number
from fastgt.ops.global_attention import global_attention
from fastgt.ops.segment_pool import of_nodes, segment_mean


@dataclass
class CorrespondenceTransformerConfig:
    """Settings of :class:`CorrespondenceTransformer`; defaults are AnimeInbet's.

    Attributes:
        node_features: Numbers of a node: its coordinates.
        dim: Width of a node's features; a multiple of ``heads``.
        heads: Of every attention.
        layers: Each is attention to the own graph, then attention to the other.
        pe_dim: Topological encodings of a node; 0 for a model without them.
        node_widths: Inner widths of the MLP of coordinates.
        pe_widths: Inner widths of the MLP of topological encodings.
        iterations: Of Sinkhorn.
        threshold: Above which an assignment is a match: it changes metrics, and no output.
    """

    node_features: int = 2
    dim: int = 128
    heads: int = 4
    layers: int = 12
    pe_dim: int = 64
    node_widths: Sequence[int] = (32, 64, 128)
    pe_widths: Sequence[int] = (96,)
    iterations: int = 20
    threshold: float = 0.2

    def __post_init__(self) -> None:
        check_config(self, "node_features", "dim", "heads", "layers", "pe_dim", "iterations")
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got dim={self.dim} and heads={self.heads}")
        for name in ("node_widths", "pe_widths"):
            widths = getattr(self, name)
            if not isinstance(widths, (tuple, list)):
                raise TypeError(f"{name} must be widths, got {type(widths).__name__}")
            setattr(self, name, tuple(integer(name, x, 1) for x in widths))
        self.threshold = number("threshold", self.threshold)
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be from 0 to 1, got {self.threshold}")

    @staticmethod
    def published(name: str) -> CorrespondenceTransformerConfig:
        """The authors' model of that name.

        Args:
            name: ``"mixamo_line"``, of MixamoLine240.

        Raises:
            ValueError: There is no such name.

        Source:
            Siyao et al., arXiv 2309.16643, and their code's configuration.
        """
        if name not in _PUBLISHED:
            raise ValueError(f"name must be one of {list(_PUBLISHED)}, got {name!r}")
        return replace(_PUBLISHED[name])


class CorrespondenceTransformer(nn.Module):
    """Logarithms of soft assignments between the nodes of the two graphs of every pair.

    Graphs 2p and 2p + 1 of a batch are pair p. A pair of graphs of n and m nodes has a matrix of
    n + 1 rows and m + 1 columns. The last row and the last column are the dustbins, for nodes that
    have no partner. :func:`fastgt.models.matches` reads the partners from it, and training
    maximises :func:`fastgt.models.log_likelihoods`.

    Weights are drawn as torch's layers draw theirs, the last bias of an MLP is 0 and the dustbins'
    score is 1 in the beginning. A bias in front of an instance norm gets a gradient of 0.

    Source:
        Siyao et al., Deep Geometrized Cartoon Line Inbetweening, arXiv 2309.16643, sections 4.1
        and 4.2, and their code. The layers and the assignment are those of Sarlin et al.,
        SuperGlue, arXiv 1911.11763.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import CorrespondenceTransformer, CorrespondenceTransformerConfig
        >>> config = CorrespondenceTransformerConfig(dim=32, layers=2, pe_dim=0)
        >>> lines = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 0, 3, 2, 5, 4]])
        >>> pair = Graph.from_edge_index(lines, graph_ptr=torch.tensor([0, 2, 6]))
        >>> out = CorrespondenceTransformer(config)(torch.rand(6, 2), pair).exp().view(3, 5)
        >>> [round(x, 3) for x in out.sum(0).tolist()]
        [1.0, 1.0, 1.0, 1.0, 2.0]
    """

    def __init__(self, config: CorrespondenceTransformerConfig):
        super().__init__()
        c = self.config = config
        self.embed = Perceptron(c.node_features, *c.node_widths, c.dim)
        self.embed_pe = Perceptron(c.pe_dim, *c.pe_widths, c.dim) if c.pe_dim else None
        self.layers = nn.ModuleList(
            CorrespondenceLayer(c.dim, c.heads) for _ in range(2 * c.layers)
        )
        self.out = nn.Linear(c.dim, c.dim)
        self.dustbin = nn.Parameter(torch.ones(()))

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)
        nn.init.ones_(self.dustbin)

    def forward(
        self,
        node: Tensor,
        graph: Graph,
        *,
        pe: Tensor | None = None,
        descriptor: Tensor | None = None,
    ) -> Tensor:
        """Pairs of graphs -> ``[sum_p (n_p + 1) (m_p + 1)]``, pair after pair, row after row.

        Args:
            node: Coordinates ``[N, node_features]``.
            graph: The batch, of an even number of graphs. Its edges are in ``pe`` alone.
            pe: ``[N, pe_dim]``, of :func:`fastgt.encodings.laplacian_pe`. The model takes their
                magnitudes, so that signs mean nothing.
            descriptor: ``[N, dim]``, other features of a node.
        """
        offsets = pair_offsets(graph)
        n, c = graph.num_rows, self.config
        check_matrix("node", node, f"N, {c.node_features}", (n, c.node_features))
        check_dtype("node", node, self.out.weight)
        ptr = graph.graph_ptr
        x = self.embed(node, ptr)
        check_pe(pe, n, c.pe_dim, self.out)
        if self.embed_pe is not None and pe is not None:
            x = x + self.embed_pe(pe.abs(), ptr)
        if descriptor is not None:
            check_matrix("descriptor", descriptor, f"N, {c.dim}", (n, c.dim))
            check_dtype("descriptor", descriptor, self.out.weight)
            x = x + descriptor
        partner, partner_ptr = _partners(graph)
        for i, layer in enumerate(self.layers):
            if i % 2:
                x = x + layer(x, x.index_select(0, partner), ptr, partner_ptr)
            else:
                x = x + layer(x, x, ptr, ptr)
        f = self.out(x)
        scores = [f[:0].flatten()]
        f = f.split(ptr.diff().tolist())
        for first, second in zip(f[::2], f[1::2], strict=True):
            scores.append((first @ second.T).flatten())
        return log_sinkhorn(
            torch.cat(scores) * c.dim**-0.5, self.dustbin, *offsets, iterations=c.iterations
        )


class CorrespondenceLayer(nn.Module):
    """What a node learns of the nodes of one graph, its own or the other: ``MLP([x; message])``.

    Args:
        dim: Width of a node's features.
        heads: Divides ``dim``.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.merge = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = Perceptron(2 * dim, 2 * dim, dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, source: Tensor, offsets: Tensor, source_offsets: Tensor) -> Tensor:
        """x ``[N, dim]``, source ``[M, dim]``, boundaries ``[G + 1]`` -> ``[N, dim]``."""
        q = self.q(x).unflatten(1, (self.heads, -1))
        k, v = (f(source).unflatten(1, (self.heads, -1)) for f in (self.k, self.v))
        attended = global_attention(q, k, v, offsets, key_offsets=source_offsets)
        return self.mlp(torch.cat([x, self.merge(attended.flatten(1))], 1), offsets)


class Perceptron(nn.Module):
    """Linear layers of these widths; between two of them an instance norm and a ReLU.

    In the beginning the last bias is 0.
    """

    def __init__(self, *widths: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self._clear_last()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)
        self._clear_last()

    def _clear_last(self) -> None:
        last: Any = self.layers[-1]
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x ``[N, width]``, offsets ``[G + 1]`` -> ``[N, width]``."""
        for layer in self.layers[:-1]:
            x = instance_norm(layer(x), offsets).relu()
        return self.layers[-1](x)


def instance_norm(x: Tensor, offsets: Tensor, eps: float = 1e-5) -> Tensor:
    """``(x - mean) / sqrt(variance + eps)``, of every graph and channel over the graph's nodes.

    x ``[N, dim]``, offsets ``[G + 1]`` -> ``[N, dim]`` in x's dtype, computed in float32 (float64
    for float64); 0 for a graph of one node.
    """
    n, wide = x.shape[0], x.to(accumulator(x))  # squares of float16 end at 256
    centred = wide - of_nodes(segment_mean(wide, offsets), offsets, n, None)
    variance = segment_mean(centred.square(), offsets)
    normed = centred * of_nodes((variance + eps).rsqrt(), offsets, n, None)
    return normed.to(x.dtype)


def _partners(graph: Graph) -> tuple[Tensor, Tensor]:
    """Nodes in the order in which the two graphs of each pair change places, and boundaries."""
    ptr = graph.graph_ptr.long()
    other = torch.arange(graph.num_graphs, device=ptr.device) ^ 1
    sizes = ptr.diff()[other]
    ends = torch.cat([ptr.new_zeros(1), sizes.cumsum(0)])
    shift = (ptr[other] - ends[:-1]).repeat_interleave(sizes, output_size=graph.num_rows)
    nodes = torch.arange(graph.num_rows, device=ptr.device) + shift
    return nodes, ends.to(graph.graph_ptr.dtype)


_PUBLISHED = {"mixamo_line": CorrespondenceTransformerConfig()}

"""The attention with connections of SymPoint, Liu et al., arXiv 2401.10556.

Graphic primitives of a drawing are points with features. A primitive attends to the nearest ones
and to those that it is joined with, in one neighbourhood M(i), with the vector attention of Point
Transformer (Zhao et al., arXiv 2012.09164, eq. 3)::

    M(i)  = nearest_k(i) union {j : an end of i is within eps of an end of j}
    d_ij  = Linear(relu(norm(Linear(p_j - p_i))))                           [dim]
    w_ij  = Linear(relu(norm(Linear(relu(norm(k_j - q_i + d_ij))))))        [dim / planes]
    out_i = sum over M(i) of softmax_j(w_ij) (v_j + d_ij)                   [planes, dim / planes]

Channels that stand at the same place of all planes share a weight. The norms are batch norms over
all edges, as in the released code. That attends to the nearest primitives alone: the module of the
connections was left out of it, and is here as in the paper.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.models.graph_gps_encoders import check_matrix
from fastgt.models.graph_transformer import check_dtype
from fastgt.nn.sublayers import check_rows, reset_sublayers
from fastgt.ops.channelwise_attention import channelwise_attention
from fastgt.ops.checks import check_float, check_generator, check_square, integer, number
from fastgt.ops.implementation import Impl, check_impl
from fastgt.patterns import knn, radius


class SymPointAttention(nn.Module):
    """Vector attention of graphic primitives over those that are near and those that are joined.

    The channels of a node are ``planes`` equal parts s, of channels c each, and all parts share the
    weights of channel c. With a batch norm before each ReLU::

        d_ij     = Linear(relu(norm(Linear(p_j - p_i))))
        w_ij     = Linear(relu(norm(Linear(relu(norm(k_j - q_i + d_ij))))))
        out_i,sc = sum_j softmax_j(w_ij)_c (v_j + d_ij)_sc

    It is :func:`fastgt.channelwise_attention` with logits ``[E, dim / planes]``, expanded to all
    planes without a copy. d_ij and the logits are made: memory is O(E dim).

    Args:
        dim: Width of the input and the output.
        position_dim: Coordinates of a primitive: 2 in the paper. The released code has 3, of which
            the last is always 0.
        planes: How many parts of the channels share their weights; divides ``dim``.
        impl: As for :func:`fastgt.channelwise_attention`.

    Source:
        Liu et al., arXiv 2401.10556; Zhao et al., arXiv 2012.09164, eq. 3, with the norms and the
        shared planes of its code.

    Example:
        >>> import torch
        >>> from fastgt.models import SymPointAttention, connected_neighbors
        >>> ends = torch.rand(40, 2, 2)
        >>> graph = connected_neighbors(ends, 16, distance=0.01)
        >>> attention = SymPointAttention(32)
        >>> attention(torch.randn(40, 32), ends.mean(1), graph).shape
        torch.Size([40, 32])
    """

    def __init__(
        self, dim: int, *, position_dim: int = 2, planes: int = 8, impl: Impl | None = None
    ):
        super().__init__()
        dim, planes = integer("dim", dim, 1), integer("planes", planes, 1)
        position_dim = integer("position_dim", position_dim, 1)
        if dim % planes:
            raise ValueError(f"planes must divide dim, got dim={dim} and planes={planes}")
        check_impl(impl)
        self.dim, self.position_dim, self.planes, self.impl = dim, position_dim, planes, impl
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.position = nn.Sequential(
            nn.Linear(position_dim, position_dim),
            nn.BatchNorm1d(position_dim),
            nn.ReLU(),
            nn.Linear(position_dim, dim),
        )
        shared = dim // planes
        self.logits = nn.Sequential(
            nn.BatchNorm1d(dim),
            nn.ReLU(),
            nn.Linear(dim, shared),
            nn.BatchNorm1d(shared),
            nn.ReLU(),
            nn.Linear(shared, shared),
        )

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, position: Tensor, graph: Graph) -> Tensor:
        """x ``[N, dim]``, position ``[N, position_dim]`` -> ``[N, dim]``; 0 without edges."""
        rows = check_square(graph)
        check_matrix("x", x, "N, dim", (rows, self.dim))
        check_matrix("position", position, "N, position_dim", (rows, self.position_dim))
        for name, given in (("x", x), ("position", position)):
            check_dtype(name, given, self.q.weight)
        source, target = graph.edge_index
        check_rows(self, source, "norm of SymPointAttention", "edge")
        step = self.position(position[source] - position[target])
        logits = self.logits(self.k(x)[source] - self.q(x)[target] + step)
        shape = self.planes, self.dim // self.planes
        out = channelwise_attention(
            logits[:, None].expand(-1, *shape),
            self.v(x).unflatten(1, shape),
            graph,
            edge_value=step.unflatten(1, shape),
            impl=self.impl,
        )
        return out.flatten(1)


def connected_neighbors(
    ends: Tensor,
    k: int,
    *,
    distance: float = 1.0,
    most: int | None = None,
    generator: torch.Generator | None = None,
    offsets: Tensor | None = None,
    partial: bool = False,
) -> Graph:
    """The k nearest primitives of each, and those that it is joined with, as one neighbourhood.

    A primitive stands in the middle between its two ends. It is nearest to itself, unless another
    in the same place has a lower number. It is joined with another where an end of the one is at
    most ``distance`` from an end of the other. One that is both near and joined counts once.
    Distances are taken in float64. Edges are sorted by row, then by column.

    Args:
        ends: ``[N, 2, position_dim]``, both ends of each; of a circle, its centre twice.
        k: How many nearest ones, from 0 to the number of primitives of each drawing.
        distance: In the unit of the ends.
        most: How many connections a primitive keeps at most, near or not: random ones.
        generator: What draws these; on the CPU. Default: PyTorch's.
        offsets: ``[G + 1]`` boundaries of the drawings of a batch.
        partial: Let a drawing have fewer than k primitives; each attends to all of them.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named, with both numbers.

    Source:
        Liu et al., arXiv 2401.10556, whose drawings are in pixels and whose k is 16.

    Example:
        >>> import torch
        >>> from fastgt.models import connected_neighbors
        >>> ends = torch.tensor([[[0, 0], [9, 0]], [[9, 0], [9, 50]], [[1, 1], [2, 1]]]).float()
        >>> connected_neighbors(ends, 1).edge_index.tolist()
        [[0, 1, 0, 1, 2], [0, 0, 1, 1, 2]]
    """
    check_float("ends", ends)
    check_generator(generator)
    if ends.ndim != 3 or ends.shape[1] != 2 or ends.shape[2] == 0:
        raise ValueError(f"ends must be [N, 2, position_dim], got {list(ends.shape)}")
    if not bool(ends.isfinite().all()):
        n, side, _ = (~ends.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"ends must be finite, got {ends[n, side].tolist()} at [{n}, {side}]")
    distance, n = number("distance", distance), len(ends)
    if not 0 <= distance < math.inf:
        raise ValueError(f"distance must be finite and not negative, got {distance}")
    ends = ends.detach().double()  # in which distances are taken, and middles do not overflow
    near = knn(ends.mean(1), k, offsets=offsets, partial=partial)
    of_ends = None if offsets is None else 2 * offsets
    col, row = (radius(ends.flatten(0, 1), distance, offsets=of_ends).edge_index // 2).unbind()
    pairs = torch.unique(row * n + col)
    pairs = pairs[pairs // n != pairs % n]
    if most is not None:
        pairs = _at_most(pairs, integer("most", most, 0), n, generator)
    col, row = near.edge_index
    pairs = torch.unique(torch.cat([row * n + col, pairs]))
    return Graph.from_edge_index(torch.stack([pairs % n, pairs // n]), n, graph_ptr=offsets)


def _at_most(pairs: Tensor, most: int, n: int, generator: torch.Generator | None) -> Tensor:
    """At most so many random pairs of each row, of pairs ``row n + column`` that are sorted."""
    drawn = torch.rand(len(pairs), generator=generator, dtype=torch.float64, device="cpu")
    order = drawn.to(pairs.device).argsort()
    order = order[(pairs[order] // n).argsort(stable=True)]
    row = pairs // n
    first = torch.searchsorted(row, row)  # a row's first pair: rows stand in order
    kept = torch.arange(len(pairs), device=pairs.device) - first < most
    return pairs[order[kept]]

"""A module around linear_attention, and random features."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastgt.nn.gated_heads import GatedHeads
from fastgt.ops.checks import check_offsets, integer
from fastgt.ops.implementation import Impl, check_impl
from fastgt.ops.linear_attention import MAX_FEATURES, FeatureMap, linear_attention


def random_features(
    num_features: int,
    width: int,
    *,
    norms: Literal["gaussian", "unit"] = "gaussian",
    generator: torch.Generator | None = None,
) -> Tensor:
    """A projection ``[num_features, width]`` for random feature maps, with orthogonal rows.

    Rows are orthogonal in blocks of ``width``, of random directions. Their lengths are drawn as
    those of Gaussian vectors, which makes "softmax" features unbiased, or are 1.

    Source:
        Choromanski et al., arXiv 2009.14794, section 2.4; lengths of 1 as torch-geometric has them.

    Example:
        >>> from fastgt.nn import random_features
        >>> random_features(44, 16).shape
        torch.Size([44, 16])
    """
    num_features, width = integer("num_features", num_features), integer("width", width)
    if num_features < 1 or width < 1:
        raise ValueError(f"num_features and width must be positive, got {num_features}, {width}")
    if norms not in ("gaussian", "unit"):
        raise ValueError(f"norms must be 'gaussian' or 'unit', got {norms!r}")
    blocks = -(-num_features // width)
    normal = torch.randn(blocks, width, width, generator=generator, dtype=torch.float64)
    directions, triangle = torch.linalg.qr(normal)
    # with a positive diagonal, directions are uniform
    directions = directions * triangle.diagonal(dim1=1, dim2=2).sgn()[:, None]
    rows = directions.mT.reshape(-1, width)[:num_features]
    if norms == "gaussian":
        lengths = torch.randn(num_features, width, generator=generator, dtype=torch.float64)
        rows = rows * lengths.norm(dim=1, keepdim=True)
    return rows.float()


class LinearAttention(GatedHeads):
    """Multi-head linear attention of every node over its graph, with its projections.

    ``out = W_o dropout(concat_h attention(W_q x, W_k x, W_v x))``

    Args:
        dim: Width of the input and the output.
        heads: Attention heads.
        head_dim: Width of a head; default ``dim / heads``.
        feature_map, eps, normalize, impl: As for :func:`fastgt.linear_attention`.
        num_features: M, of the feature maps with a projection; default D ln D, at most 1,024. The
            projection is a buffer, kept in ``state_dict``, drawn anew by :meth:`redraw_projection`.
        bias: Whether the query, key and value projections have one; the output's always does.
        dropout: Probability of dropping a channel of the heads' output, in training.
        head_gate, dense_gate_grad: As for :class:`fastgt.nn.NeighborhoodAttention`.

    Example:
        >>> import torch
        >>> from fastgt.nn import LinearAttention
        >>> attention = LinearAttention(64, heads=4, feature_map="softmax")
        >>> attention(torch.randn(10, 64), torch.tensor([0, 3, 10])).shape
        torch.Size([10, 64])
    """

    projection: Tensor | None

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        feature_map: FeatureMap = "elu",
        num_features: int | None = None,
        eps: float = 1e-6,
        normalize: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        head_gate: nn.Module | None = None,
        dense_gate_grad: bool = False,
        impl: Impl | None = None,
    ):
        super().__init__(head_gate, dense_gate_grad)
        dim, heads = integer("dim", dim, 1), integer("heads", heads)
        if heads < 1 or (head_dim is None and dim % heads):
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        head_dim = dim // heads if head_dim is None else integer("head_dim", head_dim, 1)
        if feature_map not in get_args(FeatureMap):
            raise ValueError(
                f"feature_map must be one of {list(get_args(FeatureMap))}, got {feature_map!r}"
            )
        check_impl(impl)
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, heads, head_dim
        self.feature_map, self.impl = feature_map, impl
        self.eps, self.normalize = eps, normalize
        self.q = nn.Linear(dim, heads * head_dim, bias=bias)
        self.k = nn.Linear(dim, heads * head_dim, bias=bias)
        self.v = nn.Linear(dim, heads * head_dim, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(heads * head_dim, dim)
        self.norms: Literal["gaussian", "unit"] = "gaussian" if feature_map == "softmax" else "unit"
        projection = None
        if feature_map in ("softmax", "relu_random"):
            if num_features is None:
                num_features = min(MAX_FEATURES, _default_features(head_dim))
            projection = random_features(num_features, head_dim, norms=self.norms)
        elif num_features is not None:
            raise ValueError(f"feature_map={feature_map!r} has no random features to be counted")
        self.register_buffer("projection", projection)

    def forward(
        self, x: Tensor, offsets: Tensor | None = None, *, head_gate: Tensor | None = None
    ) -> Tensor:
        """x ``[N, dim]``; offsets ``[G + 1]``, None for one graph; head_gate ``[H]`` or ``[G, H]``,
        where the module has none of its own."""
        _check_nodes(x, self.dim)
        gate = self.gate_of(head_gate, x)
        q, k, v = (self.into_heads(name, x, gate) for name in ("q", "k", "v"))
        if q.shape[1]:
            attended = linear_attention(
                q,
                k,
                v,
                offsets,
                feature_map=self.feature_map,
                projection=self.projection,
                eps=self.eps,
                normalize=self.normalize,
                head_gate=gate.values,
                dense_gate_grad=gate.dense,
                impl=self.impl,
            )
        else:
            if offsets is not None:
                check_offsets(offsets, len(x), x.device)
            attended = self.without_heads(q, k, v)
        return self.out_of_heads("out", self.dropout(gate.scaled(attended)), gate)

    def reset_parameters(self) -> None:
        """Draw every parameter, and the projection, anew."""
        super().reset_parameters()
        if self.projection is not None:
            self.redraw_projection()

    def redraw_projection(self, generator: torch.Generator | None = None) -> None:
        """New random features, in place."""
        if self.projection is None:
            raise ValueError("this feature map has no projection to be drawn anew")
        drawn = random_features(*self.projection.shape, norms=self.norms, generator=generator)
        self.projection.copy_(drawn)

    def extra_repr(self) -> str:
        features = "" if self.projection is None else f", num_features={len(self.projection)}"
        return f"heads={self.heads}, feature_map={self.feature_map!r}{features}"


def _check_nodes(x: object, width: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.ndim != 2 or x.shape[1] != width:
        padded = ": of a padded batch, x[mask], with batch.ptr for offsets" if x.ndim == 3 else ""
        raise ValueError(f"x must be [N, {width}], got {list(x.shape)}{padded}")


def _default_features(width: int) -> int:
    return max(1, int(width * math.log(width)))

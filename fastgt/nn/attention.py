"""Modules around neighborhood_attention."""

from __future__ import annotations

from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.ops._impl import Impl, check_impl
from fastgt.ops.attention import neighborhood_attention


class NeighborhoodAttention(nn.Module):
    """Multi-head attention of every node over its neighbours, with its projections.

    ``out = W_o dropout(concat_h attention(W_q x, W_k y, W_v y))`` where y is x, or ``context``.

    Args:
        dim: Width of the input and the output.
        heads: Query heads; divides ``dim``.
        kv_heads: Key and value heads (grouped-query attention); default ``heads``.
        context_dim: Width of ``context``; default ``dim``.
        bias: Whether the query, key and value projections have one; the output's always does.
        dropout: Probability of dropping a channel of the heads' output, in training.
        logit_clamp, denominator_eps, impl: As for :func:`fastgt.neighborhood_attention`.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.nn import NeighborhoodAttention
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> NeighborhoodAttention(64, heads=4)(torch.randn(3, 64), graph).shape
        torch.Size([3, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        logit_clamp: float | tuple[float, float] | None = None,
        denominator_eps: float = 0.0,
        impl: Impl | None = None,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, got {kv_heads} and {heads}")
        check_impl(impl)
        self.heads, self.kv_heads = heads, kv_heads
        self.logit_clamp, self.denominator_eps, self.impl = logit_clamp, denominator_eps, impl
        kv_dim = dim // heads * kv_heads
        context_dim = dim if context_dim is None else context_dim
        self.q = nn.Linear(dim, dim, bias=bias)
        self.k = nn.Linear(context_dim, kv_dim, bias=bias)
        self.v = nn.Linear(context_dim, kv_dim, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        graph: Graph,
        *,
        context: Tensor | None = None,
        edge_bias: Tensor | None = None,
    ) -> Tensor:
        """x ``[N_rows, dim]``; context ``[N_cols, context_dim]``; edge_bias ``[E, H]``."""
        y = x if context is None else context
        attended = self.attend(
            self.q(x).unflatten(-1, (self.heads, -1)),
            self.k(y).unflatten(-1, (self.kv_heads, -1)),
            self.v(y).unflatten(-1, (self.kv_heads, -1)),
            graph,
            edge_bias,
        )
        return self.out(self.dropout(attended.flatten(-2)))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, graph: Graph, edge_bias: Tensor | None
    ) -> Tensor:
        """The attention between the projections: what a subclass replaces."""
        out = neighborhood_attention(
            q,
            k,
            v,
            graph,
            edge_bias=edge_bias,
            logit_clamp=self.logit_clamp,
            denominator_eps=self.denominator_eps,
            impl=self.impl,
        )
        assert isinstance(out, Tensor)  # no extras were asked for
        return out

"""Modules around neighborhood_attention."""

from __future__ import annotations

from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.ops._arguments import check_graph
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


class EdgeGatedAttention(nn.Module):
    """Multi-head attention whose products are gated by edges, and which gives edges new features.

    With queries W_q x, keys W_k x, values W_v x and gates W_e e, head by head, channel by
    channel (*), d_h channels to a head::

        t_ij  = (q_i * k_j) / sqrt(d_h) * g_ij
        w_ij  = exp(clamp(sum_d t_ij, low, high))
        x'_i  = W_o dropout(concat_h sum_j w_ij v_j / (sum_j w_ij + eps))
        e'_ij = W_oe dropout(concat_h t_ij)

    Args:
        dim: Width of nodes, in and out.
        heads: Divides ``dim``.
        edge_dim: Width of edges, in and out; default ``dim``.
        bias: Whether the four projections before the attention have one; W_o and W_oe always do.
        dropout: Probability of dropping a channel before W_o and W_oe, in training.
        logit_clamp, denominator_eps, impl: As for :func:`fastgt.neighborhood_attention`.

    Source:
        Dwivedi and Bresson, arXiv 2012.09699, eqs. 8-12, with the clamp and the eps of their code.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.nn import EdgeGatedAttention
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2, 0], [1, 2, 0, 2]]))
        >>> attention = EdgeGatedAttention(64, heads=4, edge_dim=16)
        >>> x, e = attention(torch.randn(3, 64), torch.randn(4, 16), graph)
        >>> x.shape, e.shape
        (torch.Size([3, 64]), torch.Size([4, 16]))
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        edge_dim: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        logit_clamp: float | tuple[float, float] | None = None,
        denominator_eps: float = 0.0,
        impl: Impl | None = None,
    ):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        check_impl(impl)
        self.heads = heads
        self.logit_clamp, self.denominator_eps, self.impl = logit_clamp, denominator_eps, impl
        edge_dim = dim if edge_dim is None else edge_dim
        self.q = nn.Linear(dim, dim, bias=bias)
        self.k = nn.Linear(dim, dim, bias=bias)
        self.v = nn.Linear(dim, dim, bias=bias)
        self.gate = nn.Linear(edge_dim, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(dim, dim)
        self.edge_out = nn.Linear(dim, edge_dim)

    def forward(
        self, x: Tensor, e: Tensor, graph: Graph, *, edge_output: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """x ``[N, dim]``, e ``[E, edge_dim]`` -> the same shapes.

        Without ``edge_output`` no t_ij is stored, and None stands for the edges.
        """
        check_graph(graph)
        self._check("x", x, "N, dim", graph.num_rows, self.q.in_features)
        self._check("e", e, "E, edge_dim", graph.num_edges, self.gate.in_features)
        found = neighborhood_attention(
            self.q(x).unflatten(-1, (self.heads, -1)),
            self.k(x).unflatten(-1, (self.heads, -1)),
            self.v(x).unflatten(-1, (self.heads, -1)),
            graph,
            edge_gate=self.gate(e).unflatten(-1, (self.heads, -1)),
            logit_clamp=self.logit_clamp,
            denominator_eps=self.denominator_eps,
            return_edge_scores=edge_output,
            impl=self.impl,
        )
        attended, scores = found if isinstance(found, tuple) else (found, None)
        x = self.out(self.dropout(attended.flatten(-2)))
        if scores is None:
            return x, None
        return x, self.edge_out(self.dropout(scores.flatten(-2)))

    @staticmethod
    def _check(name: str, x: Tensor, letters: str, *shape: int) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must be [{letters}] = {list(shape)}, got {list(x.shape)}")

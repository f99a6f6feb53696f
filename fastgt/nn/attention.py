"""Modules around neighborhood_attention."""

from __future__ import annotations

from torch import Tensor, nn

from fastgt.contract import AuxRequest
from fastgt.graph import Graph
from fastgt.nn.gated_heads import Gate, GatedHeads
from fastgt.ops.attention import neighborhood_attention
from fastgt.ops.checks import check_graph, integer
from fastgt.ops.implementation import Impl, check_impl


class NeighborhoodAttention(GatedHeads):
    """Multi-head attention of every node over its neighbours, with its projections.

    ``out = W_o dropout(concat_h attention(W_q x, W_k y, W_v y))`` where y is x, or ``context``.

    Args:
        dim: Width of the input and the output.
        heads: Query heads; divides ``dim``.
        kv_heads: Key and value heads (grouped-query attention); default ``heads``.
        context_dim: Width of ``context``; default ``dim``.
        bias: Whether the query, key and value projections have one; the output's always does.
        dropout: Probability of dropping a channel of the heads' output, in training.
        head_gate: A module that gives a gate ``[H]`` at every call, such as
            :class:`fastgt.nn.HeadGate`. Masked heads are left out of the projections too, as long
            as these are plain ``nn.Linear``: one with an adapter or a hook is called for all heads.
        dense_gate_grad: Compute masked heads where the gate requires a gradient, to make it exact.
        logit_clamp, denominator_eps, impl: As for :func:`fastgt.neighborhood_attention`.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.nn import NeighborhoodAttention
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> NeighborhoodAttention(64, heads=4)(torch.randn(3, 64), graph).shape
        torch.Size([3, 64])
    """

    INTO, INTO_KV = ("q",), ("k", "v")

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        head_gate: nn.Module | None = None,
        dense_gate_grad: bool = False,
        logit_clamp: float | tuple[float, float] | None = None,
        denominator_eps: float = 0.0,
        impl: Impl | None = None,
    ):
        super().__init__(head_gate, dense_gate_grad)
        dim, heads = integer("dim", dim, 1), integer("heads", heads)
        kv_heads = heads if kv_heads is None else integer("kv_heads", kv_heads)
        context_dim = dim if context_dim is None else integer("context_dim", context_dim, 1)
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, got {kv_heads} and {heads}")
        check_impl(impl)
        self.dim, self.context_dim = dim, context_dim
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.logit_clamp, self.denominator_eps, self.impl = logit_clamp, denominator_eps, impl
        kv_dim = dim // heads * kv_heads
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
        head_gate: Tensor | None = None,
    ) -> Tensor:
        """x ``[N_rows, dim]``; context ``[N_cols, context_dim]``; edge_bias ``[E, H]``; head_gate
        ``[H]`` or ``[G, H]``, where the module has none of its own."""
        check_graph(graph)
        _check_features("x", x, "N_rows, dim", graph.num_rows, self.dim)
        if context is not None or graph.num_cols != graph.num_rows or self.context_dim != self.dim:
            shape = graph.num_cols, self.context_dim
            _check_features("context", context, "N_cols, context_dim", *shape)
        y, gate = x if context is None else context, self.gate_of(head_gate, x)
        if isinstance(edge_bias, Tensor) and edge_bias.shape[1:] != (self.heads,):
            given = list(edge_bias.shape)
            raise ValueError(f"edge_bias must be [E, H] = [E, {self.heads}], got {given}")
        q, k, v = (self.into_heads(n, z, gate) for n, z in (("q", x), ("k", y), ("v", y)))
        graph = self.sent(y, graph, gate, k, v)
        attended = self.attend(q, k, v, graph, edge_bias, gate)
        return self.out_of_heads("out", self.dropout(gate.scaled(attended)), gate)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        graph: Graph,
        edge_bias: Tensor | None,
        gate: Gate,
    ) -> Tensor:
        """The attention between the projections: what a subclass replaces."""
        if not q.shape[1]:
            return self.without_heads(q, k, v)
        return neighborhood_attention(
            q,
            k,
            v,
            graph,
            edge_bias=gate.heads(edge_bias),
            head_gate=gate.values,
            dense_gate_grad=gate.dense,
            logit_clamp=self.logit_clamp,
            denominator_eps=self.denominator_eps,
            impl=self.impl,
        )


class EdgeGatedAttention(GatedHeads):
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
        edge_output: Whether edges get new features. Without, there is no W_oe: a parameter that no
            call uses would trouble ``DistributedDataParallel``.
        head_gate, dense_gate_grad: As for :class:`NeighborhoodAttention`. The gate multiplies
            what goes into W_o; a masked head has no t_ij either.
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

    INTO = ("q", "k", "v", "gate")
    OUT_OF: tuple[str, ...] = ("out", "edge_out")

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        edge_dim: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        edge_output: bool = True,
        head_gate: nn.Module | None = None,
        dense_gate_grad: bool = False,
        logit_clamp: float | tuple[float, float] | None = None,
        denominator_eps: float = 0.0,
        impl: Impl | None = None,
    ):
        super().__init__(head_gate, dense_gate_grad)
        dim, heads = integer("dim", dim, 1), integer("heads", heads)
        edge_dim = dim if edge_dim is None else integer("edge_dim", edge_dim, 1)
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
        check_impl(impl)
        self.dim, self.edge_dim = dim, edge_dim
        self.heads, self.kv_heads, self.head_dim = heads, heads, dim // heads
        self.logit_clamp, self.denominator_eps, self.impl = logit_clamp, denominator_eps, impl
        self.q = nn.Linear(dim, dim, bias=bias)
        self.k = nn.Linear(dim, dim, bias=bias)
        self.v = nn.Linear(dim, dim, bias=bias)
        self.gate = nn.Linear(edge_dim, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(dim, dim)
        self.edge_out = nn.Linear(dim, edge_dim) if edge_output else None
        if not edge_output:
            self.OUT_OF = ("out",)

    def forward(
        self,
        x: Tensor,
        e: Tensor,
        graph: Graph,
        *,
        edge_output: bool | None = None,
        head_gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x ``[N, dim]``, e ``[E, edge_dim]`` -> the same shapes; head_gate ``[H]`` or ``[G, H]``,
        where the module has none of its own.

        With ``edge_output=False`` no t_ij is stored, and None stands for the edges; None for it is
        what the module was made with.
        """
        if edge_output is None:
            edge_output = self.edge_out is not None
        elif edge_output and self.edge_out is None:
            raise ValueError("edge_output=True, but the module was made with edge_output=False")
        check_graph(graph)
        _check_features("x", x, "N, dim", graph.num_rows, self.dim)
        _check_features("e", e, "E, edge_dim", graph.num_edges, self.edge_dim)
        gate = self.gate_of(head_gate, x)
        q, k, v = (self.into_heads(name, x, gate) for name in ("q", "k", "v"))
        graph = self.sent(x, graph, gate, k, v)
        edge_gate = self.into_heads("gate", e, gate)
        if not q.shape[1]:
            attended = self.without_heads(q, k, v, edge_gate)
            scores: Tensor | None = edge_gate if edge_output else None
        else:
            attended, aux = neighborhood_attention(
                q,
                k,
                v,
                graph,
                edge_gate=edge_gate,
                head_gate=gate.values,
                dense_gate_grad=gate.dense,
                logit_clamp=self.logit_clamp,
                denominator_eps=self.denominator_eps,
                return_aux=AuxRequest(edge_scores=edge_output),
                impl=self.impl,
            )
            scores = aux.edge_scores
        x = self.out_of_heads("out", self.dropout(gate.scaled(attended)), gate)
        if scores is None:
            return x, None
        return x, self.out_of_heads("edge_out", self.dropout(scores), gate)


def _check_features(name: str, x: object, letters: str, *shape: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must be [{letters}] = {list(shape)}, got {list(x.shape)}")

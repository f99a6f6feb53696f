"""PyG's TransformerConv around neighborhood_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastgt.contract import AuxRequest
from fastgt.graph import Graph
from fastgt.nn.sublayers import is_plain_linear, reset_sublayers
from fastgt.ops.attention import neighborhood_attention
from fastgt.ops.checks import MAX_WIDTH, check_graph, integer
from fastgt.ops.implementation import Impl, check_impl


class TransformerConv(nn.Module):
    """``torch_geometric.nn.TransformerConv`` in memory O(N + E H): a drop-in but for the graph.

    Same arguments, parameter names, results and, from the same seed, initial parameters;
    ``load_state_dict`` takes PyG's ``state_dict()`` and the converse. For each head::

        q_i, k_j, v_j = lin_query x_i, lin_key x_j, lin_value x_j;  e_ij = lin_edge edge_attr_ij
        a_ij = softmax_j(q_i . (k_j + e_ij) / sqrt(D))
        m_i  = sum_j dropout(a_ij) (v_j + e_ij)        heads side by side, or their mean
        r_i  = lin_skip x_i
        x'_i = m_i + r_i;  with beta  b_i r_i + (1 - b_i) m_i,
                           b_i = sigmoid(lin_beta [m_i, r_i, m_i - r_i])

    e_ij, of size E H D, is never made while ``lin_edge`` is a plain ``nn.Linear`` without a bias;
    one that is more, for an adapter or a hook, is called, as is ``lin_beta``. A node without edges
    has m_i = 0.

    Args:
        in_channels: Width of x, or ``(sources, targets)``. Not -1: nothing is lazy.
        out_channels: D, the width of a head, from 1 to 256.
        heads: H.
        concat: The output is ``[N, H D]``; else the mean over heads, ``[N, D]``.
        beta: Gate between m and r; without ``root_weight`` it is off, as in PyG.
        dropout: Probability of dropping an attention weight, in training.
        edge_dim: Width of ``edge_attr``, from 1 to 256; None: there is none.
        bias: Whether the projections of x have one; that of ``edge_attr`` never does.
        root_weight: Whether r is added; ``lin_skip`` exists without it too, as in PyG, and gets no
            gradient: for ``DistributedDataParallel``, ``lin_skip.requires_grad_(False)``.
        impl: As for :func:`fastgt.neighborhood_attention`.

    Raises:
        ValueError: A size, or ``dropout``, is out of range.

    Source:
        Shi et al., arXiv 2009.03509, eqs. 3-5; PyG's documentation for ``concat`` and
        ``root_weight``.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.nn import TransformerConv
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> conv = TransformerConv(32, 16, heads=4, edge_dim=5)
        >>> conv(torch.randn(3, 32), graph, torch.randn(3, 5)).shape
        torch.Size([3, 64])
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        heads: int = 1,
        concat: bool = True,
        beta: bool = False,
        dropout: float = 0.0,
        edge_dim: int | None = None,
        bias: bool = True,
        root_weight: bool = True,
        *,
        impl: Impl | None = None,
    ):
        super().__init__()
        if isinstance(in_channels, (tuple, list)):
            if len(in_channels) != 2:
                raise ValueError(f"in_channels must be an int or two, got {len(in_channels)}")
            source, target = (integer("in_channels", size) for size in in_channels)
            in_channels = source, target
        else:
            source = target = in_channels = integer("in_channels", in_channels)
        out_channels, heads = integer("out_channels", out_channels), integer("heads", heads)
        edge_dim = None if edge_dim is None else integer("edge_dim", edge_dim)
        if source < 1 or target < 1:
            raise ValueError(f"in_channels must be positive, nothing is lazy: got {in_channels}")
        if heads < 1:
            raise ValueError(f"heads must be positive, got {heads}")
        for name, size in (("out_channels", out_channels), ("edge_dim", edge_dim)):
            if size is not None and not 1 <= size <= MAX_WIDTH:
                raise ValueError(f"{name} must be from 1 to {MAX_WIDTH}, got {size}")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be from 0 to 1, got {dropout}")
        check_impl(impl)
        self.in_channels, self.out_channels, self.heads = in_channels, out_channels, heads
        self.concat, self.beta, self.root_weight = concat, beta and root_weight, root_weight
        self.dropout, self.edge_dim, self.impl = dropout, edge_dim, impl
        inner = heads * out_channels
        outer = inner if concat else out_channels
        self.lin_key = nn.Linear(source, inner, bias=bias)
        self.lin_query = nn.Linear(target, inner, bias=bias)
        self.lin_value = nn.Linear(source, inner, bias=bias)
        self.lin_edge = None if edge_dim is None else nn.Linear(edge_dim, inner, bias=False)
        self.lin_skip = nn.Linear(target, outer, bias=bias)
        self.lin_beta = nn.Linear(3 * outer, 1, bias=False) if self.beta else None
        self.reset_parameters()  # again: PyG draws twice, and the seed shall mean the same

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        graph: Graph,
        edge_attr: Tensor | None = None,
        return_attention_weights: bool | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """Every node's new features.

        Args:
            x: ``[N, in_channels]``, or ``(x_src [N_cols, sources], x_dst [N_rows, targets])``.
            graph: Who attends to whom, made once: a bare ``edge_index`` would be sorted at every
                call and is refused.
            edge_attr: ``[E, edge_dim]``, in the caller's edge order.
            return_attention_weights: Also give ``(edge_index [2, E], a [E, H])``, before dropout,
                in the caller's edge order. Other than PyG's, a carries no gradient, and False
                means no.

        Raises:
            TypeError, ValueError: An argument does not fit; its name and both numbers are given.
        """
        check_graph(graph)
        if not isinstance(x, Tensor) and not (isinstance(x, (tuple, list)) and len(x) == 2):
            raise TypeError(f"x must be a tensor or (x_src, x_dst), got {type(x).__name__}")
        source, target = (x, x) if isinstance(x, Tensor) else x
        if target is None:
            raise ValueError("x must be (x_src, x_dst), got None for x_dst, which the queries need")
        heads = self.heads, self.out_channels
        m, aux = neighborhood_attention(
            self.lin_query(target).unflatten(-1, heads),
            self.lin_key(source).unflatten(-1, heads),
            self.lin_value(source).unflatten(-1, heads),
            graph,
            **self._edge_terms(edge_attr, graph),
            dropout_p=self.dropout if self.training else 0.0,
            return_aux=AuxRequest(weights=bool(return_attention_weights)),
            impl=self.impl,
        )
        m = m.flatten(-2) if self.concat else m.mean(-2)
        out = self._with_root(m, self.lin_skip(target)) if self.root_weight else m
        return out if aux.weights is None else (out, (graph.edge_index, aux.weights))

    def _edge_terms(self, edge_attr: Tensor | None, graph: Graph) -> dict[str, Any]:
        """What the attention takes of edges, once ``edge_attr`` has been checked."""
        if self.lin_edge is None:
            if edge_attr is not None:
                raise ValueError("edge_dim is None, but there is an edge_attr")
            return {}
        shape = [graph.num_edges, self.edge_dim]
        given: Any = list(edge_attr.shape) if isinstance(edge_attr, Tensor) else edge_attr
        if given != shape:
            raise ValueError(f"edge_attr must be [E, edge_dim] = {shape}, got {given}")
        assert edge_attr is not None
        layer, heads = self.lin_edge, (self.heads, self.out_channels)
        if not is_plain_linear(layer) or layer.bias is not None:
            e = layer(edge_attr).unflatten(-1, heads)
            return {"edge_key": e, "edge_value": e}
        weight = layer.weight.unflatten(0, heads).permute(2, 0, 1)  # [C, H, D]
        return {"edge_attr": edge_attr, "edge_key_weight": weight, "edge_value_weight": weight}

    def _with_root(self, m: Tensor, r: Tensor) -> Tensor:
        layer = self.lin_beta
        if layer is None:
            return m + r
        if is_plain_linear(layer):
            # lin_beta [m, r, m - r], without making that
            of_m, of_r, of_difference = layer.weight.chunk(3, -1)
            logit = linear(m, of_m + of_difference, layer.bias)
            logit = logit + linear(r, of_r - of_difference)  # [N, 1]
        else:
            logit = layer(torch.cat([m, r, m - r], -1))
        return torch.lerp(m, r, logit.sigmoid())

"""Attention of some nodes of a graph, for GTSP (arXiv 2312.05479)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgt.models.graph_gps_layer import GlobalAttention
from fastgt.ops.checks import check_float, check_offsets
from fastgt.pruning import DropPath, TokenPruning


class SparseAttention(GlobalAttention):
    """Softmax attention over graphs, of their best nodes only, left out for some graphs.

    With neither it is :class:`fastgt.models.graph_gps_layer.GlobalAttention`. What does not attend
    gets 0, without the bias of the last projection. After :func:`fastgt.prune_heads` it takes
    biases of all heads as before: the columns of those that are left are kept in ``state_dict``.

    Args:
        dim, heads, dropout, head_gate, dense_gate_grad: As of that.
        prune_tokens: Share of the nodes of a graph that do not attend.
        drop_path: Probability of leaving a graph out, in training.
        virtual: Whether the first node of every graph is a virtual one, which always attends.

    Example:
        >>> import torch
        >>> from fastgt.models.gtsp_attention import SparseAttention
        >>> attention = SparseAttention(16, 4, prune_tokens=0.5)
        >>> y = attention(torch.randn(9, 16), torch.tensor([0, 4, 9]))
        >>> y.shape, int((y != 0).any(1).sum())
        (torch.Size([9, 16]), 5)
    """

    columns: Tensor | None

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        dropout: float = 0.0,
        head_gate: nn.Module | None = None,
        dense_gate_grad: bool = False,
        prune_tokens: float = 0.0,
        drop_path: float = 0.0,
        virtual: bool = False,
    ):
        super().__init__(
            dim, heads, dropout=dropout, head_gate=head_gate, dense_gate_grad=dense_gate_grad
        )
        self.tokens = TokenPruning(dim, 1 - prune_tokens) if prune_tokens else None
        self.drop_path = DropPath(drop_path) if drop_path else None
        self.virtual = virtual
        self.register_buffer("columns", None, persistent=False)

    def forward(
        self,
        x: Tensor,
        offsets: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        head_gate: Tensor | None = None,
    ) -> Tensor:
        """As of :class:`fastgt.models.graph_gps_layer.GlobalAttention`."""
        if bias is not None and self.columns is not None:
            bias = bias.index_select(1, self.columns)
        dropping = self.drop_path is not None and self.training
        if self.tokens is None and not dropping:
            return super().forward(x, offsets, bias=bias, head_gate=head_gate)
        check_float("x", x)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x must be [N, {self.dim}], got {list(x.shape)}")
        if offsets is None:
            offsets = torch.tensor([0, len(x)], device=x.device)
        check_offsets(offsets, len(x), x.device)
        offsets = offsets.long()
        sizes = offsets.diff()
        nodes, bounds = torch.arange(len(x), device=x.device), offsets
        scale = None
        if dropping:
            assert self.drop_path is not None
            scale = self.drop_path.draw(len(sizes), x)  # [G]
            there = scale != 0
            nodes = there.repeat_interleave(sizes, output_size=len(x)).nonzero().squeeze(1)
            bounds = torch.cat([offsets[:1], (sizes * there).cumsum(0)])
        given = x.index_select(0, nodes)
        if self.tokens is not None:
            kept, gate, bounds = self._kept(given, bounds)
            nodes, given = nodes[kept], given.index_select(0, kept) * gate[:, None]
        if bias is not None:
            pairs = int(sizes.square().sum())
            if len(bias) not in (len(x), pairs):
                wanted = f"N = {len(x)} rows, of keys, or {pairs}, of pairs"
                raise ValueError(f"bias must have {wanted}, got {len(bias)}")
            bias = bias.index_select(0, _places(nodes, bounds, offsets, pairs=len(bias) == pairs))
        y = super().forward(given, bounds, bias=bias, head_gate=head_gate)
        if scale is not None:
            y = y * scale.repeat_interleave(bounds.diff(), output_size=len(nodes))[:, None]
        return y.new_zeros(len(x), self.dim).index_copy(0, nodes, y)

    def heads_left(self, heads: Tensor) -> None:
        self.columns = heads if self.columns is None else self.columns[heads]

    def get_extra_state(self) -> Tensor:
        return torch.zeros(0, dtype=torch.long) if self.columns is None else self.columns

    def set_extra_state(self, state: Tensor) -> None:
        self.columns = state.to(self.q.weight.device) if len(state) else None

    def _kept(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of nodes that attend ``[K]``, gates ``[K]`` and boundaries."""
        assert self.tokens is not None
        if not self.virtual:
            return self.tokens.select(x, offsets)
        sizes = offsets.diff()
        first = offsets[:-1][sizes > 0]
        others = torch.ones(len(x), dtype=torch.bool, device=x.device)
        others = others.index_fill(0, first, False).nonzero().squeeze(1)
        own = (sizes - 1).clamp(min=0).cumsum(0)
        kept, gate, bounds = self.tokens.select(
            x.index_select(0, others), torch.cat([offsets[:1], own])
        )
        nodes, order = torch.cat([first, others[kept]]).sort()
        gate = torch.cat([gate.new_ones(len(first)), gate]).index_select(0, order)
        return nodes, gate, torch.cat([offsets[:1], (bounds.diff() + (sizes > 0)).cumsum(0)])

    def extra_repr(self) -> str:
        return f"virtual={self.virtual}"


def _places(nodes: Tensor, bounds: Tensor, offsets: Tensor, *, pairs: bool) -> Tensor:
    """Where the biases of nodes that attend stand among all: those of keys, or of pairs."""
    if not pairs:
        return nodes
    kept, sizes = bounds.diff(), offsets.diff()
    squares = kept * kept
    total = int(squares.sum())
    graphs = torch.arange(len(kept), device=kept.device)
    owner = graphs.repeat_interleave(squares, output_size=total)
    mine = torch.arange(total, device=kept.device) - (squares.cumsum(0) - squares)[owner]
    row = nodes[bounds[owner] + mine // kept[owner]] - offsets[owner]
    column = nodes[bounds[owner] + mine % kept[owner]] - offsets[owner]
    begin = (sizes * sizes).cumsum(0) - sizes * sizes
    return begin[owner] + row * sizes[owner] + column

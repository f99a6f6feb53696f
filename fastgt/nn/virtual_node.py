"""A virtual node for each graph of a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgt.nn.sublayers import check_rows, reset_sublayers
from fastgt.ops.checks import check_float, check_offsets, integer
from fastgt.ops.implementation import Impl, check_impl
from fastgt.ops.segment_pool import virtual_node


class VirtualNode(nn.Module):
    """A node that every node of a graph writes to and reads from, once a layer.

    ``y_i = x_i + s_g`` goes on to the layer's message passing, and
    ``s'_g = dropout(MLP(s_g + sum_i y_i))`` to the next layer's virtual node, where MLP is twice
    Linear, BatchNorm and ReLU: in training a batch has two graphs at least, and one is refused.

    Args:
        dim: Width of nodes and virtual nodes.
        hidden_dim: Width within the MLP; default ``2 * dim``.
        dropout: Probability of dropping an element of the new state, in training.
        residual: Whether s_g is added to its new state.
        impl: As for :func:`fastgt.virtual_node`.

    Source:
        Gilmer et al., arXiv 1704.01212, section 5.2, with the update of OGB's code, arXiv
        2005.00687. That of Cai et al., arXiv 2301.11956, sums over what the message passing gives:
        :class:`fastgt.models.MPNNVirtualNode` does that.

    Example:
        >>> import torch
        >>> from fastgt.nn import VirtualNode
        >>> node, offsets = VirtualNode(64), torch.tensor([0, 3, 10])
        >>> state = node.initial(2)  # of two graphs
        >>> y, state = node(torch.randn(10, 64), state, offsets)
        >>> y.shape, state.shape
        (torch.Size([10, 64]), torch.Size([2, 64]))
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        residual: bool = False,
        impl: Impl | None = None,
    ):
        super().__init__()
        check_impl(impl)
        dim = integer("dim", dim, 1)
        hidden_dim = 2 * dim if hidden_dim is None else integer("hidden_dim", hidden_dim, 1)
        self.residual, self.impl = residual, impl
        self.start = nn.Parameter(torch.zeros(dim))
        self.update = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, dim),
            nn.BatchNorm1d(dim),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def reset_parameters(self) -> None:
        """Draw every parameter anew; the first state is 0."""
        nn.init.zeros_(self.start)
        reset_sublayers(self)

    def initial(self, num_graphs: int) -> Tensor:
        """The learnt first state, ``[G, dim]``: 0 before training.

        Where the module is sharded or offloaded, its parameters are there within a call only: give
        the call None for the state.
        """
        return self.start.expand(integer("num_graphs", num_graphs, 0), -1)

    def forward(self, x: Tensor, state: Tensor | None, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """x ``[N, dim]``; state ``[G, dim]``, None for the first one; offsets ``[G + 1]`` -> y and
        the next state."""
        if state is None:
            check_float("x", x)
            check_offsets(offsets, x.shape[0], x.device)
            state = self.initial(offsets.shape[0] - 1)
        y, pooled = virtual_node(x, state, offsets, impl=self.impl)
        check_rows(self.update, pooled, "update of VirtualNode", "graph")
        new = self.update(pooled)
        return y, state + new if self.residual else new

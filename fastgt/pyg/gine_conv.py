"""GINEConv around aggregate."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch_geometric import nn as pyg

from fastgt.nn.sublayers import is_plain_linear
from fastgt.ops.aggregate import aggregate
from fastgt.ops.checks import MAX_WIDTH
from fastgt.pyg.fused import FusedMessages


class GINEConv(FusedMessages, pyg.GINEConv):
    """``torch_geometric.nn.GINEConv`` without messages ``[E, channels]`` of its own::

        x'_i = nn((1 + eps) x_i + sum_j relu(x_j + e_ij)),   e_ij = edge_attr_ij or lin edge_attr_ij

    Where ``lin`` is a plain linear layer of fewer attributes than channels, e_ij is not made before
    the sum. One that is more, for an adapter or a hook, is called.

    Torch-geometric's own code runs for an explainer, under ``torch.jit``, for static graphs and for
    another ``aggr`` than a sum.

    Args:
        nn, eps, train_eps, edge_dim: Torch-geometric's.

    Source:
        Hu et al., Strategies for Pre-training Graph Neural Networks, arXiv 1905.12265.

    Example:
        >>> import torch
        >>> from fastgt.pyg import GINEConv
        >>> conv = GINEConv(torch.nn.Linear(16, 32), edge_dim=4)
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> conv(torch.randn(3, 16), edge_index, torch.randn(3, 4)).shape
        torch.Size([3, 32])
    """

    PYG = pyg.GINEConv

    def forward(
        self, x: Any, edge_index: Any, edge_attr: Tensor | None = None, size: Any = None
    ) -> Tensor:
        """Every node's new features; the arguments are torch-geometric's."""
        given = x, edge_index, edge_attr, size
        source, target = (x, x) if isinstance(x, Tensor) else x
        why = self.unfusable((source, target), edge_index)
        if why:
            return self.by_pyg(why, *given)
        edges = self.edges(edge_index, source, target, size)
        edge_attr = edges.edge_attr if edge_attr is None else edge_attr
        if edge_attr is None or edge_attr.dim() != 2 or edge_attr.shape[0] != edges.graph.num_edges:
            return self.by_pyg("edge_attr is not [E, channels]", *given)
        messages = source
        values: dict[str, Any] = {}
        if self._fits(edge_attr, source):
            weight, bias = self.lin.weight, self.lin.bias
            values = {"edge_attr": edge_attr, "edge_value_weight": weight.T}
            made, channels = weight, weight.shape[0]
            messages = source if bias is None else source + bias
        else:
            made = values["edge_value"] = edge_attr if self.lin is None else self.lin(edge_attr)
            channels = made.shape[1]
        if channels != source.shape[1]:
            return self.by_pyg("edges and nodes have other numbers of channels", *given)
        if why := self.promoted(source, made):
            return self.by_pyg(why, *given)
        self.note("")
        out = aggregate(messages, edges.graph, **values, activation="relu")
        if target is not None:
            out = out + (1 + self.eps) * target
        return self.nn(out)

    def _fits(self, edge_attr: Tensor, source: Tensor) -> bool:
        """Whether the layer of edges is no more than a product, of attributes that fit it."""
        if not is_plain_linear(self.lin, pyg.Linear):
            return False
        weight, attributes = self.lin.weight, edge_attr.shape[1]
        few = attributes <= min(source.shape[1], MAX_WIDTH)
        return few and attributes == weight.shape[1] and edge_attr.dtype == weight.dtype

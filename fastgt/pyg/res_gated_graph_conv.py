"""ResGatedGraphConv around gated_aggregate."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear
from torch_geometric import nn as pyg

from fastgt.nn.sublayers import is_plain_linear
from fastgt.ops.gated_aggregate import gated_aggregate
from fastgt.pyg.fused import FusedMessages


class ResGatedGraphConv(FusedMessages, pyg.ResGatedGraphConv):
    """``torch_geometric.nn.ResGatedGraphConv`` without vectors on edges of its own::

        x'_i = lin_skip x_i + sum_j sigmoid(lin_key [x_i, e_ij] + lin_query [x_j, e_ij])
                                    * lin_value [x_j, e_ij] + bias

    Without an ``edge_dim`` nothing of size E channels is made. With one, the products of edges are
    made once for both sides of a gate, and once for values.

    Torch-geometric's own code runs for an ``act`` other than a sigmoid, where a projection of
    edges is more than a plain linear layer, for an explainer, under ``torch.jit``, for static
    graphs and for another ``aggr`` than a sum.

    Args:
        in_channels, out_channels, act, edge_dim, root_weight, bias: Torch-geometric's.

    Source:
        Bresson and Laurent, Residual Gated Graph ConvNets, arXiv 1711.07553, eq. 11.

    Example:
        >>> import torch
        >>> from fastgt.pyg import ResGatedGraphConv
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> ResGatedGraphConv(8, 16)(torch.randn(3, 8), edge_index).shape
        torch.Size([3, 16])
    """

    PYG = pyg.ResGatedGraphConv

    def forward(self, x: Any, edge_index: Any, edge_attr: Tensor | None = None) -> Tensor:
        """Every node's new features; the arguments are torch-geometric's."""
        given = x, edge_index, edge_attr
        source, target = (x, x) if isinstance(x, Tensor) else x
        why = self.unfusable((source, target), edge_index) or self._why_not(target)
        if why:
            return self.by_pyg(why, *given)
        edges = self.edges(edge_index, source, target)
        edge_attr = edges.edge_attr if edge_attr is None else edge_attr
        if (edge_attr is None) != (self.edge_dim is None):
            return self.by_pyg("edge_attr and edge_dim do not go together", *given)
        if edge_attr is not None and tuple(edge_attr.shape) != (
            edges.graph.num_edges,
            self.edge_dim,
        ):
            return self.by_pyg("edge_attr is not [E, edge_dim]", *given)
        if edge_attr is not None and (why := self.promoted(source, edge_attr)):
            return self.by_pyg(why, *given)
        self.note("")
        key, query, value = self.lin_key, self.lin_query, self.lin_value
        if edge_attr is None:
            terms = {"gate_row": key(target), "gate_col": query(source)}
            out = gated_aggregate(value(source), edges.graph, **terms, normalize=False)
        else:
            of_nodes, of_edges = zip(
                *(x.weight.tensor_split([-self.edge_dim], 1) for x in (key, query, value)),
                strict=True,
            )
            out = gated_aggregate(
                linear(source, of_nodes[2], value.bias),
                edges.graph,
                linear(edge_attr, of_edges[0] + of_edges[1]),
                gate_row=linear(target, of_nodes[0], key.bias),
                gate_col=linear(source, of_nodes[1], query.bias),
                edge_value=linear(edge_attr, of_edges[2]),
                normalize=False,
            )
        if self.root_weight:
            out = out + self.lin_skip(target)
        return out if self.bias is None else out + self.bias

    def _why_not(self, target: Tensor | None) -> str:
        if target is None:
            return "there are no features of targets"
        if type(self.act) is not nn.Sigmoid:
            return f"the gate is {self.act}"
        layers = self.lin_key, self.lin_query, self.lin_value
        if self.edge_dim is not None and not all(is_plain_linear(x, pyg.Linear) for x in layers):
            return "a projection of edges is more than a plain linear layer, or has not run yet"
        return ""

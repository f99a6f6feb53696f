"""GATConv and GATv2Conv around additive_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric import nn as pyg
from torch_geometric.utils import is_torch_sparse_tensor
from torch_geometric.utils.sparse import set_sparse_value

from fastgt.contract import AuxRequest
from fastgt.graph import Graph
from fastgt.nn.sublayers import is_plain_linear
from fastgt.ops.additive_attention import additive_attention
from fastgt.ops.checks import MAX_WIDTH
from fastgt.pyg.fused import FusedMessages
from fastgt.pyg.sharing import shared, with_self_loops


class _Additive(FusedMessages):
    """What both layers share: self loops, and what is added to the heads."""

    def into_graph(
        self: Any,
        source: Tensor,
        target: Tensor | None,
        edge_index: Any,
        edge_attr: Tensor | None,
        size: Any = None,
    ) -> tuple[Any, Graph, Tensor | None] | str:
        """``edge_index`` with self loops, its Graph and edge attributes; or why there are none."""
        sparse = not isinstance(edge_index, Graph) and not self.plain(edge_index)
        if self.add_self_loops and sparse:
            return "self loops are added to a sparse matrix"
        if edge_attr is not None and edge_attr.dim() == 1:
            edge_attr = edge_attr[:, None]
        if edge_attr is not None and not sparse:
            known = edge_index.num_edges if isinstance(edge_index, Graph) else edge_index.shape[-1]
            if edge_attr.dim() != 2 or edge_attr.shape[0] != known:
                return "edge_attr is not [E, channels]"
        if self.add_self_loops:
            if isinstance(edge_index, Graph):
                graph = edge_index
                edge_index = shared("edge_index", graph, (), lambda: graph.edge_index)
            nodes = source.shape[0] if target is None else min(source.shape[0], target.shape[0])
            nodes = nodes if size is None else min(size)
            edge_index, edge_attr = with_self_loops(edge_index, edge_attr, nodes, self.fill_value)
        edges = self.edges(edge_index, source, target, size)
        edge_attr = edges.edge_attr if edge_attr is None else edge_attr
        if edge_attr is not None and self.lin_edge is None:
            return "edge_attr is given without edge_dim"
        return edge_index, edges.graph, edge_attr

    def with_weights(self: Any, out: Tensor, edge_index: Any, weights: Tensor) -> Any:
        if isinstance(edge_index, Tensor) and is_torch_sparse_tensor(edge_index):
            edge_index = set_sparse_value(edge_index, weights)
        return super().with_weights(out, edge_index, weights)

    def why_not(self: Any, weights: bool) -> str:
        """Why the heads cannot be fused, whatever the edges are."""
        if self.out_channels > MAX_WIDTH:
            return f"heads have more than {MAX_WIDTH} channels"
        if weights and torch.is_grad_enabled():
            return "attention weights are asked for, and gradients are recorded"
        if weights and self.training and self.dropout > 0:
            return "attention weights are asked for after dropout"
        return ""

    def out_of_heads(self: Any, out: Tensor, res: Tensor | None) -> Tensor:
        """Heads side by side or their mean, with the residual and the bias."""
        out = out.flatten(-2) if self.concat else out.mean(-2)
        out = out if res is None else out + res
        return out if self.bias is None else out + self.bias


class GATConv(_Additive, pyg.GATConv):
    """``torch_geometric.nn.GATConv`` in memory O(N + E H).

    For each head, with self loops added unless ``add_self_loops=False``::

        h_i  = lin x_i
        s_ij = leaky_relu(att_dst . h_i + att_src . h_j + att_edge . (lin_edge edge_attr_ij))
        x'_i = sum_j dropout(softmax_j(s_ij)) h_j       heads side by side, or their mean

    Dropout drops other weights from the same seed than torch-geometric's. Torch-geometric's own
    code runs where attention weights are asked for while gradients are recorded, for an explainer,
    under ``torch.jit``, for another ``aggr`` than a sum, where self loops are added to a sparse
    matrix, and for heads of more than 256 channels.

    Args:
        in_channels, out_channels, heads, concat, negative_slope, dropout, add_self_loops, edge_dim,
            fill_value, bias, residual: Torch-geometric's.

    Source:
        Velickovic et al., Graph Attention Networks, arXiv 1710.10903, eqs. 1-6.

    Example:
        >>> import torch
        >>> from fastgt.pyg import GATConv
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> GATConv(32, 16, heads=4)(torch.randn(3, 32), edge_index).shape
        torch.Size([3, 64])
    """

    PYG = pyg.GATConv

    def forward(
        self,
        x: Any,
        edge_index: Any,
        edge_attr: Tensor | None = None,
        size: Any = None,
        return_attention_weights: bool | None = None,
    ) -> Any:
        """Every node's new features; the arguments are torch-geometric's.

        ``edge_index`` may be a :class:`fastgt.Graph`, made once for all layers.
        """
        given = x, edge_index, edge_attr, size, return_attention_weights
        weights = bool(return_attention_weights)
        source, target = (x, x) if isinstance(x, Tensor) else x
        why = self.unfusable((source, target), edge_index) or self.why_not(weights)
        found = why or self.into_graph(source, target, edge_index, edge_attr, size)
        if isinstance(found, str):
            return self.by_pyg(found, *given)
        self.note("")
        edge_index, graph, edge_attr = found
        res = None if self.res is None or target is None else self.res(target)
        h, h_target = self._into_heads(source, target, same=isinstance(x, Tensor))
        k = (h * self.att_src).sum(-1, keepdim=True)  # [N, H, 1]
        if h_target is None:
            q = k.new_zeros(graph.num_rows, self.heads, 1)
        else:
            q = (h_target * self.att_dst).sum(-1, keepdim=True)
        out, aux = additive_attention(
            q,
            k,
            h,
            graph,
            k.new_ones(self.heads, 1),
            **self._edge_terms(edge_attr),
            negative_slope=self.negative_slope,
            dropout_p=self.dropout if self.training else 0.0,
            return_aux=AuxRequest(weights=weights),
        )
        out = self.out_of_heads(out, res)
        return out if aux.weights is None else self.with_weights(out, edge_index, aux.weights)

    def _into_heads(
        self, source: Tensor, target: Tensor | None, same: bool
    ) -> tuple[Tensor, Tensor | None]:
        heads = self.heads, self.out_channels
        lin_source, lin_target = self.lin_src, self.lin_dst
        if self.lin is not None:
            lin_source = lin_target = self.lin
        h = lin_source(source).unflatten(-1, heads)
        if same and self.lin is not None:
            return h, h
        return h, None if target is None else lin_target(target).unflatten(-1, heads)

    def _edge_terms(self, edge_attr: Tensor | None) -> dict[str, Any]:
        if edge_attr is None:
            return {}
        layer, heads = self.lin_edge, (self.heads, self.out_channels)
        if is_plain_linear(layer, pyg.Linear) and layer.bias is None:
            # att_edge . (W e) is one number a head: (att_edge W) . e
            weight = layer.weight.unflatten(0, heads)  # [H, D, C]
            once = (self.att_edge[0, :, :, None] * weight).sum(1)  # [H, C]
            return {"edge_key": (edge_attr @ once.T)[..., None]}
        e = layer(edge_attr).unflatten(-1, heads)
        return {"edge_key": (e * self.att_edge).sum(-1, keepdim=True)}


class GATv2Conv(_Additive, pyg.GATv2Conv):
    """``torch_geometric.nn.GATv2Conv`` in memory O(N + E H).

    For each head, with self loops added unless ``add_self_loops=False``::

        t_ij = lin_r x_i + lin_l x_j + lin_edge edge_attr_ij
        x'_i = sum_j dropout(softmax_j(att . leaky_relu(t_ij))) lin_l x_j

    Heads stand side by side, or their mean is taken. t_ij, of size E H D, is never made while
    ``lin_edge`` is a plain linear layer; one that is more, for an adapter or a hook, is called.
    Dropout, and what runs torch-geometric's own code, are as in :class:`GATConv`.

    Args:
        in_channels, out_channels, heads, concat, negative_slope, dropout, add_self_loops, edge_dim,
            fill_value, bias, share_weights, residual: Torch-geometric's.

    Source:
        Brody et al., How Attentive are Graph Attention Networks?, arXiv 2105.14491, eq. 7.

    Example:
        >>> import torch
        >>> from fastgt.pyg import GATv2Conv
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> GATv2Conv(32, 16, heads=4)(torch.randn(3, 32), edge_index).shape
        torch.Size([3, 64])
    """

    PYG = pyg.GATv2Conv

    def forward(
        self,
        x: Any,
        edge_index: Any,
        edge_attr: Tensor | None = None,
        return_attention_weights: bool | None = None,
    ) -> Any:
        """Every node's new features; the arguments are torch-geometric's.

        ``edge_index`` may be a :class:`fastgt.Graph`, made once for all layers.
        """
        given = x, edge_index, edge_attr, return_attention_weights
        weights = bool(return_attention_weights)
        source, target = (x, x) if isinstance(x, Tensor) else x
        why = self.unfusable((source, target), edge_index) or self.why_not(weights)
        why = why or ("there are no features of targets" if target is None else "")
        found = why or self.into_graph(source, target, edge_index, edge_attr)
        if isinstance(found, str):
            return self.by_pyg(found, *given)
        self.note("")
        edge_index, graph, edge_attr = found
        res = None if self.res is None else self.res(target)
        heads = self.heads, self.out_channels
        k = self.lin_l(source).unflatten(-1, heads)
        if isinstance(x, Tensor) and self.share_weights:
            q = k
        else:
            q = self.lin_r(target).unflatten(-1, heads)
        out, aux = additive_attention(
            q,
            k,
            k,
            graph,
            self.att[0],
            **self._edge_terms(edge_attr),
            negative_slope=self.negative_slope,
            dropout_p=self.dropout if self.training else 0.0,
            return_aux=AuxRequest(weights=weights),
        )
        out = self.out_of_heads(out, res)
        return out if aux.weights is None else self.with_weights(out, edge_index, aux.weights)

    def _edge_terms(self, edge_attr: Tensor | None) -> dict[str, Any]:
        if edge_attr is None:
            return {}
        layer, heads = self.lin_edge, (self.heads, self.out_channels)
        plain = is_plain_linear(layer, pyg.Linear) and layer.bias is None
        if plain and edge_attr.shape[1] <= MAX_WIDTH:
            weight = layer.weight.unflatten(0, heads).permute(2, 0, 1)  # [C, H, D]
            return {"edge_attr": edge_attr, "edge_key_weight": weight}
        return {"edge_key": layer(edge_attr).unflatten(-1, heads)}

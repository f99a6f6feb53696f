"""TransformerConv around neighborhood_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch_geometric import nn as pyg

from fastgt.contract import AuxRequest
from fastgt.graph import Graph
from fastgt.nn.sublayers import is_plain_linear
from fastgt.ops.attention import neighborhood_attention
from fastgt.ops.checks import MAX_WIDTH
from fastgt.pyg.fused import FusedMessages

FEW_EDGES = 6  # a node


class TransformerConv(FusedMessages, pyg.TransformerConv):
    """``torch_geometric.nn.TransformerConv`` in memory O(N + E H).

    For each head::

        q_i, k_j, v_j = lin_query x_i, lin_key x_j, lin_value x_j;  e_ij = lin_edge edge_attr_ij
        a_ij = softmax_j(q_i . (k_j + e_ij) / sqrt(D))
        m_i  = sum_j dropout(a_ij) (v_j + e_ij)        heads side by side, or their mean
        r_i  = lin_skip x_i
        x'_i = m_i + r_i;  with beta  b_i r_i + (1 - b_i) m_i,
                           b_i = sigmoid(lin_beta [m_i, r_i, m_i - r_i])

    e_ij, of size E H D, is not made while ``lin_edge`` is a plain linear layer, but on a CPU for
    graphs of up to six edges a node, where that is faster. A layer that is more, for an adapter or
    a hook, is called, as are all others. Dropout drops other weights from the same seed than
    torch-geometric's.

    Torch-geometric's own code runs where attention weights are asked for while gradients are
    recorded, for an explainer, under ``torch.jit``, for another ``aggr`` than a sum, and for heads
    of more than 256 channels.

    Args:
        in_channels, out_channels, heads, concat, beta, dropout, edge_dim, bias, root_weight:
            Torch-geometric's.

    Source:
        Shi et al., arXiv 2009.03509, eqs. 3-5; PyG's documentation for ``concat`` and
        ``root_weight``.

    Example:
        >>> import torch
        >>> from fastgt.pyg import TransformerConv
        >>> conv = TransformerConv(32, 16, heads=4, edge_dim=5)
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> conv(torch.randn(3, 32), edge_index, torch.randn(3, 5)).shape
        torch.Size([3, 64])
    """

    PYG = pyg.TransformerConv

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
        nodes = (x, x) if isinstance(x, Tensor) else x
        weights = isinstance(return_attention_weights, bool)
        why = self.unfusable(nodes, edge_index) or self._why_not(nodes, weights)
        if why:
            return self.by_pyg(why, *given)
        source, target = nodes
        edges = self.edges(edge_index, source, target)
        graph = edges.graph
        edge_attr = edges.edge_attr if edge_attr is None else edge_attr
        why = self._odd_attributes(edge_attr, graph.num_edges)
        if why:
            return self.by_pyg(why, *given)
        self.note("")
        heads = self.heads, self.out_channels
        m, aux = neighborhood_attention(
            self.lin_query(target).unflatten(-1, heads),
            self.lin_key(source).unflatten(-1, heads),
            self.lin_value(source).unflatten(-1, heads),
            graph,
            **self._edge_terms(edge_attr, graph),
            dropout_p=self.dropout if self.training else 0.0,
            return_aux=AuxRequest(weights=weights),
        )
        out = m.flatten(-2) if self.concat else m.mean(-2)
        if self.root_weight:
            out = self._with_root(out, self.lin_skip(target))
        return out if aux.weights is None else self.with_weights(out, edge_index, aux.weights)

    def _why_not(self, nodes: tuple[Tensor, Tensor | None], weights: bool) -> str:
        if nodes[1] is None:
            return "there are no features of targets"
        if self.out_channels > MAX_WIDTH:
            return f"heads have more than {MAX_WIDTH} channels"
        if weights and torch.is_grad_enabled():
            return "attention weights are asked for, and gradients are recorded"
        return ""

    def _odd_attributes(self, edge_attr: Tensor | None, num_edges: int) -> str:
        if (self.lin_edge is None) != (edge_attr is None):
            return "edge_attr and edge_dim do not go together"
        if edge_attr is not None and (edge_attr.dim() != 2 or edge_attr.shape[0] != num_edges):
            return "edge_attr is not [E, channels]"
        return ""

    def _edge_terms(self, edge_attr: Tensor | None, graph: Graph) -> dict[str, Any]:
        """What the attention takes of edges."""
        if edge_attr is None:
            return {}
        layer, heads = self.lin_edge, (self.heads, self.out_channels)
        plain = is_plain_linear(layer, pyg.Linear) and layer.bias is None
        if plain and edge_attr.shape[1] <= MAX_WIDTH and not self._few(edge_attr, graph):
            weight = layer.weight.unflatten(0, heads).permute(2, 0, 1)  # [C, H, D]
            both = {"edge_key_weight": weight, "edge_value_weight": weight}
            return {"edge_attr": edge_attr, **both}
        e = layer(edge_attr).unflatten(-1, heads)
        return {"edge_key": e, "edge_value": e}

    def _few(self, edge_attr: Tensor, graph: Graph) -> bool:
        """Whether products of nodes cost more than those of the edges; what does not fit is refused
        by the operator."""
        if edge_attr.device.type != "cpu" or torch.compiler.is_compiling():
            return False  # one compilation serves graphs of any number
        weight = self.lin_edge.weight
        fits = edge_attr.dtype == weight.dtype and edge_attr.shape[1] == weight.shape[1]
        return fits and graph.num_edges <= FEW_EDGES * graph.num_rows

    def _with_root(self, m: Tensor, r: Tensor) -> Tensor:
        layer = self.lin_beta
        if layer is None:
            return m + r
        if is_plain_linear(layer, pyg.Linear):
            # lin_beta [m, r, m - r], without making that
            of_m, of_r, of_difference = layer.weight.chunk(3, -1)
            logit = linear(m, of_m + of_difference, layer.bias)
            logit = logit + linear(r, of_r - of_difference)  # [N, 1]
        else:
            logit = layer(torch.cat([m, r, m - r], -1))
        return torch.lerp(m, r, logit.sigmoid())

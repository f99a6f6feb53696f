"""PointTransformerConv around channelwise_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric import nn as pyg

from fastgt.ops.channelwise_attention import channelwise_attention
from fastgt.pyg.fused import FusedMessages
from fastgt.pyg.sharing import with_self_loops


class PointTransformerConv(FusedMessages, pyg.PointTransformerConv):
    """``torch_geometric.nn.PointTransformerConv`` around one fused softmax over channels.

    With self loops added unless ``add_self_loops=False``::

        d_ij = pos_nn(pos_i - pos_j)
        a_ij = softmax_j(attn_nn(lin_dst x_i - lin_src x_j + d_ij))      for each channel
        x'_i = sum_j a_ij (lin x_j + d_ij)

    d_ij and the logits are ``[E, channels]``, since ``pos_nn`` and ``attn_nn`` are any modules.

    Torch-geometric's own code runs for an explainer, under ``torch.jit``, for another ``aggr`` than
    a sum, and where self loops are added to a sparse matrix.

    Args:
        in_channels, out_channels, pos_nn, attn_nn, add_self_loops: Torch-geometric's.

    Source:
        Zhao et al., Point Transformer, arXiv 2012.09164, eq. 3.

    Example:
        >>> import torch
        >>> from fastgt.pyg import PointTransformerConv
        >>> edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
        >>> PointTransformerConv(8, 16)(torch.randn(3, 8), torch.randn(3, 3), edge_index).shape
        torch.Size([3, 16])
    """

    PYG = pyg.PointTransformerConv

    def forward(self, x: Any, pos: Any, edge_index: Any) -> Tensor:
        """Every point's new features; the arguments are torch-geometric's."""
        source, target = (x, x) if isinstance(x, Tensor) else x
        why = self.unfusable((source, target), edge_index)
        if why or (target is None and (why := "there are no features of targets")):
            return self.by_pyg(why, x, pos, edge_index)
        pos_source, pos_target = (pos, pos) if isinstance(pos, Tensor) else pos
        sizes = source.shape[0], target.shape[0]
        if (pos_source.shape[0], pos_target.shape[0]) != sizes:
            raise ValueError(
                f"pos has {pos_source.shape[0]} sources and {pos_target.shape[0]} targets but x "
                f"has {sizes[0]} and {sizes[1]}"
            )
        if self.add_self_loops:
            if not self.plain(edge_index):
                return self.by_pyg("self loops are added to a sparse matrix", x, pos, edge_index)
            edge_index, _ = with_self_loops(edge_index, None, min(sizes))
        graph = self.edges(edge_index, source, target).graph
        self.note("")
        column, row = graph.edge_index
        # in torch-geometric's order, in which layers of lazy sizes draw their weights
        key, query, value = self.lin_src(source), self.lin_dst(target), self.lin(source)
        delta = self.pos_nn(pos_target[row] - pos_source[column])
        logits = query[row] - key[column] + delta
        if self.attn_nn is not None:
            logits = self.attn_nn(logits)
        # what has one channel counts for all of them
        channels = torch.broadcast_shapes(*(x.shape[1:] for x in (delta, logits, value)))
        delta, logits, value = (x.expand(-1, *channels) for x in (delta, logits, value))
        return channelwise_attention(logits, value, graph, edge_value=delta)

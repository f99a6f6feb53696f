"""GPSConv on batches without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch_geometric import nn as pyg
from torch_geometric.utils import to_dense_batch

from fastgt.graph import Graph
from fastgt.nn.linear_attention import LinearAttention
from fastgt.nn.sublayers import has_hooks
from fastgt.ops.global_attention import MAX_WIDTH, global_attention
from fastgt.pyg.fused import Fused, as_transformed, transformed
from fastgt.pyg.linear_attention import Ragged
from fastgt.pyg.sharing import offsets_of


class GPSConv(Fused, pyg.GPSConv):
    """``torch_geometric.nn.GPSConv`` without padding: nothing of size graphs x largest graph.

    ``conv`` is called as it is, and ``attn`` on all nodes of the batch::

        h_local  = norm1(dropout(conv(x)) + x);  h_global = norm2(dropout(attn(x)) + x)
        x' = norm3(h + mlp(h)),  h = h_local + h_global

    ``attn`` is the layer that torch-geometric makes of ``attn_type``. It may be replaced by a
    module of fastgt: :class:`fastgt.nn.LinearAttention`, or a layer of fastgt.pyg. With
    ``attn_type="performer"``, which torch-geometric pads, ``attn`` becomes
    :class:`fastgt.pyg.PerformerAttention`, in whose denominator no padded key counts.

    Torch-geometric's own code runs where ``attn`` is another class than these, or has hooks. A
    layer of fastgt.pyg that counts padded keys gets them.

    Args:
        channels, conv, heads, dropout, act, act_kwargs, norm, norm_kwargs, attn_type, attn_kwargs:
            Torch-geometric's.

    Raises:
        ValueError: ``batch`` is not sorted.

    Source:
        Rampasek et al., Recipe for a General, Powerful, Scalable Graph Transformer, arXiv
        2205.12454.

    Example:
        >>> import torch
        >>> from fastgt.pyg import GINEConv, GPSConv
        >>> conv = GPSConv(16, GINEConv(torch.nn.Linear(16, 16), edge_dim=4), heads=4)
        >>> x, edge_attr, batch = torch.randn(3, 16), torch.randn(2, 4), torch.tensor([0, 0, 1])
        >>> conv(x, torch.tensor([[0, 1], [1, 0]]), batch, edge_attr=edge_attr).shape
        torch.Size([3, 16])
    """

    PYG = pyg.GPSConv

    def __init__(self, channels: int, *args: Any, **kwargs: Any):
        super().__init__(channels, *args, **kwargs)
        from fastgt.pyg.accelerating import replace

        replace(self, "attn")

    def forward(
        self, x: Tensor, edge_index: Any, batch: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Every node's new features; the arguments are torch-geometric's.

        ``edge_index`` may be a :class:`fastgt.Graph`. Its graphs are those of the batch where no
        ``batch`` is given.
        """
        why, offsets = self._why_not(x), None
        if batch is None and isinstance(edge_index, Graph):
            offsets = edge_index.graph_ptr
            if edge_index.num_rows != x.shape[0]:
                raise ValueError(f"edge_index has {edge_index.num_rows} nodes, x has {x.shape[0]}")
            if why or self.norm_with_batch:
                batch = _batch_of(edge_index.graph_ptr, x)
        if why:
            return self.by_pyg(why, x, edge_index, batch, **kwargs)
        self.note("")
        sums = []
        if self.conv is not None:
            h = self.conv(x, edge_index, **kwargs)
            sums.append(self._joined(self.norm1, h, x, batch))
        if offsets is None:
            offsets = offsets_of(batch, x.shape[0], x.device)
        sums.append(self._joined(self.norm2, self._attend(x, offsets), x, batch))
        out = sum(sums)
        out = out + self.mlp(out)
        return self._normed(self.norm3, out, batch)

    def _why_not(self, x: Any) -> str:
        attn = self.attn
        if not isinstance(x, Tensor) or x.dim() != 2:
            return "x is not [N, channels]"
        if type(attn) is nn.MultiheadAttention:
            if why := transformed():
                return why
            if has_hooks(attn) or "forward" in vars(attn):
                return "attn has hooks"
            if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn:
                return "attn has keys and values of its own"
            if attn.head_dim > MAX_WIDTH:
                return f"heads have more than {MAX_WIDTH} channels"
            return ""
        if isinstance(attn, (Ragged, LinearAttention)):
            return ""
        return f"attn is a {type(attn).__name__}"

    def _attend(self, x: Tensor, offsets: Tensor) -> Tensor:
        attn = self.attn
        if isinstance(attn, Ragged) and (attn.padding == "counted" or attn.unfusable()):
            h, mask = to_dense_batch(x, _batch_of(offsets, x))
            return self.attn(h, mask)[mask]
        if not isinstance(attn, nn.MultiheadAttention):
            with as_transformed():
                return attn(x, offsets=offsets)
        q, k, v = (
            part.unflatten(-1, (attn.num_heads, attn.head_dim))
            for part in linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, -1)
        )
        p = attn.dropout if attn.training else 0.0
        return attn.out_proj(global_attention(q, k, v, offsets, dropout_p=p).flatten(-2))

    def _joined(self, norm: Any, h: Tensor, x: Tensor, batch: Tensor | None) -> Tensor:
        h = dropout(h, p=self.dropout, training=self.training) + x
        return self._normed(norm, h, batch)

    def _normed(self, norm: Any, h: Tensor, batch: Tensor | None) -> Tensor:
        if norm is None:
            return h
        return norm(h, batch=batch) if self.norm_with_batch else norm(h)


def _batch_of(offsets: Tensor, x: Tensor) -> Tensor:
    """The number of each node's graph, ``[N]``."""
    graphs = torch.arange(offsets.shape[0] - 1, device=x.device)
    return graphs.repeat_interleave(offsets.diff(), output_size=x.shape[0])

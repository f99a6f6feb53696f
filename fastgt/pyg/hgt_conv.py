"""HGTConv around neighborhood_attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch_geometric import nn as pyg
from torch_geometric.nn import MessagePassing

from fastgt.ops.attention import neighborhood_attention
from fastgt.ops.checks import MAX_WIDTH
from fastgt.pyg.fused import FusedMessages


class HGTConv(FusedMessages, pyg.HGTConv):
    """``torch_geometric.nn.HGTConv`` in memory O(N + E H).

    For each head, over the edges of all relations r that end in node i::

        a_ij = softmax_j(p_rel_r q_i . (k_rel_r k_j) / sqrt(D))
        m_i  = sum_j a_ij (v_rel_r v_j)

    What stands before and after it is torch-geometric's own code, as are its layers.

    Torch-geometric's own code runs for an explainer and under ``torch.jit``.

    Args:
        in_channels, out_channels, metadata, heads: Torch-geometric's.

    Source:
        Hu et al., Heterogeneous Graph Transformer, arXiv 2003.01332, eqs. 1-5.

    Example:
        >>> import torch
        >>> from fastgt.pyg import HGTConv
        >>> writes = ("author", "writes", "paper")
        >>> conv = HGTConv(8, 16, (["author", "paper"], [writes]), heads=2)
        >>> x = {"author": torch.randn(3, 8), "paper": torch.randn(2, 8)}
        >>> conv(x, {writes: torch.tensor([[0, 1, 2], [0, 1, 1]])})["paper"].shape
        torch.Size([2, 16])
    """

    PYG = pyg.HGTConv

    def propagate(self, edge_index: Any, size: Any = None, **given: Any) -> Tensor:
        """The attention between the projections."""
        # of [N, H, D], which messages know as matrices
        q, k = (given[name].flatten(1) for name in ("q", "k"))
        why = self.unfusable((k, q), edge_index)
        if self.out_channels // self.heads > MAX_WIDTH:
            why = f"heads have more than {MAX_WIDTH} channels"
        if why:
            self.tell(why)
            return MessagePassing.propagate(self, edge_index, size=size, **given)
        self.note("")
        graph = self.edges(edge_index, k, q).graph
        out = neighborhood_attention(
            given["q"], given["k"], given["v"], graph, edge_gate=given["edge_attr"]
        )
        return out.flatten(1)

    _orig_propagate = _jinja_propagate = propagate  # PyG binds one of them after an explanation

    def _set_jittable_templates(self, raise_on_error: bool = False) -> None:
        kind: Any = type(self)
        if "propagate" not in vars(kind):
            kind.propagate = HGTConv.propagate  # else PyG compiles its own for a subclass
        super()._set_jittable_templates(raise_on_error)
        kind.propagates = kind.propagate is not HGTConv.propagate

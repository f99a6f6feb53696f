"""Linear attention of PyG, on dense batches with a mask and on ragged ones."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch_geometric.nn import attention as pyg
from torch_geometric.nn.attention.performer import PerformerProjection

from fastgt.ops.checks import MAX_WIDTH, check_offsets
from fastgt.ops.linear_attention import MAX_FEATURES, linear_attention, sgformer_attention
from fastgt.pyg.fused import Fused, as_transformed

Padding = Literal["ignored", "counted"]


class Ragged(Fused):
    """A layer that takes dense batches with a mask, as PyG's does, and ragged ones."""

    padding: Padding = "ignored"

    def attend(self, x: Tensor, offsets: Tensor) -> Tensor:
        """All nodes of a ragged batch, ``[N, channels]``."""
        raise NotImplementedError

    def unfusable(self) -> str:
        """Why PyG's own code has to run; "" if it has not."""
        return ""

    def forward(
        self: Any, x: Tensor, mask: Tensor | None = None, *, offsets: Tensor | None = None
    ) -> Tensor:
        """Attention of every node over the nodes of its graph.

        Args:
            x: ``[B, n, channels]``, graphs padded to n nodes; or ``[N, channels]`` with
                ``offsets``, graphs one after another.
            mask: ``[B, n]`` bool: which nodes are there. None: all.
            offsets: ``[B + 1]`` boundaries of the graphs.

        Returns:
            As x, with the layer's channels. Nodes that are not there get 0.

        Raises:
            TypeError: ``x`` is no tensor, or ``offsets`` hold no integers.
            ValueError: A shape does not fit, or there are ``offsets`` and only PyG's code, which
                has none, computes this layer.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        why = self.unfusable()
        if offsets is not None:
            if x.dim() != 2 or mask is not None:
                raise ValueError(f"with offsets, x must be [N, channels], got {list(x.shape)}")
            if why:
                raise ValueError(f"with offsets, torch-geometric's own code cannot run, but {why}")
            check_offsets(offsets, x.shape[0], x.device)
            self.note("")
            with as_transformed():
                return self.attend(x, offsets)
        if self.padding == "counted" and mask is not None:
            why = "padded keys are to be counted"
        if why:
            return self.by_pyg(why, x, mask)
        if x.dim() != 3:
            raise ValueError(f"x must be [B, n, channels], got {list(x.shape)}")
        self.note("")
        graphs, nodes = x.shape[:2]
        if mask is None:
            offsets = torch.arange(graphs + 1, device=x.device) * nodes
            with as_transformed():
                out = self.attend(x.flatten(0, 1), offsets)
            return out.unflatten(0, (graphs, nodes))
        if mask.shape != x.shape[:2]:
            raise ValueError(f"mask must be {list(x.shape[:2])}, got {list(mask.shape)}")
        offsets = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
        with as_transformed():
            out = self.attend(x[mask], offsets)
        return out.new_zeros(graphs, nodes, out.shape[-1]).index_put((mask,), out)


def _checked(padding: str) -> Padding:
    if padding not in get_args(Padding):
        raise ValueError(f"padding must be one of {list(get_args(Padding))}, got {padding!r}")
    return padding  # type: ignore[return-value]


class PerformerAttention(Ragged, pyg.PerformerAttention):
    """``torch_geometric.nn.attention.PerformerAttention`` without padding.

    ``out = attn_out(concat_h linear_attention(q, k, v))`` with features ``relu(w . x) + 1e-3``,
    then dropout. Torch-geometric zeroes the values of padded nodes, but their keys stay in the
    denominator. Here nothing of them is computed, so that a graph's output does not depend on the
    others in its batch. ``padding="counted"`` runs torch-geometric's code.

    Args:
        channels, heads, head_channels, kernel, qkv_bias, attn_out_bias, dropout:
            Torch-geometric's. A ``kernel`` other than ReLU runs torch-geometric's code.
        padding: ``"ignored"``, or ``"counted"`` as torch-geometric released it.

    Source:
        Choromanski et al., Rethinking Attention with Performers, arXiv 2009.14794, section 2.4.

    Example:
        >>> import torch
        >>> from fastgt.pyg import PerformerAttention
        >>> attn = PerformerAttention(channels=16, heads=4)
        >>> mask = torch.tensor([[True, True, False], [True, True, True]])
        >>> attn(torch.randn(2, 3, 16), mask).shape
        torch.Size([2, 3, 16])
    """

    PYG = pyg.PerformerAttention

    def __init__(self, *args: Any, padding: Padding = "ignored", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.padding = _checked(padding)

    def unfusable(self) -> str:
        attn = self.fast_attn
        if type(attn) is not PerformerProjection or "forward" in vars(attn):
            return "fast_attn has a forward of its own"
        if attn._forward_hooks or attn._forward_pre_hooks:
            return "fast_attn has hooks"
        if type(attn.kernel) is not nn.ReLU:
            return f"the kernel is {attn.kernel}"
        if self.head_channels > MAX_WIDTH or not 1 <= self.fast_attn.num_rows <= MAX_FEATURES:
            return (
                f"heads have {self.head_channels} channels and {self.fast_attn.num_rows} features"
            )
        return ""

    def attend(self, x: Tensor, offsets: Tensor) -> Tensor:
        heads = self.heads, self.head_channels
        q, k, v = (layer(x).unflatten(-1, heads) for layer in (self.q, self.k, self.v))
        out = linear_attention(
            q,
            k,
            v,
            offsets,
            feature_map="relu_random",
            projection=self.fast_attn.projection_matrix,
            eps=0.0,
        )
        return self.dropout(self.attn_out(out.flatten(-2)))


class SGFormerAttention(Ragged, pyg.SGFormerAttention):
    """``torch_geometric.nn.attention.SGFormerAttention`` without padding.

    For node i of a graph of n nodes, with the q and k of every node and head divided by their
    norms, and the mean over heads taken::

        out_i = (sum_j (q_i . k_j) v_j + n v_i) / (sum_j q_i . k_j + n)

    Torch-geometric counts padded nodes in n and in the denominator; ``padding="counted"`` runs its
    code. The authors divide by norms of a graph, as :func:`fastgt.sgformer_attention` does.

    Args:
        channels, heads, head_channels, qkv_bias: Torch-geometric's.
        padding: ``"ignored"``, or ``"counted"`` as torch-geometric released it.

    Source:
        Wu et al., SGFormer, arXiv 2306.10759, as torch-geometric has it.

    Example:
        >>> import torch
        >>> from fastgt.pyg import SGFormerAttention
        >>> SGFormerAttention(channels=16)(torch.randn(2, 3, 16)).shape
        torch.Size([2, 3, 64])
    """

    PYG = pyg.SGFormerAttention

    def __init__(self, *args: Any, padding: Padding = "ignored", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.padding = _checked(padding)

    def unfusable(self) -> str:
        if self.head_channels > MAX_WIDTH:
            return f"heads have more than {MAX_WIDTH} channels"
        return ""

    def attend(self, x: Tensor, offsets: Tensor) -> Tensor:
        heads = self.heads, self.head_channels
        q, k, v = (layer(x).unflatten(-1, heads) for layer in (self.q, self.k, self.v))
        # zeros count as 1e-6 there
        q, k = (torch.where(y == 0, 1e-6, y) for y in (q, k))
        return sgformer_attention(q, k, v, offsets, norms="node").mean(1)


class PolynormerAttention(Ragged, pyg.PolynormerAttention):
    """``torch_geometric.nn.attention.PolynormerAttention`` without padding.

    ``out = dropout(relu(lin_out(lns(attention) * (h_lins x + beta))))``, where attention is linear,
    with features ``sigmoid(q)`` and ``sigmoid(k)``. Torch-geometric zeroes the values of padded
    nodes, but their keys stay in the denominator; ``padding="counted"`` runs its code.

    Args:
        channels, heads, head_channels, beta, qkv_bias, qk_shared, dropout: Torch-geometric's.
        padding: ``"ignored"``, or ``"counted"`` as torch-geometric released it.

    Source:
        Deng et al., Polynormer, arXiv 2403.01232.

    Example:
        >>> import torch
        >>> from fastgt.pyg import PolynormerAttention
        >>> PolynormerAttention(channels=16, heads=4)(torch.randn(2, 3, 16)).shape
        torch.Size([2, 3, 256])
    """

    PYG = pyg.PolynormerAttention

    def __init__(self, *args: Any, padding: Padding = "ignored", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.padding = _checked(padding)

    def unfusable(self) -> str:
        if self.head_channels > MAX_WIDTH:
            return f"heads have more than {MAX_WIDTH} channels"
        return ""

    def attend(self, x: Tensor, offsets: Tensor) -> Tensor:
        h = self.h_lins(x)
        # heads are the last dimension there
        heads = self.head_channels, self.heads
        k, v = (layer(x).unflatten(-1, heads).mT for layer in (self.k, self.v))
        q = k if self.qk_shared else self.q(x).unflatten(-1, heads).mT
        out = linear_attention(q, k, v, offsets, feature_map="sigmoid", eps=1e-6)
        out = self.lns(out.mT.flatten(-2)) * (h + self.beta)
        return self.dropout(torch.relu(self.lin_out(out)))

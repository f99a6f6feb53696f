"""A block of Todyformer: message passing within patches of time, then attention between them.

The equations are in todyformer.py.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.nn.sublayers import reset_sublayers
from fastgt.ops.aggregate import aggregate
from fastgt.ops.attention import neighborhood_attention
from fastgt.ops.global_attention import global_attention
from fastgt.ops.segment_pool import segment_mean

Mixing = Literal["attention", "mean"]


class TodyformerBlock(nn.Module):
    """Message passing within the patches, then attention between them.

    Args:
        dim, heads, time_dim, mixing, dropout: As of :class:`TodyformerConfig`.
        edge_dim: Width of what stands on events.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        edge_dim: int,
        time_dim: int,
        *,
        mixing: Mixing = "attention",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.local = EventAttention(dim, heads, edge_dim, mixing)
        self.local_norm, self.local_ffn = nn.LayerNorm(dim), FeedForward(dim, dropout)
        self.position = nn.Linear(time_dim, dim, bias=False)
        self.across = PatchAttention(dim, heads, mixing)
        self.across_norm, self.across_ffn = nn.LayerNorm(dim), FeedForward(dim, dropout)
        self.dropout = nn.Dropout(dropout)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, z: Tensor, position: Tensor, patches: Patches) -> Tensor:
        """x ``[T, dim]``, z ``[2 E, edge_dim]``, position ``[T, time_dim]`` -> ``[T, dim]``."""
        x = self.local_norm(x + self.dropout(self.local(x, z, patches.graph)))
        x = self.local_ffn(x) + self.position(position)
        x = self.across_norm(x + self.dropout(self.across(x, patches.offsets)))
        return self.across_ffn(x)


class Patches(NamedTuple):
    """Events in patches of equal counts, as a graph of tokens.

    Attributes:
        graph: T tokens; edge e is event e, and E + e the same the way back.
        node, patch: ``[T]`` int64 of each token, node after node, patch after patch.
        offsets: ``[N + 1]`` int64: the tokens of node i are ``offsets[i]`` to ``offsets[i + 1]``.
    """

    graph: Graph
    node: Tensor
    patch: Tensor
    offsets: Tensor


def patchify(source: Tensor, target: Tensor, num_nodes: int, count: int) -> Patches:
    """Cut events into patches of equal counts; of E events, event e is of floor(e count / E).

    Args:
        source, target: ``[E]`` int64, in the order of time.
        num_nodes: That there are.
        count: Of patches. Where there are fewer events, some patches have none.

    Example:
        >>> import torch
        >>> from fastgt.models.todyformer_block import patchify
        >>> patches = patchify(torch.tensor([0, 0, 3]), torch.tensor([3, 3, 0]), 4, 3)
        >>> patches.node.tolist(), patches.patch.tolist(), patches.offsets.tolist()
        ([0, 0, 0, 3, 3, 3], [0, 1, 2, 0, 1, 2], [0, 3, 3, 3, 6])
    """
    events = source.shape[0]
    patch = torch.arange(events, device=source.device) * count // max(events, 1)
    keys, token = torch.cat([source * count + patch, target * count + patch]).unique(
        return_inverse=True
    )
    node = keys // count
    edge_index = torch.stack([token, token.roll(events)])
    offsets = torch.searchsorted(node, torch.arange(num_nodes + 1, device=node.device))
    graph = Graph.from_edge_index(edge_index, node.shape[0])
    return Patches(graph, node, keys % count, offsets)


class EventAttention(nn.Module):
    """Attention of tokens over their events, whose keys and values are of node, edge and time.

    ``y_i = W_o concat_h sum_e softmax_e(q_i . (k_j + W_ke z_e) / sqrt(D)) (v_j + W_ve z_e)``; in
    the place of the softmax with ``mixing="mean"`` 1 / degree of i.
    """

    def __init__(self, dim: int, heads: int, edge_dim: int, mixing: Mixing = "attention"):
        super().__init__()
        self.heads = heads
        softmax = mixing == "attention"
        self.q = nn.Linear(dim, dim) if softmax else None
        self.k = nn.Linear(dim, dim, bias=False) if softmax else None
        self.v = nn.Linear(dim, dim)
        self.edge_k = nn.Linear(edge_dim, dim, bias=False) if softmax else None
        self.edge_v = nn.Linear(edge_dim, dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, z: Tensor, graph: Graph) -> Tensor:
        """x ``[T, dim]``, z ``[2 E, edge_dim]`` -> ``[T, dim]``."""
        v, value_weight = self.v(x), self.edge_v.weight.T
        if self.q is None or self.k is None or self.edge_k is None:
            mean = aggregate(v, graph, reduce="mean", edge_attr=z, edge_value_weight=value_weight)
            return self.out(mean)
        shape = self.heads, -1
        y = neighborhood_attention(
            self.q(x).unflatten(1, shape),
            self.k(x).unflatten(1, shape),
            v.unflatten(1, shape),
            graph,
            edge_attr=z,
            edge_key_weight=self.edge_k.weight.T.unflatten(1, shape),
            edge_value_weight=value_weight.unflatten(1, shape),
        )
        return self.out(y.flatten(1))


class PatchAttention(nn.Module):
    """Attention of each token over all tokens of its node.

    ``y_im = W_o concat_h sum_n softmax_n(q_im . k_in / sqrt(D)) v_in``; in the place of the softmax
    with ``mixing="mean"`` 1 / how many tokens the node has.
    """

    def __init__(self, dim: int, heads: int, mixing: Mixing = "attention"):
        super().__init__()
        self.heads = heads
        softmax = mixing == "attention"
        self.q = nn.Linear(dim, dim) if softmax else None
        self.k = nn.Linear(dim, dim, bias=False) if softmax else None
        self.v, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x ``[T, dim]``, offsets ``[N + 1]`` -> ``[T, dim]``."""
        v = self.v(x)
        if self.q is None or self.k is None:
            mean = segment_mean(v, offsets)
            return self.out(mean.repeat_interleave(offsets.diff(), 0))
        q, k, v = (y.unflatten(1, (self.heads, -1)) for y in (self.q(x), self.k(x), v))
        return self.out(global_attention(q, k, v, offsets).flatten(1))


class FeedForward(nn.Module):
    """``norm(x + dropout(W_2 relu(W_1 x)))``, twice as wide within."""

    def __init__(self, dim: int, dropout: float = 0.0):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim), nn.Dropout(dropout)
        )
        self.norm = nn.LayerNorm(dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, dim]`` -> ``[T, dim]``."""
        return self.norm(x + self.layers(x))

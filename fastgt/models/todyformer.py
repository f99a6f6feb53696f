"""Todyformer: message passing within patches of time, attention between them (arXiv 2402.05944).

The E events before the time ``now`` are cut into M patches of equal counts: event e, from 0, is of
patch floor(e M / E). A token im is node i in patch m. It exists where the node has an event there,
so that nothing is padded or masked. All tokens of a node begin as x_im = x_i, its learnt vector or
a linear layer of its features. A block, several times, with * channel by channel:

    z_e   = [edge_e, direction_e, phi(now - t_e)]             phi(d) = cos(w * d + b)
    a_ie  = softmax_e((W_q x_im) . (W_k x_jm + W_ke z_e) / sqrt(D))      head by head
    y_im  = W_o concat_h sum_e a_ie (W_v x_jm + W_ve z_e)     events e of i and j in patch m
    l_im  = ffn(norm(x_im + dropout(y_im)))
    p_im  = l_im + W_p phi'(now - t_m)                        t_m: of the last event in patch m
    x_im <- ffn(norm(p_im + dropout(W_u attention(p)_im)))    over all patches n with a token in

    ffn(x) = norm(x + dropout(W_2 relu(W_1 x)))

The tokens of a node stand one after the other. So packing, which gives the attention each node's
tokens as a sequence, and unpacking are the order in which tokens are made. In the end, for a pair::

    h_i    = W_n x_i + mean_m x_im                            without tokens the first part alone
    s_ij   = w . relu(W [h_i, h_j, h_i * h_j] + c) + d

From the paper are patches of equal counts, the message passing with keys and values of node, edge
and time as in DyG2Vec (arXiv 2210.16906), packing, a positional encoding of time, and blocks that
alternate both. Its authors released no code. Chosen here are: the norms and the ffn; phi, which is
that of TGAT (arXiv 2002.07962), with ages counted from ``now``; one layer of message passing a
block, without DyG2Vec's counts of common neighbours; that an event stands both ways, and direction
(1, and -1 for the way back) tells them apart; the positional encoding of a patch by the age of its
last event; the mean over a node's tokens; the product in the predictor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from fastgt.models.graph_gps_encoders import check_matrix
from fastgt.models.graph_transformer import check_dtype
from fastgt.models.todyformer_block import Mixing, TodyformerBlock, patchify
from fastgt.nn.sublayers import reset_sublayers
from fastgt.ops.checks import check_times, integer, node_ids, node_pairs, number, readable
from fastgt.ops.segment_pool import segment_mean


@dataclass
class TodyformerConfig:
    """Settings of :class:`Todyformer`.

    Attributes:
        num_nodes: How many nodes there are.
        node_features: Width of their features; with 0 each node has a learnt vector.
        edge_features: Width of the events' features; 0 for events without.
        dim: Width of tokens; a multiple of ``heads``.
        heads: Of both attentions.
        blocks: Each is message passing within the patches, then attention between them.
        patches: How many; all have the same number of events, or one more.
        time_dim: How many frequencies an encoding of time has.
        mixing: ``"attention"``; or ``"mean"``, with equal weights in the place of both softmaxes.
        dropout: Before every residual.
    """

    num_nodes: int
    node_features: int = 0
    edge_features: int = 0
    dim: int = 64
    heads: int = 4
    blocks: int = 3
    patches: int = 16
    time_dim: int = 16
    mixing: Mixing = "attention"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_nodes", "dim", "heads", "blocks", "patches", "time_dim"):
            setattr(self, name, integer(name, getattr(self, name), 1))
        for name in ("node_features", "edge_features"):
            setattr(self, name, integer(name, getattr(self, name), 0))
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim={self.dim}, got {self.heads}")
        if self.mixing not in get_args(Mixing):
            raise ValueError(f"mixing must be one of {list(get_args(Mixing))}, got {self.mixing!r}")
        self.dropout = number("dropout", self.dropout)
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout must be from 0 to 1, got {self.dropout}")


class Todyformer(nn.Module):
    """Logits of future events between pairs of nodes, from the events before them.

    Source:
        Biparva et al., Todyformer: Towards Holistic Dynamic Graph Transformers with
        Structure-Aware Tokenization, arXiv 2402.05944.

    Example:
        >>> import torch
        >>> from fastgt.models import Todyformer, TodyformerConfig
        >>> model = Todyformer(TodyformerConfig(num_nodes=5, patches=2))
        >>> source, target = torch.tensor([[0, 1, 3, 0], [1, 2, 0, 1]])
        >>> time = torch.tensor([1, 4, 4, 9])
        >>> pairs = torch.tensor([[0, 4], [1, 2]])  # node 4 had no event
        >>> model(pairs, source, target, time, now=10).shape
        torch.Size([2])
    """

    def __init__(self, config: TodyformerConfig):
        super().__init__()
        c = self.config = config
        self.embed: nn.Module
        if c.node_features:
            self.embed = nn.Linear(c.node_features, c.dim)
        else:
            self.embed = nn.Embedding(c.num_nodes, c.dim)
        self.age = TimeEncoding(c.time_dim)
        self.patch_age = TimeEncoding(c.time_dim)
        width = c.edge_features + 1 + c.time_dim
        self.blocks = nn.ModuleList(
            TodyformerBlock(c.dim, c.heads, width, c.time_dim, mixing=c.mixing, dropout=c.dropout)
            for _ in range(c.blocks)
        )
        self.own = nn.Linear(c.dim, c.dim)
        self.link = nn.Sequential(nn.Linear(3 * c.dim, c.dim), nn.ReLU(), nn.Linear(c.dim, 1))

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(
        self,
        pairs: Tensor,
        source: Tensor,
        target: Tensor,
        time: Tensor,
        edge: Tensor | None = None,
        *,
        now: float,
        node: Tensor | None = None,
    ) -> Tensor:
        """Pairs ``[2, B]``, source above target -> logits ``[B]``; the rest as for `encode`."""
        h = self.encode(source, target, time, edge, now=now, node=node)
        pairs = node_pairs("pairs", pairs, self.config.num_nodes, h.device)
        first, second = (h.index_select(0, nodes) for nodes in pairs)  # [B, dim]
        return self.link(torch.cat([first, second, first * second], 1))[:, 0]

    def encode(
        self,
        source: Tensor,
        target: Tensor,
        time: Tensor,
        edge: Tensor | None = None,
        *,
        now: float,
        node: Tensor | None = None,
    ) -> Tensor:
        """The state of every node at the time ``now``.

        Args:
            source, target: ``[E]`` integers, nodes of the events before ``now``; E may be 0.
            time: ``[E]`` integers or floating point, never falling, all below ``now``.
            edge: ``[E, edge_features]``; None where these are 0.
            now: Time of what is to be predicted.
            node: ``[N, node_features]``; None where these are 0.

        Returns:
            ``[N, dim]``.

        Raises:
            TypeError, ValueError: An argument does not fit, events go back in time or are not
                before ``now``; its name and both numbers are given. Values are checked on a CPU.
        """
        c, weight = self.config, self.own.weight
        if not math.isfinite(number("now", now)):
            raise ValueError(f"now must be finite, got {now}")
        if not isinstance(time, Tensor):
            raise TypeError(f"time must be a tensor, got {type(time).__name__}")
        if time.dtype == torch.bool or time.is_complex():
            raise TypeError(f"time must be [E] numbers, got {time.dtype}")
        if time.ndim != 1:
            raise ValueError(f"time must be [E] numbers, got {list(time.shape)}")
        if time.device != weight.device:
            raise ValueError(f"time is on {time.device} but the model is on {weight.device}")
        count = len(time)
        source = node_ids("source", source, c.num_nodes, weight.device)
        target = node_ids("target", target, c.num_nodes, weight.device)
        for name, x in (("source", source), ("target", target)):
            if x.shape != (count,):
                raise ValueError(f"{name} must be [E] = [{count}] as time is, got {list(x.shape)}")
        if readable(time):
            check_times("time", time)
            if count and not time[-1].item() < now:
                raise ValueError(f"time must be below now={now}, got {time[-1].item()}")
        x = self._embedded(node)
        patches = patchify(source, target, c.num_nodes, c.patches)
        whole = isinstance(now, int) and not time.is_floating_point()
        # large times have no room in float32, larger ones none in float64
        age = (now - (time.long() if whole else time.double())).double()[:, None]
        z = self._events(edge, self.age(age))
        last = -(-(patches.patch + 1) * count // c.patches) - 1  # event of the patch
        position = self.patch_age(age[last])  # [T, time_dim]
        tokens = x.index_select(0, patches.node)
        for block in self.blocks:
            tokens = block(tokens, z, position, patches)
        return self.own(x) + segment_mean(tokens, patches.offsets)

    def _embedded(self, node: Tensor | None) -> Tensor:
        c = self.config
        if not c.node_features:
            if node is not None:
                raise ValueError("node must be None: node_features is 0")
            assert isinstance(self.embed, nn.Embedding)
            return self.embed.weight
        check_matrix("node", node, "N, node_features", (c.num_nodes, c.node_features))
        assert node is not None
        check_dtype("node", node, self.own.weight)
        return self.embed(node)

    def _events(self, edge: Tensor | None, age: Tensor) -> Tensor:
        """[2 E, C]: each event, then each the way back."""
        parts, c = [], self.config
        if c.edge_features:
            check_matrix("edge", edge, "E, edge_features", (len(age), c.edge_features))
            assert edge is not None
            check_dtype("edge", edge, self.own.weight)
            parts.append(edge)
        elif edge is not None:
            raise ValueError("edge must be None: edge_features is 0")
        way = age.new_ones(len(age), 1)
        return torch.cat([torch.cat([*parts, s * way, age], 1) for s in (1, -1)])


class TimeEncoding(nn.Module):
    """``cos(w age + b)``, whose frequencies w begin from 1 down to 1e-9, geometrically.

    Source:
        Xu et al., Inductive Representation Learning on Temporal Graphs, arXiv 2002.07962, section
        3.1, and the first values of their code.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.frequency, self.phase = (nn.Parameter(torch.empty(dim)) for _ in range(2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The first values, always the same."""
        self.frequency.copy_(10 ** -torch.linspace(0, 9, len(self.frequency)))
        self.phase.zero_()

    def forward(self, age: Tensor) -> Tensor:
        """age ``[..., 1]`` -> ``[..., dim]`` in the parameters' dtype."""
        wide = torch.promote_types(self.frequency.dtype, torch.float32)
        angle = age.to(wide) * self.frequency.to(wide) + self.phase.to(wide)
        return torch.cos(angle).to(self.frequency.dtype)

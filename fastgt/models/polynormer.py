"""Polynormer: polynomials of the features by local, then by global attention (arXiv 2403.01232).

Local layers, with b = sigmoid(beta) or beta itself, channel by channel::

    h_i  = relu(W_h x_i + c)
    m_i  = dropout(relu(norm(sum_j a_ij W x_j + V x_i + d)))      a softmax over the neighbours
    x_i <- (1 - b) LN(h_i m_i) + b m_i

Global layers, which begin with a layer norm of the sum of what all local layers give::

    a_i  = sum_j (s(q_i) . s(k_j)) v_j / sum_j s(q_i) . s(k_j)     over all nodes of the graph
    x_i <- dropout(relu(W_o (LN(a_i) (W_h x_i + c + b)) + o))

s is a sigmoid. The paper's Polynormer has no ReLUs, its Polynormer-r has them. In training the
local layers come first, with a readout of their own, then all: :meth:`Polynormer.set_stage`.

V x_i, W_o and the norms of products are in the authors' code beside the attention of the paper's
section 3. In torch-geometric padded nodes of smaller graphs count in the denominator of the global
attention, and there is a linear layer that nothing uses. Here there is neither: a graph's result
does not depend on the rest of its batch, but for batch norms in training.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.models.graph_gps_encoders import check_matrix
from fastgt.models.graph_transformer import check_dtype
from fastgt.models.polynormer_config import PolynormerConfig
from fastgt.models.sgformer import DrawnGCN
from fastgt.nn.sublayers import check_rows, reset_sublayers
from fastgt.ops.additive_attention import additive_attention
from fastgt.ops.checks import check_square
from fastgt.ops.linear_attention import linear_attention

Stage = Literal["local", "global"]


class Polynormer(nn.Module):
    """Numbers for every node.

    A new model is in its global stage, where ``local_readout`` is not used.

    Source:
        Deng et al., Polynormer: Polynomial-Expressive Graph Transformer in Linear Time, arXiv
        2403.01232, section 3, and their code.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import Polynormer, PolynormerConfig
        >>> model = Polynormer(PolynormerConfig.published("minesweeper"))
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> model(torch.rand(3, 7), graph).shape
        torch.Size([3, 2])
    """

    def __init__(self, config: PolynormerConfig):
        super().__init__()
        c = self.config = config
        self.in_dropout = nn.Dropout(c.in_dropout)
        self.embed = (
            nn.Sequential(nn.Linear(c.node_features, c.dim), nn.Dropout(c.dropout))
            if c.input_layer
            else None
        )
        self.layers = nn.ModuleList(
            PolynormerLocalLayer(c.dim if c.input_layer or i else c.node_features, c)
            for i in range(c.layers)
        )
        self.local_readout = nn.Linear(c.dim, c.out_dim)
        self.norm = nn.LayerNorm(c.dim)
        self.global_layers = nn.ModuleList(PolynormerGlobalLayer(c) for _ in range(c.global_layers))
        self.global_out = nn.ModuleList(
            nn.Sequential(nn.Linear(c.dim, c.dim), _relu(c), nn.Dropout(c.global_dropout))
            for _ in range(1 if c.shared_output else c.global_layers)
        )
        self.readout = nn.Linear(c.dim, c.out_dim)
        self.stage: Stage = "global"
        self.set_stage("global")

    def set_stage(self, stage: Stage) -> None:
        """``"local"``: the local layers and a readout; ``"global"``: the whole model.

        What the other stage alone uses requires no gradient from then on. So each stage can be
        trained under ``DistributedDataParallel``, around which the model is wrapped anew.
        """
        if stage not in get_args(Stage):
            raise ValueError(f"stage must be one of {list(get_args(Stage))}, got {stage!r}")
        self.stage = stage
        self.local_readout.requires_grad_(stage == "local")
        for part in (self.norm, self.global_layers, self.global_out, self.readout):
            part.requires_grad_(stage == "global")

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, node: Tensor, graph: Graph) -> Tensor:
        """node ``[N, node_features]`` -> ``[N, out_dim]``."""
        c, n = self.config, check_square(graph, shared=True)
        check_matrix("node", node, "N, node_features", (n, c.node_features))
        check_dtype("node", node, next(self.parameters()))
        x = self.in_dropout(node)
        if self.embed is not None:
            x = self.embed(x)
        total = x = self.layers[0](x, graph)
        for layer in self.layers[1:]:
            x = layer(x, graph)
            total = total + x
        if self.stage == "local":
            return self.local_readout(total)
        x = self.norm(total)
        for i, layer in enumerate(self.global_layers):
            x = self.global_out[i % len(self.global_out)](layer(x, graph.graph_ptr))
        return self.readout(x)


class PolynormerLocalLayer(nn.Module):
    """Attention over the neighbours, and its product with the node's own features.

    Args:
        in_dim: Width of the input.
        config: Of the model; the output is ``config.dim`` wide.
    """

    def __init__(self, in_dim: int, config: PolynormerConfig):
        super().__init__()
        c = config
        self.pre_norm = nn.LayerNorm(in_dim) if c.pre_norm else None
        self.h = nn.Sequential(nn.Linear(in_dim, c.dim), _relu(c))
        self.local = (
            LocalAttention(in_dim, c.dim, c.heads) if c.local == "gat" else DrawnGCN(in_dim, c.dim)
        )
        self.own = nn.Linear(in_dim, c.dim)
        self.after = nn.Sequential(
            nn.BatchNorm1d(c.dim) if c.local_norm else nn.Identity(),
            _relu(c),
            nn.Dropout(c.dropout),
        )
        self.norm = nn.LayerNorm(c.dim)
        self.beta = Beta(c.dim, c.beta, learnt=c.learn_beta)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        """x ``[N, in_dim]`` -> ``[N, dim]``."""
        check_rows(
            self.after, x, "after of PolynormerLocalLayer", "node", ", or take local_norm=False"
        )
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        m = self.after(self.local(x, graph) + self.own(x))
        product, b = self.norm(self.h(x) * m), self.beta()
        return (1 - b) * product + b * m


class PolynormerGlobalLayer(nn.Module):
    """Linear attention over the graph, and its product with the node's own features.

    Args:
        config: Of the model; input and output are ``config.dim`` wide.
    """

    def __init__(self, config: PolynormerConfig):
        super().__init__()
        c = config
        self.heads, self.eps = c.heads, c.eps
        self.h = nn.Linear(c.dim, c.dim)
        self.q = None if c.shared_query else nn.Linear(c.dim, c.dim, bias=c.qkv_bias)
        self.k, self.v = (nn.Linear(c.dim, c.dim, bias=c.qkv_bias) for _ in range(2))
        self.norm = nn.LayerNorm(c.dim)
        self.beta = Beta(c.dim, c.beta, learnt=c.learn_beta)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """x ``[N, dim]``; offsets ``[G + 1]``, None for one graph -> ``[N, dim]``."""
        k, v = (layer(x).unflatten(1, (self.heads, -1)) for layer in (self.k, self.v))  # [N, H, D]
        q = k if self.q is None else self.q(x).unflatten(1, (self.heads, -1))
        attended = linear_attention(q, k, v, offsets, feature_map="sigmoid", eps=self.eps)
        return self.norm(attended.flatten(1)) * (self.h(x) + self.beta())


class LocalAttention(nn.Module):
    """GAT's attention over the neighbours as given: no self loop is added.

    ``out_i = concat_h sum_j a_ijh W_h x_j``, a softmax of ``leaky_relu(s_h . W_h x_j + t_h . W_h
    x_i)``. The parameters are drawn as torch-geometric draws them.

    Source:
        Velickovic et al., arXiv 1710.10903, eq. 3.
    """

    def __init__(self, in_dim: int, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.lin = nn.Linear(in_dim, dim, bias=False)
        self.source, self.target = (nn.Parameter(torch.empty(heads, dim // heads)) for _ in "st")
        self._draw()

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)
        self._draw()

    def _draw(self) -> None:
        for x in (self.lin.weight, self.source, self.target):
            nn.init.xavier_uniform_(x)

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        """x ``[N, in_dim]`` -> ``[N, dim]``."""
        v = self.lin(x).unflatten(1, (self.heads, -1))  # [N, H, D]
        q, k = ((v * part).sum(2, keepdim=True) for part in (self.target, self.source))
        ones = v.new_ones(self.heads, 1)
        return additive_attention(q, k, v, graph, ones, negative_slope=0.2).flatten(1)


class Beta(nn.Module):
    """What the linear part of a layer is weighed with, channel by channel.

    Args:
        dim: Channels.
        start: None: a sigmoid of what is learnt, which is drawn from a normal distribution of
            variance 2 / (dim + 1). The authors' variance is 2 / (dim + layers). A number: what is
            learnt begins with it.
        learnt: False: the number stays.
    """

    def __init__(self, dim: int, start: float | None, *, learnt: bool):
        super().__init__()
        self.start = start
        self.value = nn.Parameter(torch.empty(dim)) if learnt else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw what is learnt anew."""
        if self.value is None:
            return
        if self.start is None:
            nn.init.normal_(self.value, std=math.sqrt(2 / (self.value.shape[0] + 1)))
        else:
            nn.init.constant_(self.value, self.start)

    def forward(self) -> Tensor | float:
        """``[dim]``, or the number."""
        if self.value is None:
            assert self.start is not None
            return self.start
        return self.value.sigmoid() if self.start is None else self.value


def _relu(config: PolynormerConfig) -> nn.Module:
    return nn.ReLU() if config.activation else nn.Identity()

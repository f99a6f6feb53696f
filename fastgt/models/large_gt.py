"""LargeGT: attention over sampled tokens and over a codebook of the whole graph (2312.11109).

Of a node i there are 3 K tokens: the features of K nodes, itself the first and others drawn from
its one- and two-hop neighbourhood, and what these features are after one and two steps along the
edges (:class:`fastgt.datasets.TokenSet`). The local module, with d = dim and heads of width d::

    t    = W_2 dropout(relu(W_1 token)),   u = W_u t
    y    = W_r u + dropout(W_o concat_h softmax(q_h k_h^T / sqrt(d)) v_h)     q, k, v of LN(u)
    y    = LN(dropout(y))
    l_i  = y_0 + sum_{j > 0} a_j y_j,      a = softmax_j(w . y_j)

The global one attends to the M centroids of a codebook, counted as often as nodes have them::

    x_i  = [W_p f(token_0); p_i]       p_i the position of node i, g wide; f a perceptron
    a_h  = softmax_m(Q_h x_i . K_h c_m / sqrt(d) + log n_m)
    g_i  = concat_h sum_m a_hm V_h c_m[:g]

A centroid c_m without nodes has log n_m = -inf. Both are joined by an MLP with batch norms. In
training the codebook then moves (large_gt_codebook.py), and the nodes of the batch are assigned
anew.

Departures from the released code, which are also said where they stand:

- Its readout scores [y_0; y_j]. The target's half and the bias are the same for all j and cancel in
  the softmax. They are not here.
- Layers that nothing uses (lin_key, lin_query, lin_value, lin_skip, out_proj) are not here, nor is
  f in the local model.
- There every node begins with a random centroid, and keeps it unless it is trained on. Here a node
  counts from the first batch that it is in; before that there is no centroid, and g_i = 0.
- Its codebook moves by replacing the data of a tensor that the backward still reads, so the weight
  of K gets its gradient at other centroids than those of the forward. Here it does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgt.models.graph_transformer import check_dtype
from fastgt.models.large_gt_codebook import Codebook
from fastgt.models.large_gt_config import LargeGTConfig
from fastgt.nn.sublayers import check_rows, reset_sublayers
from fastgt.ops.checks import check_float, node_ids
from fastgt.ops.global_attention import global_attention


class LargeGT(nn.Module):
    """Predictions for the nodes of one large graph, for a batch of nodes at a time.

    No parameter is without a gradient. Under ``DistributedDataParallel`` the codebook is that of
    the first process, as are all buffers there.

    Source:
        Dwivedi et al., Graph Transformers for Large Graphs, arXiv 2312.11109, section 3, and their
        code.

    Example:
        >>> import torch
        >>> from fastgt.models import LargeGT, LargeGTConfig
        >>> config = LargeGTConfig(7, 2, num_nodes=50, dim=16, samples=5, position_dim=4,
        ...                        centroids=8)
        >>> model, nodes = LargeGT(config), torch.arange(10)
        >>> model(torch.rand(10, 15, 7), position=torch.rand(10, 4), nodes=nodes).shape
        torch.Size([10, 2])
    """

    def __init__(self, config: LargeGTConfig):
        super().__init__()
        c = self.config = config
        self.local: nn.Module | None = None
        self.codes: CodebookAttention | None = None
        width = c.dim * c.heads
        if c.parts != "global":
            self.embed_tokens = nn.Sequential(
                nn.Linear(c.node_features, c.dim),
                nn.ReLU(),
                nn.Dropout(c.dropout),
                nn.Linear(c.dim, c.dim),
            )
            self.local = TokenAttention(c.dim, c.heads, c.local_dropout)
        if c.parts != "local":
            self.embed = nn.Sequential(
                nn.Linear(c.node_features, c.dim),
                nn.BatchNorm1d(c.dim),
                nn.ReLU(),
                nn.Dropout(c.dropout),
                nn.Linear(c.dim, c.dim),
            )
            self.codes = CodebookAttention(c)
        self.after = nn.Sequential(
            nn.Linear(width * (2 if c.parts == "full" else 1), width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(c.dropout),
            nn.Linear(width, c.dim),
            nn.BatchNorm1d(c.dim),
            nn.ReLU(),
            nn.Dropout(c.dropout),
        )
        self.readout = nn.Linear(c.dim, c.out_dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew, and forget the codebook."""
        reset_sublayers(self)

    def forward(
        self, tokens: Tensor, *, position: Tensor | None = None, nodes: Tensor | None = None
    ) -> Tensor:
        """Tokens of B nodes -> ``[B, out_dim]``.

        Args:
            tokens: ``[B, 3 samples, node_features]``, of :class:`fastgt.datasets.TokenSet`. The
                first one of a node are its own features; the order of the others makes no
                difference.
            position: ``[B, position_dim]``, of :func:`fastgt.encodings.random_projection_pe` or
                node2vec for example; None with ``parts="local"``.
            nodes: ``[B]`` integers, the numbers of these nodes, none of them twice; None with
                ``parts="local"``.
        """
        c = self.config
        check_float("tokens", tokens)
        shape = 3 * c.samples, c.node_features
        if tokens.ndim != 3 or tuple(tokens.shape[1:]) != shape:
            wanted = f"[B, 3 samples, node_features] = [B, {shape[0]}, {shape[1]}]"
            raise ValueError(f"tokens must be {wanted}, got {list(tokens.shape)}")
        check_dtype("tokens", tokens, self.readout.weight)
        check_rows(self.after, tokens, "after of LargeGT", "node")
        parts = []
        if self.local is not None:
            parts.append(self.local(self.embed_tokens(tokens)))
        if self.codes is not None:
            position, nodes = self._checked(tokens, position, nodes)
            parts.append(self.codes(self.embed(tokens[:, 0]), position, nodes))
        elif position is not None or nodes is not None:
            name = "nodes" if position is None else "position"
            raise ValueError(f"{name} must be None: parts is 'local'")
        return self.readout(self.after(torch.cat(parts, 1)))

    def _checked(
        self, tokens: Tensor, position: Tensor | None, nodes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        c, b = self.config, len(tokens)
        if position is None or nodes is None:
            name = "position" if position is None else "nodes"
            raise ValueError(f"{name} must be given with parts={c.parts!r}, got None")
        check_float("position", position)
        check_dtype("position", position, self.readout.weight)
        if tuple(position.shape) != (b, c.position_dim):
            wanted = f"[B, position_dim] = [{b}, {c.position_dim}]"
            raise ValueError(f"position must be {wanted}, got {list(position.shape)}")
        nodes = node_ids("nodes", nodes, c.num_nodes, tokens.device)
        if tuple(nodes.shape) != (b,):
            raise ValueError(f"nodes must be [B] = [{b}], got {list(nodes.shape)}")
        return position, nodes


class TokenAttention(nn.Module):
    """Attention among the tokens of each node, and the node's own with a mean of the others.

    Sequences are equally long: they take PyTorch's ``scaled_dot_product_attention``. Linear layers
    begin with weights of variance 0.02^2 and biases of 0, as in NAGphormer.

    Args:
        dim: Width of a token, and of a head.
        heads: How many; the output is ``heads * dim`` wide.
        dropout: Of the attention's output, and of its sum with the residual.

    Source:
        Dwivedi et al., arXiv 2312.11109, section 3.3; Chen et al., NAGphormer, arXiv 2206.04910.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        width = heads * dim
        self.embed = DrawnLinear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.q, self.k, self.v = (DrawnLinear(dim, width) for _ in range(3))
        self.out = DrawnLinear(width, width)
        self.residual = DrawnLinear(dim, width)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(width)
        self.score = DrawnLinear(width, 1, bias=False)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[B, T, dim]``, the node's own token first -> ``[B, heads * dim]``."""
        x = self.embed(x)
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, H, T, D]
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        y = self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        y = self.norm2(self.dropout(self.residual(x) + y))
        own, others = y[:, 0], y[:, 1:]
        weight = self.score(others).softmax(1)  # [B, T - 1, 1]
        return own + (weight * others).sum(1)


class DrawnLinear(nn.Linear):
    """A linear layer whose weights begin with a variance of 0.02^2, and biases with 0."""

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class CodebookAttention(nn.Module):
    """Attention of nodes to centroids of all nodes, which follow them in training.

    Args:
        config: Of the model; input ``config.dim`` wide, output ``config.heads * config.dim``.

    Source:
        Dwivedi et al., arXiv 2312.11109, section 3.4; Kong et al., GOAT, ICML 2023.
    """

    assigned: Tensor
    count: Tensor

    def __init__(self, config: LargeGTConfig):
        super().__init__()
        c = config
        self.heads, self.values, self.dropout = c.heads, c.position_dim, c.attention_dropout
        width = c.dim * c.heads
        self.project = nn.Linear(c.dim, c.position_dim)
        self.q, self.k = (nn.Linear(2 * c.position_dim, width) for _ in range(2))
        self.v = nn.Linear(c.position_dim, width)
        self.codebook = Codebook(c.centroids, 2 * c.position_dim, c.decay)
        # the centroid of each node, -1 for none, and how many nodes each centroid has
        self.register_buffer("assigned", torch.empty(c.num_nodes, dtype=torch.int32))
        self.register_buffer("count", torch.empty(c.centroids, dtype=torch.int64))
        self._forget()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, and forget which node has which centroid."""
        reset_sublayers(self)
        self._forget()

    def _forget(self) -> None:
        self.assigned.fill_(-1)
        self.count.zero_()

    def forward(self, x: Tensor, position: Tensor, nodes: Tensor) -> Tensor:
        """x ``[B, dim]``, position ``[B, position_dim]``, nodes ``[B]`` -> ``[B, heads * dim]``."""
        x = torch.cat([self.project(x), position], 1)
        codes = self.codebook()
        q, k, v = (
            layer(part).unflatten(1, (self.heads, -1))  # [B or M, H, D]
            for layer, part in ((self.q, x), (self.k, codes), (self.v, codes[:, : self.values]))
        )
        # in half precision, counts would be infinite
        count = self.count.to(torch.promote_types(q.dtype, torch.float32))
        bias = count.log().to(q.dtype)[:, None].expand(-1, self.heads)  # [M, H]
        places = torch.tensor([[0, len(q)], [0, len(k)]], device=q.device)
        out = global_attention(
            q,
            k,
            v,
            places[0],
            key_offsets=places[1],
            bias=bias,
            dropout_p=self.dropout if self.training else 0.0,
        )
        if self.training and len(nodes):
            self._assign(nodes, self.codebook.update(x))
        return out.flatten(1)

    @torch.no_grad()
    def _assign(self, nodes: Tensor, centroid: Tensor) -> None:
        """Give nodes their centroids, and count; of a node that is there twice, once."""
        nodes, order = nodes.sort(stable=True)
        once = torch.ones_like(nodes)
        once[1:] = (nodes[1:] != nodes[:-1]).long()
        before = self.assigned[nodes].long()
        self.count.index_add_(0, before.clamp(min=0), -once * (before >= 0))
        self.assigned[nodes] = centroid[order].to(torch.int32)
        self.count.index_add_(0, self.assigned[nodes].long(), once)

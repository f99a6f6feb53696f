"""SGFormer: simple global attention beside graph convolutions (arXiv 2306.10759).

    z_i   = dropout(relu(norm(W x_i + b)))
    a_i   = mean_h attention(W_q z, W_k z, W_v z)_ih        over all nodes of the graph
    z_i  <- dropout(norm(alpha a_i + (1 - alpha) z_i))      as often as there are layers
    y_i   = W_o (w g_i + (1 - w) z_i),   or   W_o concat(z_i, g_i)

The attention is :func:`fastgt.sgformer_attention`, graph by graph; norm is a layer norm. g comes
from graph convolutions C, with self loops and batch norms:

plain      g <- dropout(relu(norm(C g))) from x on; the last one is C alone
residual   g_0 = dropout(relu(norm(V x + c))),  g <- dropout(relu(norm(C g))) + g_0
initial    the same with C concat(g, g_0): only g is passed to neighbours

The authors' code has the first for graphs of thousands of nodes, the others for larger ones. There
and in torch-geometric the residual is to g_0 in every layer, not to the layer before. Torch-
geometric counts the padded nodes of smaller graphs in its attention. Here there are none, so that a
graph's result does not depend on the rest of its batch, but for the batch norms in training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.models.graph_gps_encoders import check_matrix
from fastgt.models.graph_gps_local import GCN
from fastgt.models.graph_transformer import check_dtype
from fastgt.nn.sublayers import check_rows, reset_sublayers
from fastgt.ops.checks import MAX_WIDTH, check_float, check_square, integer, number
from fastgt.ops.linear_attention import Norms, sgformer_attention

Convolution = Literal["plain", "residual", "initial"]
Aggregate = Literal["add", "cat"]


@dataclass
class SGFormerConfig:
    """Settings of :class:`SGFormer`; defaults are those of the authors' code for large graphs.

    Attributes:
        node_features: Width of the nodes' features.
        out_dim: Classes, or numbers to predict.
        dim: Width of both branches, and of every head of the attention; 256 at most.
        heads: Of the attention; their mean is taken.
        layers: Of the attention. The paper has 1.
        dropout: In the branch of the attention.
        alpha: Weight of the attention against the residual, from 0 to 1; 1 for no residual.
        qk_norms: ``"graph"`` as the authors, ``"node"`` as torch-geometric. See
            :func:`fastgt.sgformer_attention`.
        values: Whether the attention has a linear layer for its values.
        qkv_bias: Whether the linear layers of the attention have biases.
        activation: Whether a ReLU stands after the norm of every layer of the attention.
        convolution: ``"plain"``, ``"residual"`` or ``"initial"``.
        conv_layers: Graph convolutions.
        conv_dropout: In their branch.
        norm: Whether there are norms, in both branches. In training a batch norm needs two nodes,
            and refuses one.
        aggregate: ``"add"`` or ``"cat"``, of the two branches.
        graph_weight: Weight of the convolutions in ``"add"``, from 0 to 1.
    """

    node_features: int
    out_dim: int
    dim: int = 256
    heads: int = 1
    layers: int = 1
    dropout: float = 0.5
    alpha: float = 0.5
    qk_norms: Norms = "graph"
    values: bool = True
    qkv_bias: bool = True
    activation: bool = False
    convolution: Convolution = "residual"
    conv_layers: int = 3
    conv_dropout: float = 0.5
    norm: bool = True
    aggregate: Aggregate = "add"
    graph_weight: float = 0.5

    def __post_init__(self) -> None:
        for name in ("node_features", "out_dim", "dim", "heads", "layers", "conv_layers"):
            setattr(self, name, integer(name, getattr(self, name), 1))
        if self.dim > MAX_WIDTH:
            raise ValueError(f"dim must be {MAX_WIDTH} at most, got {self.dim}")
        for name in ("dropout", "alpha", "conv_dropout", "graph_weight"):
            found = number(name, getattr(self, name))
            if not 0 <= found <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {found}")
        for name, kinds in (
            ("qk_norms", Norms),
            ("convolution", Convolution),
            ("aggregate", Aggregate),
        ):
            if getattr(self, name) not in get_args(kinds):
                found, known = getattr(self, name), list(get_args(kinds))
                raise ValueError(f"{name} must be one of {known}, got {found!r}")

    @staticmethod
    def published(name: str) -> SGFormerConfig:
        """The authors' model of that name.

        ``"citeseer"``, ``"actor"`` and ``"squirrel"`` are of the code's first release for graphs of
        this size, its commit 57d145d. Later its run.sh has four convolutions in the place of two on
        citation graphs, as here on the other two, and another model, DIFFormer, on Actor and
        Squirrel. No options that would give the models up to ``"deezer"`` norms and linear layers
        of values are set in run.sh, nor a residual of the attention on citation graphs.

        Args:
            name: ``"cora"``, ``"citeseer"``, ``"pubmed"``, ``"actor"``, ``"squirrel"`` and
                ``"chameleon"`` (filtered), ``"deezer"``; ``"ogbn_arxiv"``, ``"ogbn_proteins"``,
                ``"amazon2m"`` or ``"pokec"``.

        Raises:
            ValueError: There is no such name.

        Source:
            Wu et al., arXiv 2306.10759, and the run.sh of their code.
        """
        if name not in _PUBLISHED:
            raise ValueError(f"name must be one of {list(_PUBLISHED)}, got {name!r}")
        return replace(_PUBLISHED[name])


class SGFormer(nn.Module):
    """Numbers for every node.

    Source:
        Wu et al., SGFormer: Simplifying and Empowering Transformers for Large-Graph
        Representations, arXiv 2306.10759, section 3.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import SGFormer, SGFormerConfig
        >>> model = SGFormer(SGFormerConfig.published("cora"))
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> model(torch.rand(3, 1433), graph).shape
        torch.Size([3, 7])
    """

    def __init__(self, config: SGFormerConfig):
        super().__init__()
        c = self.config = config
        self.embed = nn.Linear(c.node_features, c.dim)
        norm: nn.Module = nn.LayerNorm(c.dim) if c.norm else nn.Identity()
        self.after = nn.Sequential(norm, nn.ReLU(), nn.Dropout(c.dropout))
        self.layers = nn.ModuleList(
            SGFormerLayer(
                c.dim,
                c.heads,
                alpha=c.alpha,
                qk_norms=c.qk_norms,
                values=c.values,
                bias=c.qkv_bias,
                activation=c.activation,
                norm=c.norm,
                dropout=c.dropout,
            )
            for _ in range(c.layers)
        )
        self.convolutions = GraphConvolutions(
            c.node_features,
            c.dim,
            c.conv_layers,
            kind=c.convolution,
            norm=c.norm,
            dropout=c.conv_dropout,
        )
        self.readout = nn.Linear(c.dim if c.aggregate == "add" else 2 * c.dim, c.out_dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, node: Tensor, graph: Graph) -> Tensor:
        """node ``[N, node_features]`` -> ``[N, out_dim]``."""
        c, n = self.config, check_square(graph, shared=True)
        check_matrix("node", node, "N, node_features", (n, c.node_features))
        check_dtype("node", node, next(self.parameters()))
        z = self.after(self.embed(node))
        for layer in self.layers:
            z = layer(z, graph.graph_ptr)
        g = self.convolutions(node, graph)
        if c.aggregate == "add":
            return self.readout(c.graph_weight * g + (1 - c.graph_weight) * z)
        return self.readout(torch.cat([z, g], 1))


class SGFormerLayer(nn.Module):
    """Simple global attention with a residual, a norm and dropout.

    Args:
        dim, heads, alpha, qk_norms, values, activation, norm, dropout: As of
            :class:`SGFormerConfig`.
        bias: Its ``qkv_bias``.

    Example:
        >>> import torch
        >>> from fastgt.models.sgformer import SGFormerLayer
        >>> SGFormerLayer(64)(torch.randn(10, 64), torch.tensor([0, 3, 10])).shape
        torch.Size([10, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        alpha: float = 0.5,
        qk_norms: Norms = "graph",
        values: bool = True,
        bias: bool = True,
        activation: bool = False,
        norm: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        dim, heads = integer("dim", dim, 1), integer("heads", heads, 1)
        self.dim, self.heads, self.alpha, self.qk_norms = dim, heads, alpha, qk_norms
        self.q, self.k = (nn.Linear(dim, heads * dim, bias=bias) for _ in range(2))
        self.v = nn.Linear(dim, heads * dim, bias=bias) if values else None
        self.after = nn.Sequential(
            nn.LayerNorm(dim) if norm else nn.Identity(),
            nn.ReLU() if activation else nn.Identity(),
            nn.Dropout(dropout),
        )

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """x ``[N, dim]``; offsets ``[G + 1]``, None for one graph -> ``[N, dim]``."""
        check_float("x", x)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x must be [N, {self.dim}], got {list(x.shape)}")
        q, k = (layer(x).unflatten(1, (self.heads, -1)) for layer in (self.q, self.k))  # [N, H, D]
        if self.v is None:
            v = x[:, None].expand(-1, self.heads, -1)
        else:
            v = self.v(x).unflatten(1, (self.heads, -1))
        attended = sgformer_attention(q, k, v, offsets, norms=self.qk_norms).mean(1)
        return self.after(self.alpha * attended + (1 - self.alpha) * x)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, alpha={self.alpha}, qk_norms={self.qk_norms!r}"


class GraphConvolutions(nn.Module):
    """The branch of graph convolutions.

    Args:
        features: Width of the input.
        dim: Width of the output.
        layers: Convolutions.
        kind: ``"plain"``, ``"residual"`` or ``"initial"``.
        norm: Whether there are batch norms.
        dropout: After every activation.
    """

    def __init__(
        self,
        features: int,
        dim: int,
        layers: int,
        *,
        kind: Convolution = "residual",
        norm: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        plain = kind == "plain"
        self.embed = None if plain else nn.Linear(features, dim)
        convolution = DrawnGCN if plain else GCN
        self.convs = nn.ModuleList(
            convolution(features if plain and i == 0 else dim, dim) for i in range(layers)
        )
        # of g_0, apart from what is passed to neighbours
        self.initial = (
            nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(layers))
            if kind == "initial"
            else None
        )
        self.after = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm1d(dim) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(dropout)
            )
            for _ in range(layers - 1 if plain else layers + 1)
        )

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        """x ``[N, features]`` -> ``[N, dim]``."""
        for after in self.after[:1]:
            check_rows(after, x, "after of GraphConvolutions", "node", ", or take norm=False")
        if self.embed is None:
            for conv, after in zip(self.convs[:-1], self.after, strict=True):
                x = after(conv(x, graph))
            return self.convs[-1](x, graph)
        first = x = self.after[0](self.embed(x))
        for i, (conv, after) in enumerate(zip(self.convs, self.after[1:], strict=True)):
            received = conv(x, graph)
            if self.initial is not None:
                received = received + self.initial[i](first)
            x = after(received) + first
        return x


class DrawnGCN(GCN):
    """A graph convolution whose weights are drawn as torch-geometric draws them."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__(dim, out_dim)
        nn.init.xavier_uniform_(self.lin.weight)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        super().reset_parameters()
        nn.init.xavier_uniform_(self.lin.weight)


# what torch-geometric or the authors call a part -> what it is here; the first that fits
_NAMES = {
    r"trans_conv\.fcs\.0\.(\w+)": r"embed.\1",
    r"trans_conv\.bns\.0\.(\w+)": r"after.0.\1",
    r"trans_conv\.bns\.(\d+)\.(\w+)": r"layers.<\1-1>.after.0.\2",
    r"trans_conv\.attns\.(\d+)\.([qkv])\.(\w+)": r"layers.\1.\2.\3",
    r"trans_conv\.convs\.(\d+)\.W([qkv])\.(\w+)": r"layers.\1.\2.\3",
    r"graph_conv\.fcs\.0\.(\w+)": r"convolutions.embed.\1",
    r"(?:graph_conv|gnn)\.bns\.(\d+)\.(\w+)": r"convolutions.after.\1.0.\2",
    r"(?:graph_conv|gnn)\.convs\.(\d+)\.(?:lin|W)\.weight": r"convolutions.convs.\1.lin.weight",
    r"(?:graph_conv|gnn)\.convs\.(\d+)\.(?:W\.)?bias": r"convolutions.convs.\1.bias",
    r"fc\.(\w+)": r"readout.\1",
}


def sgformer_state_dict(state: Mapping[str, Tensor], *, norm: bool = True) -> dict[str, Tensor]:
    """The ``state_dict`` of torch-geometric's SGFormer, or of the authors', as it is named here.

    It loads into a :class:`SGFormer` of the same settings. Those of ``torch_geometric.nn.models
    .SGFormer`` are ``qk_norms="node"``, ``qkv_bias=False`` and ``activation=True`` with
    ``convolution="residual"``. It returns the logarithms of a softmax of what the model here gives.

    Args:
        state: Torch-geometric's, or the authors' with a GCN or their own convolutions.
        norm: Of the configuration. The authors' code makes norms that it does not use without
            ``use_bn``: False leaves them out.

    Raises:
        ValueError: A name is none of these models'; it is given.

    Source:
        Wu et al., arXiv 2306.10759, and their code; ``torch_geometric.nn.models.SGFormer``.

    Example:
        >>> import torch
        >>> from fastgt.models import sgformer_state_dict
        >>> list(sgformer_state_dict({"trans_conv.bns.1.bias": torch.zeros(64)}))
        ['layers.0.after.0.bias']
    """
    found: dict[str, Tensor] = {}
    for name, x in state.items():
        if not norm and re.match(r"(trans_conv|graph_conv|gnn)\.bns\.", name):
            continue
        ours = _renamed(name)
        if re.match(r"graph_conv\.convs\.\d+\.W\.weight", name) and x.shape[1] == 2 * x.shape[0]:
            x, initial = x.chunk(2, 1)
            found[ours.replace("convs", "initial").replace("lin.", "")] = initial
        found[ours] = x
    return found


def _renamed(name: str) -> str:
    for theirs, ours in _NAMES.items():
        if (match := re.fullmatch(theirs, name)) is not None:
            return re.sub(r"<(\d+)-1>", lambda m: str(int(m[1]) - 1), match.expand(ours))
    raise ValueError(f"{name!r} is no parameter of an SGFormer")


_CITATIONS = SGFormerConfig(
    1433,
    7,
    dim=64,
    dropout=0.2,
    alpha=1.0,
    values=False,
    convolution="plain",
    conv_layers=4,
    norm=False,
    graph_weight=0.8,
)
_HETEROPHILOUS = replace(_CITATIONS, alpha=0.5, conv_layers=2)
_LARGE = SGFormerConfig(128, 40)
_BATCHED = replace(
    _LARGE, dim=64, dropout=0.0, convolution="initial", conv_layers=2, conv_dropout=0.0
)
_PUBLISHED = {
    "cora": _CITATIONS,
    "citeseer": replace(
        _CITATIONS, node_features=3703, out_dim=6, conv_layers=2, dropout=0.3, graph_weight=0.7
    ),
    "pubmed": replace(_CITATIONS, node_features=500, out_dim=3, dropout=0.3),
    "actor": replace(
        _HETEROPHILOUS,
        node_features=932,
        out_dim=5,
        dropout=0.6,
        conv_dropout=0.6,
        graph_weight=0.5,
    ),
    "squirrel": replace(
        _HETEROPHILOUS,
        node_features=2089,
        out_dim=5,
        dropout=0.3,
        conv_layers=5,
        conv_dropout=0.3,
    ),
    "chameleon": replace(
        _HETEROPHILOUS, node_features=2325, out_dim=5, dropout=0.6, conv_dropout=0.6
    ),
    "deezer": replace(
        _HETEROPHILOUS,
        node_features=31241,
        out_dim=2,
        dim=96,
        dropout=0.4,
        conv_dropout=0.4,
    ),
    "ogbn_arxiv": _LARGE,
    "ogbn_proteins": replace(_BATCHED, node_features=8, out_dim=112, convolution="residual"),
    "amazon2m": replace(_BATCHED, node_features=100, out_dim=47, dim=256, conv_layers=3),
    "pokec": replace(_BATCHED, node_features=65, out_dim=2),
}

"""Settings of Polynormer, and those of the published models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from fastgt.ops.checks import MAX_WIDTH, integer, number

Local = Literal["gat", "gcn"]


@dataclass
class PolynormerConfig:
    """Settings of :class:`Polynormer`; defaults are those of the authors' code.

    Attributes:
        node_features: Width of the nodes' features.
        out_dim: Classes, or numbers to predict.
        dim: Width of all layers; a multiple of ``heads``.
        heads: Of both attentions, each ``dim / heads`` wide, 256 at most.
        layers: Local ones.
        global_layers: Global ones.
        in_dropout: Of the features.
        dropout: After the first linear layer and in the local layers.
        global_dropout: In the global layers.
        beta: None: learnt through a sigmoid. A number: what beta begins with.
        learn_beta: False: beta stays that number.
        activation: Whether there are ReLUs, as in Polynormer-r.
        pre_norm: Whether local layers begin with a layer norm.
        local: ``"gat"``, or ``"gcn"`` with self loops.
        local_norm: Whether a batch norm stands after the sum over the neighbours. In training it
            needs two nodes, and refuses one.
        input_layer: Whether a linear layer stands before the local layers. Without, the first one
            takes the features.
        shared_query: Whether the queries of the global attention are its keys.
        qkv_bias: Whether its linear layers have biases.
        shared_output: Whether all global layers have one linear layer after their products.
        eps: In the denominator of the global attention.
    """

    node_features: int
    out_dim: int
    dim: int = 512
    heads: int = 8
    layers: int = 7
    global_layers: int = 2
    in_dropout: float = 0.15
    dropout: float = 0.5
    global_dropout: float = 0.5
    beta: float | None = None
    learn_beta: bool = True
    activation: bool = True
    pre_norm: bool = False
    local: Local = "gat"
    local_norm: bool = False
    input_layer: bool = True
    shared_query: bool = True
    qkv_bias: bool = True
    shared_output: bool = True
    eps: float = 0.0

    def __post_init__(self) -> None:
        for name in ("node_features", "out_dim", "dim", "heads", "layers", "global_layers"):
            setattr(self, name, integer(name, getattr(self, name), 1))
        for name in ("in_dropout", "dropout", "global_dropout"):
            p = number(name, getattr(self, name))
            if not 0 <= p <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {p}")
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got dim={self.dim} and heads={self.heads}")
        if self.dim // self.heads > MAX_WIDTH:
            found = f"{self.dim} / {self.heads} = {self.dim // self.heads}"
            raise ValueError(f"dim / heads must be {MAX_WIDTH} at most, got {found}")
        if self.beta is None:
            if not self.learn_beta:
                raise ValueError("beta must be a number with learn_beta=False, got None")
        else:
            self.beta = number("beta", self.beta)
        if self.local not in get_args(Local):
            raise ValueError(f"local must be one of {list(get_args(Local))}, got {self.local!r}")

    @staticmethod
    def published(name: str) -> PolynormerConfig:
        """The authors' model of that name, with ReLUs.

        Their model for WikiCS is not here: its only head is 512 wide. On the last three graphs
        their code trains the local stage alone.

        Args:
            name: ``"roman_empire"``, ``"amazon_ratings"``, ``"minesweeper"``, ``"tolokers"``,
                ``"questions"``, ``"amazon_computers"``, ``"amazon_photo"``, ``"coauthor_cs"``,
                ``"coauthor_physics"``, ``"ogbn_arxiv"``, ``"ogbn_products"`` or ``"pokec"``.

        Raises:
            ValueError: There is no such name.

        Source:
            Deng et al., arXiv 2403.01232, and the run.sh of their code; their code for large
            graphs.
        """
        if name not in _PUBLISHED:
            raise ValueError(f"name must be one of {list(_PUBLISHED)}, got {name!r}")
        return replace(_PUBLISHED[name])


_MINES = PolynormerConfig(
    7, 2, layers=10, global_layers=3, in_dropout=0.2, dropout=0.3, global_dropout=0.3
)
_SHOPS = PolynormerConfig(
    767, 10, layers=5, global_layers=1, in_dropout=0.2, dropout=0.7, global_dropout=0.7
)
_AUTHORS = replace(
    _SHOPS,
    node_features=6805,
    out_dim=15,
    global_layers=2,
    in_dropout=0.1,
    dropout=0.3,
    global_dropout=0.3,
)
_LARGE = PolynormerConfig(
    128,
    40,
    dim=256,
    heads=1,
    beta=0.9,
    learn_beta=False,
    local="gcn",
    local_norm=True,
    input_layer=False,
)
_PUBLISHED = {
    "roman_empire": replace(
        _MINES,
        node_features=300,
        out_dim=18,
        global_layers=2,
        in_dropout=0.15,
        global_dropout=0.5,
        beta=0.5,
    ),
    "amazon_ratings": replace(_MINES, node_features=300, out_dim=5, heads=2, global_layers=1),
    "minesweeper": _MINES,
    "tolokers": replace(
        _MINES,
        node_features=10,
        dim=960,
        heads=16,
        layers=7,
        global_layers=4,
        dropout=0.5,
        global_dropout=0.5,
        beta=0.1,
    ),
    "questions": replace(
        _MINES,
        node_features=301,
        layers=5,
        in_dropout=0.15,
        dropout=0.2,
        global_dropout=0.5,
        beta=0.4,
        pre_norm=True,
    ),
    "amazon_computers": _SHOPS,
    "amazon_photo": replace(_SHOPS, node_features=745, out_dim=8, layers=7, global_layers=2),
    "coauthor_cs": _AUTHORS,
    "coauthor_physics": replace(
        _AUTHORS,
        node_features=8415,
        out_dim=5,
        dim=256,
        global_layers=4,
        dropout=0.5,
        global_dropout=0.5,
    ),
    "ogbn_arxiv": _LARGE,
    "ogbn_products": replace(
        _LARGE,
        node_features=100,
        out_dim=47,
        heads=8,
        layers=10,
        in_dropout=0.2,
        pre_norm=True,
        local="gat",
    ),
    "pokec": replace(
        _LARGE, node_features=65, out_dim=2, in_dropout=0.0, dropout=0.2, global_dropout=0.2
    ),
}

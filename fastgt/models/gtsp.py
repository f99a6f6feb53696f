"""GTSP: GraphGPS or Graphormer with tokens, heads, layers and weights taken away (2312.05479).

In every attention branch y_i = Attention(x)_i of the model below it::

    tokens    only the best ceil((1 - s) n) nodes of a graph of n attend, among themselves, as
              x_i gate_i (see TokenPruning); y_i = 0 for the others
    heads     y_i = W_o concat_h(g_h head_h), g_h in {0, 1}; which heads is learnt (HeadSparsity)
    layers    y_i m_g / (1 - s) of graph g, m_g = 0 with probability s, in training (DropPath)

and of the weights of all linear layers the smallest share s becomes 0 while it trains, by the cubic
schedule (GradualPruning). s is the share that is taken away, of each on its own. What is taken away
is not computed: neither nodes, nor heads, nor the attention of graphs whose branch is left out.

Released is GPS alone, with tokens that stay in the softmax, a k of the padded length, scores of
heads taken behind the projection that mixes them, a path dropped for every node by itself, and
weights that grow again (of which there is nothing here).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.models.graph_gps_encoders import FeatureEncoder, check_matrix
from fastgt.models.graph_gps_layer import GlobalAttention, GraphGPSLayer
from fastgt.models.graph_transformer import check_dtype
from fastgt.models.graphormer import Graphormer, GraphormerConfig
from fastgt.models.gtsp_attention import SparseAttention
from fastgt.nn import HeadGate
from fastgt.nn.sublayers import reset_sublayers
from fastgt.ops.checks import check_graph, integer
from fastgt.ops.segment_pool import segment_sum
from fastgt.pruning import GradualPruning, HeadSparsity, prune_heads

Base = Literal["gps", "graphormer"]
_PRUNED = ("tokens", "heads", "layers", "weights")
_SIZES = (
    "node_features",
    "out_dim",
    "dim",
    "heads",
    "layers",
    "walk_steps",
    "path_distance",
    "degrees",
)


@dataclass
class GTSPConfig:
    """Settings of :class:`GTSP`; defaults are the authors' for NCI1, without pruning.

    Attributes:
        base: ``"gps"``, GIN beside the attention, with random walks; or ``"graphormer"``, without
            types of edges.
        node_features: Width of a node's features.
        out_dim: Classes.
        dim: Width of nodes; a multiple of ``heads``.
        heads: Of every attention.
        layers: So many times.
        walk_steps: Probabilities of return of a node, for ``"gps"``.
        path_distance: As of :class:`fastgt.models.GraphormerConfig`, for ``"graphormer"``.
        degrees: How many degrees have embeddings, for ``"graphormer"``.
        dropout: Inside the layers, and for ``"graphormer"`` of the embedded nodes.
        attention_dropout: Of the softmax's weights.
        prune: What is taken away, and its share, from 0 to below 1: ``{"heads": 0.5}``. Names are
            ``"tokens"``, ``"heads"``, ``"layers"`` and ``"weights"``.
    """

    base: Base = "gps"
    node_features: int = 37
    out_dim: int = 2
    dim: int = 64
    heads: int = 4
    layers: int = 4
    walk_steps: int = 20
    path_distance: int = 20
    degrees: int = 64
    dropout: float = 0.0
    attention_dropout: float = 0.5
    prune: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _SIZES:
            setattr(self, name, integer(name, getattr(self, name), 1))
        if self.base not in ("gps", "graphormer"):
            raise ValueError(f"base must be 'gps' or 'graphormer', got {self.base!r}")
        for name, share in self.prune.items():
            if name not in _PRUNED:
                raise ValueError(f"prune must name some of {list(_PRUNED)}, got {name!r}")
            if not 0 <= share < 1:
                raise ValueError(f"prune[{name!r}] must be from 0 to below 1, got {share}")
        self.prune = dict(self.prune)

    def share(self, name: str) -> float:
        """Of what is taken away, 0 where ``prune`` does not name it."""
        return self.prune.get(name, 0.0)

    @staticmethod
    def published(name: str) -> GTSPConfig:
        """The authors' GPS of that name, without pruning; they take 0.25, 0.5 and 0.75 away.

        Args:
            name: ``"nci1"``, ``"imdb_binary"`` or ``"dd"``, of TU's data sets.

        Raises:
            ValueError: There is no such name.

        Source:
            Liu et al., arXiv 2312.05479, and their code's scripts.
        """
        if name not in _PUBLISHED:
            raise ValueError(f"name must be one of {list(_PUBLISHED)}, got {name!r}")
        return replace(_PUBLISHED[name])


class GTSP(nn.Module):
    """Logits for every graph of a batch.

    Heads and weights are chosen while the model trains: :class:`Sparsification` does that. Until
    then all heads are active.

    Source:
        Liu et al., Exploring Sparsity in Graph Transformers, arXiv 2312.05479, section 3.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import GTSP, GTSPConfig
        >>> model = GTSP(GTSPConfig(node_features=8, prune={"tokens": 0.5}))
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> model(torch.randn(3, 8), graph, walk_pe=torch.rand(3, 20)).shape
        torch.Size([1, 2])
    """

    def __init__(self, config: GTSPConfig):
        super().__init__()
        c = self.config = config
        softmax = functools.partial(
            _attention,
            prune_tokens=c.share("tokens"),
            drop_path=c.share("layers"),
            gated=c.share("heads") > 0,
            virtual=c.base == "graphormer",
        )
        self.model: nn.Module
        if c.base == "gps":
            self.model = _GPS(c, softmax)
        else:
            base = GraphormerConfig(
                out_dim=c.out_dim,
                node_types=(),
                node_features=c.node_features,
                edge_types=(),
                dim=c.dim,
                heads=c.heads,
                layers=c.layers,
                ffn_dim=c.dim,
                path_distance=c.path_distance,
                path_edges=1,
                degrees=c.degrees,
                in_dropout=c.dropout,
                dropout=c.dropout,
                attention_dropout=c.attention_dropout,
            )
            self.model = Graphormer(base, softmax=softmax)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(
        self,
        node: Tensor,
        graph: Graph,
        *,
        walk_pe: Tensor | None = None,
        pair_distance: Tensor | None = None,
    ) -> Tensor:
        """Nodes and encodings -> ``[G, out_dim]``.

        Args:
            node: ``[N, node_features]``.
            graph: The batch.
            walk_pe: ``[N, walk_steps]``, for ``"gps"``.
            pair_distance: ``[P]``, of :func:`fastgt.encodings.shortest_paths` with
                ``path_distance``, for ``"graphormer"``.
        """
        given = {"walk_pe": walk_pe, "pair_distance": pair_distance}
        wanted = "walk_pe" if self.config.base == "gps" else "pair_distance"
        for name, x in given.items():
            if name != wanted and x is not None:
                raise ValueError(
                    f"{name} must be None (base is {self.config.base!r}), got {list(x.shape)}"
                )
        return self.model(node, graph, **{wanted: given[wanted]})


class Sparsification:
    """Takes heads and weights of a :class:`GTSP` away while it trains.

    :meth:`step` goes after every step of the optimizer. Every ``every`` steps of training heads are
    exchanged, and from a tenth to four fifths of the training the smallest weights become 0: all of
    it as ``prune`` of the model's settings says. Tokens and layers need nothing of this.

    Args:
        model: It is changed in place.
        steps: Of the training, about.
        every: Steps between two changes.
        scored: Batches before an exchange whose gradients score the heads.

    Raises:
        ValueError: A number does not fit, or the model has neither.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import GTSP, GTSPConfig
        >>> from fastgt.models.gtsp import Sparsification
        >>> model = GTSP(GTSPConfig(node_features=8, prune={"heads": 0.5}))
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        >>> sparsification = Sparsification(model, steps=10, every=2, scored=1)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(3, 8), graph, walk_pe=torch.rand(3, 20)).square().sum().backward()
        ...     optimizer.step()
        ...     sparsification.step()
        >>> smaller = sparsification.finish()
        >>> smaller.model.layers[0].attention.heads
        2
    """

    def __init__(self, model: GTSP, *, steps: int, every: int = 200, scored: int = 10):
        if not isinstance(model, GTSP):
            raise TypeError(f"model must be a GTSP, got {type(model).__name__}")
        c, steps = model.config, integer("steps", steps, 1)
        if not c.share("heads") and not c.share("weights"):
            raise ValueError(
                f"prune names neither 'heads' nor 'weights', got {c.prune}: nothing is to be done"
            )
        self.model = model
        self.heads: HeadSparsity | None = None
        if share := c.share("heads"):
            self.heads = HeadSparsity(model, 1 - share, steps=steps, every=every, scored=scored)
        self.weights: GradualPruning | None = None
        if share := c.share("weights"):
            begin, end = steps // 10, max(steps // 10 + 1, steps * 4 // 5)
            self.weights = GradualPruning(model, share, begin=begin, end=end, every=every)

    def step(self) -> None:
        """After every step of the optimizer."""
        if self.heads is not None:
            self.heads.step()
        if self.weights is not None:
            self.weights.step()

    def finish(self) -> GTSP:
        """The trained model without its masked heads, and with zeros in the place of weights that
        are gone: outside training it gives what the model gave, but for rounding."""
        if self.weights is not None:
            self.weights.finish()
        return self.model if self.heads is None else prune_heads(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands; masks are in the model's."""
        parts = {"heads": self.heads, "weights": self.weights}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.heads is not None:
            self.heads.load_state_dict(state["heads"])
        if self.weights is not None:
            self.weights.load_state_dict(state["weights"])


class _GPS(nn.Module):
    """The GPS model of the authors: no norm of random walks, no layer before the logits."""

    def __init__(self, c: GTSPConfig, softmax: Callable[..., GlobalAttention]):
        super().__init__()
        self.walk_steps = c.walk_steps
        self.embed = FeatureEncoder(c.node_features, c.dim)
        self.embed_walk = nn.Linear(c.walk_steps, c.dim)
        self.layers = nn.ModuleList(
            GraphGPSLayer(
                c.dim,
                c.heads,
                local="gin",
                dropout=c.dropout,
                attention_dropout=c.attention_dropout,
                softmax=softmax,
            )
            for _ in range(c.layers)
        )
        self.readout = nn.Linear(c.dim, c.out_dim)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, node: Tensor, graph: Graph, *, walk_pe: Tensor | None) -> Tensor:
        check_graph(graph)
        n, k = graph.num_rows, self.walk_steps
        x = self.embed("node", node, "N", n, graph)
        check_matrix("walk_pe", walk_pe, f"N, {k}", (n, k))
        assert walk_pe is not None
        check_dtype("walk_pe", walk_pe, next(self.embed_walk.parameters()))
        x = x + self.embed_walk(walk_pe)
        for layer in self.layers:
            x, _ = layer(x, None, graph)
        return self.readout(segment_sum(x, graph.graph_ptr))


def _attention(dim: int, heads: int, *, gated: bool, **options: Any) -> SparseAttention:
    if gated:
        options["head_gate"] = HeadGate(torch.ones(heads, dtype=torch.bool))
    return SparseAttention(dim, heads, **options)


_PUBLISHED = {
    "nci1": GTSPConfig(),
    "imdb_binary": GTSPConfig(node_features=136),
    "dd": GTSPConfig(node_features=89),
}

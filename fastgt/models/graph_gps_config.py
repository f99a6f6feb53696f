"""Settings of GraphGPS, and those of the published models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fastgt.models.graph_gps_encoders import Head, Pooling
from fastgt.models.graph_gps_layer import Attention, GPSNorm
from fastgt.models.graph_gps_local import WITH_EDGES, Activation, Local
from fastgt.models.graph_gps_sign_net import SignNetKind
from fastgt.ops.checks import integer

_SIZES = ("out_dim", "dim", "heads", "layers", "performer_width", "head_layers", "lap_layers")
_SIGN_SIZES = ("sign_layers", "sign_hidden", "sign_out", "sign_rho_layers")
_WIDTHS = (
    "node_features",
    "edge_features",
    "walk_steps",
    "walk_dim",
    "lap_pe",
    "lap_dim",
    "lap_heads",
    "sign_pe",
    "sign_dim",
    "heat_times",
    "heat_dim",
    "electrostatic_dim",
    "kernel_layers",
    "stable_pe",
    "path_distance",
    "degrees",
)
_ENCODED = ("walk_dim", "lap_dim", "sign_dim", "heat_dim", "electrostatic_dim")


@dataclass
class GraphGPSConfig:
    """Settings of :class:`GraphGPS`; defaults are the authors' for ZINC.

    Attributes:
        out_dim: Numbers to predict.
        node_types: How many kinds of nodes there are, or how many in each column of types; () for
            nodes with features.
        node_features: Width of these; 0 for nodes with types.
        edge_types, edge_features: As of nodes. Neither: one learnt vector stands on all edges.
        dim: Width of nodes and edges; a multiple of ``heads``.
        heads: Of the attention, and of ``"gat"`` and ``"attention"`` among the neighbours.
        layers: So many times.
        local: ``"none"``, ``"gcn"``, ``"gin"``, ``"gine"``, ``"genconv"``, ``"gat"``,
            ``"pna"``, ``"attention"`` or ``"gatedgcn"``. The first three use no edge features, and
            take none.
        attention: ``"none"``, ``"softmax"``, ``"performer"``, ``"linear"``, ``"deepsets"`` or
            ``"bigbird"``, over whole graphs, the last one along a pattern
            (:func:`fastgt.models.graph_gps_bigbird.bigbird_pattern`).
        learn_temperature: Whether ``"genconv"`` learns the temperature of its softmax.
        performer_width: Of a head of Performer.
        norm: ``"batch"``, ``"graph"`` (over the nodes and channels of each graph) or ``"none"``.
            GatedGCN and GENConv have batch norms besides. In training a batch norm needs two nodes
            and two edges, or no edge, and refuses one.
        activation: ``"relu"`` or ``"gelu"``.
        dropout: Inside the layers.
        attention_dropout: Of a softmax's weights, of the output of ``"performer"`` and
            ``"linear"``. ``"bigbird"`` has none, as in the authors' code.
        walk_steps: Probabilities of return of a node; 0 for a model without them.
        walk_dim: What they are made as wide as.
        lap_pe: Laplacian eigenvectors of a node; 0 for a model without them.
        lap_dim: What they are made as wide as.
        lap_layers: Linear layers of their DeepSet, or layers of a Transformer.
        lap_heads: Heads of that Transformer in the place of the DeepSet; 0 for the DeepSet.
        sign_pe: Laplacian eigenvectors of a node for SignNet, in the place of ``lap_pe``; 0 for a
            model without it.
        sign_dim: What they are made as wide as.
        sign_net: ``"mlp"`` or ``"deepset"``, what takes all eigenvectors together.
        sign_layers, sign_hidden, sign_out: Layers of SignNet's phi, and their widths within and in
            the end.
        sign_rho_layers: Linear layers of what takes all eigenvectors together.
        heat_times, heat_dim: Diagonals of the heat kernel, as of walks.
        electrostatic_dim: What the 10 electrostatic numbers of a node are made as wide as, or 0.
        kernel_layers: Linear layers, each with a ReLU, for walks, heat and electrostatics; 0 for
            one without a ReLU.
        stable_pe: Laplacian eigenvectors that give the factors of edges in ``"gine"`` or
            ``"gatedgcn"``, in the place of ``walk_steps`` and ``lap_pe``; 0 for none.
        path_distance: Graphormer's biases of pairs of nodes, for paths shorter than this many
            edges, with ``attention="softmax"`` and ``edge_types`` of one column; 0 for none.
        degrees: How many degrees of nodes have embeddings, Graphormer's too, or 0.
        head: ``"san_graph"``, ``"default"`` (of graphs) or ``"inductive_node"``.
        head_layers: Linear ones of the last two.
        pooling: ``"add"``, ``"mean"`` or ``"max"``, of graphs.
        last_edges: Whether the last GatedGCN has a norm of edges, as in the authors' code and
            parameter counts. Nothing uses it: without, every parameter gets a gradient, as
            ``DistributedDataParallel`` wants it.
    """

    out_dim: int = 1
    node_types: int | Sequence[int] = (28,)
    node_features: int = 0
    edge_types: int | Sequence[int] = (4,)
    edge_features: int = 0
    dim: int = 64
    heads: int = 4
    layers: int = 10
    local: Local = "gine"
    attention: Attention = "softmax"
    learn_temperature: bool = False
    performer_width: int = 64
    norm: GPSNorm = "batch"
    activation: Activation = "relu"
    dropout: float = 0.0
    attention_dropout: float = 0.5
    walk_steps: int = 20
    walk_dim: int = 28
    lap_pe: int = 0
    lap_dim: int = 0
    lap_layers: int = 2
    lap_heads: int = 0
    sign_pe: int = 0
    sign_dim: int = 0
    sign_net: SignNetKind = "mlp"
    sign_layers: int = 8
    sign_hidden: int = 64
    sign_out: int = 4
    sign_rho_layers: int = 2
    heat_times: int = 0
    heat_dim: int = 0
    electrostatic_dim: int = 0
    kernel_layers: int = 0
    stable_pe: int = 0
    path_distance: int = 0
    degrees: int = 0
    head: Head = "san_graph"
    head_layers: int = 3
    pooling: Pooling = "add"
    last_edges: bool = True

    def __post_init__(self) -> None:
        for name in (*_SIZES, *_SIGN_SIZES):
            setattr(self, name, integer(name, getattr(self, name), 1))
        for name in _WIDTHS:
            setattr(self, name, integer(name, getattr(self, name), 0))
        check_inputs(self)
        assert not isinstance(self.edge_types, int)
        for count, width in (
            ("walk_steps", "walk_dim"),
            ("lap_pe", "lap_dim"),
            ("sign_pe", "sign_dim"),
            ("heat_times", "heat_dim"),
        ):
            check_together(self, count, width)
        if self.stable_pe and self.encoded_dim:
            counts = ("walk_steps", "lap_pe", "sign_pe", "heat_times", "electrostatic_dim")
            others = [f"{name}={getattr(self, name)}" for name in counts if getattr(self, name)]
            raise ValueError(
                f"stable_pe must be 0 with {' and '.join(others)}, got {self.stable_pe}"
            )
        if self.sign_pe and self.lap_pe:
            raise ValueError(f"sign_pe must be 0 with lap_pe={self.lap_pe}, got {self.sign_pe}")
        if self.lap_heads and self.lap_dim % self.lap_heads:
            raise ValueError(f"lap_heads must divide lap_dim={self.lap_dim}, got {self.lap_heads}")
        if self.path_distance and (self.attention != "softmax" or len(self.edge_types) != 1):
            raise ValueError(
                f"path_distance must be 0 with attention={self.attention!r} and edge_types="
                f"{self.edge_types}: it takes 'softmax' and one column, got {self.path_distance}"
            )
        if self.encoded_dim >= self.dim:
            parts = {name: getattr(self, name) for name in _ENCODED if getattr(self, name)}
            found = " + ".join(map(str, parts.values()))
            raise ValueError(f"{' + '.join(parts)} must be below dim={self.dim}, got {found}")
        if self.local not in WITH_EDGES and (self.edge_types or self.edge_features):
            raise ValueError(
                f"edge_types must be () and edge_features 0 with local={self.local!r}, which uses "
                f"no edges, got {self.edge_types} and {self.edge_features}"
            )

    @property
    def encoded_dim(self) -> int:
        """How much of ``dim`` encodings take."""
        return sum(getattr(self, name) for name in _ENCODED)

    @staticmethod
    def published(name: str) -> GraphGPSConfig:
        """The authors' model of that name.

        Args:
            name: ``"zinc"``, ``"zinc_sign_mlp"``, ``"zinc_sign_deepset"``, ``"zinc_graphormer"``,
                ``"pattern"``, ``"cluster"``, ``"mnist"``, ``"cifar10"``, ``"malnet_tiny"``; with
                OGB's atoms and bonds ``"ogbg_molhiv"``, ``"ogbg_molpcba"``, ``"peptides_func"``,
                ``"peptides_struct"``, ``"pcqm4mv2_small"``, ``"pcqm4mv2_medium"`` or
                ``"pcqm4mv2_deep"``.

        Raises:
            ValueError: There is no such name.

        Source:
            Rampasek et al., arXiv 2205.12454, tables A.2 to A.5, and their code's configurations.
        """
        if name not in _PUBLISHED:
            raise ValueError(f"name must be one of {list(_PUBLISHED)}, got {name!r}")
        return replace(_PUBLISHED[name])


class Inputs(Protocol):
    """Fields of a config that say what nodes and edges come with."""

    node_types: int | Sequence[int]
    node_features: int
    edge_types: int | Sequence[int]
    edge_features: int


def check_inputs(config: Inputs) -> None:
    """Make tuples of types; refuse types beside features, and nodes with neither."""
    config.node_types = kinds_of("node_types", config.node_types)
    config.edge_types = kinds_of("edge_types", config.edge_types)
    for whose, types, features in (
        ("node", config.node_types, config.node_features),
        ("edge", config.edge_types, config.edge_features),
    ):
        if types and features:
            raise ValueError(
                f"{whose}_features must be 0 with {whose}_types={types}, got {features}"
            )
    if not config.node_types and not config.node_features:
        raise ValueError("node_types is () and node_features is 0: give one of them")


def check_together(config: object, count: str, width: str) -> None:
    """Refuse two fields of which one is 0 and the other is not."""
    if bool(getattr(config, count)) != bool(getattr(config, width)):
        found = f"{getattr(config, count)} and {getattr(config, width)}"
        raise ValueError(f"{count} and {width} must both be 0 or positive, got {found}")


def kinds_of(name: str, types: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(types, str) or not isinstance(types, Sequence):
        types = (types,)
    return tuple(integer(name, n, 1) for n in types)


_OF_NODES = GraphGPSConfig(
    node_types=(),
    edge_types=(),
    local="gatedgcn",
    walk_steps=0,
    walk_dim=0,
    lap_pe=16,
    lap_dim=16,
    head="inductive_node",
    node_features=3,
    layers=6,
)
_IMAGES = replace(
    _OF_NODES,
    edge_features=1,
    out_dim=10,
    dim=52,
    layers=3,
    lap_pe=8,
    lap_dim=8,
    head="default",
    pooling="mean",
)
_PCQM = GraphGPSConfig(
    node_types=(119, 4, 12, 12, 10, 6, 6, 2, 2),
    edge_types=(5, 6, 2),
    dim=304,
    layers=5,
    local="gatedgcn",
    walk_steps=16,
    walk_dim=20,
    pooling="mean",
)
_PEPTIDES = replace(
    _PCQM,
    out_dim=10,
    dim=96,
    layers=4,
    walk_steps=0,
    walk_dim=0,
    lap_pe=10,
    lap_dim=16,
    head="default",
    head_layers=1,
)
_SIGN = GraphGPSConfig(walk_steps=0, walk_dim=0)
_PUBLISHED = {
    "zinc": GraphGPSConfig(),
    "zinc_sign_mlp": replace(_SIGN, sign_pe=8, sign_dim=8),
    "zinc_sign_deepset": replace(
        _SIGN, sign_pe=37, sign_dim=28, sign_net="deepset", sign_out=64, sign_rho_layers=3
    ),
    "zinc_graphormer": GraphGPSConfig(path_distance=20, degrees=64),
    "pattern": _OF_NODES,
    "cluster": replace(
        _OF_NODES,
        node_features=7,
        out_dim=6,
        dim=48,
        heads=8,
        layers=16,
        dropout=0.1,
        lap_pe=10,
    ),
    "mnist": _IMAGES,
    "cifar10": replace(_IMAGES, node_features=5, head_layers=2),
    "malnet_tiny": replace(
        _OF_NODES,
        node_features=5,
        out_dim=5,
        layers=5,
        attention="performer",
        lap_pe=10,
        head="default",
        pooling="max",
    ),
    "ogbg_molhiv": replace(_PCQM, dim=64, layers=10, walk_dim=16, dropout=0.05),
    "ogbg_molpcba": replace(
        _PCQM, out_dim=128, dim=384, dropout=0.2, head="default", head_layers=1
    ),
    "peptides_func": _PEPTIDES,
    "peptides_struct": replace(_PEPTIDES, out_dim=11),
    "pcqm4mv2_small": _PCQM,
    "pcqm4mv2_medium": replace(
        _PCQM, dim=384, heads=16, layers=10, dropout=0.1, attention_dropout=0.1
    ),
    "pcqm4mv2_deep": replace(
        _PCQM,
        dim=256,
        heads=8,
        layers=16,
        dropout=0.1,
        attention_dropout=0.1,
        activation="gelu",
    ),
}

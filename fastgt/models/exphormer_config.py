"""Settings of Exphormer, and those of the published models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastgt.models.graph_gps_config import check_inputs, check_together
from fastgt.models.graph_gps_encoders import Head, Pooling
from fastgt.models.graph_gps_local import Local
from fastgt.ops.checks import integer

_LOCAL = ("none", "gcn", "gin", "gine", "gatedgcn")
_SIZES = ("out_dim", "dim", "heads", "layers", "head_layers", "lap_layers")
_COUNTS = (
    "node_features",
    "edge_features",
    "in_layers",
    "expander_degree",
    "virtual_nodes",
    "lap_pe",
    "lap_dim",
    "stable_pe",
)


@dataclass
class ExphormerConfig:
    """Settings of :class:`Exphormer`; defaults are the authors' for CIFAR10.

    Attributes:
        out_dim: Numbers to predict.
        node_types, node_features, edge_types, edge_features: As of :class:`GraphGPSConfig`.
        dim: Width of nodes and edges; a multiple of ``heads``.
        heads: Of the attention.
        layers: So many times.
        local: ``"none"``, ``"gcn"``, ``"gin"``, ``"gine"`` or ``"gatedgcn"``.
        expander_degree: Permutations of the expander, whose nodes have twice as many edges; 0 for
            none.
        virtual_nodes: Of each graph.
        dropout: Inside the layers, and before them.
        encode_nodes: Whether nodes are embedded before the layers of ``in_layers``. Without, these
            take the features as they are.
        encode_norm: Whether a batch norm follows the embedding.
        in_layers: Of ``normalize(relu(dropout(norm(W x))))``, before the others.
        lap_pe, lap_dim, lap_layers, stable_pe: As of :class:`GraphGPSConfig`.
        head, head_layers, pooling: As of :class:`GraphGPSConfig`.
        last_edges: Whether the last GatedGCN has a norm of edges, which nothing uses, as in the
            authors' code and parameter counts.
    """

    out_dim: int = 10
    node_types: int | Sequence[int] = ()
    node_features: int = 5
    edge_types: int | Sequence[int] = ()
    edge_features: int = 1
    dim: int = 40
    heads: int = 4
    layers: int = 5
    local: Local = "gatedgcn"
    expander_degree: int = 5
    virtual_nodes: int = 1
    dropout: float = 0.1
    encode_nodes: bool = True
    encode_norm: bool = False
    in_layers: int = 0
    lap_pe: int = 0
    lap_dim: int = 0
    lap_layers: int = 2
    stable_pe: int = 8
    head: Head = "default"
    head_layers: int = 2
    pooling: Pooling = "mean"
    last_edges: bool = True

    def __post_init__(self) -> None:
        for name in _SIZES:
            setattr(self, name, integer(name, getattr(self, name), 1))
        for name in _COUNTS:
            setattr(self, name, integer(name, getattr(self, name), 0))
        check_inputs(self)
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got dim={self.dim} and heads={self.heads}")
        if self.local not in _LOCAL:
            raise ValueError(f"local must be one of {list(_LOCAL)}, got {self.local!r}")
        check_together(self, "lap_pe", "lap_dim")
        if self.lap_pe and self.stable_pe:
            raise ValueError(f"stable_pe must be 0 with lap_pe={self.lap_pe}, got {self.stable_pe}")
        if self.lap_dim >= self.dim:
            raise ValueError(f"lap_dim must be below dim={self.dim}, got {self.lap_dim}")
        if not self.encode_nodes and (self.node_types or not self.in_layers or self.lap_pe):
            raise ValueError(
                "encode_nodes=False takes node_features, in_layers and no lap_pe, got "
                f"node_types={self.node_types}, in_layers={self.in_layers}, lap_pe={self.lap_pe}"
            )

    @staticmethod
    def published(name: str) -> ExphormerConfig:
        """The authors' model of that name.

        Args:
            name: ``"cifar10"``, ``"mnist"``, ``"cluster"``, ``"pattern"``, ``"malnet_tiny"``,
                ``"voc"``, ``"coco"``, ``"arxiv"``, ``"peptides_func"`` or ``"peptides_struct"``.

        Raises:
            ValueError: There is no such name.

        Source:
            Shirzad et al., arXiv 2303.06147, appendix D, and their code's configurations.
        """
        if name not in _PUBLISHED:
            raise ValueError(f"name must be one of {list(_PUBLISHED)}, got {name!r}")
        return replace(_PUBLISHED[name])


_IMAGES = ExphormerConfig()
_BLOCK_MODELS = replace(
    _IMAGES,
    edge_features=0,
    dropout=0.0,
    stable_pe=10,
    head="inductive_node",
    head_layers=3,
)
_SUPERPIXELS = ExphormerConfig(
    out_dim=21,
    node_features=14,
    edge_features=2,
    dim=96,
    heads=8,
    layers=4,
    virtual_nodes=0,
    dropout=0.15,
    lap_pe=10,
    lap_dim=16,
    stable_pe=0,
    head="inductive_node",
    head_layers=3,
)
_PEPTIDES = ExphormerConfig(
    node_types=(119, 4, 12, 12, 10, 6, 6, 2, 2),
    node_features=0,
    edge_types=(5, 6, 2),
    edge_features=0,
    dim=64,
    layers=8,
    expander_degree=0,
    dropout=0.12,
    lap_pe=10,
    lap_dim=16,
    stable_pe=0,
    head_layers=1,
)
_PUBLISHED = {
    "cifar10": _IMAGES,
    "mnist": replace(_IMAGES, node_features=3),
    "pattern": replace(
        _BLOCK_MODELS, out_dim=1, node_features=3, layers=4, expander_degree=7, virtual_nodes=4
    ),
    "cluster": replace(
        _BLOCK_MODELS,
        out_dim=6,
        node_features=7,
        dim=32,
        heads=8,
        layers=20,
        expander_degree=3,
        virtual_nodes=3,
        dropout=0.1,
    ),
    "malnet_tiny": ExphormerConfig(
        out_dim=5,
        edge_features=0,
        dim=64,
        expander_degree=0,
        virtual_nodes=4,
        dropout=0.0,
        encode_norm=True,
        in_layers=1,
        stable_pe=0,
        head_layers=3,
        pooling="max",
    ),
    "voc": _SUPERPIXELS,
    "coco": replace(
        _SUPERPIXELS, out_dim=81, dim=72, heads=4, layers=7, expander_degree=11, dropout=0.0
    ),
    "arxiv": ExphormerConfig(
        out_dim=40,
        node_features=128,
        edge_features=0,
        dim=80,
        heads=2,
        layers=4,
        local="gcn",
        expander_degree=3,
        virtual_nodes=0,
        dropout=0.3,
        encode_nodes=False,
        in_layers=1,
        stable_pe=0,
        head="inductive_node",
        head_layers=1,
    ),
    "peptides_func": _PEPTIDES,
    "peptides_struct": replace(_PEPTIDES, out_dim=11, dim=88, layers=4, virtual_nodes=6),
}

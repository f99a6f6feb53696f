"""Settings of LargeGT, and those of the published models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from fastgt.ops.checks import integer, number
from fastgt.ops.global_attention import MAX_WIDTH

Parts = Literal["full", "local", "global"]


@dataclass
class LargeGTConfig:
    """Settings of :class:`LargeGT`; defaults are those of the authors' scripts.

    Attributes:
        node_features: Width of the nodes' features.
        out_dim: Classes, or numbers to predict.
        num_nodes: Nodes of the graph. The model keeps the number of the centroid of each; with
            ``parts="local"`` it keeps nothing.
        dim: Width of the model, and of every head: 512 at most, unless ``parts`` is ``"local"``.
        heads: Of both attentions, each ``dim`` wide.
        samples: K: how many nodes stand for the neighbourhood of one, itself among them.
        parts: ``"full"``, or the ``"local"`` or ``"global"`` module alone.
        position_dim: Width of the positions of nodes, and of the half of a centroid that stands for
            features.
        centroids: Of the codebook, ``num_nodes`` at most.
        decay: Of its moving averages.
        dropout: Between linear layers.
        local_dropout: In the local module.
        attention_dropout: Of the weights of centroids.
    """

    node_features: int
    out_dim: int
    num_nodes: int
    dim: int = 256
    heads: int = 2
    samples: int = 100
    parts: Parts = "full"
    position_dim: int = 64
    centroids: int = 4096
    decay: float = 0.99
    dropout: float = 0.5
    local_dropout: float = 0.3
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            "node_features",
            "out_dim",
            "num_nodes",
            "dim",
            "heads",
            "samples",
            "position_dim",
            "centroids",
        ):
            setattr(self, name, integer(name, getattr(self, name), 1))
        for name in ("dropout", "local_dropout", "attention_dropout"):
            p = number(name, getattr(self, name))
            if not 0 <= p <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {p}")
        if not 0 < number("decay", self.decay) < 1:
            raise ValueError(f"decay must be between 0 and 1, got {self.decay}")
        if self.parts not in get_args(Parts):
            raise ValueError(f"parts must be one of {list(get_args(Parts))}, got {self.parts!r}")
        if self.samples < 2:
            raise ValueError(
                f"samples must be 2 at least, the node and another, got {self.samples}"
            )
        if self.parts == "local":
            return
        if self.dim > MAX_WIDTH:
            raise ValueError(
                f"dim must be {MAX_WIDTH} at most with parts={self.parts!r}, got {self.dim}: a "
                "head is as wide"
            )
        if self.centroids > self.num_nodes:
            raise ValueError(
                f"centroids must be num_nodes={self.num_nodes} at most, got {self.centroids}"
            )

    @staticmethod
    def published(name: str) -> LargeGTConfig:
        """The authors' model of that name, with both modules.

        Args:
            name: ``"ogbn_products"``, ``"snap_patents"`` or ``"ogbn_papers100m"``, of whose nodes
                the 1,546,782 with a class have centroids.

        Raises:
            ValueError: There is no such name.

        Source:
            Dwivedi et al., arXiv 2312.11109, and docs/03_reproduce.md of their code.
        """
        if name not in _PUBLISHED:
            raise ValueError(f"name must be one of {list(_PUBLISHED)}, got {name!r}")
        return replace(_PUBLISHED[name])


_PUBLISHED = {
    "ogbn_products": LargeGTConfig(100, 47, 2_449_029),
    "snap_patents": LargeGTConfig(269, 5, 2_923_922, dim=128, samples=50),
    "ogbn_papers100m": LargeGTConfig(128, 172, 1_546_782, dim=512, position_dim=128),
}

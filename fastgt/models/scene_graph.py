"""The encoder of scene graphs of trf-sg2im: objects and predicates become boxes (2303.04634).

    x_i = dropout(object_i) + W pe_i                 embeddings, and Laplacian eigenvectors
    e_ij = predicate_ij
    x, e = Graph Transformer with edges (x, e)       see graph_transformer.py, with batch norms
    box_i = silu(W_3 gelu(W_2 gelu(W_1 x_i)))
    class_i = W_2' gelu(W_1' x_i)

Edge j -> i of predicate t says "j t i": objects attend to the subjects of what is said of them.
The authors' code differs in three points: it flips signs of eigenvectors outside training too, so
that no two answers are alike; it takes graphs of one size only; and it has a GELU behind the
classes' logits, which keeps them above -0.17.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.models.graph_transformer import EdgeLayers, Norm, check_config


@dataclass
class SceneGraphConfig:
    """Settings of :class:`SceneGraphEncoder`; defaults are the authors' for COCO.

    Attributes:
        objects: How many classes of objects there are.
        predicates: How many kinds of edges there are.
        dim: Width of a node's and of an edge's features; a multiple of ``heads`` and of 4.
        heads: Of every attention.
        layers: Attention and feed-forward, so many times.
        pe_dim: Laplacian eigenvectors of a node; 0 for a model without encodings.
        norm: ``"batch"`` or ``"layer"``, after every residual. In training a batch norm needs two
            nodes and two edges, or no edge, and refuses one.
        dropout: Of the embedded objects, and inside the layers.
        last_edges: Whether the last layer has the parameters of an edge branch, as in the authors'
            code. Nothing uses them: without, every parameter gets a gradient, as
            ``DistributedDataParallel`` wants it.
    """

    objects: int = 184
    predicates: int = 7
    dim: int = 768
    heads: int = 12
    layers: int = 12
    pe_dim: int = 32
    norm: Norm = "batch"
    dropout: float = 0.1
    last_edges: bool = True

    def __post_init__(self) -> None:
        check_config(self, "objects", "predicates", "dim", "heads", "layers", "pe_dim")
        if self.dim % 4:
            raise ValueError(f"dim must be a multiple of 4, got {self.dim}")

    @staticmethod
    def published(name: str) -> SceneGraphConfig:
        """The authors' model of that name.

        Args:
            name: ``"coco"``, of COCO-Stuff's 184 numbers of categories and 7 predicates, or
                ``"vg"``, of the 179 objects and 46 predicates of sg2im's Visual Genome.

        Raises:
            ValueError: There is no such name.

        Source:
            Sortino et al., arXiv 2303.04634, and their code's configurations.
        """
        if name not in _PUBLISHED:
            raise ValueError(f"name must be one of {list(_PUBLISHED)}, got {name!r}")
        return replace(_PUBLISHED[name])


class SceneGraphEncoder(EdgeLayers):
    """A box and logits of classes for every object of a batch of scene graphs.

    Boxes are no less than -0.28, and not bounded above: the authors clamp them to (0, 1) before
    their losses. The edges of the last layer reach no output: its edge branch is there, as in the
    authors' code and parameter counts, but is not computed and gets no gradient. With
    ``last_edges=False`` it is not there, as suits ``DistributedDataParallel``.

    Source:
        Sortino et al., Transformer-based Image Generation from Scene Graphs, arXiv 2303.04634,
        section 3.1; the layers are those of Dwivedi and Bresson, arXiv 2012.09699.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import SceneGraphConfig, SceneGraphEncoder
        >>> config = SceneGraphConfig(objects=20, predicates=7, dim=48, layers=2, pe_dim=0)
        >>> scene = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> objects, predicates = torch.tensor([3, 7, 19]), torch.tensor([1, 5, 2])
        >>> boxes, logits = SceneGraphEncoder(config)(objects, predicates, scene)
        >>> boxes.shape, logits.shape
        (torch.Size([3, 4]), torch.Size([3, 20]))
    """

    def __init__(self, config: SceneGraphConfig):
        c = config
        super().__init__(c, c.objects, c.predicates, c.dropout)
        self.box = nn.Sequential(
            nn.Linear(c.dim, c.dim // 2),
            nn.GELU(),
            nn.Linear(c.dim // 2, c.dim // 4),
            nn.GELU(),
            nn.Linear(c.dim // 4, 4),
            nn.SiLU(),
        )
        self.classes = nn.Sequential(
            nn.Linear(c.dim, c.dim // 2), nn.GELU(), nn.Linear(c.dim // 2, c.objects)
        )

    def forward(
        self, node: Tensor, edge: Tensor, graph: Graph, *, pe: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """node ``[N]``, edge ``[E]`` integers, pe ``[N, pe_dim]`` -> ``[N, 4]``, ``[N, objects]``.

        In training every eigenvector gets one random sign for the whole batch.
        """
        x = self.encode(node, edge, graph, pe)
        return self.box(x), self.classes(x)


_PUBLISHED = {
    "coco": SceneGraphConfig(),
    "vg": SceneGraphConfig(objects=179, predicates=46, pe_dim=8),
}

"""Node classification from words and typed edges: the model that ``fastgt demo`` trains.

Graph Transformer layers (see ``graph_transformer.py``) over bags of words, with one learned logit
bias per edge kind, head and layer:

    h_i^0 = dropout(norm(sum_{w in words(i)} e_w / sqrt(|words(i)|)))
    s_ij  = clamp(q_i . k_j / sqrt(d_h), -5, 5) + b_kind(ij)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fastgt.graph import Graph
from fastgt.models.graph_transformer import GraphTransformerLayer, check_config, check_types
from fastgt.nn.sublayers import reset_sublayers
from fastgt.ops.checks import check_graph


@dataclass
class PackageClassifierConfig:
    vocabulary: int
    edge_kinds: int
    classes: int
    dim: int = 64
    heads: int = 4
    layers: int = 2
    dropout: float = 0.2
    word_dropout: float = 0.2

    def __post_init__(self) -> None:
        check_config(self, "vocabulary", "edge_kinds", "classes", "dim", "heads", "layers")


class PackageClassifier(nn.Module):
    def __init__(self, config: PackageClassifierConfig):
        super().__init__()
        c = self.config = config
        self.words = _Words(c.vocabulary, c.dim, mode="sum", include_last_offset=True)
        self.norm = nn.LayerNorm(c.dim)
        self.layers = nn.ModuleList(
            GraphTransformerLayer(c.dim, c.heads, dropout=c.dropout) for _ in range(c.layers)
        )
        self.edge_bias = nn.ModuleList(_EdgeBias(c.edge_kinds, c.heads) for _ in range(c.layers))
        self.dropout = nn.Dropout(c.dropout)
        self.out = nn.Linear(c.dim, c.classes)

    def reset_parameters(self) -> None:
        """Draw every parameter anew."""
        reset_sublayers(self)

    def forward(self, word_ptr: Tensor, word: Tensor, graph: Graph, edge_kind: Tensor) -> Tensor:
        """word_ptr ``[N + 1]``, word ``[W]``, edge_kind ``[E]`` -> logits ``[N, classes]``.

        Node i owns the words ``word[word_ptr[i]:word_ptr[i + 1]]``. In training whole words are
        dropped at random.
        """
        check_graph(graph)
        c = self.config
        word = check_types("word", word, "W", len(word), c.vocabulary, graph).long()
        ends = graph.num_rows + 1, len(word) + 1
        word_ptr = check_types("word_ptr", word_ptr, "N + 1", *ends, graph).long()
        edge_kind = check_types("edge_kind", edge_kind, "E", graph.num_edges, c.edge_kinds, graph)
        count = word_ptr.diff()
        weight = (
            count.clamp(min=1)
            .to(self.words.weight.dtype)
            .rsqrt()
            .repeat_interleave(count, output_size=len(word))
        )
        weight = nn.functional.dropout(weight, self.config.word_dropout, self.training)
        x = self.words(word, word_ptr, per_sample_weights=weight)
        x = self.dropout(self.norm(x))
        for layer, bias in zip(self.layers, self.edge_bias, strict=True):
            x = layer(x, graph, edge_bias=bias(edge_kind))
        return self.out(self.dropout(x))


class _Words(nn.EmbeddingBag):
    def reset_parameters(self) -> None:
        super().reset_parameters()  # a seed draws as it did
        nn.init.normal_(self.weight, std=0.1)


class _EdgeBias(nn.Embedding):
    """Of 0 to begin with."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

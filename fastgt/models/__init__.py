"""Reference models, one file each."""

from fastgt.models.graph_classifier import GraphClassifier, GraphClassifierConfig
from fastgt.models.graph_transformer import (
    EdgeGraphTransformer,
    EdgeGraphTransformerConfig,
    GraphTransformer,
    GraphTransformerConfig,
)

__all__ = [
    "EdgeGraphTransformer",
    "EdgeGraphTransformerConfig",
    "GraphClassifier",
    "GraphClassifierConfig",
    "GraphTransformer",
    "GraphTransformerConfig",
]

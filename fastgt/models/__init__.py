"""Reference models, one file each."""

from fastgt.models.graph_transformer import (
    EdgeGraphTransformer,
    EdgeGraphTransformerConfig,
    GraphTransformer,
    GraphTransformerConfig,
)

__all__ = [
    "EdgeGraphTransformer",
    "EdgeGraphTransformerConfig",
    "GraphTransformer",
    "GraphTransformerConfig",
]

"""Reference models, one file each."""

from fastgt.models.graph_transformer import GraphTransformer, GraphTransformerConfig

__all__ = ["GraphTransformer", "GraphTransformerConfig"]

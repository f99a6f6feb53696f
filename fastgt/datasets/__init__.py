"""Data sets: many graphs in flat arrays, one graph with splits of its nodes, or timed events."""

from fastgt.datasets.block_models import cluster, pattern
from fastgt.datasets.event_set import EventBatch, Events, EventSet
from fastgt.datasets.flights import flights
from fastgt.datasets.graph_set import Batch, Encoded, GraphSet
from fastgt.datasets.hop_features import hop_features
from fastgt.datasets.line_drawings import drawn_lines
from fastgt.datasets.named import DATASETS, load
from fastgt.datasets.node_set import NodeSet
from fastgt.datasets.sampled_tokens import sample_tokens
from fastgt.datasets.token_set import TokenBatch, TokenSet

__all__ = [
    "DATASETS",
    "Batch",
    "Encoded",
    "EventBatch",
    "EventSet",
    "Events",
    "GraphSet",
    "NodeSet",
    "TokenBatch",
    "TokenSet",
    "cluster",
    "drawn_lines",
    "flights",
    "hop_features",
    "load",
    "pattern",
    "sample_tokens",
]

"""Data sets: many graphs in flat arrays, or one graph with splits of its nodes."""

from fastgt.datasets.block_models import cluster, pattern
from fastgt.datasets.graph_set import Batch, Encoded, GraphSet
from fastgt.datasets.line_drawings import drawn_lines
from fastgt.datasets.named import DATASETS, load
from fastgt.datasets.node_set import NodeSet

__all__ = [
    "DATASETS",
    "Batch",
    "Encoded",
    "GraphSet",
    "NodeSet",
    "cluster",
    "drawn_lines",
    "load",
    "pattern",
]

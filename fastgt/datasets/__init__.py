"""Data sets: many graphs in flat arrays, or one graph with splits of its nodes."""

from fastgt.datasets.graph_set import Batch, Encoded, GraphSet
from fastgt.datasets.node_set import NodeSet

__all__ = ["Batch", "Encoded", "GraphSet", "NodeSet"]

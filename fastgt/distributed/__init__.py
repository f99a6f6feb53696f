"""Graphs that lie on several machines, on ``torch.distributed``."""

from fastgt.distributed.graph import DistributedGraph
from fastgt.distributed.group import Group

__all__ = ["DistributedGraph", "Group"]

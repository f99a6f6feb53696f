"""Graphs that lie on several machines, on ``torch.distributed``."""

from fastgt.distributed.edge_list import edge_list_graph
from fastgt.distributed.partition import partition
from fastgt.distributed.partition_files import read_part, read_tensors, write_partitions
from fastgt.distributed.pyg_partition import read_pyg_partition
from fastgt.distributed.report import report

__all__ = [
    "edge_list_graph",
    "partition",
    "read_part",
    "read_pyg_partition",
    "read_tensors",
    "report",
    "write_partitions",
]

"""Graphs that lie on several machines, on ``torch.distributed``."""

from fastgt.distributed.checkpoint import load_checkpoint, save_checkpoint
from fastgt.distributed.edge_list import edge_list_graph
from fastgt.distributed.graph import DistributedGraph
from fastgt.distributed.group import Group
from fastgt.distributed.halo_exchange import halo_exchange
from fastgt.distributed.head_parallel import head_parallel
from fastgt.distributed.in_turn import in_turn
from fastgt.distributed.load import load_partition
from fastgt.distributed.over_ranks import over_ranks
from fastgt.distributed.partition import partition
from fastgt.distributed.partition_files import read_part, read_tensors, write_partitions
from fastgt.distributed.pyg_partition import read_pyg_partition
from fastgt.distributed.report import report
from fastgt.distributed.synchronize import sync_gradients, sync_parameters

__all__ = [
    "DistributedGraph",
    "Group",
    "edge_list_graph",
    "halo_exchange",
    "head_parallel",
    "in_turn",
    "load_checkpoint",
    "load_partition",
    "over_ranks",
    "partition",
    "read_part",
    "read_pyg_partition",
    "read_tensors",
    "report",
    "save_checkpoint",
    "sync_gradients",
    "sync_parameters",
    "write_partitions",
]

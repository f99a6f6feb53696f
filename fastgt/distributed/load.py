"""This rank's share of a graph, from a folder of parts."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastgt.distributed.agreement import agree
from fastgt.distributed.graph import DistributedGraph
from fastgt.distributed.group import Group
from fastgt.distributed.part import Part, Whole
from fastgt.distributed.partition_files import read_meta, read_part, read_tensors


def load_partition(
    folder: str | os.PathLike[str],
    group: dist.ProcessGroup | DeviceMesh | Group | None = None,
    *,
    names: Iterable[str] | None = None,
    device: torch.device | str = "cpu",
    overlap: bool = True,
    check: bool = True,
) -> tuple[DistributedGraph, dict[str, Tensor]]:
    """This rank's share of a graph and of its tensors, as ``write_partitions`` wrote them.

    Every rank of the group calls it. All of them raise where one cannot read its part, or where
    they read parts of different partitions.

    Args:
        folder: Every rank may have its own copy.
        group, overlap, check: As of :class:`fastgt.distributed.DistributedGraph`.
        names: Of the tensors; None for all.
        device: Where the graph lies. Tensors stay in their files, mapped into memory.

    Returns:
        The distributed graph, and its tensors by name: of nodes in the order of the rank's own rows
        (columns where the name ends in ``_col``), of edges in that of its edges.

    Raises:
        ValueError: This rank's part is missing, half written or damaged; or the group has another
            size than the partition.
        RuntimeError: Another rank's is; names it. Or ranks have parts of different partitions.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.distributed import load_partition, write_partitions
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     owners = torch.zeros(3, dtype=torch.int64)
        ...     write_partitions(folder, graph, owners, x=torch.randn(3, 8))
        ...     shard, tensors = load_partition(folder)
        >>> shard.num_rows, tensors["x"].shape
        (3, torch.Size([3, 8]))
    """
    ranks = group if isinstance(group, Group) else Group(group)
    told: dict[str, str] = {}
    problem: Exception | None = None
    found: tuple[Part, dict[str, Tensor]] | None = None
    try:
        meta = read_meta(folder)
        told = {"partition": meta.partition}
        if meta.parts != ranks.size:
            raise ValueError(
                f"the group has {ranks.size} ranks but {os.fspath(folder)} has {meta.parts} parts"
            )
        found = read_part(folder, ranks.rank), read_tensors(folder, ranks.rank, names)
    except (OSError, TypeError, ValueError) as error:
        problem = error
    agree(ranks, torch.device(device), "load_partition", told, problem)
    assert found is not None
    part, tensors = found
    shard = DistributedGraph(_moved(part, device), ranks, overlap=overlap, check=check)
    return shard, tensors


def _moved(part: Part, device: torch.device | str) -> Part:
    def moved(x: Any) -> Any:
        if isinstance(x, Whole):
            return Whole(*map(moved, x))
        return x.to(device) if isinstance(x, Tensor) else x

    here = Part(*map(moved, part))
    return here._replace(cols=here.rows) if part.cols is part.rows else here

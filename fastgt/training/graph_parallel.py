"""``--graph-parallel P``: one graph that P processes share, each with some of its rows."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastgt.datasets import GraphSet, NodeSet
from fastgt.distributed import DistributedGraph, Group, load_partition, partition
from fastgt.distributed.agreement import agree
from fastgt.distributed.part import Part
from fastgt.distributed.partition import ROW_COST
from fastgt.graph import Graph
from fastgt.training.published_recipes import MODELS
from fastgt.training.recipe import Recipe


@dataclass(frozen=True)
class GraphParallel:
    """How the graph is shared.

    Attributes:
        processes: How many share it.
        partition: What :func:`fastgt.distributed.write_partitions` wrote; None for one that is
            found anew, by METIS, or by LDG where pymetis is not installed.
    """

    processes: int
    partition: Path | None = None


def check(recipe: Recipe, data: GraphSet | NodeSet, size: int, parallel: GraphParallel) -> None:
    """The recipe, its data and the processes that there are can share a graph.

    Raises:
        ValueError: There are others than ``processes``; or the data is many graphs; or the model is
            not called with a graph.
    """
    wanted = parallel.processes
    if size != wanted:
        raise ValueError(
            f"--graph-parallel {wanted} takes {wanted} processes, and there are {size}: start them "
            f"with torchrun --nproc-per-node {wanted} -m fastgt train ..."
        )
    if not isinstance(data, NodeSet):
        raise ValueError(
            f"--graph-parallel shares one graph, and {recipe.data} is many: leave it away, and "
            "processes share batches of graphs"
        )
    if MODELS[recipe.model].sampled:
        raise ValueError(
            f"--graph-parallel shares one graph, and {recipe.model} is called with tokens of some "
            "nodes in its place"
        )


def shared(graph: Graph, parallel: GraphParallel, group: Group) -> DistributedGraph:
    """This process's share of a graph that every process has.

    Raises:
        ValueError: The partition's folder cannot be read, is for another number of processes, or
            is of another graph.
        RuntimeError: Another process cannot read it; or no partition can be found here.
    """
    if parallel.partition is None:
        return DistributedGraph.from_graph(graph, _found(graph, group), group)
    shard, _ = load_partition(parallel.partition, group, names=(), device=graph.device)
    problem = _of_another(graph, shard.part, parallel.partition)
    agree(group, graph.device, "--partition", {}, problem)
    return shard


def _found(graph: Graph, group: Group) -> Tensor:
    """The rank of each node; one process finds it for all."""
    found: Tensor | None = None
    problem: Exception | None = None
    if group.rank == 0:
        method = "metis" if importlib.util.find_spec("pymetis") is not None else "ldg"
        try:
            part = partition(
                graph.to("cpu"),
                group.size,
                method,  # type: ignore[arg-type]
                row_cost=ROW_COST,
            )
            assert isinstance(part, Tensor)
            found = part
        except Exception as error:  # whatever it is, the others wait for it
            problem = error
    agree(group, graph.device, "--graph-parallel", {}, problem)
    owners: Tensor = group.told_by_first(found)
    return owners.to(graph.device)


def _of_another(graph: Graph, part: Part, folder: Path) -> Exception | None:
    """What shows that a part was cut from another graph."""
    whole = part.whole
    if (whole.rows, whole.edges) != (graph.num_rows, graph.num_edges) or not whole.square:
        return ValueError(
            f"--partition {folder} is of a graph of {whole.rows} nodes and {whole.edges} edges, "
            f"and that of the data has {graph.num_rows} and {graph.num_edges}"
        )
    columns = torch.cat([part.cols, part.halo])
    there = torch.stack([columns[part.col], part.rows[part.row]])
    here = graph.edge_index.index_select(1, part.edge).long()
    differing = (there != here).any(0).nonzero()
    if not len(differing):
        return None
    i = int(differing[0])
    return ValueError(
        f"--partition {folder} is of another graph: its edge {int(part.edge[i])} leads from node "
        f"{int(there[0, i])} to {int(there[1, i])}, and that of the data from {int(here[0, i])} to "
        f"{int(here[1, i])}"
    )

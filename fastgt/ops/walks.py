"""The edges of a graph as an operator goes through them, on a CPU or by Triton's kernels."""

from __future__ import annotations

from torch import Tensor

from fastgt.graph import Graph
from fastgt.plans import Plan

CPU = Plan("cpp", 0, "")
GATHER = Plan("gather", 0, "channels that never meet have no use for tensor cores")


def row_walk(graph: Graph, plan: Plan) -> tuple[Tensor, ...]:
    """The edges grouped by row, with what Triton's kernels need besides."""
    if plan.path == "cpp":
        return graph.row_ptr, graph.col, graph.edge
    return graph.row_walk(plan)


def column_walk(graph: Graph, plan: Plan) -> tuple[Tensor, ...]:
    """The same edges grouped by column."""
    return graph.columns if plan.path == "cpp" else graph.column_walk(plan)

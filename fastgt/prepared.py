"""What is made of a graph for its kernels, when it is first asked for, and kept with the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgt import plans, tiles
from fastgt.graph_build import Structure, group, normal
from fastgt.plans import Plan
from fastgt.tiles import Buckets, Windows


class ColumnWalk(NamedTuple):
    """The same edges grouped by column (CSC): what the gradient of keys and values walks.

    Attributes:
        ptr: ``[N_cols + 1]``; column j owns the slots ``ptr[j]:ptr[j + 1]``.
        row: ``[E]`` the row of each slot.
        slot: ``[E]`` the same edge's slot in the row walk.
        edge: ``[E]`` the same edge's number in the caller's order.
    """

    ptr: Tensor
    row: Tensor
    slot: Tensor
    edge: Tensor

    def of_transpose(self, graph: Structure) -> ColumnWalk:
        """That of the transposed graph, where this is the graph's own."""
        # where each slot of the graph's row walk stands in its column walk
        place = torch.empty_like(self.slot)
        place[self.slot.long()] = torch.arange(
            graph.num_edges, dtype=place.dtype, device=place.device
        )
        return ColumnWalk(graph.row_ptr, graph.col, normal(place), graph.edge)


class WindowPair(NamedTuple):
    """Windows of rows and of columns; tables that are equal are one."""

    rows: Windows
    columns: Windows


@dataclass(eq=False)
class Prepared:
    """What a graph keeps beside itself. Graphs that differ in their plan only share one.

    Attributes:
        columns: The column walk; None before anybody asked for it.
        row_buckets, column_buckets: None before anybody asked; ``()`` where rows, or columns, are
            taken as they stand.
        windows: By path and height.
        plans: By width and dtype of heads.
        sizes: The numbers of columns, and of nodes and edges of types, as a pytree has them.
    """

    columns: ColumnWalk | None = None
    row_buckets: Buckets | tuple[()] | None = None
    column_buckets: Buckets | tuple[()] | None = None
    windows: dict[tuple[str, int], WindowPair] = field(default_factory=dict)
    plans: dict[tuple[int, torch.dtype], Plan] = field(default_factory=dict)
    sizes: tuple[Tensor, ...] | None = None

    def columns_of(self, graph: Structure) -> ColumnWalk:
        """The column walk of the graph: one sort of its edges."""
        if self.columns is not None:
            return self.columns
        ends = graph.col, graph.row
        row, slot, ptr, edge = group(*ends, graph.num_cols, graph.col.dtype, graph.edge)
        assert edge is not None
        walk = ColumnWalk(ptr, row, slot, edge)
        # torch.export traces with fake tensors: they must not outlive the trace
        if type(slot) is type(graph.col) and _may_be_kept():
            walk = self.columns = map_tensors(normal, walk)
        return walk

    def sizes_of(self, col: Tensor, numbers: list[int]) -> tuple[Tensor, ...]:
        """Empty tensors of so many rows: always the same ones, as torch.export expects."""
        if self.sizes is not None:
            return self.sizes
        sizes = tuple(col.new_empty((n, 0)) for n in numbers)
        if all(type(x) is type(col) for x in sizes) and _may_be_kept():
            sizes = self.sizes = map_tensors(normal, sizes)
        return sizes

    def row_buckets_of(self, ptr: Tensor, num_edges: int) -> Buckets | tuple[()]:
        """The buckets of the rows; none where they are taken as they stand."""
        if self.row_buckets is None and measurable(ptr) and num_edges > tiles.SMALL_EDGES:
            self.row_buckets = map_tensors(normal, tiles.buckets(ptr) or ())
        return () if self.row_buckets is None else self.row_buckets

    def column_buckets_of(self, ptr: Tensor, num_edges: int) -> Buckets | tuple[()]:
        """The buckets of the columns; none where they are taken as they stand."""
        if self.column_buckets is None and measurable(ptr) and num_edges > tiles.SMALL_EDGES:
            self.column_buckets = map_tensors(normal, tiles.buckets(ptr) or ())
        return () if self.column_buckets is None else self.column_buckets

    def windows_of(self, graph: Structure, path: str, height: int) -> WindowPair | None:
        """The graph's windows; None where dense ones cannot hold the edges."""
        key = window_key(path, height)
        if key in self.windows:
            return self.windows[key]
        ends = graph.graph_ptr, graph.col_graph_ptr
        plans.check_fits(path, height, graph.num_edges, *ends, graph.col.dtype)
        ptr, row, _, edge = self.columns_of(graph)
        rows: Windows | None
        columns: Windows | None
        if path == "graphs":
            rows = tiles.dense_windows(graph.row_ptr, graph.col, graph.edge, *ends, height)
            columns = tiles.dense_windows(ptr, row, edge, *ends[::-1], height)
        else:
            rows = tiles.windows(graph.row_ptr, graph.col, graph.edge, graph.num_cols, height)
            columns = tiles.windows(ptr, row, edge, graph.num_rows, height)
        if rows is None or columns is None:
            return None
        pair = WindowPair(rows, tiles.shared(columns, rows))
        if _may_be_kept():
            pair = self.windows[key] = map_tensors(normal, pair)
        return pair

    def plan_for(self, graph: Structure, width: int, dtype: torch.dtype) -> Plan:
        """The plan for heads of that width and dtype, found once and then kept."""
        plan = self.plans.get((width, dtype))
        if plan is not None:
            return plan
        if not measurable(graph.col):
            return plans.UNPREPARED
        plan = plans.best_plan(graph, width, dtype)
        if plan.path == "graphs" and self.windows_of(graph, plan.path, plan.height) is None:
            # an edge stands there twice, which windows across graphs can hold
            ends = graph.graph_ptr[[0, -1]], graph.col_graph_ptr[[0, -1]]
            whole = graph._replace(graph_ptr=ends[0], col_graph_ptr=ends[1])
            plan = plans.best_plan(whole, width, dtype)
        # a plan that is kept is prepared: it may be compiled from now on
        try:
            if plan.height:
                self.windows_of(graph, plan.path, plan.height)
        except RuntimeError as error:  # memory has shrunk since it was asked for
            plan = Plan("gather", 0, f"auto: {error}")
        self.plans[width, dtype] = plan
        return plan


def window_key(path: str, height: int) -> tuple[str, int]:
    """Where windows stand in :class:`Prepared`."""
    # by comparison: the height is symbolic in torch.compile(dynamic=True)
    return path, 16 if height == 16 else 32 if height == 32 else 64


def measurable(x: Tensor) -> bool:
    """Whether there are values: not on the meta device, nor while somebody traces."""
    tracing = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return not tracing and x.device.type != "meta"


def _may_be_kept() -> bool:
    """Not what is compiled under inference_mode: inference tensors, which Dynamo cannot tell."""
    return torch.is_grad_enabled() or not torch.compiler.is_compiling()


def map_tensors(f: Callable[[Tensor], Any], x: Any) -> Any:
    """``f`` of every tensor in nested tuples and dicts, which keep their types, and in those of a
    :class:`Prepared`."""
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, dict):
        return {key: map_tensors(f, value) for key, value in x.items()}
    if isinstance(x, Prepared):
        return Prepared(**map_tensors(f, vars(x)))
    if not isinstance(x, tuple):
        return x
    parts = [map_tensors(f, part) for part in x]
    return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)


# torch.load of a saved graph works as it does for tensors
torch.serialization.add_safe_globals([ColumnWalk, Prepared, WindowPair, Buckets, Windows, Plan])

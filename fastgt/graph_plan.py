"""How kernels go through a Graph: planned by the caller or measured, and prepared once."""

from __future__ import annotations

from typing import Literal, Self

import torch
from torch import Tensor

from fastgt import plans
from fastgt.graph_build import Structure
from fastgt.graph_storage import Stored
from fastgt.plans import Path, Plan
from fastgt.prepared import ColumnWalk, Prepared, WindowPair, measurable, window_key


class Planned(Stored):
    """A graph with the tensors that kernels walk, which are made when they are first needed."""

    num_rows: int
    num_cols: int
    row_ptr: Tensor  # [N_rows + 1]
    edge: Tensor  # [E]
    graph_ptr: Tensor  # [G + 1]
    col_graph_ptr: Tensor  # [G + 1]
    prepared: Prepared
    settled: Plan | None
    order: Tensor | None  # [N]

    @property
    def columns(self) -> ColumnWalk:
        """The column walk, sorted on first use and kept."""
        walk = self.prepared.columns
        return self.prepared.columns_of(self._structure) if walk is None else walk

    def plan(
        self,
        path: Path | Literal["auto"] = "auto",
        *,
        height: int | None = None,
        width: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Self:
        """The same graph with the way that Triton kernels go through it settled and prepared.

        ``"gather"`` loads a row of k and v for every edge. ``"windows"`` takes windows of
        ``height`` rows whose columns are loaded once and multiplied on tensor cores; it pays
        where rows share columns. ``"graphs"`` does so with whole graphs of a batch, of up to 128
        nodes. Both take an edge bias; with any other tensor on edges, and with dropout, attention
        gathers. Results agree to rounding, each is the same bit for bit every time. What is
        prepared is kept and shared with this graph: 24 bytes an edge at most for each walk.

        Without a call of this, every attention plans for itself: graphs of up to 65,536 edges,
        float32 and float64 and heads beyond 128 channels gather; otherwise a sample of the graph
        and a table decide, and ``repr`` says what was chosen and why. On a CPU there is one path:
        a graph planned for another is refused. Graphs made from this one are planned anew. Call
        it before compiling or capturing a CUDA graph, where nothing can be measured any more:
        attention then takes what is prepared, else gathers rows as they stand.

        Args:
            path: ``"gather"``, ``"windows"``, ``"graphs"``; or ``"auto"``: the plan for
                ``width`` and ``dtype``, or, without a width, each attention's own.
            height: Rows of a window: 16, 32 or 64, the default.
            width, dtype: Of the heads, for ``"auto"``.

        Raises:
            TypeError: ``height`` or ``width`` is no int.
            ValueError: The path does not fit the graph; says why.
            RuntimeError: Its tables would not fit in memory, or the graph holds no values.

        Example:
            >>> import torch
            >>> from fastgt import Graph
            >>> graph = Graph.from_dense(torch.ones(3, 3, dtype=torch.bool)).plan("windows")
            >>> print(graph.settled)
            windows of 64 rows (named)
        """
        height, width = plans.checked_request(path, height, width, dtype)
        if self.device.type == "meta":
            raise RuntimeError("a graph on the meta device has no values to plan with")
        settled = None
        if path != "auto":
            settled = Plan(path, 0 if path == "gather" else height or 64, "named")
        elif width is not None:
            settled = self._replace(settled=None).plan_for(width, dtype)
        # where nothing is settled, what gathering needs
        self.row_walk(settled or plans.SMALL)
        self.column_walk(settled or plans.SMALL)
        return self._replace(settled=settled)

    def plan_for(self, width: int, dtype: torch.dtype, *, more_than_bias: bool = False) -> Plan:
        """How attention with heads of that width and dtype goes through the graph, and why.

        ``more_than_bias``: with edge terms other than a bias, or dropout.
        """
        if more_than_bias:
            return plans.MORE_THAN_BIAS
        if self.settled is not None:
            return self.settled
        # a program that is exported is for any number of edges: it must not compare them
        if not self.prepared.plans and not measurable(self.col):
            return plans.UNPREPARED
        if self.col.shape[0] <= plans.LAUNCH_BOUND:
            return plans.SMALL
        plan = self.prepared.plans.get((width, dtype))
        return self.prepared.plan_for(self._structure, width, dtype) if plan is None else plan

    def row_walk(self, plan: Plan) -> tuple[Tensor, ...]:
        """The flat tensors that the kernels of that plan walk by rows."""
        walk = self.row_ptr, self.col, self.edge
        if plan.path == "gather":
            return *walk, *self.prepared.row_buckets_of(self.row_ptr, self.col.shape[0])
        return *walk, *self._windows(plan).rows[2:]

    def column_walk(self, plan: Plan) -> tuple[Tensor, ...]:
        """The flat tensors that the kernels of that plan walk by columns."""
        if plan.path == "gather":
            ptr, row, _, edge = self.columns
            return ptr, row, edge, *self.prepared.column_buckets_of(ptr, self.col.shape[0])
        return tuple(self._windows(plan).columns[2:])

    def _windows(self, plan: Plan) -> WindowPair:
        pair = self.prepared.windows.get(window_key(plan.path, plan.height))
        if pair is None:
            pair = self.prepared.windows_of(self._structure, plan.path, plan.height)
        if pair is None:
            raise ValueError(
                "path 'graphs' takes graphs without duplicate edges, and this one has some: "
                "use 'windows'"
            )
        return pair

    def __repr__(self) -> str:
        if not isinstance(self.col, Tensor):  # what tree_map made of the tensors
            return f"Graph(row_ptr={self.row_ptr}, col={self.col}, edge={self.edge}, ...)"
        square = self.num_rows == self.num_cols
        size = f"N={self.num_rows}" if square else f"N={self.num_rows}x{self.num_cols}"
        edges = self.col.shape[0]
        if self.device.type == "meta":  # no values to describe
            return f"Graph({size}, E={edges}, meta)"
        parts = [size, f"E={edges}"]
        if len(self.graph_ptr) != 2:
            parts.append(f"G={len(self.graph_ptr) - 1}")
        if self.num_rows:
            mean, degree = edges / self.num_rows, self.row_ptr.diff()
            parts.append(f"degree mean {mean:.1f} max {int(degree.max())}")
            parts.append(f"{int((degree == 0).sum())} isolated rows")
        if self.order is not None:
            parts.append("reordered")
        index = str(self.col.dtype).removeprefix("torch.")
        parts += [index, f"{self._bytes() / 1e6:.1f} MB", str(self.device)]
        if self.settled is not None:
            others = "; gather with edge vectors, gates, attributes or dropout"
            parts.append(f"plan {self.settled}{others if self.settled.height else ''}")
        else:
            for (width, dtype), plan in self.prepared.plans.items():
                parts.append(f"plan for width {width} {dtype}: {plan}".replace("torch.", ""))
        return f"Graph({', '.join(parts)})"

    @property
    def _structure(self) -> Structure:
        ends = self.graph_ptr, self.col_graph_ptr
        return Structure(self.num_rows, self.num_cols, self.row_ptr, self.col, self.edge, *ends)

    def _elsewhere(self) -> Self:
        """The graph on another device: plans are made for one, unless they are named."""
        self.prepared.plans.clear()
        named = self.settled is not None and self.settled.reason == "named"
        return self if named else self._replace(settled=None)

"""Which way the kernels go through a graph: by edges, by windows of rows, or graph by graph.

Windows pay where rows share columns. The table ``data/plans.json`` says from which density on, for
each width of heads, dtype and device.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path as FilePath
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastgt.graph_build import Structure, size_of
from fastgt.tiles import HEIGHTS, MAX_WIDTH, sampled_density

Path = Literal["gather", "windows", "graphs"]

LAUNCH_BOUND = 2**16  # edges up to which no path is faster than another
DENSE_NODES = 128  # largest graph of a batch that is one dense tile


class Plan(NamedTuple):
    """How kernels go through a graph, and why. ``height`` is that of windows, 0 for gather."""

    path: str
    height: int
    reason: str

    def __str__(self) -> str:
        of = f" of {self.height} rows" if self.height else ""
        return f"{self.path}{of} ({self.reason})"


SMALL = Plan("gather", 0, f"auto: at most {LAUNCH_BOUND} edges")
MORE_THAN_BIAS = Plan("gather", 0, "edge vectors, gates, attributes and dropout are gathered")
UNPREPARED = Plan("gather", 0, "auto: nothing was prepared before compiling")


def best_plan(graph: Structure, width: int, dtype: torch.dtype) -> Plan:
    """The plan for heads of that width and dtype on the device of the graph.

    Windows are taken from the rho on that the table ``data/plans.json`` has for the op, width,
    dtype and device. A table row that no device has measured follows a model of the tensor cores'
    rate against the bandwidth, and says so.
    """
    least, source = _least_rho(width, dtype, capability(graph.col.device))
    height = tallest(width, dtype.itemsize)
    if least is None or not height:
        return Plan("gather", 0, f"auto: {source}")
    plan = None
    ends = graph.graph_ptr, graph.col_graph_ptr
    largest = torch.stack([x.diff().max() for x in ends]).tolist()
    if len(graph.graph_ptr) > 2 and max(largest) <= DENSE_NODES:
        rho = graph.num_edges / max(1, _dense_entries(*ends, height))
        if rho >= least:
            plan = Plan("graphs", height, f"auto: {rho:.1f} edges a column >= {least}, {source}")
    if plan is None:
        rho = sampled_density(graph.row_ptr, graph.col, graph.num_cols)
        if rho < least:
            return Plan("gather", 0, f"auto: rho64 {rho:.2f} < {least}, {source}")
        plan = Plan("windows", height, f"auto: rho64 {rho:.2f} >= {least}, {source}")
    try:
        check_fits(plan.path, height, graph.num_edges, *ends, graph.col.dtype)
    except RuntimeError as error:
        return Plan("gather", 0, f"auto: {error}")
    return plan


def checked_request(
    path: str, height: int | None, width: int | None, dtype: torch.dtype
) -> tuple[int | None, int | None]:
    """-> height and width of what :meth:`fastgt.Graph.plan` is asked for, as Python ints."""
    if path not in ("auto", *get_args(Path)):
        raise ValueError(f"path must be 'auto' or one of {list(get_args(Path))}, got {path!r}")
    height = None if height is None else size_of(height, "height")
    width = None if width is None else size_of(width, "width")
    if height is not None and height not in HEIGHTS:
        raise ValueError(f"height must be one of {list(HEIGHTS)}, got {height!r}")
    if height is not None and path not in ("windows", "graphs"):
        raise ValueError(f"height is for windows and graphs, got path={path!r}")
    if width is not None and not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"width must be from 1 to {MAX_WIDTH}, got {width}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    return height, width


def tallest(width: int, itemsize: int) -> int:
    """Rows of the largest window that fits on a processor with such heads; 0 where none does.

    What fits on every target that is compiled for: registers, shared and tensor memory.
    """
    most = (2**15 if itemsize == 2 else 2**14) // (width * itemsize)
    return 64 if most >= 64 else 32 if most >= 32 else 16 if most >= 16 else 0


def check_fits(
    path: str,
    height: int,
    num_edges: int,
    graph_ptr: Tensor,
    col_graph_ptr: Tensor,
    dtype: torch.dtype,
) -> None:
    """ValueError for graphs beyond 128 nodes, RuntimeError where memory is too small."""
    entries = 2 * num_edges
    if path == "graphs":
        sizes = graph_ptr.diff(), col_graph_ptr.diff()
        largest = max(int(x.max()) if len(x) else 0 for x in sizes)
        if largest > DENSE_NODES:
            raise ValueError(
                f"path 'graphs' takes graphs of up to {DENSE_NODES} nodes, the largest has "
                f"{largest}"
            )
        ends = graph_ptr, col_graph_ptr
        entries = _dense_entries(*ends, height) + _dense_entries(*ends[::-1], height)
    # while they are made: keys, order and places in int64, for rows and then for columns
    needed = entries * (8 + 2 * dtype.itemsize) + num_edges * (2 * dtype.itemsize + 80)
    free = free_memory(graph_ptr.device)
    if needed > free:
        raise RuntimeError(
            f"path {path!r} needs about {needed / 1e9:.1f} GB for its tables, {free / 1e9:.1f} GB "
            "are free"
        )


def _dense_entries(graph_ptr: Tensor, col_graph_ptr: Tensor, height: int) -> int:
    """Entries of all windows of whole graphs."""
    tall = (graph_ptr.diff().long() + (height - 1)).div(height, rounding_mode="floor")
    return int((tall * col_graph_ptr.diff()).sum())


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    with suppress(OSError):
        for line in FilePath("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _least_rho(width: int, dtype: torch.dtype, capability: str) -> tuple[float | None, str]:
    """-> from which rho64 on windows pay (None: never), and who says so."""
    name = str(dtype).removeprefix("torch.")
    rows = [row for row in _table() if row["op"] == "attention" and row["dtype"] == name]
    measured = [row for row in rows if row["capability"] == capability]
    rows = sorted(measured or [row for row in rows if row["capability"] == "any"], key=_width)
    rows = [row for row in rows if row["width"] <= width]
    if not rows:
        return None, f"no tensor-core path for width {width} {name}"
    row = rows[-1]
    return row["rho64"], row["source"]


def _width(row: dict) -> int:
    return row["width"]


@cache
def _table() -> list[dict]:
    return json.loads((files("fastgt.data") / "plans.json").read_text())


def capability(device: torch.device) -> str:
    """The architecture that rows of the plan table name."""
    if device.type != "cuda":
        return "none"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))

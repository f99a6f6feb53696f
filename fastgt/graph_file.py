"""A Graph in a file of its own, which is mapped into memory and checked when it is loaded."""

from __future__ import annotations

import errno
import os
import zlib
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fastgt import files
from fastgt.cpu import graph_file as cpu
from fastgt.graph_build import (
    Structure,
    check_boundaries,
    check_index,
    check_ptr,
    check_range,
    size_of,
    with_boundaries,
)
from fastgt.graph_hetero import Types, types_from_lists, types_to_lists
from fastgt.graph_order import permutation
from fastgt.graph_plan import Planned
from fastgt.prepared import ColumnWalk, Prepared

FORMAT, VERSION = "fastgt.Graph", 1


class Saved(Planned):
    """A graph that can be written to a file."""

    types: Types | None

    def save(self, path: str | os.PathLike[str], *, columns: bool = False) -> None:
        """Write the graph to a file, which is replaced whole or not at all.

        The file has the edges, the boundaries of a batch, the order of a :meth:`reordered` graph
        and the types of a graph :meth:`from_hetero`. Plans are made anew. Whoever loads the file
        in many processes saves ``columns`` too, the column walk that gradients need: else each
        process sorts its own.

        Raises:
            RuntimeError: The graph is on the meta device.
            OSError: The file cannot be written.

        Example:
            >>> import tempfile, torch
            >>> from pathlib import Path
            >>> from fastgt import Graph
            >>> graph = Graph.complete(torch.tensor([0, 2]))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     graph.save(Path(folder, "graph.fastgt"))
            ...     Graph.load(Path(folder, "graph.fastgt"), mmap=False).col.tolist()
            [0, 1, 0, 1]
        """
        if self.device.type == "meta":
            raise RuntimeError("a graph on the meta device has no values to save")
        names = ["row_ptr", "col", "edge", "graph_ptr"]
        if self.graph_ptr is not self.col_graph_ptr:
            names.append("col_graph_ptr")
        tensors = {name: getattr(self, name) for name in names}
        if self.order is not None:
            tensors["order"] = self.order
        if columns:
            tensors |= {f"columns.{name}": x for name, x in self.columns._asdict().items()}
        tensors = {name: _alone(x) for name, x in tensors.items()}
        content = {
            "format": FORMAT,
            "version": VERSION,
            "num_rows": self.num_rows,
            "num_cols": self.num_cols,
            "types": None if self.types is None else types_to_lists(self.types),
            "tensors": tensors,
            "crc32": {name: zlib.crc32(x.numpy()) for name, x in tensors.items()},
        }
        with files.replacing(Path(path)) as file:
            torch.save(content, file)

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap: bool = True, *, check: bool = True) -> Self:
        """The graph that :meth:`save` wrote, on the CPU.

        With ``mmap`` its tensors stay in the file, and processes that load it share the memory.
        All of it is read once, for it is checked: sums of the bytes, and that all indices are in
        range, whatever wrote them. ``check=False`` looks at types and sizes alone, and reads
        nothing that is not asked for: where another process has checked the file.

        Raises:
            ValueError: The file is not of :meth:`save`, is damaged, or is of a newer version.
            OSError: The file cannot be read.
        """
        try:
            content = torch.load(path, mmap=mmap, weights_only=True, map_location="cpu")
        except Exception as error:  # a damaged pickle may raise any
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            # nor can what is cut short be mapped
            raise ValueError(f"{os.fspath(path)} cannot be read as a graph: {error}") from error
        try:
            return cls(**_checked(content, check))
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{os.fspath(path)} holds no graph: {error}") from error


def _alone(x: Tensor) -> Tensor:
    """On the CPU, without what else its storage holds."""
    x = x.detach().cpu().contiguous()
    return x if x.untyped_storage().nbytes() == x.numel() * x.itemsize else x.clone()


def _checked(content: Any, values: bool) -> dict[str, Any]:
    """The fields of a graph. Their values are looked at on request."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError("it was not written by Graph.save")
    if content["version"] != VERSION:
        raise ValueError(f"its version is {content['version']}, this fastgt reads {VERSION}")
    tensors, sums = dict(content["tensors"]), content["crc32"]
    for name, x in tensors.items():
        check_index(x, name)
        found = zlib.crc32(x.contiguous().numpy()) if values else sums[name]
        if found != sums[name]:
            raise ValueError(f"{name} is damaged: its CRC is {found:#x} instead of {sums[name]:#x}")
    parts = [tensors.pop(f"columns.{name}", None) for name in ColumnWalk._fields]
    order = tensors.pop("order", None)
    tensors.setdefault("col_graph_ptr", tensors["graph_ptr"])
    rows, cols = (size_of(content[name], name) for name in ("num_rows", "num_cols"))
    graph = Structure(num_rows=rows, num_cols=cols, **tensors)
    columns = None if parts[0] is None else ColumnWalk(*parts)
    types = None if content["types"] is None else types_from_lists(content["types"])
    _check_shapes(graph, columns, order)
    if types is not None:
        _check_types(types, graph)
    if values:
        walk = graph.row_ptr, graph.col, graph.edge
        if not cpu.is_sound(rows, cols, walk, columns or ()):
            _check_walks(graph, columns)  # says what is wrong
        _check_batch(graph)
        if order is not None:
            permutation(order, graph)
    prepared = Prepared(columns=columns)
    return {**graph._asdict(), "prepared": prepared, "order": order, "types": types}


def _check_shapes(graph: Structure, columns: ColumnWalk | None, order: Tensor | None) -> None:
    dtype, edges = graph.col.dtype, graph.num_edges
    if dtype not in (torch.int32, torch.int64):
        raise ValueError(f"col is {dtype}, neither torch.int32 nor torch.int64")
    graphs = len(graph.graph_ptr)
    expected = [
        ("row_ptr", graph.row_ptr, graph.num_rows + 1, dtype),
        ("col", graph.col, edges, dtype),
        ("edge", graph.edge, edges, dtype),
        ("graph_ptr", graph.graph_ptr, graphs, dtype),
        ("col_graph_ptr", graph.col_graph_ptr, graphs, dtype),
    ]
    if columns is not None:
        sizes = graph.num_cols + 1, edges, edges, edges
        names = [f"columns.{name}" for name in columns._fields]
        expected += zip(names, columns, sizes, [dtype] * 4, strict=True)
    if order is not None:
        expected.append(("order", order, graph.num_rows, torch.int64))
    for name, x, size, kind in expected:
        if x.shape != (size,) or x.dtype != kind:
            raise ValueError(f"{name} must be [{size}] of {kind}, got {list(x.shape)} of {x.dtype}")


def _check_walks(graph: Structure, columns: ColumnWalk | None) -> None:
    check_boundaries(graph.row_ptr, "row_ptr", graph.num_edges, "edges")
    check_range(graph.col, graph.num_cols, "col", "columns")
    _check_permutation(graph.edge, "edge")
    if columns is not None:
        _check_columns(columns, graph)


def _check_batch(graph: Structure) -> None:
    for name, size in (("graph_ptr", graph.num_rows), ("col_graph_ptr", graph.num_cols)):
        check_ptr(getattr(graph, name), name, "G + 1")
        check_boundaries(getattr(graph, name), name, size, "nodes")
    if len(graph.graph_ptr) > 2:
        with_boundaries(graph, graph.graph_ptr, graph.col_graph_ptr)


def _check_columns(walk: ColumnWalk, graph: Structure) -> None:
    """The column walk has the same edges."""
    check_boundaries(walk.ptr, "columns.ptr", graph.num_edges, "edges")
    _check_permutation(walk.slot, "columns.slot")
    slot = walk.slot.long()
    col = torch.arange(graph.num_cols, dtype=graph.col.dtype).repeat_interleave(
        walk.ptr.diff(), output_size=graph.num_edges
    )
    for name, x, y in (
        ("columns.ptr", col, graph.col[slot]),
        ("columns.row", walk.row, graph.row[slot]),
        ("columns.edge", walk.edge, graph.edge[slot]),
    ):
        if not torch.equal(x, y):
            raise ValueError(f"{name} is not of the same edges as the rows")


def _check_types(types: Types, graph: Structure) -> None:
    sizes = {"rows": graph.num_rows, "columns": graph.num_cols, "edges": graph.num_edges}
    for name, size in sizes.items():
        part, end = getattr(types, name), 0
        for x in part.values():
            if x.start != end or x.stop < end:
                raise ValueError(f"types.{name} has {x} after {end}")
            end = x.stop
        if end != size:
            raise ValueError(f"types.{name} ends at {end}, the graph has {size}")


def _check_permutation(x: Tensor, name: str) -> None:
    check_range(x, len(x), name, "edges")
    there = torch.zeros(len(x), dtype=torch.bool)
    there[x.long()] = True
    if not bool(there.all()):
        raise ValueError(f"{name} has not every number below {len(x)}")

"""Graphs of edge lists that do not fit into memory: sorted on disk, then mapped."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgt import files
from fastgt.graph import Graph
from fastgt.graph_build import group, index_dtype, single, size_of

CHUNK = 1 << 22  # edges in memory at once


def edge_list_graph(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    num_nodes: int | None = None,
    *,
    pairs: Literal["int32", "int64"] | None = None,
) -> Graph:
    """The graph of an edge list in a file, whose edges stay on disk.

    It takes memory for the nodes and for some millions of edges, however many there are. What the
    list has sorted by target is copied. Else edges are counted, dealt out to files of a range of
    targets each, and sorted range by range: two readings and two writings. Equal targets keep
    their order, and edges their numbers.

    Args:
        path: A ``.npy`` of integers ``[2, E]``, sources above targets; or, with ``pairs``, nothing
            but pairs of a source and a target.
        folder: Gets ``col.npy`` and ``edge.npy``, which must stay while the graph is used. Files
            to sort in are removed. Is made if need be.
        num_nodes: Default: the largest index plus one.
        pairs: The type of a file of pairs.

    Raises:
        ValueError: The file holds no such edges, or an index out of range.
        RuntimeError: Another process writes to the folder.
        OSError: A file cannot be read or written.

    Example:
        >>> import tempfile, numpy
        >>> from pathlib import Path
        >>> from fastgt.distributed import edge_list_graph, partition
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     numpy.save(Path(folder, "list.npy"), numpy.array([[1, 0, 2, 3], [0, 1, 3, 2]]))
        ...     graph = edge_list_graph(Path(folder, "list.npy"), folder)
        ...     partition(graph, 2, "ldg").tolist(), graph.col.tolist()
        ([0, 0, 1, 1], [1, 0, 3, 2])
    """
    edges = _opened(Path(path), pairs)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    row_ptr, is_sorted = _counted(edges, num_nodes)
    nodes = len(row_ptr) - 1
    dtype = index_dtype(nodes, nodes, edges.total)
    paths = [place / f"{name}.npy" for name in ("col", "edge")]
    with files.lock(place), ExitStack() as stack:
        col, edge = (stack.enter_context(files.replacing(x)) for x in paths)
        for file in (col, edge):
            _write_header(file, edges.total, dtype)
        if is_sorted:
            _copy(edges, col, edge, dtype)
        else:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=place))
            _sort(edges, row_ptr, Path(scratch), col, edge, dtype)
    mapped = (_mapped(x) for x in paths)
    return Graph(*single(nodes, nodes, row_ptr.to(dtype), *mapped))


class _Edges(NamedTuple):
    """A file of edges."""

    path: Path
    dtype: np.dtype
    offset: int
    total: int
    interleaved: bool  # source, target, source, target, ... instead of all sources first

    def block(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Sources and targets of some edges, int64."""
        size, n = self.dtype.itemsize, last - first
        if self.interleaved:
            both = self._read(2 * first * size, 2 * n).reshape(n, 2)
            ends = both[:, 0], both[:, 1]
        else:
            ends = self._read(first * size, n), self._read((self.total + first) * size, n)
        source, target = (torch.from_numpy(x.astype(np.int64)) for x in ends)
        return source, target

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for first in range(0, self.total, CHUNK):
            yield first, *self.block(first, min(first + CHUNK, self.total))

    def _read(self, place: int, count: int) -> np.ndarray:
        found = np.fromfile(self.path, self.dtype, count, offset=self.offset + place)
        if len(found) != count:
            raise ValueError(f"{self.path} ends {count - len(found)} numbers too early")
        return found


def _opened(path: Path, pairs: str | None) -> _Edges:
    if pairs is not None:
        if pairs not in ("int32", "int64"):
            raise ValueError(f"pairs must be 'int32' or 'int64', got {pairs!r}")
        dtype, size = np.dtype(pairs), path.stat().st_size
        if size % (2 * dtype.itemsize):
            raise ValueError(
                f"{path} has {size} bytes, which are not whole pairs of {2 * dtype.itemsize}"
            )
        return _Edges(path, dtype, 0, size // (2 * dtype.itemsize), True)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a .npy array: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.shape[0] != 2:
        found = list(array.shape) if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{path} must hold an array [2, E], got {found}")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{path} must hold integers, got {array.dtype}")
    offset = path.stat().st_size - array.nbytes
    interleaved = not array.flags.c_contiguous
    return _Edges(path, array.dtype, offset, array.shape[1], interleaved)


def _counted(edges: _Edges, num_nodes: int | None) -> tuple[Tensor, bool]:
    """-> where the edges of each target begin, ``[N + 1]``, and whether they stand in order."""
    nodes = 0 if num_nodes is None else size_of(num_nodes, "num_nodes")
    degree = torch.zeros(nodes, dtype=torch.int64)
    is_sorted, before = True, -1
    for first, source, target in edges.blocks():
        for name, x in (("source", source), ("target", target)):
            low, high = (int(end) for end in x.aminmax())
            if low < 0 or (num_nodes is not None and high >= nodes):
                wrong = low if low < 0 else high
                at = first + int((x == wrong).nonzero()[0])
                raise ValueError(
                    f"{edges.path}: the {name} of edge {at} is {wrong}, which is none of the nodes"
                    + ("" if num_nodes is None else f", of which there are {nodes}")
                )
            if high >= len(degree):
                degree = torch.cat([degree, degree.new_zeros(high + 1 - len(degree))])
        degree[low : high + 1] += (target - low).bincount()
        is_sorted = is_sorted and before <= low and bool((target[1:] >= target[:-1]).all())
        before = high
    return torch.cat([degree.new_zeros(1), degree.cumsum(0)]), is_sorted


def _copy(edges: _Edges, col: BinaryIO, edge: BinaryIO, dtype: torch.dtype) -> None:
    for first, source, _ in edges.blocks():
        _append(col, source.to(dtype))
        _append(edge, torch.arange(first, first + len(source), dtype=dtype))


def _sort(
    edges: _Edges,
    row_ptr: Tensor,
    scratch: Path,
    col: BinaryIO,
    edge: BinaryIO,
    dtype: torch.dtype,
) -> None:
    """Deals edges out to ranges of targets, then sorts these one after another."""
    bounds = _ranges(row_ptr)
    starts = row_ptr[bounds].tolist()
    cursor = starts[:-1]
    with ExitStack() as stack:
        kept = [
            stack.enter_context((scratch / name).open("w+b"))
            for name in ("source", "target", "number")
        ]
        for first, source, target in edges.blocks():
            which = torch.searchsorted(bounds, target, right=True) - 1
            source, order, ends, _ = group(which, source, len(bounds) - 1, torch.int64)
            columns = source, target.index_select(0, order), order + first
            for b in (ends.diff() > 0).nonzero().flatten().tolist():
                piece = slice(int(ends[b]), int(ends[b + 1]))
                for file, x in zip(kept, columns, strict=True):
                    file.seek(cursor[b] * 8)
                    _append(file, x[piece])
                cursor[b] += piece.stop - piece.start
        for b, (low, high) in enumerate(
            zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ):
            for first in range(starts[b], starts[b + 1], CHUNK):
                count = min(CHUNK, starts[b + 1] - first)
                source, target, number = (_taken(file, first, count) for file in kept)
                if high - low > 1:  # else all are of one target, and may be more than a chunk
                    source, order, _, _ = group(target - low, source, high - low, torch.int64)
                    number = number.index_select(0, order)
                _append(col, source.to(dtype))
                _append(edge, number.to(dtype))


def _ranges(row_ptr: Tensor) -> Tensor:
    """Boundaries of ranges of targets: of one, or of no more edges than a chunk has."""
    bounds = [0]
    while bounds[-1] < len(row_ptr) - 1:
        most = int(row_ptr[bounds[-1]]) + CHUNK
        last = int(torch.searchsorted(row_ptr, most, right=True)) - 1
        bounds.append(max(last, bounds[-1] + 1))
    return torch.tensor(bounds)


def _write_header(file: BinaryIO, count: int, dtype: torch.dtype) -> None:
    kind = np.dtype(str(dtype).removeprefix("torch."))
    said = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, said)


def _append(file: BinaryIO, x: Tensor) -> None:
    file.write(x.contiguous().numpy().data)


def _taken(file: BinaryIO, first: int, count: int) -> Tensor:
    file.seek(first * 8)
    return torch.frombuffer(bytearray(file.read(count * 8)), dtype=torch.int64)


def _mapped(path: Path) -> Tensor:
    # copy on write: what is written to the tensor stays in this process
    return torch.from_numpy(np.asarray(np.load(path, mmap_mode="c")))

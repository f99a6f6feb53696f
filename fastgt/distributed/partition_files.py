"""The shares of all ranks in a folder, from which each rank maps its own into memory.

``meta.json`` is written last and says what the folder holds. ``part-3/part.json`` says which files
rank 3 has, how large they are, and the SHA-256 of each. ``part-3/halo.npy`` and others are the
fields of its :class:`fastgt.distributed.part.Part`. ``part-3/tensors/x.npy`` are the rows of the
caller's tensors that belong to it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgt import files
from fastgt.distributed.part import Part, Whole, arranged, whole_of
from fastgt.distributed.partition import check_part
from fastgt.distributed.report import rows_by_rank, slots_of
from fastgt.graph import Graph
from fastgt.graph_build import check_device, size_of

FORMAT, VERSION = "fastgt.Partition", 1
FIELDS = "rows", "cols", "halo", "halo_ptr", "row", "col", "edge"
_ENDS = "graph_ptr", "col_graph_ptr"
_BITS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
}  # what stands for dtypes that NumPy has not


class Meta(NamedTuple):
    """What a folder of parts holds.

    Attributes:
        partition: The SHA-256 of the graph and of the rank of each node. Tensors do not change it.
        parts: How many ranks it is for.
        rows, cols, edges: Of the whole graph.
        square: Whether columns are the same nodes as rows.
        tensors: The names of the tensors that were written with it.
        sums: The SHA-256 of each ``part.json``, and of the boundaries of a batch.
    """

    partition: str
    parts: int
    rows: int
    cols: int
    edges: int
    square: bool
    tensors: list[str]
    sums: dict[str, str]


def write_partitions(
    folder: str | os.PathLike[str],
    graph: Graph,
    part: Tensor | tuple[Tensor, Tensor],
    /,
    *,
    parts: int | None = None,
    **tensors: Tensor,
) -> None:
    """Writes the share of each rank: its rows, their edges, its halo, and its tensors.

    A tensor with "edge" in its name has a row for each edge, in the caller's order of edges. The
    others have one for each node: in a bipartite graph, for each column if the name ends in
    ``_col``, else for each row. A rank's tensors are in the order of its part's ``edge``, ``rows``
    and ``cols``. Node tensors are in the order of the graph as it stands, also if it was
    ``reordered``.

    Takes the memory of one part at a time beside the graph and the tensors, which may lie in files.
    A partition that the folder holds already is replaced. A folder that is not written to the end
    holds none.

    Args:
        folder: Is made if need be.
        graph: The graph.
        part: As :func:`fastgt.distributed.partition` gives it, or your own.
        parts: How many ranks. Default: the largest of ``part``, plus one.
        tensors: By name.

    Raises:
        TypeError: ``part`` or a tensor is of another type.
        ValueError: A length does not fit, or a name cannot be that of a file.
        RuntimeError: Another process writes there.
        OSError: The folder cannot be written to.

    Example:
        >>> import tempfile, torch
        >>> from fastgt import Graph
        >>> from fastgt.distributed import read_part, read_tensors, write_partitions
        >>> graph = Graph.from_edge_index(torch.tensor([[1, 2, 3, 0], [0, 1, 2, 3]]))
        >>> x = torch.arange(4.0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_partitions(folder, graph, torch.tensor([0, 1, 0, 1]), x=x)
        ...     read_part(folder, 1).halo.tolist(), read_tensors(folder, 1)["x"].tolist()
        ([0, 2], [1.0, 3.0])
    """
    row_part, col_part, count = check_part(graph, part, parts)
    whole = whole_of(graph, col_part is row_part)
    for name, x in tensors.items():
        _check_tensor(name, x, whole, graph.device)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with files.lock(place):
        if (place / "meta.json").exists():
            read_meta(place, check=False)  # another program's file stays
            (place / "meta.json").unlink()
        ends = _ENDS[: 1 if whole.square else 2]
        sums = {f"{name}.npy": _write(place / f"{name}.npy", getattr(whole, name)) for name in ends}
        found = hash_of(graph, row_part, col_part, count)
        for rank, rows in enumerate(rows_by_rank(row_part, count)):
            one = _part_of(graph, whole, row_part, col_part, rank, count, rows)
            sums[f"part-{rank}/part.json"] = _write_part(place, found, one, tensors)
        meta = Meta(found, count, *whole[:4], list(tensors), sums)
        said = {"format": FORMAT, "version": VERSION, **meta._asdict()}
        files.write(place / "meta.json", _signed(said))


def read_meta(folder: str | os.PathLike[str], *, check: bool = True) -> Meta:
    """What the folder holds.

    Raises:
        ValueError: It holds no partition, one that is half written or damaged, or one of a newer
            version.
        OSError: It cannot be read.
    """
    path = Path(folder, "meta.json")
    if not path.exists():
        raise ValueError(
            f"{os.fspath(folder)} holds no partition, or one that was not written to the end: "
            "it has no meta.json"
        )
    said = _json(path, check)
    if said.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by write_partitions")
    if said.get("version") != VERSION:
        raise ValueError(
            f"{path}: its version is {said.get('version')}, this fastgt reads {VERSION}"
        )
    fields: dict[str, Any] = {name: said.get(name) for name in Meta._fields}
    return Meta(**fields)


def read_part(folder: str | os.PathLike[str], rank: int) -> Part:
    """The share of one rank, as :func:`write_partitions` wrote it; its tensors stay in the files.

    Sizes and hashes of its files are checked, and that they are of one partition.

    Raises:
        ValueError: The folder holds no such rank, is half written or damaged, or has parts of
            several partitions; names the file.
        OSError: A file cannot be read.
    """
    place, meta = Path(folder), read_meta(folder)
    said = _read_said(place, meta, rank)
    ends = [
        _read(place, f"{x}.npy", {"sha256": meta.sums[f"{x}.npy"]})
        for x in _ENDS[: 1 if meta.square else 2]
    ]
    whole = Whole(meta.rows, meta.cols, meta.edges, meta.square, ends[0], ends[-1])
    names = [name for name in FIELDS if name != "cols" or not meta.square]
    at = Path(f"part-{rank}")
    found = {name: _read(place, at / f"{name}.npy", said["files"][f"{name}.npy"]) for name in names}
    found.setdefault("cols", found["rows"])
    fields = {name: found[name] for name in FIELDS}
    return Part(rank=rank, parts=meta.parts, whole=whole, **fields, interior=said["interior"])


def read_tensors(
    folder: str | os.PathLike[str], rank: int, names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """The tensors of one rank by name, all or some; they stay in their files.

    Sizes and hashes of these files are checked, and that they are of the folder's partition.

    Raises:
        ValueError: There is no such tensor, or as :func:`read_part`.
        OSError: A file cannot be read.
    """
    place, meta = Path(folder), read_meta(folder)
    if isinstance(names, str):
        raise TypeError(f"names must be several names, got the str {names!r}")
    chosen = meta.tensors if names is None else list(names)
    for name in chosen:
        if name not in meta.tensors:
            raise ValueError(f"{os.fspath(folder)} has no tensor {name!r}; it has {meta.tensors}")
    said = _read_said(place, meta, rank)
    at = Path(f"part-{rank}")
    stored = {name: f"tensors/{name}.npy" for name in chosen}
    return {name: _read(place, at / x, said["files"][x]) for name, x in stored.items()}


def _check_tensor(name: str, x: Any, whole: Whole, device: torch.device) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {x.layout}")
    if not name.isidentifier():
        raise ValueError(f"{name!r} must be a name of letters, digits and _: a file has it")
    size, of = _owners_of(name, whole)
    if x.ndim == 0 or len(x) != size:
        raise ValueError(
            f"{name} must be [{size}, ...], a row for each of the {of}, got {list(x.shape)}"
        )
    check_device(x, name, device, "the graph")


def _owners_of(name: str, whole: Whole) -> tuple[int, str]:
    if "edge" in name:
        return whole.edges, "edges"
    if name.endswith("_col") and not whole.square:
        return whole.cols, "columns"
    return whole.rows, "nodes" if whole.square else "rows"


def _part_of(
    graph: Graph,
    whole: Whole,
    row_part: Tensor,
    col_part: Tensor,
    rank: int,
    parts: int,
    rows: Tensor,
) -> Part:
    """As :func:`fastgt.distributed.part.cut`, in the time of one part."""
    cols = rows if whole.square else (col_part == rank).nonzero().flatten()
    slots = slots_of(graph.row_ptr, rows)
    degree = graph.row_ptr.index_select(0, rows + 1) - graph.row_ptr.index_select(0, rows)
    row = torch.arange(len(rows), device=rows.device)
    row = row.repeat_interleave(degree.long(), output_size=len(slots))
    reads, edge = (x.index_select(0, slots).long() for x in (graph.col, graph.edge))
    return arranged(whole, rank, parts, rows, cols, col_part, row, reads, edge)


def _write_part(place: Path, partition: str, part: Part, tensors: dict[str, Tensor]) -> str:
    """-> the SHA-256 of what says which files there are."""
    folder = place / f"part-{part.rank}"
    (folder / "tensors").mkdir(parents=True, exist_ok=True)
    content: dict[str, dict[str, Any]] = {}

    def add(name: str, x: Tensor) -> None:
        digest = _write(folder / name, x)
        kind = str(x.dtype).removeprefix("torch.")
        size = (folder / name).stat().st_size
        content[name] = {"bytes": size, "sha256": digest, "dtype": kind, "shape": list(x.shape)}

    for name in FIELDS:
        if name != "cols" or not part.whole.square:
            add(f"{name}.npy", getattr(part, name))
    for name, x in tensors.items():
        of = _owners_of(name, part.whole)[1]
        places = {"edges": part.edge, "columns": part.cols}.get(of, part.rows)
        add(f"tensors/{name}.npy", x.detach().index_select(0, places))
    said = {
        "partition": partition,
        "rank": part.rank,
        "interior": part.interior,
        "files": content,
    }
    text = _signed(said)
    files.write(folder / "part.json", text)
    return hashlib.sha256(text).hexdigest()


def _write(path: Path, x: Tensor) -> str:
    """-> the SHA-256 of the file."""
    x = x.detach().cpu().contiguous()
    try:
        array = x.numpy()
    except TypeError:
        array = x.view(_BITS[x.itemsize]).numpy()
    with files.replacing(path) as file:
        np.save(file, array, allow_pickle=False)
    return _sha256(path)


def _read(place: Path, name: str | Path, said: dict[str, Any]) -> Tensor:
    path = place / name
    if not path.is_file():
        raise ValueError(f"{path} is absent: the partition is not whole")
    size = path.stat().st_size
    if size != said.get("bytes", size):
        raise ValueError(
            f"{path} has {size} bytes instead of {said['bytes']}: it was cut short, or "
            "is of another partition"
        )
    found = _sha256(path)
    if found != said["sha256"]:
        raise ValueError(
            f"{path} is damaged or of another partition: its SHA-256 is {found} instead of "
            f"{said['sha256']}"
        )
    # copy on write: what is written to the tensor stays in this process
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    x = torch.from_numpy(np.asarray(array))
    return x.view(getattr(torch, said["dtype"])) if "dtype" in said else x


def _read_said(place: Path, meta: Meta, rank: int) -> dict[str, Any]:
    """What ``part.json`` says, which is of the folder's partition."""
    rank = size_of(rank, "rank")
    if rank >= meta.parts:
        raise ValueError(f"rank {rank} is none of the {meta.parts} parts in {place}")
    path = place / f"part-{rank}" / "part.json"
    if not path.is_file():
        raise ValueError(f"{path} is absent: the partition is not whole")
    said = _json(path, True)
    if said.get("partition") != meta.partition:
        raise ValueError(
            f"{path.parent} is of partition {said.get('partition')}, but {place} holds partition "
            f"{meta.partition}: parts of two partitions are mixed"
        )
    if _sha256(path) != meta.sums[f"part-{rank}/part.json"]:
        raise ValueError(f"{path} is of another writing of this partition, with other tensors")
    return said


def hash_of(graph: Graph, row_part: Tensor, col_part: Tensor, parts: int) -> str:
    """The SHA-256 of a graph and of the rank of each of its nodes."""
    found = hashlib.sha256(f"{graph.num_rows} {graph.num_cols} {parts}".encode())
    arrays = [graph.row_ptr, graph.col, graph.edge, graph.graph_ptr, row_part]
    if col_part is not row_part:
        arrays += [graph.col_graph_ptr, col_part]
    for x in arrays:
        found.update(x.cpu().contiguous().numpy().data)
    return found.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _signed(said: dict[str, Any]) -> bytes:
    """JSON with a sum of itself."""
    text = json.dumps(said, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**said, "sha256": digest}, sort_keys=True, separators=(",", ":")).encode()


def _json(path: Path, check: bool) -> dict[str, Any]:
    try:
        said = json.loads(path.read_bytes())
        if not isinstance(said, dict):
            raise ValueError(f"it holds a {type(said).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    digest = said.pop("sha256", None)
    text = json.dumps(said, sort_keys=True)
    if check and digest != hashlib.sha256(text.encode()).hexdigest():
        raise ValueError(f"{path} is damaged, or was not written by write_partitions")
    return said

"""Arrays on disk that are written block by block, and read through memory maps.

    header   4,096 bytes: what the array is, in JSON, with the sum of that
    sums     32 bytes a block: zeros, or the sum of the header, the block's number and its bytes
    rows     of all blocks, each at its place

A block counts as written when its sum is there, which is written after its rows. So whatever ends
the writing leaves the blocks before it valid, and several processes may write different ones.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastgt import files
from fastgt.graph import Graph

_MAGIC = b"fastgt.blocks 1\n"
_HEADER = 4096  # bytes
_SUM = 32  # bytes
_BLOCK = 2**23  # bytes of a block, at most; one row at least


class BlockFile:
    """An array ``[N, ...]`` in a file.

    Args:
        path: Of the file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or another file.

    Attributes:
        about: What the array was made of, as :meth:`prepared` was told.
        shape, dtype: Of the array.
        rows: Of a block; the last one may have fewer.
        blocks: How many there are.

    Example:
        >>> import tempfile, pathlib
        >>> import numpy as np
        >>> from fastgt.datasets.block_file import BlockFile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name) / "squares"
        >>> file = BlockFile.prepared(path, {"power": 2}, (5,), np.int64)
        >>> file.missing()
        [0]
        >>> file.write(0, np.arange(5) ** 2)
        >>> file.missing(), BlockFile(path).array[3]
        ([], np.int64(9))
        >>> folder.cleanup()
    """

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            header = file.read(_HEADER)
        told = _told(header)
        if told is None:
            raise self._damaged("its header is no header of fastgt's")
        self.about: dict[str, Any] = told["about"]
        self.shape: tuple[int, ...] = tuple(told["shape"])
        self.dtype, self.rows = np.dtype(told["dtype"]), int(told["rows"])
        self.blocks = -(-self.shape[0] // self.rows)
        self._key = hashlib.sha256(header).digest()
        self._start = _HEADER + -(-self.blocks * _SUM // _HEADER) * _HEADER
        self._map: np.memmap | None = None
        size = self._start + self.shape[0] * self._row_bytes
        if path.stat().st_size != size:
            raise self._damaged(f"it has {path.stat().st_size} bytes instead of {size}")

    @classmethod
    def prepared(
        cls, path: Path, about: dict[str, Any], shape: Sequence[int], dtype: Any
    ) -> BlockFile:
        """The file, made if need be, of which some blocks may be written. These are checked.

        Args:
            about: What the array is made of: numbers, strings and None by name.

        Raises:
            ValueError: The file holds an array that was made of something else, or it is damaged.
        """
        dtype, shape = np.dtype(dtype), tuple(int(n) for n in shape)
        row = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        rows = max(1, min(_BLOCK // max(1, row), max(1, shape[0])))
        told = {"about": about, "shape": list(shape), "dtype": dtype.str, "rows": rows}
        if not path.exists():
            header = _header(told)
            blocks = -(-shape[0] // rows)
            start = _HEADER + -(-blocks * _SUM // _HEADER) * _HEADER
            with files.replacing(path) as file:
                file.write(header)
                file.truncate(start + shape[0] * row)  # sparse: what is not written takes no room
        found = cls(path)
        found.check_about(dict.fromkeys(found.about) | about)
        theirs = list(found.shape), found.dtype.str, found.rows
        if theirs != (told["shape"], told["dtype"], told["rows"]):
            raise ValueError(f"{path} holds {theirs}, not {tuple(told.values())[1:]}")
        found.check()
        return found

    @staticmethod
    def complete(path: Path) -> bool:
        """Whether the file is there with all its blocks.

        Raises:
            ValueError: It is damaged.
        """
        return path.exists() and not BlockFile(path).missing()

    def missing(self) -> list[int]:
        """The blocks that are not written."""
        with self.path.open("rb") as file:
            file.seek(_HEADER)
            sums = np.frombuffer(file.read(self.blocks * _SUM), np.uint8).reshape(-1, _SUM)
        return np.flatnonzero(~sums.any(1)).tolist()

    def write(self, block: int, rows: np.ndarray) -> None:
        """The rows of a block."""
        first, last = self.span(block)
        rows = np.ascontiguousarray(rows, self.dtype)
        if rows.shape != (last - first, *self.shape[1:]):
            wanted = [last - first, *self.shape[1:]]
            raise ValueError(f"block {block} must be {wanted}, got {list(rows.shape)}")
        content = rows.tobytes()
        with self.path.open("r+b") as file:
            file.seek(self._start + first * self._row_bytes)
            file.write(content)
            file.flush()
            file.seek(_HEADER + block * _SUM)
            file.write(self._sum(block, content))

    def span(self, block: int) -> tuple[int, int]:
        """The first row of a block, and the first of the next."""
        return block * self.rows, min((block + 1) * self.rows, self.shape[0])

    def check(self) -> None:
        """Read all that is written, block by block.

        Raises:
            ValueError: The rows of a block are not those that were written.
        """
        with self.path.open("rb") as file:
            for block, content, told in self._written(file):
                if self._sum(block, content) != told:
                    first, last = self.span(block)
                    raise self._damaged(f"rows {first} to {last - 1} are not those of its sum")

    def check_about(self, about: dict[str, Any]) -> None:
        """Refuse a file that was made of something else than ``about`` names."""
        for name, wanted in about.items():
            if self.about.get(name) != wanted:
                raise ValueError(
                    f"{self.path} was made with {name}={self.about.get(name)}, not {wanted}: name "
                    "another folder, or delete it"
                )

    def check_complete(self) -> None:
        """Refuse a file of which blocks are missing."""
        if missing := self.missing():
            raise ValueError(
                f"{self.path} lacks {len(missing)} of {self.blocks} blocks: what made it was "
                "interrupted, and goes on when it is called again"
            )

    @property
    def array(self) -> np.memmap:
        """``[N, ...]``, read from the disk where it is used; what is written to it is lost."""
        if self._map is None:
            self._map = np.memmap(
                self.path, self.dtype, mode="c", offset=self._start, shape=self.shape
            )
        return self._map

    def release(self) -> None:
        """Give pages of the file that were read back to the system; they are read anew."""
        found = None if self._map is None else getattr(self._map, "_mmap", None)
        if found is not None and hasattr(mmap, "MADV_DONTNEED"):
            found.madvise(mmap.MADV_DONTNEED)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_map": None}  # another process maps the file itself

    @property
    def _row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))

    def _written(self, file: BinaryIO) -> Iterator[tuple[int, bytes, bytes]]:
        """Number, bytes and sum of each block that is written."""
        file.seek(_HEADER)
        sums = file.read(self.blocks * _SUM)
        for block in range(self.blocks):
            told = sums[block * _SUM : (block + 1) * _SUM]
            if any(told):
                first, last = self.span(block)
                file.seek(self._start + first * self._row_bytes)
                yield block, file.read((last - first) * self._row_bytes), told

    def _sum(self, block: int, content: bytes) -> bytes:
        return hashlib.sha256(self._key + block.to_bytes(8, "little") + content).digest()

    def _damaged(self, how: str) -> ValueError:
        return ValueError(f"{self.path} is damaged ({how}): delete it, and it is made anew")


def graph_digest(graph: Graph) -> str:
    """Sixteen letters that change with who attends to whom."""
    total = hashlib.sha256(f"{graph.num_rows} {graph.num_cols}".encode())
    for x in (graph.row_ptr, graph.col):
        total.update(x.detach().cpu().long().contiguous().numpy().data)
    return total.hexdigest()[:16]


def _header(told: dict[str, Any]) -> bytes:
    content = json.dumps(told, sort_keys=True).encode() + b"\n"
    header = _MAGIC + content + hashlib.sha256(content).hexdigest().encode() + b"\n"
    if len(header) > _HEADER:
        raise ValueError(f"about takes {len(header)} bytes, there are {_HEADER}")
    return header.ljust(_HEADER, b"\0")


def _told(header: bytes) -> dict[str, Any] | None:
    """None where it is damaged."""
    if len(header) != _HEADER or not header.startswith(_MAGIC):
        return None
    content, _, rest = header[len(_MAGIC) :].partition(b"\n")
    if rest[:64] != hashlib.sha256(content + b"\n").hexdigest().encode():
        return None
    return json.loads(content)

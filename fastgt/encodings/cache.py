"""Encodings on disk, found by what they were computed from."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import sys
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastgt import files
from fastgt.graph import Graph
from fastgt.ops.checks import check_graph

VERSION = 1  # another one wherever the file, or what a function of this package gives, changes
_MAGIC = f"fastgt.encoding {VERSION}\n".encode()
_LONGEST_HEADER = 2**16
_ARRAYS = ("row_ptr", "col", "edge", "graph_ptr", "col_graph_ptr")


class Cache:
    """A folder of encodings: what was computed once is read from then on.

        cache(function, graph, ...) = function(graph, ...)

    A file is named by the SHA-256 of the graph's arrays, the function's name and its arguments,
    whichever way they are given, except ``progress``. The dtype of a graph's indices and its device
    make no difference; the order of its edges does. The code of the function is not part of it:
    whoever changes a function of their own deletes its files.

    A file is written whole or not at all, and several processes may do so at once. It holds plain
    arrays and their SHA-256, which is compared whenever it is read: no code is run, and a file that
    was cut short or changed is refused by name.

    Args:
        folder: Is made when the first file is written.

    Example:
        >>> import tempfile, torch
        >>> from fastgt import Graph
        >>> from fastgt.encodings import Cache, random_walk_pe
        >>> path = Graph.from_edge_index(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = Cache(folder)
        ...     first = cache(random_walk_pe, path, 2)  # computed
        ...     torch.equal(cache(random_walk_pe, path, steps=2), first)  # read
        True
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)

    def __call__(
        self, function: Callable[..., Any], graph: Graph, *args: Any, **kwargs: Any
    ) -> Any:
        """What ``function(graph, *args, **kwargs)`` gives: a tensor, or a tuple of tensors.

        A tuple with names comes as a plain one, computed or read: a file holds no names.

        Raises:
            TypeError: The function is none of a module, an argument is neither a number, a string,
                None, a tensor nor a tuple of these, or the result is neither a tensor nor a tuple
                of two tensors or more.
            ValueError: The file is damaged; its path is given.
            OSError: The file cannot be read or written.
        """
        check_graph(graph)
        key = _key(function, graph, args, kwargs)
        path = self.folder / f"{function.__name__}-{key[:32]}.encoding"
        try:
            with path.open("rb") as file:
                found = _read(file, key)
        except FileNotFoundError:
            pass
        except _DamagedError as error:
            raise ValueError(
                f"{path} is damaged ({error}): delete it, and it is computed anew"
            ) from error
        else:
            found = [x.to(graph.device) for x in found]
            return found[0] if len(found) == 1 else tuple(found)
        result = function(graph, *args, **kwargs)
        tensors = tuple(result) if isinstance(result, tuple) else (result,)
        # what is read of one tensor is no tuple
        few = isinstance(result, tuple) and len(tensors) < 2
        if few or not all(isinstance(x, Tensor) for x in tensors):
            given = ", ".join(type(x).__name__ for x in tensors)
            raise TypeError(
                f"{function.__name__} must give a tensor or a tuple of two or more, gave ({given})"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as file:
            _write(file, key, [x.detach().cpu().contiguous() for x in tensors])
        return tensors if isinstance(result, tuple) else result


class _DamagedError(Exception):
    """What is wrong with a file."""


def _key(
    function: Callable[..., Any], graph: Graph, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    name, module = getattr(function, "__qualname__", None), getattr(function, "__module__", None)
    if not name or getattr(sys.modules.get(module or ""), name, None) is not function:
        raise TypeError(
            f"function must be one of a module, by whose name its results are found, got {function}"
        )
    bound = inspect.signature(function).bind(graph, *args, **kwargs)
    bound.apply_defaults()
    given = dict(list(bound.arguments.items())[1:])
    given.pop("progress", None)
    arrays = {x: _digest(getattr(graph, x).long()) for x in _ARRAYS}
    described = {
        "function": f"{module}.{name}",
        "arguments": {name: _described(name, x) for name, x in given.items()},
        "graph": [graph.num_rows, graph.num_cols, arrays],
    }
    return hashlib.sha256(_MAGIC + json.dumps(described).encode()).hexdigest()


def _described(name: str, x: object) -> Any:
    """An argument as JSON takes it, so that no two of them look the same."""
    if isinstance(x, np.generic):
        x = x.item()
    if x is None or isinstance(x, (bool, int, float, str)):
        return [type(x).__name__, repr(x)]
    if isinstance(x, (tuple, list)):
        return ["tuple", [_described(name, y) for y in x]]
    if isinstance(x, Tensor):
        return ["tensor", str(x.dtype), list(x.shape), _digest(x)]
    raise TypeError(
        f"{name} must be a number, a string, None, a tensor or a tuple of these, got "
        f"{type(x).__name__}"
    )


def _digest(x: Tensor) -> str:
    return hashlib.sha256(_bytes(x.detach().cpu().contiguous())).hexdigest()


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return x.view(-1).view(torch.uint8).numpy().data


def _write(file: BinaryIO, key: str, tensors: list[Tensor]) -> None:
    """What it is, its key, the tensors' dtypes and shapes, their bytes, and the sum of all that."""
    kinds = [[str(x.dtype).removeprefix("torch."), list(x.shape)] for x in tensors]
    header = json.dumps({"key": key, "tensors": kinds}).encode() + b"\n"
    total = hashlib.sha256()
    parts: list[bytes | memoryview] = [_MAGIC, header, *map(_bytes, tensors)]
    for part in parts:
        total.update(part)
        file.write(part)
    file.write(total.digest())


def _read(file: BufferedReader, key: str) -> list[Tensor]:
    total = hashlib.sha256()
    magic, header = file.readline(len(_MAGIC)), file.readline(_LONGEST_HEADER)
    if magic != _MAGIC:
        raise _DamagedError(f"it does not begin with {_MAGIC.decode().strip()!r}")
    total.update(magic + header)
    try:
        described = json.loads(header)
        kinds = [(getattr(torch, name), shape) for name, shape in described["tensors"]]
        bytes_ = sum(math.prod(shape) * dtype.itemsize for dtype, shape in kinds)
        found_key = described["key"]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise _DamagedError("its header cannot be read") from error
    # before memory is taken for what a damaged header says
    wanted = file.tell() + bytes_ + total.digest_size
    size = os.fstat(file.fileno()).st_size
    if size != wanted:
        raise _DamagedError(f"it has {size:,} bytes instead of {wanted:,}")
    tensors = []
    for dtype, shape in kinds:
        x = torch.empty(shape, dtype=dtype)
        file.readinto(_bytes(x))
        total.update(_bytes(x))
        tensors.append(x)
    if file.read() != total.digest():
        raise _DamagedError("its bytes do not have the checksum that it was written with")
    if found_key != key:
        raise _DamagedError("it belongs to other arguments")
    return tensors

"""Arrays of a file: read and checked."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgt.real_graphs import open_data


def read(path: Path | None, stem: str, keys: Iterable[str]) -> tuple[str, dict[str, np.ndarray]]:
    """-> the file's name for messages, and its arrays of those names.

    Args:
        path: ``stem.npz``, or the folder that holds it. None: where
            :func:`fastgt.real_graphs.open_data` finds it.

    Raises:
        FileNotFoundError: It is absent.
        ValueError: It is damaged; says how.
    """
    if path is not None and path.is_dir():
        path = path / f"{stem}.npz"
    if path is not None and not path.is_file():
        raise FileNotFoundError(
            f"{path} is absent: --data names {stem}.npz or its folder, as folder= does in Python"
        )
    name = str(path or f"{stem}.npz")
    try:
        with np.load(path) if path is not None else open_data(stem) as archive:
            return name, {key: archive[key] for key in keys}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, or name it by --data") from None
    except _DAMAGE as error:
        raise ValueError(f"{name} is damaged: {error} (or it is another file)") from error


@contextmanager
def checking(name: str) -> Iterator[None]:
    """What does not fit inside is told as damage of that file."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} is damaged: {error}") from error


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Sixteen letters that change with the arrays."""
    found = hashlib.sha256()
    for array in arrays.values():
        found.update(array.tobytes())
    return found.hexdigest()[:16]


def check_array(name: str, array: np.ndarray, ndim: int, kinds: str) -> None:
    """Refuse another number of dimensions, or a dtype of none of those NumPy kinds."""
    if array.ndim != ndim or array.dtype.kind not in kinds:
        raise ValueError(f"{name} is {list(array.shape)} {array.dtype}")


def check_ptr(name: str, ptr: Tensor, graphs: int, total: int) -> None:
    """Refuse boundaries that do not rise from 0 to ``total`` in as many steps as graphs."""
    if len(ptr) != graphs + 1 or ptr[0] != 0 or ptr[-1] != total or (ptr.diff() < 0).any():
        raise ValueError(
            f"{name} must rise from 0 to {total} in {graphs} steps, goes from "
            f"{ptr[:1].tolist()} to {ptr[-1:].tolist()} in {len(ptr) - 1}"
        )


def ptr(counts: Tensor) -> Tensor:
    """Where each begins that has so many, and where the last ends: ``[G + 1]`` of ``[G]``."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


_DAMAGE = (zipfile.BadZipFile, zlib.error, KeyError, ValueError, TypeError, OSError, EOFError)

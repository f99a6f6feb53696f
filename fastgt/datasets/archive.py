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

from fastgt.real_graphs import path_of

HOW = "docs/data-sets.md tells where it comes from"


def read(place: Path | None, stem: str, keys: Iterable[str]) -> tuple[str, dict[str, np.ndarray]]:
    """-> the name of ``stem.npz`` for messages, and its arrays of those names.

    Raises:
        FileNotFoundError: It is not at :func:`found`'s place.
        ValueError: It is damaged; says how.
    """
    path = found(place, f"{stem}.npz")
    try:
        with np.load(path) as archive:
            return str(path), {key: archive[key] for key in keys}
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged: {error} (or it is another file)") from error


def found(place: Path | None, name: str) -> Path:
    """The file of that name.

    Args:
        place: The file, or the folder that holds it. None: the package, or the folder that
            ``FASTGT_DATA`` names.

    Raises:
        FileNotFoundError: It is absent; says how it is named, and where it comes from.
    """
    if place is None:
        try:
            return path_of(name)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error} ({HOW}), or name it by --data") from None
    path = place / name if place.is_dir() else place
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is absent: --data names {name} or its folder, as folder= does in Python; {HOW}"
        )
    return path


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

"""The versions of torch and triton that fastgt was run with, and what is said about others."""

from __future__ import annotations

import functools
import re
import warnings

SUPPORTED = {"torch": ("2.11", "2.15"), "triton": ("3.6", "3.9")}
"""Package -> the lowest and the highest minor version."""


@functools.cache  # asked at every call of an operator, and a warning is given once
def check(package: str, version: str) -> None:
    """Refuse a version before the supported ones; warn of one after them.

    Raises:
        RuntimeError: The version is older.
    """
    low, high = SUPPORTED[package]
    place = _minor(version)
    said = f"fastgt supports {package} {low} to {high}, and {version} is installed"
    if place < _minor(low):
        raise RuntimeError(f"{said}: install one of the supported versions")
    if place > _minor(high):
        warnings.warn(f"{said}: fastgt was not tested with it", RuntimeWarning, stacklevel=4)


def _minor(version: str) -> tuple[int, int]:
    """Of ``"2.15.0a0+git"``: (2, 15)."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise RuntimeError(f"a version must begin with two numbers, got {version!r}")
    return int(found[1]), int(found[2])

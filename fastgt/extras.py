"""Packages that fastgt installs only with an extra."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def require(package: str, what: str, extra: str) -> Any:
    """-> the package; ImportError that says who needs it, and which extra installs it."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f'{what} needs {package}: pip install "fastgt[{extra}]"') from error


def require_drawing(what: str) -> None:
    """What curves and progress bars are drawn with: absent, it must show before the training."""
    for package in ("matplotlib", "tqdm"):
        require(package, what, "demo")

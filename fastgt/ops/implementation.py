"""Which implementation runs. A named one is obeyed or refused, never replaced."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from fastgt import versions
from fastgt.cpu import library

Impl = Literal["triton", "cpp", "reference"]
_NAMES = get_args(Impl)

_forced: Impl | None = None


@contextmanager
def implementation(impl: Impl | None) -> Iterator[None]:
    """Run every operator without an ``impl`` of its own by this one (None: by device).

    For the whole process, as PyTorch's backend flags are (a compiled function watches it): not to
    be entered by several threads at once. The backward runs as the forward did.

    Example:
        >>> import fastgt
        >>> with fastgt.implementation("reference"):
        ...     pass
    """
    global _forced
    check_impl(impl)
    before, _forced = _forced, impl
    try:
        yield
    finally:
        _forced = before


def resolve_impl(impl: Impl | None, x: Tensor) -> Impl:
    """``impl``, else the surrounding :func:`implementation`, else what suits ``x``'s device."""
    check_impl(impl)
    if not torch.compiler.is_compiling():
        versions.check("torch", torch.__version__)
    impl = impl or _forced
    if impl is None:
        return _on_cpu() if x.device.type == "cpu" else "triton"
    if impl == "cpp":
        if x.device.type != "cpu":
            raise RuntimeError(f"impl='cpp' runs on CPU tensors, got {x.device}")
        if reason := _why_not_cpp():
            raise RuntimeError(f"impl='cpp' cannot run: {reason}")
    return impl


def _on_cpu() -> Impl:
    """The compiled kernels; where there are none, the definitions, and a warning says why, once."""
    if reason := _why_not_cpp():
        _warn_once(reason)
        return "reference"
    return "cpp"


def _why_not_cpp() -> str:
    loaded = library.load()
    return loaded if isinstance(loaded, str) else ""


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"fastgt runs its slow reference on this CPU: {reason}", stacklevel=2)


# as torch.compiler.assume_constant_result does, which imports Triton: no tracing of a file's search
_on_cpu._dynamo_marked_constant = True  # type: ignore[attr-defined]
_why_not_cpp._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_impl(impl: Impl | None) -> None:
    """Refuse a name that is not one of an implementation."""
    if impl is not None and impl not in _NAMES:
        raise ValueError(f"impl must be one of {list(_NAMES)} or None, got {impl!r}")


def require_triton(x: Tensor) -> None:
    """Refuse clearly where a Triton kernel cannot run on ``x``."""
    try:
        import triton
    except ImportError as error:
        raise RuntimeError("impl='triton' needs the package triton, which is missing") from error
    versions.check("triton", triton.__version__)
    if x.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "impl='triton' needs tensors on a GPU, got cpu (or Triton's interpreter: set "
            "TRITON_INTERPRET=1 before starting Python)"
        )

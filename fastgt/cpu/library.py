"""The compiled kernels: finding, checking and calling them.

A kernel is a C function that takes one struct of numbers of 8 bytes each. ``Library.run`` makes the
struct from a call's values, one after another. The library says how large it has to be.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import struct
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent
_VARIANTS = {"AVX512": "v4", "AVX2": "v3"}
_EMPTY = 64
_NONE = 0, 0, 0
_AGAIN = (
    "with a C++17 compiler (GCC 11, Clang 12 or newer) install fastgt again, from its sources: "
    "pip install --force-reinstall --no-cache-dir"
)
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


class Library:
    """One build of the kernels."""

    def __init__(self, path: Path):
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.fastgt_version.restype = ctypes.c_char_p
        self.version = self._library.fastgt_version().decode()
        self._functions: dict[str, tuple[Any, struct.Struct]] = {}
        _check_version(self)
        # the libraries that PyTorch's module is linked with are searched too
        from_torch = ctypes.CDLL(torch._C.__file__)
        threads = ctypes.cast(from_torch.torch_parallel_for, ctypes.c_void_p)
        self._library.fastgt_use_threads(threads)
        self.vector_bytes = int(self._library.fastgt_vector_bytes())

    def run(self, op: str, function: str, *values: Any) -> None:
        """Call ``op_function`` with a struct of ``values``."""
        flat = flatten(values)
        call, layout = self._functions.get(op + function) or self._find(op, function, flat)
        call(layout.pack(*flat))

    def run_in_memory(self, op: str, function: str, *values: Any) -> None:
        """As ``run``; the last field of the struct is memory that the call works in.

        The function says how many bytes it needs when it gets none.
        """
        flat = flatten(values)
        none = (0, 0, 0)
        found = self._functions.get(op + function)
        call, layout = found or self._find(op, function, [*flat, *none])
        work = torch.empty(call(layout.pack(*flat, *none)), dtype=torch.uint8, device="cpu")
        call(layout.pack(*flat, work.data_ptr(), 1, 0))

    def _find(self, op: str, function: str, flat: list[Any]) -> tuple[Any, struct.Struct]:
        layout = struct.Struct("".join("d" if type(x) is float else "q" for x in flat))
        try:
            size = getattr(self._library, f"{op}_size")
            call = getattr(self._library, f"{op}_{function}")
        except AttributeError:
            message = f"{self.path.name} has no {op}_{function}: install fastgt again"
            raise RuntimeError(message) from None
        size.restype = ctypes.c_int64
        if size() != layout.size:
            raise RuntimeError(
                f"{self.path.name}: {op} takes {size()} bytes, this version of fastgt gives "
                f"{layout.size}: install fastgt again"
            )
        call.argtypes, call.restype = [ctypes.c_char_p], ctypes.c_int64
        self._functions[op + function] = call, layout
        return call, layout


def flatten(values: Any) -> list[Any]:
    """A tensor is its address and first two strides, None is three zeros, tuples are spliced."""
    flat: list[Any] = []
    for x in values:
        if type(x) is int:  # most are, and short calls wait for this
            flat.append(x)
        elif x is None:
            flat += _NONE
        elif isinstance(x, Tensor):
            # an empty tensor has no address, and is not None
            strides, address = x.stride(), x.data_ptr() or _EMPTY
            flat += (address, strides[0], strides[1]) if len(strides) > 1 else (address, 1, 0)
        elif isinstance(x, tuple):
            flat += flatten(x)
        else:
            flat.append(x)
    return flat


def walk(ptr: Tensor, other: Tensor | None, edge: Tensor) -> tuple[int, ...]:
    """The fields of a walk through the edges."""
    return (
        ptr.data_ptr(),
        0 if other is None else other.data_ptr(),
        edge.data_ptr(),
        ptr.shape[0] - 1,
        int(ptr.dtype == torch.int64),
    )


def filled(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """None where nothing is to be written: results that a call does not give are empty tensors."""
    return tuple(None if x is None or not x.numel() else x for x in tensors)


def dtype_number(x: Tensor) -> int:
    return _DTYPES[x.dtype]


def accumulator(x: Tensor) -> torch.dtype:
    """What sums over ``x`` are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rows_of(x: Tensor) -> Tensor:
    """``x``, copied where its last dimension is not contiguous."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def variant() -> str:
    """Which build this CPU runs."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "baseline"
    return _VARIANTS.get(torch.backends.cpu.get_cpu_capability(), "baseline")


@cache
def load() -> Library | str:
    """The kernels for this CPU, or why there are none."""
    path = _FOLDER / f"kernels_{variant()}.so"
    try:
        if path.exists():
            return Library(path)
        log = _FOLDER / "not_built.txt"
        reason = log.read_text().strip() if log.exists() else f"{path} does not exist"
    except (OSError, AttributeError, RuntimeError) as error:
        return f"the CPU kernels cannot be loaded: {error}"
    return f"the CPU kernels were not built: {reason}\n{_AGAIN}"


def kernels() -> Library:
    """The kernels for this CPU; RuntimeError says why there are none."""
    loaded = load()
    if isinstance(loaded, str):
        raise RuntimeError(loaded)
    return loaded


def _check_version(library: Library) -> None:
    from fastgt import __version__

    number, _, built_from = library.version.partition(" ")
    if number != __version__:
        raise RuntimeError(
            f"{library.path.name} is of fastgt {number}, not {__version__}: install fastgt again"
        )
    sources = sorted([*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h")])
    if not sources:  # an installed package has none
        return
    text = b"".join(path.read_bytes() for path in sources)
    if built_from != hashlib.sha256(text).hexdigest()[:12]:
        raise RuntimeError(
            f"{library.path.name} was built from other sources: run pip install -e . again"
        )

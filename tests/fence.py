"""An electric fence around the memory that Triton's kernels get, where no GPU's sanitizer runs.

In Triton's interpreter a kernel's loads and stores are plain reads and writes of the addresses that
it computes, of the lanes alone that its masks let through. Inside ``fenced(side)`` every tensor of
every launch is a copy in memory of its own, at one end of it:

    "end"     | guard | 255 255 255 tensor | guard |      the last byte before a guard
    "begin"   | guard | tensor 255 255 255 | guard |      the first byte after one

A guard is 16 MiB that the operating system lets nobody read or write: an access one byte too far
ends the process with SIGSEGV. Elements are aligned as ever, so no gap is left between a tensor and
its guard; rows are no longer aligned to 16 bytes, which the interpreter does not need. What is left
of the pages, and what a strided tensor leaves out between its elements, holds bytes of 255: NaN as
a number, -1 as an index. A kernel that writes there is found after the launch. One that reads there
is found only where that changes a result, or where the -1 leads it out of a tensor; so every case
runs with the fence at either side, and both must give the same bits.

What stays unseen: an access that goes wrong inside a tensor (the next row), or that leaps over a
guard.

``Worker`` runs such calls in a process of its own, which may die. It says which call it was, which
signal ended it, and from ``faulthandler`` the kernel's line. The next call gets a new process,
forked from one that has imported everything but the kernels. With ``kernels=folder`` these come
from there: ``test_fence.py`` runs copies in which one mask is missing.
"""

import contextlib
import ctypes
import faulthandler
import hashlib
import importlib.util
import mmap
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgt.testing import poisoned_memory

SIDES = ("end", "begin")
SECONDS = 120  # that a call may take
_GUARD = 1 << 24
_NONE = 0  # PROT_NONE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class Crash(AssertionError):
    """A signal has ended the process of a call."""


class Worker:
    """Runs functions in a process of its own, and another one after each that dies.

    Its arguments and results are pickled; the function stands in a module that can be imported.
    """

    def __init__(self, kernels: Path | None = None) -> None:
        self._kernels = kernels
        self._process: Any = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, side: str | None, function: Callable, *args: Any) -> Any:
        """The function's result with fences at that side (None: without any)."""
        if self._process is None:
            self._start()
        call = f"{function.__name__}({', '.join(map(str, args))}), fences at the {side}"
        try:
            self._pipe.send((side, function, args))
            if not self._pipe.poll(SECONDS):
                self._stop()
                raise AssertionError(f"{call}: not done after {SECONDS} seconds")
            error, found = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code, lines = self._process.exitcode, Path(self._log.name).read_text()
            self._stop()
            if code < 0:
                raise Crash(f"{call}: {signal.Signals(-code).name}\n{lines}") from None
            raise AssertionError(f"{call}: the process has left, exit code {code}") from None
        if error is not None:
            raise AssertionError(f"{call}:\n{error}")
        return found

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        # what every process needs; the kernels may be others each time
        context.set_forkserver_preload(
            ["hypothesis", "pytest", "torch._dynamo.testing", "triton", "fastgt.testing"]
        )
        self._log = tempfile.NamedTemporaryFile(prefix="fence-")  # noqa: SIM115
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, self._log.name, self._kernels), daemon=True
        )
        self._process.start()
        other.close()

    def _stop(self) -> None:
        if self._process is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
            self._log.close()
            self._process = None


def _serve(pipe: Any, log: str, kernels: Path | None) -> None:
    """What the process does: calls, one after another."""
    torch.set_num_threads(1)
    if kernels is not None:
        _take_kernels(kernels)
    lines = open(log, "w")  # noqa: SIM115  (as long as the process)
    faulthandler.enable(lines, all_threads=False)
    with poisoned_memory():
        _answer(pipe)


def _answer(pipe: Any) -> None:
    while True:
        try:
            side, function, args = pipe.recv()
        except EOFError:
            return
        try:
            with fenced(side) if side else contextlib.nullcontext():
                found = function(*args)
        except Exception:
            pipe.send((traceback.format_exc(), None))
        else:
            pipe.send((None, found))


def _take_kernels(folder: Path) -> None:
    """Import ``fastgt.kernels`` from another folder."""
    spec = importlib.util.spec_from_file_location(
        "fastgt.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastgt.kernels"] = sys.modules["fastgt"].kernels = module
    spec.loader.exec_module(module)


def digests(found: dict[str, Tensor]) -> dict[str, str]:
    """Of the bits of results by name: what a worker can send."""
    return {
        name: hashlib.sha256(x.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for name, x in found.items()
    }


@contextlib.contextmanager
def fenced(side: str) -> Iterator[None]:
    """Fences at one of SIDES around the tensors of all launches in Triton's interpreter."""
    from triton.runtime.interpreter import InterpretedFunction

    launch = InterpretedFunction.run

    def run(kernel, *args, grid, warmup, **kwargs):
        names = [*kernel.arg_names[: len(args)], *kwargs]
        fences = _Fences(kernel.__name__, side)
        held = [fences.around(*x) for x in zip(names, [*args, *kwargs.values()], strict=True)]
        named = dict(zip(kwargs, held[len(args) :], strict=True))
        result = launch(kernel, *held[: len(args)], grid=grid, warmup=warmup, **named)
        fences.give_back()
        return result

    InterpretedFunction.run = run
    try:
        yield
    finally:
        InterpretedFunction.run = launch


class _Fences:
    """The fenced copies of one launch's tensors."""

    def __init__(self, kernel: str, side: str) -> None:
        self._kernel = kernel
        self._side = side
        self._copies: dict[tuple, _Copy] = {}

    def around(self, name: str, x: Any) -> Any:
        """An argument with its tensors fenced; one that comes twice has one copy."""
        if isinstance(x, tuple):
            fields = getattr(x, "_fields", range(len(x)))
            held = [self.around(f"{name}.{field}", y) for field, y in zip(fields, x, strict=True)]
            return type(x)(*held) if hasattr(x, "_fields") else tuple(held)
        if not isinstance(x, Tensor) or not x.numel():
            return x  # an empty tensor's address is 0, where nothing can be read either
        key = x.data_ptr(), x.dtype, x.shape, x.stride()
        if key not in self._copies:
            self._copies[key] = _Copy(f"{name} of {self._kernel}", x.detach(), self._side)
        return self._copies[key].tensor

    def give_back(self) -> None:
        copies = list(self._copies.values())
        for written in [copy for copy in copies if copy.give_back()]:
            for other in copies:
                # two copies of the same memory would no longer see each other
                apart = written.last <= other.first or other.last <= written.first
                assert other is written or apart, f"{written.name} overlaps {other.name}"


class _Copy:
    """A tensor's copy that begins or ends at a guard."""

    def __init__(self, name: str, x: Tensor, side: str) -> None:
        self.name = name
        self._original = self._once(x)
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        size = extent * x.element_size()
        self.first, self.last = x.data_ptr(), x.data_ptr() + size
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = _guarded(pages)
        begin = _GUARD + (pages - size if side == "end" else 0)
        self._pages = torch.frombuffer(memory, dtype=torch.uint8, count=pages, offset=_GUARD)
        self._pages.fill_(255)
        # a storage of its own, which begins and ends where the tensor does
        room = torch.frombuffer(memory, dtype=x.dtype, count=extent, offset=begin)
        self.tensor = room.as_strided(x.shape, x.stride())
        self._once(self.tensor).copy_(self._original)
        self._before = self._pages.clone()
        self._begin, self._end = begin - _GUARD, begin - _GUARD + size

    def give_back(self) -> bool:
        """Whether the kernel has written to it, and no other byte."""
        if torch.equal(self._pages, self._before):
            return False
        found = self._once(self.tensor)
        expected = self._before[self._begin : self._end].view(found.dtype)
        expected.as_strided(found.shape, found.stride(), expected.storage_offset()).copy_(found)
        beside = (self._before != self._pages).nonzero().flatten() - self._begin
        if len(beside):
            raise AssertionError(f"{self.name}: written at byte {beside.tolist()} of the tensor")
        self._original.copy_(found)
        return True

    @staticmethod
    def _once(x: Tensor) -> Tensor:
        """The tensor with each element of an expanded one once."""
        shape = [n if s else 1 for n, s in zip(x.shape, x.stride(), strict=True)]
        return x.as_strided(shape, x.stride(), x.storage_offset())


def _guarded(pages: int) -> mmap.mmap:
    """Memory between two guards; it goes when the last tensor in it does."""
    # the guards of many tensors must not count as memory in use
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    memory = mmap.mmap(-1, _GUARD + pages + _GUARD, flags=flags)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (address, address + _GUARD + pages):
        if _LIBC.mprotect(guard, _GUARD, _NONE):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return memory

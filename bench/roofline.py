"""What a device can do, measured in the run that compares with it.

A pass over a problem takes at least as long as its bytes take: those that move once at the rate of
a copy, and rows that edges fetch again at the rate of a gather. It takes at least as long as its
products take at the rate of a matrix product. The three rates are measured: the copy of buffers as
large as the problem and the gather from a table as large as what edges point at, since each level
of a cache has its own; the product of matrices in the dtype of the problem.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import NamedTuple

import torch

REPEATS = 7


class Work(NamedTuple):
    """What a pass moves and multiplies, whoever does it.

    Attributes:
        once: Bytes of inputs, outputs and indices, each moved once: the least there is.
        gathered: Bytes of rows that are fetched for edges, each but for its first time.
        flops: Of products and sums; exponentials left out.
        table: Bytes of the rows that edges point at while a kernel goes through them. The gather is
            measured from as many, at random places: edges that point close by may do better.
        row: Bytes of such a row.
    """

    once: int
    gathered: int
    flops: int
    table: int = 0
    row: int = 0

    def __add__(self, other: tuple) -> Work:  # type: ignore[override]
        sums = (a + b for a, b in zip(self[:3], other[:3], strict=True))
        return Work(*sums, max(self.table, other[3]), max(self.row, other[4]))


def passes(forward: Work, backward: Work) -> dict[str, Work]:
    """Of a forward, of a backward and of both."""
    return {"forward": forward, "backward": backward, "both": forward + backward}


def roofline(work: Work, seconds: float, rates: dict[str, float]) -> dict[str, float]:
    """Columns of a row: bytes a second with the gathered ones, operations a second, operations a
    byte, and the share of the time that the device needs at least. None of them where that is more
    than all of it: who is faster does less work than was counted."""
    bytes_take = work.once / rates["copy_bytes_per_s"]
    if work.gathered:
        bytes_take += work.gathered / rates["gather_bytes_per_s"]
    least = max(bytes_take, work.flops / rates["matmul_flops_per_s"])
    if least > seconds:
        return {}
    return {
        "bytes_per_s": (work.once + work.gathered) / seconds,
        "flops_per_s": work.flops / seconds,
        "flops_per_byte": work.flops / work.once,
        "roofline": least / seconds,
    }


def measured_rates(
    device: torch.device, dtype: torch.dtype, nbytes: int, work: Work | None = None
) -> dict[str, float]:
    """Bytes a second, read and written, of a copy among buffers of about so many bytes in all, and
    operations a second of a matrix product in that dtype; bytes a second of the gather that the
    work has."""
    size = 1 << max(20, min(30, (max(1, nbytes) - 1).bit_length()))
    gather = {}
    if work is not None and work.gathered:
        table = 1 << max(16, min(30, (work.table - 1).bit_length()))
        gather["gather_bytes_per_s"] = _gather(device, table, max(64, work.row))
    return gather | {
        "copy_bytes_per_s": _copy(device, size),
        # a CPU multiplies narrow types slowly, and kernels may widen them
        "matmul_flops_per_s": max(_matmul(device, dtype), _matmul(device, torch.float32)),
    }


@functools.cache
def _copy(device: torch.device, size: int) -> float:
    x, y = torch.rand(2, size // 8).to(device)  # both together are of that size
    # as many copies as make a timing long
    often = max(1, (64 << 20) // size)

    def copy() -> None:
        for _ in range(often):
            y.copy_(x)

    return often * 2 * x.nbytes / _seconds(copy, device)


@functools.cache
def _gather(device: torch.device, table: int, row: int) -> float:
    """Of sums over 16 random rows each, which read a row an index and write one in 16."""
    rows, often = max(1, table // row), max(1 << 12, (64 << 20) // row)
    x = torch.rand(rows, row // 4).to(device)
    index = torch.randint(rows, (often,), generator=torch.Generator().manual_seed(0)).to(device)
    bags = torch.arange(0, often + 1, 16, device=device)

    def gather() -> None:
        torch.nn.functional.embedding_bag(index, x, bags, mode="sum", include_last_offset=True)

    return often * 4 * (row // 4) / _seconds(gather, device)


@functools.cache
def _matmul(device: torch.device, dtype: torch.dtype) -> float:
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.rand(2, n, n).to(device, dtype)
    return 2 * n**3 / _seconds(lambda: a @ b, device)


def _seconds(fn, device: torch.device) -> float:  # type: ignore[no-untyped-def]
    times = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        fn()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])

"""What a device can do, measured in the run that compares with it.

A pass over a problem takes at least as long as its bytes take at the rate of a copy, and as its
products take at the rate of a matrix product. Both rates are measured: the copy of buffers as large
as the problem, for what fits a cache is not limited by memory; the product of matrices in the
dtype of the problem.
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
        gathered: Bytes of rows that are fetched for edges, beside that.
        flops: Of products and sums; exponentials left out.
    """

    once: int
    gathered: int
    flops: int

    def __add__(self, other: tuple) -> Work:  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


def passes(forward: Work, backward: Work) -> dict[str, Work]:
    """Of a forward, of a backward and of both."""
    return {"forward": forward, "backward": backward, "both": forward + backward}


def roofline(work: Work, seconds: float, rates: dict[str, float]) -> dict[str, float]:
    """Columns of a row: bytes a second with the gathered ones, operations a second, operations a
    byte, and the share of the time that the device needs at least. None of them where that is more
    than all of it: who is faster does less work than was counted."""
    least = max(work.once / rates["copy_bytes_per_s"], work.flops / rates["matmul_flops_per_s"])
    if least > seconds:
        return {}
    return {
        "bytes_per_s": (work.once + work.gathered) / seconds,
        "flops_per_s": work.flops / seconds,
        "flops_per_byte": work.flops / work.once,
        "roofline": least / seconds,
    }


def measured_rates(device: torch.device, dtype: torch.dtype, nbytes: int) -> dict[str, float]:
    """Bytes a second, read and written, of a copy among buffers of about so many bytes in all, and
    operations a second of a matrix product in that dtype."""
    size = 1 << max(20, min(30, (max(1, nbytes) - 1).bit_length()))
    return {
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

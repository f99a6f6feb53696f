"""How much memory a call takes, and that none takes more than there is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOM = 512 << 20  # bytes that are left to everybody else


def peak_extra_memory(fn: Callable[[], Any], device: torch.device) -> int:
    """Bytes that PyTorch held at most during ``fn()``, beyond those it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = fn()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del kept
        return peak
    activities = [torch.profiler.ProfilerActivity.CPU]
    profile = torch.profiler.profile(activities=activities, profile_memory=True)
    with _silence():
        profile.start()
        try:
            kept = fn()
        finally:
            profile.stop()
    del kept
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        held += change
        peak = max(peak, held)
    return peak


@contextmanager
def allocation_limit(device: torch.device) -> Iterator[None]:
    """Let who asks a CPU for more memory than it has fail, where Linux would kill the process."""
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = _held() + max(0, available() - ROOM)
    if soft != resource.RLIM_INFINITY:
        most = min(most, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def available() -> int:
    """Bytes that a Linux machine, or the container that this runs in, can still give."""
    free = [_kilobytes("/proc/meminfo", "MemAvailable")]
    group = Path("/sys/fs/cgroup")
    most = group / "memory.max"
    if most.exists() and most.read_text().strip() != "max":
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        free.append(int(most.read_text()) - used)
    return min(free)


def resident() -> int:
    """Bytes of memory that this process has, on Linux: files that it has mapped and read too."""
    return _kilobytes("/proc/self/status", "VmRSS")


def peak_resident() -> int:
    """The most that :func:`resident` ever was."""
    return _kilobytes("/proc/self/status", "VmHWM")


def _held() -> int:
    return _kilobytes("/proc/self/status", "VmData")


def _kilobytes(path: str, name: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"{path} has no {name}")


@contextmanager
def _silence() -> Iterator[None]:
    """PyTorch's profiler announces itself on stderr, past Python, at any log level."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)

"""Verify, then time: the parts that every benchmark shares."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgt.testing import assert_as_accurate

Provider = Callable[[], Any]


def verdict(names: list[str], *results: tuple[Tensor, ...]) -> dict[str, Any]:
    """Whether a provider's results, the first of ``names`` an output and the others gradients, are
    as accurate as eager ones; ``results``: its own, eager ones and those in float64."""
    try:
        for name, *tensors in zip(names, *results, strict=True):
            assert_as_accurate(*tensors, name, factor=2.0 if name == names[0] else 3.0)
    except AssertionError as error:
        return {"match": False, "error": str(error)}
    return {"match": True}


def time_rows(
    rows: list[dict[str, Any]],
    forward: dict[str, Provider],
    both: dict[str, Provider],
    device: torch.device,
    *,
    repeats: int = 9,
) -> None:
    """Fill the rows of those who match: seconds, peak extra bytes, and ratios to "fastgt"."""
    forward_s = measure(forward, device, repeats=repeats)
    both_s = measure(both, device, repeats=repeats)
    for row in rows:
        name = row["provider"]
        if not row["match"]:
            continue
        row["forward_s"] = statistics.median(forward_s[name])
        row["both_s"] = statistics.median(both_s[name])
        row["forward_spread"], row["both_spread"] = spread(forward_s[name]), spread(both_s[name])
        row["forward_peak_bytes"] = peak_extra_memory(forward[name], device)
        row["both_peak_bytes"] = peak_extra_memory(both[name], device)
        if "fastgt" in forward:
            row["forward_x"] = ratio(forward_s[name], forward_s["fastgt"])
            row["both_x"] = ratio(both_s[name], both_s["fastgt"])


def measure(
    providers: dict[str, Provider], device: torch.device, *, repeats: int = 9
) -> dict[str, list[float]]:
    """-> seconds of every call. Providers take turns, in both orders, so that a slow moment of
    the machine hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for fn in providers.values():
        fn()
    for i in range(repeats):
        for name in reversed(providers) if i % 2 else providers:
            times[name].append(_seconds(providers[name], device))
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the ratios of calls made next to each other."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def spread(times: list[float]) -> float:
    """The middle half's width, as a share of the median."""
    if len(times) < 2:
        return 0.0
    quarters = statistics.quantiles(times, n=4, method="inclusive")
    return (quarters[2] - quarters[0]) / quarters[1]


def peak_extra_memory(fn: Provider, device: torch.device) -> int:
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
        with _silence():
            profile.stop()
    del kept
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        held += change
        peak = max(peak, held)
    return peak


def environment(device: torch.device) -> dict[str, str]:
    """What every row of results carries."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "date": date.today().isoformat(),
        "device": where,
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "torch_geometric": _version("torch_geometric"),
        "torch_scatter": _version("torch_scatter"),
    }


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


def _seconds(fn: Provider, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    fn()
    return time.perf_counter() - begin


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return run.stdout.strip() or "unknown"


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"

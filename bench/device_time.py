"""Times of a call on a GPU, by its own clock and by the host's.

A call is timed by events around it, after a pass over a buffer larger than the cache. Beside that
stand the host's wall time of a call that is waited for, what its kernels take one by one, and what
a CUDA graph of it takes: what launches cost is the difference.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

FLUSHED = 256 << 20  # bytes, more than any L2
REPEATS = 9


def clock(device: torch.device) -> Callable[[Callable[..., Any]], tuple[float, ...]]:
    """-> times from a step to seconds (until it said ``between``, if it did; all of it)."""
    flushed = torch.empty(FLUSHED, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device)

    def run(step: Callable[..., Any]) -> tuple[float, ...]:
        events: list[torch.cuda.Event] = []

        def mark() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record(stream)

        flushed.zero_()
        mark()
        step(mark)
        mark()
        events[-1].synchronize()
        return tuple(events[0].elapsed_time(event) / 1e3 for event in events[1:])

    return run


def measure(part: str, call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """-> columns of a row: ``{part}_wall_s``, ``{part}_kernel_s`` and ``{part}_replay_s``, or
    ``{part}_replay_error`` where the call cannot be captured."""
    row: dict[str, Any] = {
        f"{part}_wall_s": _wall(call, device),
        f"{part}_kernel_s": _kernels(call, device),
    }
    try:
        row[f"{part}_replay_s"] = _replay(call, device)
    except Exception as error:  # of any kind: Triton's are no RuntimeErrors
        lines = str(error).strip().splitlines()
        row[f"{part}_replay_error"] = lines[0] if lines else type(error).__name__
    return row


def _wall(call: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _kernels(call: Callable[[], Any], device: torch.device) -> float:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(REPEATS):
            call()
        torch.cuda.synchronize(device)
    microseconds = sum(event.self_device_time_total for event in profile.key_averages())
    return microseconds / 1e6 / REPEATS


def _replay(call: Callable[[], Any], device: torch.device) -> float:
    with torch.cuda.device(device):  # a capture is of the current one
        return _captured(call, device)


def _captured(call: Callable[[], Any], device: torch.device) -> float:
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    time_it = clock(device)
    seconds = statistics.median(time_it(lambda mark: graph.replay())[-1] for _ in range(REPEATS))
    del kept
    return seconds

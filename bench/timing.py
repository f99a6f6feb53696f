"""Calls timed in turns, and what is made of the times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]
SAMPLE = 0.03  # seconds that one timing takes on a CPU at least: short calls are repeated
LONG = 20.0  # seconds that all timings of a call take at most, unless they are FEWEST
FEWEST = 3


def measure(
    calls: dict[str, Call], device: torch.device, *, repeats: int = 9, sample: float = SAMPLE
) -> dict[str, list[float]]:
    """-> seconds of every call. Providers take turns, in both orders, so that a slow moment of
    the machine hits all of them. Each timing is the mean of as many calls as take ``sample``
    seconds; of one call, after one to warm up, if that is 0."""
    clock = _clock(device)

    def whole(call: Call) -> Callable[[], tuple[float, ...]]:
        return lambda: clock(lambda between: call())

    parts = _in_turns({name: whole(call) for name, call in calls.items()}, device, repeats, sample)
    return {name: [times[-1] for times in samples] for name, samples in parts.items()}


def measure_steps(
    steps: dict[str, Callable[[Callable[[], None]], Any]], device: torch.device, repeats: int
) -> dict[str, dict[str, list[float]]]:
    clock = _clock(device)
    calls = {name: lambda step=step: clock(step) for name, step in steps.items()}
    samples = _in_turns(calls, device, repeats, SAMPLE)
    return {
        "backward": {name: [both - fwd for fwd, both in x] for name, x in samples.items()},
        "both": {name: [both for _, both in x] for name, x in samples.items()},
    }


def _in_turns(
    calls: dict[str, Callable[[], tuple[float, ...]]],
    device: torch.device,
    repeats: int,
    sample: float,
) -> dict[str, list[tuple[float, ...]]]:
    often, rounds = {}, {}
    for name, call in calls.items():
        seconds = call()[-1]
        rounds[name] = min(repeats, max(FEWEST, int(LONG / seconds)))
        # a GPU's cache is emptied before every call
        once = device.type == "cuda" or not sample
        often[name] = 1 if once else max(1, round(sample / seconds))
    samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    for i in range(repeats):
        for name in reversed(calls) if i % 2 else calls:
            if i >= rounds[name]:
                continue
            found = [calls[name]() for _ in range(often[name])]
            samples[name].append(tuple(sum(x) / len(found) for x in zip(*found, strict=True)))
    return samples


def _clock(device: torch.device) -> Callable[[Callable[..., Any]], tuple[float, ...]]:
    """-> times from a step to (what it took until ``between``, if it said so; all of it)."""
    if device.type == "cuda":
        from fastgt.bench import device_time

        return device_time.clock(device)

    def clock(step: Callable[..., Any]) -> tuple[float, ...]:
        moments = [time.perf_counter()]
        step(lambda: moments.append(time.perf_counter()))
        moments.append(time.perf_counter())
        return tuple(moment - moments[0] for moment in moments[1:])

    return clock


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the ratios of calls made next to each other, as far as both go."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=False))


def spread(times: list[float]) -> float:
    """The middle half's width, as a share of the median."""
    if len(times) < 2:
        return 0.0
    quarters = statistics.quantiles(times, n=4, method="inclusive")
    return (quarters[2] - quarters[0]) / quarters[1]

"""How long a GPU session will take, from what it compiles and times, counted here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fastgt.bench import gpu_benchmarks as benchmarks
from fastgt.bench import gpu_correctness, gpu_count, tune
from fastgt.bench.gpu_pool import Pool, Task

CORES = 16
# seconds, on one core where not said otherwise
KERNEL = 0.75  # to compile one: .36 is the mean of 131, .36 the C that launches it, on a Xeon here
START = 12.0  # of processes, which are kept: importing torch, making CUDA contexts; assumed
CHECK = 0.3  # a check of correctness, four forwards and three backwards: assumed
COMPILED = 60.0  # what torch.compile takes for a peer, forward and backward: assumed
LOADED = 2.0  # a problem: made, and what is right computed in float64: assumed, beside its edges
TIMED = 1.5  # a provider: verified, timed 20 times after a flush, profiled, captured: assumed
EDGES = 1e6  # edges a second that a graph is made of: as measured here, 12 million in 15 s
TUNED = 1.5  # a plan or the tiles of a path: some 200 calls of milliseconds, graphs made once
# about, of the problems that are large
SIZES = {"igb_small": 12e6, "pascalvoc": 2.8e6, "flights": 6e5, "tolokers": 1e6}


class Count(NamedTuple):
    """Of a step: kernels it compiles, tasks, and seconds on the device."""

    step: str
    kernels: int
    tasks: int
    seconds: float


def lines(pool: Pool, steps: dict[str, float]) -> Iterator[str]:
    """The prediction of these steps, for people; each with the seconds that it has at most."""
    counts = predict(pool, list(steps))
    yield f"predicted for a GPU machine of {CORES} cores, from counts:"
    for step, kernels, tasks, seconds in counts:
        budget = steps[step]
        limit = "the rest" if budget == float("inf") else f"{budget:.0f} s"
        yield f"  {step:12} {kernels:5} kernels, {tasks:5} tasks, {seconds:4.0f} s of {limit}"
    total = sum(min(x.seconds, steps[x.step]) for x in counts)
    yield f"  together {total:.0f} s, {total / 60:.1f} minutes"
    yield (
        f"  taken for it: {KERNEL} s a kernel and core (measured without a GPU), {START:.0f} s a "
        f"process, {CHECK} s a check, {COMPILED:.0f} s a compiled peer, {LOADED} s a problem, "
        f"{TIMED} s a provider, {TUNED} s a plan or a path's tiles (assumed)"
    )


def predict(pool: Pool, steps: Sequence[str]) -> list[Count]:
    """Kernels are counted by asking Triton, which compiles nothing; in processes that have it
    without its interpreter."""
    kernels = _kernels(pool, steps)
    return [_counted(step, kernels.get(step, 0)) for step in steps]


def _counted(step: str, kernels: int) -> Count:
    compiling = kernels * KERNEL / CORES
    if step == "environment":
        return Count(step, kernels, 1, START + 5)
    if step == "launch":
        return Count(step, kernels, 3, kernels * KERNEL + 6)
    if step == "correctness":
        checks = sum(map(len, gpu_correctness.groups(False)))
        return Count(step, kernels, checks, START + compiling + checks * CHECK / CORES)
    if step == "plans":
        tasks = len(benchmarks.tuned(False))
        edges = len(tune.DENSITIES) * tune.DEGREE * benchmarks.TUNED_ROWS[False][1]
        seconds = compiling + tasks * TUNED + edges / EDGES
        return Count(step, kernels, tasks, seconds)
    chosen = _BENCHMARKS[step]
    peers = [peer for x in benchmarks.kinds(chosen) for peer in benchmarks.providers(x)]
    slow = sum(peer in benchmarks.COMPILED for peer in peers)
    compiling += (slow * COMPILED + len(peers) * TIMED) / CORES
    compiling = max(compiling, COMPILED if slow else 0.0)
    return Count(step, kernels, len(chosen), compiling + sum(map(_timed, chosen)))


def _timed(benchmark: benchmarks.Benchmark) -> float:
    edges = SIZES.get(benchmark.problem, 3e5)
    return LOADED + edges / EDGES + TIMED * len(benchmarks.providers(benchmark))


def _kernels(pool: Pool, steps: Sequence[str]) -> dict[str, int]:
    calls: dict[str, list[tuple[Callable, tuple]]] = {
        "correctness": [
            (gpu_correctness.launch, (problem, variant, dtype, "cpu", False))
            for group in gpu_correctness.groups(False)
            for problem, variant, dtype in group
        ],
        "plans": [
            (benchmarks.trace_tuned, (function, args))
            for _, function, args in benchmarks.tuned(False)
        ],
        "launch": [(benchmarks.trace_launches, ())],
    }
    for step, chosen in _BENCHMARKS.items():
        calls[step] = [(benchmarks.trace, (x,)) for x in benchmarks.kinds(chosen)]
    groups = [
        [Task(step, gpu_count.count, (those,), 600.0)]
        for step, those in calls.items()
        if step in steps
    ]
    settings = {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    found = {}
    for outcome in pool.run(groups, 2, time.monotonic() + 600, settings):
        if outcome.error:
            raise RuntimeError(f"kernels of {outcome.task.name} cannot be counted: {outcome.error}")
        found[outcome.task.name] = outcome.value
    return found


_BENCHMARKS = {"attention": benchmarks.ATTENTION, "linear": benchmarks.LINEAR}

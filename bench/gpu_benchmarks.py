"""What a GPU session times: attention where others' figures are published, linear attention, masked
heads, launches and plans. Each function here is run in a worker of ``gpu_pool.py``."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from fastgt import implementation, linear_attention, neighborhood_attention
from fastgt.bench import (
    attention,
    device_time,
    harness,
    launch,
    masked_heads,
    peer_paths,
    roofline,
    timing,
    tune,
)
from fastgt.bench import (
    linear_attention as linear,
)
from fastgt.testing import PROBLEMS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES: dict[str, Callable[..., harness.Case]] = {
    "attention": attention.case,
    "linear_attention": linear.case,
    "performer": linear.performer,
    "masked_heads": masked_heads.case,
}
PATHS = ("gather", "windows", "graphs")
PADDED = ("padded einsum", *peer_paths.LINEAR_ATTENTION)
GATES = tuple(f"{active} of 8" for active in (1, 2, 4, 6, 8))
PEERS = ("pyg", "pyg, compiled", "flex attention", *peer_paths.ATTENTION)
COMPILED = ("pyg, compiled", "flex attention")  # by torch.compile, a minute each
REHEARSED = {
    "attention": ("fastgt, windows", "pyg", "anemoi"),
    "linear_attention": ("padded einsum",),
    "performer": ("pyg, padded keys zeroed",),
    "masked_heads": ("1 of 8",),
}
# compile the same kernels as the problems, for the last one's graphs are dense, and are soon made
STAND_INS = ("power_law", "molecules", "complete")
# rows of a graph whose plans are compiled, and of one that they are measured on; in a rehearsal
TUNED_ROWS = {False: (2**10, 2**16), True: (16, 16)}


class Benchmark(NamedTuple):
    """A case of an operator, and who is timed beside the first."""

    operator: str
    problem: str
    dtype: torch.dtype
    heads: int
    width: int
    peers: tuple[str, ...]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operator}, {self.problem}, {self.heads} x {self.width}, {dtype}"


class Where(NamedTuple):
    """What a benchmark runs on; ``small``: in Triton's interpreter, on little."""

    device: str
    peer_path: str | None
    small: bool

    def run_by_triton(self) -> Any:
        """As it is on a GPU anyway."""
        return implementation("triton") if self.small else nullcontext()


def _attention(problem: str, dtype: torch.dtype, heads: int, width: int) -> Benchmark:
    peers = (*(f"fastgt, {path}" for path in PATHS), *PEERS)
    return Benchmark("attention", problem, dtype, heads, width, peers)


# with published figures first, as Fused3S and anemoi-core measured; then real graphs, carried
ATTENTION = (
    _attention("h_to_h", FP16, 16, 64),
    _attention("pattern", BF16, 8, 16),
    _attention("github", BF16, 1, 128),
    _attention("pascalvoc", BF16, 1, 128),
    _attention("molecules", BF16, 8, 16),
    _attention("igb_small", BF16, 1, 128),
    _attention("power_law", BF16, 8, 16),
    *(
        _attention(problem, BF16, 8, 16)
        for problem in ("zinc", "amazon_computers", "tolokers", "dd", "cora", "debian", "flights")
    ),
)
LINEAR = (
    Benchmark("linear_attention", linear.RAGGED, BF16, 8, 16, PADDED),
    Benchmark("masked_heads", "power_law", BF16, 8, 64, GATES),
    Benchmark("linear_attention", "igb_small", BF16, 8, 16, PADDED),
    Benchmark("linear_attention", "pascalvoc", BF16, 8, 16, PADDED),
    Benchmark("performer", linear.RAGGED, FP32, 4, 16, ("pyg", "pyg, padded keys zeroed")),
    Benchmark("linear_attention", linear.RAGGED, FP32, 8, 16, PADDED),
    Benchmark("masked_heads", "power_law", FP32, 8, 64, GATES),
)


def environment(where: Where, tell: Callable) -> list[dict[str, Any]]:
    """-> a row of what there is, and of what it can do at most."""
    device = torch.device(where.device)
    row: dict[str, Any] = harness.environment(device) | {
        "python": platform.python_version(),
        "numpy": harness.version("numpy"),
        "scipy": harness.version("scipy"),
        "cores": os.cpu_count(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row |= {
            "cuda": torch.version.cuda,
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    nbytes = 1 << (20 if where.small else 30)
    for dtype in (FP32,) if where.small else (BF16, FP32):
        rates = roofline.measured_rates(device, dtype, nbytes)
        name = str(dtype).removeprefix("torch.")
        row["copy_bytes_per_s"] = rates["copy_bytes_per_s"]
        row[f"matmul_{name}_flops_per_s"] = rates["matmul_flops_per_s"]
        tell(name)
    return [row]


def prepare(benchmark: Benchmark, provider: str, where: Where, tell: Callable) -> None:
    """Compile all that the provider needs, by its calls on stand-ins; nothing is verified yet.

    Raises:
        Exception: The provider's own, where it can do none of them.
    """
    _compile_alone()
    problems = ("tiny",) if where.small else STAND_INS
    failed: list[Exception] = []
    with where.run_by_triton():
        for problem in problems:
            tell(problem)
            case = _case(benchmark._replace(problem=problem), where)
            if provider not in case.providers:  # its source was not carried
                return
            try:
                _call(case, provider)
            except harness.FAILURES as error:
                failed.append(error)
    if len(failed) == len(problems):
        raise failed[-1]


def measure(
    benchmark: Benchmark, without: tuple[str, ...], where: Where, tell: Callable
) -> list[dict[str, Any]]:
    """-> rows of it; those who are left out have none. Tells its columns, then who comes next."""
    _compile_alone()
    with where.run_by_triton():
        case = _case(benchmark, where)
        repeats = 1 if where.small else 9
        columns = {"operator": benchmark.operator} | case.shape | {"repeats": repeats}
        tell(columns | harness.environment(case.device))
        only = [name for name in benchmark.peers if name not in without]
        rows = harness.compare(case, repeats=repeats, only=only, tell=tell)
    return [{"operator": benchmark.operator} | row for row in rows]


def _case(benchmark: Benchmark, where: Where) -> harness.Case:
    operator, problem, dtype, heads, width, _ = benchmark
    options: dict[str, Any] = {"heads": heads, "width": width, "dtype": dtype}
    options["device"] = where.device
    if operator in ("attention", "linear_attention") and where.peer_path is not None:
        options["peer_path"] = Path(where.peer_path)
    if operator == "attention":
        options["paths"] = PATHS
    return CASES[operator](problem, **options)


def _compile_alone() -> None:
    """Workers share the cores: none of them is to start a pool of compilers."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1


def kinds(chosen: Sequence[Benchmark]) -> list[Benchmark]:
    """One of all benchmarks that share their kernels."""
    found = {(x.operator, x.dtype, x.heads, x.width): x for x in reversed(chosen)}
    return list(found.values())[::-1]


def providers(benchmark: Benchmark) -> tuple[str, ...]:
    """The first and its peers, known without a problem."""
    return "no gate" if benchmark.operator == "masked_heads" else "fastgt", *benchmark.peers


def rehearsed(chosen: Sequence[Benchmark]) -> list[Benchmark]:
    """One of each operator, small, with peers that need no compiler."""
    small = []
    for operator in CASES:
        for benchmark in [x for x in chosen if x.operator == operator][:1]:
            heads = 8 if operator == "masked_heads" else 2
            peers = REHEARSED[operator]
            small.append(benchmark._replace(problem="tiny", heads=heads, width=8, peers=peers))
    return small


def trace(benchmark: Benchmark) -> None:
    """Call what is ours of a benchmark, on stand-ins and a CPU: for who counts kernels."""
    with implementation("triton"):
        for problem in STAND_INS:
            where = Where("cpu", None, False)
            case = _case(benchmark._replace(problem=problem), where)
            for name in providers(benchmark):
                if name.startswith("fastgt") or name in ("no gate", *GATES):
                    with suppress(ValueError):  # a path that does not fit the graph
                        _call(case, name)


def trace_launches() -> None:
    """Likewise of :func:`launches`."""
    for call in launch.calls(PROBLEMS["tiny"].load()).values():
        call()


def _call(case: harness.Case, name: str) -> None:
    """As it will be timed: without gradients, and with them."""
    provider = case.providers[name]()
    harness.forward(provider, case)()
    harness.step(provider, case)()


def launches(where: Where, tell: Callable) -> list[dict[str, Any]]:
    """-> a row a call: what it costs the host, on a batch of molecules."""
    graph = PROBLEMS["tiny" if where.small else "molecules"].load().to(where.device)
    device = torch.device(where.device)
    calls = launch.calls(graph)
    often = {"repeats": 1, "rounds": 1} if where.small else {}
    rows = []
    for name, microseconds in launch.measure(calls, **often).items():
        row = {"call": name, "microseconds": microseconds} | harness.environment(device)
        rows.append(row | {"target": row["device"]})
    if device.type == "cuda":
        for row in rows:
            row |= device_time.measure("call", calls[row["call"]], device)
    return rows


def captured(operator: str, where: Where, tell: Callable) -> list[dict[str, Any]]:
    """-> a row: whether a CUDA graph of forward and backward, replayed with new numbers in its
    inputs, gives the bits of an eager call; microseconds of a replay."""
    device = torch.device(where.device)
    call = f"forward and backward of {operator}, captured"
    row: dict[str, Any] = {"call": call} | harness.environment(device)
    if device.type != "cuda":
        return [row | {"match": None, "error": f"a CUDA graph needs a GPU, got {device}"}]
    graph = PROBLEMS["molecules"].load().to(device).plan("gather")
    offsets = graph.graph_ptr

    def both(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        if operator == "attention":
            out = neighborhood_attention(q, k, v, graph)
        else:
            out = linear_attention(q, k, v, offsets)
        return [out, *torch.autograd.grad(out, (q, k, v), out.detach())]

    inputs = [torch.randn(graph.num_rows, 8, 16, device=device).requires_grad_() for _ in range(3)]
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            both(*inputs)
    torch.cuda.current_stream(device).wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        replayed = both(*inputs)
    with torch.no_grad():
        for x in inputs:
            x.normal_()
    expected = both(*inputs)
    recorded.replay()
    row["match"] = all(map(torch.equal, replayed, expected))
    if not row["match"]:
        row["error"] = "a replay differs from an eager call on the same inputs"
    clock = device_time.clock(device)
    times = [clock(lambda mark: recorded.replay())[-1] for _ in range(9)]
    return [row | {"replay_s": statistics.median(times)}]


def tuned(small: bool) -> list[tuple[str, Callable[..., list[dict]], tuple]]:
    """A name, a function of this module and its first arguments: plans first, then tiles."""
    dtypes = tune.DTYPES[:1] if small else tune.DTYPES
    widths = tune.WIDTHS[:1] if small else tune.WIDTHS
    shapes = [(dtype, width) for dtype in dtypes for width in widths]
    made: list[tuple[str, Callable[..., list[dict]], tuple]] = []
    for dtype, width in shapes:
        made.append((f"plan, {str(dtype).removeprefix('torch.')}, {width}", plan, (dtype, width)))
    for dtype, width in shapes:
        for path in tune.PATHS[1:] if small else tune.PATHS:
            name = f"tiles, {path}, {str(dtype).removeprefix('torch.')}, {width}"
            made.append((name, tiles, (path, dtype, width)))
    return made


def plan(dtype: torch.dtype, width: int, rows: int, where: Where, tell: Callable) -> list[dict]:
    """-> the row of the plan table; of so many rows of a graph."""
    few: dict[str, Any] = {}
    if where.small:
        few = {"densities": tune.DENSITIES[::9], "heads_by_width": 16, "repeats": 1}
    with where.run_by_triton():
        return [tune.plan(dtype, width, torch.device(where.device), rows=rows, **few)]


def tiles(
    path: str, dtype: torch.dtype, width: int, rows: int, where: Where, tell: Callable
) -> list[dict]:
    """-> a row a tile."""
    few: dict[str, Any] = {}
    if where.small:
        few = {"changes": tune.CHANGES[:2], "heads_by_width": 16, "repeats": 1}
    with where.run_by_triton():
        return tune.time_tiles(path, dtype, width, torch.device(where.device), rows=rows, **few)


def trace_tuned(function: Callable[..., list[dict]], args: tuple) -> None:
    """Call what one of :func:`tuned` compiles, on a CPU: for who counts kernels."""
    how: dict[str, Any] = {"rows": TUNED_ROWS[False][0]}
    if function is plan:
        how["densities"] = (3.5,)  # others take the same kernels
    called = tune.plan if function is plan else tune.time_tiles
    with implementation("triton"), mock.patch.object(timing, "measure", _called_once):
        called(*args, torch.device("cpu"), **how)


def _called_once(calls: dict[str, Callable], *args: Any, **how: Any) -> dict[str, list[float]]:
    for call in calls.values():
        call()
    return {name: [1.0] for name in calls}

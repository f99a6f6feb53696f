"""Tables that are measured on a GPU: from which density on windows beat gathering, and tiles.

``fastgt bench --tune --device cuda`` times forward and backward of both paths on random graphs
whose windows share more and more columns, for every dtype and head width, and writes what it found
for the device's architecture beside the rows that are in ``data/plans.json``. Then it times, on one
such graph, smaller and larger tiles of either path beside those that ``kernels/configs.py`` has,
and writes all to ``bench/results/tiles-DEVICE.json``: who changes that file says from where.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastgt import Graph, neighborhood_attention, plans, reference, tiles
from fastgt.bench import harness, timing
from fastgt.files import lock, write
from fastgt.ops.implementation import Impl
from fastgt.terminal import wrapped

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (16, 32, 64, 128)
DENSITIES = (1.2, 1.4, 1.7, 2.0, 2.4, 2.8, 3.5, 5.0, 7.0, 10.0, 14.0)
DEGREE = 16
PATHS = ("gather", "windows")
# of a tile's rows or columns, warps and loads ahead; none first
CHANGES: tuple[dict[str, float], ...] = (
    {},
    {"block_r": 0.5, "block_n": 0.5},
    {"block_r": 2, "block_n": 2},
    {"num_warps": 0.5},
    {"num_warps": 2},
    {"block_r": 2, "block_n": 2, "num_warps": 2},
    {"num_stages": 2},
)


def graph_of_density(rho: float, rows: int, device: torch.device | str = "cpu") -> Graph:
    """16 edges a row, every 64 rows among as few columns as give about that rho64."""
    generator = torch.Generator().manual_seed(0)
    # so many columns that 64 rows, each with its own 16 of them, meet 64 * 16 / rho
    pool = DEGREE
    while pool * (1 - (1 - DEGREE / pool) ** 64) < 64 * DEGREE / rho:
        pool += 1
    window = torch.arange(rows).repeat_interleave(DEGREE) // 64
    # columns of a window lie apart, as they do in a graph: no help from neighbouring addresses
    stride = 7919
    draw = torch.rand(rows, pool, generator=generator).topk(DEGREE, 1).indices.flatten()
    col = (window * 64 + draw * stride) % rows
    ptr = torch.arange(0, rows * DEGREE + 1, DEGREE)
    return Graph.from_csr(ptr, col).to(device)


def threshold(ratios: list[tuple[float, float]]) -> float | None:
    """Of (rho64, time of gathering / time of windows): the rho from which windows win on."""
    best = None
    for rho, ratio in sorted(ratios, reverse=True):
        if ratio <= 1:
            break
        best = rho
    return best


def tune(device: torch.device, *, heads_by_width: int = 128, rows: int = 2**16) -> list[dict]:
    """-> rows for the plan table, one a dtype and width."""
    how: dict[str, Any] = {"heads_by_width": heads_by_width, "rows": rows}
    return [plan(dtype, width, device, **how) for dtype in DTYPES for width in WIDTHS]


def plan(
    dtype: torch.dtype,
    width: int,
    device: torch.device,
    *,
    heads_by_width: int = 128,
    rows: int = 2**16,
    densities: Sequence[float] = DENSITIES,
    repeats: int = 9,
) -> dict[str, Any]:
    """-> a row for the plan table."""
    heads = max(1, heads_by_width // width)
    graphs = [_graph(rho, rows, device) for rho in densities]
    ratios = [_ratio(graph, heads, width, dtype, device, repeats) for graph in graphs]
    found = {
        "op": "attention",
        "capability": plans.capability(device),
        "dtype": str(dtype).removeprefix("torch."),
        "width": width,
        "rho64": threshold(ratios),
        "source": f"measured on {harness.environment(device)['device']}, "
        f"{date.today().isoformat()}",
    }
    shown = " ".join(f"{rho:.1f}:{ratio:.2f}" for rho, ratio in ratios)
    print(wrapped(f"{found['dtype']} {width}: from {found['rho64']} on   ({shown})"))
    return found


@functools.cache
def _graph(rho: float, rows: int, device: torch.device) -> Graph:
    return graph_of_density(rho, rows, device)


def _ratio(
    graph: Graph, heads: int, width: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    shape = 4, graph.num_rows, heads, width
    q, k, v, do = torch.randn(shape, generator=generator).to(device, dtype)

    def both(planned: Graph) -> timing.Call:
        def fn() -> tuple[Tensor, ...]:
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(neighborhood_attention(*inputs, planned), inputs, do)

        return fn

    height = plans.tallest(width, dtype.itemsize)
    calls = {
        "gather": both(graph.plan("gather")),
        "windows": both(graph.plan("windows", height=height)),
    }
    times = timing.measure(calls, device, repeats=repeats)
    rho = tiles.density(graph.row_ptr, graph.col, graph.num_cols)
    return round(rho, 2), timing.ratio(times["gather"], times["windows"])


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """The table with the rows of the new ones' device replaced."""
    replaced = {(row["op"], row["capability"]) for row in new}
    return [row for row in old if (row["op"], row["capability"]) not in replaced] + new


def write_plans(path: Path, table: list[dict]) -> None:
    """The table of plans, a line a row."""
    write(path, ("[\n" + ",\n".join(" " + json.dumps(row) for row in table) + "\n]\n").encode())


def tune_tiles(
    device: torch.device, *, heads_by_width: int = 128, rows: int = 2**16, impl: Impl | None = None
) -> list[dict]:
    """-> a row a tile: seconds, and as many times those of the tile that is there; the first of a
    path, dtype and width is that one. Tiles that do not compile or err have a reason."""
    how: dict[str, Any] = {"heads_by_width": heads_by_width, "rows": rows, "impl": impl}
    return [
        row
        for dtype in DTYPES
        for width in WIDTHS
        for path in PATHS
        for row in time_tiles(path, dtype, width, device, **how)
    ]


def time_tiles(
    path: str,
    dtype: torch.dtype,
    width: int,
    device: torch.device,
    *,
    heads_by_width: int = 128,
    rows: int = 2**16,
    impl: Impl | None = None,
    changes: Sequence[dict[str, float]] | None = None,
    repeats: int = 5,
) -> list[dict]:
    """-> the rows of one path, dtype and width; ``changes``: CHANGES, if not others."""
    heads = max(1, heads_by_width // width)
    graph = _graph(3.5, rows, device)
    timed = _time_tiles(path, graph, heads, width, dtype, impl, changes or CHANGES, repeats)
    best = min(timed, key=lambda row: row.get("x", math.inf))
    print(wrapped(f"{path}, {best['dtype']} {width}: {best['change']}, {best.get('x')}x"))
    return timed


def _time_tiles(
    path: str,
    graph: Graph,
    heads: int,
    width: int,
    dtype: torch.dtype,
    impl: Impl | None,
    changes: Sequence[dict[str, float]],
    repeats: int,
) -> list[dict]:
    how = {} if path == "gather" else {"height": plans.tallest(width, dtype.itemsize)}
    planned = graph.plan(path, **how)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    shape = 4, graph.num_rows, heads, width
    inputs = torch.randn(shape, generator=generator).to(graph.device, dtype)
    ours = functools.partial(neighborhood_attention, graph=planned, impl=impl)
    definition = functools.partial(reference.neighborhood_attention, graph=graph)
    truth = [_gradients(definition, *x) for x in (inputs, inputs.double())]
    rows, calls = [], {}
    for change in changes:
        row = {
            "path": path,
            "dtype": str(dtype).removeprefix("torch."),
            "heads": heads,
            "width": width,
            "change": change,
        }
        rows.append(row)
        call = _with_tiles(path, change, functools.partial(_gradients, ours, *inputs))
        try:
            row |= harness.verdict(["output", "q", "k", "v"], call(), *truth)
        except Exception as error:  # more shared memory than a processor has, and the like
            row |= {"match": None, "error": harness.reason(error)}
        if row["match"]:
            calls[str(change)] = call
    times = timing.measure(calls, graph.device, repeats=repeats)
    for row in rows:
        mine, usual = times.get(str(row["change"])), times.get("{}")
        if mine is not None:
            row["both_s"] = statistics.median(mine)
        if mine is not None and usual is not None:
            row["x"] = timing.ratio(mine, usual)
    return [row | harness.environment(graph.device) for row in rows]


def _gradients(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, do: Tensor
) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, do)


def _with_tiles(path: str, change: dict[str, float], call: timing.Call) -> timing.Call:
    """The call, forward and backward, with tiles so many times those that it would take."""
    from fastgt.kernels import attention, attention_windows

    module, name = (
        (attention, "attention_tile") if path == "gather" else (attention_windows, "window_tile")
    )
    usual = getattr(module, name)

    def tile(*args: Any) -> Any:
        it = usual(*args)
        least = {"block_n": 16}  # a product takes no fewer
        sizes = {
            field: max(least.get(field, 1), int(getattr(it, field) * factor))
            for field, factor in change.items()
            if hasattr(it, field)
        }
        return it._replace(**sizes)

    def changed() -> Any:
        with mock.patch.object(module, name, tile):
            return call()

    return changed


def run(name: str, tiles_file: Path | None = None, path: Path | None = None) -> None:
    """Measure on the device of that name, and write the table: the package's own, or ``path``;
    and seconds of other tiles to ``tiles_file``, if there is one.

    Raises:
        RuntimeError: It is no GPU, or there is none of that name.
    """
    device = torch.device(name)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise RuntimeError(f"--device {name}: tuning needs a GPU, and there is none of that name")
    path = path or Path(str(files("fastgt.data") / "plans.json"))
    with lock(path):
        old = json.loads(path.read_text()) if path.exists() else []
        write_plans(path, merged(old, tune(device)))
    print(path)
    if tiles_file is not None:
        write(tiles_file, (json.dumps(tune_tiles(device), indent=1) + "\n").encode())
        print(tiles_file)

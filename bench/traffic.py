"""Bytes that attention has to move through a graph, and the time that a GPU needs for them.

``python -m fastgt.bench.traffic`` runs no kernel: it follows the walks that kernels take through
``fastgt.tiles`` and counts

- what is read or written once, whatever the order: q, o, lse, gradients, indices, tables;
- what is gathered: a row of k and v for every edge (windows: for every entry, by each head), of q,
  do, lse, w and gamma in the pass over columns. Whole rows, not sectors; all of it comes from L2;
- what of that misses L2: an exact LRU cache of rows, fed in the order of the walk, one row after
  another, all heads of a window at once. The whole cache is theirs;
- products on tensor cores and exponentials, of tiles as they are padded.

A kernel's time is the largest of bytes over L2's bandwidth, missed and single bytes over memory's,
products and exponentials over their rates. No latency, no launch (a few microseconds each), no
other arithmetic, of which windows of narrow heads have much: a bound that kernels are measured
against, not a forecast.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgt import Graph, files, tiles
from fastgt.bench.device_model import DEVICES, Device, Kernel, Visits
from fastgt.options import one_of
from fastgt.plans import Plan
from fastgt.terminal import STDOUT, text_on_stderr, wrapped

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = ((8, 16), (1, 128))  # heads, width
COMMITTED = ("pattern", "zinc", "superpixels", "debian", "moby", "rmat")
# products of wider types against those of 16 bits: three of TF32 at half the rate; float64
_RATE = {2: 1.0, 4: 1 / 6, 8: 1 / 16}


class _Bytes(NamedTuple):
    """Of one node's row, all heads; of an index; of an edge's bias."""

    q: int
    o: int
    k: int
    v: int
    stat: int  # a number in the accumulator's precision for each head
    number: int
    bias: int


def attention_traffic(
    graph: Graph,
    plan: Plan,
    *,
    heads: int,
    width: int,
    dtype: torch.dtype,
    kv_heads: int | None = None,
    v_width: int | None = None,
    bias: bool = False,
) -> list[Kernel]:
    """The kernels of a forward and a backward, in the order in which they run."""
    kv_heads, v_width = kv_heads or heads, v_width or width
    item, wide = dtype.itemsize, 8 if dtype == torch.float64 else 4
    size = _Bytes(
        heads * width * item,
        heads * v_width * item,
        kv_heads * width * item,
        kv_heads * v_width * item,
        heads * wide,
        graph.col.element_size(),
        heads * item if bias else 0,
    )
    if plan.path == "gather":
        # sums of segments are kept in the accumulator's precision
        return _gather(graph, plan, size, wide // item, graph.num_edges * heads)
    return _windows(graph, plan, size, (heads, width, v_width), item)


def _gather(graph: Graph, plan: Plan, size: _Bytes, widened: int, logits: int) -> list[Kernel]:
    n, m, edges = graph.num_rows, graph.num_cols, graph.num_edges
    q, o, k, v, stat, index, bias = size
    edge = index + bias if bias else 0  # its number and its bias

    visits, tables, parts, split = _gathered(graph.row_walk(plan), index)
    sums = parts * (widened * o + 2 * stat)
    found = [
        Kernel(
            "fwd",
            n * q + (n - split) * (o + stat) + sums + tables + edges * edge,
            edges * (k + v),
            row=k + v,
            visits=visits,
            exponentials=2 * logits,
        )
    ]
    if parts:
        found.append(Kernel("fwd combine", sums + split * (o + stat + 3 * index)))
    sums = parts * (2 * widened * q + 2 * stat)
    finished = q + 2 * stat  # dq, w and gamma
    found.append(
        Kernel(
            "bwd dq",
            n * (q + o + stat) + (n - split) * finished + sums + tables + edges * edge,
            edges * (k + v),
            row=k + v,
            visits=visits,
            exponentials=logits,
        )
    )
    if parts:
        found.append(Kernel("bwd dq combine", sums + split * (stat + finished + 3 * index)))
    visits, tables, parts, split = _gathered(graph.column_walk(plan)[:7], index)
    sums = parts * widened * (k + v)
    row = q + o + 3 * stat
    once = (2 * m - split) * (k + v) + sums + tables + edges * (edge + bias)
    found.append(Kernel("bwd dkv", once, edges * row, 0, row, visits, logits))
    if parts:
        found.append(Kernel("bwd dkv combine", sums + split * (k + v + 3 * index)))
    return found


def _gathered(walk: Sequence[Tensor], index: int) -> tuple[Visits, int, int, int]:
    """-> visits, bytes of the tables, segments, rows that are split into them."""
    ptr, other, _, *tables = walk
    held = index * (ptr.numel() + other.numel())
    if not tables:
        return Visits(other), held, 0, 0
    few, middle, segment, split = (x[: -tiles.FILLERS].long() for x in tables)
    whole = torch.cat([middle, few])
    begin = torch.cat([segment[:, 1], ptr[whole].long()])
    end = torch.cat([segment[:, 2], ptr[whole + 1].long()])
    held += index * (whole.numel() + segment.numel())
    return Visits(other[_ranges(begin, end)]), held, segment.shape[0], split.shape[0]


def _windows(
    graph: Graph, plan: Plan, size: _Bytes, shape: tuple[int, int, int], item: int
) -> list[Kernel]:
    from fastgt.kernels.configs import power_of_2, window_tile

    heads, width, v_width = shape
    n, m, edges = graph.num_rows, graph.num_cols, graph.num_edges
    q, o, k, v, stat, index, bias = size
    d, dv = (max(16, power_of_2(x)) for x in (width, v_width))
    found = []
    for name, once, tiles_of, products, columns in (
        ("fwd", n * (q + o + stat), "fwd", d + dv, False),
        ("bwd dq", n * (2 * q + 2 * o + 3 * stat), "bwd", 3 * d + dv, False),
        ("bwd dkv", m * 2 * (k + v), "bwd", 2 * (d + dv), True),
    ):
        walk = graph.column_walk(plan) if columns else graph.row_walk(plan)[3:]
        window, entry = walk[0].long(), walk[1]
        begin, end = window[:, 2], window[:, 3]
        entries = int((end - begin).sum())
        block_n = window_tile(tiles_of, max(d, dv), item, bias > 0).block_n
        steps = int((end - begin + (block_n - 1)).div(block_n, rounding_mode="floor").sum())
        logits = heads * plan.height * steps * block_n
        tables = window.numel() * index + entries * (8 + (0 if plan.path == "graphs" else index))
        if bias:
            tables += (entries + edges) * index
            once += edges * bias * (2 if columns else 1)
        row = q + o + 3 * stat if columns else k + v
        # a program has one head: k and v come once for each query head
        asked = row if columns else heads * (width + v_width) * item
        found.append(
            Kernel(
                name,
                once + tables,
                entries * asked,
                (heads - 1) * tables,
                row,
                Visits(entry[_ranges(begin, end)]),
                logits,
                2 * logits * products,
                _RATE[item],
            )
        )
    return found


def _ranges(begin: Tensor, end: Tensor) -> Tensor:
    """The numbers of ``begin[i]:end[i]``, one range after another."""
    size = end - begin
    shift = begin - (size.cumsum(0) - size)
    return torch.arange(int(size.sum())) + shift.repeat_interleave(size)


def designed(graph: Graph, heads: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by the formulas that the kernels were designed with: N (8D + 4H + 4) + 4E at least,
    gathers of 4ED forward and 8ED backward, in 16 bits with D = heads x width."""
    channels, item = heads * width, dtype.itemsize
    nodes = graph.num_rows * (2 * channels * item + 4 * heads + 4)
    nodes += graph.num_cols * 2 * channels * item
    return {
        "compulsory_forward": nodes + 4 * graph.num_edges,
        "gathers_forward": 2 * item * graph.num_edges * channels,
        "gathers_backward": 4 * item * graph.num_edges * channels,
    }


def predicted(
    graph: Graph, name: str, *, heads: int, width: int, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds on the device of that name for a row of results; empty if it is not known."""
    device = next((d for d in DEVICES.values() if d.match in name), None)
    if device is None:
        return {}
    plan = graph.plan_for(width, dtype)
    kernels = attention_traffic(graph.to("cpu"), plan, heads=heads, width=width, dtype=dtype)
    forward = sum(k.seconds(device) for k in kernels if k.name.startswith("fwd"))
    both = sum(k.seconds(device) for k in kernels)
    return {"predicted_forward_s": forward, "predicted_both_s": both}


def measure(
    problem: str,
    graph: Graph,
    path: str,
    *,
    heads: int,
    width: int,
    dtype: torch.dtype,
    devices: Sequence[str] = tuple(DEVICES),
) -> dict[str, Any]:
    """-> one row of results: the graph, the plan, its kernels' bytes, seconds, and ratios."""
    planned = graph.plan(path, width=width, dtype=dtype)  # type: ignore[arg-type]
    plan = planned.plan_for(width, dtype)
    kernels = attention_traffic(planned, plan, heads=heads, width=width, dtype=dtype)
    by_pass = {
        "forward": [k for k in kernels if k.name.startswith("fwd")],
        "backward": [k for k in kernels if k.name.startswith("bwd")],
    }
    design = designed(graph, heads, width, dtype)
    model = {
        "compulsory_forward": by_pass["forward"][0].compulsory,
        "gathers_forward": sum(k.gathered for k in by_pass["forward"]),
        "gathers_backward": sum(k.gathered for k in by_pass["backward"]),
    }
    return {
        "problem": problem,
        "rows": graph.num_rows,
        "edges": graph.num_edges,
        "rho16": round(tiles.density(graph.row_ptr, graph.col, graph.num_cols, 16), 3),
        "rho64": round(tiles.density(graph.row_ptr, graph.col, graph.num_cols, 64), 3),
        "heads": heads,
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "path": path,
        "plan": str(plan),
        "design_bytes": design,
        "ratio_to_design": {key: round(model[key] / max(1, design[key]), 4) for key in design},
        "kernels": [
            {
                "kernel": k.name,
                "once_bytes": k.once,
                "gathered_bytes": k.gathered,
                "again_bytes": k.again,
                "compulsory_bytes": k.compulsory,
                "tensor_core_flops": k.flops,
                "exponentials": k.exponentials,
                "miss_share": {
                    d: round(k.missed(DEVICES[d]) / max(1, k.gathered), 4) for d in devices
                },
                "predicted_ms": {d: round(k.seconds(DEVICES[d]) * 1e3, 6) for d in devices},
                "limit": {d: _limit(k, DEVICES[d]) for d in devices},
            }
            for k in kernels
        ],
        "predicted_ms": {
            d: {
                part: round(sum(k.seconds(DEVICES[d]) for k in some) * 1e3, 6)
                for part, some in by_pass.items()
            }
            for d in devices
        },
    }


def _limit(kernel: Kernel, device: Device) -> str:
    limits = kernel.limits(device)
    return max(limits, key=lambda part: limits[part])


def show(row: dict[str, Any]) -> str:
    """One row of results as a table for a terminal; times in ms, with what limits them."""
    devices = list(row["predicted_ms"])
    ratio = row["ratio_to_design"]
    lines = [
        wrapped(
            f"{row['problem']}: N={row['rows']} E={row['edges']} rho16 {row['rho16']:.2f} "
            f"rho64 {row['rho64']:.2f}, H={row['heads']} D={row['width']} {row['dtype']}, "
            f"{row['path']} -> {row['plan']}"
        ),
        f"  {'':16} {'once MB':>9} {'gathered':>9} {'again':>9} {'GFLOP':>8} {'miss':>6}",
    ]
    for k in row["kernels"]:
        sizes = (k[f"{name}_bytes"] / 1e6 for name in ("once", "gathered", "again"))
        lines.append(
            f"  {k['kernel']:16}"
            + "".join(f" {size:9.3f}" for size in sizes)
            + f" {k['tensor_core_flops'] / 1e9:8.2f} {k['miss_share'][devices[0]]:6.1%}"
        )
    lines.append(f"  {'':16}" + "".join(f" {name + ' ms':>17}" for name in devices))
    for k in row["kernels"]:
        times = (f" {k['predicted_ms'][d]:10.5f} {k['limit'][d]:6}" for d in devices)
        lines.append(f"  {k['kernel']:16}{''.join(times)}".rstrip())
    lines.append(
        wrapped(
            f"  of the design's formula: compulsory forward {ratio['compulsory_forward']:.3f}, "
            f"gathers forward {ratio['gathers_forward']:.3f}, backward "
            f"{ratio['gathers_backward']:.3f}"
        )
    )
    return "\n".join(lines)


def arguments(parser: argparse.ArgumentParser) -> None:
    from fastgt.testing import PROBLEMS

    several = "may be given more than once; default: "
    parser.add_argument(
        "--problem",
        type=one_of("problem", PROBLEMS),
        action="append",
        metavar="NAME",
        help=several + ", ".join(COMMITTED),
    )
    parser.add_argument("--heads", type=int, action="append", help=several + "8 and 1")
    parser.add_argument("--width", type=int, action="append", help="one for each --heads")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--path",
        choices=["auto", "gather", "windows", "graphs"],
        action="append",
        help=several + "gather, auto, and windows where auto gathers though rho64 > 1.4",
    )
    parser.add_argument(
        "--device", choices=DEVICES, action="append", help=several + "all; misses are the first's"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the rows to this file; -: to stdout"
    )


def run(args: argparse.Namespace) -> int:
    from fastgt.testing import PROBLEMS

    if len(args.heads or ()) != len(args.width or ()):
        raise ValueError("--width must be given as often as --heads")
    shapes = list(zip(args.heads, args.width, strict=True)) if args.heads else SHAPES
    devices = args.device or list(DEVICES)
    dtype = DTYPES[args.dtype]
    rows = []
    for problem in args.problem or COMMITTED:
        graph = PROBLEMS[problem].load()
        for heads, width in shapes:
            chosen = graph.plan("auto", width=width, dtype=dtype)
            paths = args.path or ["gather", "auto"]
            gathers = chosen.plan_for(width, dtype).path == "gather"
            dense = tiles.density(graph.row_ptr, graph.col, graph.num_cols) > 1.4
            if not args.path and gathers and dense:
                paths.append("windows")
            for path in paths:
                row = measure(
                    problem, graph, path, heads=heads, width=width, dtype=dtype, devices=devices
                )
                with text_on_stderr(args.json == STDOUT):
                    print(show(row), end="\n\n", flush=True)
                rows.append(row)
    text = "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"
    if args.json == STDOUT:
        print(text, end="")
    elif args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        files.write(args.json, text.encode())
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments(parser)
    try:
        run(parser.parse_args())
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

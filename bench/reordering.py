"""What an order of the nodes costs, and what it gains.

``python -m fastgt.bench.reordering`` renumbers each problem by each method, verifies that attention
gives the same output and gradients after :meth:`fastgt.Graph.undo_order`, then times forward and
backward on node tensors that are in the graph's order already, in turns. rho16 and rho64 are the
edges per distinct column of a window of 16 and 64 consecutive rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgt import Graph, files, neighborhood_attention
from fastgt.bench import harness, timing
from fastgt.testing import PROBLEMS, assert_as_accurate
from fastgt.tiles import density

METHODS = ("degree", "rcm", "metis", "louvain")


def run(
    problem: str,
    methods: tuple[str, ...] = METHODS,
    *,
    heads: int = 8,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    repeats: int = 9,
) -> list[dict[str, Any]]:
    """-> one row an order, "as loaded" first: its cost, rho, seconds and their ratio to that."""
    device = torch.device(device)
    graph = PROBLEMS[problem].load().to(device)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(graph.num_nodes, heads, width, generator=generator).to(device, dtype)
        for _ in range(4)
    ]
    shape = {
        "problem": problem,
        "rows": graph.num_rows,
        "edges": graph.num_edges,
        "heads": heads,
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
    }
    oracle = _attend(graph, [x.double() for x in inputs])
    plain = _attend(graph, inputs)
    calls, rows = {}, []
    pair = Graph.from_edge_index(torch.tensor([[0], [1]]))
    for method in ("as loaded", *methods):
        moved, row = graph, {"node_order": method, "reorder_s": 0.0}
        if method != "as loaded":
            try:
                pair.reordered(method)  # importing the package is no part of the cost
            except ImportError as error:
                rows.append(shape | {"node_order": method, "match": None, "error": str(error)})
                continue
            begin = time.perf_counter()
            moved = graph.reordered(method)
            row["reorder_s"] = time.perf_counter() - begin
        for height in (16, 64):
            row[f"rho{height}"] = density(moved.row_ptr, moved.col, graph.num_cols, height)
        own = [moved.apply_order(x) for x in inputs]
        row |= _verdict([moved.undo_order(x) for x in _attend(moved, own)], plain, oracle)
        if row["match"]:
            calls[method] = lambda moved=moved, own=own: _attend(moved, own)
        rows.append(shape | row)
    seconds = timing.measure(calls, device, repeats=repeats)
    for row in rows:
        if row["match"]:
            times = seconds[row["node_order"]]
            row["both_s"] = statistics.median(times)
            row["both_x"] = timing.ratio(times, seconds["as loaded"])
    return [row | harness.environment(device) for row in rows]


def _attend(graph: Graph, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """-> the output and the gradients of q, k and v; ``inputs`` are q, k, v and do."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = neighborhood_attention(q, k, v, graph)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])


def _verdict(
    found: list[Tensor], plain: tuple[Tensor, ...], oracle: tuple[Tensor, ...]
) -> dict[str, Any]:
    try:
        for name, *tensors in zip(("o", "dq", "dk", "dv"), found, plain, oracle, strict=True):
            assert_as_accurate(*tensors, name, factor=2.0 if name == "o" else 3.0)
    except AssertionError as error:
        return {"match": False, "error": str(error)}
    return {"match": True}


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for a terminal."""
    lines = [f"{'order':10} {'match':5} {'cost':>9} {'rho16':>7} {'rho64':>7} {'fwd+bwd':>20}"]
    for row in rows:
        if not row["match"]:
            lines.append(
                f"{row['node_order']:10} {row['match']!s:5} {row['error'].splitlines()[0]}"
            )
            continue
        lines.append(
            f"{row['node_order']:10} {'yes':5} {row['reorder_s']:7.2f} s "
            f"{row['rho16']:7.2f} {row['rho64']:7.2f} "
            f"{row['both_s'] * 1e3:9.1f} ms {row['both_x']:6.2f}x"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--problem",
        choices=PROBLEMS,
        action="append",
        help="may be given more than once; real graphs other than debian are files in the folder "
        "that FASTGT_DATA names",
    )
    parser.add_argument(
        "--method", choices=METHODS, action="append", help="may be given more than once"
    )
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for problem in args.problem or [next(iter(PROBLEMS))]:
        try:
            rows = run(
                problem,
                tuple(args.method or METHODS),
                heads=args.heads,
                width=args.width,
                device=args.device,
                repeats=args.repeats,
            )
        except FileNotFoundError as error:
            parser.error(f"--problem {problem}: {error}")
        print(f"\n{problem}: {rows[0]['rows']} rows, {rows[0]['edges']} edges")
        print(show(rows))
        found += rows
        if args.json:
            files.write(args.json, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

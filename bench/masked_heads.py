"""Attention with its projections where some of the heads are masked: what it saves.

``python -m fastgt.bench.masked_heads`` runs NeighborhoodAttention with all heads and with a
HeadGate that leaves some of them, here and there. What the masked ones give is verified against
the float64 definition of a module that has only the others; then forward (without gradients) and
forward+backward (gradients of x and the parameters) are timed in turns, as shares of the time
without a gate, and the peak memory of each.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgt import Graph, implementation, prune_heads
from fastgt.bench import harness
from fastgt.bench.attention import DTYPES
from fastgt.nn import HeadGate, NeighborhoodAttention
from fastgt.testing import random_edge_index


def run(
    *,
    nodes: int = 20_000,
    edges: int = 300_000,
    heads: int = 8,
    width: int = 64,
    active: tuple[int, ...] = (1, 2, 4, 6, 8),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    repeats: int = 9,
) -> list[dict[str, Any]]:
    """-> one row a number of active heads, "no gate" first: seconds, shares, peak extra bytes."""
    device = torch.device(device)
    index = random_edge_index(0, nodes, edges, kind="power_law").to(device)
    graph = Graph.from_edge_index(index, nodes)
    graph.columns  # noqa: B018  built once for a graph, not at every call
    torch.manual_seed(0)
    full = NeighborhoodAttention(heads * width, heads).to(device, dtype)
    x, do = (torch.randn(nodes, heads * width).to(device, dtype) for _ in range(2))
    order = torch.randperm(heads, generator=torch.Generator().manual_seed(0))
    modules: dict[str, nn.Module] = {"no gate": full}
    for count in active:
        mask = torch.zeros(heads).index_fill(0, order[:count], 1)
        module = copy.deepcopy(full)
        module.head_gate = HeadGate(mask).to(device)
        modules[f"{count} of {heads}"] = module
    shape = {
        "problem": "power_law",
        "rows": nodes,
        "edges": edges,
        "heads": heads,
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "node_order": "as drawn",
    }
    rows: list[dict[str, Any]] = []
    forward, both = {}, {}
    for name, module in modules.items():
        # as if the masked heads had never been there
        removed = prune_heads(module)
        with implementation("reference"):
            eager = _gradients(removed, graph, x, do)()
            wide = _gradients(removed.double(), graph, x.double(), do.double())()
        backward = _gradients(module, graph, x, do)
        found = backward()
        row = {"active": name, **harness.verdict(["output", "x"], found[:2], eager[:2], wide[:2])}
        rows.append(row)
        if row["match"]:
            forward[name] = torch.no_grad()(lambda module=module: module(x, graph))
            both[name] = backward
    for part, calls in (("forward", forward), ("both", both)):
        seconds = harness.measure(calls, device, repeats=repeats)
        for row in rows:
            if row["match"]:
                name = row["active"]
                row[f"{part}_s"] = statistics.median(seconds[name])
                row[f"{part}_spread"] = harness.spread(seconds[name])
                row[f"{part}_share"] = harness.ratio(seconds[name], seconds["no gate"])
                row[f"{part}_peak_bytes"] = harness.peak_extra_memory(calls[name], device)
    return [shape | row | harness.environment(device) for row in rows]


def _gradients(
    module: nn.Module, graph: Graph, x: Tensor, do: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    def both() -> tuple[Tensor, ...]:
        leaf = x.detach().requires_grad_()
        out = module(leaf, graph)
        return out.detach(), *torch.autograd.grad(out, [leaf, *module.parameters()], do)

    return both


def show(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'active heads':>12} {'forward':>17} {'forward+backward':>19} {'peak MB':>15}"]
    for row in rows:
        if not row["match"]:
            lines.append(f"{row['active']:>12} MISMATCH: {row['error'].splitlines()[0]}")
            continue
        cells = [f"{row['active']:>12}"]
        for part, room in (("forward", 7), ("both", 9)):
            ms, share = row[f"{part}_s"] * 1e3, row[f"{part}_share"]
            cells.append(f"{ms:>{room}.0f} ms ({share:.3f})")
        peaks = (f"{row[f'{part}_peak_bytes'] / 1e6:.0f}" for part in ("forward", "both"))
        lines.append(" ".join([*cells, f"{' / '.join(peaks):>14}"]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=20_000)
    parser.add_argument("--edges", type=int, default=300_000)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--active", type=int, nargs="+", default=[1, 2, 4, 6, 8])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    if not all(1 <= count <= args.heads for count in args.active):
        parser.error(f"--active must be from 1 to --heads {args.heads}, got {args.active}")
    rows = run(
        nodes=args.nodes,
        edges=args.edges,
        heads=args.heads,
        width=args.width,
        active=tuple(args.active),
        dtype=DTYPES[args.dtype],
        device=args.device,
        repeats=args.repeats,
    )
    print(f"{args.nodes} nodes, {args.edges} edges, H={args.heads}, D={args.width}, {args.dtype}")
    print(show(rows))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

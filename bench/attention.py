"""Neighbourhood attention against what users would otherwise run.

``python -m fastgt.bench.attention`` verifies every provider against the float64 definition, then
times forward and forward+backward, in turns, and measures the peak memory of both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgt import Graph, neighborhood_attention, reference
from fastgt.bench import harness, peers, traffic
from fastgt.testing import PROBLEMS, assert_as_accurate

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(
    problem: str,
    *,
    heads: int = 8,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    repeats: int = 9,
    only: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """-> one row a provider: seconds, ratios to it, peak extra bytes, and whether it is right.

    ``only``: these peers; None for all.
    """
    device = torch.device(device)
    graph = PROBLEMS[problem].load().to(device)
    generator = torch.Generator().manual_seed(0)
    q, k, v, do = (
        torch.randn(n, heads, width, generator=generator).to(device, dtype)
        for n in (graph.num_rows, graph.num_cols, graph.num_cols, graph.num_rows)
    )
    edge_index = graph.edge_index
    attentions = {"fastgt": lambda q, k, v: neighborhood_attention(q, k, v, graph)}
    absent = []
    for name in peers.ATTENTION if only is None else only:
        try:
            peer = peers.attention(name)
        except ImportError:
            absent.append(name)
            continue
        attentions[name] = lambda q, k, v, peer=peer: peer(q, k, v, edge_index)

    oracle = reference.neighborhood_attention(q.double(), k.double(), v.double(), graph)
    eager = reference.neighborhood_attention(q, k, v, graph)
    forward, both, wrong = {}, {}, []
    for name, attention in attentions.items():
        backward = _with_backward(attention, q, k, v, do)
        try:
            assert_as_accurate(attention(q, k, v), eager, oracle, name)
            backward()
        except (AssertionError, *FAILURES) as error:
            # of the others, what it cannot do here: the run goes on
            match = False if isinstance(error, AssertionError) else None
            wrong.append({"provider": name, "match": match, "error": _reason(error)})
            continue
        forward[name] = lambda attention=attention: attention(q, k, v)
        both[name] = backward
    graph.columns  # noqa: B018  built once for a graph, not at every call
    rows = [{"provider": name, "match": True} for name in forward]
    harness.time_rows(rows, forward, both, device, repeats=repeats)
    if "fastgt" in forward and device.type == "cuda":
        rows[0] |= traffic.predicted(
            graph, torch.cuda.get_device_name(device), heads=heads, width=width, dtype=dtype
        )
    shape = _shape(problem, graph, heads, width, dtype)
    missing = [{"provider": name, "match": None, "error": "not installed"} for name in absent]
    return [shape | row | harness.environment(device) for row in rows + wrong + missing]


FAILURES = (RuntimeError, MemoryError, NotImplementedError, ValueError)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"


def _with_backward(attention, q: Tensor, k: Tensor, v: Tensor, do: Tensor):  # type: ignore[no-untyped-def]
    def fn() -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(attention(*inputs), inputs, do)

    return fn


def _shape(
    problem: str, graph: Graph, heads: int, width: int, dtype: torch.dtype
) -> dict[str, Any]:
    return {
        "problem": problem,
        "rows": graph.num_rows,
        "edges": graph.num_edges,
        "heads": heads,
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "node_order": "as loaded",
    }


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for a terminal."""
    head = f"{'provider':16} {'match':5} {'forward':>20} {'fwd+bwd':>20} {'peak memory':>22}"
    lines = [head]
    for row in rows:
        if not row["match"]:
            lines.append(f"{row['provider']:16} {row['match']!s:5} {row['error'].splitlines()[0]}")
            continue
        lines.append(
            f"{row['provider']:16} {'yes':5} "
            f"{row['forward_s'] * 1e3:9.1f} ms {row.get('forward_x', 1):6.2f}x "
            f"{row['both_s'] * 1e3:9.1f} ms {row.get('both_x', 1):6.2f}x "
            f"{row['forward_peak_bytes'] / 1e6:8.1f} {row['both_peak_bytes'] / 1e6:8.1f} MB"
        )
        if "predicted_both_s" in row:
            predicted = row["predicted_forward_s"] * 1e3, row["predicted_both_s"] * 1e3
            lines.append(f"{'  at least':22} {predicted[0]:9.3f} ms {predicted[1]:18.3f} ms")
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
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
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
                heads=args.heads,
                width=args.width,
                dtype=DTYPES[args.dtype],
                device=args.device,
                repeats=args.repeats,
            )
        except FileNotFoundError as error:
            parser.error(f"--problem {problem}: {error}")
        print(f"\n{problem}: {rows[0]['rows']} rows, {rows[0]['edges']} edges, {args.dtype}")
        print(show(rows))
        found += rows
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

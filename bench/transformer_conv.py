"""TransformerConv with edge features against torch-geometric's, from the same parameters.

``python -m fastgt.bench.transformer_conv`` verifies output and gradients of both against the
float64 definition, then times forward (without gradients) and forward+backward (gradients of
parameters, x and edge_attr), in turns, and measures the peak memory of both, also as so many
tensors of edges x heads x width: the low-rank form makes none.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgt import Graph, implementation
from fastgt.bench import harness
from fastgt.bench.attention import DTYPES
from fastgt.nn import TransformerConv
from fastgt.testing import PROBLEMS


def run(
    problem: str,
    *,
    heads: int = 8,
    width: int = 16,
    edge_dim: int = 16,
    in_channels: int = 128,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    repeats: int = 9,
) -> list[dict[str, Any]]:
    """-> one row a provider: seconds, ratios to ours, peak extra bytes, and whether it is right."""
    device = torch.device(device)
    graph = PROBLEMS[problem].load().to(device)
    torch.manual_seed(0)
    ours = TransformerConv(in_channels, width, heads, edge_dim=edge_dim).to(device, dtype)
    x, edge_attr, do = (
        torch.randn(shape).to(device, dtype)
        for shape in (
            (graph.num_nodes, in_channels),
            (graph.num_edges, edge_dim),
            (graph.num_nodes, heads * width),
        )
    )
    shape = {
        "problem": problem,
        "rows": graph.num_rows,
        "edges": graph.num_edges,
        "heads": heads,
        "width": width,
        "edge_dim": edge_dim,
        "in_channels": in_channels,
        "dtype": str(dtype).removeprefix("torch."),
        "node_order": "as loaded",
    }
    graph.columns  # noqa: B018  built once for a graph, not at every call
    convs: dict[str, tuple[nn.Module, Graph | Tensor]] = {"fastgt": (ours, graph)}
    rows: list[dict[str, Any]] = []
    try:
        convs["pyg"] = _pyg(ours), graph.edge_index
    except ImportError:
        rows.append({"provider": "pyg", "match": None, "error": "not installed"})

    with implementation("reference"):
        eager = _with_backward(ours, graph, x, edge_attr, do)()
        wide = (t.double() for t in (x, edge_attr, do))
        oracle = _with_backward(copy.deepcopy(ours).double(), graph, *wide)()
    names = ["output", *(name for name, _ in ours.named_parameters()), "x", "edge_attr"]
    forward, both = {}, {}
    for name, (conv, edges) in convs.items():
        backward = _with_backward(conv, edges, x, edge_attr, do)
        row = {"provider": name, **harness.verdict(names, backward(), eager, oracle)}
        rows.append(row)
        if row["match"]:
            forward[name], both[name] = _forward(conv, edges, x, edge_attr), backward
    del eager, oracle
    harness.time_rows(rows, forward, both, device, repeats=repeats)
    for row in rows:
        if row["match"]:
            one = graph.num_edges * heads * width * x.element_size()
            row["both_peak_edge_tensors"] = row["both_peak_bytes"] / one
    rows.sort(key=lambda row: row["provider"] != "fastgt")
    return [shape | row | harness.environment(device) for row in rows]


def _pyg(ours: TransformerConv) -> nn.Module:
    """PyG's module with the parameters of ours; ImportError where the package is absent."""
    from torch_geometric.nn import TransformerConv as PyG

    theirs = PyG(ours.in_channels, ours.out_channels, ours.heads, edge_dim=ours.edge_dim)
    theirs.load_state_dict(ours.state_dict())
    return theirs.to(ours.lin_key.weight)


def _forward(
    conv: nn.Module, edges: Graph | Tensor, x: Tensor, edge_attr: Tensor
) -> Callable[[], Tensor]:
    @torch.no_grad()
    def fn() -> Tensor:
        return conv(x, edges, edge_attr)

    return fn


def _with_backward(
    conv: nn.Module, edges: Graph | Tensor, x: Tensor, edge_attr: Tensor, do: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    def fn() -> tuple[Tensor, ...]:
        inputs = [t.detach().requires_grad_() for t in (x, edge_attr)]
        out = conv(inputs[0], edges, inputs[1])
        return out.detach(), *torch.autograd.grad(out, [*conv.parameters(), *inputs], do)

    return fn


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for a terminal."""
    name = max(10, *(len(row["provider"]) for row in rows))
    head = f"{'provider':{name}} {'match':5} {'forward':>20} {'fwd+bwd':>20} {'peak memory':>20}"
    unit = "both_peak_edge_tensors" if "edges" in rows[0] else "both_peak_inputs"
    lines = [f"{head} {'/ E H D' if 'edges' in rows[0] else '/ N H D':>8}"]
    for row in rows:
        label = f"{row['provider']:{name}}"
        if not row["match"]:
            lines.append(f"{label} {row['match']!s:5} {row['error'].splitlines()[0]}")
            continue
        lines.append(
            f"{label} {'yes':5} "
            f"{row['forward_s'] * 1e3:9.1f} ms {row.get('forward_x', 1):6.2f}x "
            f"{row['both_s'] * 1e3:9.1f} ms {row.get('both_x', 1):6.2f}x "
            f"{row['forward_peak_bytes'] / 1e6:8.1f} {row['both_peak_bytes'] / 1e6:8.1f} MB "
            f"{row[unit]:8.2f}"
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
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, action="append", help="may be given more than once")
    parser.add_argument("--edge-dim", type=int, default=16)
    parser.add_argument("--in-channels", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for problem in args.problem or [next(iter(PROBLEMS))]:
        for width in args.width or [16]:
            try:
                rows = run(
                    problem,
                    heads=args.heads,
                    width=width,
                    edge_dim=args.edge_dim,
                    in_channels=args.in_channels,
                    dtype=DTYPES[args.dtype],
                    device=args.device,
                    repeats=args.repeats,
                )
            except FileNotFoundError as error:
                parser.error(f"--problem {problem}: {error}")
            size = f"{rows[0]['rows']} nodes, {rows[0]['edges']} edges, C={args.edge_dim}"
            print(f"\n{problem}: {size}, H={args.heads}, D={width}, {args.dtype}")
            print(show(rows))
            found += rows
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

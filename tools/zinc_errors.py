"""Where models trained on ZINC err: by the largest ring of a molecule.

The label falls by a molecule's largest ring beyond six atoms. ``python tools/zinc_errors.py``
takes the best epoch of each training on ``zinc12k`` that ``tools/trainings.py`` has left, and
writes ``bench/results/zinc_errors.json``.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from render_cells import machine
from torch import Tensor

from fastgt import Graph, files
from fastgt.bench.harness import environment
from fastgt.datasets import GraphSet, load
from fastgt.encodings import Cache
from fastgt.training.inputs import prepared
from fastgt.training.published_recipes import MODELS, RECIPES

ROOT = Path(__file__).parent.parent
WRITTEN = ROOT / "bench" / "results" / "zinc_errors.json"
SIX = 6  # atoms of the largest ring that costs nothing
GROUPS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda ring: ring >= 0,
    "up to 6 atoms": lambda ring: ring <= SIX,
    "more": lambda ring: ring > SIX,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "results")
    parser.add_argument("--data", type=Path, default=os.environ.get("FASTGT_DATA"))
    args = parser.parse_args()
    data = load("zinc12k", args.data)
    assert isinstance(data, GraphSet)
    rows = []
    for model, name in RECIPES:
        run = args.runs / f"{model}-zinc12k"
        if name == "zinc12k" and (run / "best.pt").exists():
            rows += errors(model, data, run)
    files.write(WRITTEN, (json.dumps(rows, indent=1) + "\n").encode())
    print(table(rows))


def errors(model: str, data: GraphSet, run: Path) -> list[dict[str, Any]]:
    """A row for each split and group of molecules: how many, and their mean absolute error."""
    recipe = RECIPES[model, "zinc12k"]
    taken = prepared(recipe, data, Cache(run / "encodings"))
    assert isinstance(taken, GraphSet)
    best = torch.load(run / "best.pt", weights_only=True)
    network = MODELS[model].make(recipe.config).eval()
    network.load_state_dict(best["model"])
    rows = []
    for split in ("val", "test"):
        batch = taken.batch(taken.splits[split])
        inputs = (batch.node, batch.edge) if MODELS[model].takes_edges else (batch.node,)
        with torch.no_grad():
            out = network(*inputs, batch.graph, **batch.encodings)
        error, ring = (out.flatten() - batch.y.flatten()).abs(), largest_rings(batch.graph)
        for group, chosen in GROUPS.items():
            mine = error[chosen(ring)]
            row = {"model": model, "epoch": best["epoch"], "split": split, "rings": group}
            row |= {"graphs": len(mine), "mae": mine.mean().item(), "median": mine.median().item()}
            row["standard_error"] = (mine.std(correction=0) / len(mine) ** 0.5).item()
            rows.append(row | environment(torch.device("cpu")))
    return rows


def largest_rings(graph: Graph) -> Tensor:
    """``[G]``: the most edges of a ring in a shortest basis of each graph's rings; 0 without."""
    import networkx

    ptr = graph.graph_ptr.tolist()
    source, target = graph.edge_index
    of = torch.bucketize(source, graph.graph_ptr[1:], right=True)
    found = []
    for i in range(len(ptr) - 1):
        mine = of == i
        pairs = torch.stack([source[mine], target[mine]], 1).tolist()
        rings = networkx.minimum_cycle_basis(networkx.Graph(pairs))
        found.append(max(map(len, rings), default=0))
    return torch.tensor(found)


def table(rows: list[dict[str, Any]]) -> str:
    """For docs/results.md."""
    lines = [
        machine(rows),
        "",
        "| model | epoch | split | largest ring | molecules | mean absolute error | median |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = f"{row['mae']:.3f} ± {row['standard_error']:.3f}"
        lines.append(
            f"| `{row['model']}` | {row['epoch']} | {row['split']} | {row['rings']} "
            f"| {row['graphs']:,} | {error} | {row['median']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

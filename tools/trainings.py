"""Models trained as published, beside the published figures: ``make results``.

Every entry of ``TRAININGS`` is a call of ``fastgt train`` in a folder of its own. Stopped, the same
command goes on. What has ended stands in ``bench/results/trainings.json``, from which
``tools/render.py`` makes the table of ``docs/results.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from render_models import trained_alike

from fastgt import files

ROOT = Path(__file__).parent.parent
TRAININGS = ROOT / "bench" / "results" / "trainings.json"
HALF_AN_HOUR = ["--hours", "0.5"]
# a learning rate that falls until the last epoch must know which that is: about half an hour each;
# in the first epoch of a warm-up nothing is learned
RUNS: dict[str, list[str]] = {
    "edge_graph_transformer zinc12k": ["--hours", "4"],
    "graph_gps zinc12k": ["--epochs", "70", "--set", "warmup=5"],
    "exphormer zinc12k": ["--epochs", "60", "--set", "warmup=5"],
    "graph_transformer cluster_small": HALF_AN_HOUR,
    "graph_gps cluster_small": ["--epochs", "8", "--set", "warmup=0"],
    "exphormer cluster_small": ["--epochs", "8", "--set", "warmup=0"],
    "graph_transformer pattern_small": HALF_AN_HOUR,
    "graph_gps pattern_small": ["--epochs", "10", "--set", "warmup=0"],
    "exphormer pattern_small": ["--epochs", "12", "--set", "warmup=0"],
    "sgformer cora_drawn": ["--splits", "0-4"],
    "sgformer citeseer_drawn": ["--splits", "0-4"],
    "sgformer cora_sgformer": ["--seeds", "0-4"],
    "sgformer citeseer_sgformer": ["--seeds", "0-4"],
    "sgformer actor": [],
    "sgformer squirrel_filtered": [],
    "polynormer minesweeper": ["--splits", "0", "--epochs", "150", "--set", "local_epochs=75"],
    "polynormer tolokers": ["--splits", "0", "--epochs", "40", "--set", "local_epochs=20"],
    "graph_gps dd": ["--epochs", "10"],
    "mpnn_virtual_node dd": ["--epochs", "10"],
    "gtsp molhiv_small": HALF_AN_HOUR,
    "gtsp molhiv_small heads": [*HALF_AN_HOUR, "--set", "prune=heads:0.5"],
    "gtsp molhiv_small tokens": [*HALF_AN_HOUR, "--set", "prune=tokens:0.5"],
    "large_gt debian": HALF_AN_HOUR,
    "large_gt tolokers": ["--splits", "0", *HALF_AN_HOUR],
    "correspondence drawn_lines": HALF_AN_HOUR,
}
"""A model, its data and, where one pair is trained in several ways, a word for that way: and the
options by which all of them are trained within a night on two cores."""


def main() -> None:
    """Train what is asked for, one after the other, and write what they reached."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("only", nargs="*", help=f"of {', '.join(RUNS)}; default: all")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "results")
    args = parser.parse_args()
    if unknown := set(args.only) - set(RUNS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    for name in args.only or RUNS:
        folder = args.runs / name.replace(" ", "-")
        model, data, *way = name.split()
        command = [model, data, *RUNS[name], "--output", str(folder)]
        print(f"fastgt train {' '.join(command)}", flush=True)
        subprocess.run([sys.executable, "-m", "fastgt", "train", *command], check=True)
        found = json.loads((folder / "result.json").read_text())
        kept = json.loads(TRAININGS.read_text()) if TRAININGS.exists() else []
        found = [{**row, "way": " ".join(way), "options": " ".join(RUNS[name])} for row in found]
        files.write(TRAININGS, (json.dumps(merged(kept, found), indent=1) + "\n").encode())


def merged(kept: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``kept`` with ``found`` in the place of the same model's runs on the same data, that way."""
    new = {trained_alike(row) for row in found}
    others = [row for row in kept if trained_alike(row) not in new]
    return sorted([*others, *found], key=trained_alike)


if __name__ == "__main__":
    main()

"""What runs reached: ``result.json``, and the table at the end, beside what was published."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from fastgt import files
from fastgt.bench import harness
from fastgt.terminal import wrapped
from fastgt.training import scores
from fastgt.training.loop import Training
from fastgt.training.recipe import Published, Recipe


def row(training: Training, parameters: int) -> dict[str, Any]:
    """One run: what was trained, how long that took, what it reached, where it ran."""
    recipe, p = training.recipe, training.progress
    assert p.best is not None
    seconds = [row["seconds"] for row in p.rows]
    published = recipe.published
    return {
        "title": training.task.title,
        "settings": training.settings,
        "metric": recipe.metric,
        "val": p.best[f"val_{recipe.metric}"],
        "test": p.best[f"test_{recipe.metric}"],
        "epoch": p.best["epoch"],
        "epochs": len(p.rows),
        "epoch_s": statistics.median(seconds),
        "train_s": sum(seconds),
        "peak_bytes": p.peak_bytes,
        "parameters": parameters,
        "published": None if published is None else vars(published),
        **harness.environment(training.device),
    }


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """``result.json`` of that folder."""
    content = json.dumps(rows, indent=1) + "\n"
    files.write(folder / "result.json", content.encode())


def table(rows: list[dict[str, Any]], recipe: Recipe, folder: Path) -> str:
    """A line a run, of several their mean and deviation, and the published figure."""
    first, name = rows[0], scores.metric(recipe.metric).name
    lines = [
        "",
        f"{recipe.model} on {first['title']}: {name}; {first['parameters']:,} parameters",
        f"{first['device']}, torch {first['torch']}, {first['date']}, commit {first['commit']}",
        "",
        f"{'':24} {'validation':>12} {'test':>12} {'at epoch':>9} {'of':>6} {'epoch s':>9} "
        f"{'peak MB':>8}",
    ]
    for one in rows:
        lines.append(
            f"{_label(one):24} {one['val']:>12.4f} {one['test']:>12.4f} {one['epoch']:>9} "
            f"{one['epochs']:>6} {one['epoch_s']:>9.3g} {one['peak_bytes'] / 1e6:>8.0f}"
        )
    if len(rows) > 1:
        spread = [_spread([one[part] for one in rows]) for part in ("val", "test")]
        lines.append(f"{f'mean of {len(rows)}':24} {spread[0]:>12} {spread[1]:>12}")
    if recipe.published is None:
        lines.append(f"{'published':24} {'':12} {'none':>12}")
    else:
        lines.append(
            f"{'published':24} {'':12} {_figure(recipe.published):>12}   {recipe.published.source}"
        )
    where = f"{folder}: result.json, and of each run metrics.csv, curve.png and best.pt"
    return "\n".join([*map(wrapped, lines), "", where])


def _label(one: dict[str, Any]) -> str:
    return f"seed {one['settings']['seed']}, split {one['settings']['split']}"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f}+-{statistics.stdev(values):.4f}"


def _figure(published: Published) -> str:
    spread = "" if published.deviation is None else f"+-{published.deviation:.4f}"
    return f"{published.value:.4f}{spread}"

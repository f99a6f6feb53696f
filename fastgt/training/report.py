"""What a run tells: the table of its epochs and their curve."""

from __future__ import annotations

import io
from typing import Any

from fastgt.training import scores
from fastgt.training.recipe import Metric

COLUMNS = ("epoch", "seconds", "lr", "train_loss", "val_loss", "val_{}", "test_{}")

Row = dict[str, Any]  # an epoch; its test metric is None unless validation was the best so far


def csv(rows: list[Row], metric: Metric) -> bytes:
    """Numbers in full: reading them gives the same bits."""
    columns = [column.format(metric) for column in COLUMNS]
    lines = [",".join(columns)]
    for row in rows:
        cells = {**row, "seconds": round(row["seconds"], 3)}
        lines.append(",".join("" if cells[c] is None else repr(cells[c]) for c in columns))
    return ("\n".join(lines) + "\n").encode()


def curve(rows: list[Row], title: str, metric: Metric) -> bytes:
    """A PNG: losses and the metric in validation over the epochs, the learning rate below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in rows]
    val, score = f"val_{metric}", scores.metric(metric)
    best = (max if score.higher else min)(rows, key=lambda row: row[val])
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, values, rate = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1])
    for part, color in (("train", "tab:gray"), ("val", "tab:green")):
        losses.plot(epochs, [r[f"{part}_loss"] for r in rows], color=color, label=f"{part} loss")
    losses.set_ylabel("loss")
    losses.legend()
    values.plot(epochs, [r[val] for r in rows], color="tab:blue")
    values.plot(best["epoch"], best[val], "o", color="tab:blue")
    values.set_ylabel(f"{score.name}\nin validation")
    for axes, keys in ((losses, ("train_loss", "val_loss")), (values, (val,))):
        if not score.higher and min(row[key] for row in rows for key in keys) > 0:
            axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    test = best[f"test_{metric}"]
    losses.set_title(f"{title}: {score.name} {test:.4f} in test at epoch {best['epoch']}")
    rate.step(epochs, [row["lr"] for row in rows], where="mid", color="tab:orange")
    rate.set_yscale("log")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("epoch")
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()

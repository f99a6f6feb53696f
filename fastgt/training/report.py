"""What a run tells: the table of its epochs and their curve."""

from __future__ import annotations

import io
from typing import Any

COLUMNS = ("epoch", "seconds", "lr", "train_loss", "val_{}", "test_{}")

_NAMES = {"mae": "mean absolute error", "error": "share of errors"}

Row = dict[str, Any]  # an epoch; its test error is None unless validation was the best so far


def csv(rows: list[Row], measure: str) -> bytes:
    """Numbers in full: reading them gives the same bits."""
    columns = [column.format(measure) for column in COLUMNS]
    lines = [",".join(columns)]
    for row in rows:
        cells = {**row, "seconds": round(row["seconds"], 3)}
        lines.append(",".join("" if cells[c] is None else repr(cells[c]) for c in columns))
    return ("\n".join(lines) + "\n").encode()


def curve(rows: list[Row], title: str, measure: str) -> bytes:
    """A PNG: training loss and validation error over the epochs, the learning rate below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in rows]
    val, name = f"val_{measure}", _NAMES.get(measure, measure)
    best = min(rows, key=lambda row: row[val])
    figure = Figure(figsize=(8, 5), layout="constrained")
    errors, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    errors.plot(epochs, [r["train_loss"] for r in rows], color="tab:gray", label="training loss")
    errors.plot(epochs, [r[val] for r in rows], color="tab:blue", label=f"validation: {name}")
    errors.plot(best["epoch"], best[val], "o", color="tab:blue")
    test = best[f"test_{measure}"]
    errors.set_title(f"{title}: {name} {test:.3f} in test at epoch {best['epoch']}")
    errors.set_ylabel(name)
    if min(r[val] for r in rows) > 0:
        errors.set_yscale("log")
    errors.grid(alpha=0.3, which="both")
    errors.legend()
    rate.step(epochs, [row["lr"] for row in rows], where="mid", color="tab:orange")
    rate.set_yscale("log")
    rate.set_ylabel("learning rate")
    rate.set_xlabel("epoch")
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()

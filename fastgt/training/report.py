"""What a run tells: the table of its epochs and their curve."""

from __future__ import annotations

import io
from typing import Any

COLUMNS = ("epoch", "seconds", "lr", "train_loss", "val_mae", "test_mae")

Row = dict[str, Any]  # an epoch; test_mae is None unless validation was the best so far


def csv(rows: list[Row]) -> bytes:
    """Numbers in full: reading them gives the same bits."""
    lines = [",".join(COLUMNS)]
    for row in rows:
        cells = {**row, "seconds": round(row["seconds"], 3)}
        lines.append(",".join("" if cells[c] is None else repr(cells[c]) for c in COLUMNS))
    return ("\n".join(lines) + "\n").encode()


def curve(rows: list[Row], title: str) -> bytes:
    """A PNG: training loss and validation error over the epochs, the learning rate below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in rows]
    best = min(rows, key=lambda row: row["val_mae"])
    figure = Figure(figsize=(8, 5), layout="constrained")
    errors, rate = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    errors.plot(epochs, [r["train_loss"] for r in rows], color="tab:gray", label="training loss")
    errors.plot(epochs, [r["val_mae"] for r in rows], color="tab:blue", label="validation MAE")
    errors.plot(best["epoch"], best["val_mae"], "o", color="tab:blue")
    errors.set_title(f"{title}: test MAE {best['test_mae']:.3f} at epoch {best['epoch']}")
    errors.set_ylabel("mean absolute error")
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

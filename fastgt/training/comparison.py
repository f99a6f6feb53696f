"""A dense model beside some with heads pruned: accuracy, seconds and memory, in a table and a plot.

All are timed in one process, in turns and both orders, on copies that go on training: seconds of
runs at different times would compare the machine's moments. A pruned model's epoch has its masked
heads left out by their gates, without the batches that ``HeadSparsity`` scores; its inference is
timed with gates, and after ``prune_heads``.
"""

from __future__ import annotations

import copy
import io
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastgt import files
from fastgt.bench import harness, memory, timing
from fastgt.nn import HeadGate
from fastgt.pruning import prune_heads
from fastgt.terminal import wrapped

REPEATS = 3  # epochs of each
COLUMNS = (
    "pruned",
    "active_heads",
    "parameters",
    "test_accuracy",
    "epoch",
    "train_epoch_s",
    "inference_s",
    "removed_inference_s",
    "step_peak_bytes",
    "largest_difference",
)


@dataclass
class Trained:
    """A model with the weights of its best epoch.

    Attributes:
        pruned: Share of heads.
        test_accuracy, epoch: Of the epoch best in validation.
    """

    pruned: float
    model: nn.Module
    test_accuracy: float
    epoch: int


def compare(
    trained: list[Trained],
    batch: Callable[[Tensor], tuple[Tensor, Any, Tensor]],
    splits: dict[str, Tensor],
    batch_size: int,
) -> list[dict[str, Any]]:
    """-> one row a model.

    Args:
        batch: The inputs of some examples and their classes.
        splits: Numbers of the examples.
    """
    device = next(trained[0].model.parameters()).device
    batches = {
        name: [batch(some) for some in splits[name].split(batch_size)] for name in ("train", "test")
    }
    print("comparing, in turns ...")
    names = [f"{t.pruned:g}" for t in trained]
    gated = {name: copy.deepcopy(t.model).eval() for name, t in zip(names, trained, strict=True)}
    removed = {name: prune_heads(model) for name, model in gated.items()}
    steps = {name: _Steps(copy.deepcopy(model)) for name, model in gated.items()}
    epochs = {name: lambda s=s: s(batches["train"]) for name, s in steps.items()}
    epoch_s = timing.measure(epochs, device, repeats=REPEATS)
    passes = {
        (kind, name): _pass(model, batches["test"])
        for kind, models in (("gated", gated), ("removed", removed))
        for name, model in models.items()
    }
    pass_s = timing.measure(
        {f"{kind} {name}": f for (kind, name), f in passes.items()}, device, repeats=3 * REPEATS
    )
    largest = max(batches["train"], key=lambda b: len(b[0]))
    rows = []
    for name, t in zip(names, trained, strict=True):
        apart = max(
            float((a - b).abs().max())
            for a, b in zip(passes["gated", name](), passes["removed", name](), strict=True)
        )
        size = max(float(a.abs().max()) for a in passes["gated", name]())
        if not apart <= 1e-4 * max(1.0, size):
            raise RuntimeError(f"{name}: outputs are {apart:.1e} apart after prune_heads")
        steps[name].optimizer.zero_grad()  # gradients count as the step's own memory
        rows.append(
            {
                "pruned": t.pruned,
                "active_heads": _active_heads(t.model),
                "parameters": sum(x.numel() for x in removed[name].parameters()),
                "test_accuracy": t.test_accuracy,
                "test_examples": len(splits["test"]),
                "epoch": t.epoch,
                "train_epoch_s": statistics.median(epoch_s[name]),
                "inference_s": statistics.median(pass_s[f"gated {name}"]),
                "removed_inference_s": statistics.median(pass_s[f"removed {name}"]),
                "step_peak_bytes": memory.peak_extra_memory(
                    lambda s=steps[name]: s([largest]), device
                ),
                "largest_difference": apart,
                **harness.environment(device),
            }
        )
    return rows


class _Steps:
    """Training steps on some batches, on a copy."""

    def __init__(self, model: nn.Module):
        self.model = model.train()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def __call__(self, batches: list[tuple[Tensor, Any, Tensor]]) -> None:
        for *inputs, y in batches:
            loss = cross_entropy(self.model(*inputs), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def _pass(
    model: nn.Module, batches: list[tuple[Tensor, Any, Tensor]]
) -> Callable[[], list[Tensor]]:
    @torch.no_grad()
    def outputs() -> list[Tensor]:
        return [model(*inputs) for *inputs, _ in batches]

    return outputs


def _active_heads(model: nn.Module) -> list[int]:
    """Of each gate."""
    return [int((m.mask != 0).sum()) for m in model.modules() if isinstance(m, HeadGate)]


def table(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    said = [
        f"{first['device']}, torch {first['torch']}. Accuracy is that of the epoch best in "
        f"validation, on {first['test_examples']} examples.",
        "Timed in turns: an epoch of training steps, without those that score masked heads; the "
        "test set with gates / without the heads.",
        "Peak memory of a training step on the largest batch. In brackets: shares of the dense "
        "model's.",
    ]
    lines = [
        "",
        *(wrapped(line, "") for line in said),
        "",
        f"{'heads pruned':>12} {'parameters':>10} {'test acc.':>9} {'epoch s':>14} "
        f"{'inference s':>22} {'peak MB':>14} {'outputs apart':>13}",
    ]
    for row in rows:
        share = [row[k] / first[k] for k in ("train_epoch_s", "inference_s", "step_peak_bytes")]
        inference = f"{row['inference_s']:.2f} / {row['removed_inference_s']:.2f}"
        lines.append(
            f"{row['pruned']:>12.0%} {row['parameters']:>10,} {row['test_accuracy']:>9.4f} "
            f"{row['train_epoch_s']:>7.2f} ({share[0]:.2f}) {inference:>15} ({share[1]:.2f}) "
            f"{row['step_peak_bytes'] / 1e6:>7.0f} ({share[2]:.2f}) "
            f"{row['largest_difference']:>13.0e}"
        )
    heads = ", ".join(f"{row['pruned']:.0%}: {row['active_heads']}" for row in rows[1:])
    told = [wrapped(f"active heads of each layer: {heads}")] if heads else []
    return "\n".join([*lines, *told])


def write(rows: list[dict[str, Any]], folder: Path, title: str) -> None:
    """``comparison.csv``, ``comparison.json`` and ``comparison.png``."""
    lines = [",".join(COLUMNS)]
    for row in rows:
        cells = {**row, "active_heads": " ".join(map(str, row["active_heads"]))}
        lines.append(",".join(str(cells[c]) for c in COLUMNS))
    files.write(folder / "comparison.csv", ("\n".join(lines) + "\n").encode())
    content = json.dumps(rows, indent=1) + "\n"
    files.write(folder / "comparison.json", content.encode())
    files.write(folder / "comparison.png", _plot(rows, title))


def _plot(rows: list[dict[str, Any]], title: str) -> bytes:
    from matplotlib.figure import Figure

    names = ["none" if not row["pruned"] else f"{row['pruned']:.0%}" for row in rows]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.suptitle(f"{title}: heads pruned, {rows[0]['device']}", fontsize=10)
    for axes, (label, key, unit) in zip(
        figure.subplots(1, 3),
        (
            ("test accuracy", "test_accuracy", 1.0),
            ("seconds a training epoch", "train_epoch_s", 1.0),
            ("peak MB of a training step", "step_peak_bytes", 1e-6),
        ),
        strict=True,
    ):
        values = [row[key] * unit for row in rows]
        bars = axes.bar(names, values, color=["tab:gray"] + ["tab:blue"] * (len(rows) - 1))
        axes.bar_label(bars, fmt="{:.3g}", fontsize=8)
        axes.set_title(label, fontsize=9)
        axes.set_ylim(0, 1.15 * max(values))
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()

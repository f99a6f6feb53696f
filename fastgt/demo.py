"""``fastgt demo``: a graph transformer learns the sections of Debian's packages from their words
and dependencies, beside the same model with the usual gather-softmax-scatter attention."""

from __future__ import annotations

import copy
import io
import math
import statistics
import zipfile
import zlib
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgt.extras import require_drawing
from fastgt.files import lock, write
from fastgt.graph import Graph
from fastgt.models.package_classifier import PackageClassifier, PackageClassifierConfig
from fastgt.nn import NeighborhoodAttention
from fastgt.ops.implementation import Impl, implementation

LEARNING_RATE = 0.01
WEIGHT_DECAY = 1e-4
WARMUP = 6  # epochs


@dataclass
class Packages:
    """The Debian graph, every dependency in both directions."""

    graph: Graph
    edge_kind: Tensor  # [E] which relation, and which way
    word_ptr: Tensor  # [N + 1]
    word: Tensor  # [W]
    section: Tensor  # [N]
    split: Tensor  # [N] 0 train, 1 validation, 2 test
    vocabulary: int
    edge_kinds: int
    sections: int


@dataclass
class Result:
    """One row of the closing table."""

    name: str
    accuracy: float
    seconds_per_epoch: float
    peak_bytes: int


def run(
    *,
    device: torch.device,
    epochs: int,
    seed: int,
    impl: Impl | None,
    output: Path,
) -> list[dict[str, Any]]:
    """Train, compare, print the table and draw ``output``.

    -> a row an attention: accuracy, seconds and bytes, and where it ran.
    """
    require_drawing("fastgt demo")

    from fastgt.bench.harness import environment

    with lock(output), implementation(impl):
        data = load(device)
        print(data.graph, flush=True)
        torch.manual_seed(seed)
        model = PackageClassifier(
            PackageClassifierConfig(data.vocabulary, data.edge_kinds, data.sections)
        ).to(device)
        curve = train(model, data, epochs)
        results = compare(model, data)
        print("\n" + table(results))
        draw(curve, results, device, output)
    print(f"\nLearning curve and bars: {output}")
    where = environment(device)
    return [{**vars(result), **where} for result in results]


def load(device: torch.device) -> Packages:
    """Read the embedded file; a damaged one is a ValueError that says so."""
    with as_file(files("fastgt.data") / "debian.npz") as path:
        try:
            with np.load(path) as archive:
                raw = {name: torch.from_numpy(archive[name].astype(np.int64)) for name in _ARRAYS}
                sections, kinds = len(archive["classes"]), len(archive["edge_types"])
                vocabulary = len(archive["vocab"])
        except _DAMAGE as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        for name, limit in (
            ("y", sections),
            ("edge_type", kinds),
            ("x_indices", vocabulary),
            ("split", 3),
        ):
            if not 0 <= int(raw[name].min()) <= int(raw[name].max()) < limit:
                raise ValueError(f"{path} is damaged: {name} has values beyond 0 to {limit - 1}")
    nodes = len(raw["y"])
    forward, kind = raw["edge_index"], raw["edge_type"]
    return Packages(
        Graph.from_edge_index(torch.cat([forward, forward.flip(0)], 1), nodes).to(device),
        torch.cat([kind, kind + kinds]).to(device),
        raw["x_indptr"].to(device),
        raw["x_indices"].to(device),
        raw["y"].to(device),
        raw["split"].to(device),
        vocabulary,
        2 * kinds,
        sections,
    )


_DAMAGE = (zipfile.BadZipFile, zlib.error, KeyError, ValueError, TypeError, OSError, EOFError)
_ARRAYS = ("edge_index", "edge_type", "x_indptr", "x_indices", "y", "split")


def train(model: PackageClassifier, data: Packages, epochs: int) -> list[tuple[float, float]]:
    """-> loss and validation accuracy of every epoch."""
    from tqdm import trange

    step = _Step(model, data, epochs)
    curve = []
    # None: on a terminal alone
    with trange(epochs, desc="training", unit="epoch", disable=None) as bar:
        for _ in bar:
            curve.append((step(), accuracy(model, data, 1)))
            bar.set_postfix(loss=f"{curve[-1][0]:.3f}", val_acc=f"{curve[-1][1]:.3f}")
    return curve


@torch.no_grad()
def accuracy(model: PackageClassifier, data: Packages, split: int) -> float:
    model.eval()
    guess = _forward(model, data).argmax(1)
    chosen = data.split == split
    return float((guess == data.section)[chosen].float().mean())


class _Step:
    """One epoch: the whole graph at once. -> the loss."""

    def __init__(self, model: PackageClassifier, data: Packages, epochs: int):
        self.model, self.data = model, data
        self.rows = (data.split == 0).nonzero()[:, 0]
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda epoch: (
                min((epoch + 1) / WARMUP, 1) * (1 + math.cos(math.pi * min(epoch / epochs, 1))) / 2
            ),
        )

    def __call__(self) -> float:
        self.model.train()
        logits = _forward(self.model, self.data)[self.rows]
        loss = nn.functional.cross_entropy(logits, self.data.section[self.rows])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def compare(model: PackageClassifier, data: Packages, repeats: int = 3) -> list[Result]:
    """The trained model with either attention: accuracy on the test split, time and memory.

    Epochs are timed in turns, on copies that go on training.
    """
    from fastgt.bench import memory, timing
    from fastgt.bench.peers import gather_scatter

    class GatherScatter(NeighborhoodAttention):
        def attend(  # type: ignore[override]
            self, q: Tensor, k: Tensor, v: Tensor, graph: Graph, edge_bias: Tensor | None, _: Any
        ) -> Tensor:
            return gather_scatter(q, k, v, edge_index, edge_bias=edge_bias, logit_clamp=5.0)

    edge_index = data.graph.edge_index
    usual = copy.deepcopy(model)
    for layer in usual.layers:
        layer.attention.__class__ = GatherScatter  # type: ignore[assignment]
    models = {"fastgt": model, "gather-softmax-scatter": usual}
    device = data.graph.device
    print("comparing with gather-softmax-scatter in the same model ...")
    scores = {name: accuracy(m, data, 2) for name, m in models.items()}
    steps = {name: _Step(copy.deepcopy(m), data, repeats + 2) for name, m in models.items()}
    seconds = timing.measure(steps, device, repeats=repeats, sample=0)
    for step in steps.values():
        step.optimizer.zero_grad()  # gradients count as the epoch's own memory
    peaks = {name: memory.peak_extra_memory(step, device) for name, step in steps.items()}
    return [
        Result(name, scores[name], statistics.median(seconds[name]), peaks[name]) for name in models
    ]


def table(results: list[Result]) -> str:
    lines = [f"{'attention':24} {'test accuracy':>13} {'s / epoch':>10} {'peak memory':>12}"]
    for r in results:
        memory = f"{r.peak_bytes / 1e6:,.0f} MB"
        lines.append(f"{r.name:24} {r.accuracy:13.4f} {r.seconds_per_epoch:10.2f} {memory:>12}")
    ours, usual = results
    lines.append(
        f"{'':24} {'':13} {usual.seconds_per_epoch / ours.seconds_per_epoch:9.1f}x "
        f"{usual.peak_bytes / max(ours.peak_bytes, 1):11.1f}x"
    )
    return "\n".join(lines)


def draw(
    curve: list[tuple[float, float]], results: list[Result], device: torch.device, output: Path
) -> None:
    """The learning curve and, for time and memory, two bars."""
    from matplotlib.figure import Figure

    from fastgt.bench.harness import environment

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    where = environment(device)
    machine = (
        f"{where['device']}, torch {where['torch']}, {where['date']}, commit {where['commit']}"
    )
    figure.supxlabel(machine, fontsize="small", color="gray")
    learning, seconds, memory = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    epochs = range(1, len(curve) + 1)
    learning.plot(epochs, [loss for loss, _ in curve], color="tab:gray")
    learning.set_xlabel("epoch")
    learning.set_ylabel("training loss", color="tab:gray")
    learning.set_title(f"sections of Debian packages: test accuracy {results[0].accuracy:.3f}")
    right = learning.twinx()
    right.plot(epochs, [acc for _, acc in curve], color="tab:blue")
    right.set_ylabel("validation accuracy", color="tab:blue")
    names = [r.name.replace("-softmax-", "-\nsoftmax-\n") for r in results]
    for axes, values, title, form in (
        (seconds, [r.seconds_per_epoch for r in results], "seconds per epoch", "{:.2f}"),
        (memory, [r.peak_bytes / 1e6 for r in results], "peak memory, MB", "{:,.0f}"),
    ):
        axes.bar_label(axes.bar(names, values, color=["tab:blue", "tab:orange"]), fmt=form)
        axes.set_title(title)
        axes.margins(y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=output.suffix[1:], dpi=150)
    write(output, buffer.getvalue())


def _forward(model: PackageClassifier, data: Packages) -> Tensor:
    return model(data.word_ptr, data.word, data.graph, data.edge_kind)

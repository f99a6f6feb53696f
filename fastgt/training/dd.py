"""``fastgt train dd``: a Graph Transformer that tells enzymes from other proteins, whole and with
heads pruned while it trains.

Adam, cross-entropy, random splits of 80/10/10. A pruned model has so many of its heads masked from
the first step to the last, by :class:`fastgt.pruning.HeadSparsity`, which exchanges them every
``EVERY`` steps of the first three quarters. :mod:`fastgt.training.comparison` measures what that
saves.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastgt import files
from fastgt.models import GraphClassifier, GraphClassifierConfig
from fastgt.ops.implementation import Impl, implementation
from fastgt.pruning import HeadSparsity
from fastgt.training import comparison
from fastgt.training.checkpoint import open_run, seed_everything
from fastgt.training.loop import Task, Training
from fastgt.training.proteins import CLASSES, NODE_TYPES, Proteins, load_dd
from fastgt.training.size import check_fits

TITLE = "D&D, one random split"
LEARNING_RATE, MIN_LEARNING_RATE, PATIENCE = 1e-3, 1e-6, 5
EVERY, SCORED = 30, 3  # steps between two exchanges of heads, and those that are scored before


@dataclass
class Settings:
    """What makes a run another run.

    Attributes:
        pruned: Share of every layer's heads that is masked; 0 for a model without gates.
        epochs: The exchange of heads ends with them.
        limit: Train on so many proteins only; None for all.
    """

    seed: int = 0
    batch_size: int = 16
    layers: int = 4
    dim: int = 64
    heads: int = 8
    epochs: int = 15
    pruned: float = 0.0
    limit: int | None = None


def run(
    settings: Settings,
    shares: list[float],
    *,
    data: Path | None,
    output: Path,
    device: torch.device,
    impl: Impl | None,
) -> None:
    """Train the dense model and one for each share of pruned heads, or go on with them; compare."""
    # absent extras must show before minutes of training
    import matplotlib  # noqa: F401
    import tqdm  # noqa: F401

    for share in shares:
        left = round((1 - share) * settings.heads)
        if left in (0, settings.heads):
            what = "all" if left else "none"
            raise ValueError(
                f"--prune heads={share:g} leaves {what} of the {settings.heads} heads of a layer"
            )
    proteins, digest = load_dd(data)
    splits = proteins.splits()
    if settings.limit is not None:
        splits["train"] = splits["train"][: settings.limit]
    check_fits(lambda: _model(settings), settings.layers, settings.dim, device)
    trained = []
    output.mkdir(parents=True, exist_ok=True)
    with files.lock(output), implementation(impl):
        for share in [0.0, *shares]:
            mine = Settings(**{**asdict(settings), "pruned": share})
            folder = output / (f"heads-{share:g}" if share else "dense")
            trained.append(_train(mine, proteins, splits, digest, folder, device))
        rows = comparison.compare(
            trained, lambda chosen: proteins.batch(chosen).to(device), splits, settings.batch_size
        )
        comparison.write(rows, output, TITLE)
    print(comparison.table(rows))
    print(f"majority of the classes in training: {_majority(proteins, splits):.3f}")
    print(f"{output / 'comparison.csv'}, {output / 'comparison.json'}, comparison.png beside them")


def _train(
    settings: Settings,
    proteins: Proteins,
    splits: dict[str, Tensor],
    digest: str,
    folder: Path,
    device: torch.device,
) -> comparison.Trained:
    kept = {"task": "dd", **asdict(settings), "data": digest}
    resumed = open_run(folder, kept)
    seed_everything(settings.seed)
    model = _model(settings).to(device)
    sparsity = None
    if settings.pruned:
        batches = -(-len(splits["train"]) // settings.batch_size)
        # the last quarter trains the heads that were found
        steps = max(1, 3 * settings.epochs * batches // 4)
        sparsity = HeadSparsity(model, 1 - settings.pruned, steps=steps, every=EVERY, scored=SCORED)

    def logits(split: str, chosen: Tensor) -> tuple[Tensor, Tensor]:
        node_type, graph, y = proteins.batch(splits[split][chosen]).to(device)
        return model(node_type, graph), y

    def errors(split: str, chosen: Tensor) -> Tensor:
        found, y = logits(split, chosen)
        return (found.argmax(1) != y).sum()

    task = Task(
        f"{TITLE}, {settings.pruned:.0%} of the heads pruned",
        {name: len(x) for name, x in splits.items()},
        loss=lambda chosen: cross_entropy(*logits("train", chosen)),
        error=errors,
        measure="error",
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="min", factor=0.5, patience=PATIENCE
    )
    training = Training(
        task,
        model,
        optimizer,
        schedule,
        batch_size=settings.batch_size,
        folder=folder,
        settings=kept,
        resumed=resumed,
        sparsity=sparsity,
    )
    print(
        f"{folder}: {task.title}; {_count(model):,} parameters, {training.batches} batches an epoch"
    )
    ended = training.run(epochs=settings.epochs, hours=float("inf"), min_lr=MIN_LEARNING_RATE)
    best = training.progress.best
    assert best is not None
    print(f"{ended}; test accuracy {1 - best['test_error']:.4f} at epoch {best['epoch']}")
    model.load_state_dict(best["model"])
    return comparison.Trained(settings.pruned, model, 1 - best["test_error"], best["epoch"])


def _model(settings: Settings) -> GraphClassifier:
    return GraphClassifier(
        GraphClassifierConfig(
            NODE_TYPES,
            CLASSES,
            dim=settings.dim,
            heads=settings.heads,
            layers=settings.layers,
            gated=settings.pruned > 0,
        )
    )


def _majority(proteins: Proteins, splits: dict[str, Tensor]) -> float:
    """Test accuracy of naming the class that is most frequent in training."""
    top = proteins.y[splits["train"]].bincount().argmax()
    return float((proteins.y[splits["test"]] == top).double().mean())


def _count(model: nn.Module) -> int:
    return sum(x.numel() for x in model.parameters())

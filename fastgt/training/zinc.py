"""``fastgt train zinc``: the edge version of the Graph Transformer on ZINC, as published.

Adam, L1 loss, batches of 128, the learning rate from 7e-4 halved after 15 epochs without a better
validation error until it is below 1e-6; 8 Laplacian eigenvectors with random signs in training
(Dwivedi and Bresson, arXiv 2012.09699).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgt import files
from fastgt.models import EdgeGraphTransformer, EdgeGraphTransformerConfig
from fastgt.ops.implementation import Impl, implementation
from fastgt.training.checkpoint import open_run, seed_everything
from fastgt.training.loop import Task, Training
from fastgt.training.molecules import ATOM_TYPES, BOND_TYPES, Molecules, load_zinc
from fastgt.training.size import check_fits

TITLE = "ZINC-12k, substitute train"  # val and test are the benchmark's own molecules
PUBLISHED = "0.226, trained on the benchmark's own training molecules"
LEARNING_RATE, MIN_LEARNING_RATE, PATIENCE = 7e-4, 1e-6, 15


@dataclass
class Settings:
    """What makes a run another run.

    Attributes:
        limit: Train on the first so many molecules; None for all.
        pe_dim: Laplacian eigenvectors; 0 for a model without.
    """

    seed: int = 41
    batch_size: int = 128
    layers: int = 10
    dim: int = 64
    heads: int = 8
    pe_dim: int = 8
    limit: int | None = None


def run(
    settings: Settings,
    *,
    data: Path | None,
    output: Path,
    epochs: int,
    hours: float,
    device: torch.device,
    impl: Impl | None,
) -> None:
    """Train, or go on with the run in ``output``, and print the result."""
    # absent extras must show before minutes of training
    import matplotlib  # noqa: F401
    import tqdm  # noqa: F401

    splits, digest = load_zinc(data)
    if settings.limit is not None:
        splits["train"] = splits["train"].first(settings.limit)
    check_fits(lambda: _model(settings), settings.layers, settings.dim, device)
    kept = {"task": "zinc", **asdict(settings), "data": digest}
    output.mkdir(parents=True, exist_ok=True)
    with files.lock(output), implementation(impl):
        print(_trained(settings, splits, kept, output, epochs, hours, device))


def _trained(
    settings: Settings,
    splits: dict[str, Molecules],
    kept: dict[str, Any],
    output: Path,
    epochs: int,
    hours: float,
    device: torch.device,
) -> str:
    """Train, or go on. -> what is told in the end."""
    resumed = open_run(output, kept)
    seed_everything(settings.seed)
    model = _model(settings).to(device)
    if settings.pe_dim:
        splits = {name: x.with_laplacian_pe(settings.pe_dim) for name, x in splits.items()}

    def difference(split: str, chosen: Tensor) -> Tensor:
        *inputs, y = splits[split].batch(chosen).to(device)
        return model(*inputs)[:, 0] - y

    task = Task(
        TITLE,
        {name: len(x) for name, x in splits.items()},
        loss=lambda chosen: difference("train", chosen).abs().mean(),
        error=lambda split, chosen: difference(split, chosen).abs().sum(),
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
        folder=output,
        settings=kept,
        resumed=resumed,
    )
    print(_opening(training, model))
    ended = training.run(epochs=epochs, hours=hours, min_lr=MIN_LEARNING_RATE)
    median = splits["train"].y.median()
    guess = float((splits["test"].y - median).abs().mean())
    return _closing(training, ended, guess)


def _model(settings: Settings) -> EdgeGraphTransformer:
    return EdgeGraphTransformer(
        EdgeGraphTransformerConfig(
            node_types=ATOM_TYPES,
            edge_types=BOND_TYPES,
            dim=settings.dim,
            heads=settings.heads,
            layers=settings.layers,
            pe_dim=settings.pe_dim,
        )
    )


def _opening(training: Training, model: nn.Module) -> str:
    sizes, p = training.task.sizes, training.progress
    parameters = sum(x.numel() for x in model.parameters())
    lines = [
        f"{TITLE}: {sizes['train']:,} / {sizes['val']:,} / {sizes['test']:,} molecules; "
        f"{parameters:,} parameters; {training.batches} batches an epoch on {training.device}"
    ]
    if p.rows or p.batch:
        lines.append(
            f"going on with {training.folder}: {len(p.rows)} epochs and {p.batch} batches done"
        )
    return "\n".join(lines)


def _closing(training: Training, ended: str, guess: float) -> str:
    best, rows, folder = training.progress.best, training.progress.rows, training.folder
    assert best is not None
    minutes = sum(row["seconds"] for row in rows) / 60
    return (
        f"\n{ended}: {len(rows)} epochs in {minutes:,.1f} minutes\n"
        f"{TITLE}: test MAE {best['test_mae']:.4f} at epoch {best['epoch']}, the best in "
        f"validation ({best['val_mae']:.4f})\n"
        f"published: {PUBLISHED}; the median of the training molecules: {guess:.3f}\n"
        f"{folder / 'metrics.csv'}, {folder / 'curve.png'}, weights in {folder / 'best.pt'}"
    )

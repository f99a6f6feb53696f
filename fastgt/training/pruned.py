"""``fastgt train MODEL DATA --prune heads=SHARE,...``: a model whole, and with heads pruned.

A pruned model has so many of its heads masked from the first step to the last, by
:class:`fastgt.pruning.HeadSparsity`, which exchanges them every ``EVERY`` steps of the first three
quarters. :mod:`fastgt.training.comparison` measures what that saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgt import files
from fastgt.datasets import GraphSet, load
from fastgt.extras import require_drawing
from fastgt.ops.implementation import Impl, implementation
from fastgt.pruning import HeadSparsity
from fastgt.training import comparison
from fastgt.training.checkpoint import open_run
from fastgt.training.inputs import prepared
from fastgt.training.memory import check_fits
from fastgt.training.published_recipes import MODELS
from fastgt.training.recipe import Recipe
from fastgt.training.train import Plan, start

EVERY, SCORED = 30, 3  # steps between two exchanges of heads, and those that are scored before


def run(
    recipe: Recipe,
    shares: Sequence[float],
    plan: Plan,
    *,
    device: torch.device,
    impl: Impl | None = None,
) -> list[dict[str, Any]]:
    """Train the dense model and one for each share of pruned heads, or go on with them; compare.

    -> the rows of ``comparison.json``.

    Raises:
        ValueError: The recipe is none of classes of graphs with heads that have gates, or a share
            leaves all heads or none.
    """
    require_drawing("fastgt train --prune")

    if not hasattr(recipe.config, "gated") or recipe.loss != "cross_entropy":
        raise ValueError(
            f"--prune: heads of {recipe.model} are not pruned here; name another model"
        )
    if plan.seeds is not None or plan.splits is not None:
        raise ValueError("--prune compares runs of one seed: leave --seeds and --splits out")
    for share in shares:
        heads = recipe.config.heads
        left = round((1 - share) * heads)
        if left in (0, heads):
            what = "all" if left else "none"
            raise ValueError(
                f"--prune heads={share:g} leaves {what} of the {heads} heads of a layer"
            )
    whole = load(recipe.data, plan.data)
    assert isinstance(whole, GraphSet)
    digest = whole.digest()
    check_fits(lambda: MODELS[recipe.model].make(recipe.config), device)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with files.lock(plan.folder), implementation(impl):
        data = prepared(recipe, whole, plan.cache)
        assert isinstance(data, GraphSet)
        trained = []
        for share in [0.0, *shares]:
            folder = plan.folder / (f"heads-{share:g}" if share else "dense")
            trained.append(train(recipe, share, data, digest, folder, plan.hours, device))
        rows = comparison.compare(
            trained, lambda chosen: _inputs(data, chosen, device), data.splits, recipe.batch_size
        )
        comparison.write(rows, plan.folder, data.title)
    print(comparison.table(rows))
    print(f"majority of the classes in training: {_majority(data):.3f}")
    print(f"{plan.folder}: comparison.csv, comparison.json and comparison.png")
    return rows


def train(
    recipe: Recipe,
    share: float,
    data: GraphSet,
    digest: str,
    folder: Path,
    hours: float,
    device: torch.device,
) -> comparison.Trained:
    """Train a model with that share of its heads pruned, or go on with it."""
    gated = replace(recipe, config=replace(recipe.config, gated=share > 0))
    # the exchange of heads ends with the epochs: more of them make another run
    kept = {**gated.kept(digest), "epochs": recipe.epochs, "pruned": share}

    def sparsity(model: nn.Module) -> HeadSparsity:
        batches = -(-len(data.splits["train"]) // recipe.batch_size)
        # the last quarter trains the heads that were found
        steps = max(1, 3 * recipe.epochs * batches // 4)
        return HeadSparsity(model, 1 - share, steps=steps, every=EVERY, scored=SCORED)

    training = start(
        gated,
        replace(data, title=f"{data.title}, {share:.0%} of the heads pruned"),
        device,
        folder=folder,
        kept=kept,
        resumed=open_run(folder, kept),
        sparsity=sparsity if share else None,
    )
    print(f"{folder}: {training.task.title}; {training.batches} batches an epoch", flush=True)
    ended = training.run(hours=hours)
    best = training.progress.best
    assert best is not None
    print(f"{ended}; test accuracy {best['test_accuracy']:.4f} at epoch {best['epoch']}")
    training.model.load_state_dict(best["model"])
    return comparison.Trained(share, training.model, best["test_accuracy"], best["epoch"])


def _inputs(data: GraphSet, chosen: Tensor, device: torch.device) -> tuple[Tensor, object, Tensor]:
    batch = data.batch(chosen).to(device)
    return batch.node, batch.graph, batch.y


def _majority(data: GraphSet) -> float:
    """Test accuracy of naming the class that is most frequent in training."""
    top = data.y[data.splits["train"]].bincount().argmax()
    return float((data.y[data.splits["test"]] == top).double().mean())

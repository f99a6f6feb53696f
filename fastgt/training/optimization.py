"""The optimizer, the schedule of its learning rate and the scale of fp16's losses."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.optim import lr_scheduler

from fastgt.training.recipe import Precision, Recipe

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def optimizer(
    recipe: Recipe, model: nn.Module, attention: tuple[str, ...] = ()
) -> torch.optim.Optimizer:
    """Of the model's parameters; those whose names begin so may have a decay of their own."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    if recipe.attention_decay is None:
        return kind(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    if not attention:
        raise ValueError(f"attention_decay must be none: {recipe.model} has one weight decay")
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, x in model.named_parameters():
        groups[name.startswith(attention)].append(x)
    first = {"params": groups[True], "weight_decay": recipe.attention_decay}
    return kind([first, {"params": groups[False]}], lr=recipe.lr, weight_decay=recipe.weight_decay)


def schedule(recipe: Recipe, steps: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    """Of the optimizer's learning rate: a step an epoch, which a plateau gives a loss."""
    if recipe.schedule == "plateau":
        return lr_scheduler.ReduceLROnPlateau(
            steps, mode="min", factor=recipe.factor, patience=recipe.patience
        )
    warmup, epochs = recipe.warmup, recipe.epochs
    if recipe.schedule == "constant":
        return lr_scheduler.LambdaLR(steps, lambda epoch: 1.0)
    of = cosine if recipe.schedule == "cosine" else linear
    return lr_scheduler.LambdaLR(steps, lambda epoch: of(epoch, warmup, epochs))


def cosine(epoch: int, warmup: int, epochs: int) -> float:
    """What the learning rate is multiplied with in an epoch, counted from 0.

    In the first epoch of a warm-up it is 1e-6, so that nothing is learned in it.

    Source:
        Rampasek et al., arXiv 2205.12454, cosine_with_warmup of their code.

    Example:
        >>> from fastgt.training.optimization import cosine
        >>> [round(cosine(epoch, 2, 6), 3) for epoch in range(7)]
        [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if epoch < warmup:
        return max(1e-6, epoch / warmup)
    return max(0.0, (1 + math.cos(math.pi * (epoch - warmup) / max(1, epochs - warmup))) / 2)


def linear(epoch: int, warmup: int, epochs: int) -> float:
    """As :func:`cosine`: a linear rise to 1 in the last epoch of the warm-up, then a linear fall.

    Source:
        Ying et al., arXiv 2106.05234, appendix B, whose code changes the rate at every step.

    Example:
        >>> from fastgt.training.optimization import linear
        >>> [round(linear(epoch, 2, 6), 3) for epoch in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if epoch < warmup:
        return (epoch + 1) / warmup
    return max(0.0, (epochs - epoch) / (epochs - warmup))


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """What a forward runs in."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, _DTYPES[precision])


def scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Of losses, so that gradients of float16 do not vanish; it does nothing for the others."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")

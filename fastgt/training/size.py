"""Whether a model can be there at all, before it is made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fastgt.plans import free_memory

COPIES = 4  # weights, gradients, and the two moments of Adam


def check_fits(make: Callable[[], nn.Module], layers: int, dim: int, device: torch.device) -> None:
    """Refuse a model whose training takes more memory than is free; draws no random number."""
    with torch.device("meta"):
        model = make()
    parameters = sum(x.numel() for x in model.parameters())
    needed = COPIES * sum(x.nbytes for x in model.parameters())
    free = free_memory(device)
    if needed > free:
        raise ValueError(
            f"{layers} layers of width {dim} have {parameters:,} parameters, which take "
            f"{needed / 1e9:,.1f} GB in training, and {free / 1e9:,.1f} GB are free: choose a "
            "smaller --dim or --layers"
        )

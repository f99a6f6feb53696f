"""How much memory a training took, and whether a model can be there at all."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn

from fastgt.plans import free_memory

COPIES = 4  # weights, gradients, and the two moments of Adam


def check_fits(make: Callable[[], nn.Module], device: torch.device) -> int:
    """Refuse a model whose training takes more memory than is free; draws no random number.

    -> how many parameters it has.
    """
    with torch.device("meta"):
        model = make()
    parameters = sum(x.numel() for x in model.parameters())
    needed = COPIES * sum(x.nbytes for x in model.parameters())
    free = free_memory(device)
    if needed > free:
        raise ValueError(
            f"a model of {parameters:,} parameters takes {needed / 1e9:,.1f} GB in training, and "
            f"{free / 1e9:,.1f} GB are free: choose a smaller one, as by --set layers=2"
        )
    return parameters


def peak_memory(device: torch.device) -> int:
    """Bytes that tensors took at most on a GPU, or that this process took at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10

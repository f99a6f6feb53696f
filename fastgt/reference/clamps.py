"""Bounds of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def clamped(x: Tensor, logit_clamp: float | tuple[float, float]) -> Tensor:
    """``x.clamp``, whose gradient at a bound itself is 1 (torch 2.14 made torch.clamp's 0)."""
    low, high = bounds(logit_clamp)
    return torch.where((low <= x) & (x <= high), x, x.detach().clamp(low, high))


def bounds(logit_clamp: float | tuple[float, float] | None) -> tuple[float, float]:
    if logit_clamp is None:
        return -math.inf, math.inf
    return logit_clamp if isinstance(logit_clamp, tuple) else (-logit_clamp, logit_clamp)

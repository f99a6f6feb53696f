"""Gradients that are differentiable themselves, for ``create_graph=True``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastgt.ops.checks import accumulator


def differentiable_gradients(
    define: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of ``inputs`` for ``upstream`` ones of the outputs of ``define(*inputs)``.

    ``define`` is the plain definition. Its inputs are float32 or float64, since its sums are kept
    in their precision.
    """
    # aliases: where one input was made from another, partial derivatives are asked for
    aliases = [None if x is None else x.view_as(x) for x in inputs]
    outputs = define(*(None if x is None else x.to(accumulator(x)) for x in aliases))
    asked = [x for x, need in zip(aliases, needs, strict=True) if need and x is not None]
    # an output may depend on none of the inputs, as a log-sum-exp on the values
    pairs = [
        (y, dy.to(y.dtype))
        for y, dy in zip(outputs, upstream, strict=True)
        if dy is not None and y.requires_grad
    ]
    if not pairs:
        return [
            torch.zeros_like(x) if need and x is not None else None
            for x, need in zip(aliases, needs, strict=True)
        ]
    ys, dys = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(ys, asked, dys, create_graph=True, materialize_grads=True))
    return [
        next(found) if need and x is not None else None
        for x, need in zip(aliases, needs, strict=True)
    ]

"""Collectives that a gradient goes through.

Each rank has a loss of its own, and what is trained is their sum. So the gradient of a sum over
ranks, which every rank has, is the sum of what all ranks send back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgt.distributed.agreement import agree_on_backward
from fastgt.distributed.group import Group


def sum_over_ranks(x: Tensor, group: Group) -> Tensor:
    """``sum_p x_p``, the same on every rank; its gradient is the sum of all ranks' gradients.

    Where the loss of a rank does not depend on it, all ranks raise in the backward.
    """
    if group.size == 1:
        return x
    found: Tensor = _Sum.apply(group, x)
    return found


def next_ranks(tensors: Sequence[Tensor], group: Group, rows: int) -> list[Tensor]:
    """What the next rank has, ``[rows, ...]`` of it, while this rank's goes to the one before."""
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    send, receive = [0] * group.size, [0] * group.size
    send[before], receive[after] = len(tensors[0]), rows
    flights = [group.all_to_all(x, send, receive) for x in tensors]
    return [flight.wait() for flight in flights]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, x: Tensor) -> Tensor:
        ctx.group, ctx.call = group, next(group.calls)
        return group.sum(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        told = {"gradient": f"{grad.dtype}{list(grad.shape)}"}
        agree_on_backward(ctx.group, grad.device, "a sum over ranks", ctx.call, told)
        return None, sum_over_ranks(grad, ctx.group)

"""A call's tensors of columns: a rank's own, and with those of its halo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Columns:
    """Arguments ``[m, ...]`` of a call. A tensor in two arguments is one.

    Args:
        given: The tensors, by argument.
        halo: h, how many columns of other ranks will join them.
        order: ``[m + h]``, the columns in the order of the graph that reads them, own ones standing
            first and then the halo's; None for that order.

    Attributes:
        tensors: Each tensor once.
    """

    def __init__(self, given: Mapping[str, Tensor], halo: int, order: Tensor | None):
        self._ids = {name: id(x) for name, x in given.items()}
        self._own = {id(x): x for x in given.values()}
        self._halo, self._order = halo, order
        self._places: dict[int, Tensor] = {}
        self.tensors = list(self._own.values())

    def placed(self) -> dict[str, Tensor]:
        """Own columns by argument, where the halo's will stand beside them.

        So what a backward keeps of both calls, with and without a halo, is one tensor.
        """
        if self._order is None:
            for key, x in self._own.items():
                place = x.new_empty(len(x) + self._halo, *x.shape[1:])
                self._own[key], self._places[key] = _Place.apply(x, place), place
        return {name: self._own[key] for name, key in self._ids.items()}

    def joined(self, halos: Sequence[Tensor]) -> dict[str, Tensor]:
        """``[m + h, ...]`` by argument; ``halos``: ``[h, ...]`` of each of ``tensors``."""
        full = {}
        for (key, own), halo in zip(self._own.items(), halos, strict=True):
            place = self._places.get(key)
            full[key] = (
                joined(own, halo, self._order) if place is None else _Join.apply(own, halo, place)
            )
        return {name: full[key] for name, key in self._ids.items()}


def joined(own: Tensor, halo: Tensor, order: Tensor | None) -> Tensor:
    """``[m, ...]`` and ``[h, ...]`` -> ``[m + h, ...]`` in that order."""
    both = torch.cat([own, halo])
    return both if order is None else both.index_select(0, order)


# What these return is `data` of the place: a tensor with a count of changes of its own, so that a
# halo may be written beside columns that a backward has kept.
class _Place(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, place: Tensor) -> Tensor:
        return place[: len(own)].copy_(own).data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, halo: Tensor, place: Tensor) -> Tensor:
        ctx.own = len(own)
        place[ctx.own :].copy_(halo)
        return place.data

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad[: ctx.own], grad[ctx.own :], None

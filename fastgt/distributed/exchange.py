"""Columns of other ranks, fetched; their gradients, sent back and summed in a fixed order.

Forward and backward send the same number of bytes: the rows that a rank sends are those whose
gradient it receives. What is on its way while something else is computed goes through two autograd
functions. In the forward ``_Depart`` comes before the computation and ``_Arrive`` after it. In the
backward autograd calls what came last first, so ``_Arrive`` sends gradients off, the gradient of
the computation follows, and ``_Depart`` waits for what the other ranks sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgt.distributed.agreement import agree, agree_on_backward
from fastgt.distributed.group import Flight, Group
from fastgt.distributed.part import Part
from fastgt.distributed.part_checks import not_owned
from fastgt.graph import Graph
from fastgt.graph_build import from_pairs
from fastgt.ops.aggregate import aggregate


class Exchange:
    """Which own columns a rank sends to whom, and how many it receives.

    A rank knows its halo, and asks each owner for it, once. So a directed graph works.

    Args:
        part, group: The rank's share, and the ranks.
        check: Whether ranks tell each other before a backward that they are about to wait in it.

    Attributes:
        sent: ``[S]``, the own column of each row that is sent, rank after rank.
        send, receive: How many rows go to each rank, and come from it.
        active: Whether any two ranks exchange anything.

    Raises:
        ValueError, RuntimeError: A rank is asked for columns that it does not own.
    """

    def __init__(self, part: Part, group: Group, check: bool = True):
        self._group = group if check else group.unchecked()
        self._columns = len(part.cols)
        asked = part.halo_ptr.diff()
        wanted = group.gathered(asked)  # [P, P], row p: how many rank p asks each rank for
        self.receive, self.send = asked.tolist(), wanted[:, group.rank].tolist()
        self.active = bool(wanted.any())
        numbers = group.all_to_all(part.halo, self.receive, self.send).wait()
        self.sent = torch.searchsorted(part.cols, numbers)
        problem = not_owned(part, numbers, self.sent)
        agree(group, part.cols.device, "DistributedGraph, its halo", {}, problem)
        # an own column receives the gradient of each row that was made of it
        places = torch.arange(len(self.sent), device=self.sent.device)
        self._returned = Graph(*from_pairs(self.sent, places, self._columns, len(self.sent)))

    def fetched(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``[m, ...]`` of own columns -> ``[h, ...]`` of the halo. Differentiable, twice too."""
        found: tuple[Tensor, ...] = _Fetch.apply(self, *tensors)
        return found

    def returned(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``[h, ...]`` of the halo -> their sums over own columns of all ranks, ``[m, ...]``."""
        found: tuple[Tensor, ...] = _Return.apply(self, *tensors)
        return found

    def depart(self, tensors: Sequence[Tensor]) -> Journey:
        """Send own columns off; :meth:`Journey.arrive` gives the halo."""
        return Journey(self, tensors)

    def next_call(self) -> int:
        """The number of an exchange whose backward is another one."""
        return next(self._group.calls)

    def before_backward(self, call: int, grads: Sequence[Tensor]) -> None:
        """Raise on all ranks where one does not send gradients back now.

        Its loss then does not depend on what it fetched, and it goes on without this backward.
        """
        told = {"gradients": ", ".join(f"{x.dtype}{['.', *x.shape[1:]]}" for x in grads)}
        agree_on_backward(self._group, self.sent.device, "a halo exchange", call, told)

    def _forth(self, tensors: Sequence[Tensor]) -> _Messages:
        rows = [x.detach().index_select(0, self.sent) for x in tensors]
        return _Messages(self._group, rows, self.send, self.receive)

    def _back(self, tensors: Sequence[Tensor]) -> _Messages:
        rows = [x.detach() for x in tensors]
        return _Messages(self._group, rows, self.receive, self.send)

    def _summed(self, x: Tensor) -> Tensor:
        """``[S, ...]``, of each row that was sent -> its sum over each own column ``[m, ...]``."""
        if not x.numel():
            return x.new_zeros(self._columns, *x.shape[1:])
        flat = aggregate(x.reshape(len(x), -1), self._returned)
        return flat.view(self._columns, *x.shape[1:])


class Journey:
    """Tensors of own columns on their way to the ranks that read them.

    What is computed between its making and :meth:`arrive` goes on while they fly, and so does its
    gradient while theirs do.
    """

    def __init__(self, exchange: Exchange, tensors: Sequence[Tensor]):
        self.exchange, self.call = exchange, exchange.next_call()
        self.forth: _Messages | None = None
        self.back: _Messages | None = None
        self._token = _Depart.apply(self, *tensors)
        self._made = [x.requires_grad for x in tensors]

    def arrive(self) -> tuple[Tensor, ...]:
        """``[h, ...]`` of the halo, tensor by tensor."""
        found: tuple[Tensor, ...] = _Arrive.apply(self, self._made, self._token)
        return found


class _Messages:
    """The same rows of several tensors in flight: those of one dtype in one message."""

    def __init__(
        self, group: Group, rows: Sequence[Tensor], send: Sequence[int], receive: Sequence[int]
    ):
        self._shapes = [x.shape[1:] for x in rows]
        self._flights: list[tuple[Flight, list[int]]] = []
        for dtype in dict.fromkeys(x.dtype for x in rows):
            which = [i for i, x in enumerate(rows) if x.dtype == dtype]
            flat = [rows[i].reshape(len(rows[i]), self._shapes[i].numel()) for i in which]
            x = flat[0] if len(flat) == 1 else torch.cat(flat, 1)
            self._flights.append((group.all_to_all(x, send, receive), which))

    def wait(self) -> list[Tensor]:
        """The rows of each tensor that are for this rank."""
        found: dict[int, Tensor] = {}
        for flight, which in self._flights:
            x = flight.wait()
            parts = x.split([self._shapes[i].numel() for i in which], 1)
            for i, part in zip(which, parts, strict=True):
                found[i] = part.reshape(len(x), *self._shapes[i])
        return [found[i] for i in range(len(self._shapes))]


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.call = exchange, exchange.next_call()
        found = tuple(exchange._forth(tensors).wait())
        ctx.mark_non_differentiable(*[x for x in found if not x.is_floating_point()])
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        given = [grad for grad, need in zip(grads, needs, strict=True) if need]
        ctx.exchange.before_backward(ctx.call, given)
        return (None, *_spread(ctx.exchange.returned(given), needs))


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *grads: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return tuple(exchange._summed(x) for x in exchange._back(grads).wait())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.exchange.fetched(grads))


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, journey: Journey, *tensors: Tensor) -> Tensor:
        ctx.journey = journey
        journey.forth = journey.exchange._forth(tensors)
        # autograd joins it to what arrives
        return next(x for x in tensors if x.is_floating_point()).new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        journey, needs = ctx.journey, ctx.needs_input_grad[1:]
        assert journey.back is not None
        found = [journey.exchange._summed(x) for x in journey.back.wait()]
        journey.back = None
        return (None, *_spread(found, needs))


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, journey: Journey, made: Sequence[bool], token: Tensor
    ) -> tuple[Tensor, ...]:
        assert journey.forth is not None
        ctx.journey, ctx.made = journey, made
        found = tuple(journey.forth.wait())
        journey.forth = None
        ctx.mark_non_differentiable(*[x for x, m in zip(found, made, strict=True) if not m])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        journey = ctx.journey
        given = [grad for grad, made in zip(grads, ctx.made, strict=True) if made]
        journey.exchange.before_backward(journey.call, given)
        journey.back = journey.exchange._back(given)
        return None, None, given[0].new_zeros(0)


def _spread(found: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """What was found, one for each need; None between."""
    rest = iter(found)
    return [next(rest) if need else None for need in needs]

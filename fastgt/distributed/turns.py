"""Ranks that are threads of one process, of which one runs at a time.

A collective takes what a rank brings. A rank that needs what others have not brought yet gives its
turn to the next one that can go on. So ranks change at collectives alone, always in one order.
"""

from __future__ import annotations

import functools
import itertools
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgt.distributed.file_memory import FileMemory
from fastgt.distributed.group import Flight, Group


class Stopped(BaseException):
    """Another rank failed: this one ends."""


class Meeting:
    """A collective that ranks come to one after another.

    Attributes:
        number: How many a rank came to before.
        kind: What it does, as errors name it.
        brought: By rank.
        made: What the first rank that goes on made of it.
    """

    def __init__(self, number: int, kind: str):
        self.number, self.kind = number, kind
        self.brought: dict[int, Any] = {}
        self.made: Tensor | None = None


class Turns:
    """Whose turn it is among ``size`` ranks, and at which collective each of them is.

    Every rank has PyTorch's generator of the CPU to itself, as a process has. All begin with the
    state that it has now.

    Attributes:
        failure: The first rank that failed, and its exception.
        random: The generator's state of every rank.
    """

    def __init__(self, size: int):
        self.size = size
        self.failure: tuple[int, BaseException] | None = None
        self.random = [torch.get_rng_state()] * size
        self._go = [threading.Semaphore(0) for _ in range(size)]
        self._ended = [False] * size
        self._awaits: list[Meeting | None] = [None] * size
        self._begun = [0] * size
        self._meetings: dict[int, Meeting] = {}

    def begin(self) -> None:
        """Let the first rank go on."""
        self._go[0].release()

    def stop(self) -> None:
        """End every rank as soon as it asks for its turn."""
        for go in self._go:
            go.release()

    def enter(self, rank: int) -> None:
        """Come back when it is this rank's turn.

        Raises:
            Stopped: A rank failed.
        """
        self._go[rank].acquire()
        if self.failure is not None:
            raise Stopped
        torch.set_rng_state(self.random[rank])

    def end(self, rank: int, error: BaseException | None) -> None:
        """A rank is through, or failed: the next one goes on, or all end."""
        self._ended[rank] = True
        if self.failure is None and error is not None and not isinstance(error, Stopped):
            self.failure = rank, error
        if self.failure is not None:
            self.stop()
            return
        self.random[rank] = torch.get_rng_state()
        if all(self._ended):
            return
        following = self._following(rank)
        if following is None:
            self.failure = self._never_met()
            self.stop()
        else:
            self._go[following].release()

    def bring(self, rank: int, kind: str, x: Any) -> Meeting:
        """What a rank has for its next collective; ranks that come to it come to the same one.

        Raises:
            RuntimeError: Another rank came to another collective.
        """
        number = self._begun[rank]
        self._begun[rank] += 1
        meeting = self._meetings.setdefault(number, Meeting(number, kind))
        if meeting.kind != kind:
            other = next(iter(meeting.brought))
            raise RuntimeError(f"rank {rank} is in {kind} where rank {other} is in {meeting.kind}")
        meeting.brought[rank] = x
        if self._is_full(meeting):
            del self._meetings[number]
        return meeting

    def all_of(self, rank: int, meeting: Meeting, memory: FileMemory) -> list[Any]:
        """What every rank brought; other ranks have their turns until all came."""
        if not self._is_full(meeting):
            self._awaits[rank] = meeting
            following = self._following(rank)
            if following is None:
                _, error = self._never_met()
                raise error
            memory.put_away()
            self.random[rank] = torch.get_rng_state()
            self._go[following].release()
            self.enter(rank)
            self._awaits[rank] = None
        return [meeting.brought[p] for p in range(self.size)]

    def _is_full(self, meeting: Meeting) -> bool:
        return len(meeting.brought) == self.size

    def _following(self, rank: int) -> int | None:
        """The next rank that can go on, if there is one."""
        for other in (*range(rank + 1, self.size), *range(rank)):
            meeting = self._awaits[other]
            if not self._ended[other] and (meeting is None or self._is_full(meeting)):
                return other
        return None

    def _never_met(self) -> tuple[int, RuntimeError]:
        """Of ranks of which none can go on: one that waits, and why it would for ever.

        Who is not at the first of all collectives that are waited for is at none: it ended.
        """
        waiting = [(x.number, p, x) for p, x in enumerate(self._awaits) if x is not None]
        _, rank, meeting = min(waiting, key=lambda x: x[:2])
        absent = next(p for p in range(self.size) if p not in meeting.brought)
        return rank, RuntimeError(
            f"rank {rank} is in {meeting.kind}, and rank {absent} ended without it"
        )


class TurnGroup(Group):
    """A rank among those that take turns: the same collectives as of processes.

    Sums are taken in the order of the ranks.

    Attributes:
        rank, size: This rank's number among how many.
    """

    def __init__(self, turns: Turns, rank: int, memory: FileMemory):
        self.processes = None
        self.rank, self.size, self.calls = rank, turns.size, itertools.count(1)
        self._turns, self._memory = turns, memory

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Flight:
        kind = f"all_to_all of {_told(x, rows=True)}"
        # a rank may change what it sent before others read it
        letters = x.detach().clone().split(list(send))
        return _Letters(self, self._turns.bring(self.rank, kind, letters), receive)

    def sum(self, x: Tensor) -> Tensor:
        return self._made("sum", x, lambda all_ranks: functools.reduce(torch.add, all_ranks))

    def largest(self, x: Tensor) -> Tensor:
        return self._made("largest", x, lambda all_ranks: torch.stack(all_ranks).amax(0))

    def gathered(self, x: Tensor) -> Tensor:
        return self._made("gathered", x, torch.stack)

    def from_first(self, x: Tensor) -> None:
        mine = None if self.rank else x.detach().clone()
        first = self._all("from_first", mine)[0]
        if self.rank:
            x.copy_(first)

    def told(self, x: Any) -> list[Any]:
        return [pickle.loads(said) for said in self._all("told", pickle.dumps(x))]

    def told_by_first(self, x: Any) -> Any:
        return self.told(x)[0]

    def arrived(self, meeting: Meeting) -> list[Any]:
        """What every rank brought to a collective that this one came to."""
        return self._turns.all_of(self.rank, meeting, self._memory)

    def _all(self, kind: str, x: Any) -> list[Any]:
        return self.arrived(self._turns.bring(self.rank, kind, x))

    def _made(self, kind: str, x: Tensor, make: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """Made once, by the first rank that goes on; each has a copy of it."""
        kind = f"{kind} of {_told(x, rows=False)}"
        meeting = self._turns.bring(self.rank, kind, x.detach())
        all_ranks = self.arrived(meeting)
        if meeting.made is None:
            meeting.made = make(all_ranks)
        return meeting.made.clone(memory_format=torch.contiguous_format)


class _Letters(Flight):
    """Rows for this rank, which the others have brought or will bring."""

    def __init__(self, group: TurnGroup, meeting: Meeting, receive: Sequence[int]):
        self._ranks, self._receive = group, list(receive)
        self._meeting: Meeting | None = meeting
        self._rows: Tensor | None = None

    def wait(self) -> Tensor:
        if self._meeting is not None:
            found = [letters[self._ranks.rank] for letters in self._ranks.arrived(self._meeting)]
            for other, (rows, expected) in enumerate(zip(found, self._receive, strict=True)):
                if len(rows) != expected:
                    raise RuntimeError(
                        f"rank {self._ranks.rank} expects {expected} rows of rank {other}, which "
                        f"sent {len(rows)}"
                    )
            self._rows, self._meeting = torch.cat(found), None
        assert self._rows is not None
        return self._rows


def _told(x: Tensor, *, rows: bool) -> str:
    """What ranks have to bring alike: rows may differ in number."""
    shape = list(x.shape[1:]) if rows else list(x.shape)
    return f"{x.dtype}{shape}"

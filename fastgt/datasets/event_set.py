"""Timed events between nodes, in batches that see what came before them, and pairs without one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastgt.datasets.graph_set import digest
from fastgt.ops.checks import FLOATS, check_times, integer, node_pairs

Negatives = Literal["random", "historical", "inductive"]


class Events(NamedTuple):
    """Some events, in the order of time.

    Attributes:
        source, target: ``[E]`` int64 nodes.
        time: ``[E]`` integers or floating point, never falling.
        edge: ``[E, F]`` features; None where events carry nothing.
    """

    source: Tensor
    target: Tensor
    time: Tensor
    edge: Tensor | None

    def to(self, device: torch.device | str) -> Events:
        """The events on that device."""
        edge = None if self.edge is None else self.edge.to(device)
        return Events(self.source.to(device), self.target.to(device), self.time.to(device), edge)


class EventBatch(NamedTuple):
    """Events to predict, and those that are known when the first of them happens.

    Attributes:
        events: To predict.
        history: The last ones before ``now``: none that happens at ``now``.
        now: Time of the first event to predict.
        first, last: Numbers of the events to predict in their set, ``first`` up to ``last - 1``.
        known: How many events of the set happened before ``now``.
        split_begin: Number of the first event of the split.
    """

    events: Events
    history: Events
    now: float
    first: int
    last: int
    known: int
    split_begin: int

    @property
    def pairs(self) -> Tensor:
        """``[2, B]``, source above target, of the events to predict."""
        return torch.stack([self.events.source, self.events.target])

    def to(self, device: torch.device | str) -> EventBatch:
        """The batch on that device. Its set, and negatives that the set draws, stay on a CPU."""
        return self._replace(events=self.events.to(device), history=self.history.to(device))


@dataclass(frozen=True)
class EventSet:
    """Timed events between nodes, on a CPU.

    Attributes:
        source, target: ``[E]`` int64 nodes, from 0 to ``num_nodes - 1``.
        time: ``[E]`` integers or floating point, never falling.
        num_nodes: How many nodes there are.
        splits: ``(first, end)`` of ``"train"``, ``"val"`` and ``"test"``: a split has the events
            ``first`` to ``end - 1``.
        edge: ``[E, F]`` features; None where events carry nothing.
        title: What results on it are called.

    Raises:
        TypeError: ``source``, ``target``, ``time`` or ``edge`` is no tensor or has another dtype,
            or ``splits`` has another form.
        ValueError: Events go back in time, a node is beyond the graph, or the arrays do not fit
            each other; says which.

    Example:
        >>> import torch
        >>> from fastgt.datasets import EventSet
        >>> data = EventSet(
        ...     source=torch.tensor([0, 1, 0, 2, 1]),
        ...     target=torch.tensor([1, 2, 1, 0, 0]),
        ...     time=torch.tensor([0, 3, 3, 8, 8]),
        ...     num_nodes=3,
        ...     splits={"train": (0, 3), "val": (3, 4), "test": (4, 5)},
        ... )
        >>> batch = data.batch("val", 0, size=10, history=2)
        >>> batch.pairs.tolist(), batch.history.time.tolist()
        ([[2], [0]], [3, 3])
        >>> data.times_seen(torch.tensor([[0, 2], [1, 0]]), batch.known).tolist()
        [2, 0]
    """

    source: Tensor
    target: Tensor
    time: Tensor
    num_nodes: int
    splits: dict[str, tuple[int, int]]
    edge: Tensor | None = None
    title: str = ""

    def __post_init__(self) -> None:
        if integer("num_nodes", self.num_nodes, 1) > _MOST_NODES:
            raise ValueError(f"num_nodes must be {_MOST_NODES} at most, got {self.num_nodes}")
        for name in ("source", "target", "time", "edge"):
            x = getattr(self, name)
            if not (isinstance(x, Tensor) or (name == "edge" and x is None)):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        for name in ("source", "target"):
            x = getattr(self, name)
            if x.dtype != torch.int64:
                raise TypeError(f"{name} must be int64, got {x.dtype}")
        if self.time.dtype == torch.bool or self.time.is_complex():
            raise TypeError(
                f"time must hold integers or floating point numbers, got {self.time.dtype}"
            )
        if self.time.ndim != 1:
            raise ValueError(f"time must be [E], got {list(self.time.shape)}")
        count = len(self.time)
        for name in ("source", "target", "time"):
            if getattr(self, name).shape != (count,):
                found = list(getattr(self, name).shape)
                raise ValueError(f"{name} must be [E] = [{count}], got {found}")
        if self.edge is not None:
            if self.edge.dtype not in FLOATS:
                raise TypeError(f"edge must be floating point, got {self.edge.dtype}")
            if self.edge.ndim != 2 or len(self.edge) != count:
                raise ValueError(f"edge must be [E, F] = [{count}, F], got {list(self.edge.shape)}")
        for name in ("source", "target"):
            x = getattr(self, name)
            beyond = (x < 0) | (x >= self.num_nodes)
            if beyond.any():
                event = int(beyond.nonzero()[0])
                raise ValueError(
                    f"{name} must be from 0 to {self.num_nodes - 1}, got {int(x[event])} at event "
                    f"{event}"
                )
        check_times("time", self.time)
        if not isinstance(self.splits, dict):
            raise TypeError(f"splits must be a dict, got {type(self.splits).__name__}")
        for name, ends in self.splits.items():
            if not isinstance(ends, (tuple, list)) or len(ends) != 2:
                raise TypeError(f"splits[{name!r}] must be a pair (first, end), got {ends!r}")
            first, last = (integer(f"splits[{name!r}]", end) for end in ends)
            if not 0 <= first <= last <= count:
                raise ValueError(
                    f"splits[{name!r}] must be within 0 to {count}, got {first} to {last}"
                )

    def __len__(self) -> int:
        """How many events there are."""
        return len(self.time)

    def batches(self, split: str, size: int) -> int:
        """How many batches of that size a split has; the last one may be smaller."""
        first, last = self._bounds(split)
        return -(-(last - first) // integer("size", size, 1))

    def batch(self, split: str, number: int, *, size: int, history: int) -> EventBatch:
        """That batch of a split, with the last ``history`` events before it.

        History ends before the time of the batch's first event. What happens at that time, or
        later, is not in it.

        Raises:
            ValueError: There is no such split or batch.
        """
        begin, end = self._bounds(split)
        count = self.batches(split, size)
        if not 0 <= number < count:
            raise ValueError(f"number must be from 0 to {count - 1} of {split!r}, got {number}")
        first = begin + number * size
        last = min(first + size, end)
        known = int(torch.searchsorted(self.time, self.time[first]))
        oldest = max(0, known - integer("history", history, 1))
        return EventBatch(
            self._events(first, last),
            self._events(oldest, known),
            self.time[first].item(),
            first,
            last,
            known,
            begin,
        )

    def negatives(self, batch: EventBatch, kind: Negatives, *, seed: int = 0) -> Tensor:
        """As many pairs as the batch has, none with an event between its first and its last time.

        ``"random"`` keeps the source of each event and draws a target among all targets of the
        set. ``"historical"`` draws, each once, pairs that had an event before the batch.
        ``"inductive"`` draws those of them that had none before the split began. If there are fewer
        such pairs than events, random ones stand in the last places. A seed always gives the same
        pairs for a batch, whatever was drawn before.

        Args:
            batch: Of this set.
            kind: ``"random"``, ``"historical"`` or ``"inductive"``.
            seed: Of the drawing.

        Returns:
            ``[2, B]`` int64, source above target.

        Raises:
            ValueError: ``kind`` is another, or a source has an event with every target.

        Source:
            Poursafaei et al., Towards Better Evaluation for Dynamic Link Prediction, arXiv
            2207.10128, section 4. Their code too takes historical pairs from all that was before
            the batch, not from the training events alone.
        """
        kinds = get_args(Negatives)
        if kind not in kinds:
            raise ValueError(f"kind must be one of {list(kinds)}, got {kind!r}")
        draws = torch.Generator().manual_seed(
            (seed * 1_000_003 + batch.first * len(kinds) + kinds.index(kind)) % 2**63
        )
        source, span = self.source[batch.first : batch.last], self._span(batch)
        if kind == "random":
            return self._random(source, span, draws)
        pairs, first_seen = self._seen
        begin = batch.split_begin if kind == "inductive" else 0
        some = torch.searchsorted(first_seen, torch.tensor([begin, batch.known]))
        found = pairs[int(some[0]) : int(some[1])]
        found = found[~torch.isin(found, span)]
        found = found[torch.randperm(len(found), generator=draws)[: len(source)]]
        drawn = torch.stack([found // self.num_nodes, found % self.num_nodes])
        rest = self._random(source[len(found) :], span, draws)
        return torch.cat([drawn, rest], 1)

    def times_seen(self, pairs: Tensor, end: int, begin: int = 0) -> Tensor:
        """How many of the events ``begin`` to ``end - 1`` each pair had.

        This is the popularity of a pair. EdgeBank predicts an event where it is not 0 (Poursafaei
        et al., arXiv 2207.10128, section 5).

        Args:
            pairs: ``[2, B]``, source above target.
            end, begin: Numbers of events, from 0 to E.

        Returns:
            ``[B]`` int64.

        Raises:
            TypeError, ValueError: Pairs hold no integers or have another shape, or a node or an
                event is beyond the set.
        """
        # as int64: the number of a pair has no room in int32
        pairs = node_pairs("pairs", pairs, self.num_nodes, self.time.device)
        if not 0 <= begin <= end <= len(self):
            raise ValueError(f"events must be within 0 to {len(self)}, got {begin} to {end}")
        known, place = self._places
        key = pairs[0] * self.num_nodes + pairs[1]
        rank = torch.searchsorted(known, key)
        there = rank < len(known)
        there[there.clone()] = known[rank[there]] == key[there]
        low, high = (torch.searchsorted(place, rank * len(self) + n) for n in (begin, end))
        return torch.where(there, high - low, 0)

    def digest(self) -> str:
        """Sixteen letters that change with the events."""
        return digest(
            [
                ("source", self.source),
                ("target", self.target),
                ("time", self.time),
                ("edge", self.edge),
                ("num_nodes", torch.tensor(self.num_nodes)),
                *((name, torch.tensor(ends)) for name, ends in self.splits.items()),
            ]
        )

    def _bounds(self, split: str) -> tuple[int, int]:
        if split not in self.splits:
            raise ValueError(f"split must be one of {list(self.splits)}, got {split!r}")
        return self.splits[split]

    def _events(self, first: int, last: int) -> Events:
        part = slice(first, last)
        edge = None if self.edge is None else self.edge[part]
        return Events(self.source[part], self.target[part], self.time[part], edge)

    @cached_property
    def _key(self) -> Tensor:
        """[E] a number for each pair of nodes."""
        return self.source * self.num_nodes + self.target

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """[P] pairs that have events, and [E] rank of its pair times E plus number of each event,
        both rising."""
        known, rank = self._key.unique(return_inverse=True)
        return known, (rank * len(self) + torch.arange(len(self))).sort().values

    @cached_property
    def _seen(self) -> tuple[Tensor, Tensor]:
        """[P] pairs in the order of their first events, and the numbers of these."""
        known, place = self._places
        ranks = torch.arange(len(known)) * len(self)
        first, order = (place[torch.searchsorted(place, ranks)] - ranks).sort()
        return known[order], first

    def _span(self, batch: EventBatch) -> Tensor:
        """[S] pairs that have an event from the batch's first time to its last."""
        end = torch.searchsorted(self.time, self.time[batch.last - 1], right=True)
        return self._key[batch.known : int(end)].unique()

    @cached_property
    def _targets(self) -> Tensor:
        return self.target.unique()

    def _random(self, source: Tensor, span: Tensor, draws: torch.Generator) -> Tensor:
        taken = torch.bincount(span // self.num_nodes, minlength=self.num_nodes)[source]
        if bool((taken == len(self._targets)).any()):
            node = int(source[taken == len(self._targets)][0])
            raise ValueError(
                f"source {node} has an event with each of the {len(self._targets)} targets in one "
                "batch: it takes smaller ones"
            )
        target = torch.empty_like(source)
        again = torch.ones_like(source, dtype=torch.bool)
        while bool(again.any()):
            chosen = torch.randint(len(self._targets), (int(again.sum()),), generator=draws)
            target[again] = self._targets[chosen]
            again = torch.isin(source * self.num_nodes + target, span)
        return torch.stack([source, target])


_MOST_NODES = 2**31  # a pair of nodes is one number of 64 bits


def chronological(
    time: Tensor, val: float = 0.15, test: float = 0.15
) -> dict[str, tuple[int, int]]:
    """Splits of events in the order of time: shares ``val`` and ``test`` come last.

    Events of one time stay in one split, the earlier one.

    Example:
        >>> import torch
        >>> from fastgt.datasets.event_set import chronological
        >>> chronological(torch.tensor([0, 1, 2, 2, 2, 3]), 0.25, 0.25)
        {'train': (0, 5), 'val': (5, 5), 'test': (5, 6)}
    """
    if not (val >= 0 and test >= 0 and val + test < 1):
        raise ValueError(f"val and test must leave events to train on, got {val} and {test}")
    count, ends = len(time), []
    for share in (1 - val - test, 1 - test):
        place = round(share * count)
        if 0 < place < count:
            place = int(torch.searchsorted(time, time[place - 1], right=True))
        ends.append(place)
    return {"train": (0, ends[0]), "val": (ends[0], ends[1]), "test": (ends[1], count)}

"""A group of ranks and its collectives; alone, a process is a group of one."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastgt.distributed.eager import eager

GRACE = 5.0  # seconds in which ranks answer that a collective failed for them too
_POLL = 0.02  # seconds
Error = TypeVar("Error", bound=Exception)
# of each process group, for one call may make a Group of it, and the next one another
_CALLS: WeakKeyDictionary[dist.ProcessGroup, Iterator[int]] = WeakKeyDictionary()


class Flight:
    """Rows that are on their way to this rank."""

    def __init__(self, group: Group, received: Tensor, sent: Tensor, work: dist.Work | None):
        self._group, self._received, self._sent, self._work = group, received, sent, work

    @eager
    def wait(self) -> Tensor:
        """The rows, once they are here."""
        if self._work is not None:
            with self._group.watched():
                self._work.wait()
        return self._received


class Group:
    """Some ranks of ``torch.distributed``, in an order that all of them know.

    Where a collective fails, because a rank has ended or because the group's timeout is over, the
    others tell each other so through the group's store, and raise an error that names the ranks
    that said nothing for ``GRACE`` seconds. It costs nothing before.

    Args:
        processes: A process group, or a ``DeviceMesh`` of one dimension; None for the default
            group or, where ``init_process_group`` was not called, for this process alone.

    Attributes:
        rank, size: This process's number among how many.
        checked: Whether ranks compare what they are about to do before they wait for each other.
        calls: Numbers those calls of autograd functions that ask other ranks in their backward.

    Raises:
        TypeError, ValueError: ``processes`` is no group, or one that this process is not in.

    Example:
        >>> from fastgt.distributed import Group
        >>> Group().size
        1
    """

    checked = True

    def __init__(self, processes: dist.ProcessGroup | DeviceMesh | None = None):
        if isinstance(processes, DeviceMesh):
            processes = processes.get_group()
        # what new_group gives a process that it leaves out
        if isinstance(processes, int) and processes == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(_outside())
        if processes is not None and not isinstance(processes, dist.ProcessGroup):
            found = type(processes).__name__
            raise TypeError(f"group must be a torch.distributed.ProcessGroup, got {found}")
        alone = processes is None and not (dist.is_available() and dist.is_initialized())
        self.processes = None if alone else processes or dist.group.WORLD
        self.rank = 0 if alone else dist.get_rank(self.processes)
        self.size = 1 if alone else dist.get_world_size(self.processes)
        self.calls: Iterator[int] = itertools.count(1)
        if self.processes is not None:
            self.calls = _CALLS.setdefault(self.processes, self.calls)
        if self.rank < 0:
            raise ValueError(_outside())

    def unchecked(self) -> Group:
        """The same ranks, that compare nothing."""
        found = copy.copy(self)
        found.checked = False
        return found

    @eager
    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Flight:
        """``x [S, ...]``, ``send[p]`` rows of it for rank p -> ``receive[p]`` rows of each rank p.

        It comes back at once; :meth:`Flight.wait` gives the rows.
        """
        if self.size == 1:
            return Flight(self, x, x, None)
        received = x.new_empty(sum(receive), *x.shape[1:])
        x = x.contiguous()
        with self.watched():
            work = dist.all_to_all_single(
                received, x, list(receive), list(send), group=self.processes, async_op=True
            )
        return Flight(self, received, x, work)

    @eager
    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' tensors; no gradient goes through it."""
        x = x.detach().clone(memory_format=torch.contiguous_format)
        if self.size > 1:
            with self.watched():
                dist.all_reduce(x, group=self.processes)
        return x

    @eager
    def largest(self, x: Tensor) -> Tensor:
        """The maximum of all ranks' tensors, number by number; no gradient goes through it."""
        x = x.detach().clone(memory_format=torch.contiguous_format)
        if self.size > 1:
            with self.watched():
                dist.all_reduce(x, dist.ReduceOp.MAX, group=self.processes)
        return x

    @eager
    def gathered(self, x: Tensor) -> Tensor:
        """``x`` of every rank, of one shape on all of them -> ``[P, ...]``."""
        if self.size == 1:
            return x[None]
        found = x.new_empty(self.size, *x.shape)
        # gloo gathers into tensors of a list, NCCL too
        with self.watched():
            dist.all_gather(list(found.unbind()), x.contiguous(), group=self.processes)
        return found

    @eager
    def from_first(self, x: Tensor) -> None:
        """Write what the first rank has into ``x``."""
        if self.size > 1:
            # a broadcast writes into memory that lies in order
            whole = x.contiguous()
            with self.watched():
                dist.broadcast(whole, self._first(), self.processes)
            if whole is not x:
                x.copy_(whole)

    @eager
    def told(self, x: Any) -> list[Any]:
        """What each rank says: any object that can be pickled."""
        if self.size == 1:
            return [x]
        found: list[Any] = [None] * self.size
        with self.watched():
            dist.all_gather_object(found, x, group=self.processes)
        return found

    @eager
    def told_by_first(self, x: Any) -> Any:
        """What the first rank says: any object that can be pickled."""
        if self.size == 1:
            return x
        found = [x]
        with self.watched():
            dist.broadcast_object_list(found, self._first(), group=self.processes)
        return found[0]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A collective. Where it fails, the error names the ranks that no longer answer."""
        try:
            yield
        except RuntimeError as error:
            raise on_all_ranks(RuntimeError(f"{self._failure()}: {error}")) from error

    def _first(self) -> int:
        assert self.processes is not None
        return dist.get_global_rank(self.processes, 0)

    def _failure(self) -> str:
        """What is known of a collective that failed; the other ranks ask at the same time."""
        silent = set(range(self.size)) - {self.rank}
        reached = False
        try:
            assert self.processes is not None
            store = dist.distributed_c10d._get_process_group_store(self.processes)
            store.set(_key(self.rank), "failed")
            end = time.monotonic() + GRACE
            while silent and time.monotonic() < end:
                time.sleep(_POLL)
                silent = {p for p in silent if not store.check([_key(p)])}
                reached = True
        except RuntimeError:
            # the process that keeps the store has ended: at the last moment, or with the collective
            if not reached:
                return (
                    f"a collective of {self.size} ranks failed on rank {self.rank}, and the store "
                    "of their process group is gone: the process that keeps it, rank 0 if not "
                    "torchrun, has ended"
                )
        if not silent:
            return f"a collective failed on all {self.size} ranks"
        names = ", ".join(map(str, sorted(silent)))
        which = f"rank {names} does" if len(silent) == 1 else f"ranks {names} do"
        return (
            f"a collective of {self.size} ranks failed, and {which} not answer within {GRACE:g} s: "
            "killed, ended or stuck"
        )


def on_all_ranks(error: Error) -> Error:
    """The error, marked: all ranks raise, so that none has to be told."""
    error.__dict__["on_all_ranks"] = True
    return error


def is_on_all_ranks(error: BaseException | None) -> bool:
    """Whether it, or what it came from, is marked so."""
    while error is not None and "on_all_ranks" not in error.__dict__:
        error = error.__cause__ or error.__context__
    return error is not None


def _outside() -> str:
    return f"this process, rank {dist.get_rank()}, is not in the group"


def _key(rank: int) -> str:
    return f"fastgt/failed/{rank}"

"""A group of ranks and its collectives; alone, a process is a group of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


class Flight:
    """Rows that are on their way to this rank."""

    def __init__(self, received: Tensor, sent: Tensor, work: dist.Work | None):
        self._received, self._sent, self._work = received, sent, work

    def wait(self) -> Tensor:
        """The rows, once they are here."""
        if self._work is not None:
            self._work.wait()
        return self._received


class Group:
    """Some ranks of ``torch.distributed``, in an order that all of them know.

    Args:
        processes: A process group, or a ``DeviceMesh`` of one dimension; None for the default
            group or, where ``init_process_group`` was not called, for this process alone.

    Attributes:
        rank, size: This process's number among how many.

    Example:
        >>> from fastgt.distributed import Group
        >>> Group().size
        1
    """

    def __init__(self, processes: dist.ProcessGroup | DeviceMesh | None = None):
        if isinstance(processes, DeviceMesh):
            processes = processes.get_group()
        if processes is not None and not isinstance(processes, dist.ProcessGroup):
            found = type(processes).__name__
            raise TypeError(f"group must be a torch.distributed.ProcessGroup, got {found}")
        alone = processes is None and not (dist.is_available() and dist.is_initialized())
        self.processes = None if alone else processes or dist.group.WORLD
        self.rank = 0 if alone else dist.get_rank(self.processes)
        self.size = 1 if alone else dist.get_world_size(self.processes)
        if self.rank < 0:
            raise ValueError(f"this process, rank {dist.get_rank()}, is not in the group")

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Flight:
        """``x [S, ...]``, ``send[p]`` rows of it for rank p -> ``receive[p]`` rows of each rank p.

        It comes back at once; :meth:`Flight.wait` gives the rows.
        """
        if self.size == 1:
            return Flight(x, x, None)
        received = x.new_empty(sum(receive), *x.shape[1:])
        x = x.contiguous()
        work = dist.all_to_all_single(
            received, x, list(receive), list(send), group=self.processes, async_op=True
        )
        return Flight(received, x, work)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' tensors; no gradient goes through it."""
        if self.size > 1:
            x = x.detach().clone(memory_format=torch.contiguous_format)
            dist.all_reduce(x, group=self.processes)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """The maximum of all ranks' tensors, number by number; no gradient goes through it."""
        if self.size > 1:
            x = x.detach().clone(memory_format=torch.contiguous_format)
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.processes)
        return x

    def gathered(self, x: Tensor) -> Tensor:
        """``x`` of every rank, of one shape on all of them -> ``[P, ...]``."""
        if self.size == 1:
            return x[None]
        found = x.new_empty(self.size, *x.shape)
        # gloo gathers into tensors of a list, NCCL too
        dist.all_gather(list(found.unbind()), x.contiguous(), group=self.processes)
        return found

    def from_first(self, x: Tensor) -> None:
        """Write what the first rank has into ``x``."""
        if self.size > 1:
            assert self.processes is not None
            # a broadcast writes into memory that lies in order
            whole = x.contiguous()
            dist.broadcast(whole, dist.get_global_rank(self.processes, 0), self.processes)
            if whole is not x:
                x.copy_(whole)

    def told(self, x: Any) -> list[Any]:
        """What each rank says: any object that can be pickled."""
        if self.size == 1:
            return [x]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, x, group=self.processes)
        return found

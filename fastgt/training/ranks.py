"""The processes that share a training: ``torchrun --nproc-per-node P -m fastgt train ...``.

Every process has the whole data set and takes every P-th example of each batch. Sums are taken over
all of them, those of batch norms too, so that P processes learn what one learns, up to rounding and
to random numbers: dropout and signs are drawn by each for itself.

With ``--graph-parallel P`` the only example is one graph, of which each process takes some rows.
Then P processes learn what one learns, up to rounding, dropout too: it is drawn by the numbers of
nodes and edges.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastgt.distributed import over_ranks, sync_gradients, sync_parameters
from fastgt.distributed.batch_norm import RankBatchNorm
from fastgt.distributed.group import Group


class Ranks:
    """One process among ``size``; alone, all its methods give back what they get.

    Attributes:
        rank: Number of this process; 0 writes files and prints.
        size: How many there are.
        group: All of them.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size, self.group = rank, size, Group()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, chosen: Tensor) -> Tensor:
        """This process's examples of a batch."""
        return chosen[self.rank :: self.size]

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes; no gradient goes through it."""
        return x if self.size == 1 else self.group.sum(x)

    def mean(self, loss: Tensor) -> Tensor:
        """The loss of all examples of a batch, of what :class:`Task` gives in each process."""
        return self.total(loss) / self.size

    def largest(self, x: float) -> float:
        """Of all processes' numbers."""
        return x if self.size == 1 else max(self.gathered(x))

    def gathered(self, x: Any) -> list[Any]:
        """Of each process what it gave."""
        return [x] if self.size == 1 else self.group.told(x)

    def told(self, x: Any) -> Any:
        """What process 0 gave."""
        return x if self.size == 1 else self.group.told_by_first(x)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training; its own batch norms become those of all ranks."""
        if self.size == 1:
            return model
        # a group of their own: their sums and those of gradients go in no common order
        group = Group(dist.new_group()).unchecked()
        for layer in model.modules():
            if type(layer) is nn.BatchNorm1d:
                layer.__class__ = RankBatchNorm
                layer.group = group  # type: ignore[assignment]
        return DistributedDataParallel(model, broadcast_buffers=False)

    def divided(self, loss: Tensor, weight: Tensor) -> Tensor:
        """A sum over this process's examples, divided so that :meth:`mean` is that of all."""
        return loss * self.size / self.total(weight)

    def own_seed(self, seed: int) -> int:
        """Of what this process draws for itself."""
        return seed + self.rank

    def sum_gradients(self, model: nn.Module) -> None:
        """After a backward: DistributedDataParallel has done it by then."""


class GraphRanks(Ranks):
    """Processes that each have some rows of one graph: their shares of a loss are added."""

    def __init__(self, group: Group):
        super().__init__(group.rank, group.size)
        self.group = group

    def share(self, chosen: Tensor) -> Tensor:
        """The one example: all processes take it together."""
        return chosen

    def divided(self, loss: Tensor, weight: Tensor) -> Tensor:
        """A sum over this process's nodes, divided so that the sum over processes is the mean."""
        return loss / self.total(weight)

    def mean(self, loss: Tensor) -> Tensor:
        return self.total(loss)

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model itself, its batch norms and dropouts those of all processes."""
        sync_parameters(model, self.group)
        return over_ranks(model)

    def own_seed(self, seed: int) -> int:
        """The same for all: what is drawn goes by the numbers of nodes and edges."""
        return seed

    def sum_gradients(self, model: nn.Module) -> None:
        sync_gradients(model, self.group)


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """The processes that torchrun started, and this one's device; alone without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), size), device
    finally:
        dist.destroy_process_group()

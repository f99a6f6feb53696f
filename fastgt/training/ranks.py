"""The processes that share a training: ``torchrun --nproc-per-node P -m fastgt train ...``.

Every process has the whole data set and takes every P-th example of each batch. Sums are taken over
all of them, those of batch norms too, so that P processes learn what one learns, up to rounding and
to random numbers: dropout and signs are drawn by each for itself.
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

from fastgt.distributed.batch_norm import RankBatchNorm
from fastgt.distributed.group import Group


class Ranks:
    """One process among ``size``; alone, all its methods give back what they get.

    Attributes:
        rank: Number of this process; 0 writes files and prints.
        size: How many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, chosen: Tensor) -> Tensor:
        """This process's examples of a batch."""
        return chosen[self.rank :: self.size]

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes; no gradient goes through it."""
        if self.size > 1:
            x = x.detach().clone()
            dist.all_reduce(x)
        return x

    def largest(self, x: float) -> float:
        """Of all processes' numbers."""
        return x if self.size == 1 else max(self.gathered(x))

    def gathered(self, x: Any) -> list[Any]:
        """Of each process what it gave."""
        if self.size == 1:
            return [x]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, x)
        return found

    def told(self, x: Any) -> Any:
        """What process 0 gave."""
        if self.size == 1:
            return x
        content = [x]
        dist.broadcast_object_list(content, src=0)
        return content[0]

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training; its own batch norms become those of all ranks."""
        if self.size == 1:
            return model
        # a group of their own: their sums and those of gradients go in no common order
        group = Group(dist.new_group())
        for layer in model.modules():
            if type(layer) is nn.BatchNorm1d:
                layer.__class__ = RankBatchNorm
                layer.group = group  # type: ignore[assignment]
        return DistributedDataParallel(model, broadcast_buffers=False)


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

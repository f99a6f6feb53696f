"""Parameters and gradients of a model on the ranks of a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastgt.distributed.agreement import agree
from fastgt.distributed.group import Group

_BUCKET = 2**25  # bytes of gradients that are summed at once


@torch.no_grad()
def sync_parameters(
    model: nn.Module, group: dist.ProcessGroup | DeviceMesh | Group | None = None
) -> None:
    """Give every rank the parameters and buffers of the group's first one.

    Args:
        model: The same model on every rank. Its parameters may be sharded over other groups, as by
            FSDP2: a rank then has the shard that the group's first one has.
        group: As of :class:`fastgt.distributed.DistributedGraph`.

    Raises:
        ValueError: A parameter is sharded over ranks of this group; names it.
        RuntimeError: Ranks have tensors of different names, shapes or dtypes; names one.
    """
    ranks = group if isinstance(group, Group) else Group(group)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if not tensors:
        agree(ranks, torch.device("cpu"), "sync_parameters", {})
        return
    told = {name: f"{x.dtype}{list(x.shape)}" for name, x in tensors.items()}
    device, problem = next(iter(tensors.values())).device, _sharded(tensors, ranks)
    agree(ranks, device, "sync_parameters", told, problem)
    for x in tensors.values():
        ranks.from_first(_local(x.data))


@torch.no_grad()
def sync_gradients(
    model: nn.Module, group: dist.ProcessGroup | DeviceMesh | Group | None = None
) -> None:
    """Replace every parameter's gradient by its sum over the ranks: call it after ``backward()``.

    A rank has the loss of its own rows, and what is trained is the sum. So a mean is a rank's
    sum divided by the number of nodes of the whole graph. A loss of graphs, which every rank has,
    is divided by the number of ranks. A parameter that got no gradient on some ranks got 0 there.

    Beside data parallelism over other groups, ``DistributedDataParallel`` or FSDP2 averages over
    those. FSDP2 over this group needs no call: with ``set_gradient_divide_factor(1)`` it sums.

    Args:
        model: The same model on every rank, its parameters equal.
        group: As of :class:`fastgt.distributed.DistributedGraph`.

    Raises:
        ValueError: A parameter is sharded over ranks of this group; names it.
        RuntimeError: Ranks have parameters of different names, shapes or dtypes; names one. Or a
            rank does something else, as where its loss needed no gradient and others wait in their
            backward.
    """
    ranks = group if isinstance(group, Group) else Group(group)
    if ranks.size == 1:
        return
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = list(trained.values())
    device = parameters[0].device if parameters else torch.device("cpu")
    told = {name: f"{p.dtype}{list(p.shape)}" for name, p in trained.items()}
    agree(ranks, device, "sync_gradients", told, _sharded(trained, ranks))
    if not parameters:
        return
    found = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=device)
    anywhere = ranks.largest(found).tolist()
    given = [p for p, there in zip(parameters, anywhere, strict=True) if there]
    for p in given:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([_local(p.grad) for p in given if p.grad is not None]):
        total = ranks.sum(torch.cat([x.flatten() for x in bucket]))
        for x, part in zip(bucket, total.split([x.numel() for x in bucket]), strict=True):
            x.copy_(part.view_as(x))


def _sharded(tensors: Mapping[str, Tensor], group: Group) -> ValueError | None:
    """What is wrong where ranks of the group have different shards of a tensor."""
    from torch.distributed.tensor import DTensor

    if group.processes is None:
        return None
    others = {*dist.get_process_group_ranks(group.processes)} - {dist.get_rank()}
    for name, x in tensors.items():
        if isinstance(x, DTensor) and others & {*x.device_mesh.mesh.flatten().tolist()}:
            return ValueError(
                f"{name} is sharded over ranks of the group, which sums it by itself: as of FSDP2, "
                "with set_gradient_divide_factor(1)"
            )
    return None


def _local(x: Tensor) -> Tensor:
    """The memory that this rank has of it."""
    from torch.distributed.tensor import DTensor

    return x.to_local() if isinstance(x, DTensor) else x


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order: of one dtype, together not larger than a message, or one alone."""
    bucket: list[Tensor] = []
    for x in tensors:
        full = sum(y.nbytes for y in bucket) + x.nbytes > _BUCKET
        if bucket and (full or x.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(x)
    if bucket:
        yield bucket

"""What a rank hands to torch.distributed, and which tensors it makes, counted on the rank."""

import gc
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from distributed_models import MODELS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgt.distributed import DistributedGraph, Group, load_partition, over_ranks, sync_gradients

SUM = dist.ReduceOp.SUM


class Sent:
    """Bytes of this rank by collective: to other ranks, and of what is reduced."""

    def __init__(self, group):
        self.rank = group.rank
        self.to_others, self.summed, self.maxima, self.gathered = 0, 0, 0, 0

    @contextmanager
    def counting(self):
        exchange, reduce, gather = dist.all_to_all_single, dist.all_reduce, dist.all_gather

        def all_to_all(received, x, receive, send, **how):
            row = x[:1].nbytes if len(x) else 0
            self.to_others += row * (sum(send) - send[self.rank])
            return exchange(received, x, receive, send, **how)

        def all_reduce(x, op=SUM, **how):
            if op == SUM:
                self.summed += x.nbytes
            else:
                self.maxima += x.nbytes
            return reduce(x, op, **how)

        def all_gather(found, x, **how):
            self.gathered += x.nbytes
            return gather(found, x, **how)

        with (
            mock.patch.object(dist, "all_to_all_single", all_to_all),
            mock.patch.object(dist, "all_reduce", all_reduce),
            mock.patch.object(dist, "all_gather", all_gather),
        ):
            yield

    def taken(self):
        """What was counted since the last time."""
        found = self.to_others, self.summed, self.maxima
        self.to_others, self.summed, self.maxima = 0, 0, 0
        return found


def fetched(group, op, graph, part, shapes, dtype, overlap, without=()):
    """An operator on columns -> bytes sent in its forward and in its backward, and the formula's.

    ``shapes``: of each argument, of what and how its rows are made. Arguments in ``without`` get
    no gradient.
    """
    ranks = Group(group)
    shard = DistributedGraph.from_graph(graph, part, ranks, overlap=overlap, check=False)
    sizes = {"row": shard.num_rows, "column": shard.num_cols, "edge": shard.num_edges}
    tensors = {
        name: torch.randn(
            [sizes[kind], *shape] if kind in sizes else shape,
            dtype=dtype,
            requires_grad=name not in without,
        )
        for name, (kind, *shape) in shapes.items()
    }
    channels = [
        torch.Size(shape).numel() if kind == "column" else 0 for kind, *shape in shapes.values()
    ]
    learnt = [c for c, name in zip(channels, shapes, strict=True) if name not in without]
    sent = Sent(ranks)
    with sent.counting():
        out = op(**tensors, graph=shard)
        forward = sent.taken()
        out.sum().backward()
        backward = sent.taken()
    formula = shard.bytes_of_exchange(sum(channels), dtype)
    back = shard.bytes_of_exchange(sum(learnt), dtype)[::-1]
    return forward, backward, formula[0], back[0]


def over_graphs(group, op, graph, part, shapes, dtype, options):
    """An operator over the graphs of a batch -> bytes in its forward and in its backward."""
    ranks = Group(group)
    shard = DistributedGraph.from_graph(graph, part, ranks, check=False)
    tensors = {
        name: torch.randn(shard.num_rows, *shape, dtype=dtype, requires_grad=True)
        for name, shape in shapes.items()
    }
    sent = Sent(ranks)
    with sent.counting():
        out = op(**tensors, offsets=shard.graph_ptr, **options)
        forward = sent.taken()
        out.sum().backward()
        return forward, sent.taken()


class Made(TorchDispatchMode):
    """Shapes of all tensors that operations give, however short they live."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.shapes |= {x.shape for x in tree_leaves(found) if isinstance(x, Tensor)}
        return found


def reachable():
    """Shapes of all tensors of this process that Python knows."""
    return {x.shape for x in gc.get_objects() if issubclass(type(x), Tensor)}


def trained_from_files(group, name, folder, seed):
    """A step from a folder of parts -> shapes of what the rank made, and of what it then has."""
    ranks, made = Group(group), Made()
    with made:
        shard, tensors = load_partition(folder, ranks)
        torch.manual_seed(seed)
        model = over_ranks(MODELS[name](torch.Generator().manual_seed(seed), _One)[0].double())
        out = model(**tensors, graph=shard)
        out.square().sum().backward()
        sync_gradients(model, ranks)
        torch.optim.Adam(model.parameters()).step()
    return made.shapes, reachable(), (shard.num_rows, len(shard.part.halo), shard.num_edges)


def cut_in_memory(group, graph, part):
    """Shapes of what a rank has that cuts the graph itself, and so has all of it."""
    shard = DistributedGraph.from_graph(graph, part, Group(group))
    return reachable() | {shard.part.rows.shape}


class _One:
    """As small as a graph can be: a model's settings do not depend on it."""

    num_rows = num_edges = 1

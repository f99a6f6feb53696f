"""Trainings on one graph that ranks share: what tests of --graph-parallel run on every rank."""

import os
import signal
import traceback
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastgt import Graph
from fastgt.datasets import NodeSet, load
from fastgt.distributed import Group
from fastgt.encodings import Cache
from fastgt.models import GraphTransformerConfig, SGFormerConfig
from fastgt.training import graph_parallel, loop
from fastgt.training.checkpoint import open_run
from fastgt.training.graph_parallel import GraphParallel, shared
from fastgt.training.inputs import prepared
from fastgt.training.published_recipes import RECIPES as PUBLISHED
from fastgt.training.ranks import GraphRanks
from fastgt.training.recipe import Recipe
from fastgt.training.train import start

N, CLASSES = 90, 3
CPU = torch.device("cpu")
RECIPES = {
    "cora": PUBLISHED["sgformer", "cora"],
    "sgformer": Recipe(
        "sgformer",
        "ring",
        SGFormerConfig(node_features=5, out_dim=CLASSES, dim=8, layers=2, dropout=0.3),
        lr=0.01,
        epochs=5,
        attention_decay=1e-3,
        weight_decay=5e-4,
        schedule="constant",
    ),
    "graph_transformer": Recipe(
        "graph_transformer",
        "ring",
        GraphTransformerConfig(
            node_types=4, out_dim=CLASSES, dim=8, heads=2, layers=2, pe_dim=2, dropout=0.2
        ),
        lr=0.01,
        epochs=5,
        clip=1.0,
        loss="class_weighted_cross_entropy",
    ),
}


RECIPES["sgformer without norms"] = replace(
    RECIPES["sgformer"], config=replace(RECIPES["sgformer"].config, norm=False)
)
RECIPES["graph_transformer with layer norms"] = replace(
    RECIPES["graph_transformer"],
    config=replace(RECIPES["graph_transformer"].config, norm="layer"),
)


def data(model):
    """Three classes on a ring with chords; what a node carries is its class, and noise.

    Of ``"cora"``, the data set.
    """
    if model == "cora":
        return prepared(RECIPES[model], load("cora"), Cache("unused"))
    draw = torch.Generator().manual_seed(1)
    y = torch.randint(CLASSES, (N,), generator=draw)
    place = torch.arange(N)
    other = torch.randint(N, (N,), generator=draw)
    ends = torch.cat([torch.stack([place, place.roll(1)]), torch.stack([place, other])], 1)
    noise = torch.randn(N, 5, generator=draw)
    if RECIPES[model].model == "sgformer":
        node, encodings = y[:, None] + noise, {}
    else:
        node = torch.where(noise[:, 0] > 0.5, 3, y)
        encodings = {"pe": torch.randn(N, 2, generator=draw)}
    part = torch.randint(3, (N,), generator=draw)
    split = {name: part == i for i, name in enumerate(("train", "val", "test"))}
    return NodeSet(
        Graph.from_edge_index(torch.cat([ends, ends.flip(0)], 1), N),
        node,
        None,
        y,
        [split],
        encodings,
        "ring",
        CLASSES,
    )


def train(group, folder, model, epochs, at_step=None):
    """Train, or go on, to that epoch. -> its epochs' rows.

    Args:
        group: Of torch.distributed, or a Group.
        at_step: Called with the training before the backward of its every step.
    """
    ranks = GraphRanks(group if isinstance(group, Group) else Group(group))
    recipe, nodes = replace(RECIPES[model], epochs=epochs), data(model)
    share = shared(nodes.graph, GraphParallel(ranks.size), ranks.group)
    kept = recipe.kept(nodes.digest()) | {"processes": ranks.size, "partition": share.digest}
    resumed = ranks.told(open_run(folder, kept) if ranks.leads else None)
    training = start(
        recipe,
        nodes,
        CPU,
        folder=folder,
        kept=kept,
        resumed=resumed,
        ranks=ranks,
        shard=share,
    )
    if at_step is not None:
        loss = training.task.loss

        def interrupted(chosen):
            found = loss(chosen)
            at_step(training)
            return found

        training.task.loss = interrupted
    training.run()
    return training.progress.rows


def parts_of(group, graph, folder):
    """The rows of this rank, and what all ranks say that the partition is."""
    share = shared(graph, GraphParallel(2, folder), Group(group))
    return share.part.rows, share.digest


def shared_without_a_partition(group, graph):
    """The first rank, which finds the partition for all, has a METIS that cannot be loaded."""

    def broken(*args, **options):
        raise ImportError("the partition 'metis' needs pymetis")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_parallel, "partition", broken)
        shared(graph, GraphParallel(2), Group(group))


def stop_in_epoch_3(training):
    # the process that does not lead is told first
    training._stop.asked = training.ranks.rank == 1 and len(training.progress.rows) == 2


def train_until_stopped(group, folder, model, epochs):
    try:
        train(group, folder, model, epochs, stop_in_epoch_3)
    except KeyboardInterrupt as error:
        return str(error)
    raise AssertionError("nothing stopped it")


def die_in_epoch_4(training):
    if training.ranks.rank == 1 and len(training.progress.rows) == 3:
        os.kill(os.getpid(), signal.SIGKILL)


def _doomed(rank, size, folder, model, epochs, told):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=20),
    )
    loop.EPOCH_EVERY = 0.0  # a checkpoint after every epoch
    try:
        train(None, folder / "run", model, epochs, die_in_epoch_4)
    except RuntimeError as error:
        told.put((rank, str(error), traceback.format_exc()))
    # the queue must be empty before the process ends, however it ends
    told.close()
    told.join_thread()


def train_with_a_rank_killed(folder, size, model, epochs):
    """-> by rank what each of the others raised."""
    context = mp.get_context("spawn")
    told = context.Queue()
    processes = [
        context.Process(target=_doomed, args=(rank, size, folder, model, epochs, told))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = dict([told.get(timeout=120)[:2] for _ in range(size - 1)])
    for process in processes:
        process.join(60)
    assert processes[1].exitcode == -signal.SIGKILL
    assert all(process.exitcode is not None for process in processes)
    return found

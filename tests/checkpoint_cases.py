"""Trainings of a model on ranks, with checkpoints: what tests of them run on every rank."""

import torch
from distributed_models import MODELS, graph_of

from fastgt.distributed import (
    DistributedGraph,
    Group,
    load_checkpoint,
    over_ranks,
    save_checkpoint,
    sync_gradients,
)

MODEL = "GraphTransformer"


def trained(group, folder, steps, *, resume=False, save_at=None, hash_of=None, any_partition=False):
    """So many steps of training with dropout, from a checkpoint or from the start.

    -> the model's state and the optimizer's.
    """
    ranks = group if isinstance(group, Group) else Group(group)
    graph = graph_of(1)
    part = torch.arange(graph.num_rows) % ranks.size
    shard = DistributedGraph.from_graph(graph, part, ranks)
    partition = hash_of or shard
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(3)
    model, tensors, _ = MODELS[MODEL](generator, graph)
    model = over_ranks(model.double())
    own = {key: shard.own(x, kind) for key, (kind, x) in tensors.items()}
    # two groups, of which one has a momentum besides
    parameters = list(model.parameters())
    groups = [{"params": parameters[:3], "lr": 0.02}, {"params": parameters[3:]}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, amsgrad=True)
    done = 0
    if resume:
        found = load_checkpoint(
            folder, model, optimizer, partition=partition, any_partition=any_partition, group=ranks
        )
        done = found["step"]
        torch.set_rng_state(found["random"])
        assert found["said"] == {"names": ["a", "b"], "rate": 0.5}
    weight = torch.linspace(-1, 1, graph.num_rows, dtype=torch.float64)[:, None]
    for step in range(done, steps):
        optimizer.zero_grad()
        out = model(**own, graph=shard)
        (out.tanh() * shard.own(weight)).sum().div(graph.num_rows).backward()
        sync_gradients(model, ranks)
        optimizer.step()
        if step + 1 == save_at:
            save_checkpoint(
                folder,
                model,
                optimizer,
                partition=partition,
                step=step + 1,
                group=ranks,
                random=torch.get_rng_state(),
                said={"names": ["a", "b"], "rate": 0.5},
            )
    return model.state_dict(), optimizer.state_dict()


def steps_of_one_rank(group, folder):
    ranks = Group(group)
    save_checkpoint(folder, torch.nn.Linear(2, 1), step=ranks.rank, group=ranks)


def objects_of_one_rank(group, folder):
    ranks = Group(group)
    extra = torch.nn.Linear(1, 1) if ranks.rank else 3
    save_checkpoint(folder, torch.nn.Linear(2, 1), group=ranks, extra=extra)


def loaded(group, folder, width=2, partition=None):
    model = torch.nn.Linear(width, 1)
    return load_checkpoint(folder, model, partition=partition, group=group)


def with_options(group, function, args, options):
    return function(group, *args, **options)

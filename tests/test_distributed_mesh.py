"""Data parallel beside graph parallel: a mesh of ranks trains as one process on all examples."""

import pytest
import torch
from distributed_models import MODELS, graph_of
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from fastgt.distributed import DistributedGraph, Group, over_ranks, sync_gradients

NAMES = "GraphTransformer", "GraphGPS with softmax"
EXAMPLES = 2


def made(name, seed):
    """The model, of the same parameters everywhere, and an example's graph and tensors."""
    torch.manual_seed(seed)
    model, _, kind = MODELS[name](torch.Generator(), graph_of(0))
    return over_ranks(model.double()), kind


def loss_of(model, name, kind, example, shard, graph):
    tensors = MODELS[name](torch.Generator().manual_seed(example), graph)[1]
    torch.manual_seed(50 + example)  # dropout: alike on the ranks of a graph
    out = model(**{key: shard.own(x, k) for key, (k, x) in tensors.items()}, graph=shard)
    if kind == "graph":
        return out.square().sum() / shard.group.size
    return out.square().sum()


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def on_the_mesh(group, name, parts, seed):
    mesh = init_device_mesh("cpu", (EXAMPLES, 2), mesh_dim_names=("data", "graph"))
    example = mesh.get_local_rank("data")
    graph = graph_of(example)
    shard = DistributedGraph.from_graph(graph, parts[example], mesh["graph"])
    model, kind = made(name, seed)
    parallel = DistributedDataParallel(model, process_group=mesh.get_group("data"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(parallel, name, kind, example, shard, graph).backward()
    sync_gradients(model, mesh["graph"])
    grads = gradients(model)
    optimizer.step()
    return grads, dict(model.named_parameters())


def on_one_process(name, seed):
    model, kind = made(name, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for example in range(EXAMPLES):
        graph = graph_of(example)
        whole = torch.zeros(graph.num_rows, dtype=torch.int64)
        shard = DistributedGraph.from_graph(graph, whole, Group())
        (loss_of(model, name, kind, example, shard, graph) / EXAMPLES).backward()
    grads = gradients(model)
    optimizer.step()
    return grads, dict(model.named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_that_of_one_process_on_all_examples(ranks, name):
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randint(2, (20,), generator=generator) for _ in range(EXAMPLES)]
    grads, parameters = on_one_process(name, 8)
    assert grads
    answers = ranks.run(4, on_the_mesh, name, parts, 8)
    for their_grads, theirs in answers:
        assert their_grads.keys() == grads.keys()
        for key, grad in grads.items():
            assert_close(their_grads[key], grad, key)
        for key, x in parameters.items():
            assert_close(theirs[key], x, key)


def assert_close(found, wanted, key):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10, msg=lambda m: f"{key}: {m}")

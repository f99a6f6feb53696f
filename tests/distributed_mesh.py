"""Models whose parameters several ranks share or average, beside one process on all examples."""

import torch
from distributed_models import MODELS, graph_of
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fastgt.distributed import (
    DistributedGraph,
    Group,
    over_ranks,
    sync_gradients,
    sync_parameters,
)

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


def placed(parts):
    """The mesh, this rank's example, its graph, and the rank's share of it."""
    mesh = init_device_mesh("cpu", (EXAMPLES, 2), mesh_dim_names=("data", "graph"))
    example = mesh.get_local_rank("data")
    graph = graph_of(example)
    return mesh, example, graph, DistributedGraph.from_graph(graph, parts[example], mesh["graph"])


def on_the_mesh(group, name, parts, seed):
    mesh, example, graph, shard = placed(parts)
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


def sharded_on_the_mesh(group, name, parts, seed):
    """As ``on_the_mesh``, with parameters that FSDP2 shards over the examples."""
    mesh, example, graph, shard = placed(parts)
    model, kind = made(name, seed)
    fully_shard(model, mesh=mesh["data"])
    sync_parameters(model, mesh["graph"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, name, kind, example, shard, graph).backward()
    sync_gradients(model, mesh["graph"])
    grads = {n: x.full_tensor() for n, x in gradients(model).items()}
    optimizer.step()
    return grads, {n: p.full_tensor() for n, p in model.named_parameters()}


def sharded_over_the_graph(group, name, part, seed):
    """FSDP2 over the ranks of the graph sums their gradients itself."""
    graph = graph_of(0)
    shard = DistributedGraph.from_graph(graph, part, group)
    model, kind = made(name, seed)
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    model.set_gradient_divide_factor(1.0)
    loss_of(model, name, kind, 0, shard, graph).backward()
    return {n: x.full_tensor() for n, x in gradients(model).items()}


def synchronized_where_sharded(group, function):
    model = torch.nn.Linear(4, 4)
    fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu"))
    function(model, group)


def whole_graph_gradients(name, seed):
    (model, kind), graph = made(name, seed), graph_of(0)
    owners = torch.zeros(graph.num_rows, dtype=torch.int64)
    loss_of(
        model, name, kind, 0, DistributedGraph.from_graph(graph, owners, Group()), graph
    ).backward()
    return gradients(model)

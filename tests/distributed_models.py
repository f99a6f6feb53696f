"""Models on ranks beside one process: a training step of each."""

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastgt import Graph, aggregate, global_attention, neighborhood_attention
from fastgt.distributed import DistributedGraph, Group, over_ranks, sync_gradients
from fastgt.models import (
    EdgeGraphTransformer,
    EdgeGraphTransformerConfig,
    GraphGPS,
    GraphGPSConfig,
    GraphTransformer,
    GraphTransformerConfig,
    SGFormer,
    SGFormerConfig,
)
from fastgt.nn import NeighborhoodAttention


def transformer(generator, graph):
    config = GraphTransformerConfig(
        node_types=3, out_dim=2, dim=8, heads=2, layers=2, pe_dim=2, in_dropout=0.2, dropout=0.3
    )
    n = graph.num_rows
    tensors = {
        "node_type": ("row", torch.randint(3, (n,), generator=generator)),
        "pe": ("row", torch.randn(n, 2, dtype=torch.float64, generator=generator)),
    }
    return GraphTransformer(config), tensors, "row"


def edge_transformer(generator, graph):
    config = EdgeGraphTransformerConfig(
        dim=8, heads=2, layers=2, pe_dim=2, in_dropout=0.2, dropout=0.3, last_edges=False
    )
    n, e = graph.num_rows, graph.num_edges
    tensors = {
        "node_type": ("row", torch.randint(28, (n,), generator=generator)),
        "edge_type": ("edge", torch.randint(4, (e,), generator=generator)),
        "pe": ("row", torch.randn(n, 2, dtype=torch.float64, generator=generator)),
    }
    return EdgeGraphTransformer(config), tensors, "graph"


def gps(**settings):
    def made(generator, graph):
        config = GraphGPSConfig(
            dim=8, heads=2, layers=2, walk_steps=3, walk_dim=3, dropout=0.3, **settings
        )
        n, e = graph.num_rows, graph.num_edges
        tensors = {
            "node": ("row", torch.randint(28, (n,), generator=generator)),
            "edge": ("edge", torch.randint(4, (e,), generator=generator)),
            "walk_pe": ("row", torch.rand(n, 3, dtype=torch.float64, generator=generator)),
        }
        return GraphGPS(config), tensors, "graph"

    return made


def sgformer(generator, graph):
    config = SGFormerConfig(node_features=5, out_dim=3, dim=8, layers=2, dropout=0.3)
    x = torch.randn(graph.num_rows, 5, dtype=torch.float64, generator=generator)
    return SGFormer(config), {"node": ("row", x)}, "row"


MODELS = {
    "GraphTransformer": transformer,
    "EdgeGraphTransformer": edge_transformer,
    "GraphGPS with softmax": gps(attention_dropout=0.5),
    "GraphGPS with gated convolutions": gps(local="gatedgcn", attention="linear", norm="graph"),
    "GraphGPS with Performer": gps(local="pna", attention="performer", performer_width=4),
    "SGFormer": sgformer,
}


def graph_of(seed):
    """A batch of two graphs with a hub, self loops and isolated nodes."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(9, (2, 31), generator=generator)
    ends[0, ::3] = 0
    one = Graph.from_edge_index(ends, 10)
    return Graph.batch([one, Graph.from_edge_index(ends[:, :17].flip(0), 10)])


def step(group, name, graph, part, seed):
    """A step of training on this rank -> its outputs before and after, parameters and gradients."""
    ranks = group if isinstance(group, Group) else Group(group)
    shard = DistributedGraph.from_graph(graph, part, ranks)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model, tensors, kind = MODELS[name](generator, graph)
    model = over_ranks(model.double())
    own = {key: shard.own(x, k) for key, (k, x) in tensors.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = []
    for _ in range(2):
        optimizer.zero_grad()
        out = model(**own, graph=shard)
        weight = torch.linspace(-1, 1, graph.num_rows, dtype=out.dtype)[:, None]
        if kind == "row":
            loss = (out.tanh() * shard.own(weight)).sum() / graph.num_rows
        else:
            loss = (out.tanh() * weight[: len(out)]).sum() / ranks.size
        loss.backward()
        sync_gradients(model, ranks)
        outputs.append(out.detach())
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    model.eval()
    outputs.append(model(**own, graph=shard).detach())
    return shard.part.rows, kind, outputs, grads, model.state_dict()


def widths_sent(group, dim, context_dim):
    """-> the channels of every row that a module's attention sends and receives, there and back."""
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]))
    shard = DistributedGraph.from_graph(graph, torch.tensor([0, 1, 0, 1]), group)
    module = NeighborhoodAttention(dim, 2, context_dim=context_dim)
    x = torch.randn(2, dim, requires_grad=True)
    context = torch.randn(2, context_dim, requires_grad=True)
    widths, real = [], Group.all_to_all

    def recorded(self, y, send, receive):
        widths.append(y.shape[1])
        return real(self, y, send, receive)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Group, "all_to_all", recorded)
        module(x, shard, context=context).sum().backward()
    return widths


class Normed(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4, **options).double()

    def forward(self, x, graph):
        return self.norm(x)


def normed(group, graph, part, x, training, options):
    """A batch norm of the rank's rows -> these rows' numbers, what it gives, x's gradient, and its
    running statistics."""
    ranks = group if isinstance(group, Group) else Group(group)
    shard = DistributedGraph.from_graph(graph, part, ranks)
    model = over_ranks(Normed(**options)).train(training)
    own = shard.own(x).requires_grad_()
    out = model(own, shard)
    (grad,) = torch.autograd.grad(out.tanh().sum(), own)
    return shard.part.rows, out.detach(), grad, dict(model.named_buffers())


class Attending(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(4, 8).double(), torch.nn.BatchNorm1d(8).double()

    def forward(self, x, graph):
        h = self.norm(self.linear(x)).view(-1, 2, 4)
        near = neighborhood_attention(h, h, h, graph)
        return near + global_attention(h, h, h, graph.graph_ptr)


def compiled_by_some(group, graph, part, x, compiling, **options):
    """The model's gradients where the ranks in ``compiling`` compile it, and where none does."""
    # what takes long comes before ranks wait for each other
    torch.compile(torch.nn.Linear(1, 1), backend="eager")(torch.ones(1, 1))
    shard = DistributedGraph.from_graph(graph, part, group)
    torch.manual_seed(0)
    model = over_ranks(Attending())
    mine = shard.group.rank in compiling
    found = []
    for run in (torch.compile(model, backend="eager", **options) if mine else model, model):
        model.zero_grad()
        run(shard.own(x), shard).tanh().sum().backward()
        sync_gradients(model, group)
        found.append([p.grad.clone() for p in model.parameters()])
    return found


class Checkpointed(torch.nn.Module):
    """A part of the model is computed again in the backward, if so asked."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(4, 8).double(), torch.nn.BatchNorm1d(8).double()
        self.dropout = torch.nn.Dropout(0.5)

    def part(self, x):
        return self.dropout(self.norm(self.linear(x)).tanh())

    def forward(self, x, graph, **how):
        h = checkpoint(self.part, x, **how) if how else self.part(x)
        return aggregate(h, graph)


def computed_again(group, graph, part, x, **how):
    """The gradients of a model that is checkpointed, and of one that is not."""
    shard = DistributedGraph.from_graph(graph, part, group)
    torch.manual_seed(0)
    model = over_ranks(Checkpointed())
    found = []
    for options in (how, {}):
        model.zero_grad()
        torch.manual_seed(1)
        own = shard.own(x).requires_grad_()
        model(own, shard, **options).tanh().sum().backward()
        sync_gradients(model, group)
        found.append([own.grad, *(p.grad.clone() for p in model.parameters())])
    return found


def copied(group, graph, part, x):
    """What a model gives, and copies of it that are made after it ran."""
    shard = DistributedGraph.from_graph(graph, part, group)
    torch.manual_seed(0)
    model = over_ranks(Checkpointed())
    model(shard.own(x), shard)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    found = []
    for one in (model, *copies):
        torch.manual_seed(1)
        found.append(one(shard.own(x), shard).detach())
    return found

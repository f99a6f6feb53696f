"""What ranks refuse, and what one of them does otherwise than the others: each function is called
on every rank of a group of two."""

import torch
import torch.distributed as dist

from fastgt import Graph, global_attention, linear_attention, neighborhood_attention, segment_sum
from fastgt.distributed import (
    DistributedGraph,
    Group,
    halo_exchange,
    head_parallel,
    load_partition,
    over_ranks,
    sync_gradients,
    sync_parameters,
)
from fastgt.distributed.part import cut
from fastgt.models import GraphTransformer, GraphTransformerConfig

N, H, D = 8, 2, 4
PART = torch.arange(N) % 2
OTHER = torch.arange(N) // 4


def ring():
    place = torch.arange(N)
    ends = torch.stack([torch.cat([place, place]), torch.cat([place.roll(-1), place.roll(3)])])
    return Graph.from_edge_index(ends, N)


def shard(group, **options):
    return DistributedGraph.from_graph(ring(), PART, group, **options)


def rows(group, *shape):
    """A tensor of the rank's own rows."""
    return torch.randn(N // 2, *shape, generator=torch.Generator().manual_seed(Group(group).rank))


def second(group):
    return Group(group).rank == 1


def well(group):
    """That the group still works."""
    x = rows(group, H, D)
    return neighborhood_attention(x, x, x, shard(group)).shape


def part_of_three(group):
    owners = torch.arange(N) % 3
    DistributedGraph(cut(ring(), owners, owners, Group(group).rank, 3), group)


def ranks_that_are_none(group):
    DistributedGraph.from_graph(ring(), torch.arange(N) % 3, group)


def other_rank(group):
    """Each is given the other's part."""
    DistributedGraph(cut(ring(), PART, PART, 1 - Group(group).rank, 2), group)


def other_owners(group):
    DistributedGraph.from_graph(ring(), OTHER if second(group) else PART, group)


def other_edges(group):
    graph = ring()
    if second(group):
        graph = Graph.from_edge_index(graph.edge_index.flip(0), N)
    DistributedGraph.from_graph(graph, PART, group)


def other_parts(group):
    """Parts of two partitions of one graph, with as many rows and edges."""
    owners = OTHER if second(group) else PART
    DistributedGraph(cut(ring(), owners, owners, Group(group).rank, 2), group)


def fewer_rows(group):
    owners = (torch.arange(N) == 7).long() if second(group) else PART
    DistributedGraph(cut(ring(), owners, owners, Group(group).rank, 2), group)


def folders(group, first, other):
    load_partition(other if second(group) else first, group)


def owners_of_one_rank(group):
    DistributedGraph.from_graph(ring(), "metis" if second(group) else PART, group)


def graph_of_one_rank(group):
    graph = ring().edge_index if second(group) else ring()
    DistributedGraph.from_graph(graph, PART, group)


def part_of_one_rank(group):
    DistributedGraph(ring() if second(group) else cut(ring(), PART, PART, 0, 2), group)


def check_of_one_rank(group):
    shard(group, check=not second(group))


def whole_tensor(group):
    x = torch.randn(N, H, D)
    neighborhood_attention(x, x, x, shard(group))


def whole_tensor_of_one_rank(group):
    x = rows(group, H, D)
    k = torch.randn(N, H, D) if second(group) else x
    neighborhood_attention(x, k, k, shard(group))


def whole_edges_of_one_rank(group):
    x, graph = rows(group, H, D), shard(group)
    bias = torch.randn(2 * N if second(group) else graph.num_edges, H)
    neighborhood_attention(x, x, x, graph, edge_bias=bias)


def whole_tensor_over_graphs(group):
    segment_sum(torch.randn(N, D) if second(group) else rows(group, D), shard(group).graph_ptr)


def whole_tensor_to_exchange(group):
    halo_exchange(torch.randn(N, D) if second(group) else rows(group, D), shard(group))


def not_in_the_group(group):
    """Of what new_group gives the processes that it leaves out."""
    DistributedGraph.from_graph(ring(), PART, dist.GroupMember.NON_GROUP_MEMBER)


def calls(group, options):
    """An attention, with options that are pairs: of the first rank and of the second."""
    x = rows(group, H, D)
    mine = {name: pair[Group(group).rank] for name, pair in options.items()}
    neighborhood_attention(x, x, x, shard(group), **mine)


def dtypes(group):
    x = rows(group, H, D)
    x = x.double() if second(group) else x
    neighborhood_attention(x, x, x, shard(group))


def widths(group):
    x = rows(group, H, D + Group(group).rank)
    neighborhood_attention(x, x, x, shard(group))


def gradients_of_one_rank(group):
    x = rows(group, H, D).requires_grad_(second(group))
    neighborhood_attention(x, x, x, shard(group))


def one_tensor_of_one_rank(group):
    """Keys and values of equal numbers: one rank sends them once, the other twice."""
    x = rows(group, H, D)
    neighborhood_attention(x, x, x.clone() if second(group) else x, shard(group))


def autocast_of_one_rank(group, name):
    x, graph = rows(group, H, D), shard(group)
    with torch.autocast("cpu", torch.bfloat16, enabled=second(group)):
        ATTENTIONS[name](x, graph)


def feature_maps(group):
    x = rows(group, H, D)
    linear_attention(x, x, x, shard(group).graph_ptr, feature_map=("elu", "relu")[second(group)])


def seeds_over_graphs(group):
    x, seed = rows(group, H, D), "four" if second(group) else 4
    global_attention(x, x, x, shard(group).graph_ptr, dropout_p=0.5, dropout_seed=seed)


def generators(group):
    """No seed is given, and the ranks' generators differ."""
    torch.manual_seed(Group(group).rank)
    x = rows(group, H, D)
    neighborhood_attention(x, x, x, shard(group), dropout_p=0.5)


def other_operator(group):
    x, graph = rows(group, H, D), shard(group)
    if second(group):
        segment_sum(x, graph.graph_ptr)
    else:
        neighborhood_attention(x, x, x, graph)


def model(**changed):
    torch.manual_seed(0)
    config = {"node_types": 3, "out_dim": 2, "dim": 8, "heads": 2, "layers": 1} | changed
    return GraphTransformer(GraphTransformerConfig(**config))


def types(group):
    return torch.arange(N // 2) % 3


def gradients_of_models(group):
    net = model(out_dim=2 + Group(group).rank)
    sync_gradients(net, group)


def gradients_of_no_parameters(group):
    sync_gradients(model().requires_grad_(not second(group)), group)


def parameters_of_models(group):
    sync_parameters(model(layers=1 + Group(group).rank), group)


def seeds_of_models(group):
    net = over_ranks(model(dropout=0.5))
    torch.manual_seed(Group(group).rank)
    net(types(group), shard(group))


def modes_of_models(group):
    over_ranks(model()).train(second(group))(types(group), shard(group))


def whole_graph_of_one_rank(group):
    """The second rank's model runs on the whole graph, which asks nobody."""
    net, share = over_ranks(model()), shard(group)
    if second(group):
        net(torch.arange(N) % 3, ring())
    else:
        net(types(group), share)
    sync_gradients(net, group)


def whole_nodes_in_a_model(group):
    """The second rank's model refuses what it is given, before it asks anybody."""
    over_ranks(model())(torch.arange(N) % 3 if second(group) else types(group), shard(group))


def wrong_types_in_a_model(group):
    """So do the models of both."""
    over_ranks(model())(types(group).float(), shard(group))


class Dropped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.dropout = torch.nn.BatchNorm1d(D), torch.nn.Dropout(0.5)

    def forward(self, x, graph):
        return self.norm(self.dropout(x))


def whole_tensor_in_a_model(group):
    net, graph = over_ranks(Dropped()), shard(group)
    x = torch.randn(N + 3, D) if second(group) else rows(group, D)
    torch.manual_seed(0)
    net(x, graph)


def modes_of_a_norm(group):
    """A batch norm of one rank keeps its statistics, as one that is not fine-tuned."""
    net = over_ranks(Dropped())
    net.norm.train(not second(group))
    torch.manual_seed(0)
    net(rows(group, D), shard(group))


def channels_of_a_norm(group):
    torch.manual_seed(0)
    over_ranks(Dropped())(rows(group, 1), shard(group))


def kinds_in_a_model(group):
    """One rank drops of nodes what the other drops of edges."""
    net, graph = over_ranks(Dropped()), shard(group)
    x = torch.randn(graph.num_edges if second(group) else N // 2, D)
    torch.manual_seed(0)
    net(x, graph)


ATTENTIONS = {
    "halo": lambda x, graph: neighborhood_attention(x, x, x, graph),
    "ring": lambda x, graph: global_attention(x, x, x, graph.graph_ptr),
    "sum": lambda x, graph: linear_attention(x, x, x, graph.graph_ptr),
    "heads": lambda x, graph: head_parallel(
        neighborhood_attention, x, x, x, ring(), graph.group.processes
    ),
}


def no_backward(group, name, overlap):
    """The loss of the second rank does not depend on the operator."""
    x, graph = rows(group, H, D).requires_grad_(), shard(group, overlap=overlap)
    net = torch.nn.Linear(D, 1)
    out = ATTENTIONS[name](x, graph)
    loss = net(x if second(group) else out).sum()
    loss.backward()
    sync_gradients(net, group)


def other_backward(group, name, overlap):
    """The loss of each rank depends on another call of the operator."""
    graph = shard(group, overlap=overlap)
    first, other = (rows(group, H, D).requires_grad_() for _ in range(2))
    outs = [ATTENTIONS[name](x, graph) for x in (first, other)]
    outs[Group(group).rank].sum().backward()

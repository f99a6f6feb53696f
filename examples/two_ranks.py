"""One graph on several ranks: each has some of the nodes, and all learn as one.

    torchrun --nproc-per-node 2 examples/two_ranks.py
    python examples/two_ranks.py

The graph is cut, each rank takes its share, and the model is called as on one machine. Both
commands print the same losses: dropout and batch norms are those of the whole graph too.
"""

import os

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from fastgt import Graph
from fastgt.distributed import DistributedGraph, over_ranks, partition, sync_gradients
from fastgt.models import GraphTransformer, GraphTransformerConfig

ranks = int(os.environ.get("WORLD_SIZE", "1"))
if ranks > 1:
    dist.init_process_group("gloo")
torch.manual_seed(0)  # alike on all ranks
nodes = 2000
ends = torch.randint(nodes, (2, 10_000))
graph = Graph.from_edge_index(torch.cat([ends, ends.flip(0)], 1), nodes)
kind, label = torch.randint(7, (nodes,)), torch.randint(3, (nodes,))

shard = DistributedGraph.from_graph(graph, partition(graph, ranks, "ldg"))
own_kind, own_label = shard.own(kind), shard.own(label)
model = over_ranks(GraphTransformer(GraphTransformerConfig(7, 3, layers=2, dropout=0.1)))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for step in range(1, 6):
    out = model(own_kind, shard)
    loss = cross_entropy(out, own_label, reduction="sum") / nodes  # this rank's part of the mean
    optimizer.zero_grad()
    loss.backward()
    sync_gradients(model)
    optimizer.step()
    total = float(shard.group.sum(loss.detach()))
    if shard.group.rank == 0:
        print(f"step {step}: loss {total:.5f}, {shard}")
if ranks > 1:
    dist.destroy_process_group()

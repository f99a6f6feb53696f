"""Attention over the edges of a graph, with a bias that learns.

    python examples/attention.py

A row attends to the columns that its edges come from. Here every node should find the node with the
largest number among those that it reads: the bias of an edge learns which one that is.
"""

import torch

from fastgt import Graph, neighborhood_attention

torch.manual_seed(0)
edge_index = torch.randint(100, (2, 1000))  # source above target
graph = Graph.from_edge_index(edge_index, 100)
print(graph)

x = torch.rand(100, 1, 8)  # [nodes, heads, width]
source, target = edge_index
largest = torch.full((100,), -1.0).scatter_reduce(0, target, x[source, 0, 0], "amax")
edge_bias = torch.zeros(1000, 1, requires_grad=True)  # [edges, heads], in edge_index's order
optimizer = torch.optim.Adam([edge_bias], lr=0.3)
reads = graph.row_degree > 0
for step in range(1, 101):
    out = neighborhood_attention(x, x, x, graph, edge_bias=edge_bias)
    loss = (out[reads, 0, 0] - largest[reads]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step in (1, 10, 100):
        print(f"step {step}: loss {loss.item():.6f}")
assert loss < 1e-3

"""Heads are masked, then taken away, and what is left is exported.

    python examples/masked_heads.py

A gate of 0 masks a head: it is neither read nor computed. ``prune_heads`` makes a smaller model of
what is left, with the same outputs. ``torch.export`` writes that to a file, for graphs of any size.
"""

import io
from time import perf_counter

import torch
from torch.export import Dim

from fastgt import Graph, prune_heads
from fastgt.nn import HeadGate, NeighborhoodAttention


def problem(nodes, edges):
    graph = Graph.from_edge_index(torch.randint(nodes, (2, edges)), nodes)
    return torch.randn(nodes, 256), graph


torch.manual_seed(0)
gate = HeadGate(torch.tensor([True, False, False, True, False, False, False, True]))
masked = NeighborhoodAttention(256, heads=8, head_gate=gate).eval().requires_grad_(False)
whole = NeighborhoodAttention(256, heads=8).eval().requires_grad_(False)
smaller = prune_heads(masked).requires_grad_(False)
x, graph = problem(2000, 40_000)
for name, model in (("8 heads", whole), ("3 of 8", masked), ("3 heads", smaller)):
    model(x, graph)
    begin = perf_counter()
    for _ in range(10):
        model(x, graph)
    count = sum(p.numel() for p in model.parameters())
    print(f"{name}: {count:,} parameters, {100 * (perf_counter() - begin):.1f} ms")
print(f"the same outputs: {torch.allclose(smaller(x, graph), masked(x, graph), atol=1e-6)}")

nodes, edges = Dim("nodes"), Dim("edges")
leaves = [{0: nodes + 1}, {}, {0: edges}, {0: edges}]  # of a Graph: row_ptr, graph_ptr, col, edge
shapes = {"x": {0: nodes}, "graph": leaves}
file = io.BytesIO()
torch.export.save(torch.export.export(smaller, (x, graph), dynamic_shapes=shapes), file)
file.seek(0)
program = torch.export.load(file).module()
x, graph = problem(300, 5000)
print(f"exported, and called with {graph}")
print(f"the same outputs: {torch.allclose(program(x, graph), masked(x, graph), atol=1e-6)}")

"""Heads are masked, then taken away, and what is left is exported.

    python examples/masked_heads.py

A gate of 0 masks a head: it is neither read nor computed. ``prune_heads`` makes a smaller model of
what is left, with the same outputs, and ``torch.export`` takes it with its graph.
"""

from time import perf_counter

import torch

from fastgt import Graph, prune_heads
from fastgt.nn import HeadGate, NeighborhoodAttention

torch.manual_seed(0)
graph = Graph.from_edge_index(torch.randint(2000, (2, 40_000)), 2000)
x = torch.randn(2000, 64)
gate = HeadGate(torch.tensor([True, False, False, True, False, False, False, True]))
masked = NeighborhoodAttention(64, heads=8, head_gate=gate).eval()
whole = NeighborhoodAttention(64, heads=8).eval()
smaller = prune_heads(masked)
for name, model in (("8 heads", whole), ("3 of 8", masked), ("3 heads", smaller)):
    with torch.no_grad():
        model(x, graph)
        begin = perf_counter()
        for _ in range(10):
            model(x, graph)
    count = sum(p.numel() for p in model.parameters())
    print(f"{name}: {count:,} parameters, {100 * (perf_counter() - begin):.2f} ms")
with torch.no_grad():
    torch.testing.assert_close(smaller(x, graph), masked(x, graph))
    program = torch.export.export(smaller, (x, graph))
    torch.testing.assert_close(program.module()(x, graph), smaller(x, graph))
print("exported")

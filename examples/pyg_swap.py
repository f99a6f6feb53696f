"""A model of torch-geometric on fastgt: one line changes, and the numbers stay.

    python examples/pyg_swap.py

Two copies of a model train on the same data. One of them is accelerated: its layers keep their
parameters, their ``state_dict`` and their names, and compute on fastgt. Where the model's code is
yours, its import may change instead: ``from fastgt.pyg import GATv2Conv, TransformerConv``.
"""

import copy
from time import perf_counter

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch_geometric.nn import GATv2Conv, TransformerConv

import fastgt


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = TransformerConv(32, 16, heads=4, edge_dim=8)
        self.second = GATv2Conv(64, 16, heads=4)
        self.out = nn.Linear(64, 5)

    def forward(self, x, edge_index, edge_attr):
        x = self.first(x, edge_index, edge_attr).relu()
        return self.out(self.second(x, edge_index).relu())


torch.manual_seed(0)
edge_index = torch.randint(1000, (2, 20_000))
x, edge_attr, y = torch.randn(1000, 32), torch.randn(20_000, 8), torch.randint(5, (1000,))
theirs = Model()
ours = copy.deepcopy(theirs)
print(fastgt.accelerate(ours))  # the line

losses, seconds = [], []
for model in (theirs, ours):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    begin = perf_counter()
    for _ in range(10):
        loss = cross_entropy(model(x, edge_index, edge_attr), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses.append(loss.item())
    seconds.append((perf_counter() - begin) / 10)
print(f"loss after 10 steps: {losses[0]:.5f} and {losses[1]:.5f}")
print(f"time of a step: {1000 * seconds[0]:.0f} ms and {1000 * seconds[1]:.0f} ms")

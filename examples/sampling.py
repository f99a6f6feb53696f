"""Nodes of a large graph are classified from samples of their neighbourhoods.

    python examples/sampling.py

The graph is Debian's: packages that depend on each other, each with the words of its description
and one of 58 sections. A step takes 512 packages, 10 neighbours of each, and 5 of each of these.
What it needs of memory does not grow with the graph.
"""

from importlib.resources import files

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from fastgt import Graph
from fastgt.nn import NeighborhoodAttention


class Classifier(nn.Module):
    def __init__(self, dim=64, layers=2):
        super().__init__()
        self.words = nn.EmbeddingBag(2001, dim, mode="sum", padding_idx=0)
        self.attention = nn.ModuleList(NeighborhoodAttention(dim, 4) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.out = nn.Linear(dim, 58)

    def forward(self, seeds):
        blocks, nodes, _ = graph.sample(seeds, [10, 5])
        x = self.words(words[nodes])
        for attention, norm, block in zip(self.attention, self.norms, blocks, strict=True):
            rows = x[: block.num_rows]  # the nodes that attend stand first
            x = norm(rows + attention(rows, block, context=x))
        return self.out(x)


with np.load(files("fastgt.data") / "debian.npz") as raw:
    names = "edge_index", "y", "split", "x_indptr", "x_indices"
    depends, y, split, ptr, word = (torch.from_numpy(raw[x].astype(np.int64)) for x in names)
words = pad_sequence((word + 1).split(ptr.diff().tolist()), batch_first=True)  # 0: no word
graph = Graph.from_edge_index(torch.cat([depends, depends.flip(0)], 1), len(y))
train, test = ((split == part).nonzero()[:, 0] for part in (0, 2))
print(f"{graph}\nthe largest section has {y.bincount().max() / len(y):.0%} of the packages")

torch.manual_seed(0)
model = Classifier()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for step, seeds in enumerate(train[torch.randperm(len(train))].split(512), 1):
    loss = cross_entropy(model(seeds), y[seeds])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.2f}")
with torch.no_grad():
    found = torch.cat([model(seeds).argmax(1) for seeds in test.split(2000)])
print(f"{(found == y[test]).float().mean():.0%} of {len(test):,} other packages are right")

"""Sampled mini-batches on Debian's packages: each step computes the neighbourhood of some seeds.

    python examples/models/sampled.py --batch 1024 --channels 64

`graph.sample` draws 15 neighbours of each seed, then 10 of each node that is there so far. It gives
a bipartite Graph for each layer. Every epoch prints the share of its time that this took. The data
is a part of fastgt. Two lines make the layers fastgt's: their import, and their call with a block.
"""

import argparse
from importlib.resources import files
from time import perf_counter

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout

from fastgt import Graph
from fastgt.pyg import TransformerConv

parser = argparse.ArgumentParser()
parser.add_argument("--batch", type=int, default=1024, help="seeds of a step")
parser.add_argument("--channels", type=int, default=64)
parser.add_argument("--fanouts", type=int, nargs="+", default=[15, 10])
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--steps", type=int, help="of an epoch; default: all packages are seeds once")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

with np.load(files("fastgt.data") / "debian.npz") as raw:
    one_way = torch.from_numpy(raw["edge_index"]).long()
    y, split = torch.from_numpy(raw["y"]).long(), torch.from_numpy(raw["split"])
    word_count = torch.from_numpy(raw["x_indptr"]).long().diff()
    word = torch.from_numpy(raw["x_indices"].astype(np.int64))
graph = Graph.from_edge_index(torch.cat([one_way, one_way.flip(0)], 1), len(y))
words = torch.zeros(len(y), int(word_count.max()), dtype=torch.int64)  # 0: none
words[torch.arange(words.shape[1]) < word_count[:, None]] = word + 1


class Sampled(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.words = nn.EmbeddingBag(2001, channels, mode="sum", padding_idx=0)
        self.convs = nn.ModuleList(
            TransformerConv(channels, channels // 4, heads=4, beta=True) for _ in args.fanouts
        )
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in args.fanouts)
        self.out = nn.Linear(channels, classes)

    def forward(self, words, blocks):
        """`words` of the columns of the first block -> classes of the rows of the last one."""
        x = self.words(words)
        for conv, norm, block in zip(self.convs, self.norms, blocks, strict=True):
            # targets are the first of the sources
            x = dropout(norm(conv((x, x[: block.num_rows]), block)).relu(), 0.2, self.training)
        return self.out(x)


def batches(part):
    """Seeds of each step, in another order at every call."""
    nodes = (split == part).nonzero().flatten()
    nodes = nodes[torch.randperm(len(nodes), generator=generator)]
    return nodes.split(args.batch)[: args.steps]


def train():
    """-> seconds of drawing, and of everything."""
    model.train()
    drawing, begin = 0.0, perf_counter()
    for seeds in batches(0):
        start = perf_counter()
        part = graph.sample(seeds, args.fanouts, generator=generator)
        for block in part.blocks:
            _ = block.columns  # gradients need it: made here, it is measured
        drawing += perf_counter() - start
        optimizer.zero_grad()
        loss = cross_entropy(model(words[part.n_id], part.blocks), y[seeds])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return drawing, perf_counter() - begin


@torch.no_grad()
def accuracy(part):
    model.eval()
    right, count = 0, 0
    for seeds in batches(part):
        found = graph.sample(seeds, args.fanouts, generator=generator)
        out = model(words[found.n_id], found.blocks)
        right, count = right + int((out.argmax(1) == y[seeds]).sum()), count + len(seeds)
    return right / count


torch.manual_seed(args.seed)
generator = torch.Generator().manual_seed(args.seed)
model = Sampled(args.channels, int(y.max()) + 1)
optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
losses = []
for epoch in range(1, args.epochs + 1):
    drawing, whole = train()
    print(
        f"epoch {epoch}: loss {losses[-1]:.4f}, validation {accuracy(1):.3f}, {whole:.2f} s, "
        f"share of drawing and Graphs: {100 * drawing / whole:.1f} %"
    )
print(f"test accuracy {accuracy(2):.3f}")

"""HGT on Debian's packages: two types of nodes, and three kinds of dependencies between them.

    python examples/models/hgt.py --packages 10000

A package is of the type "library" if its name begins with lib. Its archive section is to be found
from the words of its description and from its dependencies. The data is a part of fastgt. Two lines
make this of a script for torch-geometric: `import fastgt` and `fastgt.accelerate(model)`.
Torch-geometric's layer is slow for many relations where pyg-lib is not installed.
"""

import argparse
from importlib.resources import files

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch_geometric.data import HeteroData
from torch_geometric.nn import HGTConv
from torch_geometric.transforms import ToUndirected

import fastgt

parser = argparse.ArgumentParser()
parser.add_argument("--packages", type=int, default=10000, help="those with most dependencies")
parser.add_argument("--epochs", type=int, default=50)
parser.add_argument("--layers", type=int, default=2)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()


KINDS = "Depends", "Recommends", "Suggests"  # 95 % of the dependencies


def debian(size):
    """The packages, and the words of each: where they begin, and all one after another."""
    with np.load(files("fastgt.data") / "debian.npz") as raw:
        ends, kind_of = raw["edge_index"], raw["edge_types"][raw["edge_type"]]
        y, split = (torch.from_numpy(raw[name]).long() for name in ("y", "split"))
        word_ptr, word = raw["x_indptr"], torch.from_numpy(raw["x_indices"].astype(np.int64))
        library = np.char.startswith(raw["names"], "lib")
    degree = np.bincount(ends.ravel(), minlength=len(y))
    used = np.zeros(len(y), bool)
    used[np.argsort(-degree, kind="stable")[:size]] = True
    data, place = HeteroData(), np.zeros(len(y), np.int64)
    for kind, of_kind in (("library", used & library), ("other", used & ~library)):
        nodes = np.flatnonzero(of_kind)
        place[nodes] = np.arange(len(nodes))
        data[kind].nodes, data[kind].num_nodes = torch.from_numpy(nodes), len(nodes)
        data[kind].y, data[kind].split = y[nodes], split[nodes]
        for other, of_other in (("library", used & library), ("other", used & ~library)):
            for name in KINDS:
                there = (kind_of == name) & of_kind[ends[0]] & of_other[ends[1]]
                data[kind, name, other].edge_index = torch.from_numpy(ends[:, there])
    for x in data.edge_stores:
        x.edge_index = torch.from_numpy(place)[x.edge_index.long()]
    return ToUndirected(merge=False)(data), torch.from_numpy(word_ptr).long(), word


data, word_ptr, word = debian(args.packages)


class HGT(nn.Module):
    def __init__(self, channels=64, heads=2):
        super().__init__()
        self.words = nn.EmbeddingBag(2000, channels, mode="mean", include_last_offset=True)
        self.convs = nn.ModuleList(
            HGTConv(channels, channels, data.metadata(), heads) for _ in range(args.layers)
        )
        self.out = nn.Linear(channels, 58)

    def forward(self):
        words = self.words(word, word_ptr)
        x = {kind: words[data[kind].nodes].relu() for kind in data.node_types}
        for conv in self.convs:
            x = conv(x, data.edge_index_dict)
        return {kind: self.out(h) for kind, h in x.items()}


def part(split):
    """Outputs and sections of all packages of both types in a part of the split."""
    out = model()
    found = [(out[kind][data[kind].split == split], data[kind]) for kind in out]
    sections = [store.y[store.split == split] for _, store in found]
    return torch.cat([h for h, _ in found]), torch.cat(sections)


def train():
    model.train()
    optimizer.zero_grad()
    loss = cross_entropy(*part(0))
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def accuracy(split):
    model.eval()
    out, sections = part(split)
    return (out.argmax(1) == sections).float().mean().item()


torch.manual_seed(args.seed)
model = HGT()
fastgt.accelerate(model)
optimizer = torch.optim.Adam(model.parameters(), lr=0.005, weight_decay=0.001)
losses = []
for epoch in range(1, args.epochs + 1):
    losses.append(train())
    if epoch % 10 == 0:
        print(f"epoch {epoch}: loss {losses[-1]:.4f}, validation {accuracy(1):.3f}")
print(f"test accuracy {accuracy(2):.3f}")

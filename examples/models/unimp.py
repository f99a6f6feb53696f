"""UniMP on Tolokers: known labels are inputs of a transformer over the edges.

    python examples/models/unimp.py

The first time, torch-geometric downloads Tolokers: 11,758 nodes and 1,038,000 edges. One line makes
this of a script for torch-geometric: the import of the layer.
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch_geometric.datasets import HeterophilousGraphDataset
from torch_geometric.nn import MaskLabel

from fastgt.pyg import TransformerConv

parser = argparse.ArgumentParser()
parser.add_argument("--root", default="data", help="folder of data sets")
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--dropout", type=float, default=0.3)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

data = HeterophilousGraphDataset(args.root, "Tolokers")[0]
train_mask, val_mask, test_mask = data.train_mask[:, 0], data.val_mask[:, 0], data.test_mask[:, 0]


class UniMP(nn.Module):
    def __init__(self, channels, classes, hidden=64, layers=3, heads=2):
        super().__init__()
        self.labels = MaskLabel(classes, channels)
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        both = {"heads": heads, "beta": True, "dropout": args.dropout}
        for _ in range(layers - 1):
            self.convs.append(TransformerConv(channels, hidden // heads, **both))
            self.norms.append(nn.LayerNorm(hidden))
            channels = hidden
        self.last = TransformerConv(channels, classes, concat=False, **both)

    def forward(self, x, y, edge_index, known):
        x = self.labels(x, y, known)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x, edge_index)).relu()
        return self.last(x, edge_index)


def train():
    model.train()
    known = MaskLabel.ratio_mask(train_mask, ratio=0.65)  # the others are learned
    learned = train_mask ^ known
    optimizer.zero_grad()
    out = model(data.x, data.y, data.edge_index, known)
    loss = cross_entropy(out[learned], data.y[learned])
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def accuracy(mask, known):
    model.eval()
    found = model(data.x, data.y, data.edge_index, known).argmax(1)
    return (found == data.y)[mask].float().mean().item()


torch.manual_seed(args.seed)
model = UniMP(data.num_features, int(data.y.max()) + 1)
optimizer = torch.optim.Adam(model.parameters(), lr=0.001, weight_decay=5e-4)
losses = []
for epoch in range(1, args.epochs + 1):
    losses.append(train())
    if epoch % 10 == 0:
        found = accuracy(val_mask, train_mask)
        print(f"epoch {epoch}: loss {losses[-1]:.4f}, validation {found:.3f}")
print(f"test accuracy {accuracy(test_mask, train_mask | val_mask):.3f}")

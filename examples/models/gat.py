"""GAT on Cora: two layers with dropout of features and of attention weights.

    python examples/models/gat.py --conv GATv2Conv

The first time, torch-geometric downloads Cora. One line makes this of a script for torch-geometric:
the import of the layers.
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout, elu
from torch_geometric.datasets import Planetoid
from torch_geometric.transforms import NormalizeFeatures

from fastgt.pyg import GATConv, GATv2Conv

parser = argparse.ArgumentParser()
parser.add_argument("--root", default="data", help="folder of data sets")
parser.add_argument("--conv", choices=["GATConv", "GATv2Conv"], default="GATConv")
parser.add_argument("--epochs", type=int, default=200)
parser.add_argument("--dropout", type=float, default=0.6)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

data = Planetoid(args.root, "Cora", transform=NormalizeFeatures())[0]
kind = {"GATConv": GATConv, "GATv2Conv": GATv2Conv}[args.conv]


class Model(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.conv1 = kind(channels, 8, heads=8, dropout=args.dropout)
        self.conv2 = kind(64, classes, heads=1, concat=False, dropout=args.dropout)

    def forward(self, x, edge_index):
        x = dropout(x, args.dropout, self.training)
        x = dropout(elu(self.conv1(x, edge_index)), args.dropout, self.training)
        return self.conv2(x, edge_index)


def train():
    model.train()
    optimizer.zero_grad()
    out = model(data.x, data.edge_index)
    loss = cross_entropy(out[data.train_mask], data.y[data.train_mask])
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def accuracy(mask):
    model.eval()
    found = model(data.x, data.edge_index).argmax(1)
    return (found == data.y)[mask].float().mean().item()


torch.manual_seed(args.seed)
model = Model(data.num_features, int(data.y.max()) + 1)
optimizer = torch.optim.Adam(model.parameters(), lr=0.005, weight_decay=5e-4)
losses = []
for epoch in range(1, args.epochs + 1):
    losses.append(train())
    if epoch % 20 == 0:
        print(f"epoch {epoch}: loss {losses[-1]:.4f}, validation {accuracy(data.val_mask):.3f}")
print(f"test accuracy {accuracy(data.test_mask):.3f}")

"""GraphGPS on ZINC: every layer has messages over bonds and attention over the whole molecule.

    python examples/models/gps.py

The first time, torch-geometric downloads ZINC and prepares it, which takes minutes. Two lines make
this of a script for torch-geometric: `import fastgt` and `fastgt.accelerate(model)`.
"""

import argparse

import torch
from torch import nn
from torch_geometric.datasets import ZINC
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GINEConv, GPSConv, global_add_pool
from torch_geometric.transforms import AddRandomWalkPE

import fastgt

parser = argparse.ArgumentParser()
parser.add_argument("--root", default="data/zinc", help="folder of the data set")
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--layers", type=int, default=10)
parser.add_argument("--dropout", type=float, default=0.5, help="of attention weights")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

STEPS = 20  # of the random walk
parts = {
    split: ZINC(args.root, subset=True, split=split, pre_transform=AddRandomWalkPE(STEPS, "pe"))
    for split in ("train", "val", "test")
}


class GPS(nn.Module):
    def __init__(self, channels=64, walk=8):
        super().__init__()
        self.atom = nn.Embedding(28, channels - walk)
        self.bond = nn.Embedding(4, channels)
        self.walk = nn.Sequential(nn.BatchNorm1d(STEPS), nn.Linear(STEPS, walk))
        self.convs = nn.ModuleList()
        for _ in range(args.layers):
            inside = nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels)
            local = GINEConv(nn.Sequential(*inside))
            dropout = {"dropout": args.dropout}
            self.convs.append(GPSConv(channels, local, heads=4, attn_kwargs=dropout))
        self.out = nn.Sequential(
            nn.Linear(channels, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1)
        )

    def forward(self, batch):
        x = torch.cat([self.atom(batch.x[:, 0]), self.walk(batch.pe)], 1)
        bond = self.bond(batch.edge_attr)
        for conv in self.convs:
            x = conv(x, batch.edge_index, batch.batch, edge_attr=bond)
        return self.out(global_add_pool(x, batch.batch))[:, 0]


def train():
    model.train()
    for batch in DataLoader(parts["train"], batch_size=32, shuffle=True):
        optimizer.zero_grad()
        loss = (model(batch) - batch.y).abs().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())


@torch.no_grad()
def error(split):
    model.eval()
    loader = DataLoader(parts[split], batch_size=64)
    return sum((model(x) - x.y).abs().sum().item() for x in loader) / len(parts[split])


torch.manual_seed(args.seed)
model = GPS()
fastgt.accelerate(model)
optimizer = torch.optim.Adam(model.parameters(), lr=0.001, weight_decay=1e-5)
losses = []
for epoch in range(1, args.epochs + 1):
    train()
    print(f"epoch {epoch}: loss {losses[-1]:.4f}, validation error {error('val'):.4f}")
print(f"test error {error('test'):.4f}")

"""LargeGT beside GAT and GraphSAGE on the nodes of one graph.

    python examples/models/large_gt.py --data debian --words 128 --epochs 10

Nodes at one and two steps are sampled once, into a folder that a later call reads. LargeGT trains
on batches of nodes, whose tokens another process reads ahead. torch-geometric's layers train on the
whole graph, for --gnn-epochs; fastgt computes those of GAT. Every model is tested with the weights
of its best epoch in validation. Debian's packages are a part of fastgt; other data sets are those
of `fastgt.datasets.load` with one graph whose nodes have classes.
"""

import argparse
import copy
from pathlib import Path
from time import perf_counter

import torch
from torch import nn
from torch.nn.functional import cross_entropy, dropout
from torch_geometric.nn import GATConv, SAGEConv

import fastgt
from fastgt.datasets import NodeSet, TokenSet, load
from fastgt.encodings import random_projection_pe
from fastgt.models import LargeGT, LargeGTConfig

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="debian")
parser.add_argument("--split", type=int, default=0)
parser.add_argument("--folder", type=Path, default=Path("runs/large_gt"), help="of the tokens")
parser.add_argument("--words", type=int, help="width that features are reduced to, for all models")
parser.add_argument("--samples", type=int, default=10)
parser.add_argument("--dim", type=int, default=64)
parser.add_argument("--centroids", type=int, default=256)
parser.add_argument("--batch", type=int, default=512)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--gnn-epochs", type=int, default=100)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()


class GNN(nn.Module):
    """Two layers on the whole graph."""

    def __init__(self, conv, features, classes, heads=1):
        super().__init__()
        options = {"heads": heads} if heads > 1 else {}
        self.first = conv(features, args.dim // heads, **options)
        self.norm = nn.LayerNorm(args.dim)
        self.second = conv(args.dim, args.dim // heads, **options)
        self.out = nn.Linear(args.dim, classes)

    def forward(self, x, edge_index):
        x = dropout(self.norm(self.first(x, edge_index)).relu(), 0.3, self.training)
        return self.out(self.second(x, edge_index).relu())


def score(logits, part):
    """Accuracy; of two classes, the area under the ROC curve."""
    y = data.y[parts[part]]
    if data.classes > 2:
        return float((logits.argmax(1) == y).double().mean())
    order = (logits[:, 1] - logits[:, 0]).argsort()
    rank = torch.empty_like(order)
    rank[order] = 1 + torch.arange(len(y))
    ones = int(y.sum())
    return float((int(rank[y == 1].sum()) - ones * (ones + 1) / 2) / (ones * (len(y) - ones)))


def trained(name, model, epochs, lr, step, outputs):
    """Train; -> the test score of the epoch that is best in validation."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    best, begin = (-1.0, 0, None), perf_counter()
    for epoch in range(1, epochs + 1):
        model.train()
        loss = step(model, optimizer)
        model.eval()
        with torch.no_grad():
            found = score(outputs(model, "val"), "val")
        if found > best[0]:
            best = found, epoch, copy.deepcopy(model.state_dict())
        if epochs <= 20 or epoch % 10 == 0:
            print(f"{name} {epoch}: loss {loss:.4f}, validation {found:.4f}", flush=True)
    model.load_state_dict(best[2])
    with torch.no_grad():
        test = score(outputs(model, "test"), "test")
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{name}: test {test:.4f} at epoch {best[1]} of {epochs}, validation {best[0]:.4f}, "
        f"{count:,} parameters, {perf_counter() - begin:.0f} s",
        flush=True,
    )
    return test


def batch_step(model, optimizer):
    total = 0.0
    loader = tokens.loader(
        parts["train"], batch_size=args.batch, shuffle=True, workers=1, drop_last=True
    )
    for batch in loader:
        optimizer.zero_grad()
        loss = cross_entropy(of_batch(model, batch), data.y[batch.nodes])
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / len(loader)


def of_batch(model, batch):
    return model(batch.tokens, position=position[batch.nodes], nodes=batch.nodes)


def batch_outputs(model, part):
    loader = tokens.loader(parts[part], batch_size=args.batch, workers=1)
    return torch.cat([of_batch(model, batch) for batch in loader])


def whole_step(model, optimizer):
    optimizer.zero_grad()
    rows = parts["train"]
    loss = cross_entropy(model(x, edge_index)[rows], data.y[rows])
    loss.backward()
    optimizer.step()
    return loss.item()


def whole_outputs(model, part):
    return model(x, edge_index)[parts[part]]


data = load(args.data)
if not isinstance(data, NodeSet) or data.classes < 2:
    parser.error(f"--data must be one graph whose nodes have classes, got {args.data}")
parts = {name: mask.nonzero()[:, 0] for name, mask in data.splits[args.split].items()}
x, edge_index = data.node, data.graph.edge_index.long()
if args.words:
    torch.manual_seed(0)
    u, s, _ = torch.svd_lowrank(x, args.words, niter=2)
    x = u * s / (u * s).std()
begin = perf_counter()
place = args.folder / f"{args.data}-{args.samples}-{args.words or x.shape[1]}"
tokens = TokenSet.make(data.graph, x, place, samples=args.samples, workers=2)
position = random_projection_pe(data.graph, 32)
print(f"{len(tokens) * args.samples:,} nodes sampled in {perf_counter() - begin:.1f} s", flush=True)
config = LargeGTConfig(
    x.shape[1],
    data.classes,
    num_nodes=len(tokens),
    dim=args.dim,
    samples=args.samples,
    position_dim=32,
    centroids=args.centroids,
    dropout=0.3,
)
tests = {}
for name, conv, heads in (("GAT", GATConv, 4), ("GraphSAGE", SAGEConv, 1)):
    torch.manual_seed(args.seed)
    gnn = GNN(conv, x.shape[1], data.classes, heads)
    if conv is GATConv:
        fastgt.accelerate(gnn)
    tests[name] = trained(name, gnn, args.gnn_epochs, 5e-3, whole_step, whole_outputs)
torch.manual_seed(args.seed)
model = LargeGT(config)
tests["LargeGT"] = trained("LargeGT", model, args.epochs, 1e-3, batch_step, batch_outputs)

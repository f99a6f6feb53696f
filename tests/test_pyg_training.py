"""Models as torch-geometric's examples have them: accelerated, they train the same."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, elu, relu

pytest.importorskip("torch_geometric")

from torch_geometric.nn import (
    GATConv,
    GATv2Conv,
    GINEConv,
    GPSConv,
    HGTConv,
    Linear,
    TransformerConv,
    global_add_pool,
)

import fastgt
from fastgt import pyg
from fastgt.testing import PROBLEMS

STEPS = 20


@pytest.fixture(scope="module")
def citations():
    """Nodes with features and classes, and an edge_index."""
    torch.manual_seed(0)
    n, edges = 300, 1500
    x, y = torch.randn(n, 24), torch.randint(5, (n,))
    return x, torch.randint(n, (2, edges)), y


def losses(model, step, lr=0.01):
    """Of some steps of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    found = []
    for i in range(STEPS):
        optimizer.zero_grad()
        loss = step(model, i)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


def assert_trains_alike(model, step):
    other = copy.deepcopy(model)
    report = fastgt.accelerate(other)
    assert report.replaced
    expected, found = losses(model, step), losses(other, step)
    assert expected[-1] < expected[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert set(pyg.explain(other).values()) == {"fused"}


class UniMP(nn.Module):
    """Masked labels are inputs; three layers with a gated residual (unimp_arxiv.py)."""

    def __init__(self, channels, classes):
        super().__init__()
        self.label = nn.Embedding(classes, channels)
        sizes = [channels, 32, 32]
        self.convs = nn.ModuleList(TransformerConv(c, 16, heads=2, beta=True) for c in sizes[:2])
        self.last = TransformerConv(32, classes, heads=2, concat=False, beta=True)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))

    def forward(self, x, y, edge_index, known):
        x = x + torch.where(known[:, None], self.label(y), 0)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x, edge_index)).relu()
        return self.last(x, edge_index)


def test_unimp(citations):
    x, edge_index, y = citations

    def step(model, i):
        known = torch.rand(len(x), generator=torch.Generator().manual_seed(i)) < 0.65
        return cross_entropy(model(x, y, edge_index, known)[~known], y[~known])

    assert_trains_alike(UniMP(24, 5), step)


@pytest.mark.parametrize("kind", [GATConv, GATv2Conv])
def test_gat(citations, kind):
    x, edge_index, y = citations

    class GAT(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = kind(24, 8, heads=8)
            self.conv2 = kind(64, 5, heads=1, concat=False)

        def forward(self, x, edge_index):
            return self.conv2(elu(self.conv1(x, edge_index)), edge_index)

    assert_trains_alike(GAT(), lambda model, _: cross_entropy(model(x, edge_index), y))


def test_gps():
    graph = PROBLEMS["molecules"].load()
    torch.manual_seed(0)
    x = torch.randint(28, (graph.num_nodes,))
    edge_attr = torch.randint(4, (graph.num_edges,))
    batch = torch.arange(graph.num_graphs).repeat_interleave(graph.graph_ptr.diff().long())
    y, edge_index = torch.randn(graph.num_graphs), graph.edge_index

    def pair(channels):
        layers = nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels)
        return nn.Sequential(*layers)

    class GPS(nn.Module):
        def __init__(self, channels=32):
            super().__init__()
            self.node, self.edge = nn.Embedding(28, channels), nn.Embedding(4, channels)
            inside = [
                nn.Sequential(
                    nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels)
                )
                for _ in range(2)
            ]
            self.convs = nn.ModuleList(GPSConv(channels, GINEConv(x), heads=4) for x in inside)
            self.out = nn.Linear(channels, 1)

        def forward(self, x, edge_index, edge_attr, batch):
            x, e = self.node(x), self.edge(edge_attr)
            for conv in self.convs:
                x = conv(x, edge_index, batch, edge_attr=e)
            return self.out(global_add_pool(x, batch))[:, 0]

    def step(model, _):
        return (model(x, edge_index, edge_attr, batch) - y).abs().mean()

    assert_trains_alike(GPS(), step)


def test_hgt():
    torch.manual_seed(0)
    x = {"author": torch.randn(60, 12), "paper": torch.randn(90, 20)}
    edges = {
        ("author", "to", "paper"): torch.stack(
            [torch.randint(60, (300,)), torch.randint(90, (300,))]
        ),
        ("paper", "to", "author"): torch.stack(
            [torch.randint(90, (300,)), torch.randint(60, (300,))]
        ),
    }
    y = torch.randint(4, (60,))

    class HGT(nn.Module):
        def __init__(self):
            super().__init__()
            self.lins = nn.ModuleDict({kind: Linear(-1, 16) for kind in x})
            metadata = list(x), list(edges)
            self.convs = nn.ModuleList(HGTConv(16, 16, metadata, heads=2) for _ in range(2))
            self.out = nn.Linear(16, 4)

        def forward(self, x, edges):
            x = {kind: relu(self.lins[kind](value)) for kind, value in x.items()}
            for conv in self.convs:
                x = conv(x, edges)
            return self.out(x["author"])

    model = HGT()
    model(x, edges)  # lazy sizes
    assert_trains_alike(model, lambda model, _: cross_entropy(model(x, edges), y))

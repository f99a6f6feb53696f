"""Layers of fastgt.pyg in programs that torch.export and torch.compile make."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("torch_geometric")

from torch.export import Dim
from torch_geometric import nn as pyg

import fastgt
from fastgt import Graph
from fastgt import pyg as pyg_layers
from fastgt.pyg import GATv2Conv, GINEConv, GPSConv, TransformerConv
from fastgt.testing import random_edge_index

FRESH = """
import sys
import torch
import fastgt
program, calls = sys.argv[1:]
run = torch.export.load(program).module()
for given, expected in torch.load(calls):
    torch.testing.assert_close(run(*given), expected)
    print(given[2].num_rows, given[2].num_graphs)
"""


class Model(nn.Module):
    """A model of nodes that takes a batch of graphs as one Graph."""

    def __init__(self):
        super().__init__()
        self.gps = nn.ModuleList(GPSConv(8, GINEConv(nn.Linear(8, 8)), heads=2) for _ in range(2))
        self.transformer = TransformerConv(8, 4, heads=2, edge_dim=8)
        self.gat = GATv2Conv(8, 4, heads=2, add_self_loops=False)

    def forward(self, x, edge_attr, graph):
        for layer in self.gps:
            x = layer(x, graph, edge_attr=edge_attr)
        return self.transformer(x, graph, edge_attr) + self.gat(x, graph)


def given(sizes):
    """Graphs of so many nodes and edges, as the model takes them."""
    parts = [Graph.from_edge_index(random_edge_index(i, n, e), n) for i, (n, e) in enumerate(sizes)]
    graph = Graph.batch(parts)
    return torch.randn(graph.num_rows, 8), torch.randn(graph.num_edges, 8), graph


def test_an_exported_model_runs_on_other_graphs_in_a_fresh_process(tmp_path):
    torch.manual_seed(0)
    model = Model().eval()
    size = {0: Dim.AUTO}
    shapes = size, size, [size] * 4
    program = torch.export.export(model, given([(11, 29), (8, 14)]), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    calls = [given(sizes) for sizes in ([(5, 7)], [(20, 70), (4, 0), (9, 31)], [(150, 900)])]
    with torch.no_grad():
        torch.save([(call, model(*call)) for call in calls], tmp_path / "calls.pt")
    run = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path / "model.pt2", tmp_path / "calls.pt"],
        capture_output=True,
        text=True,
    )
    assert run.stdout == "5 1\n33 3\n150 1\n", run.stdout + run.stderr


@pytest.mark.parametrize(
    "layer",
    [
        lambda: pyg.TransformerConv(8, 4, heads=2, edge_dim=8),
        lambda: pyg.GATConv(8, 4, heads=2, edge_dim=8),
        lambda: pyg.GATv2Conv(8, 4, heads=2, edge_dim=8),
        lambda: pyg.GINEConv(nn.Linear(8, 8)),
    ],
    ids=["transformer", "gat", "gatv2", "gine"],
)
def test_compiled_layers_give_what_they_give(layer):
    torch.manual_seed(0)
    torch.compiler.reset()
    net = nn.ModuleList([layer(), layer()])
    net.forward = lambda x, edge_index, e: net[1](net[0](x, edge_index, e).tanh(), edge_index, e)
    theirs = copy.deepcopy(list(net))
    for each in net:
        fastgt.accelerate(each)
    compiled = torch.compile(
        lambda *given: net.forward(*given), backend="aot_eager", dynamic=True, fullgraph=True
    )
    for n, edges in ((9, 30), (21, 55)):
        x, e = torch.randn(n, 8, requires_grad=True), torch.randn(edges, 8)
        edge_index = random_edge_index(n, n, edges)
        expected = theirs[1](theirs[0](x, edge_index, e).tanh(), edge_index, e)
        found = compiled(x, edge_index, e)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        do = torch.randn_like(expected)
        grads = [torch.autograd.grad(out, x, do)[0] for out in (found, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: TransformerConv(8, 4),
        lambda: GATv2Conv(8, 4),
        lambda: pyg_layers.PointTransformerConv(8, 4),
        lambda: pyg_layers.ResGatedGraphConv(8, 4),
    ],
    ids=["transformer", "gatv2 with self loops", "point transformer", "gated"],
)
def test_an_exported_layer_takes_an_edge_index(layer):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer()

        def forward(self, x, edge_index):
            if isinstance(self.layer, pyg.PointTransformerConv):
                return self.layer(x, x[:, :3], edge_index)
            return self.layer(x, edge_index)

    net, sizes = Net().eval(), ({0: Dim.DYNAMIC}, {1: Dim.DYNAMIC})
    args = torch.randn(9, 8), random_edge_index(0, 9, 30)
    run = torch.export.export(net, args, dynamic_shapes=sizes).module()
    x, edge_index = torch.randn(14, 8), random_edge_index(1, 14, 50)
    torch.testing.assert_close(run(x, edge_index), net(x, edge_index), rtol=1e-4, atol=1e-5)
    for wrong in (edge_index + 9, edge_index - 9):
        with pytest.raises(RuntimeError, match="edge_index has an index that is none of the nodes"):
            run(x, wrong)

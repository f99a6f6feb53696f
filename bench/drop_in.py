"""Models of torch-geometric's layers, as they are and accelerated, from the same parameters.

Each has four layers of 64 channels between which tanh stands, in training. A call makes what it
needs of ``edge_index`` anew, as a step of a training does. GPS attends to all pairs of nodes in a
batch of graphs, and is Performer's on one graph. Gradients are those of nodes, of edges where the
model takes them, and of all parameters; those of parameters are timed, not compared.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastgt import Graph, accelerate, implementation
from fastgt.bench.attention import draw, load, shape
from fastgt.bench.harness import Case, Provider

MODELS = ("transformer", "gat", "gatv2", "gps")
CHANNELS, LAYERS, EDGE_CHANNELS = 64, 4, 16


def case(
    model: str,
    problem: str,
    *,
    heads: int = 8,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """``model`` is one of :data:`MODELS`."""
    graph = load(problem, device)
    torch.manual_seed(0)
    theirs = _Stack(model, heads, graph).to(device, dtype)
    x, e, do = draw(
        [
            (graph.num_nodes, CHANNELS),
            (graph.num_edges, EDGE_CHANNELS),
            (graph.num_nodes, CHANNELS),
        ],
        dtype,
        device,
    )
    inputs = {"x": x, "edge_attr": e} if theirs.takes_edges else {"x": x}

    def provider(net: nn.Module, accelerated: bool = False) -> Provider:
        net = copy.deepcopy(net)
        if accelerated:
            accelerate(net)
        return Provider(net, tuple(net.parameters()))

    def definition(dtype: torch.dtype) -> Provider:
        net = copy.deepcopy(theirs).to(dtype)
        accelerate(net)

        def call(*given: Tensor) -> Tensor:
            with implementation("reference"):
                return net(*given)

        return Provider(call, tuple(net.parameters()))

    def compiled() -> Provider:
        # every module and shape is compiled anew, and beyond some of them none would be
        torch.compiler.reset()
        net = copy.deepcopy(theirs)
        return Provider(torch.compile(net, dynamic=True), tuple(net.parameters()))

    return Case(
        shape=shape(problem, graph, heads, CHANNELS // heads, dtype) | {"layers": LAYERS},
        inputs=inputs,
        upstream=do,
        definition=definition,
        providers={
            "fastgt": lambda: provider(theirs, accelerated=True),
            "pyg": lambda: provider(theirs),
            "pyg, compiled": compiled,
        },
    )


class _Stack(nn.Module):
    """torch-geometric's layers one after another, on one graph or batch."""

    edge_index: Tensor
    batch: Tensor

    def __init__(self, model: str, heads: int, graph: Graph):
        super().__init__()
        from torch_geometric import nn as pyg

        width = CHANNELS // heads
        self.takes_edges = model in ("transformer", "gps")
        self.batched = model == "gps"
        # all pairs of one large graph are more than a model of graphs is for
        attention = "performer" if graph.num_graphs == 1 else "multihead"

        def layer() -> nn.Module:
            if model == "transformer":
                return pyg.TransformerConv(CHANNELS, width, heads, edge_dim=EDGE_CHANNELS)
            if model == "gat":
                return pyg.GATConv(CHANNELS, width, heads)
            if model == "gatv2":
                return pyg.GATv2Conv(CHANNELS, width, heads)
            inside = pyg.GINEConv(nn.Linear(CHANNELS, CHANNELS), edge_dim=EDGE_CHANNELS)
            return pyg.GPSConv(CHANNELS, inside, heads, act="tanh", attn_type=attention)

        self.layers: Any = nn.ModuleList(layer() for _ in range(LAYERS))
        batch = torch.arange(graph.num_graphs, device=graph.device).repeat_interleave(
            graph.graph_ptr.diff().long(), output_size=graph.num_nodes
        )
        self.register_buffer("edge_index", graph.edge_index)
        self.register_buffer("batch", batch)

    def forward(self, x: Tensor, edge_attr: Tensor | None = None) -> Tensor:
        edges = {"edge_attr": edge_attr} if self.takes_edges else {}
        batch = {"batch": self.batch} if self.batched else {}
        for layer in self.layers:
            x = torch.tanh(layer(x, self.edge_index, **batch, **edges))
        return x

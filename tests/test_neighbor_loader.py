"""Batches of torch-geometric's NeighborLoader, and those of the same form, on fastgt's layers."""

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

from torch_geometric.data import Data
from torch_geometric.loader import NeighborLoader
from torch_geometric.nn import GATv2Conv, TransformerConv
from torch_geometric.utils import trim_to_layer

import fastgt
from fastgt import Graph
from fastgt.pyg import explain
from fastgt.testing import random_edge_index

NODES, FANOUTS = 400, [4, 3]
SAMPLERS = any(importlib.util.find_spec(name) for name in ("pyg_lib", "torch_sparse"))


@pytest.fixture
def data() -> Data:
    torch.manual_seed(0)
    edge_index = random_edge_index(0, NODES, 3000)
    return Data(torch.randn(NODES, 12), edge_index, edge_attr=torch.randn(edge_index.shape[1], 5))


def as_loaded(data: Data, seeds: Tensor) -> Data:
    """What ``NeighborLoader`` gives: nodes and edges hop by hop, from the seeds outwards.

    It draws neighbours of the nodes that are new at a hop, and for no node twice.
    """
    assert data.edge_index is not None
    assert data.edge_attr is not None
    graph = Graph.from_edge_index(data.edge_index, NODES)
    generator = torch.Generator().manual_seed(0)
    nodes, hop = seeds, seeds
    place = torch.full((NODES,), -1)
    place[seeds] = torch.arange(len(seeds))
    e_id, node_counts, edge_counts = [], [len(seeds)], []
    for fanout in FANOUTS:
        drawn = graph.sample(hop, [fanout], generator=generator).e_id[0]
        source = data.edge_index[0, drawn].unique()
        hop = source[place[source] < 0]
        place[hop] = torch.arange(len(hop)) + len(nodes)
        nodes = torch.cat([nodes, hop])
        e_id.append(drawn)
        node_counts.append(len(hop))
        edge_counts.append(len(drawn))
    edges = torch.cat(e_id)
    return Data(
        data.x[nodes],  # type: ignore[index]
        place[data.edge_index[:, edges]],
        edge_attr=data.edge_attr[edges],
        n_id=nodes,
        e_id=edges,
        input_id=seeds,
        batch_size=len(seeds),
        num_sampled_nodes=node_counts,
        num_sampled_edges=edge_counts,
    )


class Model(nn.Module):
    """A layer for each hop; ``trim`` leaves out what no seed depends on any more."""

    def __init__(self, kind: Any):
        super().__init__()
        self.convs = nn.ModuleList(kind(c, 8, heads=2, edge_dim=5) for c in (12, 16))

    def forward(self, batch: Data, trim: bool) -> Tensor:
        x, edge_index, edge_attr = batch.x, batch.edge_index, batch.edge_attr
        for i, conv in enumerate(self.convs):
            if trim:
                x, edge_index, edge_attr = trim_to_layer(
                    i, batch.num_sampled_nodes, batch.num_sampled_edges, x, edge_index, edge_attr
                )
            x = conv(x, edge_index, edge_attr).relu()
        return x[: batch.batch_size]


def check(batch: Data, kind: Any) -> None:
    """Outputs and gradients are torch-geometric's, trimmed or not."""
    torch.manual_seed(0)
    theirs = Model(kind)
    ours = copy.deepcopy(theirs)
    fastgt.accelerate(ours)
    found = []
    for model in (theirs, ours):
        for trim in (False, True):
            model.zero_grad()
            out = model(batch, trim)
            out.square().sum().backward()
            found.append([out.detach(), *(x.grad.clone() for x in model.parameters())])
    assert set(explain(ours).values()) == {"fused"}
    assert found[0][0].shape == (batch.batch_size, 16)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


BOTH = pytest.mark.parametrize("kind", [TransformerConv, GATv2Conv])


@BOTH
def test_batches_of_its_form_are_taken_whole_and_trimmed(kind: Any, data: Data) -> None:
    batch = as_loaded(data, torch.tensor([7, 0, 311, 42]))
    assert all(count > 4 for count in batch.num_sampled_nodes[1:])
    check(batch, kind)


@pytest.mark.skipif(not SAMPLERS, reason="NeighborLoader needs pyg-lib or torch-sparse")
@BOTH
def test_batches_of_the_loader_are_taken_whole_and_trimmed(kind: Any, data: Data) -> None:
    loader = NeighborLoader(data, FANOUTS, torch.arange(0, 40), batch_size=16)
    for batch in loader:
        check(batch, kind)

"""Graphormer's biases of pairs and degrees in a GraphGPS model."""

import copy
from itertools import pairwise

import pytest
import torch
from attention_cases import DEVICE
from torch import nn

from fastgt import Graph
from fastgt.encodings import shortest_paths
from fastgt.models import GraphGPS, GraphGPSConfig, graph_gps_state_dict
from fastgt.models.graph_gps_layer import GlobalAttention, GraphGPSLayer
from fastgt.models.graph_gps_pairs import DegreeEncoder, PairBias
from fastgt.testing import random_batch

FP64 = torch.float64
KINDS, HEADS = 4, 2


def batch():
    return random_batch(1, [(6, 9), (0, 0), (9, 14), (1, 1)], device=DEVICE)


def kinds(graph):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, KINDS, (graph.num_edges,), generator=generator).to(DEVICE)


def test_biases_are_their_equation():
    torch.manual_seed(0)
    graph, distance = batch(), 4
    lengths, types = shortest_paths(graph, kinds(graph), distance)
    module = PairBias(distance, KINDS, HEADS).to(DEVICE, FP64)
    found = module(lengths, types, graph)
    matrices = module.hop.weight.view(distance, HEADS, HEADS)
    wanted = []
    for length, along in zip(lengths.tolist(), types.tolist(), strict=True):
        edges = sum(module.edge.weight[t] @ w for t, w in zip(along, matrices, strict=True))
        wanted.append(module.length.weight[length] + edges / max(1, length))
    wanted = torch.stack(wanted)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(wanted)
    parameters = list(module.parameters())
    for a, b in zip(
        *(torch.autograd.grad(y, parameters, upstream) for y in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_layer_adds_them_to_its_logits():
    torch.manual_seed(0)
    graph = batch()
    offsets, pairs = graph.graph_ptr.tolist(), [0, 36, 36, 117, 118]
    attention = GlobalAttention(8, HEADS).to(DEVICE, FP64)
    x = torch.randn(16, 8, dtype=FP64, device=DEVICE, requires_grad=True)
    bias = torch.randn(118, HEADS, dtype=FP64, device=DEVICE, requires_grad=True)
    outs = []
    for g, (first, last) in enumerate(pairwise(offsets)):
        n, part = last - first, x[first:last]
        q, k, v = (f(part).view(n, HEADS, 4) for f in (attention.q, attention.k, attention.v))
        mine = bias[pairs[g] : pairs[g + 1]].view(n, n, HEADS)
        s = torch.einsum("ihd,jhd->ijh", q, k) / 2 + mine
        outs.append(attention.out(torch.einsum("ijh,jhd->ihd", s.softmax(1), v).flatten(1)))
    found, wanted = attention(x, graph.graph_ptr, bias=bias), torch.cat(outs)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(wanted)
    for a, b in zip(
        *(torch.autograd.grad(y, [x, bias], upstream) for y in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(a, b)
    layer = GraphGPSLayer(8, HEADS, local="none", norm="none").to(DEVICE, FP64).eval()
    layer.attention = attention
    h = x + found
    torch.testing.assert_close(layer(x, None, graph, bias=bias)[0], h + layer.ffn(h))
    other = GraphGPSLayer(8, HEADS, local="none", attention="linear").to(DEVICE, FP64)
    with pytest.raises(ValueError, match="bias must be None: only attention='softmax' has one"):
        other(x, None, graph, bias=bias)


def test_degrees():
    graph = batch()
    encoder = DegreeEncoder(16, 3).to(DEVICE)
    source, target = graph.edge_index
    for i, y in enumerate(encoder(graph)):
        reaching, leaving = int((target == i).sum()), int((source == i).sum())
        wanted = encoder.reaching.weight[reaching] + encoder.leaving.weight[leaving]
        torch.testing.assert_close(y, wanted)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="degrees must be more than the largest in-degree"):
            DegreeEncoder(1, 3)(graph)


class GraphormerBias(nn.Sequential):
    """Names of the authors."""

    def __init__(self):
        bias, degrees = nn.Module(), nn.Module()
        bias.spatial_encoder, bias.edge_encoder = nn.Embedding(21, 4), nn.Embedding(4, 4)
        bias.edge_dis_encoder = nn.Embedding(20 * 4 * 4, 1)
        degrees.in_degree_encoder = nn.Embedding(64, 36)
        degrees.out_degree_encoder = nn.Embedding(64, 36)
        super().__init__(bias, degrees)


def test_the_authors_names():
    theirs = nn.Module()
    theirs.encoder = nn.Module()
    theirs.encoder.node_encoder = nn.Module()
    theirs.encoder.node_encoder.encoder2 = GraphormerBias()
    state = graph_gps_state_dict(theirs.state_dict())
    ours = GraphGPS(GraphGPSConfig.published("zinc_graphormer"))
    named = {k: v for k, v in ours.state_dict().items() if k.startswith(("pair_", "embed_degree"))}
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in named.items()}
    extra = sum(x.numel() for x in state.values())
    assert sum(p.numel() for p in ours.parameters()) == 423_717 + extra
    weight = theirs.encoder.node_encoder.encoder2[1].in_degree_encoder.weight
    assert torch.equal(state["embed_degree.reaching.weight"], weight)


def test_wrong_inputs_are_named():
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]), 3)
    edge = torch.tensor([1, 2, 3])
    config = GraphGPSConfig(dim=16, layers=1, walk_steps=0, walk_dim=0, path_distance=3, degrees=4)
    model, node = GraphGPS(config), torch.zeros(3, dtype=torch.long)
    lengths, types = shortest_paths(graph, edge, 3)
    assert model(node, edge, graph, pair_distance=lengths, pair_edges=types).isfinite().all()
    for changes, error, message in (
        ({"pair_edges": None}, TypeError, "pair_distance and pair_edges must be tensors"),
        ({"pair_edges": types[:, 1:]}, ValueError, r"pair_edges .* = \[9, 3\], got \[9, 2\]"),
        ({"pair_distance": lengths[1:]}, ValueError, r"pair_distance must be \[P\] = \[9\]"),
        ({"pair_distance": lengths + 4}, ValueError, "pair_distance must be from 0 to 3, got 4"),
        ({"pair_edges": types + 4}, ValueError, "pair_edges must be from 0 to 3, got"),
    ):
        given = {"pair_distance": lengths, "pair_edges": types} | changes
        with pytest.raises(error, match=message):
            model(node, edge, graph, **given)
    bare = GraphGPS(GraphGPSConfig(dim=16, layers=1, walk_steps=0, walk_dim=0))
    with pytest.raises(ValueError, match=r"pair_distance must be None \(path_distance is 0\)"):
        bare(node, edge, graph, pair_distance=lengths)
    with pytest.raises(ValueError, match="path_distance must be 0 with attention='linear'"):
        GraphGPSConfig(attention="linear", path_distance=3)


def test_parameters_are_drawn_anew():
    torch.manual_seed(0)
    for module in (PairBias(3, KINDS, HEADS), DegreeEncoder(5, 3)):
        before = copy.deepcopy(module.state_dict())
        module.reset_parameters()
        for name, x in module.state_dict().items():
            assert not torch.equal(x, before[name]), name

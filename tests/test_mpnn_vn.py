"""MPNN + VN and DeepSets against their equations, written out in plain PyTorch."""

from itertools import pairwise

import pytest
import torch
from attention_cases import DEVICE
from literal_layers import (
    assert_same,
    batch_norm,
    gated_gcn,
    gcn,
    gine,
    linear,
    perturbed,
    readout,
    rough_batch,
    scatter,
)
from model_cases import check_learnt_by_heart
from torch import nn

from fastgt import Graph, linear_attention, virtual_node
from fastgt.models import MPNNVirtualNode, MPNNVirtualNodeConfig, add_virtual_nodes
from fastgt.models.deepsets import DeepSets
from fastgt.models.graph_gps_layer import GraphGPSLayer
from fastgt.models.mpnn_vn import MPNNVirtualNodeLayer
from fastgt.nn import HeadGate
from fastgt.testing import random_batch

FP64 = torch.float64
DIM = 8
SIZES = [(6, 12), (0, 0), (7, 20), (1, 1)]
LOCAL = ("gcn", "gine", "gatedgcn")
pytestmark = pytest.mark.usefixtures("one_thread")


def batch():
    return rough_batch(SIZES, loop=7)


def owners(graph):
    number = torch.arange(graph.num_graphs, device=DEVICE)
    return number.repeat_interleave(graph.graph_ptr.diff())


def drawn(**shapes):
    return {name: torch.randn(s, dtype=FP64, device=DEVICE) for name, s in shapes.items()}


def literal_layer(m, kind, x, e, state, graph, edge_output):
    owner, edge_index = owners(graph), graph.edge_index
    if state is not None:
        x = x + state[owner]
    if kind == "gatedgcn":
        x, e = gated_gcn(m.local, x, e, edge_index, edge_output)
    elif kind == "gine":
        x = x + gine(m.local, x, e, edge_index).clamp(min=0)
    else:
        x = x + gcn(m.local, x, edge_index).clamp(min=0)
    if m.update is not None:
        new = scatter(x, owner, len(state)) + state
        for i in (0, 3):
            new = batch_norm(m.update[i + 1], linear(m.update[i], new)).clamp(min=0)
        state = state + new if m.virtual_residual else new
    return x, e, state


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", LOCAL)
def test_a_layer_is_its_equations(kind, residual, train):
    torch.manual_seed(0)
    graph = batch()
    layer = MPNNVirtualNodeLayer(DIM, local=kind, virtual_residual=residual)
    layer = perturbed(layer).to(DEVICE, FP64).train(train)
    tensors = drawn(x=(14, DIM), e=(graph.num_edges, DIM), state=(4, DIM))

    def ours(m, x, e, state):
        x, edges, state = m(x, None if kind == "gcn" else e, graph, state)
        return x, e if edges is None else edges, state

    def theirs(m, x, e, state):
        return literal_layer(m, kind, x, e, state, graph, True)

    assert_same(layer, ours, theirs, tensors)


def small(**changes):
    options = {"dim": 12, "layers": 3, "out_dim": 2}
    return MPNNVirtualNode(MPNNVirtualNodeConfig(**options | changes)).to(DEVICE)


def inputs(model, graph, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    c = model.config

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    def some(kinds, features, size):
        if features:
            return draw(size, features)
        columns = [torch.randint(k, (size,), generator=generator) for k in kinds]
        columns = [x.to(DEVICE) for x in columns]
        return None if not kinds else columns[0] if len(kinds) == 1 else torch.stack(columns, 1)

    given = {
        "node": some(c.node_types, c.node_features, graph.num_rows),
        "edge": some(c.edge_types, c.edge_features, graph.num_edges),
    }
    if c.walk_steps:
        given["walk_pe"] = draw(graph.num_rows, c.walk_steps)
    if c.lap_pe:
        given["lap_vectors"] = draw(graph.num_rows, c.lap_pe)
        given["lap_values"] = draw(graph.num_graphs, c.lap_pe)
    return given


MODELS = {
    "zinc": {},
    "residual": {"virtual_residual": True, "local": "gatedgcn", "head": "inductive_node"},
    "peptides": {
        "node_types": (5, 4),
        "edge_types": (3, 2),
        "local": "gatedgcn",
        "virtual_node": False,
        "walk_steps": 4,
        "walk_dim": 3,
        "head_layers": 1,
        "pooling": "mean",
    },
    "superpixels": {
        "node_types": (),
        "node_features": 3,
        "edge_types": (),
        "edge_features": 2,
        "local": "gatedgcn",
        "lap_pe": 3,
        "lap_dim": 4,
    },
    "gcn": {"edge_types": (), "local": "gcn", "virtual_node": True},
    "shared": {"edge_types": (), "local": "gine"},
}


def embedded(encoder, x):
    if x is not None and x.is_floating_point():
        return linear(encoder.lin, x)
    if len(encoder.embed) == 1:
        return encoder.embed[0].weight[x]
    return sum(e.weight[x[:, i]] for i, e in enumerate(encoder.embed))


def literal_model(model, graph, node, edge, walk_pe=None, lap_vectors=None, lap_values=None):
    c, parts = model.config, [embedded(model.embed, node)]
    if c.lap_pe:
        y = torch.stack([lap_vectors, lap_values[owners(graph)]], 2)
        for layer in model.embed_lap.phi[::2]:
            y = linear(layer, y).clamp(min=0)
        parts.append(y.sum(1))
    if c.walk_steps:
        parts.append(linear(model.embed_walk.lin, batch_norm(model.embed_walk.norm, walk_pe)))
    x, e = torch.cat(parts, 1), None
    if c.local != "gcn":
        there = edge is not None
        e = embedded(model.embed_edge, edge if there else torch.zeros_like(graph.edge_index[0]))
    state = model.start.expand(4, -1) if c.virtual_node else None
    for i, layer in enumerate(model.layers, 1):
        x, e, state = literal_layer(layer, c.local, x, e, state, graph, i < len(model.layers))
    pool = {"mean": lambda x: x.mean(0), "add": lambda x: x.sum(0)}[c.pooling]
    return readout(model.readout, x, graph.graph_ptr.tolist(), pool)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_its_equations(name):
    torch.manual_seed(0)
    graph = batch()
    model = perturbed(small(**MODELS[name])).to(FP64).eval()
    with torch.no_grad():
        if model.start is not None:
            model.start.normal_()
    given = inputs(model, graph, FP64)
    assert_same(
        model,
        lambda m: m(graph=graph, **given),
        lambda m: literal_model(m, graph, **given),
        {},
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_is_learnt_by_heart(name):
    torch.manual_seed(0)
    model = small(**MODELS[name] | {"out_dim": 1})
    graph = random_batch(5, [(6, 14), (5, 12), (7, 20), (4, 8)], device=DEVICE)
    given = inputs(model, graph)
    size = graph.num_rows if model.config.head == "inductive_node" else graph.num_graphs
    wanted = torch.linspace(-1, 1, size, device=DEVICE)[torch.randperm(size), None]
    check_learnt_by_heart(model, graph, given, wanted, steps=100, lr=1e-2, left=0.1)


def test_virtual_nodes_are_the_only_way_between_parts():
    """Two layers, no edges: a node knows of another by the virtual node alone."""
    torch.manual_seed(0)
    graph = Graph.from_edge_index(
        torch.zeros(2, 0, dtype=torch.long, device=DEVICE),
        graph_ptr=torch.tensor([0, 3, 5], device=DEVICE),
    )
    options = {"node_types": (), "node_features": 2, "head": "inductive_node", "layers": 2}
    for there in (True, False):
        model = small(**options, virtual_node=there, out_dim=1).to(FP64)
        model.eval()
        x = torch.randn(5, 2, dtype=FP64, device=DEVICE, requires_grad=True)
        edge = torch.zeros(0, dtype=torch.long, device=DEVICE)
        (reached,) = torch.autograd.grad(model(x, edge, graph)[0].sum(), x)
        assert reached[1:3].any().item() == there
        assert not reached[3:].any()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # counted by hand from the authors' modules and configurations; no table was compared
        ("zinc", 897_397),
        ("peptides_func", 506_280),
        ("peptides_struct", 506_419),
        ("voc", 502_497),
    ],
)
def test_parameter_counts(name, parameters):
    with torch.device("meta"):
        model = MPNNVirtualNode(MPNNVirtualNodeConfig.published(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_published_settings():
    config = MPNNVirtualNodeConfig.published("peptides_func")
    found = config.layers, config.dim, config.walk_steps, config.walk_dim, config.virtual_node
    assert found == (5, 138, 16, 20, False)
    config.layers = 1
    assert MPNNVirtualNodeConfig.published("peptides_func").layers == 5
    with pytest.raises(ValueError, match=r"name must be one of \['zinc', .* got 'ZINC'"):
        MPNNVirtualNodeConfig.published("ZINC")


def test_graphs_get_a_node_more():
    graph = batch()
    node = torch.randint(1, 9, (14, 2), device=DEVICE)
    edge = torch.randint(1, 9, (graph.num_edges,), device=DEVICE)
    found = add_virtual_nodes(node, edge, graph)
    new = found.graph
    assert new.graph_ptr.tolist() == [0, 7, 8, 16, 18]
    assert found.is_virtual.nonzero().flatten().tolist() == [6, 7, 15, 17]
    assert torch.equal(found.node[~found.is_virtual], node)
    assert not found.node[found.is_virtual].any()
    assert torch.equal(found.edge[: len(edge)], edge)
    assert found.edge[len(edge) :].tolist() == [0] * 28
    place = (~found.is_virtual).nonzero().flatten()
    assert torch.equal(new.edge_index[:, : len(edge)], place[graph.edge_index])
    bounds = pairwise(new.graph_ptr.tolist())
    stars = [(i, last - 1) for first, last in bounds for i in range(first, last - 1)]
    pairs = [tuple(p) for p in new.edge_index[:, len(edge) :].T.tolist()]
    assert pairs == [*stars, *((j, i) for i, j in stars)]
    assert add_virtual_nodes(node.double(), None, graph).edge is None
    with pytest.raises(ValueError, match=r"node must be \[N, \.\.\.\] = \[14, \.\.\.\], got \[3\]"):
        add_virtual_nodes(node[:3, 0], None, graph)
    with pytest.raises(TypeError, match=r"graph must be a fastgt\.Graph, got Tensor"):
        add_virtual_nodes(node, None, graph.edge_index)


def test_a_virtual_node_makes_linear_attention():
    """One sum over each graph, one broadcast, and a quotient at every node."""
    torch.manual_seed(0)
    graph = batch()
    tensors = drawn(q=(14, 2, 3), k=(14, 2, 3), v=(14, 2, 4))

    def phi(x):
        return torch.where(x > 0, x + 1, x.exp())

    def ours(_, q, k, v):
        return linear_attention(q, k, v, graph.graph_ptr, feature_map="elu", eps=0.0)

    def theirs(_, q, k, v):
        message = torch.cat([phi(k)[..., None] * v[:, :, None], phi(k)[..., None]], 3)
        nothing = message.new_zeros(4, *message.shape[1:])
        _, state = virtual_node(message, nothing, graph.graph_ptr)
        heard, _ = virtual_node(torch.zeros_like(message), state, graph.graph_ptr)
        both = (phi(q)[..., None] * heard).sum(2)
        return both[..., :-1] / both[..., -1:]

    assert_same(nn.Identity(), ours, theirs, tensors)


def literal_deepsets(m, x, graph):
    owner = owners(graph)
    count = graph.graph_ptr.diff().clamp(min=1)[:, None]
    mean = scatter(x, owner, graph.num_graphs) / count
    y = linear(m.own, x) + linear(m.mean, mean)[owner]
    return batch_norm(m.norm, y.clamp(min=0))


@pytest.mark.parametrize("train", [False, True])
def test_deepsets_are_their_equation(train):
    torch.manual_seed(0)
    graph = batch()
    layer = perturbed(DeepSets(DIM)).to(DEVICE, FP64).train(train)
    assert_same(
        layer,
        lambda m, x: m(x, graph.graph_ptr),
        lambda m, x: literal_deepsets(m, x, graph),
        drawn(x=(14, DIM)),
    )


@pytest.mark.parametrize("kind", ["none", "gcn", "gatedgcn"])
def test_gps_takes_deepsets_for_attention(kind):
    torch.manual_seed(0)
    graph = batch()
    layer = GraphGPSLayer(DIM, 2, local=kind, attention="deepsets")
    layer = perturbed(layer).to(DEVICE, FP64)
    tensors = drawn(x=(14, DIM), e=(graph.num_edges, DIM))

    def ours(m, x, e):
        x, edges = m(x, e if kind == "gatedgcn" else None, graph)
        return x, e if edges is None else edges

    def theirs(m, x, e):
        h = batch_norm(m.attention_norm, x + literal_deepsets(m.attention, x, graph))
        if kind == "gatedgcn":
            y, e = gated_gcn(m.local, x, e, graph.edge_index, True)
            h = h + batch_norm(m.local_norm, y)
        elif kind == "gcn":
            h = h + batch_norm(m.local_norm, x + gcn(m.local, x, graph.edge_index))
        ffn = linear(m.ffn[3], linear(m.ffn[0], h).clamp(min=0))
        return batch_norm(m.norm, h + ffn), e

    assert_same(layer, ours, theirs, tensors)


def test_deepsets_have_no_heads_and_drop_by_the_layers_dropout():
    with pytest.raises(ValueError, match="head_gate must be None: attention='deepsets' has no"):
        GraphGPSLayer(DIM, 2, attention="deepsets", head_gate=HeadGate(torch.ones(2)))
    layer = GraphGPSLayer(DIM, 2, local="none", attention="deepsets", attention_dropout=0.999999)
    assert [dropout.p for dropout in layer.attention_dropout] == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"x must be \[N, 8\], got \[3, 7\]"):
        DeepSets(DIM)(torch.zeros(3, 7), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="norm of DeepSets is a batch norm in training and got 1"):
        DeepSets(DIM)(torch.zeros(1, 8), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"offsets ends at 2 but there are 3 nodes"):
        DeepSets(DIM)(torch.zeros(3, 8), torch.tensor([0, 2]))


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    graph = batch()
    for changes in MODELS.values():
        model = small(**changes, last_edges=False)
        model(graph=graph, **inputs(model, graph)).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters())


def test_models_of_the_meta_device_are_drawn_when_reset():
    with torch.device("meta"):
        model = MPNNVirtualNode(MPNNVirtualNodeConfig(dim=12, layers=2, local="gatedgcn"))
        layer = GraphGPSLayer(DIM, 2, attention="deepsets")
    torch.manual_seed(0)
    for module in (model, layer):
        module.to_empty(device=DEVICE)
        module.reset_parameters()
        assert all(x.isfinite().all() for x in module.state_dict().values())
    assert not model.start.any()
    graph = batch()
    assert model(graph=graph, **inputs(model, graph)).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_mixed_precision_is_near(name):
    torch.manual_seed(0)
    model, graph = small(**MODELS[name]).eval(), batch()
    given = inputs(model, graph)
    wanted = model(graph=graph, **given)
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        found = model(graph=graph, **given)
    found.float().sum().backward()
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_graphs_without_edges_and_batches_without_graphs(name):
    model = small(**MODELS[name]).eval()
    none = torch.zeros(2, 0, dtype=torch.long, device=DEVICE)
    for ptr in ([0, 3, 4], [0]):
        graph = Graph.from_edge_index(none, graph_ptr=torch.tensor(ptr, device=DEVICE))
        found = model(graph=graph, **inputs(model, graph))
        by_node = model.config.head == "inductive_node"
        assert found.shape == (ptr[-1] if by_node else len(ptr) - 1, 2)
        assert found.isfinite().all()


def test_one_graph_is_too_few_for_a_batch_norm_in_training():
    graph = random_batch(0, [(5, 9)], device=DEVICE)
    model = small()
    given = inputs(model, graph)
    with pytest.raises(ValueError, match=r"update of MPNNVirtualNodeLayer is .* got 1 graph"):
        model(graph=graph, **given)
    assert model.eval()(graph=graph, **given).isfinite().all()
    without = small(virtual_node=False)
    assert without(graph=graph, **inputs(without, graph)).isfinite().all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"node": torch.zeros(4, dtype=torch.long)}, ValueError, r"node must be \[N\] = \[14\]"),
        ({"node": torch.full((14,), 28)}, ValueError, "node must be from 0 to 27, got 28 at 0"),
        ({"edge": None}, TypeError, "edge must be a tensor of integers, got NoneType"),
        ({"walk_pe": torch.zeros(14, 3)}, ValueError, r"walk_pe must be None \(walk_steps is 0\)"),
        ({"graph": torch.zeros(2, 3, dtype=int)}, TypeError, r"graph must be a fastgt\.Graph, got"),
    ],
)
def test_wrong_inputs_are_named(changes, error, message):
    model, graph = small(), batch()
    changes = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in changes.items()}
    with pytest.raises(error, match=message):
        model(**{"graph": graph} | inputs(model, graph) | changes)


def test_what_a_layer_lacks_is_named():
    graph = batch()
    x, e, state = (y.float() for y in drawn(x=(14, 8), e=(graph.num_edges, 8), s=(4, 8)).values())
    with pytest.raises(ValueError, match="state must be a tensor with virtual_node=True"):
        MPNNVirtualNodeLayer(DIM).to(DEVICE)(x, e, graph)
    with pytest.raises(ValueError, match="state must be None with virtual_node=False"):
        MPNNVirtualNodeLayer(DIM, virtual_node=False).to(DEVICE)(x, e, graph, state)
    layer = MPNNVirtualNodeLayer(DIM).to(DEVICE)
    with pytest.raises(ValueError, match=r"x must be \[N, dim\] = \[14, 8\], got \[13, 8\]"):
        layer(x[1:], e, graph, state)
    with pytest.raises(ValueError, match=r"state must be \[G, dim\] = \[4, 8\], got \[3, 8\]"):
        layer(x, e, graph, state[1:])
    with pytest.raises(TypeError, match="e must be a tensor, got NoneType"):
        layer(x, None, graph, state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local": "gat"}, "local must be 'gcn', 'gine' or 'gatedgcn', got 'gat'"),
        ({"local": "gcn"}, r"edge_types must be \(\) and edge_features 0 with local='gcn'"),
        ({"layers": 0}, "layers must be positive, got 0"),
        ({"walk_steps": 3}, "walk_steps and walk_dim must both be 0 or positive, got 3 and 0"),
        ({"walk_steps": 3, "walk_dim": 12}, r"walk_dim \+ lap_dim must be below dim=12, got 12"),
        ({"node_types": ()}, r"node_types is \(\) and node_features is 0: give one"),
        ({"edge_features": 2}, r"edge_features must be 0 with edge_types=\(4,\), got 2"),
        (
            {"virtual_node": False, "virtual_residual": True},
            "virtual_residual must be False with virtual_node=False",
        ),
    ],
)
def test_configurations_that_make_no_model(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)

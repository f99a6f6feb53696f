"""GraphGPS against its equations, written out in plain PyTorch."""

import copy
from itertools import pairwise

import pytest
import torch
from attention_cases import DEVICE, FAST
from gps_cases import (
    ATTENTION,
    DIM,
    FP64,
    HEADS,
    LOCAL,
    NO_ENCODINGS,
    batch,
    check,
    inputs,
    small,
)
from literal_layers import perturbed
from model_cases import check_learnt_by_heart

from fastgt import Graph
from fastgt.models import GraphGPS, GraphGPSConfig
from fastgt.models.graph_gps_layer import GlobalAttention, GraphGPSLayer
from fastgt.models.graph_gps_local import edge_distance
from fastgt.nn import HeadGate
from fastgt.pruning import prune_heads
from fastgt.testing import random_batch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", LOCAL)
@pytest.mark.parametrize("attention", ATTENTION)
def test_every_pair_is_its_equations(kind, attention):
    if kind == attention == "none":
        with pytest.raises(ValueError, match="local and attention are both 'none'"):
            GraphGPSLayer(DIM, HEADS, local=kind, attention=attention)
        return
    check(kind, attention)


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize(("kind", "attention"), [("gatedgcn", "softmax"), ("gat", "performer")])
def test_implementations(kind, attention, impl):
    check(kind, attention, impl)


@pytest.mark.parametrize("norm", ["batch", "graph", "none"])
@pytest.mark.parametrize("kind", ["gine", "gatedgcn"])
@pytest.mark.parametrize("train", [False, True])
def test_norms_activations_and_factors(kind, norm, train):
    check(kind, "softmax", norm=norm, stable=True, activation="gelu", train=train)


def test_the_last_edges_are_left_out():
    check("gatedgcn", "softmax", edge_output=False)
    layer = GraphGPSLayer(DIM, HEADS, local="gatedgcn", edge_output=False)
    assert not any("edge_norm" in name for name, _ in layer.named_parameters())
    graph = batch()
    x, e = torch.randn(graph.num_rows, DIM), torch.randn(graph.num_edges, DIM)
    assert layer(x, e, graph)[1] is e
    with pytest.raises(ValueError, match="edge_output=True, but the module was made with"):
        layer(x, e, graph, edge_output=True)


def test_distances():
    graph, p = batch(), torch.randn(13, 3, dtype=FP64, requires_grad=True)
    source, target = graph.edge_index
    wanted = ((p[target] - p[source]) ** 2).sum(-1, keepdim=True)
    upstream = torch.randn_like(wanted)
    found = edge_distance(p, graph)
    torch.testing.assert_close(found, wanted)
    (a,), (b,) = (torch.autograd.grad(y, p, upstream) for y in (found, wanted))
    torch.testing.assert_close(a, b)


def test_dropout_stands_where_the_paper_has_it():
    graph = batch()
    x, e = torch.randn(graph.num_rows, DIM), torch.randn(graph.num_edges, DIM)
    for kind in ("gine", "gatedgcn"):
        layer = GraphGPSLayer(
            DIM, HEADS, local=kind, attention="none", norm="none", dropout=0.999999
        )
        # nothing but residuals is left
        torch.manual_seed(0)
        found = layer(x, e, graph)
        torch.testing.assert_close(found[0], x)
        torch.testing.assert_close(found[1], e)
    for attention in ("performer", "linear"):
        layer = GraphGPSLayer(
            DIM, HEADS, local="none", attention=attention, norm="none", attention_dropout=0.999999
        )
        assert torch.equal(layer(x, None, graph)[0], x + layer.ffn(x))
    layer = GraphGPSLayer(DIM, HEADS, local="none", norm="none", attention_dropout=0.999999)
    bias = layer.attention.out.bias
    torch.testing.assert_close(layer(x, None, graph)[0], x + bias + layer.ffn(x + bias))


def test_heads_may_be_masked_and_taken_away():
    torch.manual_seed(0)
    x, offsets = torch.randn(9, DIM), torch.tensor([0, 4, 9])
    attention = GlobalAttention(DIM, 4, head_gate=HeadGate(torch.tensor([1.0, 0.0, 0.5, 0.0])))
    smaller = prune_heads(attention)
    assert smaller.q.out_features == DIM // 2
    torch.testing.assert_close(smaller(x, offsets), attention(x, offsets))
    for gate in (torch.zeros(4), torch.tensor([[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])):
        masked = GlobalAttention(DIM, 4)
        assert masked(x, offsets, head_gate=gate).isfinite().all()


MODELS = {
    "types": {},
    "columns": {"node_types": (3, 4), "edge_types": (2, 3), "local": "gatedgcn", "dropout": 0.1},
    "features": {"node_types": (), "node_features": 5, "edge_types": (), "edge_features": 2},
    "one edge": {"edge_types": (), "local": "gatedgcn", "head": "inductive_node"},
    "no edge": {"edge_types": (), "local": "gcn", "head": "default", "pooling": "max"},
    "graph norm": {"norm": "graph", "attention": "linear", "head": "default", "pooling": "mean"},
    "wide": {"local": "pna", "dim": 132, "attention": "none"},
    "pairs": {"path_distance": 4, "degrees": 16, "attention_dropout": 0.0},
    "stable": NO_ENCODINGS | {"stable_pe": 3, "local": "gatedgcn", "lap_layers": 1},
    "performer": {"attention": "performer", "local": "gat", "lap_layers": 3},
    "softmax of messages": NO_ENCODINGS | {"local": "genconv", "learn_temperature": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_equals_its_graphs_one_by_one(name):
    torch.manual_seed(0)
    model, graph = perturbed(small(**MODELS[name])).double().eval(), batch()
    given = inputs(model, graph, FP64)
    whole = model(graph=graph, **given)
    nodes = model.config.head == "inductive_node"
    assert whole.shape == (graph.num_rows if nodes else graph.num_graphs, 1)
    assert whole.isfinite().all()
    target = graph.edge_index[1]
    pairs = [0, *graph.graph_ptr.diff().square().cumsum(0).tolist()]
    for g, (first, last) in enumerate(pairwise(graph.graph_ptr.tolist())):
        mine = (target >= first) & (target < last)
        one = Graph.from_edge_index(graph.edge_index[:, mine] - first, last - first)
        places = {
            "edge": mine,
            "lap_values": slice(g, g + 1),
            "pair_distance": slice(*pairs[g : g + 2]),
            "pair_edges": slice(*pairs[g : g + 2]),
        }
        parts = {
            key: None if x is None else x[places.get(key, slice(first, last))]
            for key, x in given.items()
        }
        found = model(graph=one, **parts)
        torch.testing.assert_close(found, whole[first:last] if nodes else whole[g : g + 1])


@pytest.mark.parametrize("name", MODELS)
def test_models_compile_whole(name, compiled_kernels):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, graph = small(**MODELS[name]).eval(), batch()
    given = inputs(model, graph)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(graph=graph, **given), model(graph=graph, **given))


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_is_learnt_by_heart(name):
    torch.manual_seed(0)
    model = small(**MODELS[name] | {"dropout": 0.0})
    graph = random_batch(5, [(6, 14), (5, 12), (7, 20), (4, 8)], device=DEVICE)
    given = inputs(model, graph)
    if model.embed_lap is not None:
        given["lap_vectors"] = given["lap_vectors"].nan_to_num()
    size = graph.num_rows if model.config.head == "inductive_node" else graph.num_graphs
    wanted = torch.linspace(-1, 1, size, device=DEVICE)[torch.randperm(size), None]
    check_learnt_by_heart(model, graph, given, wanted, steps=150)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("zinc", 423_717),
        ("pattern", 337_201),
        ("cluster", 502_054),
        ("mnist", 115_394),
        ("cifar10", 112_726),
        ("ogbg_molhiv", 558_625),
        ("ogbg_molpcba", 9_744_496),
        ("peptides_func", 504_362),
        ("peptides_struct", 504_459),
        ("pcqm4mv2_small", 6_152_001),
        ("pcqm4mv2_medium", 19_414_641),
        ("pcqm4mv2_deep", 13_807_345),
    ],
)
def test_parameter_counts_of_the_paper(name, parameters):
    with torch.device("meta"):
        model = GraphGPS(GraphGPSConfig.published(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_published_settings():
    deep, tiny = (GraphGPSConfig.published(n) for n in ("pcqm4mv2_deep", "malnet_tiny"))
    assert (deep.activation, deep.dropout, deep.attention_dropout) == ("gelu", 0.1, 0.1)
    assert (tiny.attention, tiny.performer_width, tiny.pooling) == ("performer", 64, "max")
    with torch.device("meta"):
        attention = GraphGPS(tiny).layers[0].attention
    assert attention.q.weight.shape == (256, 64)
    assert attention.q.bias is None
    assert attention.projection.shape == (266, 64)
    deep.layers = 1
    assert GraphGPSConfig.published("pcqm4mv2_deep").layers == 16
    with pytest.raises(ValueError, match=r"name must be one of \['zinc', .* got 'ZINC'"):
        GraphGPSConfig.published("ZINC")


def test_encodings_flip_signs_only_in_training():
    torch.manual_seed(0)
    model, graph = small(norm="graph", walk_steps=0, walk_dim=0), batch()
    given = inputs(model, graph)
    assert 2 <= len({model(graph=graph, **given).sum().item() for _ in range(20)}) <= 8
    model.eval()
    assert len({model(graph=graph, **given).sum().item() for _ in range(3)}) == 1


def test_an_absent_eigenvector_adds_nothing():
    encoder = small().embed_lap.eval()
    graph = batch()
    vectors, values = torch.randn(13, 3), torch.randn(4, 3)
    vectors[5:] = torch.nan
    values[2:] = torch.nan
    found = encoder(vectors, values, graph)
    assert not found[5:].any()
    pairs = torch.stack([vectors[:5], values[:1].expand(5, 3)], 2)
    torch.testing.assert_close(found[:5], encoder.phi(pairs).sum(1))


def test_one_node_is_too_few_for_a_batch_norm_in_training():
    graph = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.long), 1)
    model = small(edge_types=(), local="gcn", **NO_ENCODINGS)
    with pytest.raises(
        ValueError, match=r"norm of GraphGPSLayer is a batch norm in training.*'graph'"
    ):
        model(torch.tensor([1]), None, graph)
    assert model.eval()(torch.tensor([1]), None, graph).isfinite().all()


def test_same_bits_every_time():
    torch.manual_seed(0)
    model, graph, found = small(**MODELS["columns"] | {"dropout": 0.0}), batch(), []
    given = inputs(model, graph)
    for _ in range(2):
        again = copy.deepcopy(model)
        torch.manual_seed(0)
        out = again(graph=graph, **given)
        out.sum().backward()
        found.append([out, *(p.grad for p in again.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"node": torch.zeros(4, dtype=torch.long)}, ValueError, r"node must be \[N\] = \[13\]"),
        ({"node": torch.zeros(13)}, TypeError, "node must hold integers .* got torch.float32"),
        ({"node": torch.full((13,), 28)}, ValueError, "node must be from 0 to 27, got 28 at 0"),
        ({"edge": None}, TypeError, "edge must be a tensor of integers, got NoneType"),
        ({"walk_pe": None}, TypeError, "walk_pe must be a tensor, got NoneType"),
        ({"walk_pe": torch.zeros(13, 3, dtype=int)}, TypeError, "walk_pe must be float16"),
        ({"walk_pe": torch.zeros(13, 4)}, ValueError, r"walk_pe .* = \[13, 3\], got \[13, 4\]"),
        ({"lap_vectors": torch.zeros(13, 4)}, ValueError, r"lap_vectors .* got \[13, 4\]"),
        ({"lap_values": torch.zeros(13, 3)}, ValueError, r"lap_values .* \[4, 3\], got \[13, 3\]"),
        ({"graph": torch.zeros(2, 3, dtype=int)}, TypeError, "graph must be a fastgt.Graph, got"),
    ],
)
def test_wrong_inputs_are_named(changes, error, message):
    model, graph = small(), batch()
    with pytest.raises(error, match=message):
        model(**{"graph": graph} | inputs(model, graph) | changes)


def test_what_is_not_wanted_is_refused():
    graph = batch()
    bare = small(edge_types=(), local="gin", **NO_ENCODINGS)
    node = torch.zeros(13, dtype=torch.long)
    with pytest.raises(ValueError, match="edge must be None: local='gin' uses no edges"):
        bare(node, torch.zeros(graph.num_edges, dtype=torch.long), graph)
    for name in ("walk_pe", "lap_vectors", "lap_values"):
        with pytest.raises(ValueError, match=rf"{name} must be None \(.* 0\), got \[13, 3\]"):
            bare(node, None, graph, **{name: torch.zeros(13, 3)})
    shared = small(edge_types=(), **NO_ENCODINGS)
    with pytest.raises(ValueError, match="edge must be None: the model has one vector for all"):
        shared(node, torch.zeros(graph.num_edges, dtype=torch.long), graph)
    columns = small(node_types=(3, 4), **NO_ENCODINGS)
    with pytest.raises(ValueError, match=r"node must be \[N, columns\] = \[13, 2\].* got \[13\]"):
        columns(node, node, graph)
    with pytest.raises(ValueError, match=r"node\[:, 1\] must be from 0 to 3, got 4 at 0"):
        columns(torch.full((13, 2), 4).sub(torch.tensor([2, 0])), node, graph)


def test_the_layer_refuses_what_does_not_fit():
    graph = batch()
    x, e = torch.randn(13, DIM), torch.randn(graph.num_edges, DIM)
    layer = GraphGPSLayer(DIM, HEADS)
    with pytest.raises(ValueError, match=r"x must be \[N, dim\] = \[13, 8\], got \[13, 7\]"):
        layer(x[:, 1:], e, graph)
    with pytest.raises(ValueError, match=r"e must be \[E, dim\] = .* got \[13, 8\]"):
        layer(x, x, graph)
    with pytest.raises(TypeError, match="e must be a tensor, got NoneType"):
        layer(x, None, graph)
    with pytest.raises(ValueError, match=r"distance must be None: .* stable=False"):
        layer(x, e, graph, distance=e[:, :1])
    with pytest.raises(TypeError, match="distance must be a tensor, got NoneType"):
        GraphGPSLayer(DIM, HEADS, stable=True)(x, e, graph)
    with pytest.raises(ValueError, match="e must be None: local='gcn' uses no edges"):
        GraphGPSLayer(DIM, HEADS, local="gcn")(x, e, graph)
    between = Graph.from_edge_index(torch.tensor([[0, 4], [1, 0]]), (4, 5))
    with pytest.raises(ValueError, match="graph must be square, got 4 rows and 5 columns"):
        layer(x[:4], e[:2], between)
    with pytest.raises(ValueError, match=r"x must be \[N, 8\], got \[13, 7\]"):
        GlobalAttention(DIM, HEADS)(x[:, 1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local": "gcnii"}, r"edge_types must be .* with local='gcnii'"),
        ({"local": "egc", "edge_types": ()}, r"local must be one of \['none', .* got 'egc'"),
        ({"attention": "nystrom"}, r"attention must be one of .* got 'nystrom'"),
        (
            {"learn_temperature": True},
            "learn_temperature must be False with local='gine', got True",
        ),
        ({"norm": "layer"}, "norm must be 'batch', 'graph' or 'none', got 'layer'"),
        ({"activation": "tanh"}, "activation must be 'relu' or 'gelu', got 'tanh'"),
        ({"head": "graph"}, "head must be 'san_graph', .* got 'graph'"),
        ({"pooling": "sum"}, r"pooling must be one of \['add', 'mean', 'max'\], got 'sum'"),
        ({"heads": 3}, "heads must divide dim, got dim=16 and heads=3"),
        ({"heads": 3, "local": "gat", "attention": "performer"}, "heads must divide dim, got dim"),
        ({"layers": 0}, "layers must be positive, got 0"),
        ({"walk_steps": -1}, "walk_steps must not be negative, got -1"),
        ({"walk_dim": 0}, "walk_steps and walk_dim must both be 0 or positive, got 3 and 0"),
        ({"walk_dim": 12}, r"walk_dim \+ lap_dim must be below dim=16, got 12 \+ 4"),
        ({"stable_pe": 3}, "stable_pe must be 0 with walk_steps=3 and lap_pe=3, got 3"),
        ({"node_types": ()}, r"node_types is \(\) and node_features is 0: give one"),
        ({"node_features": 3}, r"node_features must be 0 with node_types=\(28,\), got 3"),
        ({"local": "gcn"}, r"edge_types must be \(\) and edge_features 0 with local='gcn'"),
        (NO_ENCODINGS | {"stable_pe": 3, "local": "gat"}, r"local must be .* stable .* got 'gat'"),
    ],
)
def test_configurations_that_make_no_model(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)

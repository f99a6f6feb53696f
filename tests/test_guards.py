"""Modules and models refuse what operators refuse, in the same words."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from module_cases import MODULES, Given

from fastgt import Graph
from fastgt.models import (
    EdgeGraphTransformer,
    EdgeGraphTransformerConfig,
    GraphClassifier,
    GraphClassifierConfig,
    GraphTransformer,
    GraphTransformerConfig,
)
from fastgt.models.graph_transformer import GraphTransformerEdgeLayer, GraphTransformerLayer
from fastgt.nn import (
    HeadGate,
    NeighborhoodAttention,
    VirtualNode,
)

N, E, DIM = 4, 6, 8
EDGES = torch.tensor([[0, 1, 2, 3, 0, 1], [1, 2, 3, 0, 2, 3]])
GRAPH = Graph.from_edge_index(EDGES, N)
X, EDGE = torch.randn(N, DIM), torch.randn(E, DIM)
NODE_TYPE, EDGE_TYPE = torch.tensor([0, 2, 1, 0]), torch.tensor([0, 1, 1, 0, 1, 0])
WORD_PTR, WORD = torch.tensor([0, 2, 2, 3, 5]), torch.tensor([4, 0, 1, 2, 2])
SMALL = {"dim": DIM, "heads": 2, "layers": 2}


GIVEN = Given(
    GRAPH,
    torch.tensor([0, 2, 4]),
    X,
    EDGE,
    torch.zeros(2, DIM),
    NODE_TYPE,
    EDGE_TYPE,
    word_ptr=WORD_PTR,
    word=WORD,
)
OPTIONS = {
    "GraphTransformer": {"layers": 2},
    "EdgeGraphTransformer": {"layers": 2, "pe_dim": 0},
    "GraphGPS": {"layers": 2},
    "Exphormer": {"layers": 2},
    "MPNNVirtualNode": {"layers": 2, "virtual_node": False},
    "SAN": {"layers": 2},
    "GraphClassifier": {"layers": 2},
    "PackageClassifier": {"layers": 2},
}
TAKE_A_GRAPH = (
    "NeighborhoodAttention",
    "NeighborhoodAttention without heads",
    "EdgeGatedAttention",
    "GraphTransformerLayer",
    "GraphTransformerEdgeLayer",
    "GraphTransformer",
    "EdgeGraphTransformer",
    "GraphGPSLayer",
    "GraphGPS",
    "Polynormer",
    "SGFormer",
    "Exphormer",
    "MPNNVirtualNode",
    "SAN",
    "GraphClassifier",
    "PackageClassifier",
    "TokenPruning",
    "SkipLayer",
)
TAKE_OFFSETS = (
    "LinearAttention",
    "LinearAttention without heads",
    "GlobalAttention",
    "GlobalAttention without heads",
    "PerformerAttention",
    "SGFormerLayer",
    "VirtualNode",
)


def made(name):
    kind, _, without_heads = name.partition(" without ")
    options = {"head_gate": HeadGate(torch.zeros(2))} if without_heads else OPTIONS.get(kind, {})
    return MODULES[kind].make(DIM, 2, **options)


def call(name, **changes):
    return MODULES[name.partition(" without ")[0]].call(made(name), replace(GIVEN, **changes))


@pytest.mark.parametrize("name", TAKE_A_GRAPH)
def test_an_edge_index_is_no_graph(name):
    for wrong in (EDGES, EDGES.tolist(), None, "graph"):
        found = type(wrong).__name__
        message = (
            rf"graph must be a fastgt\.Graph, got {found}: make one, for all calls, with Graph"
        )
        with pytest.raises(TypeError, match=message):
            call(name, graph=wrong)
    call(name)


@pytest.mark.parametrize("name", TAKE_OFFSETS)
def test_a_graph_is_no_offsets(name):
    with pytest.raises(TypeError, match="offsets must be a tensor of integers, got Graph: its gra"):
        call(name, offsets=GRAPH)
    with pytest.raises(TypeError, match="offsets must be a tensor of integers, got list"):
        call(name, offsets=[0, 2, 4])
    with pytest.raises(ValueError, match=r"offsets must be \[G \+ 1\], got \[2, 6\]"):
        call(name, offsets=EDGES)
    with pytest.raises(ValueError, match="offsets ends at 3 but there are 4 nodes"):
        call(name, offsets=torch.tensor([0, 2, 3]))
    call(name)


@pytest.mark.parametrize("name", [*TAKE_OFFSETS, "NeighborhoodAttention", "EdgeGatedAttention"])
def test_features_are_tensors(name):
    """x, and the context of an attention between two sets of nodes."""
    with pytest.raises(TypeError, match="x must be a tensor, got ndarray"):
        call(name, x=X.numpy())


def test_nodes_that_do_not_fit_the_graph_are_refused():
    attention = NeighborhoodAttention(DIM, 2)
    with pytest.raises(ValueError, match=r"x must be \[N_rows, dim\] = \[4, 8\], got \[5, 8\]"):
        attention(torch.zeros(5, DIM), GRAPH)
    with pytest.raises(ValueError, match=r"x must be \[N_rows, dim\] = \[4, 8\], got \[4, 7\]"):
        attention(torch.zeros(4, 7), GRAPH)
    with pytest.raises(ValueError, match=r"context must be .* = \[4, 8\], got \[3, 8\]"):
        attention(X, GRAPH, context=torch.zeros(3, DIM))
    between = Graph.from_edge_index(torch.tensor([[0, 4], [1, 0]]), (4, 5))
    with pytest.raises(TypeError, match="context must be a tensor, got NoneType"):
        attention(X, between)


# a model, and the names of the types that it takes, with what fits and how many kinds there are
TYPED = {
    "GraphTransformer": ({"node_type": (NODE_TYPE, 3)}, {"graph": GRAPH}),
    "EdgeGraphTransformer": (
        {"node_type": (NODE_TYPE, 3), "edge_type": (EDGE_TYPE, 2)},
        {"graph": GRAPH},
    ),
    "GraphGPS": ({"node": (NODE_TYPE, 3), "edge": (EDGE_TYPE, 2)}, {"graph": GRAPH}),
    "GraphClassifier": ({"node_type": (NODE_TYPE, 3)}, {"graph": GRAPH}),
    "PackageClassifier": (
        {"word_ptr": (WORD_PTR, 6), "word": (WORD, 5), "edge_kind": (EDGE_TYPE, 2)},
        {"graph": GRAPH},
    ),
}
CASES = [(model, name) for model, (types, _) in TYPED.items() for name in types]


def call_typed(model, **changes):
    types, others = TYPED[model]
    torch.manual_seed(0)
    module = made(model).eval()
    return module(**{name: x for name, (x, _) in types.items()} | others | changes)


@pytest.mark.parametrize(("model", "name"), CASES)
def test_types_of_every_integer_dtype_are_taken(model, name):
    wanted = call_typed(model)
    fitting = TYPED[model][0][name][0]
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        assert torch.equal(call_typed(model, **{name: fitting.to(dtype)}), wanted)


@pytest.mark.parametrize(("model", "name"), CASES)
def test_types_that_are_no_integers_are_refused_by_name(model, name):
    fitting = TYPED[model][0][name][0]
    for wrong, found in (
        (fitting.tolist(), "list"),
        (fitting.numpy(), "ndarray"),
        (np.asarray(fitting), "ndarray"),
        (tuple(fitting.tolist()), "tuple"),
    ):
        message = rf"{name} must be a tensor of integers, got {found}: torch.as_tensor\({name}\) m"
        with pytest.raises(TypeError, match=message):
            call_typed(model, **{name: wrong})
    for dtype in (torch.bool, torch.float32, torch.float16, torch.complex64, torch.uint16):
        message = rf"{name} must hold integers \(uint8 or int8 to int64\), got {dtype}"
        with pytest.raises(TypeError, match=message):
            call_typed(model, **{name: fitting.to(dtype)})
    with pytest.raises(TypeError, match=f"{name} must hold integers .*sparse"):
        call_typed(model, **{name: fitting.to_sparse()})


@pytest.mark.parametrize(("model", "name"), CASES)
def test_types_out_of_range_are_refused_with_their_place(model, name):
    fitting, kinds = TYPED[model][0][name]
    for wrong in (-1, kinds, 100):
        types = fitting.to(torch.int8)
        types[2] = wrong
        with pytest.raises(
            ValueError, match=f"{name} must be from 0 to {kinds - 1}, got {wrong} a"
        ):
            call_typed(model, **{name: types})
    if name != "word":  # there may be any number of words
        for wrong in (fitting[:-1], fitting[:, None], fitting[:0]):
            with pytest.raises(
                ValueError, match=rf"{name} must be \[.*\] = \[{len(fitting)}\] int"
            ):
                call_typed(model, **{name: wrong})


def test_graphs_without_nodes_or_edges_have_types_too():
    none = torch.zeros(0, dtype=torch.long)
    empty = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.long), 0)
    assert call_typed("GraphTransformer", node_type=none, graph=empty).shape == (0, 2)
    assert call_typed("GraphClassifier", node_type=none, graph=empty).shape == (1, 2)
    edgeless = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.long), N)
    assert call_typed("EdgeGraphTransformer", edge_type=none, graph=edgeless).shape == (1, 1)


def test_encodings_that_are_no_numbers_are_refused():
    model = GraphTransformer(GraphTransformerConfig(3, 2, pe_dim=2, **SMALL))
    for wrong, found in ((np.zeros((N, 2)), "a tensor, got ndarray"), ([[0.0, 0.0]] * N, "list")):
        with pytest.raises(TypeError, match=f"pe must be .*{found}"):
            model(NODE_TYPE, GRAPH, wrong)
    with pytest.raises(TypeError, match=r"pe must be float16.* got torch\.int64"):
        model(NODE_TYPE, GRAPH, torch.zeros(N, 2, dtype=torch.long))


ALONE = Graph.from_edge_index(torch.zeros(2, 3, dtype=torch.long), 1)
ONE_EDGE = Graph.from_edge_index(torch.tensor([[0], [1]]), N)
# what has batch norms, called with one row
ONE_ROW = {
    "a node": (
        lambda: GraphTransformerLayer(DIM, 2),
        lambda m: m(X[:1], ALONE),
        "norm1 of GraphTransformerLayer is a batch norm in training and got 1 node: a variance",
    ),
    "a node of a model": (
        lambda: GraphTransformer(GraphTransformerConfig(3, 2, **SMALL)),
        lambda m: m(NODE_TYPE[:1], ALONE),
        r"got 1 node: .* Make larger batches.* norm='layer'",
    ),
    "a node of a graph": (
        lambda: GraphClassifier(GraphClassifierConfig(3, 2, **SMALL)),
        lambda m: m(NODE_TYPE[:1], ALONE),
        "norm1 of GraphTransformerLayer .* got 1 node",
    ),
    "a node with edges": (
        lambda: GraphTransformerEdgeLayer(DIM, 2),
        lambda m: m(X[:1], EDGE[:3], ALONE),
        "norm1 of GraphTransformerEdgeLayer is .* got 1 node",
    ),
    "an edge": (
        lambda: GraphTransformerEdgeLayer(DIM, 2),
        lambda m: m(X, EDGE[:1], ONE_EDGE),
        "edge_norm1 of GraphTransformerEdgeLayer is .* got 1 edge: a variance takes 2 at least",
    ),
    "an edge of a model": (
        lambda: EdgeGraphTransformer(EdgeGraphTransformerConfig(3, 2, pe_dim=0, **SMALL)),
        lambda m: m(NODE_TYPE, EDGE_TYPE[:1], ONE_EDGE),
        "edge_norm1 of .* got 1 edge",
    ),
    "a graph": (
        lambda: VirtualNode(DIM),
        lambda m: m(X, torch.zeros(1, DIM), torch.tensor([0, N])),
        "update of VirtualNode is a batch norm in training and got 1 graph: a variance",
    ),
}


@pytest.mark.parametrize("name", ONE_ROW)
def test_one_row_under_a_batch_norm_in_training_is_refused(name):
    make, call, message = ONE_ROW[name]
    module = make()
    before = {key: x.clone() for key, x in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        call(module)
    for key, x in module.state_dict().items():
        assert torch.equal(x, before[key]), key
    call(module.eval())


def test_one_row_passes_other_norms_and_the_last_layers_edges():
    torch.manual_seed(0)
    layer = {"dim": DIM, "heads": 2, "norm": "layer"}
    GraphTransformerLayer(**layer)(X[:1], ALONE)
    GraphTransformerEdgeLayer(**layer)(X, EDGE[:1], ONE_EDGE)
    x, _ = GraphTransformerEdgeLayer(DIM, 2)(X, EDGE[:1], ONE_EDGE, edge_output=False)
    assert x.isfinite().all()
    model = EdgeGraphTransformer(
        EdgeGraphTransformerConfig(3, 2, pe_dim=0, dim=DIM, heads=2, layers=1)
    )
    model(NODE_TYPE, EDGE_TYPE[:1], ONE_EDGE).sum().backward()


def test_no_edge_leaves_the_batch_norms_of_edges_as_they_are():
    torch.manual_seed(0)
    edgeless = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.long), N)
    layer = GraphTransformerEdgeLayer(DIM, 2)
    x, e = layer(X, EDGE[:0], edgeless)
    assert e.shape == (0, DIM)
    assert x.isfinite().all()
    assert layer.edge_norm1.running_mean.tolist() == [0.0] * DIM
    assert layer.edge_norm1.running_var.tolist() == [1.0] * DIM


def test_there_may_be_more_types_than_a_narrow_dtype_holds():
    model = GraphClassifier(GraphClassifierConfig(300, 2, **SMALL)).eval()
    types = torch.tensor([0, 45, 255, 100])
    wanted = model(types, GRAPH)
    assert torch.equal(model(types.to(torch.uint8), GRAPH), wanted)
    with pytest.raises(ValueError, match="node_type must be from 0 to 299, got -1 at 2"):
        model(types.to(torch.int8), GRAPH)

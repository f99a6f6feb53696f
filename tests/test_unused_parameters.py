"""Every parameter gets a gradient, as DistributedDataParallel wants, or is left out on demand."""

import pytest
import torch
from attention_cases import FP64, close
from module_cases import MODULES, Given
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastgt import Graph, prune_heads
from fastgt.models.graph_transformer import GraphTransformerEdgeLayer
from fastgt.nn import (
    EdgeGatedAttention,
    HeadGate,
)

N, E, DIM, HEADS = 5, 8, 8, 2
EDGES = torch.tensor([[0, 1, 2, 3, 0, 1, 4, 4], [1, 2, 3, 0, 2, 3, 4, 0]])
GRAPHS = {
    "edges": Graph.from_edge_index(EDGES, N),
    "no edges": Graph.from_edge_index(EDGES[:, :0], N),
}
X = torch.randn(N, DIM)
KINDS = torch.tensor([0, 1, 2, 0, 1])


# name -> what it is, and its options
WITH_GATES = {
    "neighborhood": ("NeighborhoodAttention", {}),
    "edge": ("EdgeGatedAttention", {}),
    "edge without output": ("EdgeGatedAttention", {"edge_output": False}),
    "linear": ("LinearAttention", {}),
    "global": ("GlobalAttention", {}),
}
MODELS = {
    "performer": ("PerformerAttention", {}),
    "conv": ("TransformerConv with edges", {"edge_dim": DIM, "beta": True}),
    "nodes": ("GraphTransformer", {"layers": 2, "pe_dim": 2}),
    "graphs": ("GraphClassifier", {"layers": 2, "gated": True}),
    "typed edges": (
        "EdgeGraphTransformer",
        {"layers": 2, "pe_dim": 0, "edge_types": 4, "last_edges": False},
    ),
    "gps": ("GraphGPS", {"layers": 2, "edge_types": 4}),
    "gps of several": ("GraphGPS", {"layers": 2, "local": "pna", "edge_types": 4}),
    "gps gated": (
        "GraphGPS",
        {"layers": 2, "local": "gatedgcn", "edge_types": 4, "last_edges": False},
    ),
    "gps additive": (
        "GraphGPS without edges",
        {"layers": 2, "local": "gat", "attention": "performer"},
    ),
    "gps without edges": (
        "GraphGPS without edges",
        {"layers": 2, "local": "gcn", "attention": "linear", "norm": "graph"},
    ),
    "sgformer": ("SGFormer", {"layers": 2}),
    "sgformer without norms": (
        "SGFormer",
        {"norm": False, "values": False, "alpha": 1.0, "convolution": "plain"},
    ),
    "sgformer with the first features": (
        "SGFormer",
        {"convolution": "initial", "aggregate": "cat", "qk_norms": "node"},
    ),
    "exphormer": (
        "Exphormer",
        {"layers": 2, "edge_types": 4, "virtual_nodes": 2, "last_edges": False},
    ),
    "san": ("SAN", {"layers": 2, "edge_types": 4}),
    "mpnn": (
        "MPNNVirtualNode",
        {"layers": 2, "virtual_node": False, "local": "gatedgcn", "last_edges": False},
    ),
    "packages": ("PackageClassifier", {"layers": 2, "edge_kinds": 4}),
}


def made(kind, options):
    return MODULES[kind].make(DIM, HEADS, **options)


def outputs(kind, module, graph):
    given = Given(
        graph,
        graph.graph_ptr,
        X,
        torch.ones(graph.num_edges, DIM),
        node_type=KINDS,
        edge_type=torch.arange(graph.num_edges) % 4,
        pe=torch.ones(N, 2) if kind == "GraphTransformer" else None,
        word_ptr=torch.arange(N + 1),
        word=KINDS,
    )
    out = MODULES[kind].call(module, given)
    return [y for y in (out if isinstance(out, tuple) else (out,)) if y is not None]


def total(kind, module, graph):
    return sum(y.sum() for y in outputs(kind, module, graph))


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("gate", [None, [1.0, 1.0], [0.0, 0.5], [0.0, 0.0]], ids=str)
@pytest.mark.parametrize("name", WITH_GATES)
def test_every_parameter_of_a_module_gets_a_gradient(name, gate, graph):
    """Whichever heads its gate masks on this rank or that."""
    kind, options = WITH_GATES[name]
    gate_of_heads = None if gate is None else HeadGate(torch.tensor(gate))
    module = made(kind, options | {"head_gate": gate_of_heads})
    total(kind, module, GRAPHS[graph]).backward()
    assert all(p.grad is not None for p in module.parameters())
    if gate == [0.0, 0.0]:
        assert not any(layer.weight.grad.any() for layer in (module.q, module.k, module.v))


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_model_gets_a_gradient(name, graph):
    kind, options = MODELS[name]
    model = made(kind, options)
    total(kind, model, GRAPHS[graph]).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def steps(kind, model):
    parallel = DistributedDataParallel(model)
    for _ in range(2):  # the second one misses what the first has left
        total(kind, parallel, GRAPHS["edges"]).backward()


@pytest.mark.parametrize("name", MODELS)
def test_models_run_under_distributed_data_parallel(name, group):
    kind, options = MODELS[name]
    steps(kind, made(kind, options))


def test_what_is_unused_can_be_left_out(group):
    """The published last layer, and TransformerConv's lin_skip without a root."""
    conv = made("TransformerConv", {"root_weight": False})
    with pytest.raises(RuntimeError, match="parameters that were not used"):
        steps("TransformerConv", conv)
    conv.lin_skip.requires_grad_(False)
    steps("TransformerConv", conv)
    kind, options = MODELS["typed edges"]
    published = made(kind, options | {"last_edges": True})
    with pytest.raises(RuntimeError, match="parameters that were not used"):
        steps(kind, published)


def test_a_model_without_the_last_edges_is_the_published_one_without_what_nothing_uses():
    torch.manual_seed(0)
    kind, options = MODELS["typed edges"]
    published = made(kind, options | {"last_edges": True}).double()
    smaller = made(kind, options).double()
    missing, unexpected = smaller.load_state_dict(published.state_dict(), strict=False)
    assert not missing
    last = "layers.1."
    assert {key.removeprefix(last).split(".")[0] for key in unexpected} == {
        "attention", "edge_norm1", "edge_ffn", "edge_norm2",
    }  # fmt: skip
    assert all(key.startswith(last) for key in unexpected)
    assert {key for key in unexpected if "attention" in key} == {
        f"{last}attention.edge_out.weight", f"{last}attention.edge_out.bias",
    }  # fmt: skip
    for model in (published, smaller):
        model.eval()
    graph = GRAPHS["edges"]
    (whole,), (part,) = (outputs(kind, model, graph) for model in (published, smaller))
    assert torch.equal(whole, part)


def test_attention_without_edge_output():
    torch.manual_seed(0)
    graph, e = GRAPHS["edges"], torch.randn(E, DIM, dtype=FP64)
    whole = EdgeGatedAttention(DIM, HEADS).double()
    part = EdgeGatedAttention(DIM, HEADS, edge_output=False).double()
    part.load_state_dict(whole.state_dict(), strict=False)
    x = X.double()
    for edge_output in (None, False):
        found, none = part(x, e, graph, edge_output=edge_output)
        assert none is None
        close(found, whole(x, e, graph)[0])
    with pytest.raises(
        ValueError, match="edge_output=True, but the module was made with edge_outp"
    ):
        part(x, e, graph, edge_output=True)
    # its heads may be taken away, and come back from a file
    part.head_gate = HeadGate(torch.tensor([0.0, 2.0]))
    smaller = prune_heads(part)
    assert smaller.q.out_features == DIM // 2
    assert smaller.edge_out is None
    close(smaller(x, e, graph)[0], part(x, e, graph)[0])
    part.head_gate = None
    again = prune_heads(part, state_dict=smaller.state_dict())
    assert torch.equal(again(x, e, graph)[0], smaller(x, e, graph)[0])


def test_a_layer_without_edge_output_hands_its_edges_on():
    graph, e = GRAPHS["edges"], torch.randn(E, DIM)
    layer = GraphTransformerEdgeLayer(DIM, HEADS, edge_output=False)
    assert not any("edge" in name for name, _ in layer.named_parameters())
    x, same = layer(X, e, graph)
    assert same is e
    assert x.shape == X.shape
    with pytest.raises(ValueError, match="edge_output=True, but the module was made"):
        layer(X, e, graph, edge_output=True)
    assert isinstance(GraphTransformerEdgeLayer(DIM, HEADS).edge_ffn, nn.Sequential)

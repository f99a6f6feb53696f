"""Every parameter gets a gradient, as DistributedDataParallel wants, or is left out on demand."""

import pytest
import torch
from attention_cases import FP64, close
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastgt import Graph, prune_heads
from fastgt.models import (
    EdgeGraphTransformer,
    EdgeGraphTransformerConfig,
    GraphClassifier,
    GraphClassifierConfig,
    GraphTransformer,
    GraphTransformerConfig,
)
from fastgt.models.graph_transformer import GraphTransformerEdgeLayer
from fastgt.models.package_classifier import PackageClassifier, PackageClassifierConfig
from fastgt.nn import (
    EdgeGatedAttention,
    HeadGate,
    LinearAttention,
    NeighborhoodAttention,
    PerformerAttention,
    TransformerConv,
)

N, E, DIM, HEADS = 5, 8, 8, 2
EDGES = torch.tensor([[0, 1, 2, 3, 0, 1, 4, 4], [1, 2, 3, 0, 2, 3, 4, 0]])
GRAPHS = {
    "edges": Graph.from_edge_index(EDGES, N),
    "no edges": Graph.from_edge_index(EDGES[:, :0], N),
}
SIZES = {"dim": DIM, "heads": HEADS, "layers": 2}
X = torch.randn(N, DIM)
KINDS = torch.tensor([0, 1, 2, 0, 1])


def edge_types(graph):
    return torch.arange(graph.num_edges) % 4


# how it is made from a gate, and called with a graph
MODULES = {
    "neighborhood": (
        lambda gate: NeighborhoodAttention(DIM, HEADS, head_gate=gate),
        lambda m, g: m(X, g),
    ),
    "edge": (
        lambda gate: EdgeGatedAttention(DIM, HEADS, head_gate=gate),
        lambda m, g: sum(y.sum() for y in m(X, torch.ones(g.num_edges, DIM), g)),
    ),
    "edge without output": (
        lambda gate: EdgeGatedAttention(DIM, HEADS, edge_output=False, head_gate=gate),
        lambda m, g: m(X, torch.ones(g.num_edges, DIM), g)[0],
    ),
    "linear": (
        lambda gate: LinearAttention(DIM, HEADS, head_gate=gate),
        lambda m, g: m(X, g.graph_ptr),
    ),
}
MODELS = {
    "performer": (lambda: PerformerAttention(DIM, HEADS), lambda m, g: m(X, g.graph_ptr)),
    "conv": (
        lambda: TransformerConv(DIM, 4, HEADS, edge_dim=3, beta=True),
        lambda m, g: m(X, g, torch.ones(g.num_edges, 3)),
    ),
    "nodes": (
        lambda: GraphTransformer(GraphTransformerConfig(3, 2, pe_dim=2, **SIZES)),
        lambda m, g: m(KINDS, g, torch.ones(N, 2)),
    ),
    "graphs": (
        lambda: GraphClassifier(GraphClassifierConfig(3, 2, gated=True, **SIZES)),
        lambda m, g: m(KINDS, g),
    ),
    "typed edges": (
        lambda: EdgeGraphTransformer(
            EdgeGraphTransformerConfig(pe_dim=0, last_edges=False, **SIZES)
        ),
        lambda m, g: m(KINDS, edge_types(g), g),
    ),
    "packages": (
        lambda: PackageClassifier(PackageClassifierConfig(4, 4, 2, **SIZES)),
        lambda m, g: m(torch.arange(N + 1), KINDS, g, edge_types(g)),
    ),
}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("gate", [None, [1.0, 1.0], [0.0, 0.5], [0.0, 0.0]], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_of_a_module_gets_a_gradient(name, gate, graph):
    """Whichever heads its gate masks on this rank or that."""
    make, call = MODULES[name]
    module = make(None if gate is None else HeadGate(torch.tensor(gate)))
    call(module, GRAPHS[graph]).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    if gate == [0.0, 0.0]:
        assert not any(layer.weight.grad.any() for layer in (module.q, module.k, module.v))


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_model_gets_a_gradient(name, graph):
    make, call = MODELS[name]
    model = make()
    call(model, GRAPHS[graph]).sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def steps(model, call):
    parallel = DistributedDataParallel(model)
    for _ in range(2):  # the second one misses what the first has left
        call(parallel, GRAPHS["edges"]).sum().backward()


@pytest.mark.parametrize("name", MODELS)
def test_models_run_under_distributed_data_parallel(name, group):
    make, call = MODELS[name]
    steps(make(), call)


def test_what_is_unused_can_be_left_out(group):
    """The published last layer, and TransformerConv's lin_skip without a root."""
    conv = TransformerConv(DIM, 4, root_weight=False)
    with pytest.raises(RuntimeError, match="parameters that were not used"):
        steps(conv, lambda m, g: m(X, g))
    conv.lin_skip.requires_grad_(False)
    steps(conv, lambda m, g: m(X, g))
    published = EdgeGraphTransformer(EdgeGraphTransformerConfig(pe_dim=0, **SIZES))
    with pytest.raises(RuntimeError, match="parameters that were not used"):
        steps(published, MODELS["typed edges"][1])


def test_a_model_without_the_last_edges_is_the_published_one_without_what_nothing_uses():
    torch.manual_seed(0)
    published = EdgeGraphTransformer(EdgeGraphTransformerConfig(pe_dim=0, **SIZES)).double()
    smaller = MODELS["typed edges"][0]().double()
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
    found = [model(KINDS, edge_types(graph), graph) for model in (published, smaller)]
    assert torch.equal(*found)


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

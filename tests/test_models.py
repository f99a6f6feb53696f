"""The reference models: the paper's parameter counts, and behaviour under training."""

from itertools import pairwise

import pytest
import torch

import fastgt.nn.attention as nn_attention
from fastgt import Graph, implementation
from fastgt.models import GraphTransformer, GraphTransformerConfig
from fastgt.models.graph_transformer import GraphTransformerLayer
from fastgt.nn import NeighborhoodAttention
from fastgt.testing import random_batch, random_graph


@pytest.mark.parametrize(
    ("node_types", "out_dim", "pe_dim", "parameters"),
    [(3, 2, 0, 522_742), (3, 2, 2, 522_982), (7, 6, 0, 523_146), (7, 6, 10, 524_026)],
    ids=["PATTERN", "PATTERN+LapPE", "CLUSTER", "CLUSTER+LapPE"],
)
def test_parameter_counts_of_the_paper(node_types, out_dim, pe_dim, parameters):
    model = GraphTransformer(GraphTransformerConfig(node_types, out_dim, pe_dim=pe_dim))
    assert sum(p.numel() for p in model.parameters()) == parameters


def small(norm="batch", pe_dim=3):
    torch.manual_seed(0)
    config = GraphTransformerConfig(4, 3, dim=16, heads=2, layers=2, pe_dim=pe_dim, norm=norm)
    return GraphTransformer(config)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_layer_is_the_papers_equation(norm):
    """Against the authors' arithmetic written out with loops."""
    torch.manual_seed(0)
    layer = GraphTransformerLayer(12, 3, norm=norm).double()
    graph = random_graph(1, 9, 30, isolated=2)
    x = torch.randn(9, 12, dtype=torch.float64)
    q, k, v = (
        f(x).view(9, 3, 4) for f in (layer.attention.q, layer.attention.k, layer.attention.v)
    )
    h = torch.zeros(9, 3, 4, dtype=torch.float64)
    z = torch.zeros(9, 3, 1, dtype=torch.float64)
    for j, i in graph.edge_index.T.tolist():
        w = ((q[i] * k[j]).sum(-1, keepdim=True) / 4**0.5).clamp(-5, 5).exp()
        h[i] += w * v[j]
        z[i] += w
    h = torch.where(z > 0, h / z, 0.0)
    y = layer.norm1(x + layer.attention.out(h.flatten(1)))
    y = layer.norm2(y + layer.ffn(y))
    torch.testing.assert_close(layer(x, graph), y)
    assert layer.attention.q.bias is None
    assert layer.attention.out.bias is not None


def test_isolated_nodes_stay_finite_in_training():
    model = small()
    graph = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]), 5)
    out = model(torch.tensor([0, 1, 2, 3, 0]), graph, torch.randn(5, 3))
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_encodings_flip_signs_only_in_training():
    model = small(norm="layer")
    graph, types, pe = random_graph(0, 12, 40), torch.zeros(12, dtype=torch.long), None
    pe = torch.randn(12, 3)
    torch.manual_seed(0)
    trained = {model(types, graph, pe).sum().item() for _ in range(20)}
    assert 2 <= len(trained) <= 8, "one sign per eigenvector: at most 2^3 results"
    model.eval()
    assert len({model(types, graph, pe).sum().item() for _ in range(5)}) == 1


def test_missing_or_unwanted_encodings_are_refused():
    graph, types = random_graph(0, 4, 6), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="pe must be"):
        small()(types, graph)
    with pytest.raises(ValueError, match="pe must be"):
        small(pe_dim=0)(types, graph, torch.zeros(4, 3))


def test_batch_equals_single_graphs():
    graph = random_batch(3, [(5, 12), (0, 0), (8, 30), (1, 0)])
    model, types = small(norm="layer").eval(), torch.arange(14) % 4
    pe = torch.randn(14, 3)
    whole = model(types, graph, pe)
    ptr = graph.graph_ptr.tolist()
    source, target = graph.edge_index
    for first, last in pairwise(ptr):
        mine = (target >= first) & (target < last)
        one = Graph.from_edge_index(torch.stack([source[mine], target[mine]]) - first, last - first)
        torch.testing.assert_close(model(types[first:last], one, pe[first:last]), whole[first:last])


def test_model_is_equivariant():
    graph, order = random_graph(5, 20, 80), torch.randperm(20)
    model, types, pe = small(norm="layer").eval(), torch.arange(20) % 4, torch.randn(20, 3)
    torch.testing.assert_close(
        model(types[order], graph.reordered(order), pe[order]), model(types, graph, pe)[order]
    )


@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_a_model_learns(impl):
    """One implementation for the whole model; a small task is fitted."""
    torch.manual_seed(0)
    graph = random_graph(2, 40, 160)
    types = torch.randint(4, (40,))
    # the label is the type of the node's first neighbour: words alone cannot tell
    has = graph.row_degree > 0
    label = torch.zeros(40, dtype=torch.long)
    label[has] = types[graph.col.long()[graph.row_ptr[:-1].long()[has]]] % 3
    model = small(pe_dim=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    with implementation(impl):
        for _ in range(120):
            loss = torch.nn.functional.cross_entropy(model(types, graph), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert loss < 0.2


def test_module_takes_bipartite_graphs_grouped_heads_and_bias():
    graph = random_graph(0, 6, 20, cols=9)
    module = NeighborhoodAttention(16, 4, kv_heads=2, context_dim=10)
    x, y = torch.randn(6, 16), torch.randn(9, 10)
    out = module(x, graph, context=y, edge_bias=torch.randn(20, 4))
    assert out.shape == (6, 16)
    with implementation("reference"):
        torch.manual_seed(1)
        bias = torch.randn(20, 4)
        expected = module(x, graph, context=y, edge_bias=bias)
    torch.testing.assert_close(module(x, graph, context=y, edge_bias=bias), expected)


@pytest.mark.parametrize(
    ("types", "pe", "message"),
    [
        (torch.zeros(4, 1, dtype=torch.long), torch.zeros(4, 3), r"node_type .* \[4\] .* \[4, 1\]"),
        (torch.zeros(5, dtype=torch.long), torch.zeros(4, 3), r"node_type .* got \[5\]"),
        (torch.zeros(4, dtype=torch.long), torch.zeros(4, 2), r"pe .* \[4, 3\], got \[4, 2\]"),
        (
            torch.tensor([0, 1, 4, 2]),
            torch.zeros(4, 3),
            "node_type must be from 0 to 3, got 4 at 2",
        ),
    ],
)
def test_inputs_of_other_shapes_are_refused(types, pe, message):
    with pytest.raises(ValueError, match=message):
        small()(types, random_graph(0, 4, 6), pe)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers must be positive, got 0"),
        ({"out_dim": -1}, "out_dim must be positive, got -1"),
        ({"pe_dim": -1}, "pe_dim must not be negative, got -1"),
        ({"dim": 10, "heads": 3}, "dim=10 and heads=3"),
        ({"norm": "group"}, "norm must be 'batch' or 'layer', got 'group'"),
    ],
)
def test_configurations_that_make_no_model(changes, message):
    with pytest.raises(ValueError, match=message):
        GraphTransformer(GraphTransformerConfig(**{"node_types": 4, "out_dim": 3} | changes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 12, "heads": 4, "impl": "cuda"}, "impl must be one of .* got 'cuda'"),
        ({"dim": 10, "heads": 3}, "dim=10 and heads=3"),
        ({"dim": 12, "heads": 0}, "dim=12 and heads=0"),
        ({"dim": 12, "heads": 4, "kv_heads": 3}, "got 3 and 4"),
    ],
)
def test_module_refuses_clearly(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention(**arguments)


def test_state_dict_round_trip():
    model, again = small().eval(), small().eval()
    for p in again.parameters():
        torch.nn.init.normal_(p)
    again.load_state_dict(model.state_dict())
    graph, types, pe = random_graph(0, 6, 20), torch.arange(6) % 4, torch.randn(6, 3)
    torch.testing.assert_close(again(types, graph, pe), model(types, graph, pe))


def test_layer_is_the_papers_equation_with_all_parts_told_apart():
    """Logits beyond the clamp, a bias, norms that differ, and the feed-forward written out."""
    torch.manual_seed(0)
    layer = GraphTransformerLayer(12, 3, norm="layer").double()
    with torch.no_grad():
        for p in (layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias):
            p.normal_()
    graph = random_graph(1, 9, 30)
    x = 9 * torch.randn(9, 12, dtype=torch.float64)
    bias = torch.randn(30, 3, dtype=torch.float64)
    q, k, v = (
        f(x).view(9, 3, 4) for f in (layer.attention.q, layer.attention.k, layer.attention.v)
    )
    source, target = graph.edge_index
    logit = (q[target] * k[source]).sum(-1) / 4**0.5
    assert (logit.abs() > 5).sum() > 10
    w = (logit.clamp(-5, 5) + bias).exp()[..., None]
    z = torch.zeros(9, 3, 1, dtype=torch.float64).index_add(0, target, w)
    h = torch.zeros(9, 3, 4, dtype=torch.float64).index_add(0, target, w * v[source])
    h = torch.where(z > 0, h / z, 0.0)
    y = layer.norm1(x + layer.attention.out(h.flatten(1)))
    first, last = layer.ffn[0], layer.ffn[-1]
    y = layer.norm2(y + last(first(y).relu()))
    torch.testing.assert_close(layer(x, graph, edge_bias=bias), y)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_model_is_its_layers(norm):
    model = small(norm=norm).eval()
    wanted = {"batch": torch.nn.BatchNorm1d, "layer": torch.nn.LayerNorm}[norm]
    for layer in model.layers:
        assert type(layer.norm1) is type(layer.norm2) is wanted
    graph, types, pe = random_graph(0, 12, 40), torch.arange(12) % 4, torch.randn(12, 3)
    x = model.embed(types) + model.embed_pe(pe)
    for layer in model.layers:
        x = layer(x, graph)
    first, _, second, _, third = model.readout
    expected = third(second(first(x).relu()).relu())
    torch.testing.assert_close(model(types, graph, pe), expected)


def test_dropout_stands_where_the_paper_has_it():
    """On the input, between the heads and W_o, and between relu and W_2: nowhere else."""
    torch.manual_seed(0)
    config = GraphTransformerConfig(4, 3, dim=16, heads=2, layers=2, in_dropout=0.3, dropout=0.6)
    model, graph, types = GraphTransformer(config), random_graph(0, 40, 200), torch.arange(40) % 4
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.3, 0.6}
    dropped = {}

    def watch(name):
        def hook(module, args):
            dropped[name] = (args[0] == 0).double().mean().item()

        return hook

    for i, layer in enumerate(model.layers):
        for name, module in (("x", layer), ("out", layer.attention.out), ("ffn", layer.ffn[-1])):
            module.register_forward_pre_hook(watch(f"{name}{i}"))
    with torch.no_grad():
        model(types, graph)
        assert 0.2 < dropped["x0"] < 0.4
        assert dropped["x1"] == 0
        for i in range(2):
            assert 0.5 < dropped[f"out{i}"] < 0.7
            assert 0.7 < dropped[f"ffn{i}"] < 0.9  # half of them by the relu
        model.eval()(types, graph)
        assert dropped["x0"] == dropped["out0"] == 0


@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_module_hands_its_options_to_the_operator(impl, monkeypatch):
    seen = []
    real = nn_attention.neighborhood_attention

    def spy(*args, **kwargs):
        seen.append(kwargs["impl"])
        return real(*args, **kwargs)

    monkeypatch.setattr(nn_attention, "neighborhood_attention", spy)
    graph, x, bias = random_graph(0, 6, 20), 9 * torch.randn(6, 16), torch.randn(20, 4)
    module = NeighborhoodAttention(16, 4, logit_clamp=(-0.5, 1.0), denominator_eps=2.0, impl=impl)
    found = module(x, graph, edge_bias=bias)
    assert seen == [impl]
    q, k, v = (f(x).unflatten(1, (4, 4)) for f in (module.q, module.k, module.v))
    options = {"edge_bias": bias, "logit_clamp": (-0.5, 1.0), "denominator_eps": 2.0}
    out = real(q, k, v, graph, impl="reference", **options)
    torch.testing.assert_close(found, module.out(out.flatten(1)))

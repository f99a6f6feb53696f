"""Encoders of encodings in a GraphGPS model against their equations in plain PyTorch."""

import copy
from itertools import pairwise

import pytest
import torch
from encoding_cases import both_ways
from torch import nn
from torch.nn import functional as F

from fastgt import Graph
from fastgt.encodings import electrostatic_pe, heat_kernel_pe, random_walk_pe
from fastgt.models import GraphGPS, GraphGPSConfig
from fastgt.models.graph_gps_encoders import KernelEncoder
from fastgt.models.graph_gps_sign_net import SignNet

FP64 = torch.float64
pytestmark = pytest.mark.usefixtures("one_thread")


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def batch_norm(norm, x):
    """``[rows, channels]``."""
    mean, variance = norm.running_mean, norm.running_var
    if norm.training:
        mean, variance = x.mean(0), x.var(0, unbiased=False)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def sign_net(net, vectors, graph):
    adjacency = torch.zeros(len(vectors), len(vectors), dtype=vectors.dtype)
    for source, target in graph.edge_index.T.tolist():
        adjacency[target, source] += 1
    u = torch.where(vectors.isnan(), 0, vectors)
    columns = [sign * u[:, k, None] for k in range(net.count) for sign in (1, -1)]  # [N, 1] each

    def together(layer, parts):
        return layer(torch.cat(parts)).chunk(len(parts))

    def perceptron(mlp, x):
        for i in range(0, len(mlp) - 1, 3):
            x = batch_norm(mlp[i + 2], linear(mlp[i], x).clamp(min=0))
        return linear(mlp[-1], x)

    for i, mlp in enumerate(net.phi):
        if i:
            columns = together(lambda x, i=i: batch_norm(net.norms[i - 1], x), columns)
        columns = [x + adjacency @ x for x in columns]
        columns = together(lambda x, mlp=mlp: perceptron(mlp, x), columns)
    y = [a + b for a, b in zip(columns[::2], columns[1::2], strict=True)]
    if net.kind == "mlp":
        return perceptron(net.rho, torch.cat(y, 1))
    there = ~vectors.isnan()
    return perceptron(net.rho, sum(x * there[:, k, None] for k, x in enumerate(y)))


def perturbed(module):
    """Constants and statistics of norms, no two alike."""
    generator = torch.Generator().manual_seed(1)
    for m in module.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.LayerNorm)):
            own = (*m.parameters(), *(x for x in m.buffers() if x.ndim))
            for x in own:
                x.data.copy_(torch.rand(x.shape, generator=generator) + 0.5)
    return module


def gradients(module, call, *inputs):
    module = copy.deepcopy(module)
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = call(module, *inputs)
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(out.shape, generator=generator, dtype=FP64)
    named = dict(module.named_parameters())
    found = torch.autograd.grad(out, [*inputs, *named.values()], upstream)
    assert all(x.isfinite().all() for x in found)
    names = [f"input {i}" for i in range(len(inputs))] + list(named)
    return {"out": out} | dict(zip(names, found, strict=True))


def check(module, ours, theirs, *inputs):
    found, wanted = (gradients(module, call, *inputs) for call in (ours, theirs))
    for name, x in wanted.items():
        torch.testing.assert_close(
            found[name], x, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def eigenvectors(graph, count):
    """Random, and as many as a graph has nodes: NaN stands for the others."""
    torch.manual_seed(0)
    vectors = torch.randn(graph.num_rows, count, dtype=FP64)
    values = torch.rand(graph.num_graphs, count, dtype=FP64)
    for g, (first, last) in enumerate(pairwise(graph.graph_ptr.tolist())):
        vectors[first:last, last - first :] = torch.nan
        values[g, last - first :] = torch.nan
    return vectors, values


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("kind", "rho_layers"), [("mlp", 2), ("mlp", 1), ("deepset", 3)])
def test_sign_net(kind, rho_layers, train):
    torch.manual_seed(0)
    graph = both_ways()
    options = {"layers": 3, "hidden": 6, "out": 2, "rho_layers": rho_layers}
    net = perturbed(SignNet(5, 4, kind=kind, **options)).double().train(train)
    vectors = eigenvectors(graph, 5)[0]

    def on(call):
        return lambda module, u: call(module, torch.where(vectors.isnan(), vectors, u), graph)

    check(net, on(lambda m, u, graph: m(u, graph)), on(sign_net), vectors.nan_to_num())


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "deepset"])
def test_signs_make_no_difference(kind, train):
    torch.manual_seed(0)
    graph, net = both_ways(), SignNet(5, 4, kind=kind).double().train(train)
    vectors = eigenvectors(graph, 5)[0]
    for _ in range(5):
        signs = torch.randint(2, (5,)) * 2.0 - 1
        torch.testing.assert_close(net(vectors * signs, graph), net(vectors, graph))
    other = net(vectors.abs(), graph)  # but signs within one do
    assert not torch.allclose(other, net(vectors, graph))
    order = torch.randperm(5)
    moved = torch.allclose(net(vectors[:, order], graph), net(vectors, graph))
    assert moved == (kind == "deepset")


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
@pytest.mark.parametrize("train", [False, True])
def test_encoders_of_kernels(layers, train):
    torch.manual_seed(0)
    graph = both_ways()
    encoder = perturbed(KernelEncoder("walk_pe", 6, 4, layers)).double().train(train)
    x = torch.randn(graph.num_rows, 6, dtype=FP64)

    def literal(module, x):
        x = batch_norm(module.norm, x)
        if not layers:
            return linear(module.lin, x)
        for layer in list(module.lin)[::2]:
            x = linear(layer, x).clamp(min=0)
        return x

    check(encoder, lambda m, x: m(x, graph), literal, x)
    widths = [p.shape[0] for name, p in encoder.lin.named_parameters() if "weight" in name]
    assert widths == [8] * (layers - 1) + [4]


BASE = {"dim": 24, "layers": 1, "heads": 2, "walk_steps": 0, "walk_dim": 0, "edge_types": ()}
BASE |= {"local": "gin", "attention_dropout": 0.0}
SIGN = {"sign_pe": 4, "sign_dim": 6, "sign_layers": 2, "sign_hidden": 8}
MODELS = {
    "transformer": {"lap_pe": 4, "lap_dim": 6, "lap_heads": 2, "lap_layers": 1},
    "sign mlp": SIGN,
    "sign deepset": SIGN | {"sign_net": "deepset"},
    "kernels": {"walk_steps": 3, "walk_dim": 2, "heat_times": 3, "heat_dim": 4}
    | {"electrostatic_dim": 5, "kernel_layers": 2},
}


def model_of(name):
    torch.manual_seed(0)
    model = GraphGPS(GraphGPSConfig(**BASE | MODELS[name]))
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    return model


def inputs(model, graph):
    c = model.config
    given = {"node": torch.arange(graph.num_rows) % 28, "edge": None}
    vectors, values = eigenvectors(graph, 4)
    if c.lap_pe + c.sign_pe:
        given["lap_vectors"] = vectors.float()
    if c.lap_pe:
        given["lap_values"] = values.float()
    if c.walk_steps:
        given["walk_pe"] = random_walk_pe(graph, 3)
        given["heat_pe"] = heat_kernel_pe(graph, [1, 2, 4])
        given["electrostatic_pe"] = electrostatic_pe(graph)
    return given


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_equals_its_graphs_one_by_one(name):
    model, graph = perturbed(model_of(name)).eval(), both_ways()
    given = inputs(model, graph)
    whole = model(graph=graph, **given)
    target = graph.edge_index[1]
    for g, (first, last) in enumerate(pairwise(graph.graph_ptr.tolist())):
        mine = (target >= first) & (target < last)
        one = Graph.from_edge_index(graph.edge_index[:, mine] - first, last - first)
        places = {"lap_values": slice(g, g + 1)}
        parts = {
            key: None if x is None else x[places.get(key, slice(first, last))]
            for key, x in given.items()
        }
        torch.testing.assert_close(model(graph=one, **parts), whole[g : g + 1])


@pytest.mark.parametrize("name", MODELS)
def test_models_compile_whole(name):
    torch._dynamo.reset()
    model, graph = model_of(name).eval(), both_ways()
    given = inputs(model, graph)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(graph=graph, **given), model(graph=graph, **given))


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_is_learnt_by_heart(name):
    model, graph = model_of(name), both_ways()
    given = inputs(model, graph)
    # one kind of nodes: what tells the graphs apart is how they are encoded
    given["node"] = torch.zeros_like(given["node"])
    wanted = torch.linspace(-1, 1, graph.num_graphs)[torch.randperm(graph.num_graphs), None]
    sizes = graph.graph_ptr.diff()
    kept = sizes > 3
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0), []
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.mse_loss(model(graph=graph, **given)[kept], wanted[kept])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert min(losses[-20:]) < 0.1 * losses[0], (losses[0], losses[-1])


def test_published_settings():
    with torch.device("meta"):
        mlp, deepset = (
            GraphGPS(GraphGPSConfig.published(f"zinc_sign_{kind}")) for kind in ("mlp", "deepset")
        )
    for model, count, dim, out in ((mlp, 8, 8, 4), (deepset, 37, 28, 64)):
        net = model.embed_sign
        assert len(net.phi) == 8
        assert (net.count, net.rho[-1].out_features) == (count, dim)
        assert net.phi[-1][-1].out_features == out
        assert model.embed.embed[0].weight.shape == (28, 64 - dim)
    # 37 vectors are summed, 8 are joined
    assert mlp.embed_sign.rho[0].in_features == 32
    assert deepset.embed_sign.rho[0].in_features == 64
    assert [len(x.embed_sign.rho) for x in (mlp, deepset)] == [4, 7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (SIGN | {"lap_pe": 2, "lap_dim": 2}, "sign_pe must be 0 with lap_pe=2, got 4"),
        ({"sign_pe": 3}, "sign_pe and sign_dim must both be 0 or positive, got 3 and 0"),
        ({"heat_dim": 3}, "heat_times and heat_dim must both be 0 or positive, got 0 and 3"),
        (MODELS["transformer"] | {"lap_heads": 4}, "lap_heads must divide lap_dim=6, got 4"),
        ({"stable_pe": 3, "electrostatic_dim": 2}, "stable_pe must be 0 with electrostatic_dim=2"),
        (SIGN | {"electrostatic_dim": 18}, r"sign_dim \+ electrostatic_dim must .* got 6 \+ 18"),
        (SIGN | {"sign_net": "gin"}, "kind must be 'mlp' or 'deepset', got 'gin'"),
        (SIGN | {"sign_layers": 1}, "layers must be 2 at least, got 1"),
    ],
)
def test_configurations_that_make_no_model(changes, message):
    with pytest.raises(ValueError, match=message):
        GraphGPS(GraphGPSConfig(**BASE | changes))


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("sign mlp", {"lap_vectors": None}, TypeError, "lap_vectors must be a tensor, got None"),
        ("sign mlp", {"lap_vectors": torch.zeros(3, 4)}, ValueError, r"\[40, 4\], got \[3, 4\]"),
        ("sign mlp", {"heat_pe": torch.zeros(40, 3)}, ValueError, r"None \(heat_times is 0\), got"),
        ("kernels", {"heat_pe": torch.zeros(40, 2)}, ValueError, r"heat_pe .* got \[40, 2\]"),
        ("kernels", {"electrostatic_pe": None}, TypeError, "electrostatic_pe must be a tensor"),
        ("transformer", {"lap_values": torch.zeros(1, 4)}, ValueError, r"lap_values .* \[1, 4\]"),
    ],
)
def test_wrong_inputs_are_named(name, changes, error, message):
    model, graph = model_of(name), both_ways()
    with pytest.raises(error, match=message):
        model(graph=graph, **(inputs(model, graph) | changes))


def test_one_node_is_too_few_for_batch_norms_in_training():
    one = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), 1)
    for name, where in (("sign mlp", "norm of SignNet"), ("kernels", "KernelEncoder of walk_pe")):
        model = model_of(name)
        with pytest.raises(ValueError, match=f"{where} is a batch norm in training and got 1 node"):
            model(graph=one, **inputs(model, one))
        assert model.eval()(graph=one, **inputs(model, one)).isfinite().all()

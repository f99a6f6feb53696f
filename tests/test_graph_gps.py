"""GraphGPS against its equations, written out in plain PyTorch."""

import copy
from itertools import pairwise

import pytest
import torch
from attention_cases import DEVICE, FAST
from torch import nn
from torch.nn import functional as F

from fastgt import Graph, implementation
from fastgt.encodings import shortest_paths
from fastgt.models import GraphGPS, GraphGPSConfig
from fastgt.models.graph_gps_layer import GlobalAttention, GraphGPSLayer, GraphNorm
from fastgt.models.graph_gps_local import edge_distance
from fastgt.nn import HeadGate
from fastgt.pruning import prune_heads
from fastgt.testing import random_batch

FP64 = torch.float64
DIM, HEADS = 8, 2
SIZES = [(5, 12), (0, 0), (7, 20), (1, 1)]
LOCAL = ("none", "gcn", "gin", "gine", "gat", "pna", "attention", "gatedgcn")
WITH_EDGES = ("gine", "gat", "pna", "attention", "gatedgcn")
ATTENTION = ("none", "softmax", "performer", "linear")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More would mostly wait for each other: these tensors are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch():
    """Graphs with isolated nodes, self loops and duplicate edges."""
    graph = random_batch(3, SIZES, device=DEVICE)
    extra = torch.tensor([[0, 1, 1, 6], [0, 2, 2, 6]], device=DEVICE)
    edges = torch.cat([graph.edge_index, extra], 1)
    edges = edges[:, edges[1] != 3]
    return Graph.from_edge_index(edges, graph_ptr=graph.graph_ptr)


def scatter(values, index, n):
    return values.new_zeros(n, *values.shape[1:]).index_add(0, index, values)


def batch_norm(norm, x, offsets):
    mean, variance = norm.running_mean, norm.running_var
    if norm.training:
        mean, variance = x.mean(0), x.var(0, unbiased=False)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def graph_norm(norm, x, offsets):
    parts = [x[:0]]
    for first, last in pairwise(offsets):
        part = x[first:last]
        if last > first:
            part = (part - part.mean()) / (part.var(unbiased=False) + norm.eps).sqrt()
        parts.append(part * norm.weight + norm.bias)
    return torch.cat(parts)


def norm_of(norm, x, offsets):
    if isinstance(norm, nn.Identity):
        return x
    return (graph_norm if isinstance(norm, GraphNorm) else batch_norm)(norm, x, offsets)


def linear(layer, x):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def activation(module, x):
    if isinstance(module, nn.ReLU):
        return x.clamp(min=0)
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def two(mlp, x):
    return linear(mlp[2], activation(mlp[1], linear(mlp[0], x)))


def factor(local, distance):
    if local.factor is None:
        return 1
    return 1 / (1 + torch.exp(-two(local.factor, distance)))


def gcn(m, x, e, source, target, distance):
    n = len(x)
    keep = source != target
    loops = torch.arange(n, device=x.device)
    source, target = torch.cat([source[keep], loops]), torch.cat([target[keep], loops])
    degree = scatter(torch.ones_like(source, dtype=x.dtype), target, n)
    norm = degree[source] ** -0.5 * degree[target] ** -0.5
    return scatter(norm[:, None] * linear(m.lin, x)[source], target, n) + m.bias


def gin(m, x, e, source, target, distance):
    return two(m.mlp, x + scatter(x[source], target, len(x)))


def gine(m, x, e, source, target, distance):
    messages = (x[source] + e).clamp(min=0) * factor(m, distance)
    return two(m.mlp, x + scatter(messages, target, len(x)))


def gat(m, x, e, source, target, distance):
    n, heads = len(x), m.heads
    keep = source != target
    source, target, e = source[keep], target[keep], e[keep]
    count = scatter(torch.ones_like(source, dtype=x.dtype), target, n).clamp(min=1)
    loops = torch.arange(n, device=x.device)
    e = torch.cat([e, scatter(e, target, n) / count[:, None]])
    source, target = torch.cat([source, loops]), torch.cat([target, loops])
    v = linear(m.lin, x).view(n, heads, -1)
    alpha = (v[source] * m.source).sum(-1) + (v[target] * m.target).sum(-1)
    alpha = alpha + (linear(m.lin_edge, e).view(len(e), heads, -1) * m.edge).sum(-1)
    w = torch.where(alpha > 0, alpha, 0.2 * alpha).exp()[..., None]
    out = scatter(w * v[source], target, n) / scatter(w, target, n)
    return out.flatten(1) + m.bias


def pna(m, x, e, source, target, distance):
    weight = torch.cat([m.row.weight, m.col.weight, m.of_edge.weight], 1)
    given = torch.cat([x[target], x[source], linear(m.edge, e)], 1)
    messages = given @ weight.T + m.row.bias
    rows = []
    for i in range(len(x)):
        mine = messages[target == i]
        found = [mine.mean(0), mine.max(0).values, mine.sum(0)] if len(mine) else 3 * [0 * x[i]]
        rows.append(torch.cat([x[i], *found]))
    return linear(m.lin, linear(m.post, torch.stack(rows)))


def neighbours(m, x, e, source, target, distance):
    n, a = len(x), m.attention
    q, k, v = (linear(layer, x).view(n, a.heads, -1) for layer in (a.q, a.k, a.v))
    s = (q[target] * k[source]).sum(-1) / q.shape[2] ** 0.5 + linear(m.edge_bias, e)
    w = s.exp()[..., None]
    total = scatter(w, target, n)
    out = scatter(w * v[source], target, n) / torch.where(total > 0, total, 1)
    return linear(a.out, out.flatten(1))


def gated(m, x, e, source, target, distance, edge_output, offsets):
    n = len(x)
    scores = linear(m.gate_row, x)[target] + linear(m.gate_col, x)[source] + linear(m.gate, e)
    sigma = factor(m, distance) / (1 + torch.exp(-scores))
    mean = scatter(sigma * linear(m.value, x)[source], target, n)
    mean = mean / (scatter(sigma, target, n) + 1e-6)
    y = batch_norm(m.norm, linear(m.own, x) + mean, offsets)
    x = x + activation(m.activation, y)
    if edge_output:
        e = e + activation(m.edge_activation, batch_norm(m.edge_norm, scores, offsets))
    return x, e


def softmax(m, q, k, v):
    s = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[2] ** 0.5
    return torch.einsum("hnm,mhd->nhd", s.softmax(-1), v)


def performer(m, q, k, v):
    w, width = m.projection.to(q.dtype), q.shape[2]

    def phi(x, over):
        product = x @ w.T / width**0.25
        half = x.square().sum(-1, keepdim=True) / (2 * width**0.5)
        top = product.amax(over, keepdim=True).detach()
        return (torch.exp(product - half - top) + 1e-4) / len(w) ** 0.5

    a = torch.einsum("nhf,mhf->hnm", phi(q, 2), phi(k, (0, 2)))
    return torch.einsum("hnm,mhd->nhd", a / a.sum(-1, keepdim=True), v)


def elu(m, q, k, v):
    a = torch.einsum("nhd,mhd->hnm", F.elu(q) + 1, F.elu(k) + 1)
    return torch.einsum("hnm,mhd->nhd", a / (a.sum(-1, keepdim=True) + m.eps), v)


GLOBAL = {"softmax": softmax, "performer": performer, "linear": elu}
MESSAGES = {"gcn": gcn, "gin": gin, "gine": gine, "gat": gat, "pna": pna, "attention": neighbours}


def literal(layer, kind, attention, x, graph, e, distance, edge_output):
    source, target = graph.edge_index
    offsets, parts = graph.graph_ptr.tolist(), []
    if kind == "gatedgcn":
        given = source, target, distance, edge_output, offsets
        y, e_out = gated(layer.local, x, e, *given)
        parts.append(norm_of(layer.local_norm, y, offsets))
    elif kind != "none":
        y = MESSAGES[kind](layer.local, x, e, source, target, distance)
        parts.append(norm_of(layer.local_norm, x + y, offsets))
    if attention != "none":
        m, outs = layer.attention, [x[:0]]
        for first, last in pairwise(offsets):
            if last > first:
                part = x[first:last]
                q, k, v = (linear(f, part).view(len(part), HEADS, -1) for f in (m.q, m.k, m.v))
                outs.append(linear(m.out, GLOBAL[attention](m, q, k, v).flatten(1)))
        parts.append(norm_of(layer.attention_norm, x + torch.cat(outs), offsets))
    h = sum(parts)
    ffn = linear(layer.ffn[3], activation(layer.ffn[1], linear(layer.ffn[0], h)))
    return norm_of(layer.norm, h + ffn, offsets), e_out if kind == "gatedgcn" else e


def perturbed(module):
    """Buffers and constants of norms, that no two are alike."""
    generator = torch.Generator().manual_seed(1)
    for m in module.modules():
        for name, x in (*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)):
            if x.ndim == 1 and name != "offsets":
                drawn = torch.rand(x.shape, generator=generator, dtype=FP64) + 0.5
                x.data.copy_(drawn)
    return module


def run(layer, forward, tensors, upstream):
    layer, inputs = copy.deepcopy(layer), [t.clone().requires_grad_() for t in tensors.values()]
    outputs = [
        y for y in forward(layer, **dict(zip(tensors, inputs, strict=True))) if y is not None
    ]
    named = dict(layer.named_parameters())
    grads = torch.autograd.grad(
        outputs,
        [*inputs, *named.values()],
        [g[: len(y)] for y, g in zip(outputs, upstream, strict=False)],
        materialize_grads=True,
    )
    names = [*tensors, *named]
    found = {f"out {i}": y for i, y in enumerate(outputs)}
    return found | {f"d {name}": g for name, g in zip(names, grads, strict=True)}


def check(kind, attention, impl="cpp", train=True, **options):
    torch.manual_seed(0)
    graph = batch()
    layer = GraphGPSLayer(DIM, HEADS, local=kind, attention=attention, **options)
    layer = perturbed(layer).to(DEVICE, FP64).train(train)
    n, edges = graph.num_rows, graph.num_edges
    tensors = {"x": torch.randn(n, DIM, dtype=FP64, device=DEVICE)}
    if kind in WITH_EDGES:
        tensors["e"] = torch.randn(edges, DIM, dtype=FP64, device=DEVICE)
    if options.get("stable"):
        tensors["distance"] = torch.rand(edges, 1, dtype=FP64, device=DEVICE)
    upstream = [torch.randn(m, DIM, dtype=FP64, device=DEVICE) for m in (n, edges)]
    output = options.get("edge_output", True)

    def ours(m, x, e=None, distance=None):
        return m(x, e, graph, distance=distance)

    def theirs(m, x, e=None, distance=None):
        return literal(m, kind, attention, x, graph, e, distance, output)

    with implementation(impl):
        found = run(layer, ours, tensors, upstream)
    wanted = run(layer, theirs, tensors, upstream)
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(
            found[name], x, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: n + m
        )


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


def small(**changes):
    options = {"dim": 16, "layers": 2, "heads": 2, "walk_steps": 3, "walk_dim": 4}
    options |= {"lap_pe": 3, "lap_dim": 4, "attention_dropout": 0.0}
    return GraphGPS(GraphGPSConfig(**options | changes)).to(DEVICE)


def inputs(model, graph, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    c, n, edges = model.config, graph.num_rows, graph.num_edges

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    def types(kinds, size):
        columns = [torch.randint(k, (size,), generator=generator) for k in kinds]
        return (columns[0] if len(columns) == 1 else torch.stack(columns, 1)).to(DEVICE)

    node = types(c.node_types, n) if c.node_types else draw(n, c.node_features)
    given = {"node": node, "edge": None}
    if c.edge_types:
        given["edge"] = types(c.edge_types, edges)
    elif c.edge_features:
        given["edge"] = draw(edges, c.edge_features)
    if c.walk_steps:
        given["walk_pe"] = draw(n, c.walk_steps)
    if vectors := c.lap_pe + c.stable_pe:
        given["lap_vectors"] = draw(n, vectors)
        given["lap_vectors"][: n // 2, -1] = torch.nan
    if c.path_distance:
        paths = shortest_paths(graph, given["edge"], c.path_distance)
        given["pair_distance"], given["pair_edges"] = paths
    if c.lap_pe:
        given["lap_values"] = draw(graph.num_graphs, c.lap_pe)
    return given


NO_ENCODINGS = {"walk_steps": 0, "walk_dim": 0, "lap_pe": 0, "lap_dim": 0}
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.mse_loss(model(graph=graph, **given), wanted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-20:]) < 0.05 * losses[0], (losses[0], losses[-1])


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
        ({"local": "genconv"}, r"edge_types must be .* with local='genconv'"),
        ({"local": "egc", "edge_types": ()}, r"local must be one of \['none', .* got 'egc'"),
        ({"attention": "bigbird"}, r"attention must be one of .* got 'bigbird'"),
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

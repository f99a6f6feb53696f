"""The edge version of the Graph Transformer against a transcription of the published one."""

import copy
import functools
from itertools import pairwise

import pytest
import torch
from attention_cases import DEVICE, IMPLS
from torch import nn

from fastgt import Graph, implementation
from fastgt.datasets import Encoded, load
from fastgt.encodings import flip_signs, laplacian_pe
from fastgt.models import EdgeGraphTransformer, EdgeGraphTransformerConfig
from fastgt.models.graph_transformer import GraphTransformerEdgeLayer
from fastgt.nn import EdgeGatedAttention
from fastgt.testing import assert_as_accurate, random_batch, random_graph

pytestmark = pytest.mark.usefixtures("one_thread")


class PublishedLayer(nn.Module):
    """Equations 8 to 14 of arXiv 2012.09699, names as in the authors' code."""

    def __init__(self, dim, heads, norm="batch"):
        super().__init__()
        self.heads = heads
        self.Q, self.K, self.V, self.proj_e = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.O_h, self.O_e = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.FFN_h_layer1, self.FFN_h_layer2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.FFN_e_layer1, self.FFN_e_layer2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        make = nn.BatchNorm1d if norm == "batch" else nn.LayerNorm
        self.norm1_h, self.norm1_e, self.norm2_h, self.norm2_e = (make(dim) for _ in range(4))

    def forward(self, h, e, source, target):
        width = h.shape[1] // self.heads
        q, k, v, proj_e = (
            f(x).view(-1, self.heads, width)
            for f, x in ((self.Q, h), (self.K, h), (self.V, h), (self.proj_e, e))
        )
        score = k[source] * q[target]
        score = score / width**0.5
        score = score * proj_e
        e_out = score
        score = torch.exp(score.sum(-1, keepdim=True).clamp(-5, 5))
        wv = torch.zeros_like(v).index_add(0, target, v[source] * score)
        z = v.new_zeros(len(h), self.heads, 1).index_add(0, target, score)
        h_out = wv / (z + torch.full_like(z, 1e-6))
        h_attn, e_attn = h_out.reshape(h.shape), e_out.reshape(e.shape)
        h1 = self.norm1_h(h + self.O_h(h_attn))
        e1 = self.norm1_e(e + self.O_e(e_attn))
        h2 = self.FFN_h_layer2(torch.relu(self.FFN_h_layer1(h1)))
        e2 = self.FFN_e_layer2(torch.relu(self.FFN_e_layer1(e1)))
        return self.norm2_h(h1 + h2), self.norm2_e(e1 + e2)


class PublishedNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        d = config.dim
        self.embedding_h = nn.Embedding(config.node_types, d)
        self.embedding_e = nn.Embedding(config.edge_types, d)
        self.embedding_lap_pos_enc = nn.Linear(config.pe_dim, d)
        self.layers = nn.ModuleList(
            PublishedLayer(d, config.heads, config.norm) for _ in range(config.layers)
        )
        self.FC_layers = nn.ModuleList(
            [nn.Linear(d, d // 2), nn.Linear(d // 2, d // 4), nn.Linear(d // 4, config.out_dim)]
        )

    def forward(self, h, e, source, target, sizes, h_lap_pos_enc):
        h = self.embedding_h(h) + self.embedding_lap_pos_enc(h_lap_pos_enc)
        e = self.embedding_e(e)
        for layer in self.layers:
            h, e = layer(h, e, source, target)
        y = torch.stack([part.mean(0) for part in h.split(sizes)])
        for layer in self.FC_layers[:-1]:
            y = torch.relu(layer(y))
        return self.FC_layers[-1](y)


OURS = {
    "Q": "attention.q",
    "K": "attention.k",
    "V": "attention.v",
    "proj_e": "attention.gate",
    "O_h": "attention.out",
    "O_e": "attention.edge_out",
    "norm1_h": "norm1",
    "norm1_e": "edge_norm1",
    "norm2_h": "norm2",
    "norm2_e": "edge_norm2",
    "FFN_h_layer1": "ffn.0",
    "FFN_h_layer2": "ffn.3",
    "FFN_e_layer1": "edge_ffn.0",
    "FFN_e_layer2": "edge_ffn.3",
    "embedding_h": "embed",
    "embedding_e": "embed_edge",
    "embedding_lap_pos_enc": "embed_pe",
    "FC_layers.0": "readout.0",
    "FC_layers.1": "readout.2",
    "FC_layers.2": "readout.4",
}


def ours(name):
    """The name in fastgt of one of the published parameters or buffers."""
    module, _, leaf = name.rpartition(".")
    head = ".".join(module.split(".")[:2]) if module.startswith("layers.") else ""
    inner = module.removeprefix(head + ".") if head else module
    return ".".join(part for part in (head, OURS[inner], leaf) if part)


def with_weights_of(published, model):
    """The published module with our weights, and nothing of ours left over."""
    state = model.state_dict()
    published.load_state_dict({name: state.pop(ours(name)) for name in published.state_dict()})
    assert not state
    return published


@functools.cache
def molecules():
    try:
        few = load("zinc12k").subset(torch.arange(8))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    pe = laplacian_pe(few.batch(torch.arange(8)).graph, 3)
    return few.with_encodings({"pe": Encoded(pe, "node")})


def zinc(impl):
    """A batch of ZINC on the device; one molecule where kernels are interpreted."""
    count = 1 if (impl, DEVICE) == ("triton", "cpu") else 8
    return molecules().batch(torch.arange(count)).to(DEVICE)


def awake(model, seed=0):
    """Weights that reach every part of the equations: logits on both sides of the clamp."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name or name.endswith("bias"):
                p.add_(0.3 * noise)
            elif ".q." in name or ".k." in name:
                p.mul_(3)
    return model.to(DEVICE)


def layer_of(norm, dtype=torch.float32, dim=16, heads=2):
    torch.manual_seed(0)
    layer = awake(GraphTransformerEdgeLayer(dim, heads, norm=norm))
    return layer.to(dtype)


def results(module, inputs, forward, upstream):
    """Outputs and the gradients of inputs and parameters, by name."""
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = forward(module, **inputs)
    torch.autograd.backward(outputs, upstream)
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    found |= {f"d {name}": x.grad for name, x in inputs.items()}
    found |= {f"d {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found


def renamed(found):
    def name_of(key):
        name = key.removeprefix("d ")
        return key if name in ("x", "e", "pe") or "output" in key else f"d {ours(name)}"

    return {name_of(key): x for key, x in found.items()}


def assert_agree(found, eager, oracle):
    """Float32 beside the transcription in float32, or both in float64."""
    assert found.keys() == eager.keys() == oracle.keys()
    for name, x in found.items():
        if x.dtype == torch.float64:
            torch.testing.assert_close(x, oracle[name], rtol=1e-9, atol=1e-11, msg=name)
        else:
            factor = 2.0 if name.startswith("output") else 3.0
            assert_as_accurate(x, eager[name], oracle[name], name, factor)


@pytest.mark.parametrize(("norm", "train"), [("batch", True), ("batch", False), ("layer", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("impl", IMPLS)
def test_layer_is_the_published_one(impl, dtype, norm, train):
    batch = zinc(impl)
    graph = batch.graph
    source, target = graph.edge_index.long()
    layer = layer_of(norm, dtype).train(train)
    if norm == "batch" and not train:
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    generator = torch.Generator().manual_seed(1)
    inputs = {"x": torch.randn(graph.num_rows, 16, generator=generator)}
    inputs["e"] = torch.randn(graph.num_edges, 16, generator=generator)
    inputs = {name: x.to(DEVICE, dtype) for name, x in inputs.items()}
    upstream = [torch.randn(x.shape, generator=generator) for x in inputs.values()]
    published = with_weights_of(PublishedLayer(16, 2, norm).to(DEVICE, dtype), layer).train(train)

    def literal(module, x, e):
        return module(x, e, source, target)

    def run(module, forward, dtype):
        module = copy.deepcopy(module).to(dtype)
        given = {name: x.to(dtype) for name, x in inputs.items()}
        return results(module, given, forward, [x.to(DEVICE, dtype) for x in upstream])

    with implementation(impl):
        found = run(layer, lambda module, x, e: module(x, e, graph), dtype)
    eager = renamed(run(published, literal, dtype))
    oracle = renamed(run(published, literal, torch.float64))
    assert_agree(found, eager, oracle)


def test_logits_of_these_tests_stand_on_both_sides_of_the_clamp():
    batch = zinc("reference")
    layer = layer_of("batch", torch.float64)
    generator = torch.Generator().manual_seed(1)
    x, e = (
        torch.randn(n, 16, generator=generator).to(DEVICE, torch.float64)
        for n in (batch.graph.num_rows, batch.graph.num_edges)
    )
    source, target = batch.graph.edge_index.long()
    q, k, g = (getattr(layer.attention, name)(y) for name, y in (("q", x), ("k", x), ("gate", e)))
    logit = (q[target] * k[source] * g).unflatten(1, (2, 8)).sum(-1) / 8**0.5
    assert 0.02 < (logit.abs() > 5).double().mean() < 0.9


def small(norm="batch", **changes):
    torch.manual_seed(0)
    options = {"dim": 16, "heads": 2, "layers": 3, "pe_dim": 3, "norm": norm} | changes
    return awake(EdgeGraphTransformer(EdgeGraphTransformerConfig(**options)))


@pytest.mark.parametrize(("norm", "train"), [("batch", True), ("batch", False), ("layer", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("impl", [impl for impl in IMPLS if (impl, DEVICE) != ("triton", "cpu")])
def test_model_is_the_published_one(impl, dtype, norm, train):
    batch = zinc(impl)
    graph = batch.graph
    source, target = graph.edge_index.long()
    sizes = graph.graph_ptr.diff().tolist()
    model = small(norm).to(dtype).train(train)
    published = with_weights_of(PublishedNet(model.config).to(DEVICE, dtype), model).train(train)
    upstream = torch.randn(len(sizes), 1, generator=torch.Generator().manual_seed(2))

    def mine(module, pe):
        torch.manual_seed(5)
        return [module(batch.node, batch.edge, graph, pe)]

    def literal(module, pe):
        torch.manual_seed(5)
        pe = flip_signs(pe) if train else pe
        return [module(batch.node, batch.edge, source, target, sizes, pe)]

    def run(module, forward, dtype):
        module = copy.deepcopy(module).to(dtype)
        upstreams = [upstream.to(DEVICE, dtype)]
        return results(module, {"pe": batch.encodings["pe"].to(dtype)}, forward, upstreams), module

    with implementation(impl):
        found, trained = run(model, mine, dtype)
    eager, twin = run(published, literal, dtype)
    oracle, _ = run(published, literal, torch.float64)
    assert_agree(found, renamed(eager), renamed(oracle))
    # what training keeps of the batch; the last layer's edges are not computed
    state = trained.state_dict()
    for name, x in twin.named_buffers():
        if not name.startswith(f"layers.{len(model.layers) - 1}.norm") or name.endswith("_h"):
            torch.testing.assert_close(state[ours(name)], x)


@pytest.mark.parametrize(("pe_dim", "parameters"), [(0, 588_353), (8, 588_929)])
def test_parameter_counts_of_the_paper(pe_dim, parameters):
    model = EdgeGraphTransformer(EdgeGraphTransformerConfig(pe_dim=pe_dim))
    assert sum(p.numel() for p in model.parameters()) == parameters


def random_inputs(graph, seed=0, dtype=torch.float64, dim=16):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, dim, generator=generator, dtype=dtype).to(DEVICE)
        for n in (graph.num_rows, graph.num_edges)
    ]


@pytest.mark.parametrize("impl", IMPLS)
def test_either_output_alone_and_both(impl):
    """The gradient of both is the sum of the gradients of each."""
    graph = random_graph(1, 12, 40, isolated=2, device=DEVICE)
    layer = layer_of("layer", torch.float64)
    upstream = random_inputs(graph, seed=3)
    grads = {}
    with implementation(impl):
        for used in ((0,), (1,), (0, 1)):
            inputs = [x.requires_grad_() for x in random_inputs(graph)]
            outputs = layer(*inputs, graph)
            parameters = list(layer.parameters())
            found = torch.autograd.grad(
                [outputs[i] for i in used],
                inputs + parameters,
                [upstream[i] for i in used],
                materialize_grads=True,
            )
            grads[used] = found
    for nodes, edges, both in zip(grads[0,], grads[1,], grads[0, 1], strict=True):
        torch.testing.assert_close(nodes + edges, both)
    # nodes never see W_oe, edges never see W_v
    names = ["x", "e", *(name for name, _ in layer.named_parameters())]
    assert not grads[0,][names.index("attention.edge_out.weight")].any()
    assert not grads[1,][names.index("attention.v.weight")].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_edges_may_be_left_out(impl):
    graph = random_graph(1, 12, 40, isolated=2, device=DEVICE)
    layer = layer_of("layer")
    x, e = random_inputs(graph, dtype=torch.float32)
    with implementation(impl):
        nodes, edges = layer(x, e, graph, edge_output=False)
        assert edges is e
        torch.testing.assert_close(nodes, layer(x, e, graph)[0])
        assert layer.attention(x, e, graph, edge_output=False)[1] is None


@pytest.mark.parametrize("impl", IMPLS)
def test_edge_order_and_node_order_change_nothing(impl):
    graph = random_graph(5, 14, 50, isolated=2, device=DEVICE)
    layer = layer_of("batch", torch.float64)
    x, e = random_inputs(graph)
    nodes, edges = torch.randperm(14, device=DEVICE), torch.randperm(50, device=DEVICE)
    again = Graph.from_edge_index(graph.edge_index[:, edges], 14)
    with implementation(impl):
        h, f = layer(x, e, graph)
        for found, expected in zip(layer(x, e[edges], again), (h, f[edges]), strict=True):
            torch.testing.assert_close(found, expected)
        moved = layer(x[nodes], e, graph.reordered(nodes))
    for found, expected in zip(moved, (h[nodes], f), strict=True):
        torch.testing.assert_close(found, expected)


def test_batch_equals_single_graphs():
    sizes = [(5, 12), (0, 0), (8, 30), (1, 0), (0, 0)]
    graph = random_batch(3, sizes, device=DEVICE)
    model = small().eval()
    types, bonds = torch.arange(14, device=DEVICE), torch.arange(42, device=DEVICE) % 4
    pe = random_inputs(graph, dim=3, dtype=torch.float32)[0]
    whole = model(types, bonds, graph, pe)
    assert whole.isfinite().all()
    torch.testing.assert_close(whole[[1, 4]], model.readout(whole.new_zeros(2, 16)))
    target = graph.edge_index[1]
    for g, (first, last) in enumerate(pairwise(graph.graph_ptr.tolist())):
        mine = (target >= first) & (target < last)
        edge_index = graph.edge_index[:, mine] - first
        one = Graph.from_edge_index(edge_index, last - first)
        found = model(types[first:last], bonds[mine], one, pe[first:last])
        torch.testing.assert_close(found[0], whole[g])


def test_a_graph_full_of_nan_changes_no_other():
    graph = random_batch(3, [(5, 12), (6, 20)], device=DEVICE)
    model = small("layer").eval()
    types, bonds = torch.arange(11, device=DEVICE), torch.arange(32, device=DEVICE) % 4
    pe = random_inputs(graph, dim=3, dtype=torch.float32)[0]
    expected = model(types, bonds, graph, pe)[0]
    pe[5:] = float("nan")
    found = model(types, bonds, graph, pe)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("edges", [torch.tensor([[0, 1], [1, 0]]), torch.zeros(2, 0).long()])
def test_isolated_nodes_stay_finite_in_training(impl, edges):
    model = small()
    edges = edges.to(DEVICE)
    graph = Graph.from_edge_index(edges, 5)
    pe = random_inputs(graph, dim=3, dtype=torch.float32)[0]
    with implementation(impl):
        out = model(torch.arange(5, device=DEVICE), 0 * edges[0], graph, pe)
        out.sum().backward()
    assert out.isfinite().all()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    assert all("layers.2." in name and "edge_" in name for name in unused)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_isolated_node_gets_only_biases_and_its_own_features():
    graph = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]], device=DEVICE), 3)
    layer = layer_of("layer", torch.float64)
    x, e = random_inputs(graph)
    h = layer.norm1(x[2] + layer.attention.out.bias)
    torch.testing.assert_close(layer(x, e, graph)[0][2], layer.norm2(h + layer.ffn(h)))


def test_same_bits_every_time():
    batch, model = zinc("cpp"), small()
    found = []
    for _ in range(3):
        again = copy.deepcopy(model)
        torch.manual_seed(0)
        out = again(batch.node, batch.edge, batch.graph, batch.encodings["pe"])
        out.sum().backward()
        found.append([out, *(p.grad for p in again.parameters() if p.grad is not None)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_encodings_flip_signs_only_in_training():
    model, batch = small("layer"), zinc("cpp")
    inputs = batch.node, batch.edge, batch.graph, batch.encodings["pe"]
    assert 2 <= len({model(*inputs).sum().item() for _ in range(20)}) <= 8
    model.eval()
    assert len({model(*inputs).sum().item() for _ in range(3)}) == 1


def test_without_dropout_training_equals_evaluation():
    graph = random_graph(1, 12, 40, device=DEVICE)
    layer, (x, e) = layer_of("layer"), random_inputs(graph, dtype=torch.float32)
    trained = layer.train()(x, e, graph)
    for a, b in zip(trained, layer.eval()(x, e, graph), strict=True):
        assert torch.equal(a, b)


def test_dropout_stands_where_the_paper_has_it():
    """On the embedded nodes, before W_o and W_oe, and between relu and W_2: nowhere else."""
    model = small(in_dropout=0.3, dropout=0.6, layers=2, pe_dim=0)
    graph = random_graph(0, 40, 200, device=DEVICE)
    types, bonds = torch.arange(40, device=DEVICE) % 28, torch.arange(200, device=DEVICE) % 4
    dropped = {}

    def watch(name, i):
        def hook(module, args):
            dropped[name] = (args[i] == 0).double().mean().item()

        return hook

    first = model.layers[0]
    for name, module, i in (
        ("x", first, 0),
        ("e", first, 1),
        ("out", first.attention.out, 0),
        ("edge_out", first.attention.edge_out, 0),
        ("ffn", first.ffn[-1], 0),
        ("edge_ffn", first.edge_ffn[-1], 0),
        ("next x", model.layers[1], 0),
        ("next e", model.layers[1], 1),
    ):
        module.register_forward_pre_hook(watch(name, i))
    with torch.no_grad():
        model(types, bonds, graph)
        assert 0.2 < dropped["x"] < 0.4
        for name in ("out", "edge_out"):
            assert 0.5 < dropped[name] < 0.7
        for name in ("ffn", "edge_ffn"):
            assert 0.65 < dropped[name] < 0.95  # some of them by the relu
        assert dropped["e"] == dropped["next x"] == dropped["next e"] == 0
        model.eval()(types, bonds, graph)
        assert dropped["x"] == dropped["out"] == dropped["edge_out"] == 0


LONG = torch.long


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"node_type": torch.zeros(5, dtype=LONG)}, r"node_type .*\[N\] = \[4\].* got \[5\]"),
        ({"edge_type": torch.zeros(4, dtype=LONG)}, r"edge_type .*\[E\] = \[6\].* got \[4\]"),
        ({"edge_type": torch.zeros(6, 1, dtype=LONG)}, r"edge_type .* got \[6, 1\]"),
        ({"pe": None}, r"pe must be \[N, pe_dim\] = \[4, 3\], got None"),
        ({"pe": torch.zeros(4, 2)}, r"pe .* \[4, 3\], got \[4, 2\]"),
    ],
)
def test_inputs_of_other_shapes_are_refused(changes, message):
    inputs = {
        "node_type": torch.zeros(4, dtype=LONG),
        "edge_type": torch.zeros(6, dtype=LONG),
        "graph": random_graph(0, 4, 6),
        "pe": torch.zeros(4, 3),
    }
    with pytest.raises(ValueError, match=message):
        small()(**inputs | changes)


def test_unwanted_encodings_are_refused():
    types, bonds = torch.zeros(4, dtype=LONG), torch.zeros(6, dtype=LONG)
    with pytest.raises(ValueError, match=r"pe must be None \(pe_dim is 0\), got \[4, 3\]"):
        small(pe_dim=0)(types, bonds, random_graph(0, 4, 6), torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("x", "e", "message"),
    [
        (torch.zeros(5, 16), torch.zeros(6, 8), r"x must be \[N, dim\] = \[4, 16\], got \[5, 16\]"),
        (torch.zeros(4, 8), torch.zeros(6, 8), r"x must be .* = \[4, 16\], got \[4, 8\]"),
        (torch.zeros(4, 16), torch.zeros(6, 16), r"e .*\[E, edge_dim\] = \[6, 8\], got \[6, 16\]"),
        (torch.zeros(4, 16), torch.zeros(4, 8), r"e must be .* = \[6, 8\], got \[4, 8\]"),
    ],
)
def test_attention_refuses_other_shapes(x, e, message):
    attention = EdgeGatedAttention(16, 2, edge_dim=8)
    with pytest.raises(ValueError, match=message):
        attention(x, e, random_graph(0, 4, 6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edge_types": 0}, "edge_types must be positive, got 0"),
        ({"layers": 0}, "layers must be positive, got 0"),
        ({"pe_dim": -1}, "pe_dim must not be negative, got -1"),
        ({"dim": 10, "heads": 3}, "dim=10 and heads=3"),
        ({"norm": "group"}, "norm must be 'batch' or 'layer', got 'group'"),
    ],
)
def test_configurations_that_make_no_model(changes, message):
    with pytest.raises(ValueError, match=message):
        EdgeGraphTransformer(EdgeGraphTransformerConfig(**changes))


def test_attention_refuses_an_unknown_implementation():
    with pytest.raises(ValueError, match=r"impl must be one of .* got 'cuda'"):
        EdgeGatedAttention(16, 2, impl="cuda")


def test_attention_hands_its_options_on():
    graph = random_graph(0, 6, 20)
    torch.manual_seed(0)
    options = {"logit_clamp": (-0.5, 1.0), "denominator_eps": 2.0, "edge_dim": 5}
    attention = EdgeGatedAttention(16, 4, bias=True, **options, impl="reference").double()
    x, e = torch.randn(6, 16).double(), torch.randn(20, 5).double()
    q, k, v, g = (
        f(y).unflatten(1, (4, 4))
        for f, y in ((attention.q, x), (attention.k, x), (attention.v, x), (attention.gate, e))
    )
    source, target = graph.edge_index.long()
    t = q[target] * k[source] * g / 2
    w = t.sum(-1, keepdim=True).clamp(-0.5, 1.0).exp()
    total = torch.zeros(6, 4, 1).double().index_add(0, target, w)
    out = torch.zeros(6, 4, 4).double().index_add(0, target, w * v[source]) / (total + 2.0)
    found = attention(x, e, graph)
    torch.testing.assert_close(found[0], attention.out(out.flatten(1)))
    torch.testing.assert_close(found[1], attention.edge_out(t.flatten(1)))


def test_state_dict_round_trip():
    model, again = small().eval(), small().eval()
    for p in again.parameters():
        nn.init.normal_(p)
    again.load_state_dict(model.state_dict())
    batch = zinc("cpp")
    inputs = batch.node, batch.edge, batch.graph, batch.encodings["pe"]
    torch.testing.assert_close(again(*inputs), model(*inputs))

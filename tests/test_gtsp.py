"""GTSP: what is taken away equals what is masked, and is not computed."""

import copy
from itertools import pairwise

import pytest
import torch
from attention_cases import DEVICE
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastgt import Graph, prune_heads
from fastgt.encodings import shortest_paths
from fastgt.models import GTSP, GTSPConfig, Sparsification
from fastgt.models.graph_gps_layer import GlobalAttention
from fastgt.models.gtsp_attention import SparseAttention
from fastgt.nn import HeadGate
from fastgt.testing import random_batch

FP64 = torch.float64
DIM, HEADS = 8, 2
SIZES = [(5, 8), (0, 0), (7, 12), (1, 1), (4, 0)]
SMALL = {"node_features": 3, "dim": DIM, "heads": HEADS, "layers": 2, "walk_steps": 4}
SMALL |= {"path_distance": 4, "degrees": 24, "attention_dropout": 0.0, "out_dim": 3}
pytestmark = pytest.mark.usefixtures("one_thread")


def batch(sizes=SIZES):
    return random_batch(3, sizes, device=DEVICE)


def model_of(base="gps", dtype=FP64, **changes):
    torch.manual_seed(0)
    model = GTSP(GTSPConfig(base=base, **SMALL | changes)).to(DEVICE, dtype)
    for p in model.parameters():
        p.data += torch.randn_like(p) * 0.2
    return model


def inputs(model, graph, dtype=FP64):
    generator, c = torch.Generator().manual_seed(1), model.config

    def draw(columns):
        return torch.randn(graph.num_rows, columns, generator=generator).to(DEVICE, dtype)

    given = {"node": draw(c.node_features)}
    if c.base == "gps":
        return given | {"walk_pe": draw(c.walk_steps)}
    edges = torch.zeros(graph.num_edges, dtype=torch.long, device=DEVICE)
    return given | {"pair_distance": shortest_paths(graph, edges, c.path_distance)[0]}


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def dense(m, x, offsets, bias=None, noise=None, scale=None):
    """Attention over all nodes, with masks: of keys, of what comes out, and of whole graphs.

    bias: [n, n, H] of each graph. noise: [N], of every node's score. scale: [G].
    """
    outs = [x[:0]]
    for g, (first, last) in enumerate(pairwise(offsets)):
        part, n = x[first:last], last - first
        gate = torch.ones(n, dtype=x.dtype, device=x.device)
        fixed = int(m.virtual and n > 0)
        if m.tokens is not None and n > fixed:
            s = linear(m.tokens.score, part[fixed:]).squeeze(1)
            s = s if noise is None else s + noise[first + fixed : last]
            soft, count = s.softmax(0), -int(-(len(s) * m.tokens.keep) // 1)
            hard = torch.zeros_like(soft)
            hard[sorted(range(len(s)), key=lambda i: -s[i].item())[:count]] = 1
            gate = torch.cat([gate[:fixed], hard + soft - soft.detach()])
        there = gate.detach() > 0.5
        given = part * gate[:, None]
        q, k, v = (linear(f, given).view(n, m.heads, m.head_dim) for f in (m.q, m.k, m.v))
        logits = torch.einsum("ihd,jhd->ijh", q, k) / m.head_dim**0.5
        logits = logits if bias is None else logits + bias[g]
        weight = logits.masked_fill(~there[None, :, None], -torch.inf).softmax(1)
        y = linear(m.out, torch.einsum("ijh,jhd->ihd", weight, v).flatten(1))
        y = torch.where(there[:, None], y, 0)
        outs.append(y if scale is None else y * scale[g])
    return torch.cat(outs)


def compare(found, wanted, named):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)
    upstream = torch.randn_like(wanted)
    grads = (
        torch.autograd.grad(
            y, list(named.values()), upstream, allow_unused=True, materialize_grads=True
        )
        for y in (found, wanted)
    )
    for key, a, b in zip(named, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("kind", ["none", "keys", "pairs"])
@pytest.mark.parametrize("virtual", [False, True])
@pytest.mark.parametrize(
    ("prune_tokens", "drop_path", "train"),
    [(0.5, 0, False), (0.3, 0, True), (0, 0.5, True), (0.5, 0.5, True), (0.5, 0.5, False)],
)
def test_attention_of_the_kept_equals_the_masked(prune_tokens, drop_path, train, virtual, kind):
    torch.manual_seed(0)
    attention = SparseAttention(
        DIM, HEADS, prune_tokens=prune_tokens, drop_path=drop_path, virtual=virtual
    )
    attention = attention.to(DEVICE, FP64).train(train)
    offsets = batch().graph_ptr
    bounds = offsets.tolist()
    n = bounds[-1]
    x = torch.randn(n, DIM, dtype=FP64, device=DEVICE, requires_grad=True)
    named, bias, of_graphs = dict(attention.named_parameters()) | {"x": x}, None, None
    if kind != "none":
        rows = n if kind == "keys" else sum((b - a) ** 2 for a, b in pairwise(bounds))
        bias = torch.randn(rows, HEADS, dtype=FP64, device=DEVICE, requires_grad=True)
        named["bias"], of_graphs, pair = bias, [], 0
        for a, b in pairwise(bounds):
            size = b - a
            if kind == "keys":
                of_graphs.append(bias[a:b].expand(size, size, HEADS))
            else:
                of_graphs.append(bias[pair : pair + size**2].view(size, size, HEADS))
                pair += size**2
    # the draws of training, in their order: graphs, then nodes of those that are there
    scale = noise = None
    torch.manual_seed(4)
    if train:
        graphs = len(bounds) - 1
        there = torch.ones(graphs, dtype=torch.bool, device=DEVICE)
        if drop_path:
            drawn = torch.ones(graphs, dtype=FP64, device=DEVICE).bernoulli_(1 - drop_path)
            scale, there = drawn / (1 - drop_path), drawn > 0
            assert 0 < int(drawn.sum()) < graphs
        if prune_tokens:
            owner = torch.arange(graphs, device=DEVICE).repeat_interleave(offsets.diff())
            scored = there[owner]
            if virtual:
                scored[offsets[:-1][offsets.diff() > 0]] = False
            noise = torch.zeros(n, dtype=FP64, device=DEVICE)
            noise[scored] = -(-torch.rand(int(scored.sum()), dtype=FP64, device=DEVICE).log()).log()
    torch.manual_seed(4)
    found = attention(x, offsets, bias=bias)
    compare(found, dense(attention, x, bounds, of_graphs, noise, scale), named)


def gps(model, node, graph, walk_pe):
    """The model's equations, with masks."""
    m = model.model
    x = linear(m.embed.lin, node) + linear(m.embed_walk, walk_pe)
    source, target = graph.edge_index
    bounds = graph.graph_ptr.tolist()

    def norm(layer, y):
        mean, variance = layer.running_mean, layer.running_var
        if layer.training:
            mean, variance = y.mean(0), y.var(0, unbiased=False)
        return (y - mean) / (variance + layer.eps).sqrt() * layer.weight + layer.bias

    for layer in m.layers:
        received = x + torch.zeros_like(x).index_add(0, target, x[source])
        mlp = layer.local.mlp
        h = norm(layer.local_norm, x + linear(mlp[2], linear(mlp[0], received).clamp(min=0)))
        h = h + norm(layer.attention_norm, x + dense(layer.attention, x, bounds))
        x = norm(layer.norm, h + linear(layer.ffn[3], linear(layer.ffn[0], h).clamp(min=0)))
    sums = [x[first:last].sum(0) for first, last in pairwise(bounds)]
    return linear(m.readout, torch.stack(sums))


@pytest.mark.parametrize(
    ("prune", "train"), [({}, False), ({}, True), ({"tokens": 0.5, "layers": 0.5}, False)]
)
def test_gps_is_its_equations(prune, train):
    model, graph = model_of(prune=prune).train(train), batch()
    given = inputs(model, graph)
    given["node"].requires_grad_()
    named = dict(model.named_parameters()) | {"node": given["node"]}
    compare(model(graph=graph, **given), gps(model, graph=graph, **given), named)


def test_graphormer_keeps_its_virtual_node():
    model, graph = model_of("graphormer", prune={"tokens": 0.9}).eval(), batch()
    given = inputs(model, graph)
    seen, offsets = [], []

    def attended(module, arguments, out):
        seen.append((out != 0).any(1))
        offsets.append(arguments[1])

    for layer in model.model.layers:
        layer.attention.register_forward_hook(attended)
    assert model(graph=graph, **given).isfinite().all()
    for there, bounds in zip(seen, offsets, strict=True):
        assert there[bounds[:-1]].all()
        # of n nodes ceil(n / 10), and the virtual one
        counts = [int(there[a:b].sum()) for a, b in pairwise(bounds.tolist())]
        assert counts == [1 + (n > 0) for n, _ in SIZES]


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_what_is_taken_away_is_not_computed():
    x, offsets = torch.randn(64, 16, device=DEVICE), torch.arange(0, 65, 8, device=DEVICE)

    def of(**options):
        torch.manual_seed(0)
        attention = SparseAttention(16, 4, **options).to(DEVICE)
        with torch.no_grad():
            return flops(lambda: attention(x, offsets))

    whole = flops(lambda: GlobalAttention(16, 4).to(DEVICE)(x, offsets))
    assert of() == whole
    projections = 4 * 2 * 64 * 16 * 16
    masked = HeadGate(torch.tensor([True, False, True, False]))
    # the counter's hooks have the projections called for all heads
    assert of(head_gate=masked) == projections + (whole - projections) / 2
    scores = 2 * 64 * 16
    assert of(prune_tokens=0.5) == scores + projections / 2 + (whole - projections) / 4
    torch.manual_seed(0)
    SparseAttention(16, 4)
    kept = int(torch.ones(8, device=DEVICE).bernoulli_(0.5).sum())
    assert 0 < kept < 8
    assert of(drop_path=0.5) == whole * kept / 8


def test_every_parameter_gets_a_gradient_where_all_graphs_are_left_out():
    torch.manual_seed(0)
    x, offsets = torch.randn(4, 16, device=DEVICE), torch.tensor([0, 4], device=DEVICE)
    attention = SparseAttention(16, 4, prune_tokens=0.5, drop_path=0.9).to(DEVICE)
    y = attention(x, offsets, bias=torch.zeros(16, 4, device=DEVICE))
    assert not y.any()
    y.sum().backward()
    for name, p in attention.named_parameters():
        assert p.grad is not None, name
        assert not p.grad.any(), name


def test_masked_heads_are_not_read():
    masked = HeadGate(torch.tensor([True, False, True, False]))
    attention = SparseAttention(16, 4, head_gate=masked, prune_tokens=0.5).to(DEVICE)
    x, offsets = torch.randn(9, 16, device=DEVICE), torch.tensor([0, 4, 9], device=DEVICE)
    wanted = attention.eval()(x, offsets)
    with torch.no_grad():
        for layer in (attention.q, attention.k, attention.v):
            layer.weight.view(4, 4, 16)[[1, 3]] = torch.nan
            layer.bias.view(4, 4)[[1, 3]] = torch.nan
        attention.out.weight.view(16, 4, 4)[:, [1, 3]] = torch.nan
    assert torch.equal(attention(x, offsets), wanted)


@pytest.mark.parametrize("base", ["gps", "graphormer"])
def test_masked_heads_equal_zeros_and_their_gates_get_gradients(base):
    model, graph = model_of(base, prune={"heads": 0.5}), batch()
    given = inputs(model, graph)
    masks = [torch.tensor([0, 1]), torch.tensor([1, 0])]
    plain = model_of(base)
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.endswith("head_gate.mask")}
    )
    gates = []
    for layer, other, mask in zip(model.model.layers, plain.model.layers, masks, strict=True):
        layer.attention.head_gate.mask.copy_(mask)
        layer.attention.head_gate.score(True)
        gate = mask.to(DEVICE, FP64).requires_grad_()
        # the gate as a factor of what goes into the last projection
        other.attention.out.register_forward_pre_hook(
            lambda _, x, g=gate: (x[0] * g.repeat_interleave(DIM // HEADS),)
        )
        gates.append(gate)
    found, wanted = model(graph=graph, **given), plain(graph=graph, **given)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(wanted)
    found.backward(upstream)
    wanted.backward(upstream)
    for layer, gate in zip(model.model.layers, gates, strict=True):
        taken = layer.attention.head_gate.take_gradient().to(FP64)
        assert gate.grad.abs().min() > 1e-6
        torch.testing.assert_close(taken, gate.grad, rtol=1e-5, atol=1e-6)
        layer.attention.head_gate.score(False)
    named = dict(plain.named_parameters())
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, named[key].grad, rtol=1e-9, atol=1e-10)


PRUNINGS = [{}, *({name: 0.5} for name in ("tokens", "heads", "layers", "weights"))]
ALL = dict.fromkeys(("tokens", "heads", "weights"), 0.5)


def training(model, graph, given, steps, every=10):
    """-> losses, and what was taken away."""
    wanted = torch.arange(graph.num_graphs, device=DEVICE) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    chosen = {"heads", "weights"} & set(model.config.prune)
    sparsification = Sparsification(model, steps=steps, every=every, scored=2) if chosen else None
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(graph=graph, **given), wanted)
        loss.backward()
        optimizer.step()
        if sparsification is not None:
            sparsification.step()
        losses.append(loss.item())
    return losses, sparsification


@pytest.mark.parametrize("base", ["gps", "graphormer"])
@pytest.mark.parametrize("prune", PRUNINGS, ids=lambda p: next(iter(p), "nothing"))
def test_a_batch_is_learnt_by_heart(base, prune):
    torch.manual_seed(0)
    graph = batch([(6, 14), (5, 12), (7, 20), (4, 8), (9, 20), (6, 9)])
    model = GTSP(GTSPConfig(base=base, **SMALL | {"prune": prune, "dim": 16})).to(DEVICE)
    losses, _ = training(model, graph, inputs(model, graph, torch.float32), 120)
    last = sum(losses[-10:]) / 10
    assert last < 0.35 * losses[0], (losses[0], last)


@pytest.mark.parametrize("base", ["gps", "graphormer"])
def test_the_trained_model_without_what_was_taken_away(base):
    torch.manual_seed(0)
    graph = batch([(6, 14), (5, 12), (7, 20)])
    model = GTSP(GTSPConfig(base=base, **SMALL | {"prune": ALL, "heads": 4})).to(DEVICE, FP64)
    given = inputs(model, graph)
    _, sparsification = training(model, graph, given, 20, every=4)
    model.eval()
    wanted = model(graph=graph, **given)
    heads = [layer.attention.head_gate.mask.sum().item() for layer in model.model.layers]
    size = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert heads == [2, 2]
    assert sparsification.weights.pruned() == round(size / 2)
    smaller = sparsification.finish().eval()
    torch.testing.assert_close(smaller(graph=graph, **given), wanted)
    for layer in smaller.model.layers:
        assert (layer.attention.heads, layer.attention.q.out_features) == (2, DIM // 2)
        assert layer.attention.head_gate is None
        assert layer.attention.tokens.keep == 0.5
    again = prune_heads(model, state_dict=smaller.state_dict()).eval()
    torch.testing.assert_close(again(graph=graph, **given), wanted)
    linears = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    assert sum(int((w == 0).sum()) for w in linears) == round(size / 2)


def test_training_goes_on_from_a_checkpoint():
    graph = batch([(6, 14), (5, 12), (7, 20)])
    config = GTSPConfig(**SMALL | {"prune": {"heads": 0.5, "weights": 0.5}, "heads": 4})
    found = []
    for stop in (None, 7):
        torch.manual_seed(0)
        model = GTSP(config).to(DEVICE)
        given = inputs(model, graph, torch.float32)
        part = Sparsification(model, steps=16, every=4, scored=2)
        for step in range(16):
            if step == stop:
                state = copy.deepcopy([model.state_dict(), part.state_dict()])
                model = GTSP(config).to(DEVICE)
                part = Sparsification(model, steps=16, every=4, scored=2)
                model.load_state_dict(state[0])
                part.load_state_dict(state[1])
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            model(graph=graph, **given).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            part.step()
        found.append(model.state_dict())
    assert found[0].keys() == found[1].keys()
    for key, x in found[0].items():
        assert torch.equal(x, found[1][key]), key


@pytest.mark.parametrize(("name", "features"), [("nci1", 37), ("imdb_binary", 136), ("dd", 89)])
def test_parameter_counts(name, features):
    """Layer by layer as the authors' code makes them; they state no count."""
    d = 64
    attention, gin = 4 * (d * d + d), 2 * (d * d + d)
    mlp, norms = d * 2 * d + 2 * d + 2 * d * d + d, 3 * 2 * d
    ends = features * d + d + 20 * d + d + 2 * d + 2
    config = GTSPConfig.published(name)
    model = GTSP(config)
    # without the embedding of 4 kinds of edges that nothing uses there
    assert sum(p.numel() for p in model.parameters()) == 4 * (attention + gin + mlp + norms) + ends
    with_tokens = GTSP(GTSPConfig(**vars(config) | {"prune": {"tokens": 0.5}}))
    extra = sum(p.numel() for n, p in with_tokens.named_parameters() if ".tokens." in n)
    assert extra == 4 * (d + 1)
    assert (config.dim, config.heads, config.layers, config.attention_dropout) == (64, 4, 4, 0.5)


def test_wrong_settings_are_named():
    for changes, message in (
        ({"base": "gt"}, "base must be 'gps' or 'graphormer', got 'gt'"),
        ({"prune": {"nodes": 0.5}}, r"prune must name some of \['tokens', .* got 'nodes'"),
        ({"prune": {"heads": 1.0}}, r"prune\['heads'\] must be from 0 to below 1, got 1.0"),
        ({"heads": 3}, "heads must divide dim, got dim=8 and heads=3"),
        ({"layers": 0}, "layers must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            GTSP(GTSPConfig(**SMALL | changes))
    with pytest.raises(ValueError, match=r"name must be one of \['nci1', .* got 'mutag'"):
        GTSPConfig.published("mutag")
    with pytest.raises(ValueError, match=r"neither 'heads' nor 'weights', got {'tokens': 0.5}"):
        Sparsification(model_of(prune={"tokens": 0.5}), steps=9)
    with pytest.raises(TypeError, match="model must be a GTSP, got Linear"):
        Sparsification(nn.Linear(2, 2), steps=9)
    with pytest.raises(ValueError, match=r"active=.* leaves .* none of its 2 heads"):
        Sparsification(model_of(prune={"heads": 0.9}), steps=9, every=3, scored=1)


@pytest.mark.parametrize(
    ("base", "changes", "error", "message"),
    [
        ("gps", {"node": torch.zeros(17, 4)}, ValueError, r"node must be .* = \[17, 3\], got"),
        ("gps", {"walk_pe": None}, TypeError, "walk_pe must be a tensor, got NoneType"),
        ("gps", {"walk_pe": torch.zeros(17, 3)}, ValueError, r"walk_pe .* = \[17, 4\], got"),
        (
            "gps",
            {"pair_distance": torch.zeros(9)},
            ValueError,
            r"pair_distance must be None \(base",
        ),
        ("graphormer", {"walk_pe": torch.zeros(17, 4)}, ValueError, "walk_pe must be None"),
        ("graphormer", {"pair_distance": None}, TypeError, "pair_distance must be a tensor"),
        ("gps", {"graph": torch.zeros(2, 3, dtype=int)}, TypeError, "graph must be a"),
        (
            "graphormer",
            {"graph": torch.zeros(2, 3, dtype=int)},
            TypeError,
            "graph must be a fastgt",
        ),
    ],
)
def test_wrong_inputs_are_named(base, changes, error, message):
    model, graph = model_of(base, torch.float32), batch()
    given = {"graph": graph} | inputs(model, graph, torch.float32)
    with pytest.raises(error, match=message):
        model(**given | changes)


def test_attention_refuses_what_does_not_fit():
    attention = SparseAttention(DIM, HEADS, prune_tokens=0.5)
    with pytest.raises(ValueError, match=r"x must be \[N, 8\], got \[5, 7\]"):
        attention(torch.zeros(5, 7))
    with pytest.raises(ValueError, match="offsets"):
        attention(torch.zeros(5, DIM), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"bias must have N = 5 rows, .* or 25, of pairs, got 9"):
        attention(torch.zeros(5, DIM), bias=torch.zeros(9, HEADS))
    assert attention(torch.zeros(5, DIM)).shape == (5, DIM)  # one graph


@pytest.mark.parametrize("base", ["gps", "graphormer"])
def test_graphs_without_edges_and_of_one_node(base):
    model = model_of(base, torch.float32, prune={"tokens": 0.5}).eval()
    for n in (1, 3):
        graph = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.long), n).to(DEVICE)
        assert model(graph=graph, **inputs(model, graph, torch.float32)).isfinite().all()
    one = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.long), 1).to(DEVICE)
    if base == "gps":
        with pytest.raises(ValueError, match="norm of GraphGPSLayer is a batch norm in training"):
            model.train()(graph=one, **inputs(model, one, torch.float32))

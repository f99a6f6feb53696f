"""The encoder of scene graphs against its equations, written out in plain PyTorch."""

import pytest
import torch
from attention_cases import DEVICE
from torch.nn import functional as F

from fastgt import Graph, implementation
from fastgt.models import SceneGraphConfig, SceneGraphEncoder
from fastgt.testing import random_batch

FP64 = torch.float64
SMALL = {"objects": 6, "predicates": 4, "dim": 12, "heads": 3, "layers": 3, "pe_dim": 2}
SMALL |= {"dropout": 0.0}


def batch():
    """Scenes with an object that nothing is said of, self loops and duplicate edges."""
    graph = random_batch(3, [(5, 12), (0, 0), (7, 20), (1, 1)], device=DEVICE)
    extra = torch.tensor([[0, 1, 1, 6], [0, 2, 2, 6]], device=DEVICE)
    edges = torch.cat([graph.edge_index, extra], 1)
    return Graph.from_edge_index(edges[:, edges[1] != 3], graph_ptr=graph.graph_ptr)


def model_of(dtype=FP64, **changes):
    torch.manual_seed(0)
    model = SceneGraphEncoder(SceneGraphConfig(**SMALL | changes)).to(DEVICE, dtype)
    for p in model.parameters():  # no two alike, those of norms neither
        p.data += torch.randn_like(p) * 0.2
    return model


def inputs(model, graph, dtype=FP64):
    generator = torch.Generator().manual_seed(1)
    c = model.config
    return {
        "node": torch.randint(c.objects, (graph.num_rows,), generator=generator).to(DEVICE),
        "edge": torch.randint(c.predicates, (graph.num_edges,), generator=generator).to(DEVICE),
        "pe": torch.randn(graph.num_rows, c.pe_dim, generator=generator).to(DEVICE, dtype),
    }


def linear(layer, x):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def batch_norm(layer, x):
    mean, variance = layer.running_mean, layer.running_var
    if layer.training:
        mean, variance = x.mean(0), x.var(0, unbiased=False)
    return (x - mean) / (variance + layer.eps).sqrt() * layer.weight + layer.bias


def ffn(layers, x):
    return linear(layers[3], linear(layers[0], x).clamp(min=0))


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def literal(model, node, edge, graph, pe):
    c, (source, target) = model.config, graph.edge_index.tolist()
    heads, width = c.heads, c.dim // c.heads
    x = model.embed.weight[node] + linear(model.embed_pe, pe)
    e = model.embed_edge.weight[edge]
    for i, layer in enumerate(model.layers, 1):
        m = layer.attention
        q, k, v = (linear(f, x).view(-1, heads, width) for f in (m.q, m.k, m.v))
        gate = linear(m.gate, e).view(-1, heads, width)
        total = [0 * q[0] for _ in node]
        weight = [0 * q[0, :, :1] for _ in node]
        scores = []
        for at, (j, to) in enumerate(zip(source, target, strict=True)):
            t = k[j] * q[to] / width**0.5 * gate[at]
            w = torch.exp(t.sum(-1, keepdim=True).clamp(-5, 5))
            total[to], weight[to] = total[to] + w * v[j], weight[to] + w
            scores.append(t)
        attended = torch.stack(total) / (torch.stack(weight) + 1e-6)
        x = batch_norm(layer.norm1, x + linear(m.out, attended.flatten(1)))
        x = batch_norm(layer.norm2, x + ffn(layer.ffn, x))
        if i < c.layers:
            e = batch_norm(layer.edge_norm1, e + linear(m.edge_out, torch.stack(scores).flatten(1)))
            e = batch_norm(layer.edge_norm2, e + ffn(layer.edge_ffn, e))
    box = linear(model.box[4], gelu(linear(model.box[2], gelu(linear(model.box[0], x)))))
    logits = linear(model.classes[2], gelu(linear(model.classes[0], x)))
    return box / (1 + torch.exp(-box)), logits


@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize("train", [False, True])
def test_the_model_is_its_equations(train, impl):
    model, graph = model_of(last_edges=False).train(train), batch()
    given = inputs(model, graph)
    given["pe"].requires_grad_()
    with implementation(impl):
        found = model(graph=graph, **given)
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=FP64, device=DEVICE)
    fits = [literal(model, given["node"], given["edge"], graph, given["pe"] * s) for s in signs]
    # in training signs are drawn: one of the four ways to do so
    at = 0
    if train:
        at = min(range(4), key=lambda i: (fits[i][1] - found[1]).abs().max().item())
    wanted = fits[at]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    named = dict(model.named_parameters()) | {"pe": given["pe"]}
    upstream = [torch.randn_like(y) for y in wanted]
    grads = (torch.autograd.grad(y, list(named.values()), upstream) for y in (found, wanted))
    for key, a, b in zip(named, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, k=key: k + m)


def test_signs_are_flipped_only_in_training():
    model, graph = model_of(torch.float32, norm="layer"), batch()
    given = inputs(model, graph, torch.float32)
    assert 2 <= len({model(graph=graph, **given)[1].sum().item() for _ in range(20)}) <= 4
    model.eval()
    assert len({model(graph=graph, **given)[1].sum().item() for _ in range(3)}) == 1


@pytest.mark.parametrize("name", ["coco", "vg"])
def test_parameter_counts(name):
    """Layer by layer as the authors' code makes them; they state no count."""
    c = SceneGraphConfig.published(name)
    d, objects = 768, {"coco": 184, "vg": 179}[name]

    def lin(a, b, bias=True):
        return a * b + b * bias

    norms = 4 * 2 * d
    layer = 4 * lin(d, d, False) + 2 * lin(d, d) + 2 * (lin(d, 2 * d) + lin(2 * d, d)) + norms
    embeddings = d * (objects + {"coco": 7, "vg": 46}[name]) + lin({"coco": 32, "vg": 8}[name], d)
    box = lin(d, d // 2) + lin(d // 2, d // 4) + lin(d // 4, 4)
    classes = lin(d, d // 2) + lin(d // 2, objects)
    with torch.device("meta"):
        model = SceneGraphEncoder(c)
    count = sum(p.numel() for p in model.parameters())
    assert count == 12 * layer + embeddings + box + classes
    assert count == {"coco": 100_146_044, "vg": 100_151_799}[name]


def test_published_settings():
    coco, vg = (SceneGraphConfig.published(n) for n in ("coco", "vg"))
    assert (coco.layers, coco.heads, coco.dim, coco.pe_dim, coco.norm) == (12, 12, 768, 32, "batch")
    assert (vg.objects, vg.predicates, vg.pe_dim) == (179, 46, 8)
    coco.layers = 1
    assert SceneGraphConfig.published("coco").layers == 12
    with pytest.raises(ValueError, match=r"name must be one of \['coco', 'vg'\], got 'clevr'"):
        SceneGraphConfig.published("clevr")


def test_a_batch_is_learnt_by_heart():
    model = SceneGraphEncoder(SceneGraphConfig(**SMALL | {"layers": 2, "dim": 24})).to(DEVICE)
    graph = random_batch(5, [(6, 14), (5, 12), (4, 8)], device=DEVICE)
    given = inputs(model, graph, torch.float32)
    given["pe"] = torch.randn(15, 2, device=DEVICE)
    boxes = torch.rand(15, 4, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        found, logits = model(graph=graph, **given)
        loss = F.mse_loss(found, boxes) + F.cross_entropy(logits, given["node"])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-20:]) < 0.05 * losses[0], (losses[0], losses[-1])


def test_every_parameter_but_the_last_edges_gets_a_gradient():
    graph = batch()
    for last_edges in (False, True):
        model = model_of(last_edges=last_edges)
        box, logits = model(graph=graph, **inputs(model, graph))
        (box.sum() + logits.square().sum()).backward()
        without = {name for name, p in model.named_parameters() if p.grad is None}
        assert all(name.startswith("layers.2.") and "edge_" in name for name in without)
        assert bool(without) == last_edges


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"node": torch.zeros(4, dtype=torch.long)}, ValueError, r"node must be \[N\] = \[13\]"),
        ({"node": torch.zeros(13)}, TypeError, "node must hold integers .* got torch.float32"),
        ({"node": torch.full((13,), 6)}, ValueError, "node must be from 0 to 5, got 6 at 0"),
        ({"edge": None}, TypeError, "edge must be a tensor of integers, got NoneType"),
        ({"edge": torch.zeros(3, dtype=int)}, ValueError, r"edge must be \[E\] = .* got \[3\]"),
        ({"pe": None}, ValueError, r"pe must be \[N, pe_dim\] = \[13, 2\], got None"),
        ({"pe": torch.zeros(13, 3)}, ValueError, r"pe must be .* = \[13, 2\], got \[13, 3\]"),
        ({"graph": torch.zeros(2, 3, dtype=int)}, TypeError, "graph must be a fastgt.Graph, got"),
    ],
)
def test_wrong_inputs_are_named(changes, error, message):
    model, graph = model_of(torch.float32), batch()
    with pytest.raises(error, match=message):
        model(**{"graph": graph} | inputs(model, graph, torch.float32) | changes)


def test_one_object_is_too_few_for_a_batch_norm_in_training():
    model = model_of(torch.float32, pe_dim=0)
    graph = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.long), 1).to(DEVICE)
    node = torch.zeros(1, dtype=torch.long, device=DEVICE)
    with pytest.raises(ValueError, match="norm1 of GraphTransformerEdgeLayer is a batch norm in"):
        model(node, node[:0], graph)
    boxes, logits = model.eval()(node, node[:0], graph)
    assert boxes.isfinite().all()
    assert logits.shape == (1, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 6}, "dim must be a multiple of 4, got 6"),
        ({"heads": 5}, "heads must divide dim, got dim=12 and heads=5"),
        ({"objects": 0}, "objects must be positive, got 0"),
        ({"norm": "graph"}, "norm must be 'batch' or 'layer', got 'graph'"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        SceneGraphEncoder(SceneGraphConfig(**SMALL | changes))

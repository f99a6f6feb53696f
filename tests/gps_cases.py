"""GraphGPS's layers in plain PyTorch, written out, and small models of it with inputs."""

import copy
from itertools import pairwise

import numpy as np
import torch
from attention_cases import DEVICE
from literal_layers import (
    activation,
    batch_norm,
    gated_gcn,
    gcn,
    gin,
    gine,
    layer_norm,
    linear,
    perturbed,
    rough_batch,
    scatter,
)
from torch import nn
from torch.nn import functional as F

from fastgt import implementation
from fastgt.encodings import shortest_paths
from fastgt.models import GraphGPS, GraphGPSConfig
from fastgt.models.graph_gps_bigbird import bigbird_pattern
from fastgt.models.graph_gps_layer import GraphGPSLayer, GraphNorm

FP64 = torch.float64
DIM, HEADS = 8, 2
SIZES = [(5, 12), (0, 0), (7, 20), (1, 1)]
LOCAL = ("none", "gcn", "gin", "gine", "genconv", "gat", "pna", "attention", "gatedgcn")
WITH_EDGES = ("gine", "genconv", "gat", "pna", "attention", "gatedgcn")
ATTENTION = ("none", "softmax", "performer", "linear", "bigbird")


def batch():
    return rough_batch(SIZES)


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
    return graph_norm(norm, x, offsets) if isinstance(norm, GraphNorm) else batch_norm(norm, x)


def genconv(m, x, e, edge_index):
    source, target = edge_index
    n, messages = len(x), (x[source] + e).clamp(min=0) + 1e-7
    w = (messages * (1 if m.temperature is None else m.temperature)).exp()
    total = scatter(w, target, n)
    out = x + scatter(w * messages, target, n) / torch.where(total > 0, total, 1)
    hidden = batch_norm(m.mlp[1], linear(m.mlp[0], out))
    return linear(m.mlp[3], hidden.clamp(min=0))


def gat(m, x, e, edge_index):
    n, heads, (source, target) = len(x), m.heads, edge_index
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


def pna(m, x, e, edge_index):
    source, target = edge_index
    weight = torch.cat([m.row.weight, m.col.weight, m.of_edge.weight], 1)
    given = torch.cat([x[target], x[source], linear(m.edge, e)], 1)
    messages = given @ weight.T + m.row.bias
    rows = []
    for i in range(len(x)):
        mine = messages[target == i]
        found = [mine.mean(0), mine.max(0).values, mine.sum(0)] if len(mine) else 3 * [0 * x[i]]
        rows.append(torch.cat([x[i], *found]))
    return linear(m.lin, linear(m.post, torch.stack(rows)))


def neighbours(m, x, e, edge_index):
    n, a, (source, target) = len(x), m.attention, edge_index
    q, k, v = (linear(layer, x).view(n, a.heads, -1) for layer in (a.q, a.k, a.v))
    s = (q[target] * k[source]).sum(-1) / q.shape[2] ** 0.5 + linear(m.edge_bias, e)
    w = s.exp()[..., None]
    total = scatter(w, target, n)
    out = scatter(w * v[source], target, n) / torch.where(total > 0, total, 1)
    return linear(a.out, out.flatten(1))


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
MESSAGES = {
    "gcn": lambda m, x, e, edge_index: gcn(m, x, edge_index),
    "gin": lambda m, x, e, edge_index: gin(m, x, edge_index),
    "gine": gine,
    "genconv": genconv,
    "gat": gat,
    "pna": pna,
    "attention": neighbours,
}


def sees(n, block=3, random=3, seed=0):
    """Which nodes of a graph attend to which in BigBird, by its rules, ``[n, n]``."""
    seen = torch.zeros(n, n, dtype=torch.bool)
    count = -(-n // block)
    drawn = np.random.Generator(np.random.PCG64(seed)).random((count, random))
    for i in range(count):
        keys = {0, count - 1, i - 1, i, i + 1}
        if i in (0, count - 1):
            keys = set(range(count))
        left = [j for j in range(count) if j not in keys]
        for u in drawn[i][: len(left)]:
            keys.add(left.pop(int(u * len(left))))
        for j in keys:
            seen[i * block : (i + 1) * block, j * block : (j + 1) * block] = True
    return seen


def bigbird(m, x, **rules):
    """One graph."""
    a, n = m.attention, len(x)
    assert m.norm1.eps == m.norm2.eps == 1e-6
    q, k, v = (linear(layer, x).view(n, a.heads, -1) for layer in (a.q, a.k, a.v))
    s = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[2] ** 0.5
    s = s.masked_fill(~sees(n, **rules).to(x.device), -torch.inf)
    y = torch.einsum("hnm,mhd->nhd", s.softmax(-1), v).flatten(1)
    h = layer_norm(m.norm1, x + linear(a.out, y))
    ffn = linear(m.ffn[2], linear(m.ffn[0], h).clamp(min=0))
    return layer_norm(m.norm2, h + ffn)


def literal(layer, kind, attention, x, graph, e, distance, edge_output):
    m, edges = layer.local, graph.edge_index
    offsets, parts = graph.graph_ptr.tolist(), []
    if kind == "gatedgcn":
        y, e_out = gated_gcn(m, x, e, edges, edge_output, distance)
        parts.append(norm_of(layer.local_norm, y, offsets))
    elif kind != "none":
        given = {"distance": distance} if kind == "gine" else {}
        y = MESSAGES[kind](m, x, e, edges, **given)
        parts.append(norm_of(layer.local_norm, x + y, offsets))
    if attention != "none":
        m, outs = layer.attention, [x[:0]]
        for first, last in pairwise(offsets):
            part = x[first:last]
            if last > first and attention == "bigbird":
                outs.append(bigbird(m, part))
            elif last > first:
                q, k, v = (linear(f, part).view(len(part), HEADS, -1) for f in (m.q, m.k, m.v))
                outs.append(linear(m.out, GLOBAL[attention](m, q, k, v).flatten(1)))
        parts.append(norm_of(layer.attention_norm, x + torch.cat(outs), offsets))
    h = sum(parts)
    ffn = linear(layer.ffn[3], activation(layer.ffn[1], linear(layer.ffn[0], h)))
    return norm_of(layer.norm, h + ffn, offsets), e_out if kind == "gatedgcn" else e


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


def check(kind, attention, impl="cpp", train=True, graph=None, **options):
    torch.manual_seed(0)
    graph = batch() if graph is None else graph
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
    pattern = bigbird_pattern(graph) if attention == "bigbird" else None

    def ours(m, x, e=None, distance=None):
        return m(x, e, graph, distance=distance, pattern=pattern)

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

"""Equations of layers that several models share, in plain PyTorch: they read parameters alone.

And the batch that models are compared on.
"""

import copy
from itertools import pairwise

import torch
from attention_cases import DEVICE
from torch import nn

from fastgt import Graph
from fastgt.testing import random_batch


def linear(layer, x):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def batch_norm(norm, x):
    mean, variance = norm.running_mean, norm.running_var
    if norm.training:
        mean, variance = x.mean(0), x.var(0, unbiased=False)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def layer_norm(norm, x):
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return centred / scale * norm.weight + norm.bias


def scatter(values, index, n):
    return values.new_zeros(n, *values.shape[1:]).index_add(0, index, values)


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


def gcn(m, x, edge_index):
    n, (source, target) = len(x), edge_index
    keep, loops = source != target, torch.arange(n, device=x.device)
    source, target = torch.cat([source[keep], loops]), torch.cat([target[keep], loops])
    degree = scatter(torch.ones_like(source, dtype=x.dtype), target, n)
    norm = degree[source] ** -0.5 * degree[target] ** -0.5
    return scatter(norm[:, None] * linear(m.lin, x)[source], target, n) + m.bias


def gine(m, x, e, edge_index, distance=None):
    source, target = edge_index
    messages = (x[source] + e).clamp(min=0) * factor(m, distance)
    return two(m.mlp, x + scatter(messages, target, len(x)))


def gin(m, x, edge_index):
    source, target = edge_index
    return two(m.mlp, x + scatter(x[source], target, len(x)))


def gated_gcn(m, x, e, edge_index, edge_output, distance=None):
    n, (source, target) = len(x), edge_index
    scores = linear(m.gate_row, x)[target] + linear(m.gate_col, x)[source] + linear(m.gate, e)
    sigma = factor(m, distance) / (1 + torch.exp(-scores))
    mean = scatter(sigma * linear(m.value, x)[source], target, n)
    mean = mean / (scatter(sigma, target, n) + 1e-6)
    y = x + activation(m.activation, batch_norm(m.norm, linear(m.own, x) + mean))
    if edge_output:
        e = e + activation(m.edge_activation, batch_norm(m.edge_norm, scores))
    return y, e


def spectral_encoder(encoder, vectors, values, graph):
    """Node by node, over the eigenvectors that it has."""
    heads, rows = encoder.layers[0].attention.heads, []
    for g, (first, last) in enumerate(pairwise(graph.graph_ptr.tolist())):
        for i in range(first, last):
            there = ~vectors[i].isnan()
            x = linear(encoder.lin, torch.stack([vectors[i][there], values[g][there]], 1))
            for layer in encoder.layers if len(x) else ():
                m = layer.attention
                q, k, v = (linear(f, x).view(len(x), heads, -1) for f in (m.q, m.k, m.v))
                s = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[2] ** 0.5
                y = torch.einsum("hnm,mhd->nhd", s.softmax(-1), v).flatten(1)
                x = layer_norm(layer.norm1, x + linear(m.out, y))
                hidden = linear(layer.ffn[0], x).clamp(min=0)
                x = layer_norm(layer.norm2, x + linear(layer.ffn[3], hidden))
            rows.append(x.sum(0))
    return torch.stack(rows)


def readout(m, x, offsets, pool):
    if m.kind != "inductive_node":
        rows = [x[a:b] for a, b in pairwise(offsets)]
        x = torch.stack([pool(row) if len(row) else 0 * x.sum(0) for row in rows])
    for layer in m.layers[:-1]:
        x = linear(layer, x).clamp(min=0)
        if m.kind != "san_graph":
            x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return linear(m.layers[-1], x)


def perturbed(module):
    """The module with vectors and buffers of which no two are alike, as training makes them."""
    generator = torch.Generator().manual_seed(1)
    for m in module.modules():
        for x in (*m.parameters(recurse=False), *m.buffers(recurse=False)):
            if x.ndim == 1:
                x.data.copy_(torch.rand(x.shape, generator=generator, dtype=torch.float64) + 0.5)
    return module


def assert_same(module, ours, theirs, tensors, tolerance=1e-10):
    """Both give the same outputs and gradients of all tensors and parameters, in float64."""
    found, wanted = (_run(module, f, tensors) for f in (ours, theirs))
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(
            found[name], x, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + ": " + m
        )


def _run(module, forward, tensors):
    module, inputs = copy.deepcopy(module), [t.clone().requires_grad_() for t in tensors.values()]
    outputs = forward(module, **dict(zip(tensors, inputs, strict=True)))
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(2)
    upstream = [
        torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device) for y in outputs
    ]
    named = dict(module.named_parameters()) if isinstance(module, nn.Module) else {}
    grads = torch.autograd.grad(
        outputs, [*inputs, *named.values()], upstream, materialize_grads=True
    )
    found = {f"out {i}": y for i, y in enumerate(outputs)}
    names = zip([*tensors, *named], grads, strict=True)
    return found | {f"d {name}": g for name, g in names}


def rough_batch(sizes, loop=6):
    """Graphs with isolated nodes, self loops, one at node ``loop``, and duplicate edges."""
    graph = random_batch(3, sizes, device=DEVICE)
    extra = torch.tensor([[0, 1, 1, loop], [0, 2, 2, loop]], device=DEVICE)
    edges = torch.cat([graph.edge_index, extra], 1)
    edges = edges[:, edges[1] != 3]
    return Graph.from_edge_index(edges, graph_ptr=graph.graph_ptr)


def edgeless(*sizes):
    """Graphs of so many nodes, without edges."""
    ptr = torch.tensor([0, *sizes]).cumsum(0).to(DEVICE)
    return Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.long, device=DEVICE), graph_ptr=ptr)

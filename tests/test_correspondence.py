"""The correspondence transformer against its equations on padded pairs, and what is read of it."""

import itertools
import re
from itertools import pairwise

import pytest
import torch
from attention_cases import DEVICE
from literal_layers import assert_same, edgeless, linear, perturbed, rough_batch
from torch.nn import functional as F

from fastgt import Graph, implementation
from fastgt.encodings import laplacian_pe
from fastgt.models import (
    CorrespondenceTransformer,
    CorrespondenceTransformerConfig,
    correspondence_state_dict,
    log_likelihoods,
    log_sinkhorn,
    matches,
)
from fastgt.models.correspondence import instance_norm
from fastgt.testing import random_batch

FP64 = torch.float64
SMALL = {"dim": 12, "heads": 3, "layers": 2, "pe_dim": 4, "node_widths": (5, 7), "pe_widths": (6,)}
SIZES = [(5, 12), (8, 20), (7, 20), (1, 1), (1, 0), (4, 0)]  # three pairs


def batch():
    """Pairs of unequal sizes, with one node and without edges."""
    return rough_batch(SIZES, loop=9)


def model_of(dtype=FP64, **changes):
    torch.manual_seed(0)
    model = CorrespondenceTransformer(CorrespondenceTransformerConfig(**SMALL | changes))
    return perturbed(model.to(DEVICE, dtype))


def inputs(model, graph, dtype=FP64, descriptor=False):
    generator = torch.Generator().manual_seed(1)
    c = model.config
    widths = {"node": c.node_features, "pe": c.pe_dim, "descriptor": c.dim * descriptor}
    drawn = {k: torch.randn(graph.num_rows, n, generator=generator) for k, n in widths.items() if n}
    return {name: x.to(DEVICE, dtype) for name, x in drawn.items()}


def padded(x, sizes):
    """``[N, C]`` -> ``[2, P, n, C]`` and a mask ``[2, P, n]``: the graphs of a pair are 0 and 1."""
    out = x.new_zeros(len(sizes), max(sizes), x.shape[1])
    mask = x.new_zeros(len(sizes), max(sizes))
    for g, part in enumerate(x.split(sizes)):
        out = out.index_put((torch.tensor(g), torch.arange(len(part))), part)
        mask[g, : len(part)] = 1
    return (y.unflatten(0, (-1, 2)).transpose(0, 1) for y in (out, mask))


def perceptron(module, x, mask):
    """With norms over the nodes of each graph that are no padding."""
    count = mask.sum(2)[..., None, None]
    for layer in module.layers[:-1]:
        x = linear(layer, x)
        mean = (x * mask[..., None]).sum(2, keepdim=True) / count
        variance = ((x - mean) ** 2 * mask[..., None]).sum(2, keepdim=True) / count
        x = ((x - mean) / (variance + 1e-5).sqrt()).clamp(min=0)
    return linear(module.layers[-1], x)


def attention(layer, x, source, mask):
    shape = (*x.shape[:3], layer.heads, -1)
    q, k, v = layer.q(x).view(shape), layer.k(source).view(shape), layer.v(source).view(shape)
    s = torch.einsum("spihd,spjhd->spijh", q, k) / q.shape[-1] ** 0.5
    s = s.masked_fill(mask[:, :, None, :, None] == 0, -torch.inf)
    return torch.einsum("spijh,spjhd->spihd", s.softmax(3), v).flatten(3)


def literal(model, node, graph, pe=None, descriptor=None):
    c, sizes = model.config, graph.graph_ptr.diff().tolist()
    node, mask = padded(node, sizes)
    x = perceptron(model.embed, node, mask)
    if pe is not None:
        x = x + perceptron(model.embed_pe, next(padded(pe.abs(), sizes)), mask)
    if descriptor is not None:
        x = x + next(padded(descriptor, sizes))
    for layer, kind in zip(model.layers, itertools.cycle(["self", "cross"]), strict=False):
        source, keys = (x, mask) if kind == "self" else (x.flip(0), mask.flip(0))
        message = linear(layer.merge, attention(layer, x, source, keys))
        x = x + perceptron(layer.mlp, torch.cat([x, message], 3), mask)
    f = linear(model.out, x)
    scores = torch.einsum("pid,pjd->pij", *f) / c.dim**0.5
    blocks = []
    for p, (n, m) in enumerate(zip(sizes[::2], sizes[1::2], strict=True)):
        # Sinkhorn and Knopp's own form: rows and columns of exp(z) are divided by their sums
        column = model.dustbin.expand(n, 1)
        z = torch.cat([scores[p, :n, :m], column], 1)
        z = torch.cat([z, model.dustbin.expand(1, m + 1)]).exp()
        rows = torch.tensor([1.0] * n + [m], dtype=z.dtype, device=z.device)
        columns = torch.tensor([1.0] * m + [n], dtype=z.dtype, device=z.device)
        for _ in range(c.iterations):
            z = z / z.sum(1, keepdim=True) * rows[:, None]
            z = z / z.sum(0) * columns
        blocks.append(z.log().flatten())
    return torch.cat(blocks)


@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize("descriptor", [False, True])
def test_the_model_is_its_equations(descriptor, impl):
    model, graph = model_of(), batch()
    given = inputs(model, graph, descriptor=descriptor)

    def ours(m, **tensors):
        with implementation(impl):
            return m(graph=graph, **tensors)

    assert_same(model, ours, lambda m, **x: literal(m, graph=graph, **x), given, 1e-9)


def test_the_model_without_encodings_is_its_equations():
    model, graph = model_of(pe_dim=0, iterations=3), batch()
    assert_same(
        model,
        lambda m, node: m(node, graph),
        lambda m, node: literal(m, node, graph),
        inputs(model, graph),
        1e-9,
    )


def matrices(out, graph):
    sizes = [n + 1 for n in graph.graph_ptr.diff().tolist()]
    shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
    parts = out.split([n * m for n, m in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def test_pairs_know_nothing_of_each_other():
    model, graph = model_of(), batch()
    given, ptr = inputs(model, graph), graph.graph_ptr.tolist()
    whole = matrices(model(graph=graph, **given), graph)
    for p, one in enumerate(whole):
        first, middle, last = ptr[2 * p : 2 * p + 3]
        alone = edgeless(middle - first, last - middle)
        part = {name: x[first:last] for name, x in given.items()}
        found = model(graph=alone, **part)
        torch.testing.assert_close(found, one.flatten(), rtol=1e-11, atol=1e-11)


def test_the_order_of_nodes_is_that_of_rows_and_columns():
    model, graph = model_of(), batch()
    given, generator = inputs(model, graph), torch.Generator().manual_seed(3)
    orders = [
        torch.randperm(b - a, generator=generator) for a, b in pairwise(graph.graph_ptr.tolist())
    ]
    starts = graph.graph_ptr.tolist()
    nodes = torch.cat([order + start for order, start in zip(orders, starts, strict=False)])
    wanted = matrices(model(graph=graph, **given), graph)
    moved = {name: x[nodes] for name, x in given.items()}
    found = matrices(model(graph=graph, **moved), graph)
    for p, (a, b) in enumerate(zip(found, wanted, strict=True)):
        row, col = (torch.cat([x, torch.tensor([len(x)])]) for x in orders[2 * p : 2 * p + 2])
        torch.testing.assert_close(a, b[row][:, col], rtol=1e-10, atol=1e-10)


def test_signs_of_eigenvectors_mean_nothing():
    model, graph = model_of(), batch()
    given = inputs(model, graph)
    signs = torch.tensor([1, -1, -1, 1], dtype=FP64, device=DEVICE)
    flipped = given | {"pe": given["pe"] * signs}
    assert torch.equal(model(graph=graph, **flipped), model(graph=graph, **given))


def test_parameter_counts():
    """Layer by layer as the authors' modules make them, without their convolutions of an image."""

    def lin(a, b):
        return a * b + b

    d, c = 128, CorrespondenceTransformerConfig.published("mixamo_line")
    coordinates = lin(2, 32) + lin(32, 64) + lin(64, 128) + lin(128, d)
    topology = lin(64, 96) + lin(96, d)
    layer = 4 * lin(d, d) + lin(2 * d, 2 * d) + lin(2 * d, d)
    with torch.device("meta"):
        model = CorrespondenceTransformer(c)
    count = sum(p.numel() for p in model.parameters())
    assert count == coordinates + topology + 24 * layer + lin(d, d) + 1
    # all of SuperGlueT is 4,112,961, of which its three convolutions have 97,088
    convolutions = 32 * (3 * 49 + 1) + 64 * (32 * 9 + 1) + 128 * (64 * 9 + 1)
    assert count == 4_112_961 - convolutions == 4_015_873


def test_published_settings():
    c = CorrespondenceTransformerConfig.published("mixamo_line")
    assert (c.dim, c.heads, c.layers, c.pe_dim, c.iterations, c.threshold) == (
        *(128, 4, 12, 64, 20),
        0.2,
    )
    c.layers = 1
    assert CorrespondenceTransformerConfig.published("mixamo_line").layers == 12
    with pytest.raises(ValueError, match=r"name must be one of \['mixamo_line'\], got 'sintel'"):
        CorrespondenceTransformerConfig.published("sintel")


def test_weights_begin_as_they_are_said_to():
    model = CorrespondenceTransformer(CorrespondenceTransformerConfig(**SMALL))
    assert model.dustbin.item() == 1
    for layer in (model.embed, model.embed_pe, *(x.mlp for x in model.layers)):
        assert not layer.layers[-1].bias.any()
        assert layer.layers[0].bias.all()
    layer = model.layers[0]
    assert not torch.equal(layer.q.weight, layer.k.weight)


def authors_state(c):
    """Random parameters by the authors' names, of convolutions over one node."""
    generator = torch.Generator().manual_seed(0)
    layers = {
        "vertex_desc.encoder.layer1": [3, c.dim // 4],
        "kenc.encoder": [c.node_features, *c.node_widths, c.dim],
        "tenc.encoder": [c.pe_dim, *c.pe_widths, c.dim],
        "final_proj": [c.dim, c.dim],
    }
    for i in range(2 * c.layers):
        layers[f"gnn.layers.{i}.attn.merge"] = [c.dim, c.dim]
        layers |= {f"gnn.layers.{i}.attn.proj.{j}": [c.dim, c.dim] for j in range(3)}
        layers[f"gnn.layers.{i}.mlp"] = [2 * c.dim, 2 * c.dim, c.dim]
    state = {"bin_score": torch.tensor(0.8, dtype=FP64)}
    for name, widths in layers.items():
        for i, (a, b) in enumerate(pairwise(widths)):
            part = f"{name}.{3 * i}" if name.endswith(("encoder", "mlp")) else name
            state[f"{part}.weight"] = torch.randn(b, a, 1, generator=generator, dtype=FP64) / a**0.5
            state[f"{part}.bias"] = torch.randn(b, generator=generator, dtype=FP64)
    return {name: x.to(DEVICE) for name, x in state.items()}


def authors_layers(state, name, x):
    """``[C, n]`` -> ``[C', n]``, with instance norms of PyTorch's."""
    numbers = sorted(int(k.split(".")[-2]) for k in state if re.match(rf"{name}\.\d+\.bias", k))
    for i in numbers:
        x = state[f"{name}.{i}.weight"][..., 0] @ x + state[f"{name}.{i}.bias"][:, None]
        if i != numbers[-1]:
            x = F.instance_norm(x[None])[0].relu()
    return x


def authors(state, c, nodes, encodings):
    """One pair, ``[C, n]`` and ``[C, m]``: -> scores ``[n, m]``. Channel d of head h is d H + h."""

    def projected(name, x):
        return state[f"{name}.weight"][..., 0] @ x + state[f"{name}.bias"][:, None]

    x = [authors_layers(state, "kenc.encoder", y) for y in nodes]
    x = [y + authors_layers(state, "tenc.encoder", e) for y, e in zip(x, encodings, strict=True)]
    for i in range(2 * c.layers):
        name, found = f"gnn.layers.{i}", []
        for mine, source in zip(x, x[::-1] if i % 2 else x, strict=True):
            q = projected(f"{name}.attn.proj.0", mine).view(-1, c.heads, mine.shape[1])
            k, v = (
                projected(f"{name}.attn.proj.{j}", source).view(-1, c.heads, source.shape[1])
                for j in (1, 2)
            )
            s = torch.einsum("dhn,dhm->hnm", q, k) / len(q) ** 0.5
            message = torch.einsum("hnm,dhm->dhn", s.softmax(2), v).reshape(c.dim, -1)
            message = projected(f"{name}.attn.merge", message)
            found.append(authors_layers(state, f"{name}.mlp", torch.cat([mine, message])))
        x = [a + b for a, b in zip(x, found, strict=True)]
    first, second = (projected("final_proj", y) for y in x)
    return first.T @ second / c.dim**0.5


@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_of_the_authors_give_what_they_gave(prefix):
    model = model_of()
    c, state, graph = model.config, authors_state(model.config), edgeless(6, 4)
    given = inputs(model, graph)
    given["pe"] = given["pe"].abs()
    theirs = {prefix + name: x for name, x in state.items()}
    model.load_state_dict(correspondence_state_dict(theirs, c))
    parts = [[x.T for x in given[name].split([6, 4])] for name in ("node", "pe")]
    scores = authors(state, c, *parts).flatten()
    offsets = torch.tensor([[0, 6], [0, 4]], device=DEVICE)
    wanted = log_sinkhorn(scores, state["bin_score"], *offsets, iterations=c.iterations)
    torch.testing.assert_close(model(graph=graph, **given), wanted, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"'gnn\.layers\.0\.norm\.bias' is no parameter of the"):
        correspondence_state_dict({"gnn.layers.0.norm.bias": torch.zeros(1)}, c)


def true_matches(graph, seed=0):
    """A random partial assignment of the two graphs of every pair, as ``y``."""
    generator = torch.Generator().manual_seed(seed)
    sizes, y = graph.graph_ptr.diff().tolist(), []
    for n, m in zip(sizes[::2], sizes[1::2], strict=True):
        first, second = torch.full((n,), -1), torch.full((m,), -1)
        count = (min(n, m) + 1) // 2
        rows, cols = (torch.randperm(x, generator=generator)[:count] for x in (n, m))
        first[rows], second[cols] = cols, rows
        y += [first, second]
    return torch.cat(y).to(DEVICE)


def test_likelihoods_are_entries_of_the_matrices():
    graph = batch()
    y, sizes = true_matches(graph), graph.graph_ptr.diff().tolist()
    total = sum((n + 1) * (m + 1) for n, m in zip(sizes[::2], sizes[1::2], strict=True))
    out = torch.arange(float(total), device=DEVICE, requires_grad=True)
    found, wanted, of_nodes = log_likelihoods(out, y, graph), [], y.split(sizes)
    for p, block in enumerate(matrices(out, graph)):
        n, m = (x - 1 for x in block.shape)
        wanted += [block[i, j if j >= 0 else m] for i, j in enumerate(of_nodes[2 * p].tolist())]
        wanted += [block[i if i >= 0 else n, j] for j, i in enumerate(of_nodes[2 * p + 1].tolist())]
    assert found.tolist() == [float(x.detach()) for x in wanted]
    (grad,) = torch.autograd.grad(found.sum(), out)
    (expected,) = torch.autograd.grad(torch.stack(wanted).sum(), out)
    assert torch.equal(grad, expected)
    assert set(expected.tolist()) == {0, 1, 2}
    assert torch.equal(log_likelihoods(out, y.to(torch.int16), graph), found)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_matches_are_the_largest_of_their_row_and_column(threshold):
    graph = batch()
    sizes = graph.graph_ptr.diff().tolist()
    total = sum((n + 1) * (m + 1) for n, m in zip(sizes[::2], sizes[1::2], strict=True))
    p = torch.rand(total, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    wanted = []
    for block in matrices(p, graph):
        n, m = (x - 1 for x in block.shape)
        first, second = [-1] * n, [-1] * m
        for i, j in itertools.product(range(n), range(m)):
            rivals = [*block[i, :m].tolist(), *block[:n, j].tolist()]
            if block[i, j] == max(rivals) and block[i, j] > threshold:
                first[i], second[j] = j, i
        wanted += first + second
    assert matches(p.log(), graph, threshold).tolist() == wanted
    assert (max(wanted) >= 0) == (threshold < 1)


def test_partners_are_learnt_by_heart():
    """Also those that have none, by the loss of all nodes."""
    graph = random_batch(5, [(9, 30), (7, 24), (6, 14), (8, 26)], device=DEVICE)
    model = model_of(torch.float32, layers=1, iterations=10)
    given, y = inputs(model, graph, torch.float32), true_matches(graph)
    given["pe"] = laplacian_pe(graph, 4, symmetrize=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        loss = -log_likelihoods(model(graph=graph, **given), y, graph).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0], (losses[0], losses[-1])
    assert torch.equal(matches(model(graph=graph, **given), graph), y)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 5), (4, 1, 2, 2), ()])
def test_one_node_and_no_edges(sizes):
    model, graph = model_of(), edgeless(*sizes)
    given = inputs(model, graph)
    out = model(graph=graph, **given)
    for block, (n, m) in zip(
        matrices(out.exp(), graph), zip(sizes[::2], sizes[1::2], strict=True), strict=True
    ):
        columns = torch.tensor([1.0] * m + [n], dtype=FP64, device=DEVICE)
        torch.testing.assert_close(block.sum(0), columns, rtol=1e-10, atol=1e-10)
    out.sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    assert matches(out, graph).shape == (sum(sizes),)


def test_every_parameter_gets_a_gradient_and_all_but_those_of_norms_move_the_output():
    model, graph = model_of(), batch()
    out = model(graph=graph, **inputs(model, graph))
    out.square().sum().backward()
    for name, p in model.named_parameters():
        before_norm = name.endswith("bias") and "layers." in name and p.grad.abs().max() < 1e-8
        assert p.grad.abs().max() > 1e-6 or before_norm or name.endswith(".k.bias"), name


def test_half_precision():
    """Under autocast, and in bfloat16: sums of Sinkhorn are float32's."""
    model, graph = model_of(torch.float32), batch()
    given = inputs(model, graph, torch.float32)
    wanted = model(graph=graph, **given)
    with torch.autocast(graph.device.type, torch.bfloat16):
        found = model(graph=graph, **given)
    found.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    narrow = {name: x.bfloat16() for name, x in given.items()}
    whole = model_of(torch.bfloat16)(graph=graph, **narrow)
    for x in (found, whole):
        assert x.dtype == torch.float32
        assert (x - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_instance_norms_of_large_and_of_equal_numbers_are_those_of_float32(dtype):
    """Squares that float16 does not hold, and a variance of 0, whose gradient has eps ** -1.5."""
    torch.manual_seed(0)
    sizes, offsets = [40, 1, 7], torch.tensor([0, 40, 41, 48], device=DEVICE)
    x = 300 * torch.randn(48, 4, device=DEVICE)
    x[41:] = 1.0
    x = x.to(dtype).requires_grad_()
    weight = torch.randn(48, 4, device=DEVICE).to(dtype)
    wanted = []
    for part in x.double().split(sizes):
        centred = part - part.mean(0)
        wanted.append(centred / (centred.square().mean(0) + 1e-5).sqrt())
    wanted = torch.cat(wanted)
    found = instance_norm(x, offsets)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted.to(dtype))
    grads = [
        torch.autograd.grad((y * weight).sum(), x, retain_graph=True)[0] for y in (found, wanted)
    ]
    assert grads[0].isfinite().all()
    torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"graph": torch.zeros(2, 3, dtype=int)}, TypeError, "graph must be a fastgt.Graph, got T"),
        ({"graph": "odd"}, ValueError, "graph must be a batch of pairs, .*; got 3 graphs"),
        ({"graph": "empty"}, ValueError, "graph 1 of the batch has no nodes: a pair is of two"),
        ({"graph": "bipartite"}, ValueError, "graph must be square, got 2 rows and 3 columns"),
        ({"node": None}, TypeError, "node must be a tensor, got NoneType"),
        ({"node": torch.zeros(26, 2, dtype=int)}, TypeError, "node must be float16, .* torch.int"),
        ({"node": torch.zeros(26, 2, dtype=FP64)}, TypeError, "node must be torch.float32, as the"),
        ({"node": torch.zeros(25, 2)}, ValueError, r"node must be .* \[26, 2\], got \[25, 2\]"),
        ({"node": torch.zeros(26, 3)}, ValueError, r"node must be .* \[26, 2\], got \[26, 3\]"),
        ({"pe": None}, ValueError, r"pe must be \[N, pe_dim\] = \[26, 4\], got None"),
        ({"pe": torch.zeros(26, 5)}, ValueError, r"pe must be .* \[26, 4\], got \[26, 5\]"),
        ({"pe": torch.zeros(26, 4, dtype=FP64)}, TypeError, "pe must be torch.float32, as the mod"),
        ({"descriptor": torch.zeros(26, 4)}, ValueError, r"descriptor must be .* got \[26, 4\]"),
        ({"descriptor": [0.0]}, TypeError, "descriptor must be a tensor, got list"),
    ],
)
def test_wrong_inputs_are_named(changes, error, message):
    lines = torch.zeros(2, 0, dtype=torch.long)
    graphs = {
        "odd": edgeless(1, 2, 3),
        "empty": edgeless(2, 0),
        "bipartite": Graph.from_edge_index(lines, (2, 3)).to(DEVICE),
    }
    model, graph = model_of(torch.float32), batch()
    given = {"graph": graph} | inputs(model, graph, torch.float32)
    changes = {name: graphs[x] if isinstance(x, str) else x for name, x in changes.items()}
    changes = {name: x.to(DEVICE) if hasattr(x, "to") else x for name, x in changes.items()}
    with pytest.raises(error, match=message):
        model(**given | changes)


@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        ([0, -1, 0], TypeError, "y must be a tensor of integers, got list"),
        (torch.zeros(3), TypeError, r"y must hold integers, got torch.float32"),
        (
            torch.zeros(3, dtype=torch.complex64),
            TypeError,
            "y must hold integers, got torch.comp",
        ),
        (torch.zeros(3, dtype=int, device="meta"), ValueError, "y is on meta but graph is on "),
        (torch.zeros(2, dtype=int), ValueError, r"y must be \[N\] = \[3\], got \[2\]"),
        (torch.tensor([0, 1, 0]), ValueError, "y must be from -1 to 0, .* has 1 nodes, got 1 at 1"),
        (torch.tensor([0, -2, 0]), ValueError, "y must be from -1 to 0, .* got -2 at 1"),
    ],
)
def test_wrong_matches_are_named(y, error, message):
    y = y.to(DEVICE) if isinstance(y, torch.Tensor) and not y.is_meta else y
    with pytest.raises(error, match=message):
        log_likelihoods(torch.zeros(6, device=DEVICE), y, edgeless(2, 1))


def test_wrong_assignments_and_thresholds_are_named():
    graph, y = edgeless(2, 1), torch.zeros(3, dtype=torch.long, device=DEVICE)
    for call in (lambda x: matches(x, graph), lambda x: log_likelihoods(x, y, graph)):
        with pytest.raises(ValueError, match=r"log_assignment must be .* = \[6\], got \[2, 3\]"):
            call(torch.zeros(2, 3, device=DEVICE))
        with pytest.raises(TypeError, match="log_assignment must be a tensor, got NoneType"):
            call(None)
        with pytest.raises(ValueError, match="log_assignment is on meta but graph is on "):
            call(torch.zeros(6, device="meta"))
    for threshold in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"threshold must be from 0 to 1, got {threshold}"):
            matches(torch.zeros(6, device=DEVICE), graph, threshold)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"heads": 5}, ValueError, "heads must divide dim, got dim=12 and heads=5"),
        ({"layers": 0}, ValueError, "layers must be positive, got 0"),
        ({"iterations": 0}, ValueError, "iterations must be positive, got 0"),
        ({"pe_dim": -1}, ValueError, "pe_dim must not be negative, got -1"),
        ({"node_widths": 32}, TypeError, "node_widths must be widths, got int"),
        ({"pe_widths": (0,)}, ValueError, "pe_widths must be positive, got 0"),
        ({"threshold": 2.0}, ValueError, "threshold must be from 0 to 1, got 2.0"),
    ],
)
def test_wrong_settings_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        CorrespondenceTransformerConfig(**SMALL | changes)

"""OpenGraph against its equations, written out densely, and what its embeddings are used for."""

import math
from itertools import pairwise

import pytest
import torch
from attention_cases import DEVICE
from literal_layers import assert_same, layer_norm, linear, perturbed, rough_batch
from torch import nn

from fastgt import Graph
from fastgt.encodings import svd_tokens
from fastgt.models import OpenGraph, OpenGraphConfig, open_graph_state_dict
from fastgt.models.open_graph import (
    Anchors,
    OpenGraphLayer,
    draw_anchors,
    info_nce,
    topology_encoding,
)
from fastgt.testing import random_graph

FP64 = torch.float64
DIM, HEADS = 8, 2
SIZES = [(5, 12), (0, 0), (7, 20), (1, 1)]
SMALL = {"dim": DIM, "heads": HEADS, "layers": 3, "anchors": 3, "hops": 2}
BARE = SMALL | {"dropout": 0.0, "attention_dropout": 0.0}
pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(**changes):
    torch.manual_seed(0)
    return perturbed(OpenGraph(OpenGraphConfig(**BARE | changes)).to(DEVICE, FP64))


def drawn(n, seed=0, dim=DIM):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=FP64).to(DEVICE)


def anchors_of(graph, layers=3, count=3):
    torch.manual_seed(7)
    return [draw_anchors(graph.graph_ptr, graph.num_rows, count) for _ in range(layers)]


def smoothed(x, edges, hops):
    """Layer norm without weights, then the powers of a dense adjacency, from a list of edges."""
    n = len(x)
    a = x.new_zeros(n, n)
    for j, i in edges:
        a[i, j] += 1
    rows, cols = a.sum(1, keepdim=True).clamp(min=1), a.sum(0, keepdim=True).clamp(min=1)
    a = a / (rows * cols).sqrt()
    centred = x - x.mean(1, keepdim=True)
    x = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    if not hops:
        return x
    total = torch.zeros_like(x)
    for power in range(1, hops + 1):
        total = total + torch.linalg.matrix_power(a, power) @ x
    return total


def attended(m, x, y):
    """Head by head, query by query."""
    width, heads = x.shape[1] // m.heads, []
    for h in range(m.heads):
        some = slice(h * width, (h + 1) * width)
        q, k, v = x @ m.q.weight[some].T, y @ m.k.weight[some].T, y @ m.v.weight[some].T
        rows = [((k @ query) / width**0.5).softmax(0) @ v for query in q]
        heads.append(torch.stack(rows))
    return torch.cat(heads, 1) @ m.out.weight.T


def leaky(x):
    return torch.where(x > 0, x, 0.5 * x)


def literal_layer(m, x, offsets, anchors):
    out = [x[:0]]
    for (a, b), (c, d) in zip(pairwise(offsets), pairwise(anchors.ptr.tolist()), strict=True):
        if a == b:
            continue
        part, s = x[a:b], x[anchors.node[c:d]]
        s = s + attended(m.attention, s, part)
        h = layer_norm(m.norm1, part + attended(m.attention, part, s))
        y = leaky(linear(m.ffn[2], leaky(linear(m.ffn[0], h))))
        out.append(layer_norm(m.norm2, h + y) / 10)
    return torch.cat(out)


def literal(m, x, offsets, anchors):
    for layer, some in zip(m.layers, anchors, strict=True):
        x = literal_layer(layer, x, offsets, some)
    return x


@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize("train", [False, True])
def test_a_layer_is_its_equations(count, train):
    torch.manual_seed(0)
    layer = perturbed(OpenGraphLayer(DIM, HEADS, anchors=count).to(DEVICE, FP64)).train(train)
    graph = rough_batch(SIZES)
    offsets, n = graph.graph_ptr, graph.num_rows
    (anchors,) = anchors_of(graph, 1, count)
    assert_same(
        layer,
        lambda m, x: m(x, offsets, anchors),
        lambda m, x: literal_layer(m, x, offsets.tolist(), anchors),
        {"x": drawn(n)},
        tolerance=1e-11,
    )


@pytest.mark.parametrize("hops", [0, 1, 3])
def test_the_topology_encoder_is_its_equation(hops):
    graph = rough_batch(SIZES)
    edges = graph.edge_index.T.tolist()
    generator = torch.Generator().manual_seed(0)
    present = (torch.rand(len(edges), generator=generator) < 0.6).to(DEVICE)
    for some in (None, present):
        kept = (
            edges if some is None else [e for e, p in zip(edges, some.tolist(), strict=True) if p]
        )
        assert_same(
            None,
            lambda _, x, some=some: topology_encoding(x, graph, hops, present=some),
            lambda _, x, kept=kept: smoothed(x, kept, hops),
            {"x": drawn(graph.num_rows)},
            tolerance=1e-11,
        )


def test_the_model_is_its_equations():
    graph, model = rough_batch(SIZES), model_of()
    anchors, edges = anchors_of(graph), graph.edge_index.T.tolist()
    assert_same(
        model,
        lambda m, x: m(x, graph, anchors=anchors),
        lambda m, x: literal(m, smoothed(x, edges, 2), graph.graph_ptr.tolist(), anchors),
        {"x": drawn(graph.num_rows)},
    )


class Parts(nn.Module):
    """Modules under the names that the authors give them."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.ModuleList(part) if isinstance(part, list) else part)


def test_the_model_is_the_released_one_from_its_state():
    """With PyTorch's own attention, called twice."""
    torch.manual_seed(0)
    theirs = [
        Parts(
            multi_head_attention=nn.MultiheadAttention(DIM, HEADS, bias=False),
            dense_layers=[Parts(linear=nn.Linear(DIM, DIM)) for _ in range(2)],
            layer_norm1=nn.LayerNorm(DIM),
            layer_norm2=nn.LayerNorm(DIM),
        )
        for _ in range(3)
    ]
    whole = perturbed(Parts(graphTransformer=Parts(gt_layers=theirs)).to(DEVICE, FP64))
    model = OpenGraph(OpenGraphConfig(**BARE)).to(DEVICE, FP64)
    model.load_state_dict(open_graph_state_dict(whole.state_dict()))
    x = wanted = drawn(11)
    anchors = [draw_anchors(torch.tensor([0, 11], device=DEVICE), 11, count) for count in (4, 2, 7)]
    for layer, some in zip(theirs, anchors, strict=True):
        s = wanted[some.node]
        s = layer.multi_head_attention(s, wanted, wanted)[0] + s
        wanted = layer.layer_norm1(layer.multi_head_attention(wanted, s, s)[0] + wanted)
        y = wanted
        for dense in layer.dense_layers:
            y = leaky(dense.linear(y))
        wanted = layer.layer_norm2(y + wanted) / 10
    found = model.transform(x, anchors=anchors)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for name in ("graphTransformer.gt_layers.0.layer_norm3.bias", "layers.0.norm1.bias"):
        with pytest.raises(ValueError, match=f"'{name}' is no parameter of an OpenGraph"):
            open_graph_state_dict({name: x})


def test_weights_are_drawn_as_pytorchs_attention_draws_them():
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(96, 4, bias=False)
    ours = OpenGraphLayer(96, 4).attention
    for _ in range(2):
        bound = theirs.in_proj_weight.abs().max()
        for part in (ours.q, ours.k, ours.v):
            assert 0.98 * bound < part.weight.abs().max() <= (1.5 / 96) ** 0.5
        assert abs(ours.out.weight.std() / theirs.out_proj.weight.std() - 1) < 0.05
        ours.reset_parameters()


def test_dropout_is_that_of_training():
    x = drawn(9)
    anchors = draw_anchors(torch.tensor([0, 9], device=DEVICE), 9, 5)
    for options in ({"dropout": 0.5}, {"attention_dropout": 0.5}):
        layer = OpenGraphLayer(DIM, HEADS, **options).to(DEVICE, FP64)
        first, second = layer(x, None, anchors), layer(x, None, anchors)
        assert not torch.equal(first, second), options
        layer.eval()
        assert torch.equal(layer(x, None, anchors), layer(x, None, anchors)), options


def test_published_parameter_count():
    with torch.device("meta"):
        for name in ("gen0", "gen1", "gen2"):
            model = OpenGraph(OpenGraphConfig.published(name))
            assert sum(p.numel() for p in model.parameters()) == 25_190_400
    with pytest.raises(ValueError, match=r"name must be one of \['gen0', .* got 'gen3'"):
        OpenGraphConfig.published("gen3")


@pytest.mark.parametrize("count", [1, 3, 5, 9])
def test_anchors_are_so_many_random_nodes_of_each_graph(count):
    offsets, seen = torch.tensor([0, 5, 5, 12, 13], device=DEVICE), torch.zeros(13)
    torch.manual_seed(0)
    for _ in range(400):
        node, ptr = draw_anchors(offsets, 13, count)
        parts = [node[a:b].tolist() for a, b in pairwise(ptr.tolist())]
        assert [len(x) for x in parts] == [min(count, n) for n in (5, 0, 7, 1)]
        for part, (first, last) in zip(parts, pairwise(offsets.tolist()), strict=True):
            assert part == sorted(set(part))
            assert all(first <= i < last for i in part)
        seen[node.cpu()] += 1
    shares = torch.tensor([min(1, count / 5)] * 5 + [min(1, count / 7)] * 7 + [1])
    assert ((seen / 400 - shares).abs() < 0.1).all()


def test_anchors_change_from_call_to_call():
    graph, model = random_graph(0, 40, 200, device=DEVICE), model_of().eval()
    tokens = drawn(40)
    torch.manual_seed(1)
    first, second = model(tokens, graph), model(tokens, graph)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(model(tokens, graph), first)
    everyone = model_of(anchors=40).eval()
    torch.testing.assert_close(everyone(tokens, graph), everyone(tokens, graph))


def literal_loss(a, p, n, floor=0.0):
    """Row by row, as the paper has it."""
    total = 0
    for b in range(len(a)):
        near = (a[b] * p[b]).sum()
        far = [(a[b] * n[k]).sum() for k in range(len(n))]
        total = total + torch.log(near.exp() + sum(x.exp() for x in far) + floor) - near
    return total / len(a)


def released_loss(a, p, n):
    near, far = (a * p).sum(-1), a @ n.T
    top = torch.cat([near, far.reshape(-1)]).max()
    near, far = near - top, far - top
    return -(near - (far.exp().sum(-1) + near.exp() + 1e-8).log()).mean()


def test_the_loss_is_its_equation():
    tensors = {"a": drawn(4, 0), "p": drawn(4, 1), "n": drawn(6, 2)}
    assert_same(
        None,
        lambda _, a, p, n: info_nce(a, p, n),
        lambda _, a, p, n: literal_loss(a, p, n),
        tensors,
        tolerance=1e-12,
    )


def test_the_loss_is_the_released_one_where_scores_are_near_another():
    a, p, n = drawn(4, 0), drawn(4, 1), drawn(6, 2)
    torch.testing.assert_close(
        info_nce(a / 3, p, n), released_loss(a / 3, p, n), rtol=1e-7, atol=1e-7
    )
    a = torch.cat([a, 40 * a[:1]])  # one node whose scores are far above those of the others
    p = torch.cat([p, p[:1]])
    assert abs(info_nce(a, p, n) - released_loss(a, p, n)) > 1
    a = 1e4 * a
    assert info_nce(a, p, n).isfinite()
    assert info_nce(a.float(), p.float(), n.float()).isfinite()


def test_a_step_hides_the_edges_of_its_batch():
    """Both ways and all duplicates, and no other; what is no edge adds none."""
    edges = [(0, 1), (1, 0), (0, 1), (2, 1), (1, 2), (3, 4), (4, 3), (2, 4), (5, 5), (0, 5), (6, 0)]
    graph = Graph.from_edge_index(torch.tensor(edges, device=DEVICE).T, 7)
    row, positive, negative = [0, 4, 2, 5, 3], [1, 3, 4, 5, 6], [5, 6, 0, 2]
    hidden = [(0, 1), (1, 0), (3, 4), (4, 3), (2, 4), (4, 2), (5, 5), (3, 6), (6, 3)]
    kept = [e for e in edges if e not in hidden]
    assert len(kept) == 4
    model, rows = model_of(), row + positive + negative
    some = [Anchors(torch.tensor([1, 4, 11]), torch.tensor([0, 3])) for _ in range(3)]
    some = [Anchors(*(x.to(DEVICE) for x in y)) for y in some]
    node = drawn(7)
    given = [torch.tensor(x, device=DEVICE) for x in (row, positive, negative)]

    def ours(m):
        return m.link_loss(node, graph, *given, anchors=some)

    def theirs(m):
        out = literal(m, smoothed(node, kept, 2)[rows], [0, 14], some)
        return literal_loss(out[:5], out[5:10], out[10:])

    assert_same(model, ours, theirs, {})
    with_all = literal(model, smoothed(node, edges, 2)[rows], [0, 14], some)
    assert abs(literal_loss(with_all[:5], with_all[5:10], with_all[10:]) - ours(model)) > 1e-6


def test_nothing_is_learned_through_the_topology_encoder():
    graph, model = random_graph(0, 9, 40, device=DEVICE), model_of()
    node = drawn(9).requires_grad_()
    source, target = graph.edge_index
    model.link_loss(node, graph, source[:4], target[:4], target[5:8]).backward()
    assert node.grad is None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # a call of the model does reach the tokens
    model(node, graph).square().sum().backward()
    assert node.grad.any()


def test_edges_are_learned_by_heart():
    """Cliques that nothing tells apart at first but their edges."""
    clique = [(i, j) for i in range(5) for j in range(5) if i != j]
    edges = torch.tensor([(5 * c + i, 5 * c + j) for c in range(6) for i, j in clique]).T
    graph = Graph.from_edge_index(edges.to(DEVICE), 30)
    torch.manual_seed(0)
    model = OpenGraph(OpenGraphConfig(16, 2, 2, 30, dropout=0, attention_dropout=0, scale=1.0))
    model = model.to(DEVICE)
    tokens = svd_tokens(graph, 16, iterations=8)
    row = torch.arange(0, 30, 5, device=DEVICE)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=5e-3), []
    for _ in range(150):
        optimizer.zero_grad()
        # others of a node's clique are near it, the five other cliques are far
        loss = sum(
            model.link_loss(tokens, graph, row[c : c + 1], row[c : c + 1] + 1, far)
            for c in range(6)
            for far in [row[row != 5 * c] + 2]
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0], losses[::30]


def test_what_does_not_fit_is_refused_by_name():
    graph, model = random_graph(0, 9, 40, device=DEVICE), model_of()
    node, edge = drawn(9), torch.tensor([0, 1], device=DEVICE)
    long = torch.tensor([0, 9], device=DEVICE)
    for changes, error, message in (
        ({"graph": graph.edge_index}, TypeError, r"graph must be a fastgt\.Graph, got Tensor"),
        ({"node": node[:, 1:]}, ValueError, r"node must be \[N, dim\] = \[9, 8\], got \[9, 7\]"),
        ({"node": node[1:]}, ValueError, r"node must be \[N, dim\] = \[9, 8\], got \[8, 8\]"),
        ({"node": node.float()}, TypeError, r"node must be torch\.float64, as the model is, got"),
        ({"row": [0, 1]}, TypeError, "row must be a tensor of integers, got list"),
        ({"positive": edge.float()}, TypeError, r"positive must hold integers .*, got torch\.fl"),
        ({"negative": edge[None]}, ValueError, r"negative must have one dimension, got \[1, 2\]"),
        ({"row": long}, ValueError, "row must be from 0 to 8, got 9 at 1"),
        ({"negative": -long}, ValueError, "negative must be from 0 to 8, got -9 at 1"),
        ({"positive": edge[:1]}, ValueError, r"positive must be \[2\] as row, got \[1\]"),
        ({"negative": edge[:0]}, ValueError, "negative must have a node at least, got 0"),
        (
            {"row": edge[:0], "positive": edge[:0]},
            ValueError,
            "row must have a node at least, got 0",
        ),
        ({"graph": Graph.batch([graph] * 2)}, ValueError, r"node must be \[N, dim\] = \[18, 8\]"),
        (
            {"graph": Graph.batch([graph] * 2), "node": drawn(18)},
            ValueError,
            "graph must be a single one, got a batch of 2",
        ),
        ({"anchors": []}, ValueError, "anchors must be of 3 layers, got those of 0"),
    ):
        given = {"node": node, "graph": graph} | dict.fromkeys(
            ("row", "positive", "negative"), edge
        )
        with pytest.raises(error, match=message):
            model.link_loss(**given | changes)
    bipartite = Graph.from_edge_index(torch.tensor([[0], [1]], device=DEVICE), (2, 3))
    for call in (
        lambda: model(drawn(2), bipartite),
        lambda: topology_encoding(drawn(2), bipartite),
    ):
        with pytest.raises(ValueError, match="graph must be square, got 2 rows and 3 columns"):
            call()
    with pytest.raises(ValueError, match=r"node must be \[N, dim\] = \[9, dim\], got \[9\]"):
        topology_encoding(node[:, 0], graph)
    with pytest.raises(ValueError, match=r"x must be \[N, 8\], got \[9, 7\]"):
        model.transform(node[:, 1:])
    with pytest.raises(ValueError, match="offsets ends at 8 but there are 9 nodes"):
        model.transform(node, torch.tensor([0, 8], device=DEVICE))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "heads must divide dim, got dim=8 and heads=3"),
        ({"dim": 2048, "heads": 2}, "512 channels at most, got dim=2048 and heads=2"),
        ({"anchors": 0}, "anchors must be positive, got 0"),
        ({"hops": -1}, "hops must not be negative, got -1"),
        ({"dropout": 1.5}, "dropout must be from 0 to 1, got 1.5"),
        ({"attention_dropout": math.nan}, "attention_dropout must be from 0 to 1, got nan"),
        ({"scale": 0.0}, "scale must be positive and finite, got 0.0"),
        ({"slope": math.inf}, "slope must be positive and finite, got inf"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OpenGraphConfig(**SMALL | changes)


def test_anchors_of_other_graphs_are_refused():
    layer, offsets = OpenGraphLayer(DIM, HEADS), torch.tensor([0, 4, 9])
    node, ptr = draw_anchors(offsets, 9, 2)  # two of each
    for given, message in (
        ((node + 6, ptr), "anchors must be from 0 to 8, got"),
        ((node.flip(0), ptr), r"anchor 0 is node [4-8], and its graph has nodes 0 to 3"),
        ((node, ptr[:2]), "ptr of anchors ends at 2 but there are 4 nodes"),
        ((node[:2], ptr[:2]), "anchors must be of 2 graphs, got those of 1"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(torch.zeros(9, DIM), offsets, Anchors(*given))


def test_compiled_whole_with_anchors(compiled_kernels):
    torch._dynamo.reset()
    model = model_of().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for graph in (rough_batch(SIZES), rough_batch([(9, 30), (8, 14)])):
        given = drawn(graph.num_rows), graph
        anchors = anchors_of(graph)
        found, wanted = (f(*given, anchors=anchors) for f in (compiled, model))
        torch.testing.assert_close(found, wanted)


def test_exported_with_anchors(compiled_kernels):
    model, graph = model_of().eval(), rough_batch(SIZES)
    given = {"node": drawn(graph.num_rows), "graph": graph, "anchors": anchors_of(graph)}
    program = torch.export.export(model, (), given)
    torch.testing.assert_close(program.module()(**given), model(**given))

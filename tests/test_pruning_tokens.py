"""TokenPruning: the best nodes of every graph, and nothing of the others."""

import math

import pytest
import torch
from attention_cases import DEVICE, FP64, close
from hypothesis import given
from hypothesis import strategies as st

from fastgt import Graph
from fastgt.nn import NeighborhoodAttention
from fastgt.pruning import TokenPruning


def batch(sizes, seed=0, edges=4):
    """Graphs of those sizes, with a few edges for each node."""
    generator = torch.Generator().manual_seed(seed)
    parts, begin = [], 0
    for n in sizes:
        if n:
            parts.append(torch.randint(n, (2, edges * n), generator=generator) + begin)
        begin += n
    edge_index = torch.cat([torch.zeros(2, 0, dtype=torch.long), *parts], 1)
    order = torch.randperm(edge_index.shape[1], generator=generator)
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    graph = Graph.from_edge_index(edge_index[:, order].to(DEVICE), begin, graph_ptr=ptr.to(DEVICE))
    return graph, torch.randn(begin, 6, generator=generator, dtype=FP64).to(DEVICE)


def pruning(keep, seed=0, **more):
    torch.manual_seed(seed)
    return TokenPruning(6, keep, **more).to(DEVICE, FP64)


def by_loops(scores, sizes, keep):
    """The kept nodes, graph by graph."""
    found, begin = [], 0
    for n in sizes:
        mine = scores[begin : begin + n].tolist()
        count = math.ceil(round(keep * n, 9))
        best = sorted(range(n), key=lambda i: (-mine[i], i))[:count]
        found += [begin + i for i in sorted(best)]
        begin += n
    return found


sizes_of_graphs = st.lists(st.integers(0, 9), min_size=1, max_size=6)
shares = st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.0])


@given(sizes=sizes_of_graphs, keep=shares, seed=st.integers(0, 2**31))
def test_the_best_of_every_graph_are_kept(sizes, keep, seed):
    graph, x = batch(sizes, seed)
    prune = pruning(keep, seed).eval()
    kept = prune(x, graph)
    wanted = by_loops(prune.score(x).squeeze(1), sizes, keep)
    assert kept.nodes.tolist() == wanted
    close(kept.x, x[wanted], "x")
    assert kept.graph.graph_ptr.diff().tolist() == [math.ceil(round(keep * n, 9)) for n in sizes]
    # edges between kept nodes, in the caller's order, under their new numbers
    number = {node: i for i, node in enumerate(wanted)}
    pairs = graph.edge_index.T.tolist()
    inside = [e for e, (a, b) in enumerate(pairs) if a in number and b in number]
    assert kept.edges.tolist() == inside
    assert kept.graph.edge_index.T.tolist() == [
        [number[pairs[e][0]], number[pairs[e][1]]] for e in inside
    ]


@given(sizes=sizes_of_graphs, keep=shares, seed=st.integers(0, 2**31))
def test_training_keeps_as_many_by_chance(sizes, keep, seed):
    graph, x = batch(sizes, seed)
    prune = pruning(keep, seed)
    kept = prune(x, graph)
    assert kept.graph.graph_ptr.diff().tolist() == [math.ceil(round(keep * n, 9)) for n in sizes]
    assert kept.nodes.tolist() == sorted(set(kept.nodes.tolist()))
    assert torch.equal(kept.x, x[kept.nodes])
    # nodes of each graph in its place
    ends = graph.graph_ptr.tolist()
    parts = kept.nodes.tensor_split(kept.graph.graph_ptr[1:-1].long().cpu())
    for part, begin, end in zip(parts, ends, ends[1:], strict=False):
        assert all(begin <= i < end for i in part.tolist())


@given(levels=st.lists(st.integers(0, 2), min_size=1, max_size=12), keep=shares)
def test_of_equal_scores_the_first_is_kept(levels, keep):
    graph, _ = batch([len(levels)])
    x = torch.zeros(len(levels), 6, dtype=FP64, device=DEVICE)
    x[:, 0] = torch.tensor(levels)
    prune = pruning(keep).eval()
    with torch.no_grad():
        prune.score.weight.copy_(torch.eye(6)[:1])
    assert prune(x, graph).nodes.tolist() == by_loops(x[:, 0], [len(levels)], keep)


@given(sizes=sizes_of_graphs, seed=st.integers(0, 2**31))
def test_a_batch_is_its_graphs_one_by_one(sizes, seed):
    graph, x = batch(sizes, seed)
    prune = pruning(0.5).eval()
    kept, begin, parts = prune(x, graph), 0, []
    for n in sizes:
        mine = ((graph.edge_index >= begin) & (graph.edge_index < begin + n)).all(0)
        alone = Graph.from_edge_index(graph.edge_index[:, mine] - begin, n)
        found = prune(x[begin : begin + n], alone)
        edges = mine.nonzero().squeeze(1)[found.edges]
        parts.append((found.x, found.nodes + begin, edges, found.graph))
        begin += n
    xs, nodes, edges, graphs = zip(*parts, strict=True)
    assert torch.equal(kept.x, torch.cat(xs))
    assert torch.equal(kept.nodes, torch.cat(nodes))
    assert torch.equal(kept.edges, torch.cat(edges).sort().values)
    together = Graph.batch(graphs)
    assert torch.equal(kept.graph.col, together.col)
    assert torch.equal(kept.graph.row_ptr, together.row_ptr)
    assert torch.equal(kept.graph.graph_ptr, together.graph_ptr)


@given(sizes=sizes_of_graphs, tau=st.sampled_from([0.3, 1.0, 2.0]), seed=st.integers(0, 2**31))
def test_the_gate_is_1_with_the_gradient_of_the_soft_score(sizes, tau, seed):
    graph, x = batch(sizes, seed)
    prune = pruning(0.5, seed, tau=tau).eval()
    x.requires_grad_()
    kept = prune(x, graph)
    assert torch.equal(kept.x.detach(), x.detach()[kept.nodes])
    do = torch.randn(kept.x.shape, dtype=FP64, device=DEVICE)
    found = torch.autograd.grad((kept.x * do).sum(), [x, *prune.parameters()])
    scores = prune.score(x).squeeze(1)
    soft = torch.cat([(part / tau).softmax(0) for part in scores.split(sizes)])
    loss = ((x[kept.nodes] + x.detach()[kept.nodes] * soft[kept.nodes, None]) * do).sum()
    wanted = torch.autograd.grad(loss, [x, *prune.parameters()])
    for a, b in zip(found, wanted, strict=True):
        close(a, b)
    assert found[1].any() == any(n > 1 for n in sizes)


def test_in_training_the_gradient_has_the_noise():
    """Gradients of one graph's scores sum to 0, and two draws that keep the same nodes differ."""
    graph, x = batch([2], 1)
    prune = pruning(1.0)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        loss = (prune(x, graph).x * torch.tensor([[1.0], [3.0]], device=DEVICE)).sum()
        found.append(torch.autograd.grad(loss, list(prune.parameters())))
    assert not torch.allclose(found[0][0], found[1][0], rtol=1e-3)
    assert abs(float(found[0][1])) < 1e-12


def test_noise_in_training_draws_nodes_by_their_softmax():
    """One node of three is kept as often as Gumbel's noise says: with probability softmax(s)."""
    graph, x = batch([3] * 4000, 0, edges=1)
    x = x[:3].repeat(4000, 1)
    prune = pruning(0.3, 3).train()
    with torch.no_grad():
        prune.score.weight.mul_(2)  # far from even, where a noise of the wrong sign shows
        wanted = prune.score(x[:3]).squeeze(1).softmax(0)
    torch.manual_seed(0)
    found = (prune(x, graph).nodes % 3).bincount(minlength=3) / 4000
    assert ((found - wanted).abs() < 4 * (0.25 / 4000) ** 0.5).all()
    torch.manual_seed(1)
    again = prune(x, graph).nodes
    torch.manual_seed(1)
    assert torch.equal(prune(x, graph).nodes, again)
    assert torch.equal(prune.eval()(x, graph).nodes, prune(x, graph).nodes)


def test_bfloat16_favours_no_place():
    """Of 64 equal nodes the kept one is in either half as often: its noise has no ties."""
    ptr = 64 * torch.arange(4001, device=DEVICE)
    none = torch.zeros(2, 0, dtype=torch.long, device=DEVICE)
    graph = Graph.from_edge_index(none, 64 * 4000, graph_ptr=ptr)
    prune = pruning(1 / 64).bfloat16()
    torch.manual_seed(0)
    kept = prune(torch.ones(64 * 4000, 6, dtype=torch.bfloat16, device=DEVICE), graph)
    assert kept.x.dtype == torch.bfloat16
    first = (kept.nodes % 64 < 32).double().mean()
    assert abs(float(first) - 0.5) < 4 * (0.25 / 4000) ** 0.5


def test_pruned_nodes_take_no_part_in_attention():
    graph, x = batch([8, 7], 2)
    prune, attention = pruning(0.5).eval(), NeighborhoodAttention(6, 2).to(DEVICE, FP64)
    kept = prune(x, graph)
    out = attention(kept.x, kept.graph)
    # as with a -inf bias on edges that touch a pruned node
    inside = torch.zeros(graph.num_edges, dtype=torch.bool, device=DEVICE)
    inside[kept.edges] = True
    bias = torch.where(inside, 0.0, -torch.inf).double()[:, None].expand(-1, 2)
    close(out, attention(x, graph, edge_bias=bias)[kept.nodes], "x")
    # whatever the pruned ones have, but for their scores
    other = x.clone()
    off = torch.ones(15, dtype=torch.bool, device=DEVICE)
    off[kept.nodes] = False
    direction = torch.randn(6, dtype=FP64, device=DEVICE)
    w = prune.score.weight[0].detach()
    other[off] += 100 * (direction - (direction @ w) / (w @ w) * w)
    again = prune(other, graph)
    assert torch.equal(again.nodes, kept.nodes)
    close(attention(again.x, again.graph), out, "x")


def test_nothing_waits_in_what_is_pruned():
    """NaN in a node that is pruned changes nothing, and gets no gradient but 0."""
    graph, x = batch([8, 7, 3], 2)
    prune, attention = pruning(0.5).eval(), NeighborhoodAttention(6, 2).to(DEVICE, FP64)
    kept = prune(x, graph)
    off = torch.ones(18, dtype=torch.bool, device=DEVICE)
    off[kept.nodes] = False
    for bad in (torch.nan, torch.inf, -torch.inf):
        other = x.masked_fill(off[:, None], bad).requires_grad_()
        again = prune(other, graph)
        assert torch.equal(again.nodes, kept.nodes)
        assert torch.equal(again.x, kept.x)
        assert torch.equal(again.edges, kept.edges)
        out = attention(again.x, again.graph)
        assert torch.equal(out, attention(kept.x, kept.graph))
        out.sum().backward()
        assert not other.grad[off].any()
        assert other.grad.isfinite().all()
    # in training too such a node is the last to be taken
    nan = x.index_fill(0, torch.tensor([1, 9, 16], device=DEVICE), torch.nan)
    for seed in range(20):
        torch.manual_seed(seed)
        assert prune.train()(nan, graph).x.isfinite().all()
    # and where there is nothing else, others in the batch do not know
    nan = x.clone()
    nan[:8] = torch.nan
    assert torch.equal(prune.eval()(nan, graph).x[4:], kept.x[4:])


def test_scores_that_overflow_leave_the_gate_1():
    graph, x = batch([4])
    prune = pruning(0.5, tau=0.5).eval()
    with torch.no_grad():
        prune.score.weight.copy_(torch.tensor([[4.0, 0, 0, 0, 0, 0]]))
    for row in (1e308, -1e308, 4e307):  # infinite, and infinite once it is divided by tau
        x[:, 0] = row
        kept = prune(x, graph)
        assert kept.nodes.tolist() == [0, 1]
        assert torch.equal(kept.x, x[:2])


def test_edge_features_follow():
    graph, x = batch([6, 5], 4)
    bias = torch.randn(graph.num_edges, 2, dtype=FP64, device=DEVICE)
    prune, attention = pruning(0.6).eval(), NeighborhoodAttention(6, 2).to(DEVICE, FP64)
    kept = prune(x, graph)
    out = attention(kept.x, kept.graph, edge_bias=bias[kept.edges])
    shut = torch.full_like(bias, -torch.inf)
    shut[kept.edges] = bias[kept.edges]
    close(out, attention(x, graph, edge_bias=shut)[kept.nodes], "x")


def test_a_reordered_graph_keeps_the_same_nodes():
    graph, x = batch([7], 6)
    prune = pruning(0.5).eval()
    kept = prune(x, graph)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    moved = graph.reordered(order)
    again = prune(moved.apply_order(x), moved)
    assert sorted(order[again.nodes].tolist()) == kept.nodes.tolist()
    assert torch.equal(again.edges, kept.edges)
    close(moved.undo_order(again.spread(again.x)), kept.spread(kept.x), "x")


def test_it_is_kept_with_the_model():
    graph, x = batch([9], 7)
    prune, other = pruning(0.5, 0).eval(), pruning(0.5, 1).eval()
    other.load_state_dict(prune.state_dict())
    assert torch.equal(other(x, graph).nodes, prune(x, graph).nodes)
    assert "keep=0.5, tau=1.0" in repr(prune)


def test_spread():
    graph, x = batch([3, 4], 5)
    kept = pruning(0.5).eval()(x, graph)
    whole = kept.spread(kept.x)
    assert torch.equal(whole[kept.nodes], kept.x)
    assert int((whole != 0).any(1).sum()) == len(kept.nodes)
    beside = kept.spread(2 * kept.x, x)
    wanted = x.clone()
    wanted[kept.nodes] *= 2
    assert torch.equal(beside, wanted)
    with pytest.raises(ValueError, match=r"y must be \[K, \.\.\.\] = \[4, \.\.\.\], got \[7, 6\]"):
        kept.spread(x)
    with pytest.raises(ValueError, match=r"others must be \[7, 6\], got \[4, 6\]"):
        kept.spread(kept.x, kept.x)
    with pytest.raises(TypeError, match=r"others is torch\.float32 but y is torch\.float64"):
        kept.spread(kept.x, x.float())


def test_a_share_that_is_a_whole_number_is_not_rounded_up():
    assert 0.07 * 100 > 7  # in floating point
    graph, x = batch([100])
    assert len(pruning(0.07)(x, graph).nodes) == 7


def test_no_nodes_and_one():
    graph, x = batch([0, 1, 0], 0)
    kept = pruning(0.01)(x, graph)
    assert kept.nodes.tolist() == [0]
    assert kept.graph.num_graphs == 3
    for graph in (batch([0, 0], 0)[0], Graph.batch([]).to(DEVICE)):
        kept = pruning(0.5)(x[:0], graph)
        assert kept.x.shape == (0, 6)
        assert kept.graph.num_graphs == graph.num_graphs


def test_refusals():
    for keep in (0.0, -0.5, 1.1, math.nan):
        with pytest.raises(ValueError, match="keep must be above 0, to 1, got"):
            TokenPruning(6, keep)
    for tau in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="tau must be positive and finite, got"):
            TokenPruning(6, tau=tau)
    with pytest.raises(ValueError, match="dim must be positive, got 0"):
        TokenPruning(0)
    graph, x = batch([3])
    with pytest.raises(ValueError, match=r"x must be \[N, dim\] = \[3, 6\], got \[3, 5\]"):
        pruning(0.5)(x[:, :5], graph)
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        pruning(0.5)([1.0], graph)
    with pytest.raises(TypeError, match=r"graph must be a fastgt\.Graph, got Tensor"):
        pruning(0.5)(x, graph.edge_index)
    with pytest.raises(ValueError, match="x is on meta but graph is on"):
        pruning(0.5)(x.to("meta"), graph)
    both = Graph.from_edge_index(torch.zeros(2, 1, dtype=torch.long, device=DEVICE), (3, 2))
    with pytest.raises(ValueError, match="num_nodes needs a square graph, got 3 rows and 2"):
        pruning(0.5)(x, both)
    pair = Graph.batch([both, both.transpose()])
    with pytest.raises(ValueError, match="num_nodes needs square graphs, got a batch of bipartite"):
        pruning(0.5)(x.new_zeros(5, 6), pair)


def test_nodes_are_selected_without_a_graph():
    graph, x = batch([5, 0, 3])
    prune = pruning(0.5).eval()
    kept = prune(x, graph)
    nodes, gate, offsets = prune.select(x, graph.graph_ptr)
    assert torch.equal(nodes, kept.nodes)
    assert torch.equal(x[nodes] * gate[:, None], kept.x)
    assert offsets.tolist() == kept.graph.graph_ptr.tolist() == [0, 3, 3, 5]
    with pytest.raises(ValueError, match=r"x must be \[N, 6\], got \[8, 5\]"):
        prune.select(x[:, 1:], graph.graph_ptr)
    with pytest.raises(ValueError, match="offsets"):
        prune.select(x[1:], graph.graph_ptr)

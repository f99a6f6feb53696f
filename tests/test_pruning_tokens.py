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


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    keep=st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.0]),
    seed=st.integers(0, 2**31),
)
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


def test_a_batch_is_its_graphs_one_by_one():
    sizes = [5, 1, 8]
    graph, x = batch(sizes, 3)
    prune = pruning(0.5).eval()
    kept, begin = prune(x, graph), 0
    parts = []
    for n in sizes:
        mine = ((graph.edge_index >= begin) & (graph.edge_index < begin + n)).all(0)
        alone = Graph.from_edge_index(graph.edge_index[:, mine] - begin, n)
        parts.append(prune(x[begin : begin + n], alone).nodes + begin)
        begin += n
    assert torch.equal(kept.nodes, torch.cat(parts))


def test_the_gate_is_1_with_the_gradient_of_the_soft_score():
    graph, x = batch([4, 3], 1)
    prune = pruning(0.5, tau=0.7).eval()
    x.requires_grad_()
    kept = prune(x, graph)
    assert torch.equal(kept.x.detach(), x.detach()[kept.nodes])
    do = torch.randn(kept.x.shape, dtype=FP64, device=DEVICE)
    found = torch.autograd.grad((kept.x * do).sum(), [x, *prune.parameters()])
    scores = prune.score(x).squeeze(1)
    soft = torch.cat([(part.log_softmax(0) / 0.7).softmax(0) for part in scores.split([4, 3])])
    loss = ((x[kept.nodes] + x.detach()[kept.nodes] * soft[kept.nodes, None]) * do).sum()
    wanted = torch.autograd.grad(loss, [x, *prune.parameters()])
    for a, b in zip(found, wanted, strict=True):
        close(a, b)
    assert found[1].any()


def test_noise_in_training_draws_nodes_by_their_softmax():
    """Of two nodes one is kept as often as Gumbel's noise says: with probability softmax(s)."""
    graph, x = batch([2] * 4000, 0, edges=1)
    x = x[:2].repeat(4000, 1)
    prune = pruning(0.5).train()
    torch.manual_seed(0)
    first = (prune(x, graph).nodes % 2 == 0).double().mean()
    wanted = prune.score(x[:2]).detach().squeeze(1).softmax(0)[0]
    assert abs(float(first - wanted)) < 4 * (0.25 / 4000) ** 0.5
    torch.manual_seed(1)
    again = prune(x, graph).nodes
    torch.manual_seed(1)
    assert torch.equal(prune(x, graph).nodes, again)
    assert torch.equal(prune.eval()(x, graph).nodes, prune(x, graph).nodes)


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


def test_no_nodes_and_one():
    graph, x = batch([0, 1, 0], 0)
    kept = pruning(0.01)(x, graph)
    assert kept.nodes.tolist() == [0]
    assert kept.graph.num_graphs == 3
    graph, x = batch([0, 0], 0)
    assert pruning(0.5)(x, graph).x.shape == (0, 6)


def test_refusals():
    for keep in (0.0, -0.5, 1.1, math.nan):
        with pytest.raises(ValueError, match="keep must be above 0, to 1, got"):
            TokenPruning(6, keep)
    with pytest.raises(ValueError, match=r"tau must be positive, got 0\.0"):
        TokenPruning(6, tau=0.0)
    graph, x = batch([3])
    with pytest.raises(ValueError, match=r"x must be \[N, dim\] = \[3, 6\], got \[3, 5\]"):
        pruning(0.5)(x[:, :5], graph)
    both = Graph.from_edge_index(torch.zeros(2, 1, dtype=torch.long, device=DEVICE), (3, 2))
    with pytest.raises(ValueError, match="num_nodes needs a square graph, got 3 rows and 2"):
        pruning(0.5)(x, both)

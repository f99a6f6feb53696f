"""Exphormer's expanders and patterns against what defines them, edge by edge."""

import math
from itertools import pairwise

import pytest
import torch
from literal_layers import edgeless, rough_batch

from fastgt import Graph
from fastgt.models import expander_table
from fastgt.models.exphormer_graph import exphormer_pattern

FP64 = torch.float64
SIZES = [(12, 30), (0, 0), (7, 20), (1, 1)]
pytestmark = pytest.mark.usefixtures("one_thread")


def edges_of(table, offsets):
    """Both ways, as pairs, one loop at a time."""
    pairs = []
    for first, last in pairwise(offsets):
        for i in range(first, last):
            for j in table[i].tolist():
                if j >= 0:
                    assert j < last - first
                    pairs += [(i, first + j), (first + j, i)]
    return pairs


def second_eigenvalue(pairs, first, last):
    """Of the Laplacian D - A of one graph, the lowest but one."""
    a = torch.zeros(last - first, last - first, dtype=FP64)
    for i, j in pairs:
        if first <= i < last:
            a[i - first, j - first] += 1
    return torch.linalg.eigvalsh(a.sum(1).diag() - a)[1].item()


@pytest.mark.parametrize("cycles", [False, True])
@pytest.mark.parametrize("degree", [2, 3, 5])
def test_expanders_are_regular_and_expand(degree, cycles):
    graph = edgeless(40, 0, 11, 117, 64)
    offsets = graph.graph_ptr.tolist()
    table = expander_table(graph, degree, cycles=cycles, multiset=True)
    assert table.shape == (232, max(degree, 5))
    pairs = edges_of(table, offsets)
    count = torch.zeros(232, dtype=torch.long)
    for i, _ in pairs:
        count[i] += 1
    assert count.eq(2 * degree).all()
    bound = 2 * degree - 2 * math.sqrt(2 * degree - 1) - 0.1
    for first, last in pairwise(offsets):
        for column in table[first:last, :degree].T.tolist():
            assert sorted(column) == list(range(last - first))
            at, seen = 0, 0
            while cycles and column:
                at, seen = column[at], seen + 1
                if at == 0:
                    assert seen == last - first
                    break
        if last > first:
            assert second_eigenvalue(pairs, first, last) > bound - 1e-4


def test_what_does_not_expand_is_drawn_again():
    graph = edgeless(*[30] * 60)
    offsets = graph.graph_ptr.tolist()
    bound = 4 - 2 * math.sqrt(3) - 0.1
    once, several = (
        edges_of(expander_table(graph, 2, tries=tries, multiset=True), offsets)
        for tries in (1, 100)
    )
    for first, last in pairwise(offsets):
        before, after = (second_eigenvalue(x, first, last) for x in (once, several))
        # the bound decides, and what was good enough stays
        assert after > bound - 1e-4
        inside = [[p for p in x if first <= p[0] < last] for x in (once, several)]
        assert (before > bound) == (inside[0] == inside[1]) or abs(before - bound) < 1e-4
    assert once != several


def test_the_best_draw_is_kept_where_none_is_good_enough():
    graph, before = edgeless(*[14] * 60), [0.0] * 60
    bounds = list(pairwise(graph.graph_ptr.tolist()))
    for tries in range(1, 5):
        pairs = edges_of(
            expander_table(graph, 2, tries=tries, multiset=True), graph.graph_ptr.tolist()
        )
        after = [second_eigenvalue(pairs, *ends) for ends in bounds]
        assert all(y > x - 1e-4 for x, y in zip(before, after, strict=True))
        before = after


def test_self_loops_and_duplicates_are_left_out_unless_asked_for():
    graph = edgeless(12, 15, 30)
    offsets = graph.graph_ptr.tolist()
    whole, simple = (expander_table(graph, 5, multiset=multiset) for multiset in (True, False))
    before, after = edges_of(whole, offsets), edges_of(simple, offsets)
    assert len(set(after)) == len(after)
    assert all(i != j for i, j in after)
    assert set(after) == {(i, j) for i, j in before if i != j}
    assert len(before) > len(after)
    assert set(after) == {(j, i) for i, j in after}


def test_small_graphs_get_all_pairs():
    sizes = [*range(12), 13]
    graph = edgeless(*sizes)
    offsets = graph.graph_ptr.tolist()
    for multiset in (False, True):
        # 13 nodes are more than 10, but no more than 13
        pairs = edges_of(expander_table(graph, 13, multiset=multiset), offsets)
        assert len(pairs) == len(set(pairs))
        wanted = {
            (i, j)
            for first, last in pairwise(offsets)
            for i in range(first, last)
            for j in range(first, last)
            if i != j
        }
        assert set(pairs) == wanted


def test_a_seed_draws_the_same_whatever_else_is_in_the_batch():
    seeds = torch.tensor([5, -3, 2**40, 5])
    graph = edgeless(20, 33, 50, 20)
    whole = expander_table(graph, 3, seed=seeds)
    assert torch.equal(whole, expander_table(graph, 3, seed=seeds))
    for g, (first, last) in enumerate(pairwise(graph.graph_ptr.tolist())):
        alone = expander_table(edgeless(last - first), 3, seed=seeds[g : g + 1])
        assert torch.equal(alone, whole[first:last])
    assert torch.equal(whole[:20], whole[-20:])
    assert torch.equal(
        expander_table(graph, 3, seed=7), expander_table(graph, 3, seed=torch.tensor([7, 8, 9, 10]))
    )
    assert not torch.equal(expander_table(graph, 3, seed=7), expander_table(graph, 3, seed=8))


def test_permutations_are_uniform():
    table = expander_table(edgeless(*[11] * 3000), 1, multiset=True, tries=1)
    count = torch.zeros(11, 11)
    count.index_put_((torch.arange(11).repeat(3000), table[:, 0]), torch.ones(1), accumulate=True)
    # chi squared of 100 degrees of freedom
    assert 55 < ((count - 3000 / 11).square() / (3000 / 11)).sum() < 160


def test_a_pattern_is_the_edges_the_expander_and_the_stars():
    graph = rough_batch(SIZES)
    offsets, n = graph.graph_ptr.tolist(), graph.num_rows
    table = expander_table(graph, 3, multiset=True)
    pattern = exphormer_pattern(graph, table, 2)
    assert pattern.graph.num_nodes == n + 2 * 4
    found = [tuple(p) for p in pattern.graph.edge_index.T.tolist()]
    owner = [(i, g) for g, (a, b) in enumerate(pairwise(offsets)) for i in range(a, b)]
    star = [[(i, n + v * 4 + g) for i, g in owner] for v in range(2)]
    wanted = [
        [tuple(p) for p in graph.edge_index.T.tolist()],
        edges_of(table, offsets),
        *(x for s in star for x in (s, [(j, i) for i, j in s])),
    ]
    assert pattern.sizes == tuple(map(len, wanted))
    at = 0
    for kind, part in enumerate(wanted):
        there = found[at : at + len(part)]
        assert sorted(there) == sorted(part) if kind == 1 else there == part
        at += len(part)
    assert at == len(found)


@pytest.mark.parametrize("multiset", [False, True])
def test_the_default_device_changes_nothing(multiset):
    """Expanders are drawn on the CPU also where ``torch.set_default_device`` named another."""
    graph = edgeless(5, 0, 30)
    wanted = expander_table(graph, 3, seed=4, multiset=multiset)
    with torch.device("meta"):
        found = expander_table(graph, 3, seed=4, multiset=multiset)
    assert torch.equal(found, wanted)


def test_what_is_no_graph_or_no_seed_is_refused():
    graph = edgeless(12)
    with pytest.raises(TypeError, match=r"graph must be a fastgt\.Graph, got Tensor"):
        expander_table(torch.zeros(2, 3, dtype=torch.long), 3)
    with pytest.raises(ValueError, match="degree must be positive, got 0"):
        expander_table(graph, 0)
    with pytest.raises(ValueError, match=r"seed must be \[G\] = \[1\] int64, got \[2\]"):
        expander_table(graph, 3, seed=torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="virtual_nodes must not be negative, got -1"):
        exphormer_pattern(graph, None, -1)
    with pytest.raises(TypeError, match="virtual_nodes must be an int, got float"):
        exphormer_pattern(graph, None, 1.5)
    for seed in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match=f"seed must fit in 64 bits, got {seed}"):
            expander_table(graph, 3, seed=seed)
    between = Graph.from_edge_index(torch.tensor([[0], [1]]), (4, 5))
    with pytest.raises(ValueError, match="graph must be square, got 4 rows and 5 columns"):
        expander_table(between, 3)

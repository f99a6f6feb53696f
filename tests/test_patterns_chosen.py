"""Patterns that points, scores or a generator choose, and patterns by head, against loops."""

import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from graph_cases import assert_same, examples, few
from hypothesis import given
from hypothesis import strategies as st
from pattern_cases import (
    Largest,
    all_pairs,
    check_pattern,
    offsets_of,
    sizes_of_batches,
    symmetric,
)
from torch.nn.functional import scaled_dot_product_attention as sdpa

from fastgt import Graph, neighborhood_attention
from fastgt.models import expander_table
from fastgt.patterns import (
    balls,
    band,
    big_bird,
    causal,
    expander,
    fold,
    fold_heads,
    global_tokens,
    groups,
    knn,
    radius,
    random,
    sets,
    top_blocks,
    top_k,
    unfold,
    windows,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = st.integers(0, 2**31)


def best(scores, k):
    """The numbers of the k highest, the lower number first among equal ones."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:k]


def draw_scores(seed, *shape):
    """Few values, so that many are equal."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 4, shape) / 4)


@examples
@given(st.data(), SEEDS, st.integers(0, 3), st.integers(1, 6), st.integers(1, 6))
def test_top_k(data, seed, graphs, rows, cols):
    k = data.draw(st.integers(0, cols))
    scores = draw_scores(seed, max(graphs, 1), rows, cols)
    g = len(scores)
    pairs = [
        (b * rows + i, b * cols + j)
        for b in range(g)
        for i in range(rows)
        for j in sorted(best(scores[b, i].tolist(), k))
    ]
    given = scores if graphs else scores[0]
    found = top_k(given.requires_grad_(), k)
    check_pattern(found, pairs, [rows] * g, [cols] * g)
    assert found.num_edges == g * rows * k


@examples
@given(st.data(), SEEDS, st.integers(0, 2), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_top_blocks(data, seed, graphs, rows, cols, ragged):
    k = data.draw(st.integers(0, cols))
    scores = draw_scores(seed, max(graphs, 1), rows, cols)
    g = len(scores)
    if ragged:
        heights, widths = (
            data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)) for n in (rows, cols)
        )
        block = torch.tensor(offsets_of(heights)), torch.tensor(offsets_of(widths))
    else:
        block = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        heights, widths = [block[0]] * rows, [block[1]] * cols
    of_row = [r for r, n in enumerate(heights) for _ in range(n)]
    of_col = [c for c, n in enumerate(widths) for _ in range(n)]
    chosen = [[best(x.tolist(), k) for x in part] for part in scores]
    pairs = [
        (b * len(of_row) + i, b * len(of_col) + j)
        for b in range(g)
        for i, r in enumerate(of_row)
        for j, c in enumerate(of_col)
        if c in chosen[b][r]
    ]
    given = scores if graphs else scores[0]
    found = top_blocks(given.requires_grad_(), k, block)
    edges = sum(heights[r] * widths[c] for x in chosen for r in range(rows) for c in x[r])
    assert found.num_edges == edges
    if not ragged:
        assert edges == g * rows * k * block[0] * block[1]
    if heights == widths:
        check_pattern(found, pairs, [len(of_row)] * g)
        assert_same(top_blocks(given, k, block[0]), found)
    else:
        rows, cols = [len(of_row)] * g, [len(of_col)] * g
        assert found.edge_index.T.tolist() == [[j, i] for i, j in pairs]
        assert found.graph_ptr.tolist() == offsets_of(rows)
        assert found.col_graph_ptr.tolist() == offsets_of(cols)


def draw_points(seed, count, dimensions, lattice):
    """On a lattice, where many distances are equal, or anywhere."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 4, (count, dimensions)) if lattice else rng.random((count, dimensions))
    return torch.from_numpy(found.astype(np.float64))


def squared(x, y):
    return sum((a - b) ** 2 for a, b in zip(x, y, strict=True))


def near(points, query, k):
    """The numbers of the k nearest points, the lower number first among equally far ones."""
    return sorted(range(len(points)), key=lambda j: (squared(query, points[j]), j))[:k]


def split(x, sizes):
    return [part.tolist() for part in x.split(sizes)]


clouds = st.tuples(SEEDS, st.integers(1, 3), st.booleans())


@examples
@given(st.data(), clouds, sizes_of_batches, st.integers(0, 6))
def test_nearest_points(data, cloud, sizes, k):
    seed, dimensions, lattice = cloud
    points = draw_points(seed, sum(sizes), dimensions, lattice)
    parts = split(points, sizes)
    offsets = torch.tensor(offsets_of(sizes))
    pairs = all_pairs(sizes, lambda g, i, j: j in near(parts[g], parts[g][i], k))
    found = knn(points, k, offsets=offsets, partial=True)
    check_pattern(found, pairs, sizes)
    assert found.num_edges == sum(n * min(k, n) for n in sizes)

    asked = data.draw(st.lists(st.integers(0, 5), min_size=len(sizes), max_size=len(sizes)))
    queries = draw_points(seed + 1, sum(asked), dimensions, lattice)
    starts, firsts = offsets_of(sizes), offsets_of(asked)
    wanted = [
        (firsts[g] + i, starts[g] + j)
        for g, part in enumerate(split(queries, asked))
        for i, query in enumerate(part)
        for j in sorted(near(parts[g], query, k))
    ]
    query_offsets = torch.tensor(firsts)
    more = {"queries": queries, "offsets": offsets, "query_offsets": query_offsets}
    found = knn(points, k, partial=True, **more)
    assert found.edge_index.T.tolist() == [[j, i] for i, j in wanted]
    assert (found.graph_ptr.tolist(), found.col_graph_ptr.tolist()) == (firsts, starts)
    small = [g for g, n in enumerate(sizes) if n < k and asked[g]]
    if small:
        message = f"k={k} is larger than the {sizes[small[0]]} points of graph {small[0]}"
        with pytest.raises(ValueError, match=message):
            knn(points, k, **more)
    else:
        assert_same(knn(points, k, **more), found)


@examples
@given(clouds, sizes_of_batches, st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.integers(0, 4))
def test_points_within_a_radius(cloud, sizes, r, most):
    seed, dimensions, lattice = cloud
    points = draw_points(seed, sum(sizes), dimensions, lattice)
    parts = split(points, sizes)
    offsets = torch.tensor(offsets_of(sizes))

    def within(g, i, j):
        return squared(parts[g][i], parts[g][j]) <= r * r

    pairs = all_pairs(sizes, within)
    check_pattern(radius(points, r, offsets=offsets), pairs, sizes)
    assert symmetric(pairs)
    reach = [
        [j for j in range(len(x)) if within(g, i, j)]
        for g, x in enumerate(parts)
        for i in range(len(x))
    ]
    pairs = all_pairs(
        sizes, lambda g, i, j: within(g, i, j) and j in near(parts[g], parts[g][i], most)
    )
    found = radius(points, r, most=most, offsets=offsets)
    check_pattern(found, pairs, sizes)
    assert found.num_edges == sum(min(len(x), most) for x in reach)


def test_equally_far_points_are_taken_by_number(monkeypatch):
    """More of them than the first question to the tree brings, in several parts."""
    monkeypatch.setattr("fastgt.patterns.points._ROOM", 500)
    found = knn(torch.eye(200), 3).col.view(200, 3)
    assert found.tolist() == [[0, 1, 2]] * 3 + [[0, 1, i] for i in range(3, 200)]
    found = knn(torch.eye(200), 3, queries=torch.zeros(7, 200)).col.view(7, 3)
    assert found.tolist() == [[0, 1, 2]] * 7


def test_points_as_far_apart_as_any_may_be():
    points = torch.tensor([[-1e150, 1e150], [1e150, -1e150], [-1e150, 9e149]], dtype=torch.float64)
    assert knn(points, 2).col.view(3, 2).tolist() == [[0, 2], [1, 2], [0, 2]]
    assert radius(points, 2e149).col.tolist() == [0, 2, 1, 0, 2]
    assert balls(points, 2, partial=True).col.tolist() == [0, 2, 1, 0, 2]


def test_many_points_may_share_a_place():
    """In time that is not that of all pairs."""
    points = torch.zeros(200_000, 2)
    points[0] = 9.0
    found = knn(points, 3).col.view(-1, 3)
    assert found[1:].eq(torch.tensor([1, 2, 3])).all()
    assert found[0].tolist() == [0, 1, 2]


def leaves(points, numbers, size):
    """The leaves of a part of a graph, one after another."""
    count = -(-len(numbers) // size)
    if count <= 1:
        return [numbers]
    spread = [
        max(points[i][a] for i in numbers) - min(points[i][a] for i in numbers)
        for a in range(len(points[0]))
    ]
    axis = spread.index(max(spread))
    ordered = sorted(numbers, key=lambda i: (points[i][axis], i))
    half = min(math.ceil(count / 2) * size, len(numbers))
    return leaves(points, ordered[:half], size) + leaves(points, ordered[half:], size)


@examples
@given(clouds, st.lists(st.integers(0, 14), min_size=1, max_size=3), st.integers(1, 4))
def test_balls(cloud, sizes, size):
    seed, dimensions, lattice = cloud
    points = draw_points(seed, sum(sizes), dimensions, lattice)
    parts = [leaves(x, list(range(len(x))), size) for x in split(points, sizes)]
    pairs = all_pairs(sizes, lambda g, i, j: any(i in leaf and j in leaf for leaf in parts[g]))
    found = balls(points, size, offsets=torch.tensor(offsets_of(sizes)), partial=True)
    check_pattern(found, pairs, sizes)
    assert symmetric(pairs)
    edges = sum(size**2 * (n // size) + (n % size) ** 2 for n in sizes)
    assert found.num_edges == edges


def test_balls_are_near():
    """On a square grid, leaves of 2^m points are its squares and half squares."""
    points = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    assert_same(balls(points, 4), windows((8, 8), 2))
    assert_same(balls(points, 8), windows((8, 8), (2, 4)))


@few
@given(sizes_of_batches, SEEDS)
def test_random(sizes, seed):
    sizes = [n for n in sizes if n]
    degree = min(sizes, default=0) // 2 + 1 if sizes else 0

    def draw():
        return random(
            torch.tensor(offsets_of(sizes)), degree, generator=torch.Generator().manual_seed(seed)
        )

    found = draw()
    kept = set(map(tuple, found.edge_index.flip(0).T.tolist()))
    assert len(kept) == found.num_edges == sum(sizes) * degree
    starts = offsets_of(sizes)
    pairs = all_pairs(sizes, lambda g, i, j: (starts[g] + i, starts[g] + j) in kept)
    check_pattern(found, pairs, sizes)
    assert_same(found, draw())


def test_every_set_of_columns_is_as_likely():
    found = random(5, 3, generator=torch.Generator().manual_seed(0), graphs=400)
    local = found.col.view(-1, 5, 3) - 5 * torch.arange(400)[:, None, None]
    for row in local.unbind(1):
        sets, counts = row.unique(dim=0, return_counts=True)
        assert len(sets) == 10
        # each is binomial of 400 and 1 / 10: 40 on average, with a deviation of 6
        assert counts.min() > 40 - 24
        assert counts.max() < 40 + 24


@few
@given(sizes_of_batches.map(lambda x: [3 * n for n in x]), st.integers(2, 4), SEEDS, st.booleans())
def test_expander(sizes, degree, seed, cycles):
    offsets = torch.tensor(offsets_of(sizes))
    found = expander(offsets, degree, cycles=cycles, seed=seed)
    table = expander_table(Graph.complete(offsets), degree, cycles=cycles, seed=seed).tolist()
    there = set()
    for i, others in enumerate(table):
        first = max(start for start in offsets_of(sizes) if start <= i)
        there |= {(i, first + j) for j in others if j >= 0}
    there |= {(j, i) for i, j in there}
    check_pattern(found, sorted(there), sizes)
    assert found.num_edges == 2 * sum(j >= 0 for others in table for j in others)
    for (a, b), n in zip(pairwise(offsets_of(sizes)), sizes, strict=True):
        if n <= 10:
            assert found.row_degree[a:b].tolist() == [n - 1] * n
    assert not any(i == j for i, j in there)


def blocks_seen(count, window, ends, drawn):
    """Of each block, those that it attends to; drawn has those beside the rule."""
    seen = []
    for b in range(count):
        if b < ends or b >= count - ends:
            seen.append(set(range(count)))
            continue
        rule = {c for c in range(count) if c < ends or c >= count - ends}
        rule |= {c for c in range(count) if abs(b - c) <= (window - 1) / 2}
        seen.append(rule | drawn[b])
    return seen


@examples
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=3),
    st.integers(1, 3),
    st.sampled_from([1, 3, 5]),
    st.integers(0, 2),
    st.integers(0, 4),
    SEEDS,
)
def test_big_bird(sizes, block, window, ends, drawn, seed):
    def draw():
        generator = torch.Generator().manual_seed(seed)
        options = {"window": window, "globals": ends, "random": drawn, "generator": generator}
        return big_bird(torch.tensor(offsets_of(sizes)), block, **options)

    found = draw()
    starts = offsets_of(sizes)
    edges = set(map(tuple, found.edge_index.flip(0).T.tolist()))
    # what is seen beside the rule is drawn: whole blocks, as many as there are to draw
    rules, total = [], 0
    for start, n in zip(starts, sizes, strict=False):
        count = -(-n // block)
        rule = blocks_seen(count, window, ends, [set()] * count)
        more = []
        for b in range(count):
            row = start + b * block
            seen = {c for c in range(count) if (row, start + c * block) in edges}
            more.append(seen - rule[b])
            left = count - len(rule[b])
            assert len(more[b]) == min(drawn, left)
        rules.append(blocks_seen(count, window, ends, more))
        g = min(2 * ends, count)
        pairs = g * count
        for b in range(ends, count - ends):
            c = sum(abs(b - other) < (window + 1) / 2 for other in range(ends, count - ends))
            pairs += g + c + min(drawn, count - g - c)
        total += block**2 * pairs
    pairs = all_pairs(sizes, lambda g, i, j: j // block in rules[g][i // block])
    check_pattern(found, pairs, sizes)
    if not any(n % block for n in sizes):
        assert found.num_edges == total
    most = 4 * ends + window + drawn
    assert found.num_edges <= sum(sizes) * block * most
    assert drawn or symmetric(pairs)
    assert_same(found, draw())


@pytest.mark.parametrize(
    ("block", "options"),
    [
        (2, {"window": 2**40 + 1}),
        (2, {"globals": 2**40}),
        (2, {"window": 1, "globals": 0, "random": 2**40}),
        (2**63 - 1, {}),
    ],
)
def test_more_blocks_than_there_are_is_all_of_them(block, options):
    """In the memory of the edges."""
    offsets = torch.tensor([0, 40, 40, 47])
    with Largest() as made:
        found = big_bird(offsets, block, **options)
    assert_same(found, Graph.complete(offsets))
    assert made.elements <= 2 * (found.num_edges + found.num_rows)


def test_nothing_is_drawn_of_pytorchs_generator_that_is_not_asked_for():
    graph, generator = Graph.complete(torch.tensor([0, 20])), torch.Generator()
    before = torch.get_rng_state()
    big_bird(40, 2, random=0)
    big_bird(40, 2, generator=generator)
    random(40, 2, generator=generator)
    expander(40, 2)
    expander_table(graph, 2)
    assert torch.equal(torch.get_rng_state(), before)
    big_bird(40, 2)
    assert not torch.equal(torch.get_rng_state(), before)


def test_equal_graphs_of_a_batch_have_one_pattern_of_big_bird():
    alone, both = (
        big_bird(40, 2, generator=torch.Generator().manual_seed(1), graphs=n) for n in (1, 2)
    )
    assert_same(Graph.batch([alone, alone]), both)
    other = big_bird(40, 2, generator=torch.Generator().manual_seed(2))
    assert other.col.tolist() != alone.col.tolist()


def test_heads_have_patterns_of_their_own():
    """Folded attention is SDPA with a mask and a bias a head, gradients too."""
    torch.manual_seed(0)
    graphs = [causal(7), band(7, 1, 2), Graph.complete(torch.tensor([0, 7]))]
    folded = fold_heads(graphs)
    pairs = [
        (h * 7 + i, h * 7 + j)
        for h, graph in enumerate(graphs)
        for j, i in graph.edge_index.T.tolist()
    ]
    check_pattern(folded, pairs, [7] * 3)
    assert folded.num_edges == sum(graph.num_edges for graph in graphs)
    for each in (1, 2):
        q, k, v = torch.randn(3, 7, 3 * each, 5, dtype=torch.float64).requires_grad_().unbind()
        bias = torch.randn(len(pairs), each, dtype=torch.float64, requires_grad=True)
        dense = []
        for h in range(3 * each):
            mask = torch.full((7, 7), -torch.inf, dtype=torch.float64)
            for e, (i, j) in enumerate(pairs):
                if i // 7 == h // each:
                    mask = mask.index_put(
                        (torch.tensor(i % 7), torch.tensor(j % 7)), bias[e, h % each]
                    )
            dense.append(mask)
        wanted = sdpa(*(x.transpose(0, 1) for x in (q, k, v)), torch.stack(dense))
        wanted = wanted.transpose(0, 1)
        parts = [fold(x, 3) for x in (q, k, v)]
        assert [x.shape for x in parts] == [(21, each, 5)] * 3
        found = unfold(neighborhood_attention(*parts, folded, edge_bias=bias), 3)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        upstream = torch.randn_like(found)
        inputs = q, k, v, bias
        ours, theirs = (torch.autograd.grad(x, inputs, upstream) for x in (found, wanted))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    x = torch.randn(4, 6, 3)
    assert fold(x).shape == (24, 1, 3)
    assert torch.equal(fold(x)[4 * 5 + 2, 0], x[2, 5])
    assert torch.equal(unfold(fold(x), 6), x)
    assert torch.equal(unfold(fold(x.transpose(0, 1)), 4), x.transpose(0, 1))


def test_scores_of_heads_are_a_pattern_a_head():
    scores = torch.randn(3, 5, 5)
    assert_same(top_k(scores, 2), fold_heads([top_k(x, 2) for x in scores]))


EMPTY = {
    "top_k": lambda: top_k(torch.zeros(0, 3, 3), 2),
    "top_blocks": lambda: top_blocks(torch.zeros(0, 3, 3), 2, 4),
    "knn": lambda: knn(torch.zeros(0, 2), 3, offsets=torch.tensor([0])),
    "radius": lambda: radius(torch.zeros(0, 2), 1.0, offsets=torch.tensor([0])),
    "balls": lambda: balls(torch.zeros(0, 2), 4, offsets=torch.tensor([0])),
    "random": lambda: random(torch.tensor([0]), 3),
    "expander": lambda: expander(torch.tensor([0]), 3),
    "big_bird": lambda: big_bird(torch.tensor([0]), 2),
    "band": lambda: band(torch.tensor([0]), 2, 2),
    "groups": lambda: groups(torch.zeros(0).long(), offsets=torch.tensor([0])),
    "sets": lambda: sets(torch.zeros(0).long(), 4, offsets=torch.tensor([0])),
    "global_tokens": lambda: global_tokens(Graph.batch([]), 2),
}


@pytest.mark.parametrize("pattern", EMPTY)
def test_a_batch_of_no_graphs(pattern):
    check_pattern(EMPTY[pattern](), [], [])


def test_scores_without_rows_or_columns():
    check_pattern(top_k(torch.zeros(0, 3), 2), [], [0], [3])
    check_pattern(top_k(torch.zeros(3, 0), 0), [], [3], [0])
    check_pattern(top_blocks(torch.zeros(0, 3), 2, 4), [], [0], [12])


def cloud(nodes):
    return torch.rand(nodes, 3, generator=torch.Generator().manual_seed(0))


NODES = 2**13
LARGE = {
    "knn": lambda: knn(cloud(NODES), 8),
    "radius": lambda: radius(cloud(NODES), 0.06),
    "balls": lambda: balls(cloud(NODES), 16),
    "random": lambda: random(NODES, 8),
    "expander": lambda: expander(NODES, 4, tries=1),
    "big_bird": lambda: big_bird(NODES, 2),
    "top_blocks": lambda: top_blocks(torch.rand(NODES // 64, NODES // 64), 1, 64),
    "fold_heads": lambda: fold_heads([band(NODES // 4, 2, 2)] * 4),
}


@pytest.mark.parametrize("pattern", LARGE)
def test_no_tensor_is_larger_than_edges(pattern):
    with Largest() as made:
        graph = LARGE[pattern]()
    assert graph.num_edges <= 64 * NODES
    assert made.elements <= 2 * (graph.num_edges + graph.num_rows)


SCORES = torch.zeros(2, 3)
POINTS = torch.zeros(4, 2)
BAD = [
    (lambda: top_k(SCORES, 4), ValueError, "k=4 is larger than the 3 columns of scores"),
    (lambda: top_k(SCORES, -1), ValueError, "k must not be negative, got -1"),
    (lambda: top_k(SCORES.long(), 1), TypeError, "scores must be float16, bfloat16, float32 or"),
    (lambda: top_k(SCORES[0], 1), ValueError, "scores must be [M, N] or [G, M, N], got [3]"),
    (lambda: top_k(SCORES + torch.nan, 1), ValueError, "scores must not be NaN, got one at [0, 0]"),
    (lambda: top_blocks(SCORES, 4, 2), ValueError, "k=4 is larger than the 3 blocks of columns"),
    (lambda: top_blocks(SCORES, 1, 0), ValueError, "block must be positive, got 0"),
    (lambda: top_blocks(SCORES, 1, (2, 2, 2)), ValueError, "block must be one, or a pair (rows, c"),
    (
        lambda: top_blocks(SCORES, 1, torch.tensor([0, 2, 4])),
        ValueError,
        "block has boundaries of 2 blocks but scores has 3 of columns",
    ),
    (
        lambda: top_blocks(SCORES, 1, 2**62),
        ValueError,
        f"block gives {2**63} nodes in each of 1 graphs: all must fit in 64 bits",
    ),
    (
        lambda: top_blocks(SCORES.expand(2, 2, 3), 1, (torch.tensor([0, 1, 2**62]), 1)),
        ValueError,
        f"block gives {2**62} nodes in each of 2 graphs: all must fit in 64 bits",
    ),
    (lambda: random(2**62, 0, graphs=4), ValueError, f"n gives {2**62} nodes in each of 4"),
    (lambda: knn(POINTS, 5), ValueError, "k=5 is larger than the 4 points of graph 0"),
    (lambda: knn(POINTS.long(), 1), TypeError, "points must be float16, bfloat16, float32 or"),
    (lambda: knn(POINTS[0], 1), ValueError, "points must be [N, dimensions], got [2]"),
    (lambda: knn(POINTS + torch.inf, 1), ValueError, "points must be finite, got inf at [0, 0]"),
    (
        lambda: knn(POINTS.double() - 1e200, 1),
        ValueError,
        "points must be from -1e+150 to 1e+150, got -1e+200 at [0, 0]",
    ),
    (
        lambda: radius(POINTS, 1.0, queries=torch.full((1, 2), 1.1e150, dtype=torch.float64)),
        ValueError,
        "queries must be from -1e+150 to 1e+150, got 1.1e+150 at [0, 0]",
    ),
    (
        lambda: knn(POINTS, 1, queries=torch.zeros(2, 3)),
        ValueError,
        "queries has 3 dimensions but points has 2",
    ),
    (
        lambda: knn(POINTS, 1, query_offsets=torch.tensor([0, 4])),
        ValueError,
        "query_offsets needs queries, which is None",
    ),
    (
        lambda: knn(POINTS, 1, queries=POINTS, offsets=torch.tensor([0, 4])),
        ValueError,
        "offsets and query_offsets go together, but query_offsets is None",
    ),
    (
        lambda: knn(
            POINTS,
            1,
            queries=POINTS,
            offsets=torch.tensor([0, 4]),
            query_offsets=torch.tensor([0, 2, 4]),
        ),
        ValueError,
        "offsets are of 1 graphs but query_offsets of 2",
    ),
    (
        lambda: knn(POINTS, 1, offsets=torch.tensor([0, 3])),
        ValueError,
        "offsets ends at 3 but there are 4 nodes",
    ),
    (lambda: radius(POINTS, -1.0), ValueError, "r must be finite and not negative, got -1.0"),
    (lambda: radius(POINTS, math.nan), ValueError, "r must be finite and not negative, got nan"),
    (lambda: radius(POINTS, "1"), TypeError, "r must be a number, got str"),
    (lambda: radius(POINTS, 1.0, most=-1), ValueError, "most must not be negative, got -1"),
    (lambda: balls(POINTS, 3), ValueError, "size=3 does not divide the 4 nodes of graph 0"),
    (lambda: balls(POINTS, 0), ValueError, "size must be positive, got 0"),
    (lambda: random(4, 5), ValueError, "degree=5 is larger than the 4 nodes of graph 0"),
    (lambda: random(4, 1, generator=3), TypeError, "generator must be a torch.Generator or None"),
    (lambda: expander(20, 0), ValueError, "degree must be positive, got 0"),
    (lambda: expander(20, 3, seed=torch.zeros(2)), ValueError, "seed must be [G] = [1] int64"),
    (lambda: big_bird(20, 2, window=2), ValueError, "window must be odd, got 2"),
    (lambda: big_bird(20, 2, globals=-1), ValueError, "globals must not be negative, got -1"),
    (lambda: big_bird(20, 0), ValueError, "block must be positive, got 0"),
    (lambda: big_bird(20, 2, generator=1), TypeError, "generator must be a torch.Generator or"),
    (lambda: fold_heads([]), ValueError, "graphs must be one at least, got none"),
    (lambda: fold_heads([causal(2), 3]), TypeError, "graphs[1] must be a Graph, got int"),
    (
        lambda: fold_heads([causal(2), causal(3)]),
        ValueError,
        "graphs[0] has 2 rows and 2 columns, graphs[1] has 3 and 3",
    ),
    (lambda: fold(torch.zeros(2, 3)), ValueError, "x must be [N, H, D], got [2, 3]"),
    (lambda: fold(torch.zeros(2, 3, 4), 2), ValueError, "patterns=2 must divide the 3 heads of x"),
    (lambda: unfold(torch.zeros(5, 1, 4), 2), ValueError, "patterns=2 must divide the 5 rows of x"),
    (lambda: unfold(torch.zeros(5, 1), 2), ValueError, "x must be [P N, H / P, D], got [5, 1]"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[x[2] for x in BAD])
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()

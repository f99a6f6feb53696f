"""Patterns of grids, sequences, sets and tokens against loops over all pairs of nodes."""

import math
import re
from itertools import pairwise

import pytest
import torch
from graph_cases import examples
from hypothesis import given
from hypothesis import strategies as st
from pattern_cases import (
    Largest,
    all_pairs,
    check_pattern,
    coordinates,
    offsets_of,
    shapes,
    sizes_of_batches,
    symmetric,
)

from fastgt import Graph, neighborhood_attention
from fastgt.patterns import (
    axial,
    band,
    causal,
    dilated,
    global_tokens,
    groups,
    neighborhood,
    sets,
    stripes,
    windows,
)
from fastgt.testing import random_batch

pytestmark = pytest.mark.usefixtures("one_thread")
BATCHES = st.integers(1, 3)


def each(shape, low, high):
    """An integer for each axis, from low to what high gives of it."""
    return st.tuples(*[st.integers(low, high(n)) for n in shape])


def squares(parts):
    return sum(n * n for n in parts)


@examples
@given(st.data(), shapes, BATCHES)
def test_windows(data, shape, graphs):
    window = data.draw(each(shape, 1, lambda n: n + 1))
    shift = tuple(data.draw(st.integers(0, w - 1)) for w in window)
    at = coordinates(shape)

    def rule(_, i, j):
        return all(
            math.floor((x - s) / w) == math.floor((y - s) / w)
            for x, y, w, s in zip(at[i], at[j], window, shift, strict=True)
        )

    pairs = all_pairs([len(at)] * graphs, rule)
    found = windows(shape, window, shift=shift, partial=True, graphs=graphs)
    check_pattern(found, pairs, [len(at)] * graphs)
    assert symmetric(pairs)
    # sizes of the windows along each axis: the first up to the shift, the last one what is left
    edges = 1
    for n, w, s in zip(shape, window, shift, strict=True):
        whole, rest = divmod(max(n - s, 0), w)
        edges *= squares([min(s, n), *[w] * whole, rest])
    assert found.num_edges == graphs * edges


@pytest.mark.parametrize(("shape", "window"), [((6, 4), 2), ((6, 4), (3, 4)), ((8,), (4,))])
def test_whole_windows_have_as_many_edges_a_node(shape, window):
    each_axis = window if isinstance(window, tuple) else (window,) * len(shape)
    degree = windows(shape, window).row_degree
    assert degree.tolist() == [math.prod(each_axis)] * math.prod(shape)


def test_shifted_windows_are_swins_mask():
    """Swin rolls the image back, and its mask keeps apart what was not together before."""
    height, width, window, shift = 8, 12, 4, 2
    region = torch.zeros(height, width, dtype=torch.long)
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for number, (rows, cols) in enumerate((a, b) for a in cuts for b in cuts):
        region[rows, cols] = number
    seen = torch.zeros(height * width, height * width, dtype=torch.bool)
    node = torch.arange(height * width).view(height, width).roll((-shift, -shift), (0, 1))
    for top in range(0, height, window):
        for left in range(0, width, window):
            part = slice(top, top + window), slice(left, left + window)
            nodes, regions = node[part].flatten(), region[part].flatten()
            together = regions[:, None] == regions
            seen[nodes[:, None].expand_as(together), nodes.expand_as(together)] |= together
    pairs = [tuple(pair) for pair in seen.nonzero().tolist()]
    check_pattern(windows((height, width), window, shift=shift), pairs, [height * width])


@examples
@given(st.data(), shapes, BATCHES)
def test_dilated(data, shape, graphs):
    window = data.draw(each(shape, 1, lambda n: n))
    dilation = data.draw(each(shape, 1, lambda n: n))
    at = coordinates(shape)

    def rule(_, i, j):
        return all(
            x // (w * d) == y // (w * d) and x % d == y % d
            for x, y, w, d in zip(at[i], at[j], window, dilation, strict=True)
        )

    pairs = all_pairs([len(at)] * graphs, rule)
    found = dilated(shape, window, dilation, partial=True, graphs=graphs)
    check_pattern(found, pairs, [len(at)] * graphs)
    assert symmetric(pairs)
    if not any(n % (w * d) for n, w, d in zip(shape, window, dilation, strict=True)):
        assert found.num_edges == graphs * len(at) * math.prod(window)


def test_one_dilated_window_is_the_grid_of_maxvit():
    """MaxViT makes an image [g, H / g, g, W / g]: those at one place of both gaps are together."""
    image = torch.arange(6 * 4).view(2, 3, 2, 2)
    pairs = []
    for a in range(3):
        for b in range(2):
            nodes = image[:, a, :, b].flatten().tolist()
            pairs += [(i, j) for i in nodes for j in nodes]
    check_pattern(dilated((6, 4), 2, (3, 2)), sorted(pairs), [24])


@examples
@given(st.data(), shapes, BATCHES)
def test_stripes_and_lines(data, shape, graphs):
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    n = shape[axis]
    width = data.draw(st.integers(1, n + 1))
    at, sizes = coordinates(shape), [math.prod(shape)] * graphs
    pairs = all_pairs(sizes, lambda _, i, j: at[i][axis] // width == at[j][axis] // width)
    found = stripes(shape, width, axis, partial=True, graphs=graphs)
    check_pattern(found, pairs, sizes)
    assert symmetric(pairs)
    if n % width == 0:
        assert found.num_edges == graphs * sizes[0] ** 2 * width // n

    others = [a for a in range(len(shape)) if a != axis % len(shape)]
    pairs = all_pairs(sizes, lambda _, i, j: all(at[i][a] == at[j][a] for a in others))
    found = axial(shape, axis, graphs=graphs)
    check_pattern(found, pairs, sizes)
    assert symmetric(pairs)
    assert found.num_edges == graphs * sizes[0] * n


def neighbours(n, window, dilation, x):
    """The window around x, moved node by node until it is within the grid."""
    low = x - dilation * (window // 2)
    while low < 0:
        low += dilation
    while low + dilation * (window - 1) >= n:
        low -= dilation
    return [low + dilation * t for t in range(window)]


@examples
@given(st.data(), shapes, BATCHES)
def test_neighborhood(data, shape, graphs):
    window = data.draw(each(shape, 1, lambda n: n))
    dilation = tuple(data.draw(st.integers(1, n // w)) for n, w in zip(shape, window, strict=True))
    at = coordinates(shape)

    def rule(_, i, j):
        axes = zip(shape, window, dilation, at[i], at[j], strict=True)
        return all(y in neighbours(n, w, d, x) for n, w, d, x, y in axes)

    sizes = [len(at)] * graphs
    pairs = all_pairs(sizes, rule)
    found = neighborhood(shape, window, dilation=dilation, graphs=graphs)
    check_pattern(found, pairs, sizes)
    assert found.row_degree.tolist() == [math.prod(window)] * sum(sizes)
    assert not symmetric(all_pairs([4], lambda _, i, j: j in neighbours(4, 3, 1, i)))


@examples
@given(sizes_of_batches, st.integers(0, 10), st.integers(0, 10), st.booleans())
def test_bands(sizes, before, after, equal):
    if equal:
        sizes, after = sizes[:1] * len(sizes), before
    n = {"n": torch.tensor(offsets_of(sizes))}
    if equal:
        n = {"n": sizes[0], "graphs": len(sizes)}
    pairs = all_pairs(sizes, lambda _, i, j: i - before <= j <= i + after)
    found = band(**n, before=before, after=after)
    check_pattern(found, pairs, sizes)
    assert symmetric(pairs) or before != after
    edges = 0
    for size in sizes:
        b, a = min(before, size - 1), min(after, size - 1)
        edges += size * (b + a + 1) - (b * (b + 1) + a * (a + 1)) // 2
    assert found.num_edges == edges

    pairs = all_pairs(sizes, lambda _, i, j: j <= i)
    found = causal(**n)
    check_pattern(found, pairs, sizes)
    assert found.num_edges == sum(size * (size + 1) // 2 for size in sizes)
    assert not symmetric(pairs) or max(sizes) < 2
    pairs = all_pairs(sizes, lambda _, i, j: 0 <= i - j < before + 1)
    found = causal(**n, window=before + 1)
    check_pattern(found, pairs, sizes)
    least = [min(before + 1, size) for size in sizes]
    edges = [s * w - w * (w - 1) // 2 for s, w in zip(sizes, least, strict=True)]
    assert found.num_edges == sum(edges)


@examples
@given(st.data(), sizes_of_batches)
def test_groups(data, sizes):
    label = data.draw(st.lists(st.integers(-2, 2), min_size=sum(sizes), max_size=sum(sizes)))
    starts = offsets_of(sizes)
    pairs = all_pairs(sizes, lambda g, i, j: label[starts[g] + i] == label[starts[g] + j])
    dtype = data.draw(st.sampled_from([torch.int64, torch.int8]))
    found = groups(torch.tensor(label, dtype=dtype), offsets=torch.tensor(starts))
    check_pattern(found, pairs, sizes)
    assert symmetric(pairs)
    parts = [label[a:b] for a, b in pairwise(starts)]
    assert found.num_edges == sum(squares(map(x.count, set(x))) for x in parts)
    together = groups(torch.tensor(label, dtype=dtype))
    check_pattern(
        together, all_pairs([sum(sizes)], lambda _, i, j: label[i] == label[j]), [sum(sizes)]
    )


@examples
@given(st.data(), sizes_of_batches, st.integers(1, 5))
def test_sets(data, sizes, size):
    starts = offsets_of(sizes)
    local = [data.draw(st.permutations(range(n))) for n in sizes]
    order = torch.tensor([starts[g] + i for g, x in enumerate(local) for i in x], dtype=torch.int64)
    pairs = all_pairs(sizes, lambda g, i, j: local[g].index(i) // size == local[g].index(j) // size)
    found = sets(order, size, offsets=torch.tensor(starts), partial=True)
    check_pattern(found, pairs, sizes)
    assert symmetric(pairs)
    edges = sum(size**2 * (n // size) + (n % size) ** 2 for n in sizes)
    assert found.num_edges == edges
    whole = [n % size == 0 for n in sizes]
    if all(whole):
        assert torch.equal(sets(order, size, offsets=torch.tensor(starts)).col, found.col)
    else:
        n = sizes[whole.index(False)]
        message = f"size={size} does not divide the {n} nodes of graph {whole.index(False)}"
        with pytest.raises(ValueError, match=message):
            sets(order, size, offsets=torch.tensor(starts))


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("plain", [False, True])
def test_global_tokens(tokens, plain):
    sizes = [(3, 7), (0, 0), (1, 2), (6, 0)]
    before = random_batch(0, sizes)
    if plain:
        before = windows((2, 3), (2, 1))
    ends = before.graph_ptr.tolist()
    place = [i + g * tokens for g in range(len(ends) - 1) for i in range(ends[g], ends[g + 1])]
    after = [end + g * tokens for g, end in enumerate(ends)]
    found = global_tokens(before, tokens)
    source, target = found.edge_index.tolist()
    pairs = list(zip(target, source, strict=True))
    # the graph's own edges stand first, in their order
    kept = [(place[i], place[j]) for j, i in before.edge_index.T.tolist()]
    assert pairs[: len(kept)] == kept
    new, edges = [], before.num_edges
    for g in range(len(ends) - 1):
        nodes = range(after[g], after[g + 1])
        mine = nodes[len(nodes) - tokens :]
        new += [(i, j) for i in nodes for j in nodes if i in mine or j in mine]
        edges += 2 * (len(nodes) - tokens) * tokens + tokens**2
    assert sorted(pairs[len(kept) :]) == sorted(new)
    assert found.num_edges == edges
    check_pattern(found, pairs, [b - a for a, b in pairwise(after)])
    assert symmetric(pairs) == symmetric(kept)


def test_edges_keep_their_numbers_when_tokens_come():
    """A bias on the graph's edges, and one on the further ones, stand one after another."""
    torch.manual_seed(0)
    graph = band(5, 1, 0)
    found = global_tokens(graph, 1)
    x = torch.randn(6, 1, 4, dtype=torch.float64)
    bias = torch.randn(found.num_edges, 1, dtype=torch.float64)
    bias[graph.num_edges :] = -torch.inf
    out = neighborhood_attention(x, x, x, found, edge_bias=bias)
    alone = neighborhood_attention(
        x[:5], x[:5], x[:5], graph, edge_bias=bias[: graph.num_edges].contiguous()
    )
    torch.testing.assert_close(out[:5], alone, rtol=1e-12, atol=1e-12)


NODES = 2**14
LARGE = {
    "windows": lambda: windows((128, 128), 4, shift=2),
    "dilated": lambda: dilated((128, 128), 4, 32),
    "stripes": lambda: stripes((NODES // 8, 8), 2, 0),
    "axial": lambda: axial((NODES // 16, 4, 4), 1),
    "neighborhood": lambda: neighborhood((128, 128), 5, dilation=3),
    "band": lambda: band(NODES, 9, 9),
    "causal": lambda: causal(NODES, window=16),
    "sets": lambda: sets(torch.arange(NODES).flip(0), 16),
    "global_tokens": lambda: global_tokens(band(NODES, 4, 4), 4),
}


@pytest.mark.parametrize("pattern", LARGE)
def test_time_and_memory_are_linear_in_edges(pattern):
    with Largest() as made:
        graph = LARGE[pattern]()
    linear = graph.num_edges + graph.num_rows
    assert graph.num_edges < 40 * NODES
    # edge_index has two numbers an edge
    assert made.elements <= 2 * linear
    assert made.bytes <= 200 * linear


BAD = [
    (lambda: windows(4, 2), TypeError, "shape must be a tuple of ints, got int"),
    (lambda: windows((), 2), ValueError, "shape must have one axis at least, got none"),
    (lambda: windows((4, 0), 2), ValueError, r"shape\[1\] must be positive, got 0"),
    (lambda: windows((4, 4.0), 2), TypeError, r"shape\[1\] must be an int, got float 4.0"),
    (lambda: windows((4, 4), (2, 2, 2)), ValueError, "window has 3 numbers but shape has 2"),
    (lambda: windows((4, 4), 0), ValueError, "window must be positive, got 0"),
    (lambda: windows((4, 4), 2, shift=2), ValueError, "shift must be below window=2, got 2"),
    (lambda: windows((4, 4), 2, shift=-1), ValueError, "shift must not be negative, got -1"),
    (lambda: windows((4, 4), 2, graphs=0), ValueError, "graphs must be positive, got 0"),
    (lambda: windows((4, 6), 4), ValueError, "window of 4 does not divide the 6 nodes"),
    (lambda: dilated((8, 8), 2, 3), ValueError, "window times dilation of 6 does not divide the 8"),
    (
        lambda: dilated((8,), 2**62, 4, partial=True),
        ValueError,
        f"window times dilation must fit in 64 bits, got {2**64}",
    ),
    (lambda: dilated((8, 8), 2, 0), ValueError, "dilation must be positive, got 0"),
    (lambda: stripes((8, 8), 3, 0), ValueError, "width of 3 does not divide the 8 nodes"),
    (lambda: stripes((8, 8), 2, 2), ValueError, "axis must be from -2 to 1, got 2"),
    (lambda: axial((8, 8), 1.0), TypeError, "axis must be an int, got float"),
    (
        lambda: neighborhood((8, 6), 3, dilation=3),
        ValueError,
        "window=3 times dilation=3 must not be larger than the grid's 8 nodes along axis 0",
    ),
    (lambda: band(4, -1, 0), ValueError, "before must not be negative, got -1"),
    (lambda: causal(-1), ValueError, "n must not be negative, got -1"),
    (lambda: causal(4, window=0), ValueError, "window must be positive, got 0"),
    (lambda: causal(2**62, graphs=4), ValueError, f"n gives {2**62} nodes in each of 4 graphs"),
    (lambda: causal(torch.tensor([0, 3, 2])), ValueError, "n decreases from 3 to 2 at 2"),
    (
        lambda: causal(torch.tensor([5, 7])),
        ValueError,
        "n must start at 0, got 5: it takes boundaries, not sizes",
    ),
    (lambda: causal(torch.tensor([0, 3]), graphs=2), ValueError, "graphs must be 1 where n has"),
    (lambda: causal(torch.tensor(5)), ValueError, "n must be [G + 1], got []"),
    (lambda: causal(torch.zeros(2, 2).long()), ValueError, "n must be [G + 1], got [2, 2]"),
    (lambda: causal([0, 5]), TypeError, "n must be an int, got list"),
    (lambda: causal(torch.tensor([0.0, 3.0])), TypeError, "n must be int32 or int64, got torch.fl"),
    (lambda: causal(torch.tensor([0, math.nan])), TypeError, "n must be int32 or int64, got torch"),
    (lambda: groups([1, 2]), TypeError, "label must be a tensor of integers, got list"),
    (lambda: groups(torch.zeros(2, 2).long()), ValueError, r"label must be \[N\], got \[2, 2\]"),
    (
        lambda: groups(torch.zeros(5).long(), offsets=torch.tensor([0, 4])),
        ValueError,
        "offsets ends at 4 but there are 5 nodes",
    ),
    (lambda: sets(torch.tensor([0, 1, 1, 3]), 2), ValueError, "order has node 1 2 times"),
    (lambda: sets(torch.tensor([0, 1, 4, 3]), 2), ValueError, "order has node 4 but there are 4"),
    (lambda: sets(torch.tensor([0, 1]), 0), ValueError, "size must be positive, got 0"),
    (lambda: sets(torch.arange(5), 2), ValueError, "size=2 does not divide the 5 nodes of graph 0"),
    (
        lambda: sets(torch.tensor([0, 2, 1, 3]), 2, offsets=torch.tensor([0, 2, 4])),
        ValueError,
        "order has node 2 of graph 1 at a place of graph 0",
    ),
    (
        lambda: global_tokens(torch.tensor([[0], [1]]), 1),
        TypeError,
        "graph must be a fastgt.Graph, got Tensor",
    ),
    (lambda: global_tokens(band(4, 1, 1), -1), ValueError, "tokens must not be negative, got -1"),
    (
        lambda: global_tokens(Graph.from_edge_index(torch.tensor([[0], [1]]), (2, 3)), 1),
        ValueError,
        "graph must be square, got 2 rows and 3 columns",
    ),
    (
        lambda: global_tokens(band(4, 1, 1).reordered("degree"), 1),
        ValueError,
        "graph must not be reordered",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[x[2] for x in BAD])
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message if "\\" in message else re.escape(message)):
        call()


def test_batched_bipartite_graphs_get_no_tokens():
    ones = [Graph.from_edge_index(torch.tensor([[0], [0]]), size) for size in ((1, 2), (2, 1))]
    with pytest.raises(ValueError, match="graph must be square, got a batch of bipartite ones"):
        global_tokens(Graph.batch(ones), 1)

"""Windows and buckets decoded back into edges and rows, against loops over Python lists."""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
import torch
from graph_cases import examples, few
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgt import Graph, plans, tiles
from fastgt.testing import random_graph, with_index_dtype
from fastgt.tiles import Buckets, Windows

HEIGHTS = st.sampled_from(tiles.HEIGHTS)
DTYPES = st.sampled_from([torch.int32, torch.int64])


@st.composite
def pairs(draw, rows: st.SearchStrategy, cols: st.SearchStrategy, repeated: bool) -> tuple:
    """Rows, columns and distinct or repeated (row, column) pairs in random order."""
    n, m = draw(rows), draw(cols)
    share = draw(st.sampled_from([0.0, 0.03, 0.5, 0.97, 1.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    taken = rng.random((n, m)) < share
    if n and m:  # some columns have every row, some rows have no column
        taken[:, rng.integers(0, m, draw(st.integers(0, 2)))] = True
        taken[rng.integers(0, n, draw(st.integers(0, 3)))] = False
    edges = np.argwhere(taken)
    if repeated and len(edges):
        again = edges[rng.integers(0, len(edges), draw(st.integers(0, 9)))]
        often = np.repeat(again[:1], draw(st.integers(0, 3)), 0)  # one pair up to five times
        edges = np.concatenate([edges, again, often])
    return n, m, rng.permutation(edges)


def build(n: int, m: int, edges: np.ndarray) -> Graph:
    return Graph.from_edge_index(torch.from_numpy(edges.T[::-1].copy()), (n, m))


TALL = st.sampled_from([0, 1, 5, 15, 16, 17, 31, 64, 65, 100, 127, 128, 130])
WIDE = st.sampled_from([0, 1, 2, 3, 7, 20])
multigraphs = pairs(TALL, WIDE, True)
batches = st.lists(pairs(TALL | st.just(0), st.sampled_from([0, 1, 3, 7]), False), max_size=3)


def triples(graph: Graph) -> Counter:
    """(row, column, the caller's number) of every edge."""
    source, target = graph.edge_index.tolist()
    return Counter((i, j, e) for e, (j, i) in enumerate(zip(source, target, strict=True)))


def turned(edges: Counter) -> Counter:
    return Counter((j, i, e) for i, j, e in edges.elements())


def decode(tables: Windows) -> list[tuple]:
    """A window each, fillers included: (first row, last, full entries, entries)."""
    col, bits, base, edge = (x.tolist() for x in tables[3:])
    windows = []
    for first, last, start, stop, fulls in tables.window.tolist():
        entries = []
        for c in range(start, stop):
            word = bits[c] & (2**64 - 1)
            rows = [first + r for r in range(64) if word >> r & 1]
            numbers = edge[base[c] : base[c] + len(rows)]
            entries.append((col[c], list(zip(rows, numbers, strict=True))))
        windows.append((first, last, fulls, entries))
    return windows


def edges_of(windows: Iterable[tuple]) -> Counter:
    return Counter(
        (i, j, e) for *_, entries in windows for j, members in entries for i, e in members
    )


def check_shape(tables: Windows, height: int, dense: bool, dtype: torch.dtype, count: int) -> None:
    assert (tables.height, tables.dense) == (height, dense)
    assert {x.dtype for x in (tables.window, tables.col, tables.base, tables.edge)} == {dtype}
    assert tables.bits.dtype == torch.int64
    assert min(len(tables.window), len(tables.col)) >= 2
    assert tables.col.shape == tables.bits.shape == tables.base.shape
    assert tables.window.shape[1:] == (5,)
    assert tables.edge.shape == (count,)


def check_windows(tables: Windows, rows: int, height: int) -> list[tuple]:
    """What holds for every kind of window; -> those that are no fillers."""
    windows = decode(tables)
    real = [w for w in windows if w[1] > w[0]]
    assert windows[: len(real)] == real, "fillers stand at the end"
    assert all(w == (0, 0, 0, []) for w in windows[len(real) :])
    assert len(windows) == max(2, len(real))
    assert sorted(i for first, last, *_ in real for i in range(first, last)) == list(range(rows))
    assert all(last - first <= height for first, last, *_ in real)
    assert real == sorted(real, key=lambda w: (-len(w[3]), w[0])), "longest first, stable"
    for first, last, _, entries in real:
        assert all(first <= i < last for _, members in entries for i, _ in members)
    return real


@examples
@given(multigraphs, HEIGHTS, DTYPES)
def test_windows(drawn: tuple, height: int, dtype: torch.dtype) -> None:
    graph = with_index_dtype(build(*drawn), dtype)
    ptr, row, _, edge = graph.columns
    walks = (
        (graph.row_ptr, graph.col, graph.edge, graph.num_cols, graph.num_rows, triples(graph)),
        (ptr, row, edge, graph.num_rows, graph.num_cols, turned(triples(graph))),
    )
    for ptr, index, edge, num_cols, num_rows, expected in walks:
        tables = tiles.windows(ptr, index, edge, num_cols, height)
        check_shape(tables, height, False, dtype, graph.num_edges)
        real = check_windows(tables, num_rows, height)
        assert edges_of(real) == expected
        assert {first for first, *_ in real} == set(range(0, num_rows, height))
        assert len(tables.col) == max(2, sum(len(w[3]) for w in real))
        copies = Counter((i, j) for i, j, _ in expected)
        for first, last, fulls, entries in real:
            # a column stands there as often as the row that has it most often
            need = Counter()
            for (i, j), k in copies.items():
                if first <= i < last:
                    need[j] = max(need[j], k)
            assert Counter(j for j, _ in entries) == need
            full = [len(members) == last - first for _, members in entries]
            assert full == [True] * fulls + [False] * (len(entries) - fulls)
            for part in (entries[:fulls], entries[fulls:]):
                assert [j for j, _ in part] == sorted(j for j, _ in part)
            for j in need:  # k copies of an edge are in the first k entries of its column
                sizes = [len(members) for c, members in entries if c == j]
                assert sizes == sorted(sizes, reverse=True)


def test_the_copies_of_an_edge_keep_the_callers_order() -> None:
    graph = build(2, 3, np.array([[1, 2], [0, 2], [1, 2], [1, 0], [1, 2], [0, 2]]))
    tables = tiles.windows(graph.row_ptr, graph.col, graph.edge, 3, 16)
    both, rest = [(0, 1), (1, 0)], [(0, 5), (1, 2)]
    assert decode(tables)[0] == (0, 2, 2, [(2, both), (2, rest), (0, [(1, 3)]), (2, [(1, 4)])])


def test_windows_as_in_the_docstring() -> None:
    graph = build(5, 8, np.array([[0, 1], [1, 5], [1, 7], [2, 1], [0, 5], [2, 7], [4, 0]]))
    graph = Graph.from_csr(graph.row_ptr, graph.col, 8)  # edges numbered row by row
    tables = tiles.windows(graph.row_ptr, graph.col, graph.edge, 8, 4)
    assert tables.window.tolist() == [[0, 4, 0, 3, 0], [4, 5, 3, 4, 1]]
    assert tables.col.tolist() == [1, 5, 7, 0]
    assert tables.bits.tolist() == [5, 3, 6, 1]
    assert tables.base.tolist() == [0, 2, 4, 6]
    assert tables.edge.tolist() == [0, 4, 1, 2, 3, 5, 6]


@examples
@given(batches, HEIGHTS, DTYPES)
def test_dense_windows(parts: list[tuple], height: int, dtype: torch.dtype) -> None:
    graph = with_index_dtype(Graph.batch([build(*part) for part in parts]), dtype)
    ptr, row, _, edge = graph.columns
    ends, expected = (graph.graph_ptr, graph.col_graph_ptr), triples(graph)
    walks = (
        (graph.row_ptr, graph.col, graph.edge, ends, expected),
        (ptr, row, edge, ends[::-1], turned(expected)),
    )
    for ptr, index, edge, ends, expected in walks:
        tables = tiles.dense_windows(ptr, index, edge, *ends, height)
        assert tables is not None
        check_shape(tables, height, True, dtype, graph.num_edges)
        real = check_windows(tables, len(ptr) - 1, height)
        assert edges_of(real) == expected
        col_begin = ends[1].tolist()
        spans = {}  # the windows that a graph has, and its columns
        for g, (i, end) in enumerate(pairwise(ends[0].tolist())):
            for first in range(i, end, height):
                cols = list(range(col_begin[g], col_begin[g + 1]))
                spans[first] = (min(first + height, end), cols)
        assert {w[0]: (w[1], [j for j, _ in w[3]]) for w in real} == spans
        for first, last, fulls, entries in real:
            full = all(len(members) == last - first for _, members in entries)
            assert fulls == (len(entries) if full else 0)


@few
@given(multigraphs, HEIGHTS)
def test_dense_windows_hold_an_edge_once(drawn: tuple, height: int) -> None:
    graph = build(*drawn)
    copies = Counter((i, j) for i, j, _ in triples(graph))
    ends = graph.graph_ptr, graph.col_graph_ptr
    tables = tiles.dense_windows(graph.row_ptr, graph.col, graph.edge, *ends, height)
    assert (tables is None) == (max(copies.values(), default=1) > 1)


@pytest.mark.parametrize("row", [0, 31, 62, 63])
@pytest.mark.parametrize("times", [2, 3, 4, 64])
def test_no_carry_hides_a_repeated_edge(row: int, times: int) -> None:
    edges = np.array([[row, 0]] * times + [[i, 0] for i in range(64) if i != row])
    graph = build(64, 1, edges)
    ends = graph.graph_ptr, graph.col_graph_ptr
    assert tiles.dense_windows(graph.row_ptr, graph.col, graph.edge, *ends) is None


@pytest.mark.parametrize("size", [(0, 0), (0, 3), (3, 0), (70, 2)], ids=str)
def test_windows_without_edges(size: tuple[int, int]) -> None:
    graph = build(*size, np.zeros((0, 2), dtype=np.int64))
    walk = graph.row_ptr, graph.col, graph.edge
    dense = tiles.dense_windows(*walk, graph.graph_ptr, graph.col_graph_ptr)
    assert dense is not None
    for tables, cols in ((tiles.windows(*walk, size[1]), 0), (dense, size[1])):
        real = check_windows(tables, size[0], 64)
        assert [(len(w[3]), w[2]) for w in real] == [(cols, 0)] * -(-size[0] // 64)
        assert edges_of(real) == Counter()


def test_buckets_as_in_the_docstring() -> None:
    ptr = torch.tensor([0, 1, 4, 4, 13, 15])
    buckets = tiles.buckets(ptr, few=2, segment=4)
    assert buckets is not None
    none = [0, 0, 0]
    assert buckets.segment.tolist() == [[3, 4, 8], [3, 8, 12], [3, 12, 13], none, none]
    assert buckets.split.tolist() == [[3, 0, 3], none, none]
    assert buckets.middle.tolist() == [1, 0, 0]
    assert buckets.few.tolist() == [0, 2, 4, 0, 0]


degrees = st.sampled_from([2, 4, 8, 9, 16, 90]).flatmap(
    lambda most: st.lists(st.integers(0, most) | st.integers(0, 9).map(lambda d: min(d, most)))
)


def step_class(degree: int) -> int:
    """ceil(degree / 4) rounded up to a power of two."""
    steps = 1
    while 4 * steps < degree:
        steps *= 2
    return steps


LIMITS = st.sampled_from([(2, 4), (4, 9), (8, 9), (16, 20), (16, 64), (32, 50), (32, 512)])


@settings(max_examples=150)
@given(degrees, LIMITS, DTYPES)
def test_buckets(drawn: list[int], limits: tuple[int, int], dtype: torch.dtype) -> None:
    limit, segment = limits
    ptr = torch.tensor([0, *np.cumsum(drawn)]).to(dtype)
    buckets = tiles.buckets(ptr, *limits)
    rows = range(len(drawn))
    classes = {step_class(d) for d in drawn}
    natural = all(d <= limit for d in drawn) and (len(classes) <= 1 or classes == {1, 2})
    assert (buckets is None) == natural
    if buckets is None:
        return
    assert {x.dtype for x in buckets} == {dtype}
    lists = [x.tolist() for x in buckets]
    for x in lists:
        assert all(filler in (0, [0, 0, 0]) for filler in x[-2:])
    few, middle, parts, split = (x[:-2] for x in lists)
    assert sorted(few + middle + [s[0] for s in split]) == list(rows), "every row once"
    shares = [i for i in rows if drawn[i] <= limit]
    assert few == sorted(shares, key=lambda i: -step_class(drawn[i])), "alike together, stable"
    own = [i for i in rows if limit < drawn[i] <= segment]
    assert middle == sorted(own, key=lambda i: -drawn[i]), "longest first, stable"
    assert [s[0] for s in split] == [i for i in rows if drawn[i] > segment]
    at = 0
    for i, first, last in split:
        assert first == at
        mine, at = parts[first:last], last
        begin, end = int(ptr[i]), int(ptr[i + 1])
        assert [s for p in mine for s in range(p[1], p[2])] == list(range(begin, end))
        assert all(p[0] == i and p[2] - p[1] == segment for p in mine[:-1])
        assert mine[-1][0] == i
        assert 0 < mine[-1][2] - mine[-1][1] <= segment
    assert at == len(parts)


def test_buckets_of_no_rows() -> None:
    assert tiles.buckets(torch.tensor([0])) is None


def test_default_buckets_of_a_hub() -> None:
    hub = 2 * tiles.SEGMENT + 1
    degree = torch.tensor([3, tiles.FEW + 1, hub, tiles.FEW, tiles.SEGMENT])
    buckets = tiles.buckets(torch.cat([degree.new_zeros(1), degree.cumsum(0)]))
    assert type(buckets) is Buckets
    assert [x[:-2].tolist() for x in (buckets.few, buckets.middle)] == [[3, 0], [4, 1]]
    assert buckets.split[:-2].tolist() == [[2, 0, 3]]
    assert (buckets.segment[:3, 2] - buckets.segment[:3, 1]).tolist() == [512, 512, 1]


@few
@given(multigraphs, HEIGHTS, DTYPES)
def test_density(drawn: tuple, height: int, dtype: torch.dtype) -> None:
    graph = with_index_dtype(build(*drawn), dtype)
    distinct = {(i // height, j) for i, j, _ in triples(graph)}
    rho = graph.num_edges / len(distinct) if distinct else 0.0
    args = graph.row_ptr, graph.col, graph.num_cols, height
    assert tiles.density(*args) == rho
    assert tiles.sampled_density(*args) == rho


def test_sampled_density_of_many_windows() -> None:
    n = 16 * 1000 + 3
    graph = random_graph(0, n, 60_000, cols=40)
    args = graph.row_ptr, graph.col, 40, 16
    whole, sample = tiles.density(*args), tiles.sampled_density(*args)
    assert whole > 1.5
    assert sample != whole
    assert sample == pytest.approx(whole, rel=0.03)
    # all windows there are, and one more than that; the last of them has few rows
    for rows in (16 * 256, 16 * 256 + 1):
        ptr = graph.row_ptr[: rows + 1]
        args = ptr, graph.col[: int(ptr[-1])], 40, 16
        assert tiles.sampled_density(*args) == pytest.approx(tiles.density(*args), rel=0.01)
    assert tiles.sampled_density(torch.zeros(n, dtype=torch.int32), graph.col[:0], 40, 16) == 0.0


def test_the_sample_is_spread_over_the_rows() -> None:
    # each of 512 windows has one column twice, or in the second half 16 times
    degree = torch.tensor([2] * 256 + [16] * 256).repeat_interleave(16) // 2
    ptr = torch.cat([degree.new_zeros(1), degree.cumsum(0)])
    index = torch.zeros(int(ptr[-1]), dtype=torch.int64)
    assert tiles.sampled_density(ptr, index, 1, 16) == tiles.density(ptr, index, 1, 16) == 72.0


@few
@given(TALL, HEIGHTS)
def test_a_symmetric_graph_holds_its_tables_once(n: int, height: int) -> None:
    rng = np.random.default_rng(n)
    mask = rng.random((n, n)) < 0.2
    mask |= mask.T
    graph = Graph.from_dense(torch.from_numpy(mask))
    rows = tiles.windows(graph.row_ptr, graph.col, graph.edge, n, height)
    ptr, row, _, edge = graph.columns
    columns = tiles.windows(ptr, row, edge, n, height)
    both = tiles.shared(columns, rows)
    for name in ("window", "col", "bits", "base"):
        assert getattr(both, name) is getattr(rows, name)
    for x, y in zip(both, columns, strict=True):  # and nothing is lost
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("edges", [[[0, 1]], [[0, 1], [2, 2]], [[0, 1], [0, 2]]], ids=str)
def test_tables_that_differ_are_not_shared(edges: list) -> None:
    # some of these have tables in common: sharing those alone would be one more pattern
    graph = build(3, 3, np.array(edges))
    ptr, row, _, edge = graph.columns
    rows = tiles.windows(graph.row_ptr, graph.col, graph.edge, 3)
    columns = tiles.windows(ptr, row, edge, 3)
    assert tiles.shared(columns, rows) is columns


def test_all_bits() -> None:
    masks = tiles._all_bits(torch.arange(1, 65)).tolist()
    assert [x & (2**64 - 1) for x in masks] == [2**n - 1 for n in range(1, 65)]


def test_popcount() -> None:
    words = [0, 1, -1, 2**63 - 1, -(2**63), 0x5555555555555555, -0x5555555555555556]
    words += [2**n - 1 for n in range(64)] + [1 << n for n in range(63)]
    words += np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 500).tolist()
    expected = [(x & (2**64 - 1)).bit_count() for x in words]
    assert tiles._popcount(torch.tensor(words)).tolist() == expected


def test_free_memory_is_a_number_of_bytes() -> None:
    free = plans.free_memory(torch.device("cpu"))
    assert type(free) is int
    assert 2**20 < free < 2**50

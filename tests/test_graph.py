"""Graph: one multiset of edges, two walks and the caller's order, against loops over lists."""

import copy
import doctest
import gc
import os
import pickle
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastgt.graph as graph_module
from fastgt import Graph, neighborhood_attention

FIELDS = ("row_ptr", "col", "edge", "graph_ptr", "col_graph_ptr")
SIX = torch.tensor([[1, 2, 1, 5, 0], [0, 1, 0, 4, 2]])
examples = settings(deadline=None, max_examples=40)
few = settings(deadline=None, max_examples=20)
DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass
class Case:
    """Edges as Python lists; ``ends`` are the graphs' (row, column) boundaries after 0."""

    rows: int
    cols: int
    source: list[int]
    target: list[int]
    ends: list[tuple[int, int]]

    @property
    def edge_index(self) -> torch.Tensor:
        return torch.tensor([self.source, self.target], dtype=torch.int64).reshape(2, -1)

    @property
    def size(self) -> tuple[int, int]:
        return self.rows, self.cols

    def graph(self) -> Graph:
        return Graph.from_edge_index(self.edge_index, self.size)


def draw_edges(seed: int, rows: int, cols: int, count: int, narrow: bool) -> tuple[list, list]:
    rng = np.random.default_rng(seed)
    if not rows or not cols:
        return [], []
    # few distinct ends give duplicates, self loops, hubs and isolated nodes
    high = (min(rows, 3), min(cols, 3)) if narrow else (rows, cols)
    return rng.integers(0, high[1], count).tolist(), rng.integers(0, high[0], count).tolist()


@st.composite
def cases(draw, square: bool | None = None) -> Case:
    rows = draw(st.integers(0, 12))
    is_square = draw(st.booleans()) if square is None else square
    cols = rows if is_square else draw(st.integers(0, 12))
    count = draw(st.integers(0, 40))
    source, target = draw_edges(draw(st.integers(0, 2**31)), rows, cols, count, draw(st.booleans()))
    return Case(rows, cols, source, target, [(rows, cols)])


def joined(parts: list[Case]) -> Case:
    """The block-diagonal union, by hand."""
    rows = cols = 0
    source, target, ends = [], [], []
    for part in parts:
        source += [j + cols for j in part.source]
        target += [i + rows for i in part.target]
        ends += [(rows + r, cols + c) for r, c in part.ends]
        rows, cols = rows + part.rows, cols + part.cols
    return Case(rows, cols, source, target, ends)


def check(graph: Graph, case: Case, dtype: torch.dtype = torch.int32) -> None:
    """Every invariant of a Graph, by loops over lists."""
    count = len(case.source)
    assert (graph.num_rows, graph.num_cols) == case.size
    assert (graph.num_edges, graph.num_graphs) == (count, len(case.ends))
    assert all(type(n) is int for n in (graph.num_rows, graph.num_cols, graph.num_edges))
    tensors = [getattr(graph, name) for name in FIELDS] + list(graph.columns)
    assert [x.dtype for x in tensors] == [dtype] * len(tensors)
    assert all(type(x) is torch.Tensor and x.is_contiguous() for x in tensors)
    assert graph.graph_ptr.tolist() == [0] + [r for r, _ in case.ends]
    assert graph.col_graph_ptr.tolist() == [0] + [c for _, c in case.ends]

    row_ptr, col, edge = graph.row_ptr.tolist(), graph.col.tolist(), graph.edge.tolist()
    assert len(row_ptr) == case.rows + 1
    assert (row_ptr[0], row_ptr[-1], len(col), len(edge)) == (0, count, count, count)
    assert sorted(edge) == list(range(count))
    row = [i for i in range(case.rows) for _ in range(row_ptr[i], row_ptr[i + 1])]
    assert len(row) == count
    assert [(row[s], col[s]) for s in range(count)] == [
        (case.target[e], case.source[e]) for e in edge
    ]

    ptr, walk_row, slot, walk_edge = (x.tolist() for x in graph.columns)
    assert len(ptr) == case.cols + 1
    assert (ptr[0], ptr[-1], len(walk_row), len(slot), len(walk_edge)) == (0, *[count] * 4)
    assert sorted(slot) == list(range(count))
    walk_col = [j for j in range(case.cols) for _ in range(ptr[j], ptr[j + 1])]
    assert len(walk_col) == count
    for t in range(count):
        assert (walk_row[t], walk_col[t]) == (row[slot[t]], col[slot[t]])
        assert walk_edge[t] == edge[slot[t]]
    assert Counter(zip(walk_row, walk_col, strict=True)) == Counter(
        zip(case.target, case.source, strict=True)
    )

    assert graph.row.tolist() == row
    assert graph.edge_index.shape == (2, count)
    assert graph.edge_index.tolist() == [case.source, case.target]
    into, out = Counter(case.target), Counter(case.source)
    assert graph.row_degree.tolist() == [into[i] for i in range(case.rows)]
    assert graph.col_degree.tolist() == [out[j] for j in range(case.cols)]


def tensors_of(graph: Graph) -> list[torch.Tensor]:
    return [getattr(graph, name) for name in FIELDS] + list(graph.columns)


def assert_same(a: Graph, b: Graph) -> None:
    """Field by field, dtypes and column walk included."""
    assert (a.num_rows, a.num_cols) == (b.num_rows, b.num_cols)
    names = (*FIELDS, *a.columns._fields)
    for name, x, y in zip(names, tensors_of(a), tensors_of(b), strict=True):
        assert x.dtype == y.dtype, name
        assert x.tolist() == y.tolist(), name


# --- the docstring ---------------------------------------------------------------------------


def test_the_docstrings_six_nodes_field_by_field() -> None:
    part = Graph.from_edge_index(torch.tensor([[1, 2, 1, 0], [0, 1, 0, 2]]), 4)
    assert (part.num_nodes, part.num_graphs) == (4, 1)
    graph = Graph.from_edge_index(SIX, 6, graph_ptr=torch.tensor([0, 4, 6]))
    assert (graph.num_rows, graph.num_cols, graph.num_nodes) == (6, 6, 6)
    assert (graph.num_edges, graph.num_graphs) == (5, 2)
    assert graph.row_ptr.tolist() == [0, 2, 3, 4, 4, 5, 5]
    assert graph.col.tolist() == [1, 1, 2, 0, 5]
    assert graph.edge.tolist() == [0, 2, 1, 4, 3]
    assert graph.graph_ptr.tolist() == [0, 4, 6]
    assert graph.col_graph_ptr is graph.graph_ptr
    assert graph.columns.ptr.tolist() == [0, 1, 3, 4, 4, 4, 5]
    assert graph.columns.row.tolist() == [2, 0, 0, 1, 4]
    assert graph.columns.slot.tolist() == [3, 0, 1, 2, 4]
    assert graph.columns.edge.tolist() == [4, 0, 2, 1, 3]
    assert graph.columns is graph.columns
    ends = [(4, 4), (6, 6)]
    check(graph, Case(6, 6, SIX[0].tolist(), SIX[1].tolist(), ends))


def test_the_doctest_runs() -> None:
    found = doctest.DocTestFinder(recurse=False).find(Graph, "Graph", globs={})
    results = [doctest.DocTestRunner().run(test) for test in found]
    assert sum(r.attempted for r in results) == 4
    assert sum(r.failed for r in results) == 0


# --- constructors ----------------------------------------------------------------------------


@examples
@given(cases(), st.sampled_from(DTYPES))
def test_from_edge_index(case: Case, dtype: torch.dtype) -> None:
    edge_index = case.edge_index.to(dtype)
    check(Graph.from_edge_index(edge_index, case.size), case)
    strided = torch.full((4, 2 * len(case.source)), 99, dtype=dtype)[1::2, ::2].copy_(edge_index)
    check(Graph.from_edge_index(strided, case.size), case)
    check(Graph.from_edge_index(edge_index.t().contiguous().t(), case.size), case)
    if case.rows == case.cols:
        check(Graph.from_edge_index(edge_index, case.rows), case)
    # edges keep the caller's order inside a row
    graph = case.graph()
    order = sorted(range(len(case.target)), key=lambda e: case.target[e])
    assert graph.edge.tolist() == order


@examples
@given(cases(square=True))
def test_from_edge_index_counts_the_nodes(case: Case) -> None:
    n = max([*case.source, *case.target], default=-1) + 1
    graph = Graph.from_edge_index(case.edge_index)
    check(graph, Case(n, n, case.source, case.target, [(n, n)]))


def test_expanded_edge_index() -> None:
    graph = Graph.from_edge_index(torch.tensor([[0], [1]]).expand(2, 5), 2)
    check(graph, Case(2, 2, [0] * 5, [1] * 5, [(2, 2)]))


@examples
@given(cases(), st.sampled_from(DTYPES))
def test_constructors_agree_on_a_multigraph(case: Case, dtype: torch.dtype) -> None:
    pairs = sorted(zip(case.target, case.source, strict=True))
    target, source = [i for i, _ in pairs], [j for _, j in pairs]
    case = Case(case.rows, case.cols, source, target, case.ends)
    expected = case.graph()
    check(expected, case)
    ptr = [sum(i < r for i in target) for r in range(case.rows + 1)]
    row_ptr, col = torch.tensor(ptr, dtype=dtype), torch.tensor(source, dtype=dtype)
    assert_same(Graph.from_csr(row_ptr, col, case.cols), expected)
    row_ptr2 = row_ptr.repeat_interleave(2)[::2]
    assert_same(Graph.from_csr(row_ptr2, col.repeat_interleave(3)[::3], case.cols), expected)
    if case.rows == case.cols:
        assert_same(Graph.from_csr(row_ptr, col), expected)
    # explicit zeros and duplicates are stored entries
    value = np.zeros(len(source))
    if case.rows and case.cols:
        coo = sp.coo_array((value, (target, source)), shape=case.size)
        csr = sp.csr_array((value, source, ptr), shape=case.size)
        for matrix in (coo, csr, sp.coo_matrix(coo), sp.csr_matrix(csr)):
            assert matrix.nnz == len(source)
            assert_same(Graph.from_scipy(matrix), expected)


@examples
@given(cases())
def test_constructors_agree_on_a_simple_graph(case: Case) -> None:
    pairs = sorted(set(zip(case.target, case.source, strict=True)))
    target, source = [i for i, _ in pairs], [j for _, j in pairs]
    case = Case(case.rows, case.cols, source, target, case.ends)
    expected = case.graph()
    mask = torch.zeros(case.size, dtype=torch.bool)
    mask[target, source] = True
    for dense in (mask, mask.t().contiguous().t(), mask.repeat_interleave(2, 1)[:, ::2]):
        assert_same(Graph.from_dense(dense), expected)
    if case.rows and case.cols:
        for kind in ("csr", "coo", "lil"):
            assert_same(Graph.from_scipy(sp.coo_array(mask.numpy()).asformat(kind)), expected)


@examples
@given(cases())
def test_scipy_edges_are_numbered_as_in_tocoo(case: Case) -> None:
    if not case.rows or not case.cols:
        return
    coo = sp.coo_array((np.ones(len(case.source)), (case.target, case.source)), shape=case.size)
    check(Graph.from_scipy(coo), case)
    csc = coo.tocsc()
    check(
        Graph.from_scipy(csc),
        Case(*case.size, csc.tocoo().col.tolist(), csc.tocoo().row.tolist(), case.ends),
    )


@few
@given(st.lists(cases(square=True), min_size=1, max_size=4), st.booleans())
def test_from_pyg(parts: list[Case], relabel: bool) -> None:
    data = pytest.importorskip("torch_geometric.data")
    single = [data.Data(edge_index=p.edge_index, num_nodes=p.rows) for p in parts]
    if relabel:  # nodes counted from the features instead
        single = [data.Data(edge_index=p.edge_index, x=torch.zeros(p.rows, 1)) for p in parts]
    for one, part in zip(single, parts, strict=True):
        check(Graph.from_pyg(one), part)
    whole = joined(parts)
    check(Graph.from_pyg(data.Batch.from_data_list(single)), whole)
    assert_same(
        Graph.from_pyg(data.Batch.from_data_list(single)), Graph.batch([p.graph() for p in parts])
    )


def test_from_pyg_leaves_pygs_tensor_types_behind() -> None:
    pyg = pytest.importorskip("torch_geometric")
    edge_index = pyg.EdgeIndex(SIX, sparse_size=(6, 6))
    graph = Graph.from_pyg(pyg.data.Data(edge_index=edge_index, num_nodes=6))
    assert_same(graph, Graph.from_edge_index(SIX, 6))
    assert {type(x) for x in tensors_of(graph)} == {torch.Tensor}
    assert "E=5" in repr(graph)


def test_from_pyg_takes_a_tensor_count_of_nodes() -> None:
    data = pytest.importorskip("torch_geometric.data")
    graph = Graph.from_pyg(data.Data(edge_index=SIX, num_nodes=torch.tensor(7)))
    assert graph.num_nodes == 7
    assert type(graph.num_nodes) is int


@pytest.mark.parametrize("n", [np.int64(6), np.int32(6), (np.int64(6), 6)])
def test_numpy_sizes_are_integers(n: object) -> None:
    graph = Graph.from_edge_index(SIX, n)  # type: ignore[arg-type]
    assert (graph.num_rows, graph.num_cols) == (6, 6)
    assert type(graph.num_rows) is int
    assert type(graph.num_cols) is int
    csr = Graph.from_csr(torch.tensor([0, 1]), torch.tensor([3]), np.int64(4))
    assert type(csr.num_cols) is int


# --- boundaries and batches ------------------------------------------------------------------

_EMPTY = Case(0, 0, [], [], [(0, 0)])


@examples
@given(st.data(), st.booleans(), st.sampled_from(["", "start", "middle", "end", "all"]))
def test_batch_is_concatenation(data: st.DataObject, square: bool, empty: str) -> None:
    parts = data.draw(st.lists(cases(square=True if square else None), max_size=4))
    at = {"start": 0, "middle": len(parts) // 2, "end": len(parts)}
    if empty == "all":
        parts = [_EMPTY] * len(parts)
    elif empty:
        parts.insert(at[empty], _EMPTY)
    whole = joined(parts)
    batch = Graph.batch(p.graph() for p in parts)  # type: ignore[arg-type]
    check(batch, whole)
    plain = whole.graph()
    for name in ("row_ptr", "col", "edge"):
        assert torch.equal(getattr(batch, name), getattr(plain, name)), name
    if all(p.rows == p.cols for p in parts):
        assert batch.col_graph_ptr is batch.graph_ptr
        ptr = torch.tensor([0] + [r for r, _ in whole.ends])
        for dtype in (torch.int64, torch.int32, torch.uint8):
            with_ptr = Graph.from_edge_index(whole.edge_index, whole.rows, graph_ptr=ptr.to(dtype))
            assert_same(batch, with_ptr)
            assert with_ptr.col_graph_ptr is with_ptr.graph_ptr


@few
@given(st.lists(st.lists(cases(), max_size=3), max_size=3), st.booleans())
def test_batch_of_batches(groups: list[list[Case]], turned: bool) -> None:
    graphs = [[p.graph() for p in group] for group in groups]
    nested = Graph.batch([Graph.batch(group) for group in graphs])
    flat = Graph.batch([g for group in graphs for g in group])
    assert_same(nested, flat)
    check(nested, joined([p for group in groups for p in group]))
    if turned:
        back = Graph.batch([g.transpose() for group in graphs for g in group])
        assert back.edge_index.tolist() == nested.transpose().edge_index.tolist()
        assert back.graph_ptr.tolist() == nested.col_graph_ptr.tolist()
        assert back.col_graph_ptr.tolist() == nested.graph_ptr.tolist()


def test_a_batch_of_none() -> None:
    check(Graph.batch([]), Case(0, 0, [], [], []))
    check(Graph.batch([Graph.batch([]), Graph.batch([])]), Case(0, 0, [], [], []))
    check(
        Graph.from_edge_index(torch.empty(2, 0, dtype=torch.int64), graph_ptr=torch.tensor([0])),
        Case(0, 0, [], [], []),
    )


def test_bipartite_batch_with_square_totals_is_not_square() -> None:
    wide, tall = Case(3, 2, [0], [2], [(3, 2)]), Case(2, 3, [2], [0], [(2, 3)])
    batch = Graph.batch([wide.graph(), tall.graph()])
    check(batch, joined([wide, tall]))
    check(
        batch.transpose(), joined([Case(2, 3, [2], [0], [(2, 3)]), Case(3, 2, [0], [2], [(3, 2)])])
    )
    # node 2 is a row of the first graph and a column of the second: it has no self loop
    for needs_nodes in (
        lambda: batch.with_self_loops(),
        lambda: batch.reordered(torch.arange(5)),
    ):
        with pytest.raises(ValueError, match="square"):
            needs_nodes()


# --- derived graphs --------------------------------------------------------------------------


@examples
@given(st.lists(cases(), max_size=3), st.booleans())
def test_transpose(parts: list[Case], walked: bool) -> None:
    case = joined(parts)
    graph = Graph.batch([p.graph() for p in parts])
    if walked:
        _ = graph.columns
    turned = graph.transpose()
    back = Case(case.cols, case.rows, case.target, case.source, [(c, r) for r, c in case.ends])
    check(turned, back)
    twice = turned.transpose()
    check(twice, case)
    assert_same(twice, graph)
    check(graph, case)  # as it was
    # the column walk of a transpose is this graph's row walk: nothing is sorted again
    with Sorts() as sorts:
        turned = graph.transpose()
        walk = turned.columns
    assert sorts.count == 0
    assert walk.ptr is graph.row_ptr
    assert walk.row is graph.col


@examples
@given(st.lists(cases(square=True), max_size=3))
def test_with_self_loops(parts: list[Case]) -> None:
    case = joined(parts)
    graph = Graph.batch([p.graph() for p in parts])
    looped = graph.with_self_loops()
    nodes = list(range(case.rows))
    expected = Case(*case.size, case.source + nodes, case.target + nodes, case.ends)
    check(looped, expected)
    assert looped.col_graph_ptr is looped.graph_ptr
    check(
        looped.with_self_loops(),
        Case(*case.size, expected.source + nodes, expected.target + nodes, case.ends),
    )
    check(graph, case)


@examples
@given(st.lists(cases(square=True), max_size=3), st.integers(0, 2**31), st.sampled_from(DTYPES))
def test_reordered(parts: list[Case], seed: int, dtype: torch.dtype) -> None:
    case = joined(parts)
    graph = Graph.batch([p.graph() for p in parts])
    rng = np.random.default_rng(seed)
    order, start = [], 0
    for end, _ in case.ends:
        order += (start + rng.permutation(end - start)).tolist()
        start = end
    place = {node: i for i, node in enumerate(order)}
    index = torch.tensor(order, dtype=dtype)
    moved = graph.reordered(index)
    source, target = [place[j] for j in case.source], [place[i] for i in case.target]
    check(moved, Case(*case.size, source, target, case.ends))
    assert moved.col_graph_ptr is moved.graph_ptr
    strided = index.repeat_interleave(2)[::2]
    assert_same(graph.reordered(strided), moved)
    inverse = torch.tensor([place[i] for i in range(case.rows)], dtype=torch.int64)
    assert_same(moved.reordered(inverse), graph)
    check(graph, case)


def test_a_strided_order_raises_no_warning() -> None:
    graph = Graph.from_edge_index(SIX, 6, graph_ptr=torch.tensor([0, 4, 6]))
    order = torch.arange(6).repeat_interleave(2)[::2]
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            graph.reordered(order)
    finally:
        torch.set_warn_always(before)


@few
@given(cases(square=True), st.integers(0, 2**31))
def test_attention_follows_the_order_of_nodes(case: Case, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    n, e = case.rows, len(case.source)
    q, k, v = torch.randn(3, n, 2, 3, generator=rng, dtype=torch.float64)
    bias = torch.randn(e, 2, generator=rng, dtype=torch.float64)
    order = torch.randperm(n, generator=rng)
    graph = case.graph()
    # with the graph as given, reordered, and transposed twice
    o, w = neighborhood_attention(q, k, v, graph, edge_bias=bias, return_weights=True)
    moved = graph.reordered(order)
    o2, w2 = neighborhood_attention(
        q[order], k[order], v[order], moved, edge_bias=bias, return_weights=True
    )
    torch.testing.assert_close(o2, o[order], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(w2, w, rtol=1e-10, atol=1e-12)
    twice = graph.transpose().transpose()
    o3, w3 = neighborhood_attention(q, k, v, twice, edge_bias=bias, return_weights=True)
    torch.testing.assert_close(o3, o, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(w3, w, rtol=1e-10, atol=1e-12)


# --- an immutable object ---------------------------------------------------------------------


def test_fields_cannot_be_set() -> None:
    graph = Graph.from_edge_index(SIX, 6)
    for f in fields(graph):
        with pytest.raises(FrozenInstanceError):
            setattr(graph, f.name, getattr(graph, f.name))
        with pytest.raises(FrozenInstanceError):
            delattr(graph, f.name)
    for name in ("columns", "row", "edge_index", "device", "num_nodes", "new"):
        with pytest.raises((FrozenInstanceError, AttributeError)):
            setattr(graph, name, None)


def test_identity_equality_and_hash() -> None:
    graph, other = Graph.from_edge_index(SIX, 6), Graph.from_edge_index(SIX, 6)
    assert graph == graph
    assert graph != other
    assert hash(graph) == hash(graph)
    assert {graph: 1, other: 2}[graph] == 1
    assert len({graph, other, copy.deepcopy(graph)}) == 3


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_callers_tensors_are_the_callers(dtype: torch.dtype) -> None:
    data = pytest.importorskip("torch_geometric.data")
    edge_index = SIX.to(dtype, copy=True)
    ptr = torch.tensor([0, 4, 6], dtype=dtype)
    row_ptr = torch.tensor([0, 2, 3, 4, 4, 5, 5], dtype=dtype)
    col = torch.tensor([1, 1, 2, 0, 5], dtype=dtype)
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[SIX[1], SIX[0]] = True
    order = torch.tensor([3, 2, 1, 0, 5, 4], dtype=dtype)
    kind = np.dtype(str(dtype).removeprefix("torch."))
    ends = (edge_index[1].numpy().astype(kind), edge_index[0].numpy().astype(kind))
    coo = sp.coo_array((np.ones(5), ends), shape=(6, 6))
    csr = coo.tocsr()
    pyg = data.Data(edge_index=edge_index.clone(), num_nodes=6)
    batch = data.Batch.from_data_list([pyg, pyg])
    mine = [edge_index, ptr, row_ptr, col, mask, order, pyg.edge_index]
    mine += [batch.edge_index, batch.ptr]
    arrays = [*coo.coords, coo.data, csr.indices, csr.indptr, csr.data]
    mine += [torch.from_numpy(a) for a in arrays]
    before = [x.clone() for x in mine]

    base = Graph.from_edge_index(edge_index, 6, graph_ptr=ptr)
    graphs = {
        "from_edge_index": Graph.from_edge_index(edge_index, 6),
        "graph_ptr": base,
        "from_csr": Graph.from_csr(row_ptr, col),
        "from_dense": Graph.from_dense(mask),
        "from_scipy(coo)": Graph.from_scipy(coo),
        "from_scipy(csr)": Graph.from_scipy(csr),
        "from_pyg(data)": Graph.from_pyg(pyg),
        "from_pyg(batch)": Graph.from_pyg(batch),
        "reordered": base.reordered(order),
    }
    for x, y in zip(mine, before, strict=True):
        assert torch.equal(x, y), "an input was modified"
    kept = {name: [x.clone() for x in tensors_of(g)] for name, g in graphs.items()}
    late = {name: copy.deepcopy(g) for name, g in graphs.items()}
    for x in mine:
        x.zero_()
    for name, graph in graphs.items():
        for x, y in zip(tensors_of(graph), kept[name], strict=True):
            assert torch.equal(x, y), name
        assert_same(graph, late[name])


def test_what_is_read_from_a_graph_is_not_the_graph() -> None:
    graph = Graph.from_edge_index(SIX, 6)
    kept = copy.deepcopy(graph)
    for name in ("edge_index", "row", "row_degree", "col_degree"):
        getattr(graph, name).zero_()
    assert_same(graph, kept)


def test_to() -> None:
    graph = Graph.from_edge_index(SIX, (6, 7))
    assert graph.to("cpu") is graph
    assert graph.to(torch.device("cpu")) is graph
    _ = graph.columns
    for source in (graph, Graph.from_edge_index(SIX, 6)):
        away = source.to("meta")
        assert away is not source
        assert source.device.type == "cpu"
        assert away.device.type == "meta"
        assert all(x.device.type == "meta" for x in tensors_of(away))
        assert [x.shape for x in tensors_of(away)] == [x.shape for x in tensors_of(source)]
        square = source.num_rows == source.num_cols
        assert (away.graph_ptr is away.col_graph_ptr) is square
        assert away.to("meta") is away
    with Sorts() as sorts:  # what was cached goes along
        _ = graph.to("meta").columns
    assert sorts.count == 0


def test_to_where_it_is_already_under_another_name() -> None:
    # "cpu:0" is to "cpu" what "cuda" is to "cuda:0": another graph would sort its columns anew
    graph = Graph.from_edge_index(SIX, 6)
    assert graph.to("cpu:0").to("cpu") is graph
    assert graph.to("cpu:0").columns is graph.columns


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_to_cuda() -> None:
    graph = Graph.from_edge_index(SIX, (6, 7))
    _ = graph.columns
    away = graph.to("cuda")
    assert away.to("cuda") is away
    assert_same(away.to("cpu"), graph)
    assert_same(Graph.from_edge_index(SIX.cuda(), (6, 7)).to("cpu"), graph)


@few
@given(cases(), st.booleans())
def test_copies(case: Case, walked: bool) -> None:
    graph = case.graph()
    if walked:
        _ = graph.columns
    for twin in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), copy.copy(graph)):
        assert twin is not graph
        check(twin, case)
        assert_same(twin, graph)
        assert (twin.graph_ptr is twin.col_graph_ptr) is (case.rows == case.cols)
    deep = copy.deepcopy(graph)
    if len(case.source):
        assert deep.col.data_ptr() != graph.col.data_ptr()
        assert deep.columns.row.data_ptr() != graph.columns.row.data_ptr()


def test_saved_and_loaded(tmp_path: Path) -> None:
    graph = Graph.from_edge_index(SIX, 6)
    torch.save(graph, tmp_path / "graph.pt")
    assert_same(torch.load(tmp_path / "graph.pt", weights_only=False), graph)


def test_graphs_are_freed_without_the_cycle_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        graph = Graph.from_edge_index(SIX, 6)
        turned = graph.transpose().transpose()
        gone = [weakref.ref(graph), weakref.ref(turned)]
        del graph, turned
        assert [r() for r in gone] == [None, None]
    finally:
        gc.enable()


def test_repr() -> None:
    graph = Graph.from_edge_index(SIX, 6)
    assert (
        repr(graph) == "Graph(N=6, E=5, degree mean 0.8 max 2, 2 isolated rows, int32, 0.0 MB, cpu)"
    )
    text = repr(Graph.from_edge_index(SIX, (6, 9)))
    assert text.startswith("Graph(N=6x9, E=5, degree")
    assert "G=2" in repr(Graph.batch([graph, graph]))
    assert repr(Graph.batch([])) == "Graph(N=0, E=0, G=0, int32, 0.0 MB, cpu)"
    assert "N=0x3, E=0" in repr(Graph.from_dense(torch.zeros(0, 3, dtype=torch.bool)))


def test_repr_counts_every_storage_once() -> None:
    edges = torch.randint(0, 1000, (2, 100_000), generator=torch.Generator().manual_seed(0))
    graph = Graph.from_edge_index(edges, 1000)  # (100000 * 2 + 1001 + 2) * 4 bytes
    assert ", 0.8 MB," in repr(graph)
    _ = graph.columns  # and 3 * 100000 + 1001 more
    assert ", 2.0 MB," in repr(graph)
    assert ", 2.4 MB," not in repr(graph.transpose())


def test_repr_on_the_meta_device() -> None:
    assert "E=5" in repr(Graph.from_edge_index(SIX, 6).to("meta"))


# --- work done and kept ----------------------------------------------------------------------


class Sorts(TorchDispatchMode):
    """Counts the sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.overloadpacket in (torch.ops.aten.sort, torch.ops.aten.argsort)
        return func(*args, **(kwargs or {}))


def test_a_graph_is_sorted_once_and_its_columns_once() -> None:
    with Sorts() as build:
        graph = Graph.from_edge_index(SIX, 6)
    with Sorts() as walk:
        _ = graph.columns, graph.columns, graph.col_degree, graph.edge_index, graph.row
    with Sorts() as csr:
        Graph.from_csr(graph.row_ptr, graph.col)
        Graph.batch([graph, graph])
        graph.transpose().transpose()
    assert build.count <= 1
    assert walk.count <= 1
    assert csr.count == 0


def test_a_dense_mask_is_in_row_order_already() -> None:
    with Sorts() as sorts:
        Graph.from_dense(torch.eye(3, dtype=torch.bool))
    assert sorts.count == 0


@pytest.mark.parametrize(
    "derive",
    [
        lambda g: g.columns,
        lambda g: g.row,
        lambda g: g.row_degree,
        lambda g: g.col_degree,
        lambda g: g.edge_index,
        lambda g: g.transpose().columns,
        lambda g: g.with_self_loops().columns,
        lambda g: Graph.batch([g, g]).columns,
    ],
    ids=["columns", "row", "row_degree", "col_degree", "edge_index", "transpose", "loops", "batch"],
)
def test_derived_structure_never_waits_for_the_device(derive: Callable[[Graph], object]) -> None:
    # a meta tensor has no values to wait for: reading one raises
    derive(Graph.from_edge_index(SIX, 6).to("meta"))


def test_tracing_leaves_no_fake_tensor_in_the_graph() -> None:
    from torch._subclasses import FakeTensorMode

    graph = Graph.from_edge_index(SIX, 6)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _ = graph.columns
    assert {type(x) for x in graph.columns} == {torch.Tensor}


def test_training_after_export() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = Graph.from_edge_index(SIX, 6)
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return neighborhood_attention(x * self.weight, x, x + 1, self.graph)

    layer, x = Layer(), torch.randn(6, 2, 4)
    torch.export.export(layer, (x,), strict=False)
    layer(x).sum().backward()
    assert type(layer.weight.grad) is torch.Tensor
    check(layer.graph, Case(6, 6, *SIX.tolist(), [(6, 6)]))


# --- int32 while it fits ---------------------------------------------------------------------


def test_the_index_type() -> None:
    choose = graph_module._index_dtype
    assert choose(0, 0, 0) == torch.int32
    for place in range(3):
        sizes = [10, 10, 10]
        sizes[place] = 2**31 - 1
        assert choose(*sizes) == torch.int32
        sizes[place] = 2**31
        assert choose(*sizes) == torch.int64


def test_more_edges_than_int32_holds() -> None:
    many = torch.empty(2**31 + 5, dtype=torch.int64, device="meta")
    other, order, ptr = graph_module._group(many, many, 10)
    assert (other.shape, order.shape, ptr.shape) == (many.shape, many.shape, (11,))
    assert {x.dtype for x in (other, order, ptr)} == {torch.int64}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend int32 ends at 7."""
    monkeypatch.setattr(graph_module, "_INT32_MAX", 7)


@pytest.mark.usefixtures("narrow")
def test_int64_graphs_are_int64_throughout() -> None:
    case = Case(8, 8, *SIX.tolist(), [(8, 8)])
    graph = case.graph()
    check(graph, case, torch.int64)
    nodes = torch.arange(8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[SIX[1], SIX[0]] = True
    row, col = SIX[1].numpy(), SIX[0].numpy()
    for other in (
        graph.transpose(),
        graph.with_self_loops(),
        graph.reordered(nodes),
        Graph.batch([graph, graph]),
        Graph.from_csr(graph.row_ptr.int(), graph.col.int()),
        Graph.from_edge_index(SIX.int(), 8, graph_ptr=torch.tensor([0, 4, 8], dtype=torch.int32)),
        Graph.from_dense(mask),
        Graph.from_scipy(sp.coo_array((np.ones(5), (row, col)), shape=(8, 8))),
        copy.deepcopy(graph),
    ):
        assert {x.dtype for x in tensors_of(other)} == {torch.int64}
    check(graph.transpose(), Case(8, 8, case.target, case.source, [(8, 8)]), torch.int64)


@pytest.mark.usefixtures("narrow")
def test_graphs_that_grow_past_int32() -> None:
    case = Case(6, 6, *SIX.tolist(), [(6, 6)])
    graph = case.graph()
    assert graph.col.dtype == torch.int32
    check(Graph.batch([graph, graph]), joined([case, case]), torch.int64)
    loops = list(range(6))
    looped = Case(6, 6, case.source + loops, case.target + loops, [(6, 6)])
    check(graph.with_self_loops(), looped, torch.int64)


@pytest.mark.usefixtures("narrow")
def test_boundaries_beyond_int32_are_not_searched_as_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch refuses out_int32=True for a longer sequence than int32 counts
    asked, searchsorted = [], torch.searchsorted

    def spy(*args, **kwargs):  # type: ignore[no-untyped-def]
        asked.append(kwargs.get("out_int32", False))
        return searchsorted(*args, **kwargs)

    monkeypatch.setattr(torch, "searchsorted", spy)
    _ = Graph.from_edge_index(SIX, 8).columns
    assert not any(asked)


# --- refusals --------------------------------------------------------------------------------

_NONE = torch.empty(2, 0, dtype=torch.int64)
_PTR = torch.tensor([0, 1, 2])
_GRAPH = Graph.from_edge_index(SIX, 6)
_BIPARTITE = Graph.from_edge_index(SIX, (6, 7))


def t(*values: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def from_edges(edge_index: object, *args: object, **kwargs: object) -> Graph:
    return Graph.from_edge_index(edge_index, *args, **kwargs)  # type: ignore[arg-type]


REFUSALS = {
    # edge_index
    "list": (lambda: from_edges([[0], [1]], 2), TypeError, r"edge_index.*list"),
    "array": (lambda: from_edges(SIX.numpy(), 6), TypeError, r"edge_index.*ndarray"),
    "float": (lambda: from_edges(SIX.float(), 6), TypeError, r"edge_index.*float32"),
    "float, no edges": (lambda: from_edges(torch.empty(2, 0), 6), TypeError, r"edge_index.*float"),
    "bool": (lambda: from_edges(SIX.bool(), 6), TypeError, r"edge_index.*bool"),
    "complex": (lambda: from_edges(SIX.cfloat(), 6), TypeError, r"edge_index.*complex64"),
    "one dimension": (lambda: from_edges(t(0, 1), 6), ValueError, r"edge_index.*\[2, E\].*\[2\]"),
    "[E, 2]": (lambda: from_edges(SIX.t(), 6), ValueError, r"edge_index.*\[2, E\].*\[5, 2\]"),
    "too high": (lambda: from_edges(SIX, 5), ValueError, r"edge_index.*index 5 .* 5 nodes"),
    "negative": (lambda: from_edges(-SIX, 6), ValueError, r"edge_index.*index -5"),
    "all negative, counted": (lambda: from_edges(SIX - 9), ValueError, r"edge_index.*index -9"),
    "source": (lambda: from_edges(SIX, (6, 3)), ValueError, r"edge_index\[0\].*5 .* 3 columns"),
    "target": (lambda: from_edges(SIX, (3, 6)), ValueError, r"edge_index\[1\].*4 .* 3 rows"),
    "beyond int32": (
        lambda: from_edges(torch.tensor([[2**32], [0]]), 6),
        ValueError,
        r"edge_index.*index 4294967296 .* 6 nodes",
    ),
    "edges without nodes": (lambda: from_edges(SIX, 0), ValueError, r"index 5 .* 0 nodes"),
    "uint16": (lambda: from_edges(SIX.to(torch.uint16), 6), TypeError, r"edge_index.*uint16"),
    "sparse": (lambda: from_edges(SIX.to_sparse(), 6), TypeError, r"edge_index.*sparse"),
    # num_nodes
    "size True": (lambda: from_edges(SIX, True), TypeError, r"num_nodes.*bool"),
    "size 6.0": (lambda: from_edges(SIX, 6.0), TypeError, r"num_nodes.*float"),
    "size '6'": (lambda: from_edges(SIX, "6"), TypeError, r"num_nodes.*str"),
    "size -1": (lambda: from_edges(_NONE, -1), ValueError, r"num_nodes.*-1"),
    "size (6, -1)": (lambda: from_edges(_NONE, (6, -1)), ValueError, r"num_nodes.*-1"),
    "size (True, 6)": (lambda: from_edges(SIX, (True, 6)), TypeError, r"num_nodes.*bool"),
    "size (6,)": (lambda: from_edges(SIX, (6,)), ValueError, r"num_nodes.*1"),
    "size (6, 6, 6)": (lambda: from_edges(SIX, (6, 6, 6)), ValueError, r"num_nodes.*3"),
    "size (6, None)": (lambda: from_edges(SIX, (6, None)), TypeError, r"num_nodes.*None"),
    # graph_ptr
    "ptr list": (lambda: from_edges(SIX, 6, graph_ptr=[0, 6]), TypeError, r"graph_ptr.*list"),
    "ptr float": (
        lambda: from_edges(SIX, 6, graph_ptr=torch.tensor([0.0, 6])),
        TypeError,
        r"graph_ptr.*float",
    ),
    "ptr empty": (lambda: from_edges(SIX, 6, graph_ptr=t()), ValueError, r"graph_ptr.*\[0\]"),
    "ptr [1, 2]": (
        lambda: from_edges(SIX, 6, graph_ptr=t(0, 6)[None]),
        ValueError,
        r"graph_ptr.*\[1, 2\]",
    ),
    "ptr start": (lambda: from_edges(SIX, 6, graph_ptr=t(1, 6)), ValueError, r"graph_ptr.*0.*1"),
    "ptr end": (
        lambda: from_edges(SIX, 6, graph_ptr=t(0, 7)),
        ValueError,
        r"graph_ptr.* 7 .* 6 nodes",
    ),
    "ptr down": (
        lambda: from_edges(SIX, 6, graph_ptr=t(0, 5, 4, 6)),
        ValueError,
        r"graph_ptr.*5 to 4",
    ),
    "ptr down, uint8": (
        lambda: from_edges(SIX, 6, graph_ptr=t(0, 5, 4, 6, dtype=torch.uint8)),
        ValueError,
        r"graph_ptr.*5 to 4",
    ),
    "ptr device": (
        lambda: from_edges(SIX, 6, graph_ptr=t(0, 6).to("meta")),
        ValueError,
        r"graph_ptr.*meta.*edge_index.*cpu",
    ),
    "ptr bipartite": (
        lambda: from_edges(SIX, (6, 7), graph_ptr=t(0, 6)),
        ValueError,
        r"graph_ptr.*6 rows and 7 columns",
    ),
    "between graphs": (
        lambda: from_edges(SIX, 6, graph_ptr=t(0, 2, 6)),
        ValueError,
        r"edge_index.*edge 1 .*node 2 .*node 1",
    ),
    # from_csr
    "csr list": (lambda: Graph.from_csr([0, 1], t(0)), TypeError, r"row_ptr.*list"),
    "csr col list": (lambda: Graph.from_csr(t(0, 1), [0]), TypeError, r"col.*list"),
    "csr float": (lambda: Graph.from_csr(_PTR.float(), t(0, 1)), TypeError, r"row_ptr.*float32"),
    "csr col float": (lambda: Graph.from_csr(_PTR, _PTR[1:] / 2), TypeError, r"col.*float32"),
    "csr empty": (lambda: Graph.from_csr(t(), t()), ValueError, r"row_ptr.*\[N \+ 1\].*\[0\]"),
    "csr [1, 3]": (lambda: Graph.from_csr(_PTR[None], t(0, 1)), ValueError, r"row_ptr.*\[1, 3\]"),
    "csr col [1, 2]": (lambda: Graph.from_csr(_PTR, t(0, 1)[None]), ValueError, r"col.*\[1, 2\]"),
    "csr start": (lambda: Graph.from_csr(t(1, 2), t(0, 0)), ValueError, r"row_ptr.*0.*1"),
    "csr end": (lambda: Graph.from_csr(_PTR, t(0)), ValueError, r"row_ptr.* 2 .* 1 edges"),
    "csr down": (
        lambda: Graph.from_csr(t(0, 3, 1, 4), t(0, 1, 0, 1)),
        ValueError,
        r"row_ptr.*3 to 1",
    ),
    "csr down, uint8": (
        lambda: Graph.from_csr(t(0, 3, 1, 4, dtype=torch.uint8), t(0, 1, 0, 1)),
        ValueError,
        r"row_ptr.*3 to 1",
    ),
    "csr down, int8": (
        lambda: Graph.from_csr(t(0, 100, -100, 3, dtype=torch.int8), t(0, 1, 0)),
        ValueError,
        r"row_ptr.*100 to -100",
    ),
    "csr down, int64": (
        lambda: Graph.from_csr(t(0, 2**62 + 5, -(2**62) - 5, 3), t(0, 1, 0)),
        ValueError,
        r"row_ptr",
    ),
    "csr high": (lambda: Graph.from_csr(_PTR, t(0, 2)), ValueError, r"col.*2 .* 2 columns"),
    "csr low": (lambda: Graph.from_csr(_PTR, t(0, -1)), ValueError, r"col.*-1"),
    "csr num_cols": (lambda: Graph.from_csr(_PTR, t(0, 3), 3), ValueError, r"col.*3 .* 3 columns"),
    "csr num_cols -1": (lambda: Graph.from_csr(t(0), t(), -1), ValueError, r"num_cols.*-1"),
    "csr num_cols True": (
        lambda: Graph.from_csr(_PTR, t(0, 0), True),
        TypeError,
        r"num_cols.*bool",
    ),
    "csr device": (
        lambda: Graph.from_csr(_PTR.to("meta"), t(0, 1)),
        ValueError,
        r"row_ptr.*meta.*col.*cpu",
    ),
    # from_dense, from_scipy, from_pyg, batch
    "dense float": (lambda: Graph.from_dense(torch.zeros(3, 2)), TypeError, r"mask.*float32"),
    "dense array": (lambda: Graph.from_dense(np.eye(2) > 0), TypeError, r"mask.*ndarray"),
    "dense [3]": (lambda: Graph.from_dense(t(1, 0).bool()), ValueError, r"mask.*\[2\]"),
    "scipy array": (lambda: Graph.from_scipy(np.eye(3)), TypeError, r"matrix.*ndarray"),
    "scipy 1-d": (
        lambda: Graph.from_scipy(sp.coo_array(np.array([0, 1]))),
        ValueError,
        r"matrix.*\b2\b",
    ),
    "pyg none": (lambda: Graph.from_pyg(None), TypeError, r"data.*edge_index.*NoneType"),
    "batch of None": (lambda: Graph.batch([_GRAPH, None]), TypeError, r"graphs\[1\].*NoneType"),
    "batch devices": (
        lambda: Graph.batch([_GRAPH, _GRAPH.to("meta")]),
        ValueError,
        r"graphs\[0\].*cpu.*graphs\[1\].*meta",
    ),
    # derived
    "nodes": (lambda: _BIPARTITE.num_nodes, ValueError, r"num_nodes.*6 rows and 7 columns"),
    "loops": (_BIPARTITE.with_self_loops, ValueError, r"with_self_loops.*6 rows and 7 columns"),
    "order bipartite": (
        lambda: _BIPARTITE.reordered(torch.arange(6)),
        ValueError,
        r"reordered.*6 rows and 7 col",
    ),
    "order list": (lambda: _GRAPH.reordered([0]), TypeError, r"order.*list"),
    "order float": (lambda: _GRAPH.reordered(torch.zeros(6)), TypeError, r"order.*float32"),
    "order short": (lambda: _GRAPH.reordered(torch.arange(5)), ValueError, r"order.*\[6\].*\[5\]"),
    "order twice": (
        lambda: _GRAPH.reordered(t(0, 0, 1, 2, 3, 4)),
        ValueError,
        r"order.*node 5 of 6",
    ),
    "order high": (
        lambda: _GRAPH.reordered(t(0, 6, 1, 2, 3, 4)),
        ValueError,
        r"order.*6 .* 6 nodes",
    ),
    "order low": (lambda: _GRAPH.reordered(t(0, -1, 1, 2, 3, 4)), ValueError, r"order.*-1"),
    "order device": (
        lambda: _GRAPH.reordered(torch.arange(6).to("meta")),
        ValueError,
        r"order.*meta.*cpu",
    ),
    "order between graphs": (
        lambda: Graph.batch([_GRAPH, _GRAPH]).reordered(torch.arange(12).roll(1)),
        ValueError,
        r"order.*node 11\b.*graph 1\b.*graph 0\b",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    refused, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        refused()


def test_scipy_indices_out_of_range() -> None:
    # scipy checks when a matrix is made, not what is written into its arrays afterwards
    coo = sp.coo_array((np.ones(2), ([0, 1], [0, 1])), shape=(2, 2))
    coo.coords[1][1] = 7
    with pytest.raises(ValueError, match=r"matrix.*7.* 2 columns"):
        Graph.from_scipy(coo)
    coo.coords[1][1] = 0
    coo.coords[0][1] = -1
    with pytest.raises(ValueError, match=r"matrix.*-1"):
        Graph.from_scipy(coo)


# --- real graphs -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["debian", "moby"])
def test_real_graphs(name: str) -> None:
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("FASTGT_DATA", default)) / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    with np.load(path) as data:
        source, target = data["edge_index"].astype(np.int64)
    n = int(max(source.max(), target.max())) + 1
    graph = Graph.from_edge_index(torch.from_numpy(np.stack([source, target])), n)
    order = np.argsort(target, kind="stable")
    assert np.array_equal(graph.edge.numpy(), order)
    assert np.array_equal(graph.col.numpy(), source[order])
    assert np.array_equal(graph.row.numpy(), target[order])
    assert np.array_equal(graph.row_degree.numpy(), np.bincount(target, minlength=n))
    slot = np.argsort(source[order], kind="stable")
    assert np.array_equal(graph.columns.slot.numpy(), slot)
    assert np.array_equal(graph.columns.row.numpy(), target[order][slot])
    assert np.array_equal(graph.columns.edge.numpy(), order[slot])
    assert np.array_equal(graph.col_degree.numpy(), np.bincount(source, minlength=n))
    assert np.array_equal(graph.edge_index.numpy(), np.stack([source, target]))

"""Graph: one multiset of edges, two walks and the caller's order, against loops over lists."""

import doctest
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from graph_cases import (
    DTYPES,
    SIX,
    Case,
    Sorts,
    assert_same,
    cases,
    check,
    examples,
    few,
    joined,
    tensors_of,
)
from hypothesis import given
from hypothesis import strategies as st

from fastgt import AuxRequest, Graph, neighborhood_attention
from fastgt.real_graphs import open_data


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
    examples = doctest.DocTestFinder(recurse=False).find(Graph, "Graph", globs={})
    results = [doctest.DocTestRunner().run(test) for test in examples]
    assert sum(r.attempted for r in results) == 4
    assert sum(r.failed for r in results) == 0


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
    terms = {"edge_bias": bias, "return_aux": AuxRequest(weights=True)}
    o, (_, w, _) = neighborhood_attention(q, k, v, graph, **terms)
    moved = graph.reordered(order)
    o2, (_, w2, _) = neighborhood_attention(q[order], k[order], v[order], moved, **terms)
    torch.testing.assert_close(o2, o[order], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(w2, w, rtol=1e-10, atol=1e-12)
    twice = graph.transpose().transpose()
    o3, (_, w3, _) = neighborhood_attention(q, k, v, twice, **terms)
    torch.testing.assert_close(o3, o, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(w3, w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["debian", "moby"])
def test_real_graphs(name: str) -> None:
    try:
        with open_data(name) as data:
            source, target = data["edge_index"].astype(np.int64)
    except FileNotFoundError as error:
        pytest.skip(str(error))
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

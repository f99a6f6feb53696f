"""Graph: who owns its memory, how it is copied, moved, shown, indexed and traced, what it costs."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from graph_cases import SIX, Case, Sorts, assert_same, cases, check, few, joined, tensors_of
from hypothesis import given
from hypothesis import strategies as st

from fastgt import Graph, graph_build, neighborhood_attention


def test_fields_cannot_be_set() -> None:
    graph = Graph.from_edge_index(SIX, 6)
    for name in vars(graph):
        with pytest.raises(FrozenInstanceError):
            setattr(graph, name, getattr(graph, name))
        with pytest.raises(FrozenInstanceError):
            delattr(graph, name)
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
    assert_same(torch.load(tmp_path / "graph.pt"), graph)


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


def test_the_index_type() -> None:
    index_dtype = graph_build.index_dtype
    assert index_dtype(0, 0, 0) == torch.int32
    for place in range(3):
        sizes = [10, 10, 10]
        sizes[place] = 2**31 - 1
        assert index_dtype(*sizes) == torch.int32
        sizes[place] = 2**31
        assert index_dtype(*sizes) == torch.int64


@pytest.mark.parametrize("ends", [torch.int32, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("size", [1, 7, 200])
def test_counting_is_the_stable_sort(
    size: int, dtype: torch.dtype, ends: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU kernels count; without them, and elsewhere, edges are sorted."""
    key, other = torch.randint(size, (2, 1000), dtype=ends).t().contiguous().t()
    given = key, other, size, dtype, torch.randperm(1000).to(dtype)
    found = graph_build.group(*given)
    monkeypatch.setattr("fastgt.cpu.graph.can_group", lambda *_: False)
    for a, b in zip(found, graph_build.group(*given), strict=True):
        assert a is not None
        assert b is not None
        assert (a.dtype, a.tolist()) == (dtype, b.tolist())


def test_more_edges_than_int32_holds() -> None:
    many = torch.empty(2**31 + 5, dtype=torch.int64, device="meta")
    other, order, ptr, _ = graph_build.group(many, many, 10, torch.int64)
    assert (other.shape, order.shape, ptr.shape) == (many.shape, many.shape, (11,))
    assert {x.dtype for x in (other, order, ptr)} == {torch.int64}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend int32 ends at 7."""
    monkeypatch.setattr(graph_build, "INT32_MAX", 7)


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

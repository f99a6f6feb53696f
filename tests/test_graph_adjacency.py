"""Graph.from_pyg of sparse adjacency matrices, and of PyG's EdgeIndex, which knows sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import SIX, Case, assert_same, cases, few
from hypothesis import given
from torch import Tensor

from fastgt import Graph, aggregate

pyg = pytest.importorskip("torch_geometric.data")
EdgeIndex = pytest.importorskip("torch_geometric.edge_index").EdgeIndex
# what torch says of its sparse tensors
pytestmark = pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor", "ignore:Sparse CSC tensor", "ignore:Sparse invariant checks"
)


class SparseTensor:
    """What ``torch_sparse.SparseTensor`` answers, for entries in row-major order."""

    def __init__(self, row: Tensor, col: Tensor, sizes: tuple[int, int]):
        counts = torch.bincount(row, minlength=sizes[0])
        self._row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self._row, self._col, self._sizes = row, col, sizes

    def csr(self) -> tuple[Tensor, Tensor, None]:
        return self._row_ptr, self._col, None

    def coo(self) -> tuple[Tensor, Tensor, None]:
        return self._row, self._col, None

    def sparse_sizes(self) -> tuple[int, int]:
        return self._sizes


def coo(case: Case) -> Tensor:
    ends = torch.tensor([case.target, case.source]).reshape(2, -1).long()
    return torch.sparse_coo_tensor(ends, torch.ones(ends.shape[1]), case.size)


def row_major(case: Case) -> list[tuple[int, int]]:
    """(row, column) of every edge, by a sort of Python's."""
    return sorted(zip(case.target, case.source, strict=True))


def duck(case: Case) -> Any:
    pairs = torch.tensor(row_major(case)).reshape(-1, 2).long()
    return SparseTensor(pairs[:, 0].clone(), pairs[:, 1].clone(), case.size)


KEPT: list[Any] = []  # a relation holds no reference to its HeteroData


def relation(adj_t: Any, case: Case) -> Any:
    data = pyg.HeteroData()
    KEPT[:] = [data]
    data["key"].num_nodes, data["query"].num_nodes = case.cols, case.rows
    data["key", "to", "query"].adj_t = adj_t
    return data["key", "to", "query"]


MATRICES: dict[str, Callable[[Case], Any]] = {
    "SparseTensor": duck,
    "sparse_coo with duplicates": coo,
    "sparse_coo": lambda case: coo(case).coalesce(),
    "sparse_csr": lambda case: coo(case).to_sparse_csr(),
    "sparse_csc": lambda case: coo(case).to_sparse_csc(),
}


@pytest.mark.parametrize("name", MATRICES)
@few
@given(case=cases())
def test_entries_are_edges_numbered_row_by_row(name: str, case: Case) -> None:
    pairs = row_major(case)
    if name in ("sparse_coo", "sparse_csr", "sparse_csc"):  # which merge duplicates
        pairs = sorted(set(pairs))
    graph = Graph.from_pyg(relation(MATRICES[name](case), case))
    assert graph.edge.tolist() == list(range(len(pairs)))
    source, target = graph.edge_index.tolist()
    assert list(zip(target, source, strict=True)) == pairs
    assert_same(graph, Graph.from_edge_index(graph.edge_index, case.size))


def test_values_of_a_matrix_stand_in_the_order_of_its_edges() -> None:
    ends = SIX.flip(0)
    matrix = torch.sparse_coo_tensor(ends, torch.tensor([1.0, 2, 4, 8, 16]), (6, 6)).coalesce()
    x = torch.rand(6, 3)
    expected = matrix.to_dense() @ x
    for layout in (matrix, matrix.to_sparse_csr()):
        graph = Graph.from_pyg(pyg.Data(x=x, adj_t=layout))
        value = layout.values()[:, None].expand(-1, 3)
        found = aggregate(x, graph, edge_value=value * x[graph.edge_index[0]])
        torch.testing.assert_close(found - aggregate(x, graph), expected)
    turned = matrix.to_sparse_csc()
    graph = Graph.from_pyg(pyg.Data(x=x, adj_t=turned))
    assert turned.values().tolist() != turned.to_sparse_csr().values().tolist()
    for (j, i), value in zip(
        graph.edge_index.t().tolist(), turned.to_sparse_csr().values().tolist(), strict=True
    ):
        assert matrix.to_dense()[i, j] == value


def test_entries_that_stand_twice_keep_their_order() -> None:
    ends = torch.tensor([[1, 0, 1, 1], [2, 0, 0, 2]])
    matrix = torch.sparse_coo_tensor(ends, torch.ones(4), (3, 3))
    assert not matrix.is_coalesced()
    graph = Graph.from_pyg(pyg.Data(adj_t=matrix, num_nodes=3))
    assert graph.edge_index.tolist() == [[0, 0, 2, 2], [0, 1, 1, 1]]


def test_entries_may_hold_vectors() -> None:
    matrix = torch.sparse_coo_tensor(SIX.flip(0), torch.ones(5, 4), (6, 6, 4))
    assert Graph.from_pyg(pyg.Data(adj_t=matrix, num_nodes=6)).num_edges == 5


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_what_pygs_transform_makes(layout: torch.layout) -> None:
    transform = pytest.importorskip("torch_geometric.transforms").ToSparseTensor(layout=layout)
    edge_index = SIX[:, [0, 1, 3, 4]]
    data = pyg.Data(x=torch.rand(6, 1), edge_index=edge_index)
    made = transform(data.clone())
    assert "edge_index" not in made
    graph = Graph.from_pyg(made)
    ends = sorted(zip(*edge_index.flip(0).tolist(), strict=True))
    assert list(zip(*graph.edge_index.flip(0).tolist(), strict=True)) == ends


def test_a_batch_of_matrices_keeps_its_graphs() -> None:
    matrix = coo(Case(6, 6, *SIX[:, 1:].tolist(), [(6, 6)])).to_sparse_csr()
    data = pyg.Data(x=torch.rand(6, 1), adj_t=matrix)
    one = Graph.from_pyg(data)
    assert_same(Graph.from_pyg(pyg.Batch.from_data_list([data, data])), Graph.batch([one, one]))


def test_an_edge_index_comes_before_a_matrix() -> None:
    matrix = coo(Case(6, 6, [0], [1], [(6, 6)]))
    data = pyg.Data(edge_index=SIX, adj_t=matrix, num_nodes=6)
    assert_same(Graph.from_pyg(data), Graph.from_edge_index(SIX, 6))


def test_a_matrix_says_how_many_nodes_there_are() -> None:
    case = Case(6, 7, *SIX.tolist(), [(6, 7)])
    data = pyg.HeteroData()
    data["key", "to", "query"].adj_t = duck(case)
    graph = Graph.from_pyg(data["key", "to", "query"])
    assert (graph.num_rows, graph.num_cols) == (6, 7)


SQUARE = Case(6, 6, *SIX.tolist(), [(6, 6)])
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "rows": (
        lambda: relation(duck(SQUARE), Case(5, 6, [], [], [])),
        ValueError,
        r"adj_t has 6 rows but data\['query'\] has 5 nodes",
    ),
    "columns": (
        lambda: relation(duck(SQUARE), Case(6, 8, [], [], [])),
        ValueError,
        r"adj_t has 6 columns but data\['key'\] has 8 nodes",
    ),
    "nodes": (
        lambda: pyg.Data(x=torch.ones(7, 1), adj_t=coo(SQUARE)),
        ValueError,
        r"adj_t has 6 rows but data has 7 nodes",
    ),
    "no square": (
        lambda: pyg.Data(x=torch.ones(6, 1), adj_t=coo(Case(6, 7, [], [], []))),
        ValueError,
        r"adj_t has 7 columns but data has 6 nodes",
    ),
    "dense": (
        lambda: pyg.Data(adj_t=torch.ones(6, 6)),
        TypeError,
        r"adj_t must be a sparse matrix, .* got a dense tensor",
    ),
    "a list": (
        lambda: pyg.Data(adj_t=[[1]], num_nodes=1),
        TypeError,
        r"adj_t must be a sparse matrix, .* got list",
    ),
    "blocks": (
        lambda: pyg.Data(adj_t=torch.ones(6, 6).to_sparse_bsr((2, 2)), num_nodes=6),
        TypeError,
        r"adj_t must be torch.sparse_csr, .* got torch.sparse_bsr",
    ),
    "a cube": (
        lambda: pyg.Data(adj_t=torch.ones(2, 2, 2).to_sparse_coo(), num_nodes=2),
        ValueError,
        r"adj_t must be \[targets, sources\], got \[2, 2, 2\]",
    ),
    "batches": (
        lambda: pyg.Data(adj_t=torch.ones(2, 2, 2).to_sparse_csr(), num_nodes=2),
        ValueError,
        r"adj_t must be \[targets, sources\], got \[2, 2, 2\]",
    ),
    "meta": (
        lambda: pyg.Data(adj_t=coo(SQUARE).to("meta"), num_nodes=6),
        RuntimeError,
        "adj_t is on the meta device",
    ),
    "another device": (
        lambda: pyg.Data(adj_t=coo(SQUARE), ptr=torch.tensor([0, 6]).to("meta"), num_nodes=6),
        ValueError,
        r"data\.ptr is on meta, adj_t on cpu",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse B")
@pytest.mark.parametrize("name", REFUSED)
def test_matrices_that_do_not_fit_are_refused(name: str) -> None:
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        Graph.from_pyg(make())


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((7, 7), (7, 7)),
        ((9, 8), (8, 9)),  # PyG: (sources, targets); fastgt: (rows, columns)
        ((9, None), (5, 9)),
        ((None, 9), (9, 6)),
        ((None, None), (6, 6)),
    ],
)
def test_an_edge_index_of_pyg_knows_its_sizes(sizes: tuple, expected: tuple[int, int]) -> None:
    edge_index = EdgeIndex(SIX, sparse_size=sizes)
    graph = Graph.from_edge_index(edge_index)
    assert_same(graph, Graph.from_edge_index(SIX, expected))
    assert all(type(x) is Tensor for x in graph._tensors())
    # what is asked for by name comes first: sizes that PyG has counted are not the graph's
    edge_index.get_sparse_size()
    assert_same(Graph.from_edge_index(edge_index, 10), Graph.from_edge_index(SIX, 10))
    ptr = torch.tensor([0, 4, 8])
    batch = Graph.from_edge_index(edge_index, graph_ptr=ptr)
    assert_same(batch, Graph.from_edge_index(SIX, graph_ptr=ptr))


def test_sizes_of_an_edge_index_in_pygs_data() -> None:
    edge_index = EdgeIndex(SIX, sparse_size=(7, 7))
    assert Graph.from_pyg(pyg.Data(edge_index=edge_index)).num_nodes == 7
    assert Graph.from_pyg(pyg.Data(x=torch.ones(8, 1), edge_index=edge_index)).num_nodes == 8
    data = pyg.HeteroData()
    data["key", "to", "query"].edge_index = EdgeIndex(SIX, sparse_size=(9, 8))
    assert_same(Graph.from_pyg(data["key", "to", "query"]), Graph.from_edge_index(SIX, (8, 9)))


def test_nothing_that_an_edge_index_has_cached_is_trusted() -> None:
    edge_index = EdgeIndex(SIX, sparse_size=(6, 6), sort_order="col")  # which is not true
    edge_index._indptr = torch.zeros(7, dtype=torch.long)
    edge_index._T_perm = torch.zeros(5, dtype=torch.long)
    assert_same(Graph.from_edge_index(edge_index), Graph.from_edge_index(SIX, 6))
    small = EdgeIndex(SIX, sparse_size=(4, 4))
    with pytest.raises(ValueError, match="edge_index has index 5 but the graph has 4 nodes"):
        Graph.from_edge_index(small)


def test_a_sparse_tensor_is_no_edge_index() -> None:
    with pytest.raises(TypeError, match="edge_index must be a tensor of integers, got Sparse"):
        Graph.from_edge_index(duck(SQUARE))

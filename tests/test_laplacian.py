"""Laplacian encodings against dense algebra on a Laplacian written out with loops."""

import subprocess
import sys
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigsh, spilu

from fastgt import Graph
from fastgt.encodings import flip_signs, lanczos, laplacian_components, laplacian_pe
from fastgt.real_graphs import open_data
from fastgt.testing import with_index_dtype

examples = settings(deadline=None, max_examples=25)
ROOT2 = 2**-0.5


def dense():
    return mock.patch.object(laplacian_components, "_DENSE", 10**9)


def krylov():
    return mock.patch.object(laplacian_components, "_DENSE", 0)


def both_ways(edges: list[tuple[int, int]], n: int) -> Graph:
    """Every pair once each way, a self loop once."""
    pairs = edges + [(j, i) for i, j in edges if i != j]
    return Graph.from_edge_index(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T, n)


def loop_laplacian(graph: Graph) -> np.ndarray:
    """I - D^-1/2 A D^-1/2, edge by edge."""
    n = graph.num_rows
    degree = [0] * n
    for _, target in graph.edge_index.T.tolist():
        degree[target] += 1
    matrix = np.eye(n)
    for source, target in graph.edge_index.T.tolist():
        matrix[target, source] -= (max(degree[target], 1) * max(degree[source], 1)) ** -0.5
    return matrix


def check(graph: Graph, k: int, pe: torch.Tensor, values: torch.Tensor) -> None:
    """Values, residuals, orthonormality, signs and padding of one graph."""
    n = graph.num_rows
    real = max(0, min(k, n - 1))
    assert pe.shape == (n, k)
    assert values.shape == (k,)
    assert pe.dtype == values.dtype == torch.float32
    assert not pe[:, real:].any()
    assert not values[real:].any()
    u, w, matrix = (
        pe[:, :real].double().numpy(),
        values[:real].double().numpy(),
        loop_laplacian(graph),
    )
    assert abs(w - np.linalg.eigvalsh(matrix)[1 : real + 1]).max(initial=0) < 1e-6
    assert abs(matrix @ u - u * w).max(initial=0) < 1e-6
    assert abs(u.T @ u - np.eye(real)).max(initial=0) < 1e-6
    for column in u.T:
        assert column.max() >= (1 - 1e-6) * -column.min()


def solve(graph: Graph, k: int) -> None:
    pe, values = laplacian_pe(graph, k, return_eigenvalues=True)
    check(graph, k, pe, values[0])


@st.composite
def graphs(draw, low: int = 0, connected: bool = False) -> Graph:
    n = draw(st.integers(low, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    # few edges leave many components and isolated nodes; duplicates and self loops occur
    edges = rng.integers(0, max(n, 1), (draw(st.integers(0, 3 * n)), 2)).tolist()
    if connected:
        edges += [(i, int(rng.integers(0, i))) for i in range(1, n)]
    return both_ways([(i, j) for i, j in edges], n)


@given(graphs(), st.integers(0, 12), st.sampled_from([dense, krylov]))
@examples
def test_eigenpairs(graph, k, solver):
    with solver():
        solve(graph, k)


@given(graphs(low=2, connected=True), st.sampled_from([dense, krylov]))
@examples
def test_trivial_vector_is_the_one_left_out(graph, solver):
    trivial = graph.row_degree.double().sqrt()
    with solver():
        pe = laplacian_pe(graph, 5).double()
    assert (trivial @ pe / trivial.norm()).abs().max() < 1e-6


@given(st.lists(graphs(), max_size=4), st.integers(1, 6), st.sampled_from([dense, krylov]))
@examples
def test_batch_is_its_graphs(parts, k, solver):
    if not parts:
        return
    batch = Graph.batch(parts)
    with solver():
        pe, values = laplacian_pe(batch, k, return_eigenvalues=True)
        singles = [laplacian_pe(part, k, return_eigenvalues=True) for part in parts]
    assert values.shape == (len(parts), k)
    assert torch.equal(pe, torch.cat([x for x, _ in singles]))
    assert torch.equal(values, torch.cat([x for _, x in singles]))


@given(graphs(low=2, connected=True), st.integers(0, 2**31), st.sampled_from([dense, krylov]))
@examples
def test_renumbered_nodes(graph, seed, solver):
    """Same eigenvalues, and the same projector on every eigenspace."""
    n, k = graph.num_rows, min(7, graph.num_rows - 1)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    with solver():
        pe, values = laplacian_pe(graph, k, return_eigenvalues=True)
        moved, same = laplacian_pe(graph.reordered(order), k, return_eigenvalues=True)
    assert torch.allclose(values, same, atol=1e-6)
    spectrum = np.linalg.eigvalsh(loop_laplacian(graph))
    for count in range(1, k + 1):
        # below a gap the span is determined, whatever basis was chosen in it
        if count + 1 == n or spectrum[count + 1] - spectrum[count] > 1e-3:
            projector = pe[order, :count] @ pe[order, :count].T
            assert torch.allclose(moved[:, :count] @ moved[:, :count].T, projector, atol=1e-5)


def test_path_of_three_by_hand():
    pe, values = laplacian_pe(both_ways([(0, 1), (1, 2)], 3), 2, return_eigenvalues=True)
    assert values[0].tolist() == pytest.approx([1, 2])
    expected = torch.tensor([[ROOT2, -0.5], [0, ROOT2], [-ROOT2, -0.5]])
    assert torch.allclose(pe, expected, atol=1e-6)


def test_duplicates_and_self_loops_count():
    """Two nodes, joined m times, s loops on the first: L has the trace 2 - s / (m + s)."""
    pe, values = laplacian_pe(both_ways([(0, 1)] * 3 + [(0, 0)] * 2, 2), 1, return_eigenvalues=True)
    assert values.item() == pytest.approx(2 - 2 / 5)
    # orthogonal to the trivial vector, (sqrt 5, sqrt 3)
    assert pe[:, 0].tolist() == pytest.approx([-((3 / 8) ** 0.5), (5 / 8) ** 0.5])


def chains(count: int, length: int) -> list[tuple[int, int]]:
    """Equal chains hanging off node 0."""
    nodes = [[0, *range(1 + i * length, 1 + (i + 1) * length)] for i in range(count)]
    return [edge for chain in nodes for edge in pairwise(chain)]


def torus(side: int) -> list[tuple[int, int]]:
    cells = np.arange(side**3).reshape(side, side, side)
    ends = [np.stack([cells, np.roll(cells, 1, axis)], -1).reshape(-1, 2) for axis in range(3)]
    return [(i, j) for i, j in np.concatenate(ends).tolist()]


@pytest.mark.parametrize("solver", [dense, krylov])
@pytest.mark.parametrize(
    ("edges", "n", "k"),
    [
        (chains(9, 40), 361, 8),
        (torus(7), 343, 30),
        ([(0, i) for i in range(1, 300)], 300, 20),
        ([(i, j) for i in range(150) for j in range(i)], 150, 30),
    ],
    ids=["chains", "torus", "star", "complete"],
)
def test_every_copy_of_a_repeated_eigenvalue(edges, n, k, solver):
    with solver():
        solve(both_ways(edges, n), k)


def test_complete_graphs_take_no_more_searches_than_needed():
    """All eigenvalues are equal: the first search is complete, and one or two others show it."""
    graph = both_ways([(i, j) for i in range(120) for j in range(i)], 120)
    with krylov(), mock.patch("scipy.sparse.linalg.eigsh", wraps=eigsh) as searched:
        laplacian_pe(graph, 4)
    assert searched.call_count <= 4  # each of the others is coarse, and exact if it finds more


def test_paths_are_factorised():
    n = 3000
    path = both_ways([(i, i + 1) for i in range(n - 1)], n)
    with mock.patch("scipy.sparse.linalg.spilu", wraps=spilu) as factorised:
        pe, values = laplacian_pe(path, 4, return_eigenvalues=True)
    assert factorised.call_count == 1
    # 1 - cos(pi j / (n - 1)), without the cancellation
    exact = 2 * torch.sin(torch.pi * torch.arange(1, 5).double() / (n - 1) / 2) ** 2
    assert torch.allclose(values[0].double(), exact, rtol=1e-6, atol=0)
    # the eigenvectors, where both ends have degree 1: sqrt(D) cos(pi j i / (n - 1))
    i, j = torch.arange(n).double()[:, None], torch.arange(1, 5).double()
    u = path.row_degree.double().sqrt()[:, None] * torch.cos(torch.pi * i * j / (n - 1))
    overlap = (pe.double() * u / u.norm(dim=0)).sum(0).abs()
    assert torch.allclose(overlap, torch.ones(4, dtype=torch.float64), atol=1e-6)


def test_components():
    """Eigenvalue 0 once per component with an edge, the largest component's vector skipped."""
    edges = [(0, 1), (2, 3), (3, 4), (6, 7), (7, 8), (8, 9)]  # 5 is isolated
    pe, values = laplacian_pe(both_ways(edges, 10), 4, return_eigenvalues=True)
    assert values[0, :2].tolist() == [0, 0]
    assert values[0, 2:].tolist() == pytest.approx([0.5, 1])
    expected = torch.zeros(10, 2)
    expected[2:5, 0] = torch.tensor([0.5, ROOT2, 0.5])
    expected[:2, 1] = ROOT2
    assert torch.allclose(pe[:, :2], expected, atol=1e-6)
    assert not pe[:6, 2].any()
    assert pe.isfinite().all()


def test_isolated_nodes():
    """Their degree is clipped at 1: eigenvalue 1, not 0. Equal ones share their columns."""
    pe, values = laplacian_pe(both_ways([(1, 2)], 4), 3, return_eigenvalues=True)
    assert values[0].tolist() == pytest.approx([1, 1, 2])
    expected = torch.zeros(4, 3)
    expected[[0, 3], 0] = ROOT2
    expected[[0, 3], 1] = torch.tensor([-ROOT2, ROOT2])
    expected[1, 2], expected[2, 2] = ROOT2, -ROOT2
    assert torch.allclose(pe, expected, atol=1e-6)


def test_no_edges_at_all():
    pe, values = laplacian_pe(both_ways([], 50_000), 3, return_eigenvalues=True)
    assert values.tolist() == [[1, 1, 1]]
    # the vector on all nodes is skipped; then one node against those before it
    assert pe[4:].count_nonzero() == 0
    expected = torch.tensor([[-1, -1, -1], [1, -1, -1], [0, 2, -1], [0, 0, 3.0]])
    assert torch.allclose(pe[:4], expected / expected.norm(dim=0))


@pytest.mark.parametrize("k", [0, 1, 8])
def test_small_and_empty_graphs(k):
    parts = [both_ways([], 0), both_ways([(0, 1), (1, 2)], 3), both_ways([], 0)]
    parts += [both_ways([], 1), both_ways([(0, 0)], 1), both_ways([], 0)]
    pe, values = laplacian_pe(Graph.batch(parts), k, return_eigenvalues=True)
    assert pe.shape == (5, k)
    assert values.shape == (6, k)
    check(parts[1], k, pe[:3], values[1])
    assert not pe[3:].any()
    assert not values[[0, 2, 3, 4, 5]].any()
    assert laplacian_pe(parts[0], k).shape == (0, k)


@pytest.mark.parametrize("solver", [dense, krylov])
def test_repeatable_to_the_bit(solver):
    rng = np.random.default_rng(1)
    edges = [(i, int(rng.integers(0, i))) for i in range(1, 400)] + chains(6, 20)
    graphs = [both_ways(edges, 400), both_ways([(i, j) for i in range(60) for j in range(i)], 60)]
    graph = Graph.batch(graphs)
    with solver():
        first = laplacian_pe(graph, 8)
        np.random.seed(3)
        assert torch.equal(first, laplacian_pe(graph, 8))
        assert torch.equal(first, laplacian_pe(with_index_dtype(graph, torch.int64), 8))


def test_one_way_edges():
    one_way = Graph.from_edge_index(torch.tensor([[0, 1, 1, 3], [1, 0, 2, 2]]), 4)
    with pytest.raises(ValueError, match="1 edges from node 1 to 2 but 0 back"):
        laplacian_pe(one_way, 2)
    unequal = Graph.from_edge_index(torch.tensor([[0, 0, 1], [1, 1, 0]]), 2)
    with pytest.raises(ValueError, match="2 edges from node 0 to 1 but 1 back; symmetrize"):
        laplacian_pe(unequal, 1)
    repaired = both_ways([(0, 1), (1, 2), (2, 3)], 4)
    assert torch.equal(laplacian_pe(one_way, 2, symmetrize=True), laplacian_pe(repaired, 2))
    assert torch.equal(laplacian_pe(repaired, 2, symmetrize=True), laplacian_pe(repaired, 2))
    twice = both_ways([(0, 1), (0, 1), (1, 1)], 2)
    looped = Graph.from_edge_index(torch.tensor([[0, 0, 1, 1], [1, 1, 0, 1]]), 2)
    assert torch.equal(laplacian_pe(looped, 1, symmetrize=True), laplacian_pe(twice, 1))


def test_the_graph_is_left_alone(device):
    # unsorted duplicates in a row: scipy would sort and merge them in place
    col = torch.tensor([2, 1, 2, 0, 0, 0], dtype=torch.int32, device=device)
    row_ptr = torch.tensor([0, 3, 4, 6], dtype=torch.int32, device=device)
    graph = Graph.from_csr(row_ptr, col)
    pe, values = laplacian_pe(graph, 2, return_eigenvalues=True)
    assert torch.equal(graph.col, col)
    assert torch.equal(graph.row_ptr, row_ptr)
    assert pe.device == values.device == graph.device
    check(graph.to("cpu"), 2, pe.cpu(), values[0].cpu())


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (2.0, TypeError, "k must be an int, got float"),
        (np.float64(2), TypeError, "k must be an int, got float64"),
        (np.True_, TypeError, "k must be an int, got bool"),
        (True, TypeError, "k must be an int, got bool"),
        (None, TypeError, "k must be an int, got NoneType"),
        (-1, ValueError, "k must not be negative, got -1"),
    ],
)
def test_bad_k(k, error, message):
    with pytest.raises(error, match=message):
        laplacian_pe(both_ways([(0, 1)], 2), k)


def test_k_of_numpy():
    graph = both_ways([(0, 1), (1, 2), (2, 3)], 4)
    assert torch.equal(laplacian_pe(graph, np.int64(3)), laplacian_pe(graph, 3))


def test_without_scipy():
    """Everything but the call works, and that says what is missing."""
    code = (
        "import sys; sys.modules['scipy'] = None\n"
        "import torch, fastgt, fastgt.encodings\n"
        "g = fastgt.Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]))\n"
        "print(fastgt.encodings.flip_signs(torch.ones(2, 1)).shape)\n"
        "try: fastgt.encodings.laplacian_pe(g, 1)\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == (
        "torch.Size([2, 1])\nlaplacian_pe needs scipy, which is not installed\n"
    ), run.stderr


@pytest.mark.parametrize("solver", [dense, krylov])
def test_equal_components_in_another_order(solver):
    """Three equal components: the same spans, whichever has the first numbers."""
    ring = [(i, (i + 1) % 5) for i in range(5)] + [(0, 2)]
    graph = both_ways([(i + 5 * c, j + 5 * c) for c in range(3) for i, j in ring], 15)
    with solver():
        pe, values = laplacian_pe(graph, 8, return_eigenvalues=True)
        check(graph, 8, pe, values[0])
        for seed in range(5):
            order = torch.from_numpy(np.random.default_rng(seed).permutation(15))
            moved, same = laplacian_pe(graph.reordered(order), 8, return_eigenvalues=True)
            assert torch.allclose(values, same, atol=1e-6)
            for count in (2, 5, 8):  # each eigenvalue occurs three times, 0 twice more
                projector = pe[order, :count] @ pe[order, :count].T
                assert torch.allclose(moved[:, :count] @ moved[:, :count].T, projector, atol=1e-5)


def test_an_edge_index_is_not_a_graph():
    with pytest.raises(TypeError, match=r"graph must be a fastgt\.Graph, got Tensor"):
        laplacian_pe(torch.tensor([[0, 1], [1, 0]]), 1)


def test_bipartite_is_refused():
    with pytest.raises(ValueError, match="graph must be square, got 2 rows and 3 columns"):
        laplacian_pe(Graph.from_dense(torch.ones(2, 3, dtype=torch.bool)), 1)


def test_no_convergence_is_told():
    rng = np.random.default_rng(0)
    crowd = both_ways([(i, j) for i, j in rng.integers(0, 400, (3000, 2)).tolist()], 400)
    batch = Graph.batch([both_ways([(0, 1)], 2), crowd])
    message = r"laplacian_pe: no convergence in graph 1, in a component of 400 nodes, for 20 "
    with krylov():
        laplacian_pe(batch, 20)
        with (
            mock.patch.object(lanczos, "_WORK", 0),
            mock.patch.object(lanczos, "_PRODUCTS", 50),
            pytest.raises(RuntimeError, match=message) as caught,
        ):
            laplacian_pe(batch, 20)
    assert "steps of conjugate gradients" in str(caught.value.__cause__.__cause__)


def test_flip_signs():
    pe = torch.randn(7, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = pe.clone()
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([flip_signs(pe, generator) / pe for _ in range(400)])  # [draws, N, k]
    assert torch.equal(pe, kept)
    assert draws.dtype == pe.dtype
    assert torch.equal(draws, draws[:, :1].expand_as(draws).contiguous())
    signs = draws[:, 0]
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    # six standard deviations of a fair coin; correlated columns would show in the product
    assert signs.mean(0).abs().max() < 6 / 400**0.5
    assert (signs[:, 0] * signs[:, 1]).mean().abs() < 6 / 400**0.5
    again = [flip_signs(pe, torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*again)
    torch.manual_seed(5)
    one = flip_signs(pe)
    torch.manual_seed(5)
    assert torch.equal(one, flip_signs(pe))
    assert flip_signs(torch.zeros(3, 0)).shape == (3, 0)


def test_flip_signs_on_the_device(device):
    pe = torch.ones(3, 4, device=device)
    flipped = flip_signs(pe, torch.Generator().manual_seed(0))  # a CPU generator serves any device
    assert flipped.device == pe.device
    assert torch.equal(flipped.abs(), pe)


@pytest.mark.parametrize("pe", [torch.ones(3), torch.ones(3, 2, dtype=torch.int64)])
def test_flip_signs_refusals(pe):
    with pytest.raises(ValueError, match="pe must be"):
        flip_signs(pe)


def load(name: str) -> dict[str, np.ndarray]:
    try:
        with open_data(name) as data:
            return dict(data)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def adjacency(graph: Graph) -> csr_array:
    entries = np.ones(graph.num_edges), graph.col.numpy().copy(), graph.row_ptr.numpy().copy()
    return csr_array(entries, shape=(graph.num_rows, graph.num_cols))


def test_cora():
    """2,485 connected papers; the eigenvalues were found by shift-invert, outside the package."""
    data = load("cora")
    source, target = data["edge_index"].astype(np.int64)
    n = len(data["y"])
    both = np.unique(np.concatenate([source * n + target, target * n + source]))
    whole = Graph.from_edge_index(torch.from_numpy(np.stack([both % n, both // n])), n)
    label = connected_components(adjacency(whole), directed=False)[1]
    inside = np.flatnonzero(label == np.bincount(label).argmax())
    graph = Graph.from_scipy(adjacency(whole)[inside][:, inside])
    pe, values = laplacian_pe(graph, 8, return_eigenvalues=True)
    expected = [0.004784, 0.007435, 0.008626, 0.017507, 0.017808, 0.019682, 0.019899, 0.021715]
    assert values[0].tolist() == pytest.approx(expected, abs=1e-6)
    u = pe.double().numpy()
    assert abs(loop_laplacian(graph) @ u - u * values.numpy()).max() < 1e-6
    assert abs(u.T @ u - np.eye(8)).max() < 1e-6
    # 78 components: eigenvalue 0 fills all columns of the whole graph
    pe, values = laplacian_pe(whole, 8, return_eigenvalues=True)
    assert not values.any()
    assert (pe != 0).any(1).sum() == np.sort(np.bincount(label))[-9:-1].sum()


def test_zinc():
    data = load("zinc12k")
    ptr = data["val_node_ptr"].astype(np.int64)[:33]
    ends = data["val_edge_ptr"].astype(np.int64)[:33]
    edge_index = data["val_edge_local"][:, : ends[-1]] + np.repeat(ptr[:-1], np.diff(ends))
    pe, values = laplacian_pe(
        Graph.from_edge_index(
            torch.from_numpy(edge_index), int(ptr[-1]), graph_ptr=torch.from_numpy(ptr)
        ),
        8,
        return_eigenvalues=True,
    )
    for g in range(32):
        local = data["val_edge_local"][:, ends[g] : ends[g + 1]].astype(np.int64)
        graph = Graph.from_edge_index(torch.from_numpy(local), int(ptr[g + 1] - ptr[g]))
        check(graph, 8, pe[ptr[g] : ptr[g + 1]], values[g])

"""Solvers of one large component: which of them runs, what it takes, and that it is right."""

import subprocess
import sys
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import scipy.sparse as sp
from laplacian_cases import NORMALIZATIONS, both_ways, dense_laplacian, expander
from numpy.testing import assert_allclose
from scipy.sparse.linalg import eigsh, spilu

from fastgt import Graph
from fastgt.encodings import lanczos, laplacian_eigenpairs, laplacian_pe


def path(nodes: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(nodes))


def grid(height: int, width: int) -> list[tuple[int, int]]:
    cells = np.arange(height * width).reshape(height, width)
    ends = [cells[:, :-1], cells[:, 1:]], [cells[:-1], cells[1:]]
    return np.concatenate([np.stack([x.ravel(), y.ravel()], 1) for x, y in ends]).tolist()


def graph_of(kind: str) -> Graph:
    rng = np.random.default_rng(0)
    if kind == "path":
        return both_ways(path(list(range(4000))), 4000)
    if kind == "grid":
        return both_ways(grid(50, 80), 4000)
    if kind == "tree":
        return both_ways([(i, (i - 1) // 2) for i in range(1, 4000)], 4000)
    if kind == "complete":
        return both_ways([(i, j) for i in range(600) for j in range(i)], 600)
    edges = expander(900).edge_index.T[:1800].tolist()
    if kind == "expander":
        return both_ways(edges, 900)
    if kind == "hub":  # of degree 450: bounds on L say little about most nodes
        return both_ways(edges + [(900, i) for i in range(0, 900, 2)], 901)
    assert kind == "lollipop"
    more = rng.integers(0, 900, (1800, 2)).tolist()
    return both_ways(edges + more + path(list(range(899, 1300))), 1300)


def laplacian_of(graph: Graph, normalization: str | None) -> tuple[sp.csr_array, np.ndarray, float]:
    """-> L, its trivial vector, a bound on its eigenvalues."""
    entries = np.ones(graph.num_edges), tuple(graph.edge_index.numpy())
    a = sp.csr_array(sp.coo_array(entries, shape=(graph.num_rows,) * 2))
    degree = a.sum(1)
    if normalization is None:
        plain = sp.csr_array(sp.diags_array(degree) - a)
        return plain, np.full(len(degree), len(degree) ** -0.5), 2 * degree.max()
    scale = sp.diags_array(degree**-0.5)
    normal = sp.csr_array(sp.eye_array(len(degree)) - scale @ a @ scale)
    return normal, np.sqrt(degree / degree.sum()), 2.0


FACTORISED = ("path", "grid", "tree")


@NORMALIZATIONS
@pytest.mark.parametrize(
    "kind", ["path", "grid", "tree", "complete", "expander", "hub", "lollipop"]
)
def test_lowest(kind, normalization):
    """Residuals, orthogonality, and that no eigenvalue below is missing, by counting signs."""
    matrix, trivial, bound = laplacian_of(graph_of(kind), normalization)
    with mock.patch("scipy.sparse.linalg.spilu", wraps=spilu) as factorised:
        w, u = lanczos.lowest(matrix, trivial, bound, 6)
    assert factorised.called == (kind in FACTORISED)
    assert (np.diff(w) >= -1e-12 * bound).all()
    assert abs(matrix @ u - u * w).max() < 1e-8
    assert abs(u.T @ u - np.eye(6)).max() < 1e-9
    assert abs(trivial @ u).max() < 1e-9
    # the next one is not below: of the space orthogonal to all these
    known = np.column_stack([trivial, u])
    rest = sp.linalg.LinearOperator(
        matrix.shape,
        lambda x: bound * (x - known @ (known.T @ x)) - matrix @ (x - known @ (known.T @ x)),
        dtype=np.float64,
    )
    if kind in ("expander", "complete"):
        above = bound - eigsh(rest, 1, which="LA", return_eigenvectors=False)[0]
        assert above >= w[-1] - 1e-9


@NORMALIZATIONS
def test_against_dense_algebra(normalization):
    """Paths that hang off an expander: a factor of a part, conjugate gradients on the rest."""
    edges = expander(300).edge_index.T[:600].tolist()
    tails = [edge for t in range(10) for edge in path([t, *range(300 + 60 * t, 360 + 60 * t)])]
    graph = both_ways(edges + tails, 900)
    exact = np.linalg.eigvalsh(dense_laplacian(graph, normalization))[1:9]
    matrix, trivial, bound = laplacian_of(graph, normalization)
    eliminated, core, _ = lanczos._elimination(matrix)
    assert len(eliminated) + len(core) == 900
    with (
        mock.patch.object(lanczos, "_elimination", return_value=(eliminated, core, False)),
        mock.patch.object(lanczos, "_filtered", side_effect=lanczos._UnsolvedError),
    ):
        w, u = lanczos.lowest(matrix, trivial, bound, 8)
    assert_allclose(w, exact, rtol=1e-9)
    assert abs(matrix @ u - u * w).max() < 1e-9


def test_the_inverse_comes_where_a_filter_is_slow():
    matrix, trivial, bound = laplacian_of(graph_of("lollipop"), "sym")
    w, u = lanczos.lowest(matrix, trivial, bound, 4)
    limit = lanczos._limit
    with mock.patch.object(lanczos, "_limit", side_effect=[200, limit(matrix.nnz)]) as limits:
        again, v = lanczos.lowest(matrix, trivial, bound, 4)
    assert limits.call_count == 2
    assert_allclose(again, w, rtol=1e-7)
    assert_allclose(abs((u * v).sum(0)), np.ones(4), rtol=1e-6)


def test_a_random_regular_graph_takes_few_products_and_no_factor():
    """Four random neighbours each: eigenvalues are dense, and every factor fills in."""
    graph = expander(2000)
    with (
        mock.patch("scipy.sparse.linalg.splu") as splu,
        mock.patch("scipy.sparse.linalg.spilu") as spilu,
        mock.patch.object(lanczos, "_WORK", 0),
        mock.patch.object(lanczos, "_PRODUCTS", 3000),
    ):
        pe, values = laplacian_pe(graph, 8, return_eigenvalues=True)
    assert not splu.called
    assert not spilu.called
    matrix, _, _ = laplacian_of(graph, "sym")
    u = pe.double().numpy()
    assert abs(matrix @ u - u * values.numpy()).max() < 1e-6


def test_a_filter_parts_what_lies_below_its_cut():
    """Against dense algebra, with tails, so that lambda_1 is small and the degree is high."""
    edges = expander(300).edge_index.T[:600].tolist()
    graph = both_ways(edges + path([0, *range(300, 360)]) + path([1, *range(360, 400)]), 400)
    for normalization in (None, "sym"):
        matrix, trivial, bound = laplacian_of(graph, normalization)
        exact = np.linalg.eigvalsh(dense_laplacian(graph, normalization))[1:9]
        w, u = lanczos._filtered(matrix, trivial, bound, 8, 40)
        assert_allclose(w, exact, rtol=1e-10)
        assert abs(matrix @ u - u * w).max() < 1e-11


@pytest.mark.parametrize("kind", [*FACTORISED, "complete", "expander", "hub", "lollipop"])
def test_what_has_a_sparse_factor(kind):
    matrix, _, _ = laplacian_of(graph_of(kind), "sym")
    eliminated, core, sparse = lanczos._elimination(matrix)
    assert sparse == (kind in FACTORISED)
    assert sorted([*eliminated, *core]) == list(range(matrix.shape[0]))
    assert len(core)


def test_a_factor_without_room_is_none():
    """Entries were dropped: what is left does not solve."""
    matrix, trivial, bound = laplacian_of(graph_of("grid"), "sym")
    x = np.random.default_rng(0).standard_normal(4000)
    x -= trivial * (trivial @ x)
    solve = lanczos._factor(matrix, bound)
    assert abs(matrix @ solve(x) - x).max() < 1e-9
    with mock.patch.object(lanczos, "_ROOM", 8):
        assert lanczos._factor(matrix, bound) is None


def test_conjugate_gradients_end():
    matrix, trivial, bound = laplacian_of(graph_of("hub"), None)
    with (
        mock.patch.object(lanczos, "_WORK", 0),
        mock.patch.object(lanczos, "_PRODUCTS", 360),
        pytest.raises(RuntimeError, match="no convergence in 180 steps of conjugate gradients"),
    ):
        lanczos.lowest(matrix, trivial, bound, 4)


def test_memory_of_an_expander_is_that_of_a_lanczos_basis():
    """In a process of its own, whose peak grows by less than the factor alone would take."""
    code = (
        "import resource, numpy as np, torch\n"
        "from fastgt import Graph\nfrom fastgt.encodings import laplacian_pe\n"
        "import scipy.sparse.linalg, scipy.sparse.csgraph\n"
        "n, rng = 8000, np.random.default_rng(0)\n"
        "one = np.concatenate([np.stack([np.arange(n), rng.permutation(n)]) for _ in 'ab'], 1)\n"
        "g = Graph.from_edge_index(torch.from_numpy(np.concatenate([one, one[::-1]], 1)), n)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak()\n"
        "laplacian_pe(g, 4)\n"
        "print(peak() - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    # a basis of 40 vectors has 2.5 MB; the factor of this graph over 70 MB
    assert float(run.stdout) < 50, run.stderr


def test_large_graphs_with_a_hub():
    """The largest degree bounds D - A, and says little about most nodes."""
    graph = graph_of("hub")
    u, values = laplacian_eigenpairs(graph, 5)
    exact = np.linalg.eigvalsh(dense_laplacian(graph, None))[:5]
    assert_allclose(values[0].numpy(), exact, atol=1e-5)
    matrix, _, _ = laplacian_of(graph, None)
    assert abs(matrix @ u.double().numpy() - u.double().numpy() * values.numpy()).max() < 1e-3

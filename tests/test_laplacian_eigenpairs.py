"""Eigenpairs of both Laplacians, against numpy on matrices written out edge by edge."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laplacian_cases import NORMALIZATIONS, both_ways, dense_laplacian
from numpy.testing import assert_allclose
from scipy.sparse.csgraph import connected_components as components

from fastgt import Graph
from fastgt.encodings import (
    LaplacianEigenpairs,
    laplacian_components,
    laplacian_eigenpairs,
    laplacian_pe,
)


@st.composite
def graphs(draw) -> Graph:
    n = draw(st.integers(0, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    edges = rng.integers(0, max(n, 1), (draw(st.integers(0, 3 * n)), 2)).tolist()
    if draw(st.booleans()):
        edges += [(i, int(rng.integers(0, i))) for i in range(1, n)]
    return both_ways([(i, j) for i, j in edges], n)


@given(
    st.lists(graphs(), min_size=1, max_size=4),
    st.integers(0, 12),
    st.sampled_from([None, "sym"]),
    st.booleans(),
    st.sampled_from([0, 10**9]),
)
@settings(deadline=None, max_examples=80)
def test_eigenpairs(parts, k, normalization, skip, dense):
    graph = Graph.batch(parts)
    with mock.patch.object(laplacian_components, "_DENSE", dense):
        pairs = laplacian_eigenpairs(graph, k, normalization=normalization, skip_trivial=skip)
    assert isinstance(pairs, LaplacianEigenpairs)
    assert pairs.vectors.dtype == pairs.values.dtype == torch.float32
    assert pairs.vectors.shape == (graph.num_rows, k)
    assert pairs.values.shape == (len(parts), k)
    for g, part in enumerate(parts):
        start, end = graph.graph_ptr[g : g + 2].tolist()
        matrix = dense_laplacian(part, normalization)
        u, w = (x.double().numpy() for x in (pairs.vectors[start:end], pairs.values[g]))
        real = max(0, min(k, part.num_rows - skip))
        assert np.isnan(u[:, real:]).all()
        assert np.isnan(w[real:]).all()
        u, w = u[:, :real], w[:real]
        assert_allclose(w, np.linalg.eigvalsh(matrix)[int(skip) : real + int(skip)], atol=2e-5)
        assert_allclose(matrix @ u, u * w, atol=2e-5)
        assert_allclose(u.T @ u, np.eye(real), atol=1e-5)


@NORMALIZATIONS
def test_the_first_pair_of_a_connected_graph(normalization):
    graph = both_ways([(0, 1), (1, 2), (2, 3), (3, 0), (0, 2)], 4)
    u, values = laplacian_eigenpairs(graph, 3, normalization=normalization)
    first = torch.ones(4) if normalization is None else graph.row_degree.float().sqrt()
    torch.testing.assert_close(u[:, 0], first / first.norm())
    assert values[0, 0] == 0
    rest = laplacian_eigenpairs(graph, 2, normalization=normalization, skip_trivial=True)
    assert torch.equal(rest.vectors, u[:, 1:])
    assert torch.equal(rest.values, values[:, 1:])


def test_isolated_nodes():
    """Eigenvalue 0 of D - A, 1 of the normalised one; a component with an edge comes first."""
    graph = both_ways([(1, 2)], 4)
    u, values = laplacian_eigenpairs(graph, 4)
    assert values[0].tolist() == [0, 0, 0, 2]
    half = 0.5**0.5
    expected = torch.tensor([[0, half, -half], [half, 0, 0], [half, 0, 0], [0, half, half]])
    torch.testing.assert_close(u[:, :3], expected)
    _, values = laplacian_eigenpairs(graph, 4, normalization="sym")
    assert values[0].tolist() == [0, 1, 1, 2]


def test_as_laplacian_pe():
    graph = both_ways([(0, 1), (1, 2), (2, 0), (4, 5), (5, 5)], 7)
    pe, values = laplacian_pe(graph, 9, return_eigenvalues=True)
    pairs = laplacian_eigenpairs(graph, 9, normalization="sym", skip_trivial=True, fill=0.0)
    assert torch.equal(pairs.vectors, pe)
    assert torch.equal(pairs.values, values)


@NORMALIZATIONS
def test_self_loops(normalization):
    """They cancel in D - A, and count in the normalised Laplacian."""
    plain, loops = both_ways([(0, 1), (1, 2)], 3), both_ways([(0, 1), (1, 2), (0, 0)], 3)
    one, two = (
        laplacian_eigenpairs(x, 3, normalization=normalization).values for x in (plain, loops)
    )
    assert torch.equal(one, two) == (normalization is None)


def test_what_graph_gps_takes():
    from fastgt.models.graph_gps_encoders import LaplacianEncoder

    graph = Graph.batch([both_ways([(0, 1), (1, 2)], 3), both_ways([], 1), both_ways([(0, 1)], 2)])
    pairs = laplacian_eigenpairs(graph, 8)
    encoder = LaplacianEncoder(8, 5).eval()
    out = encoder(pairs.vectors, pairs.values, graph)
    assert out.shape == (6, 5)
    assert out.isfinite().all()


@pytest.mark.parametrize("k", [0, 1, 3])
def test_no_nodes_and_no_edges(k):
    pairs = laplacian_eigenpairs(both_ways([], 0), k)
    assert pairs.vectors.shape == (0, k)
    assert pairs.values.shape == (1, k)
    assert pairs.values.isnan().all()
    pairs = laplacian_eigenpairs(both_ways([], 1), k)
    assert pairs.values[0, :1].tolist() == [0.0] * min(k, 1)
    assert pairs.vectors[:, 1:].isnan().all()


def test_bad_input():
    graph = both_ways([(0, 1)], 2)
    with pytest.raises(ValueError, match="normalization must be None or \"sym\", got 'rw'"):
        laplacian_eigenpairs(graph, 1, normalization="rw")
    with pytest.raises(TypeError, match="k must be an int, got float"):
        laplacian_eigenpairs(graph, 1.0)
    with pytest.raises(TypeError, match=r"graph must be a fastgt\.Graph, got Tensor"):
        laplacian_eigenpairs(torch.tensor([[0, 1], [1, 0]]), 1)
    one_way = Graph.from_edge_index(torch.tensor([[0], [1]]), 2)
    with pytest.raises(ValueError, match="symmetrize=True makes it so"):
        laplacian_eigenpairs(one_way, 1)
    assert laplacian_eigenpairs(one_way, 2, symmetrize=True).values.tolist() == [[0, 2]]


def test_many_graphs_take_one_solve_for_each_size():
    """No call for each graph: connected components once, one stack of equal sizes."""
    rng = np.random.default_rng(0)
    sizes = [4, 5, 6] * 40
    parts = [both_ways([(i, int(rng.integers(0, i))) for i in range(1, n)], n) for n in sizes]
    graph = Graph.batch(parts)
    with (
        mock.patch("numpy.linalg.eigh", wraps=np.linalg.eigh) as solved,
        mock.patch("scipy.sparse.csgraph.connected_components", wraps=components) as searched,
    ):
        laplacian_eigenpairs(graph, 3)
    assert solved.call_count == 3
    assert searched.call_count == 1

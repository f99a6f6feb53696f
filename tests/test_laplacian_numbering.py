"""Laplacian eigenvectors of the same graph under other numbers of its nodes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laplacian_cases import NORMALIZATIONS, dense_laplacian, moved, side_by_side
from numpy.testing import assert_allclose

from fastgt import Graph
from fastgt.encodings import laplacian_components, laplacian_eigenpairs, laplacian_pe


@st.composite
def alike(draw) -> Graph:
    """Random connected parts, each once, twice or three times, and isolated nodes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(2, 6))
        tree = [(i, int(rng.integers(0, i))) for i in range(1, n)]
        extra = rng.integers(0, n, (draw(st.integers(0, 4)), 2)).tolist()
        edges = tree + [(i, j) for i, j in extra]
        parts += [(edges, n)] * draw(st.integers(1, 3))
    return side_by_side(parts, draw(st.integers(0, 3)))


@given(
    alike(),
    st.integers(1, 12),
    st.sampled_from([None, "sym"]),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=80)
def test_spans_and_simple_eigenvectors(graph, k, normalization, skip, seed):
    other, order = moved(graph, seed)
    options = {"normalization": normalization, "skip_trivial": skip, "fill": 0.0}
    u, values = (x.double().numpy() for x in laplacian_eigenpairs(graph, k, **options))
    v, same = (x.double().numpy() for x in laplacian_eigenpairs(other, k, **options))
    assert_allclose(same, values, atol=1e-6)
    u = u[order.numpy()]
    spectrum = np.linalg.eigvalsh(dense_laplacian(graph, normalization))[int(skip) :]
    real = min(k, len(spectrum))
    gaps = [
        c for c in range(1, real + 1) if c == len(spectrum) or spectrum[c] > spectrum[c - 1] + 1e-3
    ]
    for start, end in zip([0, *gaps], gaps, strict=False):
        # the first cluster lacks the skipped vector: the rest of it is the same space nevertheless
        assert_allclose(
            v[:, start:end] @ v[:, start:end].T, u[:, start:end] @ u[:, start:end].T, atol=2e-5
        )
        if end == start + 1:
            column, again = u[:, start], v[:, start]
            if abs(np.sort(column) - np.sort(-column)).max() > 1e-4:  # -u is another vector
                assert_allclose(again, column, atol=2e-5)
            else:
                assert_allclose(abs(again), abs(column), atol=2e-5)


TREES = [  # of seven nodes, with the same number of edges: only what surrounds a node differs
    [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)],
    [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (1, 6)],
    [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (2, 6)],
    [(0, i) for i in range(1, 7)],
]


@NORMALIZATIONS
@pytest.mark.parametrize("k", [1, 2, 3])
def test_components_of_equal_size_are_told_apart(normalization, k):
    """Column k ends within eigenvalue 0, and is the same column all the same."""
    graph = side_by_side([(tree, 7) for tree in TREES])
    options = {"normalization": normalization, "skip_trivial": True}
    u, _ = laplacian_eigenpairs(graph, k, **options)
    assert ((u != 0).sum(0) == 7).all()  # one component each
    for seed in range(20):
        other, order = moved(graph, seed)
        torch.testing.assert_close(laplacian_eigenpairs(other, k, **options).vectors, u[order])


def test_equal_eigenvalues_of_unlike_components_keep_their_order():
    """Paths of 3 and 5 nodes share eigenvalue 1; the larger comes first."""
    path3, path5 = [(0, 1), (1, 2)], [(0, 1), (1, 2), (2, 3), (3, 4)]
    graph = side_by_side([(path3, 3), (path5, 5)])
    u, values = laplacian_pe(graph, 4, return_eigenvalues=True)
    assert values[0, 2:].tolist() == pytest.approx([1, 1])
    assert not u[:3, 2].any()
    assert not u[3:, 3].any()
    for seed in range(30):
        other, order = moved(graph, seed)
        torch.testing.assert_close(laplacian_pe(other, 4).abs(), u[order].abs(), atol=1e-6, rtol=0)


def test_columns_that_equal_components_share():
    """By hand: three edges, of which the vector on all of them is skipped."""
    graph = side_by_side([([(0, 1)], 2)] * 3)
    u = laplacian_pe(graph, 2)
    expected = torch.tensor([[-1, 1, 0], [-1, -1, 2]]).repeat_interleave(2, 1).T.float()
    torch.testing.assert_close(u, expected / expected.norm(dim=0))
    whole = laplacian_eigenpairs(graph, 3)
    torch.testing.assert_close(whole.vectors[:, 0], torch.full((6,), 6**-0.5))
    torch.testing.assert_close(whole.vectors[:, 1:], u)


def test_the_sign_that_the_surroundings_decide():
    """u has every entry with both signs, but no renumbering of the graph turns it into -u."""
    n, seen = 8, 0
    rng = np.random.default_rng(0)
    root = np.ones((1, n))
    for _ in range(20):
        colours = rng.random((1, n))
        u = (
            np.repeat(rng.random((1, n // 2, 1)), 2, 1)
            * np.tile([1.0, -1.0], n // 2)[None, :, None]
        )
        once = laplacian_components._oriented(u, colours)
        order = rng.permutation(n)
        again = laplacian_components._oriented(-u[:, order], colours[:, order])
        assert_allclose(again, once[:, order])
        # without surroundings it depends on the numbers
        first, second = (laplacian_components._oriented(x, root) for x in (u, -u[:, order]))
        seen += not np.allclose(second, first[:, order])
    assert seen > 3


def test_invariance_as_pyg_tests_it():
    """A triangle and a path of three: absolute values, for 200 orders."""
    triangle, path = [(0, 1), (0, 2), (1, 2)], [(0, 1), (1, 2)]
    graph = side_by_side([(triangle, 3), (path, 3)])
    u = laplacian_pe(graph, 2)
    for seed in range(200):
        other, order = moved(graph, seed)
        again = laplacian_pe(other, 2)
        torch.testing.assert_close(again.abs(), u[order].abs(), atol=1e-6, rtol=0)
        # the path's own vector keeps its sign too; the other is turned by a reflection of the path
        torch.testing.assert_close(again[:, 0], u[order, 0], atol=1e-6, rtol=0)

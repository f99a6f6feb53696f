"""Tokens of a randomised SVD against the dense one."""

import pytest
import torch
from attention_cases import DEVICE
from literal_layers import rough_batch

from fastgt import Graph
from fastgt.encodings import svd_tokens
from fastgt.encodings.singular_vectors import adjacency_weights
from fastgt.testing import random_graph

FP64 = torch.float64
SIZES = [(5, 12), (0, 0), (7, 20), (1, 1)]
pytestmark = pytest.mark.usefixtures("one_thread")


def adjacency(graph, present=None):
    """D_r^-1/2 A D_c^-1/2, edge by edge."""
    a = torch.zeros(graph.num_rows, graph.num_cols, dtype=FP64)
    for e, (j, i) in enumerate(graph.edge_index.T.tolist()):
        a[i, j] += 1 if present is None or present[e] else 0
    rows, cols = a.sum(1), a.sum(0)
    for i in range(len(rows)):
        for j in range(len(cols)):
            if a[i, j]:
                a[i, j] /= (rows[i] * cols[j]).sqrt()
    return a


def dense_tokens(a, dim=None):
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    root = s[:dim].sqrt()
    return u[:, :dim] * root, vh.T[:, :dim] * root


def communities(sizes=(30, 20, 14), inside=0.7, across=0.02):
    """Three singular values far above the others; edges go both ways."""
    generator = torch.Generator().manual_seed(0)
    of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    share = torch.where(of[:, None] == of, inside, across)
    upper = (torch.rand(share.shape, generator=generator) < share).triu(1)
    return Graph.from_dense((upper | upper.T).to(DEVICE))


def test_all_singular_vectors_give_the_products_of_the_dense_ones():
    """Directed edges, duplicates, self loops, an isolated node, an empty graph, one node."""
    graph = rough_batch(SIZES)
    tokens, a = svd_tokens(graph, 7, dtype=FP64).cpu(), adjacency(graph)
    for first, last in ((0, 5), (5, 12), (12, 13)):  # tokens of two graphs have no common basis
        rows, cols = dense_tokens(a[first:last, first:last])
        part, wanted = tokens[first:last], rows + cols
        assert part.any()
        torch.testing.assert_close(part @ part.T, wanted @ wanted.T, rtol=1e-11, atol=1e-11)


def test_a_column_that_no_edge_leaves_or_reaches_has_no_token():
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 2, 1], [1, 0, 1, 2]]).to(DEVICE), 5)
    tokens = svd_tokens(graph, 4, dtype=FP64)
    assert tokens[:3].any(1).all()
    assert tokens[3:].abs().max() < 1e-15


def test_the_largest_singular_vectors_are_found():
    graph = communities()
    tokens = svd_tokens(graph, 3, iterations=12, dtype=FP64).cpu()
    rows, cols = dense_tokens(adjacency(graph), 3)
    wanted = rows + cols
    cosines = torch.linalg.svdvals(torch.linalg.qr(tokens).Q.T @ torch.linalg.qr(wanted).Q)
    assert cosines.min() > 1 - 1e-9  # of the angles between the two subspaces
    torch.testing.assert_close(tokens @ tokens.T, wanted @ wanted.T, rtol=1e-7, atol=1e-7)


def test_more_iterations_come_nearer():
    graph = communities()
    rows, cols = dense_tokens(adjacency(graph), 3)
    wanted = (rows + cols) @ (rows + cols).T
    errors = []
    for iterations in (0, 1, 2, 5):
        tokens = svd_tokens(graph, 3, iterations=iterations, dtype=FP64).cpu()
        errors.append(float((tokens @ tokens.T - wanted).abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-2
    assert errors[2] < errors[0] / 10


def test_of_edges_both_ways_the_negative_eigenvalues_cancel():
    graph = communities((9, 8))
    tokens = svd_tokens(graph, 17, dtype=FP64).cpu()
    values, vectors = torch.linalg.eigh(adjacency(graph))
    assert (values < -1e-3).any()
    positive = vectors * values.clamp(min=0) @ vectors.T
    torch.testing.assert_close(tokens @ tokens.T, 4 * positive, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("nodes", [(6, 9), (9, 6)])
def test_rows_and_columns_of_a_bipartite_graph_give_its_adjacency(nodes):
    edges = torch.tensor([[0, 1, 2, 5, 5, 4, 3, 3], [0, 0, 1, 2, 4, 5, 5, 5]])
    graph = Graph.from_edge_index(edges.to(DEVICE), nodes)
    tokens = svd_tokens(graph, 8, dtype=FP64).cpu()
    assert tokens.shape == (15, 8)
    rows, cols = tokens[: nodes[0]], tokens[nodes[0] :]
    torch.testing.assert_close(rows @ cols.T, adjacency(graph), rtol=1e-11, atol=1e-11)
    u, _ = dense_tokens(adjacency(graph))
    torch.testing.assert_close(rows @ rows.T, u @ u.T, rtol=1e-11, atol=1e-11)
    assert not tokens[:, 6:].any()


def test_fewer_nodes_than_channels_leave_channels_of_zero():
    tokens = svd_tokens(rough_batch(SIZES), 9)
    assert tokens.shape == (13, 9)
    assert not tokens[:5, 5:].any()
    assert not tokens[5:12, 7:].any()
    assert tokens[5:12, 6].any()
    assert not tokens[12, 1:].any()


def test_a_graph_has_the_tokens_that_it_has_alone():
    parts = [communities((6, 5)), communities((9, 4, 5))]
    whole = svd_tokens(Graph.batch(parts), 6, seed=3)
    assert torch.equal(whole, torch.cat([svd_tokens(x, 6, seed=3) for x in parts]))


def test_the_seed_alone_decides():
    graph, before = communities(), torch.get_rng_state()
    first, again, other = (svd_tokens(graph, 3, iterations=12, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert first.dtype == torch.float32
    with torch.autocast(graph.device.type, torch.bfloat16):
        assert torch.equal(svd_tokens(graph, 3, iterations=12, seed=1), first)
    assert not torch.equal(first, other)
    torch.testing.assert_close(first @ first.T, other @ other.T, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("offsets", [[0, 4], [0, 1], [0, 0, 3], [0]])
def test_no_edges(offsets):
    none = torch.zeros(2, 0, dtype=torch.long, device=DEVICE)
    graph = Graph.from_edge_index(none, graph_ptr=torch.tensor(offsets, device=DEVICE))
    tokens = svd_tokens(graph, 3)
    assert tokens.shape == (offsets[-1], 3)
    assert not tokens.any()


def test_what_is_no_graph_or_does_not_fit_is_refused():
    graph = communities((4, 4))
    for changes, error, message in (
        ({"graph": graph.edge_index}, TypeError, r"graph must be a fastgt\.Graph, got Tensor"),
        ({"dim": 0}, ValueError, "dim must be positive, got 0"),
        ({"dim": 2.0}, TypeError, r"dim must be an int, got float 2\.0"),
        ({"iterations": -1}, ValueError, "iterations must not be negative, got -1"),
        ({"seed": 0.5}, TypeError, "seed must be an int, got float"),
        ({"dtype": torch.float16}, TypeError, r"dtype must be float32 or float64, got torch\.floa"),
    ):
        with pytest.raises(error, match=message):
            svd_tokens(**{"graph": graph, "dim": 3} | changes)
    two = Graph.batch([Graph.from_edge_index(torch.tensor([[0], [1]]), (2, 3))] * 2)
    with pytest.raises(ValueError, match="a bipartite graph must be a single one, got 2"):
        svd_tokens(two, 3)


def test_weights_of_edges_are_the_entries():
    graph = rough_batch(SIZES)
    generator = torch.Generator().manual_seed(0)
    some = (torch.rand(graph.num_edges, generator=generator) < 0.6).to(DEVICE)
    for present in (None, some, torch.zeros_like(some)):
        weight = adjacency_weights(graph, present=present, dtype=FP64).cpu()
        found = torch.zeros(13, 13, dtype=FP64)
        source, target = graph.edge_index.cpu()
        found.index_put_((target, source), weight, accumulate=True)
        torch.testing.assert_close(found, adjacency(graph, present), rtol=1e-12, atol=1e-12)
    hub = Graph.from_edge_index(torch.arange(300, device=DEVICE).repeat(2, 1).fill_(0), 1)
    for dtype in (torch.float16, torch.bfloat16):
        assert adjacency_weights(hub, dtype=dtype).tolist() == pytest.approx([1 / 300] * 300, 4e-3)
    with pytest.raises(TypeError, match=r"present must be a tensor of bool, got torch\.float32"):
        adjacency_weights(graph, present=some.float())
    n = graph.num_edges
    with pytest.raises(ValueError, match=rf"present must be \[E\] = \[{n}\], got \[{n - 1}\]"):
        adjacency_weights(graph, present=some[1:])


def test_the_default_device_makes_no_difference():
    graph = random_graph(0, 20, 60)  # on a CPU
    wanted = svd_tokens(graph, 5)
    with torch.device("meta"):
        assert torch.equal(svd_tokens(graph, 5), wanted)

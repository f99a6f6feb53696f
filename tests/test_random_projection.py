"""Random projections against powers of a dense matrix."""

import pytest
import torch
from encoding_cases import both_ways, one_way

from fastgt import Graph
from fastgt.encodings import random_projection_pe

FP64 = torch.float64


def even(x):
    return (x - x.mean(0)) / x.var(0, unbiased=False).sqrt()


def literal(graph: Graph, dim: int, steps: int, seed: int):
    n = graph.num_rows
    a = torch.eye(n, dtype=FP64)
    for source, target in graph.edge_index.T.tolist():
        a[target, source] += 1
    a = a / a.sum(1, keepdim=True).sqrt() / a.sum(0).sqrt()
    u = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)).to(FP64)
    return even(sum(even(torch.matrix_power(a, s) @ u) for s in range(1, steps + 1)))


@pytest.mark.parametrize(("steps", "seed"), [(1, 0), (3, 0), (4, 7)])
@pytest.mark.parametrize("make", [one_way, both_ways])
def test_powers_of_a_dense_matrix(make, steps, seed):
    graph = make()
    found = random_projection_pe(graph, 5, steps=steps, seed=seed)
    assert found.dtype == torch.float32
    assert torch.allclose(found.to(FP64), literal(graph, 5, steps, seed), atol=2e-5)
    assert torch.equal(found, random_projection_pe(graph, 5, steps=steps, seed=seed))


def test_nodes_of_one_community_are_close():
    parts = torch.randperm(60, generator=torch.Generator().manual_seed(0)) % 2
    near = (parts[:, None] == parts) & ~torch.eye(60, dtype=torch.bool)
    pe = random_projection_pe(Graph.from_dense(near), 16)
    distance = torch.cdist(pe, pe)
    assert distance[near].max() < 0.1 * distance[parts[:, None] != parts].min()


@pytest.mark.parametrize("nodes", [2, 3, 10, 300])
def test_nodes_that_are_all_alike_have_no_position(nodes):
    """Sums of the same numbers in another order differ by rounding, which is no direction."""
    graph = Graph.from_dense(~torch.eye(nodes, dtype=torch.bool))
    assert not random_projection_pe(graph, 5, steps=4).any()


def test_autocast_changes_nothing():
    graph = both_ways()
    wanted = random_projection_pe(graph, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(random_projection_pe(graph, 5), wanted)


def test_the_default_dtype_makes_no_difference():
    graph = both_ways()
    wanted, before = random_projection_pe(graph, 5), torch.get_default_dtype()
    torch.set_default_dtype(FP64)
    try:
        found = random_projection_pe(graph, 5)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, wanted)


def test_the_default_device_makes_no_difference():
    graph = both_ways()
    wanted = random_projection_pe(graph, 5)
    with torch.device("meta"):
        assert torch.equal(random_projection_pe(graph, 5), wanted)


@pytest.mark.parametrize("nodes", [0, 1, 4])
def test_graphs_without_edges(nodes):
    graph = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.long), nodes)
    assert random_projection_pe(graph, 0).shape == (nodes, 0)
    pe = random_projection_pe(graph, 3)
    assert pe.shape == (nodes, 3)
    assert pe.isfinite().all()


def test_what_is_refused():
    graph = Graph.from_edge_index(torch.tensor([[0], [1]]), 2)
    with pytest.raises(TypeError, match=r"graph must be a fastgt.Graph, got Tensor"):
        random_projection_pe(torch.zeros(2, 1), 3)
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        random_projection_pe(graph, 3, steps=0)
    with pytest.raises(ValueError, match="dim must not be negative, got -1"):
        random_projection_pe(graph, -1)

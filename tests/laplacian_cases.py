"""Graphs for the tests of Laplacian encodings, and their Laplacians edge by edge."""

import numpy as np
import pytest
import torch

from fastgt import Graph

Edges = list[tuple[int, int]]
NORMALIZATIONS = pytest.mark.parametrize("normalization", [None, "sym"])


def both_ways(edges: Edges, n: int) -> Graph:
    pairs = edges + [(j, i) for i, j in edges if i != j]
    return Graph.from_edge_index(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T, n)


def side_by_side(parts: list[tuple[Edges, int]], isolated: int = 0) -> Graph:
    edges, n = [], 0
    for some, size in parts:
        edges += [(i + n, j + n) for i, j in some]
        n += size
    return both_ways(edges, n + isolated)


def dense_laplacian(graph: Graph, normalization: str | None) -> np.ndarray:
    a = np.zeros((graph.num_rows, graph.num_rows))
    for source, target in graph.edge_index.T.tolist():
        a[target, source] += 1
    if normalization is None:
        return np.diag(a.sum(1)) - a
    root = np.sqrt(np.maximum(a.sum(1), 1))
    return np.eye(len(a)) - a / root / root[:, None]


def moved(graph: Graph, seed: int) -> tuple[Graph, torch.Tensor]:
    order = torch.from_numpy(np.random.default_rng(seed).permutation(graph.num_rows))
    return graph.reordered(order), order


def expander(n: int) -> Graph:
    """The union of two random permutations: every cut is large, and so is every factor."""
    rng = np.random.default_rng(0)
    one_way = np.concatenate([np.stack([np.arange(n), rng.permutation(n)]) for _ in range(2)], 1)
    return Graph.from_edge_index(torch.from_numpy(np.concatenate([one_way, one_way[::-1]], 1)), n)

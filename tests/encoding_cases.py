"""Batches that encodings are tried on, and each graph of them as a dense matrix."""

from itertools import pairwise

import numpy as np
import torch

from fastgt import Graph
from fastgt.real_graphs import open_data
from fastgt.testing import random_batch

SIZES = [(6, 9), (0, 0), (9, 14), (1, 1), (6, 12), (1, 0), (0, 0), (4, 0), (13, 20)]


def one_way() -> Graph:
    """Isolated nodes, self loops and duplicates; edges without those back."""
    graph = random_batch(2, SIZES)
    extra = torch.tensor([[0, 1, 1, 8, 8], [0, 2, 2, 8, 9]])
    return Graph.from_edge_index(torch.cat([graph.edge_index, extra], 1), graph_ptr=graph.graph_ptr)


def both_ways() -> Graph:
    """As :func:`one_way`, with every edge back but the self loops."""
    edges, ptr = one_way().edge_index, one_way().graph_ptr
    back = edges.flip(0)[:, edges[0] != edges[1]]
    return Graph.from_edge_index(torch.cat([edges, back], 1), graph_ptr=ptr)


def dense(graph: Graph) -> list[np.ndarray]:
    """A of each graph, edge by edge: ``A[i, j]`` counts the edges i -> j."""
    found = []
    edges = graph.edge_index.T.tolist()
    for first, last in pairwise(graph.graph_ptr.tolist()):
        a = np.zeros((last - first, last - first))
        for source, target in edges:
            if first <= target < last:
                a[source - first, target - first] += 1
        found.append(a)
    return found


def molecules(count: int) -> Graph:
    """The first of zinc12k's validation molecules; FileNotFoundError where that is absent."""
    with open_data("zinc12k") as data:
        ptr = data["val_node_ptr"].astype(np.int64)[: count + 1]
        ends = data["val_edge_ptr"].astype(np.int64)[: count + 1]
        local = data["val_edge_local"][:, : ends[-1]]
    edges = torch.from_numpy(local + np.repeat(ptr[:-1], np.diff(ends)))
    return Graph.from_edge_index(edges, int(ptr[-1]), graph_ptr=torch.from_numpy(ptr))

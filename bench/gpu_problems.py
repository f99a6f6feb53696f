"""The thirty graphs that every operator is held against on a GPU: sizes, degrees and shapes where
kernels of graphs have their edges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fastgt import Graph, published
from fastgt.testing import random_batch, random_graph, with_index_dtype

SHAPES = ((8, 16), (1, 128), (8, 10), (4, 64))  # heads, width


class Problem(NamedTuple):
    """A graph of about so many nodes, by the generator; heads and width."""

    name: str
    make: Callable[[int], Graph]
    nodes: int
    heads: int
    width: int


def _degrees(*degrees: int) -> Callable[[int], Graph]:
    """Rows of exactly so many edges each, over and over."""

    def make(nodes: int) -> Graph:
        wanted = torch.tensor(degrees).clamp(max=2 * nodes).repeat(nodes // len(degrees) + 1)
        generator = torch.Generator().manual_seed(0)
        row_ptr = torch.cat([wanted.new_zeros(1), wanted[:nodes].cumsum(0)])
        col = torch.randint(nodes, (int(row_ptr[-1]),), generator=generator)
        return Graph.from_csr(row_ptr, col)

    return make


def _star(nodes: int) -> Graph:
    """A node that all others attend to, and that attends to all."""
    other = torch.arange(1, nodes)
    hub = torch.zeros_like(other)
    both = torch.stack([torch.cat([other, hub]), torch.cat([hub, other])])
    return Graph.from_edge_index(both, nodes)


def _dense_batch(*sizes: int) -> Callable[[int], Graph]:
    """Graphs of so many nodes, an edge between any two by the toss of a coin."""

    def make(nodes: int) -> Graph:
        generator = torch.Generator().manual_seed(0)
        graphs, left = [], nodes
        for size in sizes * (nodes // sum(sizes) + 1):
            size = min(size, left)
            left -= size
            graphs.append(Graph.from_dense(torch.rand(size, size, generator=generator) < 0.5))
        return Graph.batch(graphs)

    return make


def _band(nodes: int) -> Graph:
    """A sequence whose places attend to the eight before and after them, and to themselves."""
    place = torch.arange(nodes)
    source = place[:, None] + torch.arange(-8, 9)
    inside = (source >= 0) & (source < nodes)
    target = place[:, None].expand_as(source)
    return Graph.from_edge_index(torch.stack([source[inside], target[inside]]), nodes)


def _complete(size: int) -> Callable[[int], Graph]:
    def make(nodes: int) -> Graph:
        each = min(size, nodes)
        one = Graph.from_dense(torch.ones(each, each, dtype=torch.bool))
        return Graph.batch([one] * max(2, nodes // each))

    return make


def _batch(*sizes: tuple[int, int]) -> Callable[[int], Graph]:
    """Uniform random graphs of so many nodes and edges, over and over."""

    def make(nodes: int) -> Graph:
        times = max(1, nodes // sum(n for n, _ in sizes))
        return random_batch(0, [(min(n, nodes), min(e, 3 * nodes)) for n, e in sizes] * times)

    return make


def _made(kind: str, degree: int, **how: Any) -> Callable[[int], Graph]:
    return lambda n: random_graph(0, n, degree * n, kind=kind, **how)  # type: ignore[arg-type]


def _bipartite(rows: int, cols: int, degree: int) -> Callable[[int], Graph]:
    """``rows`` targets to ``cols`` sources."""
    return lambda n: random_graph(0, rows * n, degree * n, cols=cols * n)


def _reordered(nodes: int) -> Graph:
    return random_graph(0, nodes, 15 * nodes, kind="power_law").reordered("degree")


def _long(nodes: int) -> Graph:
    return with_index_dtype(random_graph(0, nodes, 9 * nodes), torch.int64)


def _mesh(nodes: int) -> Graph:
    return published.h_to_h(levels=0 if nodes < 100 else 4)


_MAKERS: tuple[tuple[str, Callable[[int], Graph], int], ...] = (
    ("molecules", _batch((23, 50), (17, 36), (31, 66)), 1500),
    ("power law", _made("power_law", 15), 3000),
    ("hub", _made("hub", 12), 2000),
    ("dense batch", _dense_batch(60, 90, 128), 1200),
    ("isolated rows", _made("uniform", 8, isolated=5), 1500),
    ("more rows than columns", _bipartite(3, 1, 20), 700),
    ("more columns than rows", _bipartite(1, 4, 30), 600),
    ("complete", _complete(64), 1024),
    ("star", _star, 6000),
    ("rows of 511, 512 and 513", _degrees(511, 512, 513, 3), 600),
    ("rows of 31, 32 and 33", _degrees(31, 32, 33, 0), 1200),
    ("band", _band, 2000),
    ("empty graphs within", _batch((12, 30), (0, 0), (40, 0), (25, 90)), 900),
    ("mesh", _mesh, 2562),
    ("no edges", lambda n: random_graph(0, n, 0), 70),
    ("one edge", lambda n: random_graph(0, n, 1), 70),
    ("one node", lambda n: random_graph(0, 1, 1), 1),
    ("long indices", _long, 1500),
    ("by degree", _reordered, 2500),
    ("small blocks", _dense_batch(16, 5, 1, 33), 900),
    ("just dense", _complete(128), 512),
    ("beyond dense", _complete(129), 516),
    ("duplicates", lambda n: random_graph(0, n, 60 * n), 120),
    ("uniform", _made("uniform", 16), 6000),
    ("rows of 1", _degrees(1), 3000),
    ("rows of 15, 16 and 17", _degrees(15, 16, 17), 2000),
    ("long rows", _degrees(1500, 2, 700), 300),
    ("two sizes", _batch((1, 1), (300, 2000)), 1800),
    ("hub, many columns", lambda n: random_graph(3, n, 20 * n, cols=3 * n, kind="hub"), 450),
    ("cliques", _complete(17), 850),
)
PROBLEMS = tuple(
    Problem(name, make, nodes, *SHAPES[i % len(SHAPES)])
    for i, (name, make, nodes) in enumerate(_MAKERS)
)

"""Patterns by loops over all pairs of nodes, which share nothing with the library."""

from collections.abc import Callable
from itertools import product

import torch
from graph_cases import Case, check
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastgt import Graph

Pairs = list[tuple[int, int]]


def all_pairs(sizes: list[int], rule: Callable[[int, int, int], bool]) -> Pairs:
    """(row, column) through the batch, row after row: rule(graph, i, j) sees numbers within it."""
    pairs, first = [], 0
    for g, n in enumerate(sizes):
        pairs += [(first + i, first + j) for i in range(n) for j in range(n) if rule(g, i, j)]
        first += n
    return pairs


def check_pattern(
    graph: Graph, pairs: Pairs, sizes: list[int], cols: list[int] | None = None
) -> None:
    """Every invariant of a Graph, with these edges in this order and graphs of these sizes."""
    cols = sizes if cols is None else cols
    ends = list(zip(offsets_of(sizes)[1:], offsets_of(cols)[1:], strict=True))
    source, target = [j for _, j in pairs], [i for i, _ in pairs]
    check(graph, Case(sum(sizes), sum(cols), source, target, ends))
    assert (graph.graph_ptr is graph.col_graph_ptr) == (sizes == cols)


def symmetric(pairs: Pairs) -> bool:
    return set(pairs) == {(j, i) for i, j in pairs}


def offsets_of(sizes: list[int]) -> list[int]:
    return [sum(sizes[:g]) for g in range(len(sizes) + 1)]


def coordinates(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of each node of a grid, the last one fastest."""
    return list(product(*map(range, shape)))


shapes = st.integers(1, 3).flatmap(
    lambda dims: st.tuples(*[st.integers(1, {1: 12, 2: 7, 3: 4}[dims])] * dims)
)
sizes_of_batches = st.lists(st.integers(0, 9), min_size=1, max_size=4)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that is made, and how many bytes all of them took."""

    def __init__(self):
        super().__init__()
        self.elements = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
                self.bytes += x.numel() * x.element_size()
        return out

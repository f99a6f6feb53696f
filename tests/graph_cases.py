"""Multigraphs as Python lists, and what a Graph of them must hold, by loops over those lists."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastgt import Graph

FIELDS = ("row_ptr", "col", "edge", "graph_ptr", "col_graph_ptr")
SIX = torch.tensor([[1, 2, 1, 5, 0], [0, 1, 0, 4, 2]])
examples = settings(deadline=None, max_examples=40)
few = settings(deadline=None, max_examples=20)
DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass
class Case:
    """Edges as Python lists; ``ends`` are the graphs' (row, column) boundaries after 0."""

    rows: int
    cols: int
    source: list[int]
    target: list[int]
    ends: list[tuple[int, int]]

    @property
    def edge_index(self) -> torch.Tensor:
        return torch.tensor([self.source, self.target], dtype=torch.int64).reshape(2, -1)

    @property
    def size(self) -> tuple[int, int]:
        return self.rows, self.cols

    def graph(self) -> Graph:
        return Graph.from_edge_index(self.edge_index, self.size)


def draw_edges(seed: int, rows: int, cols: int, count: int, narrow: bool) -> tuple[list, list]:
    rng = np.random.default_rng(seed)
    if not rows or not cols:
        return [], []
    # few distinct ends give duplicates, self loops, hubs and isolated nodes
    high = (min(rows, 3), min(cols, 3)) if narrow else (rows, cols)
    return rng.integers(0, high[1], count).tolist(), rng.integers(0, high[0], count).tolist()


@st.composite
def cases(draw, square: bool | None = None) -> Case:
    rows = draw(st.integers(0, 12))
    is_square = draw(st.booleans()) if square is None else square
    cols = rows if is_square else draw(st.integers(0, 12))
    count = draw(st.integers(0, 40))
    source, target = draw_edges(draw(st.integers(0, 2**31)), rows, cols, count, draw(st.booleans()))
    return Case(rows, cols, source, target, [(rows, cols)])


def joined(parts: list[Case]) -> Case:
    """The block-diagonal union, by hand."""
    rows = cols = 0
    source, target, ends = [], [], []
    for part in parts:
        source += [j + cols for j in part.source]
        target += [i + rows for i in part.target]
        ends += [(rows + r, cols + c) for r, c in part.ends]
        rows, cols = rows + part.rows, cols + part.cols
    return Case(rows, cols, source, target, ends)


def check(graph: Graph, case: Case, dtype: torch.dtype = torch.int32) -> None:
    """Every invariant of a Graph, by loops over lists."""
    count = len(case.source)
    assert (graph.num_rows, graph.num_cols) == case.size
    assert (graph.num_edges, graph.num_graphs) == (count, len(case.ends))
    assert all(type(n) is int for n in (graph.num_rows, graph.num_cols, graph.num_edges))
    tensors = [getattr(graph, name) for name in FIELDS] + list(graph.columns)
    assert [x.dtype for x in tensors] == [dtype] * len(tensors)
    assert all(type(x) is torch.Tensor and x.is_contiguous() for x in tensors)
    assert graph.graph_ptr.tolist() == [0] + [r for r, _ in case.ends]
    assert graph.col_graph_ptr.tolist() == [0] + [c for _, c in case.ends]

    row_ptr, col, edge = graph.row_ptr.tolist(), graph.col.tolist(), graph.edge.tolist()
    assert len(row_ptr) == case.rows + 1
    assert (row_ptr[0], row_ptr[-1], len(col), len(edge)) == (0, count, count, count)
    assert sorted(edge) == list(range(count))
    row = [i for i in range(case.rows) for _ in range(row_ptr[i], row_ptr[i + 1])]
    assert len(row) == count
    assert [(row[s], col[s]) for s in range(count)] == [
        (case.target[e], case.source[e]) for e in edge
    ]

    ptr, walk_row, slot, walk_edge = (x.tolist() for x in graph.columns)
    assert len(ptr) == case.cols + 1
    assert (ptr[0], ptr[-1], len(walk_row), len(slot), len(walk_edge)) == (0, *[count] * 4)
    assert sorted(slot) == list(range(count))
    walk_col = [j for j in range(case.cols) for _ in range(ptr[j], ptr[j + 1])]
    assert len(walk_col) == count
    for t in range(count):
        assert (walk_row[t], walk_col[t]) == (row[slot[t]], col[slot[t]])
        assert walk_edge[t] == edge[slot[t]]
    assert Counter(zip(walk_row, walk_col, strict=True)) == Counter(
        zip(case.target, case.source, strict=True)
    )

    assert graph.row.tolist() == row
    assert graph.edge_index.shape == (2, count)
    assert graph.edge_index.tolist() == [case.source, case.target]
    into, out = Counter(case.target), Counter(case.source)
    assert graph.row_degree.tolist() == [into[i] for i in range(case.rows)]
    assert graph.col_degree.tolist() == [out[j] for j in range(case.cols)]


def tensors_of(graph: Graph) -> list[torch.Tensor]:
    return [getattr(graph, name) for name in FIELDS] + list(graph.columns)


def assert_same(a: Graph, b: Graph) -> None:
    """Field by field, dtypes and column walk included."""
    assert (a.num_rows, a.num_cols) == (b.num_rows, b.num_cols)
    names = (*FIELDS, *a.columns._fields)
    for name, x, y in zip(names, tensors_of(a), tensors_of(b), strict=True):
        assert x.dtype == y.dtype, name
        assert x.tolist() == y.tolist(), name


class Sorts(TorchDispatchMode):
    """Counts the sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func.overloadpacket in (torch.ops.aten.sort, torch.ops.aten.argsort)
        return func(*args, **(kwargs or {}))

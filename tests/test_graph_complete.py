"""Graph.complete: every row of a graph attends to every column of it."""

import copy

import pytest
import torch
from graph_cases import Case, Sorts, assert_same, check, few
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastgt import Graph, graph_build, neighborhood_attention

sizes = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=5)


def by_hand(graphs: list[tuple[int, int]]) -> Case:
    rows = cols = 0
    source, target, ends = [], [], []
    for n, m in graphs:
        for i in range(n):
            for j in range(m):
                source.append(cols + j)
                target.append(rows + i)
        rows, cols = rows + n, cols + m
        ends.append((rows, cols))
    return Case(rows, cols, source, target, ends)


def offsets(numbers: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *numbers]).cumsum(0).to(dtype)


@few
@given(sizes, st.sampled_from([torch.int64, torch.int32, torch.uint8]))
def test_keys_of_their_own(graphs: list[tuple[int, int]], dtype: torch.dtype) -> None:
    rows, cols = ([pair[side] for pair in graphs] for side in (0, 1))
    graph = Graph.complete(offsets(rows, dtype), offsets(cols, dtype))
    check(graph, by_hand(graphs))
    assert graph.edge.tolist() == list(range(graph.num_edges))
    assert graph.graph_ptr is not graph.col_graph_ptr


@few
@given(st.lists(st.integers(0, 6), max_size=5))
def test_square(numbers: list[int]) -> None:
    ptr = offsets(numbers)
    for graph in (Graph.complete(ptr), Graph.complete(ptr, ptr)):
        check(graph, by_hand([(n, n) for n in numbers]))
        assert graph.edge.tolist() == list(range(graph.num_edges))
        assert graph.graph_ptr is graph.col_graph_ptr


def test_attention_is_dense_in_each_graph() -> None:
    rows, cols = offsets([3, 1, 4]), offsets([2, 5, 0])
    graph = Graph.complete(rows, cols)
    q, k, v = torch.randn(8, 2, 4), torch.randn(7, 2, 4), torch.randn(7, 2, 4)
    out = neighborhood_attention(q, k, v, graph)
    for g in range(2):
        i, j = slice(*rows[g : g + 2].tolist()), slice(*cols[g : g + 2].tolist())
        parts = (x.transpose(0, 1) for x in (q[i], k[j], v[j]))
        torch.testing.assert_close(out[i], scaled_dot_product_attention(*parts).transpose(0, 1))
    assert not out[4:].any()  # a graph without keys


def test_the_callers_tensor_is_the_callers_and_nothing_is_sorted() -> None:
    ptr = offsets([2, 3], torch.int32)
    with Sorts() as sorts:
        graph = Graph.complete(ptr)
    assert sorts.count == 0
    kept = copy.deepcopy(graph)
    ptr.zero_()
    assert_same(graph, kept)


def test_more_edges_than_int32_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_build, "INT32_MAX", 7)
    check(Graph.complete(offsets([3])), by_hand([(3, 3)]), torch.int64)


@pytest.mark.parametrize(
    ("rows", "cols", "error", "message"),
    [
        ([1, 3], None, ValueError, "offsets must start at 0, got 1"),
        ([0, 3, 2], None, ValueError, "offsets decreases from 3 to 2 at 2"),
        ([0, 3], [0, 3, 2], ValueError, "key_offsets decreases from 3 to 2 at 2"),
        ([0, 3], [0, 3, 4], ValueError, "offsets are of 1 graphs but key_offsets of 2"),
        ([], None, ValueError, r"offsets must be \[G \+ 1\], got \[0\]"),
        ([0.0, 1.0], None, TypeError, "offsets must hold integers"),
        ([0, 1], [0.0, 1.0], TypeError, "key_offsets must hold integers"),
    ],
)
def test_boundaries_that_do_not_fit_are_refused(
    rows: list, cols: list | None, error: type[Exception], message: str
) -> None:
    made = [
        None if x is None else torch.tensor(x, dtype=None if x else torch.long)
        for x in (rows, cols)
    ]
    with pytest.raises(error, match=message):
        Graph.complete(*made)  # type: ignore[arg-type]


def test_other_devices_are_refused() -> None:
    ptr = torch.tensor([0, 2])
    with pytest.raises(RuntimeError, match="offsets is on the meta device"):
        Graph.complete(ptr.to("meta"))
    with pytest.raises(TypeError, match="offsets must be a tensor of integers, got list"):
        Graph.complete([0, 2])  # type: ignore[arg-type]

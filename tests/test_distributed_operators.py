"""Operators on a DistributedGraph give what one process gives, outputs and all gradients."""

import pytest
import torch
from distributed_cases import (
    GRADIENTS,
    OPERATORS,
    OVER_GRAPHS,
    RESULTS,
    assert_equal_to_one_process,
    cut_graphs,
    exchanged,
    on_a_rank,
    on_one_process,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgt import Graph


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in OVER_GRAPHS])
@given(cut_graphs(), st.integers(0, 2**31), st.booleans())
@settings(max_examples=25)
def test_ranks_give_what_one_process_gives(ranks, name, case, seed, overlap):
    graph, row_part, col_part, parts = case
    part = row_part if col_part is row_part else (row_part, col_part)
    results, grads, weights = on_one_process(name, graph, seed, {})
    answers = ranks.run(parts, on_a_rank, name, graph, part, seed, {}, weights, overlap)
    assert_equal_to_one_process(answers, results, RESULTS)
    assert_equal_to_one_process(answers, grads, GRADIENTS)


@pytest.mark.parametrize("name", OVER_GRAPHS)
@given(cut_graphs(square=True), st.integers(0, 2**31))
@settings(max_examples=25)
def test_ranks_give_what_one_process_gives_over_graphs(ranks, name, case, seed):
    graph, part, _, parts = case
    results, grads, weights = on_one_process(name, graph, seed, {})
    answers = ranks.run(parts, on_a_rank, name, graph, part, seed, {}, weights, True)
    assert_equal_to_one_process(answers, results, RESULTS)
    assert_equal_to_one_process(answers, grads, GRADIENTS)


@given(cut_graphs(square=True), st.integers(0, 2**31))
@settings(max_examples=15)
def test_a_halo_is_fetched_and_its_gradients_are_summed(ranks, case, seed):
    graph, part, _, parts = case
    if graph.num_graphs > 1:
        graph, part = Graph.from_edge_index(graph.edge_index, graph.num_rows), part
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(graph.num_rows, 2, dtype=torch.float64, generator=generator)
    total = torch.zeros(graph.num_rows, 1, dtype=torch.float64)
    answers = ranks.run(parts, exchanged, graph, part, x)
    for place, found, _, _, weight in answers:
        assert torch.equal(found, x[place])
        total.index_add_(0, place, weight)
    for rank, (place, _, grad, second, _) in enumerate(answers):
        own = place[: int((part == rank).sum())]
        torch.testing.assert_close(grad, 2 * x[own] * total[own])
        torch.testing.assert_close(second, 2 * total[own].expand_as(second))

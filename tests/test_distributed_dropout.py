"""Ranks of a graph drop what one process drops."""

import pytest
import torch
from distributed_cases import (
    GRADIENTS,
    OVER_GRAPHS,
    RESULTS,
    assert_equal_to_one_process,
    cut_graphs,
    on_a_rank,
    on_one_process,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgt import Graph, PairDropoutSeed, global_attention
from fastgt.distributed import DistributedGraph, Group

EDGES = "attention", "attention of every edge term", "additive attention"
PAIRS = [name for name in OVER_GRAPHS if name.startswith("global attention")]


@pytest.mark.parametrize("name", [*EDGES, *PAIRS])
@given(cut_graphs(square=True), st.integers(0, 2**31), st.sampled_from([0.2, 0.7]))
@settings(max_examples=20)
def test_ranks_drop_what_one_process_drops(ranks, name, case, seed, p):
    graph, part, _, parts = case
    options = {"dropout_p": p, "dropout_seed": seed + 2**40}
    results, grads, weights = on_one_process(name, graph, seed, options)
    answers = ranks.run(parts, on_a_rank, name, graph, part, seed, options, weights, True)
    assert_equal_to_one_process(answers, results, RESULTS)
    assert_equal_to_one_process(answers, grads, GRADIENTS)


def test_something_is_dropped():
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]), 9)
    found = [
        on_one_process("global attention", graph, 1, {"dropout_p": p, "dropout_seed": 1})[0]
        for p in (0.0, 0.7)
    ]
    assert not torch.allclose(found[0]["out"][1], found[1]["out"][1])


def attended(group, part, seed, p=0.5, manual=0):
    shard = DistributedGraph.from_graph(
        Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]), 6), part, group
    )
    torch.manual_seed(manual)
    x = shard.own(torch.linspace(-1, 1, 6 * 2 * 3, dtype=torch.float64).view(6, 2, 3))
    out = global_attention(x, x, x, shard.graph_ptr, dropout_p=p, dropout_seed=seed)
    return shard.part.rows, out


def test_a_seed_that_ranks_draw_alike(ranks):
    _, whole = attended(Group(), torch.zeros(6, dtype=torch.int64), None)
    for rows, out in ranks.run(3, attended, torch.arange(6) % 3, None):
        torch.testing.assert_close(out, whole[rows], rtol=1e-12, atol=1e-12)


def drawn_apart(group, part):
    return attended(group, part, None, manual=Group(group).rank)


def test_seeds_that_ranks_draw_apart_are_refused(ranks):
    for answer in ranks.answers(2, drawn_apart, torch.arange(6) % 2):
        assert answer.kind == "RuntimeError"
        assert "ranks disagree about dropout_seed of global_attention" in answer.message


BAD = {
    "a seed of pairs": (
        {"seed": PairDropoutSeed(1)},
        "TypeError",
        "dropout_seed must be an int or a tensor, got PairDropoutSeed",
    ),
    "a share above 1": ({"seed": 1, "p": 1.5}, "ValueError", "dropout_p must be from 0 to 1"),
}


def attended_with(group, part, changes):
    return attended(group, part, **changes)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(ranks, name):
    changes, kind, message = BAD[name]
    for answer in ranks.answers(2, attended_with, torch.arange(6) % 2, changes):
        assert answer.kind == kind
        assert message in answer.message

"""Attention with its heads on several ranks gives what one process gives, in two messages."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgt import (
    AuxRequest,
    DropoutSeed,
    Graph,
    additive_attention,
    channelwise_attention,
    global_attention,
    linear_attention,
    neighborhood_attention,
    philox,
)
from fastgt.distributed import DistributedGraph, Group, head_parallel

H, D, C = 12, 3, 2  # heads of 1, 2, 3 and 4 ranks
LSE = AuxRequest(lse=True)
QKV = {"q": ("row", H, D), "k": ("column", H, D), "v": ("column", H, D + 1)}
GATE = torch.linspace(-1, 1, H, dtype=torch.float64).mul(3).round().div(3)  # 0 at two heads

# what an operator takes of rows, columns, edges, graphs, pairs, and as it is; and its options
CASES = {
    "attention": (
        neighborhood_attention,
        QKV | {"edge_bias": ("edge", H)},
        {"return_aux": AuxRequest(lse=True, weights=True)},
    ),
    "attention of shared keys": (
        neighborhood_attention,
        QKV
        | {
            "q": ("row", 2 * H, D),
            "edge_gate": ("edge", 2 * H, D),
            "edge_attr": ("edge", C),
            "edge_key_weight": ("all", C, 2 * H, D),
            "edge_value_weight": ("all", C, 2 * H, D + 1),
        },
        {
            "dropout_p": 0.4,
            "dropout_seed": 5,
            "return_aux": AuxRequest(lse=True, edge_scores=True),
        },
    ),
    "attention of edge vectors and masked heads": (
        neighborhood_attention,
        QKV | {"v": ("column", H, D), "edge_key": ("edge", H, D), "edge_gate": ("edge", H)},
        {"head_gate": GATE, "return_aux": LSE, "dropout_p": 0.4, "dropout_seed": 3},
    ),
    "additive attention": (
        additive_attention,
        QKV
        | {
            "weight": ("all", H, D),
            "edge_key": ("edge", H, D),
            "edge_bias": ("edge", H),
            "head_gate": ("graph", H),
        },
        {"return_aux": LSE, "dropout_p": 0.4, "dropout_seed": 7},
    ),
    "global attention of biased pairs": (
        global_attention,
        QKV | {"bias": ("pair", H)},
        {"return_aux": LSE, "dropout_p": 0.4, "dropout_seed": 9},
    ),
    "global attention of biased keys": (
        global_attention,
        QKV | {"bias": ("column", H)},
        {"return_aux": LSE, "head_gate": GATE},
    ),
    "linear attention": (linear_attention, QKV | {"head_gate": ("graph", H)}, {}),
    "linear attention of random features": (
        linear_attention,
        QKV,
        {"feature_map": "softmax", "projection": torch.linspace(-1, 1, 5 * D).view(5, D).double()},
    ),
}
OVER_GRAPHS = global_attention, linear_attention
# a share of these stands on a rank
SHARED_OUT = "q", "k", "v"


def place_of(op, graph):
    return graph.graph_ptr if op in OVER_GRAPHS else graph


@st.composite
def cut_graphs(draw, *, square):
    """A graph, and where the rows and columns of each rank begin."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    parts = draw(st.integers(1, 4))
    rows, edges = draw(st.integers(1, 9)), draw(st.integers(0, 20))
    cols = rows if square else rows + draw(st.integers(1, 4))
    ends = torch.stack([torch.randint(n, (edges,), generator=generator) for n in (cols, rows)])
    graph = Graph.from_edge_index(ends, (rows, cols))
    if draw(st.booleans()):
        graph = Graph.batch([graph, graph])

    def bounds(n):
        # some ranks have no rows
        inner = torch.randint(n + 1, (parts - 1,), generator=generator).sort().values
        return [0, *inner.tolist(), n]

    of_rows = bounds(graph.num_rows)
    return graph, of_rows, of_rows if square else bounds(graph.num_cols), parts


def tensors_of(name, graph, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = int(graph.graph_ptr.diff().long().square().sum())
    sizes = {
        "row": graph.num_rows,
        "column": graph.num_cols,
        "edge": graph.num_edges,
        "graph": graph.num_graphs,
        "pair": pairs,
    }
    return {
        key: torch.randn(
            *([sizes[kind]] if kind in sizes else []),
            *shape,
            dtype=torch.float64,
            generator=generator,
        )
        for key, (kind, *shape) in CASES[name][1].items()
    }


def results_of(op, found):
    """By name, what has rows and what has edges."""
    if isinstance(found, torch.Tensor):
        return {"out": found}
    out, aux = found
    return {"out": out} | {key: x for key, x in aux._asdict().items() if x is not None}


def loss_of(results, weights):
    return sum(
        torch.where(x.isfinite(), x, 0.0).mul(weights[key]).sum()
        for key, x in results.items()
        if x.requires_grad
    )


def on_one_process(name, graph, seed):
    op, _, options = CASES[name]
    leaves = {key: x.requires_grad_() for key, x in tensors_of(name, graph, seed).items()}
    q, k, v, *_ = leaves.values()
    rest = {key: x for key, x in leaves.items() if key not in SHARED_OUT}
    results = results_of(op, op(q, k, v, place_of(op, graph), **rest, **options))
    generator = torch.Generator().manual_seed(seed + 1)
    weights = {
        key: torch.randn(x.shape, dtype=x.dtype, generator=generator) for key, x in results.items()
    }
    loss = loss_of(results, weights)
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    found = {key: x.detach() for key, x in results.items()}
    return found, dict(zip(leaves, grads, strict=True)), weights


def on_a_rank(group, name, graph, of_rows, of_columns, seed, weights):
    """-> the rank's results, gradients and messages."""
    ranks = Counted(group)
    op, kinds, options = CASES[name]

    def share(kind, x):
        ends = {"row": of_rows, "column": of_columns}[kind]
        return x[ends[ranks.rank] : ends[ranks.rank + 1]]

    leaves = {}
    for key, x in tensors_of(name, graph, seed).items():
        own = share(kinds[key][0], x) if key in SHARED_OUT else x
        leaves[key] = own.clone().requires_grad_()
    q, k, v, *_ = leaves.values()
    rest = {key: x for key, x in leaves.items() if key not in SHARED_OUT}
    found = head_parallel(op, q, k, v, place_of(op, graph), ranks, **rest, **options)
    results = results_of(op, found)
    heads = q.shape[1] // ranks.size
    own = {
        key: share("row", x)
        if key in ("out", "lse")
        else x[:, ranks.rank * heads : (ranks.rank + 1) * heads]
        for key, x in weights.items()
    }
    loss = loss_of(results, own)
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    found = {key: x.detach() for key, x in results.items()}
    return found, dict(zip(leaves, grads, strict=True)), ranks.sent


class Counted(Group):
    """A group that remembers how many numbers each of its messages takes to other ranks."""

    def __init__(self, processes):
        super().__init__(processes)
        self.sent = []

    def all_to_all(self, x, send, receive):
        self.sent.append(sum(send) - send[self.rank])
        return super().all_to_all(x, send, receive)


def assert_equal_to_one_process(answers, results, grads):
    for key, wanted in results.items():
        dim = 0 if key in ("out", "lse") else 1
        close(key, torch.cat([found[key] for found, _, _ in answers], dim), wanted)
    for key, wanted in grads.items():
        shares = [found[key] for _, found, _ in answers]
        whole = torch.cat(shares) if key in SHARED_OUT else torch.stack(shares).sum(0)
        close(f"gradient of {key}", whole, wanted)


def close(name, found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", CASES)
@given(st.data())
@settings(max_examples=12)
def test_ranks_give_what_one_process_gives(ranks, name, data):
    square = CASES[name][0] in OVER_GRAPHS
    graph, of_rows, of_columns, parts = data.draw(cut_graphs(square=square))
    seed = data.draw(st.integers(0, 2**31))
    results, grads, weights = on_one_process(name, graph, seed)
    answers = ranks.run(parts, on_a_rank, name, graph, of_rows, of_columns, seed, weights)
    assert_equal_to_one_process(answers, results, grads)


def triangle():
    return Graph.from_edge_index(torch.tensor([[0, 1, 2, 0, 3], [1, 2, 0, 2, 1]]), 5)


def test_one_message_takes_tensors_to_the_heads_and_one_back(ranks):
    graph, bounds, name = triangle(), [0, 3, 3, 5], "linear attention"
    _, _, weights = on_one_process(name, graph, 1)
    answers = ranks.run(3, on_a_rank, name, graph, bounds, bounds, 1, weights)
    heads, widths = H // 3, 2 * D + (D + 1)
    for rank, (_, _, sent) in enumerate(answers):
        rows = bounds[rank + 1] - bounds[rank]
        there, back = 2 * rows * heads * widths, (5 - rows) * heads * (D + 1)
        # the backward sends what the forward received
        home = 2 * rows * heads * (D + 1)
        assert sent == [there, back, home, (5 - rows) * heads * widths]


def test_the_same_bits_every_time(ranks):
    graph, bounds, name = triangle(), [0, 1, 5], "attention of shared keys"
    _, _, weights = on_one_process(name, graph, 2)
    first, again = (
        ranks.run(2, on_a_rank, name, graph, bounds, bounds, 2, weights) for _ in range(2)
    )
    for a, b in zip(first, again, strict=True):
        for mine, more in zip(a[:2], b[:2], strict=True):
            for key, x in mine.items():
                assert torch.equal(x.nan_to_num(), more[key].nan_to_num()), key


def drawn(group, parts):
    torch.manual_seed(4)
    x = torch.ones(5, H, D, dtype=torch.float64)
    graph = triangle()
    if group is None:
        return neighborhood_attention(x, x, x, graph, dropout_p=0.5)
    rank = Group(group).rank
    own = x[5 * rank // parts : 5 * (rank + 1) // parts]
    return head_parallel(neighborhood_attention, own, own, own, graph, group, dropout_p=0.5)


def test_a_seed_that_ranks_draw_alike(ranks):
    close("out", torch.cat(ranks.run(4, drawn, 4)), drawn(None, 1))


def twice(group, graph, bounds):
    """The gradient of a gradient, of the rank's rows."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(5, H, D, dtype=torch.float64, generator=generator)
    if group is None:
        q = x.requires_grad_()
        out = neighborhood_attention(q, q.tanh(), q, graph)
    else:
        rank = Group(group).rank
        q = x[bounds[rank] : bounds[rank + 1]].clone().requires_grad_()
        out = head_parallel(neighborhood_attention, q, q.tanh(), q, graph, group)
    (dq,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    return torch.autograd.grad(dq.square().sum(), q)[0]


def test_second_derivatives(ranks):
    graph, bounds = triangle(), [0, 2, 5]
    close("gradient", torch.cat(ranks.run(2, twice, graph, bounds)), twice(None, graph, bounds))


def test_heads_are_known_by_their_place_among_all():
    seed = torch.tensor([3])
    whole = philox.kept(seed, 70, 13, 0.5)
    for first in range(10):
        assert torch.equal(philox.kept(seed, 70, 3, 0.5, first_head=first), whole[:, first:][:, :3])


X = torch.ones(2, 2, D)
BAD = {
    "heads": (
        {"q": torch.ones(2, 3, D)},
        ValueError,
        "q has 3 heads, which must be a multiple of the group's 2 ranks",
    ),
    "key heads": (
        {"k": torch.ones(2, 1, D), "v": torch.ones(2, 1, D)},
        ValueError,
        "k has 1 heads, which must be a multiple of the group's 2 ranks",
    ),
    "a matrix": ({"v": torch.ones(2, 2)}, ValueError, r"v must be \[n, H, D\], got \[2, 2\]"),
    "no tensor": ({"k": None}, TypeError, "k must be a tensor, got NoneType"),
    "v": (
        {"v": torch.ones(1, 2, D)},
        ValueError,
        r"v has 1 nodes and 2 heads but k has \d and 2",
    ),
    "operator": (
        {"op": channelwise_attention},
        ValueError,
        "op must be one of neighborhood_attention, additive_attention, global_attention, "
        "linear_attention, got 'channelwise_attention'",
    ),
    "edge_index": (
        {"graph": torch.zeros(2, 3, dtype=torch.int64)},
        TypeError,
        "graph must be a Graph, which every rank has whole, got Tensor",
    ),
    "heads of edges": (
        {"edge_bias": torch.ones(5, 1)},
        ValueError,
        r"edge_bias must have q's 2 heads in dimension 1, got \[5, 1\]",
    ),
    "rows": (
        {"q": torch.ones(3, 2, D)},
        ValueError,
        "q has 6 rows but the graph has 5 rows",
    ),
    "gate": (
        {"head_gate": torch.tensor([torch.nan, 1.0])},
        ValueError,
        r"head_gate is NaN at heads \[0\]",
    ),
    "seed": (
        {"dropout_p": 0.5, "dropout_seed": "x"},
        TypeError,
        "dropout_seed must be an int or a tensor, got str",
    ),
    "numbers": (
        {"dropout_p": 0.5, "dropout_seed": DropoutSeed(1, first_head=-1)},
        ValueError,
        r"first_head must be from 0 to 2\^31 - 1, got -1",
    ),
}


def call(group, changes, only):
    rank = Group(group).rank
    x = torch.ones(2 + rank, 2, D)
    given = {"op": neighborhood_attention, "q": x, "k": x, "v": x, "graph": triangle()}
    return head_parallel(**given | (changes if only in (None, rank) else {}), group=group)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_all_ranks(ranks, name):
    changes, error, message = BAD[name]
    for answer in ranks.answers(2, call, changes, None):
        assert answer.kind == error.__name__
        assert re.search(message, answer.message)


def test_a_rank_that_refuses_is_named_by_the_others(ranks):
    first, second = ranks.answers(2, call, BAD["a matrix"][0], 1)
    assert (first.kind, second.kind) == ("RuntimeError", "ValueError")
    assert first.message.startswith("rank 1 refuses the arguments of head_parallel of neighborhood")


def test_ranks_that_disagree_are_told(ranks):
    for answer in ranks.answers(2, call, {"scale": 0.5}, 1):
        assert answer.kind == "RuntimeError"
        assert "ranks disagree about scale of head_parallel of neighborhood_attention" in (
            answer.message
        )


def test_a_distributed_graph_is_refused():
    graph = triangle()
    shard = DistributedGraph.from_graph(graph, torch.zeros(5, dtype=torch.int64))
    x = torch.ones(5, 2, D)
    with pytest.raises(TypeError, match="which every rank has whole, got DistributedGraph"):
        head_parallel(neighborhood_attention, x, x, x, shard)

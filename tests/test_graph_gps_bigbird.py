"""BigBird's pattern and layer against their rules, written out."""

from itertools import pairwise

import pytest
import torch
from attention_cases import DEVICE, FAST
from gps_cases import DIM, FP64, HEADS, NO_ENCODINGS, bigbird, check, inputs, run, sees
from gps_cases import small as small_gps
from literal_layers import perturbed

from fastgt import Graph, implementation
from fastgt.models.graph_gps_bigbird import BigBirdAttention, bigbird_pattern
from fastgt.models.graph_gps_layer import GraphGPSLayer
from fastgt.testing import random_batch, random_graph

pytestmark = pytest.mark.usefixtures("one_thread")

# from no block to 21 blocks of 3, whole and not; blocks can be drawn from 15 nodes on
SIZES = [(0, 0), (1, 3), (2, 1), (3, 4), (9, 20), (10, 9), (15, 30), (16, 0), (38, 80), (63, 100)]


def ragged():
    return random_batch(1, SIZES, device=DEVICE)


def dense(pattern):
    """How often each row attends to each column, ``[N, N]``."""
    source, target = pattern.edge_index.cpu()
    counts = torch.zeros(pattern.num_rows, pattern.num_cols, dtype=torch.long)
    return counts.index_put_((target, source), torch.ones_like(source), accumulate=True)


RULES = [{}, {"block": 1}, {"block": 5, "random": 2}, {"random": 0}, {"random": 6, "seed": 3}]


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_the_pattern_is_its_rules(rules):
    graph = ragged()
    pattern = bigbird_pattern(graph, **rules)
    assert pattern.device == graph.device
    assert pattern.graph_ptr.tolist() == graph.graph_ptr.tolist()
    wanted = torch.block_diag(*(sees(n, **rules) for n, _ in SIZES))
    assert torch.equal(dense(pattern), wanted.long())
    block, random = rules.get("block", 3), rules.get("random", 3)
    assert pattern.num_edges <= graph.num_rows * block * (random + 7)


def test_middle_blocks_attend_to_eight_blocks():
    pattern = bigbird_pattern(Graph.complete(torch.tensor([0, 60])))
    assert pattern.row_degree.tolist() == [60] * 3 + [21] * 3 + [24] * 48 + [21] * 3 + [60] * 3


def test_blocks_are_drawn_evenly_and_by_seed():
    graph = Graph.complete(torch.tensor([0, 12]))
    counts = sum(dense(bigbird_pattern(graph, block=1, random=2, seed=s)) for s in range(600))
    # row 5 sees 0, 4, 5, 6, 11 and two of 1, 2, 3, 7, 8, 9, 10
    assert counts[5, [0, 4, 5, 6, 11]].tolist() == [600] * 5
    drawn = counts[5, [1, 2, 3, 7, 8, 9, 10]]
    assert drawn.sum() == 1200
    # each is binomial of 600 and 2 / 7: 171 on average, with a deviation of 11
    assert drawn.min() > 171 - 45
    assert drawn.max() < 171 + 45
    first, again = (dense(bigbird_pattern(graph, block=1, random=2, seed=4)) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("impl", ["reference", *FAST])
@pytest.mark.parametrize("rules", [{}, {"block": 2, "random": 1, "seed": 7}], ids=str)
def test_the_layer_is_its_equations(impl, rules):
    torch.manual_seed(0)
    graph = ragged()
    layer = perturbed(BigBirdAttention(DIM, HEADS)).to(DEVICE, FP64)
    tensors = {"x": torch.randn(graph.num_rows, DIM, dtype=FP64, device=DEVICE)}
    upstream = [torch.randn(graph.num_rows, DIM, dtype=FP64, device=DEVICE)]
    pattern = bigbird_pattern(graph, **rules)

    def theirs(m, x):
        parts = pairwise(graph.graph_ptr.tolist())
        return [torch.cat([bigbird(m, x[i:j], **rules) for i, j in parts if j > i])]

    with implementation(impl):
        found = run(layer, lambda m, x: [m(x, pattern)], tensors, upstream)
    wanted = run(layer, theirs, tensors, upstream)
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, rtol=1e-11, atol=1e-11)


def test_larger_graphs_in_a_layer_of_gps():
    check("gatedgcn", "bigbird", graph=ragged())


def test_a_model_makes_the_pattern_or_takes_it():
    torch.manual_seed(0)
    graph = ragged()
    model = small_gps(attention="bigbird", **NO_ENCODINGS).eval()
    given = inputs(model, graph)
    made = model(graph=graph, **given)
    assert torch.equal(model(graph=graph, pattern=bigbird_pattern(graph), **given), made)
    other = model(graph=graph, pattern=bigbird_pattern(graph, seed=1), **given)
    # graphs up to 15 nodes attend to all of themselves
    differs = (other != made)[:, 0].tolist()
    assert differs[:6] == [False] * 6
    assert differs[-1]
    with pytest.raises(TypeError, match=r"pattern must be a fastgt\.Graph, .* got Tensor"):
        model(graph=graph, pattern=graph.edge_index, **given)
    with pytest.raises(ValueError, match="pattern must have 157 rows and 157 columns, got 3"):
        model(graph=graph, pattern=random_graph(0, 3, 5), **given)
    with pytest.raises(ValueError, match="bias must be None: only attention='softmax' has one"):
        GraphGPSLayer(DIM, HEADS, local="none", attention="bigbird")(
            torch.zeros(157, DIM), None, graph, bias=torch.zeros(5, HEADS), pattern=graph
        )
    softmax = small_gps(**NO_ENCODINGS)
    with pytest.raises(ValueError, match="pattern must be None: only attention='bigbird' has one"):
        softmax(graph=graph, pattern=bigbird_pattern(graph), **given)


def test_dropout_stands_behind_both_parts():
    torch.manual_seed(0)
    graph = ragged()
    x = torch.randn(graph.num_rows, DIM)
    layer = BigBirdAttention(DIM, HEADS, dropout=0.999999)
    found = layer(x, bigbird_pattern(graph))
    torch.testing.assert_close(found, layer.norm2(layer.norm1(x)))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"graph": torch.zeros(2, 3, dtype=int)}, TypeError, "graph must be a fastgt.Graph, got"),
        ({"block": 0}, ValueError, "block must be positive, got 0"),
        ({"random": -1}, ValueError, "random must not be negative, got -1"),
        ({"seed": -1}, ValueError, "seed must not be negative, got -1"),
        ({"random": 1.5}, TypeError, "random must be an int, got"),
        (
            {"graph": Graph.from_edge_index(torch.tensor([[0], [1]]), (4, 5))},
            ValueError,
            "graph must be square, got 4 rows and 5 columns",
        ),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        bigbird_pattern(**{"graph": ragged()} | changes)

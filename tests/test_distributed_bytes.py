"""Ranks send what the formulas say, to the byte, and have no tensor of the whole graph."""

import pytest
import torch
from distributed_bytes import cut_in_memory, fetched, over_graphs, trained_from_files

from fastgt import (
    Graph,
    additive_attention,
    aggregate,
    channelwise_attention,
    gated_aggregate,
    global_attention,
    linear_attention,
    neighborhood_attention,
    segment_softmax,
    segment_sum,
    sgformer_attention,
)
from fastgt.distributed import DistributedGraph, report, write_partitions

H, D, DV, C = 2, 3, 5, 4
# by operator: its arguments, of what and how their rows are made; channels of a column
FETCHING = {
    "attention": (
        neighborhood_attention,
        {"q": ("row", H, D), "k": ("column", H, D), "v": ("column", H, DV)},
        H * (D + DV),
    ),
    "additive attention": (
        additive_attention,
        {
            "q": ("row", H, D),
            "k": ("column", H, D),
            "v": ("column", H, DV),
            "weight": ("all", H, D),
            "edge_bias": ("edge", H),
        },
        H * (D + DV),
    ),
    "channelwise attention": (
        channelwise_attention,
        {"logits": ("edge", H, D), "v": ("column", H, D)},
        H * D,
    ),
    "aggregate": (aggregate, {"x": ("column", C), "edge_weight": ("edge",)}, C),
    "gated aggregate": (
        gated_aggregate,
        {"x": ("column", C), "gate_row": ("row", C), "gate_col": ("column", C)},
        2 * C,
    ),
    "segment softmax": (segment_softmax, {"x": ("edge", C)}, 0),
}
QKV = {"q": (H, D), "k": (H, D), "v": (H, DV)}


def graph_of(seed, parts):
    """A directed graph with a hub, and owners at random: the last rank has few rows."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(40, (2, 90), generator=generator)
    ends[0, ::4] = 7
    part = torch.randint(parts, (40,), generator=generator)
    part[(part == parts - 1) & (torch.arange(40) > 9)] = 0
    part[3] = parts - 1
    return Graph.from_edge_index(ends, 40), part


def item(dtype):
    return torch.empty(0, dtype=dtype).element_size()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", FETCHING)
@pytest.mark.parametrize(("parts", "dtype"), [(2, torch.float32), (4, torch.float64)])
def test_an_exchange_sends_each_row_of_the_halo_once_each_way(ranks, name, parts, dtype, overlap):
    op, shapes, channels = FETCHING[name]
    graph, part = graph_of(parts, parts)
    answers = ranks.run(parts, fetched, op, graph, part, shapes, dtype, overlap)
    # halo rows between each pair of ranks, from the edges alone
    source, target = graph.edge_index
    pairs = {(int(part[t]), int(s)) for s, t in zip(source, target, strict=True)}
    read = [(p, int(part[s])) for p, s in pairs if p != part[s]]
    row = channels * item(dtype)
    for rank, (forward, backward, formula, back) in enumerate(answers):
        gives = sum(owner == rank for _, owner in read) * row
        takes = sum(reader == rank for reader, _ in read) * row
        assert (forward, backward) == ((gives, 0, 0), (takes, 0, 0))
        assert (formula, back) == (gives, takes)
    if channels:
        found = report(graph, part, parts=parts, width=channels, dtype=dtype)
        assert found.bytes_sent.tolist() == [forward[0] for forward, _, _, _ in answers]
        assert found.bytes_received.tolist() == [backward[0] for _, backward, _, _ in answers]
        assert sum(found.bytes_sent) > 0


@pytest.mark.parametrize("overlap", [True, False])
def test_gradients_that_nobody_asks_for_are_not_sent(ranks, overlap):
    op, shapes, _ = FETCHING["attention"]
    graph, part = graph_of(1, 3)
    answers = ranks.run(3, fetched, op, graph, part, shapes, torch.float32, overlap, ("k",))
    for forward, backward, formula, back in answers:
        assert (forward[0], backward[0]) == (formula, back)
    sent, returned = (sum(answer[i][0] for answer in answers) for i in (0, 1))
    assert sent * DV == returned * (D + DV) > 0


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 4)]
)
@pytest.mark.parametrize("parts", [2, 3])
def test_linear_attention_sums_its_state_however_many_nodes_there_are(ranks, parts, dtype, wide):
    graph, part = graph_of(0, parts)
    batch, both = Graph.batch([graph, graph]), torch.cat([part, part])
    state = 2 * H * D * (DV + 1) * wide
    for forward, backward in ranks.run(
        parts, over_graphs, linear_attention, batch, both, QKV, dtype, {}
    ):
        assert (forward, backward) == ((0, state, 0), (0, state, 0))
    features = 7
    projection = torch.randn(features, D, generator=torch.Generator().manual_seed(0))
    options = {"feature_map": "softmax", "projection": projection.to(dtype)}
    state, maxima = 2 * H * features * (DV + 1) * wide, 2 * H * wide
    for forward, backward in ranks.run(
        parts, over_graphs, linear_attention, batch, both, QKV, dtype, options
    ):
        assert (forward, backward) == ((0, state, maxima), (0, state, 0))


def test_sgformer_attention_sums_its_state_and_two_norms(ranks):
    graph, part = graph_of(0, 3)
    state, norms = H * D * (DV + 1) * 4, 2 * 4
    found = ranks.run(3, over_graphs, sgformer_attention, graph, part, QKV, torch.float32, {})
    for forward, backward in found:
        assert (forward, backward) == ((0, state + norms, 0), (0, state + norms, 0))


def test_a_sum_over_graphs_sends_what_graphs_have(ranks):
    graph, part = graph_of(0, 3)
    shapes = {"x": (H, D)}
    for forward, backward in ranks.run(
        3, over_graphs, segment_sum, graph, part, shapes, torch.float64, {}
    ):
        assert (forward, backward) == ((0, H * D * 8, 0), (0, H * D * 8, 0))


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ring_sends_keys_and_values_past_every_other_rank(ranks, parts, dtype):
    graph, part = graph_of(2, parts)
    rows = part.bincount(minlength=parts).tolist()
    found = ranks.run(parts, over_graphs, global_attention, graph, part, QKV, dtype, {})
    channels = H * (D + DV) * item(dtype)
    for rank, (forward, backward) in enumerate(found):
        # all blocks but that of the rank before, which ends its way here
        passed = (40 - rows[rank - 1]) * channels
        assert forward == (passed, 0, 0)
        # keys and values again, and their gradients until they are home
        assert backward == (passed + 40 * channels, 0, 0)
    assert sum(forward[0] for forward, _ in found) == (parts - 1) * 40 * channels


def test_bytes_of_an_exchange_are_counted_in_channels():
    graph, part = graph_of(0, 1)
    shard = DistributedGraph.from_graph(graph, part)
    assert shard.bytes_of_exchange(3, torch.float32) == (0, 0)
    with pytest.raises(ValueError, match="channels must not be negative, got -1"):
        shard.bytes_of_exchange(-1, torch.float32)


@pytest.mark.parametrize("name", ["GraphTransformer", "SGFormer"])
def test_no_rank_has_a_tensor_of_the_whole_graph(ranks, tmp_path, name):
    nodes, parts = 10_007, 4
    here = torch.arange(nodes)
    ends = torch.stack([here, here.roll(1)])  # a ring
    graph, part = Graph.from_edge_index(ends, nodes), here * parts // nodes
    generator = torch.Generator().manual_seed(0)
    tensors = {"node": torch.randn(nodes, 5, dtype=torch.float64, generator=generator)}
    if name == "GraphTransformer":
        tensors = {
            "node_type": torch.randint(3, (nodes,), generator=generator),
            "pe": torch.randn(nodes, 2, dtype=torch.float64, generator=generator),
        }
    write_partitions(tmp_path, graph, part, **tensors)
    answers = ranks.run(parts, trained_from_files, name, tmp_path, 1)
    for made, kept, (rows, halo, edges) in answers:
        assert (halo, edges) == (1, rows)
        # the widest of a node or an edge: the hidden channels of a feed-forward, or q, k and v
        most = max(rows + halo, edges) * 24
        assert most < 8 * nodes
        for shape in made | kept:
            assert not whole(shape, nodes), shape
            assert shape.numel() <= most, shape
        assert torch.Size([rows, 8]) in made
    # what finds nothing here finds what is there
    for kept in ranks.run(parts, cut_in_memory, graph, part):
        assert any(whole(shape, nodes) for shape in kept)


def whole(shape, nodes):
    return bool({nodes, nodes + 1} & set(shape))

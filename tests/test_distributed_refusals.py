"""What does not fit is named on every rank, and no rank waits for another."""

import distributed_refusals as cases
import pytest
import torch
from distributed_refusals import N, ring

import fastgt
from fastgt import Graph
from fastgt import distributed as fd
from fastgt.encodings import (
    electrostatic_pe,
    heat_kernel_pe,
    laplacian_eigenpairs,
    laplacian_pe,
    random_projection_pe,
    random_walk_pe,
    shortest_paths,
    svd_tokens,
)
from fastgt.models.exphormer_graph import expander_table, exphormer_pattern
from fastgt.models.mpnn_vn import add_virtual_nodes
from fastgt.models.open_graph_tasks import both_sides, draw_negatives
from fastgt.models.san import complement
from fastgt.models.sym_point import SymPointAttention
from fastgt.patterns import global_tokens
from fastgt.shard import NotOnRanks


def refused(ranks, function, *args, first, second=None):
    """What each of two ranks raised, in the pattern of the messages; the group works on."""
    answers = ranks.answers(2, function, *args)
    for answer, wanted in zip(answers, (first, second or first), strict=True):
        kind, _, part = wanted.partition(": ")
        assert getattr(answer, "kind", answer) == kind, answer
        assert part in answer.message, answer
    assert ranks.run(2, cases.well) == [torch.Size([N // 2, cases.H, cases.D])] * 2


def test_a_group_of_another_size_than_the_partition(ranks, tmp_path):
    size = "ValueError: the group has 2 ranks but the partition has 3 parts"
    refused(ranks, cases.part_of_three, first=size)
    refused(ranks, cases.ranks_that_are_none, first="ValueError: ranks, of which there are 2")
    fd.write_partitions(tmp_path, ring(), torch.arange(N) % 3)
    args = tmp_path, tmp_path
    refused(ranks, cases.folders, *args, first="ValueError: the group has 2 ranks but ")
    refused(
        ranks,
        cases.other_rank,
        first="ValueError: part 1 was given to rank 0",
        second="ValueError: part 0 was given to rank 1",
    )


def test_a_process_outside_the_group(ranks):
    refused(
        ranks,
        cases.not_in_the_group,
        first="ValueError: this process, rank 0, is not in the group",
        second="ValueError: this process, rank 1, is not in the group",
    )


def test_parts_of_different_partitions(ranks, tmp_path):
    told = "RuntimeError: ranks disagree about partition of DistributedGraph.from_graph: rank "
    refused(ranks, cases.other_owners, first=told)
    refused(ranks, cases.other_edges, first=told)
    asked = "which it does not own: ranks have parts of different partitions"
    refused(
        ranks,
        cases.other_parts,
        first=f"ValueError: {asked}",
        second=f"ValueError: {asked}",
    )
    refused(ranks, cases.fewer_rows, first="RuntimeError: the ranks have 5 rows together but the")
    fd.write_partitions(tmp_path / "first", ring(), cases.PART)
    fd.write_partitions(tmp_path / "other", ring(), cases.OTHER)
    told = "RuntimeError: ranks disagree about partition of load_partition: rank "
    refused(ranks, cases.folders, tmp_path / "first", tmp_path / "other", first=told)


@pytest.mark.parametrize(
    ("function", "mine"),
    [
        (cases.owners_of_one_rank, "TypeError: part must be a tensor"),
        (cases.graph_of_one_rank, "TypeError: graph must be a Graph, got Tensor"),
        (cases.part_of_one_rank, "TypeError: part must be a Part, got Graph"),
    ],
)
def test_a_rank_that_refuses_its_own_share(ranks, function, mine):
    refused(ranks, function, first="RuntimeError: rank 1 refuses the arguments", second=mine)


def test_ranks_that_disagree_about_whether_they_compare(ranks):
    told = "RuntimeError: ranks disagree about check of DistributedGraph: rank "
    refused(ranks, cases.check_of_one_rank, first=told)


@pytest.mark.parametrize(
    ("function", "name", "kind"),
    [
        (cases.whole_tensor_of_one_rank, "k", "column"),
        (cases.whole_edges_of_one_rank, "edge_bias", "edge"),
        (cases.whole_tensor_over_graphs, "x", "row"),
        (cases.whole_tensor_to_exchange, "x", "column"),
    ],
)
def test_a_tensor_of_the_whole_graph(ranks, function, name, kind):
    hint = f"of a tensor of the whole graph, own({name}, {kind!r}) is the share"
    refused(
        ranks,
        function,
        first="RuntimeError: rank 1 refuses the arguments of ",
        second=f"ValueError: {hint}",
    )


def test_a_tensor_of_the_whole_graph_on_all_ranks(ranks):
    told = "ValueError: q is [8, 2, 4] but rank {} has 4 rows: of a tensor of the whole graph"
    refused(ranks, cases.whole_tensor, first=told.format(0), second=told.format(1))


GATE = torch.tensor([1.0, 0.0])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("scale", {"scale": (0.5, 0.25)}),
        ("logit_clamp", {"logit_clamp": (None, 5.0)}),
        ("dropout_p", {"dropout_p": (0.5, 0.25), "dropout_seed": (3, 3)}),
        ("dropout_seed", {"dropout_p": (0.5, 0.5), "dropout_seed": (3, 4)}),
        ("head_gate", {"head_gate": (GATE, GATE.flip(0))}),
        ("head_gate", {"head_gate": (None, GATE)}),
        ("impl", {"impl": ("reference", None)}),
    ],
)
def test_ranks_that_disagree_about_an_option(ranks, name, options):
    told = f"RuntimeError: ranks disagree about {name} of neighborhood_attention: rank "
    refused(ranks, cases.calls, options, first=told)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (cases.dtypes, "q"),
        (cases.widths, "q"),
        (cases.gradients_of_one_rank, "q"),
        (cases.generators, "dropout_seed"),
    ],
)
def test_ranks_that_disagree_about_their_tensors(ranks, function, name):
    told = f"RuntimeError: ranks disagree about {name} of neighborhood_attention: rank "
    refused(ranks, function, first=told)


def test_a_rank_of_which_keys_and_values_are_one_tensor(ranks):
    told = "RuntimeError: ranks disagree about v of neighborhood_attention: rank "
    refused(ranks, cases.one_tensor_of_one_rank, first=told)


@pytest.mark.parametrize("name", ["halo", "ring", "sum", "heads"])
def test_a_rank_that_computes_in_another_dtype(ranks, name):
    refused(
        ranks,
        cases.autocast_of_one_rank,
        name,
        first="RuntimeError: ranks disagree about autocast of ",
    )


def test_ranks_that_disagree_over_the_graphs_of_a_batch(ranks):
    told = "RuntimeError: ranks disagree about feature_map of linear_attention: rank "
    refused(ranks, cases.feature_maps, first=told)


def test_ranks_that_call_different_operators(ranks):
    refused(
        ranks,
        cases.other_operator,
        first="RuntimeError: rank 0 calls neighborhood_attention where rank 1 calls segment_sum",
        second="RuntimeError: rank 1 calls segment_sum where rank 0 calls neighborhood_attention",
    )


def test_a_seed_that_one_rank_refuses(ranks):
    refused(
        ranks,
        cases.calls,
        {"dropout_p": (0.5, 0.5), "dropout_seed": (3, "four")},
        first="RuntimeError: rank 1 refuses the arguments of neighborhood_attention: ",
        second="TypeError: dropout_seed",
    )


def test_a_seed_of_an_operator_over_graphs_that_one_rank_refuses(ranks):
    refused(
        ranks,
        cases.seeds_over_graphs,
        first="RuntimeError: rank 1 refuses the arguments of global_attention: dropout_seed",
        second="TypeError: dropout_seed",
    )


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (cases.gradients_of_models, "of sync_gradients: rank "),
        (cases.gradients_of_no_parameters, "of sync_gradients: rank "),
        (cases.parameters_of_models, "of sync_parameters: rank "),
        (cases.seeds_of_models, "which torch.manual_seed makes equal, of GraphTransformer: rank "),
        (cases.modes_of_models, "ranks disagree about training of GraphTransformer: rank "),
        (cases.modes_of_a_norm, "ranks disagree about training of a batch norm or dropout: rank "),
        (cases.kinds_in_a_model, "ranks disagree about rows of x of a batch norm or dropout: "),
    ],
)
def test_ranks_whose_models_differ(ranks, function, told):
    refused(ranks, function, first=f"RuntimeError: {told}")


def test_a_model_that_one_rank_calls_with_the_whole_graph(ranks):
    refused(
        ranks,
        cases.whole_graph_of_one_rank,
        first="RuntimeError: rank 0 calls GraphTransformer where rank 1 calls sync_gradients",
        second="RuntimeError: rank 1 calls sync_gradients where rank 0 calls GraphTransformer",
    )


def test_a_tensor_that_one_rank_s_model_refuses(ranks):
    refused(
        ranks,
        cases.whole_nodes_in_a_model,
        first="RuntimeError: rank 1 refuses the arguments of GraphTransformer: node",
        second="ValueError: [8]",
    )
    refused(ranks, cases.wrong_types_in_a_model, first="TypeError: node")


def test_a_tensor_of_other_channels_in_a_batch_norm(ranks):
    refused(ranks, cases.channels_of_a_norm, first="ValueError: a batch norm of 4 channels got 1")


def test_a_tensor_of_other_rows_in_a_model(ranks):
    refused(
        ranks,
        cases.whole_tensor_in_a_model,
        first="RuntimeError: rank 1 refuses the arguments of a batch norm or dropout: a tensor of",
        second="ValueError: a tensor of 11 rows is neither of the rank's 4 nodes nor of its 8",
    )


BACKWARD = pytest.mark.parametrize(
    ("name", "overlap", "told"),
    [
        ("halo", True, "a halo exchange"),
        ("halo", False, "a halo exchange"),
        ("ring", True, "global_attention"),
        ("sum", True, "a sum over ranks"),
        ("heads", True, "head_parallel"),
    ],
)


@BACKWARD
def test_a_rank_whose_loss_needs_no_gradient_of_an_operator(ranks, name, overlap, told):
    mine, other = f"calls the backward of {told}", "calls sync_gradients"
    refused(
        ranks,
        cases.no_backward,
        name,
        overlap,
        first=f"RuntimeError: rank 0 {mine} where rank 1 {other}",
        second=f"RuntimeError: rank 1 {other} where rank 0 {mine}",
    )


@BACKWARD
def test_ranks_whose_losses_need_gradients_of_different_calls(ranks, name, overlap, told):
    refused(
        ranks,
        cases.other_backward,
        name,
        overlap,
        first=f"RuntimeError: disagree about which call, counted from 1, of the backward of {told}",
    )


def whole():
    return fd.DistributedGraph.from_graph(ring(), torch.zeros(N, dtype=torch.int64))


TYPES = torch.zeros(2 * N, dtype=torch.int64)
NEED_A_GRAPH = {
    "laplacian_pe": lambda g: laplacian_pe(g, 2),
    "laplacian_eigenpairs": lambda g: laplacian_eigenpairs(g, 2),
    "random_walk_pe": lambda g: random_walk_pe(g, 2),
    "random_projection_pe": lambda g: random_projection_pe(g, 2),
    "heat_kernel_pe": lambda g: heat_kernel_pe(g, (1.0,)),
    "electrostatic_pe": electrostatic_pe,
    "shortest_paths": lambda g: shortest_paths(g, TYPES, 2),
    "svd_tokens": lambda g: svd_tokens(g, 2),
    "expander_table": lambda g: expander_table(g, 2),
    "exphormer_pattern": lambda g: exphormer_pattern(g, None, 1),
    "add_virtual_nodes": lambda g: add_virtual_nodes(torch.zeros(N), None, g),
    "both_sides": both_sides,
    "draw_negatives": lambda g: draw_negatives(g, torch.tensor([0])),
    "complement": complement,
    "global_tokens": lambda g: global_tokens(g, 1),
    "SymPointAttention": lambda g: SymPointAttention(8)(torch.zeros(N, 8), torch.zeros(N, 2), g),
    "Graph.batch": lambda g: Graph.batch([g, g]),
    "partition": lambda g: fd.partition(g, 2, "hash"),
    "report": lambda g: fd.report(g, torch.zeros(N, dtype=torch.int64)),
    "write_partitions": lambda g: fd.write_partitions("parts", g, torch.zeros(N).long()),
    "DistributedGraph": fd.DistributedGraph,
    "from_graph": lambda g: fd.DistributedGraph.from_graph(g, torch.zeros(N).long()),
    "save": lambda g: g.save("file"),
    "transpose": lambda g: g.transpose,
    "reordered": lambda g: g.reordered("rcm"),
    "with_self_loops": lambda g: g.with_self_loops(),
    "row_ptr": lambda g: g.row_ptr,
}


@pytest.mark.parametrize("name", NEED_A_GRAPH)
def test_what_needs_a_whole_graph_says_so(name):
    with pytest.raises((NotOnRanks, TypeError), match=r"DistributedGraph|RankOffsets"):
        NEED_A_GRAPH[name](whole())


def test_a_share_of_what_a_graph_does_not_have():
    with pytest.raises(ValueError, match=r"kind must be one of .*'row'.*, got 'node'"):
        whole().own(torch.zeros(N), "node")


def test_operators_name_what_is_no_graph():
    x = torch.randn(N, 2, 4)
    with pytest.raises(TypeError, match=r"graph must be a fastgt.Graph, got Tensor"):
        fastgt.neighborhood_attention(x, x, x, ring().edge_index)
    with pytest.raises(TypeError, match="shard must be a DistributedGraph, got Graph"):
        fd.halo_exchange(x, ring())
    with pytest.raises(TypeError, match="offsets must be a tensor of integers, got Graph"):
        fastgt.segment_sum(x, ring())
    with pytest.raises(TypeError, match=r"segment_sum takes graph.graph_ptr, got a Distr"):
        fastgt.segment_sum(x, whole())
    with pytest.raises(TypeError, match="neighborhood_attention takes a graph, got its graph_ptr"):
        fastgt.neighborhood_attention(x, x, x, whole().graph_ptr)

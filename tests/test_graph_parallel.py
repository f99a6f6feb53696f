"""Ranks that share one graph learn what one process learns, and go on where they were."""

import json
from dataclasses import replace

import pytest
import torch
from graph_parallel_cases import (
    RECIPES,
    N,
    data,
    parts_of,
    shared_without_a_partition,
    train,
    train_until_stopped,
    train_with_a_rank_killed,
)
from train_cases import assert_same_run, launched, ring, table, write

from fastgt import Graph, cli
from fastgt.datasets import load
from fastgt.distributed import Group, write_partitions
from fastgt.models import Exphormer, ExphormerConfig
from fastgt.training import graph_parallel
from fastgt.training.graph_parallel import GraphParallel
from fastgt.training.published_recipes import RECIPES as PUBLISHED
from fastgt.training.ranks import GraphRanks
from fastgt.training.recipe import Recipe
from fastgt.training.tasks import NodeTask
from fastgt.training.train import start

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same_curve(found, wanted, tolerance):
    assert len(found) == len(wanted)
    for row, other in zip(found, wanted, strict=True):
        for name in ("train_loss", "val_loss"):
            assert row[name] == pytest.approx(other[name], rel=tolerance), name
        if tolerance <= 1e-5:
            # a class changes where two logits are closer than what rounding does
            assert row["val_accuracy"] == other["val_accuracy"]
            assert row["test_accuracy"] == other["test_accuracy"]


@pytest.mark.parametrize(
    ("model", "tolerance"),
    [
        ("cora", 1e-6),
        ("sgformer without norms", 1e-6),
        ("graph_transformer with layer norms", 1e-6),
        # a bias before a batch norm has a gradient of rounding alone, and Adam takes a step of it
        ("sgformer", 1e-3),
        ("graph_transformer", 1e-3),
    ],
)
def test_ranks_learn_what_one_process_learns(ranks, tmp_path, model, tolerance):
    """With dropout, in float32."""
    if model == "cora":
        try:
            load("cora")
        except FileNotFoundError as error:
            pytest.skip(str(error))
    alone = train(Group(), tmp_path / "one", model, 5)
    assert alone[0]["train_loss"] > alone[-1]["train_loss"]
    for size in (2, 3):
        of_ranks = ranks.run(size, train, tmp_path / str(size), model, 5)
        for rows in of_ranks:
            assert_same_curve(rows, alone, tolerance)
        assert sorted(x.name for x in (tmp_path / str(size)).iterdir()) == [
            "best.pt",
            "checkpoint.pt",
            "curve.png",
            "metrics.csv",
        ]


def test_one_rank_learns_what_the_whole_graph_teaches(tmp_path):
    """Without dropout, which is drawn otherwise."""
    recipe, nodes = RECIPES["sgformer without norms"], data("sgformer")
    config = replace(recipe.config, dropout=0.0, conv_dropout=0.0)
    recipe = replace(recipe, config=config)
    curves = []
    for name in ("whole", "shared"):
        options = {}
        if name == "shared":
            group = Group()
            shard = graph_parallel.shared(nodes.graph, GraphParallel(1), group)
            options = {"ranks": GraphRanks(group), "shard": shard}
        folder = tmp_path / name
        folder.mkdir()
        training = start(recipe, nodes, CPU, folder=folder, kept={}, **options)
        training.run()
        curves.append(training.progress.rows)
    assert_same_curve(*curves, 1e-5)


def test_ranks_that_are_stopped_go_on_with_the_bits_of_ranks_that_were_not(ranks, tmp_path):
    args = "sgformer", 5
    ranks.run(2, train, tmp_path / "whole", *args)
    for said in ranks.run(2, train_until_stopped, tmp_path / "parts", *args):
        assert "stopped in epoch 3 after" in said
    ranks.run(2, train, tmp_path / "parts", *args)
    assert_same_run(tmp_path / "parts", tmp_path / "whole", "accuracy")


def test_a_killed_rank_is_named_and_the_run_goes_on(ranks, tmp_path):
    """Rank 1 dies between forward and backward in epoch 4; the checkpoint is of epoch 3."""
    args = "graph_transformer", 6
    ranks.run(3, train, tmp_path / "whole", *args)
    told = train_with_a_rank_killed(tmp_path, 3, *args)
    assert told.keys() == {0, 2}
    for message in told.values():
        assert "rank 1 does not answer within" in message, message
    ranks.run(3, train, tmp_path / "run", *args)
    assert_same_run(tmp_path / "run", tmp_path / "whole", "accuracy")


def test_a_partition_of_a_folder(ranks, tmp_path):
    graph, owners = data("sgformer").graph, torch.arange(N) // 7 % 2
    write_partitions(tmp_path, graph, owners)
    (first, digest), (second, other) = ranks.run(2, parts_of, graph, tmp_path)
    assert torch.equal(first, (owners == 0).nonzero().flatten())
    assert torch.equal(second, owners.nonzero().flatten())
    assert digest == other
    assert digest != ranks.run(2, parts_of, graph, None)[0][1]


def test_a_partition_of_another_graph_is_refused_on_every_rank(ranks, tmp_path):
    graph = data("sgformer").graph
    owners = torch.arange(N) % 2
    source, target = graph.edge_index.clone()
    source[3] = (source[3] + 1) % N  # an edge of a row of one rank alone
    other = Graph.from_edge_index(torch.stack([source, target]), N)
    write_partitions(tmp_path / "edge", other, owners)
    less = Graph.from_edge_index(torch.stack([source, target])[:, 1:], N)
    write_partitions(tmp_path / "less", less, owners)
    for answer in ranks.answers(2, parts_of, graph, tmp_path / "edge"):
        assert "is of another graph: its edge 3 leads from node" in answer.message
    for answer in ranks.answers(2, parts_of, graph, tmp_path / "less"):
        assert f"is of a graph of {N} nodes and {4 * N - 1} edges" in answer.message
    write_partitions(tmp_path / "three", graph, torch.arange(N) % 3)
    for answer in ranks.answers(2, parts_of, graph, tmp_path / "three"):
        assert "the group has 2 ranks but" in answer.message


def test_a_partition_that_cannot_be_found_is_named_on_every_rank(ranks):
    graph = data("sgformer").graph
    first, second = ranks.answers(2, shared_without_a_partition, graph)
    assert (first.kind, second.kind) == ("ImportError", "RuntimeError")
    assert "rank 0 refuses the arguments of --graph-parallel: the partition" in second.message


def test_what_cannot_share_a_graph_is_refused(tmp_path):
    nodes, molecules = data("sgformer"), load("zinc12k", write(tmp_path))
    recipe = RECIPES["sgformer"]
    with pytest.raises(ValueError, match="--graph-parallel 2 takes 2 processes, and there are 1"):
        graph_parallel.check(recipe, nodes, 1, GraphParallel(2))
    with pytest.raises(ValueError, match="shares one graph, and zinc12k is many"):
        graph_parallel.check(PUBLISHED["graph_gps", "zinc12k"], molecules, 1, GraphParallel(1))
    with pytest.raises(ValueError, match="large_gt is called with tokens of some nodes"):
        graph_parallel.check(PUBLISHED["large_gt", "tolokers"], nodes, 1, GraphParallel(1))


def test_a_model_that_needs_the_whole_graph_is_named():
    config = ExphormerConfig(
        out_dim=3,
        node_features=5,
        edge_features=0,
        dim=8,
        heads=2,
        layers=1,
        local="gcn",
        expander_degree=0,
        stable_pe=0,
        head="inductive_node",
    )
    nodes = data("sgformer")
    shard = graph_parallel.shared(nodes.graph, GraphParallel(1), Group())
    recipe = Recipe("exphormer", "ring", config)
    task = NodeTask("", recipe, nodes, 0, Exphormer(config), takes_edges=True, shard=shard)
    with pytest.raises(ValueError, match="exphormer does not run on a graph that processes share"):
        task.loss(torch.tensor([0]))


def test_the_command_refuses_what_does_not_go_together(tmp_path, capsys):
    names = ["train", "polynormer", "minesweeper", "--output", str(tmp_path), "--device", "cpu"]
    data = ring(tmp_path / "minesweeper.npz", 60, 7, 1)
    for options, said in (
        (["--graph-parallel", "2"], "--graph-parallel 2 takes 2 processes, and there are 1"),
        (["--partition", "parts"], "--partition goes with --graph-parallel P"),
        (["--graph-parallel", "1", "--prune", "heads=0.5"], "leave --graph-parallel away"),
    ):
        assert cli.main([*names, "--data", str(data), *options]) == 2
        assert said in capsys.readouterr().err


SMALL = ["dim=8", "heads=2", "layers=2", "epochs=4", "local_epochs=2"]


def test_torchrun_shares_the_graph_of_a_data_set(tmp_path):
    """Polynormer, with both of its stages: two processes learn what one learns."""
    path = ring(tmp_path / "minesweeper.npz", 60, 7, 1)
    names = ["train", "polynormer", "minesweeper", "--data", str(path), "--device", "cpu"]
    args = [*names, "--splits", "0", "--set", *SMALL]
    status, out = launched(
        [*args, "--output", str(tmp_path / "two"), "--graph-parallel", "2"], tmp_path
    )
    assert status == 0, out
    assert out.count("one graph in 2 parts") == 1
    assert cli.main([*args, "--output", str(tmp_path / "one"), "--graph-parallel", "1"]) == 0
    tables = [table(tmp_path / name / "split-0", "roc_auc") for name in ("two", "one")]
    for found, expected in zip(*tables, strict=True):
        for a, b in zip(found, expected, strict=True):
            assert (a == b == "") or float(a) == pytest.approx(float(b), rel=1e-5)
    (row,) = json.loads((tmp_path / "two" / "result.json").read_text())
    assert row["settings"]["processes"] == 2
    assert len(row["settings"]["partition"]) == 16
    # the run of two parts is not that of one
    assert cli.main([*args, "--output", str(tmp_path / "two"), "--graph-parallel", "1"]) == 2

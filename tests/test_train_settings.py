"""Recipes, the settings that reach them, and ``fastgt train --list``."""

import json
import re
from dataclasses import replace

import pytest
import torch

from fastgt import cli
from fastgt.models import GraphGPSConfig
from fastgt.training import optimization
from fastgt.training.command import chosen
from fastgt.training.published_recipes import MODELS, RECIPES
from fastgt.training.settings import changed, parsed, types_of
from fastgt.training.train import without_unused_parameters

ZINC = RECIPES["graph_gps", "zinc12k"]


def test_values_are_read_as_their_types():
    recipe = changed(
        ZINC,
        ["lr=1e-2", "clip=none", "layers=2", "local=gin", "edge_types=()", "last_edges=FALSE"],
    )
    assert (recipe.lr, recipe.clip) == (0.01, None)
    c = recipe.config
    assert (c.layers, c.local, c.edge_types, c.last_edges) == (2, "gin", (), False)
    assert changed(ZINC, ["node_types=5,6,2"]).config.node_types == (5, 6, 2)
    assert changed(ZINC, ["node_types=(5,)"]).config.node_types == (5,)
    assert changed(ZINC, ["stop_after=5"]).stop_after == 5
    assert ZINC.config == GraphGPSConfig.published("zinc")  # recipes are not changed, copies are


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("width=3", "--set width: no such setting; known are loss, .*seed, .*, out_dim, "),
        ("model=sgformer", "--set model: no such setting"),
        ("layers=2.5", "--set layers must be a whole number, got '2.5'"),
        ("clip=soon", "--set clip must be a number or none, got 'soon'"),
        ("lr=inf", "--set lr must be a number, got 'inf'"),
        ("local=gcnii", "--set local must be 'none' or 'gcn' or "),
        ("edge_types=a", "--set edge_types must be a whole number or whole numbers between commas"),
        ("last_edges=yes", "--set last_edges must be true or false, got 'yes'"),
        ("factor=1.5", "factor must be between 0 and 1, got 1.5"),
        ("lr=-1", "lr must be positive, got -1"),
        ("weight_decay=-1", "weight_decay must not be below 0, got -1"),
        ("metric=accuracy", "loss 'l1' and metric 'mae' go together, got 'l1' and 'accuracy'"),
        ("loss=cross_entropy", "loss 'l1' and metric 'mae' .*, got 'cross_entropy' and 'mae'"),
        ("stop_after=0", "stop_after must be positive, got 0"),
        ("warmup=2000", "warmup must be below epochs=2000, got 2000"),
        ("layers=" + "9" * 30, "--set layers must be a whole number"),
    ],
)
def test_settings_that_are_refused(assignment, message):
    with pytest.raises(ValueError, match=message):
        changed(ZINC, [assignment])


def test_shares_of_what_is_taken_away_are_read():
    recipe = RECIPES["gtsp", "dd"]
    pruned = changed(recipe, ["prune=heads:0.5,tokens:0.25"])
    assert pruned.config.prune == {"heads": 0.5, "tokens": 0.25}
    assert changed(pruned, ["prune={'layers':0.5}"]).config.prune == {"layers": 0.5}
    assert changed(pruned, ["prune="]).config.prune == {}
    assert recipe.config.prune == {}
    for text in ("heads", "heads:some", "heads:0.5,heads:0.25"):
        with pytest.raises(
            ValueError, match=r"--set prune must be names and numbers, as heads:0.5"
        ):
            changed(recipe, [f"prune={text}"])
    with pytest.raises(ValueError, match=r"prune must name some of .*, got 'edges'"):
        changed(recipe, ["prune=edges:0.5"])


def test_rates_rise_and_fall_linearly():
    recipe = replace(RECIPES["graphormer", "zinc12k"], warmup=2, epochs=6, lr=1.0)
    steps = optimization.optimizer(recipe, torch.nn.Linear(1, 1))
    schedule, found = optimization.schedule(recipe, steps), []
    for _ in range(6):
        found.append(steps.param_groups[0]["lr"])
        steps.step()
        schedule.step()
    assert found == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    with pytest.raises(ValueError, match="warmup must be below epochs=6, got 6"):
        replace(recipe, warmup=6)


def test_a_type_without_a_reader_is_an_error():
    with pytest.raises(TypeError, match="no reader"):
        parsed("x", "3", dict)


@pytest.mark.parametrize("names", RECIPES, ids="-".join)
def test_every_recipe_is_whole(names):
    recipe = RECIPES[names]
    own, config = types_of(recipe)
    assert not own.keys() & config.keys()  # --set would not know which
    assert not {"model", "data", "digest", "split", "processes", "pruned"} & (own | config).keys()
    for key, hint in (own | config).items():  # every field can be set to what it is
        value = recipe.settable[key] if key in own else getattr(recipe.config, key)
        assert parsed(key, str(value).replace(" ", ""), hint) == value
    kept = recipe.kept("digest")
    assert kept["seed"] == recipe.seed
    assert ("epochs" in kept) == (recipe.schedule in ("cosine", "linear"))


def test_recipes_are_the_published_settings():
    """As in Dwivedi and Bresson's and in Rampasek et al.'s configurations."""
    gt = RECIPES["edge_graph_transformer", "zinc12k"]
    assert (gt.optimizer, gt.lr, gt.patience, gt.batch_size, gt.loss) == (
        "adam",
        7e-4,
        15,
        128,
        "l1",
    )
    for data, size, pe in (("pattern", 26, 2), ("cluster", 32, 10)):
        gt = RECIPES["graph_transformer", data]
        assert (gt.lr, gt.patience, gt.batch_size, gt.config.pe_dim) == (5e-4, 10, size, pe)
        assert (gt.loss, gt.metric) == ("class_weighted_cross_entropy", "class_accuracy")
    for data, lr, size, epochs, warmup in (
        ("zinc12k", 1e-3, 32, 2000, 50),
        ("pattern", 5e-4, 32, 100, 5),
        ("cluster", 5e-4, 16, 100, 5),
        ("molhiv", 1e-4, 32, 100, 5),
    ):
        gps = RECIPES["graph_gps", data]
        assert (gps.lr, gps.batch_size, gps.epochs, gps.warmup) == (lr, size, epochs, warmup)
        assert (gps.optimizer, gps.weight_decay, gps.clip) == ("adamw", 1e-5, 1.0)
        assert gps.schedule == "cosine"
    for data, lr, decay, size, epochs in (
        ("pattern", 2e-4, 2e-5, 32, 120),
        ("cluster", 2e-4, 1e-5, 16, 150),
        ("pyg:CIFAR10", 1e-3, 1e-5, 16, 150),
        ("pyg:Peptides-func", 3e-4, 0.0, 128, 200),
    ):
        ex = RECIPES["exphormer", data]
        assert (ex.lr, ex.weight_decay, ex.batch_size, ex.epochs) == (lr, decay, size, epochs)
        assert (ex.optimizer, ex.schedule, ex.clip) == ("adamw", "cosine", 1.0)
    for data, lr, patience, least, size in (
        ("zinc12k", 7e-4, 25, 1e-6, 32),
        ("pattern", 5e-4, 10, 1e-6, 16),
        ("cluster", 5e-4, 10, 1e-5, 16),
    ):
        san = RECIPES["san", data]
        assert (san.lr, san.patience, san.min_lr, san.batch_size) == (lr, patience, least, size)
        assert (san.optimizer, san.schedule, san.weight_decay) == ("adam", "plateau", 0)
    slim = RECIPES["graphormer", "zinc12k"]
    assert slim.epochs * 40 == 400_000
    assert slim.warmup * 40 == 40_000
    assert (slim.optimizer, slim.lr, slim.weight_decay, slim.batch_size) == (
        "adamw",
        2e-4,
        0.01,
        256,
    )
    vn = RECIPES["mpnn_virtual_node", "zinc12k"]
    assert (vn.lr, vn.min_lr, vn.epochs, vn.batch_size) == (5e-4, 1e-5, 500, 32)
    gtsp = RECIPES["gtsp", "dd"]
    assert (gtsp.lr, gtsp.weight_decay, gtsp.epochs, gtsp.batch_size) == (1e-3, 1e-5, 100, 128)
    assert (gtsp.optimizer, gtsp.schedule) == ("adam", "constant")


def test_processes_train_no_parameter_that_gets_no_gradient():
    assert not without_unused_parameters(RECIPES["graph_gps", "pattern"]).config.last_edges
    recipe = RECIPES["graph_transformer", "pattern"]
    assert without_unused_parameters(recipe) is recipe


def test_the_list_has_parameters_and_published_results(capsys):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert cli.main(["train", "--list"]) == 0
    assert torch.equal(torch.get_rng_state(), before)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert (
        "graph_gps              zinc12k                 423,717  mae               0.07 +- 0.004"
        in out
    )
    assert "Rampasek et al., arXiv 2205.12454" in out
    assert cli.main(["train", "--list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["model"], row["data"]) for row in rows] == sorted(RECIPES)
    found = {(row["model"], row["data"]): row["parameters"] for row in rows}
    assert found["edge_graph_transformer", "zinc12k"] == 588_929
    assert found["graph_transformer", "pattern"] == 522_982
    assert found["graph_transformer", "cluster"] == 524_026
    assert found["graph_gps", "pattern"] == 337_201
    assert found["graph_gps", "cluster"] == 502_054
    assert found["exphormer", "pyg:CIFAR10"] == 111_095
    assert found["san", "pattern"] == 520_518
    assert found["graphormer", "zinc12k"] == 489_481
    assert found["mpnn_virtual_node", "zinc12k"] == 897_397
    assert min(found.values()) > 0
    told = {(row["model"], row["data"]): row["published_parameters"] for row in rows}
    equal = {pair for pair, count in told.items() if count == f"{found[pair]:,}"}
    assert {pair for pair, count in told.items() if count} - equal == {
        *(("graphormer", data) for data in ("zinc12k", "pyg:ZINC")),  # without the last norm
        *(("san", data) for data in ("zinc12k", "pyg:ZINC")),  # of others, rounded
    }
    assert ("graph_gps", "pyg:MNIST") in equal
    made = MODELS["graph_classifier"].make(RECIPES["graph_classifier", "dd"].config)
    assert found["graph_classifier", "dd"] == sum(x.numel() for x in made.parameters())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "name a model of .*edge_graph_transformer, .*, got no model: fastgt train --list"),
        (["gcn", "dd"], "name a model of .*, got 'gcn'"),
        (["graph_gps"], "graph_gps is trained on .*, got no data set: fastgt train --list"),
        (["--json"], "name a model of .*, got no model"),
        (["--list", "graph_gps"], "--list takes no names, got 'graph_gps'"),
        (["graph_gps", "mnist"], "graph_gps is trained on cluster, .*zinc12k, got 'mnist'"),
    ],
)
def test_names_that_are_unknown_or_of_no_use(names, message, capsys):
    assert cli.main(["train", *names]) == 2
    assert re.match(f"fastgt: {message}", capsys.readouterr().err)


def test_a_setting_that_the_model_refuses_is_refused_before_the_data_are_read(tmp_path, capsys):
    command = ["train", "edge_graph_transformer", "zinc12k", "--set", "dropout=2"]
    command += ["--data", str(tmp_path / "absent.npz"), "--output", str(tmp_path / "run")]
    assert cli.main(command) == 2
    err = capsys.readouterr().err
    assert "dropout" in err
    assert "absent" not in err


def test_a_setting_that_was_changed_is_in_the_run():
    recipe = chosen("graph_gps", "zinc12k", ["layers=2", "seed=5"])
    assert recipe == replace(ZINC, seed=5, config=replace(ZINC.config, layers=2))

"""Node classification on one graph: splits and seeds, early stopping, runs that go on."""

import copy
import json
import re
import statistics
from dataclasses import replace

import pytest
import torch
from train_cases import assert_same_run, ring

from fastgt import cli, files
from fastgt.datasets import load
from fastgt.encodings import random_walk_pe
from fastgt.models import GraphGPS, GraphGPSConfig, PolynormerConfig
from fastgt.training import loop, published_recipes
from fastgt.training.recipe import Recipe
from fastgt.training.train import Plan, run

NODES, SPLITS = 60, 3
pytestmark = pytest.mark.usefixtures("recipe")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return ring(tmp_path_factory.mktemp("data") / "minesweeper.npz", NODES, 7, SPLITS)


@pytest.fixture
def recipe(monkeypatch):
    """Of a small model with dropout: published ones take longer."""
    config = GraphGPSConfig(
        out_dim=2,
        node_types=(),
        node_features=7,
        edge_types=(),
        dim=8,
        heads=2,
        layers=1,
        local="gcn",
        attention="none",
        dropout=0.2,
        walk_steps=3,
        walk_dim=2,
        head="inductive_node",
    )
    small = Recipe("graph_gps", "minesweeper", config, metric="roc_auc", epochs=6, lr=0.01)
    monkeypatch.setitem(published_recipes.RECIPES, ("graph_gps", "minesweeper"), small)
    return small


def command(data, output, *options):
    names = ["train", "graph_gps", "minesweeper", "--data", str(data), "--output", str(output)]
    return [*names, "--device", "cpu", *options]


def test_every_split_and_seed_is_a_run_and_their_mean_is_told(data, tmp_path, capsys):
    assert cli.main(command(data, tmp_path, "--seeds", "0,2", "--splits", "0-1")) == 0
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "result.json").read_text())
    runs = [(row["settings"]["seed"], row["settings"]["split"]) for row in rows]
    assert runs == [(0, 0), (0, 1), (2, 0), (2, 1)]
    names = [f"seed-{seed}-split-{split}" for seed, split in runs]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*names, "encodings", "result.json"]
    )
    for name, row in zip(names, rows, strict=True):
        assert json.loads((tmp_path / name / "result.json").read_text()) == [row]
        assert len((tmp_path / name / "metrics.csv").read_text().splitlines()) == 7
    tests = [row["test"] for row in rows]
    assert len(set(tests)) > 1
    found = f"{statistics.mean(tests):.4f}+-{statistics.stdev(tests):.4f}"
    assert re.search(rf"^mean of 4 +\S+ +{re.escape(found)}$", out, re.MULTILINE)
    assert "Minesweeper, published splits: ROC-AUC" in out
    assert "going on with" not in out
    # all splits without a word, of which nothing is left to train
    assert cli.main(command(data, tmp_path, "--seeds", "0,2", "--splits", "0-1")) == 0
    assert capsys.readouterr().out.count("going on with") == 4
    again = json.loads((tmp_path / "result.json").read_text())
    assert [row["test"] for row in again] == tests


def test_all_splits_are_trained_unless_some_are_named(data, tmp_path):
    assert cli.main(command(data, tmp_path, "--epochs", "1")) == 0
    rows = json.loads((tmp_path / "result.json").read_text())
    assert [row["settings"]["split"] for row in rows] == [0, 1, 2]
    assert (tmp_path / "split-2" / "best.pt").exists()


def test_the_metric_is_that_of_the_split_with_the_best_weights(data, recipe, tmp_path):
    assert cli.main(command(data, tmp_path, "--splits", "1")) == 0
    (row,) = json.loads((tmp_path / "result.json").read_text())
    nodes = load("minesweeper", data)
    model = GraphGPS(recipe.config).eval()
    weights = torch.load(tmp_path / "split-1" / "best.pt", weights_only=True)["model"]
    model.load_state_dict(weights)
    walks = random_walk_pe(nodes.graph, 3)
    with torch.no_grad():
        logits = model(nodes.node, None, nodes.graph, walk_pe=walks)
    for part in ("val", "test"):
        mask = nodes.splits[1][part]
        score, y = (logits[:, 1] - logits[:, 0])[mask], nodes.y[mask]
        above = (score[y == 1][:, None] > score[y == 0]).double().mean()
        assert row[part] == pytest.approx(float(above), abs=1e-9)


def test_stopped_between_and_within_splits_is_the_same(data, recipe, tmp_path, monkeypatch):
    device = torch.device("cpu")
    run(recipe, Plan(tmp_path / "whole", data=data), device=device)
    real, steps = loop.Training._obey, [0]

    def obey(self):
        steps[0] += 1
        if steps[0] % 17 == 0:
            self._stop.asked = True
        real(self)

    monkeypatch.setattr(loop.Training, "_obey", obey)
    stops = 0
    while True:
        try:
            run(recipe, Plan(tmp_path / "parts", data=data), device=device)
            break
        except KeyboardInterrupt:
            stops += 1
            assert stops < 40
    assert stops >= 3
    for split in range(SPLITS):
        folders = (tmp_path / name / f"split-{split}" for name in ("parts", "whole"))
        assert_same_run(*folders, metric="roc_auc")


def test_local_epochs_come_before_global_ones(data, tmp_path, monkeypatch):
    """The first of these goes on from the best local epoch, which is not the last here."""
    config = PolynormerConfig(7, 2, dim=8, heads=2, layers=2, global_layers=1)
    staged = Recipe("polynormer", "minesweeper", config, lr=1e-3, schedule="constant")
    began, real = [], loop.Training._train

    def train(self):
        began.append((self.model.stage, copy.deepcopy(self.model.state_dict())))
        real(self)

    def evaluate(self, split):
        return 1.0, 0.5 if self.progress.rows else 0.9

    monkeypatch.setattr(loop.Training, "_train", train)
    monkeypatch.setattr(loop.Training, "_evaluate", evaluate)
    plan = Plan(tmp_path, data=data, splits=[0])
    run(replace(staged, local_epochs=2, epochs=3), plan, device=torch.device("cpu"))
    assert [stage for stage, _ in began] == ["local", "local", "global"]
    for name, x in began[1][1].items():  # as the first epoch left it
        assert torch.equal(began[2][1][name], x), name
    assert "optimizer" not in torch.load(tmp_path / "split-0" / "best.pt", weights_only=True)
    run(replace(staged, local_epochs=2, epochs=5), plan, device=torch.device("cpu"))
    assert [stage for stage, _ in began[3:]] == ["global", "global"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "local_epochs=2"], "local_epochs must be 0: graph_gps has one stage"),
        (["--splits", "1-3"], "--splits 3: minesweeper has 3, numbered from 0"),
        (["--limit", "5"], "--limit counts graphs, and minesweeper is one graph"),
        (["--set", "node_features=6"], r"node must be \[N, 6\] = \[60, 6\], got \[60, 7\]"),
        (["--set", "out_dim=3"], r"the model gives \[20, 3\] numbers and the labels are"),
    ],
)
def test_what_does_not_fit_is_refused(options, message, data, tmp_path, capsys):
    assert cli.main(command(data, tmp_path, *options)) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_second_process_in_the_folder_of_all_runs_is_refused(data, tmp_path, capsys):
    with files.lock(tmp_path):
        assert cli.main(command(data, tmp_path)) == 1
    assert f"fastgt: {tmp_path} is in use by process " in capsys.readouterr().err

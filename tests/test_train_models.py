"""Every model of ``fastgt train`` that has edges, virtual nodes or prunings of its own, trained."""

import json
import os

import pytest
import torch
from train_cases import assert_same_run, table, write, write_proteins

from fastgt import cli
from fastgt.models import GTSP, Graphormer, GTSPConfig, Sparsification
from fastgt.pruning import HeadSparsity, prune_heads
from fastgt.training import checkpoint
from fastgt.training.published_recipes import MODELS, RECIPES

pytestmark = pytest.mark.usefixtures("one_thread")

TWO_BATCHES = ["--limit", "16", "--epochs", "1", "--device", "cpu"]
SMALL = ["batch_size=8", "layers=2"]
GTSP_SMALL = ["batch_size=8", "layers=2", "dim=16", "walk_steps=4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder)
    write_proteins(folder)
    return folder


def gtsp(data, output, *options):
    names = ["train", "gtsp", "dd", "--data", str(data / "dd.npz"), "--output", str(output)]
    return [*names, "--device", "cpu", "--set", *GTSP_SMALL, *options]


@pytest.mark.parametrize(
    ("model", "name", "settings"),
    [
        ("exphormer", "zinc12k", ["dim=16", "warmup=0"]),
        ("san", "zinc12k", ["dim=16", "heads=2"]),
        ("graphormer", "zinc12k", ["dim=16", "heads=2", "ffn_dim=16", "warmup=0"]),
        ("mpnn_virtual_node", "zinc12k", ["dim=16"]),
        ("mpnn_virtual_node", "dd", ["dim=32"]),
        ("gtsp", "dd", ["dim=16"]),
        ("gtsp", "dd", ["dim=16", "prune=heads:0.5,tokens:0.5,layers:0.25"]),
        ("gtsp", "dd", ["dim=16", "base=graphormer", "prune=heads:0.5,tokens:0.5"]),
    ],
)
def test_two_batches_are_trained(model, name, settings, data, tmp_path):
    where = ["--data", str(data / f"{name}.npz"), "--output", str(tmp_path)]
    assert cli.main(["train", model, name, *where, *TWO_BATCHES, "--set", *SMALL, *settings]) == 0
    recipe = RECIPES[model, name]
    (row,) = table(tmp_path, recipe.metric)
    (result,) = json.loads((tmp_path / "result.json").read_text())
    assert result["epochs"] == 1
    assert result["settings"]["limit"] == 16
    assert all(float(cell) >= 0 for cell in row)
    trained = checkpoint.load(tmp_path / "checkpoint.pt")
    assert trained["optimizer"]["state"][0]["step"] == 2


def test_graphormer_starts_as_published():
    torch.manual_seed(3)
    made = MODELS["graphormer"].make(RECIPES["graphormer", "zinc12k"].config)
    torch.manual_seed(3)
    expected = Graphormer(RECIPES["graphormer", "zinc12k"].config)
    expected.draw_as_published()
    for (name, x), y in zip(made.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(x, y), name
    assert float(made.layers[0].ffn[0].weight.detach().std()) < 0.01  # of torch's own layers 0.06


def test_heads_are_exchanged_over_all_steps_of_the_training(data, tmp_path, monkeypatch):
    made, step = [], HeadSparsity.step

    def seen(self):
        made.append((self.steps, [int(gate.mask.sum()) for gate in self._layers]))
        step(self)

    monkeypatch.setattr(HeadSparsity, "step", seen)
    options = ["prune=heads:0.75", "--epochs", "2", "--limit", "16"]
    assert cli.main(gtsp(data, tmp_path, *options)) == 0
    assert made == [(4, [1, 1])] * 4
    best = checkpoint.load(tmp_path / "best.pt")["model"]
    config = GTSPConfig(node_features=89, dim=16, layers=2, walk_steps=4, prune={"heads": 0.75})
    model = GTSP(config)
    model.load_state_dict(best)
    assert prune_heads(model).model.layers[0].attention.heads == 1
    assert cli.main(gtsp(data, tmp_path, *options)) == 0  # nothing is left to train
    assert len(made) == 4


def test_more_epochs_are_another_run_where_heads_are_exchanged(data, tmp_path, capsys):
    for prune, status in (("tokens:0.5", 0), ("heads:0.5", 2)):
        folder = tmp_path / prune[:5]
        options = [f"prune={prune}", "--limit", "16", "--epochs"]
        assert cli.main(gtsp(data, folder, *options, "1")) == 0
        capsys.readouterr()
        assert cli.main(gtsp(data, folder, *options, "2")) == status
    assert "holds a run with epochs 1, not 2" in capsys.readouterr().err


def test_a_pruned_run_that_was_stopped_ends_as_if_it_was_not(data, tmp_path, monkeypatch):
    options = ["prune=heads:0.5,tokens:0.5", "--epochs", "3", "--limit", "16"]
    defaults = {"every": 2, "scored": 1}
    monkeypatch.setattr(Sparsification.__init__, "__kwdefaults__", defaults)
    assert cli.main(gtsp(data, tmp_path / "whole", *options)) == 0
    real, steps = torch.optim.Adam.step, []

    def interrupted(self, *args):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), 15)
        return real(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    assert cli.main(gtsp(data, tmp_path / "parts", *options)) != 0
    assert cli.main(gtsp(data, tmp_path / "parts", *options)) == 0
    assert len(steps) == 6
    assert_same_run(tmp_path / "whole", tmp_path / "parts", "accuracy")


def test_weights_are_not_taken_away_here(data, tmp_path, capsys):
    assert cli.main(gtsp(data, tmp_path, "prune=weights:0.5")) == 2
    assert "prune must name none of 'weights', got {'weights': 0.5}" in capsys.readouterr().err

"""``fastgt train ... --prune``: runs that are resumed, and the comparison with the dense model."""

import json
import math
import os

import pytest
import torch
from attention_cases import DEVICE, close
from train_cases import write_proteins

from fastgt import cli, files
from fastgt.datasets import load
from fastgt.models import GraphClassifier, GraphClassifierConfig
from fastgt.training import checkpoint, comparison, pruned
from fastgt.training.command import chosen

SMALL = ["layers=2", "dim=16", "heads=4", "batch_size=8"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_proteins(tmp_path_factory.mktemp("data"))


def command(data, output, *options):
    names = ["train", "graph_classifier", "dd", "--data", str(data), "--output", str(output)]
    return [*names, "--device", "cpu", "--set", *SMALL, *options]


def test_a_graph_is_classified_alone_as_in_a_batch(data):
    proteins = load("dd", data)
    torch.manual_seed(0)
    config = GraphClassifierConfig(90, 2, dim=16, heads=2, layers=2, gated=True)
    model = GraphClassifier(config).to(DEVICE).eval()
    together = proteins.batch(torch.tensor([3, 40, 9])).to(DEVICE)
    both = model(together.node, together.graph)
    for g, i in enumerate((3, 40, 9)):
        alone = proteins.batch(torch.tensor([i])).to(DEVICE)
        close(model(alone.node, alone.graph)[0], both[g], "logits", 1e-5)
    with pytest.raises(ValueError, match="dim must be positive"):
        GraphClassifierConfig(90, 2, dim=0)


def test_models_learn_and_are_compared(data, tmp_path, capsys):
    options = ["--epochs", "8", "--prune", "heads=0.25,0.5"]
    assert cli.main(command(data, tmp_path, *options)) == 0
    out = capsys.readouterr().out
    rows = json.loads((tmp_path / "comparison.json").read_text())
    assert [row["pruned"] for row in rows] == [0, 0.25, 0.5]
    assert [row["active_heads"] for row in rows] == [[], [3, 3], [2, 2]]
    for row, heads in zip(rows, (4, 3, 2), strict=True):
        assert row["largest_difference"] < 1e-5
        assert row["train_epoch_s"] > 0
        assert row["step_peak_bytes"] > 0
        # four projections of 16 x 4 numbers a head, and biases out of them
        removed = 2 * (4 - heads) * 4 * 16 * 4
        assert row["parameters"] == rows[0]["parameters"] - removed
    assert max(row["test_accuracy"] for row in rows) > 0.8
    assert f"{rows[0]['test_accuracy']:.4f}" in out
    header, *lines = (tmp_path / "comparison.csv").read_text().splitlines()
    assert header.split(",") == list(comparison.COLUMNS)
    assert len(lines) == 3
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    for name in ("dense", "heads-0.25", "heads-0.5"):
        metrics = (tmp_path / name / "metrics.csv").read_text().splitlines()
        assert metrics[0] == "epoch,seconds,lr,train_loss,val_loss,val_accuracy,test_accuracy"
        assert len(metrics) == 9
    masks = [
        x for key, x in checkpoint.load(tmp_path / "heads-0.5" / "best.pt")["model"].items()
        if key.endswith("head_gate.mask")
    ]  # fmt: skip
    assert [int(x.sum()) for x in masks] == [2, 2]
    # once more: nothing is left to train
    assert cli.main(command(data, tmp_path, *options)) == 0
    again = json.loads((tmp_path / "comparison.json").read_text())
    assert [r["test_accuracy"] for r in again] == [r["test_accuracy"] for r in rows]


def test_a_run_that_was_stopped_ends_as_if_it_was_not(data, tmp_path, monkeypatch):
    """Heads are exchanged after every third step, six batches an epoch."""
    monkeypatch.setattr(pruned, "EVERY", 3)
    monkeypatch.setattr(pruned, "SCORED", 2)
    proteins = load("dd", data)
    small = ["layers=2", "dim=16", "heads=8", "batch_size=8"]
    recipe = chosen("graph_classifier", "dd", [*small, "epochs=4"])
    masks, step = set(), pruned.HeadSparsity.step

    def seen(self):
        step(self)
        masks.add(str([gate.mask.tolist() for gate in self._layers]))

    monkeypatch.setattr(pruned.HeadSparsity, "step", seen)

    def train(folder):
        where = folder, math.inf, torch.device("cpu")
        return pruned.train(recipe, 0.5, proteins, proteins.digest(), *where)

    whole = train(tmp_path / "whole")
    real, steps = torch.optim.Adam.step, []

    def interrupted(self, *args):
        steps.append(1)
        if len(steps) == 10:  # in the second epoch, between two exchanges
            os.kill(os.getpid(), 15)
        return real(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts")
    parts = train(tmp_path / "parts")
    assert len(steps) == 24
    for key, x in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[key], x), key
    a, b = (checkpoint.load(tmp_path / x / "checkpoint.pt") for x in ("whole", "parts"))
    assert torch.equal(torch.stack(a["sparsity"]["sums"]), torch.stack(b["sparsity"]["sums"]))
    assert len(masks) > 1  # heads were exchanged


def test_outputs_that_differ_after_pruning_are_told(data, tmp_path, monkeypatch, capsys):
    def other(model):
        model = comparison.copy.deepcopy(model)
        with torch.no_grad():
            model.readout[-1].bias += 1
        return model

    monkeypatch.setattr(comparison, "prune_heads", other)
    assert cli.main(command(data, tmp_path, "--epochs", "1", "--prune", "heads=0.5")) == 1
    assert "apart after prune_heads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("heads=1.5", "must be between 0 and 1, got '1.5'"),
        ("heads=0", "must be between 0 and 1, got '0'"),
        ("heads=", "must be between 0 and 1, got ''"),
        ("heads", "must be between 0 and 1, got ''"),
        ("heads=half", "must be between 0 and 1, got 'half'"),
        ("heads=0.5,0.5", "0.5 is there twice"),
        ("tokens=0.5", "only heads can be pruned here, got 'tokens=0.5'"),
    ],
)
def test_shares_that_are_refused(data, tmp_path, capsys, option, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(command(data, tmp_path, "--prune", option))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_runs_that_are_refused(data, tmp_path, capsys):
    assert cli.main(command(data, tmp_path, "--prune", "heads=0.9")) == 2
    assert "--prune heads=0.9 leaves none of the 4 heads" in capsys.readouterr().err
    assert cli.main(command(data, tmp_path, "--prune", "heads=0.05")) == 2
    assert "--prune heads=0.05 leaves all of the 4 heads" in capsys.readouterr().err
    assert cli.main(command(data, tmp_path, "--epochs", "1", "--prune", "heads=0.5", "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "comparison.json").read_text())
    assert cli.main(command(data, tmp_path, "--epochs", "2", "--prune", "heads=0.5")) == 2
    assert "holds a run with epochs 1, not 2" in capsys.readouterr().err


def test_a_second_comparison_in_the_same_folder_is_refused(data, tmp_path, capsys):
    with files.lock(tmp_path):
        assert cli.main(command(data, tmp_path, "--epochs", "1", "--prune", "heads=0.5")) == 1
    assert f"fastgt: {tmp_path} is in use by process {os.getpid()} on " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

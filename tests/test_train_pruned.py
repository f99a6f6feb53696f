"""``fastgt train dd``: data, batches, runs that are resumed, the comparison."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_cases import DEVICE, close

from fastgt import cli, files
from fastgt.models import GraphClassifier, GraphClassifierConfig
from fastgt.training import checkpoint, comparison, dd
from fastgt.training.proteins import Proteins, load_dd

SMALL = ["--layers", "2", "--dim", "16", "--heads", "4", "--batch-size", "8", "--device", "cpu"]


pytestmark = pytest.mark.usefixtures("one_thread")


def arrays(count=60):
    """Rings, whose class is the type that most of their nodes have; sorted by class."""
    draw = np.random.default_rng(0)
    labels, edges, ptr, y = [], [], [0], []
    for i in range(count):
        n, kind = int(draw.integers(4, 12)), int(i >= count // 2)
        labels.append(np.where(draw.random(n) < 0.8, kind + 1, 2 - kind))
        ring = np.arange(n)
        edges.append(np.stack([ring, (ring + 1) % n]) + ptr[-1])
        ptr.append(ptr[-1] + n)
        y.append(kind + 1)
    return {
        "node_label": np.concatenate(labels).astype(np.uint8),
        "edge_index": np.concatenate(edges, 1).astype(np.int32),
        "node_ptr": np.array(ptr, dtype=np.int32),
        "y": np.array(y, dtype=np.int8),
    }


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "dd.npz"
    np.savez_compressed(path, **arrays())
    return path


def command(data, output, *options):
    return ["train", "dd", "--data", str(data), "--output", str(output), *SMALL, *options]


def test_batches_are_the_proteins_one_by_one(data):
    proteins, _ = load_dd(data)
    assert len(proteins) == 60
    chosen = torch.tensor([7, 0, 59, 7])
    batch, begin = proteins.batch(chosen), 0
    assert batch.y.tolist() == [0, 0, 1, 0]
    for g, i in enumerate(chosen.tolist()):
        alone = proteins.batch(torch.tensor([i]))
        end = begin + len(alone.node_type)
        assert batch.graph.graph_ptr[g : g + 2].tolist() == [begin, end]
        assert torch.equal(batch.node_type[begin:end], alone.node_type)
        mine = ((batch.graph.edge_index >= begin) & (batch.graph.edge_index < end)).all(0)
        assert torch.equal(batch.graph.edge_index[:, mine] - begin, alone.graph.edge_index)
        begin = end
    assert begin == batch.graph.num_nodes


def test_splits_are_random_apart_and_the_same_every_time(data):
    proteins, _ = load_dd(data)
    splits = proteins.splits()
    assert [len(x) for x in splits.values()] == [48, 6, 6]
    assert sorted(torch.cat(list(splits.values())).tolist()) == list(range(60))
    torch.manual_seed(5)
    assert all(torch.equal(x, splits[name]) for name, x in proteins.splits().items())
    # of both classes, which the file has one after the other
    assert 0 < proteins.y[splits["train"]].double().mean() < 1


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("node_label", lambda x: x[:-1], "node_ptr must rise from 0 to"),
        ("node_label", lambda x: x + 100, "node_label has values beyond 1 to 89"),
        ("node_label", lambda x: x.astype(float), r"node_label is \[\d+\] float64"),
        ("node_ptr", lambda x: x[::-1], "node_ptr must rise"),
        ("edge_index", lambda x: x[:1], r"edge_index must be \[2, E\], got \[1,"),
        ("edge_index", lambda x: x + 10**6, "edge_index has values beyond"),
        (
            "edge_index",
            lambda x: np.roll(x, 3, 0 + 1)[:, ::-1],
            "must have its edges protein by protein",
        ),
        (
            "edge_index",
            lambda x: np.stack([x[0], np.roll(x[1], 5)]),
            "edges from one protein to another",
        ),
        ("y", lambda x: x - 1, "y has values beyond 1 to 2"),
        ("y", lambda x: x[:3], "y must have a protein for each tenth, at least 10, got 3"),
    ],
)
def test_damaged_data_is_refused(tmp_path, key, change, message):
    made = arrays()
    made[key] = change(made[key])
    np.savez(tmp_path / "dd.npz", **made)
    with pytest.raises(ValueError, match=rf"dd\.npz is damaged: .*{message}"):
        load_dd(tmp_path)


def test_absent_and_other_data(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"dd\.npz is absent: --data names dd\.npz"):
        load_dd(tmp_path)
    monkeypatch.setenv("FASTGT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="or name it by --data"):
        load_dd(None)
    (tmp_path / "dd.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"dd\.npz is damaged"):
        load_dd(tmp_path)


def test_a_graph_is_classified_alone_as_in_a_batch(data):
    proteins, _ = load_dd(data)
    torch.manual_seed(0)
    config = GraphClassifierConfig(90, 2, dim=16, heads=2, layers=2, gated=True)
    model = GraphClassifier(config).to(DEVICE).eval()
    node_type, graph, _ = proteins.batch(torch.tensor([3, 40, 9])).to(DEVICE)
    both = model(node_type, graph)
    for g, i in enumerate((3, 40, 9)):
        node_type, graph, _ = proteins.batch(torch.tensor([i])).to(DEVICE)
        close(model(node_type, graph)[0], both[g], "logits", 1e-5)
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
        assert metrics[0] == "epoch,seconds,lr,train_loss,val_error,test_error"
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
    monkeypatch.setattr(dd, "EVERY", 3)
    monkeypatch.setattr(dd, "SCORED", 2)
    proteins, digest = load_dd(data)
    splits = proteins.splits()
    settings = dd.Settings(batch_size=8, layers=2, dim=16, heads=4, epochs=4, pruned=0.5)
    args = proteins, splits, digest

    def train(folder):
        return dd._train(settings, *args, folder, torch.device("cpu"))

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
    masks = [x for key, x in a["model"].items() if key.endswith("mask")]
    first = dd.HeadSparsity  # the exchange did happen: not the masks of the beginning
    torch.manual_seed(settings.seed)
    checkpoint.seed_everything(settings.seed)
    model = GraphClassifier(GraphClassifierConfig(90, 2, dim=16, heads=4, layers=2, gated=True))
    first(model, 0.5, steps=18, every=3, scored=2)
    began = [x for key, x in model.state_dict().items() if key.endswith("mask")]
    assert any(not torch.equal(x, y) for x, y in zip(masks, began, strict=True))


def test_outputs_that_differ_after_pruning_are_told(data, tmp_path, monkeypatch, capsys):
    def other(model):
        model = comparison.copy.deepcopy(model)
        with torch.no_grad():
            model.readout[-1].bias += 1
        return model

    monkeypatch.setattr(comparison, "prune_heads", other)
    assert cli.main(command(data, tmp_path, "--epochs", "1")) == 1
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
    assert cli.main(command(data, tmp_path, "--prune", "heads=0.9")) == 1
    assert "--prune heads=0.9 leaves none of the 4 heads" in capsys.readouterr().err
    assert cli.main(command(data, tmp_path, "--prune", "heads=0.05")) == 1
    assert "--prune heads=0.05 leaves all of the 4 heads" in capsys.readouterr().err
    assert cli.main(command(data, tmp_path, "--epochs", "1")) == 0
    capsys.readouterr()
    assert cli.main(command(data, tmp_path, "--epochs", "2")) == 1
    assert "holds a run with epochs 1, not 2" in capsys.readouterr().err


def test_a_second_comparison_in_the_same_folder_is_refused(data, tmp_path, capsys):
    with files.lock(tmp_path):
        assert cli.main(command(data, tmp_path, "--epochs", "1")) == 1
    assert f"fastgt: {tmp_path} is in use by process {os.getpid()} on " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_proteins_are_frozen(data):
    proteins, _ = load_dd(data)
    assert isinstance(replace(proteins, y=proteins.y + 1), Proteins)
    with pytest.raises(AttributeError):
        proteins.y = None

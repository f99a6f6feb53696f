"""examples/models/open_graph.py on a small graph in the layout of Cora, and on Cora where it is."""

import os
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "models" / "open_graph.py"
pytestmark = pytest.mark.usefixtures("one_thread")


def run(monkeypatch, *arguments):
    """What the script has when it ends."""
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLE), run_name="__main__")


@pytest.fixture
def folder(tmp_path):
    """``cora.npz``: seven communities of 20 nodes; two nodes of each are to train with."""
    draw, of = np.random.default_rng(0), np.repeat(np.arange(7), 20)
    share = np.where(of[:, None] == of, 0.4, 0.01)
    np.savez(
        tmp_path / "cora.npz",
        edge_index=np.stack(np.nonzero(np.triu(draw.random(share.shape) < share, 1))),
        y=of,
        split_public=np.tile(np.repeat([0, 1, 2], [2, 3, 15]), 7),
        x_indptr=np.arange(141),
        x_indices=np.zeros(140, np.int64),
        x_shape=np.array([140, 3]),
    )
    return tmp_path


def test_classes_and_links_without_training(folder, monkeypatch, capsys):
    found = run(monkeypatch, "cora", "--data", folder, "--dim", 32, "--draws", 2)
    classes, links = found["results"]["cora"]
    assert classes.shape == links.shape == (2, 2)
    assert classes.min() > 0.9
    assert links[:, 0].min() > 0.5
    assert (links[:, 1] >= links[:, 0]).all()
    said = capsys.readouterr().out
    assert re.search(r"cora: accuracy, macro F1 with 14 labels \d\.\d{4} \+- \d\.\d{4}, \d", said)
    assert re.search(r"cora: recall at 20, at 40 of hidden edges \d\.\d{4} \+- ", said)
    run(monkeypatch, "cora", "--data", folder, "--dim", 8, "--draws", 2, "--labels", "train", "val")
    assert "with 35 labels" in capsys.readouterr().out


def test_a_model_learns_the_edges_of_a_graph(folder, monkeypatch, capsys):
    settings = ["--dim", 32, "--layers", 2, "--anchors", 16, "--lr", 5e-3, "--draws", 2]
    settings += ["--pretrain", "cora", "--epochs", 5, "--batch", 32, "--steps", 12]
    found = run(monkeypatch, "cora", "--data", folder, *settings)
    assert len(re.findall(r"epoch \d: loss \d", capsys.readouterr().out)) == 5
    losses = found["losses"]
    assert len(losses) == 60
    assert sum(losses[-12:]) < 0.95 * sum(losses[:12])
    classes, _ = found["results"]["cora"]
    assert classes.min() > 0.9


def test_cora_without_training(monkeypatch):
    folder = Path(os.environ["FASTGT_DATA"])
    if not (folder / "cora.npz").exists():
        pytest.skip(f"{folder} has no cora.npz")
    found = run(monkeypatch, "cora", "--data", folder, "--dim", 128, "--draws", 1)
    assert found["results"]["cora"][0][0, 0] > 0.55
    assert found["results"]["cora"][1][0, 0] > 0.3

"""A training on pairs of graphs: what it is told, what it counts, and that it goes on."""

import json
from dataclasses import replace

import pytest
import torch
from train_cases import assert_same_run

from fastgt import cli
from fastgt.datasets import DATASETS, drawn_lines
from fastgt.encodings import Cache
from fastgt.models import CorrespondenceTransformer, log_likelihoods
from fastgt.training.inputs import prepared
from fastgt.training.published_recipes import RECIPES
from fastgt.training.ranks import Ranks
from fastgt.training.scores import loss_terms, matched
from fastgt.training.settings import changed
from fastgt.training.tasks import PairTask

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = ["dim=8", "heads=2", "layers=1", "pe_dim=3", "node_widths=8", "pe_widths=8", "iterations=2"]


@pytest.fixture(scope="module")
def data():
    return drawn_lines(20)


@pytest.fixture
def task(data, tmp_path):
    recipe = changed(RECIPES["correspondence", "drawn_lines"], TINY)
    torch.manual_seed(0)
    model = CorrespondenceTransformer(recipe.config)
    whole = prepared(recipe, data, Cache(tmp_path))
    return PairTask("", recipe, whole, model, takes_edges=False, ranks=Ranks()), model


def test_an_example_is_a_pair(task, data):
    task, model = task
    assert task.sizes == {"train": 20, "val": 2, "test": 2}
    output, y = task.outputs("val", torch.tensor([1, 0]))
    graphs = torch.tensor([42, 43, 40, 41])
    batch = task.data.batch(graphs)
    assert torch.equal(y, batch.y)
    assert batch.encodings.keys() == {"pe"}
    found = model(batch.node, batch.graph, **batch.encodings)
    assert torch.equal(output[:, 0], log_likelihoods(found, batch.y, batch.graph))
    assert set(output[:, 1].long().tolist()) <= set(range(-1, 50))


def test_the_loss_is_that_of_all_true_entries(task):
    """Of a match it counts once, though both of its nodes have it."""
    task, _ = task
    chosen = torch.tensor([3, 0])
    batch = task.data.batch(torch.tensor([6, 7, 0, 1]))
    output = task._output(batch)
    terms, ptr = [], batch.graph.graph_ptr.tolist()
    for g in range(4):
        for i in range(ptr[g], ptr[g + 1]):
            if batch.y[i] < 0 or g % 2 == 0:  # of a match, the first graph's
                terms.append(-output[i, 0])
    wanted = torch.stack(terms).mean()
    torch.testing.assert_close(task.loss(chosen), wanted)
    parts, weight = loss_terms("assignment", output, batch.y, lambda x: x)
    torch.testing.assert_close(parts / weight, wanted)


def test_what_is_matched_is_counted_among_those_that_have_a_match():
    output = torch.tensor([[0.0, 4.0], [0.0, 2.0], [0.0, -1.0], [0.0, -1.0], [0.0, 7.0]])
    assert matched(output, torch.tensor([4, 3, -1, 0, -1])) == 1 / 3
    for wrong in (torch.zeros(5), torch.zeros(4, dtype=int)):
        with pytest.raises(ValueError, match=r"numbers \[B, 2\] need matches \[B\], got \[5, 2\]"):
            matched(output, wrong)


@pytest.mark.parametrize(
    ("graphs", "message"),
    [
        ([0, 1, 2], "train has 3 graphs, and a pair has two"),
        ([0, 2, 1, 3], r"train must have graphs 2p and 2p \+ 1 after each other"),
        ([1, 2], r"train must have graphs 2p and 2p \+ 1 after each other"),
    ],
)
def test_splits_that_tear_pairs_apart_are_refused(task, graphs, message):
    task, model = task
    data = replace(task.data, splits=task.data.splits | {"train": torch.tensor(graphs)})
    with pytest.raises(ValueError, match=message):
        PairTask("", task.recipe, data, model, takes_edges=False, ranks=Ranks())


def test_loss_and_metric_go_together():
    recipe = RECIPES["correspondence", "drawn_lines"]
    with pytest.raises(ValueError, match="loss 'assignment' and metric 'matched' go together, got"):
        replace(recipe, metric="accuracy")
    with pytest.raises(ValueError, match="loss 'assignment' and metric 'matched' go together, got"):
        replace(RECIPES["graph_gps", "pattern"], metric="matched")


def test_a_tiny_training_runs_and_goes_on(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DATASETS, "drawn_lines", lambda folder: data)

    def train(folder, epochs, *more):
        names = ["train", "correspondence", "drawn_lines", "--output", str(tmp_path / folder)]
        options = [*TINY, "schedule=constant", "batch_size=6", f"epochs={epochs}", *more]
        assert cli.main([*names, "--device", "cpu", "--set", *options]) == 0
        return capsys.readouterr().out

    out = train("whole", 2)
    assert "20 / 2 / 2 pairs of graphs" in out
    assert "share of matches found" in out
    (row,) = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert row["metric"] == "matched"
    assert 0 <= row["test"] <= 1
    train("parts", 1)
    train("parts", 2)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", "matched")
    assert "at epoch" in train("half", 1, "precision=bf16")
    names = ["train", "correspondence", "drawn_lines", "--output", str(tmp_path / "odd")]
    assert cli.main([*names, "--device", "cpu", "--limit", "7", "--set", *TINY]) == 2
    assert "train has 7 graphs, and a pair has two" in capsys.readouterr().err

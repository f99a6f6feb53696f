"""Training on batches of nodes whose tokens were sampled before."""

import json
from dataclasses import replace

import pytest
import torch
from train_cases import assert_same_run, ring

from fastgt import cli
from fastgt.datasets import TokenSet, load
from fastgt.encodings import random_projection_pe
from fastgt.models import LargeGT, LargeGTConfig
from fastgt.training import loop, published_recipes
from fastgt.training.recipe import Recipe
from fastgt.training.train import Plan, run

NODES = 90
CONFIG = LargeGTConfig(
    10, 2, NODES, dim=8, samples=4, position_dim=4, centroids=6, dropout=0.2, local_dropout=0.1
)
pytestmark = pytest.mark.usefixtures("recipe")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return ring(tmp_path_factory.mktemp("data") / "tolokers.npz", NODES, 10, 2)


@pytest.fixture
def recipe(monkeypatch):
    small = Recipe(
        "large_gt", "tolokers", CONFIG, metric="roc_auc", schedule="constant", batch_size=12,
        epochs=4, lr=0.01,
    )  # fmt: skip
    monkeypatch.setitem(published_recipes.RECIPES, ("large_gt", "tolokers"), small)
    return small


def command(data, output, *options):
    names = ["train", "large_gt", "tolokers", "--data", str(data), "--output", str(output)]
    return [*names, "--device", "cpu", *options]


@pytest.mark.parametrize("parts", ["full", "local", "global"])
def test_trains_and_tells_the_metric_of_the_best_weights(data, parts, recipe, tmp_path, capsys):
    options = ["--splits", "1", "--epochs", "12", "--set", f"parts={parts}"]
    assert cli.main(command(data, tmp_path, *options)) == 0
    assert "30 / 30 / 30 nodes of one graph" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "result.json").read_text())
    assert row["test"] > 0.8 or parts == "global"
    nodes = load("tolokers", data)
    model = LargeGT(replace(CONFIG, parts=parts)).eval()
    model.load_state_dict(torch.load(tmp_path / "split-1" / "best.pt", weights_only=True)["model"])
    (folder,) = (tmp_path / "encodings").glob("tokens-*-4")
    mine = nodes.splits[1]["test"].nonzero()[:, 0]
    batch = TokenSet(folder).batch(mine)
    given = {}
    if parts != "local":
        given = {"position": random_projection_pe(nodes.graph, 4)[mine], "nodes": mine}
    with torch.no_grad():
        logits = model(batch.tokens, **given)
    score, y = logits[:, 1] - logits[:, 0], nodes.y[mine]
    above = (score[y == 1][:, None] > score[y == 0]).double().mean()
    assert row["test"] == pytest.approx(float(above), abs=1e-9)


def test_stopped_and_begun_again_is_the_same(data, recipe, tmp_path, monkeypatch):
    device = torch.device("cpu")
    run(recipe, Plan(tmp_path / "whole", splits=[0], data=data), device=device)
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
            run(recipe, Plan(tmp_path / "parts", splits=[0], data=data), device=device)
            break
        except KeyboardInterrupt:
            stops += 1
            assert stops < 20
    assert stops >= 2
    assert_same_run(tmp_path / "whole" / "split-0", tmp_path / "parts" / "split-0", "roc_auc")


def test_a_graph_of_other_nodes_is_refused(data, recipe, tmp_path):
    other = replace(recipe, config=replace(CONFIG, num_nodes=91))
    with pytest.raises(ValueError, match="num_nodes must be 90, the nodes of tolokers, got 91"):
        run(other, Plan(tmp_path, data=data), device=torch.device("cpu"))
    assert not list(tmp_path.glob("encodings/tokens-*"))  # before what takes long

"""``torchrun -m fastgt train``: two processes learn what one learns."""

import json
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from train_cases import assert_same_run, command, launched, table, write

from fastgt import cli
from fastgt.datasets import load
from fastgt.models import EdgeGraphTransformerConfig, GraphTransformerConfig
from fastgt.training import checkpoint
from fastgt.training.published_recipes import MODELS
from fastgt.training.ranks import Ranks
from fastgt.training.recipe import Recipe
from fastgt.training.tasks import GraphTask

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo and torchrun")
# without dropout and signs, which each process draws for itself
SAME = ["pe_dim=0", "epochs=2", "batch_size=33", "last_edges=false"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"))


def test_two_processes_learn_what_one_learns(data, tmp_path):
    status, out = launched(command(data, tmp_path / "two", *SAME), tmp_path)
    assert status == 0, out
    assert out.count("edge_graph_transformer on ZINC-12k, substitute train: 200 / 40 / 40") == 1
    assert "2 processes" in out
    assert cli.main(command(data, tmp_path / "one", *SAME)) == 0
    # seven batches, the last of two graphs: one a process
    for found, expected in zip(table(tmp_path / "two"), table(tmp_path / "one"), strict=True):
        for a, b in zip(found, expected, strict=True):
            assert (a == b == "") or float(a) == pytest.approx(float(b), rel=2e-4)
    (row,) = json.loads((tmp_path / "two" / "result.json").read_text())
    assert row["settings"]["processes"] == 2
    # one process does not go on with the run of two
    assert cli.main(command(data, tmp_path / "two", *SAME)) == 2


def gradients(path, ranks):
    """Losses, gradients and running statistics of two models, whose shares are ragged or empty."""
    molecules = load("zinc12k", path)
    labelled = replace(molecules, y=molecules.node % 3, y_per="node")
    config = GraphTransformerConfig(28, 3, dim=8, heads=2, layers=2)
    nodes = Recipe("graph_transformer", "", config, loss="class_weighted_cross_entropy")
    small = EdgeGraphTransformerConfig(dim=8, heads=2, layers=2, pe_dim=0, last_edges=False)
    graphs = Recipe("edge_graph_transformer", "", small, loss="l1", metric="mae")
    found = {}
    for recipe, data in ((nodes, labelled), (graphs, molecules)):
        kind = MODELS[recipe.model]
        for chosen in (torch.arange(7), torch.tensor([3])):
            torch.manual_seed(0)
            model = kind.make(recipe.config).double()
            called = ranks.wrapped(model)
            task = GraphTask("", recipe, data, called, takes_edges=kind.takes_edges, ranks=ranks)
            loss = task.loss(ranks.share(chosen))
            loss.backward()
            where = f"{recipe.model} {len(chosen)}"
            found[where] = ranks.total(loss) / ranks.size
            found |= {f"{where} {name}": x.grad for name, x in model.named_parameters()}
            found |= {f"{where} {name}": x for name, x in model.named_buffers()}
    return found


GRADIENTS = """
import torch
from test_train_ranks import gradients
from fastgt.training.ranks import joined
with joined(torch.device("cpu")) as (ranks, _):
    found = gradients(sys.argv[1], ranks)
    if ranks.rank == 1:
        torch.save(found, sys.argv[2])
sys.exit()
"""


def test_gradients_are_those_of_one_process(data, tmp_path):
    status, out = launched([str(data), str(tmp_path / "found.pt")], tmp_path, GRADIENTS)
    assert status == 0, out
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    expected = gradients(data, Ranks())
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-9, atol=1e-12, msg=name)


def test_a_batch_norm_that_no_process_gives_rows_tracks_nothing():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        norm = torch.nn.BatchNorm1d(3)
        called = Ranks(0, 2).wrapped(norm)
        out = called(torch.zeros(0, 3))
        out.sum().backward()
    finally:
        dist.destroy_process_group()
    assert out.shape == (0, 3)
    expected = torch.nn.BatchNorm1d(3)
    expected(torch.zeros(0, 3))
    for (name, x), y in zip(norm.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(x, y), name
    for x in norm.parameters():
        assert x.grad is not None
        assert not x.grad.any()


STOPPED = """
real, seen = loop.Training._obey, [0]
def obey(self):
    seen[0] += 1
    # the process that does not lead is told first
    self._stop.asked = self.ranks.rank == 1 and seen[0] == 6
    real(self)
loop.Training._obey = obey
"""


def test_two_processes_that_are_stopped_go_on(data, tmp_path):
    """With signs and dropout, of which each process has its own random numbers."""
    options = ["dropout=0.2", "epochs=2", "batch_size=40"]
    assert launched(command(data, tmp_path / "whole", *options), tmp_path)[0] == 0
    status, out = launched(command(data, tmp_path / "parts", *options), tmp_path, STOPPED)
    assert status == 1, out
    assert "stopped in epoch 2 after" in out or "stopped in epoch 1 after" in out
    status, out = launched(command(data, tmp_path / "parts", *options), tmp_path)
    assert status == 0, out
    assert "going on with" in out
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    states = checkpoint.load(tmp_path / "whole" / "checkpoint.pt")["random"]
    assert states.keys() == {"0", "1"}
    assert not torch.equal(states["0"]["torch"], states["1"]["torch"])

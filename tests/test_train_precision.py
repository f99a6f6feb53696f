"""Trainings of GraphGPS with dropout, clipping, cosine and low precision: stopped, they go on."""

import math

import pytest
import torch
from train_cases import assert_same_run, command, table, write

from fastgt import cli
from fastgt.training import checkpoint, loop

GPS = ["heads=2", "walk_steps=4", "walk_dim=4", "epochs=3", "warmup=1", "attention_dropout=0.3"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"))


def train(data, folder, *options):
    return cli.main(command(data, folder, *GPS, *options, model="graph_gps"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stopped_inside_epochs_a_run_goes_on(precision, data, tmp_path, monkeypatch):
    options = [f"precision={precision}"]
    assert train(data, tmp_path / "whole", *options) == 0
    real, seen, stops = loop.Training._obey, [0], 0

    def obey(self):
        seen[0] += 1
        if seen[0] == 6:
            self._stop.asked = True
        real(self)

    monkeypatch.setattr(loop.Training, "_obey", obey)
    while (status := train(data, tmp_path / "parts", *options)) == 130:
        seen[0], stops = 0, stops + 1
        assert stops < 20
    assert status == 0
    assert stops > 3
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    rates = [float(row[1]) / 1e-3 for row in table(tmp_path / "whole")]
    assert rates == pytest.approx([1e-6, 1.0, 0.5])
    scale = checkpoint.load(tmp_path / "whole" / "checkpoint.pt")["scaler"]
    assert bool(scale) == (precision == "fp16")


def test_low_precision_learns_alike_and_not_the_same(data, tmp_path):
    losses = {}
    for precision in ("fp32", "bf16", "fp16"):
        options = ["attention_dropout=0", "warmup=0", f"precision={precision}"]
        keep = [x for x in GPS if x.partition("=")[0] not in ("attention_dropout", "warmup")]
        folder = tmp_path / precision
        assert cli.main(command(data, folder, *keep, *options, model="graph_gps")) == 0
        losses[precision] = [float(row[2]) for row in table(folder)]
    for precision in ("bf16", "fp16"):
        assert losses[precision] == pytest.approx(losses["fp32"], rel=0.05)
        assert losses[precision] != losses["fp32"]


def test_gradients_are_cut_to_the_norm(data, tmp_path, monkeypatch):
    """Before the step, and of the gradients without their scale."""
    norms, real = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        squares = [x.grad.square().sum() for g in self.param_groups for x in g["params"]]
        norms.append(math.sqrt(float(torch.stack(squares).sum())))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    keep = [x for x in GPS if not x.startswith("epochs")]
    for precision in ("fp32", "fp16"):
        norms.clear()
        options = ["epochs=2", "clip=0.01", f"precision={precision}"]
        folder = tmp_path / precision
        names = [*keep, "last_edges=false", *options]
        assert cli.main(command(data, folder, *names, model="graph_gps")) == 0
        assert len(norms) == 14
        assert max(norms) == pytest.approx(0.01, rel=1e-3)

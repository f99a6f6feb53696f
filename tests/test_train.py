"""``fastgt train``: what is learned, what interruptions cost (nothing), what is refused."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from train_cases import arrays, assert_same_run, command, table, write

from fastgt import cli, files
from fastgt.datasets import GraphSet, load
from fastgt.encodings import laplacian_pe
from fastgt.models import EdgeGraphTransformer, EdgeGraphTransformerConfig
from fastgt.training import checkpoint, loop, memory, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """Three epochs, never interrupted, and what was printed."""
    folder = tmp_path_factory.mktemp("straight")
    assert cli.main(command(data, folder, "--epochs", "3")) == 0
    return folder


def test_the_loss_falls_and_the_result_is_told(data, tmp_path, capsys):
    assert cli.main(command(data, tmp_path / "a" / "b", "--epochs", "8")) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "a" / "b"
    rows = [[float(x) if x else None for x in row] for row in table(folder)]
    assert [row[0] for row in rows] == list(range(1, 9))
    assert rows[-1][2] < 0.8 * rows[0][2]
    best = min(rows, key=lambda row: row[4])
    # the test error of the best epoch, and of none that is worse than one before it
    for i, row in enumerate(rows):
        assert (row[5] is not None) == (row[4] < min([r[4] for r in rows[:i]], default=1e9))
        assert row[3] == pytest.approx(row[4], rel=1e-6)  # this loss is this metric
    assert "on ZINC-12k, substitute train: 200 / 40 / 40 graphs" in out
    assert "8 epochs are done" in out
    line = re.search(r"^seed 41, split 0 +(\S+) +(\S+) +(\d+) +8 ", out, re.MULTILINE)
    assert line.groups() == (f"{best[4]:.4f}", f"{best[5]:.4f}", f"{best[0]:.0f}")
    assert re.search(r"^published +0\.2260\+-0\.0140 +Dwivedi and Bresson", out, re.MULTILINE)
    (result,) = json.loads((folder / "result.json").read_text())
    assert (result["val"], result["test"], result["epoch"]) == (best[4], best[5], best[0])
    assert result["title"] == "ZINC-12k, substitute train"
    assert result["published"]["value"] == 0.226
    assert result["epoch_s"] > 0
    assert result["peak_bytes"] > 10**8
    model = EdgeGraphTransformer(EdgeGraphTransformerConfig(layers=2, dim=16, heads=2))
    assert result["parameters"] == sum(x.numel() for x in model.parameters())
    assert result["settings"]["layers"] == 2
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(x.name for x in folder.iterdir()) == [
        "best.pt",
        "checkpoint.pt",
        "curve.png",
        "encodings",
        "metrics.csv",
        "result.json",
    ]
    assert err == ""  # a bar is for a terminal
    assert "\r" not in out


def test_json_stands_alone_and_bars_are_for_a_terminal(data, tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    assert cli.main(command(data, tmp_path, "--epochs", "1", "--json")) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == json.loads((tmp_path / "result.json").read_text())
    said = shown.getvalue()
    assert "training: 100%" in said
    assert "val_mae=" in said
    assert "1 epochs are done" in said


def test_a_log_gets_whole_lines(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "TELL_EVERY", 0.0)
    assert cli.main(command(data, tmp_path, "--epochs", "2")) == 0
    lines = capsys.readouterr().err.splitlines()
    number = r"-?[\d.]+(e[-+]\d+)?"
    for i, line in enumerate(lines, 1):
        state = rf"loss {number}, val_mae {number}, best {number}, lr {number}"
        assert re.fullmatch(rf"epoch {i} of 2: {state}", line), line
    assert len(lines) == 2


def test_best_weights_give_the_reported_error(straight, data):
    best = checkpoint.load(straight / "best.pt")
    model = EdgeGraphTransformer(EdgeGraphTransformerConfig(layers=2, dim=16, heads=2)).eval()
    model.load_state_dict(best["model"])
    molecules = load("zinc12k", data)
    test = molecules.batch(molecules.splits["test"])
    error = model(test.node, test.edge, test.graph, laplacian_pe(test.graph, 8))[:, 0] - test.y
    assert error.abs().mean().item() == pytest.approx(best["test_mae"], rel=1e-5)


def test_settings_are_the_published_ones(data, tmp_path, monkeypatch):
    made = {}

    class Spy(loop.Training):
        def run(self, **limits):
            made.update(vars(self), limits=limits)
            raise KeyboardInterrupt

    monkeypatch.setattr(train, "Training", Spy)
    folder = str(tmp_path / "run")
    names = ["train", "edge_graph_transformer", "zinc12k"]
    assert cli.main([*names, "--data", str(data), "--output", folder]) == 130
    assert sum(p.numel() for p in made["model"].parameters()) == 588_929
    assert type(made["optimizer"]) is torch.optim.Adam
    group = made["optimizer"].param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (7e-4, 0)
    schedule = made["schedule"]
    assert (schedule.mode, schedule.factor, schedule.patience) == ("min", 0.5, 15)
    assert made["batch_size"] == 128
    assert made["settings"]["seed"] == 41
    assert (made["recipe"].epochs, made["recipe"].min_lr) == (1000, 1e-6)
    assert made["limits"] == {"hours": 24.0}


@pytest.mark.parametrize("every", [0.0, 1e9], ids=["every batch", "epochs only"])
def test_killed_again_and_again_is_the_same_run(every, straight, data, tmp_path, monkeypatch):
    """Nothing gets to clean up, as by SIGKILL: what counts is the last checkpoint."""
    monkeypatch.setattr(loop, "SAVE_EVERY", every)
    monkeypatch.setattr(loop, "EPOCH_EVERY", 0.0)
    real, calls, lives = GraphSet.batch, [0], 0

    class Killed(BaseException):
        pass

    def batch(self, graphs):
        calls[0] += 1
        if calls[0] == 4 + lives * (2 if every else 1):
            raise Killed
        return real(self, graphs)

    monkeypatch.setattr(GraphSet, "batch", batch)
    while True:
        calls[0] = -1 if lives else 0  # that of all graphs, for the encodings
        # generators in any other state
        random.seed(lives), np.random.seed(lives), torch.manual_seed(lives)
        try:
            assert cli.main(command(data, tmp_path, "--epochs", "3")) == 0
            break
        except Killed:
            lives += 1
            assert lives < 60
    assert lives > 5
    assert_same_run(tmp_path, straight)


def test_stopped_politely_after_any_batch_is_the_same_run(straight, data, tmp_path, capsys):
    """In training and in evaluation; the checkpoint is written though none was due."""
    stops = 0
    real = loop.Training._obey
    seen = [0]

    def obey(self):
        seen[0] += 1
        if seen[0] == 2 + stops % 5:
            signal.raise_signal(signal.SIGTERM if stops % 2 else signal.SIGINT)
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Training, "_obey", obey)
        while (status := cli.main(command(data, tmp_path, "--epochs", "3"))) == 130:
            assert "the same command goes on from there" in capsys.readouterr().err
            stops, seen[0] = stops + 1, 0
            assert stops < 30
    assert status == 0
    assert stops > 4
    assert f"going on with {tmp_path}" in capsys.readouterr().out
    assert_same_run(tmp_path, straight)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interrupt_does_not_wait(data, tmp_path, monkeypatch):
    def loss(self):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one must come through")

    monkeypatch.setattr(loop.Training, "_train", loss)
    assert cli.main(command(data, tmp_path, "--epochs", "3")) == 130


def start(data, folder, *options, save_every=30.0):
    code = (
        "import sys; from fastgt import cli; from fastgt.training import loop\n"
        f"loop.SAVE_EVERY = {save_every}; sys.exit(cli.main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *command(data, folder, *options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )


def wait_for(condition, run):
    limit = time.monotonic() + 120
    while not condition():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < limit
        time.sleep(0.02)


def position(folder):
    """-> epochs and batches done, by the checkpoint."""
    if not (folder / "checkpoint.pt").exists():
        return 0, 0
    progress = checkpoint.load(folder / "checkpoint.pt")["progress"]
    return len(progress["rows"]), progress["batch"]


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_process_stopped_inside_an_epoch_goes_on(name, straight, data, tmp_path, capsys):
    run = start(data, tmp_path, "--epochs", "3", save_every=0.0)
    wait_for(lambda: position(tmp_path) >= (1, 2), run)
    run.send_signal(getattr(signal, name))
    err = run.communicate(timeout=120)[1]
    assert run.returncode == (-signal.SIGKILL if name == "SIGKILL" else 130), err
    if name != "SIGKILL":
        assert "Traceback" not in err
        assert err.splitlines()[-1].startswith("fastgt: stopped in epoch ")
    epochs, batches = position(tmp_path)
    assert epochs < 3
    (tmp_path / "checkpoint.pt.0123456789abcdef.partial").write_bytes(b"half of a checkpoint")
    capsys.readouterr()
    assert cli.main(command(data, tmp_path, "--epochs", "3")) == 0
    assert f"{epochs} epochs and {batches} batches done" in capsys.readouterr().out
    assert_same_run(tmp_path, straight)
    assert not list(tmp_path.glob("*.partial"))


def test_a_second_run_in_the_same_folder_is_refused(straight, data, tmp_path, capsys):
    with files.lock(tmp_path):
        assert cli.main(command(data, tmp_path, "--epochs", "3")) == 1
    said = capsys.readouterr().err
    assert re.search(rf"^fastgt: {tmp_path} is in use by process {os.getpid()} on \S+ since ", said)
    assert list(tmp_path.iterdir()) == []
    assert cli.main(command(data, tmp_path, "--epochs", "3")) == 0
    assert_same_run(tmp_path, straight)


def test_several_runs_in_the_folder_of_one_are_refused(straight, data, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run")
    kept = (tmp_path / "run" / "result.json").read_bytes()
    for seeds in ("0", "1-2"):
        options = ["--epochs", "1", "--seeds", seeds]
        assert cli.main(command(data, tmp_path / "run", *options)) == 2
        assert "holds one run: name another --output for several" in capsys.readouterr().err
    assert (tmp_path / "run" / "result.json").read_bytes() == kept
    assert not list((tmp_path / "run").glob("seed-*"))


def test_files_lost_after_the_last_checkpoint_are_made_again(straight, data, tmp_path):
    for name in ("checkpoint.pt", "metrics.csv", "best.pt"):
        (tmp_path / name).write_bytes((straight / name).read_bytes())
    whole = (tmp_path / "metrics.csv").read_bytes()
    (tmp_path / "metrics.csv").write_bytes(whole[:70])
    (tmp_path / "best.pt").unlink()
    assert cli.main(command(data, tmp_path, "--epochs", "3")) == 0
    assert (tmp_path / "metrics.csv").read_bytes() == whole
    assert (tmp_path / "curve.png").exists()
    assert (tmp_path / "best.pt").exists()


def test_a_finished_run_can_be_made_longer(straight, data, tmp_path, capsys):
    assert cli.main(command(data, tmp_path, "--epochs", "2")) == 0
    assert cli.main(command(data, tmp_path, "--epochs", "1")) == 0
    assert "2 epochs are done" in capsys.readouterr().out
    assert cli.main(command(data, tmp_path, "--epochs", "3")) == 0
    assert_same_run(tmp_path, straight)


def test_hours_and_learning_rate_end_a_run(data, tmp_path, capsys):
    assert cli.main(command(data, tmp_path / "hours", "--hours", "1e-6")) == 0
    assert "1e-06 hours are over" in capsys.readouterr().out
    assert len(table(tmp_path / "hours")) == 1
    # halved where validation is no better than in the epoch before
    options = ["lr=0.5", "patience=0", "min_lr=0.2", "epochs=40"]
    assert cli.main(command(data, tmp_path / "rate", *options)) == 0
    assert "the learning rate fell below 0.2" in capsys.readouterr().out
    assert float(table(tmp_path / "rate")[-1][1]) >= 0.2


def test_no_better_metric_ends_a_run(data, tmp_path, capsys):
    options = ["lr=1e-9", "schedule=constant", "stop_after=2", "epochs=40"]
    assert cli.main(command(data, tmp_path, *options)) == 0
    assert "validation was no better for 2 epochs" in capsys.readouterr().out
    rows = table(tmp_path)
    best = min(rows, key=lambda row: float(row[4]))
    assert len(rows) == int(best[0]) + 2


def test_every_option_of_the_run_makes_another_run(straight, data, tmp_path, capsys):
    for options, message in (
        (["seed=42"], "seed 41, not 42"),
        (["batch_size=16"], "batch_size 32, not 16"),
        (["layers=3"], "layers 2, not 3"),
        (["pe_dim=0"], "pe_dim 8, not 0"),
        (["clip=1"], "clip None, not 1.0"),
        (["--limit", "100"], "limit None, not 100"),
        (["--precision", "bf16"], "precision fp32, not bf16"),
    ):
        assert cli.main(command(data, straight, *options)) == 2
        err = capsys.readouterr().err
        assert f"{straight} holds a run with {message}: name another --output" in err
        assert err.count("\n") == 1
    write(tmp_path, train_y=arrays()["train_y"] + 1)
    assert cli.main(command(tmp_path, straight)) == 2
    assert f"{straight} holds a run with digest " in capsys.readouterr().err


def test_seeds_and_options_matter(straight, data, tmp_path):
    for i, options in enumerate((["seed=1"], ["pe_dim=0"], ["--limit", "64"])):
        folder = tmp_path / str(i)
        assert cli.main(command(data, folder, *options, "--epochs", "1")) == 0
        assert table(folder)[0] != table(straight)[0]


def test_reference_trains_alike(straight, data, tmp_path):
    assert cli.main(command(data, tmp_path, "--epochs", "1", "--impl", "reference")) == 0
    for found, expected in zip(table(tmp_path)[0], table(straight)[0], strict=True):
        assert float(found) == pytest.approx(float(expected), rel=1e-3)


def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path, capsys):
    assert cli.main(command(data, tmp_path, "lr=1e30")) == 1
    assert "fastgt: epoch 1 ended with loss nan" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other", "format"])
def test_damaged_checkpoints_are_said_and_kept(damage, straight, data, tmp_path, capsys):
    content = (straight / "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other":
        torch.save([1, 2], path)
    else:
        torch.save(checkpoint.load(straight / "checkpoint.pt") | {"format": 0}, path)
    before = path.read_bytes()
    assert cli.main(command(data, tmp_path)) == 2
    err = capsys.readouterr().err
    wanted = "has format 0" if damage == "format" else "checkpoint.pt is damaged: "
    assert wanted in err
    assert err.count("\n") == 1
    assert path.read_bytes() == before


def lacking(content, key):
    """A copy without the entry of that path, "progress.rows.0.lr" for one."""
    head, _, rest = key.partition(".")
    if isinstance(content, list):
        return [lacking(content[0], rest), *content[1:]]
    if not rest:
        return {name: x for name, x in content.items() if name != head}
    return {**content, head: lacking(content[head], rest)}


@pytest.mark.parametrize(
    "key",
    [
        "settings",
        "model",
        "optimizer",
        "schedule",
        "random",
        "progress",
        "optimizer.state",
        "random.0.torch",
        "progress.rows",
        "progress.order",
        "progress.loss",
        "progress.best",
        "progress.best.model",
        "progress.best.val_mae",
        "progress.rows.0.lr",
        "progress.rows.0.test_mae",
        "scaler",
    ],
)
def test_a_checkpoint_that_lacks_a_part_is_said(key, straight, data, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    whole = checkpoint.load(straight / "checkpoint.pt")
    torch.save(lacking(whole, key), path)
    before = path.read_bytes()
    assert cli.main(command(data, tmp_path, "--epochs", "3")) == 2
    err = capsys.readouterr().err
    last = key.rpartition(".")[2]
    assert err == (
        f"fastgt: {path} is no whole checkpoint: {last!r} is missing; delete it, or name another "
        "--output\n"
    )
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("settings", 3, "no whole checkpoint: 'settings' is a int"),
        ("model", {}, "does not fit the run: Error.s. in loading state_dict"),
        ("optimizer", {"state": {}, "param_groups": []}, "does not fit the run: .*param"),
        ("random", {"0": {"python": 1}}, "does not fit the run: "),
        ("progress", {"more": 1}, "no whole checkpoint: 'rows' is missing"),
    ],
)
def test_a_checkpoint_of_something_else_is_said(
    part, value, message, straight, data, tmp_path, capsys
):
    content = checkpoint.load(straight / "checkpoint.pt") | {part: value}
    torch.save(content, tmp_path / "checkpoint.pt")
    assert cli.main(command(data, tmp_path, "--epochs", "3")) == 2
    err = capsys.readouterr().err
    assert re.match(f"fastgt: {tmp_path / 'checkpoint.pt'} (is )?{message}", err), err
    assert err.endswith("; delete it, or name another --output\n")
    assert err.count("\n") == 1


def test_damaged_data_is_said(tmp_path, capsys):
    write(tmp_path, train_atom=np.full_like(arrays()["train_atom"], 28))
    assert cli.main(command(tmp_path, tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fastgt: {tmp_path / 'zinc12k.npz'} is damaged: train_atom has values ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--data", "nowhere"], 2, "nowhere is absent"),
        (["--data", "."], 2, "zinc12k.npz is absent"),
        (["--device", "tpu"], 2, "--device must be cpu or cuda, got tpu"),
        (["heads=3"], 2, "heads must divide dim, got dim=16 and heads=3"),
        (["depth=3"], 2, "--set depth: no such setting; known are loss, metric, optimizer, "),
        (["layers=two"], 2, "--set layers must be a whole number, got 'two'"),
        (["layers"], 2, "--set takes key=value, got 'layers'"),
        (["lr=nan"], 2, "--set lr must be a number, got 'nan'"),
        (["lr=1", "lr=2"], 2, "--set lr is there twice"),
        (["epochs=3", "--epochs", "3"], 2, "--set epochs is there twice"),
        (["schedule=step"], 2, "--set schedule must be 'constant' or 'plateau' or 'cosine'"),
        (["last_edges=1"], 2, "--set last_edges must be true or false, got '1'"),
        (["batch_size=0"], 2, "batch_size must be positive, got 0"),
        (["schedule=cosine", "warmup=5", "epochs=5"], 2, "warmup must be below epochs=5, got 5"),
        ([f"seed={2**64}"], 2, "seed must fit in 64 bits"),
        (["--epochs", "0"], 2, "positive integer, got '0'"),
        (["--hours", "-1"], 2, "positive number, got '-1'"),
        (["--hours", "nan"], 2, "positive number, got 'nan'"),
        (["--hours", "soon"], 2, "positive number, got 'soon'"),
        (["--epochs", "9" * 20], 2, f"--epochs: must be at most 2147483647, got {'9' * 20}"),
        (["--precision", "fp8"], 2, "invalid choice"),
        (["--seeds", "3-1"], 2, "must be numbers as 0-3,7, got '3-1'"),
        (["--seeds", "1,1"], 2, "--seeds has a number twice: 1, 1"),
        (["--splits", "0"], 2, "--splits are of the nodes of one graph, and zinc12k is many"),
        (["--prune", "heads=0.5"], 2, "heads of edge_graph_transformer are not pruned here"),
        (["--limit", "none"], 2, "positive integer, got 'none'"),
        (["--impl", "cuda"], 2, "invalid choice"),
        (["--output", "file"], 2, "file"),
        (["--output", "file/run"], 2, "file/run"),
    ],
)
def test_usage_errors(options, status, message, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("not a folder")
    try:
        found = cli.main(command(data, "run", *options))
    except SystemExit as error:
        found = error.code
    err = capsys.readouterr().err
    assert found == status
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("option", ["dim=512", "layers=100"])
def test_a_model_that_fits_in_no_memory_is_refused_before_it_is_made(
    option, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(memory, "free_memory", lambda device: 4_000_000)
    assert cli.main(command(data, tmp_path / "run", option)) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(
        r"fastgt: a model of [\d,]+ parameters takes 0\.\d GB in training, and 0\.0 GB are free: "
        r"choose a smaller one, as by --set layers=2\n",
        err,
    )
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    drawn = torch.get_rng_state()
    config = EdgeGraphTransformerConfig(layers=2, dim=16, heads=2)
    memory.check_fits(lambda: EdgeGraphTransformer(config), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_folder_that_takes_no_files_shows_before_training(data, tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "checkpoint.pt.partial")

    monkeypatch.setattr(files.os, "fsync", refuse)
    assert cli.main(command(data, tmp_path / "run")) == 1
    out, err = capsys.readouterr()
    assert err == "fastgt: [Errno 13] Permission denied: 'checkpoint.pt.partial'\n"
    assert out == ""
    assert not [x for x in (tmp_path / "run").rglob("*") if x.is_file()]


def test_data_that_is_nowhere_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTGT_DATA", str(tmp_path))
    names = ["train", "edge_graph_transformer", "zinc12k"]
    assert cli.main([*names, "--output", str(tmp_path / "run")]) == 2
    assert "zinc12k.npz is absent: set FASTGT_DATA" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_devices_that_cannot_run_are_said(data, tmp_path, monkeypatch, capsys):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert cli.main(command(data, tmp_path / "run", "--impl", "triton")) == 1
    assert "impl='triton' needs tensors on a GPU, got cpu" in capsys.readouterr().err
    assert cli.main(command(data, tmp_path / "run", "--device", "cuda")) == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x"
    files.write(path, b"old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        files.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_random_states_are_restored():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.normal(),
            torch.rand(1).item(),
            torch.rand(1, device=device).item(),
        )

    checkpoint.seed_everything(3)
    draw()
    state = checkpoint.random_state(device)
    expected = [draw() for _ in range(3)]
    checkpoint.set_random_state(state, device)
    assert [draw() for _ in range(3)] == expected

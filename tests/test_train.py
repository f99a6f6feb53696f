"""``fastgt train``: what is learned, what interruptions cost (nothing), what is refused."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgt import cli, files
from fastgt.training import checkpoint, loop, size, zinc
from fastgt.training.molecules import Molecules, load_zinc

SMALL = ["--layers", "2", "--dim", "16", "--heads", "2", "--batch-size", "32", "--device", "cpu"]
TRAIN, HELD_OUT = 200, 40
BATCHES = 7  # of an epoch


pytestmark = pytest.mark.usefixtures("one_thread")


def arrays():
    """Small rings with a tail; what is predicted is a sum over atoms and bonds."""
    draw = np.random.default_rng(0)
    worth = draw.normal(size=28), draw.normal(size=4)
    made = {}
    for split, count in (("train", TRAIN), ("val", HELD_OUT), ("test", HELD_OUT)):
        atoms, bonds, edges, y = [], [], [], []
        for _ in range(count):
            n = int(draw.integers(9, 14))
            pairs = [(i, (i + 1) % 6) for i in range(6)] + [(i - 1, i) for i in range(6, n)]
            atom, bond = draw.integers(0, 28, n), draw.integers(1, 4, len(pairs))
            y.append((worth[0][atom].sum() + worth[1][bond].sum()) / n)
            atoms.append(atom)
            bonds.append(np.concatenate([bond, bond]))
            edges.append(np.concatenate([np.array(pairs), np.array(pairs)[:, ::-1]]).T)
        made |= {
            f"{split}_atom": np.concatenate(atoms).astype(np.uint8),
            f"{split}_bond": np.concatenate(bonds).astype(np.uint8),
            f"{split}_edge_local": np.concatenate(edges, 1).astype(np.uint8),
            f"{split}_node_ptr": np.cumsum([0, *map(len, atoms)]).astype(np.int32),
            f"{split}_edge_ptr": np.cumsum([0, *map(len, bonds)]).astype(np.int32),
            f"{split}_y": np.array(y, dtype=np.float32),
        }
    return made


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "zinc12k.npz"
    np.savez_compressed(path, **arrays())
    return path


def command(data, output, *options):
    return ["train", "zinc", "--data", str(data), "--output", str(output), *SMALL, *options]


def table(folder):
    """The cells of metrics.csv apart from the times."""
    header, *lines = (folder / "metrics.csv").read_text().splitlines()
    assert header == "epoch,seconds,lr,train_loss,val_mae,test_mae"
    return [[cell for i, cell in enumerate(line.split(",")) if i != 1] for line in lines]


def assert_same_run(folder, other):
    assert table(folder) == table(other)
    a, b = (checkpoint.load(x / "checkpoint.pt") for x in (folder, other))
    for content in (a, b):
        for row in content["progress"]["rows"]:
            del row["seconds"]
        del content["progress"]["seconds"]
    assert_same_bits(a, b)
    assert_same_bits(*(checkpoint.load(x / "best.pt") for x in (folder, other)))


def assert_same_bits(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


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
    best = min(rows, key=lambda row: row[3])
    # the test error of the best epoch, and of none that is worse than one before it
    assert f"test MAE {best[4]:.4f} at epoch {best[0]:.0f}, the best in validation" in out
    for i, row in enumerate(rows):
        assert (row[4] is not None) == (row[3] < min([r[3] for r in rows[:i]], default=1e9))
    assert "ZINC-12k, substitute train: 200 / 40 / 40 molecules" in out
    assert "published: 0.226" in out
    assert "8 epochs are done" in out
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(x.name for x in folder.iterdir()) == [
        "best.pt",
        "checkpoint.pt",
        "curve.png",
        "metrics.csv",
    ]
    assert "training: 100%" in err
    assert "val_mae=" in err


def test_best_weights_give_the_reported_error(straight, data):
    best = checkpoint.load(straight / "best.pt")
    settings = best["settings"]
    model = zinc.EdgeGraphTransformer(
        zinc.EdgeGraphTransformerConfig(
            dim=settings["dim"], heads=settings["heads"], layers=settings["layers"]
        )
    ).eval()
    model.load_state_dict(best["model"])
    test = load_zinc(data)[0]["test"].with_laplacian_pe(8)
    *inputs, y = test.batch(torch.arange(len(test)))
    error = (model(*inputs)[:, 0] - y).abs().mean().item()
    assert error == pytest.approx(best["test_mae"], rel=1e-5)


def test_settings_are_the_published_ones(data, tmp_path, monkeypatch):
    made = {}

    class Spy(loop.Training):
        def run(self, **limits):
            made.update(vars(self), limits=limits)
            raise KeyboardInterrupt

    monkeypatch.setattr(zinc, "Training", Spy)
    folder = str(tmp_path / "run")
    assert cli.main(["train", "zinc", "--data", str(data), "--output", folder]) == 130
    assert sum(p.numel() for p in made["model"].parameters()) == 588_929
    assert type(made["optimizer"]) is torch.optim.Adam
    group = made["optimizer"].param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (7e-4, 0)
    schedule = made["schedule"]
    assert (schedule.mode, schedule.factor, schedule.patience) == ("min", 0.5, 15)
    assert made["batch_size"] == 128
    assert made["settings"]["seed"] == 41
    assert made["limits"] == {"epochs": 1000, "hours": 24.0, "min_lr": 1e-6}


@pytest.mark.parametrize("every", [0.0, 1e9], ids=["every batch", "epochs only"])
def test_killed_again_and_again_is_the_same_run(every, straight, data, tmp_path, monkeypatch):
    """Nothing gets to clean up, as by SIGKILL: what counts is the last checkpoint."""
    monkeypatch.setattr(loop, "SAVE_EVERY", every)
    real, calls, lives = Molecules.batch, [0], 0

    class Killed(BaseException):
        pass

    def batch(self, molecules):
        calls[0] += 1
        if calls[0] == 4 + lives * (2 if every else 1):
            raise Killed
        return real(self, molecules)

    monkeypatch.setattr(Molecules, "batch", batch)
    while True:
        calls[0] = -3 if lives else 0  # encodings of the three splits
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


def test_hours_and_learning_rate_end_a_run(data, tmp_path, monkeypatch, capsys):
    assert cli.main(command(data, tmp_path / "hours", "--hours", "1e-6")) == 0
    assert "1e-06 hours are over: 1 epochs" in capsys.readouterr().out
    monkeypatch.setattr(zinc, "PATIENCE", -1)  # halve it in every epoch
    monkeypatch.setattr(zinc, "MIN_LEARNING_RATE", 2e-4)
    assert cli.main(command(data, tmp_path / "rate")) == 0
    assert "the learning rate fell below 0.0002: " in capsys.readouterr().out
    assert float(table(tmp_path / "rate")[-1][1]) >= 2e-4


def test_every_option_of_the_run_makes_another_run(straight, data, tmp_path, capsys):
    for options, message in (
        (["--seed", "42"], "seed 41, not 42"),
        (["--batch-size", "16"], "batch_size 32, not 16"),
        (["--layers", "3"], "layers 2, not 3"),
        (["--no-pe"], "pe_dim 8, not 0"),
        (["--limit", "100"], "limit None, not 100"),
    ):
        assert cli.main(command(data, straight, *options)) == 1
        err = capsys.readouterr().err
        assert f"{straight} holds a run with {message}: name another --output" in err
        assert err.count("\n") == 1
    other = arrays()
    other["train_y"][3] += 1
    np.savez(tmp_path / "zinc12k.npz", **other)
    assert cli.main(command(tmp_path, straight)) == 1
    assert f"{straight} holds a run with data " in capsys.readouterr().err


def test_seeds_and_options_matter(straight, data, tmp_path):
    for i, options in enumerate((["--seed", "1"], ["--no-pe"], ["--limit", "64"])):
        folder = tmp_path / str(i)
        assert cli.main(command(data, folder, "--epochs", "1", *options)) == 0
        assert table(folder)[0] != table(straight)[0]


def test_reference_trains_alike(straight, data, tmp_path):
    assert cli.main(command(data, tmp_path, "--epochs", "1", "--impl", "reference")) == 0
    for found, expected in zip(table(tmp_path)[0], table(straight)[0], strict=True):
        assert float(found) == pytest.approx(float(expected), rel=1e-3)


def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zinc, "LEARNING_RATE", float("inf"))
    assert cli.main(command(data, tmp_path)) == 1
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
    assert cli.main(command(data, tmp_path)) == 1
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
        "random.torch",
        "progress.rows",
        "progress.order",
        "progress.loss",
        "progress.best",
        "progress.best.model",
        "progress.best.val_mae",
        "progress.rows.0.lr",
        "progress.rows.0.test_mae",
    ],
)
def test_a_checkpoint_that_lacks_a_part_is_said(key, straight, data, tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    whole = checkpoint.load(straight / "checkpoint.pt")
    torch.save(lacking(whole, key), path)
    before = path.read_bytes()
    assert cli.main(command(data, tmp_path, "--epochs", "3")) == 1
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
        ("random", {"python": 1}, "does not fit the run: "),
        ("progress", {"more": 1}, "no whole checkpoint: 'rows' is missing"),
    ],
)
def test_a_checkpoint_of_something_else_is_said(
    part, value, message, straight, data, tmp_path, capsys
):
    content = checkpoint.load(straight / "checkpoint.pt") | {part: value}
    torch.save(content, tmp_path / "checkpoint.pt")
    assert cli.main(command(data, tmp_path, "--epochs", "3")) == 1
    err = capsys.readouterr().err
    assert re.match(f"fastgt: {tmp_path / 'checkpoint.pt'} (is )?{message}", err), err
    assert err.endswith("; delete it, or name another --output\n")
    assert err.count("\n") == 1


def damaged(kind):
    content = arrays()
    if kind == "missing":
        del content["val_bond"]
    elif kind == "atom":
        content["test_atom"][5] = 28
    elif kind == "edge":
        content["train_edge_local"][0, 3] = 13
    elif kind == "pointer":
        content["train_node_ptr"][4] = 0
    elif kind == "short":
        content["val_edge_ptr"] = content["val_edge_ptr"][:-1]
    elif kind == "nan":
        content["train_y"][0] = np.nan
    elif kind == "float":
        content["train_atom"] = content["train_atom"].astype(np.float32)
    elif kind == "rows":
        content["train_edge_local"] = content["train_edge_local"][:1]
    elif kind == "none":
        for name, array in content.items():
            if name.startswith("val"):
                content[name] = array[..., : int(name.endswith("ptr"))]
    return content


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "val_bond"),
        ("atom", "test_atom has values beyond 0 to 27"),
        ("edge", "train_edge_local has values beyond its molecule"),
        ("pointer", "train_node_ptr must rise from 0"),
        ("short", "val_edge_ptr must rise from 0"),
        ("nan", "train_y must be finite numbers"),
        ("float", "train_atom is .* float32"),
        ("rows", r"train_edge_local must be \[2, "),
        ("none", "val_y must be finite numbers, and some"),
    ],
)
def test_damaged_data_is_said(kind, message, tmp_path, capsys):
    np.savez(tmp_path / "zinc12k.npz", **damaged(kind))
    with pytest.raises(ValueError, match=f"zinc12k.npz is damaged: .*{message}"):
        load_zinc(tmp_path)
    assert cli.main(command(tmp_path, tmp_path / "run")) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"fastgt: {tmp_path / 'zinc12k.npz'} is damaged: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["truncated", "flipped", "no archive"])
def test_damaged_archives_are_said(kind, data, tmp_path, capsys):
    content = bytearray(data.read_bytes())
    if kind == "truncated":
        content = content[: len(content) // 2]
    elif kind == "flipped":
        content[300:500] = bytes(200)
    else:
        content = b"no archive at all"
    (tmp_path / "zinc12k.npz").write_bytes(content)
    assert cli.main(command(tmp_path / "zinc12k.npz", tmp_path / "run")) == 1
    assert "zinc12k.npz is damaged: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--data", "nowhere"], 1, "nowhere is absent: --data names zinc12k.npz or its folder"),
        (["--data", "."], 1, "zinc12k.npz is absent"),
        (["--device", "tpu"], 1, "--device must be cpu or cuda, got tpu"),
        (["--heads", "3"], 1, "heads must divide dim, got dim=16 and heads=3"),
        (["--epochs", "0"], 2, "positive integer, got '0'"),
        (["--hours", "-1"], 2, "positive number, got '-1'"),
        (["--hours", "nan"], 2, "positive number, got 'nan'"),
        (["--hours", "soon"], 2, "positive number, got 'soon'"),
        (["--batch-size", "0"], 2, "positive integer, got '0'"),
        (["--dim", "9" * 20], 2, f"--dim: must be at most 65536, got {'9' * 20}"),
        (["--dim", "9" * 5000], 2, "--dim: must be at most 65536, got 999"),
        (["--layers", "1001"], 2, "--layers: must be at most 1000, got 1001"),
        (
            ["--batch-size", str(2**31)],
            2,
            "at most 2147483647, got 2147483648",
        ),
        (["--epochs", "9" * 20], 2, f"--epochs: must be at most 2147483647, got {'9' * 20}"),
        (["--limit", "none"], 2, "positive integer, got 'none'"),
        (["--impl", "cuda"], 2, "invalid choice"),
        (["--seed", str(2**64)], 1, "--seed must fit in 64 bits"),
        (["--output", "file"], 1, "file"),
        (["--output", "file/run"], 1, "file/run"),
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
    assert len(err.splitlines()) == 1 or err.startswith("usage: ")


@pytest.mark.parametrize("options", [["--dim", "512"], ["--layers", "100"]])
def test_a_model_that_fits_in_no_memory_is_refused_before_it_is_made(
    options, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(size, "free_memory", lambda device: 4_000_000)
    assert cli.main(command(data, tmp_path / "run", *options)) == 1
    err = capsys.readouterr().err
    assert re.fullmatch(
        r"fastgt: (2|100) layers of width (512|16) have [\d,]+ parameters, which take 0\.\d GB in "
        r"training, and 0\.0 GB are free: choose a smaller --dim or --layers\n",
        err,
    )
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    drawn = torch.get_rng_state()
    small = zinc.Settings(layers=2, dim=16, heads=2)
    size.check_fits(lambda: zinc._model(small), 2, 16, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_folder_that_takes_no_files_shows_before_training(data, tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "checkpoint.pt.partial")

    monkeypatch.setattr(files.os, "fsync", refuse)
    assert cli.main(command(data, tmp_path / "run")) == 1
    out, err = capsys.readouterr()
    assert err == "fastgt: [Errno 13] Permission denied: 'checkpoint.pt.partial'\n"
    assert out == ""
    assert not list((tmp_path / "run").iterdir())


def test_data_that_is_nowhere_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASTGT_DATA", str(tmp_path))
    assert cli.main(["train", "zinc", "--output", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert "zinc12k.npz is absent: set FASTGT_DATA" in err
    assert err.endswith("or name it by --data\n")


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


def test_batches_are_the_molecules_asked_for(data):
    molecules = load_zinc(data.parent)[0]["train"].with_laplacian_pe(4)
    chosen = torch.tensor([7, 0, 199, 7])
    batch = molecules.batch(chosen)
    assert batch.graph.num_graphs == 4
    at = edge_at = 0
    for i, g in enumerate(chosen.tolist()):
        nodes = slice(*molecules.node_ptr[g : g + 2].tolist())
        edges = slice(*molecules.edge_ptr[g : g + 2].tolist())
        n, e = nodes.stop - nodes.start, edges.stop - edges.start
        assert torch.equal(batch.node_type[at : at + n], molecules.atom[nodes])
        assert torch.equal(batch.pe[at : at + n], molecules.pe[nodes])
        assert torch.equal(batch.edge_type[edge_at : edge_at + e], molecules.bond[edges])
        local = batch.graph.edge_index[:, edge_at : edge_at + e] - at
        assert torch.equal(local.long(), molecules.edge_index[:, edges])
        assert batch.graph.graph_ptr[i + 1] == at + n
        at, edge_at = at + n, edge_at + e
    assert torch.equal(batch.y, molecules.y[chosen])
    assert (at, edge_at) == (batch.graph.num_rows, batch.graph.num_edges)
    # encodings of one molecule do not depend on the others
    torch.testing.assert_close(
        molecules.first(3).with_laplacian_pe(4).pe, molecules.first(3).pe, rtol=0, atol=0
    )
    assert len(molecules.first(1000)) == TRAIN


def test_zinc_is_whole():
    try:
        splits, _ = load_zinc(None)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert [len(x) for x in splits.values()] == [10_000, 1_000, 1_000]
    assert int(splits["train"].atom.max()) < 28
    guess = splits["train"].y.median()
    assert (splits["test"].y - guess).abs().mean().item() == pytest.approx(1.556, abs=1e-3)

"""The command line: exit codes, and the demo on a small version of itself."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import fastgt
from fastgt import cli, demo, files
from fastgt.models.package_classifier import PackageClassifier, PackageClassifierConfig


@pytest.fixture
def small(monkeypatch):
    """The demo's data cut down to 2,000 packages."""
    data = demo.load(torch.device("cpu"))
    keep = 2000
    source, target = data.graph.edge_index
    inside = (source < keep) & (target < keep)
    data.graph = demo.Graph.from_edge_index(torch.stack([source, target])[:, inside], keep)
    data.edge_kind = data.edge_kind[inside]
    data.word_ptr = data.word_ptr[: keep + 1]
    data.word = data.word[: int(data.word_ptr[-1])]
    data.section, data.split = data.section[:keep], data.split[:keep]
    monkeypatch.setattr(demo, "load", lambda device: data)
    return data


def test_demo_runs_and_reports(small, tmp_path, capsys):
    output = tmp_path / "demo.png"
    assert cli.main(["demo", "--epochs", "3", "--device", "cpu", "--output", str(output)]) == 0
    text, err = capsys.readouterr()
    assert err == ""  # a bar is for a terminal
    rows = re.findall(r"^(fastgt|gather-softmax-scatter) +(0\.\d+) +(\S+) +(\S+) MB$", text, re.M)
    assert [name for name, *_ in rows] == ["fastgt", "gather-softmax-scatter"]
    # one set of weights, two ways to compute the same attention
    assert float(rows[0][1]) == pytest.approx(float(rows[1][1]), abs=0.01)
    assert output.read_bytes().startswith(b"\x89PNG")


def test_a_second_demo_with_the_same_output_is_refused(small, tmp_path, monkeypatch, capsys):
    output = tmp_path / "demo.png"
    output.write_bytes(b"of the first")
    options = ["demo", "--epochs", "1", "--device", "cpu", "--output", str(output)]
    with files.lock(output):
        assert cli.main(options) == 1
    assert f"fastgt: {output} is in use by process {os.getpid()} on " in capsys.readouterr().err
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("torn")))
    monkeypatch.setattr(demo, "compare", lambda *_: [demo.Result("a", 0.5, 1.0, 1)] * 2)
    assert cli.main(options) == 1
    assert output.read_bytes() == b"of the first"
    assert os.listdir(tmp_path) == ["demo.png"]


def test_the_rows_of_the_demo_as_json(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "compare", lambda *_: [demo.Result("fastgt", 0.5, 1.0, 1)] * 2)
    output = tmp_path / "demo.png"
    where = ["--device", "cpu", "--output", str(output)]
    assert cli.main(["demo", "--epochs", "1", "--json", *where]) == 0
    out, err = capsys.readouterr()
    row, _ = json.loads(out)
    assert (row["name"], row["accuracy"], row["seconds_per_epoch"]) == ("fastgt", 0.5, 1.0)
    assert {"device", "commit", "torch"} <= row.keys()
    assert f"Learning curve and bars: {output}" in err


def test_demo_is_the_same_for_the_same_seed(small):
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        config = PackageClassifierConfig(small.vocabulary, small.edge_kinds, small.sections)
        losses.append(demo.train(PackageClassifier(config), small, 2))
    assert losses[0] == losses[1]


def test_what_pytorch_says_is_told_without_its_c_frames(monkeypatch, capsys):
    def memory(**_):
        raise MemoryError

    def wrong(**_):
        raise RuntimeError(
            "Overflow when unpacking long long\nException raised from THPUtils_unpackLong at "
            "python_numbers.h:79 (most recent call first):\nframe #0: c10::Error::Error"
        )

    for run, message in ((wrong, "Overflow when unpacking"), (memory, "MemoryError")):
        monkeypatch.setattr(demo, "run", run)
        assert cli.main(["demo", "--device", "cpu"]) == 1
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("seed", ["9" * 26, str(2**64), str(-(2**63) - 1)])
def test_a_seed_of_too_many_digits_is_said(seed, capsys):
    assert cli.main(["demo", "--device", "cpu", "--seed", seed]) == 2
    assert capsys.readouterr().err == f"fastgt: --seed must fit in 64 bits, got {seed}\n"


def test_demo_data_is_whole():
    data = demo.load(torch.device("cpu"))
    assert (data.graph.num_rows, data.graph.num_edges) == (63_436, 2 * 345_795)
    assert data.split.bincount().tolist() == [31_725, 15_878, 15_833]
    assert int(data.edge_kind.max()) < data.edge_kinds
    assert int(data.word.max()) < data.vocabulary
    assert data.word_ptr[-1] == len(data.word)


@pytest.mark.parametrize(
    "damage", ["truncated", "missing array", "not an archive", "flipped", "label"]
)
def test_damaged_data_is_said(damage, monkeypatch, tmp_path, capsys):
    (tmp_path / "debian.npz").write_bytes(b"no archive at all")
    original = demo.files("fastgt.data") / "debian.npz"
    if damage == "truncated":
        (tmp_path / "debian.npz").write_bytes(original.read_bytes()[:100_000])
    elif damage == "flipped":
        content = bytearray(original.read_bytes())
        content[2000:2400] = bytes(400)
        (tmp_path / "debian.npz").write_bytes(bytes(content))
    elif damage == "label":
        with np.load(original) as data:
            np.savez(tmp_path / "debian.npz", **dict(data) | {"y": data["y"] + 1})
    elif damage == "missing array":
        np.savez(tmp_path / "debian.npz", y=np.zeros(3))
    monkeypatch.setattr(demo, "files", lambda package: tmp_path)
    assert cli.main(["demo", "--output", str(tmp_path / "demo.png")]) == 2
    assert "debian.npz is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["demo", "--epochs", "0"], 2, "positive integer, got '0'"),
        (["demo", "--impl", "cuda"], 2, "invalid choice"),
        (["demo", "--epochs", "²"], 2, "positive integer, got '²'"),
        (["demo", "--device", "nowhere"], 2, "--device must be cpu or cuda, got nowhere"),
        (["demo", "--device", "meta"], 2, "--device must be cpu or cuda, got meta"),
        (["demo", "--output", "x.foo"], 2, "must end in .png, .pdf or .svg, got x.foo"),
        (["demo", "--output", "."], 2, "must end in .png"),
        (["demo", "--output", "/no/such/folder/x.png"], 2, "no such folder"),
        (["nothing"], 2, "invalid choice: 'nothing'"),
        (["report"], 2, "the following arguments are required: kind"),
    ],
)
def test_usage_errors(arguments, status, message, capsys):
    try:
        found = cli.main(arguments)
    except SystemExit as error:
        found = error.code
    assert found == status
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("fastgt")
    assert err.count("\n") == 1


def test_the_bare_command_says_what_to_try(capsys):
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"fastgt {fastgt.__version__}: ")
    assert [line.split()[1] for line in said.splitlines() if line.startswith("    fastgt ")] == [
        *("doctor", "demo", "train"),
    ]


def test_help_has_the_exit_statuses(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--help"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert re.findall(r"^  (\d+) +\w", said, re.MULTILINE) == ["0", "1", "2", "130", "141"]


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"fastgt {fastgt.__version__}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_impl_that_cannot_run_is_said_before_the_data_is_read(monkeypatch, capsys):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert cli.main(["demo", "--impl", "triton", "--device", "cpu"]) == 1
    found = capsys.readouterr()
    assert found.out == ""
    assert "impl='triton' needs tensors on a GPU, got cpu" in found.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_absent_cuda_is_said(capsys):
    assert cli.main(["demo", "--device", "cuda"]) == 1
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_interrupt_leaves_a_clean_terminal(tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-m", "fastgt.cli", "demo", "--output", str(tmp_path / "demo.png")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "0"},
    )
    assert run.stdout.readline().startswith("Graph(")  # the data is read, training begins
    time.sleep(2)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=120)
    # where the signal comes in code that a string was made into, as a dataclass is, Python dies of
    # it in the end though it was caught: shells say 130 of both
    assert run.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "fastgt: interrupted"
    assert "\r" not in err
    assert not (tmp_path / "demo.png").exists()

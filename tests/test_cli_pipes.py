"""The command line where nobody reads what it prints, as in ``fastgt bench | head -1``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pipes of a shell")
MAIN = [sys.executable, "-m", "fastgt"]
# what runs for minutes is replaced by what it prints in the end
LONG = """
import sys
from fastgt import cli, demo
from fastgt.training import train
demo.run = train.run = lambda *_, **__: print("a line\\n" * 3)
sys.exit(cli.main(sys.argv[1:]))
"""
TINY = """
import sys
from fastgt import cli
from fastgt.bench import report
from fastgt.distributed import command
from fastgt.testing import PROBLEMS, Problem, random_graph
command._graph = lambda *_: random_graph(0, 40, 200)
PROBLEMS["cora"] = Problem("cora", lambda: random_graph(0, 40, 200))
report.run = lambda args: print("a line") or 0
sys.exit(cli.main(sys.argv[1:]))
"""
BENCH = ["attention", "--problems", "cora", "--peers", "gather-scatter", "--repeats", "1"]
COMMANDS = {
    "version": [*MAIN, "--version"],
    "help": [*MAIN, "bench", "--help"],
    "demo": [sys.executable, "-c", LONG, "demo", "--device", "cpu"],
    "train": [sys.executable, "-c", LONG, "train", "graph_gps", "zinc12k", "--device", "cpu"],
    "train list": [*MAIN, "train", "--list"],
    "bench": [sys.executable, "-c", TINY, "bench", *BENCH],
    "doctor": [*MAIN, "doctor"],
    "doctor json": [*MAIN, "doctor", "--json"],
    "partition": [sys.executable, "-c", TINY, "partition", "x", "--parts", "2", "--method", "hash"],
    "report kernels": [sys.executable, "-c", TINY, "report", "kernels"],
    "report traffic": [sys.executable, "-c", TINY, "report", "traffic", "--problem", "cora"],
}


def run(command: list[str], *, errors_too: bool = False) -> subprocess.CompletedProcess:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            command,
            stdout=writer,
            stderr=writer if errors_too else subprocess.PIPE,
            text=True,
            timeout=120,
            # buffered, as for users
            env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_closed_pipe_ends_a_command_quietly(name: str, compiled_kernels) -> None:
    found = run(COMMANDS[name])
    assert found.returncode == 141, found.stderr
    assert found.stderr == ""


@pytest.mark.parametrize("name", ["train list", "bench", "doctor", "partition"])
def test_who_reads_one_line_gets_it(name: str, compiled_kernels) -> None:
    """As ``| head -1``: some of the output was written before nobody reads it any more."""
    with subprocess.Popen(
        COMMANDS[name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as command:
        line = command.stdout.readline()
        command.stdout.close()
        errors = command.stderr.read()
    assert line.strip()
    assert errors == ""
    assert command.returncode in (0, 141)  # 0: all of it was written at once


def test_a_closed_pipe_for_json(compiled_kernels) -> None:
    """Then the table is on stderr, and nothing comes after it."""
    found = run([*COMMANDS["bench"], "--json", "-"])
    assert found.returncode == 141
    assert "attention, cora: 40 nodes" in found.stderr
    assert "gather-scatter" in found.stderr.splitlines()[-1]


def test_a_closed_pipe_for_errors_too() -> None:
    command = [*MAIN, "demo", "--device", "cpu", "--seed", str(2**64)]
    assert run(command, errors_too=True).returncode == 141


def test_the_rows_that_were_measured_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert run([*COMMANDS["bench"], "--json", str(path)]).returncode == 141
    assert os.listdir(tmp_path) == ["rows.json"]  # and no lock
    assert [row["provider"] for row in json.loads(path.read_text())] == ["fastgt", "gather-scatter"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("name", ["nothing", "train list"])
def test_a_full_disk_is_one_line(name: str, unbuffered: str, compiled_kernels) -> None:
    with open("/dev/full", "wb") as full:
        found = subprocess.run(
            {"nothing": MAIN, **COMMANDS}[name],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert found.stderr == "fastgt: [Errno 28] No space left on device\n"
    assert found.returncode == 1


@pytest.mark.parametrize(
    ("closed", "arguments", "status", "told"),
    [
        (">&-", ["doctor", "--json"], 0, ""),
        (">&-", ["train", "gps"], 2, "fastgt: name a model of "),
        ("2>&-", ["train", "gps"], 2, ""),
    ],
)
def test_a_stream_may_be_closed(
    closed: str, arguments: list[str], status: int, told: str, compiled_kernels
) -> None:
    """What would go to stderr is not on stdout instead, where JSON is to be alone."""
    command = ["sh", "-c", f'"$@" {closed}', "sh", *MAIN, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == status
    assert found.stdout == ""
    assert found.stderr.startswith(told)
    assert found.stderr.count("\n") == bool(told)

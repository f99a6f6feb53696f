"""``--json`` of every command: JSON alone on stdout, and what is said beside it on stderr."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastgt import cli, demo
from fastgt.kernels import resources  # before a test takes TRITON_INTERPRET away
from fastgt.testing import PROBLEMS, Problem, random_graph
from fastgt.training import train

TEXT = "what is told beside it"
BUDGET = json.loads((Path(__file__).parent / "kernel_budget.json").read_text())["sm_90"]
COMMANDS = {
    "fastgt demo": ["--device", "cpu", "--json"],
    "fastgt train": ["graph_gps", "zinc12k", "--device", "cpu", "--json"],
    "fastgt bench": [
        *("attention", "--problems", "cora", "--peers", "gather-scatter"),
        *("--repeats", "1", "--json", "-"),
    ],
    "fastgt partition": ["edges.npy", "--parts", "3", "--method", "hash", "--json"],
    "fastgt doctor": ["--json"],
    "fastgt report kernels": ["--target", "sm_90", "--json", "-"],
    "fastgt report traffic": ["--problem", "cora", "--json", "-"],
}


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Those that have no commands below them."""
    below = [x for x in parser._actions if isinstance(x, argparse._SubParsersAction)]
    if not below:
        yield parser
    for action in below:
        for each in action.choices.values():
            yield from commands(each)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """What takes minutes is replaced by what it tells and gives."""
    made = Problem("cora", lambda: random_graph(0, 40, 200))
    monkeypatch.setitem(PROBLEMS, "cora", made)

    def told(*_, **__):
        print(TEXT)
        return [{"accuracy": 0.5}]

    monkeypatch.setattr(demo, "run", told)
    monkeypatch.setattr(train, "run", told)
    ahead = SimpleNamespace(compile_ahead=lambda target, only, tell: BUDGET)
    monkeypatch.setitem(sys.modules, "fastgt.kernels.ahead", ahead)
    monkeypatch.setitem(sys.modules, "fastgt.kernels.cases", SimpleNamespace(CASES={}))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert resources.PROCESSORS
    monkeypatch.chdir(tmp_path)
    np.save("edges.npy", np.random.default_rng(0).integers(0, 50, (2, 300)))


def test_every_command_takes_json():
    """A command that does not needs a reason, and a place for it here: there is none."""
    found = {x.prog: x for x in commands(cli._parser())}
    assert found.keys() == COMMANDS.keys()
    assert not [name for name, x in found.items() if "--json" not in x._option_string_actions]


@pytest.mark.parametrize("name", COMMANDS)
def test_stdout_is_json_alone(name, small, compiled_kernels, capsys):
    assert cli.main([*name.split()[1:], *COMMANDS[name]]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)
    assert "\r" not in err
    if name in ("fastgt demo", "fastgt train"):
        assert err == f"{TEXT}\n"


def test_the_rows_of_a_benchmark(small, capsys):
    assert cli.main(["bench", *COMMANDS["fastgt bench"]]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [row["provider"] for row in rows] == ["fastgt", "gather-scatter"]
    assert all(row["both_s"] > 0 for row in rows)
    assert "attention, cora: 40 nodes" in err  # the table
    assert not list(Path().glob("-*"))


def test_the_figures_of_a_partition(small, capsys):
    assert cli.main(["partition", *COMMANDS["fastgt partition"], "--output", "parts"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert len(found["ranks"]) == 3
    assert sum(rank["rows"] for rank in found["ranks"]) == 50
    assert sum(rank["edges"] for rank in found["ranks"]) == 300
    assert all(rank["bytes_sent"] == 512 * rank["sent"] for rank in found["ranks"])
    assert (found["network"], found["width"], found["dtype"]) == ("infiniband-ndr", 128, "float32")
    assert err.endswith("wrote 3 parts to parts\n")


def test_the_figures_of_kernels(small, capsys):
    assert cli.main(["report", "kernels", *COMMANDS["fastgt report kernels"]]) == 0
    assert json.loads(capsys.readouterr().out) == {"sm_90": BUDGET}


def test_an_error_leaves_stdout_empty(small, monkeypatch, capsys):
    def failed(*_, **__):
        print(TEXT)
        raise RuntimeError("no room\n  for that")

    monkeypatch.setattr(demo, "run", failed)
    assert cli.main(["demo", *COMMANDS["fastgt demo"]]) == 1
    assert capsys.readouterr() == ("", f"{TEXT}\nfastgt: no room for that\n")

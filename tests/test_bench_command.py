"""``fastgt bench``: what is chosen, written, compared, drawn and refused."""

import csv
import json

import pytest

from fastgt import cli, files
from fastgt.bench import attention, command, harness, peers
from fastgt.testing import Problem, random_graph


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Small graphs under the names of the problems."""
    for name in list(attention.PROBLEMS):
        made = Problem(name, lambda: random_graph(0, 40, 200))
        monkeypatch.setitem(attention.PROBLEMS, name, made)


def bench(*options):
    return cli.main(["bench", *map(str, options), "--repeats", "2"])


def test_rows_are_written_as_they_are_measured(tmp_path, capsys):
    files = ["--json", tmp_path / "new" / "rows.json", "--csv", tmp_path / "rows.csv"]
    where = ["--problems", "cora", "zinc", "--peers", "gather-scatter", "sdpa, dense mask"]
    assert bench("attention", *where, *files) == 0
    rows = json.loads((tmp_path / "new" / "rows.json").read_text())
    assert [(row["problem"], row["provider"]) for row in rows] == [
        (problem, provider)
        for problem in ("cora", "zinc")
        for provider in ("fastgt", "gather-scatter", "sdpa, dense mask")
    ]
    for row in rows:
        assert row["operator"] == "attention"
        assert row["match"]
        assert {"forward_s", "both_s", "forward_spread", "both_x", "commit", "device"} <= row.keys()
    with (tmp_path / "rows.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert [float(c["both_s"]) for c in cells] == [row["both_s"] for row in rows]
    out = capsys.readouterr().out
    assert "attention, cora: 40 nodes, 200 edges, H=8, D=16, float32" in out
    assert not list(tmp_path.rglob("*.partial"))


def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    real = attention.run

    def run(problem, **how):
        if problem == "zinc":
            raise KeyboardInterrupt
        return real(problem, **how)

    monkeypatch.setattr(attention, "run", run)
    path = tmp_path / "rows.json"
    assert bench("attention", "--problems", "cora", "zinc", "cora", "--json", path) == 130
    assert {row["problem"] for row in json.loads(path.read_text())} == {"cora"}


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.json"
    path.write_text("old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert bench("attention", "--problems", "cora", "--json", path) == 1
    assert "No space left" in capsys.readouterr().err
    assert path.read_text() == "old"


def test_all_operators_run_on_their_own_problems(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        command.linear_attention, "run", _small(command.linear_attention.run, graphs=3, largest=12)
    )
    monkeypatch.setattr(
        command.masked_heads,
        "run",
        _small(command.masked_heads.run, nodes=30, edges=90, heads=2, width=4, active=(1,)),
    )
    path = tmp_path / "rows.json"
    assert cli.main(["bench", "--quick", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert {row["operator"] for row in rows} == set(command.OPERATORS)
    problems = {row["problem"] for row in rows if row["operator"] == "attention"}
    assert len(problems) >= 8
    assert len(problems & {"zinc", "cora", "citeseer", "actor", "squirrel"}) >= 5
    out = capsys.readouterr().out
    assert "linear_attention, ragged" in out
    assert "1 of 2" in out


def _small(run, **sizes):
    return lambda **how: run(**how, **sizes)


def test_runs_are_compared_and_wide_spreads_told(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.json"
    where = ["attention", "--problems", "cora", "--peers", "gather-scatter"]
    assert bench(*where, "--json", path) == 0
    rows = json.loads(path.read_text())
    for row in rows:
        row["forward_s"] /= 1e6
    path.write_text(json.dumps(rows))
    capsys.readouterr()
    monkeypatch.setattr(harness, "spread", lambda times: 0.25)
    assert bench(*where, "--compare", path) == 0
    out = capsys.readouterr().out
    assert f"fastgt takes, of its time at {rows[0]['commit']}: forward " in out
    factor = float(out.split("forward ")[-1].split("x")[0])
    assert factor > 1000
    assert "gather-scatter, both: times spread by 25% of their median" in out


def test_speed_ups_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    where = ["attention", "--problems", "cora", "zinc", "--peers", "gather-scatter"]
    assert bench(*where, "--plot", tmp_path / "plots") == 0
    assert (tmp_path / "plots" / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plots" / "attention.svg").read_text().lstrip().startswith("<?xml")


def test_wrong_peers_are_shown_and_not_timed(capsys, monkeypatch):
    def wrong(q, k, v, edge_index):
        return peers.gather_scatter(q, k, v, edge_index) + 0.01

    monkeypatch.setitem(peers.ATTENTION, "gather-scatter", wrong)
    assert bench("attention", "--problems", "cora", "--peers", "gather-scatter") == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("gather-scatter"))
    assert "False" in line
    assert " ms" not in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["atention"], "no operator is called 'atention': did you mean 'attention'?"),
        (["--problems", "corra"], "no problem is called 'corra': did you mean 'cora'?"),
        (["--peers", "pig"], "no peer is called 'pig': did you mean 'pyg'?"),
        (["--problems", "?"], "no problem is called '?'; there are power_law,"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench(*options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_run_is_told(tmp_path, capsys, monkeypatch):
    assert bench("masked_heads", "--problems", "cora") == 1
    assert "masked_heads has no problem 'cora': it has power_law" in capsys.readouterr().err
    assert bench("linear_attention", "--peers", "pyg") == 1
    assert "--peers are those of attention" in capsys.readouterr().err
    assert cli.main(["bench", "--repeats", "0"]) == 1
    assert "--repeats must be positive, got 0" in capsys.readouterr().err
    assert bench("attention", "--compare", tmp_path / "absent.json") == 1
    assert "--compare" in capsys.readouterr().err
    (tmp_path / "other.json").write_text('[{"a": 1}]')
    assert bench("attention", "--compare", tmp_path / "other.json") == 1
    assert "it holds no rows of this command" in capsys.readouterr().err

    def absent():
        raise FileNotFoundError("cora.npz is absent")

    monkeypatch.setitem(attention.PROBLEMS, "cora", Problem("cora", absent))
    assert bench("attention", "--problems", "cora") == 1
    captured = capsys.readouterr()
    assert "attention, cora: skipped: cora.npz is absent" in captured.out
    assert "nothing was measured" in captured.err

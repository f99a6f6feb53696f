"""``fastgt bench``: what is chosen, written, resumed, compared and refused."""

import csv
import json
import os
import sys

import pytest

from fastgt import cli, files
from fastgt.bench import attention, command, harness, peers, table, timing
from fastgt.testing import PROBLEMS, SCALING, Problem, random_graph


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Small graphs under the names of the problems."""
    for name in list(PROBLEMS):
        made = Problem(name, lambda: random_graph(0, 40, 200))
        monkeypatch.setitem(PROBLEMS, name, made)


def bench(*options):
    return cli.main(["bench", *map(str, options), "--repeats", "2"])


ONE = ["attention", "--problems", "cora", "--peers", "gather-scatter"]


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


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(tmp_path, monkeypatch, capsys):
    real = harness.compare
    measured = []

    def compare(case, **how):
        measured.append(case.shape["problem"])
        if measured == ["cora", "zinc"]:
            raise KeyboardInterrupt
        return real(case, **how)

    monkeypatch.setattr(harness, "compare", compare)
    path = tmp_path / "rows.json"
    where = ["attention", "--problems", "cora", "zinc", "--peers", "gather-scatter"]
    assert bench(*where, "--json", path) == 130
    assert {row["problem"] for row in json.loads(path.read_text())} == {"cora"}
    assert bench(*where, "--json", path, "--resume") == 0
    assert measured == ["cora", "zinc", "zinc"]
    assert [row["problem"] for row in json.loads(path.read_text())] == ["cora"] * 2 + ["zinc"] * 2
    # rows of another width, or of another commit, are other rows
    assert bench(*where, "--json", path, "--resume", "--width", "8") == 0
    assert measured[3:] == ["cora", "zinc"]
    assert bench(*where, "--json", path, "--resume", "--width", "16") == 0
    assert bench(*where, "--json", path, "--resume") == 0
    assert measured[5:] == []
    capsys.readouterr()
    assert bench(*where, "--json", path, "--resume") == 0
    assert f"{path} has 8 rows; 0 problems are left" in capsys.readouterr().out
    monkeypatch.setattr(harness, "_cpu_name", lambda: "another")
    assert bench(*where, "--json", path, "--resume") == 2
    assert "and this is another" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(harness, "compare", compare)
    monkeypatch.setattr(harness, "commit", lambda: "later")
    assert bench(*where, "--json", path, "--resume") == 0
    assert measured[5:] == ["cora", "zinc"]


@pytest.mark.parametrize("option", ["--json", "--csv", "--plot"])
def test_a_file_that_another_run_writes_is_refused_before_anything_is_measured(
    option, tmp_path, monkeypatch, capsys
):
    """Each writes all of its rows every time: those of the other would be lost."""
    monkeypatch.setattr(harness, "compare", lambda case, **how: pytest.fail("measured"))
    path = tmp_path / "rows"
    if option == "--plot":
        path.mkdir()
    with files.lock(path):
        assert bench(*ONE, option, path) == 1
    assert f"fastgt: {path} is in use by process {os.getpid()} on " in capsys.readouterr().err


def test_peers_that_are_not_there_yet_are_measured(tmp_path):
    path = tmp_path / "rows.json"
    where = ["attention", "--problems", "cora", "--json", path, "--resume", "--peers"]
    assert bench(*where, "gather-scatter") == 0
    assert bench(*where, "gather-scatter", "sdpa, dense mask") == 0
    rows = json.loads(path.read_text())
    names = [row["provider"] for row in rows]
    assert names == ["fastgt", "gather-scatter", "sdpa, dense mask"]  # the newer ones, once
    before = rows[0]["both_s"]
    assert cli.main(["bench", *map(str, where), "gather-scatter", "--repeats", "3"]) == 0
    found = {row["provider"]: row for row in json.loads(path.read_text())}
    assert found["fastgt"]["both_s"] != before
    assert found["fastgt"]["repeats"] == 3


def test_a_wrong_fastgt_is_a_failure(capsys, monkeypatch):
    def wrong(q, k, v, graph):
        return peers.composed(graph)(q, k, v) * 1.5

    monkeypatch.setattr(attention, "neighborhood_attention", wrong)
    assert bench(*ONE) == 1
    assert "attention, cora: fastgt: output is off by" in capsys.readouterr().out


def test_what_an_operator_refuses_leaves_the_others(capsys):
    pytest.importorskip("torch_geometric")
    where = ["--problems", "cora", "--width", "300", "--peers", "pyg"]
    assert bench("transformer_conv", "segment_pool", *where) == 0
    out = " ".join(capsys.readouterr().out.split())
    refused = "refused: fastgt.pyg.TransformerConv is not fused: heads have more than 256 channels"
    assert f"transformer_conv, cora: {refused}" in out
    assert "segment_pool, cora: 40 nodes" in out


def test_layers_of_an_absent_package_leave_the_others(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastgt.pyg", None)
    where = ["--problems", "cora", "--peers", "pyg"]
    assert bench("transformer_conv", "segment_pool", *where) == 0
    out = capsys.readouterr().out
    assert "transformer_conv, cora: skipped: import of fastgt.pyg halted" in out
    assert "segment_pool, cora: 40 nodes" in out


def test_a_full_disk_leaves_what_was_written(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.json"
    real = files.write
    written = []

    def write(where, content):
        if written:
            raise OSError(28, "No space left on device")
        written.append(where)
        real(where, content)

    monkeypatch.setattr(files, "write", write)
    where = ["attention", "--problems", "cora", "zinc", "--peers", "gather-scatter"]
    assert bench(*where, "--json", path) == 1
    assert {row["problem"] for row in json.loads(path.read_text())} == {"cora"}
    assert "No space left on device" in capsys.readouterr().err


def test_operators_and_problems_are_those_asked_for(monkeypatch, tmp_path):
    asked = []

    def case(name):
        real = command.OPERATORS[name]

        def make(problem, **options):
            asked.append((name, problem, options.get("heads"), options.get("width")))
            raise FileNotFoundError("not here")

        make.__signature__ = __import__("inspect").signature(real.case)
        return command.OPERATORS[name].__class__(**{**vars(real), "case": make, "epochs": None})

    for name in list(command.OPERATORS):
        monkeypatch.setitem(command.OPERATORS, name, case(name))

    def chosen(*options):
        asked.clear()
        assert bench(*options) == 1  # nothing was measured
        return list(asked)

    short = {name for name, operator in command.OPERATORS.items() if operator.quick}
    assert {name for name, *_ in chosen("--quick")} == short
    assert {"attention", "masked_heads", "graph_transformer"} <= short
    quick = {problem for name, problem, *_ in asked if name == "attention"}
    assert len(quick) >= 8
    assert len(quick & {"zinc", "cora", "citeseer", "actor", "squirrel"}) == 5
    assert {name for name, *_ in chosen("--peers", "torch.sparse")} == {
        "attention",
        "aggregate",
        "gcn",
    }
    assert chosen("gine", "--problems", "zinc", "--heads", "2", "--width", "5") == [
        ("gine", "zinc", 2, 5)
    ]
    assert chosen("attention", "--problems", "cora", "--shapes", "gt_zinc", "gps_wide") == [
        ("attention", "cora", 8, 8),
        ("attention", "cora", 4, 13),
    ]
    grown = chosen("attention", "--scaling", "nodes", "--most", "600000")
    assert [problem for _, problem, *_ in grown] == ["rmat_11", "rmat_13", "rmat"]
    grown = chosen("attention", "--scaling", "edges", "--most", "10000000")
    assert [problem for _, problem, *_ in grown] == list(SCALING["edges"])


def test_models_are_measured_by_epochs(tmp_path, capsys):
    path = tmp_path / "rows.json"
    where = ["graph_transformer", "--problems", "cora", "--peers", "pyg", "--quick", "--json", path]
    assert bench(*where) == 0
    ours, theirs = json.loads(path.read_text())
    assert ours["operator"] == "graph_transformer"
    assert ours["epoch_s"] > ours["inference_s"] > 0
    assert theirs["match"] is not False
    assert "training epoch s" in capsys.readouterr().out


def test_progress_names_who_is_measured(capsys, monkeypatch):
    told = []
    monkeypatch.setattr("tqdm.tqdm.set_description", lambda bar, text: told.append(text))
    assert bench(*ONE) == 0
    assert told[0] == "1/1 attention, cora: loading"
    assert [text.rpartition(": ")[2] for text in told[1:]] == ["fastgt", "gather-scatter", "timing"]


def test_later_runs_are_compared_and_spreads_told(tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.json"
    assert bench(*ONE, "--json", path) == 0
    rows = json.loads(path.read_text())
    for row in rows:
        row["forward_s"] /= 1e6
    path.write_text(json.dumps(rows))
    capsys.readouterr()
    monkeypatch.setattr(timing, "spread", lambda times: 0.25)
    assert bench(*ONE, "--compare", path) == 0
    out = capsys.readouterr().out
    assert f"fastgt takes, of its time at {rows[0]['commit']}: forward " in out
    factor = float(out.split("forward ")[-1].split("x")[0])
    assert factor > 1000
    assert "gather-scatter: times spread, of their median, by forward 25%" in out


def test_wrong_peers_are_shown_and_not_timed(capsys, monkeypatch):
    def wrong(graph):
        attend = peers.composed(graph)
        return lambda q, k, v: attend(q, k, v) + 0.01

    monkeypatch.setitem(peers.ATTENTION, "gather-scatter", wrong)
    assert bench(*ONE) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(x for x in lines if x.startswith("gather-scatter"))
    assert "MISMATCH: output is off by" in line


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError("no room"), "attention, cora: does not fit: MemoryError: no room"),
        (FileNotFoundError("cora.npz is absent"), "cora: skipped: cora.npz is absent"),
    ],
)
def test_problems_that_are_not_there_or_do_not_fit_are_told(error, what, capsys, monkeypatch):
    def absent():
        raise error

    monkeypatch.setitem(attention.PROBLEMS, "cora", Problem("cora", absent))
    assert bench("attention", "--problems", "cora", "zinc", "--peers", "gather-scatter") == 0
    out = capsys.readouterr().out
    assert what in out
    assert "attention, zinc: 40 nodes" in out
    assert bench("attention", "--problems", "cora") == 1
    assert "nothing was measured" in capsys.readouterr().err


def test_errors_of_our_own_are_not_hidden(capsys, monkeypatch):
    def broken(*args, **how):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(harness, "compare", broken)
    assert bench(*ONE) == 1
    assert "fastgt: a mistake" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["atention"], "no operator is called 'atention': did you mean 'attention'?"),
        (["--problems", "corra"], "no problem is called 'corra': did you mean 'cora'?"),
        (["--peers", "pig"], "no peer is called 'pig': did you mean 'pyg'?"),
        (["--shapes", "gt_zink"], "no shape is called 'gt_zink': did you mean 'gt_zinc'?"),
        (["--problems", "?"], "no problem is called '?'; there are power_law,"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench(*options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["attention", "--problems", "ragged"], "attention has no problem 'ragged': it has 'power"),
        (
            ["segment_pool", "--peers", "torch.sparse"],
            "segment_pool has no such peer: it has 'pyg'",
        ),
        (["--heads", "0"], "--heads must be positive, got 0"),
        (["--most", "-1"], "--most must be positive, got -1"),
        (["--width", "9" * 20], f"--width must be at most 2147483647, got {'9' * 20}"),
        (["--shapes", "gt_zinc", "--heads", "4"], "leave --heads and --width out"),
        (["--scaling", "nodes", "--problems", "cora"], "leave --problems out"),
        (["--resume"], "name it with --json"),
        (["--peer-path", "nowhere"], "--peer-path nowhere: no such folder"),
        (["--device", "tpu"], "--device must be cpu or cuda, got tpu"),
        (["--compare", "absent.json"], "--compare absent.json: "),
        (["--tune", "--device", "cpu"], "tuning needs a GPU"),
        (["--tune", "--json", "-"], "--tune writes tables to files"),
        (["--resume", "--json", "-"], "name it with --json"),
        (["attention", "--peers", "anemoi"], "name their folder with --peer-path"),
        (["segment_softmax", "--width", "5"], "segment_softmax has heads and widths of its own"),
        (["gps", "--shapes", "gt_zinc"], "gps has heads and widths of its own"),
        (["--json", "/"], "--json /: it is a folder"),
        (["--csv", __file__ + "/x.csv"], "x.csv: File exists"),
        (["--plot", __file__], "File exists"),
    ],
)
def test_what_cannot_be_run_is_told(options, message, capsys):
    assert bench(*options) == (1 if "needs a GPU" in message else 2)
    assert message in capsys.readouterr().err


def test_files_that_are_none_of_this_command_are_refused(tmp_path, capsys):
    (tmp_path / "other.json").write_text('[{"a": 1}]')
    for option in ("--compare", "--resume"):
        where = ["--json", tmp_path / "other.json"] if option == "--resume" else []
        value = [tmp_path / "other.json"] if option == "--compare" else []
        assert bench(*ONE, *where, option, *value) == 2
        assert "it holds no rows of this command" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"forward_s": None}, {"forward_s": 0.0}, {"heads": [1]}, {"commit": None}, {"date": 3}],
)
def test_rows_that_were_changed_are_refused(change, tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert bench(*ONE, "--json", path) == 0
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([row | change for row in rows]))
    assert bench(*ONE, "--compare", path) == 2
    assert bench(*ONE, "--json", path, "--resume") == 2
    assert capsys.readouterr().err.count("it holds no rows of this command") == 2


def test_only_what_ran_out_of_memory_does_not_fit():
    assert command._of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GB"))
    assert command._of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not command._of_memory(RuntimeError("an illegal memory access was encountered"))


def test_repeats_must_be_positive(capsys):
    assert cli.main(["bench", "--repeats", "0"]) == 2
    assert "--repeats must be positive, got 0" in capsys.readouterr().err


def test_another_run_s_row_is_found_by_what_was_measured():
    row = {"operator": "a", "problem": "p", "heads": 8, "width": 16, "provider": "pyg"}
    assert table.key(row) == table.key(row | {"both_s": 1.0})
    assert table.key(row) != table.key(row | {"width": 8})
    assert table.key(row | {"batches": 2}) != table.key(row | {"batches": 8})

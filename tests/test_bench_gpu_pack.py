"""What travels to a GPU and what is made of what comes back."""

import json
import subprocess
import sys

import numpy as np
import pytest
import render

from fastgt.bench import gpu, gpu_collect, gpu_pack, gpu_session, harness, peer_paths
from fastgt.bench.gpu_benchmarks import ATTENTION
from fastgt.testing import PROBLEMS

ANEMOI = "models/src/anemoi/models/triton/gt.py"
BLA = "flash_bla/ops/linear_attn/varlen.py"
GPU = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """-> a folder of checkouts; FASTGT_DATA has one graph of its own making."""
    data = tmp_path / "data"
    data.mkdir()
    edges = np.array([[0, 1, 2], [1, 2, 3]])
    np.savez(data / "cora.npz", edge_index=edges, y=np.zeros(4))
    monkeypatch.setenv("FASTGT_DATA", str(data))
    checkouts = tmp_path / "checkouts"
    for name, text in ((f"anemoi-core/{ANEMOI}", "x = 1\n"), (f"bla/{BLA}", "y = 2\n")):
        file = checkouts / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
    return checkouts


@pytest.fixture
def carried(sources, tmp_path, capsys):
    folder = tmp_path / "carried"
    assert gpu.main(["--pack", str(folder), "--peer-path", str(sources)]) == 0
    return folder


def test_what_is_packed_is_found_there(carried, monkeypatch, capsys):
    manifest = gpu_pack.check(carried)
    assert set(manifest["files"]) == {
        "data/cora.npz",
        "peers/anemoi/models/triton/gt.py",
        "peers/flash_bla/ops/linear_attn/varlen.py",
    }
    assert gpu_pack.commit(manifest) == harness.commit()
    with monkeypatch.context() as there:
        there.setenv("FASTGT_DATA", str(carried / "data"))
        assert PROBLEMS["cora"].load().num_edges == 6
        # from itself it would be made empty
        assert gpu.main(["--pack", str(carried)]) == 2
        assert "is in it, and would be lost" in capsys.readouterr().err
    peers = carried / "peers"
    found = peer_paths._find("anemoi", peers, ANEMOI, "anemoi/models/triton/gt.py")
    assert found.read_text() == "x = 1\n"
    assert peer_paths._find("bla", peers, BLA).read_text() == "y = 2\n"
    # as often as one likes: what is there is made anew
    assert gpu.main(["--pack", str(carried)]) == 0
    assert set(gpu_pack.check(carried)["files"]) == {"data/cora.npz"}


def test_what_is_absent_is_told(carried, sources, capsys):
    gpu.main(["--pack", str(carried), "--peer-path", str(sources / "bla")])
    told = capsys.readouterr().out
    assert "zinc: left out: " in told
    assert "anemoi: left out: there is no anemoi/models/triton/gt.py under" in told
    assert "igb_small" not in told  # made by a generator


def test_an_incomplete_folder_names_the_file(carried, tmp_path, capsys):
    def refused():
        assert (
            gpu.main(["--rehearse", "--carried", str(carried), "--out", str(tmp_path / "o")]) == 2
        )
        return capsys.readouterr().err

    graph = carried / "data" / "cora.npz"
    content = graph.read_bytes()
    graph.write_bytes(content[:-1])
    assert f"--carried {carried}: data/cora.npz is damaged: make it anew" in refused()
    graph.unlink()
    assert "data/cora.npz is missing: make it anew with python -m" in refused()
    graph.write_bytes(content)
    gpu_pack.check(carried)
    for text in ("{", "{}", '{"files": 3}'):
        (carried / "manifest.json").write_text(text)
        assert "manifest.json is damaged" in refused()
    assert not (tmp_path / "o").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path, sources, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("all there is")
    assert gpu.main(["--pack", str(other)]) == 2
    assert "it holds something else" in capsys.readouterr().err
    assert (other / "thesis.txt").exists()


def test_more_than_may_travel_is_refused(tmp_path, sources, monkeypatch, capsys):
    monkeypatch.setattr(gpu_pack, "LARGEST", 100)
    assert gpu.main(["--pack", str(tmp_path / "carried")]) == 2
    assert "bytes, and at most 100 travel" in capsys.readouterr().err


def test_other_code_than_was_packed_is_marked(carried, monkeypatch):
    manifest = gpu_pack.check(carried) | {"commit": "abc"}
    assert gpu_pack.commit(manifest) == "abc"
    assert gpu_pack.commit(manifest | {"code": "other"}) == "abc-dirty"


def test_every_real_graph_is_known_to_be_one():
    made = {x.problem for x in ATTENTION} - gpu_pack._REAL
    assert made == {
        "h_to_h",
        "pattern",
        "github",
        "pascalvoc",
        "molecules",
        "igb_small",
        "power_law",
    }


def test_without_git_the_commit_is_that_of_the_manifest(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert harness.commit() == harness.UNKNOWN
    result = gpu_session._Result.__new__(gpu_session._Result)
    result.commit, result.rows, result.written = "abc", [], float("inf")
    result.add([{"commit": harness.UNKNOWN}, {"commit": "def"}, {}])
    assert result.rows == [{"commit": "abc"}, {"commit": "def"}, {}]


def row(operator, provider, problem="h_to_h", **more):
    made = {"operator": operator, "provider": provider, "problem": problem, "match": True}
    made |= {"rows": 40, "edges": 90, "graphs": 1, "heads": 8, "width": 16, "dtype": "bfloat16"}
    made |= {f"{part}_{x}": 1.0 for part in ("forward", "backward", "both") for x in ("s", "x")}
    made |= {"device": GPU, "commit": "abc", "date": "2026-11-28", "torch": "2.11", "repeats": 9}
    return made | {"forward_peak_bytes": 1, "both_peak_bytes": 2} | more


def checked(dtype, **more):
    what = {"operator": "aggregate", "variant": "sum", "problem": "hub", "dtype": dtype}
    return what | {"match": True, "same_bits": True} | more


@pytest.fixture
def home(tmp_path):
    """-> what a session brought home; the folder of results; the table of plans."""
    out, results, plans = tmp_path / "out", tmp_path / "results", tmp_path / "plans.json"
    out.mkdir()
    where = {"device": GPU, "commit": "abc", "torch": "2.11", "date": "2026-11-28"}
    plan = {"op": "attention", "capability": "sm_90", "dtype": "bfloat16", "width": 16}
    rows = {
        "environment": [where | {"copy_bytes_per_s": 3e12}],
        "correctness": [
            checked("float16"),
            checked("float16", problem="star", match=False, same_bits=False, error="off"),
        ],
        "attention": [row("attention", "fastgt"), row("attention", "pyg", both_x=9.0)],
        "linear": [
            row("linear_attention", "fastgt", "ragged"),
            row("linear_attention", "padded einsum", "pascalvoc", match=None, error="crashed"),
        ],
        "launch": [
            where | {"call": "forward", "microseconds": 30.0, "target": "cuda", "triton": "3.6"},
            where
            | {
                "call": "forward and backward of attention, captured",
                "match": True,
                "replay_s": 2e-5,
            },
            where
            | {
                "call": "forward and backward of linear_attention, captured",
                "match": False,
                "error": "differs",
            },
        ],
        "plans": [
            plan | {"rho64": 1.7, "source": f"measured on {GPU}"},
            where | {"path": "gather", "change": {}, "both_s": 1.0},
        ],
    }
    for step in gpu_session.STEPS:
        content = {"step": step, "commit": "abc", "state": "done", "seconds": 9.0, "left": []}
        text = json.dumps(content | {"rows": rows[step]})
        (out / f"{step}.json").write_text(text)
    plans.write_text(json.dumps([plan | {"capability": "any", "rho64": 3.5, "source": "a model"}]))
    return out, results, plans


def test_what_came_home_becomes_results(home, monkeypatch):
    out, results, plans = home
    told = list(gpu_collect.collect(out, results, plans))
    name = "nvidia-h100-80gb-hbm3"
    assert {x.name for x in results.iterdir()} == {
        *(f"{name}.json", f"launch-{name}.json", f"tiles-{name}.json", f"correctness-{name}.json")
    }
    rows = json.loads((results / f"{name}.json").read_text())
    assert [(x["operator"], x["provider"]) for x in rows] == [
        ("attention", "fastgt"),
        ("attention", "pyg"),
        ("linear_attention", "fastgt"),
    ]
    assert "forward and backward of linear_attention, captured: differs" in told
    assert "linear_attention, pascalvoc: left out: padded einsum stands alone" in told
    launches = json.loads((results / f"launch-{name}.json").read_text())
    assert [(x["call"], x["microseconds"]) for x in launches] == [
        ("forward", 30.0),
        ("forward and backward of attention, captured", 20.0),
    ]
    table = json.loads(plans.read_text())
    assert [x["capability"] for x in table] == ["any", "sm_90"]
    machine, sums = json.loads((results / f"correctness-{name}.json").read_text())
    assert machine["seconds"]["correctness"] == 9.0
    assert (sums["problems"], sums["right"]) == (2, 1)
    assert sums["wrong"] == [{"problem": "star", "error": "off", "same_bits": False}]
    # what is made of results takes all of them
    monkeypatch.setattr(render, "RESULTS", results)
    assert f"**{GPU}**" in render._devices()
    assert "30.0" in render.rendered(f"<!-- table launch-{name} -->\n<!-- end -->")


def test_what_a_killed_session_had_is_kept(home):
    out, results, plans = home
    for step in ("linear", "launch", "plans"):
        (out / f"{step}.json").unlink()
    before = plans.read_text()
    told = list(gpu_collect.collect(out, results, plans))
    assert "plans: not run in 0.0 s, 0 tasks left" in told
    name = "nvidia-h100-80gb-hbm3"
    assert {x.name for x in results.iterdir()} == {f"{name}.json", f"correctness-{name}.json"}
    assert plans.read_text() == before


def test_the_same_measurement_is_replaced(home):
    out, results, plans = home
    results.mkdir()
    path = results / "nvidia-h100-80gb-hbm3.json"
    old = [row("attention", "fastgt", both_s=7.0), row("attention", "fastgt", "cora")]
    path.write_text(json.dumps(old))
    list(gpu_collect.collect(out, results, plans))
    found = json.loads(path.read_text())
    assert [(x["problem"], x["both_s"]) for x in found if x["provider"] == "fastgt"] == [
        ("cora", 1.0),
        ("h_to_h", 1.0),
        ("ragged", 1.0),
    ]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: (out / "plans.json").write_text("["), "plans.json is damaged"),
        (
            lambda out: (out / "plans.json").write_text((out / "linear.json").read_text()),
            "it is no file of that step",
        ),
        (
            lambda out: (out / "linear.json").write_text(
                (out / "linear.json").read_text().replace("H100", "H200")
            ),
            "rows of 2 devices",
        ),
    ],
)
def test_what_is_no_session_of_one_gpu_is_refused(home, spoil, message):
    out, results, plans = home
    spoil(out)
    with pytest.raises(ValueError, match=message):
        list(gpu_collect.collect(out, results, plans))
    assert not results.exists()


def test_a_rehearsal_is_no_result(home):
    out, results, plans = home
    for step in gpu_session.STEPS:
        path = out / f"{step}.json"
        path.write_text(path.read_text().replace(GPU, "a CPU, 2 threads"))
    with pytest.raises(ValueError, match="this was a rehearsal, on a CPU, 2 threads"):
        list(gpu_collect.collect(out, results, plans))


def test_collect_says_what_it_cannot(tmp_path):
    command = [sys.executable, "-m", "fastgt.bench.gpu", "--collect", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert "name the folder of results with --results" in run.stderr
    run = subprocess.run([*command, "--results", str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith(
        f"fastgt.bench.gpu: --collect {tmp_path}: it holds none of environment.json, correctness"
    )

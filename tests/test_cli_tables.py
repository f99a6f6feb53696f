"""Tables of the command line fit 100 columns, with the longest names that there are."""

import json
from pathlib import Path

import pytest
import torch

from fastgt import cli, demo, doctor
from fastgt.bench import report, table, targets, traffic, tune
from fastgt.bench.operators import OPERATORS
from fastgt.distributed.report import NETWORKS, Report
from fastgt.terminal import wrapped
from fastgt.training import comparison, results
from fastgt.training.published_recipes import RECIPES

ROOT = Path(__file__).parent.parent
PROVIDERS = sorted({name for x in OPERATORS.values() for name in (x.first, *x.peers)})
MACHINE = {
    "device": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz, 192 threads",
    "commit": "0123456789ab-dirty",
    "date": "2026-11-29",
    "torch": "2.13.0+cu130",
}
ERROR = "MemoryError: a dense matrix of nodes by nodes would take 1.6 GB, " * 3


def assert_fits(text: str) -> None:
    too_long = [line for line in text.splitlines() if len(line) > 100]
    assert not too_long, f"{len(too_long[0])} columns: {too_long[0]}"


def measured(provider: str, seconds: float, **more) -> dict:
    row = {
        "operator": "edge_graph_transformer",
        "problem": "amazon_computers",
        "provider": provider,
        "match": True,
        "rows": 111_059_956,
        "edges": 1_615_685_872,
        "graphs": 123_456,
        "heads": 128,
        "width": 256,
        "dtype": "bfloat16",
        "forward_peak_bytes": 123456e6,
        "both_peak_bytes": 654321e6,
    }
    for part in table.PARTS:
        row |= {f"{part}_s": seconds, f"{part}_x": 1234.5, f"{part}_spread": 0.5}
        row |= {f"{part}_bytes_per_s": 4800e9, f"{part}_roofline": 1.0}
        row |= {f"{part}_wall_s": seconds, f"{part}_kernel_s": seconds}
        row |= {f"{part}_replay_error": ERROR}
    return row | MACHINE | more


@pytest.mark.parametrize("seconds", [1e-6, 0.5, 12345.678])
def test_every_provider_of_the_benchmarks(seconds):
    rows = [measured(name, seconds) for name in PROVIDERS]
    text = table.table(rows)
    assert_fits(text)
    lines = text.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in PROVIDERS)
    # every one has its figures, the longest name in a line below it
    figures = [line for line in lines if line.count("(1234x)") == 3]
    assert len(figures) == len(PROVIDERS)
    assert len({len(line) for line in figures}) == 1
    assert_fits(table.size(rows[0]))
    told = map(wrapped, table.compared(rows, rows))
    assert_fits("\n".join(told))


def test_what_is_said_of_a_provider_that_failed():
    long = max(PROVIDERS, key=len)
    failed = [measured(name, 1.0, match=False, error=ERROR) for name in ("pyg", long)]
    text = table.table([measured("fastgt", 1.0, backward_error=ERROR), *failed])
    assert_fits(text)
    assert text.count("MISMATCH") == 2
    words = " ".join(text.split())
    assert words.count(ERROR.strip()) == 2 + 1 + 6  # and of a backward and two replays each


def test_epochs_of_models():
    sizes = {"batches": 1234, "layers": 100, "parameters": 123_456_789, "epoch_peak_bytes": 1e11}
    text = table.table([measured(name, 12345.678, **sizes) for name in PROVIDERS])
    assert_fits(text)
    assert text.count("12345.678") == 2 * len(PROVIDERS)


@pytest.mark.parametrize("file", ["cpu.json", "cpu-1-thread.json"])
def test_rows_that_were_measured(file):
    rows = json.loads((ROOT / "bench" / "results" / file).read_text())
    groups: dict[tuple, list] = {}
    for row in rows:
        groups.setdefault(table.key(row)[:-1], []).append(row)
    assert len(groups) > 5
    for group in groups.values():
        assert_fits(table.table(group))
        assert_fits("\n".join(map(wrapped, table.compared(group, rows))))
    assert_fits("\n".join(map(wrapped, targets.lines(rows, "cpu"))))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda x: f"{x.model}-{x.data}")
def test_what_every_training_reached(recipe):
    row = {
        "title": "a long title of a data set, substitute train",
        "settings": {"seed": 2**63, "split": 9},
        "val": -1234.5678,
        "test": -1234.5678,
        "epoch": 10_000,
        "epochs": 10_000,
        "epoch_s": 12345.6,
        "peak_bytes": 1e11,
        "parameters": 123_456_789,
        "published": None if recipe.published is None else vars(recipe.published),
        **MACHINE,
    }
    other = row | {"settings": {"seed": 1, "split": 0}, "val": 0.1, "test": 0.1}
    text = results.table([row, other], recipe, Path("runs"))
    assert_fits(text)
    if recipe.published is not None:  # told whole, whatever lines it takes
        assert recipe.published.source in " ".join(text.split())


def test_heads_that_were_pruned():
    row = {
        "pruned": 0.0,
        "parameters": 99_999_999,
        "test_accuracy": 1.0,
        "test_examples": 123_456,
        "train_epoch_s": 1234.56,
        "inference_s": 123.45,
        "removed_inference_s": 123.45,
        "step_peak_bytes": 1e12,
        "largest_difference": 1e-5,
        "active_heads": [16] * 48,
        **MACHINE,
    }
    text = comparison.table([row, row | {"pruned": 0.5}])
    assert_fits(text)
    assert text.count("16, 16") > 20


def test_the_demo():
    rows = [demo.Result(x, 0.5, 12345.6, 10**12) for x in ("fastgt", "gather-softmax-scatter")]
    assert_fits(demo.table(rows))


def test_a_partition_of_the_largest_graph_that_is_published():
    """ogbn-papers100M, among 1,024 ranks."""
    ranks = 1024
    rows = torch.full((ranks,), 111_059_956 // ranks)
    rows[0] = 111_059_956 - int(rows[1:].sum())
    edges = torch.full((ranks,), 2 * 1_615_685_872 // ranks)
    peers = torch.full((ranks,), ranks - 1)
    for network in NETWORKS:
        found = Report(
            rows, rows, edges, 8 * rows, 8 * rows, edges, peers, 128, torch.float32, network
        )
        assert_fits(str(found))


def test_the_doctor():
    operators = {
        name: {"impl": "reference", "right": False, "why": ERROR, "seconds": None}
        for name in doctor.OPERATORS
    }
    found = {
        "fastgt": "0.1.0.dev1",
        "python": "3.13.12",
        "packages": dict.fromkeys(doctor.PACKAGES, "2.15.0.dev20261129+cu130"),
        "gpu": "NVIDIA GeForce RTX 4090 Laptop GPU",
        "cpu": {"threads": 192, "kernels": None, "why": f"c++ failed\n{ERROR}"},
        "operators": operators,
    }
    text = doctor.table(found)
    assert_fits(text)
    assert text.count("WRONG: ") == len(operators)
    assert text.endswith(f"0 of {len(operators)} operators agree with their definitions")
    kernels = {"kernels": "baseline", "vector_bytes": 64, "path": "kernels_baseline.so"}
    assert_fits(doctor.table(found | {"cpu": {"threads": 192, **kernels}}))


def test_every_kernel():
    budget = json.loads((ROOT / "tests" / "kernel_budget.json").read_text())
    for target, kernels in budget.items():
        text = report.show(target, kernels)
        assert_fits(text)
        assert all(name.partition("/")[0] in text for name in kernels)


def test_traffic():
    for row in json.loads((ROOT / "bench" / "results" / "traffic.json").read_text()):
        text = traffic.show(row)
        assert_fits(text)
        kernels = [line[2:18] for line in text.splitlines() if line.startswith("  fwd")]
        assert kernels == 2 * kernels[: len(kernels) // 2]  # bytes, and times on devices


def test_what_tuning_tells(monkeypatch, capsys):
    monkeypatch.setattr(tune, "_graph", lambda *_: None)
    monkeypatch.setattr(tune, "_ratio", lambda *_: (12.34, 123.45))
    monkeypatch.setattr(tune.plans, "capability", lambda device: "9.0")
    tune.plan(torch.bfloat16, 128, torch.device("cpu"))
    said = capsys.readouterr().out
    assert said.count("123.45") == len(tune.DENSITIES)
    assert_fits(said)


@pytest.mark.parametrize(
    "command",
    [
        *["", "demo", "train", "bench", "partition", "doctor"],
        *["report", "report kernels", "report traffic"],
    ],
)
def test_help_fits(command: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    assert_fits(capsys.readouterr().out)


def test_problems_of_traffic_are_named(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["report", "traffic", "--problem", "coraa"])
    assert "no problem is called 'coraa': did you mean 'cora'?" in capsys.readouterr().err

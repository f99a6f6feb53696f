"""Scripts of examples/models train as on torch-geometric's layers, two lines apart at most."""

import difflib
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from raw_data_sets import write_cora, write_tolokers, write_zinc
from test_event_set import write_flights

pytest.importorskip("torch_geometric")

from fastgt.pyg import explain

EXAMPLES = Path(__file__).parent.parent / "examples" / "models"
STEPS = 20


def run(source: str, name: str, *arguments: Any) -> dict[str, Any]:
    """What a script has when it ends."""
    names = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        exec(compile(source, name, "exec"), names)
    return names


def for_pyg(source: str) -> str:
    """The script without fastgt: layers are imported from torch-geometric, models left alone."""
    source = source.replace("\nfrom fastgt.pyg import", "\nfrom torch_geometric.nn import")
    return re.sub(r"^(import fastgt|fastgt\.accelerate\(model\))\n", "", source, flags=re.MULTILINE)


def lines_changed(before: str, after: str) -> int:
    """Lines that are put in or out; one that stands for another counts once."""
    pairs = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False)
    changes = [ends for tag, *ends in pairs.get_opcodes() if tag != "equal"]
    return sum(max(i1 - i0, j1 - j0) for i0, i1, j0, j1 in changes)


# of a script, its arguments; dropout draws other weights from a seed, so that there is none
CASES = {
    "gat": ("gat.py", ["--conv", "GATConv", "--epochs", STEPS, "--dropout", 0]),
    "gatv2": ("gat.py", ["--conv", "GATv2Conv", "--epochs", STEPS, "--dropout", 0]),
    "unimp": ("unimp.py", ["--epochs", STEPS, "--dropout", 0]),
    "hgt": ("hgt.py", ["--epochs", STEPS, "--packages", 800]),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real data sets, or of parts of them."""
    root = tmp_path_factory.mktemp("data")
    write_cora(root)
    write_tolokers(root, 1500)
    write_zinc(root, {"train": 128, "val": 32, "test": 32})
    return root


WARNINGS = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning:torch_geometric"
)


@pytest.mark.parametrize("case", CASES)
@WARNINGS
def test_training_is_that_of_torch_geometric(case: str, request: pytest.FixtureRequest) -> None:
    name, arguments = CASES[case]
    if name != "hgt.py":
        arguments = ["--root", request.getfixturevalue("root"), *arguments]
    ours = (EXAMPLES / name).read_text()
    theirs = for_pyg(ours)
    assert 1 <= lines_changed(theirs, ours) <= 2
    expected, found = run(theirs, name, *arguments), run(ours, name, *arguments)
    assert not explain(expected["model"])
    assert set(explain(found["model"]).values()) == {"fused"}
    assert len(expected["losses"]) == STEPS
    assert expected["losses"][-1] < expected["losses"][0]
    losses = [torch.tensor(x["losses"], dtype=torch.float64) for x in (found, expected)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


@WARNINGS
def test_training_of_gps_is_that_of_torch_geometric_in_float64(tmp_path: Path) -> None:
    """In float32 a rounding error may turn a ReLU on or off, which changes the losses that follow.

    Torch-geometric's own then differ by as much if its parameters are changed by 1e-7.
    """
    write_zinc(tmp_path, {"train": 64, "val": 8, "test": 8})
    ours = (EXAMPLES / "gps.py").read_text()
    theirs = for_pyg(ours)
    assert lines_changed(theirs, ours) == 2
    arguments = ["--root", tmp_path, "--epochs", STEPS // 2, "--layers", 10, "--dropout", 0]
    torch.set_default_dtype(torch.float64)
    try:
        expected, found = (run(x, "gps.py", *arguments) for x in (theirs, ours))
    finally:
        torch.set_default_dtype(torch.float32)
    assert next(found["model"].parameters()).dtype == torch.float64
    assert set(explain(found["model"]).values()) == {"fused"}
    assert len(found["losses"]) == STEPS
    losses = [torch.tensor(x["losses"], dtype=torch.float64) for x in (found, expected)]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["gat.py", "unimp.py", "gps.py"])
@WARNINGS
def test_scripts_run_with_dropout(
    name: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--root", root, "--epochs", STEPS, *(["--layers", 2] if name == "gps.py" else [])]
    found = run((EXAMPLES / name).read_text(), name, *arguments)
    assert set(explain(found["model"]).values()) == {"fused"}
    assert sum(found["losses"][-5:]) < sum(found["losses"][:5])
    said = capsys.readouterr().out
    assert re.search(r"epoch 20: loss \d\.\d{4}, validation .*\d\.\d+\ntest \w+ \d\.\d+\n", said)


@WARNINGS
def test_sampled_training_is_that_of_torch_geometric(capsys: pytest.CaptureFixture[str]) -> None:
    ours = (EXAMPLES / "sampled.py").read_text()
    theirs = for_pyg(ours).replace(
        "block.num_rows]), block)", "block.num_rows]), block.edge_index)"
    )
    assert lines_changed(theirs, ours) == 2
    arguments = ["--batch", 64, "--channels", 16, "--epochs", 2, "--steps", STEPS // 2]
    expected, found = run(theirs, "sampled.py", *arguments), run(ours, "sampled.py", *arguments)
    assert set(explain(found["model"]).values()) == {"fused"}
    assert len(found["losses"]) == STEPS
    assert sum(found["losses"][-5:]) < sum(found["losses"][:5])
    losses = [torch.tensor(x["losses"], dtype=torch.float64) for x in (found, expected)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert "share of drawing and Graphs: " in capsys.readouterr().out


def test_todyformer_is_compared_with_its_means_and_with_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Airports fly in a circle, which turns back in the test: counts know the old way best."""
    event = torch.arange(3000)
    source = event % 6
    write_flights(
        tmp_path,
        src=source.numpy(),
        dst=((source + torch.where(event < 2550, 1, 5)) % 6).numpy(),
        t_minutes=(event // 3).numpy(),
        distance=(100 + source).numpy(),
    )
    arguments = ["--data", tmp_path, "--history", 60, "--patches", 3, "--dim", 16, "--batch", 6]
    arguments += ["--steps", 60, "--evaluated", 10, "--lr", 1e-2]
    found = run((EXAMPLES / "todyformer.py").read_text(), "todyformer.py", *arguments)
    results, said = found["results"], capsys.readouterr().out
    for name in ("Todyformer", "Todyformer, means"):
        losses = found["losses"][name]
        assert len(losses) == 60
        assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
        assert results["val", "random", name][0] > 0.9
    for name in ("popularity", "EdgeBank", "EdgeBank, history"):
        # all pairs of the circle are as frequent, and those against them never were
        assert results["val", "random", name] == (1.0, 1.0)
    assert results["test", "historical", "popularity"][1] < 0.2
    assert results["test", "historical", "EdgeBank"][1] <= 0.5
    for split in ("val", "test"):
        for kind in ("random", "historical", "inductive"):
            for name in ("popularity", "EdgeBank, history", "Todyformer, means", "Todyformer"):
                assert re.search(rf"{split}, {kind} negatives, {name}: AP [01]\.\d{{4}}, AUC", said)


@WARNINGS
def test_large_gt_trains_beside_layers_of_torch_geometric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Communities whose members have noisy features of their class: attention finds them all."""
    draw = np.random.default_rng(0)
    y = np.arange(200) % 2
    edges = draw.integers(0, 200, (4000, 2))
    part = draw.permuted(np.tile(np.arange(200) % 3, (10, 1)), axis=1)
    np.savez(
        tmp_path / "tolokers.npz",
        node_features=(y[:, None] + draw.normal(size=(200, 10))).astype(np.float32),
        node_labels=y,
        edges=edges[y[edges[:, 0]] == y[edges[:, 1]]],
        train_masks=part == 0,
        val_masks=part == 1,
        test_masks=part == 2,
    )
    monkeypatch.setenv("FASTGT_DATA", str(tmp_path))
    given = {"data": "tolokers", "folder": tmp_path, "samples": 6, "dim": 16, "batch": 16}
    given |= {"centroids": 16, "epochs": 6, "gnn-epochs": 20}
    arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
    found = run((EXAMPLES / "large_gt.py").read_text(), "large_gt.py", *arguments)
    assert set(found["tests"]) == {"GAT", "GraphSAGE", "LargeGT"}
    assert min(found["tests"].values()) > 0.9

"""Files of many graphs that are damaged: each fault is named."""

import numpy as np
import pytest
import torch

from fastgt.datasets import load


def molecules(counts=(20, 4, 6)):
    """Rings of 6 with a tail, in ``zinc12k.npz``'s layout."""
    draw = np.random.default_rng(0)
    made = {}
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        sizes = draw.integers(9, 14, count)
        ends, bonds = [], []
        for n in sizes:
            pairs = [(i, (i + 1) % 6) for i in range(6)] + [(i - 1, i) for i in range(6, n)]
            both = np.concatenate([np.array(pairs), np.array(pairs)[:, ::-1]])
            ends.append(both.T)
            bonds.append(np.tile(draw.integers(1, 4, len(pairs)), 2))
        made |= {
            f"{split}_atom": draw.integers(0, 28, sizes.sum()).astype(np.uint8),
            f"{split}_bond": np.concatenate(bonds).astype(np.uint8),
            f"{split}_edge_local": np.concatenate(ends, 1).astype(np.uint8),
            f"{split}_node_ptr": np.cumsum([0, *sizes]).astype(np.int32),
            f"{split}_edge_ptr": np.cumsum([0, *map(len, bonds)]).astype(np.int32),
            f"{split}_y": draw.normal(size=count).astype(np.float32),
        }
    return made


def proteins(count=60):
    """Rings, in ``dd.npz``'s layout; sorted by class."""
    draw = np.random.default_rng(0)
    sizes = draw.integers(4, 12, count)
    ptr = np.cumsum([0, *sizes])
    rings = [np.stack([np.arange(n), (np.arange(n) + 1) % n]) for n in sizes]
    return {
        "node_label": draw.integers(1, 90, ptr[-1]).astype(np.uint8),
        "edge_index": np.concatenate([r + p for r, p in zip(rings, ptr, strict=False)], 1),
        "node_ptr": ptr.astype(np.int32),
        "y": np.repeat([1, 2], count // 2).astype(np.int8),
    }


def test_whole_files_are_read(tmp_path):
    np.savez(tmp_path / "zinc12k.npz", **molecules())
    data = load("zinc12k", tmp_path)
    assert {name: x.tolist() for name, x in data.splits.items()} == {
        "train": list(range(20)),
        "val": list(range(20, 24)),
        "test": list(range(24, 30)),
    }
    np.savez(tmp_path / "dd.npz", **proteins())
    data = load("dd", tmp_path / "dd.npz")
    assert [len(x) for x in data.splits.values()] == [48, 6, 6]
    assert sorted(torch.cat(list(data.splits.values())).tolist()) == list(range(60))
    torch.manual_seed(5)
    assert load("dd", tmp_path).digest() == data.digest()
    assert 0.2 < data.y[data.splits["train"]].double().mean() < 0.8


def with_value(index, value):
    def change(x):
        x = x.copy()
        x[index] = value
        return x

    return change


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("test_atom", with_value(5, 28), "test_atom has values beyond 0 to 27"),
        ("val_bond", with_value(0, 4), "val_bond has values beyond 0 to 3"),
        ("train_edge_local", with_value((0, 3), 13), "edge_local has values beyond its molecule"),
        ("train_edge_local", lambda x: x[:1], r"train_edge_local must be \[2, "),
        ("train_node_ptr", with_value(4, 0), "train_node_ptr must rise from 0"),
        ("train_node_ptr", with_value(0, 1), "train_node_ptr must rise from 0"),
        ("val_edge_ptr", lambda x: x[:-1], "val_edge_ptr must rise from 0 .* in 3"),
        ("train_y", with_value(0, np.nan), "train_y must be finite numbers"),
        ("test_y", lambda x: x[:0], "test_y must be finite numbers, and some"),
        ("train_atom", lambda x: x.astype(np.float32), r"train_atom is \[\d+\] float32"),
        ("val_bond", None, "val_bond"),
    ],
)
def test_damaged_molecules_are_refused(tmp_path, key, change, message):
    arrays = molecules()
    taken = arrays.pop(key)
    if change is not None:
        arrays[key] = change(taken)
    np.savez(tmp_path / "zinc12k.npz", **arrays)
    with pytest.raises(ValueError, match=rf"zinc12k\.npz is damaged: .*{message}"):
        load("zinc12k", tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("node_label", lambda x: x[:-1], "node_ptr must rise from 0 to"),
        ("node_label", lambda x: x + 100, "node_label has values beyond 1 to 89"),
        ("node_label", lambda x: x.astype(float), r"node_label is \[\d+\] float64"),
        ("node_ptr", lambda x: x[::-1], "node_ptr must rise"),
        ("node_ptr", lambda x: x[[0, 2, 2, *range(3, len(x))]], "protein 1 has no nodes"),
        ("edge_index", lambda x: x[:1], r"edge_index must be \[2, E\], got \[1,"),
        ("edge_index", lambda x: x + 10**6, "edge_index has values beyond"),
        ("edge_index", lambda x: x[:, ::-1], "must have its edges protein by protein"),
        ("edge_index", lambda x: np.stack([x[0], np.roll(x[1], 5)]), "from one protein to another"),
        ("y", lambda x: x - 1, "y has values beyond 1 to 2"),
        ("y", lambda x: x[:3], "y must have a protein for each tenth, at least 10, got 3"),
        ("y", None, "y is not a file"),
    ],
)
def test_damaged_proteins_are_refused(tmp_path, key, change, message):
    arrays = proteins()
    taken = arrays.pop(key)
    if change is not None:
        arrays[key] = change(taken)
    np.savez(tmp_path / "dd.npz", **arrays)
    with pytest.raises(ValueError, match=rf"dd\.npz is damaged: .*{message}"):
        load("dd", tmp_path)


@pytest.mark.parametrize("kind", ["truncated", "flipped", "no archive", "empty"])
@pytest.mark.parametrize("compressed", [False, True])
def test_damaged_archives_are_refused(tmp_path, kind, compressed):
    path = tmp_path / "zinc12k.npz"
    (np.savez_compressed if compressed else np.savez)(path, **molecules())
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        content = content[: len(content) // 2]
    elif kind == "flipped":
        content[150:180] = bytes(30)
    else:
        content = b"no archive at all" if kind == "no archive" else b""
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"zinc12k\.npz is damaged: "):
        load("zinc12k", tmp_path)


def test_absent_files_say_how_they_are_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"dd\.npz is absent: --data names dd\.npz or its"):
        load("dd", tmp_path)
    monkeypatch.delenv("FASTGT_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"zinc12k\.npz is absent: set FASTGT_DATA"):
        load("zinc12k")

"""Small data sets, and runs of ``fastgt train`` on molecules, for the files test_train_*.py."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from fastgt.training import checkpoint

SMALL = ["layers=2", "dim=16", "heads=2", "batch_size=32"]
TRAIN, HELD_OUT = 200, 40
BATCHES = 7  # of an epoch


def ring(path, nodes, features, splits):
    """Two classes on a ring; features are the class, and noise. -> the file."""
    draw = np.random.default_rng(0)
    y = draw.integers(0, 2, nodes)
    place = np.arange(nodes)
    part = draw.permuted(np.tile(place % 3, (splits, 1)), axis=1)
    np.savez(
        path,
        node_features=(y[:, None] + draw.normal(size=(nodes, features))).astype(np.float32),
        node_labels=y,
        edges=np.stack([place, (place + 1) % nodes], 1),
        train_masks=part == 0,
        val_masks=part == 1,
        test_masks=part == 2,
    )
    return path


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


def write(folder, **changed):
    """-> zinc12k.npz in that folder."""
    path = folder / "zinc12k.npz"
    np.savez_compressed(path, **(arrays() | changed))
    return path


def proteins(count=60):
    """Rings, whose class is the type that most of their nodes have; sorted by class."""
    draw = np.random.default_rng(0)
    labels, edges, ptr, y = [], [], [0], []
    for i in range(count):
        n, kind = int(draw.integers(4, 12)), int(i >= count // 2)
        labels.append(np.where(draw.random(n) < 0.8, kind + 1, 2 - kind))
        ring = np.arange(n)
        edges.append(np.stack([ring, (ring + 1) % n]) + ptr[-1])
        ptr.append(ptr[-1] + n)
        y.append(kind + 1)
    return {
        "node_label": np.concatenate(labels).astype(np.uint8),
        "edge_index": np.concatenate(edges, 1).astype(np.int32),
        "node_ptr": np.array(ptr, dtype=np.int32),
        "y": np.array(y, dtype=np.int8),
    }


def write_proteins(folder):
    """-> dd.npz in that folder."""
    path = folder / "dd.npz"
    np.savez_compressed(path, **proteins())
    return path


def command(data, output, *options, model="edge_graph_transformer"):
    """Arguments of a run; ``key=value`` first among the options, in the place of those of SMALL."""
    names = ["train", model, "zinc12k", "--data", str(data), "--output", str(output)]
    given = {option.partition("=")[0] for option in options}
    kept = [option for option in SMALL if option.partition("=")[0] not in given]
    return [*names, "--device", "cpu", "--set", *kept, *options]


def launched(args, folder, patch=""):
    """-> status and output of two processes that torchrun starts."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    code = (
        "import sys; from fastgt import cli; from fastgt.training import loop\n"
        f"{patch}\nsys.exit(cli.main(sys.argv[1:]))"
    )
    script = folder / "two.py"
    script.write_text(code)
    process = subprocess.Popen(
        [*torchrun, "--nproc-per-node", "2", str(script), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
    )
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def table(folder, metric="mae"):
    """The cells of metrics.csv apart from the times."""
    header, *lines = (folder / "metrics.csv").read_text().splitlines()
    assert header == f"epoch,seconds,lr,train_loss,val_loss,val_{metric},test_{metric}"
    return [[cell for i, cell in enumerate(line.split(",")) if i != 1] for line in lines]


def assert_same_run(folder, other, metric="mae"):
    """The same numbers to the last bit, but for seconds and memory."""
    assert table(folder, metric) == table(other, metric)
    a, b = (checkpoint.load(x / "checkpoint.pt") for x in (folder, other))
    for content in (a, b):
        for row in content["progress"]["rows"]:
            del row["seconds"]
        del content["progress"]["seconds"], content["progress"]["peak_bytes"]
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

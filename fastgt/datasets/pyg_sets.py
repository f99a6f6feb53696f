"""Data sets of torch-geometric, from the files that it downloads."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastgt.datasets.from_pyg import graph_set, node_set
from fastgt.datasets.graph_set import GraphSet
from fastgt.datasets.molhiv import ATOMS, BONDS
from fastgt.datasets.node_set import NodeSet

SPLITS = ("train", "val", "test")


def zinc(folder: Path | None) -> GraphSet:
    """``ZINC(folder/"ZINC", subset=True)``: the benchmark's own 10,000 / 1,000 / 1,000."""
    args = {"subset": True}
    with _opened("ZINC", folder, "ZINC", args) as (dataset, root):
        splits = {split: dataset(str(root), **args, split=split) for split in SPLITS}
        return graph_set(splits, title="ZINC-12k", node_types=(28,), edge_types=(4,))


def benchmark(name: str, folder: Path | None) -> GraphSet:
    """``GNNBenchmarkDataset(folder, name)``: PATTERN, CLUSTER, MNIST or CIFAR10.

    Nodes of the first two have a type, which the files have as one of three or seven features.
    Those of images have colours and places, ``x`` beside ``pos``.

    Source:
        Dwivedi et al., arXiv 2003.00982.
    """
    image = name in ("MNIST", "CIFAR10")
    transform = _with_places if image else _typed
    args = {"name": name}
    with _opened("GNNBenchmarkDataset", folder, "", args) as (dataset, root):
        splits = {
            split: dataset(str(root), **args, split=split, transform=transform) for split in SPLITS
        }
        if image:
            return graph_set(splits, title=name)
        types = (3,) if name == "PATTERN" else (7,)
        return graph_set(splits, y_per="node", title=name, node_types=types)


def long_range(name: str, folder: Path | None) -> GraphSet:
    """``LRGBDataset(folder, name)``: Peptides-func, Peptides-struct or PascalVOC-SP.

    Source:
        Dwivedi et al., arXiv 2206.08164.
    """
    args = {"name": name}
    with _opened("LRGBDataset", folder, "", args) as (dataset, root):
        splits = {split: dataset(str(root), **args, split=split) for split in SPLITS}
        if name == "PascalVOC-SP":
            return graph_set(splits, y_per="node", title=name)
        return graph_set(splits, title=name, node_types=ATOMS, edge_types=BONDS)


def planetoid(name: str, folder: Path | None) -> NodeSet:
    """``Planetoid(folder, name)`` with the public split; features of a node sum to 1 or 0."""
    args = {"name": name}
    with _opened("Planetoid", folder, "", args) as (dataset, root):
        data = dataset(str(root), **args)[0]
        data.x = data.x / data.x.sum(1, keepdim=True).clamp(min=1)
        return node_set(data, title=f"{name}, public split")


def heterophilous(name: str, folder: Path | None) -> NodeSet:
    """``HeterophilousGraphDataset(folder, name)`` with its ten splits."""
    args = {"name": name}
    with _opened("HeterophilousGraphDataset", folder, "", args) as (dataset, root):
        return node_set(dataset(str(root), **args)[0], title=f"{name}, published splits")


DATASETS: dict[str, Callable[[Path | None], GraphSet | NodeSet]] = {
    "pyg:ZINC": zinc,
    **{f"pyg:{x}": partial(benchmark, x) for x in ("PATTERN", "CLUSTER", "MNIST", "CIFAR10")},
    **{
        f"pyg:{x}": partial(long_range, x)
        for x in ("Peptides-func", "Peptides-struct", "PascalVOC-SP")
    },
    **{f"pyg:{x}": partial(planetoid, x) for x in ("Cora", "CiteSeer", "PubMed")},
    **{
        f"pyg:{x}": partial(heterophilous, x)
        for x in ("Roman-empire", "Amazon-ratings", "Minesweeper", "Tolokers", "Questions")
    },
}


def _with_places(data: Any) -> Any:
    data.x = torch.cat([data.x, data.pos], 1)
    return data


def _typed(data: Any) -> Any:
    data.x = data.x.argmax(1)
    data.edge_attr = None  # ones, if any
    return data


@contextmanager
def _opened(
    kind: str, folder: Path | None, inner: str, args: dict[str, Any]
) -> Iterator[tuple[type, Path]]:
    """The class of that name, which does not download, and its root: a folder in ``folder``.

    What fails while the files are read is told as damage of them.
    """
    name = args.get("name", kind)
    if folder is None:
        raise FileNotFoundError(f"pyg:{name} needs the folder of its files: name it by --data")
    try:
        import torch_geometric.datasets
    except ImportError as error:
        raise ImportError(
            f'pyg:{name} is read by torch-geometric: pip install "fastgt[pyg]" ({error})'
        ) from None
    root = folder / inner
    call = ", ".join([repr(str(root)), *(f"{key}={value!r}" for key, value in args.items())])

    def refuse(self: Any) -> None:
        raise FileNotFoundError(
            f"the files of pyg:{name} are absent in {root}: torch_geometric.datasets.{kind}({call})"
            " downloads them"
        )

    real = getattr(torch_geometric.datasets, kind)
    try:
        yield type(kind, (real,), {"download": refuse}), root
    except FileNotFoundError:
        raise
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"a file of pyg:{name} in {root} is damaged: {reason}") from error


_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
)

"""Data sets of OGB, from the files that it downloads. Its package is not needed to read them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgt.datasets import archive
from fastgt.datasets.graph_set import GraphSet
from fastgt.datasets.molhiv import ATOMS, BONDS
from fastgt.datasets.node_graphs import undirected
from fastgt.datasets.node_set import NodeSet

SPLITS = {"train": "train", "val": "valid", "test": "test"}


def molhiv(folder: Path | None) -> GraphSet:
    """ogbg-molhiv of ``folder/ogbg_molhiv`` by its scaffold split; each bond stands both ways.

    Source:
        Hu et al., arXiv 2005.00687.
    """
    files = _Files("ogbg-molhiv", folder, "graphproppred.PygGraphPropPredDataset")
    nodes, edges = (files.read(f"raw/num-{x}-list", np.int64)[:, 0] for x in ("node", "edge"))
    with archive.checking(str(files.root)):
        ends = files.read("raw/edge", np.int64).T
        y = files.read("raw/graph-label", np.int64)[:, 0]
        return GraphSet(
            _types("node-feat", files.read("raw/node-feat", np.int64), ATOMS),
            _types("edge-feat", files.read("raw/edge-feat", np.int64), BONDS).repeat_interleave(
                2, 0
            ),
            torch.stack([ends, ends.flip(0)], 2).flatten(1),
            archive.ptr(nodes),
            archive.ptr(2 * edges),
            y,
            {
                split: files.read(f"split/scaffold/{name}", np.int64)[:, 0]
                for split, name in SPLITS.items()
            },
            title="ogbg-molhiv",
            classes=2,
            node_types=ATOMS,
            edge_types=BONDS,
        )


def arxiv(folder: Path | None) -> NodeSet:
    """ogbn-arxiv of ``folder/ogbn_arxiv`` by its split in time; each citation stands both ways.

    Source:
        Hu et al., arXiv 2005.00687.
    """
    files = _Files("ogbn-arxiv", folder, "nodeproppred.PygNodePropPredDataset")
    with archive.checking(str(files.root)):
        y = files.read("raw/node-label", np.int64)[:, 0]
        split = {}
        for name, stored in SPLITS.items():
            chosen = files.read(f"split/time/{stored}", np.int64)[:, 0]
            if not 0 <= int(chosen.min()) <= int(chosen.max()) < len(y):
                raise ValueError(f"split {stored} has nodes beyond 0 to {len(y) - 1}")
            split[name] = torch.zeros(len(y), dtype=torch.bool).index_fill(0, chosen, True)
        return NodeSet(
            undirected(files.read("raw/edge", np.int64).T.numpy(), len(y)),
            files.read("raw/node-feat", np.float32),
            None,
            y,
            [split],
            title="ogbn-arxiv",
            classes=40,
        )


DATASETS: dict[str, Callable[[Path | None], GraphSet | NodeSet]] = {
    "ogb:ogbg-molhiv": molhiv,
    "ogb:ogbn-arxiv": arxiv,
}


class _Files:
    """Tables of a data set, which are compressed text."""

    def __init__(self, name: str, folder: Path | None, loader: str):
        if folder is None:
            raise FileNotFoundError(f"ogb:{name} needs the folder of its files: name it by --data")
        self.root = folder / name.replace("-", "_")
        self.hint = f"ogb.{loader}({name!r}, root={str(folder)!r}) downloads it (pip install ogb)"

    def read(self, stem: str, dtype: type) -> Tensor:
        """``[rows, columns]``."""
        path = self.root / f"{stem}.csv.gz"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is absent: {self.hint}")
        try:
            table: np.ndarray = np.loadtxt(path, dtype=dtype, delimiter=",", ndmin=2)
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path.name} cannot be read: {error}") from error
        if not table.size:
            raise ValueError(f"{path.name} is empty")
        return torch.from_numpy(table)


def _types(name: str, x: Tensor, kinds: tuple[int, ...]) -> Tensor:
    if x.shape[1] != len(kinds):
        raise ValueError(f"{name} must have {len(kinds)} columns, got {x.shape[1]}")
    if ((x < 0) | (x >= torch.tensor(kinds))).any():
        raise ValueError(f"{name} has types beyond those of OGB, {kinds}")
    return x

"""ZINC's molecules, whose penalised logP is predicted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgt.datasets import archive
from fastgt.datasets.graph_set import GraphSet

ATOM_TYPES, BOND_TYPES = 28, 4
SPLITS = ("train", "val", "test")
_ARRAYS = ("atom", "bond", "edge_local", "node_ptr", "edge_ptr", "y")


def zinc12k(folder: Path | None = None) -> GraphSet:
    """ZINC-12k with 10,000 / 1,000 / 1,000 molecules, of ``zinc12k.npz``.

    Nodes have one of 28 types and edges one of 4; each bond stands both ways. ``y`` is float32.
    The file has, of each split, its atoms, bonds, edges within a molecule, boundaries and targets.

    Args:
        folder: That of the file, or the file. None: where
            :func:`fastgt.real_graphs.open_data` finds it.

    Raises:
        FileNotFoundError: It is absent.
        ValueError: It is damaged; says how.

    Source:
        Dwivedi et al., arXiv 2003.00982.
    """
    keys = {split: [f"{split}_{name}" for name in _ARRAYS] for split in SPLITS}
    name, arrays = archive.read(
        folder, "zinc12k", [key for split in keys.values() for key in split]
    )
    with archive.checking(name):
        parts = [_molecules(arrays, split) for split in SPLITS]
    atom, bond, edge_index, nodes, edges, y = (
        torch.cat(some, -1) for some in zip(*parts, strict=True)
    )
    sizes = [len(part[-1]) for part in parts]
    return GraphSet(
        atom,
        bond,
        edge_index,
        archive.ptr(nodes),
        archive.ptr(edges),
        y,
        dict(zip(SPLITS, torch.arange(len(y)).split(sizes), strict=True)),
        # val and test are the benchmark's own molecules
        title="ZINC-12k, substitute train",
        node_types=(ATOM_TYPES,),
        edge_types=(BOND_TYPES,),
    )


def _molecules(arrays: Mapping[str, np.ndarray], split: str) -> tuple[Tensor, ...]:
    """-> atoms, bonds, edges, how many of them each molecule has, and targets of a split.

    The arrays fit each other, or a ValueError says which does not.
    """
    for key in _ARRAYS:
        name = f"{split}_{key}"
        kinds = "f" if key == "y" else "iu"
        archive.check_array(name, arrays[name], 2 if key == "edge_local" else 1, kinds)
    *integers, y = (arrays[f"{split}_{key}"] for key in _ARRAYS)
    atom, bond, local, node_ptr, edge_ptr = (torch.from_numpy(x.astype(np.int64)) for x in integers)
    if not len(y) or not np.isfinite(y).all():
        raise ValueError(f"{split}_y must be finite numbers, and some")
    archive.check_ptr(f"{split}_node_ptr", node_ptr, len(y), len(atom))
    archive.check_ptr(f"{split}_edge_ptr", edge_ptr, len(y), len(bond))
    if tuple(local.shape) != (2, len(bond)):
        raise ValueError(f"{split}_edge_local must be [2, {len(bond)}], got {list(local.shape)}")
    size = node_ptr.diff().repeat_interleave(edge_ptr.diff())
    for name, x, limit in (
        ("atom", atom, torch.tensor(ATOM_TYPES)),
        ("bond", bond, torch.tensor(BOND_TYPES)),
        ("edge_local", local, size),
    ):
        if ((x < 0) | (x >= limit)).any():
            what = "its molecule" if name == "edge_local" else f"0 to {int(limit) - 1}"
            raise ValueError(f"{split}_{name} has values beyond {what}")
    y32 = torch.from_numpy(y.astype(np.float32))
    return atom, bond, local, node_ptr.diff(), edge_ptr.diff(), y32

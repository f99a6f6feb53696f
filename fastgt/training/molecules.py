"""ZINC's molecules: reading them, and cutting batches out of flat arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgt.datasets import archive
from fastgt.datasets.graph_set import owned
from fastgt.encodings import laplacian_pe
from fastgt.graph import Graph

ATOM_TYPES, BOND_TYPES = 28, 4
SPLITS = ("train", "val", "test")


class Batch(NamedTuple):
    """Molecules as one graph: what the model takes, and what it should find."""

    node_type: Tensor  # [N]
    edge_type: Tensor  # [E]
    graph: Graph
    pe: Tensor | None  # [N, k]
    y: Tensor  # [G]

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(None if x is None else x.to(device) for x in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Molecules:
    """Molecule after molecule in flat arrays.

    Attributes:
        atom, bond: ``[N]``, ``[E]`` int64 types.
        edge_index: ``[2, E]`` int64, source above target, numbered within each molecule.
        node_ptr, edge_ptr: ``[G + 1]`` int64; molecule g owns the atoms
            ``node_ptr[g]:node_ptr[g + 1]`` and likewise its bonds, each in both directions.
        y: ``[G]`` float32.
        pe: ``[N, k]`` float32, or None.

    Example:
        >>> import torch
        >>> from fastgt.training.molecules import Molecules
        >>> two = Molecules(
        ...     atom=torch.tensor([0, 1, 5]),
        ...     bond=torch.tensor([1, 1]),
        ...     edge_index=torch.tensor([[0, 1], [1, 0]]),
        ...     node_ptr=torch.tensor([0, 1, 3]),
        ...     edge_ptr=torch.tensor([0, 0, 2]),
        ...     y=torch.tensor([0.5, 2.0]),
        ... )
        >>> two.batch(torch.tensor([1, 0, 1])).node_type.tolist()
        [1, 5, 0, 1, 5]
    """

    atom: Tensor
    bond: Tensor
    edge_index: Tensor
    node_ptr: Tensor
    edge_ptr: Tensor
    y: Tensor
    pe: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, molecules: Tensor) -> Batch:
        """Those molecules, ``[B]`` integers, in that order; any may occur more than once."""
        node, graph_ptr = owned(self.node_ptr, molecules)
        edge, edge_ptr = owned(self.edge_ptr, molecules)
        shift = graph_ptr[:-1].repeat_interleave(edge_ptr.diff())
        return Batch(
            self.atom[node],
            self.bond[edge],
            Graph.from_edge_index(self.edge_index[:, edge] + shift, len(node), graph_ptr=graph_ptr),
            None if self.pe is None else self.pe[node],
            self.y[molecules],
        )

    def first(self, count: int) -> Molecules:
        """The first ``count`` molecules, or all where there are no more."""
        count = min(count, len(self))
        nodes, edges = int(self.node_ptr[count]), int(self.edge_ptr[count])
        return Molecules(
            self.atom[:nodes],
            self.bond[:edges],
            self.edge_index[:, :edges],
            self.node_ptr[: count + 1],
            self.edge_ptr[: count + 1],
            self.y[:count],
            None if self.pe is None else self.pe[:nodes],
        )

    def with_laplacian_pe(self, k: int) -> Molecules:
        pe = laplacian_pe(self.batch(torch.arange(len(self))).graph, k)
        assert isinstance(pe, Tensor)  # no eigenvalues were asked for
        return replace(self, pe=pe)


def load_zinc(path: Path | None) -> tuple[dict[str, Molecules], str]:
    """-> the splits, and a digest of them.

    Args:
        path: ``zinc12k.npz``, or the folder that holds it. None: where
            :func:`fastgt.real_graphs.open_data` finds it.

    Raises:
        FileNotFoundError: It is absent.
        ValueError: It is damaged; says how.
    """
    name, arrays = archive.read(path, "zinc12k", [key for split in SPLITS for key in _keys(split)])
    with archive.checking(name):
        return {split: _molecules(arrays, split) for split in SPLITS}, archive.digest(arrays)


_ARRAYS = ("atom", "bond", "edge_local", "node_ptr", "edge_ptr", "y")


def _keys(split: str) -> list[str]:
    return [f"{split}_{name}" for name in _ARRAYS]


def _molecules(arrays: Mapping[str, np.ndarray], split: str) -> Molecules:
    """The arrays fit each other, or a ValueError says which does not."""
    for key in _keys(split):
        kinds = "f" if key.endswith("_y") else "iu"
        archive.check_array(key, arrays[key], 2 if key.endswith("edge_local") else 1, kinds)
    *integers, y = (arrays[key] for key in _keys(split))
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
    return Molecules(atom, bond, local, node_ptr, edge_ptr, torch.from_numpy(y.astype(np.float32)))

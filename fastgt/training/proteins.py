"""D&D's proteins: reading them, splitting them, and cutting batches out of flat arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgt.datasets import archive
from fastgt.datasets.graph_set import owned
from fastgt.graph import Graph

NODE_TYPES, CLASSES = 89, 2
SPLIT_SEED = 0  # of the split alone: runs of all seeds train on the same proteins


class Batch(NamedTuple):
    """Proteins as one graph: what the model takes, and what it should find."""

    node_type: Tensor  # [N]
    graph: Graph
    y: Tensor  # [G]

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.node_type.to(device), self.graph.to(device), self.y.to(device))


@dataclass(frozen=True)
class Proteins:
    """Protein after protein in flat arrays.

    Attributes:
        node_type: ``[N]`` int64, kinds of amino acids.
        edge_index: ``[2, E]`` int64, source above target, numbered within each protein.
        node_ptr, edge_ptr: ``[G + 1]`` int64; protein g owns the nodes
            ``node_ptr[g]:node_ptr[g + 1]`` and likewise its edges, each in both directions.
        y: ``[G]`` int64, 0 or 1.

    Example:
        >>> import torch
        >>> from fastgt.training.proteins import Proteins
        >>> two = Proteins(
        ...     node_type=torch.tensor([0, 1, 5]),
        ...     edge_index=torch.tensor([[0, 1], [1, 0]]),
        ...     node_ptr=torch.tensor([0, 1, 3]),
        ...     edge_ptr=torch.tensor([0, 0, 2]),
        ...     y=torch.tensor([0, 1]),
        ... )
        >>> two.batch(torch.tensor([1, 0, 1])).node_type.tolist()
        [1, 5, 0, 1, 5]
    """

    node_type: Tensor
    edge_index: Tensor
    node_ptr: Tensor
    edge_ptr: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, proteins: Tensor) -> Batch:
        """Those proteins, ``[B]`` integers, in that order; any may occur more than once."""
        node, graph_ptr = owned(self.node_ptr, proteins)
        edge, edge_ptr = owned(self.edge_ptr, proteins)
        shift = graph_ptr[:-1].repeat_interleave(edge_ptr.diff())
        return Batch(
            self.node_type[node],
            Graph.from_edge_index(self.edge_index[:, edge] + shift, len(node), graph_ptr=graph_ptr),
            self.y[proteins],
        )

    def splits(self) -> dict[str, Tensor]:
        """The numbers of the proteins to train on, 8 of 10, to validate and to test on, 1 of 10."""
        # the file has one class after the other
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(SPLIT_SEED))
        tenth = len(self) // 10
        train, val, test = order.split([len(self) - 2 * tenth, tenth, tenth])
        return {"train": train, "val": val, "test": test}


def load_dd(path: Path | None) -> tuple[Proteins, str]:
    """-> the proteins, and a digest of them.

    Args:
        path: ``dd.npz``, or the folder that holds it. None: where
            :func:`fastgt.real_graphs.open_data` finds it.

    Raises:
        FileNotFoundError: It is absent.
        ValueError: It is damaged; says how.
    """
    name, arrays = archive.read(path, "dd", ("node_label", "edge_index", "node_ptr", "y"))
    with archive.checking(name):
        return _proteins(arrays), archive.digest(arrays)


def _proteins(arrays: Mapping[str, np.ndarray]) -> Proteins:
    """The arrays fit each other, or a ValueError says which does not."""
    for key, array in arrays.items():
        archive.check_array(key, array, 2 if key == "edge_index" else 1, "iu")
    label, edge_index, node_ptr, y = (torch.from_numpy(x.astype(np.int64)) for x in arrays.values())
    if len(y) < 10:
        raise ValueError(f"y must have a protein for each tenth, at least 10, got {len(y)}")
    archive.check_ptr("node_ptr", node_ptr, len(y), len(label))
    if len(edge_index) != 2:
        raise ValueError(f"edge_index must be [2, E], got {list(edge_index.shape)}")
    for name, x, low, high in (
        ("node_label", label, 1, NODE_TYPES),
        ("y", y, 1, CLASSES),
        ("edge_index", edge_index, 0, len(label) - 1),
    ):
        if ((x < low) | (x > high)).any():
            raise ValueError(f"{name} has values beyond {low} to {high}")
    source, target = torch.bucketize(edge_index, node_ptr[1:], right=True)
    if (source != target).any():
        raise ValueError("edge_index has edges from one protein to another")
    if (target.diff() < 0).any():
        raise ValueError("edge_index must have its edges protein by protein")
    if (node_ptr.diff() == 0).any():
        raise ValueError(f"protein {int((node_ptr.diff() == 0).nonzero()[0])} has no nodes")
    edge_ptr = torch.searchsorted(target, torch.arange(len(y) + 1))
    return Proteins(label - 1, edge_index - node_ptr[target], node_ptr, edge_ptr, y - 1)

"""D&D's proteins, of which enzymes are told from others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fastgt.datasets import archive
from fastgt.datasets.graph_set import GraphSet

NODE_TYPES, CLASSES = 89, 2
SPLIT_SEED = 0  # of the split alone: runs of all seeds train on the same proteins


def dd(folder: Path | None = None) -> GraphSet:
    """D&D's 1,178 proteins, of ``dd.npz``: 8 of 10 to train on, 1 to validate and 1 to test on.

    Nodes have one of 89 types, each edge stands both ways. The splits are random, and always the
    same.

    Args:
        folder: That of the file, or the file. None: where
            :func:`fastgt.real_graphs.open_data` finds it.

    Raises:
        FileNotFoundError: It is absent.
        ValueError: It is damaged; says how.

    Source:
        Dobson and Doig, J. Mol. Biol. 330, 2003, as in Morris et al., arXiv 2007.08663.
    """
    keys = ("node_label", "edge_index", "node_ptr", "y")
    name, arrays = archive.read(folder, "dd", keys)
    with archive.checking(name):
        return _proteins(arrays)


def _proteins(arrays: Mapping[str, np.ndarray]) -> GraphSet:
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
    # the file has one class after the other
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(SPLIT_SEED))
    tenth = len(y) // 10
    train, val, test = order.split([len(y) - 2 * tenth, tenth, tenth])
    return GraphSet(
        label - 1,
        None,
        edge_index - node_ptr[target],
        node_ptr,
        torch.searchsorted(target, torch.arange(len(y) + 1)),
        y - 1,
        {"train": train, "val": val, "test": test},
        title="D&D, one random split",
        classes=CLASSES,
        node_types=(NODE_TYPES,),
    )

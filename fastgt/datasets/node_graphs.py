"""Single graphs whose nodes are classified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastgt.datasets import archive
from fastgt.datasets.node_set import NodeSet
from fastgt.graph import Graph

SPLITS = ("train", "val", "test")
RANDOM_SPLITS = 10
_BAG = ("x_indptr", "x_indices", "x_shape")


def citations(
    stem: str,
    title: str,
    classes: int,
    folder: Path | None,
    *,
    splits: Literal["public", "drawn", "sgformer"] = "public",
) -> NodeSet:
    """Cora or CiteSeer with the public split, of ``stem.npz``.

    ``"drawn"``: in its place ten random splits of the same sizes, 20 nodes of each class to train
    on, 500 and 1,000. They are always the same. ``"sgformer"``: one such split, that of SGFormer's
    authors.

    Each citation stands both ways, once, and no node has a loop, as in PyG's ``Planetoid``. Words
    are divided by their number, so that a node's features sum to 1 or 0, as in the experiments on
    this split.

    Source:
        Yang et al., arXiv 1603.08861; Kipf and Welling, arXiv 1609.02907.
    """
    keys = ("edge_index", "y", "split_public", *_BAG)
    name, arrays = archive.read(folder, stem, keys)
    with archive.checking(name):
        y = _classes("y", arrays["y"], classes)
        graph = undirected(arrays["edge_index"], len(y), loops=False)
        words = _bag(arrays, len(y))
        split = _integers("split_public", arrays["split_public"], len(y), -1, 2)
        if splits == "public":
            masks, told = [{x: split == i for i, x in enumerate(SPLITS)}], "public split"
        elif splits == "drawn":
            masks = class_splits(y, 20, 500, 1000, RANDOM_SPLITS)
            told = "ten random splits of 20 a class"
        else:
            masks, told = [sgformer_split(y, 20, 500, 1000)], "SGFormer's split"
        return NodeSet(
            graph,
            words / words.sum(1, keepdim=True).clamp(min=1),
            None,
            y,
            masks,
            title=f"{title}, {told}",
            classes=classes,
        )


def amazon_computers(folder: Path | None = None) -> NodeSet:
    """Amazon's computers, of ``amazon_computers.npz``, with ten random splits of 60/20/20.

    Each edge stands both ways. Features are 767 words, 0 or 1. The splits are always the same.

    Source:
        Shchur et al., arXiv 1811.05868.
    """
    name, arrays = archive.read(folder, "amazon_computers", ("edge_index", "y", *_BAG))
    with archive.checking(name):
        y = _classes("y", arrays["y"], 10)
        return NodeSet(
            undirected(arrays["edge_index"], len(y)),
            _bag(arrays, len(y)),
            None,
            y,
            random_splits(len(y), (0.6, 0.2), RANDOM_SPLITS),
            title="Amazon computers, ten random splits",
            classes=10,
        )


def heterophilous(stem: str, title: str, classes: int, folder: Path | None) -> NodeSet:
    """A graph in the layout of its authors, with their ten splits, of ``stem.npz``.

    Each edge stands both ways, once, as in their experiments.

    Source:
        Platonov et al., arXiv 2302.11640.
    """
    masks = {split: f"{split}_masks" for split in SPLITS}
    keys = ("node_features", "node_labels", "edges", *masks.values())
    name, arrays = archive.read(folder, stem, keys)
    with archive.checking(name):
        y = _classes("node_labels", arrays["node_labels"], classes)
        archive.check_array("edges", arrays["edges"], 2, "iu")
        graph = undirected(arrays["edges"].T, len(y))
        archive.check_array("node_features", arrays["node_features"], 2, "f")
        count = len(arrays["train_masks"])
        for key in masks.values():
            if arrays[key].dtype != bool or arrays[key].shape != (count, len(y)):
                found = f"{list(arrays[key].shape)} {arrays[key].dtype}"
                raise ValueError(f"{key} must be [{count}, {len(y)}] bool, got {found}")
        return NodeSet(
            graph,
            torch.from_numpy(arrays["node_features"].astype(np.float32)),
            None,
            y,
            [
                {split: torch.from_numpy(arrays[key][i]) for split, key in masks.items()}
                for i in range(count)
            ],
            title=f"{title}, published splits",
            classes=classes,
        )


def debian(folder: Path | None = None) -> NodeSet:
    """Debian's packages, of ``debian.npz``, which fastgt has with it: sections are told apart.

    Each dependency stands both ways, with one of 8 types the one way and one of 8 others back.
    Features are 2,000 words, 0 or 1.
    """
    keys = ("edge_index", "edge_type", "edge_types", "y", "classes", "split", *_BAG)
    name, arrays = archive.read(folder, "debian", keys)
    with archive.checking(name):
        classes, kinds = len(arrays["classes"]), len(arrays["edge_types"])
        y = _classes("y", arrays["y"], classes)
        edge_index = edges_of(arrays["edge_index"], len(y))
        kind = _integers("edge_type", arrays["edge_type"], edge_index.shape[1], 0, kinds - 1)
        split = _integers("split", arrays["split"], len(y), 0, 2)
        return NodeSet(
            Graph.from_edge_index(torch.cat([edge_index, edge_index.flip(0)], 1), len(y)),
            _bag(arrays, len(y)),
            torch.cat([kind, kind + kinds]),
            y,
            [{part: split == i for i, part in enumerate(SPLITS)}],
            title="Debian's packages, stored split",
            classes=classes,
            edge_types=(2 * kinds,),
        )


def undirected(edge_index: np.ndarray, nodes: int, *, loops: bool = True) -> Graph:
    """Every edge both ways, once; in the order of targets, then of sources."""
    source, target = edges_of(edge_index, nodes)
    both = torch.cat([target * nodes + source, source * nodes + target]).unique()
    source, target = both % nodes, both // nodes
    keep = slice(None) if loops else source != target
    return Graph.from_edge_index(torch.stack([source, target])[:, keep], nodes)


def random_splits(
    nodes: int, shares: tuple[float, float], count: int, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Nodes to train and to validate on by their shares, the others to test on; so many times."""
    generator = torch.Generator().manual_seed(seed)
    train, val = (round(share * nodes) for share in shares)
    splits = []
    for _ in range(count):
        order = torch.randperm(nodes, generator=generator)
        splits.append(_masks(order.split([train, val, nodes - train - val]), nodes))
    return splits


def class_splits(
    y: Tensor, each: int, val: int, test: int, count: int, seed: int = 0
) -> list[dict[str, Tensor]]:
    """``each`` nodes of every class to train on, ``val`` and ``test`` others; so many times."""
    generator = torch.Generator().manual_seed(seed)
    splits = []
    for _ in range(count):
        order = torch.randperm(len(y), generator=generator)
        order = order[y[order] >= 0]
        train = torch.cat([order[y[order] == label][:each] for label in y[y >= 0].unique()])
        others = order[~torch.isin(order, train)]
        _check_left(others, val, test)
        splits.append(_masks((train, others[:val], others[val : val + test]), len(y)))
    return splits


def sgformer_split(y: Tensor, each: int, val: int, test: int, seed: int = 123) -> dict[str, Tensor]:
    """The random split that SGFormer's authors train five times on: the first of this seed.

    Each class is shuffled, in turn, then all that is left. A node whose class is unknown counts as
    one of class 0 there, as torch-geometric has it. It is drawn with them here, and left out.

    Source:
        Wu et al., arXiv 2306.10759; the order of draws is that of their code.
    """
    generator = torch.Generator().manual_seed(seed)
    known, label = y >= 0, y.clamp(min=0)
    classes = [(label == c).nonzero()[:, 0] for c in label.unique()]
    classes = [x[torch.randperm(len(x), generator=generator)] for x in classes]
    train = torch.cat([x[:each] for x in classes])
    others = torch.cat([x[each:] for x in classes])
    _check_left(others, val, test)
    others = others[torch.randperm(len(others), generator=generator)]
    masks = _masks((train, others[:val], others[val : val + test]), len(y))
    return {name: mask & known for name, mask in masks.items()}


def _check_left(others: Tensor, val: int, test: int) -> None:
    if len(others) < val + test:
        raise ValueError(
            f"{val} and {test} nodes to validate and test on must be left, {len(others)} are"
        )


def edges_of(edge_index: np.ndarray, nodes: int) -> Tensor:
    """``[2, E]`` int64, between those nodes."""
    archive.check_array("edge_index", edge_index, 2, "iu")
    if len(edge_index) != 2:
        raise ValueError(f"edge_index must be [2, E], got {list(edge_index.shape)}")
    if edge_index.size and not 0 <= edge_index.min() <= edge_index.max() < nodes:
        found = f"{edge_index.min()} to {edge_index.max()}"
        raise ValueError(f"edge_index has nodes from {found}, there are {nodes}")
    return torch.from_numpy(edge_index.astype(np.int64))


def _masks(parts: Sequence[Tensor], nodes: int) -> dict[str, Tensor]:
    return {
        name: torch.zeros(nodes, dtype=torch.bool).index_fill(0, part, True)
        for name, part in zip(SPLITS, parts, strict=True)
    }


def _classes(name: str, y: np.ndarray, classes: int) -> Tensor:
    """Those of nodes; -1 where unknown."""
    if not y.size:
        raise ValueError(f"{name} must have a node at least")
    return _integers(name, y, len(y), -1, classes - 1)


def _integers(name: str, array: np.ndarray, count: int, low: int, high: int) -> Tensor:
    archive.check_array(name, array, 1, "iu")
    if len(array) != count:
        raise ValueError(f"{name} must be [{count}], got {list(array.shape)}")
    if ((array < low) | (array > high)).any():
        raise ValueError(f"{name} has values beyond {low} to {high}")
    return torch.from_numpy(array.astype(np.int64))


def _bag(arrays: Mapping[str, np.ndarray], nodes: int) -> Tensor:
    """``[N, F]`` float32: 1 where a node has the word."""
    indptr, indices, shape = (arrays[key] for key in _BAG)
    for key in _BAG:
        archive.check_array(key, arrays[key], 1, "iu")
    ptr = torch.from_numpy(indptr.astype(np.int64))
    archive.check_ptr("x_indptr", ptr, nodes, len(indices))
    # one file has the two the other way round
    if len(shape) != 2 or nodes not in shape:
        raise ValueError(f"x_shape must be [{nodes}, F], got {shape.tolist()}")
    words = int(shape[1] if shape[0] == nodes else shape[0])
    word = _integers("x_indices", indices, len(indices), 0, words - 1)
    found = torch.zeros(nodes, words)
    found[torch.arange(nodes).repeat_interleave(ptr.diff()), word] = 1
    return found

"""Sets made of torch-geometric's objects. It need not be installed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from fastgt.datasets import archive
from fastgt.datasets.graph_set import GraphSet
from fastgt.datasets.node_set import NodeSet
from fastgt.graph import Graph

MASKS = {"train": "train_mask", "val": "val_mask", "test": "test_mask"}


def graph_set(
    splits: Mapping[str, Iterable[Any]],
    *,
    y_per: Literal["node", "graph"] = "graph",
    title: str = "",
    node_types: Sequence[int] | None = None,
    edge_types: Sequence[int] | None = None,
) -> GraphSet:
    """Graphs of ``Data`` objects: their ``x``, ``edge_index``, ``edge_attr`` and ``y``.

    Integers in ``x`` and ``edge_attr`` are types: ``[N, 1]`` becomes ``[N]``. Other numbers are
    features: ``[E]`` becomes ``[E, 1]``. An integer ``y`` has classes, as many as its largest is,
    and one more. Nothing else of the objects is kept.

    Args:
        splits: A data set or a list of ``Data`` each for ``"train"``, ``"val"`` and ``"test"``.
        y_per: What ``y`` belongs to.
        title: Of the set.
        node_types, edge_types: How many types each column has. None: as many as are there.

    Raises:
        ValueError: A graph lacks something, or has it in another shape than the first one; says
            which graph of which split.

    Example:
        >>> import torch
        >>> from torch_geometric.data import Data
        >>> from fastgt.datasets import GraphSet
        >>> ends = torch.tensor([[0, 1], [1, 0]])
        >>> pair = Data(x=torch.tensor([[3], [1]]), edge_index=ends, y=torch.tensor([0.5]))
        >>> pairs = GraphSet.from_pyg({"train": [pair, pair], "test": [pair]})
        >>> pairs.node.tolist(), pairs.node_types
        ([3, 1, 3, 1, 3, 1], (4,))
    """
    found: dict[str, list[Tensor]] = {"x": [], "edge_attr": [], "edge_index": [], "y": []}
    counts = {}
    for split, graphs in splits.items():
        before = len(found["x"])
        for i, data in enumerate(graphs):
            _append(found, data, f"graph {i} of {split!r}", y_per)
        counts[split] = len(found["x"]) - before
    if not found["x"]:
        raise ValueError("there is no graph in the splits")
    node, kinds = _types("x", torch.cat(found["x"]), node_types)
    edge: Tensor | None = None
    edge_kinds: tuple[int, ...] = ()
    if found["edge_attr"]:
        edge, edge_kinds = _types("edge_attr", torch.cat(found["edge_attr"]), edge_types)
    y = torch.cat(found["y"])
    ends = accumulate(counts.values(), initial=0)
    return GraphSet(
        node,
        edge,
        torch.cat(found["edge_index"], 1),
        archive.ptr(torch.tensor([len(x) for x in found["x"]])),
        archive.ptr(torch.tensor([x.shape[1] for x in found["edge_index"]])),
        y,
        {
            split: torch.arange(begin, begin + count)
            for (split, count), begin in zip(counts.items(), ends, strict=False)
        },
        y_per=y_per,
        title=title,
        classes=_classes(y),
        node_types=kinds,
        edge_types=edge_kinds,
    )


def node_set(
    data: Any, *, splits: list[dict[str, Tensor]] | None = None, title: str = ""
) -> NodeSet:
    """One graph of a ``Data`` object: its ``x``, ``edge_index``, ``edge_attr`` and ``y``.

    Args:
        data: ``y`` is ``[N]`` or ``[N, 1]``; integers are classes.
        splits: Masks. None: ``train_mask``, ``val_mask`` and ``test_mask`` of ``data``, ``[N]``, or
            ``[N, S]`` for S splits.
        title: Of the set.

    Raises:
        ValueError: Something is missing or does not fit; says which.
    """
    for name in ("x", "edge_index", "y"):
        if getattr(data, name, None) is None:
            raise ValueError(f"data has no {name}")
    n = len(data.x)
    y = data.y[:, 0] if data.y.dim() == 2 and data.y.shape[1] == 1 else data.y
    edge = getattr(data, "edge_attr", None)
    kinds: tuple[int, ...] = ()
    if edge is not None:
        edge, kinds = _types("edge_attr", edge, None)
    return NodeSet(
        Graph.from_edge_index(data.edge_index, n),
        data.x.float(),
        edge,
        y,
        _masks(data) if splits is None else splits,
        title=title,
        classes=_classes(y),
        edge_types=kinds,
    )


def _append(
    found: dict[str, list[Tensor]], data: Any, name: str, y_per: Literal["node", "graph"]
) -> None:
    """Takes one graph into the lists; refuses what does not fit those before it."""
    for key in ("x", "edge_index", "y"):
        if getattr(data, key, None) is None:
            raise ValueError(f"{name} has no {key}")
    y = torch.as_tensor(data.y)
    y = y.view(1) if y.dim() == 0 else y
    wanted = len(data.x) if y_per == "node" else 1
    if len(y) != wanted:
        raise ValueError(
            f"y of {name} must have {wanted} rows with y_per={y_per!r}, got {list(y.shape)}"
        )
    if y.dim() == 2 and y.shape[1] == 1:
        y = y[:, 0]
    parts = {"x": data.x, "edge_index": data.edge_index, "y": y}
    edge = getattr(data, "edge_attr", None)
    if (edge is None) != (not found["edge_attr"]) and found["x"]:
        raise ValueError(f"{name} has {'no' if edge is None else 'an'} edge_attr unlike the first")
    if edge is not None:
        if len(edge) != data.edge_index.shape[1]:
            raise ValueError(
                f"edge_attr of {name} must have {data.edge_index.shape[1]} rows, got {len(edge)}"
            )
        parts["edge_attr"] = edge
    for key, x in parts.items():
        rest = x.shape[:1] if key == "edge_index" else x.shape[1:]
        if found[key]:
            first = found[key][0]
            like = first.shape[:1] if key == "edge_index" else first.shape[1:]
            if (rest, x.dtype) != (like, first.dtype):
                raise ValueError(
                    f"{key} of {name} is {list(x.shape)} {x.dtype}, unlike that of the first "
                    f"graph, {list(first.shape)} {first.dtype}"
                )
        found[key].append(x)


def _types(name: str, x: Tensor, known: Sequence[int] | None) -> tuple[Tensor, tuple[int, ...]]:
    """-> types or features of nodes or edges, and how many types each column has."""
    if x.is_floating_point():
        if known is not None:
            raise ValueError(f"{name} must hold integers, which are types, got {x.dtype}")
        return x.view(-1, 1) if x.dim() == 1 else x, ()
    x = x.long()
    table = x.view(len(x), -1)
    count = table.amax(0) + 1 if len(x) else table.new_ones(table.shape[1])
    kinds = tuple(count.tolist()) if known is None else tuple(known)
    if len(kinds) != len(count):
        raise ValueError(f"{name} must have {len(kinds)} columns of types, got {len(count)}")
    for i, (have, most) in enumerate(zip(count.tolist(), kinds, strict=True)):
        if have > most or (len(x) and int(table[:, i].min()) < 0):
            raise ValueError(f"{name} has types beyond 0 to {most - 1} in column {i}")
    return table[:, 0] if len(kinds) == 1 else x, kinds


def _classes(y: Tensor) -> int:
    return 0 if y.is_floating_point() or y.dim() > 1 or not len(y) else int(y.max()) + 1


def _masks(data: Any) -> list[dict[str, Tensor]]:
    masks = {}
    for split, name in MASKS.items():
        mask = getattr(data, name, None)
        if mask is None:
            raise ValueError(f"data has no {name}: give the splits")
        masks[split] = mask.view(len(mask), -1)
    counts = {mask.shape[1] for mask in masks.values()}
    if len(counts) > 1:
        raise ValueError(f"train_mask, val_mask and test_mask have {sorted(counts)} splits")
    return [
        {split: mask[:, i].contiguous() for split, mask in masks.items()}
        for i in range(counts.pop())
    ]

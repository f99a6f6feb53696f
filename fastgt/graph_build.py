"""What a Graph is built from: indices and sizes that are checked, boundaries in PyG's objects, and
tensors that may be kept."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_index(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {x.layout}")
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name} must hold integers (uint8 or int8 to int64), got {x.dtype}")


def check_ptr(x: Tensor, name: str, size: str) -> None:
    check_index(x, name)
    if x.ndim != 1 or x.shape[0] == 0:
        raise ValueError(f"{name} must be [{size}], got {list(x.shape)}")


def size_of(n: Any, name: str) -> int:
    """A size as a Python int; NumPy's integers are taken too."""
    try:
        if isinstance(n, bool):
            raise TypeError
        size = operator.index(n)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(n).__name__}") from None
    if size < 0:
        raise ValueError(f"{name} must not be negative, got {size}")
    if size > torch.iinfo(torch.int64).max:
        raise ValueError(f"{name} must fit in int64, got {size}")
    return size


def check_range(index: Tensor, size: int, name: str, of: str) -> None:
    if not index.numel():
        return
    low, high = (int(x) for x in torch.aminmax(index))
    if low < 0:
        raise ValueError(f"{name} has index {low}; indices must not be negative")
    if high >= size:
        raise ValueError(f"{name} has index {high} but the graph has {size} {of}")


def check_values(x: Tensor, name: str) -> None:
    """Refuse a tensor that holds none."""
    if x.is_meta:
        raise RuntimeError(
            f"{name} is on the meta device and holds no values, which a graph is built from: build "
            "it on another device, then move it with graph.to('meta')"
        )


class Sides(NamedTuple):
    """Rows and columns of a graph, and where the graphs of a batch begin in both, if it is one."""

    rows: int
    cols: int
    row_ptr: Tensor | None  # [G + 1]
    col_ptr: Tensor | None  # [G + 1]


def sides_of_pyg(data: Any) -> Sides:
    """Of a ``Data``, a ``Batch`` or ``data[relation]`` of a ``HeteroData``.

    Boundaries are ``ptr``, else they come from a sorted ``batch``. The last graphs of a ``batch``
    may have no nodes: as many as PyG says in ``num_graphs`` or ``batch_size`` are there.

    Raises:
        TypeError: ``batch`` does not hold integers.
        ValueError: ``batch`` does not fit or is not sorted, or a number of nodes is not known.
    """
    key = getattr(data, "_key", None)
    if not isinstance(key, tuple):
        n = data.num_nodes
        ptr = _boundaries(data, "data", n, _graphs(data, "data", n))
        return Sides(n, n, ptr, ptr)
    parent = data._parent()
    if parent is None:
        raise ValueError(f"the HeteroData of {key} is gone: keep it until its graph is made")
    source, target = parent[key[0]], parent[key[-1]]
    names = [f"data[{kind!r}]" for kind in (key[0], key[-1])]
    sizes = []
    for nodes, name in zip((source, target), names, strict=True):
        size = nodes.num_nodes
        if size is None:
            raise ValueError(f"the number of nodes of {name} is not known: set {name}.num_nodes")
        sizes.append(size)
    counts = [_graphs(x, *of) for x, *of in zip((source, target), names, sizes, strict=True)]
    if (counts[0] is None) != (counts[1] is None):
        one, other = names if counts[0] is None else names[::-1]
        raise ValueError(f"{one} has neither ptr nor batch, but {other} has: both need one")
    # the last graphs may have nodes of one type only
    count = max((x for x in (*counts, getattr(parent, "_num_graphs", None)) if x), default=0)
    ends = [
        None if own is None else _boundaries(x, name, size, count)
        for x, name, size, own in zip((source, target), names, sizes, counts, strict=True)
    ]
    if source is target:
        ends[1] = ends[0]
    return Sides(sizes[1], sizes[0], ends[1], ends[0])


def _graphs(nodes: Any, name: str, size: int) -> int | None:
    """How many graphs the nodes belong to; None where nothing says so."""
    ptr, batch = getattr(nodes, "ptr", None), getattr(nodes, "batch", None)
    if ptr is not None:
        return len(ptr) - 1
    if batch is None:
        return None
    if not isinstance(batch, Tensor) or batch.dtype not in INTEGERS:
        kind = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(f"{name}.batch must be a tensor of integers, got {kind}")
    if batch.shape != (size,):
        raise ValueError(
            f"{name}.batch must be [{size}], one entry a node, got {list(batch.shape)}"
        )
    down = batch[1:] < batch[:-1]
    if bool(down.any()):
        i = int(down.nonzero()[0])
        raise ValueError(
            f"{name}.batch is not sorted: node {i} is of graph {int(batch[i])}, node {i + 1} of "
            f"graph {int(batch[i + 1])}; order the nodes first, as with "
            "data.subgraph(data.batch.argsort(stable=True))"
        )
    if size and int(batch[0]) < 0:
        raise ValueError(f"{name}.batch has graph {int(batch[0])}; it must not be negative")
    highest = int(batch[-1]) + 1 if size else 0
    # PyG counts the graphs of a Batch by the largest of batch, which an empty one does not have
    known = ("num_graphs", "batch_size") if size else ("_num_graphs",)
    for attribute in known:
        found = getattr(nodes, attribute, None)
        if found is not None and found < highest:
            raise ValueError(
                f"{name}.batch has graph {highest - 1} but {name}.{attribute} is {found}"
            )
        highest = max(highest, found or 0)
    return highest


def _boundaries(nodes: Any, name: str, size: int, count: int | None) -> Tensor | None:
    ptr = getattr(nodes, "ptr", None)
    if ptr is not None or count is None:
        return ptr
    graphs = torch.arange(count + 1, device=nodes.batch.device)
    return torch.searchsorted(nodes.batch.long(), graphs)


def normal(x: Tensor) -> Tensor:
    """``x``; where it is an inference tensor, a copy that autograd may save for a backward.

    What is made under ``torch.inference_mode()``, and kept, is trained with afterwards.
    """
    # Dynamo does not trace the question
    if torch.compiler.is_compiling() or not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()

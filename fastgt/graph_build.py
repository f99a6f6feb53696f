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


def check_device(x: Tensor, name: str, edge_index: Tensor) -> None:
    if x.device != edge_index.device:
        raise ValueError(f"{name} is on {x.device}, edge_index on {edge_index.device}")


def check_boundaries(ptr: Tensor, name: str, total: int, of: str) -> None:
    first, last, down = int(ptr[0]), int(ptr[-1]), ptr[1:] < ptr[:-1]  # a difference may wrap
    if first != 0:
        raise ValueError(f"{name} must start at 0, got {first}")
    if bool(down.any()):
        i = int(down.nonzero()[0])
        raise ValueError(f"{name} decreases from {int(ptr[i])} to {int(ptr[i + 1])} at {i + 1}")
    if last != total:
        raise ValueError(f"{name} ends at {last} but there are {total} {of}")


class Sides(NamedTuple):
    """Rows and columns of a graph, and where the graphs of a batch begin in both, if it is one."""

    rows: int
    cols: int
    row_ptr: Tensor | None  # [G + 1]
    col_ptr: Tensor | None  # [G + 1]


def sides_of_pyg(data: Any) -> Sides:
    """Of a ``Data``, a ``Batch`` or ``data[relation]`` of a ``HeteroData``.

    Boundaries come from a sorted ``batch``, else they are ``ptr``: PyG's ``Batch.subgraph`` leaves
    the ``ptr`` of the batch before it. The last graphs of a ``batch`` may have no nodes: as many as
    ``ptr`` has, else as PyG says in ``num_graphs`` or ``batch_size``, are there.

    Raises:
        TypeError: ``batch`` or ``ptr`` does not hold integers.
        ValueError: ``batch`` or ``ptr`` does not fit, is not sorted or is not where ``edge_index``
            is; or a number of nodes is not known.
    """
    edges = data.edge_index
    key = getattr(data, "_key", None)
    if not isinstance(key, tuple):
        n = data.num_nodes
        ptr = _boundaries(data, "data", n, _graphs(data, "data", n, edges))
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
    of_source = _graphs(source, names[0], sizes[0], edges)
    of_target = of_source if source is target else _graphs(target, names[1], sizes[1], edges)
    if (of_source is None) != (of_target is None):
        one, other = names if of_source is None else names[::-1]
        raise ValueError(f"{one} has neither ptr nor batch, but {other} has: both need one")
    # the last graphs may have nodes of one type only
    known = of_source, of_target, getattr(parent, "_num_graphs", None)
    count = None if of_source is None else max(x or 0 for x in known)
    col_ptr = _boundaries(source, names[0], sizes[0], count)
    row_ptr = col_ptr
    if source is not target:
        row_ptr = _boundaries(target, names[1], sizes[1], count)
    return Sides(sizes[1], sizes[0], row_ptr, col_ptr)


def _graphs(nodes: Any, name: str, size: int, edges: Tensor) -> int | None:
    """How many graphs the nodes belong to; None where nothing says so."""
    ptr, batch = getattr(nodes, "ptr", None), getattr(nodes, "batch", None)
    if ptr is not None:
        check_ptr(ptr, f"{name}.ptr", "G + 1")
        check_device(ptr, f"{name}.ptr", edges)
    if batch is None:
        return None if ptr is None else len(ptr) - 1
    if not isinstance(batch, Tensor) or batch.dtype not in INTEGERS:
        kind = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(f"{name}.batch must be a tensor of integers, got {kind}")
    check_device(batch, f"{name}.batch", edges)
    if batch.shape != (size,):
        raise ValueError(
            f"{name}.batch must be [{size}], one entry a node, got {list(batch.shape)}"
        )
    highest = _highest(batch, name) + 1
    # PyG counts the graphs of a Batch by the largest of batch, which an empty one does not have
    known = ("num_graphs", "batch_size") if size else ("_num_graphs",)
    counts = {x: getattr(nodes, x, None) for x in known} if ptr is None else {"ptr": len(ptr) - 1}
    for attribute, found in counts.items():
        if found is not None and found < highest:
            said = "the number of graphs in " if attribute == "ptr" else ""
            raise ValueError(
                f"{name}.batch has graph {highest - 1} but {said}{name}.{attribute} is {found}"
            )
        highest = max(highest, found or 0)
    return highest


def _highest(batch: Tensor, name: str) -> int:
    """The last graph of a sorted ``batch``; -1 where there are no nodes."""
    if not batch.numel():
        return -1
    down = batch[1:] < batch[:-1]
    # together: a GPU is waited for once
    unsorted, first, last = torch.stack(
        [down.any().long(), batch[0].long(), batch[-1].long()]
    ).tolist()
    if unsorted:
        i = int(down.nonzero()[0])
        raise ValueError(
            f"{name}.batch is not sorted: node {i} is of graph {int(batch[i])}, node {i + 1} of "
            f"graph {int(batch[i + 1])}; order the nodes first, as with "
            "data.subgraph(data.batch.argsort(stable=True))"
        )
    if first < 0:
        raise ValueError(f"{name}.batch has graph {first}; it must not be negative")
    return last


def _boundaries(nodes: Any, name: str, size: int, count: int | None) -> Tensor | None:
    if count is None:
        return None
    batch = getattr(nodes, "batch", None)
    if batch is None:
        check_boundaries(nodes.ptr, f"{name}.ptr", size, "nodes")
        return nodes.ptr
    graphs = torch.arange(count + 1, device=batch.device)
    return torch.searchsorted(batch.long(), graphs)


def normal(x: Tensor) -> Tensor:
    """``x``; where it is an inference tensor, a copy that autograd may save for a backward.

    What is made under ``torch.inference_mode()``, and kept, is trained with afterwards. While
    somebody compiles, ``x`` itself: what compiled code returns there are inference tensors.
    """
    # Dynamo does not trace the question, and AOTAutograd drops a change of the mode
    if torch.compiler.is_compiling() or not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()

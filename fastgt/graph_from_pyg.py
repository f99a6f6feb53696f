"""How a Graph is built from PyG's objects: their sizes, and where the graphs of a batch begin."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastgt.graph_adjacency import Edges, read_edges
from fastgt.graph_build import (
    INTEGERS,
    Structure,
    check_boundaries,
    check_device,
    check_ptr,
    from_edge_index,
    with_boundaries,
)
from fastgt.graph_hetero import Types, joined_relations


def from_pyg(data: Any) -> tuple[Structure, Types | None]:
    """Of a ``Data``, a ``Batch``, a ``HeteroData`` or ``data[relation]`` of one."""
    if hasattr(data, "edge_types") and hasattr(data, "node_types"):
        return _from_hetero(data)
    edges = edges_of(data, "data")
    sides = _sides(data, edges)
    graph = edges.graph
    if graph is None:
        graph = from_edge_index(edges.index, (sides.rows, sides.cols), None)
    if sides.row_ptr is None or sides.col_ptr is None:
        return graph, None
    return with_boundaries(graph, sides.row_ptr, sides.col_ptr), None


def _from_hetero(data: Any) -> tuple[Structure, Types]:
    """All relations of a ``HeteroData``, with columns of their own."""
    if not data.edge_types:
        raise ValueError("data must have a relation, got a HeteroData without one")
    edges = {key: edges_of(data[key], f"data[{key!r}]") for key in data.edge_types}
    kinds = {key[side] for key in edges for side in (0, 2)}
    sizes = {kind: _inferred(data[kind]) for kind in data.node_types if kind in kinds}
    known = {kind: n for kind, n in sizes.items() if n is not None}
    return joined_relations(edges, known, "relations", "set data[{!r}].num_nodes")


def edges_of(data: Any, name: str) -> Edges:
    """The ``edge_index`` of ``data``, else its ``adj_t``."""
    of, found = "edge_index", getattr(data, "edge_index", None)
    if found is None:
        of, found = "adj_t", getattr(data, "adj_t", None)
    if found is None:
        raise TypeError(
            f"{name} must have an edge_index or an adj_t, got {type(data).__name__} without one: "
            "use from_edge_index or from_csr"
        )
    name = of if name == "data" else f"{name}.{of}"
    return read_edges(found, name, matrix=of == "adj_t")


class _Sides(NamedTuple):
    """Rows and columns of a graph, and where the graphs of a batch begin in both, if it is one."""

    rows: int
    cols: int
    row_ptr: Tensor | None  # [G + 1]
    col_ptr: Tensor | None  # [G + 1]


def _sides(data: Any, edges: Edges) -> _Sides:
    """Sizes and boundaries of a ``Data``, a ``Batch`` or a relation.

    Boundaries come from a sorted ``batch``, else they are ``ptr``: PyG's ``Batch.subgraph`` leaves
    the ``ptr`` of the batch before it, by which no graph has fewer nodes. The last graphs of a
    ``batch`` may have no nodes: as many as ``ptr`` has, else as PyG says in ``num_graphs`` or
    ``batch_size``, are there.

    Raises:
        TypeError: ``batch`` or ``ptr`` does not hold integers.
        ValueError: ``batch`` or ``ptr`` does not fit, is not sorted or is not where ``edge_index``
            is; or a number of nodes is not known.
    """
    key = getattr(data, "_key", None)
    if not isinstance(key, tuple):
        n = count_nodes(data, "data", edges, "rows")
        if edges.graph is not None and n != edges.cols:
            raise ValueError(f"{edges.name} has {edges.cols} columns but data has {n} nodes")
        ptr = _boundaries(data, "data", n, _graphs(data, "data", n, edges))
        return _Sides(n, n, ptr, ptr)
    parent = data._parent()
    if parent is None:
        raise ValueError(f"the HeteroData of {key} is gone: keep it until its graph is made")
    source, target = parent[key[0]], parent[key[-1]]
    names = [f"data[{kind!r}]" for kind in (key[0], key[-1])]
    sizes = [
        count_nodes(source, names[0], edges, "columns"),
        count_nodes(target, names[1], edges, "rows"),
    ]
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
    return _Sides(sizes[1], sizes[0], row_ptr, col_ptr)


def count_nodes(nodes: Any, name: str, edges: Edges, side: Literal["rows", "columns"]) -> int:
    """The number of nodes that stand on that side of a matrix of edges."""
    known = edges.rows if side == "rows" else edges.cols
    size = _inferred(nodes)
    if size is None:
        size = known
    if size is None:
        raise ValueError(f"the number of nodes of {name} is not known: set {name}.num_nodes")
    if edges.graph is not None and size != known:
        raise ValueError(f"{edges.name} has {known} {side} but {name} has {size} nodes")
    return size


def _inferred(nodes: Any) -> int | None:
    """How many nodes PyG knows of, which warns where it has to guess."""
    return nodes.num_nodes if getattr(nodes, "can_infer_num_nodes", True) else None


def _graphs(nodes: Any, name: str, size: int, edges: Edges) -> int | None:
    """How many graphs the nodes belong to; None where nothing says so."""
    ptr, batch = getattr(nodes, "ptr", None), getattr(nodes, "batch", None)
    if ptr is not None:
        check_ptr(ptr, f"{name}.ptr", "G + 1")
        check_device(ptr, f"{name}.ptr", edges.device, edges.name)
    if batch is None:
        return None if ptr is None else len(ptr) - 1
    if not isinstance(batch, Tensor) or batch.dtype not in INTEGERS:
        kind = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(f"{name}.batch must be a tensor of integers, got {kind}")
    check_device(batch, f"{name}.batch", edges.device, edges.name)
    if batch.shape != (size,):
        raise ValueError(
            f"{name}.batch must be [{size}], one entry a node, got {list(batch.shape)}"
        )
    highest = _highest(batch, name) + 1
    # PyG counts the graphs of a Batch by the largest of batch, which an empty one does not have
    known = ("num_graphs", "batch_size") if size else ("_num_graphs",)
    counts = {x: getattr(nodes, x, None) for x in known} if ptr is None else {"ptr": len(ptr) - 1}
    for attribute, count in counts.items():
        if count is not None and count < highest:
            kind = "the number of graphs in " if attribute == "ptr" else ""
            raise ValueError(
                f"{name}.batch has graph {highest - 1} but {kind}{name}.{attribute} is {count}"
            )
        highest = max(highest, count or 0)
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
    ends = torch.searchsorted(batch.long(), graphs)
    if getattr(nodes, "ptr", None) is not None:
        _check_counts(ends.diff(), nodes.ptr.long().diff(), name)
    return ends


def _check_counts(by_batch: Tensor, by_ptr: Tensor, name: str) -> None:
    """A graph may have fewer nodes than ``ptr`` says, as in a subgraph, and not more."""
    more = by_batch[: len(by_ptr)] > by_ptr
    if bool(more.any()):
        graph = int(more.nonzero()[0])
        raise ValueError(
            f"graph {graph} has {int(by_batch[graph])} nodes by {name}.batch but "
            f"{int(by_ptr[graph])} by {name}.ptr: take away the one that is wrong"
        )

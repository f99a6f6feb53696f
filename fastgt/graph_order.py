"""How the nodes of a Graph are renumbered, and their tensors with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgt.graph_build import Structure, check_index, check_range, from_pairs, owners, shifted
from fastgt.reordering import node_order


def permutation(order: Tensor | str, graph: Structure) -> Tensor:
    """``order`` as int64, or the one of that name; refused where it does not fit the graph."""
    if graph.col.is_meta:
        raise RuntimeError(
            "a graph on the meta device has no values to order: reorder it before it is moved"
        )
    if isinstance(order, str):
        order = node_order(order, graph.row_ptr, graph.col, graph.graph_ptr)
    check_index(order, "order")
    n = graph.num_rows
    if order.shape != (n,):
        raise ValueError(f"order must be [{n}], one entry a node, got {list(order.shape)}")
    if order.device != graph.col.device:
        raise ValueError(f"order is on {order.device} but the graph is on {graph.col.device}")
    check_range(order, n, "order", "nodes")
    order = order.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
    place = _places(order)
    if bool((place < 0).any()):
        missing = int((place < 0).nonzero()[0])
        raise ValueError(f"order is not a permutation: node {missing} of {n} is missing")
    if graph.graph_ptr.shape[0] > 2:
        graph_of = owners(graph.graph_ptr, n)
        astray = graph_of[order] != graph_of
        if bool(astray.any()):
            i = int(astray.nonzero()[0])
            raise ValueError(
                f"order puts node {int(order[i])} of graph {int(graph_of[order[i]])} at {i}, "
                f"in graph {int(graph_of[i])} of the batch"
            )
    return order


def renumbered(graph: Structure, order: Tensor) -> Structure:
    """The graph whose node i is node ``order[i]`` of this square one; edges keep their numbers."""
    place = _places(order)
    source, target = graph.edge_index
    n = graph.num_rows
    ptr = graph.graph_ptr
    return from_pairs(place[target], place[source], n, n)._replace(graph_ptr=ptr, col_graph_ptr=ptr)


def joined_orders(graphs: Sequence[Structure], orders: Sequence[Tensor | None]) -> Tensor | None:
    """The order of a batch; None where none of its graphs is reordered."""
    moved = [i for i, order in enumerate(orders) if order is not None]
    if not moved:
        return None
    bipartite = [i for i, g in enumerate(graphs) if g.graph_ptr is not g.col_graph_ptr]
    if bipartite:
        raise ValueError(
            f"graphs[{moved[0]}] is reordered but graphs[{bipartite[0]}] is bipartite: they "
            "have no order in common"
        )
    nodes, device = [g.num_rows for g in graphs], graphs[0].col.device
    parts = [
        torch.arange(n, device=device) if order is None else order
        for n, order in zip(nodes, orders, strict=True)
    ]
    return shifted(parts, nodes, torch.int64)


def check_nodes(x: Tensor, name: str, n: int, device: torch.device) -> None:
    """Refuse what is no tensor with an entry for each of ``n`` nodes, on that device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.ndim == 0 or x.shape[0] != n:
        raise ValueError(f"{name} must be [{n}, ...], one entry a node, got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} but the graph is on {device}")


def _places(order: Tensor) -> Tensor:
    """Where each node goes; -1 for one that ``order`` does not have."""
    place = torch.full_like(order, -1)
    place[order] = torch.arange(len(order), device=order.device)
    return place

"""Nodes in groups: inside a group all attend to all, and nobody attends to another group."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.graph import Graph
from fastgt.graph_build import check_index, owners
from fastgt.ops.checks import integer
from fastgt.patterns.build import from_rows, parts, ranges


def groups(label: Tensor, *, offsets: Tensor | None = None) -> Graph:
    """Nodes with the same label attend to each other, and to themselves.

    The edges are ``{(i, j): label_i = label_j, i and j in one graph}``. With n_c nodes of label c
    these are ``sum_c n_c^2``. The pattern is symmetric.

    Args:
        label: ``[N]`` integers, any ones.
        offsets: ``[G + 1]`` boundaries of a batch. Labels of other graphs are other labels.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named.

    Example:
        >>> import torch
        >>> from fastgt.patterns import groups
        >>> groups(torch.tensor([7, 2, 7])).col.tolist()
        [0, 2, 1, 0, 2]
    """
    check_index(label, "label")
    if label.ndim != 1:
        raise ValueError(f"label must be [N], got {list(label.shape)}")
    n = len(label)
    ptr = parts(offsets, n, label.device, "offsets")
    order = label.argsort(stable=True)
    owner = owners(ptr, n)[order]
    if offsets is not None:
        again = owner.argsort(stable=True)
        order, owner = order[again], owner[again]
    return from_order(order, owner, label[order], ptr)


def from_order(order: Tensor, owner: Tensor, label: Tensor, offsets: Tensor) -> Graph:
    """Groups of nodes in an order: a group ends where the graph or the label changes.

    Args:
        order: ``[N]`` int64, the nodes; those of a group ascend.
        owner, label: ``[N]``, the graph and the label of each, in that order.
        offsets: ``[G + 1]`` boundaries of the graphs.
    """
    n = len(order)
    begins = torch.ones(n, dtype=torch.bool, device=order.device)
    begins[1:] = (label[1:] != label[:-1]) | (owner[1:] != owner[:-1])
    start = begins.nonzero()[:, 0]
    size = torch.cat([start, start.new_tensor([n])]).diff()
    # back to the order of the nodes
    first, count = torch.empty_like(order), torch.empty_like(order)
    first[order] = start.repeat_interleave(size, output_size=n)
    count[order] = size.repeat_interleave(size, output_size=n)
    place = ranges(first, count)
    return from_rows(count, order.to(place.dtype).index_select(0, place), offsets)


def sets(
    order: Tensor, size: int, *, offsets: Tensor | None = None, partial: bool = False
) -> Graph:
    """Sets of equal size along an order of the nodes; inside a set all attend to all.

    Node ``order[p]`` is at place p. The edges are ``{(i, j): p_i // size = p_j // size}``, with
    places counted in each graph. A graph of n nodes has ``n size`` edges where ``size`` divides n,
    and else ``size^2 (n // size) + (n mod size)^2``. The pattern is symmetric.

    FlatFormer fills its last set up with earlier nodes, which the others of it then see too. Here
    the last set is smaller. DSVT's sets are of nearly equal size: :func:`groups` makes such.

    Args:
        order: ``[N]`` integers, a permutation that keeps each graph's nodes in its own range.
        size: Nodes of a set, 1 at least.
        offsets: ``[G + 1]`` boundaries of a batch.
        partial: Let the last set of a graph be smaller. If not, ``size`` has to divide n.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named, with both numbers.

    Source:
        Liu et al., FlatFormer, arXiv 2301.08739, section 3.1.

    Example:
        >>> import torch
        >>> from fastgt.patterns import sets
        >>> sets(torch.tensor([3, 0, 1, 2]), 2).edge_index.tolist()
        [[0, 3, 1, 2, 1, 2, 0, 3], [0, 0, 1, 1, 2, 2, 3, 3]]
    """
    check_index(order, "order")
    if order.ndim != 1:
        raise ValueError(f"order must be [N], got {list(order.shape)}")
    size, n = integer("size", size, 1), len(order)
    ptr = parts(offsets, n, order.device, "offsets")
    if not partial:
        check_divides(size, ptr)
    order, owner = order.long(), owners(ptr, n)
    _check_permutation(order, owner)
    label = (torch.arange(n, device=order.device) - ptr[owner]) // size
    # the nodes of a set ascend: sorted by node, then stably by set
    place = torch.empty_like(order)
    place[order] = torch.arange(n, device=order.device)
    number = (ptr[owner] + label * size)[place]
    ascending = number.argsort(stable=True)
    return from_order(ascending, owner, label, ptr)


def check_divides(size: int, offsets: Tensor) -> None:
    """``size`` divides the number of nodes of every graph."""
    rest = (offsets.diff() % size).nonzero()
    if len(rest):
        g = int(rest[0])
        raise ValueError(
            f"size={size} does not divide the {int(offsets.diff()[g])} nodes of graph {g}: "
            "partial=True lets the last set be smaller"
        )


def _check_permutation(order: Tensor, owner: Tensor) -> None:
    n = len(order)
    wrong = ((order < 0) | (order >= n)).nonzero()
    if len(wrong):
        raise ValueError(f"order has node {int(order[wrong[0]])} but there are {n} nodes")
    count = torch.bincount(order, minlength=n)
    if bool((count != 1).any()):
        node = int((count > 1).nonzero()[0])
        raise ValueError(f"order has node {node} {int(count[node])} times; it must be there once")
    moved = (owner[order] != owner).nonzero()
    if len(moved):
        p = int(moved[0])
        raise ValueError(
            f"order has node {int(order[p])} of graph {int(owner[order[p]])} at a place of graph "
            f"{int(owner[p])}"
        )

"""What OpenGraph's embeddings are used for: links, and classes as nodes of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastgt.graph import Graph
from fastgt.ops.checks import (
    check_float,
    check_graph,
    check_offsets,
    check_square,
    check_whole,
    integer,
    node_ids,
    readable,
)

_ROWS = 256  # of [rows, N_cols] at once
_TRIES = 8  # to draw no neighbour


def with_class_nodes(graph: Graph, y: Tensor, labelled: Tensor, classes: int) -> Graph:
    """The graph with one more node for each class, to which its labelled nodes are joined.

    Node ``N + c`` stands for class c. Edges are those of the graph, then those from labelled nodes
    to their classes, then these the other way round.

    Args:
        graph: A single square one.
        y: ``[N]`` integers, classes of the nodes; only those of labelled nodes are read.
        labelled: ``[N]`` bool.
        classes: How many there are. Each must have a labelled node.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.

    Source:
        Xia et al., arXiv 2403.01121, the graphs of their code's ``node_classification``.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import with_class_nodes
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]), 3)
        >>> labelled = torch.tensor([True, False, True])
        >>> with_class_nodes(graph, torch.tensor([1, 0, 0]), labelled, 2).edge_index.tolist()
        [[0, 1, 0, 2, 4, 3], [1, 0, 4, 3, 0, 2]]
    """
    n, classes = check_square(graph), integer("classes", classes, 1)
    if graph.num_graphs != 1:
        raise ValueError(f"graph must be a single one, got a batch of {graph.num_graphs}")
    if not isinstance(labelled, Tensor) or labelled.dtype != torch.bool:
        found = labelled.dtype if isinstance(labelled, Tensor) else type(labelled).__name__
        raise TypeError(f"labelled must be a tensor of bool, got {found}")
    if not isinstance(y, Tensor) or y.is_floating_point() or y.dtype == torch.bool:
        found = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y must be a tensor of integers, got {found}")
    for name, x in (("y", y), ("labelled", labelled)):
        if x.shape != (n,):
            raise ValueError(f"{name} must be [N] = [{n}], got {list(x.shape)}")
    node = labelled.nonzero()[:, 0].to(graph.device)
    of = y.to(graph.device)[node].long()
    if len(of) and not 0 <= int(of.min()) <= int(of.max()) < classes:
        raise ValueError(
            f"y must be from 0 to {classes - 1} where labelled, got {int(of.min())} to "
            f"{int(of.max())}"
        )
    count = torch.bincount(of, minlength=classes)
    if len(missing := (count == 0).nonzero()):
        raise ValueError(f"class {int(missing[0])} of {classes} has no labelled node")
    joined = torch.stack([node, n + of])
    edge_index = torch.cat([graph.edge_index, joined, joined.flip(0)], 1)
    return Graph.from_edge_index(edge_index, n + classes)


def class_scores(x: Tensor, classes: int) -> Tensor:
    """Dot products of nodes with class nodes: x ``[N + classes, dim]`` -> ``[N, classes]``.

    A node is taken to have the class of its largest one.

    Example:
        >>> import torch
        >>> from fastgt.models import class_scores
        >>> class_scores(torch.tensor([[1.0, 2.0], [1.0, 0.0], [0.0, 1.0]]), 2).tolist()
        [[1.0, 2.0]]
    """
    check_float("x", x)
    classes = integer("classes", classes, 1)
    if x.ndim != 2 or len(x) < classes:
        raise ValueError(f"x must be [N + {classes}, dim], got {list(x.shape)}")
    return x[:-classes] @ x[-classes:].T


def both_sides(graph: Graph) -> Graph:
    """A bipartite graph as a square one: rows, then columns, are its nodes.

    Edges are those of the graph, then the same the other way round. Its nodes have the order of the
    tokens that :func:`fastgt.encodings.svd_tokens` makes of the bipartite graph.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import both_sides
        >>> likes = Graph.from_edge_index(torch.tensor([[0, 2], [1, 0]]), (2, 3))
        >>> both_sides(likes).edge_index.tolist()
        [[2, 4, 1, 0], [1, 0, 2, 4]]
    """
    check_graph(graph)
    check_whole(graph)
    if graph.num_graphs != 1:
        raise ValueError(f"graph must be a single one, got a batch of {graph.num_graphs}")
    source, target = graph.edge_index
    there = torch.stack([source + graph.num_rows, target])
    return Graph.from_edge_index(
        torch.cat([there, there.flip(0)], 1), graph.num_rows + graph.num_cols
    )


def edges_between(graph: Graph, first: Tensor, second: Tensor) -> Tensor:
    """Which edges join a pair ``first[b]``, ``second[b]``, either way round.

    Args:
        graph: Square.
        first, second: ``[B]`` integers, nodes.

    Returns:
        ``[E]`` bool, in the caller's edge order.
    """
    n = check_square(graph)
    source, target = graph.edge_index
    pair, edge = (
        torch.minimum(a, b).long() * n + torch.maximum(a, b)
        for a, b in ((first, second), (source, target))
    )
    return torch.isin(edge, pair)


def draw_negatives(graph: Graph, row: Tensor) -> Tensor:
    """For every row a random node, other than itself, from which it has no edge.

    All such nodes are equally likely. Drawn from PyTorch's generator.

    Args:
        graph: Square, with edges both ways.
        row: ``[B]`` integers.

    Returns:
        ``[B]`` int64.

    Raises:
        ValueError: A row has edges from all other nodes; it is named.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import draw_negatives
        >>> path = Graph.from_edge_index(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> draw_negatives(path, torch.tensor([0, 2])).tolist()
        [2, 0]
    """
    n = check_square(graph)
    row = check_nodes("row", row, n, graph.device)
    source, target = graph.edge_index
    pair = target * n + source
    negative = torch.empty(len(row), dtype=torch.int64, device=row.device)
    pending = torch.arange(len(row), device=row.device)
    for _ in range(_TRIES):
        drawn = torch.randint(n, (len(pending),), device=row.device)
        mine = row[pending]
        bad = torch.isin(mine * n + drawn, pair) | (mine == drawn)
        negative[pending[~bad]] = drawn[~bad]
        pending = pending[bad]
        if not len(pending):
            return negative
    # rows with edges from nearly all nodes
    for some in pending.split(_ROWS):
        mine = row[some]
        free = ~_mask(graph, mine)
        free[torch.arange(len(mine), device=mine.device), mine] = False
        if len(full := (~free.any(1)).nonzero()):
            raise ValueError(
                f"node {int(mine[full[0]])} has edges from all others: it has no negative"
            )
        negative[some] = free.float().multinomial(1)[:, 0]
    return negative


class Ranking(NamedTuple):
    """Means over the rows that have something to find."""

    recall: float
    ndcg: float


@torch.no_grad()
def rank_links(
    rows: Tensor, cols: Tensor, known: Graph, hidden: Graph, ks: Sequence[int] = (20, 40)
) -> list[Ranking]:
    """Recall and NDCG of hidden edges among the k columns of the largest dot products with a row.

        recall_i = |top_k(i) and hidden(i)| / |hidden(i)|
        ndcg_i   = sum_{j in hidden(i), rank_ij < k} 1 / log2(rank_ij + 2)
                   / sum_{r < min(k, |hidden(i)|)} 1 / log2(r + 2)

    Columns of known edges are no candidates. All other columns are: where rows and columns are the
    same nodes, a node itself too, as in the released code. Rows without hidden edges do not count.
    Computed for 256 rows at once, in O(256 N_cols) memory.

    Args:
        rows: ``[N_rows, dim]`` embeddings.
        cols: ``[N_cols, dim]``, as rows.
        known: Edges that a model was given.
        hidden: Edges to find, of the same rows and columns. An edge that stands there several times
            counts once.
        ks: Numbers k.

    Returns:
        A Ranking for each of ``ks``.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.

    Source:
        Xia et al., arXiv 2403.01121, their code's ``link_prediction/main.py``.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import rank_links
        >>> rows, cols = torch.tensor([[1.0]]), torch.tensor([[4.0], [3.0], [2.0], [1.0]])
        >>> known = Graph.from_edge_index(torch.tensor([[0], [0]]), (1, 4))
        >>> hidden = Graph.from_edge_index(torch.tensor([[1, 3], [0, 0]]), (1, 4))
        >>> rank_links(rows, cols, known, hidden, [2])[0].recall
        0.5
    """
    ks = [integer("k", x, 1) for x in ks]
    check_float("rows", rows)
    check_float("cols", cols)
    if cols.dtype != rows.dtype:
        raise TypeError(f"cols must be {rows.dtype} as rows, got {cols.dtype}")
    if rows.ndim != 2 or cols.ndim != 2 or rows.shape[1] != cols.shape[1]:
        raise ValueError(f"rows and cols must be [_, dim], got {[*rows.shape]} and {[*cols.shape]}")
    shape = len(rows), len(cols)
    for name, graph in (("known", known), ("hidden", hidden)):
        check_graph(graph)
        if (graph.num_rows, graph.num_cols) != shape:
            found = f"{graph.num_rows} rows and {graph.num_cols} columns"
            sizes = f"{shape[0]} rows and {shape[1]} columns"
            raise ValueError(f"{name} must have {sizes}, got {found}")
    if not ks or max(ks) > len(cols):
        raise ValueError(f"ks must be from 1 to {len(cols)}, the columns, got {ks}")
    wanted = (hidden.row_degree > 0).nonzero()[:, 0]
    if not len(wanted):
        raise ValueError("hidden has no edges: there is nothing to find")
    total = torch.zeros(len(ks), 2, dtype=torch.float64, device=rows.device)
    discount = torch.arange(2, len(cols) + 2, device=rows.device).double().log2().reciprocal()
    best = discount.cumsum(0)
    for some in wanted.split(_ROWS):
        scores = rows[some] @ cols.T
        scores = scores.masked_fill(_mask(known, some), -torch.inf)
        target = _mask(hidden, some)
        top = scores.topk(max(ks))
        hits = target.gather(1, top.indices) & (top.values > -torch.inf)  # [B, k], by rank
        count = target.sum(1)
        for i, most in enumerate(ks):
            hit = hits[:, :most].double()
            ideal = best[count.clamp(max=most) - 1]
            total[i, 0] += (hit.sum(1) / count).sum()
            total[i, 1] += (hit @ discount[:most] / ideal).sum()
    return [Ranking(*pair) for pair in (total / len(wanted)).tolist()]


def check_nodes(name: str, x: Tensor, nodes: int, device: torch.device) -> Tensor:
    """``[_]`` integers from 0 to ``nodes - 1``, as int64."""
    x = node_ids(name, x, nodes, device)
    if x.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got {list(x.shape)}")
    return x


def check_anchors(node: Tensor, ptr: Tensor, offsets: Tensor, nodes: int) -> Tensor:
    """Anchors as int64, nodes of their graphs where their values are at hand."""
    node = check_nodes("anchors", node, nodes, offsets.device)
    check_offsets(ptr, len(node), offsets.device, "ptr of anchors")
    if len(ptr) != len(offsets):
        raise ValueError(
            f"anchors must be of {len(offsets) - 1} graphs, got those of {len(ptr) - 1}"
        )
    if readable(node) and readable(ptr):
        first, end = (x.repeat_interleave(ptr.diff()) for x in (offsets[:-1], offsets[1:]))
        if len(beyond := ((node < first) | (node >= end)).nonzero()):
            i = int(beyond[0])
            raise ValueError(
                f"anchor {i} is node {int(node[i])}, and its graph has nodes {int(first[i])} to "
                f"{int(end[i]) - 1}"
            )
    return node


def _mask(graph: Graph, rows: Tensor) -> Tensor:
    """``[B, N_cols]`` bool: the columns of these rows."""
    ptr, count = graph.row_ptr.long()[rows], graph.row_degree.long()[rows]
    at = torch.arange(len(rows), device=rows.device).repeat_interleave(count)
    first = (ptr - count.cumsum(0) + count).repeat_interleave(count)
    col = graph.col[first + torch.arange(len(at), device=rows.device)].long()
    mask = torch.zeros(len(rows), graph.num_cols, dtype=torch.bool, device=rows.device)
    mask[at, col] = True
    return mask

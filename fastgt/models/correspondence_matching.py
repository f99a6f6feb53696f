"""What a matrix of soft assignments says of the nodes of two graphs, and how far it is from right.

Graphs 2p and 2p + 1 of a batch are pair p, of n and m nodes. Its matrix has a row for each node of
the first graph, a column for each one of the second, and last a row and a column of dustbins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgt.graph import Graph
from fastgt.ops.checks import check_float, check_square, number, readable


class PairOffsets(NamedTuple):
    """Boundaries of the graphs of pairs, ``[P + 1]`` each: as if they stood in two batches."""

    first: Tensor
    second: Tensor


def matches(log_assignment: Tensor, graph: Graph, threshold: float = 0.2) -> Tensor:
    """The partner of every node, numbered within the other graph of its pair; -1 without one.

    Node i of the first graph and j of the second are partners where ``exp(log_assignment_ij)`` is
    the largest of row i and of column j, dustbins left out, and above the threshold.

    Args:
        log_assignment: ``[sum_p (n_p + 1) (m_p + 1)]``, of :func:`log_sinkhorn`.
        graph: The batch.
        threshold: From 0 to 1.

    Returns:
        ``[N]`` int64, without a gradient.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.

    Source:
        Sarlin et al., SuperGlue, arXiv 1911.11763, their code.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import matches
        >>> none = torch.zeros(2, 0, dtype=torch.long)
        >>> pair = Graph.from_edge_index(none, graph_ptr=torch.tensor([0, 2, 3]))
        >>> of_rows = torch.tensor([[0.1, 0.9], [0.7, 0.3], [0.2, 0.8]])  # the last is the dustbin
        >>> matches(of_rows.log().flatten(), pair).tolist()
        [-1, 0, 1]
    """
    threshold = number("threshold", threshold)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be from 0 to 1, got {threshold}")
    _check_assignment(log_assignment, graph)
    sizes = graph.graph_ptr.diff().tolist()
    blocks = [(n + 1, m + 1) for n, m in zip(sizes[::2], sizes[1::2], strict=True)]
    found = [log_assignment.new_zeros(0, dtype=torch.long)]
    parts = log_assignment.detach().split([n * m for n, m in blocks])
    for part, shape in zip(parts, blocks, strict=True):
        inner = part.view(shape)[:-1, :-1]
        best, col = inner.max(1)  # [n]
        row = inner.argmax(0)  # [m]
        n, m = (torch.arange(len(x), device=x.device) for x in (col, row))
        sure = (row[col] == n) & (best.exp() > threshold)
        found.append(torch.where(sure, col, -1))
        found.append(torch.where(sure[row] & (col[row] == m), row, -1))
    return torch.cat(found)


def log_likelihoods(log_assignment: Tensor, y: Tensor, graph: Graph) -> Tensor:
    """``log_assignment`` at the true partner of every node, or at its dustbin.

    The loss of SuperGlue is minus its sum over all pairs of partners and over all nodes without
    one::

        loss = -sum_ij log P_ij - sum_i log P_im - sum_j log P_nj

    Both of two partners have ``log P_ij`` here: half of it counts for each.

    Args:
        log_assignment: ``[sum_p (n_p + 1) (m_p + 1)]``, of :func:`log_sinkhorn`.
        y: ``[N]`` integers: the partner of every node, numbered within the other graph of its pair;
            -1 without one.
        graph: The batch.

    Returns:
        ``[N]``.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.

    Source:
        Sarlin et al., SuperGlue, arXiv 1911.11763, eq. 9. AnimeInbet's code leaves out the nodes of
        the second graph that have no partner.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models import log_likelihoods
        >>> none = torch.zeros(2, 0, dtype=torch.long)
        >>> pair = Graph.from_edge_index(none, graph_ptr=torch.tensor([0, 2, 3]))
        >>> log_likelihoods(torch.arange(6.0), torch.tensor([-1, 0, 1]), pair).tolist()
        [1.0, 2.0, 2.0]
    """
    _check_assignment(log_assignment, graph)
    sizes = graph.graph_ptr.diff().long()
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor of integers, got {type(y).__name__}")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"y must hold integers, got {y.dtype}")
    if y.device != graph.device:
        raise ValueError(f"y is on {y.device} but graph is on {graph.device}")
    if y.shape != (graph.num_rows,):
        raise ValueError(f"y must be [N] = [{graph.num_rows}], got {list(y.shape)}")
    owner = torch.arange(len(sizes), device=y.device).repeat_interleave(
        sizes, output_size=graph.num_rows
    )
    local = torch.arange(graph.num_rows, device=y.device) - graph.graph_ptr[owner]
    others = sizes[owner ^ 1]
    y = y.long()
    if readable(y) and (wrong := ((y < -1) | (y >= others)).nonzero()).numel():
        at = int(wrong[0])
        raise ValueError(
            f"y must be from -1 to {int(others[at]) - 1}, as the other graph has "
            f"{int(others[at])} nodes, got {int(y[at])} at {at}"
        )
    partner = torch.where(y < 0, others, y)
    first = owner % 2 == 0
    row, col = torch.where(first, local, partner), torch.where(first, partner, local)
    n, m = sizes[::2] + 1, sizes[1::2] + 1
    begin = (n * m).cumsum(0) - n * m
    return log_assignment.index_select(0, begin[owner // 2] + row * m[owner // 2] + col)


def pair_offsets(graph: Graph) -> PairOffsets:
    """Of a batch whose graphs 2p and 2p + 1 are pair p.

    Raises:
        TypeError, ValueError: It is no Graph, not square, or its graphs are odd in number, or one
            has no nodes (which is seen on a CPU only).
    """
    check_square(graph)
    if graph.num_graphs % 2:
        raise ValueError(
            f"graph must be a batch of pairs, its graphs 2p and 2p + 1; got {graph.num_graphs} "
            "graphs"
        )
    sizes = graph.graph_ptr.diff().long()
    if readable(sizes) and (empty := (sizes == 0).nonzero()).numel():
        raise ValueError(f"graph {int(empty[0])} of the batch has no nodes: a pair is of two sets")
    ends = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (sizes[::2], sizes[1::2]))
    return PairOffsets(*ends)


def _check_assignment(log_assignment: Tensor, graph: Graph) -> None:
    first, second = (x.diff() + 1 for x in pair_offsets(graph))
    check_float("log_assignment", log_assignment)
    if log_assignment.device != graph.device:
        raise ValueError(
            f"log_assignment is on {log_assignment.device} but graph is on {graph.device}"
        )
    wanted = int((first * second).sum())
    if log_assignment.shape != (wanted,):
        raise ValueError(
            f"log_assignment must be [sum_p (n_p + 1) (m_p + 1)] = [{wanted}], got "
            f"{list(log_assignment.shape)}"
        )

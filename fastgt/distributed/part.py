"""One rank's share of a graph, as it is cut, stored and sent."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgt.graph import Graph


class Whole(NamedTuple):
    """What every rank knows of the graph that was cut.

    Attributes:
        rows, cols, edges: How many the whole graph has.
        square: Whether a rank owns the same columns as rows.
        graph_ptr, col_graph_ptr: ``[G + 1]`` int64, where each graph of a batch lies in the whole
            graph's rows and columns.
    """

    rows: int
    cols: int
    edges: int
    square: bool
    graph_ptr: Tensor
    col_graph_ptr: Tensor


class Part(NamedTuple):
    """The rows that a rank owns, their edges, and the columns that these read.

    Three nodes on two ranks, node 0 and node 1 on rank 0, node 2 on rank 1. Edges, source above
    target, numbered as the caller gave them::

        edge      0  1  2  3
        source    2  1  0  0
        target    0  0  1  2

        rank 0    rows  [0, 1]   halo [2]    row 0 reads node 2: it is a boundary row
                  edge  [2, 0, 1]            interior rows first, then boundary rows
                  row   [1, 0, 0]
                  col   [0, 2, 1]            0 and 1 are own columns, 2 is the first of the halo
                  interior 1                 edges of interior rows
        rank 1    rows  [2]      halo [0]
                  edge  [3]   row [0]   col [1]   interior 0

    All tensors are int64 on one device.

    Attributes:
        rank, parts: Which part this is, of how many.
        whole: The graph that was cut.
        rows: ``[n]``, the rows that the rank owns, ascending.
        cols: ``[m]``, the columns that it owns, ascending; ``rows`` itself where the graph is
            square.
        halo: ``[h]``, the other ranks' columns that it reads: rank after rank, ascending.
        halo_ptr: ``[P + 1]``, rank p owns ``halo[halo_ptr[p]:halo_ptr[p + 1]]``.
        row, col: ``[e]``, the ends of each edge. A row counts in ``rows``. A column counts in
            ``cols`` and, after these, in ``halo``.
        edge: ``[e]``, the number of each edge in the whole graph. Edge tensors of the rank are in
            this order: the edges of interior rows, which read own columns alone, row by row, then
            those of boundary rows.
        interior: How many edges interior rows have.
    """

    rank: int
    parts: int
    whole: Whole
    rows: Tensor
    cols: Tensor
    halo: Tensor
    halo_ptr: Tensor
    row: Tensor
    col: Tensor
    edge: Tensor
    interior: int


def whole_of(graph: Graph, square: bool) -> Whole:
    """What ranks know of it, where it is cut in the same way in rows and in columns, or not."""
    row_ptr, col_ptr = graph.graph_ptr.long(), graph.col_graph_ptr.long()
    ends = row_ptr, row_ptr if square else col_ptr
    return Whole(graph.num_rows, graph.num_cols, graph.num_edges, square, *ends)


def cut(graph: Graph, row_part: Tensor, col_part: Tensor, rank: int, parts: int) -> Part:
    """The share of one rank, where each row and each column says which rank owns it.

    One tensor for both says that columns are the same nodes as rows.
    Takes O(N + E) time and memory: it is for graphs that fit where they are cut.
    """
    whole = whole_of(graph, col_part is row_part)
    rows = (row_part == rank).nonzero().flatten()
    cols = rows if whole.square else (col_part == rank).nonzero().flatten()
    # where each node of the whole graph stands among the rank's own
    place = torch.zeros(max(whole.rows, whole.cols), dtype=torch.int64, device=rows.device)
    place[rows] = torch.arange(len(rows), device=rows.device)
    slots = (row_part.index_select(0, graph.row.long()) == rank).nonzero().flatten()
    row = place.index_select(0, graph.row.index_select(0, slots).long())
    edge = graph.edge.index_select(0, slots).long()
    reads = graph.col.index_select(0, slots).long()
    return arranged(whole, rank, parts, rows, cols, col_part, row, reads, edge)


def arranged(
    whole: Whole,
    rank: int,
    parts: int,
    rows: Tensor,
    cols: Tensor,
    col_part: Tensor,
    row: Tensor,
    reads: Tensor,
    edge: Tensor,
) -> Part:
    """A part of edges that lie row by row.

    Args:
        whole, rank, parts, rows, cols: As in :class:`Part`.
        col_part: ``[N_cols]``, the rank that owns each column of the whole graph.
        row: ``[e]``, ascending places in ``rows``.
        reads: ``[e]``, the column of each edge in the whole graph.
        edge: ``[e]``, its number there.
    """
    owner = col_part.index_select(0, reads)
    outside = owner != rank
    halo = reads[outside].unique()
    by_rank = col_part.index_select(0, halo)
    halo = halo.index_select(0, by_rank.sort(stable=True).indices)
    counts = by_rank.bincount(minlength=parts)
    halo_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    # the halo lies rank by rank: a place in it is found among that rank's nodes
    key = col_part.index_select(0, halo) * whole.cols + halo
    col = torch.searchsorted(cols, reads)
    col[outside] = len(cols) + torch.searchsorted(key, owner[outside] * whole.cols + reads[outside])
    boundary = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    boundary[row[outside]] = True
    late = boundary.index_select(0, row)
    order = late.sort(stable=True).indices
    row, col, edge = (x.index_select(0, order) for x in (row, col, edge))
    interior = len(edge) - int(late.sum())
    return Part(rank, parts, whole, rows, cols, halo, halo_ptr, row, col, edge, interior)


def graphs_of(part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """-> ``[G + 1]`` boundaries of the graphs in the rank's rows, the same in its own columns, and
    ``[h]`` the graph of each node of the halo."""
    whole = part.whole
    rows = torch.searchsorted(part.rows, whole.graph_ptr)
    cols = rows if whole.square else torch.searchsorted(part.cols, whole.col_graph_ptr)
    halo = torch.searchsorted(whole.col_graph_ptr, part.halo, right=True) - 1
    return rows, cols, halo

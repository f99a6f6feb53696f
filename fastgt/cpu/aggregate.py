"""aggregate on a CPU. Where messages are rows of one tensor, their sums are embedding bags and
nothing is stored. The symbols are those of ``kernels/aggregate.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.contract import MessageNeeds, Messages, Reduction
from fastgt.cpu.chunks import chunks, joined, largest, take
from fastgt.cpu.sparse import accumulator, make_walk, segment_of, spmm


def aggregate_fwd(
    messages: Messages, rows: tuple[Tensor, ...], reduction: Reduction
) -> tuple[Tensor, Tensor]:
    """-> o [N, D]; for a maximum the edge it was found on [N, D], -1 for none, else [0, D]."""
    (x, edge_value), (row_ptr, col, edge), (reduce, relu) = messages, rows, reduction
    like = edge_value if x is None else x
    assert like is not None
    wide, (n, width) = accumulator(like), (row_ptr.shape[0] - 1, like.shape[1])
    o = like.new_empty(n, width)
    if reduce == "max":
        value, first = _first_largest(messages, rows, relu)
        return o.copy_(value), first
    if edge_value is None:
        assert x is not None
        total = spmm(make_walk(row_ptr, col), None, x.to(wide).relu() if relu else x.to(wide))
    elif x is None and not relu and edge_value.dtype == wide:
        total = spmm(make_walk(row_ptr, edge), None, edge_value)
    else:
        walk = make_walk(row_ptr, edge)
        total = o.new_zeros(walk.cut.shape[0] - 1, width, dtype=wide)
        for chunk in chunks(walk.cut, width):
            m = _made(messages, col[chunk.edges], edge[chunk.edges], relu, wide)
            total[chunk.pieces] = chunk.sum(m)
        total = joined(walk.joint, total)
    if reduce == "mean":
        total /= row_ptr.diff().clamp_(min=1)[:, None]
    return o.copy_(total), row_ptr.new_empty(0, width)


def aggregate_bwd(
    do: Tensor,
    messages: Messages,
    first: Tensor,
    rows: tuple[Tensor, ...],
    columns: tuple[Tensor, ...],
    reduction: Reduction,
    needs: MessageNeeds,
) -> tuple[Tensor, Tensor]:
    """-> dx [M, D], dedge [E, D] in the caller's edge order; empty where not needed."""
    (x, edge_value), (reduce, relu), (need_x, need_edge) = messages, reduction, needs
    (row_ptr, col, edge), (col_ptr, col_row, _, col_edge) = rows, columns
    (n, width), num_edges, m, wide = do.shape, edge.shape[0], col_ptr.shape[0] - 1, accumulator(do)
    dx = do.new_empty((m, width) if need_x else (0,))
    dedge = do.new_empty((num_edges, width) if need_edge else (0,))
    if reduce == "max":
        channel = torch.arange(width).expand(n, width)
        if need_edge:
            dedge.zero_()
            some = first >= 0
            # an edge is the first of its row only: no two write to one place
            dedge[first[some].long(), channel[some]] = do[some]
        if need_x:
            column = torch.empty_like(col).index_copy_(0, edge.long(), col)
            owner = torch.cat([column, column.new_tensor([m])])[first.long()].long()  # -1: m
            into = do.new_zeros(m + 1, width, dtype=wide)
            dx.copy_(into.scatter_add_(0, owner, do.to(wide))[:m])
        return dx, dedge
    dm = do.to(wide)
    if reduce == "mean":
        dm = dm / row_ptr.diff().clamp_(min=1)[:, None]
    if relu and edge_value is not None:
        walk, owner = make_walk(col_ptr, col_row), segment_of(col_ptr, col_row)
        total = dm.new_zeros(walk.cut.shape[0] - 1 if need_x else 0, width)
        number = col_edge.long()
        for chunk in chunks(walk.cut, width):
            s = _made(messages, owner[chunk.edges], col_edge[chunk.edges], False, wide)
            part = _through_relu(dm.index_select(0, col_row[chunk.edges]), s)
            if need_x:
                total[chunk.pieces] = chunk.sum(part)
            if need_edge:
                dedge.index_copy_(0, number[chunk.edges], part.to(dedge.dtype))
        if need_x:
            dx.copy_(joined(walk.joint, total))
        return dx, dedge
    if need_x:
        total = spmm(make_walk(col_ptr, col_row), None, dm)
        if relu:
            assert x is not None
            total = _through_relu(total, x.to(wide))
        dx.copy_(total)
    if need_edge:
        row = torch.empty_like(edge).index_copy_(0, edge.long(), segment_of(row_ptr, edge))
        torch.index_select(dm.to(dedge.dtype), 0, row, out=dedge)
    return dx, dedge


def _made(messages: Messages, col: Tensor, edge: Tensor, relu: bool, wide: torch.dtype) -> Tensor:
    """activation(x_j + edge_value_ij) of some edges from the columns ``col``."""
    x, edge_value = messages
    if x is None:
        assert edge_value is not None
        m = take(edge_value, edge, wide)
    else:
        m = take(x, col, wide)
        if edge_value is not None:
            m += take(edge_value, edge, wide)
    return m.relu_() if relu else m


def _through_relu(dm: Tensor, x: Tensor) -> Tensor:
    """dm, 0 where ``x`` is not above 0: a masked fill takes ten times as long."""
    return torch.ops.aten.threshold_backward(dm, x, 0)


def _first_largest(
    messages: Messages, rows: tuple[Tensor, ...], relu: bool
) -> tuple[Tensor, Tensor]:
    """-> the largest message of each row and its edge, [N, D]: 0 and -1 for none."""
    row_ptr, col, edge = rows
    like = messages.edge_value if messages.x is None else messages.x
    assert like is not None
    wide, width, walk = accumulator(like), like.shape[1], make_walk(row_ptr, edge)
    pieces = walk.cut.shape[0] - 1
    value = like.new_full((pieces, width), -torch.inf, dtype=wide)
    none = torch.iinfo(edge.dtype).max
    first = edge.new_full((pieces, width), none)
    for chunk in chunks(walk.cut, width):
        m = _made(messages, col[chunk.edges], edge[chunk.edges], False, wide)
        number = edge[chunk.edges, None].expand_as(m)
        of_pieces = _firsts(m, number, chunk.owner(), chunk.ptr.shape[0] - 1, none)
        value[chunk.pieces], first[chunk.pieces] = of_pieces
    if walk.joint is not None:
        owner = segment_of(walk.joint, value)
        value, first = _firsts(value, first, owner, row_ptr.shape[0] - 1, none)
    empty = first == none
    value.masked_fill_(empty, 0.0)
    if relu:
        # monotone: the largest is the same, and below 0 nothing gets a gradient
        empty |= value <= 0
        value.relu_()
    return value, first.masked_fill_(empty, -1)


def _firsts(
    x: Tensor, number: Tensor, owner: Tensor, count: int, none: int
) -> tuple[Tensor, Tensor]:
    """-> the largest ``x [edges, D]`` of each owner and the least ``number`` it stands at."""
    top = largest(x, owner, count)
    hit = (x == top.index_select(0, owner)) | x.isnan()
    first = number.new_full(top.shape, none)
    index = owner.long()[:, None].expand_as(x)
    return top, first.scatter_reduce_(0, index, number.masked_fill(~hit, none), "amin")

"""segment_softmax, aggregate and gated_aggregate on a CPU, some thousand edges at a time.

Where messages are rows of one tensor, their sums are embedding bags and nothing is stored. Others
are made for a chunk of edges that stays in the processor's cache, summed there and forgotten: the
working memory is O(N D). Chunks follow the segments of a walk, long ones in pieces as in
``attention.py``: what a segment's sum is depends neither on other segments nor on the number of
threads. The symbols are those of ``kernels/aggregate.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastgt.cpu.sparse import accumulator, bags, make_walk, segment_of, spmm

_ELEMENTS = 2**18  # of the messages of a chunk


class _Chunk(NamedTuple):
    """Some pieces of segments, one after another, and their edges."""

    pieces: slice
    edges: slice
    ptr: Tensor  # [pieces + 1], from 0

    def owner(self) -> Tensor:
        """[edges], the piece of each, from 0."""
        piece = torch.arange(self.ptr.shape[0] - 1)
        return piece.repeat_interleave(
            self.ptr.diff(), output_size=self.edges.stop - self.edges.start
        )

    def sum(self, x: Tensor) -> Tensor:
        """``x [edges, D]`` -> [pieces, D]"""
        return bags(torch.arange(x.shape[0], dtype=self.ptr.dtype), x, self.ptr)


def _chunks(cut: Tensor, width: int) -> Iterator[_Chunk]:
    """Chunks of ``cut [pieces + 1]``, of about ``_ELEMENTS`` numbers each, that have edges."""
    size = max(1, _ELEMENTS // max(1, width))
    num_edges = int(cut[-1])
    starts = torch.arange(0, num_edges, size, dtype=cut.dtype)
    firsts = [*torch.searchsorted(cut[:-1], starts).tolist(), cut.shape[0] - 1]
    for first, last in itertools.pairwise(firsts):
        begin, end = int(cut[first]), int(cut[last])
        if begin < end:
            yield _Chunk(slice(first, last), slice(begin, end), cut[first : last + 1] - begin)


def segment_softmax_fwd(x: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
    """-> y [E, D] in the caller's edge order."""
    row_ptr, _, edge = rows
    walk, row, wide = make_walk(row_ptr, edge), segment_of(row_ptr, edge), accumulator(x)
    pieces, width = walk.cut.shape[0] - 1, x.shape[1]
    top = x.new_full((pieces, width), -torch.inf, dtype=wide)
    total = top.new_zeros(pieces, width)
    for chunk in _chunks(walk.cut, width):
        s, owner = _take(x, edge[chunk.edges], wide), chunk.owner()
        peak = _largest(s, owner, chunk.ptr.shape[0] - 1)
        top[chunk.pieces] = peak
        s -= _finite(peak).index_select(0, owner)
        total[chunk.pieces] = chunk.sum(s.exp_())
    if walk.joint is not None:
        owner = segment_of(walk.joint, top)
        peak = _largest(top, owner, row_ptr.shape[0] - 1)
        total *= (top - _finite(peak).index_select(0, owner)).exp_()
        top, total = peak, bags(torch.arange(pieces, dtype=row_ptr.dtype), total, walk.joint)
    pivot, norm = _finite(top), 1 / total.masked_fill_(total == 0, 1.0)
    y, number = x.new_empty(x.shape), edge.long()
    for chunk in _chunks(walk.cut, width):
        p, owner = _take(x, edge[chunk.edges], wide), row[chunk.edges]
        p.sub_(pivot.index_select(0, owner)).exp_().mul_(norm.index_select(0, owner))
        y.index_copy_(0, number[chunk.edges], p.to(y.dtype))
    return y


def segment_softmax_bwd(dy: Tensor, y: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
    """-> dx [E, D] in the caller's edge order."""
    row_ptr, _, edge = rows
    walk, row, wide = make_walk(row_ptr, edge), segment_of(row_ptr, edge), accumulator(y)
    pieces, width = walk.cut.shape[0] - 1, y.shape[1]
    total = y.new_zeros(pieces, width, dtype=wide)
    delta = torch.zeros_like(total)
    for chunk in _chunks(walk.cut, width):
        p = _take(y, edge[chunk.edges], wide)
        total[chunk.pieces] = chunk.sum(p)
        delta[chunk.pieces] = chunk.sum(p.mul_(_take(dy, edge[chunk.edges], wide)))
    total, delta = _joined(walk.joint, total), _joined(walk.joint, delta)
    delta /= total.masked_fill_(total == 0, 1.0)
    dx, number = y.new_empty(y.shape), edge.long()
    for chunk in _chunks(walk.cut, width):
        p, ds = (_take(t, edge[chunk.edges], wide) for t in (y, dy))
        ds.sub_(delta.index_select(0, row[chunk.edges])).mul_(p)
        dx.index_copy_(0, number[chunk.edges], ds.to(dx.dtype))
    return dx


def aggregate_fwd(
    x: Tensor | None,
    edge_value: Tensor | None,
    rows: tuple[Tensor, ...],
    reduce: str,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """-> o [N, D]; for a maximum the edge it was found on [N, D], -1 for none, else [0, D]."""
    row_ptr, col, edge = rows
    like = edge_value if x is None else x
    assert like is not None
    wide, (n, width) = accumulator(like), (row_ptr.shape[0] - 1, like.shape[1])
    o = like.new_empty(n, width)
    if reduce == "max":
        value, first = _first_largest(x, edge_value, rows, relu)
        return o.copy_(value), first
    if edge_value is None:
        assert x is not None
        total = spmm(make_walk(row_ptr, col), None, x.to(wide).relu() if relu else x.to(wide))
    elif x is None and not relu and edge_value.dtype == wide:
        total = spmm(make_walk(row_ptr, edge), None, edge_value)
    else:
        walk = make_walk(row_ptr, edge)
        total = o.new_zeros(walk.cut.shape[0] - 1, width, dtype=wide)
        for chunk in _chunks(walk.cut, width):
            m = _messages(x, edge_value, col, edge, chunk.edges, relu, wide)
            total[chunk.pieces] = chunk.sum(m)
        total = _joined(walk.joint, total)
    if reduce == "mean":
        total /= row_ptr.diff().clamp_(min=1)[:, None]
    return o.copy_(total), row_ptr.new_empty(0, width)


def aggregate_bwd(
    do: Tensor,
    x: Tensor | None,
    edge_value: Tensor | None,
    first: Tensor,
    rows: tuple[Tensor, ...],
    columns: tuple[Tensor, ...],
    reduce: str,
    relu: bool,
    need_x: bool,
    need_edge: bool,
) -> tuple[Tensor, Tensor]:
    """-> dx [M, D], dedge [E, D] in the caller's edge order; empty where not needed."""
    row_ptr, col, edge = rows
    col_ptr, col_row, _, col_edge = columns
    (n, width), num_edges, m, wide = do.shape, edge.shape[0], col_ptr.shape[0] - 1, accumulator(do)
    dx = do.new_empty((m, width) if need_x else (0,))
    dedge = do.new_empty((num_edges, width) if need_edge else (0,))
    if reduce == "max":
        channel = torch.arange(width).expand(n, width)
        if need_edge:
            dedge.zero_()
            found = first >= 0
            # an edge is the first of its row only: no two write to one place
            dedge[first[found].long(), channel[found]] = do[found]
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
        for chunk in _chunks(walk.cut, width):
            s = _messages(x, edge_value, owner, col_edge, chunk.edges, False, wide)
            part = _through_relu(dm.index_select(0, col_row[chunk.edges]), s)
            if need_x:
                total[chunk.pieces] = chunk.sum(part)
            if need_edge:
                dedge.index_copy_(0, number[chunk.edges], part.to(dedge.dtype))
        if need_x:
            dx.copy_(_joined(walk.joint, total))
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


def gated_aggregate_fwd(
    x: Tensor,
    gate: Tensor | None,
    gate_row: Tensor | None,
    gate_col: Tensor | None,
    rows: tuple[Tensor, ...],
    eps: float,
    normalize: bool,
    return_gate: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> o [N, D], e [E, D] in the caller's edge order; total and mean [N, D] to be kept."""
    row_ptr, col, edge = rows
    wide, (n, width) = accumulator(x), (row_ptr.shape[0] - 1, x.shape[1])
    o, e = x.new_empty(n, width), x.new_empty(edge.shape[0] if return_gate else 0, width)
    walk, row, number = make_walk(row_ptr, edge), segment_of(row_ptr, edge), edge.long()
    mean = x.new_zeros(walk.cut.shape[0] - 1, width, dtype=wide)
    total = mean.new_zeros(mean.shape if normalize else (0, width))
    for chunk in _chunks(walk.cut, width):
        at = chunk.edges
        s = _gates(gate, gate_row, gate_col, edge[at], row[at], col[at], wide)
        if return_gate:
            e.index_copy_(0, number[at], s.to(e.dtype))
        _sigmoid(s)
        if normalize:
            total[chunk.pieces] = chunk.sum(s)
        mean[chunk.pieces] = chunk.sum(s.mul_(_take(x, col[at], wide)))
    mean = _joined(walk.joint, mean)
    if normalize:
        total = _joined(walk.joint, total).add_(eps)
        mean /= total.masked_fill_(total == 0, 1.0)
    o.copy_(mean)
    empty = mean.new_empty(0, width)
    rounded = keep and normalize and o.dtype != wide
    return o, e, total if keep and normalize else empty, mean if rounded else empty.clone()


def gated_aggregate_bwd(
    do: Tensor,
    de: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    gate_row: Tensor | None,
    gate_col: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rows: tuple[Tensor, ...],
    columns: tuple[Tensor, ...],
    normalize: bool,
    need_x: bool,
    need_gate: bool,
    need_row: bool,
    need_col: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dx [M, D], dgate [E, D], drow [N, D], dcol [M, D]; empty where not needed."""
    row_ptr, col, edge = rows
    col_ptr, col_row, _, col_edge = columns
    (m, width), n, wide = x.shape, row_ptr.shape[0] - 1, accumulator(x)
    dx = x.new_empty((m, width) if need_x else (0,))
    dgate = x.new_empty((edge.shape[0], width) if need_gate else (0,))
    drow = x.new_empty((n, width) if need_row else (0,))
    dcol = x.new_empty((m, width) if need_col else (0,))
    w = do.to(wide)
    if normalize:
        w = w / total
    shift = w * mean if normalize else None

    def through(at: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> sigma, w and ds of some edges ij"""
        sigma = _sigmoid(_gates(gate, gate_row, gate_col, at, i, j, wide))
        w_i = w.index_select(0, i)
        ds = w_i * _take(x, j, wide)
        if shift is not None:
            ds -= shift.index_select(0, i)
        ds.mul_(sigma).mul_(1 - sigma)
        if de is not None:
            ds += _take(de, at, wide)
        return sigma, w_i, ds

    if need_x or need_gate or need_col:
        walk, owner, number = (
            make_walk(col_ptr, col_row),
            segment_of(col_ptr, col_row),
            col_edge.long(),
        )
        pieces = walk.cut.shape[0] - 1
        sum_x = w.new_zeros(pieces if need_x else 0, width)
        sum_col = w.new_zeros(pieces if need_col else 0, width)
        for chunk in _chunks(walk.cut, width):
            at = chunk.edges
            sigma, w_i, ds = through(col_edge[at], col_row[at], owner[at])
            if need_x:
                sum_x[chunk.pieces] = chunk.sum(sigma.mul_(w_i))
            if need_gate:
                dgate.index_copy_(0, number[at], ds.to(dgate.dtype))
            if need_col:
                sum_col[chunk.pieces] = chunk.sum(ds)
        for out, sums, need in ((dx, sum_x, need_x), (dcol, sum_col, need_col)):
            if need:
                out.copy_(_joined(walk.joint, sums))
    if need_row and need_gate and dgate.dtype == wide:
        drow.copy_(spmm(make_walk(row_ptr, edge), None, dgate))
    elif need_row:
        walk, owner = make_walk(row_ptr, edge), segment_of(row_ptr, edge)
        sum_row = w.new_zeros(walk.cut.shape[0] - 1, width)
        for chunk in _chunks(walk.cut, width):
            at = chunk.edges
            _, _, ds = through(edge[at], owner[at], col[at])
            sum_row[chunk.pieces] = chunk.sum(ds)
        drow.copy_(_joined(walk.joint, sum_row))
    return dx, dgate, drow, dcol


def _take(x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    return x.index_select(0, index).to(dtype)


def _finite(top: Tensor) -> Tensor:
    """Pivots: 0 where nothing is finite, so that exp(-inf - pivot) is 0."""
    return top.masked_fill(top == -torch.inf, 0.0)


def _messages(
    x: Tensor | None,
    edge_value: Tensor | None,
    col: Tensor,
    edge: Tensor,
    at: slice,
    relu: bool,
    wide: torch.dtype,
) -> Tensor:
    """activation(x_j + edge_value_ij) of the edges in the slots ``at`` of a walk."""
    if x is None:
        assert edge_value is not None
        m = _take(edge_value, edge[at], wide)
    else:
        m = _take(x, col[at], wide)
        if edge_value is not None:
            m += _take(edge_value, edge[at], wide)
    return m.relu_() if relu else m


def _gates(
    gate: Tensor | None,
    gate_row: Tensor | None,
    gate_col: Tensor | None,
    edge: Tensor,
    row: Tensor,
    col: Tensor,
    wide: torch.dtype,
) -> Tensor:
    """gate_ij + gate_row_i + gate_col_j of some edges."""
    given = ((gate, edge), (gate_row, row), (gate_col, col))
    terms = [_take(x, index, wide) for x, index in given if x is not None]
    for term in terms[1:]:
        terms[0] += term
    return terms[0]


def _through_relu(dm: Tensor, x: Tensor) -> Tensor:
    """dm, 0 where ``x`` is not above 0: a masked fill takes ten times as long."""
    return torch.ops.aten.threshold_backward(dm, x, 0)


def _sigmoid(x: Tensor) -> Tensor:
    """In place. PyTorch's own rounds differently where a thread's share ends."""
    return x.neg_().exp_().add_(1.0).reciprocal_()


def _joined(joint: Tensor | None, x: Tensor) -> Tensor:
    """Sums of pieces -> sums of segments."""
    return x if joint is None else bags(torch.arange(x.shape[0], dtype=joint.dtype), x, joint)


def _largest(x: Tensor, owner: Tensor, count: int) -> Tensor:
    """The largest ``x [edges, D]`` of each owner, [count, D]; -inf for none."""
    top = x.new_full((count, x.shape[1]), -torch.inf)
    return top.scatter_reduce_(0, owner.long()[:, None].expand_as(x), x, "amax")


def _first_largest(
    x: Tensor | None, edge_value: Tensor | None, rows: tuple[Tensor, ...], relu: bool
) -> tuple[Tensor, Tensor]:
    """-> the largest message of each row and its edge, [N, D]: 0 and -1 for none."""
    row_ptr, col, edge = rows
    like = edge_value if x is None else x
    assert like is not None
    wide, width, walk = accumulator(like), like.shape[1], make_walk(row_ptr, edge)
    pieces = walk.cut.shape[0] - 1
    value = like.new_full((pieces, width), -torch.inf, dtype=wide)
    none = torch.iinfo(edge.dtype).max
    first = edge.new_full((pieces, width), none)
    for chunk in _chunks(walk.cut, width):
        m = _messages(x, edge_value, col, edge, chunk.edges, False, wide)
        number = edge[chunk.edges, None].expand_as(m)
        found = _firsts(m, number, chunk.owner(), chunk.ptr.shape[0] - 1, none)
        value[chunk.pieces], first[chunk.pieces] = found
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
    top = _largest(x, owner, count)
    largest = (x == top.index_select(0, owner)) | x.isnan()
    first = number.new_full(top.shape, none)
    index = owner.long()[:, None].expand_as(x)
    return top, first.scatter_reduce_(0, index, number.masked_fill(~largest, none), "amin")

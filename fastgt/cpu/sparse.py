"""Sparse products over segments of edges, the fastest that PyTorch has on a CPU.

A segment is summed by one thread in edge order, a long one in pieces of fixed length so that its
rounding errors do not add up: results do not depend on the number of threads.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

with warnings.catch_warnings():
    # PyTorch says "sparse CSR support is in beta state" at the first such tensor of a process
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))

_LONG = 2**14  # edges of a segment beyond which it is summed in pieces
_NARROW = 8  # float32 channels from which on PyTorch's sampled products are vectorised
_ORDINARY = 20.0  # logits up to which any of a row's keeps exp() in range


def accumulator(x: Tensor) -> torch.dtype:
    """What sums over ``x`` are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Walk(NamedTuple):
    """Segments of edges, the other end of each edge, and how long segments are cut for sums."""

    ptr: Tensor  # [segments + 1]
    other: Tensor  # [E]
    cut: Tensor  # [pieces + 1], ptr and what lies between
    joint: Tensor | None  # [segments + 1], the pieces of each segment; None: one each


def make_walk(ptr: Tensor, index: Tensor) -> Walk:
    if index.shape[0] <= _LONG or int(ptr.diff().max()) <= _LONG:
        return Walk(ptr, index, ptr, None)
    pieces = (-(-ptr.diff() // _LONG)).clamp_(min=1)
    joint = torch.cat([ptr[:1], pieces.cumsum(0, dtype=ptr.dtype)])
    number = torch.arange(int(joint[-1]), dtype=ptr.dtype)
    within = (number - joint[:-1].repeat_interleave(pieces)) * _LONG
    cut = torch.cat([ptr[:-1].repeat_interleave(pieces) + within, ptr[-1:]])
    return Walk(ptr, index, cut, joint)


def segment_of(ptr: Tensor, index: Tensor) -> Tensor:
    """The segment of every edge."""
    segment = torch.arange(ptr.shape[0] - 1, dtype=ptr.dtype)
    return segment.repeat_interleave(ptr.diff(), output_size=index.shape[0])


@dataclass(frozen=True, eq=False)
class Edges:
    """The edges that some heads go over: all, or those of the rows where a head is active."""

    rows: Walk
    row: Tensor  # [E]
    occupied: Tensor  # [N], which rows have any
    every: Tensor  # the caller's number of all edges
    attributes: Any = None  # of all edges, in row order
    cols: Any = None  # of the backward: the walk by columns
    slot: Any = None  # [E], where an edge of it stands by rows
    place: Any = None  # [E], where it stands among all edges
    active: Any = None  # [N] bool, the rows they belong to

    @cached_property
    def edge(self) -> Tensor:
        """The caller's number, [E]."""
        return self.every if self.place is None else self.every.index_select(0, self.place)

    @cached_property
    def caller(self) -> Tensor:
        return self.edge.long()

    @cached_property
    def attr(self) -> Any:
        """[E, C]"""
        if self.attributes is None or self.place is None:
            return self.attributes
        return self.attributes.index_select(0, self.place)

    def __len__(self) -> int:
        return self.row.shape[0]

    def of(self, active: Tensor) -> Edges:
        """Those of the ``active [N]`` rows."""
        kept = active.index_select(0, self.row)
        place = kept.nonzero().squeeze(1)
        ptr = _summed(torch.where(active, self.rows.ptr.diff(), 0), self.rows.ptr)
        cols = slot = None
        if self.cols is not None:
            by_col = kept.index_select(0, self.slot)
            at = by_col.nonzero().squeeze(1)
            col_ptr = _summed(by_col, self.cols.ptr).index_select(0, self.cols.ptr)
            cols = make_walk(col_ptr, self.cols.other.index_select(0, at))
            number = kept.cumsum(0, dtype=self.slot.dtype) - 1
            slot = number.index_select(0, self.slot.index_select(0, at))
        return Edges(
            make_walk(ptr, self.rows.other.index_select(0, place)),
            self.row.index_select(0, place),
            self.occupied & active,
            self.every,
            self.attributes,
            cols,
            slot,
            place,
            active,
        )


def walk_edges(
    ptr: Tensor,
    col: Tensor,
    edge: Tensor,
    attr: Tensor | None = None,
    columns: Sequence[Tensor] = (),  # ptr, row, slot
) -> Edges:
    rows, row, occupied = make_walk(ptr, col), segment_of(ptr, col), ptr.diff() > 0
    if not columns:
        return Edges(rows, row, occupied, edge, attr)
    col_ptr, col_row, slot = columns[:3]
    return Edges(rows, row, occupied, edge, attr, make_walk(col_ptr, col_row), slot)


def runs(
    heads: int, together: int, edges: Edges, on_rows: Tensor | None
) -> Iterator[tuple[slice, Edges]]:
    """Heads that go together, and the edges they go over.

    Those that are active in all rows, up to so many ``together``; one that is masked in some,
    alone. Heads that are masked in all rows are left out.
    """
    full, some = [True] * heads, [True] * heads
    if on_rows is not None:
        full, some = on_rows.all(0).tolist(), on_rows.any(0).tolist()
    start = 0
    while start < heads:
        stop = start + 1
        while full[start] and stop < min(start + together, heads) and full[stop]:
            stop += 1
        if full[start]:
            yield slice(start, stop), edges
        elif some[start] and on_rows is not None:
            yield slice(start, stop), edges.of(on_rows[:, start])
        start = stop


def _summed(x: Tensor, like: Tensor) -> Tensor:
    """The sums of the first 0, 1, ... of ``x``."""
    return torch.cat([like[:1], x.cumsum(0, dtype=like.dtype)])


def diagonal(walk: Walk, size: int, heads: slice) -> Walk:
    """The pattern once for each head along the diagonal; ``size`` is what index runs over."""
    edges, joint = walk.other.shape[0], walk.joint
    ptr = _chained(walk.ptr, edges, heads)
    cut = ptr
    if joint is not None:
        cut = _chained(walk.cut, edges, heads)
        joint = _chained(joint, walk.cut.shape[0] - 1, heads)
    return Walk(ptr, shifted(walk.other, size, heads), cut, joint)


def _chained(ptr: Tensor, total: int, heads: slice) -> Tensor:
    """Boundaries once for each head, one after the other; they end at ``total``."""
    if heads.stop - heads.start == 1:
        return ptr
    starts = shifted(ptr[:-1], total, heads)
    return torch.cat([starts, ptr[-1:] * (heads.stop - heads.start)])


def shifted(index: Tensor, size: int, heads: slice) -> Tensor:
    count = heads.stop - heads.start
    if count == 1:
        return index
    return (index + torch.arange(count, dtype=index.dtype)[:, None] * size).flatten()


def stack(x: Tensor, heads: slice, dtype: torch.dtype, ones: int = 0) -> Tensor:
    """``x [N, H, ...]`` of some heads, one below the other, [heads * N, ...]: a copy.

    Followed by columns of ones, for sums of the weights beside those of the weighted rows.
    """
    x = x[:, heads].transpose(0, 1)
    if not ones:
        return x.to(dtype, memory_format=torch.contiguous_format, copy=True).flatten(0, 1)
    stacked = x.new_empty(*x.shape[:-1], x.shape[-1] + ones, dtype=dtype)
    stacked[..., :-ones] = x
    stacked[..., -ones:] = 1.0
    return stacked.flatten(0, 1)


def unstack(x: Tensor, n: int) -> Tensor:
    return x.unflatten(0, (-1, n)).transpose(0, 1) if n else x[:0].unsqueeze(1)


def sddmm(
    x: Tensor, y: Tensor, walk: Walk, scale: float = 1.0, onto: Tensor | None = None
) -> Tensor:
    """scale * x_i . y_j for every edge, in row order; added to ``onto`` in place, if given."""
    s = x.new_zeros(walk.other.shape[0]) if onto is None else onto
    if not s.shape[0]:
        return s
    if x.dtype == torch.float32 and 1 < x.shape[1] < _NARROW:
        # zeros cost less than products one by one
        x, y = (pad(t, (0, _NARROW - t.shape[1])) for t in (x, y))
    # PyTorch takes at most rows * columns entries: a denser multigraph gets empty columns
    width = max(y.shape[0], -(-s.shape[0] // x.shape[0]))
    if width > y.shape[0]:
        y = pad(y, (0, 0, 0, width - y.shape[0]))
    shape = x.shape[0], width
    product = torch.sparse_csr_tensor(walk.ptr, walk.other, s, shape, check_invariants=False)
    # with itself as out, its indices are not copied
    torch.sparse.sampled_addmm(product, x, y.t(), alpha=scale, out=product)
    return s


def spmm(walk: Walk, weight: Tensor | None, x: Tensor) -> Tensor:
    """sum over each segment of weight_e * x[index_e], [segments, D].

    A weighted embedding bag is this product, and the fastest one that PyTorch has on a CPU. It
    adds the edges of a bag one after the other.
    """
    out = bags(walk.other, x, walk.cut, weight)
    if walk.joint is None:
        return out
    return bags(torch.arange(out.shape[0], dtype=walk.cut.dtype), out, walk.joint)


def bags(index: Tensor, x: Tensor, ptr: Tensor, weight: Tensor | None = None) -> Tensor:
    return embedding_bag(
        index, x, ptr, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


def own(walk: Walk) -> Walk:
    """The walk whose other end of an edge is the edge's own number."""
    return walk._replace(other=torch.arange(walk.other.shape[0], dtype=walk.other.dtype))


def segment_sum(own: Walk, x: Tensor) -> Tensor:
    """The sum of each segment's ``x [E]``."""
    return spmm(own, None, x[:, None]).squeeze(1)


def per_edge(x: Tensor, row: Tensor, n: int) -> Tensor:
    """What a row has, for each of its edges; ``x`` has several heads of n rows."""
    return x.unflatten(0, (-1, n)).index_select(1, row).flatten(0, 1) if n else x


def pivots(s: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor | None]:
    """A logit of each row, to be subtracted from all, and which rows have no finite one, if any.

    A row's first logit serves where all are of ordinary size, its largest elsewhere: a choice
    that depends on nothing outside of the row.
    """
    if not s.shape[0]:
        return s.new_zeros(ptr.shape[0] - 1), None
    first = s.index_select(0, ptr[:-1].clamp(max=s.shape[0] - 1))
    low, high = (float(x) for x in torch.aminmax(s))
    if low >= -_ORDINARY and high <= _ORDINARY:
        return first, None
    top = torch.segment_reduce(s, "max", offsets=ptr, unsafe=True)
    dead = top == -torch.inf
    ordinary = (top.abs() <= _ORDINARY) & (first.abs() <= _ORDINARY)
    return torch.where(ordinary, first, top.masked_fill_(dead, 0.0)), dead

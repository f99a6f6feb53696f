"""Edges on a CPU, some thousand at a time: for segment_softmax, aggregate and gated_aggregate.

What belongs to edges is made for a chunk of them that stays in the processor's cache, summed there
and forgotten: the working memory is O(N D). Chunks follow the segments of a walk, long ones in
pieces as in ``attention.py``: what a segment's sum is depends neither on other segments nor on the
number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastgt.cpu.sparse import bags

_ELEMENTS = 2**18  # of the messages of a chunk


class Chunk(NamedTuple):
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


def chunks(cut: Tensor, width: int) -> Iterator[Chunk]:
    """Chunks of ``cut [pieces + 1]``, of about ``_ELEMENTS`` numbers each, that have edges."""
    size = max(1, _ELEMENTS // max(1, width))
    num_edges = int(cut[-1])
    starts = torch.arange(0, num_edges, size, dtype=cut.dtype)
    firsts = [*torch.searchsorted(cut[:-1], starts).tolist(), cut.shape[0] - 1]
    for first, last in itertools.pairwise(firsts):
        begin, end = int(cut[first]), int(cut[last])
        if begin < end:
            yield Chunk(slice(first, last), slice(begin, end), cut[first : last + 1] - begin)


def take(x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    return x.index_select(0, index).to(dtype)


def finite(top: Tensor) -> Tensor:
    """Pivots: 0 where nothing is finite, so that exp(-inf - pivot) is 0."""
    return top.masked_fill(top == -torch.inf, 0.0)


def joined(joint: Tensor | None, x: Tensor) -> Tensor:
    """Sums of pieces -> sums of segments."""
    return x if joint is None else bags(torch.arange(x.shape[0], dtype=joint.dtype), x, joint)


def largest(x: Tensor, owner: Tensor, count: int) -> Tensor:
    """The largest ``x [edges, D]`` of each owner, [count, D]; -inf for none."""
    top = x.new_full((count, x.shape[1]), -torch.inf)
    return top.scatter_reduce_(0, owner.long()[:, None].expand_as(x), x, "amax")

"""Sums, means and maxima over graphs, and virtual nodes, where a graph lies on several ranks.

Each rank sums its own nodes and one all-reduce adds the ranks' sums, in float32 or float64. The
maximum takes two: of the values, and of which rank has the first node that has it, which alone gets
the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.distributed.collectives import sum_over_ranks
from fastgt.distributed.offsets import RankOffsets
from fastgt.ops import segment_pool
from fastgt.ops.checks import accumulator
from fastgt.ops.implementation import Impl


def segment_sum(offsets: RankOffsets, x: Tensor, impl: Impl | None) -> Tensor:
    """See :func:`fastgt.segment_sum`: x ``[n, ...]`` of own rows -> ``[G, ...]``."""
    local = segment_pool.segment_sum(x.to(accumulator(x)), offsets.local, impl=impl)
    return sum_over_ranks(local, offsets.group).to(x.dtype)


def segment_mean(offsets: RankOffsets, x: Tensor, impl: Impl | None) -> Tensor:
    """See :func:`fastgt.segment_mean`."""
    wide = x.to(accumulator(x))
    total = sum_over_ranks(segment_pool.segment_sum(wide, offsets.local, impl=impl), offsets.group)
    sizes = offsets.sizes.clamp(min=1).to(wide.dtype)
    return (total / sizes.view(-1, *[1] * (x.ndim - 1))).to(x.dtype)


def segment_max(offsets: RankOffsets, x: Tensor, impl: Impl | None) -> Tensor:
    """See :func:`fastgt.segment_max`."""
    local, group = offsets.local, offsets.group
    found = segment_pool.segment_max(x, local, impl=impl)
    shape = (-1, *[1] * (x.ndim - 1))
    empty = (local.diff() == 0).view(shape)
    top = group.largest(found.detach().masked_fill(empty, -torch.inf))
    # NaN is the largest of all, wherever it stands
    nan = group.largest(found.detach().isnan().to(torch.uint8)).bool()
    mine = torch.where(nan, found.detach().isnan(), (found.detach() == top) & ~empty)
    # the first of several ranks that have it: the one whose node has the smallest number
    top_of_nodes = segment_pool.of_nodes(top, local, len(x), impl)
    nan_of_nodes = segment_pool.of_nodes(nan.to(x.dtype), local, len(x), impl).bool()
    has = torch.where(nan_of_nodes, x.detach().isnan(), x.detach() == top_of_nodes)
    numbers = -offsets.shard.part.rows.view(shape).to(torch.float64)
    numbers = torch.where(has, numbers, -torch.inf)
    first = segment_pool.segment_max(numbers, local, impl=impl).masked_fill(~mine, -torch.inf)
    mine &= first == group.largest(first)
    share = torch.where(mine, found, 0)
    return sum_over_ranks(share, group)


def virtual_node(
    offsets: RankOffsets, x: Tensor, state: Tensor, impl: Impl | None
) -> tuple[Tensor, Tensor]:
    """See :func:`fastgt.virtual_node`: every rank has the state of every graph."""
    y, own = segment_pool.virtual_node(x, state, offsets.local, impl=impl)
    # the own sum has the state once on every rank
    wide = own.to(accumulator(own)) - state.to(accumulator(own))
    return y, (state + sum_over_ranks(wide, offsets.group)).to(y.dtype)

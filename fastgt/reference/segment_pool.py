"""The meaning of ``segment_sum``, ``segment_mean``, ``segment_max`` and ``virtual_node``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.reference.aggregate import first_of_largest
from fastgt.reference.sums import row_sums


def segment_sum(x: Tensor, offsets: Tensor) -> Tensor:
    """See :func:`fastgt.segment_sum`."""
    return row_sums(x, _graph_of(offsets), offsets.shape[0] - 1).to(x.dtype)


def segment_mean(x: Tensor, offsets: Tensor) -> Tensor:
    """See :func:`fastgt.segment_mean`."""
    total = row_sums(x, _graph_of(offsets), offsets.shape[0] - 1)
    sizes = offsets.diff().clamp(min=1).view(-1, *[1] * (x.ndim - 1))
    return (total / sizes).to(x.dtype)


def segment_max(x: Tensor, offsets: Tensor) -> Tensor:
    """See :func:`fastgt.segment_max`."""
    return first_of_largest(x, _graph_of(offsets), offsets.shape[0] - 1)


def virtual_node(x: Tensor, state: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`fastgt.virtual_node`."""
    y = x + state[_graph_of(offsets)]
    return y, state + segment_sum(y, offsets)


def _graph_of(offsets: Tensor) -> Tensor:
    """The number of each node's graph, [N]."""
    graphs = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return graphs.repeat_interleave(offsets.diff())

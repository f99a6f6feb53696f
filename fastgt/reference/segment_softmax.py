"""The meaning of ``segment_softmax``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.graph import Graph
from fastgt.reference.sums import over_channels, row_sums


def segment_softmax(x: Tensor, graph: Graph) -> Tensor:
    """See :func:`fastgt.segment_softmax`."""
    row = graph.edge_index[1]
    index = over_channels(row, x)
    shape = graph.num_rows, *x.shape[1:]
    # any pivot gives the same result; the row maximum keeps exp() in range
    pivot = x.new_full(shape, -torch.inf).scatter_reduce(0, index, x.detach(), "amax")
    p = (x - pivot.masked_fill(pivot == -torch.inf, 0.0)[row]).exp()  # [E, ...]
    total = row_sums(p, row, graph.num_rows)
    return (p / total.masked_fill(total == 0, 1.0)[row]).to(x.dtype)

"""The meaning of ``aggregate``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastgt.graph import Graph
from fastgt.reference.sums import along_channels, over_channels, row_sums


def aggregate(
    x: Tensor | None,
    graph: Graph,
    *,
    reduce: Literal["sum", "mean", "max"] = "sum",
    edge_value: Tensor | None = None,
    edge_weight: Tensor | None = None,
    edge_attr: Tensor | None = None,
    edge_value_weight: Tensor | None = None,
    activation: Literal["relu"] | None = None,
) -> Tensor:
    """See :func:`fastgt.aggregate`."""
    column, row = graph.edge_index
    terms = [] if x is None else [x[column]]
    terms += [] if edge_value is None else [edge_value]
    if edge_attr is not None and edge_value_weight is not None:
        terms.append(torch.tensordot(edge_attr, edge_value_weight, 1))
    message = sum(terms[1:], start=terms[0])  # [E, ...]
    if activation == "relu":
        message = message.relu()
    if edge_weight is not None:
        message = message * along_channels(edge_weight, message)
    rows = graph.num_rows
    if reduce == "max":
        return first_of_largest(message, row, rows)
    out = row_sums(message, row, rows)
    if reduce == "mean":
        degree = graph.row_degree.clamp(min=1)
        out = out / degree.view(-1, *[1] * (out.ndim - 1))
    return out.to(message.dtype)


def first_of_largest(message: Tensor, row: Tensor, rows: int) -> Tensor:
    """The maximum over the edges of each row, whose gradient goes to the first of the largest."""
    # a last row of zeros is for rows without edges
    index, value = over_channels(row, message), message.detach()
    top = value.new_full((rows, *value.shape[1:]), -torch.inf)
    top = top.scatter_reduce(0, index, value, "amax")
    largest = (value == top[row]) | value.isnan()
    number = over_channels(torch.arange(len(row), device=row.device), message)
    number = number.masked_fill(~largest, len(row))
    first = index.new_full(top.shape, len(row)).scatter_reduce(0, index, number, "amin")
    return torch.cat([message, message.new_zeros(1, *message.shape[1:])]).gather(0, first)

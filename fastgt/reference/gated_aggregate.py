"""The meaning of ``gated_aggregate``."""

from __future__ import annotations

import math
from typing import overload

from torch import Tensor

from fastgt.contract import Aux, AuxRequest
from fastgt.graph import Graph
from fastgt.reference.sums import along_channels, row_sums


@overload
def gated_aggregate(
    x: Tensor,
    graph: Graph,
    gate: Tensor | None = None,
    *,
    gate_row: Tensor | None = None,
    gate_col: Tensor | None = None,
    edge_weight: Tensor | None = None,
    edge_value: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    return_aux: None = None,
) -> Tensor: ...


@overload
def gated_aggregate(
    x: Tensor,
    graph: Graph,
    gate: Tensor | None = None,
    *,
    gate_row: Tensor | None = None,
    gate_col: Tensor | None = None,
    edge_weight: Tensor | None = None,
    edge_value: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    return_aux: AuxRequest,
) -> tuple[Tensor, Aux]: ...


def gated_aggregate(
    x: Tensor,
    graph: Graph,
    gate: Tensor | None = None,
    *,
    gate_row: Tensor | None = None,
    gate_col: Tensor | None = None,
    edge_weight: Tensor | None = None,
    edge_value: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Aux]:
    """See :func:`fastgt.gated_aggregate`."""
    column, row = graph.edge_index
    terms = [] if gate is None else [gate]
    terms += [] if gate_row is None else [gate_row[row]]
    terms += [] if gate_col is None else [gate_col[column]]
    e = sum(terms, start=x.new_zeros(()))  # [E, ...]
    eta = e.sigmoid()
    if edge_weight is not None:
        eta = eta * along_channels(edge_weight, e)
    value = x[column] if edge_value is None else x[column] + edge_value
    out = row_sums(eta * value, row, graph.num_rows)
    if normalize:
        total = row_sums(eta, row, graph.num_rows) + eps
        out = out / total.masked_fill(total == 0, math.inf)
    out = out.to(x.dtype)
    if return_aux is None:
        return out
    return out, Aux(edge_scores=e if return_aux.edge_scores else None)

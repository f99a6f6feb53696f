"""The meaning of ``channelwise_attention``."""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

from fastgt.contract import Aux, AuxRequest, ChannelwiseInputs, ChannelwiseLogit, HeadMask
from fastgt.graph import Graph
from fastgt.reference.clamps import bounds, clamped
from fastgt.reference.heads import gated, masked_aux, of_rows
from fastgt.reference.sums import accumulator, over_channels, row_sums


@overload
def channelwise_attention(
    logits: Tensor, v: Tensor | None, graph: Graph, *, return_aux: None = None, **options: Any
) -> Tensor: ...


@overload
def channelwise_attention(
    logits: Tensor, v: Tensor | None, graph: Graph, *, return_aux: AuxRequest, **options: Any
) -> tuple[Tensor, Aux]: ...


def channelwise_attention(  # type: ignore[misc]  # overloads leave the options unnamed
    logits: Tensor,
    v: Tensor | None,
    graph: Graph,
    *,
    edge_value: Tensor | None = None,
    logit_clamp: float | tuple[float, float] | None = None,
    denominator_eps: float = 0.0,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Aux]:
    """See :func:`fastgt.channelwise_attention`, which has ``impl`` besides, checks its arguments
    and follows autocast."""
    inputs = ChannelwiseInputs(logits, v, edge_value)
    logit = ChannelwiseLogit(*bounds(logit_clamp), denominator_eps)
    request = AuxRequest() if return_aux is None else return_aux
    on, dense = None, False
    if head_gate is not None:
        on = of_rows(head_gate.detach() != 0, graph)  # [1 or N_rows, H]
        dense = dense_gate_grad and head_gate.dtype != torch.bool
    mask = HeadMask(None if dense else on, None)
    out, lse, weights = masked_channelwise_attention(inputs, graph, mask, logit)
    aux = Aux(lse if request.lse else None, weights if request.weights else None)
    if head_gate is not None:
        out = gated(out, head_gate, graph, dense)
    if dense and on is not None:
        aux = masked_aux(aux, on.expand(graph.num_rows, -1), graph)
    return out if return_aux is None else (out, aux)


def masked_channelwise_attention(
    inputs: ChannelwiseInputs, graph: Graph, mask: HeadMask, logit: ChannelwiseLogit
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out, lse and weights of the active heads, without gates."""
    logits, v, edge_value = inputs
    column, row = graph.edge_index
    s = logits
    on = None
    if mask.rows is not None:
        on = mask.rows.expand(graph.num_rows, -1)[row][..., None]  # [E, H, 1]
        s = torch.where(on, s, 0)
    if logit.low > -math.inf or logit.high < math.inf:
        s = clamped(s, (logit.low, logit.high))
    terms = [] if v is None else [v[column]]
    terms += [] if edge_value is None else [edge_value]
    value = sum(terms[1:], start=terms[0])  # [E, ...]
    if on is not None:
        s = torch.where(on, s, -torch.inf)

    shape = graph.num_rows, *s.shape[1:]
    # any pivot gives the same result; the row maximum keeps exp() in range
    index = over_channels(row, s)
    pivot = s.new_full(shape, -torch.inf).scatter_reduce(0, index, s.detach(), "amax")
    pivot = pivot.masked_fill(pivot == -torch.inf, 0.0)
    p = (s - pivot[row]).exp()
    total = row_sums(p, row, graph.num_rows)
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    # through the logarithm: exp(-pivot) alone would overflow
    divisor = safe + (math.log(logit.eps) - pivot).exp() if logit.eps else safe
    weights = (p / divisor[row]).to(p.dtype)
    out = row_sums(weights * value, row, graph.num_rows).to(value.dtype).masked_fill(empty, 0.0)
    lse = (pivot + safe.log()).masked_fill(empty, -torch.inf).to(accumulator(s))
    return out, lse, weights.detach()

"""The meaning of ``neighborhood_attention``."""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

from fastgt.contract import Aux, AuxRequest, Dropout, EdgeTensors, Inputs, Logit
from fastgt.graph import Graph
from fastgt.philox import LEVELS, DropoutSeed, kept, threshold
from fastgt.reference.clamps import bounds, clamped
from fastgt.reference.heads import gated, masked, masked_aux, of_rows
from fastgt.reference.sums import accumulator, einsum, row_sums


@overload
def neighborhood_attention(*inputs: Any, return_aux: None = None, **options: Any) -> Tensor: ...


@overload
def neighborhood_attention(
    *inputs: Any, return_aux: AuxRequest, **options: Any
) -> tuple[Tensor, Aux]: ...


def neighborhood_attention(  # type: ignore[misc]  # overloads leave the options unnamed
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph,
    *,
    scale: float | None = None,
    edge_bias: Tensor | None = None,
    edge_gate: Tensor | None = None,
    edge_key: Tensor | None = None,
    edge_value: Tensor | None = None,
    edge_attr: Tensor | None = None,
    edge_key_weight: Tensor | None = None,
    edge_value_weight: Tensor | None = None,
    logit_clamp: float | tuple[float, float] | None = None,
    denominator_eps: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | DropoutSeed | None = None,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Aux]:
    """See :func:`fastgt.neighborhood_attention`, which has ``impl`` besides, checks its arguments
    and follows autocast."""
    low, high = bounds(logit_clamp)
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    numbers, first_head = None, 0
    seed = dropout_seed
    if isinstance(seed, DropoutSeed):
        seed, numbers, first_head = seed
    if dropout_p and seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=q.device)
    if isinstance(seed, int):
        seed = torch.full((1,), seed, device=q.device)
    active, dense = None, False
    if head_gate is not None:
        active = of_rows(head_gate.detach() != 0, graph)
        dense = dense_gate_grad and head_gate.dtype != torch.bool
    edges = EdgeTensors(
        edge_bias, edge_gate, edge_key, edge_value, edge_attr, edge_key_weight, edge_value_weight
    )
    out, aux = masked_attention(
        Inputs(q, k, v),
        edges,
        None if dense else active,
        graph,
        Logit(scale, low, high, denominator_eps),
        Dropout(seed, numbers, dropout_p, first_head),
        AuxRequest() if return_aux is None else return_aux,
    )
    if head_gate is not None:
        out = gated(out, head_gate, graph, dense)
    if dense and active is not None:
        aux = masked_aux(aux, active.expand(len(q), -1), graph)
    return out if return_aux is None else (out, aux)


def masked_attention(
    inputs: Inputs,
    edges: EdgeTensors,
    active: Tensor | None,
    graph: Graph,
    logit: Logit,
    dropout: Dropout,
    request: AuxRequest,
) -> tuple[Tensor, Aux]:
    """:func:`neighborhood_attention` whose heads are masked row by row: ``active [1 or N_rows, H]``
    (None: all heads are). Gradients go through active heads alone."""
    q, k, v = inputs
    edge_bias, edge_gate, edge_key, edge_value, edge_attr, key_weight, value_weight = edges
    scale, low, high, eps = logit
    key, query = graph.edge_index  # [E], in the caller's order
    rows, heads, group = q.shape[0], q.shape[1], q.shape[1] // max(k.shape[1], 1)
    keys, values = (x.repeat_interleave(group, 1)[key] for x in (k, v))  # [E, H, .]
    on_edges = None
    if active is not None:
        on_edges = active.expand(rows, -1)[query][..., None]  # [E, H, 1]
        anywhere = active.any(0)[:, None]
        q = torch.where(active[..., None], q, 0)
        keys, values = torch.where(on_edges, keys, 0), torch.where(on_edges, values, 0)
        edge_key, edge_value = masked(edge_key, on_edges), masked(edge_value, on_edges)
        key_weight, value_weight = masked(key_weight, anywhere), masked(value_weight, anywhere)
        edge_bias = masked(edge_bias, on_edges[..., 0])
        edge_gate = masked(edge_gate, on_edges[..., 0] if _by_head(edge_gate) else on_edges)
    if edge_key is not None:
        keys = keys + edge_key
    if edge_value is not None:
        values = values + edge_value
    if edge_attr is not None and key_weight is not None:
        keys = keys + einsum("ec,chd->ehd", edge_attr, key_weight)
    if edge_attr is not None and value_weight is not None:
        values = values + einsum("ec,chd->ehd", edge_attr, value_weight)

    product = q[query] * keys  # [E, H, D]
    if edge_gate is not None:
        product = product * (edge_gate[..., None] if _by_head(edge_gate) else edge_gate)
    if on_edges is not None:
        # nor do its scores' gradients, whatever they are
        product = torch.where(on_edges, product, 0)
    s = product.sum(-1) * scale  # [E, H]
    if (low, high) != (-math.inf, math.inf):
        s = clamped(s, (low, high))
    if edge_bias is not None:
        s = s + edge_bias
    if on_edges is not None:
        s = torch.where(on_edges[..., 0], s, -torch.inf)

    # any pivot gives the same result; the row maximum keeps exp() in range
    index = query[:, None].expand_as(s)
    pivot = s.new_full((rows, heads), -torch.inf)
    pivot = pivot.scatter_reduce(0, index, s.detach(), "amax")
    pivot = pivot.masked_fill(pivot == -torch.inf, 0.0)
    p = (s - pivot[query]).exp()  # [E, H]
    total = row_sums(p, query, rows)  # [N_rows, H]
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    # through the logarithm: exp(-pivot) alone would overflow
    divisor = safe + (math.log(eps) - pivot).exp() if eps else safe
    weights = (p / divisor[query]).to(p.dtype)
    used = weights
    if dropout.p > 0 and dropout.seed is not None:
        keep = kept(
            dropout.seed,
            graph.num_edges,
            heads,
            dropout.p,
            numbers=dropout.numbers,
            first_head=dropout.first_head,
        )
        used = weights * keep * (LEVELS / max(1, LEVELS - threshold(dropout.p)))
    out = row_sums(used[..., None] * values, query, rows).to(v.dtype)
    out = out.masked_fill(empty[..., None], 0.0)

    lse = None
    if request.lse:
        lse = (pivot + safe.log()).masked_fill(empty, -torch.inf).to(accumulator(q))
    scores = product * scale if request.edge_scores else None
    return out, Aux(lse, weights.detach() if request.weights else None, scores)


def _by_head(edge_gate: Tensor | None) -> bool:
    """Whether gates are [E, H], not [E, H, D]."""
    return edge_gate is not None and edge_gate.ndim == 2

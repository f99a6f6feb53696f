"""The meaning of ``additive_attention``."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from fastgt.contract import AdditiveInputs, AdditiveTerms, Aux, AuxRequest, Dropout
from fastgt.graph import Graph
from fastgt.philox import LEVELS, DropoutSeed, kept, threshold
from fastgt.reference.heads import gated, masked, masked_aux, of_rows
from fastgt.reference.sums import accumulator, einsum, row_sums


@overload
def additive_attention(*inputs: Any, return_aux: None = None, **options: Any) -> Tensor: ...


@overload
def additive_attention(
    *inputs: Any, return_aux: AuxRequest, **options: Any
) -> tuple[Tensor, Aux]: ...


def additive_attention(  # type: ignore[misc]  # overloads leave the options unnamed
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph,
    weight: Tensor,
    *,
    edge_key: Tensor | None = None,
    edge_attr: Tensor | None = None,
    edge_key_weight: Tensor | None = None,
    edge_bias: Tensor | None = None,
    negative_slope: float = 0.2,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | DropoutSeed | None = None,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Aux]:
    """See :func:`fastgt.additive_attention`, which has ``impl`` besides, checks its arguments and
    follows autocast."""
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
    out, aux = masked_additive_attention(
        AdditiveInputs(q, k, v, weight),
        AdditiveTerms(edge_key, edge_attr, edge_key_weight, edge_bias),
        None if dense else active,
        graph,
        negative_slope,
        Dropout(seed, numbers, dropout_p, first_head),
        AuxRequest() if return_aux is None else return_aux,
    )
    if head_gate is not None:
        out = gated(out, head_gate, graph, dense)
    if dense and active is not None:
        aux = masked_aux(aux, active.expand(len(q), -1), graph)
    return out if return_aux is None else (out, aux)


def masked_additive_attention(
    inputs: AdditiveInputs,
    terms: AdditiveTerms,
    active: Tensor | None,
    graph: Graph,
    slope: float,
    dropout: Dropout,
    request: AuxRequest,
) -> tuple[Tensor, Aux]:
    """:func:`additive_attention` whose heads are masked row by row: ``active [1 or N_rows, H]``
    (None: all heads are). Gradients go through active heads alone."""
    q, k, v, weight = inputs
    edge_key, edge_attr, key_weight, edge_bias = terms
    column, row = graph.edge_index  # [E], in the caller's order
    rows, heads = q.shape[:2]
    keys, values = k[column], v[column]  # [E, H, .]
    on_edges = None
    if active is not None:
        on_edges = active.expand(rows, -1)[row][..., None]  # [E, H, 1]
        anywhere = active.any(0)[:, None]
        q, weight = torch.where(active[..., None], q, 0), torch.where(anywhere, weight, 0)
        keys, values = torch.where(on_edges, keys, 0), torch.where(on_edges, values, 0)
        edge_key, key_weight = masked(edge_key, on_edges), masked(key_weight, anywhere)
        edge_bias = masked(edge_bias, on_edges[..., 0])
    t = q[row] + keys  # [E, H, D]
    if edge_key is not None:
        t = t + edge_key
    if edge_attr is not None and key_weight is not None:
        t = t + einsum("ec,chd->ehd", edge_attr, key_weight)
    if on_edges is not None:
        # what attributes put there, NaN perhaps, is not read either
        t = torch.where(on_edges, t, 0)
    s = (weight * leaky_relu(t, slope)).sum(-1)  # [E, H]
    if edge_bias is not None:
        s = s + edge_bias
    if on_edges is not None:
        s = torch.where(on_edges[..., 0], s, -torch.inf)

    # any pivot gives the same result; the row maximum keeps exp() in range
    index = row[:, None].expand_as(s)
    pivot = s.new_full((rows, heads), -torch.inf)
    pivot = pivot.scatter_reduce(0, index, s.detach(), "amax")
    pivot = pivot.masked_fill(pivot == -torch.inf, 0.0)
    p = (s - pivot[row]).exp()
    total = row_sums(p, row, rows)  # [N_rows, H]
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    weights = (p / safe[row]).to(p.dtype)
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
    out = row_sums(used[..., None] * values, row, rows).to(v.dtype)
    out = out.masked_fill(empty[..., None], 0.0)
    lse = None
    if request.lse:
        lse = (pivot + safe.log()).masked_fill(empty, -torch.inf).to(accumulator(q))
    return out, Aux(lse, weights.detach() if request.weights else None)

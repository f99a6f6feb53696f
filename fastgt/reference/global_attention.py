"""The meaning of ``global_attention``."""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

from fastgt.contract import Aux, AuxRequest, Inputs, PairDropout, PairTerms, RaggedPairs
from fastgt.philox import LEVELS, PairDropoutSeed, kept, threshold


@overload
def global_attention(*inputs: Any, return_aux: None = None, **options: Any) -> Tensor: ...


@overload
def global_attention(
    *inputs: Any, return_aux: AuxRequest, **options: Any
) -> tuple[Tensor, Aux]: ...


def global_attention(  # type: ignore[misc]  # overloads leave the options unnamed
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None = None,
    *,
    key_offsets: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | PairDropoutSeed | None = None,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Aux]:
    """See :func:`fastgt.global_attention`, which has ``impl`` besides, checks its arguments and
    follows autocast."""
    queries, keys, first_head = None, None, 0
    seed = dropout_seed
    if isinstance(seed, PairDropoutSeed):
        seed, queries, keys, first_head = seed
    if dropout_p and seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=q.device)
    if isinstance(seed, int):
        seed = torch.full((1,), seed, device=q.device)
    mask, dense = None, False
    if head_gate is not None:
        mask = torch.atleast_2d(head_gate.detach() != 0)
        dense = dense_gate_grad and head_gate.dtype != torch.bool
    out, lse = masked_global_attention(
        Inputs(q, k, v),
        PairTerms(
            1 / math.sqrt(q.shape[2]) if scale is None else scale,
            bias,
            bias is not None and bias.shape[0] == k.shape[0],
        ),
        RaggedPairs(offsets, key_offsets, None if dense else mask),
        PairDropout(seed, queries, keys, dropout_p, first_head),
    )
    if head_gate is not None and mask is not None:
        nodes = _graph_of_nodes(offsets, q)
        if dense:
            lse = torch.where(mask.expand(_graphs(offsets), -1)[nodes], lse, -torch.inf)
        if head_gate.dtype != torch.bool:
            wide = torch.promote_types(lse.dtype, head_gate.dtype)
            gate = torch.atleast_2d(head_gate.to(wide))
            if not dense:
                gate = gate.masked_fill(~mask, 0)
            out = out.to(wide) * gate.expand(_graphs(offsets), -1)[nodes][..., None]
            out = out.to(q.dtype)
    if return_aux is None:
        return out
    return out, Aux(lse if return_aux.lse else None)


def masked_global_attention(
    inputs: Inputs, terms: PairTerms, graphs: RaggedPairs, dropout: PairDropout
) -> tuple[Tensor, Tensor]:
    """-> out and lse of the active heads, without gates."""
    q, k, v = inputs
    dtype, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    rows = [0, len(q)] if graphs.offsets is None else graphs.offsets.tolist()
    columns = rows if graphs.key_offsets is None else graphs.key_offsets.tolist()
    nothing = q[:0].to(wide).sum(2)  # [0, H], where there is no graph
    outs = [nothing[..., None] * v[:0].to(wide).repeat_interleave(group, 1)]
    lses, pairs = [nothing], 0
    ends = zip(rows[:-1], rows[1:], columns[:-1], columns[1:], strict=True)
    for g, (begin, end, first, last) in enumerate(ends):
        n, m = end - begin, last - first
        qs = q[begin:end].to(wide)
        # sums of finite numbers overflow float16
        ks, vs = (x[first:last].to(wide).repeat_interleave(group, 1) for x in (k, v))
        bias = None
        if terms.bias is not None and terms.per_key:
            bias = terms.bias[first:last].to(wide)[None]  # [1, m, H]
        elif terms.bias is not None:
            bias = terms.bias[pairs : pairs + n * m].to(wide).view(n, m, heads)
        on = None
        if graphs.head_mask is not None:
            on = graphs.head_mask[g if graphs.head_mask.shape[0] > 1 else 0]  # [H]
            qs, ks, vs = (torch.where(on[:, None], x, 0) for x in (qs, ks, vs))
            bias = None if bias is None else torch.where(on, bias, 0)
        s = torch.einsum("nhd,mhd->nmh", qs, ks) * terms.scale
        if bias is not None:
            s = s + bias
        if on is not None:
            s = torch.where(on, s, -torch.inf)
        # any pivot gives the same result; the row maximum keeps exp() in range
        pivot = s.new_full((n, heads), -torch.inf) if m == 0 else s.detach().amax(1)
        pivot = pivot.masked_fill(pivot == -torch.inf, 0.0)
        p = (s - pivot[:, None]).exp()
        total = p.sum(1)  # [n, H]
        empty = total == 0
        safe = total.masked_fill(empty, 1.0)
        weights = p / safe[:, None]
        if dropout.p > 0 and dropout.seed is not None:
            numbers = None
            if dropout.query_numbers is not None and dropout.key_numbers is not None:
                mine, theirs = dropout.query_numbers[begin:end], dropout.key_numbers[first:last]
                numbers = (mine[:, None] + theirs).flatten()
            keep = kept(
                dropout.seed,
                n * m,
                heads,
                dropout.p,
                first=pairs,
                numbers=numbers,
                first_head=dropout.first_head,
            ).view(n, m, heads)
            weights = weights * keep * (LEVELS / max(1, LEVELS - threshold(dropout.p)))
        out = torch.einsum("nmh,mhd->nhd", weights, vs)
        outs.append(out.masked_fill(empty[..., None], 0.0))
        lses.append((pivot + safe.log()).masked_fill(empty, -torch.inf))
        pairs += n * m
    return torch.cat(outs).to(dtype), torch.cat(lses)


def _graphs(offsets: Tensor | None) -> int:
    return 1 if offsets is None else offsets.shape[0] - 1


def _graph_of_nodes(offsets: Tensor | None, q: Tensor) -> Tensor:
    """[N], the number of each node's graph."""
    if offsets is None:
        return torch.zeros(len(q), dtype=torch.int64, device=q.device)
    graphs = torch.arange(len(offsets) - 1, device=q.device)
    return graphs.repeat_interleave(offsets.diff(), output_size=len(q))

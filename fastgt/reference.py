"""The meaning of every operator in plain PyTorch: same names, same signatures, slow on purpose.

Everything here is differentiable, any number of times, by autograd alone.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastgt.contract import (
    Aux,
    AuxRequest,
    ChannelwiseInputs,
    ChannelwiseLogit,
    Dropout,
    EdgeTensors,
    HeadMask,
    Inputs,
    Logit,
)
from fastgt.graph import Graph
from fastgt.philox import LEVELS, kept, threshold


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
    dropout_seed: int | Tensor | None = None,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, Aux]:
    """See :func:`fastgt.neighborhood_attention`, which has ``impl`` besides, checks its arguments
    and follows autocast."""
    low, high = _bounds(logit_clamp)
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    seed = dropout_seed
    if dropout_p and seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=q.device)
    if isinstance(seed, int):
        seed = torch.full((1,), seed, device=q.device)
    gate = active = None
    if head_gate is not None:
        gate = head_gate  # [H], or [N_rows, H]
        if gate.ndim == 2:
            gate = gate.repeat_interleave(graph.graph_ptr.diff(), 0, output_size=len(q))
        active = torch.atleast_2d(gate.detach() != 0)
    dense = dense_gate_grad and gate is not None and gate.dtype != torch.bool
    edges = EdgeTensors(
        edge_bias, edge_gate, edge_key, edge_value, edge_attr, edge_key_weight, edge_value_weight
    )
    out, aux = masked_attention(
        Inputs(q, k, v),
        edges,
        None if dense else active,
        graph,
        Logit(scale, low, high, denominator_eps),
        Dropout(seed, dropout_p),
        AuxRequest() if return_aux is None else return_aux,
    )
    if gate is not None and gate.dtype != torch.bool:
        # the gradient of a masked head is 0, whatever stands upstream
        gate = gate if dense else gate.masked_fill(gate.detach() == 0, 0)
        wide = torch.promote_types(_accumulator(out), gate.dtype)
        out = (out.to(wide) * gate.to(wide)[..., None]).to(out.dtype)
    if dense and active is not None:
        aux = _masked_aux(aux, active.expand(len(q), -1), graph)
    return out if return_aux is None else (out, aux)


def _masked_aux(aux: Aux, active: Tensor, graph: Graph) -> Aux:
    """As where masked heads were not computed."""
    lse, weights, edge_scores = aux
    on_edges = active[graph.edge_index[1]]
    if lse is not None:
        lse = torch.where(active[..., None] if lse.ndim == 3 else active, lse, -torch.inf)
    if weights is not None:
        weights = _masked(weights, on_edges[..., None] if weights.ndim == 3 else on_edges)
    return Aux(lse, weights, _masked(edge_scores, on_edges[..., None]))


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
        edge_key, edge_value = _masked(edge_key, on_edges), _masked(edge_value, on_edges)
        key_weight, value_weight = _masked(key_weight, anywhere), _masked(value_weight, anywhere)
        edge_bias = _masked(edge_bias, on_edges[..., 0])
        edge_gate = _masked(edge_gate, on_edges[..., 0] if _by_head(edge_gate) else on_edges)
    if edge_key is not None:
        keys = keys + edge_key
    if edge_value is not None:
        values = values + edge_value
    if edge_attr is not None and key_weight is not None:
        keys = keys + _einsum("ec,chd->ehd", edge_attr, key_weight)
    if edge_attr is not None and value_weight is not None:
        values = values + _einsum("ec,chd->ehd", edge_attr, value_weight)

    product = q[query] * keys  # [E, H, D]
    if edge_gate is not None:
        product = product * (edge_gate[..., None] if _by_head(edge_gate) else edge_gate)
    if on_edges is not None:
        # nor do its scores' gradients, whatever they are
        product = torch.where(on_edges, product, 0)
    s = product.sum(-1) * scale  # [E, H]
    if (low, high) != (-math.inf, math.inf):
        s = _clamped(s, (low, high))
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
    total = _row_sums(p, query, rows)  # [N_rows, H]
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    # through the logarithm: exp(-pivot) alone would overflow
    divisor = safe + (math.log(eps) - pivot).exp() if eps else safe
    weights = (p / divisor[query]).to(p.dtype)
    used = weights
    if dropout.p > 0 and dropout.seed is not None:
        keep = kept(dropout.seed, graph.num_edges, heads, dropout.p)
        used = weights * keep * (LEVELS / max(1, LEVELS - threshold(dropout.p)))
    out = _row_sums(used[..., None] * values, query, rows).to(v.dtype)
    out = out.masked_fill(empty[..., None], 0.0)

    lse = None
    if request.lse:
        lse = (pivot + safe.log()).masked_fill(empty, -torch.inf).to(_accumulator(q))
    scores = product * scale if request.edge_scores else None
    return out, Aux(lse, weights.detach() if request.weights else None, scores)


def _clamped(x: Tensor, bounds: float | tuple[float, float]) -> Tensor:
    """``x.clamp``, whose gradient at a bound itself is 1 (torch 2.14 made torch.clamp's 0)."""
    low, high = _bounds(bounds)
    return torch.where((low <= x) & (x <= high), x, x.detach().clamp(low, high))


def _bounds(logit_clamp: float | tuple[float, float] | None) -> tuple[float, float]:
    if logit_clamp is None:
        return -math.inf, math.inf
    return logit_clamp if isinstance(logit_clamp, tuple) else (-logit_clamp, logit_clamp)


def _masked(x: Tensor | None, on: Tensor) -> Tensor | None:
    return None if x is None else torch.where(on, x, 0)


def _accumulator(x: Tensor) -> torch.dtype:
    """What sums over ``x`` are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _by_head(edge_gate: Tensor | None) -> bool:
    """Whether gates are [E, H], not [E, H, D]."""
    return edge_gate is not None and edge_gate.ndim == 2


def segment_softmax(x: Tensor, graph: Graph) -> Tensor:
    """See :func:`fastgt.segment_softmax`."""
    row = graph.edge_index[1]
    index = _over_channels(row, x)
    shape = graph.num_rows, *x.shape[1:]
    # any pivot gives the same result; the row maximum keeps exp() in range
    pivot = x.new_full(shape, -torch.inf).scatter_reduce(0, index, x.detach(), "amax")
    p = (x - pivot.masked_fill(pivot == -torch.inf, 0.0)[row]).exp()  # [E, ...]
    total = _row_sums(p, row, graph.num_rows)
    return (p / total.masked_fill(total == 0, 1.0)[row]).to(x.dtype)


def aggregate(
    x: Tensor | None,
    graph: Graph,
    *,
    reduce: Literal["sum", "mean", "max"] = "sum",
    edge_value: Tensor | None = None,
    activation: Literal["relu"] | None = None,
) -> Tensor:
    """See :func:`fastgt.aggregate`."""
    column, row = graph.edge_index
    terms = [] if x is None else [x[column]]
    terms += [] if edge_value is None else [edge_value]
    message = sum(terms[1:], start=terms[0])  # [E, ...]
    if activation == "relu":
        message = message.relu()
    rows = graph.num_rows
    if reduce == "max":
        # the first of the largest, by the caller's number; a last row of zeros for rows without
        index, value = _over_channels(row, message), message.detach()
        top = value.new_full((rows, *value.shape[1:]), -torch.inf)
        top = top.scatter_reduce(0, index, value, "amax")
        largest = (value == top[row]) | value.isnan()
        number = _over_channels(torch.arange(len(row), device=row.device), message)
        number = number.masked_fill(~largest, len(row))
        first = index.new_full(top.shape, len(row)).scatter_reduce(0, index, number, "amin")
        return torch.cat([message, message.new_zeros(1, *message.shape[1:])]).gather(0, first)
    out = _row_sums(message, row, rows)
    if reduce == "mean":
        degree = graph.row_degree.clamp(min=1)
        out = out / degree.view(-1, *[1] * (out.ndim - 1))
    return out.to(message.dtype)


@overload
def gated_aggregate(
    x: Tensor,
    graph: Graph,
    gate: Tensor | None = None,
    *,
    gate_row: Tensor | None = None,
    gate_col: Tensor | None = None,
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
    sigma = e.sigmoid()
    out = _row_sums(sigma * x[column], row, graph.num_rows)
    if normalize:
        total = _row_sums(sigma, row, graph.num_rows) + eps
        out = out / total.masked_fill(total == 0, 1.0)
    out = out.to(x.dtype)
    if return_aux is None:
        return out
    return out, Aux(edge_scores=e if return_aux.edge_scores else None)


def _row_sums(x: Tensor, row: Tensor, rows: int) -> Tensor:
    """x [E, ...] -> [N_rows, ...], in float32 (float64): as PyTorch's sums of 16 bits, rounded by
    whoever takes them. Degrees and sums of finite numbers overflow float16."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return x.new_zeros(rows, *x.shape[1:]).index_add(0, row, x)


def _over_channels(index: Tensor, x: Tensor) -> Tensor:
    """An index of each edge, [E], for every channel of ``x [E, ...]``."""
    return index.view(-1, *[1] * (x.ndim - 1)).expand_as(x)


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
    logit = ChannelwiseLogit(*_bounds(logit_clamp), denominator_eps)
    request = AuxRequest() if return_aux is None else return_aux
    on, dense = None, False
    if head_gate is not None:
        on = _of_rows(head_gate.detach() != 0, graph)  # [1 or N_rows, H]
        dense = dense_gate_grad and head_gate.dtype != torch.bool
    mask = HeadMask(None if dense else on, None)
    out, lse, weights = masked_channelwise_attention(inputs, graph, mask, logit)
    aux = Aux(lse if request.lse else None, weights if request.weights else None)
    if head_gate is not None:
        out = _gated(out, head_gate, graph, dense)
    if dense and on is not None:
        aux = _masked_aux(aux, on.expand(graph.num_rows, -1), graph)
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
        s = _clamped(s, (logit.low, logit.high))
    terms = [] if v is None else [v[column]]
    terms += [] if edge_value is None else [edge_value]
    value = sum(terms[1:], start=terms[0])  # [E, ...]
    if on is not None:
        s = torch.where(on, s, -torch.inf)

    shape = graph.num_rows, *s.shape[1:]
    # any pivot gives the same result; the row maximum keeps exp() in range
    index = _over_channels(row, s)
    pivot = s.new_full(shape, -torch.inf).scatter_reduce(0, index, s.detach(), "amax")
    pivot = pivot.masked_fill(pivot == -torch.inf, 0.0)
    p = (s - pivot[row]).exp()
    total = _row_sums(p, row, graph.num_rows)
    empty = total == 0
    safe = total.masked_fill(empty, 1.0)
    # through the logarithm: exp(-pivot) alone would overflow
    divisor = safe + (math.log(logit.eps) - pivot).exp() if logit.eps else safe
    weights = (p / divisor[row]).to(p.dtype)
    out = _row_sums(weights * value, row, graph.num_rows).to(value.dtype).masked_fill(empty, 0.0)
    lse = (pivot + safe.log()).masked_fill(empty, -torch.inf).to(_accumulator(s))
    return out, lse, weights.detach()


def _of_rows(x: Tensor, graph: Graph) -> Tensor:
    """What the heads of all graphs have, ``[H]``, or of each, ``[G, H]``: for every row."""
    if x.ndim == 1:
        return x[None]
    number = torch.arange(graph.num_graphs, device=x.device)
    return x[number.repeat_interleave(graph.graph_ptr.diff(), output_size=graph.num_rows)]


def _gated(out: Tensor, head_gate: Tensor, graph: Graph, dense: bool) -> Tensor:
    """``out [N_rows, H, D]`` times the gates; a gate of 0 has a gradient where ``dense``."""
    if head_gate.dtype == torch.bool:
        return out
    wide = torch.promote_types(_accumulator(out), head_gate.dtype)
    gate = head_gate.to(wide)
    if not dense:
        gate = gate.masked_fill(head_gate.detach() == 0, 0)
    return (out.to(wide) * _of_rows(gate, graph)[..., None]).to(out.dtype)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None = None,
    *,
    feature_map: str = "elu",
    projection: Tensor | None = None,
    eps: float = 1e-6,
    normalize: bool = True,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
) -> Tensor:
    """See :func:`fastgt.linear_attention`."""
    bounds = [0, len(q)] if offsets is None else offsets.tolist()
    keep = None
    if head_gate is not None:
        sizes = torch.tensor(bounds, device=q.device).diff()
        graph_of = torch.arange(len(sizes), device=q.device).repeat_interleave(sizes)
        if not dense_gate_grad or head_gate.dtype == torch.bool:
            mask = torch.atleast_2d(head_gate.detach() != 0)
            keep = mask.expand(len(sizes), -1)[graph_of][..., None]  # [N, H, 1]
            q, k, v = (torch.where(keep, x, 0) for x in (q, k, v))
    dtype, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    # a graph's sums of finite numbers overflow float16
    q, k, v = (x.to(wide) for x in (q, k, v))
    outs = [v[:0]]
    for begin, end in pairwise(bounds):
        if begin == end:
            continue
        f = _features(q[begin:end], feature_map, projection, stabilise_over=(2,))  # [n, H, M]
        g = _features(k[begin:end], feature_map, projection, stabilise_over=(0, 2))
        state = torch.einsum("nhm,nhd->hmd", g, v[begin:end])
        out = torch.einsum("nhm,hmd->nhd", f, state)
        if normalize:
            out = out / (torch.einsum("nhm,hm->nh", f, g.sum(0)) + eps)[..., None]
        outs.append(out)
    whole = torch.cat(outs).to(dtype)
    if keep is not None:
        whole = torch.where(keep, whole, 0)
    if head_gate is None or head_gate.dtype == torch.bool:
        return whole
    wide = torch.promote_types(wide, head_gate.dtype)
    gate = head_gate.to(wide)
    if keep is not None:
        # no gradient of masked heads, whatever stands upstream
        gate = gate.masked_fill(head_gate.detach() == 0, 0)
    if gate.ndim == 2 and offsets is not None:
        gate = gate[graph_of]
    return (whole.to(wide) * gate[..., None]).to(dtype)


def sgformer_attention(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None = None) -> Tensor:
    """See :func:`fastgt.sgformer_attention`."""
    bounds = [0, len(q)] if offsets is None else offsets.tolist()
    dtype, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    outs = [v[:0].to(wide)]
    for begin, end in pairwise(bounds):
        qs, ks, vs = (x[begin:end].to(wide) for x in (q, k, v))
        qs, ks = _unit(qs), _unit(ks)
        n = end - begin
        numerator = torch.einsum("nhc,hcd->nhd", qs, torch.einsum("nhc,nhd->hcd", ks, vs)) + n * vs
        outs.append(numerator / (torch.einsum("nhc,hc->nh", qs, ks.sum(0)) + n)[..., None])
    return torch.cat(outs).to(dtype)


def _unit(x: Tensor) -> Tensor:
    """x by its Frobenius norm; zeros stay."""
    square = x.square().sum()
    tiny = torch.finfo(x.dtype).tiny
    return x * torch.where(square > tiny, square.clamp(min=tiny).rsqrt(), 0)


def _features(
    x: Tensor, name: str, projection: Tensor | None, stabilise_over: tuple[int, ...]
) -> Tensor:
    """phi(x), [n, H, D] -> [n, H, M]."""
    if name == "identity":
        return x
    if name == "relu":
        return x.relu()
    if name == "elu":
        # exp() of large x is not to overflow, and its gradient at 0 is 1
        return torch.where(x > 0, x + 1, torch.where(x > 0, 0, x).exp())
    if name == "sigmoid":
        return x.sigmoid()
    assert projection is not None
    product = x @ projection.to(x.dtype).mT
    if name == "relu_random":
        return product.relu() + 1e-3
    m, d = projection.shape
    product = product * d**-0.25
    half = x.square().sum(-1, keepdim=True) * (d**-0.5 / 2)
    top = product.detach().amax(stabilise_over, keepdim=True)
    return ((product - half - top).exp() + 1e-4) * m**-0.5


def _einsum(equation: str, x: Tensor, y: Tensor) -> Tensor:
    """``torch.einsum``; on a CPU in 16 bits of float32 operands, and rounded once, as there.

    Where a CPU multiplies 16 bits by AMX, NaN of one row reaches the rows before it.
    """
    if x.device.type != "cpu" or x.element_size() > 2:
        return torch.einsum(equation, x, y)
    with torch.autocast("cpu", enabled=False):
        return torch.einsum(equation, x.float(), y.float()).to(x.dtype)


def head_projection(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, head_gate: Tensor | None = None
) -> Tensor:
    """See :func:`fastgt.head_projection`."""
    heads = weight.shape[1 if x.ndim == 3 else 0]
    gate = x.new_ones(heads, dtype=torch.bool) if head_gate is None else head_gate.detach()
    keep = (gate != 0)[:, None]
    if x.ndim == 3:
        x = torch.where(keep, x, 0)
        out = _einsum("nhd,chd->nc", x, torch.where(keep, weight, 0))
        return out if bias is None else out + bias
    out = _einsum("nc,hdc->nhd", x, torch.where(keep[..., None], weight, 0))
    if bias is not None:
        out = out + bias
    return torch.where(keep, out, 0)

"""Neighbourhood attention on a CPU, a few heads at a time.

A head's logits are a sampled dense-dense product (SDDMM) over the graph's CSR pattern and its
output a sparse-dense product. On a large graph heads come one by one, so that nothing larger than
one [E] vector exists beside the result: the working memory is O(N D + E). On a small one, where
the calls would cost more than the work, several heads are put side by side as one graph of
several components; the result depends neither on that choice nor on the number of threads. What
edges have besides a bias is in ``edge_terms.py``. The backward makes the logits anew, except where
that would take several products (edge keys, attributes): there [H, E] exponentials are kept. The
symbols are those of ``kernels/attention.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgt.cpu.edge_terms import Head, Terms, attributes, slots
from fastgt.cpu.sparse import (
    accumulator,
    bags,
    diagonal,
    make_walk,
    own,
    per_edge,
    pivots,
    sddmm,
    segment_of,
    segment_sum,
    shifted,
    spmm,
    stack,
    unstack,
)

_TOGETHER = 2**16  # edges and nodes, heads counted, up to which heads share their calls
_SLICE = 2**15  # edges whose attributes' gradients are made at a time


@torch.no_grad()  # called by an exported module, gradients may be on
def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge_bias: Tensor | None,
    row_ptr: Tensor,
    col: Tensor,
    edge: Tensor,
    scale: float,
    low: float,
    high: float,
    eps: float,
    return_weights: bool,
    terms: Terms | None = None,
    return_scores: bool = False,
    weigh_attr: bool = False,
    keep: bool = False,
) -> tuple[Tensor, ...]:
    """-> o [N, H, DV], lse [N, H], weights [E, H] (or [0, H]) in the caller's edge order.

    With ``terms`` also edge scores [E, H, D] (or [0, H, D]) in that order, the weighted sums of the
    attributes [N, H, C] (or [N, H, 0]), and [H, E] (or [H, 0]) in row order what the backward need
    not make again: exp(logit - a number of its row).
    """
    n, heads, d = q.shape
    num_edges, caller = col.shape[0], edge.long()
    wide = accumulator(q)
    o = q.new_empty(n, heads, v.shape[2])
    lse = q.new_empty(n, heads, dtype=wide)
    weights = q.new_empty(num_edges if return_weights else 0, heads)
    results = [o, lse, weights]
    attr: Any = attributes(terms, edge, wide)
    if terms is not None:
        channels = attr.shape[1] if attr is not None and weigh_attr else 0
        results.append(q.new_empty(num_edges if return_scores else 0, heads, d))
        results.append(q.new_empty(n, heads, channels, dtype=wide))
        results.append(q.new_empty(heads, num_edges if keep else 0, dtype=wide))
    # the sum of the weights comes along with that of the values, unless dropout takes some away
    ones = 0 if terms is not None and terms.keep is not None else 1
    row_walk, row = make_walk(row_ptr, col), segment_of(row_ptr, col)
    for kv, members in _blocks(q, k, col):
        kh, vh = stack(k, kv, wide), stack(v, kv, wide, ones=ones)
        walk = diagonal(row_walk, k.shape[0], kv)
        each = own(walk)
        for h in members:
            qh = stack(q, h, wide)
            head = Head(qh, kh, walk, each, n, row, edge, h, terms, attr, return_scores)
            s, _ = head.logits(_bias(edge_bias, edge, h), scale, low, high)
            if return_scores:
                results[3][caller, h] = unstack(head.scores(scale), num_edges).to(q.dtype)
            top, dead = pivots(s, walk.ptr)
            p = s.sub_(per_edge(top, row, n)).exp_()
            if keep and num_edges:
                results[5][h] = p.unflatten(0, (-1, num_edges))
            used = head.dropped(p)
            out = spmm(walk, used, vh)
            if ones:
                out, total = out[:, :-1], out[:, -1]
            else:
                total = segment_sum(each, p)
            if head.value is not None:
                out += spmm(head.own, used, head.value)
            if dead is not None:
                out.masked_fill_(dead[:, None], 0.0)
            lse[:, h] = unstack(total.log().add_(top), n)
            if eps:
                total = total + (math.log(eps) - top).exp()
            # rows without edges: 0 / tiny
            divisor = total.clamp(min=torch.finfo(wide).tiny)
            o[:, h] = unstack(out.div_(divisor[:, None]), n)
            if attr is not None and weigh_attr:
                out = spmm(head.common, used, attr)
                if dead is not None:
                    out.masked_fill_(dead[:, None], 0.0)
                results[4][:, h] = unstack(out.div_(divisor[:, None]), n)
            if return_weights:
                p.div_(per_edge(divisor, row, n))
                weights[caller, h] = unstack(p, num_edges).to(q.dtype)
    return tuple(results)


@torch.no_grad()
def attention_bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge_bias: Tensor | None,
    lse: Tensor,
    row_ptr: Tensor,
    col: Tensor,
    edge: Tensor,
    col_ptr: Tensor,
    col_row: Tensor,
    col_slot: Tensor,
    col_edge: Tensor,
    scale: float,
    low: float,
    high: float,
    eps: float,
    needs: Sequence[bool],
    terms: Terms | None = None,
    dscores: Tensor | None = None,
    dattr_o: Tensor | None = None,
    exps: Tensor | None = None,
) -> list[Tensor]:
    """-> gradients of q, k, v and the bias, with ``terms`` also of gate, key, value, attr, attr_q.

    Empty where ``needs`` says no. A key that is the value as well has one gradient, the key's.
    ``exps``: what the forward kept.
    """
    n, m, num_edges = q.shape[0], k.shape[0], col.shape[0]
    heads, wide, caller = q.shape[1], lse.dtype, edge.long()
    log_eps = math.log(eps) if eps else -math.inf
    grads = [
        q.new_empty(0) if x is None or not need else x.new_empty(x.shape)
        for x, need in zip((q, k, v, edge_bias, *(terms or ())[:5]), needs, strict=True)
    ]
    dq, dk, dv, dbias, dgate, dkey, dvalue, dattr, dattr_q = grads + [q] * (9 - len(grads))
    asked = [*needs, *[False] * (9 - len(needs))]
    need_q, need_k, need_v, need_bias, need_gate, need_key, need_value, need_attr, need_attr_q = (
        asked
    )
    need_logits = any((need_q, need_k, need_bias, need_gate, need_key, need_attr, need_attr_q))
    attr: Any = attributes(terms, edge, wide)
    if terms is not None and terms.value is terms.key:
        need_value, dvalue = need_key, dkey
    if need_attr:
        # of every edge: rows of attr_q by ds, rows of dattr_o by p
        attr_q: Any = None if terms is None else terms.attr_q
        kinds = (attr_q is not None) + (dattr_o is not None)
        rates = q.new_empty(num_edges, kinds, heads, dtype=wide)
        vectors = q.new_empty(n, kinds, heads, attr.shape[1], dtype=wide)
        if attr_q is not None:
            vectors[:, 0] = attr_q
    row_walk, col_walk = make_walk(row_ptr, col), make_walk(col_ptr, col_row)
    row, occupied = segment_of(row_ptr, col), row_ptr.diff() > 0
    for kv, members in _blocks(q, k, col):
        kh, vh = stack(k, kv, wide), stack(v, kv, wide)
        dkh = dvh = None
        rows, cols = diagonal(row_walk, m, kv), diagonal(col_walk, n, kv)
        each, slot = own(rows), shifted(col_slot, num_edges, kv)
        by_channel = dscores is not None
        for h in members:
            doh, qh = stack(do, h, wide), stack(q, h, wide)
            head = Head(qh, kh, rows, each, n, row, edge, h, terms, attr, by_channel)
            top, through = stack(lse, h, wide), None
            kept = 1 / (1 + (log_eps - top).exp()) if eps else None  # r
            # rows with edges but without a finite logit: exp(s - inf) = 0
            dead = top == -torch.inf
            some_dead = bool(n) and bool((dead.unflatten(0, (-1, n)) & occupied).any())
            if some_dead:
                top.masked_fill_(dead, torch.inf)
            if exps is None:
                s, through = head.logits(_bias(edge_bias, edge, h), scale, low, high)
                p = s.sub_(per_edge(top, row, n)).exp_()
            else:
                p = exps[h].flatten()
            # from logits, 1 but for the rounding of the stored LSE, that of the largest logit
            total = segment_sum(each, p)
            norm = 1 / (total.masked_fill_(dead, 1.0) if some_dead else total)
            # factors of a row are applied to its vectors: dp and ds come out with them
            share = (norm if kept is None else kept * norm)[:, None]
            doh *= share
            if some_dead:
                doh.masked_fill_(dead[:, None], 0.0)  # nor do the output's, finite or not
            used = head.dropped(p)
            if need_v:
                out = spmm(cols, used.index_select(0, slot), doh)
                dvh = out if dvh is None else dvh.add_(out)
            if need_value:
                through_value = per_edge(doh, row, n).mul_(used[:, None])
                dvalue[caller, h] = unstack(through_value, num_edges).to(dvalue.dtype)
            if dattr_o is not None:
                dah = stack(dattr_o, h, wide).mul_(share)
                if some_dead:
                    dah.masked_fill_(dead[:, None], 0.0)
                if need_attr:
                    vectors[:, -1, h], rates[:, -1, h] = unstack(dah, n), unstack(used, num_edges)
            if not need_logits:
                continue
            dp = sddmm(doh, vh, rows)
            if head.value is not None:
                sddmm(doh, head.value, head.own, onto=dp)
            if attr is not None and dattr_o is not None:
                sddmm(dah, attr, head.common, onto=dp)
            dp = head.dropped(dp)
            gamma = segment_sum(each, p * dp)
            if kept is not None:
                gamma *= kept
            if dlse is not None:
                gamma -= stack(dlse, h, wide)
            gamma *= norm
            if some_dead:
                gamma.masked_fill_(dead, 0.0)  # no edge counts, whatever the LSE's gradient
            ds = dp.sub_(per_edge(gamma, row, n)).mul_(p)
            if need_bias:
                dbias[caller, h] = unstack(ds, num_edges).to(q.dtype)
            if through is not None:
                ds.masked_fill_(~through, 0.0)
            head.take(ds, None if dscores is None else slots(dscores, edge, h, wide), scale)
            if need_q:
                out = head.dq()
                if some_dead and dscores is None:
                    out.masked_fill_(dead[:, None], 0.0)
                dq[:, h] = unstack(out, n)
            if need_k:
                out = head.dk(cols, slot)
                dkh = out if dkh is None else dkh.add_(out)
            if need_gate:
                flow = head.dfactor if dgate.ndim == 2 else head.dgate()
                dgate[caller, h] = unstack(flow, num_edges).to(q.dtype)
            if need_key:
                flow = head.dkey()
                if dvalue is dkey:
                    flow = flow + through_value
                dkey[caller, h] = unstack(flow, num_edges).to(dkey.dtype)
            if need_attr_q:
                out = spmm(head.common, head.ds, attr)
                if some_dead:
                    out.masked_fill_(dead[:, None], 0.0)
                dattr_q[:, h] = unstack(out, n)
            if need_attr and head.attr_q is not None:
                rates[:, 0, h] = unstack(head.ds, num_edges)
        if dkh is not None:
            dk[:, kv] = unstack(dkh, m)
        if dvh is not None:
            dv[:, kv] = unstack(dvh, m)
    if need_attr:
        _attribute_gradient(dattr, rates.flatten(1), vectors.flatten(1, 2), row, caller)
    return grads


def _attribute_gradient(
    dattr: Tensor, rates: Tensor, vectors: Tensor, row: Tensor, caller: Tensor
) -> None:
    """dattr[caller_e] = sum_w rates[e, w] vectors[row_e, w], some edges at a time."""
    width = rates.shape[1]
    if not width:
        dattr.zero_()
        return
    vectors = vectors.flatten(0, 1)
    dtype = torch.int64 if max(vectors.shape[0], _SLICE * width) >= 2**31 else row.dtype
    within, ptr = torch.arange(width, dtype=dtype), torch.arange(_SLICE + 1, dtype=dtype) * width
    for part, rate, number in zip(*(x.split(_SLICE) for x in (row, rates, caller)), strict=True):
        at = part.to(dtype)[:, None] * width + within
        total = bags(at.flatten(), vectors, ptr[: len(part) + 1], rate.flatten())
        dattr.index_copy_(0, number, total.to(dattr.dtype))


def _blocks(q: Tensor, k: Tensor, col: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Key heads that go together, and for each member of a group the query heads on them."""
    kv_heads = k.shape[1]
    group = q.shape[1] // max(kv_heads, 1)
    size = max(1, _TOGETHER // max(1, q.shape[0] + k.shape[0] + col.shape[0]))
    for start in range(0, kv_heads, size):
        stop = min(start + size, kv_heads)
        members = [slice(start * group + i, stop * group, group) for i in range(group)]
        yield slice(start, stop), members


def _bias(edge_bias: Tensor | None, edge: Tensor, heads: slice) -> Tensor | None:
    return None if edge_bias is None else slots(edge_bias, edge, heads, edge_bias.dtype)

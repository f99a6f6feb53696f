"""Neighbourhood attention on a CPU, a few heads at a time.

A head's logits are a sampled dense-dense product (SDDMM) over the graph's CSR pattern and its
output a sparse-dense product. On a large graph heads come one by one, so that nothing larger than
one [E] vector exists beside the result: the working memory is O(N D + E). On a small one, where
the calls would cost more than the work, several heads are put side by side as one graph of
several components; the result depends neither on that choice nor on the number of threads. What
edges have besides a bias is in ``edge_terms.py``. A head that is masked in some rows goes alone,
over the edges of the others. The backward makes the logits anew, except where
that would take several products (edge keys, attributes): there [H, E] exponentials are kept. The
symbols are those of ``kernels/attention.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgt.cpu.edge_terms import Head, Terms, attributes, slots
from fastgt.cpu.sparse import (
    Edges,
    Walk,
    accumulator,
    bags,
    diagonal,
    own,
    per_edge,
    pivots,
    runs,
    sddmm,
    segment_sum,
    shifted,
    spmm,
    stack,
    unstack,
    walk_edges,
)

_TOGETHER = 2**16  # edges and nodes, heads counted, up to which heads share their calls
_LARGE = 2**12  # a sum of exponentials that few rows reach whose first logit is among the largest
_SLICE = 2**15  # edges whose attributes' gradients are made at a time


@torch.no_grad()  # called by an exported module, gradients may be on
def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge_bias: Tensor | None,
    active: Tensor | None,
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

    To heads that are not ``active`` [1 or N, H] a row has no edges. With ``terms`` also edge scores
    [E, H, D] (or [0, H, D]) in that order, the weighted sums of the attributes [N, H, C] (or
    [N, H, 0]), and [H, E] (or [H, 0]) in row order what the backward need not make again:
    exp(logit - a number of its row).
    """
    n, heads, d = q.shape
    num_edges = col.shape[0]
    wide = accumulator(q)
    results = [
        q.new_empty(n, heads, v.shape[2]),
        q.new_empty(n, heads, dtype=wide),
        q.new_empty(num_edges if return_weights else 0, heads),
    ]
    whole = walk_edges(row_ptr, col, edge, attributes(terms, edge, wide))
    if terms is not None:
        channels = terms.attr.shape[1] if terms.attr is not None and weigh_attr else 0
        results.append(q.new_empty(num_edges if return_scores else 0, heads, d))
        results.append(q.new_empty(n, heads, channels, dtype=wide))
        results.append(q.new_empty(heads, num_edges if keep else 0, dtype=wide))
    o, lse, weights = results[:3]
    if active is not None:
        for result in results:
            result.fill_(-math.inf if result is lse else 0)
    # the sum of the weights comes along with that of the values, unless dropout takes some away
    ones = 0 if terms is not None and terms.keep is not None else 1
    for kv, members in _blocks(q, k, whole, active):
        kh, vh = stack(k, kv, wide), stack(v, kv, wide, ones=ones)
        last: Any = None
        for h, on in members:
            if on is not last:
                last, row, count = on, on.row, len(on)
                walk = diagonal(on.rows, k.shape[0], kv)
                each = own(walk)
            qh = stack(q, h, wide)
            head = Head(qh, kh, walk, each, n, on, h, terms, return_scores)
            s, _ = head.logits(_bias(edge_bias, on, h), scale, low, high)
            if return_scores:
                results[3][on.caller, h] = unstack(head.scores(scale), count).to(q.dtype)
            top, dead = pivots(s, walk.ptr)
            p = s.sub_(per_edge(top, row, n)).exp_()
            used = head.dropped(p)
            out = spmm(walk, used, vh)
            if ones:
                out, total = out[:, :-1], out[:, -1]
            else:
                total = segment_sum(each, p)
            lse[:, h] = unstack(total.log().add_(top), n)
            if keep and count:
                results[5][h, :count] = _kept(p, total, row, n).unflatten(0, (-1, count))
            if eps:
                total = total + (math.log(eps) - top).exp()
            # rows without edges: 0 / tiny
            divisor = total.clamp(min=torch.finfo(wide).tiny)
            values = [(walk, vh[:, :-1] if ones else vh)]
            if head.value is not None:
                out += spmm(head.own, used, head.value)
                values.append((head.own, head.value))
            o[:, h] = unstack(_mean(out, values, used, divisor, dead, row, n), n)
            if head.attr is not None and weigh_attr:
                out = spmm(head.common, used, head.attr)
                values = [(head.common, head.attr)]
                results[4][:, h] = unstack(_mean(out, values, used, divisor, dead, row, n), n)
            if return_weights:
                p.div_(per_edge(divisor, row, n))
                weights[on.caller, h] = unstack(p, count).to(q.dtype)
    return tuple(results)


def _kept(p: Tensor, total: Tensor, row: Tensor, n: int) -> Tensor:
    """What the backward divides by its sum: where that is large, gradients of small numbers would
    be lost."""
    large = total > _LARGE
    if not bool(large.any()):
        return p
    return p * per_edge(torch.where(large, 1 / total, 1.0), row, n)


def _mean(
    out: Tensor,
    values: list[tuple[Walk, Tensor]],
    used: Tensor,
    divisor: Tensor,
    dead: Tensor | None,
    row: Tensor,
    n: int,
) -> Tensor:
    """out [heads * N, D] / divisor, in place, where ``out`` is the sum of the weighted ``values``.

    Weights that are divided after the sum may be large, or many: where the sum is not finite, they
    are divided before it.
    """
    out.div_(divisor[:, None])
    if not bool(out.sum().isfinite()):
        weights = used / per_edge(divisor, row, n)
        sums = (spmm(walk, weights, x) for walk, x in values)
        torch.where(out.isfinite(), out, functools.reduce(Tensor.add_, sums), out=out)
    return out if dead is None else out.masked_fill_(dead[:, None], 0.0)


@torch.no_grad()
def attention_bwd(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge_bias: Tensor | None,
    active: Tensor | None,
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
    heads, wide = q.shape[1], lse.dtype
    log_eps = math.log(eps) if eps else -math.inf
    grads = [
        q.new_empty(0)
        if x is None or not need
        else (x.new_empty if active is None else x.new_zeros)(x.shape)
        for x, need in zip((q, k, v, edge_bias, *(terms or ())[:5]), needs, strict=True)
    ]
    dq, dk, dv, dbias, dgate, dkey, dvalue, dattr, dattr_q = grads + [q] * (9 - len(grads))
    asked = [*needs, *[False] * (9 - len(needs))]
    need_q, need_k, need_v, need_bias, need_gate, need_key, need_value, need_attr, need_attr_q = (
        asked
    )
    need_logits = any((need_q, need_k, need_bias, need_gate, need_key, need_attr, need_attr_q))
    attr: Any = attributes(terms, edge, wide)
    whole = walk_edges(row_ptr, col, edge, attr, (col_ptr, col_row, col_slot))
    if terms is not None and terms.value is terms.key:
        need_value, dvalue = need_key, dkey
    if need_attr:
        # of every edge: rows of attr_q by ds, rows of dattr_o by p
        attr_q: Any = None if terms is None else terms.attr_q
        kinds = (attr_q is not None) + (dattr_o is not None)
        shape = kinds, heads
        rates = q.new_empty(num_edges, *shape, dtype=wide)
        vectors = q.new_empty(n, *shape, attr.shape[1], dtype=wide)
        if active is not None:
            rates.zero_(), vectors.zero_()
    for kv, members in _blocks(q, k, whole, active):
        kh, vh = stack(k, kv, wide), stack(v, kv, wide)
        dkh = dvh = None
        by_channel = dscores is not None
        last: Any = None
        for h, on in members:
            if on is not last:
                last, row, count = on, on.row, len(on)
                rows, cols = diagonal(on.rows, m, kv), diagonal(on.cols, n, kv)
                each, slot = own(rows), shifted(on.slot, count, kv)
                place: Any = slice(None) if on.place is None else on.place
                mine: Any = slice(None) if on.active is None else on.active
            doh, qh = stack(do, h, wide), stack(q, h, wide)
            head = Head(qh, kh, rows, each, n, on, h, terms, by_channel)
            top, through = stack(lse, h, wide), None
            kept = 1 / (1 + (log_eps - top).exp()) if eps else None  # r
            # rows with edges but without a finite logit: exp(s - inf) = 0
            dead = top == -torch.inf
            some_dead = bool(n) and bool((dead.unflatten(0, (-1, n)) & on.occupied).any())
            if some_dead:
                top.masked_fill_(dead, torch.inf)
            if exps is None:
                s, through = head.logits(_bias(edge_bias, on, h), scale, low, high)
                p = s.sub_(per_edge(top, row, n)).exp_()
            else:
                p = exps[h, :count].flatten()
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
                dvalue[on.caller, h] = unstack(through_value, count).to(dvalue.dtype)
            if dattr_o is not None:
                dah = stack(dattr_o, h, wide).mul_(share)
                if some_dead:
                    dah.masked_fill_(dead[:, None], 0.0)
                if need_attr:
                    vectors[mine, -1, h] = unstack(dah, n)[mine]
                    rates[place, -1, h] = unstack(used, count)
            if not need_logits:
                continue
            dp = sddmm(doh, vh, rows)
            if head.value is not None:
                sddmm(doh, head.value, head.own, onto=dp)
            if head.attr is not None and dattr_o is not None:
                sddmm(dah, head.attr, head.common, onto=dp)
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
                dbias[on.caller, h] = unstack(ds, count).to(q.dtype)
            if through is not None:
                ds.masked_fill_(~through, 0.0)
            head.take(ds, None if dscores is None else slots(dscores, on.edge, h, wide), scale)
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
                dgate[on.caller, h] = unstack(flow, count).to(q.dtype)
            if need_key:
                flow = head.dkey()
                if dvalue is dkey:
                    flow = flow + through_value
                dkey[on.caller, h] = unstack(flow, count).to(dkey.dtype)
            if need_attr_q:
                out = spmm(head.common, head.ds, head.attr)
                if some_dead:
                    out.masked_fill_(dead[:, None], 0.0)
                dattr_q[:, h] = unstack(out, n)
            if need_attr and head.attr_q is not None:
                vectors[mine, 0, h] = unstack(head.attr_q, n)[mine]
                rates[place, 0, h] = unstack(head.ds, count)
        if dkh is not None:
            dk[:, kv] = unstack(dkh, m)
        if dvh is not None:
            dv[:, kv] = unstack(dvh, m)
    if need_attr:
        rates, vectors = rates.flatten(1), vectors.flatten(1, 2)
        _attribute_gradient(dattr, rates, vectors, whole.row, whole.caller)
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


def _blocks(
    q: Tensor, k: Tensor, edges: Edges, active: Tensor | None
) -> Iterator[tuple[slice, list[tuple[slice, Edges]]]]:
    """Key heads that go together; for each member of a group the query heads on them, the edges."""
    kv_heads = k.shape[1]
    group = q.shape[1] // max(kv_heads, 1)
    size = max(1, _TOGETHER // max(1, q.shape[0] + k.shape[0] + len(edges)))
    if active is None or group == 1:
        for kv, on in runs(kv_heads, size, edges, active):
            heads = [slice(kv.start * group + i, kv.stop * group, group) for i in range(group)]
            yield kv, [(h, on) for h in heads]
        return
    for i in range(kv_heads):
        first = i * group
        found = runs(group, 1, edges, active[:, first : first + group])
        members = [(slice(first + h.start, first + h.stop), on) for h, on in found]
        if members:
            yield slice(i, i + 1), members


def _bias(edge_bias: Tensor | None, on: Edges, heads: slice) -> Tensor | None:
    return None if edge_bias is None else slots(edge_bias, on.edge, heads, edge_bias.dtype)

"""Neighbourhood attention on a CPU, a few heads at a time.

A head's logits are a sampled dense-dense product (SDDMM) over the graph's CSR pattern and its
output a sparse-dense product. On a large graph heads come one by one, so that nothing larger than
one [E] vector exists beside the result: the working memory is O(N D + E). On a small one, where
the calls would cost more than the work, several heads are put side by side as one graph of
several components; the result depends neither on that choice nor on the number of threads. What
edges have besides a bias is in ``edge_terms.py``. The backward recomputes the logits; the symbols
are those of ``kernels/attention.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgt.cpu.edge_terms import Head, Terms, attributes, slots
from fastgt.cpu.sparse import (
    bags,
    diagonal,
    make_walk,
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
) -> tuple[Tensor, ...]:
    """-> o [N, H, DV], lse [N, H], weights [E, H] (or [0, H]) in the caller's edge order.

    With ``terms`` also edge scores [E, H, D] (or [0, H, D]) in that order, and the weighted sums of
    the attributes [N, H, C] (or [N, H, 0]).
    """
    n, heads, d = q.shape
    num_edges, caller = col.shape[0], edge.long()
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    o = q.new_empty(n, heads, v.shape[2])
    lse = q.new_empty(n, heads, dtype=wide)
    weights = q.new_empty(num_edges if return_weights else 0, heads)
    results = [o, lse, weights]
    attr: Any = attributes(terms, edge, wide)
    if terms is not None:
        channels = attr.shape[1] if attr is not None and weigh_attr else 0
        results.append(q.new_empty(num_edges if return_scores else 0, heads, d))
        results.append(q.new_empty(n, heads, channels, dtype=wide))
    # the sum of the weights comes along with that of the values, unless dropout takes some away
    ones = 0 if terms is not None and terms.keep is not None else 1
    row_walk, row = make_walk(row_ptr, col), segment_of(row_ptr, col)
    for kv, members in _blocks(q, k, col):
        kh, vh = stack(k, kv, wide), stack(v, kv, wide, ones=ones)
        walk = diagonal(row_walk, k.shape[0], kv)
        for h in members:
            head = Head(stack(q, h, wide), kh, walk, n, row, edge, h, terms, attr, return_scores)
            s, _ = head.logits(_bias(edge_bias, edge, h), scale, low, high)
            if return_scores:
                results[3][caller, h] = unstack(head.scores(scale), num_edges).to(q.dtype)
            top, dead = pivots(s, walk.ptr)
            p = s.sub_(per_edge(top, row, n)).exp_()
            used = head.dropped(p)
            out = spmm(walk, used, vh)
            if ones:
                out, total = out[:, :-1], out[:, -1]
            else:
                total = segment_sum(walk, p)
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
) -> list[Tensor]:
    """-> gradients of q, k, v and the bias, with ``terms`` also of gate, key, value, attr, attr_q.

    Empty where ``needs`` says no. A key that is the value as well has one gradient, the key's.
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
        # what an edge's attributes are multiplied with: rows of attr_q and of the gradient
        by_logit, by_value = (q.new_zeros(num_edges, heads, dtype=wide) for _ in range(2))
        dattr_rows: Any = None if dattr_o is None else torch.empty_like(dattr_o, dtype=wide)
    row_walk, col_walk = make_walk(row_ptr, col), make_walk(col_ptr, col_row)
    row, occupied = segment_of(row_ptr, col), row_ptr.diff() > 0
    for kv, members in _blocks(q, k, col):
        kh, vh = stack(k, kv, wide), stack(v, kv, wide)
        dkh = dvh = None
        rows, cols = diagonal(row_walk, m, kv), diagonal(col_walk, n, kv)
        slot = shifted(col_slot, num_edges, kv)
        for h in members:
            doh = stack(do, h, wide)
            head = Head(
                stack(q, h, wide), kh, rows, n, row, edge, h, terms, attr, dscores is not None
            )
            s, through = head.logits(_bias(edge_bias, edge, h), scale, low, high)
            top = stack(lse, h, wide)
            kept = 1 / (1 + (log_eps - top).exp()) if eps else None  # r
            # rows with edges but without a finite logit: exp(s - inf) = 0
            dead = top == -torch.inf
            some_dead = bool(n) and bool((dead.unflatten(0, (-1, n)) & occupied).any())
            if some_dead:
                top.masked_fill_(dead, torch.inf)
            p = s.sub_(per_edge(top, row, n)).exp_()
            # 1 but for the rounding of the stored LSE, which is that of the largest logit
            total = segment_sum(rows, p)
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
                    dattr_rows[:, h], by_value[:, h] = unstack(dah, n), unstack(used, num_edges)
            if not need_logits:
                continue
            dp = sddmm(doh, vh, rows, 1.0)
            if head.value is not None:
                dp += sddmm(doh, head.value, head.own, 1.0)
            if attr is not None and dattr_o is not None:
                dp += sddmm(dah, attr, head.common, 1.0)
            dp = head.dropped(dp)
            gamma = segment_sum(rows, p * dp)
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
                by_logit[:, h] = unstack(head.ds, num_edges)
        if dkh is not None:
            dk[:, kv] = unstack(dkh, m)
        if dvh is not None:
            dv[:, kv] = unstack(dvh, m)
    if need_attr:
        # every edge a bag of H weighted rows
        at = (row.long()[:, None] * heads + torch.arange(heads)).flatten()
        bag = torch.arange(num_edges + 1) * heads
        total = attr.new_zeros(attr.shape)
        attr_q = None if terms is None else terms.attr_q
        for weight, table in ((by_logit, attr_q), (by_value, dattr_rows)):
            if table is not None:
                total += bags(at, table.to(wide).flatten(0, 1), bag, weight.flatten())
        dattr.index_copy_(0, caller, total.to(q.dtype))
    return grads


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

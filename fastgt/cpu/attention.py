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

from fastgt.contract import (
    Dropout,
    EdgeTerms,
    HeadMask,
    Inputs,
    Logit,
    PerInput,
    Results,
    Saved,
    Switches,
    Upstream,
)
from fastgt.cpu.edge_terms import Head, OnEdges, attributes, kept_weights, slots
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
    row_walk: Sequence[Tensor],
    inputs: Inputs,
    logit: Logit,
    terms: EdgeTerms,
    mask: HeadMask,
    dropout: Dropout,
    switches: Switches,
) -> Results:
    """The results in the caller's edge order, but for ``exps``: exp(logit - a number of its row) in
    row order, which the backward need not make again.

    To heads that are not in ``mask.rows`` [1 or N, H] a row has no edges.
    """
    q, k, v = inputs
    row_ptr, col, edge = row_walk
    n, heads, d = q.shape
    num_edges = col.shape[0]
    wide, eps = accumulator(q), logit.eps
    attr_width = 0 if terms.attr is None else terms.attr.shape[1]
    results = Results(
        q.new_empty(n, heads, v.shape[2]),
        q.new_empty(n, heads, dtype=wide),
        q.new_empty(num_edges, heads) if switches.make_weights else None,
        q.new_empty(num_edges, heads, d) if switches.make_scores else None,
        q.new_empty(n, heads, attr_width, dtype=wide) if switches.make_attr_o else None,
        q.new_empty(heads, num_edges, dtype=wide) if switches.make_exps else None,
    )
    o, lse, weights, scores, attr_o, exps = results
    if mask.rows is not None:
        for result in results:
            if result is not None:
                result.fill_(-math.inf if result is lse else 0)
    whole = walk_edges(row_ptr, col, edge, attributes(terms, edge, wide))
    edge_terms = OnEdges(terms, switches.key_is_value, kept_weights(dropout, num_edges, heads))
    # the sum of the weights comes along with that of the values, unless dropout takes some away
    ones = 0 if edge_terms.kept is not None else 1
    for kv, members in _blocks(q, k, whole, mask.rows):
        kh, vh = stack(k, kv, wide), stack(v, kv, wide, ones=ones)
        last: Any = None
        for h, edges in members:
            if edges is not last:
                last, row, count = edges, edges.row, len(edges)
                walk = diagonal(edges.rows, k.shape[0], kv)
                each = own(walk)
            qh = stack(q, h, wide)
            head = Head(qh, kh, walk, each, n, edges, h, edge_terms, switches.make_scores)
            s, _ = head.logits(_bias(terms.bias, edges, h), logit)
            if scores is not None:
                scores[edges.caller, h] = unstack(head.scores(logit.scale), count).to(q.dtype)
            top, dead = pivots(s, walk.ptr)
            p = s.sub_(per_edge(top, row, n)).exp_()
            used = head.dropped(p)
            out = spmm(walk, used, vh)
            if ones:
                out, total = out[:, :-1], out[:, -1]
            else:
                total = segment_sum(each, p)
            lse[:, h] = unstack(total.log().add_(top), n)
            if exps is not None and count:
                exps[h, :count] = _divided(p, total, row, n).unflatten(0, (-1, count))
            if eps:
                total = total + (math.log(eps) - top).exp()
            # rows without edges: 0 / tiny
            divisor = total.clamp(min=torch.finfo(wide).tiny)
            values = [(walk, vh[:, :-1] if ones else vh)]
            if head.value is not None:
                out += spmm(head.own, used, head.value)
                values.append((head.own, head.value))
            o[:, h] = unstack(_mean(out, values, used, divisor, dead, row, n), n)
            if attr_o is not None:
                out = spmm(head.common, used, head.attr)
                values = [(head.common, head.attr)]
                attr_o[:, h] = unstack(_mean(out, values, used, divisor, dead, row, n), n)
            if weights is not None:
                p.div_(per_edge(divisor, row, n))
                weights[edges.caller, h] = unstack(p, count).to(q.dtype)
    return results


def _divided(p: Tensor, total: Tensor, row: Tensor, n: int) -> Tensor:
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
    row_walk: Sequence[Tensor],
    column_walk: Sequence[Tensor],
    needs: PerInput[bool],
    upstream: Upstream,
    saved: Saved,
    inputs: Inputs,
    logit: Logit,
    terms: EdgeTerms,
    mask: HeadMask,
    dropout: Dropout,
    switches: Switches,
) -> PerInput[Tensor | None]:
    """-> the gradients that are needed, None for the others.

    A key that is the value as well has one gradient, the key's.
    """
    q, k, v = inputs
    do, dlse, dscores, dattr_o = upstream
    row_ptr, col, edge = row_walk
    n, m, num_edges = q.shape[0], k.shape[0], col.shape[0]
    heads, wide, eps = q.shape[1], saved.lse.dtype, logit.eps
    log_eps = math.log(eps) if eps else -math.inf
    grads: PerInput[Any] = PerInput(
        *(
            None
            if x is None or not need
            else (x.new_empty if mask.rows is None else x.new_zeros)(x.shape)
            for x, need in zip((*inputs, *terms), needs, strict=True)
        )
    )
    need_logits = any(needs._replace(v=False, value=False))
    attr: Any = attributes(terms, edge, wide)
    whole = walk_edges(row_ptr, col, edge, attr, column_walk)
    edge_terms = OnEdges(terms, switches.key_is_value, kept_weights(dropout, num_edges, heads))
    need_value, dvalue = needs.value, grads.value
    if switches.key_is_value:
        need_value, dvalue = needs.key, grads.key
    if needs.attr:
        # of every edge: rows of attr_q by ds, rows of dattr_o by p
        kinds = (terms.attr_q is not None) + (dattr_o is not None)
        shape = kinds, heads
        rates = q.new_empty(num_edges, *shape, dtype=wide)
        vectors = q.new_empty(n, *shape, attr.shape[1], dtype=wide)
        if mask.rows is not None:
            rates.zero_(), vectors.zero_()
    for kv, members in _blocks(q, k, whole, mask.rows):
        kh, vh = stack(k, kv, wide), stack(v, kv, wide)
        dkh = dvh = None
        by_channel = dscores is not None
        last: Any = None
        for h, edges in members:
            if edges is not last:
                last, row, count = edges, edges.row, len(edges)
                rows, cols = diagonal(edges.rows, m, kv), diagonal(edges.cols, n, kv)
                each, slot = own(rows), shifted(edges.slot, count, kv)
                place: Any = slice(None) if edges.place is None else edges.place
                mine: Any = slice(None) if edges.active is None else edges.active
            doh, qh = stack(do, h, wide), stack(q, h, wide)
            head = Head(qh, kh, rows, each, n, edges, h, edge_terms, by_channel)
            top, through = stack(saved.lse, h, wide), None
            ratio = 1 / (1 + (log_eps - top).exp()) if eps else None  # r
            # rows with edges but without a finite logit: exp(s - inf) = 0
            dead = top == -torch.inf
            some_dead = bool(n) and bool((dead.unflatten(0, (-1, n)) & edges.occupied).any())
            if some_dead:
                top.masked_fill_(dead, torch.inf)
            if saved.exps is None:
                s, through = head.logits(_bias(terms.bias, edges, h), logit)
                p = s.sub_(per_edge(top, row, n)).exp_()
            else:
                p = saved.exps[h, :count].flatten()
            # from logits, 1 but for the rounding of the stored LSE, that of the largest logit
            total = segment_sum(each, p)
            norm = 1 / (total.masked_fill_(dead, 1.0) if some_dead else total)
            # factors of a row are applied to its vectors: dp and ds come out with them
            share = (norm if ratio is None else ratio * norm)[:, None]
            doh *= share
            if some_dead:
                doh.masked_fill_(dead[:, None], 0.0)  # nor do the output's, finite or not
            used = head.dropped(p)
            if needs.v:
                out = spmm(cols, used.index_select(0, slot), doh)
                dvh = out if dvh is None else dvh.add_(out)
            if need_value:
                through_value = per_edge(doh, row, n).mul_(used[:, None])
                dvalue[edges.caller, h] = unstack(through_value, count).to(dvalue.dtype)
            if dattr_o is not None:
                dah = stack(dattr_o, h, wide).mul_(share)
                if some_dead:
                    dah.masked_fill_(dead[:, None], 0.0)
                if needs.attr:
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
            if ratio is not None:
                gamma *= ratio
            if dlse is not None:
                gamma -= stack(dlse, h, wide)
            gamma *= norm
            if some_dead:
                gamma.masked_fill_(dead, 0.0)  # no edge counts, whatever the LSE's gradient
            ds = dp.sub_(per_edge(gamma, row, n)).mul_(p)
            if needs.bias:
                grads.bias[edges.caller, h] = unstack(ds, count).to(q.dtype)
            if through is not None:
                ds.masked_fill_(~through, 0.0)
            dt = None if dscores is None else slots(dscores, edges.edge, h, wide)
            head.take(ds, dt, logit.scale)
            if needs.q:
                out = head.dq()
                if some_dead and dscores is None:
                    out.masked_fill_(dead[:, None], 0.0)
                grads.q[:, h] = unstack(out, n)
            if needs.k:
                out = head.dk(cols, slot)
                dkh = out if dkh is None else dkh.add_(out)
            if needs.gate:
                flow = head.dfactor if grads.gate.ndim == 2 else head.dgate()
                grads.gate[edges.caller, h] = unstack(flow, count).to(q.dtype)
            if needs.key:
                flow = head.dkey()
                if switches.key_is_value:
                    flow = flow + through_value
                grads.key[edges.caller, h] = unstack(flow, count).to(grads.key.dtype)
            if needs.attr_q:
                out = spmm(head.common, head.ds, head.attr)
                if some_dead:
                    out.masked_fill_(dead[:, None], 0.0)
                grads.attr_q[:, h] = unstack(out, n)
            if needs.attr and head.attr_q is not None:
                vectors[mine, 0, h] = unstack(head.attr_q, n)[mine]
                rates[place, 0, h] = unstack(head.ds, count)
        if dkh is not None:
            grads.k[:, kv] = unstack(dkh, m)
        if dvh is not None:
            grads.v[:, kv] = unstack(dvh, m)
    if needs.attr:
        rates, vectors = rates.flatten(1), vectors.flatten(1, 2)
        _attribute_gradient(grads.attr, rates, vectors, whole.row, whole.caller)
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
        for kv, part in runs(kv_heads, size, edges, active):
            heads = [slice(kv.start * group + i, kv.stop * group, group) for i in range(group)]
            yield kv, [(h, part) for h in heads]
        return
    for i in range(kv_heads):
        first = i * group
        parts = runs(group, 1, edges, active[:, first : first + group])
        members = [(slice(first + h.start, first + h.stop), part) for h, part in parts]
        if members:
            yield slice(i, i + 1), members


def _bias(bias: Tensor | None, edges: Edges, heads: slice) -> Tensor | None:
    return None if bias is None else slots(bias, edges.edge, heads, bias.dtype)

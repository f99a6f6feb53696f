"""Neighbourhood attention on a CPU, a few heads at a time.

A head's logits are a sampled dense-dense product (SDDMM) over the graph's CSR pattern and its
output a sparse-dense product. On a large graph heads come one by one, so that nothing larger than
one [E] vector exists beside the result: the working memory is O(N D + E). On a small one, where
the calls would cost more than the work, several heads are put side by side as one graph of
several components. Every output row is summed by one thread in edge order, a long one in pieces
of fixed length so that its rounding errors do not add up: the result depends neither on the
number of threads nor on that choice. The backward recomputes the logits; the symbols are those of
``kernels/attention.py``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

with warnings.catch_warnings():
    # PyTorch says "sparse CSR support is in beta state" at the first such tensor of a process
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))

_TOGETHER = 2**16  # edges and nodes, heads counted, up to which heads share their calls
_LONG = 2**14  # edges of a segment beyond which it is summed in pieces
_ORDINARY = 20.0  # logits up to which any of a row's keeps exp() in range


class _Walk(NamedTuple):
    """Segments of edges, the other end of each edge, and how long segments are cut for sums."""

    ptr: Tensor  # [segments + 1]
    other: Tensor  # [E]
    cut: Tensor  # [pieces + 1], ptr and what lies between
    joint: Tensor | None  # [segments + 1], the pieces of each segment; None: one each


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
) -> tuple[Tensor, Tensor, Tensor]:
    """-> o [N, H, DV], lse [N, H], weights [E, H] (or [0, H]) in the caller's edge order."""
    n, heads, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    o = q.new_empty(n, heads, v.shape[2])
    lse = q.new_empty(n, heads, dtype=wide)
    weights = q.new_empty(col.shape[0] if return_weights else 0, heads)
    row_walk, row = _walk(row_ptr, col), _owner(row_ptr, col)
    for kv, members in _blocks(q, k, col):
        kh, vh = _stack(k, kv, wide), _stack(v, kv, wide, ones=1)
        walk = _diagonal(row_walk, k.shape[0], kv)
        for h in members:
            bias = _bias(edge_bias, edge, h)
            s, _ = _logits(_stack(q, h, wide), kh, bias, walk, scale, low, high)
            pivot, dead = _pivot(s, walk.ptr)
            p = s.sub_(_per_edge(pivot, row, n)).exp_()
            out = _spmm(walk, p, vh)
            if dead is not None:
                out.masked_fill_(dead[:, None], 0.0)
            out, total = out[:, :-1], out[:, -1]
            lse[:, h] = _unstack(total.log().add_(pivot), n)
            if eps:
                total = total + (math.log(eps) - pivot).exp()
            # rows without edges: 0 / tiny
            divisor = total.clamp(min=torch.finfo(wide).tiny)
            o[:, h] = _unstack(out.div_(divisor[:, None]), n)
            if return_weights:
                p.div_(_per_edge(divisor, row, n))
                weights[edge.long(), h] = _unstack(p, col.shape[0]).to(q.dtype)
    return o, lse, weights


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
    need_q: bool,
    need_k: bool,
    need_v: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dq [N, H, D], dk [M, H_kv, D], dv [M, H_kv, DV], dbias [E, H]; empty where not needed."""
    n, m, num_edges = q.shape[0], k.shape[0], col.shape[0]
    wide = lse.dtype
    log_eps = math.log(eps) if eps else -math.inf
    dq = q.new_empty(q.shape if need_q else (0,))
    dk = k.new_empty(k.shape if need_k else (0,))
    dv = v.new_empty(v.shape if need_v else (0,))
    dbias = q.new_empty((num_edges, q.shape[1]) if need_bias else (0,))
    row_walk, col_walk = _walk(row_ptr, col), _walk(col_ptr, col_row)
    row, occupied = _owner(row_ptr, col), row_ptr.diff() > 0
    for kv, members in _blocks(q, k, col):
        kh, vh = _stack(k, kv, wide), _stack(v, kv, wide)
        dkh = dvh = None
        rows, cols = _diagonal(row_walk, m, kv), _diagonal(col_walk, n, kv)
        slot = _shifted(col_slot, num_edges, kv)
        for h in members:
            qh, doh = _stack(q, h, wide), _stack(do, h, wide)
            bias = _bias(edge_bias, edge, h)
            s, through = _logits(qh, kh, bias, rows, scale, low, high)
            top = _stack(lse, h, wide)
            kept = 1 / (1 + (log_eps - top).exp()) if eps else None  # r
            # rows with edges but without a finite logit: exp(s - inf) = 0
            dead = top == -torch.inf
            some_dead = bool(n) and bool((dead.unflatten(0, (-1, n)) & occupied).any())
            if some_dead:
                top.masked_fill_(dead, torch.inf)
            p = s.sub_(_per_edge(top, row, n)).exp_()
            # 1 but for the rounding of the stored LSE, which is that of the largest logit
            total = _sum(rows, p)
            norm = 1 / (total.masked_fill_(dead, 1.0) if some_dead else total)
            # factors of a row are applied to its vectors: dp and ds come out with them
            doh *= (norm if kept is None else kept * norm)[:, None]
            if need_v:
                out = _spmm(cols, p.index_select(0, slot), doh)
                dvh = out if dvh is None else dvh.add_(out)
            if not (need_q or need_k or need_bias):
                continue
            dp = _sddmm(doh, vh, rows, 1.0)
            gamma = _sum(rows, p * dp)
            if kept is not None:
                gamma *= kept
            if dlse is not None:
                gamma -= _stack(dlse, h, wide)
            gamma *= norm
            if some_dead:
                gamma.masked_fill_(dead, 0.0)  # no edge counts, whatever the LSE's gradient
            ds = dp.sub_(_per_edge(gamma, row, n)).mul_(p)
            if need_bias:
                dbias[edge.long(), h] = _unstack(ds, num_edges).to(q.dtype)
            if through is not None:
                ds.masked_fill_(~through, 0.0)
            ds *= scale
            if need_q:
                out = _spmm(rows, ds, kh)
                if some_dead:
                    out.masked_fill_(dead[:, None], 0.0)
                dq[:, h] = _unstack(out, n)
            if need_k:
                out = _spmm(cols, ds.index_select(0, slot), qh)
                dkh = out if dkh is None else dkh.add_(out)
        if dkh is not None:
            dk[:, kv] = _unstack(dkh, m)
        if dvh is not None:
            dv[:, kv] = _unstack(dvh, m)
    return dq, dk, dv, dbias


def _blocks(q: Tensor, k: Tensor, col: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Key heads that go together, and for each member of a group the query heads on them."""
    kv_heads = k.shape[1]
    group = q.shape[1] // max(kv_heads, 1)
    size = max(1, _TOGETHER // max(1, q.shape[0] + k.shape[0] + col.shape[0]))
    for start in range(0, kv_heads, size):
        stop = min(start + size, kv_heads)
        members = [slice(start * group + i, stop * group, group) for i in range(group)]
        yield slice(start, stop), members


def _walk(ptr: Tensor, index: Tensor) -> _Walk:
    if index.shape[0] <= _LONG or int(ptr.diff().max()) <= _LONG:
        return _Walk(ptr, index, ptr, None)
    pieces = (-(-ptr.diff() // _LONG)).clamp_(min=1)
    joint = torch.cat([ptr[:1], pieces.cumsum(0, dtype=ptr.dtype)])
    number = torch.arange(int(joint[-1]), dtype=ptr.dtype)
    within = (number - joint[:-1].repeat_interleave(pieces)) * _LONG
    cut = torch.cat([ptr[:-1].repeat_interleave(pieces) + within, ptr[-1:]])
    return _Walk(ptr, index, cut, joint)


def _owner(ptr: Tensor, index: Tensor) -> Tensor:
    """The segment of every edge."""
    segment = torch.arange(ptr.shape[0] - 1, dtype=ptr.dtype)
    return segment.repeat_interleave(ptr.diff(), output_size=index.shape[0])


def _diagonal(walk: _Walk, size: int, heads: slice) -> _Walk:
    """The pattern once for each head along the diagonal; ``size`` is what index runs over."""
    edges, joint = walk.other.shape[0], walk.joint
    ptr = _chained(walk.ptr, edges, heads)
    cut = ptr
    if joint is not None:
        cut = _chained(walk.cut, edges, heads)
        joint = _chained(joint, walk.cut.shape[0] - 1, heads)
    return _Walk(ptr, _shifted(walk.other, size, heads), cut, joint)


def _chained(ptr: Tensor, total: int, heads: slice) -> Tensor:
    """Boundaries once for each head, one after the other; they end at ``total``."""
    if heads.stop - heads.start == 1:
        return ptr
    starts = _shifted(ptr[:-1], total, heads)
    return torch.cat([starts, ptr[-1:] * (heads.stop - heads.start)])


def _shifted(index: Tensor, size: int, heads: slice) -> Tensor:
    count = heads.stop - heads.start
    if count == 1:
        return index
    return (index + torch.arange(count, dtype=index.dtype)[:, None] * size).flatten()


def _stack(x: Tensor, heads: slice, dtype: torch.dtype, ones: int = 0) -> Tensor:
    """``x [N, H, ...]`` of some heads, one below the other, [heads * N, ...]: a copy.

    Followed by columns of ones, for sums of the weights beside those of the weighted rows.
    """
    x = x[:, heads].transpose(0, 1)
    if not ones:
        return x.to(dtype, memory_format=torch.contiguous_format, copy=True).flatten(0, 1)
    stacked = x.new_empty(*x.shape[:-1], x.shape[-1] + ones, dtype=dtype)
    stacked[..., :-ones] = x
    stacked[..., -ones:] = 1.0
    return stacked.flatten(0, 1)


def _unstack(x: Tensor, n: int) -> Tensor:
    return x.unflatten(0, (-1, n)).transpose(0, 1) if n else x[:0].unsqueeze(1)


def _bias(edge_bias: Tensor | None, edge: Tensor, heads: slice) -> Tensor | None:
    return None if edge_bias is None else edge_bias[:, heads].index_select(0, edge).t().flatten()


def _logits(
    qh: Tensor,
    kh: Tensor,
    bias: Tensor | None,
    walk: _Walk,
    scale: float,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor | None]:
    """clamp(scale q_i . k_j) + bias_ij of every edge, and which ones the clamp let through."""
    s, through = _sddmm(qh, kh, walk, scale), None
    if low > -math.inf or high < math.inf:
        through = (s >= low) & (s <= high)
        s.clamp_(low, high)
    if bias is not None:
        s += bias
    return s, through


def _pivot(s: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor | None]:
    """A logit of each row, to be subtracted from all, and which rows have no finite one, if any.

    A row's first logit serves where all are of ordinary size, its largest elsewhere: a choice
    that depends on nothing outside of the row.
    """
    if not s.shape[0]:
        return s.new_zeros(ptr.shape[0] - 1), None
    first = s.index_select(0, ptr[:-1].clamp(max=s.shape[0] - 1))
    low, high = (float(x) for x in torch.aminmax(s))
    if low >= -_ORDINARY and high <= _ORDINARY:
        return first, None
    top = torch.segment_reduce(s, "max", offsets=ptr, unsafe=True)
    dead = top == -torch.inf
    ordinary = (top.abs() <= _ORDINARY) & (first.abs() <= _ORDINARY)
    return torch.where(ordinary, first, top.masked_fill_(dead, 0.0)), dead


def _sddmm(x: Tensor, y: Tensor, walk: _Walk, scale: float) -> Tensor:
    """scale * x_i . y_j for every edge, in row order."""
    s = x.new_zeros(walk.other.shape[0])
    if not s.shape[0]:
        return s
    # PyTorch takes at most rows * columns entries: a denser multigraph gets empty columns
    width = max(y.shape[0], -(-s.shape[0] // x.shape[0]))
    if width > y.shape[0]:
        y = pad(y, (0, 0, 0, width - y.shape[0]))
    shape = x.shape[0], width
    product = torch.sparse_csr_tensor(walk.ptr, walk.other, s, shape, check_invariants=False)
    # with itself as out, its indices are not copied
    torch.sparse.sampled_addmm(product, x, y.t(), beta=0.0, alpha=scale, out=product)
    return product.values()


def _spmm(walk: _Walk, weight: Tensor | None, x: Tensor) -> Tensor:
    """sum over each segment of weight_e * x[index_e], [segments, D].

    A weighted embedding bag is this product, and the fastest one that PyTorch has on a CPU. It
    adds the edges of a bag one after the other.
    """
    out = _bags(walk.other, x, walk.cut, weight)
    if walk.joint is None:
        return out
    return _bags(torch.arange(out.shape[0], dtype=walk.cut.dtype), out, walk.joint)


def _bags(index: Tensor, x: Tensor, ptr: Tensor, weight: Tensor | None = None) -> Tensor:
    return embedding_bag(
        index, x, ptr, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


def _sum(walk: _Walk, x: Tensor) -> Tensor:
    """The sum of each segment's ``x [E]``."""
    every = torch.arange(x.shape[0], dtype=walk.cut.dtype)
    return _spmm(walk._replace(other=every), None, x[:, None]).squeeze(1)


def _per_edge(x: Tensor, row: Tensor, n: int) -> Tensor:
    """A value a row, for each of its edges; ``x`` has several heads of n rows."""
    return x.unflatten(0, (-1, n)).index_select(1, row).flatten() if n else x

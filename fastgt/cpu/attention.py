"""Neighbourhood attention on a CPU, a few heads at a time.

A head's logits are a sampled dense-dense product (SDDMM) over the graph's CSR pattern and its
output a sparse-dense product. On a large graph heads come one by one, so that nothing larger than
one [E] vector exists beside the result: the working memory is O(N D + E). On a small one, where
the calls would cost more than the work, several heads are put side by side as one graph of
several components. Every output row is summed by one thread in edge order: the result depends
neither on the number of threads nor on that choice. The backward recomputes the logits; the
symbols are those of ``kernels/attention.py``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

with warnings.catch_warnings():
    # PyTorch says "sparse CSR support is in beta state" at the first such tensor of a process
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))

_TOGETHER = 2**17  # edges and nodes, heads counted, up to which heads share their calls


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
    for kv, members in _blocks(q, k, col):
        kh, vh = (_stack(x, kv, wide) for x in (k, v))
        ptr, index = _diagonal(row_ptr, col, k.shape[0], kv)
        degree = ptr.diff()
        for h in members:
            bias = _bias(edge_bias, edge, h)
            s, _ = _logits(_stack(q, h, wide), kh, bias, ptr, index, scale, low, high)
            pivot = torch.segment_reduce(s, "max", offsets=ptr, unsafe=True)
            pivot.masked_fill_(pivot == -torch.inf, 0.0)
            p = s.sub_(_per_edge(pivot, degree, s)).exp_()
            total = torch.segment_reduce(p, "sum", offsets=ptr, unsafe=True)
            empty = total == 0
            total.masked_fill_(empty, 1.0)
            lse[:, h] = _unstack((pivot + total.log()).masked_fill_(empty, -torch.inf), n)
            divisor = total + (math.log(eps) - pivot).exp() if eps else total
            out = _spmm(ptr, index, p, vh).div_(divisor[:, None])
            o[:, h] = _unstack(out.masked_fill_(empty[:, None], 0.0), n)
            if return_weights:
                p.div_(_per_edge(divisor, degree, s))
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
    for kv, members in _blocks(q, k, col):
        kh, vh = _stack(k, kv, wide), _stack(v, kv, wide)
        dkh, dvh = torch.zeros_like(kh), torch.zeros_like(vh)
        ptr, index = _diagonal(row_ptr, col, m, kv)
        col_walk = _diagonal(col_ptr, col_row, n, kv)
        slot = _diagonal(col_ptr, col_slot, num_edges, kv)[1]
        degree = ptr.diff()
        for h in members:
            qh, doh = _stack(q, h, wide), _stack(do, h, wide)
            bias = _bias(edge_bias, edge, h)
            s, through = _logits(qh, kh, bias, ptr, index, scale, low, high)
            # rows without a finite logit: exp(s - inf) = 0
            top = _stack(lse, h, wide)
            dead = top == -torch.inf
            top.masked_fill_(dead, torch.inf)
            kept = 1 / (1 + (log_eps - top).exp())  # r
            p = s.sub_(_per_edge(top, degree, s)).exp_()
            # 1 but for the rounding of the stored LSE, which is that of the largest logit
            total = torch.segment_reduce(p, "sum", offsets=ptr, unsafe=True)
            norm = 1 / total.masked_fill_(total == 0, 1.0)
            # factors of a row are applied to its vectors: dp and ds come out with them
            doh *= (kept * norm)[:, None]
            if need_v:
                dvh += _spmm(*col_walk, p.index_select(0, slot), doh)
            if not (need_q or need_k or need_bias):
                continue
            dp = _sddmm(doh, vh, ptr, index, 1.0)
            delta = torch.segment_reduce(p * dp, "sum", offsets=ptr, unsafe=True)
            gamma = kept * delta
            if dlse is not None:
                gamma -= _stack(dlse, h, wide)
            gamma *= norm
            gamma.masked_fill_(dead, 0.0)  # no edge counts, whatever the LSE's gradient
            ds = dp.sub_(_per_edge(gamma, degree, dp)).mul_(p)
            if need_bias:
                dbias[edge.long(), h] = _unstack(ds, num_edges).to(q.dtype)
            if through is not None:
                ds.masked_fill_(~through, 0.0)
            if need_q:
                out = _spmm(ptr, index, ds, kh).mul_(scale)
                dq[:, h] = _unstack(out.masked_fill_(dead[:, None], 0.0), n)
            if need_k:
                dkh += _spmm(*col_walk, ds.index_select(0, slot), qh).mul_(scale)
        if need_k:
            dk[:, kv] = _unstack(dkh, m)
        if need_v:
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


def _diagonal(ptr: Tensor, index: Tensor, size: int, heads: slice) -> tuple[Tensor, Tensor]:
    """The pattern once for each head along the diagonal; ``size`` is what index runs over."""
    count = heads.stop - heads.start
    if count == 1:
        return ptr, index
    head = torch.arange(count, dtype=ptr.dtype)[:, None]
    starts = (ptr[:-1] + head * index.shape[0]).flatten()
    return torch.cat([starts, ptr[-1:] * count]), (index + head * size).flatten()


def _stack(x: Tensor, heads: slice, dtype: torch.dtype) -> Tensor:
    """``x [N, H, ...]`` of some heads, one below the other: a copy, [heads * N, ...]."""
    x = x[:, heads].transpose(0, 1)
    return x.to(dtype, memory_format=torch.contiguous_format, copy=True).flatten(0, 1)


def _unstack(x: Tensor, n: int) -> Tensor:
    return x.unflatten(0, (-1, n)).transpose(0, 1) if n else x[:0].unsqueeze(1)


def _bias(edge_bias: Tensor | None, edge: Tensor, heads: slice) -> Tensor | None:
    return None if edge_bias is None else edge_bias[:, heads].index_select(0, edge).t().flatten()


def _logits(
    qh: Tensor,
    kh: Tensor,
    bias: Tensor | None,
    ptr: Tensor,
    index: Tensor,
    scale: float,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor | None]:
    """clamp(scale q_i . k_j) + bias_ij of every edge, and which ones the clamp let through."""
    s, through = _sddmm(qh, kh, ptr, index, scale), None
    if low > -math.inf or high < math.inf:
        through = (s >= low) & (s <= high)
        s.clamp_(low, high)
    if bias is not None:
        s += bias
    return s, through


def _sddmm(x: Tensor, y: Tensor, ptr: Tensor, index: Tensor, scale: float) -> Tensor:
    """scale * x_i . y_j for every edge, in row order."""
    s = x.new_zeros(index.shape[0])
    if not s.shape[0]:
        return s
    # PyTorch takes at most rows * columns entries: a denser multigraph gets empty columns
    width = max(y.shape[0], -(-s.shape[0] // x.shape[0]))
    y = pad(y, (0, 0, 0, width - y.shape[0]))
    product = torch.sparse_csr_tensor(ptr, index, s, (x.shape[0], width), check_invariants=False)
    # with itself as out, its indices are not copied
    torch.sparse.sampled_addmm(product, x, y.t(), beta=0.0, alpha=scale, out=product)
    return product.values()


def _spmm(ptr: Tensor, index: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """sum over each segment of weight_e * x[index_e], [len(ptr) - 1, D].

    A weighted embedding bag is this product, and the fastest one that PyTorch has on a CPU.
    """
    return embedding_bag(
        index, x, ptr, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


def _per_edge(x: Tensor, degree: Tensor, like: Tensor) -> Tensor:
    """A value a row, repeated for each of its edges."""
    return x.repeat_interleave(degree, output_size=like.shape[0])

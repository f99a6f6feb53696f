"""Neighbourhood attention on a CPU, one head at a time.

A head's logits are a sampled dense-dense product (SDDMM) over the graph's CSR pattern and its
output a sparse-dense product, so nothing larger than one [E] vector a head exists beside the
result: the working memory is O(N D + E). Every output row is summed by one thread in edge order:
the result does not depend on the number of threads. The backward recomputes the logits; the
symbols are those of ``kernels/attention.py``.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

with warnings.catch_warnings():
    # PyTorch says "sparse CSR support is in beta state" at the first such tensor of a process
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


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
    group = heads // max(k.shape[1], 1)
    degree = row_ptr.diff()
    o = q.new_empty(n, heads, v.shape[2])
    lse = q.new_empty(n, heads, dtype=wide)
    weights = q.new_empty(col.shape[0] if return_weights else 0, heads)
    for h in range(heads):
        kh, vh = (_head(x, h // group, wide) for x in (k, v))
        s, _ = _logits(
            _head(q, h, wide), kh, _bias(edge_bias, edge, h), row_ptr, col, scale, low, high
        )
        pivot = torch.segment_reduce(s, "max", offsets=row_ptr, unsafe=True)  # [N]
        pivot.masked_fill_(pivot == -torch.inf, 0.0)
        p = s.sub_(_per_edge(pivot, degree, s)).exp_()  # [E]
        total = torch.segment_reduce(p, "sum", offsets=row_ptr, unsafe=True)
        empty = total == 0
        total.masked_fill_(empty, 1.0)
        lse[:, h] = (pivot + total.log()).masked_fill_(empty, -torch.inf)
        divisor = total + eps * pivot.neg().exp() if eps else total
        o[:, h] = _spmm(row_ptr, col, p, vh).div_(divisor[:, None])
        if return_weights:
            weights[edge.long(), h] = p.div_(_per_edge(divisor, degree, s)).to(q.dtype)
    return o, lse, weights


def attention_bwd(
    do: Tensor,
    dlse: Tensor,
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
    heads, kv_heads = q.shape[1], k.shape[1]
    group = heads // max(kv_heads, 1)
    wide = lse.dtype
    log_eps = math.log(eps) if eps else -math.inf
    degree = row_ptr.diff()
    dq = q.new_empty(q.shape if need_q else (0,))
    dk = q.new_empty(k.shape if need_k else (0,))
    dv = q.new_empty(v.shape if need_v else (0,))
    dbias = q.new_empty((col.shape[0], heads) if need_bias else (0,))
    for kv in range(kv_heads):
        kh, vh = _head(k, kv, wide), _head(v, kv, wide)
        dkh, dvh = torch.zeros_like(kh), torch.zeros_like(vh)
        for h in range(kv * group, (kv + 1) * group):
            qh, doh = _head(q, h, wide), _head(do, h, wide)
            s, through = _logits(qh, kh, _bias(edge_bias, edge, h), row_ptr, col, scale, low, high)
            # rows without a finite logit: exp(s - inf) = 0
            top = lse[:, h].masked_fill(lse[:, h] == -torch.inf, torch.inf)
            kept = 1 / (1 + (log_eps - top).exp())  # r, [N]
            p = s.sub_(_per_edge(top, degree, s)).exp_()  # [E]
            # 1 but for the rounding of the stored LSE, which is that of the largest logit
            total = torch.segment_reduce(p, "sum", offsets=row_ptr, unsafe=True)
            norm = 1 / total.masked_fill_(total == 0, 1.0)
            # factors of a row are applied to its vectors: dp and ds come out with them
            doh = doh * (kept * norm)[:, None]
            if need_v:
                dvh += _spmm(col_ptr, col_row, p.index_select(0, col_slot), doh)
            if not (need_q or need_k or need_bias):
                continue
            dp = _sddmm(doh, vh, row_ptr, col, 1.0)  # [E]
            delta = torch.segment_reduce(p * dp, "sum", offsets=row_ptr, unsafe=True)
            gamma = norm * (kept * delta - dlse[:, h])
            ds = dp.sub_(_per_edge(gamma, degree, dp)).mul_(p)
            if need_bias:
                dbias[edge.long(), h] = ds.to(q.dtype)
            if through is not None:
                ds.masked_fill_(~through, 0.0)
            if need_q:
                dq[:, h] = _spmm(row_ptr, col, ds, kh).mul_(scale)
            if need_k:
                dkh += _spmm(col_ptr, col_row, ds.index_select(0, col_slot), qh).mul_(scale)
        if need_k:
            dk[:, kv] = dkh
        if need_v:
            dv[:, kv] = dvh
    return dq, dk, dv, dbias


def _logits(
    qh: Tensor,
    kh: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    col: Tensor,
    scale: float,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor | None]:
    """clamp(scale q_i . k_j) + bias_ij of one head, [E], and which ones the clamp let through."""
    s, through = _sddmm(qh, kh, row_ptr, col, scale), None
    if low > -math.inf or high < math.inf:
        through = (s >= low) & (s <= high)
        s.clamp_(low, high)
    if bias is not None:
        s += bias
    return s, through


def _sddmm(x: Tensor, y: Tensor, row_ptr: Tensor, col: Tensor, scale: float) -> Tensor:
    """scale * x_i . y_j for every edge, [E] in row order."""
    s = x.new_zeros(col.shape[0])
    if not s.shape[0]:
        return s
    # PyTorch takes at most rows * columns entries: a denser multigraph gets empty columns
    width = max(y.shape[0], -(-s.shape[0] // x.shape[0]))
    y = pad(y, (0, 0, 0, width - y.shape[0]))
    product = torch.sparse_csr_tensor(row_ptr, col, s, (x.shape[0], width), check_invariants=False)
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


def _head(x: Tensor, h: int, dtype: torch.dtype) -> Tensor:
    return x[:, h].to(dtype).contiguous()


def _bias(edge_bias: Tensor | None, edge: Tensor, h: int) -> Tensor | None:
    return None if edge_bias is None else edge_bias[:, h].index_select(0, edge)


def _per_edge(x: Tensor, degree: Tensor, like: Tensor) -> Tensor:
    """A value a row, repeated for each of its edges."""
    return x.repeat_interleave(degree, output_size=like.shape[0])

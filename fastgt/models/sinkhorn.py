"""Sinkhorn's iterations in logarithms, of pairs of any sizes and without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgt.contract import AuxRequest
from fastgt.ops.checks import check_float, check_offsets, integer, readable, without_autocast
from fastgt.ops.global_attention import global_attention
from fastgt.ops.segment_pool import of_nodes


def log_sinkhorn(
    scores: Tensor,
    dustbin: Tensor,
    offsets: Tensor,
    key_offsets: Tensor,
    *,
    iterations: int = 20,
) -> Tensor:
    """Soft assignments of two sets of nodes, in which a node may have no partner.

    For a pair of sets of n and m nodes, ``Z`` is the matrix of their scores with one more row and
    one more column, the dustbins, whose entries are all ``dustbin``. Beginning with
    ``v = 0``, u and v are computed ``iterations`` times::

        u_i = log a_i - log sum_j exp(Z_ij + v_j)      a = (1, ..., 1, m) / (n + m)
        v_j = log b_j - log sum_i exp(Z_ij + u_i)      b = (1, ..., 1, n) / (n + m)

        out_ij = Z_ij + u_i + v_j + log(n + m)

    So ``sum_i exp(out_ij)`` is 1 for a node j, and n for the dustbin; ``sum_j exp(out_ij)``
    approaches 1 for a node i, and m for the dustbin.

    A sum over a row is the log-sum-exp of an attention of one channel, whose query is 1, whose key
    is ``v_j`` and whose bias is ``Z_ij``: for a gradient an iteration keeps u and v, and no matrix.

    Args:
        scores: ``[sum_p n_p m_p]`` floating point: the matrices of all pairs, one after another,
            each row after row. A score of -inf forbids a match.
        dustbin: ``[]``, like scores; it gets a gradient.
        offsets: ``[P + 1]`` int32 or int64, boundaries of the first sets. No set is empty. Values
            are checked on a CPU only.
        key_offsets: ``[P + 1]``, those of the second sets.
        iterations: How many, at least 1.

    Returns:
        ``[sum_p (n_p + 1) (m_p + 1)]``, in the order of scores; in every matrix the dustbins are
        the last row and column. It is float64 for float64, else float32, also within
        ``torch.autocast``. Memory beside it is O(sum_p n_p m_p + iterations sum_p (n_p + m_p)).

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.

    Source:
        Sarlin et al., SuperGlue, arXiv 1911.11763, section 3.2 and their code; Sinkhorn and Knopp,
        Concerning nonnegative matrices and doubly stochastic matrices, 1967.

    Example:
        >>> import torch
        >>> from fastgt.models import log_sinkhorn
        >>> scores = torch.tensor([9.0, 0.0, 0.0, 0.0, 9.0, 0.0])  # two nodes and three
        >>> two, three = torch.tensor([0, 2]), torch.tensor([0, 3])
        >>> log_sinkhorn(scores, torch.tensor(1.0), two, three).exp().view(3, 4).round(decimals=1)
        tensor([[1., 0., 0., 0.],
                [0., 1., 0., 0.],
                [0., 0., 1., 2.]])
    """
    iterations = integer("iterations", iterations, 1)
    _check(scores, dustbin, offsets, key_offsets)
    with without_autocast(scores.device.type):
        wide = scores if scores.dtype == torch.float64 else scores.float()
        return _Pairs(offsets, key_offsets).solved(wide, dustbin.to(wide.dtype), iterations)


class _Pairs:
    """Where the matrices of all pairs, dustbins and all, stand in a row.

    Attributes:
        rows, cols: ``[P + 1]``, boundaries of rows and of columns.
        row_ptr, col_ptr: Where each row begins, and each column where matrices are transposed.
        inner: Places of entries that belong to no dustbin.
        transposed: For each entry of the transposed matrices, its place.
        back: For each entry, its place in the transposed matrices.
    """

    def __init__(self, offsets: Tensor, key_offsets: Tensor):
        pairs = torch.arange(len(offsets), device=offsets.device)
        self.rows, self.cols = offsets.long() + pairs, key_offsets.long() + pairs
        n, m = self.rows.diff(), self.cols.diff()  # [P] with dustbins
        self.sizes = n - 1, m - 1
        first = _ptr(n * m)
        self.row_ptr = _ptr(m.repeat_interleave(n))
        self.col_ptr = _ptr(n.repeat_interleave(m))
        pair = pairs[:-1].repeat_interleave(n * m)
        place = torch.arange(len(pair), device=pair.device)
        local, n, m = place - first[pair], n[pair], m[pair]
        row, col = local // m, local % m
        self.inner = ((row < n - 1) & (col < m - 1)).nonzero()[:, 0]
        self.back = first[pair] + col * n + row
        self.transposed = first[pair] + local % n * m + local // n

    def solved(self, scores: Tensor, dustbin: Tensor, iterations: int) -> Tensor:
        total = len(self.back)
        z = dustbin.expand(total).index_copy(0, self.inner, scores)
        zt = z.index_select(0, self.transposed)
        first, second = (x.to(z.dtype) for x in self.sizes)
        norm = (first + second).log()
        mu = _masses(second, norm, self.rows, len(self.row_ptr) - 1)
        nu = _masses(first, norm, self.cols, len(self.col_ptr) - 1)
        ones = torch.ones_like(mu), torch.ones_like(nu)
        v = torch.zeros_like(nu)
        for _ in range(iterations):
            u = mu - _sums(*ones, v, z, self.rows, self.cols)
            v = nu - _sums(*ones[::-1], u, zt, self.cols, self.rows)
        v = of_nodes(v, self.col_ptr, total, None).index_select(0, self.back)
        u = u + norm.repeat_interleave(self.rows.diff(), output_size=len(u))
        return z + of_nodes(u, self.row_ptr, total, None) + v


def _masses(dustbins: Tensor, norm: Tensor, ptr: Tensor, count: int) -> Tensor:
    """Logarithms of the masses of all rows, or columns: that of a node is 1, all over norm."""
    mass = torch.zeros(count, dtype=norm.dtype, device=norm.device)
    mass[ptr[1:] - 1] = dustbins.log()
    return mass - norm.repeat_interleave(ptr.diff(), output_size=count)


def _sums(q: Tensor, values: Tensor, k: Tensor, z: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """log sum_j exp(z_ij + k_j), for every row i: q and values are ones."""
    q, k, values = (x[:, None, None] for x in (q, k, values))
    logits: dict[str, Any] = {"scale": 1.0, "bias": z[:, None], "key_offsets": cols}
    _, aux = global_attention(q, k, values, rows, **logits, return_aux=AuxRequest(lse=True))
    assert aux.lse is not None
    return aux.lse[:, 0]


def _ptr(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _check(scores: Tensor, dustbin: Tensor, offsets: Tensor, key_offsets: Tensor) -> None:
    check_float("scores", scores)
    check_float("dustbin", dustbin)
    if scores.ndim != 1:
        raise ValueError(f"scores must be [sum_p n_p m_p], got {list(scores.shape)}")
    if dustbin.ndim:
        raise ValueError(f"dustbin must be one number, [], got {list(dustbin.shape)}")
    if dustbin.device != scores.device:
        raise ValueError(f"dustbin is on {dustbin.device} but scores is on {scores.device}")
    for name, x in (("offsets", offsets), ("key_offsets", key_offsets)):
        last = int(x[-1]) if isinstance(x, Tensor) and x.ndim == 1 and len(x) and readable(x) else 0
        check_offsets(x, last, scores.device, name)
    if len(offsets) != len(key_offsets):
        raise ValueError(
            f"key_offsets has {len(key_offsets) - 1} pairs but offsets has {len(offsets) - 1}"
        )
    n, m = offsets.diff().long(), key_offsets.diff().long()
    if readable(n) and readable(m):
        for name, sizes in (("offsets", n), ("key_offsets", m)):
            if (empty := (sizes == 0).nonzero()).numel():
                raise ValueError(f"{name} has no node in pair {int(empty[0])}: each set has one")
        if (wanted := int((n * m).sum())) != len(scores):
            raise ValueError(f"scores must be [sum_p n_p m_p] = [{wanted}], got [{len(scores)}]")

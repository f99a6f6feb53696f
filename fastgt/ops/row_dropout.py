"""row_dropout: public function -> checks -> autograd -> op."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgt.contract import Dropout
from fastgt.ops.checks import (
    accumulator,
    check_counters,
    check_float,
    dropout_key,
    needs_gradient,
    number,
)
from fastgt.ops.implementation import resolve_impl
from fastgt.ops.registration import register
from fastgt.philox import LEVELS, kept, threshold
from fastgt.signature import Signature

_CHUNK = 2**18  # channels whose factors the definition makes at a time


def row_dropout(
    x: Tensor,
    p: float,
    *,
    seed: int | Tensor | None = None,
    numbers: Tensor | None = None,
) -> Tensor:
    """Dropout whose mask is a function of the rows' numbers: whoever has a row drops the same of
    it, in whatever order, beside whichever other rows.

    For channel c of row r::

        y_rc = m_rc x_rc / (1 - p)        m_rc is 0 with probability p, else 1

    m_rc is 1 where the upper 24 bits of word ``c % 4`` of Philox-4x32-10 at the counter
    ``(numbers_r, c // 4)`` are at least ``2^24 p``, with the 64 bits of the seed as its key. The
    backward draws the mask again: nothing is kept for it but seed and numbers.

    Args:
        x: ``[R, ...]``, float16, bfloat16, float32 or float64, any strides. The channels of a row
            are counted over all dimensions but the first.
        p: Probability, in multiples of 2^-24, of dropping a channel. At 0, x is returned; at 1 all
            finite numbers become 0. Pass 0 in evaluation.
        seed: An int, or one int64 on x's device. Two calls with one seed drop the same: give each
            call its own. None draws one from PyTorch's generator of x's device.
        numbers: ``[R]`` int64, none below 0. None: 0 to R - 1.

    Returns:
        Like x, contiguous. The mask is the same on a CPU, where a compiled kernel runs, and on a
        GPU, where PyTorch's operators do. As in ``torch.nn.functional.dropout``, a dropped NaN or
        infinity is NaN. Second derivatives are those of the equation.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.

    Source:
        Srivastava et al., Dropout, JMLR 15, 2014, section 4. Salmon et al., Parallel random
        numbers: as easy as 1, 2, 3, SC 2011, section 4.3 (Philox).

    Example:
        >>> import torch
        >>> from fastgt.ops.row_dropout import row_dropout
        >>> x = torch.randn(6, 16)
        >>> whole = row_dropout(x, 0.5, seed=3)
        >>> rows = torch.tensor([4, 1])
        >>> torch.equal(row_dropout(x[rows], 0.5, seed=3, numbers=rows), whole[rows])
        True
    """
    check_float("x", x)
    p = number("p", p)
    if x.ndim == 0:
        raise ValueError("x must be [R, ...], got []")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be from 0 to 1, got {p}")
    if numbers is not None:
        check_counters("numbers", numbers, x.shape[0], "x", "rows", x.device)
    if not p and seed is None:
        return x
    key = dropout_key(seed, x.device, "seed", "x")
    if not p:
        return x
    impl = "cpp" if resolve_impl(None, x) == "cpp" else "reference"
    rows = x.flatten(1) if x.ndim > 1 else x[:, None]
    if needs_gradient(x):
        return _RowDropout.apply(impl, rows, key, numbers, p).view(x.shape)
    return _op(impl, rows, key, numbers, p).view(x.shape)


class _RowDropout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, impl: str, x: Tensor, seed: Tensor, numbers: Tensor | None, p: float
    ) -> Tensor:
        ctx.save_for_backward(seed, numbers)
        ctx.impl, ctx.p = impl, p
        return _op(impl, x, seed, numbers, p)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # create_graph=True: the gradient must itself be differentiable
        drop = _RowDropout.apply if torch.is_grad_enabled() else _op
        return None, drop(ctx.impl, dy, *ctx.saved_tensors, ctx.p), None, None, None


class _Rows(NamedTuple):
    x: Tensor  # [R, C]


def _launch(impl: str, rows: _Rows, dropout: Dropout) -> Tensor:
    if impl == "cpp":
        from fastgt.cpu import row_dropout as cpu

        return cpu.row_dropout(rows.x, dropout)
    return _definition(rows.x, dropout)


def _definition(x: Tensor, dropout: Dropout) -> Tensor:
    """In plain PyTorch, some rows at a time: no mask is as large as x."""
    (count, width), (seed, numbers, p, _) = x.shape, dropout
    assert seed is not None
    growth = LEVELS / max(1, LEVELS - threshold(p))
    y, step = x.new_empty(x.shape), max(1, _CHUNK // max(1, width))
    for start in range(0, count, step):
        some = x[start : start + step]
        known = None if numbers is None else numbers[start : start + step]
        keep = kept(seed, len(some), width, p, first=start, numbers=known)
        factor = keep.to(accumulator(x)) * growth
        y[start : start + step] = some * factor
    return y


_op = register(
    "row_dropout",
    Signature(_Rows, Dropout),
    "Tensor",
    launch=_launch,
    fake=lambda rows, dropout: rows.x.new_empty(rows.x.shape),
)

"""additive_attention on a CPU: ``additive_attention.cpp``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgt.contract import (
    AdditiveInputs,
    AdditiveNeeds,
    AdditiveTerms,
    AdditiveUpstream,
    Dropout,
    HeadMask,
    Walks,
)
from fastgt.cpu.library import accumulator, dtype_number, kernels, rows_of, walk
from fastgt.philox import LEVELS, threshold

_NO_RESULTS = (None,) * 3
_NO_UPSTREAM = (None,) * 2
_NO_GRADIENTS = (None,) * len(AdditiveNeeds._fields)
_NO_WALK = 0, 0, 0, 0, 0


def additive_attention_fwd(
    row_walk: Sequence[Tensor],
    inputs: AdditiveInputs,
    slope: float,
    terms: AdditiveTerms,
    mask: HeadMask,
    dropout: Dropout,
    make_weights: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> o, lse [N, H], and the weights [E, H] in the caller's edge order or None.

    To heads that are not in ``mask.rows`` [1 or N, H] a row has no edges.
    """
    q, v = inputs.q, inputs.v
    n, heads, _ = q.shape
    o = q.new_empty(n, heads, v.shape[2])
    lse = q.new_empty(n, heads, dtype=accumulator(q))
    weights = q.new_empty(row_walk[1].shape[0], heads) if make_weights else None
    call = _call(row_walk, (), inputs, slope, terms, mask, dropout)
    results = o, lse, weights, *_NO_UPSTREAM, *_NO_GRADIENTS
    kernels().run_in_memory("additive_attention", "fwd", *call, *results)
    return o, lse, weights


def additive_attention_bwd(
    walks: Walks,
    upstream: AdditiveUpstream,
    inputs: AdditiveInputs,
    slope: float,
    needs: AdditiveNeeds,
    terms: AdditiveTerms,
    mask: HeadMask,
    dropout: Dropout,
) -> tuple[Tensor | None, ...]:
    """-> the gradients that are needed, None for the others."""
    given = zip((*inputs, *terms), needs, strict=True)
    grads = tuple(x.new_empty(x.shape) if need and x is not None else None for x, need in given)
    do, dlse, lse = upstream
    call = _call(*walks, inputs, slope, terms, mask, dropout)
    above = rows_of(do), None if dlse is None else rows_of(dlse)
    rest = None, lse.contiguous(), None, *above, *grads
    kernels().run_in_memory("additive_attention", "bwd", *call, *rest)
    return grads


def _call(
    row_walk: Sequence[Tensor],
    column_walk: Sequence[Tensor],
    inputs: AdditiveInputs,
    slope: float,
    terms: AdditiveTerms,
    mask: HeadMask,
    dropout: Dropout,
) -> tuple[Any, ...]:
    """What a forward and a backward begin with: the first fields of ``AdditiveCall``."""
    q, _, v, _ = inputs
    row_ptr, col, edge = row_walk
    columns: tuple[int, ...] = _NO_WALK
    slot = None
    if column_walk:
        col_ptr, col_row, slot, col_edge = column_walk
        columns = walk(col_ptr, col_row, col_edge)
    limit = threshold(dropout.p)
    return (
        dtype_number(q),
        torch.get_num_threads(),
        q.shape[1],
        q.shape[2],
        v.shape[2],
        0 if terms.attr is None else terms.attr.shape[1],
        walk(row_ptr, col, edge),
        columns,
        slot,
        *(rows_of(x) for x in inputs),
        slope,
        *(None if x is None else rows_of(x) for x in terms),
        *(None if x is None else _by_node(x) for x in mask),
        dropout.seed,
        None if dropout.numbers is None else dropout.numbers.contiguous(),
        dropout.first_head,
        limit,
        LEVELS / max(1, LEVELS - limit),
    )


def _by_node(mask: Tensor) -> Tensor:
    """[1 or N, H] with a row for every node: one row, read N times."""
    return mask.expand(2, -1) if mask.shape[0] == 1 else mask

"""Neighbourhood attention on a CPU: ``attention.cpp``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

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
from fastgt.cpu.library import accumulator, dtype_number, kernels, rows_of, walk
from fastgt.philox import LEVELS, threshold

_NO_RESULTS = (None,) * len(Results._fields)
_NO_UPSTREAM = (None,) * len(Upstream._fields)
_NO_GRADIENTS = (None,) * len(PerInput._fields)
_NO_WALK = 0, 0, 0, 0, 0


def attention_fwd(
    row_walk: Sequence[Tensor],
    inputs: Inputs,
    logit: Logit,
    terms: EdgeTerms,
    mask: HeadMask,
    dropout: Dropout,
    switches: Switches,
) -> Results:
    """The results in the caller's edge order.

    To heads that are not in ``mask.rows`` [1 or N, H] a row has no edges.
    """
    q, v = inputs.q, inputs.v
    if terms.key is not None and terms.key.dtype != q.dtype:
        # a product of attributes, which is not rounded to 16 bits
        in_float = _wide(inputs), logit, _wide(terms), mask, dropout, switches
        o, lse, weights, scores, attr_o = attention_fwd(row_walk, *in_float)
        weights, scores = (None if x is None else x.to(q.dtype) for x in (weights, scores))
        return Results(o.to(q.dtype), lse, weights, scores, attr_o)
    n, heads, d = q.shape
    num_edges = row_walk[1].shape[0]
    wide = accumulator(q)
    attr_width = 0 if terms.attr is None else terms.attr.shape[1]
    results = Results(
        q.new_empty(n, heads, v.shape[2]),
        q.new_empty(n, heads, dtype=wide),
        q.new_empty(num_edges, heads) if switches.make_weights else None,
        q.new_empty(num_edges, heads, d) if switches.make_scores else None,
        q.new_empty(n, heads, attr_width, dtype=wide) if switches.make_attr_o else None,
    )
    call = _call(row_walk, None, inputs, logit, terms, mask, dropout, switches)
    rest = *results, *_NO_UPSTREAM, *_NO_GRADIENTS
    kernels().run_in_memory("attention", "fwd", *call, *rest)
    return results


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
    q = inputs.q
    if terms.key is not None and terms.key.dtype != q.dtype:
        call = _wide(inputs), logit, _wide(terms), mask, dropout, switches
        wide = attention_bwd(row_walk, column_walk, needs, _wide(upstream), saved, *call)
        like: Any = zip(wide, (*inputs, *terms), strict=True)
        return PerInput(*(None if x is None else x.to(y.dtype) for x, y in like))
    grads: PerInput[Any] = PerInput(
        *(
            x.new_empty(x.shape) if x is not None and need else None
            for x, need in zip((*inputs, *terms), needs, strict=True)
        )
    )
    given = None, saved.lse.contiguous(), None, None, None
    do, others = rows_of(upstream.do), (None if x is None else rows_of(x) for x in upstream[1:])
    call = _call(row_walk, column_walk, inputs, logit, terms, mask, dropout, switches)
    kernels().run_in_memory("attention", "bwd", *call, *given, do, *others, *grads)
    return grads


def _call(
    row_walk: Sequence[Tensor],
    column_walk: Sequence[Tensor] | None,
    inputs: Inputs,
    logit: Logit,
    terms: EdgeTerms,
    mask: HeadMask,
    dropout: Dropout,
    switches: Switches,
) -> tuple[Any, ...]:
    """What a forward and a backward begin with: the first fields of ``AttentionCall``."""
    q, k, v = inputs
    row_ptr, col, edge = row_walk
    columns: tuple[int, ...] = _NO_WALK
    slot = None
    if column_walk is not None:
        col_ptr, col_row, slot, col_edge = column_walk
        columns = walk(col_ptr, col_row, col_edge)
    limit = threshold(dropout.p)
    gate, attr = terms.gate, terms.attr
    return (
        dtype_number(q),
        torch.get_num_threads(),
        q.shape[1],
        k.shape[1],
        q.shape[2],
        v.shape[2],
        0 if attr is None else attr.shape[1],
        walk(row_ptr, col, edge),
        columns,
        slot,
        *(rows_of(x) for x in inputs),
        *logit,
        *(None if x is None else rows_of(x) for x in terms),
        *(None if x is None else _by_node(x) for x in mask),
        dropout.seed,
        None if dropout.numbers is None else dropout.numbers.contiguous(),
        dropout.first_head,
        limit,
        LEVELS / max(1, LEVELS - limit),
        gate is not None and gate.ndim == 3,
        switches.key_is_value,
    )


T = TypeVar("T", Inputs, EdgeTerms, Upstream)


def _wide(tensors: T) -> T:
    """All in float32."""
    made: Any = (None if x is None else x.float() for x in tensors)
    return type(tensors)(*made)


def _by_node(mask: Tensor) -> Tensor:
    """[1 or N, H] with a row for every node: one row, read N times."""
    return mask.expand(2, -1) if mask.shape[0] == 1 else mask

"""global_attention on a CPU: ``global_attention.cpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgt.contract import (
    GlobalResults,
    GlobalUpstream,
    Inputs,
    PairDropout,
    PairNeeds,
    PairTerms,
    RaggedPairs,
)
from fastgt.cpu.library import accumulator, dtype_number, kernels, rows_of
from fastgt.philox import LEVELS, threshold

_ROOM = 2**20  # numbers that a thread has room for, of keys and what goes with them
_MOST = 4096  # keys that a thread has room for, at most
_PIECE = 512  # queries that one thread goes through
_PIECES = 8  # parts of a graph that have sums of their own


def global_attention_fwd(
    inputs: Inputs, terms: PairTerms, graphs: RaggedPairs, dropout: PairDropout
) -> GlobalResults:
    q, _, v = inputs
    o = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[:2], dtype=accumulator(q))
    _run("fwd", inputs, terms, graphs, dropout, (o, lse, *[None] * 6))
    return GlobalResults(o, lse)


def global_attention_bwd(
    upstream: GlobalUpstream,
    inputs: Inputs,
    terms: PairTerms,
    graphs: RaggedPairs,
    dropout: PairDropout,
    needs: PairNeeds,
) -> tuple[Tensor | None, ...]:
    """-> dq, dk, dv, dbias; None where not needed."""
    do, dlse, lse = upstream
    grads = [
        x.new_empty(x.shape) if x is not None and need else None
        for x, need in zip((*inputs, terms.bias), needs, strict=True)
    ]
    _run("bwd", inputs, terms, graphs, dropout, (None, lse, do, dlse, *grads))
    return tuple(grads)


def _run(
    function: str,
    inputs: Inputs,
    terms: PairTerms,
    graphs: RaggedPairs,
    dropout: PairDropout,
    results: tuple[Any, ...],  # o, lse, do, dlse, dq, dk, dv, dbias
) -> None:
    q, _, v = inputs
    (nodes, heads, d), (keys, kv_heads, dv) = q.shape, v.shape
    offsets, ends, mask = graphs
    offsets = torch.tensor([0, nodes]) if offsets is None else offsets
    ends = offsets if ends is None else ends
    if ends.dtype != offsets.dtype:
        offsets, ends = offsets.long(), ends.long()
    offsets, ends = offsets.contiguous(), ends.contiguous()
    count = offsets.shape[0] - 1
    limit = threshold(dropout.p)
    # of a key: k and v, their gradients, and a block's logits and their gradients
    width = 2 * (d + dv) + 128
    hold = max(8, min(_ROOM // width, _MOST, max(keys, 1)))
    kernels().run_in_memory(
        "global_attention",
        function,
        dtype_number(q),
        torch.get_num_threads(),
        heads,
        kv_heads,
        d,
        dv,
        count,
        int(offsets.dtype == torch.int64),
        offsets.data_ptr(),
        ends.data_ptr(),
        None if mask is None else mask.expand(count, -1),
        float(terms.scale),
        terms.bias,
        int(terms.per_key),
        dropout.seed,
        *(None if x is None else x.contiguous() for x in dropout[1:3]),
        dropout.first_head,
        limit,
        float(LEVELS / max(1, LEVELS - limit)),
        -(-hold // 8) * 8,
        _PIECE,
        _PIECES,
        *(rows_of(x) for x in inputs),
        *(None if x is None else rows_of(x) for x in results),
    )

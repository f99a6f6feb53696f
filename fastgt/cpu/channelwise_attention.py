"""channelwise_attention on a CPU: ``channelwise_attention.cpp``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgt.contract import (
    ChannelwiseInputs,
    ChannelwiseLogit,
    ChannelwiseNeeds,
    ChannelwiseResults,
    ChannelwiseUpstream,
    HeadMask,
    RowWalk,
    Walks,
)
from fastgt.cpu.library import accumulator, dtype_number, kernels, walk


def channelwise_attention_fwd(
    inputs: ChannelwiseInputs,
    mask: HeadMask,
    rows: RowWalk,
    logit: ChannelwiseLogit,
    results: ChannelwiseResults,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> o, lse [N, C]; weights [E, C] (or [0, C]) in the caller's edge order; and, to ``keep`` for
    the backward, stat [N, 3, C] (or [0, 3, C]). C may be [H, D].

    To masked heads a row has no edges.
    """
    logits = inputs.logits
    n, channels = rows.row_walk[0].shape[0] - 1, logits.shape[1:]
    o = logits.new_empty(n, *channels)
    lse = logits.new_empty(n, *channels, dtype=accumulator(logits))
    stat = lse.new_empty(n if results.keep else 0, 3, channels.numel())
    weights = logits.new_empty(logits.shape[0] if results.return_weights else 0, *channels)
    forward = o, lse, weights if results.return_weights else None
    kept = stat if results.keep else None
    _run("fwd", inputs, mask, Walks(rows.row_walk, ()), logit, forward, kept, (None,) * 5, None)
    return o, lse, weights, stat


def channelwise_attention_bwd(
    upstream: ChannelwiseUpstream,
    inputs: ChannelwiseInputs,
    mask: HeadMask,
    walks: Walks,
    logit: ChannelwiseLogit,
    needs: ChannelwiseNeeds,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dlogits [E, C], dv [M, C], dedge_value [E, C]; empty where not needed."""
    (do, dlse, stat), (logits, v, _) = upstream, inputs
    like = logits, logits if v is None else v, logits
    grads = [x.new_empty(x.shape if need else (0,)) for x, need in zip(like, needs, strict=True)]
    given = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    # what the sums over a column need of its rows
    pivot_u = stat.new_empty(stat.shape[0], 2, stat.shape[2]) if needs.need_v else None
    _run("bwd", inputs, mask, walks, logit, (None,) * 3, stat, (do, dlse, *given), pivot_u)
    return grads[0], grads[1], grads[2]


def _run(
    function: str,
    inputs: ChannelwiseInputs,
    mask: HeadMask,
    walks: Walks,
    logit: ChannelwiseLogit,
    forward: tuple[Tensor | None, ...],  # o, lse, weights
    stat: Tensor | None,
    backward: tuple[Tensor | None, ...],  # do, dlse, dlogits, dv, dedge_value
    pivot_u: Tensor | None,
) -> None:
    row_ptr, col, edge = walks.row_walk
    by_column = walk(*walks.column_walk[:3]) if walks.column_walk else (0,) * 5
    on_cols = _per_node(mask.cols, by_column[3]) if walks.column_walk else None
    tensors = (*inputs, *forward, *backward)
    heads, width = (1, *inputs.logits.shape[1:])[-2:]
    if mask.rows is None and all(x is None or _joined(x) for x in tensors):
        heads, width = 1, heads * width
    laid = [None if x is None else _laid(x, heads, width) for x in tensors]
    logits, v, edge_value, o, lse, weights, do, dlse, *grads = laid
    kernels().run(
        "channelwise_attention",
        function,
        dtype_number(inputs.logits),
        torch.get_num_threads(),
        heads,
        width,
        walk(row_ptr, col, edge),
        by_column,
        _with_step(logits),
        _with_step(v),
        _with_step(edge_value),
        _per_node(mask.rows, row_ptr.shape[0] - 1),
        on_cols,
        logit.low,
        logit.high,
        math.log(logit.eps) if logit.eps else -math.inf,
        int(logit.low > -math.inf or logit.high < math.inf),
        o,
        lse,
        weights,
        stat,
        _with_step(do),
        _with_step(dlse),
        *grads,
        pivot_u,
    )


def _joined(x: Tensor) -> bool:
    """Whether all channels of a row lie as those of one head."""
    return x.ndim == 2 or x.shape[1] == 1 or x.stride(1) == x.shape[2] * x.stride(2)


def _laid(x: Tensor, heads: int, width: int) -> Tensor:
    """As [., H, D], with channels side by side or one number for all of a head: a copy where they
    lie otherwise."""
    x = x.view(x.shape[0], heads, width) if x.shape[1:] != (heads, width) else x
    return x if width <= 1 or x.stride(2) in (0, 1) else x.contiguous()


def _with_step(x: Tensor | None) -> tuple[Any, int]:
    return x, int(x is not None and (x.shape[2] <= 1 or x.stride(2) == 1))


def _per_node(mask: Tensor | None, nodes: int) -> Tensor | None:
    return None if mask is None else mask.expand(nodes, -1)

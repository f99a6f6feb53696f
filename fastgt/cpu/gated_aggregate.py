"""gated_aggregate on a CPU: ``gated_aggregate.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.contract import (
    GatedKept,
    GatedMean,
    GatedMessages,
    GatedNeeds,
    GatedResults,
    GatedUpstream,
)
from fastgt.cpu.aggregate import weight_gradient
from fastgt.cpu.library import accumulator, dtype_number, filled, kernels, rows_of, walk

_NO_WALK = (0,) * 5
_NO_GRADIENTS = (None,) * 9


def gated_aggregate_fwd(
    gated: GatedMessages, rows: tuple[Tensor, ...], mean: GatedMean, results: GatedResults
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> o [N, D], e [E, D] in the caller's edge order; total and mean [N, D] to be kept."""
    x, n, width = gated.x, rows[0].shape[0] - 1, gated.x.shape[1]
    wide, keep = accumulator(x), results.keep and mean.normalize
    o = x.new_empty(n, width)
    e = x.new_empty(rows[2].shape[0] if results.edge_scores else 0, width)
    total = x.new_empty(n if keep else 0, width, dtype=wide)
    average = x.new_empty(n if keep and x.dtype != wide else 0, width, dtype=wide)
    given = *filled((o, e, total, average)), *_NO_GRADIENTS
    _run("fwd", gated, mean, (*walk(*rows), *_NO_WALK), given)
    return o, e, total, average


def gated_aggregate_bwd(
    upstream: GatedUpstream,
    gated: GatedMessages,
    kept: GatedKept,
    rows: tuple[Tensor, ...],
    columns: tuple[Tensor, ...],
    mean: GatedMean,
    needs: GatedNeeds,
) -> tuple[Tensor, ...]:
    """-> dx [M, D], dgate [E, D], drow [N, D], dcol [M, D], dweight as the weights, dvalue [E, D];
    empty where not needed."""
    x, (do, de), (col_ptr, col_row, _, col_edge) = gated.x, upstream, columns
    (m, width), n, num_edges = x.shape, rows[0].shape[0] - 1, col_edge.shape[0]
    grads = tuple(
        x.new_empty((size, width) if need else (0,))
        for size, need in zip((m, num_edges, n, m, 0, num_edges), needs, strict=True)
    )
    if needs.need_edge_weight:
        assert gated.edge_weight is not None
        grads = *grads[:4], weight_gradient(gated.edge_weight, width), grads[5]
    passed_on = x.new_empty(n, 2 * width, dtype=accumulator(x))
    given = (rows_of(do), None if de is None else rows_of(de), passed_on)
    walks = *walk(*rows), *walk(col_ptr, col_row, col_edge)
    _run("bwd", gated, mean, walks, (None, None, *filled((*kept, *given, *grads))))
    return *grads[:4], grads[4].to(x.dtype), grads[5]


def _run(
    function: str,
    gated: GatedMessages,
    mean: GatedMean,
    walks: tuple[int, ...],
    results: tuple[Tensor | None, ...],  # o, e, total, mean, do, de, w and the gradients
) -> None:
    kernels().run(
        "gated_aggregate",
        function,
        dtype_number(gated.x),
        torch.get_num_threads(),
        gated.x.shape[1],
        int(mean.normalize),
        int(gated.edge_weight is not None and gated.edge_weight.shape[1] == 1),
        float(mean.eps),
        *walks,
        *(None if x is None else rows_of(x) for x in gated),
        *results,
    )

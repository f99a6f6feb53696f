"""aggregate on a CPU: ``aggregate.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.contract import MessageNeeds, Messages, Reduction
from fastgt.cpu.library import accumulator, dtype_number, kernels, rows_of, walk

_REDUCTIONS = {"sum": 0, "mean": 1, "max": 2}
_NO_WALK: tuple[int, ...] = (0,) * 5
_NO_GRADIENTS = (None,) * 6


def aggregate_fwd(
    messages: Messages, rows: tuple[Tensor, ...], reduction: Reduction
) -> tuple[Tensor, Tensor]:
    """-> o [N, D]; for a maximum the edge it was found on [N, D], -1 for none, else [0, D]."""
    like = messages.edge_value if messages.x is None else messages.x
    assert like is not None
    n, width = rows[0].shape[0] - 1, like.shape[1]
    o = like.new_empty(n, width)
    first = rows[0].new_empty(n if reduction.reduce == "max" else 0, width)
    found = first if reduction.reduce == "max" else None
    _run("fwd", messages, reduction, (*walk(*rows), *_NO_WALK), (o, found, *_NO_GRADIENTS))
    return o, first


def aggregate_bwd(
    do: Tensor,
    messages: Messages,
    first: Tensor,
    rows: tuple[Tensor, ...],
    columns: tuple[Tensor, ...],
    reduction: Reduction,
    needs: MessageNeeds,
) -> tuple[Tensor, ...]:
    """-> dx [M, D], dedge [E, D] in the caller's edge order; dweight, dattr, dvalue_weight as what
    they are the gradients of. Empty where not needed."""
    width, by_column = do.shape[1], _NO_WALK
    dx, dedge, dweight, dattr, dvalue_weight = (do.new_empty(0) for _ in range(5))
    if needs.need_x or messages.edge_attr is not None:
        col_ptr, col_row, _, col_edge = columns
        by_column = walk(col_ptr, col_row, col_edge)
    if needs.need_x:
        dx = do.new_empty(columns[0].shape[0] - 1, width)
    if needs.need_edge_value:
        dedge = do.new_empty(rows[2].shape[0], width)
    if needs.need_edge_weight:
        assert messages.edge_weight is not None
        dweight = weight_gradient(messages.edge_weight, width)
    if needs.need_edge_attr:
        assert messages.edge_attr is not None
        dattr = do.new_empty(messages.edge_attr.shape)
    if needs.need_edge_value_weight:
        assert messages.edge_value_weight is not None
        dvalue_weight = do.new_empty(messages.edge_value_weight.shape)
    walks = (*walk(*rows), *by_column)
    results = dx, dedge, dweight, dattr, dvalue_weight
    grads = (x if need else None for x, need in zip(results, needs, strict=True))
    given = first if reduction.reduce == "max" else None, rows_of(do)
    _run("bwd", messages, reduction, walks, (None, *given, *grads))
    return dx, dedge, dweight.to(do.dtype), dattr, dvalue_weight


def weight_gradient(weight: Tensor, width: int) -> Tensor:
    """Room for the gradient of weights [E, D], or for sums over D channels of weights [E, 1]."""
    if weight.shape[1] != 1:
        return weight.new_empty(weight.shape)
    # no kernel goes through no channels
    make = weight.new_empty if width else weight.new_zeros
    return make(weight.shape[0], 1, dtype=accumulator(weight))


def _run(
    function: str,
    messages: Messages,
    reduction: Reduction,
    walks: tuple[int, ...],
    results: tuple[Tensor | None, ...],  # o, first, do, dx, dedge, dweight, dattr, dvalue_weight
) -> None:
    if reduction.reduce == "max" and messages.edge_attr is not None:
        raise ValueError("the kernel of maxima takes no values of edges in low-rank form")
    terms = tuple(None if x is None else rows_of(x) for x in messages)
    like = results[0] if results[2] is None else results[2]
    assert like is not None
    weight = messages.edge_weight
    kernels().run(
        "aggregate",
        function,
        dtype_number(like),
        torch.get_num_threads(),
        like.shape[1],
        _REDUCTIONS[reduction.reduce],
        int(reduction.relu),
        int(weight is not None and weight.shape[1] == 1),
        0 if messages.edge_attr is None else messages.edge_attr.shape[1],
        *walks,
        *terms,
        *results,
    )

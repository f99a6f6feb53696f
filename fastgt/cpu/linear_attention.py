"""linear_attention on a CPU: ``linear_attention.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.contract import Features, Inputs, NeedQKV, Quotient, Ragged
from fastgt.cpu.library import accumulator, dtype_number, kernels, rows_of

_MAPS = ("identity", "relu", "elu", "sigmoid", "softmax", "relu_random")
_SLICE = 96  # nodes whose features are made before they are used
_PIECE = 1024  # nodes of a graph that one thread goes through, at least
_FILL = 16  # numbers that rows of a state are filled up to


def linear_attention_fwd(
    inputs: Inputs, features: Features, ragged: Ragged, quotient: Quotient
) -> tuple[Tensor, Tensor]:
    """-> o [N, H, DV], and for the backward the states of graphs in pieces."""
    q, _, v = inputs
    o, kept = q.new_empty(v.shape), states_kept(inputs, features, ragged)
    _run("fwd", inputs, features, ragged, quotient, kept, (o, None, None, None, None))
    return o, kept


def states_kept(inputs: Inputs, features: Features, ragged: Ragged) -> Tensor:
    """Room for the states of as many graphs in pieces as there may be, ``[graphs, numbers]``."""
    q, offsets = inputs.q, ragged.offsets
    piece, state = _sizes(inputs, features)
    graphs = 1 if offsets is None else offsets.shape[0] - 1
    graphs = torch.sym_min(graphs, q.shape[0] // piece)
    return q.new_zeros(graphs, q.shape[1] * state, dtype=accumulator(q))


def linear_attention_bwd(
    do: Tensor,
    kept: Tensor,
    inputs: Inputs,
    features: Features,
    ragged: Ragged,
    quotient: Quotient,
    needs: NeedQKV,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv; empty where not needed."""
    grads = [x.new_empty(x.shape if need else (0,)) for x, need in zip(inputs, needs, strict=True)]
    given = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    _run("bwd", inputs, features, ragged, quotient, kept, (None, do, *given))
    return grads[0], grads[1], grads[2]


def _run(
    function: str,
    inputs: Inputs,
    features: Features,
    ragged: Ragged,
    quotient: Quotient,
    kept: Tensor,
    results: tuple[Tensor | None, ...],  # o, do, dq, dk, dv
) -> None:
    q, _, v = inputs
    (nodes, heads, d), dv = q.shape, v.shape[2]
    wide = accumulator(q)
    projection, m = features.projection, d
    if projection is not None:
        projection = projection.to(wide)
        if features.feature_map == "softmax":
            projection = projection * d**-0.25
        projection, m = rows_of(projection), projection.shape[0]
    offsets, mask = ragged
    offsets = torch.tensor([0, nodes]) if offsets is None else offsets.contiguous()
    graphs = offsets.shape[0] - 1
    piece, state = _sizes(inputs, features)
    pieces = 2 * (nodes // piece)  # at most: of graphs that have more than one
    states = q.new_empty(pieces * heads * state, dtype=wide)
    kernels().run(
        "linear_attention",
        function,
        dtype_number(q),
        torch.get_num_threads(),
        _MAPS.index(features.feature_map),
        heads,
        d,
        dv,
        m,
        graphs,
        int(offsets.dtype == torch.int64),
        offsets.data_ptr(),
        None if mask is None else mask.expand(graphs, -1),
        float(quotient.eps),
        int(quotient.normalize),
        _SLICE,
        piece,
        *(rows_of(x) for x in inputs),
        *(None if x is None else rows_of(x) for x in results),
        projection,
        states.data_ptr(),
        kept.data_ptr(),
    )


def _sizes(inputs: Inputs, features: Features) -> tuple[int, int]:
    """-> the nodes of a piece, how many numbers a state has."""
    d, dv = inputs.q.shape[2], inputs.v.shape[2]
    m = d if features.projection is None else features.projection.shape[0]
    # states of pieces take no more memory than the inputs
    return max(_PIECE, 2 * m * (dv + 1) // (d + dv)), m * _filled(dv) + _filled(m) + _FILL


def _filled(width: int) -> int:
    return -(-width // _FILL) * _FILL

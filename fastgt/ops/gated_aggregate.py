"""gated_aggregate: public function -> checks -> autograd -> ops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fastgt import reference
from fastgt.contract import (
    Aux,
    AuxRequest,
    GatedKept,
    GatedMean,
    GatedMessages,
    GatedNeeds,
    GatedResults,
    GatedUpstream,
    RowWalk,
    Walks,
)
from fastgt.cpu import gated_aggregate as cpu
from fastgt.graph import Graph
from fastgt.ops.aux_request import check_request
from fastgt.ops.channels import PLANS, autocast_all, check_channels, flat_all
from fastgt.ops.checks import accumulator, needs_gradient, number, refuse_forward_mode
from fastgt.ops.implementation import Impl, require_triton, resolve_impl
from fastgt.ops.registration import register
from fastgt.ops.second_order import differentiable_gradients
from fastgt.ops.walks import column_walk, row_walk
from fastgt.shard import Roles, Shard
from fastgt.signature import Signature


@overload
def gated_aggregate(
    x: Tensor,
    graph: Graph | Shard,
    gate: Tensor | None = None,
    *,
    gate_row: Tensor | None = None,
    gate_col: Tensor | None = None,
    edge_weight: Tensor | None = None,
    edge_value: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    return_aux: None = None,
    impl: Impl | None = None,
) -> Tensor: ...


@overload
def gated_aggregate(
    x: Tensor,
    graph: Graph | Shard,
    gate: Tensor | None = None,
    *,
    gate_row: Tensor | None = None,
    gate_col: Tensor | None = None,
    edge_weight: Tensor | None = None,
    edge_value: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    return_aux: AuxRequest,
    impl: Impl | None = None,
) -> tuple[Tensor, Aux]: ...


def gated_aggregate(
    x: Tensor,
    graph: Graph | Shard,
    gate: Tensor | None = None,
    *,
    gate_row: Tensor | None = None,
    gate_col: Tensor | None = None,
    edge_weight: Tensor | None = None,
    edge_value: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    return_aux: AuxRequest | None = None,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Aux]:
    """Mean of the neighbours, each channel weighted by a sigmoid gate: GatedGCN's aggregation.

    For row i and its columns j, channel by channel::

        e_ij   = gate_ij + gate_row_i + gate_col_j
        eta_ij = edge_weight_ij sigmoid(e_ij)
        out_i  = sum_j eta_ij (x_j + edge_value_ij) / (sum_j eta_ij + eps)

    A row without edges, or whose denominator is 0, gives exactly 0 and no gradient. Duplicate
    edges count as often as they stand. NaN and infinities reach only the rows that use them. The
    result is the same, bit for bit, every time; gradients too, but not those of
    ``create_graph=True``, which PyTorch sums.

    Args:
        x: ``[N_cols, ...]``: float16, bfloat16, float32 or float64, any strides.
        graph: Who receives from whom.
        gate: ``[E, ...]`` in the caller's edge order. As the other gates, in x's dtype and with as
            many channels; at least one of the three is given.
        gate_row: ``[N_rows, ...]``.
        gate_col: ``[N_cols, ...]``.
        edge_weight: ``[E]``, one number an edge, or ``[E, ...]``, one for each channel of x. None:
            1. With weights of both signs a denominator may come near 0.
        edge_value: ``[E, ...]``. As the weights, in the caller's edge order and x's dtype.
        normalize: False leaves the quotient's denominator out, as in residual gated graph
            convolution.
        eps: As above.
        return_aux: ``AuxRequest(edge_scores=True)`` also gives ``e_ij``, the edge update of
            GatedGCN, with its gradient.
        impl: As in :func:`fastgt.neighborhood_attention`.

    Returns:
        ``[N_rows, ...]`` in x's dtype. With ``return_aux``, that and an :class:`fastgt.Aux`, whose
        ``edge_scores`` are e ``[E, ...]`` in the caller's edge order where asked for. Sums are
        kept in float32 (float64 for float64). No message is stored: memory is O(N D), D the
        channels, beside e and the gradients of what stands on edges; that of
        weights ``[E]`` needs O(E (1 + D / 128)). Under ``torch.autocast`` the inputs are cast
        first. Second derivatives go through the plain definition, with its O(E D) memory;
        ``torch.func`` transforms and forward-mode derivatives need ``impl="reference"``.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.
        RuntimeError: ``impl`` cannot run here.

    Source:
        Bresson and Laurent, arXiv 1711.07553, eq. 11; with the denominator Dwivedi et al., arXiv
        2003.00982, eqs. 19-22 (there e is the new edge feature before its norm). The weights are
        r_ij of GraphGPS's ``EquivStableLapPE``: Wang et al., arXiv 2203.00199. Values on edges are
        those of ``torch_geometric.nn.ResGatedGraphConv`` with ``edge_dim``.

    Example:
        >>> import torch
        >>> from fastgt import AuxRequest, Graph, gated_aggregate
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> x, gate = torch.randn(2, 3, 16)
        >>> request = AuxRequest(edge_scores=True)
        >>> out, aux = gated_aggregate(x, graph, gate, gate_row=x, gate_col=x, return_aux=request)
        >>> out.shape, aux.edge_scores.shape
        (torch.Size([3, 16]), torch.Size([3, 16]))
    """
    if isinstance(graph, Shard):
        return graph.run(gated_aggregate, _ROLES, locals())
    request = check_request("gated_aggregate", return_aux, "edge_scores")
    tensors = autocast_all(x, gate, gate_row, gate_col, edge_weight, edge_value)
    x_, gate, gate_row, gate_col, edge_weight, edge_value = tensors
    if gate is None and gate_row is None and gate_col is None:
        raise ValueError("gate, gate_row and gate_col are all None: give at least one")
    eps = number("eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    check_channels(
        graph,
        x=(x_, "columns"),
        required=True,
        gate=(gate, "edges"),
        gate_row=(gate_row, "rows"),
        gate_col=(gate_col, "columns"),
        edge_weight=(edge_weight, "edges"),
        edge_value=(edge_value, "edges"),
    )
    assert x_ is not None
    impl = resolve_impl(impl, x_)
    if impl == "reference":
        options: dict[str, Any] = {"normalize": normalize, "eps": eps, "return_aux": return_aux}
        options |= {"edge_weight": edge_weight, "edge_value": edge_value}
        return reference.gated_aggregate(
            x_, graph, gate, gate_row=gate_row, gate_col=gate_col, **options
        )
    refuse_forward_mode(*tensors)
    plan, edge_scores = PLANS[impl], bool(request.edge_scores)
    inputs, mean = flat_all(*tensors), GatedMean(eps, bool(normalize))
    rows = row_walk(graph, plan)
    if needs_gradient(*tensors):
        walks = Walks(rows, column_walk(graph, plan))
        out, e = _GatedAggregate.apply(*inputs, graph, impl, *walks, *mean, edge_scores)
    else:
        out, e, _, _ = _forward(impl, *inputs, rows, *mean, edge_scores, False)
    out = out.view(graph.num_rows, *x_.shape[1:])
    if return_aux is None:
        return out
    return out, Aux(edge_scores=e.view(graph.num_edges, *x_.shape[1:]) if edge_scores else None)


_ROLES = Roles(("gate_row",), ("x", "gate_col"), ("gate", "edge_weight", "edge_value"))


class _GatedAggregate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        gate_row: Tensor | None,
        gate_col: Tensor | None,
        edge_weight: Tensor | None,
        edge_value: Tensor | None,
        graph: Graph,
        impl: str,
        rows: tuple[Tensor, ...],
        columns: tuple[Tensor, ...],
        eps: float,
        normalize: bool,
        edge_scores: bool,
    ) -> tuple[Tensor, Tensor]:
        inputs = GatedMessages(x, gate, gate_row, gate_col, edge_weight, edge_value)
        mean = GatedMean(eps, normalize)
        o, e, total, unrounded = _forward(impl, *inputs, rows, *mean, edge_scores, True)
        # the output itself where it has not been rounded
        ctx.save_for_backward(*inputs, total, o if o.dtype == total.dtype else unrounded)
        ctx.graph, ctx.impl, ctx.walks = graph, impl, Walks(rows, columns)
        ctx.mean, ctx.edge_scores = mean, edge_scores
        ctx.set_materialize_grads(False)
        return o, e

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, de: Tensor | None) -> tuple:
        *inputs, total, unrounded = ctx.saved_tensors
        needs = ctx.needs_input_grad[:6]
        de = de if ctx.edge_scores else None
        grads: Sequence[Tensor | None]
        if torch.is_grad_enabled():
            graph, (eps, normalize) = ctx.graph, ctx.mean

            def define(x: Tensor, *gates_and_edges: Tensor | None) -> tuple[Tensor, Tensor]:
                gate, gate_row, gate_col, edge_weight, edge_value = gates_and_edges
                out, aux = reference.gated_aggregate(
                    x,
                    graph,
                    gate,
                    gate_row=gate_row,
                    gate_col=gate_col,
                    edge_weight=edge_weight,
                    edge_value=edge_value,
                    normalize=normalize,
                    eps=eps,
                    return_aux=AuxRequest(edge_scores=True),
                )
                assert aux.edge_scores is not None
                return out, aux.edge_scores

            grads = differentiable_gradients(define, inputs, [do, de], needs)
        else:
            x = inputs[0]
            if do is None:
                do = x.new_zeros(()).expand(ctx.graph.num_rows, x.shape[1])
            given = do, de, *inputs, total, unrounded
            computed = _backward(ctx.impl, *given, *ctx.walks, *ctx.mean, *needs)
            grads = [x if need else None for x, need in zip(computed, needs, strict=True)]
        return (*grads, *[None] * 7)


def _implementation(impl: str, x: Tensor) -> Any:
    if impl == "cpp":
        return cpu
    require_triton(x)
    from fastgt.kernels import gated_aggregate as kernels

    return kernels


def _launch_forward(
    impl: str, gated: GatedMessages, walk: RowWalk, mean: GatedMean, results: GatedResults
) -> tuple:
    run = _implementation(impl, gated.x).gated_aggregate_fwd
    return run(gated, walk.row_walk, mean, results)


def _fake_forward(
    gated: GatedMessages, walk: RowWalk, mean: GatedMean, results: GatedResults
) -> tuple:
    x, n, wide = gated.x, walk.row_walk[0].shape[0] - 1, accumulator(gated.x)
    keep, d = results.keep and mean.normalize, x.shape[1]
    return (
        x.new_empty(n, d),
        x.new_empty(walk.row_walk[2].shape[0] if results.edge_scores else 0, d),
        x.new_empty(n if keep else 0, d, dtype=wide),
        x.new_empty(n if keep and x.dtype != wide else 0, d, dtype=wide),
    )


def _launch_backward(
    impl: str,
    upstream: GatedUpstream,
    gated: GatedMessages,
    kept: GatedKept,
    walks: Walks,
    mean: GatedMean,
    needs: GatedNeeds,
) -> tuple:
    run = _implementation(impl, gated.x).gated_aggregate_bwd
    return run(upstream, gated, kept, *walks, mean, needs)


def _fake_backward(
    upstream: GatedUpstream,
    gated: GatedMessages,
    kept: GatedKept,
    walks: Walks,
    mean: GatedMean,
    needs: GatedNeeds,
) -> tuple:
    x, (m, d), num_edges = gated.x, gated.x.shape, walks.row_walk[2].shape[0]
    weights = 0 if gated.edge_weight is None else gated.edge_weight.shape[1]
    return (
        x.new_empty((m, d) if needs.need_x else (0,)),
        x.new_empty((num_edges, d) if needs.need_gate else (0,)),
        x.new_empty((walks.row_walk[0].shape[0] - 1, d) if needs.need_gate_row else (0,)),
        x.new_empty((m, d) if needs.need_gate_col else (0,)),
        x.new_empty((num_edges, weights) if needs.need_edge_weight else (0,)),
        x.new_empty((num_edges, d) if needs.need_edge_value else (0,)),
    )


FORWARD = Signature(GatedMessages, RowWalk, GatedMean, GatedResults)
BACKWARD = Signature(GatedUpstream, GatedMessages, GatedKept, Walks, GatedMean, GatedNeeds)
_forward = register(
    "gated_aggregate_fwd",
    FORWARD,
    "(Tensor o, Tensor e, Tensor total, Tensor mean)",
    launch=_launch_forward,
    fake=_fake_forward,
)
_backward = register(
    "gated_aggregate_bwd",
    BACKWARD,
    "(Tensor dx, Tensor dgate, Tensor drow, Tensor dcol, Tensor dweight, Tensor dvalue)",
    launch=_launch_backward,
    fake=_fake_backward,
)

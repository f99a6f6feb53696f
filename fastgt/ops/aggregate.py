"""aggregate: public function -> checks -> autograd -> ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastgt import reference
from fastgt.contract import MessageNeeds, Messages, Reduction, RowWalk, Walks
from fastgt.cpu import aggregate as cpu
from fastgt.graph import Graph
from fastgt.ops.channels import (
    PLANS,
    autocast_all,
    check_channels,
    check_low_rank,
    flat,
    flat_all,
)
from fastgt.ops.checks import needs_gradient, refuse_forward_mode
from fastgt.ops.implementation import Impl, require_triton, resolve_impl
from fastgt.ops.registration import register
from fastgt.ops.second_order import differentiable_gradients
from fastgt.ops.walks import column_walk, row_walk
from fastgt.shard import Roles, Shard
from fastgt.signature import Signature

Reduce = Literal["sum", "mean", "max"]
Activation = Literal["relu"]
_REDUCTIONS, _ACTIVATIONS = get_args(Reduce), get_args(Activation)


def aggregate(
    x: Tensor | None,
    graph: Graph | Shard,
    *,
    reduce: Reduce = "sum",
    edge_value: Tensor | None = None,
    edge_weight: Tensor | None = None,
    edge_attr: Tensor | None = None,
    edge_value_weight: Tensor | None = None,
    activation: Activation | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Sum, mean or maximum of the messages that every node receives.

    For row i and its columns j, channel by channel::

        e_ij  = edge_value_ij + edge_attr_ij @ edge_value_weight
        m_ij  = edge_weight_ij * activation(x_j + e_ij)
        out_i = sum_j m_ij,   sum_j m_ij / degree_i   or   max_j m_ij

    A weight multiplies its message after the activation. The mean still divides by the number of
    edges, not by the sum of their weights. A row without edges gives exactly 0 and no gradient.
    Duplicate edges count as often as they stand. The gradient of a maximum goes to one edge: to
    the first of the largest, by the caller's numbers. NaN and infinities reach only the rows that
    use them. The result is the same, bit for bit, every time; gradients too, but not those of
    ``create_graph=True``, which PyTorch sums.

    Args:
        x: ``[N_cols, ...]``: float16, bfloat16, float32 or float64, any strides. None where the
            edges alone carry values.
        graph: Who receives from whom.
        reduce: ``"sum"``, ``"mean"`` or ``"max"``.
        edge_value: ``[E, ...]``, as many channels as x, in the caller's edge order and x's dtype.
        edge_weight: ``[E]``, one number an edge, or ``[E, ...]``, one for each channel of x; in the
            caller's edge order and x's dtype. None: 1.
        edge_attr: ``[E, C]``, C from 1 to 256, with ``edge_value_weight [C, ...]``: values of edges
            in their low-rank form, as a linear layer makes them of few attributes.
        activation: None or ``"relu"``.
        impl: As in :func:`fastgt.neighborhood_attention`.

    Returns:
        ``[N_rows, ...]`` in x's dtype. Sums are kept in float32 (float64 for float64). No
        message is stored: memory is O(N D), D the channels, beside the gradients of what stands on
        edges; that of weights ``[E]`` needs O(E (1 + D / 128)). On a CPU, sums and means
        with x do not store values in their low-rank form. A GPU stores them while its kernels run.
        Maxima, and calls without x, store them until the backward.
        Under ``torch.autocast`` the inputs are cast first. Second derivatives go through the
        plain definition, with its O(E D) memory; ``torch.func`` transforms and forward-mode
        derivatives need ``impl="reference"``.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.
        RuntimeError: ``impl`` cannot run here.

    Source:
        With ``edge_value`` and ``"relu"``, the sum in GINE: Hu et al., arXiv 1905.12265, and
        ``torch_geometric.nn.GINEConv``. With ``edge_weight [E]``, the sum in GCN: Kipf and Welling,
        arXiv 1609.02907, eq. 2, and ``torch_geometric.nn.GCNConv``.

    Example:
        >>> import torch
        >>> from fastgt import Graph, aggregate
        >>> graph = Graph.from_edge_index(torch.tensor([[1, 2, 2], [0, 0, 1]]), 3)
        >>> aggregate(torch.tensor([[1.0], [2.0], [3.0]]), graph).tolist()
        [[5.0], [3.0], [0.0]]
    """
    if isinstance(graph, Shard):
        return graph.run(aggregate, _ROLES, locals())
    x, edge_value, edge_weight, edge_attr, edge_value_weight = autocast_all(
        x, edge_value, edge_weight, edge_attr, edge_value_weight
    )
    if reduce not in _REDUCTIONS:
        raise ValueError(f"reduce must be one of {list(_REDUCTIONS)}, got {reduce!r}")
    if activation is not None and activation not in _ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {list(_ACTIVATIONS)} or None, got {activation!r}"
        )
    if x is None and edge_value is None and edge_attr is None:
        raise ValueError("x, edge_value and edge_attr are all None: there is nothing to aggregate")
    other = ("edge_value", edge_value) if x is None else ("x", x)
    check_low_rank(graph, edge_attr, edge_value_weight, other)
    if edge_attr is not None and edge_value_weight is not None and x is None and edge_value is None:
        edge_value = torch.tensordot(edge_attr, edge_value_weight, 1)
        edge_attr = edge_value_weight = None
    check_channels(
        graph,
        x=(x, "columns"),
        edge_value=(edge_value, "edges"),
        edge_weight=(edge_weight, "edges"),
    )
    like = edge_value if x is None else x
    assert like is not None
    if edge_attr is not None and edge_value_weight is not None and (x is None or reduce == "max"):
        # no kernel makes these on its way
        made = torch.tensordot(edge_attr, edge_value_weight, 1)
        edge_value = made if edge_value is None else edge_value + made
        edge_attr = edge_value_weight = None
    impl = resolve_impl(impl, like)
    if impl == "reference":
        return reference.aggregate(
            x,
            graph,
            reduce=reduce,
            edge_value=edge_value,
            edge_weight=edge_weight,
            edge_attr=edge_attr,
            edge_value_weight=edge_value_weight,
            activation=activation,
        )
    tensors = x, edge_value, edge_weight, edge_attr, edge_value_weight
    refuse_forward_mode(*tensors)
    plan = PLANS[impl]
    messages, reduction = Messages(*flat_all(*tensors)), Reduction(reduce, activation == "relu")
    rows = row_walk(graph, plan)
    if needs_gradient(*tensors):
        # on a CPU the gradients of edges go by row
        by_column = x is not None or plan.path != "cpp"
        walks = Walks(rows, column_walk(graph, plan) if by_column else ())
        out = _Aggregate.apply(*messages, graph, impl, *walks, *reduction)
    else:
        out, _ = _forward(impl, *messages, rows, *reduction)
    return out if like.ndim == 2 else out.view(graph.num_rows, *like.shape[1:])


_ROLES = Roles((), ("x",), ("edge_value", "edge_weight", "edge_attr"))


def aggregate_in_order(
    edge_value: Tensor, row_ptr: Tensor, reduce: Reduce, graph: Callable[[], Graph]
) -> Tensor:
    """``aggregate`` of edges that lie row by row and have no columns, on a CPU, in the dtype they
    have. The graph is made where a second derivative asks for it: it takes as long as the sums of a
    small batch."""
    refuse_forward_mode(edge_value)
    edge = torch.arange(edge_value.shape[0], dtype=row_ptr.dtype, device="cpu")
    rows = row_ptr.contiguous(), edge, edge
    messages, reduction = (
        Messages(None, flat(edge_value), None, None, None),
        Reduction(reduce, False),
    )
    if needs_gradient(edge_value):
        out = _Aggregate.apply(*messages, graph, "cpp", rows, (), *reduction)
    else:
        out, _ = _forward("cpp", *messages, rows, *reduction)
    return out.view(row_ptr.shape[0] - 1, *edge_value.shape[1:])


class _Aggregate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        edge_value: Tensor | None,
        edge_weight: Tensor | None,
        edge_attr: Tensor | None,
        edge_value_weight: Tensor | None,
        graph: Graph | Callable[[], Graph],
        impl: str,
        rows: tuple[Tensor, ...],
        columns: tuple[Tensor, ...],
        reduce: Reduce,
        relu: bool,
    ) -> Tensor:
        messages = x, edge_value, edge_weight, edge_attr, edge_value_weight
        o, first = _forward(impl, *messages, rows, reduce, relu)
        ctx.save_for_backward(*messages, first)
        ctx.graph, ctx.impl, ctx.walks = graph, impl, Walks(rows, columns)
        ctx.reduction = reduce, relu
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple:
        *messages, first = ctx.saved_tensors
        needs = ctx.needs_input_grad[: len(messages)]
        grads: Sequence[Tensor | None]
        if torch.is_grad_enabled():
            graph = ctx.graph if isinstance(ctx.graph, Graph) else ctx.graph()
            reduce, relu = ctx.reduction
            activation: Activation | None = "relu" if relu else None

            def define(*tensors: Tensor | None) -> tuple[Tensor]:
                x, *edges = Messages(*tensors)
                terms = dict(zip(Messages._fields[1:], edges, strict=True))
                out = reference.aggregate(x, graph, reduce=reduce, activation=activation, **terms)
                return (out,)

            grads = differentiable_gradients(define, messages, [do], needs)
        else:
            given = do, first, *messages
            computed = _backward(ctx.impl, *given, *ctx.walks, *ctx.reduction, *needs)
            grads = [x if need else None for x, need in zip(computed, needs, strict=True)]
        return (*grads, None, None, None, None, None, None)


class _Upstream(NamedTuple):
    do: Tensor  # [N_rows, D]
    first: Tensor  # [N_rows, D], the edge that a maximum was found on, -1 for none; else [0, D]


def _implementation(impl: str, x: Tensor) -> Any:
    if impl == "cpp":
        return cpu
    require_triton(x)
    from fastgt.kernels import aggregate as kernels

    return kernels


def _any(messages: Messages) -> Tensor:
    x = messages.edge_value if messages.x is None else messages.x
    assert x is not None
    return x


def _launch_forward(impl: str, messages: Messages, walk: RowWalk, reduction: Reduction) -> tuple:
    run = _implementation(impl, _any(messages)).aggregate_fwd
    return run(messages, walk.row_walk, reduction)


def _fake_forward(messages: Messages, walk: RowWalk, reduction: Reduction) -> tuple:
    like, n = _any(messages), walk.row_walk[0].shape[0] - 1
    d, maximum = like.shape[1], reduction.reduce == "max"
    return like.new_empty(n, d), walk.row_walk[2].new_empty(n if maximum else 0, d)


def _launch_backward(
    impl: str,
    upstream: _Upstream,
    messages: Messages,
    walks: Walks,
    reduction: Reduction,
    needs: MessageNeeds,
) -> tuple:
    run = _implementation(impl, upstream.do).aggregate_bwd
    do, first = upstream
    return run(do, messages, first, *walks, reduction, needs)


def _fake_backward(
    upstream: _Upstream,
    messages: Messages,
    walks: Walks,
    reduction: Reduction,
    needs: MessageNeeds,
) -> tuple:
    do, d = upstream.do, upstream.do.shape[1]
    e = walks.row_walk[2].shape[0]
    return (
        do.new_empty((walks.column_walk[0].shape[0] - 1, d) if needs.need_x else (0,)),
        do.new_empty((e, d) if needs.need_edge_value else (0,)),
        do.new_empty((e, _weights(messages)) if needs.need_edge_weight else (0,)),
        _like(messages.edge_attr if needs.need_edge_attr else None, do),
        _like(messages.edge_value_weight if needs.need_edge_value_weight else None, do),
    )


def _like(x: Tensor | None, do: Tensor) -> Tensor:
    return do.new_empty((0,) if x is None else x.shape)


def _weights(messages: Messages) -> int:
    """How many weights an edge has."""
    return 0 if messages.edge_weight is None else messages.edge_weight.shape[1]


FORWARD = Signature(Messages, RowWalk, Reduction)
BACKWARD = Signature(_Upstream, Messages, Walks, Reduction, MessageNeeds)

_forward = register(
    "aggregate_fwd",
    FORWARD,
    "(Tensor o, Tensor first)",
    launch=_launch_forward,
    fake=_fake_forward,
)
_backward = register(
    "aggregate_bwd",
    BACKWARD,
    "(Tensor dx, Tensor dedge, Tensor dweight, Tensor dattr, Tensor dvalue_weight)",
    launch=_launch_backward,
    fake=_fake_backward,
)

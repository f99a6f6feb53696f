"""channelwise_attention: public function -> checks -> autograd -> registered ops -> launchers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from fastgt import reference
from fastgt.contract import (
    Aux,
    AuxRequest,
    ChannelwiseInputs,
    ChannelwiseLogit,
    ChannelwiseNeeds,
    ChannelwiseResults,
    ChannelwiseUpstream,
    HeadMask,
    RowWalk,
    Walks,
)
from fastgt.graph import Graph
from fastgt.ops.aux_request import check_request
from fastgt.ops.checks import (
    FLOATS,
    accumulator,
    autocast,
    autocasts,
    check_graph,
    check_numbers,
    clamp_bounds,
    largest,
    needs_gradient,
    number,
    refuse_forward_mode,
)
from fastgt.ops.head_mask import check_head_gate, gated, masked_aux, node_mask
from fastgt.ops.implementation import Impl, require_triton, resolve_impl
from fastgt.ops.second_order import differentiable_gradients
from fastgt.ops.walks import CPU, GATHER, column_walk, row_walk
from fastgt.shard import Roles, Shard
from fastgt.signature import Signature


@overload
def channelwise_attention(
    logits: Tensor,
    v: Tensor | None,
    graph: Graph | Shard,
    *,
    edge_value: Tensor | None = ...,
    logit_clamp: float | tuple[float, float] | None = ...,
    denominator_eps: float = ...,
    head_gate: Tensor | None = ...,
    dense_gate_grad: bool = ...,
    return_aux: None = ...,
    impl: Impl | None = ...,
) -> Tensor: ...


@overload
def channelwise_attention(
    logits: Tensor,
    v: Tensor | None,
    graph: Graph | Shard,
    *,
    edge_value: Tensor | None = ...,
    logit_clamp: float | tuple[float, float] | None = ...,
    denominator_eps: float = ...,
    head_gate: Tensor | None = ...,
    dense_gate_grad: bool = ...,
    return_aux: AuxRequest,
    impl: Impl | None = ...,
) -> tuple[Tensor, Aux]: ...


def channelwise_attention(
    logits: Tensor,
    v: Tensor | None,
    graph: Graph | Shard,
    *,
    edge_value: Tensor | None = None,
    logit_clamp: float | tuple[float, float] | None = None,
    denominator_eps: float = 0.0,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
    return_aux: AuxRequest | None = None,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Aux]:
    """Vector attention: every channel has its own softmax over the edges of a row.

    For row i and its columns j, channel by channel::

        s_ij  = clamp(logits_ij, low, high)
        a_ij  = exp(s_ij) / (sum_j exp(s_ij) + eps)
        out_i = gate sum_j a_ij (v_j + edge_value_ij)

    A row without edges, or a channel of it whose logits are all -inf, gives exactly 0, an LSE of
    -inf and zero gradients. Duplicate edges count as often as they stand. NaN and infinities reach
    only the rows, and in them the channels, that use them. The result is the same, bit for bit,
    every time; gradients too, but not those of ``create_graph=True``, which PyTorch sums.

    Args:
        logits: ``[E, C]`` or ``[E, H, D]`` in the caller's edge order: float16, bfloat16, float32
            or float64. As all tensors, of any strides. Channels that share a logit ("planes") are
            given by an expanded tensor, ``logits[:, None].expand(-1, H, -1)`` or
            ``logits[..., None].expand(-1, -1, D)``: it is read as it lies, no copy is made.
        v: ``[N_cols, C]`` or ``[N_cols, H, D]``, as the logits; or None.
        graph: Who attends to whom.
        edge_value: ``[E, C]`` or ``[E, H, D]``, in the caller's edge order; or None, if v is given.
        logit_clamp: ``(low, high)``, or c for ``(-c, c)``. Outside it the gradient is 0.
        denominator_eps: eps above, relative to logits as they are (no maximum subtracted).
        head_gate, dense_gate_grad: As in :func:`fastgt.neighborhood_attention`, where logits are
            ``[E, H, D]``.
        return_aux: What to give beside the output. ``AuxRequest(lse=True)``: ``lse_i = log sum_j
            exp(s_ij)``, natural, ``[N_rows, C]`` in float32 (float64 for float64), with its
            gradient; eps is not part of it. ``AuxRequest(weights=True)``: ``a_ij``, ``[E, C]`` in
            the caller's edge order, without gradient.
        impl: As in :func:`fastgt.neighborhood_attention`.

    Returns:
        ``[N_rows, C]`` (``[N_rows, H, D]``) in the dtype of the logits; with ``return_aux``,
        ``(out, Aux)``. Sums are kept in float32 (float64 for float64). Beside the inputs, memory
        is O(N C); gradients of edge tensors are as large as these. Under ``torch.autocast`` the
        inputs are cast first. Second derivatives go through the plain definition, with its O(E C)
        memory; ``torch.func`` transforms and forward-mode derivatives need ``impl="reference"``.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.
        RuntimeError: ``impl`` cannot run here.

    Source:
        Zhao et al., Point Transformer, arXiv 2012.09164, eq. 3: logits are gamma(phi(x_i) -
        psi(x_j) + delta_ij), v is alpha(x_j) and edge_value is delta_ij.

    Example:
        >>> import torch
        >>> from fastgt import Graph, channelwise_attention
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> logits, v = torch.randn(2, 3, 16)
        >>> channelwise_attention(logits, v, graph).shape
        torch.Size([3, 16])
    """
    if isinstance(graph, Shard):
        return graph.run(channelwise_attention, _ROLES, locals())
    if isinstance(logits, Tensor) and autocasts(logits.device.type):
        dtype = torch.get_autocast_dtype(logits.device.type)
        logits = autocast(logits, dtype)
        v = None if v is None else autocast(v, dtype)
        edge_value = None if edge_value is None else autocast(edge_value, dtype)
    low, high = clamp_bounds(logit_clamp)
    denominator_eps = number("denominator_eps", denominator_eps)
    x = ChannelwiseInputs(logits, v, edge_value)
    _check(x, graph)
    check_numbers(logits, None, denominator_eps, 0.0)
    request = check_request("channelwise_attention", return_aux, "lse", "weights")
    low, high = (math.inf * b if abs(b) > largest(logits) else b for b in (low, high))
    if head_gate is not None:
        if logits.ndim != 3:
            raise ValueError(f"head_gate needs logits [E, H, D], got {list(logits.shape)}")
        check_head_gate(head_gate, logits.shape[1], logits.device, graph.num_graphs)
        dense_gate_grad = dense_gate_grad and head_gate.dtype != torch.bool
    impl = resolve_impl(impl, logits)
    if impl == "reference":
        o, aux = reference.channelwise_attention(
            logits,
            v,
            graph,
            edge_value=edge_value,
            logit_clamp=None if (low, high) == (-math.inf, math.inf) else (low, high),
            denominator_eps=denominator_eps,
            head_gate=head_gate,
            dense_gate_grad=dense_gate_grad,
            return_aux=request,
        )
        return o if return_aux is None else (o, aux)
    mask = HeadMask(None, None) if head_gate is None else node_mask(head_gate, graph)
    computed = HeadMask(None, None) if dense_gate_grad else mask
    logit = ChannelwiseLogit(low, high, denominator_eps)
    o, aux = _attend(x, graph, computed, logit, request, impl)
    if head_gate is not None:
        o = gated(o, head_gate, graph.graph_ptr, dense_gate_grad, impl)
        aux = masked_aux(aux, mask, graph) if dense_gate_grad else aux
    return o if return_aux is None else (o, aux)


_ROLES = Roles((), ("v",), ("logits", "edge_value"))


def _attend(
    x: ChannelwiseInputs,
    graph: Graph,
    mask: HeadMask,
    logit: ChannelwiseLogit,
    request: AuxRequest,
    impl: Impl,
) -> tuple[Tensor, Aux]:
    given = [t for t in x if t is not None]
    if torch.compiler.is_compiling():
        # Dynamo refuses one tensor in two places of a Function
        x = ChannelwiseInputs(x.logits, _alias(x.v), _alias(x.edge_value))
        mask = mask._replace(cols=_alias(mask.cols))
    refuse_forward_mode(*given)
    plan = CPU if impl == "cpp" else GATHER
    rows = row_walk(graph, plan)
    if needs_gradient(*given):
        columns = column_walk(graph, plan) if x.v is not None and x.v.requires_grad else ()
        call = _Call(graph, impl, Walks(rows, columns), logit, request.weights)
        o, lse, weights = _ChannelwiseAttention.apply(call, *x, *mask)
    else:
        results = ChannelwiseResults(keep=False, return_weights=request.weights)
        o, lse, weights, _ = _fwd(impl, *x, *mask, rows, *logit, *results)
    return o, Aux(lse if request.lse else None, weights if request.weights else None)


def _alias(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.view_as(x)


def _check(inputs: ChannelwiseInputs, graph: Graph) -> None:
    logits, v, edge_value = inputs
    check_graph(graph)
    if v is None and edge_value is None:
        raise ValueError("v and edge_value are both None: give at least one of them")
    for name, x, size, what in (
        ("logits", logits, graph.num_edges, "edges"),
        ("v", v, graph.num_cols, "columns"),
        ("edge_value", edge_value, graph.num_edges, "edges"),
    ):
        if x is None and name != "logits":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a strided tensor, got {x.layout}")
        if x.ndim not in (2, 3):
            first = "N_cols" if name == "v" else "E"
            raise ValueError(f"{name} must be [{first}, C] or [{first}, H, D], got {list(x.shape)}")
        if x.dtype != logits.dtype:
            raise TypeError(f"{name} is {x.dtype} but logits is {logits.dtype}")
        if x.device != logits.device:
            raise ValueError(f"{name} is on {x.device} but logits is on {logits.device}")
        if x.shape[0] != size:
            raise ValueError(f"{name} has {x.shape[0]} rows but the graph has {size} {what}")
        if x.shape[1:] != logits.shape[1:]:
            raise ValueError(
                f"{name} has channels {list(x.shape[1:])} but logits has {list(logits.shape[1:])}"
            )
    if 0 in logits.shape[1:]:
        raise ValueError(f"logits has no channels: {list(logits.shape)}")
    if graph.device != logits.device:
        raise ValueError(
            f"graph is on {graph.device} but logits is on {logits.device}: use graph.to()"
        )


class _Call(NamedTuple):
    """What goes through autograd as it is."""

    graph: Graph
    impl: Impl
    walks: Walks
    logit: ChannelwiseLogit
    return_weights: bool


class _ChannelwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        results = ChannelwiseResults(keep=True, return_weights=call.return_weights)
        rows = call.walks.row_walk
        o, lse, weights, stat = _fwd(call.impl, *tensors, rows, *call.logit, *results)
        ctx.call = call
        ctx.save_for_backward(*tensors, stat)
        ctx.mark_non_differentiable(weights)
        ctx.set_materialize_grads(False)
        return o, lse, weights

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None) -> tuple:
        call, (*tensors, stat) = ctx.call, ctx.saved_tensors
        x, mask = ChannelwiseInputs(*tensors[:3]), HeadMask(*tensors[3:])
        needs = ChannelwiseNeeds(*ctx.needs_input_grad[1:4])
        if torch.is_grad_enabled():
            # create_graph=True: the gradient must itself be differentiable
            def define(*tensors: Any) -> tuple[Tensor, ...]:
                inputs = ChannelwiseInputs(*tensors)
                return reference.masked_channelwise_attention(inputs, call.graph, mask, call.logit)[
                    :2
                ]

            grads = differentiable_gradients(define, x, [do, dlse], needs)
        else:
            if do is None:
                do = x.logits.new_zeros(()).expand(stat.shape[0], *x.logits.shape[1:])
            upstream = ChannelwiseUpstream(do, dlse, stat)
            grads = _bwd(call.impl, *upstream, *x, *mask, *call.walks, *call.logit, *needs)
            grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return None, *grads, None, None


FORWARD = Signature(ChannelwiseInputs, HeadMask, RowWalk, ChannelwiseLogit, ChannelwiseResults)
BACKWARD = Signature(
    ChannelwiseUpstream, ChannelwiseInputs, HeadMask, Walks, ChannelwiseLogit, ChannelwiseNeeds
)
# stat is what the backward needs of the rows: see kernels/channelwise_attention.py
torch.library.define(
    "fastgt::channelwise_attention_fwd",
    f"(str impl, {FORWARD.schema}) -> (Tensor o, Tensor lse, Tensor weights, Tensor stat)",
)
torch.library.define(
    "fastgt::channelwise_attention_bwd",
    f"(str impl, {BACKWARD.schema}) -> (Tensor dlogits, Tensor dv, Tensor dedge_value)",
)


@torch.library.register_fake("fastgt::channelwise_attention_fwd")
def _(impl: str, *flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, _, walk, _, results = FORWARD.split(flat)
    n, channels, wide = walk.row_walk[0].shape[0] - 1, x.logits.shape[1:], accumulator(x.logits)
    return (
        x.logits.new_empty(n, *channels),
        x.logits.new_empty(n, *channels, dtype=wide),
        x.logits.new_empty(x.logits.shape[0] if results.return_weights else 0, *channels),
        x.logits.new_empty(n if results.keep else 0, 3, channels.numel(), dtype=wide),
    )


@torch.library.register_fake("fastgt::channelwise_attention_bwd")
def _(impl: str, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, x, *_, needs = BACKWARD.split(flat)
    return (
        x.logits.new_empty(x.logits.shape if needs.need_logits else (0,)),
        x.logits.new_empty(x.v.shape if needs.need_v else (0,)),
        x.logits.new_empty(x.logits.shape if needs.need_edge_value else (0,)),
    )


def _launch_fwd(impl: str, *flat: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = FORWARD.split(flat)
    if impl == "cpp":
        from fastgt.cpu import channelwise_attention as cpu

        return cpu.channelwise_attention_fwd(*arguments)
    require_triton(arguments[0].logits)
    from fastgt.kernels import channelwise_attention as kernels

    return kernels.channelwise_attention_fwd(*arguments)


def _launch_bwd(impl: str, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    arguments = BACKWARD.split(flat)
    if impl == "cpp":
        from fastgt.cpu import channelwise_attention as cpu

        return cpu.channelwise_attention_bwd(*arguments)
    from fastgt.kernels import channelwise_attention_backward as kernels

    return kernels.channelwise_attention_bwd(*arguments)


torch.library.impl("fastgt::channelwise_attention_fwd", "CompositeExplicitAutograd", _launch_fwd)
torch.library.impl("fastgt::channelwise_attention_bwd", "CompositeExplicitAutograd", _launch_bwd)

_fwd = torch.ops.fastgt.channelwise_attention_fwd.default
_bwd = torch.ops.fastgt.channelwise_attention_bwd.default

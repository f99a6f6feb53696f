"""channelwise_attention: public function -> checks -> autograd -> registered ops -> launchers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgt import reference
from fastgt.graph import Graph
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
from fastgt.ops.head_mask import Active, active_heads, check_head_gate, gated, masked_extras
from fastgt.ops.implementation import Impl, require_triton, resolve_impl
from fastgt.ops.second_order import differentiable_gradients
from fastgt.ops.walks import CPU, GATHER, column_walk, row_walk


def channelwise_attention(
    logits: Tensor,
    v: Tensor | None,
    graph: Graph,
    *,
    edge_value: Tensor | None = None,
    logit_clamp: float | tuple[float, float] | None = None,
    denominator_eps: float = 0.0,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
    return_lse: bool = False,
    return_weights: bool = False,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, ...]:
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
        return_lse: Also give ``lse_i = log sum_j exp(s_ij)``, natural, ``[N_rows, C]`` in float32
            (float64 for float64), with its gradient. eps is not part of it.
        return_weights: Also give ``a_ij``, ``[E, C]`` in the caller's edge order, without gradient.
        impl: As in :func:`fastgt.neighborhood_attention`.

    Returns:
        ``[N_rows, C]`` (``[N_rows, H, D]``) in the dtype of the logits, followed by lse and weights
        where asked for. Sums are kept in float32 (float64 for float64). Beside the inputs, memory
        is O(N C); gradients of edge tensors are as large as these, and the CPU path's gradient of
        v takes up to one tensor of the logits' size besides. Under ``torch.autocast`` the inputs
        are cast first. Second derivatives go through the plain definition, with its O(E C) memory;
        ``torch.func`` transforms and forward-mode derivatives need ``impl="reference"``.

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
    if isinstance(logits, Tensor) and autocasts(logits.device.type):
        dtype = torch.get_autocast_dtype(logits.device.type)
        logits = autocast(logits, dtype)
        v = None if v is None else autocast(v, dtype)
        edge_value = None if edge_value is None else autocast(edge_value, dtype)
    low, high = clamp_bounds(logit_clamp)
    denominator_eps = number("denominator_eps", denominator_eps)
    _check(logits, v, graph, edge_value)
    check_numbers(logits, None, denominator_eps, 0.0)
    low, high = (math.inf * x if abs(x) > largest(logits) else x for x in (low, high))
    active = None
    if head_gate is not None:
        if logits.ndim != 3:
            raise ValueError(f"head_gate needs logits [E, H, D], got {list(logits.shape)}")
        check_head_gate(head_gate, logits.shape[1], logits.device, graph.num_graphs)
        active = active_heads(head_gate, graph)
        dense_gate_grad = dense_gate_grad and head_gate.dtype != torch.bool
    impl = resolve_impl(impl, logits)
    settings = low, high, denominator_eps
    wanted = return_lse, return_weights
    o, *extras = _attend(
        logits,
        v,
        edge_value,
        graph,
        None if dense_gate_grad else active,
        settings,
        impl,
        wanted,
    )
    if head_gate is not None:
        o = gated(o, head_gate, graph.graph_ptr, dense_gate_grad, impl)
    if active is not None and dense_gate_grad and extras:
        extras = masked_extras(extras, active.rows, graph, return_lse, return_weights)
    return (o, *extras) if extras else o


def _attend(
    logits: Tensor,
    v: Tensor | None,
    edge_value: Tensor | None,
    graph: Graph,
    active: Active | None,
    settings: tuple[float, float, float],
    impl: Impl,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, ...]:
    """-> o, and what is wanted besides: lse, weights."""
    return_lse, return_weights = wanted
    on_rows, on_cols = active or (None, None)
    if impl == "reference":
        low, high, eps = settings
        found = reference.channelwise_attention(
            logits,
            v,
            graph,
            edge_value=edge_value,
            logit_clamp=None if (low, high) == (-math.inf, math.inf) else (low, high),
            denominator_eps=eps,
            return_lse=return_lse,
            return_weights=return_weights,
            active=on_rows,
        )
        return found if isinstance(found, tuple) else (found,)
    tensors = [x for x in (logits, v, edge_value) if x is not None]
    if torch.compiler.is_compiling():
        # Dynamo refuses one tensor in two places of a Function
        v = None if v is None else v.view_as(v)
        edge_value = None if edge_value is None else edge_value.view_as(edge_value)
        on_cols = None if on_cols is None else on_cols.view_as(on_cols)
    refuse_forward_mode(*tensors)
    plan = CPU if impl == "torch" else GATHER
    rows = row_walk(graph, plan)
    if needs_gradient(*tensors):
        columns = column_walk(graph, plan) if v is not None and v.requires_grad else ()
        o, lse, weights = _ChannelwiseAttention.apply(
            logits,
            v,
            edge_value,
            on_rows,
            on_cols,
            graph,
            impl,
            rows,
            columns,
            settings,
            return_weights,
        )
    else:
        o, lse, weights, _ = _fwd(
            impl, logits, v, edge_value, on_rows, rows, *settings, False, return_weights
        )
    return o, *(x for x, asked in ((lse, return_lse), (weights, return_weights)) if asked)


def _check(logits: Tensor, v: Tensor | None, graph: Graph, edge_value: Tensor | None) -> None:
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


class _ChannelwiseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        v: Tensor | None,
        edge_value: Tensor | None,
        on_rows: Tensor | None,
        on_cols: Tensor | None,
        graph: Graph,
        impl: str,
        rows: tuple[Tensor, ...],
        columns: tuple[Tensor, ...],
        settings: tuple[float, float, float],
        return_weights: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        o, lse, weights, stat = _fwd(
            impl, logits, v, edge_value, on_rows, rows, *settings, True, return_weights
        )
        ctx.save_for_backward(logits, v, edge_value, on_rows, on_cols, stat)
        ctx.graph, ctx.impl, ctx.rows, ctx.columns = graph, impl, rows, columns
        ctx.settings = settings
        ctx.mark_non_differentiable(weights)
        ctx.set_materialize_grads(False)
        return o, lse, weights

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None) -> tuple:
        logits, v, edge_value, on_rows, on_cols, stat = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            # create_graph=True: the gradient must itself be differentiable
            graph, (low, high, eps) = ctx.graph, ctx.settings

            def define(
                logits: Tensor, v: Tensor | None, edge_value: Tensor | None
            ) -> tuple[Tensor, ...]:
                out = reference.channelwise_attention(
                    logits,
                    v,
                    graph,
                    edge_value=edge_value,
                    logit_clamp=(low, high),
                    denominator_eps=eps,
                    return_lse=True,
                    active=on_rows,
                )
                assert isinstance(out, tuple)
                return out

            inputs = [logits, v, edge_value]
            grads = differentiable_gradients(define, inputs, [do, dlse], needs)
        else:
            if do is None:
                do = logits.new_zeros(()).expand(stat.shape[0], *logits.shape[1:])
            tensors = logits, v, edge_value, on_rows, on_cols
            args = do, dlse, *tensors, stat, ctx.rows, ctx.columns
            found = _bwd(ctx.impl, *args, *ctx.settings, *needs)
            grads = [x if need else None for x, need in zip(found, needs, strict=True)]
        return (*grads, *[None] * 8)


# stat is what the backward needs of the rows, [N_rows, 3, C]: see kernels/channelwise_attention.py;
# on_rows and on_cols [1 or N, H] are their heads that are not masked
_INPUTS = "Tensor logits, Tensor? v, Tensor? edge_value"
_SETTINGS = "float low, float high, float eps"
torch.library.define(
    "fastgt::channelwise_attention_fwd",
    f"(str impl, {_INPUTS}, Tensor? on_rows, Tensor[] rows, {_SETTINGS}, bool keep,"
    " bool return_weights)"
    " -> (Tensor o, Tensor lse, Tensor weights, Tensor stat)",
)
torch.library.define(
    "fastgt::channelwise_attention_bwd",
    f"(str impl, Tensor do, Tensor? dlse, {_INPUTS}, Tensor? on_rows, Tensor? on_cols, Tensor stat,"
    f" Tensor[] rows, Tensor[] columns, {_SETTINGS}, bool need_logits, bool need_v,"
    " bool need_edge_value) -> (Tensor dlogits, Tensor dv, Tensor dedge_value)",
)


@torch.library.register_fake("fastgt::channelwise_attention_fwd")
def _(impl, logits, v, edge_value, on_rows, rows, low, high, eps, keep, return_weights):  # type: ignore[no-untyped-def]
    n, channels, wide = rows[0].shape[0] - 1, logits.shape[1:], accumulator(logits)
    return (
        logits.new_empty(n, *channels),
        logits.new_empty(n, *channels, dtype=wide),
        logits.new_empty(logits.shape[0] if return_weights else 0, *channels),
        logits.new_empty(n if keep else 0, 3, channels.numel(), dtype=wide),
    )


@torch.library.register_fake("fastgt::channelwise_attention_bwd")
def _(impl, do, dlse, logits, v, edge_value, *rest):  # type: ignore[no-untyped-def]
    need_logits, need_v, need_edge_value = rest[-3:]
    return (
        logits.new_empty(logits.shape if need_logits else (0,)),
        logits.new_empty(v.shape if need_v else (0,)),
        logits.new_empty(logits.shape if need_edge_value else (0,)),
    )


def _launch_fwd(impl: str, logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if impl == "torch":
        from fastgt.cpu import channelwise_attention as cpu

        return cpu.channelwise_attention_fwd(logits, *args)
    require_triton(logits)
    from fastgt.kernels import channelwise_attention as kernels

    return kernels.channelwise_attention_fwd(logits, *args)


def _launch_bwd(impl: str, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if impl == "torch":
        from fastgt.cpu import channelwise_attention as cpu

        # do, dlse, logits, v, edge_value, on_rows; on_cols, whose walks are cut by rows there
        return cpu.channelwise_attention_bwd(*args[:6], *args[7:])
    from fastgt.kernels import channelwise_attention as kernels

    return kernels.channelwise_attention_bwd(*args)


torch.library.impl("fastgt::channelwise_attention_fwd", "CompositeExplicitAutograd", _launch_fwd)
torch.library.impl("fastgt::channelwise_attention_bwd", "CompositeExplicitAutograd", _launch_bwd)

_fwd = torch.ops.fastgt.channelwise_attention_fwd.default
_bwd = torch.ops.fastgt.channelwise_attention_bwd.default

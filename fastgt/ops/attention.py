"""neighborhood_attention: public function -> checks -> autograd -> registered ops -> launchers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgt import reference
from fastgt.graph import Graph
from fastgt.ops.attention_edges import (
    autocast_edges,
    check_edges,
    edge_attention,
    reference_grads,
)
from fastgt.ops.checks import (
    autocast,
    autocasts,
    check_attention,
    check_edge_tensor,
    check_numbers,
    clamp_bounds,
    dropout_key,
    largest,
    needs_gradient,
    number,
    refuse_forward_mode,
)
from fastgt.ops.head_mask import Active, active_heads, check_head_gate, gated, masked_extras
from fastgt.ops.implementation import Impl, choose, require_triton
from fastgt.ops.walks import CPU, column_walk, row_walk
from fastgt.tiles import Plan, tallest


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph,
    *,
    scale: float | None = None,
    edge_bias: Tensor | None = None,
    edge_gate: Tensor | None = None,
    edge_key: Tensor | None = None,
    edge_value: Tensor | None = None,
    edge_attr: Tensor | None = None,
    edge_key_weight: Tensor | None = None,
    edge_value_weight: Tensor | None = None,
    logit_clamp: float | tuple[float, float] | None = None,
    denominator_eps: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
    return_lse: bool = False,
    return_weights: bool = False,
    return_edge_scores: bool = False,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Softmax attention of every node over its neighbours.

    For row (query) i and its columns (keys) j, head by head, with * channel by channel::

        t_ij  = scale * q_i * (k_j + edge_key_ij) * edge_gate_ij            [D]
        s_ij  = clamp(sum_d t_ij, low, high) + edge_bias_ij
        a_ij  = exp(s_ij) / (sum_j exp(s_ij) + eps)
        out_i = gate sum_j dropout(a_ij) (v_j + edge_value_ij)

    A row without edges, or whose logits are all -inf, gives exactly 0, an LSE of -inf and zero
    gradients. Duplicate edges count as often as they stand. NaN and infinities reach only the
    rows that attend to them. The result is the same, bit for bit, every time; gradients too, but
    not those of ``create_graph=True``: PyTorch sums these, in an order that its threads change.

    Args:
        q: ``[N_rows, H, D]``, float16, bfloat16, float32 or float64. Any strides.
        k: ``[N_cols, H_kv, D]``; H_kv divides H, query head h reads key head h // (H / H_kv).
        v: ``[N_cols, H_kv, Dv]``. D and Dv from 1 to 256.
        graph: Who attends to whom.
        scale: Default ``1 / sqrt(D)``. A number; to learn it, multiply q by it.
        edge_bias: ``[E, H]``. As all edge tensors: in the caller's edge order, in q's dtype, of any
            strides; receives a gradient. Kernels copy those below that are not contiguous.
        edge_gate: ``[E, H, D]`` or ``[E, H]``, times the products of queries and keys.
        edge_key: ``[E, H, D]``, added to the keys.
        edge_value: ``[E, H, Dv]``, added to the values. Where it is the tensor that edge_key is,
            it is read once.
        edge_attr: ``[E, C]``, C from 1 to 256: the low-rank form of the two above. With
            ``edge_key_weight [C, H, D]``, ``edge_attr @ edge_key_weight`` is added to the keys;
            with ``edge_value_weight [C, H, Dv]``, likewise to the values. Nothing of size E H D is
            made, ``q . (x W) = (W q) . x`` and ``sum a (x W) = (sum a x) W``, except where a gate
            of that size or edge scores are in use.
        logit_clamp: ``(low, high)``, or c for ``(-c, c)``. Outside it the gradient is 0.
        denominator_eps: eps above, relative to logits as they are (no maximum subtracted).
        dropout_p: Probability, in multiples of 2^-24, of dropping a weight; others grow by
            ``1 / (1 - dropout_p)``. Pass 0 in evaluation.
        dropout_seed: An int, or one int64 on q's device, that the mask is a function of, with edge
            and head (Philox): the same for every ``impl``. None draws one from PyTorch's
            generator of q's device, so that ``torch.manual_seed`` and checkpointing repeat it; a
            CPU and a GPU draw different ones, and so does code that Inductor compiled.
        head_gate: ``[H]``, or ``[G, H]`` for the rows of each graph, floating point or bool. Where
            it is 0 the head is masked: neither read nor computed, in the forward and in the
            backward; a key head, where all query heads that read it are. To a masked head a row
            has no edges: an output and gradients of 0, an LSE of -inf, weights and edge scores of
            0, whatever stands there, NaN too. Other gates multiply the output alone, and get their
            gradient ``sum do . out / gate``; one of 0 gets 0. NaN is refused (on a CPU).
        dense_gate_grad: Compute masked heads too, so that gates of 0 get the exact gradient; NaN in
            them shows.
        return_lse: Also give ``lse_i = log sum_j exp(s_ij)``, natural, ``[N_rows, H]`` in
            float32 (float64 for float64), with its gradient. eps is not part of it.
        return_weights: Also give ``a_ij``, ``[E, H]`` before dropout, without gradient.
        return_edge_scores: Also give ``t_ij``, ``[E, H, D]``, with its gradient.
        impl: ``"triton"`` (GPU), ``"torch"`` (CPU), ``"reference"`` (plain definition,
            O(E H D) memory), or None to follow the device.

    Returns:
        ``[N_rows, H, Dv]`` in q's dtype, followed by lse, weights and edge scores where asked for.
        Sums are kept in float32 (float64 for float64). Memory is O(N + E H), but for tensors of
        size E H D that are given or asked for. Under
        ``torch.autocast`` the inputs are cast first, as for
        ``torch.nn.functional.scaled_dot_product_attention``. Second derivatives go through the
        plain definition, with its memory. ``torch.func`` transforms and forward-mode derivatives
        need ``impl="reference"``; a model exported by ``torch.export`` is for inference.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.
        RuntimeError: ``impl``, or the graph's plan, cannot run here.

    Source:
        Vaswani et al., arXiv 1706.03762, eq. 1, over neighbourhoods. With ``logit_clamp=5``
        Dwivedi and Bresson, arXiv 2012.09699, eqs. 3-5; with ``edge_gate``, edge scores and
        ``denominator_eps=1e-6`` their eqs. 8-12. With ``edge_key`` and ``edge_value`` Shi et al.,
        arXiv 2009.03509, eqs. 3-4.

    Example:
        >>> import torch
        >>> from fastgt import Graph, neighborhood_attention
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> q, k, v = torch.randn(3, 3, 4, 16)
        >>> neighborhood_attention(q, k, v, graph).shape
        torch.Size([3, 4, 16])
        >>> gate = torch.randn(3, 4, 16)
        >>> out, scores = neighborhood_attention(
        ...     q, k, v, graph, edge_gate=gate, return_edge_scores=True
        ... )
        >>> scores.shape
        torch.Size([3, 4, 16])
    """
    dropout_p = number("dropout_p", dropout_p)
    plain = edge_gate is None and edge_key is None and edge_value is None and edge_attr is None
    plain = plain and edge_key_weight is None and edge_value_weight is None
    plain = plain and not dropout_p and not return_edge_scores
    edges: dict[str, Tensor | None] = {}
    if not plain:
        edges = {
            "edge_gate": edge_gate,
            "edge_key": edge_key,
            "edge_value": edge_value,
            "edge_attr": edge_attr,
            "edge_key_weight": edge_key_weight,
            "edge_value_weight": edge_value_weight,
        }
    if isinstance(q, Tensor) and autocasts(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (autocast(x, dtype) for x in (q, k, v))
        edge_bias = None if edge_bias is None else autocast(edge_bias, dtype)
        edges = autocast_edges(edges, dtype)
    low, high = clamp_bounds(logit_clamp)
    scale = None if scale is None else number("scale", scale)
    denominator_eps = number("denominator_eps", denominator_eps)
    check_attention(q, k, v, graph)
    if edge_bias is not None:
        check_edge_tensor("edge_bias", edge_bias, q, "E, H", graph.num_edges, q.shape[1])
    if edges:
        check_edges(q, v, graph.num_edges, **edges)
    check_numbers(q, scale, denominator_eps, dropout_p)
    active = None
    if head_gate is not None:
        check_head_gate(head_gate, q.shape[1], q.device, graph.num_graphs)
        active = active_heads(head_gate, graph)
        dense_gate_grad = dense_gate_grad and head_gate.dtype != torch.bool
    if logit_clamp is not None:
        low, high = (math.inf * x if abs(x) > largest(q) else x for x in (low, high))
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    seed = dropout_key(dropout_seed, q.device) if dropout_p or dropout_seed is not None else None
    impl = choose(impl, q)
    wanted = return_lse, return_weights, return_edge_scores
    o, *extras = _attend(
        (q, k, v, edge_bias),
        None if dense_gate_grad else active,
        edges,
        graph,
        (scale, low, high, denominator_eps),
        dropout_p,
        seed,
        impl,
        wanted,
    )
    if head_gate is not None:
        o = gated(o, head_gate, graph.graph_ptr, dense_gate_grad, impl)
    if active is not None and dense_gate_grad and extras:
        extras = masked_extras(extras, active.rows, graph, *wanted)
    return (o, *extras) if extras else o


def _attend(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    active: Active | None,
    edges: dict[str, Tensor | None],
    graph: Graph,
    settings: tuple[float, float, float, float],
    dropout_p: float,
    seed: Tensor | None,
    impl: Impl,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, ...]:
    """-> o, and what is wanted besides: lse, weights, edge scores."""
    q, k, v, edge_bias = inputs
    on_rows, on_cols = active or (None, None)
    return_lse, return_weights, return_edge_scores = wanted
    if impl == "reference":
        scale, low, high, eps = settings
        found = reference.neighborhood_attention(
            q,
            k,
            v,
            graph,
            scale=scale,
            edge_bias=edge_bias,
            **edges,
            logit_clamp=None if (low, high) == (-math.inf, math.inf) else (low, high),
            denominator_eps=eps,
            dropout_p=dropout_p,
            dropout_seed=seed,
            return_lse=return_lse,
            return_weights=return_weights,
            return_edge_scores=return_edge_scores,
            active=on_rows,
        )
        return found if isinstance(found, tuple) else (found,)
    given: tuple[Tensor | None, ...] = (q, k, v, edge_bias, *edges.values())
    tensors = [x for x in given if x is not None]
    if torch.compiler.is_compiling():
        # Dynamo refuses one tensor in two places of a Function, as in self-attention on x itself
        k, v = k.view_as(k), v.view_as(v)
        on_cols = None if on_cols is None else on_cols.view_as(on_cols)
    refuse_forward_mode(*tensors)
    plan = _plan(impl, graph, q, v, len(edges) > 0)
    differentiable = needs_gradient(*tensors)
    rows = row_walk(graph, plan)
    columns = column_walk(graph, plan) if differentiable else ()
    scores = None
    if edges:
        walks = graph, plan.path, rows, columns
        o, lse, weights, scores = edge_attention(
            q,
            k,
            v,
            edge_bias,
            on_rows,
            on_cols,
            edges,
            walks,
            settings,
            dropout_p,
            seed if dropout_p else None,
            return_weights,
            return_edge_scores,
            differentiable,
        )
    elif differentiable:
        o, lse, weights = _Attention.apply(
            q, k, v, edge_bias, on_rows, on_cols, graph, plan, rows, columns, settings,
            return_weights,
        )  # fmt: skip
    else:
        path, height, _ = plan
        o, lse, weights = _fwd(
            path, height, q, k, v, edge_bias, on_rows, rows, *settings, return_weights
        )
    extras: list[Any] = [x for x, asked in ((lse, return_lse), (weights, return_weights)) if asked]
    extras += [scores] if return_edge_scores else []
    return o, *extras


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        edge_bias: Tensor | None,
        on_rows: Tensor | None,
        on_cols: Tensor | None,
        graph: Graph,
        plan: Plan,
        rows: tuple[Tensor, ...],
        columns: tuple[Tensor, ...],
        settings: tuple[float, float, float, float],
        return_weights: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        path, height, _ = plan
        o, lse, weights = _fwd(
            path, height, q, k, v, edge_bias, on_rows, rows, *settings, return_weights
        )
        # only windows need the output: a first guess at the row's mean gradient
        kept = o if height else None
        ctx.save_for_backward(q, k, v, edge_bias, on_rows, on_cols, lse, kept)
        ctx.graph, ctx.plan, ctx.rows, ctx.columns = graph, plan, rows, columns
        ctx.settings = settings
        ctx.mark_non_differentiable(weights)
        ctx.set_materialize_grads(False)
        return o, lse, weights

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None) -> tuple:
        q, k, v, edge_bias, on_rows, on_cols, lse, o = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            # create_graph=True: the gradient must itself be differentiable
            grads: list[Tensor | None] = reference_grads(
                (do, dlse), (q, k, v, edge_bias), needs, ctx.graph, ctx.settings, on_rows
            )
        else:
            if do is None:
                do = q.new_zeros(()).expand(*q.shape[:2], v.shape[2])
            path, height, _ = ctx.plan
            args = (do, dlse, q, k, v, edge_bias, on_rows, on_cols, lse, o)
            found = _bwd(path, height, *args, ctx.rows, ctx.columns, *ctx.settings, *needs)
            grads = [x if need else None for x, need in zip(found, needs, strict=True)]
        return (*grads, *[None] * 8)


def _plan(impl: Impl, graph: Graph, q: Tensor, v: Tensor, edge_terms: bool) -> Plan:
    if impl == "triton":
        width = max(q.shape[2], v.shape[2])
        plan = graph.choose(width, q.dtype, edge_terms=edge_terms)
        if plan.height and plan.height > (height := tallest(width, q.element_size())):
            other = f"a height of {height}" if height else "path='gather'"
            raise RuntimeError(
                f"path {plan.path!r} with height {plan.height} does not fit on a processor with "
                f"heads of width {width} in {q.dtype}: plan for {other}"
            )
        return plan
    if graph.choice is not None and graph.choice.height:
        raise RuntimeError(
            f"the graph is planned for {graph.choice.path!r}, which impl='torch' on a CPU does "
            "not have: use graph.plan() there"
        )
    return CPU


# path is "torch" (on a CPU) or one of Triton's; rows and columns are what it walks; on_rows and
# on_cols [1 or N, H] are their heads that are not masked
_SETTINGS = "float scale, float low, float high, float eps"
torch.library.define(
    "fastgt::attention_fwd",
    "(str path, int height, Tensor q, Tensor k, Tensor v, Tensor? edge_bias, Tensor? on_rows,"
    f" Tensor[] rows, {_SETTINGS}, bool return_weights) -> (Tensor o, Tensor lse, Tensor weights)",
)
torch.library.define(
    "fastgt::attention_bwd",
    "(str path, int height, Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v,"
    " Tensor? edge_bias, Tensor? on_rows, Tensor? on_cols, Tensor lse, Tensor? o, Tensor[] rows,"
    f" Tensor[] columns, {_SETTINGS}, bool need_q, bool need_k, bool need_v, bool need_bias)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
)


@torch.library.register_fake("fastgt::attention_fwd")
def _(path, height, q, k, v, edge_bias, on_rows, rows, scale, low, high, eps, return_weights):  # type: ignore[no-untyped-def]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
        q.new_empty(q.shape[0], q.shape[1], dtype=wide),
        q.new_empty(rows[1].shape[0] if return_weights else 0, q.shape[1]),
    )


@torch.library.register_fake("fastgt::attention_bwd")
def _(path, height, do, dlse, q, k, v, edge_bias, on_rows, on_cols, lse, o, rows, columns, *rest):  # type: ignore[no-untyped-def]
    need_q, need_k, need_v, need_bias = rest[-4:]
    return (
        q.new_empty(q.shape if need_q else (0,)),
        q.new_empty(k.shape if need_k else (0,)),
        q.new_empty(v.shape if need_v else (0,)),
        q.new_empty((rows[1].shape[0], q.shape[1]) if need_bias else (0,)),
    )


def _launch_fwd(path: str, height: int, *args: Any) -> tuple[Tensor, ...]:
    # q, k, v, edge_bias, on_rows, rows; the settings
    if path == "torch":
        from fastgt.cpu import attention

        return attention.attention_fwd(*args[:5], *args[5], *args[6:])
    require_triton(args[0])
    if height:
        from fastgt.kernels.attention_windows import windows_fwd

        return windows_fwd(*args[:6], height, path == "graphs", *args[6:])
    from fastgt.kernels.attention import attention_fwd

    return attention_fwd(*args)


def _launch_bwd(path: str, height: int, *args: Any) -> tuple[Tensor, ...]:
    # do, dlse, q, k, v, edge_bias, on_rows, on_cols, lse; o, for windows; walks; the settings
    inputs, (o, rows, columns), settings = args[:9], args[9:12], args[12:]
    if path == "torch":
        from fastgt.cpu import attention

        # whole walks are cut by rows there
        arguments: Any = (*inputs[:7], inputs[8], *rows, *columns, *settings[:4], settings[4:])
        return tuple(attention.attention_bwd(*arguments))
    if height:
        from fastgt.kernels.attention_windows import windows_bwd

        return windows_bwd(*inputs, o, rows, columns, height, path == "graphs", *settings)
    from fastgt.kernels.attention_backward import attention_bwd

    return attention_bwd(*inputs, rows, columns, *settings)


torch.library.impl("fastgt::attention_fwd", "CompositeExplicitAutograd", _launch_fwd)
torch.library.impl("fastgt::attention_bwd", "CompositeExplicitAutograd", _launch_bwd)

_fwd = torch.ops.fastgt.attention_fwd.default
_bwd = torch.ops.fastgt.attention_bwd.default

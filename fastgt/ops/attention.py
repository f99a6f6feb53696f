"""neighborhood_attention: public function -> checks -> autograd -> registered ops
(``attention_launch.py``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from fastgt import reference
from fastgt.contract import (
    Aux,
    AuxRequest,
    Dropout,
    EdgeTensors,
    EdgeTerms,
    HeadMask,
    Inputs,
    Logit,
    PerInput,
    Switches,
)
from fastgt.graph import Graph
from fastgt.ops.attention_launch import attention_bwd, attention_fwd
from fastgt.ops.aux_request import check_request
from fastgt.ops.checks import (
    autocast,
    autocasts,
    check_attention,
    check_edge_tensor,
    check_numbers,
    clamp_bounds,
    edge_dropout,
    largest,
    needs_gradient,
    number,
    refuse_forward_mode,
)
from fastgt.ops.edge_terms import (
    add_attributes,
    autocast_edges,
    check_edges,
    define,
    make_terms,
    narrow,
)
from fastgt.ops.head_mask import check_head_gate, gated, masked_aux, node_mask
from fastgt.ops.implementation import Impl, resolve_impl
from fastgt.ops.second_order import differentiable_gradients
from fastgt.ops.walks import CPU, column_walk, row_walk
from fastgt.philox import DropoutSeed
from fastgt.plans import Plan, tallest
from fastgt.shard import Roles, Shard
from fastgt.signature import Signature


@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph | Shard,
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
    dropout_seed: int | Tensor | DropoutSeed | None = None,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
    return_aux: None = None,
    impl: Impl | None = None,
) -> Tensor: ...


@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph | Shard,
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
    dropout_seed: int | Tensor | DropoutSeed | None = None,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
    return_aux: AuxRequest,
    impl: Impl | None = None,
) -> tuple[Tensor, Aux]: ...


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph | Shard,
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
    dropout_seed: int | Tensor | DropoutSeed | None = None,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
    return_aux: AuxRequest | None = None,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Aux]:
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
            CPU and a GPU draw different ones, and so does code that Inductor compiled. A
            :class:`fastgt.DropoutSeed` says besides by which numbers it knows edges and heads.
        head_gate: ``[H]``, or ``[G, H]`` for the rows of each graph, floating point or bool. Where
            it is 0 the head is masked: neither read nor computed, in the forward and in the
            backward; a key head, where all query heads that read it are. To a masked head a row
            has no edges: an output and gradients of 0, an LSE of -inf, weights and edge scores of
            0, whatever stands there, NaN too. Other gates multiply the output alone, and get their
            gradient ``sum do . out / gate``; one of 0 gets 0. NaN is refused (on a CPU).
        dense_gate_grad: Compute masked heads too, so that gates of 0 get the exact gradient; NaN in
            them shows.
        return_aux: Which results to give besides: ``AuxRequest(lse=True)`` for
            ``lse_i = log sum_j exp(s_ij)``, natural, ``[N_rows, H]`` in float32 (float64 for
            float64), with its gradient, eps is not part of it; ``weights=True`` for ``a_ij``,
            ``[E, H]`` before dropout, without gradient; ``edge_scores=True`` for ``t_ij``,
            ``[E, H, D]``, with its gradient.
        impl: ``"triton"`` (GPU), ``"cpp"`` (CPU), ``"reference"`` (plain definition,
            O(E H D) memory), or None to follow the device.

    Returns:
        ``[N_rows, H, Dv]`` in q's dtype; with ``return_aux`` a tuple of it and an ``Aux``. Sums are
        kept in float32 (float64 for float64). Memory is O(N + E H), but for tensors of
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
        >>> from fastgt import AuxRequest, Graph, neighborhood_attention
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> q, k, v = torch.randn(3, 3, 4, 16)
        >>> neighborhood_attention(q, k, v, graph).shape
        torch.Size([3, 4, 16])
        >>> gate = torch.randn(3, 4, 16)
        >>> out, aux = neighborhood_attention(
        ...     q, k, v, graph, edge_gate=gate, return_aux=AuxRequest(edge_scores=True)
        ... )
        >>> aux.edge_scores.shape
        torch.Size([3, 4, 16])
    """
    if isinstance(graph, Shard):
        return graph.run(neighborhood_attention, _ROLES, locals())
    request = check_request("neighborhood_attention", return_aux, *AuxRequest._fields)
    dropout_p = number("dropout_p", dropout_p)
    edges = EdgeTensors(
        edge_bias, edge_gate, edge_key, edge_value, edge_attr, edge_key_weight, edge_value_weight
    )
    given = [x for x in edges[1:] if x is not None]
    more_than_bias = len(given) > 0 or dropout_p != 0 or request.edge_scores
    if isinstance(q, Tensor) and autocasts(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (autocast(x, dtype) for x in (q, k, v))
        edges = autocast_edges(edges, dtype)
    low, high = clamp_bounds(logit_clamp)
    scale = None if scale is None else number("scale", scale)
    denominator_eps = number("denominator_eps", denominator_eps)
    check_attention(q, k, v, graph)
    if edges.edge_bias is not None:
        shape = graph.num_edges, q.shape[1]
        check_edge_tensor("edge_bias", edges.edge_bias, q, "E, H", *shape)
    if more_than_bias:
        check_edges(edges, q, v, graph.num_edges)
    check_numbers(q, scale, denominator_eps, dropout_p)
    mask = active = _NO_MASK
    if head_gate is not None:
        check_head_gate(head_gate, q.shape[1], q.device, graph.num_graphs)
        active = node_mask(head_gate, graph)
        dense_gate_grad = dense_gate_grad and head_gate.dtype != torch.bool
        mask = mask if dense_gate_grad else active
    if logit_clamp is not None:
        low, high = (math.inf * x if abs(x) > largest(q) else x for x in (low, high))
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    # a float that a compiled program finds in a module is an input to it, first asked for inside
    dropout = Dropout(None, None, 0.0) if torch.compiler.is_compiling() else _NO_DROPOUT
    if dropout_p or dropout_seed is not None:
        dropout = edge_dropout(dropout_p, dropout_seed, graph.num_edges, q.device)
    impl = resolve_impl(impl, q)
    o, aux = _attend(
        Inputs(q, k, v),
        edges,
        mask,
        graph,
        Logit(scale, low, high, denominator_eps),
        dropout,
        request,
        impl,
        more_than_bias,
    )
    if head_gate is not None:
        o = gated(o, head_gate, graph.graph_ptr, dense_gate_grad, impl)
        aux = masked_aux(aux, active, graph) if dense_gate_grad else aux
    return o if return_aux is None else (o, aux)


# a tensor of edges is in its role, or every rank takes it for one that all have
_ROLES = Roles(
    ("q",), ("k", "v"), ("edge_bias", "edge_gate", "edge_key", "edge_value", "edge_attr")
)


_NO_MASK, _NO_DROPOUT = HeadMask(), Dropout()


def _attend(
    inputs: Inputs,
    edges: EdgeTensors,
    mask: HeadMask,
    graph: Graph,
    logit: Logit,
    dropout: Dropout,
    request: AuxRequest,
    impl: Impl,
    more_than_bias: bool,
) -> tuple[Tensor, Aux]:
    if impl == "reference":
        return reference.masked_attention(inputs, edges, mask.rows, graph, logit, dropout, request)
    tensors = [x for x in (*inputs, *edges) if x is not None]
    refuse_forward_mode(*tensors)
    differentiable = needs_gradient(*tensors)
    plan = _plan(impl, graph, inputs, more_than_bias)
    terms, key_is_value, value_weight = EdgeTerms(edges.edge_bias), False, None
    if more_than_bias:
        terms, key_is_value, value_weight = make_terms(
            inputs, edges, mask, graph, by_channel=request.edge_scores, path=plan.path
        )
    if torch.compiler.is_compiling():
        # Dynamo refuses one tensor in two places of a Function, as in self-attention on x itself
        q, k, v = inputs
        inputs = Inputs(q, k.view_as(k), v.view_as(v))
        terms = EdgeTerms(*(None if x is None else x.view_as(x) for x in terms))
        mask = HeadMask(mask.rows, None if mask.cols is None else mask.cols.view_as(mask.cols))
    # a plain call leaves out what has its default: the host waits for every argument
    rest: tuple[Tensor | None, ...] = () if terms.bias is None else (terms.bias,)
    settings: tuple[Any, ...] = ()
    if more_than_bias or mask.rows is not None or request.weights:
        rest = *terms, *mask, dropout.seed, dropout.numbers
        switches = Switches(
            key_is_value, request.weights, request.edge_scores, value_weight is not None
        )
        settings = *dropout[2:], *switches
    rows = row_walk(graph, plan)
    if differentiable:
        columns = column_walk(graph, plan)
        # not the plan: compiled code would be made anew for every reason that a plan states
        path, height, _ = plan
        call = _Call(graph, path, height, rows, columns, logit, settings)
        results = _Attention.apply(call, *inputs, *rest)
    else:
        results = attention_fwd(plan.path, plan.height, rows, *inputs, *logit, *rest, *settings)
    o, lse, weights, scores, attr_o = results
    if value_weight is not None:
        o = add_attributes(o, lse, attr_o, value_weight)
    return o, Aux(lse if request.lse else None, weights, scores)


class _Call(NamedTuple):
    """What autograd does not look into."""

    graph: Graph
    path: str
    height: int
    rows: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]
    logit: Logit
    settings: tuple[Any, ...]  # dropout's probability and first head, Switches; or nothing


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *rest: Tensor
        | None,  # nothing, the bias, or EdgeTerms, HeadMask, dropout's seed and numbers
    ) -> tuple[Tensor | None, ...]:
        _, path, height, rows, _, logit, settings = call
        results = attention_fwd(path, height, rows, q, k, v, *logit, *rest, *settings)
        o, lse, weights, _, _ = results
        # only windows need the output: a first guess at the row's mean gradient
        ctx.save_for_backward(lse, o if height else None, q, k, v, *rest)
        ctx.call = call
        if settings:
            ctx.mark_non_differentiable(*[] if weights is None else [weights])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(
        ctx: Any,
        do: Tensor | None,
        dlse: Tensor | None,
        _: None,
        dscores: Tensor | None,
        dattr_o: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        lse, o, q, k, v, *rest = ctx.saved_tensors
        graph, path, height, rows, columns, logit, settings = ctx.call
        given = ctx.needs_input_grad[1:]
        needs = (given + _NO_NEEDS)[: len(_NO_NEEDS)]
        if dattr_o is not None:
            dattr_o = narrow(dattr_o, q, path)
        upstream = do, dlse, dscores, dattr_o
        grads: Sequence[Tensor | None]
        if torch.is_grad_enabled():
            # create_graph=True: the gradient must itself be differentiable
            terms, mask, dropout, switches = _REST.split((*rest, *settings))
            call = graph, mask.rows, logit, dropout, switches.key_is_value
            grads = _differentiable(call, (q, k, v, *terms), upstream, needs)
        else:
            if do is None:
                upstream = q.new_zeros(()).expand(*q.shape[:2], v.shape[2]), *upstream[1:]
            saved = lse, o
            flat = *upstream, *saved, q, k, v, *logit, *rest, *settings
            grads = attention_bwd(path, height, rows, columns, needs, *flat)
        # neither masks nor what dropout counts by have one
        return (None, *grads, None, None, None, None)[: len(given) + 1]


_REST = Signature(EdgeTerms, HeadMask, Dropout, Switches)
_NO_NEEDS = (False,) * len(PerInput._fields)


def _differentiable(
    call: tuple[Graph, Tensor | None, Logit, Dropout, bool],
    tensors: tuple[Tensor | None, ...],
    upstream: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients from the plain definition."""
    graph, active, logit, dropout, key_is_value = call

    def definition(*tensors: Any) -> tuple[Tensor, ...]:
        inputs, terms = Inputs(*tensors[:3]), EdgeTerms(*tensors[3:])
        return define(inputs, terms, active, graph, logit, dropout, key_is_value)

    return differentiable_gradients(definition, tensors, upstream, needs)


def _plan(impl: Impl, graph: Graph, inputs: Inputs, more_than_bias: bool) -> Plan:
    if impl == "triton":
        q, _, v = inputs
        width = max(q.shape[2], v.shape[2])
        plan = graph.plan_for(width, q.dtype, more_than_bias=more_than_bias)
        if plan.height and plan.height > (height := tallest(width, q.element_size())):
            other = f"a height of {height}" if height else "path='gather'"
            raise RuntimeError(
                f"path {plan.path!r} with height {plan.height} does not fit on a processor with "
                f"heads of width {width} in {q.dtype}: plan for {other}"
            )
        return plan
    if graph.settled is not None and graph.settled.height:
        raise RuntimeError(
            f"the graph is planned for {graph.settled.path!r}, which impl='cpp' on a CPU does "
            "not have: use graph.plan() there"
        )
    return CPU

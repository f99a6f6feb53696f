"""additive_attention: public function -> checks -> autograd -> registered ops -> launchers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from fastgt import reference
from fastgt.contract import (
    AdditiveInputs,
    AdditiveLogit,
    AdditiveNeeds,
    AdditiveResults,
    AdditiveTerms,
    AdditiveUpstream,
    Aux,
    AuxRequest,
    Dropout,
    HeadMask,
    RowWalk,
    Walks,
)
from fastgt.graph import Graph
from fastgt.ops.additive_edges import attribute_gradients, with_product
from fastgt.ops.aux_request import check_request
from fastgt.ops.checks import (
    accumulator,
    autocast,
    autocasts,
    check_attention,
    check_edge_attr,
    check_edge_tensor,
    check_numbers,
    edge_dropout,
    largest,
    needs_gradient,
    number,
    refuse_forward_mode,
)
from fastgt.ops.head_mask import check_head_gate, gated, masked_aux, node_mask
from fastgt.ops.implementation import Impl, require_triton, resolve_impl
from fastgt.ops.registration import register
from fastgt.ops.second_order import differentiable_gradients
from fastgt.ops.walks import CPU, GATHER, column_walk, row_walk
from fastgt.philox import DropoutSeed
from fastgt.shard import Roles, Shard
from fastgt.signature import Signature


@overload
def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph | Shard,
    weight: Tensor,
    *,
    edge_key: Tensor | None = ...,
    edge_attr: Tensor | None = ...,
    edge_key_weight: Tensor | None = ...,
    edge_bias: Tensor | None = ...,
    negative_slope: float = ...,
    dropout_p: float = ...,
    dropout_seed: int | Tensor | DropoutSeed | None = ...,
    head_gate: Tensor | None = ...,
    dense_gate_grad: bool = ...,
    return_aux: None = ...,
    impl: Impl | None = ...,
) -> Tensor: ...


@overload
def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph | Shard,
    weight: Tensor,
    *,
    edge_key: Tensor | None = ...,
    edge_attr: Tensor | None = ...,
    edge_key_weight: Tensor | None = ...,
    edge_bias: Tensor | None = ...,
    negative_slope: float = ...,
    dropout_p: float = ...,
    dropout_seed: int | Tensor | DropoutSeed | None = ...,
    head_gate: Tensor | None = ...,
    dense_gate_grad: bool = ...,
    return_aux: AuxRequest,
    impl: Impl | None = ...,
) -> tuple[Tensor, Aux]: ...


def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph | Shard,
    weight: Tensor,
    *,
    edge_key: Tensor | None = None,
    edge_attr: Tensor | None = None,
    edge_key_weight: Tensor | None = None,
    edge_bias: Tensor | None = None,
    negative_slope: float = 0.2,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | DropoutSeed | None = None,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
    return_aux: AuxRequest | None = None,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Aux]:
    """Attention of every node over its neighbours by a leaky ReLU of sums, as GAT and GATv2 have.

    For row (query) i and its columns (keys) j, head by head::

        t_ij  = q_i + k_j + edge_key_ij + edge_attr_ij @ edge_key_weight      [D]
        s_ij  = sum_d weight_d leaky_relu(t_ij)_d + edge_bias_ij
        a_ij  = exp(s_ij) / sum_j exp(s_ij)
        out_i = gate sum_j dropout(a_ij) v_j

    GATv2 is this with v = k. GAT is this with D = 1: q and k are the products of its attention
    vectors with the nodes' channels, and the weight is 1.

    A row without edges, or whose logits are all -inf, gives exactly 0, an LSE of -inf and zero
    gradients. Duplicate edges count as often as they stand. NaN and infinities reach only the
    rows that attend to them. The result is the same, bit for bit, every time; gradients too, but
    not those of ``create_graph=True``, which PyTorch sums.

    Args:
        q: ``[N_rows, H, D]``, float16, bfloat16, float32 or float64. Any strides.
        k: ``[N_cols, H, D]``. It has the heads of q: no two query heads share one.
        v: ``[N_cols, H, Dv]``. D and Dv from 1 to 256, and either may be the larger one.
        graph: Who attends to whom.
        weight: ``[H, D]``, in q's dtype as all tensors below.
        edge_key: ``[E, H, D]``, added to the keys, in the caller's edge order.
        edge_attr: ``[E, C]``, C from 1 to 256, with ``edge_key_weight [C, H, D]``: the low-rank
            form of an edge key. On a CPU nothing of size E H D is made of it. Triton's kernels
            take the product as an edge key: it and, where it is asked for, its gradient are each
            of size E H D.
        edge_bias: ``[E, H]``, added to the logits.
        negative_slope: What t below 0 is multiplied with. At 0 its derivative is the slope.
        dropout_p, dropout_seed: As in :func:`fastgt.neighborhood_attention`.
        head_gate, dense_gate_grad: As in :func:`fastgt.neighborhood_attention`.
        return_aux: What to give beside the output. ``AuxRequest(lse=True)``: ``lse_i = log sum_j
            exp(s_ij)``, natural, ``[N_rows, H]`` in float32 (float64 for float64), with its
            gradient. ``AuxRequest(weights=True)``: ``a_ij``, ``[E, H]`` in the caller's edge
            order, before dropout, without gradient.
        impl: As in :func:`fastgt.neighborhood_attention`.

    Returns:
        ``[N_rows, H, Dv]`` in q's dtype; with ``return_aux``, ``(out, Aux)``. Sums are kept in
        float32 (float64 for float64). Memory is O(N + E H), but for tensors of size E H D that
        are given or asked for. Under ``torch.autocast`` the inputs are cast first. Second
        derivatives go through the plain definition, with its O(E H D) memory; ``torch.func``
        transforms and forward-mode derivatives need ``impl="reference"``.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.
        RuntimeError: ``impl`` cannot run here.

    Source:
        Brody et al., arXiv 2105.14491, eq. 7 (GATv2). With D = 1 Velickovic et al., arXiv
        1710.10903, eq. 3 (GAT). Their common ancestor is Bahdanau et al., arXiv 1409.0473.

    Example:
        >>> import torch
        >>> from fastgt import Graph, additive_attention
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> target, source = torch.randn(2, 3, 4, 16)
        >>> additive_attention(target, source, source, graph, torch.randn(4, 16)).shape
        torch.Size([3, 4, 16])
    """
    if isinstance(graph, Shard):
        return graph.run(additive_attention, _ROLES, locals())
    request = check_request("additive_attention", return_aux, "lse", "weights")
    inputs = AdditiveInputs(q, k, v, weight)
    terms = AdditiveTerms(edge_key, edge_attr, edge_key_weight, edge_bias)
    if isinstance(q, Tensor) and autocasts(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        inputs = AdditiveInputs(*(autocast(x, dtype) for x in inputs))
        terms = AdditiveTerms(*(None if x is None else autocast(x, dtype) for x in terms))
    _check(inputs, terms, graph)
    q = inputs.q
    slope, dropout_p = number("negative_slope", negative_slope), number("dropout_p", dropout_p)
    check_numbers(q, None, 0.0, dropout_p)
    if not abs(slope) <= largest(q):
        raise ValueError(f"negative_slope must be finite, got {slope} for {q.dtype}")
    mask = active = HeadMask()
    if head_gate is not None:
        check_head_gate(head_gate, q.shape[1], q.device, graph.num_graphs)
        active = node_mask(head_gate, graph)
        dense_gate_grad = dense_gate_grad and head_gate.dtype != torch.bool
        mask = mask if dense_gate_grad else active
    dropout = Dropout()
    if dropout_p or dropout_seed is not None:
        dropout = edge_dropout(dropout_p, dropout_seed, graph.num_edges, q.device)
    impl = resolve_impl(impl, q)
    o, aux = _attend(inputs, terms, mask, graph, slope, dropout, request, impl)
    if head_gate is not None:
        o = gated(o, head_gate, graph.graph_ptr, dense_gate_grad, impl)
        aux = masked_aux(aux, active, graph) if dense_gate_grad else aux
    return o if return_aux is None else (o, aux)


_ROLES = Roles(("q",), ("k", "v"), ("edge_key", "edge_attr", "edge_bias"))


def _check(inputs: AdditiveInputs, terms: AdditiveTerms, graph: Graph) -> None:
    q, k, v, weight = inputs
    check_attention(q, k, v, graph)
    (_, heads, width), edges = q.shape, graph.num_edges
    if k.shape[1] != heads:
        raise ValueError(
            f"k has {k.shape[1]} heads but q has {heads}: in additive_attention no heads are shared"
        )
    check_edge_tensor("weight", weight, q, "H, D", heads, width)
    if terms.key is not None:
        check_edge_tensor("edge_key", terms.key, q, "E, H, D", edges, heads, width)
    if terms.bias is not None:
        check_edge_tensor("edge_bias", terms.bias, q, "E, H", edges, heads)
    if terms.attr is not None and terms.key_weight is None:
        raise ValueError("edge_attr needs edge_key_weight, which is None")
    check_edge_attr(terms.attr, terms.key_weight, None, q, v, edges)


def _attend(
    inputs: AdditiveInputs,
    terms: AdditiveTerms,
    mask: HeadMask,
    graph: Graph,
    slope: float,
    dropout: Dropout,
    request: AuxRequest,
    impl: Impl,
) -> tuple[Tensor, Aux]:
    if impl == "reference":
        call = mask.rows, graph, slope, dropout, request
        return reference.masked_additive_attention(inputs, terms, *call)
    given = [x for x in (*inputs, *terms) if x is not None]
    refuse_forward_mode(*given)
    if torch.compiler.is_compiling():
        # Dynamo refuses one tensor in two places of a Function, as where v is k
        q, *others = inputs
        inputs = AdditiveInputs(q, *(x.view_as(x) for x in others))
        terms = AdditiveTerms(*(None if x is None else x.view_as(x) for x in terms))
        mask = HeadMask(mask.rows, None if mask.cols is None else mask.cols.view_as(mask.cols))
    plan = CPU if impl == "cpp" else GATHER
    rows = row_walk(graph, plan)
    if needs_gradient(*given):
        # Triton's kernels go through columns for whatever stands on edges, too
        of_columns = inputs[1:3] if impl == "cpp" else given[1:]
        by_column = any(x.requires_grad for x in of_columns)
        walks = Walks(rows, column_walk(graph, plan) if by_column else ())
        call_ = _Call(graph, impl, walks, slope, dropout[2:], request.weights)
        o, lse, weights = _AdditiveAttention.apply(call_, *inputs, *terms, *mask, *dropout[:2])
    else:
        flat = *inputs, rows, slope, *terms, *mask, *dropout, request.weights
        o, lse, weights = _fwd(impl, *flat)
    return o, Aux(lse if request.lse else None, weights)


class _Call(NamedTuple):
    """What goes through autograd as it is."""

    graph: Graph
    impl: Impl
    walks: Walks
    slope: float
    dropout: tuple[Any, ...]  # its probability and first head
    make_weights: bool


class _AdditiveAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, weight, *rest = tensors
        flat = q, k, v, weight, call.walks.row_walk, call.slope, *rest
        o, lse, weights = _fwd(call.impl, *flat, *call.dropout, call.make_weights)
        ctx.call = call
        ctx.save_for_backward(*tensors, lse)
        ctx.mark_non_differentiable(*[] if weights is None else [weights])
        ctx.set_materialize_grads(False)
        return o, lse, weights

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None) -> tuple:
        call, (*tensors, lse) = ctx.call, ctx.saved_tensors
        inputs, rest = AdditiveInputs(*tensors[:4]), tensors[4:]
        needs = AdditiveNeeds(*ctx.needs_input_grad[1:9])
        grads: Sequence[Tensor | None]
        if torch.is_grad_enabled():
            # create_graph=True: the gradient must itself be differentiable
            active, _, seed, numbers = rest[4:]

            def define(*tensors: Any) -> tuple[Tensor, Tensor]:
                o, aux = reference.masked_additive_attention(
                    AdditiveInputs(*tensors[:4]),
                    AdditiveTerms(*tensors[4:]),
                    active,
                    call.graph,
                    call.slope,
                    Dropout(seed, numbers, *call.dropout),
                    AuxRequest(lse=True),
                )
                assert aux.lse is not None
                return o, aux.lse

            grads = differentiable_gradients(define, tensors[:8], [do, dlse], needs)
        else:
            if do is None:
                do = inputs.q.new_zeros(()).expand(*inputs.q.shape[:2], inputs.v.shape[2])
            upstream = AdditiveUpstream(do, dlse, lse)
            flat = *upstream, *inputs, *call.walks, call.slope, *needs, *rest, *call.dropout
            grads = _bwd(call.impl, *flat)
        return None, *grads, None, None, None, None


def _launch_fwd(
    impl: str,
    inputs: AdditiveInputs,
    walk: RowWalk,
    logit: AdditiveLogit,
    terms: AdditiveTerms,
    mask: HeadMask,
    dropout: Dropout,
    results: AdditiveResults,
) -> tuple[Tensor | None, ...]:
    call, options = (walk.row_walk, inputs, logit.slope), (mask, dropout, results.make_weights)
    with torch.no_grad():  # called by an exported module, gradients may be on
        if impl == "cpp":
            from fastgt.cpu import additive_attention as cpu

            return cpu.additive_attention_fwd(*call, terms, *options)
        require_triton(inputs.q)
        from fastgt.kernels import additive_attention as kernels

        return kernels.additive_attention_fwd(*call, with_product(terms, mask), *options)


def _fake_fwd(
    inputs: AdditiveInputs,
    walk: RowWalk,
    logit: AdditiveLogit,
    terms: AdditiveTerms,
    mask: HeadMask,
    dropout: Dropout,
    results: AdditiveResults,
) -> tuple[Tensor | None, ...]:
    q, _, v, _ = inputs
    n, heads, _ = q.shape
    return (
        q.new_empty(n, heads, v.shape[2]),
        q.new_empty(n, heads, dtype=accumulator(q)),
        q.new_empty(walk.row_walk[1].shape[0], heads) if results.make_weights else None,
    )


def _launch_bwd(
    impl: str,
    upstream: AdditiveUpstream,
    inputs: AdditiveInputs,
    walks: Walks,
    logit: AdditiveLogit,
    needs: AdditiveNeeds,
    terms: AdditiveTerms,
    mask: HeadMask,
    dropout: Dropout,
) -> tuple[Tensor | None, ...]:
    with torch.no_grad():
        if impl == "cpp":
            from fastgt.cpu import additive_attention as cpu

            call = walks, upstream, inputs, logit.slope, needs, terms, mask, dropout
            return cpu.additive_attention_bwd(*call)
        from fastgt.kernels import additive_attention_backward as kernels

        attributes = needs.need_attr or needs.need_key_weight
        wanted = needs._replace(need_key=needs.need_key or attributes)
        whole = with_product(terms, mask)
        call = walks, upstream, inputs, logit.slope, wanted, whole, mask, dropout
        *grads, dkey, dbias = kernels.additive_attention_bwd(*call)
        of_attr: list[Tensor | None] = [None, None]
        if attributes:
            of_attr = attribute_gradients(dkey, terms, mask, needs)
        if dkey is not None and terms.key is not None:
            dkey = dkey.to(terms.key.dtype)
        return *grads, dkey if needs.need_key else None, *of_attr, dbias


def _fake_bwd(
    upstream: AdditiveUpstream,
    inputs: AdditiveInputs,
    walks: Walks,
    logit: AdditiveLogit,
    needs: AdditiveNeeds,
    terms: AdditiveTerms,
    mask: HeadMask,
    dropout: Dropout,
) -> tuple[Tensor | None, ...]:
    given = zip((*inputs, *terms), needs, strict=True)
    return tuple(x.new_empty(x.shape) if need and x is not None else None for x, need in given)


FORWARD = Signature(
    AdditiveInputs, RowWalk, AdditiveLogit, AdditiveTerms, HeadMask, Dropout, AdditiveResults
)
BACKWARD = Signature(
    AdditiveUpstream,
    AdditiveInputs,
    Walks,
    AdditiveLogit,
    AdditiveNeeds,
    AdditiveTerms,
    HeadMask,
    Dropout,
)
_fwd = register(
    "additive_attention_fwd",
    FORWARD,
    "(Tensor o, Tensor lse, Tensor? weights)",
    launch=_launch_fwd,
    fake=_fake_fwd,
)
_bwd = register(
    "additive_attention_bwd",
    BACKWARD,
    "(Tensor? dq, Tensor? dk, Tensor? dv, Tensor? dweight, Tensor? dkey, Tensor? dattr,"
    " Tensor? dkey_weight, Tensor? dbias)",
    launch=_launch_bwd,
    fake=_fake_bwd,
)

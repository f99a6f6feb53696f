"""neighborhood_attention with vectors on edges, gates, attributes, dropout or edge scores: what
``attention.py`` is for queries, keys, values and a bias, from autograd to launchers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgt import reference
from fastgt.graph import Graph
from fastgt.ops.checks import (
    accumulator,
    autocast,
    check_edge_attr,
    check_edge_tensor,
    check_gate,
)
from fastgt.ops.implementation import require_triton
from fastgt.ops.wide_product import wide_product
from fastgt.philox import LEVELS, kept, threshold

_Settings = tuple[float, float, float, float]  # scale, low, high, eps


def edge_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    on_rows: Tensor | None,
    on_cols: Tensor | None,
    edges: dict[str, Tensor | None],
    walks: tuple[Graph, str, tuple[Tensor, ...], tuple[Tensor, ...]],
    settings: _Settings,
    dropout: float,
    seed: Tensor | None,
    return_weights: bool,
    return_scores: bool,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> o, lse, weights, edge scores.

    The low-rank form becomes one more row vector, ``attr_q = W_k q [N, H, C]``, whose product with
    an edge's attributes joins the logit, and one more output, the weighted sum of the attributes.
    """
    gate, key, value, attr, key_weight, value_weight = edges.values()
    shared = value is key and key is not None
    graph, path, rows, _ = walks
    if on_rows is not None:
        # what is masked everywhere takes no part in the products below: 0 * NaN is not 0
        on = on_rows.any(0)[:, None]
        key_weight, value_weight = (
            None if x is None else x.masked_fill(~on, 0) for x in (key_weight, value_weight)
        )
    attr_q = None
    if attr is not None and key_weight is not None:
        if return_scores or (gate is not None and gate.ndim == 3):
            # channel by channel: beside a tensor of that size
            flat = key_weight.flatten(1)[None]  # [1, C, H D]
            made = wide_product(attr[:, None], flat).unflatten(2, key_weight.shape[1:])[:, 0]
            key, shared = made if key is None else key + made, False
        else:
            # 0 in the place of what rows without edges hold, NaN perhaps, and of its gradient
            alone = (graph.row_degree == 0)[:, None, None]
            alone = alone if on_rows is None else alone | ~on_rows[..., None]
            by_head = key_weight.permute(1, 2, 0)  # [H, D, C]
            attr_q = _narrow(wide_product(q.masked_fill(alone, 0), by_head), q)
    weigh_attr = value_weight is not None
    if attr_q is None and not weigh_attr:
        attr = None
    terms = [gate, key, None if shared else value, attr, attr_q]
    if torch.compiler.is_compiling():
        bias, *terms = (None if x is None else x.view_as(x) for x in (bias, *terms))
    # a logit of several products is kept on a CPU, which makes it anew more slowly than it reads it
    simple = gate is None and not return_scores and settings[1:3] == (-math.inf, math.inf)
    keep = path == "torch" and differentiable and simple and (attr is not None or key is not None)
    flags = dropout, shared, return_weights, return_scores, weigh_attr, keep
    if differentiable:
        found = _EdgeAttention.apply(
            q, k, v, bias, *terms, seed, on_rows, on_cols, walks, settings, flags
        )
    else:
        found = _fwd(path, q, k, v, bias, *terms, seed, on_rows, rows, *settings, *flags)
    o, lse, weights, scores, attr_o, _ = found
    if value_weight is not None:
        projected = wide_product(attr_o, value_weight.transpose(0, 1))
        projected = projected.masked_fill((lse.detach() == -torch.inf)[..., None], 0)
        o = projected.add_(o).to(q.dtype)
    return o, lse, weights, scores


def autocast_edges(edges: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Cast each; one tensor in two places stays one."""
    cast = {name: None if x is None else autocast(x, dtype) for name, x in edges.items()}
    if edges and edges["edge_value"] is edges["edge_key"]:
        cast["edge_value"] = cast["edge_key"]
    return cast


def check_edges(
    q: Tensor,
    v: Tensor,
    edges: int,
    *,
    edge_gate: Tensor | None,
    edge_key: Tensor | None,
    edge_value: Tensor | None,
    edge_attr: Tensor | None,
    edge_key_weight: Tensor | None,
    edge_value_weight: Tensor | None,
) -> None:
    heads = q.shape[1]
    if edge_gate is not None:
        check_gate(edge_gate, q, edges)
    if edge_key is not None:
        check_edge_tensor("edge_key", edge_key, q, "E, H, D", edges, heads, q.shape[2])
    if edge_value is not None:
        check_edge_tensor("edge_value", edge_value, q, "E, H, Dv", edges, heads, v.shape[2])
    check_edge_attr(edge_attr, edge_key_weight, edge_value_weight, q, v, edges)


def _narrow(x: Tensor, like: Tensor) -> Tensor:
    """Row vectors that kernels gather for every edge: in bfloat16 where the inputs are, whose range
    is float32's; float16 could overflow."""
    return x.to(like.dtype) if like.dtype == torch.bfloat16 else x


class _EdgeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        key: Tensor | None,
        value: Tensor | None,
        attr: Tensor | None,
        attr_q: Tensor | None,
        seed: Tensor | None,
        on_rows: Tensor | None,
        on_cols: Tensor | None,
        walks: tuple[Graph, str, tuple[Tensor, ...], tuple[Tensor, ...]],
        settings: _Settings,
        flags: tuple[float, bool, bool, bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        terms = [gate, key, value, attr, attr_q, seed, on_rows]
        _, path, rows, _ = walks
        found = _fwd(path, q, k, v, bias, *terms, rows, *settings, *flags)
        ctx.save_for_backward(q, k, v, bias, *terms, on_cols, found[1], found[5])
        ctx.walks, ctx.settings, ctx.flags = walks, settings, flags
        ctx.mark_non_differentiable(found[2], found[5])
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(
        ctx: Any, do: Any, dlse: Any, _: None, dscores: Any, dattr_o: Any, __: None
    ) -> tuple:
        q, k, v, bias, *terms, lse, exps = ctx.saved_tensors
        graph, path, rows, columns = ctx.walks
        *terms, seed, on_rows, on_cols = terms
        dropout, shared, _, return_scores, weigh_attr, keep = ctx.flags
        needs = ctx.needs_input_grad[:9]
        upstream = [do, dlse, dscores if return_scores else None, dattr_o if weigh_attr else None]
        if upstream[3] is not None:
            upstream[3] = _narrow(upstream[3], q)
        if torch.is_grad_enabled():
            grads = reference_grads(
                upstream,
                [q, k, v, bias, *terms],
                needs,
                graph,
                ctx.settings,
                on_rows,
                dropout,
                seed,
                shared,
            )
        else:
            if do is None:
                upstream[0] = q.new_zeros(()).expand(*q.shape[:2], v.shape[2])
            kept = lse, exps if keep else None
            inputs = q, k, v, bias, *terms, seed, on_rows, on_cols, *kept, rows, columns
            found = _bwd(path, *upstream, *inputs, *ctx.settings, dropout, shared, needs)
            grads = [x if need else None for x, need in zip(found, needs, strict=True)]
        return (*grads, *[None] * 6)


def reference_grads(
    upstream: Sequence[Tensor | None],
    inputs: Sequence[Any],
    needs: Sequence[bool],
    graph: Graph,
    settings: _Settings,
    active: Tensor | None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    shared: bool = False,
) -> list[Tensor | None]:
    """Gradients that are differentiable themselves, for ``create_graph=True``.

    Of ``inputs`` q, k, v, bias, gate, key, value, attr, attr_q, for ``upstream`` gradients of o,
    lse, edge scores and the weighted attributes; what is left out at the end is absent.
    """
    # aliases: where k was made from q, the partial derivatives are asked for, not the total ones
    aliases = [None if x is None else x.view_as(x) for x in inputs]
    # the sums of the plain definition are in its inputs' precision
    wide = accumulator(inputs[0])
    cast: list[Any] = [None if x is None else x.to(wide) for x in aliases]
    q, k, v, bias, gate, key, value, attr, attr_q = cast + [None] * (9 - len(cast))
    d, dv, heads = q.shape[2], v.shape[2], q.shape[1]
    if shared:
        value = key
    if attr is not None:
        # attributes are channels of their own: beside zeros of k and v, in place of edge vectors
        attr = attr[:, None].expand(-1, heads, -1)
        if attr_q is not None:
            key, k = _beside(key, attr, d), _beside(k, None, attr.shape[2])
            q = torch.cat([q, attr_q], 2)
        value, v = _beside(value, attr, dv), _beside(v, None, attr.shape[2])
    scale, low, high, eps = settings
    found = reference.neighborhood_attention(
        q,
        k,
        v,
        graph,
        scale=scale,
        edge_bias=bias,
        edge_gate=gate,
        edge_key=key,
        edge_value=value,
        logit_clamp=(low, high),
        denominator_eps=eps,
        dropout_p=dropout,
        dropout_seed=seed,
        return_lse=True,
        return_edge_scores=True,
        active=active,
    )
    o, lse, scores = found
    outputs = o[..., :dv], lse, scores[..., :d], o[..., dv:]
    wanted = [x for x, need in zip(aliases, needs, strict=True) if need and x is not None]
    # the LSE does not depend on v: it may have no gradient at all
    pairs = [
        (y, dy.to(wide))
        for y, dy in zip(outputs, upstream, strict=False)
        if dy is not None and y.requires_grad
    ]
    grads: Iterator[Tensor]
    if pairs:
        ys, dys = zip(*pairs, strict=True)
        grads = iter(
            torch.autograd.grad(ys, wanted, dys, create_graph=True, materialize_grads=True)
        )
    else:
        grads = map(torch.zeros_like, wanted)
    return [next(grads) if need else None for need in needs]


def _beside(x: Tensor | None, other: Tensor | None, width: int) -> Tensor:
    """[..., width of x + width of other]: zeros where one is absent, ``width`` of them."""
    if x is None:
        assert other is not None
        return torch.nn.functional.pad(other, (width, 0))
    if other is None:
        return torch.nn.functional.pad(x, (0, width))
    return torch.cat([x, other], 2)


# needs are those of q, k, v, the bias, gate, key, value, attr and attr_q; ``shared``: the key is
# the value too. No list of optional tensors: PyTorch would not resolve lazily negated ones in it.
_NUMBERS = "float scale, float low, float high, float eps, float dropout, bool shared"
torch.library.define(
    "fastgt::attention_edges_fwd",
    "(str path, Tensor q, Tensor k, Tensor v, Tensor? edge_bias, Tensor? gate, Tensor? key,"
    " Tensor? value, Tensor? attr, Tensor? attr_q, Tensor? seed, Tensor? on_rows, Tensor[] rows,"
    f" {_NUMBERS}, bool return_weights, bool return_scores, bool weigh_attr, bool keep)"
    " -> (Tensor o, Tensor lse, Tensor weights, Tensor scores, Tensor attr_o, Tensor exps)",
)
torch.library.define(
    "fastgt::attention_edges_bwd",
    "(str path, Tensor do, Tensor? dlse, Tensor? dscores, Tensor? dattr_o, Tensor q, Tensor k,"
    " Tensor v, Tensor? edge_bias, Tensor? gate, Tensor? key, Tensor? value, Tensor? attr,"
    " Tensor? attr_q, Tensor? seed, Tensor? on_rows, Tensor? on_cols, Tensor lse, Tensor? exps,"
    f" Tensor[] rows, Tensor[] columns, {_NUMBERS}, bool[] needs) -> Tensor[]",
)


@torch.library.register_fake("fastgt::attention_edges_fwd")
def _(path, q, k, v, edge_bias, gate, key, value, attr, attr_q, seed, on_rows, rows, *rest):  # type: ignore[no-untyped-def]
    return_weights, return_scores, weigh_attr, keep = rest[-4:]
    n, heads, d = q.shape
    edges, wide = rows[1].shape[0], accumulator(q)
    return (
        q.new_empty(n, heads, v.shape[2]),
        q.new_empty(n, heads, dtype=wide),
        q.new_empty(edges if return_weights else 0, heads),
        q.new_empty(edges if return_scores else 0, heads, d),
        q.new_empty(n, heads, attr.shape[1] if weigh_attr else 0, dtype=wide),
        q.new_empty(heads, edges if keep else 0, dtype=wide),
    )


@torch.library.register_fake("fastgt::attention_edges_bwd")
def _(path, do, dlse, dscores, dattr_o, *rest):  # type: ignore[no-untyped-def]
    inputs, needs = rest[:9], rest[-1]
    q = inputs[0]
    return [
        q.new_empty(0) if x is None or not need else x.new_empty(x.shape)
        for x, need in zip(inputs, needs, strict=True)
    ]


def _launch_fwd(
    path: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Any,
    gate: Any,
    key: Any,
    value: Any,
    attr: Any,
    attr_q: Any,
    seed: Any,
    on_rows: Any,
    rows: Any,
    scale: float,
    low: float,
    high: float,
    eps: float,
    dropout: float,
    shared: bool,
    return_weights: bool,
    return_scores: bool,
    weigh_attr: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    terms = gate, key, value, attr, attr_q, seed
    extras: Any = return_weights, return_scores, weigh_attr
    numbers: Any = scale, low, high, eps
    if path == "torch":
        from fastgt.cpu import attention

        on_edges = _cpu_terms(
            attention.Terms, terms, dropout, shared, (rows[1].shape[0], q.shape[1])
        )
        extras = return_weights, on_edges, return_scores, weigh_attr, keep
        return attention.attention_fwd(q, k, v, bias, on_rows, *rows, *numbers, *extras)
    require_triton(q)
    from fastgt.kernels.attention import attention_edges_fwd

    inputs = q, k, v, bias, on_rows, terms
    found = attention_edges_fwd(*inputs, rows, *numbers, dropout, shared, *extras)
    return *found, found[1].new_empty(q.shape[1], 0)


def _launch_bwd(
    path: str,
    do: Tensor,
    dlse: Any,
    dscores: Any,
    dattr_o: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Any,
    gate: Any,
    key: Any,
    value: Any,
    attr: Any,
    attr_q: Any,
    seed: Any,
    on_rows: Any,
    on_cols: Any,
    lse: Tensor,
    exps: Any,
    rows: Any,
    columns: Any,
    scale: float,
    low: float,
    high: float,
    eps: float,
    dropout: float,
    shared: bool,
    needs: Any,
) -> list[Tensor]:
    terms = gate, key, value, attr, attr_q, seed
    numbers: Any = scale, low, high, eps
    inputs = q, k, v, bias, on_rows
    if path == "torch":
        from fastgt.cpu import attention

        on_edges = _cpu_terms(
            attention.Terms, terms, dropout, shared, (rows[1].shape[0], q.shape[1])
        )
        walks: Any = (*rows, *columns)
        extras: Any = needs, on_edges, dscores, dattr_o, exps
        return attention.attention_bwd(do, dlse, *inputs, lse, *walks, *numbers, *extras)
    from fastgt.kernels.attention_backward import attention_edges_bwd

    upstream = do, dlse, dscores, dattr_o
    walks = lse, rows, columns
    return attention_edges_bwd(
        *upstream, *inputs, on_cols, terms, *walks, *numbers, dropout, shared, needs
    )


def _cpu_terms(
    make: Any, terms: tuple[Any, ...], dropout: float, shared: bool, shape: tuple[int, int]
) -> Any:
    gate, key, value, attr, attr_q, seed = terms
    keep = None if seed is None else kept(seed, *shape, dropout)
    growth = LEVELS / max(1, LEVELS - threshold(dropout))
    return make(gate, key, key if shared else value, attr, attr_q, keep, growth)


torch.library.impl("fastgt::attention_edges_fwd", "CompositeExplicitAutograd", _launch_fwd)
torch.library.impl("fastgt::attention_edges_bwd", "CompositeExplicitAutograd", _launch_bwd)

_fwd = torch.ops.fastgt.attention_edges_fwd.default
_bwd = torch.ops.fastgt.attention_edges_bwd.default

"""neighborhood_attention: public function -> checks -> autograd -> registered ops -> launchers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastgt import reference
from fastgt.graph import Graph
from fastgt.ops._impl import Impl, choose, require_triton
from fastgt.tiles import MAX_WIDTH, Plan, tallest


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph,
    *,
    scale: float | None = None,
    edge_bias: Tensor | None = None,
    logit_clamp: float | tuple[float, float] | None = None,
    denominator_eps: float = 0.0,
    return_lse: bool = False,
    return_weights: bool = False,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Softmax attention of every node over its neighbours.

    For row (query) i and its columns (keys) j, head by head::

        s_ij  = clamp(scale * q_i . k_j, low, high) + edge_bias_ij
        a_ij  = exp(s_ij) / (sum_j exp(s_ij) + eps)
        out_i = sum_j a_ij v_j

    A row without edges, or whose logits are all -inf, gives exactly 0, an LSE of -inf and zero
    gradients. Duplicate edges count as often as they stand. NaN and infinities reach only the
    rows that attend to them. The result is the same, bit for bit, every time; gradients too.

    Args:
        q: ``[N_rows, H, D]``, float16, bfloat16, float32 or float64. Any strides.
        k: ``[N_cols, H_kv, D]``; H_kv divides H, query head h reads key head h // (H / H_kv).
        v: ``[N_cols, H_kv, Dv]``. D and Dv from 1 to 256.
        graph: Who attends to whom.
        scale: Default ``1 / sqrt(D)``. A number; to learn it, multiply q by it.
        edge_bias: ``[E, H]`` in the caller's edge order, in q's dtype; receives a gradient.
        logit_clamp: ``(low, high)``, or c for ``(-c, c)``. Outside it the gradient is 0.
        denominator_eps: eps above, relative to logits as they are (no maximum subtracted).
        return_lse: Also give ``lse_i = log sum_j exp(s_ij)``, natural, ``[N_rows, H]`` in
            float32 (float64 for float64), with its gradient. eps is not part of it.
        return_weights: Also give ``a_ij``, ``[E, H]`` in the caller's edge order, without
            gradient.
        impl: ``"triton"`` (GPU), ``"torch"`` (CPU), ``"reference"`` (plain definition,
            O(E H D) memory), or None to follow the device.

    Returns:
        ``[N_rows, H, Dv]`` in q's dtype, followed by lse and weights where asked for.
        Sums are kept in float32 (float64 for float64). Memory is O(N + E H). Under
        ``torch.autocast`` the inputs are cast first, as for
        ``torch.nn.functional.scaled_dot_product_attention``. Second derivatives go through the
        plain definition, with its memory. ``torch.func`` transforms and forward-mode derivatives
        need ``impl="reference"``; a model exported by ``torch.export`` is for inference.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.
        RuntimeError: ``impl``, or the graph's plan, cannot run here.

    Source:
        Vaswani et al., arXiv 1706.03762, eq. 1, over neighbourhoods; with ``logit_clamp=5``
        Dwivedi and Bresson, arXiv 2012.09699, eqs. 3-5.

    Example:
        >>> import torch
        >>> from fastgt import Graph, neighborhood_attention
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> q, k, v = torch.randn(3, 3, 4, 16)
        >>> neighborhood_attention(q, k, v, graph).shape
        torch.Size([3, 4, 16])
    """
    if isinstance(q, Tensor) and _autocasts(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (_autocast(x, dtype) for x in (q, k, v))
        edge_bias = None if edge_bias is None else _autocast(edge_bias, dtype)
    low, high = _clamp_bounds(logit_clamp)
    scale = None if scale is None else _number("scale", scale)
    denominator_eps = _number("denominator_eps", denominator_eps)
    _check(q, k, v, graph, edge_bias, scale, denominator_eps)
    low, high = (math.inf * x if abs(x) > _largest(q) else x for x in (low, high))
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    impl = choose(impl, q)
    if impl == "reference":
        return reference.neighborhood_attention(
            q,
            k,
            v,
            graph,
            scale=scale,
            edge_bias=edge_bias,
            logit_clamp=None if logit_clamp is None else (low, high),
            denominator_eps=denominator_eps,
            return_lse=return_lse,
            return_weights=return_weights,
        )
    tensors = [x for x in (q, k, v, edge_bias) if x is not None]
    if torch.compiler.is_compiling():
        # Dynamo refuses one tensor in two places of a Function, as in self-attention on x itself
        k, v = k.view_as(k), v.view_as(v)
    elif forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise NotImplementedError("forward-mode derivatives are taken by impl='reference' only")
    plan = _plan(impl, graph, q, v)
    settings = (scale, low, high, denominator_eps)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        rows, columns = _rows(graph, plan), _columns(graph, plan)
        o, lse, weights = _Attention.apply(
            q, k, v, edge_bias, graph, plan, rows, columns, settings, return_weights
        )
    else:
        path, height, _ = plan
        rows = _rows(graph, plan)
        o, lse, weights = _fwd(path, height, q, k, v, edge_bias, rows, *settings, return_weights)
    extras = [x for x, asked in ((lse, return_lse), (weights, return_weights)) if asked]
    return (o, *extras) if extras else o


def _autocasts(device: str) -> bool:
    # meta and other devices without autocast are refused by is_autocast_enabled
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if isinstance(x, Tensor) and x.dtype in (*_HALF, torch.float32) else x


_HALF = (torch.float16, torch.bfloat16)
_FLOATS = (*_HALF, torch.float32, torch.float64)


def _clamp_bounds(logit_clamp: float | tuple[float, float] | None) -> tuple[float, float]:
    if logit_clamp is None:
        return -math.inf, math.inf
    if isinstance(logit_clamp, (tuple, list)):
        if len(logit_clamp) != 2:
            raise ValueError(f"logit_clamp must be (low, high), got {len(logit_clamp)} numbers")
        low, high = (_number("logit_clamp", x) for x in logit_clamp)
    else:
        high = _number("logit_clamp", logit_clamp)
        low = -high
    if not low <= high:
        raise ValueError(f"logit_clamp must have low <= high, got {logit_clamp}")
    return low, high


def _number(name: str, x: object) -> float:
    if not isinstance(x, (int, float)) and (isinstance(x, Tensor) or not hasattr(x, "__float__")):
        hint = ": multiply q by it" if name == "scale" and isinstance(x, Tensor) else ""
        raise TypeError(f"{name} must be a number, got {type(x).__name__}{hint}")
    return float(x)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: Graph,
    edge_bias: Tensor | None,
    scale: float | None,
    eps: float,
) -> None:
    if not isinstance(graph, Graph):
        raise TypeError(f"graph must be a fastgt.Graph, got {type(graph).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a strided tensor, got {x.layout}")
        if x.ndim != 3:
            raise ValueError(f"{name} must be [N, H, D], got {list(x.shape)}")
    others = [("k", k), ("v", v)] + ([] if edge_bias is None else [("edge_bias", edge_bias)])
    for name, x in others:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype} but q is {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}")
    if graph.device != q.device:
        raise ValueError(f"graph is on {graph.device} but q is on {q.device}: use graph.to()")
    rows, heads, width = q.shape
    for name, found, wanted, what in (
        ("q", rows, graph.num_rows, "rows"),
        ("k", k.shape[0], graph.num_cols, "columns"),
        ("v", v.shape[0], graph.num_cols, "columns"),
    ):
        if found != wanted:
            raise ValueError(f"{name} has {found} rows but the graph has {wanted} {what}")
    if k.shape[2] != width:
        raise ValueError(f"k has head width {k.shape[2]} but q has {width}")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v has {v.shape[1]} heads but k has {k.shape[1]}")
    if heads == 0 or k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"q's {heads} heads must be a multiple of k's {k.shape[1]} heads")
    for name, d in (("q", width), ("v", v.shape[2])):
        if not 1 <= d <= MAX_WIDTH:
            raise ValueError(f"{name} has head width {d}; supported are 1 to {MAX_WIDTH}")
    if edge_bias is not None and edge_bias.shape != (graph.num_edges, heads):
        raise ValueError(
            f"edge_bias must be [E, H] = [{graph.num_edges}, {heads}], got {list(edge_bias.shape)}"
        )
    if scale is not None and not abs(scale) <= _largest(q):
        raise ValueError(f"scale must be finite, got {scale} for {q.dtype}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"denominator_eps must be finite and not negative, got {eps}")


def _largest(q: Tensor) -> float:
    return torch.finfo(torch.float64 if q.dtype == torch.float64 else torch.float32).max


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        edge_bias: Tensor | None,
        graph: Graph,
        plan: Plan,
        rows: tuple[Tensor, ...],
        columns: tuple[Tensor, ...],
        settings: tuple[float, float, float, float],
        return_weights: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        path, height, _ = plan
        o, lse, weights = _fwd(path, height, q, k, v, edge_bias, rows, *settings, return_weights)
        # only windows need the output: a first guess at the row's mean gradient
        kept = o if height else None
        ctx.save_for_backward(q, k, v, edge_bias, lse, kept)
        ctx.graph, ctx.plan, ctx.rows, ctx.columns = graph, plan, rows, columns
        ctx.settings = settings
        ctx.mark_non_differentiable(weights)
        ctx.set_materialize_grads(False)
        return o, lse, weights

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None) -> tuple:
        q, k, v, edge_bias, lse, o = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():
            # create_graph=True: the gradient must itself be differentiable
            grads = _reference_grads(do, dlse, q, k, v, edge_bias, ctx.graph, ctx.settings, needs)
        else:
            if do is None:
                do = q.new_zeros(()).expand(*q.shape[:2], v.shape[2])
            path, height, _ = ctx.plan
            args = (do, dlse, q, k, v, edge_bias, lse, o, ctx.rows, ctx.columns)
            found = _bwd(path, height, *args, *ctx.settings, *needs)
            grads = [x if need else None for x, need in zip(found, needs, strict=True)]
        return (*grads, None, None, None, None, None, None)


def _reference_grads(
    do: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge_bias: Tensor | None,
    graph: Graph,
    settings: tuple[float, float, float, float],
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    scale, low, high, eps = settings
    # aliases: where k was made from q, the partial derivatives are asked for, not the total ones
    aliases = [None if x is None else x.view_as(x) for x in (q, k, v, edge_bias)]
    # the sums of the plain definition are in its inputs' precision
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    cast: list[Any] = [None if x is None else x.to(wide) for x in aliases]
    q, k, v, bias = cast
    o, lse = reference.neighborhood_attention(
        q,
        k,
        v,
        graph,
        scale=scale,
        edge_bias=bias,
        logit_clamp=(low, high),
        denominator_eps=eps,
        return_lse=True,
    )
    inputs = [x for x, need in zip(aliases, needs, strict=True) if need and x is not None]
    # the LSE does not depend on v: it may have no gradient at all
    both = ((o, None if do is None else do.to(wide)), (lse, dlse))
    pairs = [(y, dy) for y, dy in both if dy is not None and y.requires_grad]
    found: Iterator[Tensor]
    if pairs:
        outputs, upstream = zip(*pairs, strict=True)
        found = iter(
            torch.autograd.grad(
                outputs, inputs, upstream, create_graph=True, materialize_grads=True
            )
        )
    else:
        found = map(torch.zeros_like, inputs)
    return [next(found) if need else None for need in needs]


_CPU = Plan("torch", 0, "")


def _plan(impl: Impl, graph: Graph, q: Tensor, v: Tensor) -> Plan:
    if impl == "triton":
        width = max(q.shape[2], v.shape[2])
        plan = graph.choose(width, q.dtype)
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
    return _CPU


def _rows(graph: Graph, plan: Plan) -> tuple[Tensor, ...]:
    if plan.path == "torch":
        return graph.row_ptr, graph.col, graph.edge
    return graph.row_walk(plan)


def _columns(graph: Graph, plan: Plan) -> tuple[Tensor, ...]:
    return graph.columns if plan.path == "torch" else graph.column_walk(plan)


# path is "torch" (on a CPU) or one of Triton's; rows and columns are what it walks
_SETTINGS = "float scale, float low, float high, float eps"
torch.library.define(
    "fastgt::attention_fwd",
    "(str path, int height, Tensor q, Tensor k, Tensor v, Tensor? edge_bias, Tensor[] rows,"
    f" {_SETTINGS}, bool return_weights) -> (Tensor o, Tensor lse, Tensor weights)",
)
torch.library.define(
    "fastgt::attention_bwd",
    "(str path, int height, Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v,"
    " Tensor? edge_bias, Tensor lse, Tensor? o, Tensor[] rows, Tensor[] columns,"
    f" {_SETTINGS}, bool need_q, bool need_k, bool need_v, bool need_bias)"
    " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
)


@torch.library.register_fake("fastgt::attention_fwd")
def _(path, height, q, k, v, edge_bias, rows, scale, low, high, eps, return_weights):  # type: ignore[no-untyped-def]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
        q.new_empty(q.shape[0], q.shape[1], dtype=wide),
        q.new_empty(rows[1].shape[0] if return_weights else 0, q.shape[1]),
    )


@torch.library.register_fake("fastgt::attention_bwd")
def _(path, height, do, dlse, q, k, v, edge_bias, lse, o, rows, columns, *rest):  # type: ignore[no-untyped-def]
    need_q, need_k, need_v, need_bias = rest[-4:]
    return (
        q.new_empty(q.shape if need_q else (0,)),
        q.new_empty(k.shape if need_k else (0,)),
        q.new_empty(v.shape if need_v else (0,)),
        q.new_empty((rows[1].shape[0], q.shape[1]) if need_bias else (0,)),
    )


def _launch_fwd(
    path: str, height: int, q: Tensor, k: Any, v: Any, edge_bias: Any, rows: Any, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if path == "torch":
        from fastgt.cpu import attention

        return attention.attention_fwd(q, k, v, edge_bias, *rows, *settings)
    require_triton(q)
    if height:
        from fastgt.kernels.attention_windows import windows_fwd

        return windows_fwd(q, k, v, edge_bias, rows, height, path == "graphs", *settings)
    from fastgt.kernels.attention import attention_fwd

    return attention_fwd(q, k, v, edge_bias, rows, *settings)


def _launch_bwd(path: str, height: int, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # do, dlse, q, k, v, edge_bias, lse; o, which only windows need; the walks; the settings
    inputs, (o, rows, columns), settings = args[:7], args[7:10], args[10:]
    if path == "torch":
        from fastgt.cpu import attention

        return attention.attention_bwd(*inputs, *rows, *columns, *settings)
    if height:
        from fastgt.kernels.attention_windows import windows_bwd

        return windows_bwd(*inputs, o, rows, columns, height, path == "graphs", *settings)
    from fastgt.kernels.attention import attention_bwd

    return attention_bwd(*inputs, rows, columns, *settings)


torch.library.impl("fastgt::attention_fwd", "CompositeExplicitAutograd", _launch_fwd)
torch.library.impl("fastgt::attention_bwd", "CompositeExplicitAutograd", _launch_bwd)

_fwd = torch.ops.fastgt.attention_fwd.default
_bwd = torch.ops.fastgt.attention_bwd.default

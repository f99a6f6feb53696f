"""segment_softmax, aggregate, gated_aggregate: public functions -> checks -> autograd -> ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

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
    needs_gradient,
    number,
    refuse_forward_mode,
)
from fastgt.ops.implementation import Impl, require_triton, resolve_impl
from fastgt.ops.second_order import differentiable_gradients
from fastgt.ops.walks import CPU, GATHER, column_walk, row_walk

Reduce = Literal["sum", "mean", "max"]
Activation = Literal["relu"]


def segment_softmax(x: Tensor, graph: Graph, *, impl: Impl | None = None) -> Tensor:
    """Softmax of an edge tensor over the edges of each row, channel by channel.

    For row i and its edges ij::

        y_ij = exp(x_ij) / sum_j exp(x_ij)

    Channels of a row that are all -inf give 0. The result is the same, bit for bit, every time;
    the gradient too, but not that of ``create_graph=True``, which PyTorch sums.

    Args:
        x: ``[E, ...]`` in the caller's edge order: float16, bfloat16, float32 or float64, any
            strides.
        graph: Whose rows the edges belong to.
        impl: As in :func:`fastgt.neighborhood_attention`.

    Returns:
        Like x. Sums are kept in float32 (float64 for float64); beside the result, memory is
        O(N D), D the channels of an edge. Under ``torch.autocast``, x is taken as float32, as
        ``torch.softmax`` does. Second derivatives go through the plain definition.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.
        RuntimeError: ``impl`` cannot run here.

    Source:
        Velickovic et al., arXiv 1710.10903, eq. 2; ``torch_geometric.utils.softmax``.

    Example:
        >>> import torch
        >>> from fastgt import Graph, segment_softmax
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 1, 0]]))
        >>> segment_softmax(torch.zeros(3), graph).tolist()
        [0.5, 0.5, 1.0]
    """
    if isinstance(x, Tensor) and autocasts(x.device.type):
        x = autocast(x, torch.float32)
    _check(graph, x=(x, "edges"))
    impl = resolve_impl(impl, x)
    if impl == "reference":
        return reference.segment_softmax(x, graph)
    refuse_forward_mode(x)
    plan = _PLANS[impl]
    path = plan.path
    args = _flat(x), path, graph, row_walk(graph, plan)
    if torch.is_grad_enabled() and x.requires_grad:
        return _SegmentSoftmax.apply(*args).view(x.shape)
    return _softmax_fwd(path, args[0], args[3]).view(x.shape)


def aggregate(
    x: Tensor | None,
    graph: Graph,
    *,
    reduce: Reduce = "sum",
    edge_value: Tensor | None = None,
    activation: Activation | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Sum, mean or maximum of the messages that every node receives.

    For row i and its columns j, channel by channel::

        m_ij  = activation(x_j + edge_value_ij)
        out_i = sum_j m_ij,   sum_j m_ij / degree_i   or   max_j m_ij

    A row without edges gives exactly 0 and no gradient. Duplicate edges count as often as they
    stand. The gradient of a maximum goes to one edge: to the first of the largest, by the
    caller's numbers. NaN and infinities reach only the rows that use them. The result is the
    same, bit for bit, every time; gradients too, but not those of ``create_graph=True``, which
    PyTorch sums.

    Args:
        x: ``[N_cols, ...]``: float16, bfloat16, float32 or float64, any strides. None where the
            edges alone carry values.
        graph: Who receives from whom.
        reduce: ``"sum"``, ``"mean"`` or ``"max"``.
        edge_value: ``[E, ...]``, as many channels as x, in the caller's edge order and x's dtype.
        activation: None or ``"relu"``.
        impl: As in :func:`fastgt.neighborhood_attention`.

    Returns:
        ``[N_rows, ...]`` in x's dtype. Sums are kept in float32 (float64 for float64). No
        message is stored: memory is O(N D), D the channels, beside the gradient of edge_value.
        Under ``torch.autocast`` the inputs are cast first. Second derivatives go through the
        plain definition, with its O(E D) memory; ``torch.func`` transforms and forward-mode
        derivatives need ``impl="reference"``.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.
        RuntimeError: ``impl`` cannot run here.

    Source:
        With ``edge_value`` and ``"relu"``, the sum in GINE: Hu et al., arXiv 1905.12265, and
        ``torch_geometric.nn.GINEConv``.

    Example:
        >>> import torch
        >>> from fastgt import Graph, aggregate
        >>> graph = Graph.from_edge_index(torch.tensor([[1, 2, 2], [0, 0, 1]]), 3)
        >>> aggregate(torch.tensor([[1.0], [2.0], [3.0]]), graph).tolist()
        [[5.0], [3.0], [0.0]]
    """
    tensors = _autocast_all(x, edge_value)
    x, edge_value = tensors
    if reduce not in get_args(Reduce):
        raise ValueError(f"reduce must be one of {list(get_args(Reduce))}, got {reduce!r}")
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(
            f"activation must be one of {list(get_args(Activation))} or None, got {activation!r}"
        )
    if x is None and edge_value is None:
        raise ValueError("x and edge_value are both None: there is nothing to aggregate")
    _check(graph, x=(x, "columns"), edge_value=(edge_value, "edges"))
    like = edge_value if x is None else x
    assert like is not None
    impl = resolve_impl(impl, like)
    if impl == "reference":
        return reference.aggregate(
            x, graph, reduce=reduce, edge_value=edge_value, activation=activation
        )
    refuse_forward_mode(*tensors)
    plan = _PLANS[impl]
    path = plan.path
    flat, how = _flat_all(*tensors), (reduce, activation == "relu")
    rows = row_walk(graph, plan)
    if needs_gradient(*tensors):
        columns = column_walk(graph, plan)
        out = _Aggregate.apply(*flat, path, graph, rows, columns, how)
    else:
        out, _ = _aggregate_fwd(path, *flat, rows, *how)
    return out.view(graph.num_rows, *like.shape[1:])


def gated_aggregate(
    x: Tensor,
    graph: Graph,
    gate: Tensor | None = None,
    *,
    gate_row: Tensor | None = None,
    gate_col: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    return_gate: bool = False,
    impl: Impl | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean of the neighbours, each channel weighted by a sigmoid gate: GatedGCN's aggregation.

    For row i and its columns j, channel by channel::

        e_ij  = gate_ij + gate_row_i + gate_col_j
        out_i = sum_j sigmoid(e_ij) x_j / (sum_j sigmoid(e_ij) + eps)

    A row without edges, or whose gates are all 0, gives exactly 0 and no gradient. Duplicate
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
        normalize: False leaves the quotient's denominator out, as in residual gated graph
            convolution.
        eps: As above.
        return_gate: Also give ``e_ij``, the edge update of GatedGCN, with its gradient.
        impl: As in :func:`fastgt.neighborhood_attention`.

    Returns:
        ``[N_rows, ...]`` in x's dtype, followed by e ``[E, ...]`` in the caller's edge order where
        asked for. Sums are kept in float32 (float64 for float64). No message is stored: memory is
        O(N D), D the channels, beside e and the gradient of gate. Under ``torch.autocast`` the
        inputs are cast first. Second derivatives go through the plain definition, with its
        O(E D) memory; ``torch.func`` transforms and forward-mode derivatives need
        ``impl="reference"``.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.
        RuntimeError: ``impl`` cannot run here.

    Source:
        Bresson and Laurent, arXiv 1711.07553, eq. 11; with the denominator Dwivedi et al., arXiv
        2003.00982, eqs. 19-22 (there e is the new edge feature before its norm).

    Example:
        >>> import torch
        >>> from fastgt import Graph, gated_aggregate
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> x, gate = torch.randn(2, 3, 16)
        >>> out, e = gated_aggregate(x, graph, gate, gate_row=x, gate_col=x, return_gate=True)
        >>> out.shape, e.shape
        (torch.Size([3, 16]), torch.Size([3, 16]))
    """
    tensors = _autocast_all(x, gate, gate_row, gate_col)
    x_, gate, gate_row, gate_col = tensors
    if gate is None and gate_row is None and gate_col is None:
        raise ValueError("gate, gate_row and gate_col are all None: give at least one")
    eps = number("eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    _check(
        graph,
        x=(x_, "columns"),
        required=True,
        gate=(gate, "edges"),
        gate_row=(gate_row, "rows"),
        gate_col=(gate_col, "columns"),
    )
    assert x_ is not None
    impl = resolve_impl(impl, x_)
    if impl == "reference":
        return reference.gated_aggregate(
            x_,
            graph,
            gate,
            gate_row=gate_row,
            gate_col=gate_col,
            normalize=normalize,
            eps=eps,
            return_gate=return_gate,
        )
    refuse_forward_mode(*tensors)
    plan = _PLANS[impl]
    path = plan.path
    flat, how = _flat_all(*tensors), (eps, bool(normalize), bool(return_gate))
    rows = row_walk(graph, plan)
    if needs_gradient(*tensors):
        columns = column_walk(graph, plan)
        out, e = _GatedAggregate.apply(*flat, path, graph, rows, columns, how)
    else:
        out, e, _, _ = _gated_fwd(path, *flat, rows, *how, False)
    out = out.view(graph.num_rows, *x_.shape[1:])
    return (out, e.view(graph.num_edges, *x_.shape[1:])) if return_gate else out


_PLANS = {"torch": CPU, "triton": GATHER}


def _autocast_all(*tensors: Tensor | None) -> list[Tensor | None]:
    first = next((x for x in tensors if isinstance(x, Tensor)), None)
    if first is None or not autocasts(first.device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(first.device.type)
    return [None if x is None else autocast(x, dtype) for x in tensors]


def _check(graph: Graph, *, required: bool = False, **tensors: tuple[Tensor | None, str]) -> None:
    """The tensors are alike and have one row for each of the graph's rows, columns or edges."""
    check_graph(graph)
    sizes = {"rows": graph.num_rows, "columns": graph.num_cols, "edges": graph.num_edges}
    first, like = "", None
    for name, (x, what) in tensors.items():
        if x is None and (len(tensors) > 1 and not (required and name == "x")):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a strided tensor, got {x.layout}")
        if x.ndim == 0:
            raise ValueError(f"{name} must have a first dimension over the graph's {what}, got []")
        if x.shape[0] != sizes[what]:
            raise ValueError(f"{name} has {x.shape[0]} rows but the graph has {sizes[what]} {what}")
        if like is None:
            first, like = name, x
        if x.dtype != like.dtype:
            raise TypeError(f"{name} is {x.dtype} but {first} is {like.dtype}")
        if x.device != like.device:
            raise ValueError(f"{name} is on {x.device} but {first} is on {like.device}")
        if x.shape[1:] != like.shape[1:]:
            raise ValueError(
                f"{name} has channels {list(x.shape[1:])} but {first} has {list(like.shape[1:])}"
            )
    assert like is not None
    if graph.device != like.device:
        raise ValueError(
            f"graph is on {graph.device} but {first} is on {like.device}: use graph.to()"
        )


def _flat(x: Tensor) -> Tensor:
    """``[N, D]``, as a view but for strides that do not allow it."""
    return x if x.ndim == 2 else x.flatten(1) if x.ndim > 1 else x[:, None]


def _flat_all(*tensors: Tensor | None) -> list[Tensor | None]:
    flat = [None if x is None else _flat(x) for x in tensors]
    if torch.compiler.is_compiling():
        # Dynamo refuses one tensor in two places of a Function, as where x gates itself
        flat = [None if x is None else x.view_as(x) for x in flat]
    return flat


class _SegmentSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, path: str, graph: Graph, rows: tuple[Tensor, ...]) -> Tensor:
        y = _softmax_fwd(path, x, rows)
        ctx.save_for_backward(y)
        ctx.path, ctx.graph, ctx.rows = path, graph, rows
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        (y,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            # create_graph=True: the gradient must itself be differentiable, through y too
            row, (p, g) = ctx.graph.edge_index[1], (t.to(accumulator(y)) for t in (y, dy))
            zeros = p.new_zeros(ctx.graph.num_rows, p.shape[1])
            total = zeros.index_add(0, row, p)
            mean = zeros.index_add(0, row, p * g) / total.masked_fill(total == 0, 1.0)
            dx = (p * (g - mean[row])).to(y.dtype)
        else:
            dx = _softmax_bwd(ctx.path, dy, y, ctx.rows)
        return dx, None, None, None


class _Aggregate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        edge_value: Tensor | None,
        path: str,
        graph: Graph,
        rows: tuple[Tensor, ...],
        columns: tuple[Tensor, ...],
        how: tuple[str, bool],
    ) -> Tensor:
        o, first = _aggregate_fwd(path, x, edge_value, rows, *how)
        ctx.save_for_backward(x, edge_value, first)
        ctx.path, ctx.graph, ctx.rows, ctx.columns, ctx.how = path, graph, rows, columns, how
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple:
        x, edge_value, first = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            graph, (reduce, relu) = ctx.graph, ctx.how
            activation: Activation | None = "relu" if relu else None

            def define(x: Tensor | None, edge_value: Tensor | None) -> tuple[Tensor]:
                options = {"reduce": reduce, "edge_value": edge_value, "activation": activation}
                return (reference.aggregate(x, graph, **options),)

            grads = differentiable_gradients(define, [x, edge_value], [do], needs)
        else:
            walks = ctx.rows, ctx.columns
            found = _aggregate_bwd(ctx.path, do, x, edge_value, first, *walks, *ctx.how, *needs)
            grads = [x if need else None for x, need in zip(found, needs, strict=True)]
        return (*grads, None, None, None, None, None)


class _GatedAggregate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        gate_row: Tensor | None,
        gate_col: Tensor | None,
        path: str,
        graph: Graph,
        rows: tuple[Tensor, ...],
        columns: tuple[Tensor, ...],
        how: tuple[float, bool, bool],
    ) -> tuple[Tensor, Tensor]:
        inputs = x, gate, gate_row, gate_col
        o, e, total, mean = _gated_fwd(path, *inputs, rows, *how, True)
        # the output itself where it has not been rounded
        ctx.save_for_backward(*inputs, total, o if o.dtype == total.dtype else mean)
        ctx.path, ctx.graph, ctx.rows, ctx.columns, ctx.how = path, graph, rows, columns, how
        ctx.set_materialize_grads(False)
        return o, e

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, de: Tensor | None) -> tuple:
        *inputs, total, mean = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        eps, normalize, return_gate = ctx.how
        de = de if return_gate else None
        if torch.is_grad_enabled():
            graph = ctx.graph

            def define(
                x: Tensor, gate: Tensor | None, gate_row: Tensor | None, gate_col: Tensor | None
            ) -> tuple[Tensor, ...]:
                found = reference.gated_aggregate(
                    x,
                    graph,
                    gate,
                    gate_row=gate_row,
                    gate_col=gate_col,
                    normalize=normalize,
                    eps=eps,
                    return_gate=True,
                )
                assert isinstance(found, tuple)
                return found

            grads = differentiable_gradients(define, inputs, [do, de], needs)
        else:
            x = inputs[0]
            if do is None:
                do = x.new_zeros(()).expand(ctx.graph.num_rows, x.shape[1])
            walks = ctx.rows, ctx.columns
            args = do, de, *inputs, total, mean, *walks, normalize
            found = _gated_bwd(ctx.path, *args, *needs)
            grads = [x if need else None for x, need in zip(found, needs, strict=True)]
        return (*grads, None, None, None, None, None)


# path is "torch" (on a CPU) or "gather" (Triton); rows and columns are what it walks; first is
# the edge that a maximum was found on, -1 for none; total and mean are kept for the backward
torch.library.define("fastgt::segment_softmax_fwd", "(str path, Tensor x, Tensor[] rows) -> Tensor")
torch.library.define(
    "fastgt::segment_softmax_bwd", "(str path, Tensor dy, Tensor y, Tensor[] rows) -> Tensor"
)
torch.library.define(
    "fastgt::aggregate_fwd",
    "(str path, Tensor? x, Tensor? edge_value, Tensor[] rows, str reduce, bool relu)"
    " -> (Tensor o, Tensor first)",
)
torch.library.define(
    "fastgt::aggregate_bwd",
    "(str path, Tensor do, Tensor? x, Tensor? edge_value, Tensor first, Tensor[] rows,"
    " Tensor[] columns, str reduce, bool relu, bool need_x, bool need_edge)"
    " -> (Tensor dx, Tensor dedge)",
)
_GATES = "Tensor x, Tensor? gate, Tensor? gate_row, Tensor? gate_col"
torch.library.define(
    "fastgt::gated_aggregate_fwd",
    f"(str path, {_GATES}, Tensor[] rows, float eps, bool normalize, bool return_gate, bool keep)"
    " -> (Tensor o, Tensor e, Tensor total, Tensor mean)",
)
torch.library.define(
    "fastgt::gated_aggregate_bwd",
    f"(str path, Tensor do, Tensor? de, {_GATES}, Tensor total, Tensor mean, Tensor[] rows,"
    " Tensor[] columns, bool normalize, bool need_x, bool need_gate, bool need_row, bool need_col)"
    " -> (Tensor dx, Tensor dgate, Tensor drow, Tensor dcol)",
)


@torch.library.register_fake("fastgt::segment_softmax_fwd")
def _(path, x, rows):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.register_fake("fastgt::segment_softmax_bwd")
def _(path, dy, y, rows):  # type: ignore[no-untyped-def]
    return y.new_empty(y.shape)


@torch.library.register_fake("fastgt::aggregate_fwd")
def _(path, x, edge_value, rows, reduce, relu):  # type: ignore[no-untyped-def]
    like = edge_value if x is None else x
    n, d = rows[0].shape[0] - 1, like.shape[1]
    return like.new_empty(n, d), rows[2].new_empty(n if reduce == "max" else 0, d)


@torch.library.register_fake("fastgt::aggregate_bwd")
def _(path, do, x, edge_value, first, rows, columns, reduce, relu, need_x, need_edge):  # type: ignore[no-untyped-def]
    m, e, d = columns[0].shape[0] - 1, rows[2].shape[0], do.shape[1]
    return (
        do.new_empty((m, d) if need_x else (0,)),
        do.new_empty((e, d) if need_edge else (0,)),
    )


@torch.library.register_fake("fastgt::gated_aggregate_fwd")
def _(path, x, gate, gate_row, gate_col, rows, eps, normalize, return_gate, keep):  # type: ignore[no-untyped-def]
    n, d, wide = rows[0].shape[0] - 1, x.shape[1], accumulator(x)
    rounded = keep and normalize and x.dtype != wide
    return (
        x.new_empty(n, d),
        x.new_empty(rows[2].shape[0] if return_gate else 0, d),
        x.new_empty(n if keep and normalize else 0, d, dtype=wide),
        x.new_empty(n if rounded else 0, d, dtype=wide),
    )


@torch.library.register_fake("fastgt::gated_aggregate_bwd")
def _(path, do, de, x, gate, gate_row, gate_col, total, mean, rows, columns, *rest):  # type: ignore[no-untyped-def]
    _, need_x, need_gate, need_row, need_col = rest
    m, d = x.shape
    return (
        x.new_empty((m, d) if need_x else (0,)),
        x.new_empty((rows[2].shape[0], d) if need_gate else (0,)),
        x.new_empty((rows[0].shape[0] - 1, d) if need_row else (0,)),
        x.new_empty((m, d) if need_col else (0,)),
    )


def _launch(name: str) -> Callable[..., Any]:
    """The op ``name`` on the path that its first argument says."""

    def launch(path: str, *args: Any) -> Any:
        if path == "torch":
            from fastgt.cpu import aggregate as cpu

            with torch.no_grad():  # called by an exported module, gradients may be on
                return getattr(cpu, name)(*args)
        require_triton(next(x for x in args if isinstance(x, Tensor)))
        if name.startswith("aggregate"):
            from fastgt.kernels import aggregate as kernels
        elif name.startswith("gated"):
            from fastgt.kernels import aggregate_gated as kernels
        else:
            from fastgt.kernels import segment_softmax as kernels
        return getattr(kernels, name)(*args)

    return launch


def _register(name: str) -> Callable[..., Any]:
    torch.library.impl(f"fastgt::{name}", "CompositeExplicitAutograd", _launch(name))
    return getattr(torch.ops.fastgt, name).default


_softmax_fwd, _softmax_bwd = _register("segment_softmax_fwd"), _register("segment_softmax_bwd")
_aggregate_fwd, _aggregate_bwd = _register("aggregate_fwd"), _register("aggregate_bwd")
_gated_fwd, _gated_bwd = _register("gated_aggregate_fwd"), _register("gated_aggregate_bwd")

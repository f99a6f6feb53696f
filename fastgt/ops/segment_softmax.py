"""segment_softmax: public function -> checks -> autograd -> ops."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgt import reference
from fastgt.contract import RowWalk
from fastgt.graph import Graph
from fastgt.ops.channels import PLANS, check_channels, flat
from fastgt.ops.checks import accumulator, autocast, autocasts, refuse_forward_mode
from fastgt.ops.implementation import Impl, require_triton, resolve_impl
from fastgt.ops.registration import register
from fastgt.ops.walks import row_walk
from fastgt.shard import Roles, Shard
from fastgt.signature import Signature


def segment_softmax(x: Tensor, graph: Graph | Shard, *, impl: Impl | None = None) -> Tensor:
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
    if isinstance(graph, Shard):
        return graph.run(segment_softmax, _ROLES, locals())
    if isinstance(x, Tensor) and autocasts(x.device.type):
        x = autocast(x, torch.float32)
    check_channels(graph, x=(x, "edges"))
    impl = resolve_impl(impl, x)
    if impl == "reference":
        return reference.segment_softmax(x, graph)
    refuse_forward_mode(x)
    logits, rows = flat(x), row_walk(graph, PLANS[impl])
    if torch.is_grad_enabled() and x.requires_grad:
        return _SegmentSoftmax.apply(logits, graph, impl, rows).view(x.shape)
    return _forward(impl, logits, rows).view(x.shape)


_ROLES = Roles((), (), ("x",), of_edges=True)


class _SegmentSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, graph: Graph, impl: str, rows: tuple[Tensor, ...]) -> Tensor:
        y = _forward(impl, x, rows)
        ctx.save_for_backward(y)
        ctx.graph, ctx.impl, ctx.rows = graph, impl, rows
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
            dx = _backward(ctx.impl, dy, y, ctx.rows)
        return dx, None, None, None


class _Logits(NamedTuple):
    x: Tensor  # [E, D]


class _Weights(NamedTuple):
    dy: Tensor  # [E, D]
    y: Tensor  # [E, D]


def _implementation(impl: str, x: Tensor) -> Any:
    if impl == "cpp":
        from fastgt.cpu import segment_softmax as cpu

        return cpu
    require_triton(x)
    from fastgt.kernels import segment_softmax as kernels

    return kernels


def _launch_forward(impl: str, logits: _Logits, walk: RowWalk) -> Tensor:
    with torch.no_grad():  # called by an exported module, gradients may be on
        run = _implementation(impl, logits.x).segment_softmax_fwd
        return run(logits.x, walk.row_walk)


def _launch_backward(impl: str, weights: _Weights, walk: RowWalk) -> Tensor:
    with torch.no_grad():
        run = _implementation(impl, weights.y).segment_softmax_bwd
        return run(weights.dy, weights.y, walk.row_walk)


_forward = register(
    "segment_softmax_fwd",
    Signature(_Logits, RowWalk),
    "Tensor",
    launch=_launch_forward,
    fake=lambda logits, walk: logits.x.new_empty(logits.x.shape),
)
_backward = register(
    "segment_softmax_bwd",
    Signature(_Weights, RowWalk),
    "Tensor",
    launch=_launch_backward,
    fake=lambda weights, walk: weights.y.new_empty(weights.y.shape),
)

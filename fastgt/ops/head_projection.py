"""head_projection: projections into and out of heads that leave masked heads out.

Three products, of which each is the derivative of the others, with [H, D, C] weights::

    expand    y_nhd = sum_c  w_hdc x_nc      for the active heads, 0 in the others
    contract  z_nc  = sum_hd w_hdc y_nhd     over the active heads
    outer     g_hdc = sum_n  y_nhd x_nc      for the active heads, 0 in the others

``heads`` is int32 [H + 1]: the active heads, in order, then the others, then how many are active.
It is made on the tensors' device and read there, by the kernels.

Each of the three ops has an autograd formula made of the other two, instead of one Function: so a
gradient has gradients of any order, by the same kernels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from fastgt import reference
from fastgt.cpu.head_projection import keeps_rows_apart, missing
from fastgt.ops.checks import autocast, autocasts, check_float, refuse_forward_mode
from fastgt.ops.head_mask import check_head_gate, head_mask
from fastgt.ops.implementation import Impl, require_triton, resolve_impl


def head_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    head_gate: Tensor | None = None,
    *,
    impl: Impl | None = None,
) -> Tensor:
    """A linear layer into the heads of attention, or out of them, for the active heads only.

    A head is active where its gate is not 0. With m_h = 1 for active heads and 0 for the others::

        into heads     y_ih = m_h (W_h x_i + b_h)
        out of heads   z_i  = b + sum_h m_h W_h y_ih

    What belongs to a masked head, its weights, its bias or its channels, is neither read nor
    multiplied, in the forward and in the backward: time falls with the active heads, gradients are
    those of a layer without the masked ones, and NaN there changes nothing. Which heads are active
    is known on the device alone; nothing waits for it.

    Args:
        x: ``[N, C]`` to go into heads, or ``[N, H, D]`` to come out of them. float16, bfloat16,
            float32 or float64, any strides.
        weight: ``[H, D, C]`` into heads, ``[C, H, D]`` out of them, in x's dtype. That of a
            ``torch.nn.Linear`` is ``weight.unflatten(0, (H, D))`` and ``weight.unflatten(1, (H,
            D))``. Queries, keys and values may be projected at once, as 3 H heads.
        bias: ``[H, D]`` into heads, ``[C]`` out of them.
        head_gate: ``[H]``, floating point or bool; None for all heads. Only whether it is 0 matters
            here, and it receives no gradient: attention multiplies with its values. NaN is refused
            (on a CPU; on a GPU it counts as active).
        impl: As in :func:`fastgt.neighborhood_attention`.

    Returns:
        ``[N, H, D]`` into heads, ``[N, C]`` out of them, in x's dtype. Sums are kept in float32
        (float64 for float64). No node reaches another one's row. The result is the same, bit for
        bit, every time, gradients too (on a CPU, with the same number of threads). Backward
        derivatives of any order; forward-mode ones need ``impl="reference"``.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.
        RuntimeError: ``impl`` cannot run here.

    Source:
        The projections of Vaswani et al., arXiv 1706.03762, section 3.2.2, with the head masks of
        Voita et al., arXiv 1905.09418, eq. 5, and of GTSP, arXiv 2312.05479, section 3.

    Example:
        >>> import torch
        >>> from fastgt import head_projection
        >>> x, weight = torch.randn(5, 32), torch.randn(4, 8, 32)
        >>> y = head_projection(x, weight, head_gate=torch.tensor([1.0, 0.0, 1.0, 0.0]))
        >>> y.shape, y.any(2).any(0).tolist()
        (torch.Size([5, 4, 8]), [True, False, True, False])
    """
    if isinstance(x, Tensor) and autocasts(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = autocast(x, dtype), autocast(weight, dtype)
        bias = None if bias is None else autocast(bias, dtype)
    _check(x, weight, bias)
    into = x.ndim == 2
    heads, width = weight.shape[:2] if into else weight.shape[1:]
    if head_gate is not None:
        check_head_gate(head_gate, heads, x.device)
    impl = resolve_impl(impl, x)
    if impl == "reference":
        return reference.head_projection(x, weight, bias, head_gate)
    if head_gate is None:
        if not into:
            return dense(x.flatten(1), weight.flatten(1), bias)
        flat = None if bias is None else bias.flatten()
        return dense(x, weight.flatten(0, 1), flat).unflatten(1, (heads, width))
    refuse_forward_mode(x, weight, bias)
    order = head_order(head_mask(head_gate)[0])
    if into:
        return _expand(impl, x, weight, bias, order)
    return _contract(impl, x, weight.permute(1, 2, 0), bias, order)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear`` of x [N, C], in which no row reaches another one's result or gradient."""
    if autocasts(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = autocast(x, dtype), autocast(weight, dtype)
        bias = None if bias is None else autocast(bias, dtype)
    # the gradient of x is a product of rows as wide as the output
    if all(keeps_rows_apart(x, width) for width in weight.shape):
        return linear(x, weight, bias)
    width, channels = weight.shape
    beside, below = missing(channels), missing(width)
    bias = None if bias is None else pad(bias, (0, below))
    y = linear(pad(x, (0, beside)), pad(weight, (0, beside, 0, below)), bias)
    return y[:, :width].contiguous()


def head_order(mask: Tensor) -> Tensor:
    """``heads`` as above, of a mask [H]."""
    order = torch.sort(~mask, stable=True).indices
    return torch.cat([order, mask.sum()[None]]).int()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_float("x", x)
    if x.ndim not in (2, 3):
        raise ValueError(f"x must be [N, C], or [N, H, D] out of heads, got {list(x.shape)}")
    into = x.ndim == 2
    given = [("weight", weight)] + ([] if bias is None else [("bias", bias)])
    for name, t in given:
        check_float(name, t)
        if t.dtype != x.dtype:
            raise TypeError(f"{name} is {t.dtype} but x is {x.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device} but x is on {x.device}")
    letters = "H, D, C" if into else "C, H, D"
    if weight.ndim != 3:
        raise ValueError(f"weight must be [{letters}], got {list(weight.shape)}")
    if into and weight.shape[2] != x.shape[1]:
        raise ValueError(f"weight takes {weight.shape[2]} channels but x has {x.shape[1]}")
    if not into and weight.shape[1:] != x.shape[1:]:
        raise ValueError(
            f"weight takes [H, D] = {list(weight.shape[1:])} but x has {list(x.shape[1:])}"
        )
    if 0 in weight.shape:
        raise ValueError(f"weight has no entries: {list(weight.shape)}")
    wanted = weight.shape[:2] if into else weight.shape[:1]
    if bias is not None and bias.shape != wanted:
        letters = "H, D" if into else "C"
        raise ValueError(f"bias must be [{letters}] = {list(wanted)}, got {list(bias.shape)}")


torch.library.define(
    "fastgt::head_expand",
    "(str impl, Tensor x, Tensor weight, Tensor? bias, Tensor heads) -> Tensor",
)
torch.library.define(
    "fastgt::head_contract",
    "(str impl, Tensor y, Tensor weight, Tensor? bias, Tensor heads) -> Tensor",
)
torch.library.define("fastgt::head_outer", "(str impl, Tensor y, Tensor x, Tensor heads) -> Tensor")
_expand = torch.ops.fastgt.head_expand.default
_contract = torch.ops.fastgt.head_contract.default
_outer = torch.ops.fastgt.head_outer.default


@torch.library.register_fake("fastgt::head_expand")
def _(impl, x, weight, bias, heads):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], *weight.shape[:2])


@torch.library.register_fake("fastgt::head_contract")
def _(impl, y, weight, bias, heads):  # type: ignore[no-untyped-def]
    return y.new_empty(y.shape[0], weight.shape[2])


@torch.library.register_fake("fastgt::head_outer")
def _(impl, y, x, heads):  # type: ignore[no-untyped-def]
    return y.new_empty(*y.shape[1:], x.shape[1])


def _launch(name: str) -> Any:
    def launch(impl: str, x: Tensor, *args: Any) -> Tensor:
        if impl == "cpp":
            from fastgt.cpu import head_projection as cpu

            return getattr(cpu, name)(x, *args)
        require_triton(x)
        from fastgt.kernels import head_projection as kernels

        return getattr(kernels, name)(x, *args)

    return launch


class _Projection(NamedTuple):
    """What ``head_expand`` and ``head_contract`` are called with."""

    impl: str
    x: Tensor  # or y
    weight: Tensor
    bias: Tensor | None
    heads: Tensor


class _Outer(NamedTuple):
    """What ``head_outer`` is called with."""

    impl: str
    y: Tensor
    x: Tensor
    heads: Tensor


def _save_projection(ctx: Any, inputs: tuple, output: Tensor) -> None:
    call = _Projection(*inputs)
    ctx.impl, ctx.biased = call.impl, call.bias is not None
    ctx.save_for_backward(call.x, call.weight, call.heads)


def _save_outer(ctx: Any, inputs: tuple, output: Tensor) -> None:
    call = _Outer(*inputs)
    ctx.impl = call.impl
    ctx.save_for_backward(call.y, call.x, call.heads)


def _expand_backward(ctx: Any, dy: Tensor) -> tuple:
    x, weight, heads = ctx.saved_tensors
    need = _Projection(*ctx.needs_input_grad)
    dbias = None
    if ctx.biased and need.bias:
        order, count = heads[:-1].long(), heads[-1]
        ranks = torch.arange(len(order), device=order.device)
        mask = torch.zeros_like(order, dtype=torch.bool).scatter(0, order, ranks < count)
        dbias = torch.where(mask[:, None], dy.sum(0), 0)
    dx = _contract(ctx.impl, dy, weight, None, heads) if need.x else None
    dweight = _outer(ctx.impl, dy, x, heads) if need.weight else None
    return None, dx, dweight, dbias, None


def _contract_backward(ctx: Any, dz: Tensor) -> tuple:
    y, weight, heads = ctx.saved_tensors
    need = _Projection(*ctx.needs_input_grad)
    dy = _expand(ctx.impl, dz, weight, None, heads) if need.x else None
    dweight = _outer(ctx.impl, y, dz, heads) if need.weight else None
    return None, dy, dweight, dz.sum(0) if ctx.biased and need.bias else None, None


def _outer_backward(ctx: Any, dweight: Tensor) -> tuple:
    y, x, heads = ctx.saved_tensors
    need = _Outer(*ctx.needs_input_grad)
    dy = _expand(ctx.impl, x, dweight, None, heads) if need.y else None
    dx = _contract(ctx.impl, y, dweight, None, heads) if need.x else None
    return None, dy, dx, None


for _name, _backward, _save in (
    ("head_expand", _expand_backward, _save_projection),
    ("head_contract", _contract_backward, _save_projection),
    ("head_outer", _outer_backward, _save_outer),
):
    torch.library.impl(f"fastgt::{_name}", "CompositeExplicitAutograd", _launch(_name))
    torch.library.register_autograd(f"fastgt::{_name}", _backward, setup_context=_save)

"""Softmax attention over all nodes of a graph that lies on several ranks: a ring.

Queries stay. Keys and values go round: in P steps a rank sees those of every rank, one block at a
time, and merges what it gets by the blocks' LSEs::

    lse = log sum_b exp(lse_b),   out = sum_b exp(lse_b - lse) out_b

So memory is that of two blocks, and a rank sends (P - 1) n (D + Dv) H numbers: as many as gathering
all keys would take, without keeping them. The backward computes each block anew, and the gradients
of its keys and values go round with it until they are home.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgt.contract import Aux, AuxRequest
from fastgt.distributed.collectives import next_ranks
from fastgt.distributed.offsets import RankOffsets
from fastgt.ops.aux_request import check_request
from fastgt.ops.checks import accumulator, autocast, autocasts, dropout_key
from fastgt.ops.global_attention import global_attention as attention
from fastgt.ops.head_mask import check_head_gate, gated
from fastgt.ops.implementation import Impl, resolve_impl


def global_attention(
    offsets: RankOffsets,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_offsets: Any,
    scale: float | None,
    bias: Tensor | None,
    dropout_p: float,
    dropout_seed: int | Tensor | None,
    head_gate: Tensor | None,
    dense_gate_grad: bool,
    return_aux: AuxRequest | None,
    impl: Impl | None,
) -> Tensor | tuple[Tensor, Aux]:
    """See :func:`fastgt.global_attention`: q, k, v of own rows, bias ``[n, H]`` of own keys."""
    request = check_request("global_attention", return_aux, "lse")
    if key_offsets is not None:
        raise ValueError("key_offsets must be None where a graph lies on several ranks")
    if dropout_p:
        raise ValueError(
            f"dropout_p must be 0 where a graph lies on several ranks, got {dropout_p}"
        )
    if dropout_seed is not None:
        dropout_key(dropout_seed, q.device)
    if autocasts(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (autocast(x, dtype) for x in (q, k, v))
        bias = None if bias is None else autocast(bias, dtype)
    mask, dense = None, False
    if head_gate is not None:
        check_head_gate(head_gate, q.shape[1], q.device, len(offsets.sizes))
        dense = dense_gate_grad and head_gate.dtype != torch.bool
        mask = head_gate.detach() != 0
    ring = _Ring(offsets, {"scale": scale, "impl": impl}, None if dense else mask)
    out, lse = _RingAttention.apply(ring, q, k, v, bias)
    if head_gate is not None:
        out = gated(out, head_gate, offsets.local, dense, resolve_impl(impl, q))
        if dense and mask is not None:
            lse = lse.masked_fill(~offsets.of_rows(torch.atleast_2d(mask)), -math.inf)
    return out if return_aux is None else (out, Aux(lse if request.lse else None))


class _Ring:
    """One call: whose keys come by, and how a block of them is attended to."""

    def __init__(self, offsets: RankOffsets, options: dict[str, Any], mask: Tensor | None):
        self.group, self._options, self._mask = offsets.group, options, mask
        self._offsets, self._ends = offsets.local, offsets.of_ranks

    def owner(self, step: int) -> int:
        return (self.group.rank + step) % self.group.size

    def block(self, step: int, q: Tensor, *keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """The attention over the keys that are here in a step: -> o and lse."""
        k, v, bias = keys
        assert k is not None
        assert v is not None
        out, aux = attention(
            q,
            k,
            v,
            self._offsets,
            key_offsets=self._ends[self.owner(step)],
            bias=bias,
            head_gate=self._mask,
            return_aux=AuxRequest(lse=True),
            **self._options,
        )
        assert aux.lse is not None
        return out, aux.lse

    def moved(self, step: int, tensors: list[Tensor]) -> list[Tensor]:
        """What is here in the next step."""
        rows = int(self._ends[self.owner(step + 1)][-1])
        return next_ranks(tensors, self.group, rows)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ring: _Ring, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        wide = accumulator(q)
        out = q.new_zeros(*q.shape[:2], v.shape[2], dtype=wide)
        lse = q.new_full(q.shape[:2], -math.inf, dtype=wide)
        keys = [x for x in (k, v, bias) if x is not None]
        for step in range(ring.group.size):
            block, block_lse = ring.block(step, q, *_three(keys))
            total = torch.logaddexp(lse, block_lse)
            out = out * _share(lse, total) + block.to(wide) * _share(block_lse, total)
            lse = total
            if step + 1 < ring.group.size:
                keys = ring.moved(step, keys)
        out = out.to(q.dtype)
        ctx.ring = ring
        ctx.save_for_backward(q, k, v, bias, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        ring, wide = ctx.ring, ctx.saved_tensors[5].dtype
        q, k, v, bias, out, lse = ctx.saved_tensors
        keys = [x for x in (k, v, bias) if x is not None]
        grads = [torch.zeros_like(x, dtype=wide) for x in keys]
        dq = torch.zeros_like(q, dtype=wide)
        delta = dlse - (do.to(wide) * out.to(wide)).sum(2)
        for step in range(ring.group.size):
            leaves = [x.detach().requires_grad_() for x in (q, *keys)]
            with torch.enable_grad():
                block, block_lse = ring.block(step, leaves[0], *_three(leaves[1:]))
            share = _share(block_lse.detach(), lse)  # [n, H, 1]
            upstream = do.to(wide) * share
            dblock_lse = share[..., 0] * delta + (upstream * block.detach().to(wide)).sum(2)
            found = torch.autograd.grad(
                [block, block_lse], leaves, [upstream.to(block.dtype), dblock_lse]
            )
            dq += found[0]
            grads = [x + y for x, y in zip(grads, found[1:], strict=True)]
            if step + 1 < ring.group.size:
                keys = ring.moved(step, keys)
            grads = ring.moved(step, grads)
        given = (x.to(q.dtype) for x in grads)
        return None, dq.to(q.dtype), *_three(list(given))


def _three(tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Keys, values and the bias, where there is one."""
    return *tensors, *[None] * (3 - len(tensors))


def _share(lse: Tensor, total: Tensor) -> Tensor:
    """``exp(lse - total)``, ``[n, H, 1]``: 0 where a row has no keys at all."""
    return torch.where(lse == -math.inf, 0.0, (lse - total).exp())[..., None]

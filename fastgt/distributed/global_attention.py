"""Softmax attention over all nodes of a graph that lies on several ranks: a ring.

Queries stay. Keys and values go round: in P steps a rank sees those of every rank, one block at a
time, and merges what it gets by the blocks' LSEs::

    lse = log sum_b exp(lse_b),   out = sum_b exp(lse_b - lse) out_b

So memory is that of two blocks, and a rank sends (P - 1) n (D + Dv) H numbers: as many as gathering
all keys would take, without keeping them; with dropout, 8 bytes a key besides, of the number by
which dropout knows it. The backward computes each block anew, and the gradients
of its keys and values go round with it until they are home.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgt.contract import Aux, AuxRequest
from fastgt.distributed.agreement import agree_on_backward
from fastgt.distributed.collectives import next_ranks
from fastgt.distributed.offsets import RankOffsets
from fastgt.ops.aux_request import check_request
from fastgt.ops.checks import accumulator, autocast, autocasts, dropout_key, number
from fastgt.ops.global_attention import global_attention as attention
from fastgt.ops.head_mask import check_head_gate, gated
from fastgt.ops.implementation import Impl, resolve_impl
from fastgt.philox import PairDropoutSeed


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
    seed = None if dropout_seed is None else dropout_key(dropout_seed, q.device)
    if autocasts(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (autocast(x, dtype) for x in (q, k, v))
        bias = None if bias is None else autocast(bias, dtype)
    mask, dense = None, False
    if head_gate is not None:
        check_head_gate(head_gate, q.shape[1], q.device, len(offsets.sizes))
        dense = dense_gate_grad and head_gate.dtype != torch.bool
        mask = head_gate.detach() != 0
    options = {"scale": scale, "impl": impl, "head_gate": None if dense else mask}
    ring = _Ring(offsets, options, number("dropout_p", dropout_p), seed)
    out, lse = _RingAttention.apply(ring, q, k, v, bias)
    if head_gate is not None:
        out = gated(out, head_gate, offsets.local, dense, resolve_impl(impl, q))
        if dense and mask is not None:
            lse = lse.masked_fill(~offsets.of_rows(torch.atleast_2d(mask)), -math.inf)
    return out if return_aux is None else (out, Aux(lse if request.lse else None))


_Keys = list[Tensor | None]  # k, v, the bias, and the numbers by which dropout knows keys


class _Ring:
    """One call: whose keys come by, and how a block of them is attended to."""

    def __init__(
        self, offsets: RankOffsets, options: dict[str, Any], p: float, seed: Tensor | None
    ):
        self.group, self._options, self._p, self._seed = offsets.group, options, p, seed
        self._offsets, self._ends = offsets.local, offsets.of_ranks
        self._queries: Tensor | None = None
        self.numbers: Tensor | None = None
        if p:
            self._queries, self.numbers = offsets.pair_numbers

    def owner(self, step: int) -> int:
        return (self.group.rank + step) % self.group.size

    def block(self, step: int, q: Tensor, keys: _Keys) -> tuple[Tensor, Tensor]:
        """The attention over the keys that are here in a step: -> o and lse."""
        k, v, bias, numbers = keys
        assert k is not None
        assert v is not None
        seed: Tensor | PairDropoutSeed | None = self._seed
        if self._queries is not None and numbers is not None:
            seed = PairDropoutSeed(self._seed, self._queries, numbers)
        out, aux = attention(
            q,
            k,
            v,
            self._offsets,
            key_offsets=self._ends[self.owner(step)],
            bias=bias,
            dropout_p=self._p,
            dropout_seed=seed,
            return_aux=AuxRequest(lse=True),
            **self._options,
        )
        assert aux.lse is not None
        return out, aux.lse

    def moved(self, step: int, tensors: _Keys) -> _Keys:
        """What is here in the next step."""
        rows = int(self._ends[self.owner(step + 1)][-1])
        given = [x for x in tensors if x is not None]
        found = iter(next_ranks(given, self.group, rows))
        return [None if x is None else next(found) for x in tensors]


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ring: _Ring, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        wide = accumulator(q)
        out = q.new_zeros(*q.shape[:2], v.shape[2], dtype=wide)
        lse = q.new_full(q.shape[:2], -math.inf, dtype=wide)
        keys: _Keys = [k, v, bias, ring.numbers]
        for step in range(ring.group.size):
            block, block_lse = ring.block(step, q, keys)
            total = torch.logaddexp(lse, block_lse)
            out = out * _share(lse, total) + block.to(wide) * _share(block_lse, total)
            lse = total
            if step + 1 < ring.group.size:
                keys = ring.moved(step, keys)
        out = out.to(q.dtype)
        ctx.ring, ctx.call = ring, next(ring.group.calls)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        ring, wide = ctx.ring, ctx.saved_tensors[5].dtype
        q, k, v, bias, out, lse = ctx.saved_tensors
        keys: _Keys = [k, v, bias, ring.numbers]
        grads = [None if x is None else torch.zeros_like(x, dtype=wide) for x in keys[:3]]
        agree_on_backward(ring.group, q.device, "global_attention", ctx.call, {})
        dq = torch.zeros_like(q, dtype=wide)
        delta = dlse - (do.to(wide) * out.to(wide)).sum(2)
        for step in range(ring.group.size):
            mine, *theirs = (
                None if x is None else x.detach().requires_grad_() for x in (q, *keys[:3])
            )
            assert mine is not None
            with torch.enable_grad():
                block, block_lse = ring.block(step, mine, [*theirs, keys[3]])
            share = _share(block_lse.detach(), lse)  # [n, H, 1]
            upstream = do.to(wide) * share
            dblock_lse = share[..., 0] * delta + (upstream * block.detach().to(wide)).sum(2)
            found = torch.autograd.grad(
                [block, block_lse],
                [mine, *(x for x in theirs if x is not None)],
                [upstream.to(block.dtype), dblock_lse],
            )
            dq += found[0]
            more = iter(found[1:])
            grads = [None if x is None else x + next(more) for x in grads]
            if step + 1 < ring.group.size:
                keys = ring.moved(step, keys)
            grads = ring.moved(step, grads)
        given = (None if x is None else x.to(q.dtype) for x in grads)
        return None, dq.to(q.dtype), *given


def _share(lse: Tensor, total: Tensor) -> Tensor:
    """``exp(lse - total)``, ``[n, H, 1]``: 0 where a row has no keys at all."""
    return torch.where(lse == -math.inf, 0.0, (lse - total).exp())[..., None]

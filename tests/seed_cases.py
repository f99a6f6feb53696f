"""What transcriptions of the seeds have in common: dense, masked, without the library."""

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import seeds
import torch
from torch import Tensor, nn

SEEDS = seeds.SEEDS


def load(stem: str) -> ModuleType:
    """A file of examples/seeds, which is no package."""
    return seeds.load(SEEDS / f"{stem}.py")


class Weights:
    """The parameters and buffers of a block, and the layers that they are of, written out."""

    def __init__(self, block: nn.Module):
        self.of = dict(block.named_parameters()) | dict(block.named_buffers())

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = torch.einsum("...c,dc->...d", x, self.of[f"{name}.weight"])
        bias = self.of.get(f"{name}.bias")
        return y if bias is None else y + bias

    def norm(self, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return centred(x, eps) * self.of[f"{name}.weight"] + self.of[f"{name}.bias"]

    def heads(self, name: str, x: Tensor, count: int, parts: int = 1) -> Sequence[Tensor]:
        """x [N, C] -> so many [N, H, D]."""
        y = self.linear(name, x)
        width = y.shape[1] // (parts * count)
        return [
            y[:, i * count * width : (i + 1) * count * width].reshape(len(y), count, width)
            for i in range(parts)
        ]


def centred(x: Tensor, eps: float = 1e-5) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """q [N, H, D], k and v [M, H, D], allowed [N, M] -> [N, H D], by all pairs and a mask."""
    logits = torch.einsum("nhd,mhd->hnm", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    weights = logits.exp() / logits.exp().sum(2, keepdim=True)
    return torch.einsum("hnm,mhd->nhd", weights, v).flatten(1)


def same(offsets: Sequence[int], key_offsets: Sequence[int] | None = None) -> Tensor:
    """The mask [N, M] of pairs of one graph."""
    keys = offsets if key_offsets is None else key_offsets
    allowed = torch.zeros(offsets[-1], keys[-1], dtype=torch.bool)
    for g in range(len(offsets) - 1):
        allowed[offsets[g] : offsets[g + 1], keys[g] : keys[g + 1]] = True
    return allowed


def check(
    block: nn.Module,
    call: Callable[..., Any],
    literal: Callable[..., Any],
    *inputs: Tensor,
    tolerance: float = 1e-11,
) -> None:
    """Both give the same outputs, and the same gradients of all inputs and all parameters."""
    for x in inputs:
        x.requires_grad_()
    names = [f"input {i}" for i in range(len(inputs))] + [n for n, _ in block.named_parameters()]
    leaves = [*inputs, *block.parameters()]
    results = []
    for function in (call, literal):
        out = function(*inputs)
        outs = list(out) if isinstance(out, tuple) else [out]
        generator = torch.Generator().manual_seed(5)
        loss = sum(
            (y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outs
        )
        results.append((outs, torch.autograd.grad(loss, leaves)))
    (outs, grads), (expected_outs, expected_grads) = results
    assert len(outs) == len(expected_outs)
    for y, expected in zip(outs, expected_outs, strict=True):
        assert y.dtype == torch.float64
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    for name, grad, expected in zip(names, grads, expected_grads, strict=True):
        torch.testing.assert_close(
            grad, expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def drawn(block: nn.Module) -> nn.Module:
    """The block in float64, with every parameter and buffer drawn, also those that begin as 0."""
    block = block.double()
    with torch.no_grad():
        for x in [*block.parameters(), *block.buffers()]:
            if x.is_floating_point():
                x.add_(torch.randn_like(x) * 0.3)
    return block

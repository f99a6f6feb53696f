"""Gates of attention heads: fixed, the best k, or learnt to be zero.

A gate is one number a head, ``[H]``, or a head and a graph, ``[G, H]``; a head whose gate is
exactly 0 is masked. In training each of these gives the gradient that it is defined with.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastgt.ops.checks import integer


class HeadGate(nn.Module):
    """A fixed gate: numbers that are kept with the model and not trained.

    Args:
        mask: ``[H]``, floating point or bool: 0 or False masks a head. With a bool one, nothing is
            multiplied.

    Example:
        >>> import torch
        >>> from fastgt.nn import HeadGate
        >>> HeadGate(torch.tensor([True, False, True]))()
        tensor([ True, False,  True])

    Attributes:
        mask: The gate; it may be written into.
    """

    mask: Tensor

    def __init__(self, mask: Tensor):
        super().__init__()
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
        if mask.ndim != 1 or not len(mask):
            raise ValueError(f"mask must be [H], got {list(mask.shape)}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"mask must be floating point or bool, got {mask.dtype}")
        if not mask.is_meta and mask.isnan().any():
            raise ValueError(f"mask is NaN at heads {mask.isnan().nonzero().flatten().tolist()}")
        self.register_buffer("mask", mask.detach().clone())
        self._made = None if mask.is_meta else mask.detach().to("cpu", copy=True)
        self._probe: Tensor | None = None

    def reset_parameters(self) -> None:
        """The mask that it was made with; all heads, where that was on the meta device."""
        if self._made is None:
            self.mask.fill_(1)
        else:
            self.mask.copy_(self._made)

    def forward(self) -> Tensor:
        """-> ``[H]``."""
        if self._probe is None or not self.training:
            return self.mask
        return self.mask + self._probe

    def score(self, on: bool) -> None:
        """Whether a gradient of the gate is wanted: in training it then requires one."""
        if not on:
            self._probe = None
        elif self._probe is None:
            like = self.mask if self.mask.is_floating_point() else self.mask.float()
            self._probe = torch.zeros_like(like).requires_grad_()

    @property
    def has_gradient(self) -> bool:
        """Whether a backward has reached the gate since it is scored, or its gradient was taken."""
        return self._probe is not None and self._probe.grad is not None

    def take_gradient(self) -> Tensor:
        """Of the losses by the gate, ``[H]``, summed over all that reached it since.

        Raises:
            RuntimeError: No backward did.
        """
        if self._probe is None or self._probe.grad is None:
            raise RuntimeError("no backward has reached this gate: its gradient is not there")
        grad, self._probe.grad = self._probe.grad, None
        return grad


class TopKHeadGate(nn.Module):
    """1 for the k heads of the largest logits, 0 for the others, trained straight through.

    The gradient is that of ``sigmoid(logits)``, for all heads, masked ones included: as far as what
    follows gives masked heads one, they may come back. Of equal logits the first heads are taken.

    Args:
        heads: H.
        k: How many are active.

    Source:
        Bengio et al., arXiv 1308.3432, section 2.3, for the straight-through gradient.

    Example:
        >>> import torch
        >>> from fastgt.nn import TopKHeadGate
        >>> gate = TopKHeadGate(4, k=2)
        >>> gate(torch.tensor([[0.1, 0.9, 0.5, 0.2], [3.0, 1.0, 0.0, 2.0]]))  # of two graphs
        tensor([[0., 1., 1., 0.],
                [1., 0., 0., 1.]])
    """

    def __init__(self, heads: int, k: int):
        super().__init__()
        heads, k = integer("heads", heads), integer("k", k)
        if not 0 <= k <= heads or heads < 1:
            raise ValueError(f"k must be from 0 to heads, got k={k} and heads={heads}")
        self.k = k
        self.logits = nn.Parameter(torch.zeros(heads))

    def reset_parameters(self) -> None:
        """Logits of 0."""
        nn.init.zeros_(self.logits)

    def forward(self, logits: Tensor | None = None) -> Tensor:
        """-> ``[H]`` from the parameter, or ``[..., H]`` from ``logits``, of graphs for example."""
        logits = _given(logits, self.logits)
        order = logits.detach().argsort(dim=-1, descending=True, stable=True)
        hard = torch.zeros_like(logits).scatter(-1, order[..., : self.k], 1.0)
        soft = logits.sigmoid()
        return hard + (soft - soft.detach())

    def extra_repr(self) -> str:
        return f"heads={len(self.logits)}, k={self.k}"


class HardConcreteHeadGate(nn.Module):
    """A random gate that is exactly 0 or 1 with some probability, and its expected number.

    With u uniform in (0, 1) in training, and 1/2 outside it::

        s = sigmoid((log u - log(1 - u) + logit) / beta)        beta = 2/3, outside training 1
        gate = min(1, max(0, (zeta - gamma) s + gamma))         gamma = -0.1, zeta = 1.1
        P(gate > 0) = sigmoid(logit - beta log(-gamma / zeta))

    Adding ``weight * gate.penalty()`` to a loss takes heads away until they are worth ``weight``.

    Args:
        heads: H.
        logit: To begin with, of every head; 2 is a probability of 0.97 to be active.

    Source:
        Louizos et al., arXiv 1712.01312, eqs. 10 to 13; for heads Voita et al., arXiv 1905.09418,
        section 5.1.

    Example:
        >>> import torch
        >>> from fastgt.nn import HardConcreteHeadGate
        >>> gate = HardConcreteHeadGate(8).eval()
        >>> gate().shape, round(gate.penalty().item(), 2)
        (torch.Size([8]), 7.79)
    """

    BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1

    def __init__(self, heads: int, *, logit: float = 2.0):
        super().__init__()
        heads = integer("heads", heads, 1)
        if not math.isfinite(logit):
            raise ValueError(f"logit must be finite, got {logit}")
        self.logit = float(logit)
        self.logits = nn.Parameter(torch.full((heads,), self.logit))

    def reset_parameters(self) -> None:
        """The logit to begin with."""
        nn.init.constant_(self.logits, self.logit)

    def forward(self, logits: Tensor | None = None) -> Tensor:
        """-> ``[H]`` from the parameter, or ``[..., H]`` from ``logits``, of graphs for example."""
        logits = _given(logits, self.logits)
        if self.training:
            info = torch.finfo(logits.dtype)
            # of (0, 1) without the ends, where the logistic noise would be infinite
            u = torch.rand_like(logits).clamp(info.tiny, 1 - info.eps / 2)
            s = ((u.log() - (-u).log1p() + logits) / self.BETA).sigmoid()
        else:
            s = logits.sigmoid()
        return ((self.ZETA - self.GAMMA) * s + self.GAMMA).clamp(0.0, 1.0)

    def penalty(self, logits: Tensor | None = None) -> Tensor:
        """The expected number of active heads, of ``logits [..., H]`` the mean."""
        logits = _given(logits, self.logits)
        active = (logits - self.BETA * math.log(-self.GAMMA / self.ZETA)).sigmoid()
        return active.sum(-1).mean()

    def extra_repr(self) -> str:
        return f"heads={len(self.logits)}"


def _given(logits: Tensor | None, own: Tensor) -> Tensor:
    if logits is None:
        return own
    if logits.ndim < 1 or logits.shape[-1] != len(own):
        raise ValueError(f"logits must be [..., H] = [..., {len(own)}], got {list(logits.shape)}")
    return logits

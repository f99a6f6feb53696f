"""Weights: the smallest ones, more and more of them, become zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.utils import prune


class GradualPruning:
    """Gradual magnitude pruning of all linear layers together, on ``torch.nn.utils.prune``.

    After step t of training, from ``begin`` to ``end``, this share of the weights is zero::

        s_t = s_f + (s_i - s_f) (1 - (t - begin) / (end - begin))^3

    the smallest in absolute value over all layers; what is zero stays zero. The number at the end
    is exact. Masks are in the model's ``state_dict``, as ``weight_mask`` beside ``weight_orig``,
    from the beginning. Zeros are multiplied with like other numbers: time does not fall with them.

    Args:
        model: Whose ``nn.Linear`` layers lose weights; biases, norms and embeddings do not.
        final: s_f, at ``end`` and after.
        begin, end: Steps.
        every: Steps between two changes.
        initial: s_i, at ``begin``.

    Raises:
        ValueError: A setting is out of range, a layer is pruned already, two share their weight, or
            there is none.

    Source:
        Zhu and Gupta, arXiv 1710.01878, eq. 1; weights of GTSP, arXiv 2312.05479, without the
        regrowth of Liu et al., GraNet, arXiv 2106.10404.

    Example:
        >>> import torch
        >>> from fastgt.pruning import GradualPruning
        >>> model = torch.nn.Linear(10, 10)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruning = GradualPruning(model, 0.8, end=20, every=5)
        >>> for _ in range(20):
        ...     loss = model(torch.randn(3, 10)).square().sum()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     pruning.step()
        >>> pruning.finish()
        >>> int((model.weight == 0).sum())
        80
    """

    def __init__(
        self,
        model: nn.Module,
        final: float,
        *,
        end: int,
        begin: int = 0,
        every: int = 100,
        initial: float = 0.0,
    ):
        if not 0 <= initial <= final <= 1:
            raise ValueError(
                f"initial and final must be from 0 to 1 and rise, got {initial} and {final}"
            )
        if not 0 <= begin < end or every < 1:
            raise ValueError(
                "begin must be before end, and every positive, got "
                f"begin={begin}, end={end}, every={every}"
            )
        self.final, self.begin, self.end = final, begin, end
        self.every, self.initial, self.done = every, initial, 0
        layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        self.layers: list[Any] = [layer for _, layer in layers]  # with prune's attributes
        if not self.layers:
            raise ValueError("model has no nn.Linear layer")
        seen: dict[int, str] = {}
        for name, layer in layers:
            if prune.is_pruned(layer):
                raise ValueError(f"{name!r} is pruned already")
            if id(layer.weight) in seen:
                raise ValueError(f"{seen[id(layer.weight)]!r} and {name!r} share their weight")
            seen[id(layer.weight)] = name
        for layer in self.layers:
            # masks of ones: state_dict has the same names throughout
            prune.identity(layer, "weight")
        self.size = sum(layer.weight.numel() for layer in self.layers)

    def share(self) -> float:
        """s_t after the steps that are done."""
        part = (self.done - self.begin) / (self.end - self.begin)
        if part < 0:
            return 0.0
        return self.final + (self.initial - self.final) * (1 - min(part, 1.0)) ** 3

    def pruned(self) -> int:
        """How many weights are zero by a mask."""
        return sum(int((layer.weight_mask == 0).sum()) for layer in self.layers)

    def step(self) -> None:
        """After every step of the optimizer, which this does not take."""
        self.done += 1
        due = (self.done - self.begin) % self.every == 0 and self.begin <= self.done <= self.end
        if not due and self.done != self.end:
            return
        more = round(self.share() * self.size) - self.pruned()
        if more > 0:
            prune.global_unstructured(
                [(layer, "weight") for layer in self.layers],
                prune.L1Unstructured,
                # the weights as the optimizer left them: .weight is of the last forward
                {(layer, "weight"): layer.weight_orig.detach() for layer in self.layers},
                amount=more,
            )
        for layer in self.layers:
            layer.weight = layer.weight_orig.detach() * layer.weight_mask

    def finish(self) -> None:
        """Make the zeros part of plain weights: there are no masks any more."""
        for layer in self.layers:
            prune.remove(layer, "weight")

    def state_dict(self) -> dict[str, Any]:
        """The steps that are done; masks are in the model's."""
        return {"done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.done = int(state["done"])

"""Weights: the smallest ones, more and more of them, become zero."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parameters_to_vector, prune
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastgt.nn.sublayers import is_linear
from fastgt.ops.checks import integer


class GradualPruning:
    """Gradual magnitude pruning of all linear layers together, on ``torch.nn.utils.prune``.

    After step t of training, at ``begin``, every ``every`` steps from there and at ``end``, this
    share of the weights is zero::

        s_t = s_f + (s_i - s_f) (1 - (t - begin) / (end - begin))^3

    the smallest in absolute value over all layers; what is zero stays zero. The number is
    ``round(s_t size)``, at the end too. Masks are in the model's ``state_dict``, as ``weight_mask``
    beside ``weight_orig``, from the beginning until :meth:`finish`. Zeros are multiplied with like
    other numbers: time does not fall with them.

    As with ``torch.nn.utils.prune`` itself, a layer's ``weight`` is made when the layer is called;
    :meth:`step` brings it up to date, and only then may the model be copied with ``deepcopy``.

    Args:
        model: Whose ``nn.Linear`` layers, and torch-geometric's, lose weights; biases, norms and
            embeddings do not.
        final: s_f, at ``end`` and after.
        begin, end: Steps, in whole numbers, as ``int(0.75 * steps)`` is.
        every: Steps between two changes.
        initial: s_i, at ``begin``; of 0, at once.

    Raises:
        TypeError: ``begin``, ``end`` or ``every`` is no int: a float may never be reached.
        ValueError: A setting is out of range; there is no layer; or one is pruned already, shares
            its weight, has one that is made by a parametrization, is sharded or quantised or has no
            size yet, or belongs to a module that never calls it, as ``nn.MultiheadAttention``.
        RuntimeError: A call after :meth:`finish`.

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

    @torch.inference_mode(False)  # masks are saved for the backwards to come
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
        begin, end = integer("begin", begin), integer("end", end)
        every = integer("every", every)
        if not 0 <= begin < end or every < 1:
            raise ValueError(
                "begin must be before end, and every positive, got "
                f"begin={begin}, end={end}, every={every}"
            )
        self.final, self.begin, self.end = final, begin, end
        self.every, self.initial, self.done = every, initial, 0
        layers = [(name, m) for name, m in model.named_modules() if is_linear(m)]
        self.layers: list[Any] = [layer for _, layer in layers]  # with prune's attributes
        if not self.layers:
            raise ValueError("model has no nn.Linear layer, nor one of torch-geometric")
        for name, layer in layers:
            if prune.is_pruned(layer):
                raise ValueError(f"{name!r} is pruned already")
            if "weight" not in layer._parameters:
                raise ValueError(
                    f"the weight of {name!r} is made by a hook or a parametrization, as weight "
                    "norms are: remove that before it is pruned"
                )
            if is_lazy(layer.weight):
                raise ValueError(
                    f"the weight of {name!r} has no size yet: run the model once before"
                )
            if is_traceable_wrapper_subclass(layer.weight):
                raise ValueError(
                    f"the weight of {name!r} is a {type(layer.weight).__name__}: prune before it "
                    "is sharded or quantised"
                )
        weights, seen = {id(layer.weight) for layer in self.layers}, dict[int, str]()
        for name, module in model.named_modules():
            if isinstance(module, nn.MultiheadAttention):
                raise ValueError(
                    f"{name!r} is an nn.MultiheadAttention, which reads the weight of its output "
                    "layer without calling it: give the other parts of the model"
                )
            if type(module).__name__ == "HeteroDictLinear" and "pyg_lib" in sys.modules:
                raise ValueError(
                    f"{name!r} is a HeteroDictLinear, which with pyg_lib reads the weights of its "
                    "layers without calling them: give the other parts of the model"
                )
            # an embedding may have it too
            for key in weights & {id(p) for p in module._parameters.values()}:
                if key in seen:
                    raise ValueError(f"{seen[key]!r} and {name!r} share their weight")
                seen[key] = name
        for layer in self.layers:
            # masks of ones: state_dict has the same names throughout
            prune.identity(layer, "weight")
        self.size = sum(layer.weight.numel() for layer in self.layers)
        if not begin:
            self._prune()
        self._refresh()

    def share(self) -> float:
        """s_t after the steps that are done."""
        part = (self.done - self.begin) / (self.end - self.begin)
        if part < 0:
            return 0.0
        return self.final + (self.initial - self.final) * (1 - min(part, 1.0)) ** 3

    def pruned(self) -> int:
        """How many weights are zero by a mask."""
        self._check_masks()
        return sum(int((layer.weight_mask == 0).sum()) for layer in self.layers)

    @torch.inference_mode(False)
    def step(self) -> None:
        """After every step of the optimizer, which this does not take."""
        self._check_masks()
        self.done += 1
        due = (self.done - self.begin) % self.every == 0 and self.begin <= self.done <= self.end
        if due or self.done == self.end:
            self._prune()
        self._refresh()

    @torch.inference_mode(False)
    def finish(self) -> None:
        """Make the zeros part of plain weights: there are no masks any more."""
        self._check_masks()
        for layer in self.layers:
            prune.remove(layer, "weight")
        self.layers = []

    def state_dict(self) -> dict[str, Any]:
        """The steps that are done; masks are in the model's."""
        return {"done": self.done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.done = integer("done", state["done"], 0)

    def _check_masks(self) -> None:
        if not self.layers:
            raise RuntimeError("finish() has been called: there are no masks any more")

    def _prune(self) -> None:
        more = round(self.share() * self.size) - self.pruned()
        if more <= 0:
            return
        # prune.global_unstructured would do, but keeps every mask that there has been
        weights = parameters_to_vector(layer.weight_orig.detach() for layer in self.layers)
        masks = parameters_to_vector(layer.weight_mask for layer in self.layers)
        left = masks == 1
        masks[left] = prune.L1Unstructured(more).compute_mask(weights[left], masks[left])
        sizes = [layer.weight_mask.numel() for layer in self.layers]
        for layer, mask in zip(self.layers, masks.split(sizes), strict=True):
            layer.weight_mask.copy_(mask.view_as(layer.weight_mask))

    def _refresh(self) -> None:
        # what reads weights between two calls, a copy for one, finds neither old ones nor a graph
        with torch.no_grad():
            for layer in self.layers:
                layer.weight = layer.weight_orig * layer.weight_mask

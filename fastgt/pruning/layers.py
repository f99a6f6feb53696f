"""Layers: whole blocks that are left out, now and then or for good."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class SkipLayer(nn.Module):
    """A block that may be skipped as a whole: what went in comes out, and nothing is computed.

    In training it is skipped with probability p, by one draw a call for all nodes and graphs, so
    that its time is saved; outside training it is there, unless ``skipped`` says that it never is.
    Nothing is rescaled: a block that is skipped is the identity, as its residual path is. The draw
    is the host's, so that ``torch.compile`` makes a graph of each block in training.

    Args:
        block: Called as it is: ``block(x, graph)``, ``block(x, e, graph, ...)``.
        p: Probability of being skipped in training.
        passes: How many of its first arguments a block gives back anew, and comes out where it is
            skipped: 1 for x, 2 for ``(x, e)``.

    Attributes:
        skipped: For good, in training too; kept in ``state_dict``.

    Raises:
        ValueError: ``p`` or ``passes`` is out of range.

    Source:
        Huang et al., arXiv 1603.09382, section 3; Fan et al., LayerDrop, arXiv 1909.11556, section
        3.1, whose probabilities are not rescaled either; layers of GTSP, arXiv 2312.05479.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models.graph_transformer import GraphTransformerLayer
        >>> from fastgt.pruning import SkipLayer
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> layer = SkipLayer(GraphTransformerLayer(80, heads=8), p=0.2)
        >>> layer.skipped = True
        >>> x = torch.randn(3, 80)
        >>> layer(x, graph) is x
        True
    """

    def __init__(self, block: nn.Module, p: float = 0.0, *, passes: int = 1):
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p must be from 0 to 1, got {p}")
        if passes < 1:
            raise ValueError(f"passes must be positive, got {passes}")
        self.block, self.p, self.passes = block, p, passes
        self.skipped = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # drawn on the host: a device would have to be waited for
        if self.skipped or (self.training and self.p and float(torch.rand(())) < self.p):
            return args[0] if self.passes == 1 else args[: self.passes]
        return self.block(*args, **kwargs)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.skipped)

    def set_extra_state(self, state: Tensor) -> None:
        self.skipped = bool(state)

    def extra_repr(self) -> str:
        return f"p={self.p}" + (", skipped" if self.skipped else "")


def prune_layers(model: Model) -> Model:
    """A copy of the model without the layers that are ``skipped``, and without any
    :class:`SkipLayer`: its outputs are those of ``model.eval()``.

    The layers stand in an ``nn.ModuleList`` or ``nn.Sequential`` that the model goes through from
    the first to the last.

    Raises:
        ValueError: A skipped layer stands elsewhere, where its place cannot be left empty.

    Example:
        >>> from torch import nn
        >>> from fastgt.pruning import SkipLayer, prune_layers
        >>> layers = nn.Sequential(*(SkipLayer(nn.Linear(4, 4)) for _ in range(3)))
        >>> layers[1].skipped = True
        >>> prune_layers(layers)
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): Linear(in_features=4, out_features=4, bias=True)
        )
    """
    smaller = copy.deepcopy(model)
    for where, parent in list(smaller.named_modules()):
        children = list(parent.named_children())
        if not any(isinstance(child, SkipLayer) for _, child in children):
            continue
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            left = [child for _, child in children if not _is_skipped(child)]
            parent._modules.clear()
            for i, child in enumerate(left):
                parent.add_module(str(i), _without(child))
            continue
        for name, child in children:
            if _is_skipped(child):
                path = f"{where}.{name}" if where else name
                raise ValueError(f"{path!r} is skipped, but stands in no ModuleList or Sequential")
            setattr(parent, name, _without(child))
    return smaller


def _is_skipped(layer: nn.Module) -> bool:
    return isinstance(layer, SkipLayer) and layer.skipped


def _without(layer: nn.Module) -> nn.Module:
    return layer.block if isinstance(layer, SkipLayer) else layer

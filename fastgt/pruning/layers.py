"""Layers: whole blocks that are left out, now and then or for good."""

from __future__ import annotations

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fastgt.nn.sublayers import reset_sublayers
from fastgt.ops.checks import check_float, check_offsets, integer

Model = TypeVar("Model", bound=nn.Module)


class SkipLayer(nn.Module):
    """A block that may be skipped as a whole: what went in comes out, and nothing is computed.

    In training it is skipped with probability p, by one draw a call for all nodes and graphs, so
    that its time is saved; outside training it is there, unless ``skipped`` says that it never is.
    Nothing is rescaled: a block that is skipped is the identity, as its residual path is, and one
    that ends with a norm is no sum whose second term could be made smaller. The draw is the host's,
    so that ``torch.compile`` makes a graph of each block in training. Each rank of a distributed
    training draws for itself: ``DistributedDataParallel`` needs ``find_unused_parameters=True``.

    Args:
        block: Called as it is: ``block(x, graph)``, ``block(x, e, graph, ...)``.
        p: Probability of being skipped in training.
        passes: How many of its first arguments, given by position, a block gives back anew, and
            come out where it is skipped: 1 for x, 2 for ``(x, e)``.

    Attributes:
        skipped: For good, in training too; kept in ``state_dict``.

    Raises:
        TypeError: A call has fewer than ``passes`` arguments by position.
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
        passes = integer("passes", passes, 1)
        self.block, self.p, self.passes = block, p, passes
        self.skipped = False

    def reset_parameters(self) -> None:
        """Draw every parameter of the block anew."""
        reset_sublayers(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) < self.passes:
            raise TypeError(
                f"the first {self.passes} arguments (passes) must be given by position, got "
                f"{len(args)}"
            )
        # drawn on the host: a device would have to be waited for
        if self.skipped or (
            self.training and self.p and float(torch.rand((), device="cpu")) < self.p
        ):
            return args[0] if self.passes == 1 else args[: self.passes]
        return self.block(*args, **kwargs)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.skipped, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.skipped = bool(state)

    def extra_repr(self) -> str:
        return f"p={self.p}" + (", skipped" if self.skipped else "")


class DropPath(nn.Module):
    """Leaves a branch out for some graphs of a batch, in training.

    With m_g drawn for graph g, 1 with probability 1 - p and else 0, and for all its nodes alike::

        out_i = y_i m_g / (1 - p)

    Outside training nothing is left out.

    Args:
        p: Probability of leaving the branch of a graph out, from 0 to below 1.

    Raises:
        ValueError: ``p`` is out of range.

    Source:
        Huang et al., arXiv 1603.09382, section 3, with the mean kept as in its later forms; layers
        of GTSP, arXiv 2312.05479, whose code draws for every node.

    Example:
        >>> import torch
        >>> from fastgt.pruning import DropPath
        >>> out = DropPath(0.5)(torch.ones(5, 4), torch.tensor([0, 2, 5]))
        >>> bool((out[0] == out[1]).all()), set(out.unique().tolist()) <= {0.0, 2.0}
        (True, True)
    """

    def __init__(self, p: float):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must be from 0 to below 1, got {p}")
        self.p = p

    def draw(self, graphs: int, like: Tensor) -> Tensor:
        """m_g / (1 - p) in training, outside it ones, ``[G]``."""
        drawn = like.new_ones(graphs)
        return drawn.bernoulli_(1 - self.p).div_(1 - self.p) if self.training else drawn

    def forward(self, y: Tensor, offsets: Tensor) -> Tensor:
        """y ``[N, ...]``, offsets ``[G + 1]`` -> ``[N, ...]``."""
        check_float("y", y)
        check_offsets(offsets, len(y), y.device)
        if not self.training:
            return y
        sizes = offsets.diff()
        scale = self.draw(len(sizes), y).repeat_interleave(sizes, output_size=len(y))
        return y * scale.view(-1, *(1,) * (y.ndim - 1))

    def extra_repr(self) -> str:
        return f"p={self.p}"


@torch.inference_mode(False)  # its parameters are trained afterwards
def prune_layers(model: Model) -> Model:
    """A copy of the model without the layers that are ``skipped``, and without any
    :class:`SkipLayer`: its outputs are those of ``model.eval()``.

    The layers stand in an ``nn.ModuleList`` or ``nn.Sequential`` that the model goes through from
    the first to the last; those that are left are numbered anew.

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
        # not named_children, which passes over a module that stands there again
        children = parent._modules
        if isinstance(parent, SkipLayer) or not any(
            isinstance(child, SkipLayer) for child in children.values()
        ):
            continue
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            numbered = list(children) == [str(i) for i in range(len(children))]
            left = [(name, _without(m)) for name, m in children.items() if not _is_skipped(m)]
            children.clear()
            children.update((str(i) if numbered else name, m) for i, (name, m) in enumerate(left))
            continue
        for name, child in children.items():
            if _is_skipped(child):
                path = f"{where}.{name}" if where else name
                raise ValueError(f"{path!r} is skipped, but stands in no ModuleList or Sequential")
            children[name] = _without(child)
    if _is_skipped(smaller):
        raise ValueError("model itself is skipped: nothing is left")
    return cast(Model, _without(smaller))


def _is_skipped(layer: nn.Module | None) -> bool:
    return isinstance(layer, SkipLayer) and (layer.skipped or _is_skipped(layer.block))


def _without(layer: nn.Module | None) -> nn.Module | None:
    return _without(layer.block) if isinstance(layer, SkipLayer) else layer

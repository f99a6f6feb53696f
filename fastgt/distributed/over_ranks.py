"""What in a model depends on all rows of a graph, beside its operators: batch norms and dropout."""

from __future__ import annotations

import hashlib
import sys
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from fastgt.distributed.agreement import described
from fastgt.distributed.batch_norm import RankBatchNorm
from fastgt.distributed.graph import DistributedGraph
from fastgt.distributed.group import Group, is_on_all_ranks
from fastgt.ops.row_dropout import row_dropout

Kind = Literal["row", "edge", "graph"]
_KINDS: tuple[Kind, ...] = ("row", "edge", "graph")
_GENERATOR = "the random generator's state, which torch.manual_seed makes equal,"
Model = TypeVar("Model", bound=nn.Module)


def over_ranks(model: Model) -> Model:
    """Make batch norms and dropouts of a model those of all ranks. -> the model, changed in place.

    Called with a :class:`fastgt.distributed.DistributedGraph` among its arguments, the model then
    gives, and learns, on P ranks what it does on one: a batch norm takes mean and variance over the
    rows of all ranks, and dropout drops by the number of a row or an edge in the whole graph. Its
    seeds come from PyTorch's generator, so ranks have to seed it alike: they compare its states in
    every call. With a :class:`fastgt.Graph` the model is what it was. Parameters and buffers keep
    their names.

    A tensor of n rows is taken for nodes, one of e for edges and one of G for graphs. Where these
    numbers are equal on a rank, ranks ask each other; where they are equal on all of them, for
    nodes before edges before graphs.

    Only layers that are ``nn.BatchNorm1d`` and ``nn.Dropout`` themselves are changed; a call of
    ``torch.nn.functional.dropout`` inside a model is not.

    Args:
        model: Any module that takes a graph.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.distributed import DistributedGraph, over_ranks
        >>> from fastgt.models import GraphTransformer, GraphTransformerConfig
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> shard = DistributedGraph.from_graph(graph, torch.zeros(3, dtype=torch.int64))
        >>> model = over_ranks(GraphTransformer(GraphTransformerConfig(node_types=3, out_dim=2)))
        >>> model(torch.tensor([0, 2, 1]), shard).shape
        torch.Size([3, 2])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    rows = Rows()
    for layer in model.modules():
        if type(layer) is nn.BatchNorm1d:
            layer.__class__ = _BatchNormOfGraph
            layer.rows = rows  # type: ignore[assignment]
        elif type(layer) is nn.Dropout:
            layer.__class__ = _DropoutOfGraph
            layer.rows = rows  # type: ignore[assignment]
            rows.dropouts.append(layer)
    model.register_forward_pre_hook(rows.enter, with_kwargs=True)
    model.register_forward_hook(rows.leave, always_call=True)
    return model


class Rows:
    """What the rows of a tensor are, in a call of a model on a distributed graph.

    Layers are computed after it too, where ``torch.utils.checkpoint`` does so in the backward.

    Attributes:
        shard: The graph of the last call; None where that had none, and in a copy of the model.
        dropouts: Those of the model.
    """

    def __init__(self) -> None:
        self.shard: DistributedGraph | None = None
        self.dropouts: list[nn.Dropout] = []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"shard": None}

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, DistributedGraph)]
        shard = given[0] if given else None
        if shard is not None:
            told = {"training": repr(model.training)}
            if model.training and any(layer.p for layer in self.dropouts):
                told[_GENERATOR] = _state_of_generator(shard.device)
            shard.agree(type(model).__name__, told)
        self.shard = shard

    def leave(self, model: nn.Module, args: Any, result: Any) -> None:
        """Tells the other ranks, who may wait in the model, of an error that is this rank's alone.

        PyTorch calls it where the model raised too, with no result, and raises the error after it.
        """
        shard = self.shard
        error = sys.exc_info()[1] if result is None else None
        if shard is None or not isinstance(error, Exception) or is_on_all_ranks(error):
            return
        try:
            shard.agree(type(model).__name__, {}, error)
        except Exception as raised:
            if raised is not error:
                raise

    def kind(self, x: Tensor, training: bool) -> Kind:
        """Whether ``x [R, ...]`` is of nodes, of edges or of graphs: the same on all ranks.

        ``training``: of the layer, which ranks compare.
        """
        shard = self.shard
        assert shard is not None
        sizes = shard.sizes_of_ranks
        fits = (sizes[shard.group.rank] == len(x)).to(torch.uint8)
        names = [name for name, fit in zip(_KINDS, fits.tolist(), strict=True) if fit]
        several = any(len(set(of_rank)) < len(of_rank) for of_rank in sizes.tolist())
        told = {"x": described(x, rows=True), "training": repr(training)}
        if not several:
            told["rows of x"] = " ".join(names)
        misfit = ValueError(
            f"a tensor of {len(x)} rows is neither of the rank's {shard.num_rows} nodes nor of its "
            f"{shard.num_edges} edges nor of {shard.num_graphs} graphs"
        )
        shard.agree("a batch norm or dropout", told, None if names else misfit)
        if several:
            # what fits on every rank
            fits = 1 - shard.group.largest(1 - fits)
            names = [name for name, fit in zip(_KINDS, fits.tolist(), strict=True) if fit]
            if not names:
                raise misfit
        return names[0]


def _state_of_generator(device: torch.device) -> str:
    """Of the one that dropout on that device draws from."""
    state = torch.get_rng_state()
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
    return hashlib.blake2b(state.numpy().tobytes(), digest_size=7).hexdigest()


class _BatchNormOfGraph(RankBatchNorm):
    rows: Rows

    @property
    def group(self) -> Group:  # type: ignore[override]
        # not kept: a copy of the model would have to copy its processes
        assert self.rows.shard is not None
        return self.rows.shard.group

    def forward(self, x: Tensor) -> Tensor:
        """x ``[R, C]`` -> the same shape. What graphs have, every rank has: it is one's own."""
        if self.rows.shard is None or self.rows.kind(x, self.training) == "graph":
            return nn.BatchNorm1d.forward(self, x)
        return super().forward(x)


class _DropoutOfGraph(nn.Dropout):
    rows: Rows

    def forward(self, x: Tensor) -> Tensor:
        """x ``[R, ...]`` -> the same shape."""
        shard = self.rows.shard
        if shard is None or not (self.training and self.p):
            return super().forward(x)
        numbers = {"row": shard.part.rows, "edge": shard.part.edge, "graph": None}
        return row_dropout(x, self.p, numbers=numbers[self.rows.kind(x, self.training)])

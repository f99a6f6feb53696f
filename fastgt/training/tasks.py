"""What the loop trains on: many graphs, pairs of them, one graph, or batches of its nodes."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fastgt.datasets import Batch, GraphSet, NodeSet, TokenSet
from fastgt.distributed import DistributedGraph
from fastgt.models import log_likelihoods, matches
from fastgt.shard import NotOnRanks
from fastgt.training import optimization
from fastgt.training.ranks import GraphRanks, Ranks
from fastgt.training.recipe import Recipe
from fastgt.training.scores import loss_terms


class Task(Protocol):
    """What is learned.

    Attributes:
        title: Of the curve.
        sizes: Examples in each of train, val and test.
    """

    title: str
    sizes: dict[str, int]

    def loss(self, chosen: Tensor) -> Tensor:
        """Mean loss of these training examples: in each process of its share, so weighted that
        :meth:`fastgt.training.ranks.Ranks.mean` gives that of all."""

    def outputs(self, split: str, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and labels of these examples of a split."""


class _Task:
    """A model, called as it wants to be."""

    def __init__(
        self, title: str, recipe: Recipe, model: nn.Module, takes_edges: bool, ranks: Ranks
    ):
        self.title, self.recipe = title, recipe
        self.device = next(model.parameters()).device
        self._model, self._takes_edges, self._ranks = model, takes_edges, ranks

    def _terms(self, output: Tensor, y: Tensor) -> Tensor:
        loss, weight = loss_terms(self.recipe.loss, output, y, self._ranks.total)
        return self._ranks.divided(loss, weight)

    def _output(self, batch: Batch) -> Tensor:
        inputs = (batch.node, batch.edge) if self._takes_edges else (batch.node,)
        with optimization.autocast(self.recipe.precision, self.device):
            return self._model(*inputs, batch.graph, **batch.encodings)


class GraphTask(_Task):
    """Graphs, or nodes of many graphs: an example is a graph."""

    def __init__(
        self,
        title: str,
        recipe: Recipe,
        data: GraphSet,
        model: nn.Module,
        *,
        takes_edges: bool,
        ranks: Ranks,
    ):
        super().__init__(title, recipe, model, takes_edges, ranks)
        self.data = data
        self._examples = {name: self._grouped(name, x) for name, x in data.splits.items()}
        self.sizes = {name: len(x) for name, x in self._examples.items()}

    def loss(self, chosen: Tensor) -> Tensor:
        batch = self._batch("train", chosen)
        return self._terms(self._output(batch), batch.y)

    def outputs(self, split: str, chosen: Tensor) -> tuple[Tensor, Tensor]:
        batch = self._batch(split, chosen)
        return self._output(batch), batch.y

    def _grouped(self, name: str, graphs: Tensor) -> Tensor:
        """The graphs of each example of that split, ``[examples, graphs]``."""
        return graphs[:, None]

    def _batch(self, split: str, chosen: Tensor) -> Batch:
        return self.data.batch(self._examples[split][chosen].flatten()).to(self.device)


class PairTask(GraphTask):
    """Which node of one graph is which of another: an example is two graphs of the set."""

    def _grouped(self, name: str, graphs: Tensor) -> Tensor:
        if len(graphs) % 2:
            raise ValueError(f"{name} has {len(graphs)} graphs, and a pair has two")
        pairs = graphs.view(-1, 2)
        if (pairs[:, 0] % 2).any() or (pairs[:, 1] != pairs[:, 0] + 1).any():
            raise ValueError(f"{name} must have graphs 2p and 2p + 1 after each other")
        return pairs

    def _output(self, batch: Batch) -> Tensor:
        """``[N, 2]``: what loss and metric take of a node."""
        found = super()._output(batch)
        of_nodes = log_likelihoods(found, batch.y, batch.graph)
        partner = matches(found, batch.graph, self.recipe.config.threshold)
        return torch.stack([of_nodes, partner.to(of_nodes.dtype)], 1)


class NodeTask(_Task):
    """Nodes of one graph: the only example is the graph, and a split is a mask of its nodes.

    With ``shard``, of its rows alone: other processes have the others.
    """

    def __init__(
        self,
        title: str,
        recipe: Recipe,
        data: NodeSet,
        split: int,
        model: nn.Module,
        *,
        takes_edges: bool,
        shard: DistributedGraph | None = None,
    ):
        ranks = Ranks() if shard is None else GraphRanks(shard.group)
        super().__init__(title, recipe, model, takes_edges, ranks)
        masks = data.splits[split]
        if shard is None:
            graph = Batch(data.graph, data.node, data.edge, data.y, data.encodings)
            self._graph = graph.to(self.device)
        else:
            self._graph = _shared(data, shard)
            masks = {name: shard.own(mask) for name, mask in masks.items()}
        self._rows = {name: mask.nonzero()[:, 0].to(self.device) for name, mask in masks.items()}
        self.sizes = dict.fromkeys(self._rows, 1)
        self._evaluated: Tensor | None = None

    def loss(self, chosen: Tensor) -> Tensor:
        self._evaluated = None
        rows = self._rows["train"]
        return self._terms(self._output(self._graph)[rows], self._graph.y[rows])

    def outputs(self, split: str, chosen: Tensor) -> tuple[Tensor, Tensor]:
        # validation and test between two steps have the same forward
        if self._evaluated is None:
            self._evaluated = self._output(self._graph)
        rows = self._rows[split]
        return self._evaluated[rows], self._graph.y[rows]

    def _output(self, batch: Batch) -> Tensor:
        try:
            return super()._output(batch)
        except NotOnRanks as error:
            raise ValueError(
                f"{self.recipe.model} does not run on a graph that processes share with "
                f"--graph-parallel: {error}"
            ) from error


def _shared(data: NodeSet, shard: DistributedGraph) -> Batch:
    """What this process has of the graph's nodes and edges."""

    def own(x: Tensor, kind: Literal["row", "edge"] = "row") -> Tensor:
        return shard.own(x, kind).to(shard.device)

    edge = None if data.edge is None else own(data.edge, "edge")
    encodings = {name: own(x) for name, x in data.encodings.items()}
    # models take it where they take a Graph
    graph: Any = shard
    return Batch(graph, own(data.node), edge, own(data.y), encodings)


class TokenTask(_Task):
    """Nodes of one graph, each with tokens that were sampled before: an example is a node."""

    def __init__(
        self,
        title: str,
        recipe: Recipe,
        data: NodeSet,
        split: int,
        model: nn.Module,
        tokens: TokenSet,
    ):
        super().__init__(title, recipe, model, False, Ranks())
        self._tokens, self._y, self._encodings = tokens, data.y, data.encodings
        self._nodes = {name: mask.nonzero()[:, 0] for name, mask in data.splits[split].items()}
        self.sizes = {name: len(nodes) for name, nodes in self._nodes.items()}

    def loss(self, chosen: Tensor) -> Tensor:
        return self._terms(*self.outputs("train", chosen))

    def outputs(self, split: str, chosen: Tensor) -> tuple[Tensor, Tensor]:
        tokens, nodes = self._tokens.batch(self._nodes[split][chosen])
        given = {name: x[nodes] for name, x in self._encodings.items()}
        if self.recipe.config.parts != "local":
            given["nodes"] = nodes
        moved = {name: x.to(self.device) for name, x in given.items()}
        with optimization.autocast(self.recipe.precision, self.device):
            return self._model(tokens.to(self.device), **moved), self._y[nodes].to(self.device)

"""The boundaries of a batch's graphs where the nodes of a graph lie on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgt.distributed.cached import cached_property
from fastgt.distributed.eager import eager
from fastgt.ops.checks import dropout_key
from fastgt.shard import Roles, Shard

if TYPE_CHECKING:
    from fastgt.distributed.graph import DistributedGraph


class RankOffsets(Shard):
    """``graph_ptr`` of a :class:`fastgt.distributed.DistributedGraph`.

    Operators over the graphs of a batch take it for ``offsets``: ``linear_attention``,
    ``sgformer_attention``, ``global_attention``, ``segment_sum``, ``segment_mean``,
    ``segment_max`` and ``virtual_node``. They then run over the nodes of all ranks. What they give
    for graphs, ``[G, ...]``, every rank has.

    Attributes:
        shard: The distributed graph.
        local: ``[G + 1]`` int64 boundaries in the rank's own rows.
        sizes: ``[G]`` int64, the nodes of each graph on all ranks.
    """

    def __init__(self, shard: DistributedGraph, local: Tensor):
        self.shard, self.local, self.group = shard, local, shard.group
        self.sizes = shard.part.whole.graph_ptr.diff()

    @cached_property
    def of_ranks(self) -> Tensor:
        """``[P, G + 1]``, ``local`` of every rank."""
        return self.group.gathered(self.local)

    def of_rows(self, x: Tensor) -> Tensor:
        """What graphs have, ``[G or 1, ...]``, for each of the rank's rows ``[n, ...]``."""
        x = x.expand(len(self.sizes), *x.shape[1:])
        return x.repeat_interleave(self.local.diff(), 0, output_size=self.shard.num_rows)

    @cached_property
    def pair_numbers(self) -> tuple[Tensor, Tensor]:
        """``[n]`` of queries and ``[n]`` of keys: their sum is a pair's number in the whole batch.

        Pairs are numbered graph after graph, and in each row after row.
        """
        begins, pairs = self.shard.part.whole.graph_ptr[:-1], self.sizes.square().cumsum(0)
        place = self.shard.part.rows - self.of_rows(begins)
        first = self.of_rows(pairs - self.sizes.square())
        return first + place * self.of_rows(self.sizes), place

    @property
    def shape(self) -> torch.Size:
        return self.local.shape

    @property
    def device(self) -> torch.device:
        return self.local.device

    @eager
    def run(self, op: Callable[..., Any], roles: Roles, arguments: Mapping[str, Any]) -> Any:
        """An operator over the graphs of a batch; called by the operator itself."""
        from fastgt.distributed.over_graphs import OPERATORS

        problem: Exception | None = None
        if "offsets" not in arguments:
            problem = TypeError(f"{op.__name__} takes a graph, got its graph_ptr")
            self.shard.agree(op.__name__, {}, problem)
        call = {name: x for name, x in arguments.items() if name != "offsets"}
        if call.get("dropout_p"):
            try:
                call["dropout_seed"] = dropout_key(call["dropout_seed"], self.device)
            except (TypeError, ValueError) as error:
                problem = error
        self.shard.check_call(op, roles, call, problem=problem)
        return OPERATORS[op.__name__](self, **call)

"""A tensor of own columns with what other ranks have of the halo."""

from __future__ import annotations

from torch import Tensor

from fastgt.distributed.graph import DistributedGraph
from fastgt.graph import Graph
from fastgt.shard import Roles


def halo_exchange(x: Tensor, shard: DistributedGraph) -> Tensor:
    """``x`` of own columns with what the other ranks have of the halo.

    For what operators do not do: they fetch what they need themselves. All ranks call it.
    Differentiable, twice too: gradients go back to the ranks that own the columns, and are summed
    there in a fixed order.

    Args:
        x: ``[m, ...]``, of any dtype.
        shard: The rank's share of a graph.

    Returns:
        ``[m + h, ...]``, the columns of ``shard.local``, the bipartite :class:`fastgt.Graph` from
        the rank's rows to what they read.

    Raises:
        TypeError: ``shard`` is no DistributedGraph.
        ValueError: x has another number of rows than the rank has columns; names both.
        RuntimeError: Ranks disagree about x, or another rank refuses its own.

    Example:
        >>> import torch
        >>> from fastgt import Graph, aggregate
        >>> from fastgt.distributed import DistributedGraph, halo_exchange
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> shard = DistributedGraph.from_graph(graph, torch.zeros(3, dtype=torch.int64))
        >>> aggregate(halo_exchange(torch.eye(3), shard), shard.local).argmax(1).tolist()
        [2, 0, 1]
    """
    if not isinstance(shard, DistributedGraph):
        hint = ": from_graph gives a rank its share" if isinstance(shard, Graph) else ""
        raise TypeError(f"shard must be a DistributedGraph, got {type(shard).__name__}{hint}")
    shard.check_call(halo_exchange, Roles(columns=("x",)), {"x": x})
    return shard.assembled(x, shard.exchange.fetched([x])[0])

"""segment_sum, segment_mean, segment_max and virtual_node: aggregations over the graphs of a batch.

The graphs of a batch are the rows of a bipartite graph whose edges are the nodes, each on its own,
in order: everything else is ``aggregate``'s.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastgt.graph import Graph
from fastgt.ops.aggregate import Reduce, aggregate, aggregate_in_order
from fastgt.ops.checks import autocasts, check_float, check_offsets, without_autocast
from fastgt.ops.implementation import Impl, resolve_impl
from fastgt.prepared import ColumnWalk, Prepared
from fastgt.shard import Roles, Shard


def segment_sum(x: Tensor, offsets: Tensor | Shard, *, impl: Impl | None = None) -> Tensor:
    """The sum over the nodes of each graph of a ragged batch.

    For graph g, channel by channel, ``out_g = sum_i x_i`` over nodes ``offsets[g]`` to
    ``offsets[g + 1]``: 0 for a graph without nodes. The result is the same, bit for bit, every
    time, and what is in one graph, NaN included, reaches no other.

    Args:
        x: ``[N, ...]``: float16, bfloat16, float32 or float64, any strides.
        offsets: ``[G + 1]`` int32 or int64 boundaries (``Graph.graph_ptr``, or ``ptr`` of a PyG
            batch); values are checked on a CPU only.
        impl: As in :func:`fastgt.neighborhood_attention`.

    Returns:
        ``[G, ...]`` in x's dtype, summed in float32 (float64 for float64), also within
        ``torch.autocast``: as for PyTorch's own sums, nothing is cast down.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.

    Source:
        ``torch_geometric.nn.global_add_pool``.

    Example:
        >>> import torch
        >>> from fastgt import segment_sum
        >>> segment_sum(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 2, 3])).tolist()
        [3.0, 0.0, 3.0]
    """
    if isinstance(offsets, Shard):
        return offsets.run(segment_sum, _ROLES, locals())
    return _pool(x, offsets, "sum", impl)


def segment_mean(x: Tensor, offsets: Tensor | Shard, *, impl: Impl | None = None) -> Tensor:
    """The mean over the nodes of each graph of a ragged batch: 0 for a graph without nodes.

    See :func:`segment_sum`; source ``torch_geometric.nn.global_mean_pool``.

    Example:
        >>> import torch
        >>> from fastgt import segment_mean
        >>> segment_mean(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 2, 3])).tolist()
        [1.5, 0.0, 3.0]
    """
    if isinstance(offsets, Shard):
        return offsets.run(segment_mean, _ROLES, locals())
    return _pool(x, offsets, "mean", impl)


def segment_max(x: Tensor, offsets: Tensor | Shard, *, impl: Impl | None = None) -> Tensor:
    """The maximum over the nodes of each graph of a ragged batch: 0 for a graph without nodes.

    Its gradient goes to the first of the largest. See :func:`segment_sum`; source
    ``torch_geometric.nn.global_max_pool``.

    Example:
        >>> import torch
        >>> from fastgt import segment_max
        >>> segment_max(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 2, 3])).tolist()
        [2.0, 0.0, 3.0]
    """
    if isinstance(offsets, Shard):
        return offsets.run(segment_max, _ROLES, locals())
    return _pool(x, offsets, "max", impl)


def virtual_node(
    x: Tensor, state: Tensor, offsets: Tensor | Shard, *, impl: Impl | None = None
) -> tuple[Tensor, Tensor]:
    """What a virtual node of each graph gives to its nodes, and what it receives from them.

    For node i of graph g, channel by channel::

        y_i = x_i + state_g,   pooled_g = state_g + sum_i y_i      i over the nodes of g

    Args:
        x: ``[N, ...]``: float16, bfloat16, float32 or float64, any strides.
        state: ``[G, ...]`` the virtual nodes, of x's channels and dtype. Within ``torch.autocast``
            the dtypes may differ, and the wider one is taken for both.
        offsets, impl: As in :func:`segment_sum`.

    Returns:
        ``(y, pooled)``, like x and like state: y goes on to the message passing, pooled to the
        virtual nodes' own update (:class:`fastgt.nn.VirtualNode`).

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.

    Source:
        Cai et al., On the Connection Between MPNN and Graph Transformer, arXiv 2301.11956,
        section 3, and Gilmer et al., arXiv 1704.01212, section 5.2; with the residuals of the
        former's code.

    Example:
        >>> import torch
        >>> from fastgt import virtual_node
        >>> x, state = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0])
        >>> [t.tolist() for t in virtual_node(x, state, torch.tensor([0, 2, 3]))]
        [[11.0, 12.0, 23.0], [33.0, 43.0]]
    """
    if isinstance(offsets, Shard):
        return offsets.run(virtual_node, _ROLES, locals())
    _check(x, offsets)
    check_float("state", state)
    if autocasts(x.device.type):
        dtype = torch.promote_types(x.dtype, state.dtype)
        x, state = x.to(dtype), state.to(dtype)
    graphs = offsets.shape[0] - 1
    if state.dtype != x.dtype:
        raise TypeError(f"state is {state.dtype} but x is {x.dtype}")
    if state.device != x.device:
        raise ValueError(f"state is on {state.device} but x is on {x.device}")
    if state.shape != (graphs, *x.shape[1:]):
        raise ValueError(
            f"state must be {[graphs, *x.shape[1:]]}, of G graphs and x's channels, got "
            f"{list(state.shape)}"
        )
    batch = _batch(offsets, x.shape[0])
    y = _aggregate(state, batch.transpose(), x, "sum", impl)
    return y, state + _aggregate(None, batch, y, "sum", impl)


_ROLES = Roles(rows=("x",))


def of_nodes(state: Tensor, offsets: Tensor, nodes: int, impl: Impl | None) -> Tensor:
    """What a graph has, ``[G, ...]``, for each of its nodes ``[N, ...]``.

    Other than that of an index, its gradient is summed in float32 (float64), in a fixed order.
    """
    return _aggregate(state, _batch(offsets, nodes).transpose(), None, "sum", impl)


def _pool(x: Tensor, offsets: Tensor, reduce: Reduce, impl: Impl | None) -> Tensor:
    _check(x, offsets)
    batch = functools.partial(_batch, offsets, x.shape[0])
    strided = x.layout == torch.strided
    if strided and not torch.compiler.is_compiling() and resolve_impl(impl, x) == "cpp":
        return aggregate_in_order(x, offsets, reduce, batch)
    # on a CPU the gradient goes by row
    columns = torch.is_grad_enabled() and x.requires_grad and x.device.type != "cpu"
    return _aggregate(None, batch(columns=columns), x, reduce, impl)


def _aggregate(
    state: Tensor | None,
    batch: Graph,
    x: Tensor | None,
    reduce: Reduce,
    impl: Impl | None,
) -> Tensor:
    """``aggregate`` in the dtype of what is given."""
    with without_autocast(batch.device.type):
        return aggregate(state, batch, edge_value=x, reduce=reduce, impl=impl)


def _check(x: Tensor, offsets: Tensor) -> None:
    check_float("x", x)
    if x.ndim == 0:
        raise ValueError("x must be [N, ...], got a scalar")
    check_offsets(offsets, x.shape[0], x.device)


def _batch(offsets: Tensor, nodes: int, *, columns: bool = True) -> Graph:
    """Rows are graphs, columns and edges nodes; with the column walk that a backward may take."""
    offsets = offsets.contiguous()  # kernels read it as it lies
    graphs = offsets.shape[0] - 1
    like: Any = {"dtype": offsets.dtype, "device": offsets.device}
    ends, both = torch.arange(nodes + 1, **like), torch.arange(2, **like)
    node, prepared = ends[:-1], None
    if columns:
        graph = torch.arange(graphs, **like)
        graph_of = graph.repeat_interleave(offsets.diff(), output_size=nodes)
        prepared = Prepared(columns=ColumnWalk(ends, graph_of, node, node))
    return Graph(graphs, nodes, offsets, node, node, both * graphs, both * nodes, prepared)

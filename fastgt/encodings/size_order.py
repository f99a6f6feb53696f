"""A batch's graphs in the order of their sizes, so that many small ones are computed at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgt.graph import Graph
from fastgt.ops.checks import check_square
from fastgt.plans import free_memory

if TYPE_CHECKING:
    import scipy.sparse as sp


class Block(NamedTuple):
    """Consecutive graphs of a :class:`SizeOrder`.

    Attributes:
        first, last: Their nodes are ``first:last`` of the order.
        width: Nodes of the largest.
    """

    first: int
    last: int
    width: int


class SizeOrder(NamedTuple):
    """The nodes of the smallest graph first.

    Attributes:
        nodes: ``[N]``, the number in the batch of each node of this order.
        ptr: ``[G + 1]``; in this order the graphs own the nodes ``ptr[g]:ptr[g + 1]``.
        graphs: ``[G]``, their numbers in the batch.
        a: ``[N, N]`` float64; ``a[i, j]`` sums the edges j -> i, entry after entry as given.
    """

    nodes: np.ndarray
    ptr: np.ndarray
    graphs: np.ndarray
    a: sp.csr_array

    def blocks(self, room: int, *, equal: bool = False) -> Iterator[Block]:
        """As many graphs at once as nodes times the largest graph's stay within ``room``.

        A graph that is larger is a block of its own. ``equal``: graphs of one size.
        """
        ptr, sizes = self.ptr.tolist(), np.diff(self.ptr).tolist()
        start = bisect_right(sizes, 0)
        while start < len(sizes):
            begin = ptr[start]

            def entries(g: int, begin: int = begin) -> int:
                return (ptr[g + 1] - begin) * sizes[g]

            largest = sizes[start] if equal else sizes[-1]
            end = min(
                bisect_right(range(len(sizes)), room, start, key=entries),
                bisect_right(sizes, largest),
            )
            end = max(end, start + 1)
            yield Block(begin, ptr[end], sizes[end - 1])
            start = end

    def within(self, block: Block, data: np.ndarray) -> sp.csr_array:
        """The block's part of a matrix with the entries of ``a`` and those values."""
        import scipy.sparse as sp

        first, last = block.first, block.last
        begin, end = self.a.indptr[[first, last]]
        fields = data[begin:end], self.a.indices[begin:end] - first
        size = last - first
        return sp.csr_array((*fields, self.a.indptr[first : last + 1] - begin), shape=(size, size))

    def own_columns(self, block: Block, m: sp.csr_array) -> sp.csr_array:
        """``[nodes, width]``: the rows of ``m``, whose columns begin with those of the graph."""
        import scipy.sparse as sp

        begin, end = self.ptr.searchsorted([block.first, block.last], "right") - 1
        ends = m.indptr[self.ptr[begin : end + 1] - block.first]
        local = m.indices - np.repeat(self.ptr[begin:end] - block.first, np.diff(ends))
        return sp.csr_array((m.data, local, m.indptr), shape=(m.shape[0], block.width))

    def laplacians(self, block: Block) -> np.ndarray:
        """``[G, width, width]``: D - A of the block's graphs, which are all of one size."""
        n = block.width
        a = self.own_columns(block, self.within(block, self.a.data)).toarray().reshape(-1, n, n)
        found = -a
        found[:, range(n), range(n)] += a.sum(2)
        return found

    def given_order(self, x: np.ndarray, graph: Graph) -> Tensor:
        """``[N, ...]`` of this order -> float32 in the order of the batch, on its device."""
        found = np.empty(x.shape, np.float32)
        found[self.nodes] = x
        return torch.from_numpy(found).to(graph.device)


def size_order(graph: Graph, name: str) -> SizeOrder:
    """The graph in the order of its sizes, for the function of that name."""
    n = check_square(graph)
    try:
        import scipy.sparse as sp
    except ImportError as error:
        raise ImportError(f"{name} needs scipy, which is not installed") from error
    given, row_ptr, col = (
        x.cpu().numpy().astype(np.int64) for x in (graph.graph_ptr, graph.row_ptr, graph.col)
    )
    sizes = np.diff(given)
    graphs = np.argsort(sizes, kind="stable")
    ptr = np.concatenate([[0], np.cumsum(sizes[graphs])])
    nodes = np.arange(n) + np.repeat(given[graphs] - ptr[:-1], sizes[graphs])
    place = np.empty(n, np.int64)
    place[nodes] = np.arange(n)
    degree = np.diff(row_ptr)[nodes]
    ends = np.concatenate([[0], np.cumsum(degree)])
    slot = np.arange(len(col)) + np.repeat(row_ptr[nodes] - ends[:-1], degree)
    a = sp.csr_array((np.ones(len(col)), place[col[slot]], ends), shape=(n, n))
    return SizeOrder(nodes, ptr, graphs, a)


def undirected(order: SizeOrder, symmetrize: bool) -> SizeOrder:
    """The same with each entry once, where edges go both ways; ``symmetrize``: they come to do."""
    return order._replace(a=both_ways(order.a.copy(), order.nodes, symmetrize))


def both_ways(a: sp.csr_array, nodes: np.ndarray, symmetrize: bool) -> sp.csr_array:
    """``a``, whose duplicates are summed in place, if it is symmetric; or made so.

    ``nodes`` numbers its rows for the message.
    """
    a.sum_duplicates()
    if symmetrize:
        return a.maximum(a.T).tocsr()
    apart = (a - a.T).tocoo()
    if apart.nnz:
        i, j = (int(x[0]) for x in apart.coords)
        edges = f"{a[j, i]:.0f} edges from node {nodes[i]} to {nodes[j]} but {a[i, j]:.0f} back"
        raise ValueError(f"graph must be symmetric, has {edges}; symmetrize=True makes it so")
    return a


def check_room(name: str, nodes: int, needed: int) -> None:
    """Refuse what would not fit into the memory that is free, before any of it is taken."""
    free = free_memory(torch.device("cpu"))
    if needed > free:
        raise ValueError(
            f"{name} takes {needed / 1e9:,.1f} GB for graphs of up to {nodes:,} nodes, and "
            f"{free / 1e9:,.1f} GB are free: it is for smaller graphs"
        )


@contextmanager
def progress_of(name: str, total: int, shown: bool) -> Iterator[Callable[[int], object]]:
    """What takes the number of nodes that are done, and shows a bar if that is asked for."""
    if not shown:
        yield lambda done: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=name, unit=" nodes", unit_scale=True) as bar:
        yield bar.update

"""Which rank owns each node of a graph, so that costs are balanced and few edges are cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastgt.cpu import partition as cpu
from fastgt.extras import require
from fastgt.graph import Graph
from fastgt.graph_build import check_device, check_index, check_range, size_of
from fastgt.reordering import neighbour_pattern

Method = Literal["metis", "ldg", "contiguous", "hash"]
ROW_COST = 12  # edges whose time in a step of GraphTransformer on a CPU is that of a node
SLACK = 1.05  # of LDG: the cost at which a rank attracts no more, in shares of the mean
CHUNK = 1 << 22  # edges that LDG takes at once


def partition(
    graph: Graph, parts: int, method: Method = "metis", *, row_cost: int = 0, seed: int = 0
) -> Tensor | tuple[Tensor, Tensor]:
    """The rank that owns each node. A rank has the edges of the rows that it owns.

    The same call gives the same ranks. In a batch graphs may be cut. With more ranks than nodes
    some ranks own none. Computed on the CPU.

    What a row costs is balanced: its edges, and ``row_cost``. Layers compute on nodes too, and keep
    what they computed. In a step of GraphTransformer on a CPU a node takes the time of 12 edges.

    ``"metis"``
        Few edges between ranks, by METIS: recursive bisection for up to 8 ranks, and for more its
        k-way partition, whose ranks cost up to 3 % more than the mean. Directions, duplicates and
        self loops do not matter. Needs O(N + E) memory and ``pip install "fastgt[reorder]"``.
    ``"ldg"``
        Linear deterministic greedy: rows come in order, and row v goes to the rank P with the
        largest ``|P & N(v)| * (1 - cost(P) / C)``. ``|P & N(v)|`` counts the edges of v to
        columns that P owns by then. C is 1.05 times the mean cost of a rank. Ties go to the
        rank that costs least, then to that with the fewest rows, then to the first. A row that
        costs nothing goes to the rank with the fewest rows. No rank costs more than C and one row.
        Takes O(N) memory beside the graph, which may lie in a file. In a bipartite graph a column
        goes to the rank of the first row that reads it.
    ``"contiguous"``
        Ranges of nodes of about equal cost: node v goes to the rank
        ``P * (before(v) + cost(v) / 2) // total``. For orders in which neighbours stand near each
        other.
    ``"hash"``
        A hash of the node's number and the seed: what takes no time and cuts most. Balances rows.

    Args:
        graph: The graph.
        parts: How many ranks.
        method: One of the four.
        row_cost: How many edges a row costs as much as, beside its own.
        seed: Of ``"metis"`` and ``"hash"``; the others draw nothing.

    Returns:
        ``[N]`` int64, on the device of the graph. Of a bipartite graph a pair: for rows and for
        columns.

    Raises:
        TypeError: ``graph`` is no Graph, or ``parts``, ``row_cost`` or ``seed`` no int.
        ValueError: There is no such method, ``parts`` is less than 1, or ``row_cost`` is
            negative or more than 2^20.
        ImportError: METIS is not installed.
        RuntimeError: ``"ldg"`` has no compiled kernels.

    Sources:
        Karypis and Kumar, A fast and high quality multilevel scheme for partitioning irregular
        graphs, SIAM J. Sci. Comput. 20(1), 1998.
        Stanton and Kliot, Streaming graph partitioning for large distributed graphs, KDD 2012,
        section 3, LDG; its capacities count nodes.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.distributed import partition
        >>> path = torch.tensor([[1, 0, 2, 1, 3, 2, 4, 3, 5, 4], [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]])
        >>> partition(Graph.from_edge_index(path), 2, "contiguous")
        tensor([0, 0, 0, 1, 1, 1])
    """
    check_graph(graph)
    parts = checked_parts(parts)
    if method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    row_cost = size_of(row_cost, "row_cost")
    if row_cost > 2**20:
        raise ValueError(f"row_cost must be at most 2^20, got {row_cost}")
    if graph.device.type == "meta":
        raise RuntimeError("a graph on the meta device has no edges to partition")
    here = graph if graph.device.type == "cpu" else graph.to("cpu")
    rows, cols = METHODS[method](here, parts, row_cost, seed)
    if is_square(graph):
        return rows.to(graph.device)
    return rows.to(graph.device), cols.to(graph.device)


def check_part(
    graph: Graph, part: Tensor | tuple[Tensor, Tensor], parts: int | None = None
) -> tuple[Tensor, Tensor, int]:
    """-> the rank of each row, that of each column, and how many ranks there are.

    Both are the same tensor where columns are the same nodes as rows, else ``part`` is a pair.
    Without ``parts`` there are as many as the largest rank asks for.

    Raises:
        TypeError: ``part`` is not made of tensors of integers.
        ValueError: It has another length than the graph, is on another device, or has a rank that
            is none of ``parts``.
    """
    check_graph(graph)
    if is_square(graph):
        if isinstance(part, (tuple, list)):
            raise TypeError(
                f"part must be one tensor [{graph.num_rows}] for a graph whose columns are its "
                f"rows, got {len(part)} tensors"
            )
        given = {"part": (part, graph.num_rows, "nodes")}
    else:
        if not isinstance(part, (tuple, list)) or len(part) != 2:
            found = f"{len(part)} tensors" if isinstance(part, (tuple, list)) else "one tensor"
            raise TypeError(
                f"part must be a pair (rows [{graph.num_rows}], columns [{graph.num_cols}]) for a "
                f"bipartite graph, got {found}"
            )
        given = {
            "part[0] (rows)": (part[0], graph.num_rows, "rows"),
            "part[1] (columns)": (part[1], graph.num_cols, "columns"),
        }
    for name, (x, size, of) in given.items():
        check_index(x, name)
        if x.shape != (size,):
            raise ValueError(
                f"{name} must be [{size}], a rank for each of the {of}, got {list(x.shape)}"
            )
        check_device(x, name, graph.device, "the graph")
    if parts is None:
        parts = max(int(x.max()) + 1 if len(x) else 1 for x, _, _ in given.values())
        parts = max(parts, 1)
    parts = checked_parts(parts)
    for name, (x, _, _) in given.items():
        check_range(x, parts, name, f"ranks, of which there are {parts}")
    checked = [x.long() for x, _, _ in given.values()]
    return checked[0], checked[-1], parts


def check_graph(graph: Any) -> None:
    if not isinstance(graph, Graph):
        raise TypeError(f"graph must be a Graph, got {type(graph).__name__}")


def checked_parts(parts: Any) -> int:
    parts = size_of(parts, "parts")
    if not 1 <= parts < 2**31:
        raise ValueError(f"parts must be from 1 to 2^31 - 1, got {parts}")
    return parts


def is_square(graph: Graph) -> bool:
    """Whether columns are the same nodes as rows."""
    return graph.num_rows == graph.num_cols and graph.graph_ptr is graph.col_graph_ptr


def _contiguous(graph: Graph, parts: int, row_cost: int, seed: int) -> tuple[Tensor, Tensor]:
    rows = _ranges(graph.row_ptr, parts, row_cost)
    return rows, rows if is_square(graph) else _ranges(graph.columns.ptr, parts, row_cost)


def _ranges(ptr: Tensor, parts: int, row_cost: int) -> Tensor:
    """Ranges of segments of about equal cost; of equally many segments where all is free."""
    ptr = ptr.long() + row_cost * torch.arange(len(ptr))
    total = int(ptr[-1])
    if total == 0:
        ptr, total = torch.arange(len(ptr)), len(ptr) - 1
    middle = ptr[:-1] + ptr[1:]
    # P * middle may not fit in int64; a float64 may round one node to the neighbouring rank
    if total < 2**62 // parts:
        found = middle * parts // (2 * total) if total else middle
    else:
        found = (middle.double() / (2 * total) * parts).long()
    return found.clamp(max=parts - 1)


def _hash(graph: Graph, parts: int, row_cost: int, seed: int) -> tuple[Tensor, Tensor]:
    rows = _hashed(graph.num_rows, parts, seed)
    return rows, rows if is_square(graph) else _hashed(graph.num_cols, parts, seed)


def _hashed(size: int, parts: int, seed: int) -> Tensor:
    """SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) of each number, cut down to a rank."""
    start = np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    x = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    x = (x >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)
    return torch.from_numpy(x.astype(np.int64))


def _metis(graph: Graph, parts: int, row_cost: int, seed: int) -> tuple[Tensor, Tensor]:
    pymetis = require("pymetis", "the partition 'metis'", "reorder")
    square, rows, cols = is_square(graph), graph.num_rows, graph.num_cols
    ptr, col = graph.row_ptr.numpy(), graph.col.numpy()
    if not square:  # columns are nodes after the rows, which read nothing
        ptr = np.concatenate([ptr, np.full(cols, ptr[-1])])
        col = col.astype(np.int64) + rows
    if graph.num_edges == 0:
        return _contiguous(graph, parts, row_cost, seed)
    weight = np.diff(ptr)
    weight[:rows] += row_cost  # a column of a bipartite graph computes nothing
    if parts >= len(weight):
        found = np.arange(len(weight))
    else:
        pattern = neighbour_pattern(ptr, col)
        adjacency = pymetis.CSRAdjacency(pattern.indptr, pattern.indices)
        # its other objective, the volume that ranks send, loads the busiest rank more on moby
        options = pymetis.Options(seed=seed % 2**31)
        _, part = pymetis.part_graph(parts, adjacency, vweights=weight, options=options)
        found = np.asarray(part)
    both = torch.from_numpy(found.astype(np.int64))
    return both[:rows], both if square else both[rows:]


def _ldg(graph: Graph, parts: int, row_cost: int, seed: int) -> tuple[Tensor, Tensor]:
    row_part = torch.full((graph.num_rows,), -1, dtype=torch.int32)
    col_part = row_part
    if not is_square(graph):
        col_part = torch.full((graph.num_cols,), -1, dtype=torch.int32)
    state = cpu.State(row_part, col_part, *torch.zeros(2, parts, dtype=torch.int64))
    capacity = SLACK * (graph.num_edges + row_cost * graph.num_rows) / parts
    first = 0
    while first < graph.num_rows:
        begin = int(graph.row_ptr[first])
        # at least one row, whatever it has
        last = int(torch.searchsorted(graph.row_ptr, begin + CHUNK, right=True)) - 1
        last = min(max(last, first + 1), graph.num_rows)
        row_ptr = graph.row_ptr[first : last + 1]
        cpu.stream(state, first, row_ptr, graph.col[begin : int(row_ptr[-1])], row_cost, capacity)
        first = last
    unread = (col_part < 0).nonzero().flatten()
    if len(unread):  # nobody reads them: equally many for all
        share = torch.arange(len(unread)) * parts // len(unread)
        col_part[unread] = share.int()
    rows = row_part.long()
    return rows, rows if is_square(graph) else col_part.long()


METHODS: dict[str, Callable[[Graph, int, int, int], tuple[Tensor, Tensor]]] = {
    "metis": _metis,
    "ldg": _ldg,
    "contiguous": _contiguous,
    "hash": _hash,
}

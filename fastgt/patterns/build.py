"""How patterns become graphs: rows with their degrees, ranges of columns, blocks of both."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.graph import Graph
from fastgt.graph_build import index_dtype
from fastgt.ops.checks import check_offsets, integer


def from_rows(
    degree: Tensor, col: Tensor, offsets: Tensor, col_offsets: Tensor | None = None
) -> Graph:
    """A batch whose row i attends to the next ``degree[i]`` of the columns.

    Args:
        degree: ``[N]`` integers.
        col: ``[E]`` integers, row after row.
        offsets: ``[G + 1]`` boundaries of the graphs in rows.
        col_offsets: Those in columns, where columns are other nodes than rows.
    """
    square = col_offsets is None
    ends = offsets if col_offsets is None else col_offsets
    rows, cols, edges = len(degree), int(ends[-1]), len(col)
    dtype = index_dtype(rows, cols, edges)
    row_ptr = torch.cat([degree.new_zeros(1, dtype=torch.int64), degree.cumsum(0)]).to(dtype)
    edge = torch.arange(edges, dtype=dtype, device=col.device)
    ptr = offsets.to(dtype, copy=True)
    col_ptr = ptr if square else ends.to(dtype, copy=True)
    return Graph(rows, cols, row_ptr, col.to(dtype), edge, ptr, col_ptr)


def ranges(first: Tensor, count: Tensor) -> Tensor:
    """``first[i]``, ``first[i] + 1``, ... of ``count[i]`` numbers, i after i, ``[sum count]``.

    int32 while they fit.
    """
    total = int(count.sum())
    before = count.cumsum(0) - count
    largest = int((first + count).max()) if len(first) else 0
    dtype = index_dtype(total, largest, 0)
    shift = (first - before).to(dtype).repeat_interleave(count, output_size=total)
    return shift.add_(torch.arange(total, dtype=dtype, device=first.device))


def from_blocks(
    row: Tensor, col: Tensor, row_ptr: Tensor, col_ptr: Tensor, offsets: Tensor, ends: Tensor | None
) -> Graph:
    """Every row of a block attends to all columns of some blocks.

    Args:
        row, col: ``[P]`` pairs of blocks: sorted by row, then by column.
        row_ptr, col_ptr: Boundaries of the blocks in rows and in columns, int64.
        offsets, ends: As ``offsets`` and ``col_offsets`` for :func:`from_rows`.
    """
    height, width = row_ptr.diff(), col_ptr.diff()
    pairs = torch.bincount(row, minlength=len(height))
    first = pairs.cumsum(0) - pairs
    degree = torch.zeros_like(height).index_add_(0, row, width[col])
    # the pairs of each row of a block, then the columns of each pair
    pair = ranges(first.repeat_interleave(height), pairs.repeat_interleave(height))
    block = col.index_select(0, pair)
    cols = ranges(col_ptr[block], width[block])
    return from_rows(degree.repeat_interleave(height), cols, offsets, ends)


def boundaries(n: int | Tensor, graphs: int) -> Tensor:
    """``[G + 1]`` int64: of that many graphs of n nodes, or those that n gives."""
    graphs = integer("graphs", graphs, 1)
    if not isinstance(n, Tensor):
        n = integer("n", n, 0)
        check_total("n", n, graphs)
        return torch.arange(graphs + 1) * n
    if graphs != 1:
        raise ValueError(f"graphs must be 1 where n has boundaries of graphs, got {graphs}")
    return check_ptr("n", n)


def check_total(name: str, nodes: int, graphs: int) -> None:
    """The nodes of all graphs are counted in 64 bits; what PyTorch makes of an overflow crashes."""
    if nodes * graphs >= 2**63:
        raise ValueError(
            f"{name} gives {nodes} nodes in each of {graphs} graphs: all must fit in 64 bits"
        )


def check_ptr(name: str, offsets: object) -> Tensor:
    """Boundaries ``[G + 1]`` of a batch, which say themselves how many nodes there are."""
    total, device = 0, torch.device("cpu")
    if isinstance(offsets, Tensor):
        device = offsets.device
        whole = offsets.dtype in (torch.int32, torch.int64)
        total = int(offsets[-1]) if whole and offsets.ndim == 1 and len(offsets) else 0
    check_offsets(offsets, total, device, name)
    assert isinstance(offsets, Tensor)
    return offsets.long()


def parts(offsets: Tensor | None, nodes: int, device: torch.device, name: str) -> Tensor:
    """``[G + 1]`` int64 boundaries of a batch of so many nodes, which is one graph without any."""
    if offsets is None:
        return torch.tensor([0, nodes], device=device)
    check_offsets(offsets, nodes, device, name)
    return offsets.long()

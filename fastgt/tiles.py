"""What the kernels walk besides CSR: buckets of rows by degree, and compacted row windows.

Everything here is made of flat tensors, on their device, once for a :class:`fastgt.Graph`, which
keeps it. Tables have at least two entries, fillers included: ``torch.compile`` specialises sizes
of 0 and 1, and would compile anew for a graph that has one hub.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_WIDTH = 256  # channels of a head
SMALL_EDGES = 2**13  # edges up to which rows are taken as they stand
FEW = 32  # edges up to which a row shares a program with others
SEGMENT = 512  # edges of a row that one program takes
HEIGHTS = (16, 32, 64)
FILLERS = 2


class Buckets(NamedTuple):
    """Rows grouped by degree: who works on what in the gather kernels.

    With FEW = 2 and SEGMENT = 4, for rows of 1, 3, 0, 9 and 2 edges::

        segment  [(3, 4, 8), (3, 8, 12), (3, 12, 13)]   row, first edge, end
        split    [(3, 0, 3)]       row, its segments: their sums are combined
        middle   [1]               rows with a program of their own, longest first
        few      [0, 2, 4]         rows that share programs, alike ones together

    Each table ends with two fillers.

    Attributes:
        few: ``[F + 2]``.
        middle: ``[M + 2]``.
        segment: ``[S + 2, 3]``.
        split: ``[P + 2, 3]``.
    """

    few: Tensor
    middle: Tensor
    segment: Tensor
    split: Tensor


class Windows(NamedTuple):
    """Row windows with compacted columns: what the tensor-core kernels walk.

    A window is up to 16, 32 or 64 consecutive rows; its entries are the columns that any of them
    attends to, each with one bit a row. Windows of 4 rows, seven edges::

        row 0: 1, 5        window 0  columns 1    5    7          window 1  columns 0
        row 1: 5, 7                  bits    0101 0011 0110                 bits    0001
        row 2: 1, 7
        row 4: 0

        window  [(0, 4, 0, 3, 0), (4, 5, 3, 4, 1)]   rows, entries, leading full entries
        col     [1, 5, 7, 0]
        bits    [5, 3, 6, 1]         bit r: row r of the window has this edge
        base    [0, 2, 4, 6]         where the edges of an entry begin in ``edge``
        edge    [0, 4, 1, 2, 3, 5, 6]   the caller's edge numbers, entry by entry, row by row

    An edge that stands there k times has k entries of its column: nothing is merged. Entries that
    every row has come first ("full"): their tiles need no mask. Windows stand in descending order
    of their entries. Where ``dense``, the entries of a window are all the columns of its graph, in
    order, so that tiles are loaded without an index.

    Attributes:
        height: Rows of a window, at most.
        dense: Whether each window has all the columns of its graph.
        window: ``[W, 5]``, at least two; fillers have no rows.
        col: ``[C]``; bits: ``[C]`` int64; base: ``[C]``, each at least two.
        edge: ``[E]``.
    """

    height: int
    dense: bool
    window: Tensor
    col: Tensor
    bits: Tensor
    base: Tensor
    edge: Tensor


def buckets(ptr: Tensor, few: int = FEW, segment: int = SEGMENT) -> Buckets | None:
    """Buckets of the rows of a CSR pointer; None where taking them as they stand is as good.

    One sort of the rows and one synchronisation. Rows of few edges are grouped by ceil(degree / 4)
    rounded up to a power of two, and keep their order within a group: neighbours stay neighbours.
    """
    degree = ptr.diff()
    # rows of few edges go together when they take as many steps of 4 edges: up to 4, 8, 16, ...
    steps = [4 << i for i in range(max(1, (few // 4).bit_length()))]
    bounds = torch.tensor([*steps[:-1], few, segment], device=ptr.device)
    group = torch.bucketize(degree, bounds)
    sizes = torch.bincount(group, minlength=len(bounds) + 1).tolist()
    if len(degree) in (*sizes[:-2], sum(sizes[:-2][:2])):
        return None
    order = torch.argsort(group, stable=True, descending=True)
    split, middle, rest = order.split([sizes[-1], sizes[-2], sum(sizes[:-2])])
    middle = middle[torch.argsort(degree[middle], stable=True, descending=True)]
    parts = (degree[split] + (segment - 1)).div(segment, rounding_mode="floor")
    first = parts.cumsum(0) - parts
    rows = split.repeat_interleave(parts)
    part = torch.arange(len(rows), device=ptr.device) - first.repeat_interleave(parts)
    begin = ptr[rows] + part * segment
    end = torch.minimum(begin + segment, ptr[rows + 1])
    tables = (
        rest,
        middle,
        torch.stack([rows, begin, end], 1),
        torch.stack([split, first, first + parts], 1),
    )
    return Buckets(*(_filled(x.to(ptr.dtype), len(x) + FILLERS) for x in tables))


def windows(ptr: Tensor, index: Tensor, edge: Tensor, num_cols: int, height: int = 64) -> Windows:
    """Compacted windows of ``height`` consecutive rows of a CSR walk. One sort of the edges.

    Args:
        ptr, index, edge: The walk: rows' boundaries ``[N + 1]``, columns and numbers ``[E]``.
        num_cols: Columns.
        height: 16, 32 or 64.
    """
    row = _rows(ptr, index)
    window, local = row // height, row % height
    # by (window, column, row); what comes out equal is one edge several times
    key = (window * num_cols + index) * height + local
    key, order = torch.sort(key, stable=True)
    run = _runs(key)
    entry_key = key // height
    if run.any():
        # the k-th copy of an edge goes to the k-th copy of its column
        entry_key = entry_key * (run.max() + 1) + run
        entry_key, again = torch.sort(entry_key, stable=True)
        order = order[again]
    local, window = local[order], window[order]
    new = torch.ones_like(entry_key, dtype=torch.bool)
    new[1:] = entry_key[1:] != entry_key[:-1]
    base = new.nonzero().squeeze(1)
    entry = new.cumsum(0) - 1
    bits = torch.zeros_like(base).index_add_(0, entry, torch.ones_like(local) << local)
    col, entry_window = index.long()[order][base], window[base]
    first = torch.arange(0, ptr.shape[0] - 1, height, device=ptr.device)
    last = (first + height).clamp(max=ptr.shape[0] - 1)
    full = bits == _all_bits(last - first)[entry_window]
    if full.any():
        place = torch.argsort(entry_window * 2 + ~full, stable=True)
        col, bits, base = col[place], bits[place], base[place]
    count = torch.bincount(entry_window, minlength=len(first))
    fulls = torch.bincount(entry_window[full], minlength=len(first))
    stop = count.cumsum(0)
    table = torch.stack([first, last, stop - count, stop, fulls], 1)
    return _tables(height, False, table, col, bits, base, edge[order], ptr.dtype)


def dense_windows(
    ptr: Tensor,
    index: Tensor,
    edge: Tensor,
    graph_ptr: Tensor,
    col_graph_ptr: Tensor,
    height: int = 64,
) -> Windows | None:
    """Windows that end where a graph of the batch ends and hold all its columns. No sort.

    None where an edge stands there twice: a bit cannot say so.
    """
    row = _rows(ptr, index)
    begin, size = graph_ptr[:-1].long(), graph_ptr.diff().long()
    width, col_begin = col_graph_ptr.diff().long(), col_graph_ptr[:-1].long()
    tall = (size + height - 1) // height
    graph = torch.arange(len(size), device=ptr.device).repeat_interleave(tall)
    before = (tall.cumsum(0) - tall)[graph]
    first = begin[graph] + (torch.arange(len(graph), device=ptr.device) - before) * height
    last = torch.minimum(first + height, (begin + size)[graph])
    stop = width[graph].cumsum(0)
    start = stop - width[graph]
    window = torch.searchsorted(first, row, right=True) - 1
    entry = start[window] + index - col_begin[graph[window]]
    local = row - first[window]
    total = int(stop[-1]) if len(stop) else 0
    bits = torch.zeros(total, dtype=torch.int64, device=ptr.device)
    bits.index_add_(0, entry, torch.ones_like(local) << local)
    count = torch.bincount(entry, minlength=total)
    if bool((count != _popcount(bits)).any()):
        return None
    base = count.cumsum(0) - count
    below = bits[entry] & ((torch.ones_like(local) << local) - 1)
    slots = torch.empty_like(edge)
    slots[base[entry] + _popcount(below)] = edge
    whole = bits == _all_bits(last - first).repeat_interleave(width[graph])
    holes = torch.zeros(len(first), dtype=torch.int64, device=ptr.device)
    owner = torch.arange(len(first), device=ptr.device).repeat_interleave(width[graph])
    holes.index_add_(0, owner, (~whole).long())
    fulls = torch.where(holes == 0, stop - start, 0)
    col = torch.arange(total, device=ptr.device) - (start - col_begin[graph])[owner]
    table = torch.stack([first, last, start, stop, fulls], 1)
    return _tables(height, True, table, col, bits, base, slots, ptr.dtype)


def density(ptr: Tensor, index: Tensor, num_cols: int, height: int = 64) -> float:
    """rho: edges per distinct column of a window of ``height`` rows, over all windows.

    What a window saves: it loads a column once where gathering loads it rho times.
    """
    if not index.numel():
        return 0.0
    window = _rows(ptr, index) // height
    return index.numel() / (window * num_cols + index).unique().numel()


def sampled_density(ptr: Tensor, index: Tensor, num_cols: int, height: int = 64) -> float:
    """:func:`density` of up to 256 windows evenly spread over the rows: a cost that is constant."""
    rows = ptr.shape[0] - 1
    count = -(-rows // height)
    if count <= 256:
        return density(ptr, index, num_cols, height)
    window = torch.arange(256, device=ptr.device) * count // 256
    begin, end = ptr[window * height].long(), ptr[(window * height + height).clamp(max=rows)].long()
    size = end - begin
    shift = begin - (size.cumsum(0) - size)
    slot = torch.arange(int(size.sum()), device=ptr.device) + shift.repeat_interleave(size)
    if not slot.numel():
        return 0.0
    owner = window.repeat_interleave(size)
    return slot.numel() / (owner * num_cols + index[slot]).unique().numel()


def shared(a: Windows, b: Windows) -> Windows:
    """``a`` with the tables of ``b`` if all are equal: a symmetric graph holds them once.

    All or none: ``torch.compile`` compiles anew for other pairs of tensors that are one.
    """
    if not all(_equal(x, y) for x, y in zip(a[2:6], b[2:6], strict=True)):
        return a
    return Windows(a.height, a.dense, b.window, b.col, b.bits, b.base, a.edge)


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and bool(torch.equal(x, y))


def _rows(ptr: Tensor, index: Tensor) -> Tensor:
    """The row of every slot, int64."""
    row = torch.arange(ptr.shape[0] - 1, device=ptr.device)
    return row.repeat_interleave(ptr.diff(), output_size=index.shape[0])


def _runs(key: Tensor) -> Tensor:
    """How many equal keys stand before each one, of sorted keys."""
    place = torch.arange(len(key), device=key.device)
    start = torch.zeros_like(place)
    start[1:] = torch.where(key[1:] != key[:-1], place[1:], 0)
    return place - start.cummax(0).values if len(key) else place


def _all_bits(rows: Tensor) -> Tensor:
    """The lowest ``rows`` bits set, for 1 to 64."""
    return torch.full_like(rows, -1) ^ torch.where(
        rows < 64, torch.full_like(rows, -1) << rows.clamp(max=63), 0
    )


def _popcount(x: Tensor) -> Tensor:
    """Bits set in an int64."""
    count = torch.zeros_like(x)
    for byte in range(0, 64, 8):
        part = (x >> byte) & 0xFF
        part = part - ((part >> 1) & 0x55)
        part = (part & 0x33) + ((part >> 2) & 0x33)
        count += (part + (part >> 4)) & 0x0F
    return count


def _tables(
    height: int,
    dense: bool,
    table: Tensor,
    col: Tensor,
    bits: Tensor,
    base: Tensor,
    edge: Tensor,
    dtype: torch.dtype,
) -> Windows:
    table = table[torch.argsort(table[:, 3] - table[:, 2], stable=True, descending=True)]
    return Windows(
        height,
        dense,
        _filled(table.to(dtype), FILLERS),
        _filled(col.to(dtype), FILLERS),
        _filled(bits, FILLERS),
        _filled(base.to(dtype), FILLERS),
        edge,
    )


def _filled(x: Tensor, size: int) -> Tensor:
    """With zeros at the end up to ``size`` entries."""
    missing = max(0, size - x.shape[0])
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x

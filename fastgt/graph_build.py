"""How a Graph is built: indices and sizes are checked, edges are grouped by row."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import scipy.sparse

INT32_MAX = 2**31 - 1
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Structure(NamedTuple):
    """Who attends to whom: the fields of a :class:`fastgt.Graph` that its constructors give."""

    num_rows: int
    num_cols: int
    row_ptr: Tensor  # [N_rows + 1]
    col: Tensor  # [E]
    edge: Tensor  # [E]
    graph_ptr: Tensor  # [G + 1]
    col_graph_ptr: Tensor  # [G + 1]; the same tensor where the graph is square

    @property
    def num_edges(self) -> int:
        return self.col.shape[0]

    @property
    def row(self) -> Tensor:
        """The row of each slot, ``[E]``."""
        row = torch.arange(self.num_rows, dtype=self.col.dtype, device=self.col.device)
        return row.repeat_interleave(self.row_ptr.diff(), output_size=self.num_edges)

    @property
    def edge_index(self) -> Tensor:
        """``[2, E]`` int64 in the caller's order, column above row."""
        ends = torch.stack([self.col, self.row]).long()
        return torch.empty_like(ends).index_copy_(1, self.edge.long(), ends)


def from_edge_index(
    edge_index: Tensor, num_nodes: int | tuple[int, int] | None, graph_ptr: Tensor | None
) -> Structure:
    known = sparse_sizes(edge_index)
    edge_index = check_edge_index(edge_index, "edge_index")
    if graph_ptr is not None:
        check_ptr(graph_ptr, "graph_ptr", "G + 1")
        check_device(graph_ptr, "graph_ptr", edge_index.device)
    if num_nodes is None and graph_ptr is not None:
        num_nodes = int(graph_ptr[-1])
    elif num_nodes is None and known == (None, None):
        num_nodes = _counted(edge_index)
    elif num_nodes is None:
        num_nodes = (
            _counted(edge_index[1]) if known[0] is None else known[0],
            _counted(edge_index[0]) if known[1] is None else known[1],
        )
    sizes = num_nodes if isinstance(num_nodes, (tuple, list)) else (num_nodes, num_nodes)
    if len(sizes) != 2:
        raise ValueError(f"num_nodes must be an int or (rows, columns), got {len(sizes)} sizes")
    rows, cols = (size_of(n, "num_nodes") for n in sizes)
    if rows == cols:
        check_range(edge_index, cols, "edge_index", "nodes")
    else:
        check_range(edge_index[0], cols, "edge_index[0] (source)", "columns")
        check_range(edge_index[1], rows, "edge_index[1] (target)", "rows")
    graph = from_pairs(edge_index[1], edge_index[0], rows, cols)
    if graph_ptr is None:
        return graph
    check_square(graph, "graph_ptr")
    check_boundaries(graph_ptr, "graph_ptr", rows, "nodes")
    return with_boundaries(graph, graph_ptr, graph_ptr)


def sparse_sizes(edge_index: Any) -> tuple[int | None, int | None]:
    """(rows, columns) that a ``torch_geometric.EdgeIndex`` knows; None for what it does not."""
    if not (hasattr(edge_index, "sparse_size") and hasattr(edge_index, "as_tensor")):
        return None, None
    sources, targets = edge_index.sparse_size()
    return targets, sources


def _counted(index: Tensor) -> int:
    return max(int(index.max()) + 1, 0) if index.numel() else 0


def from_csr(row_ptr: Tensor, col: Tensor, num_cols: int | None) -> Structure:
    check_ptr(row_ptr, "row_ptr", "N + 1")
    check_index(col, "col")
    if row_ptr.device != col.device:
        raise ValueError(f"row_ptr is on {row_ptr.device} but col is on {col.device}")
    if col.ndim != 1:
        raise ValueError(f"col must be [E], got {list(col.shape)}")
    check_values(col, "col")
    rows = row_ptr.shape[0] - 1
    cols = rows if num_cols is None else size_of(num_cols, "num_cols")
    check_boundaries(row_ptr, "row_ptr", col.shape[0], "edges")
    check_range(col, cols, "col", "columns")
    dtype = index_dtype(rows, cols, col.shape[0])
    # a private copy: the graph must not change when the caller's tensors do
    edge = torch.arange(col.shape[0], dtype=dtype, device=col.device)
    row_ptr = row_ptr.to(dtype, copy=True)
    return single(rows, cols, row_ptr, col.to(dtype, copy=True), edge)


def from_dense(mask: Tensor) -> Structure:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a boolean tensor, got {kind}")
    if mask.ndim != 2:
        raise ValueError(f"mask must be [rows, columns], got {list(mask.shape)}")
    check_values(mask, "mask")
    rows, cols = mask.shape
    row, col = mask.nonzero(as_tuple=True)  # in row order already
    dtype = index_dtype(rows, cols, col.shape[0])
    edge = torch.arange(col.shape[0], dtype=dtype, device=col.device)
    return single(rows, cols, _boundaries(row.to(dtype), rows), col.to(dtype), edge)


def from_scipy(matrix: scipy.sparse.sparray | scipy.sparse.spmatrix) -> Structure:
    if not hasattr(matrix, "tocoo"):
        raise TypeError(f"matrix must be a scipy sparse matrix, got {type(matrix).__name__}")
    if len(matrix.shape) != 2:
        raise ValueError(f"matrix must be [rows, columns], got {list(matrix.shape)}")
    coo = matrix.tocoo()
    row, col = torch.as_tensor(coo.row.copy()), torch.as_tensor(coo.col.copy())
    rows, cols = map(int, coo.shape)
    check_range(row, rows, "matrix", "rows")
    check_range(col, cols, "matrix", "columns")
    return from_pairs(row, col, rows, cols)


def complete(offsets: Tensor, key_offsets: Tensor | None) -> Structure:
    """Every row of a graph attends to all columns of it, in order."""
    square = key_offsets is None or key_offsets is offsets
    keys = offsets if key_offsets is None else key_offsets
    for x, name in ((offsets, "offsets"), (keys, "key_offsets"))[: 1 if square else 2]:
        check_ptr(x, name, "G + 1")
        check_values(x, name)
        check_boundaries(x, name, int(x[-1]), "nodes")
    check_device(keys, "key_offsets", offsets.device, "offsets")
    if offsets.shape != keys.shape:
        raise ValueError(
            f"offsets are of {len(offsets) - 1} graphs but key_offsets of {len(keys) - 1}"
        )
    offsets, keys = offsets.long(), keys.long()
    rows, cols, sizes = int(offsets[-1]), int(keys[-1]), offsets.diff()
    # by row: how many columns its graph has, and the first of them
    degree = keys.diff().repeat_interleave(sizes, output_size=rows)
    first = keys[:-1].repeat_interleave(sizes, output_size=rows)
    row_ptr = torch.cat([offsets.new_zeros(1), degree.cumsum(0)])
    edges = int(row_ptr[-1])
    dtype = index_dtype(rows, cols, edges)
    edge = torch.arange(edges, dtype=dtype, device=offsets.device)
    shift = (first - row_ptr[:-1]).to(dtype)
    col = edge + shift.repeat_interleave(degree, output_size=edges)
    graph_ptr = offsets.to(dtype, copy=True)
    ends = graph_ptr, graph_ptr if square else keys.to(dtype, copy=True)
    return Structure(rows, cols, row_ptr.to(dtype), col, edge, *ends)


def joined(graphs: Sequence[Structure]) -> Structure:
    """The block-diagonal union of one graph or more, on one device."""
    rows, cols = [g.num_rows for g in graphs], [g.num_cols for g in graphs]
    edges = [g.num_edges for g in graphs]
    dtype = index_dtype(sum(rows), sum(cols), sum(edges))

    def join_ptr(parts: list[Tensor], sizes: list[int]) -> Tensor:
        body = shifted([p[1:] for p in parts], sizes, dtype)
        return torch.cat([body.new_zeros(1), body])

    graph_ptr = col_graph_ptr = join_ptr([g.graph_ptr for g in graphs], rows)
    if any(g.graph_ptr is not g.col_graph_ptr for g in graphs):
        col_graph_ptr = join_ptr([g.col_graph_ptr for g in graphs], cols)
    return Structure(
        sum(rows),
        sum(cols),
        join_ptr([g.row_ptr for g in graphs], edges),
        shifted([g.col for g in graphs], cols, dtype),
        shifted([g.edge for g in graphs], edges, dtype),
        graph_ptr,
        col_graph_ptr,
    )


def shifted(parts: list[Tensor], sizes: list[int], dtype: torch.dtype) -> Tensor:
    """One part after another: each is shifted by the sizes of those before it."""
    device, lengths = parts[0].device, [len(part) for part in parts]
    shift = torch.tensor([0, *sizes[:-1]], device="cpu").cumsum(0).to(device)
    shift = shift.repeat_interleave(torch.tensor(lengths, device=device), output_size=sum(lengths))
    return (torch.cat(parts).long() + shift).to(dtype)


def from_pairs(row: Tensor, col: Tensor, num_rows: int, num_cols: int) -> Structure:
    """One graph of edges in any order, in the smallest index type."""
    dtype = index_dtype(num_rows, num_cols, row.shape[0])
    col, edge, row_ptr, _ = group(row, col, num_rows, dtype)
    return single(num_rows, num_cols, row_ptr, col, edge)


def group(
    key: Tensor, other: Tensor, size: int, dtype: torch.dtype, number: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Stable sort by ``key``: -> the other ends, the order, the boundaries and ``number``."""
    from fastgt.cpu import graph as cpu

    if cpu.can_group(key, other):
        return cpu.group(key, other, size, dtype, number)
    ordered, order = torch.sort(key.to(dtype), stable=True)
    if number is not None:
        number = number.index_select(0, order)
    ends = other.to(dtype).index_select(0, order)
    return ends, order.to(dtype), _boundaries(ordered, size), number


def _boundaries(ordered: Tensor, size: int) -> Tensor:
    """Where each of the keys 0 .. size - 1 begins in ``ordered``, and the end, in its dtype."""
    keys = torch.arange(size + 1, dtype=ordered.dtype, device=ordered.device)
    return torch.searchsorted(ordered, keys, out_int32=ordered.dtype == torch.int32)


def single(num_rows: int, num_cols: int, row_ptr: Tensor, col: Tensor, edge: Tensor) -> Structure:
    """One graph, in the index type of ``row_ptr``."""
    graph_ptr = torch.tensor([0, num_rows], dtype=row_ptr.dtype, device=row_ptr.device)
    col_graph_ptr = graph_ptr
    if num_cols != num_rows:
        col_graph_ptr = torch.tensor([0, num_cols], dtype=row_ptr.dtype, device=row_ptr.device)
    return Structure(num_rows, num_cols, row_ptr, col, edge, graph_ptr, col_graph_ptr)


def with_boundaries(graph: Structure, row_ptr: Tensor, col_ptr: Tensor) -> Structure:
    """The graph as a batch, with its boundaries in rows and in columns, which fit."""
    if row_ptr.shape != col_ptr.shape:
        raise ValueError(
            f"the targets are of {len(row_ptr) - 1} graphs but the sources of {len(col_ptr) - 1}"
        )
    ptr = row_ptr.to(graph.col.dtype, copy=True)
    own = ptr if row_ptr is col_ptr else col_ptr.to(graph.col.dtype, copy=True)
    graph = graph._replace(graph_ptr=ptr, col_graph_ptr=own)
    row_graph = owners(ptr, graph.num_rows).repeat_interleave(
        graph.row_ptr.diff(), output_size=graph.num_edges
    )
    outside = owners(own, graph.num_cols).index_select(0, graph.col) != row_graph
    if bool(outside.any()):
        slot = int(outside.nonzero()[0])
        raise ValueError(
            f"edge_index: edge {int(graph.edge[slot])} joins node {int(graph.col[slot])} to node "
            f"{int(graph.row[slot])} of another graph of the batch"
        )
    return graph


def owners(ptr: Tensor, size: int) -> Tensor:
    """The number of each node's graph, ``[N]``."""
    nodes = torch.arange(size, dtype=ptr.dtype, device=ptr.device)
    return torch.searchsorted(ptr, nodes, right=True) - 1


def index_dtype(num_rows: int, num_cols: int, num_edges: int) -> torch.dtype:
    sizes = num_rows, num_cols, num_edges
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        # how many edges are left after a mask is not known there
        return torch.int32 if all(guard_or_false(n <= INT32_MAX) for n in sizes) else torch.int64
    return torch.int32 if max(sizes) <= INT32_MAX else torch.int64


def check_square(graph: Structure, what: str) -> None:
    """Refuse a bipartite graph, and a batch of such."""
    if graph.num_rows != graph.num_cols:
        raise ValueError(
            f"{what} needs a square graph, got {graph.num_rows} rows and {graph.num_cols} columns"
        )
    if graph.graph_ptr is not graph.col_graph_ptr:
        raise ValueError(f"{what} needs square graphs, got a batch of bipartite ones")


def check_index(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {x.layout}")
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name} must hold integers (uint8 or int8 to int64), got {x.dtype}")


def check_edge_index(x: Tensor, name: str) -> Tensor:
    """``x`` as a plain tensor: PyG's EdgeIndex would leave its own types in a graph."""
    plain = x.as_tensor() if hasattr(x, "as_tensor") else x
    check_index(plain, name)
    if plain.ndim != 2 or plain.shape[0] != 2:
        raise ValueError(f"{name} must be [2, E], got {list(plain.shape)}")
    check_values(plain, name)
    return plain


def check_ptr(x: Tensor, name: str, size: str) -> None:
    check_index(x, name)
    if x.ndim != 1 or x.shape[0] == 0:
        raise ValueError(f"{name} must be [{size}], got {list(x.shape)}")


def size_of(n: Any, name: str) -> int:
    """A size as a Python int; NumPy's integers are taken too."""
    try:
        if isinstance(n, bool):
            raise TypeError
        # one that is dynamic in a compiled program stays so
        size: Any = n if isinstance(n, (int, torch.SymInt)) else operator.index(n)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {type(n).__name__}") from None
    if size < 0:
        raise ValueError(f"{name} must not be negative, got {size}")
    if size > torch.iinfo(torch.int64).max:
        raise ValueError(f"{name} must fit in int64, got {size}")
    return size


def check_range(index: Tensor, size: int, name: str, of: str) -> None:
    if torch.compiler.is_compiling():
        # numbers would end a program here; what finds a bad index raises when it runs
        inside = (index >= 0) & (index < size)
        torch._assert_async(inside.all(), f"{name} has an index that is none of the {of}")
        return
    if not index.numel():
        return
    low, high = (int(x) for x in torch.aminmax(index))
    if low < 0:
        raise ValueError(f"{name} has index {low}; indices must not be negative")
    if high >= size:
        raise ValueError(f"{name} has index {high} but the graph has {size} {of}")


def check_values(x: Tensor, name: str) -> None:
    """Refuse a tensor that holds none."""
    if x.is_meta:
        raise RuntimeError(
            f"{name} is on the meta device and holds no values, which a graph is built from: build "
            "it on another device, then move it with graph.to('meta')"
        )


def check_device(x: Tensor, name: str, device: torch.device, of: str = "edge_index") -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, {of} on {device}")


def check_boundaries(ptr: Tensor, name: str, total: int, of: str) -> None:
    first, last, down = int(ptr[0]), int(ptr[-1]), ptr[1:] < ptr[:-1]  # a difference may wrap
    if first != 0:
        raise ValueError(f"{name} must start at 0, got {first}: it takes boundaries, not sizes")
    if bool(down.any()):
        i = int(down.nonzero()[0])
        raise ValueError(f"{name} decreases from {int(ptr[i])} to {int(ptr[i + 1])} at {i + 1}")
    if last != total:
        raise ValueError(f"{name} ends at {last} but there are {total} {of}")


def normal(x: Tensor) -> Tensor:
    """``x``; where it is an inference tensor, a copy that autograd may save for a backward.

    What is made under ``torch.inference_mode()``, and kept, is trained with afterwards. While
    somebody compiles, ``x`` itself: what compiled code returns there are inference tensors.
    """
    # Dynamo does not trace the question, and AOTAutograd drops a change of the mode
    if torch.compiler.is_compiling() or not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()

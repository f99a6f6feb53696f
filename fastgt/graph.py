"""Who attends to whom: built once, immutable, shared by every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, get_args

import torch
from torch import Tensor

from fastgt import plans, tiles
from fastgt.graph_build import (
    check_boundaries,
    check_device,
    check_index,
    check_ptr,
    check_range,
    check_values,
    normal,
    sides_of_pyg,
    size_of,
)
from fastgt.plans import Path, Plan
from fastgt.reordering import node_order
from fastgt.tiles import Buckets, Windows

if TYPE_CHECKING:
    import scipy.sparse

_INT32_MAX = 2**31 - 1


class ColumnWalk(NamedTuple):
    """The same edges grouped by column (CSC): what the gradient of keys and values walks.

    Attributes:
        ptr: ``[N_cols + 1]``; column j owns the slots ``ptr[j]:ptr[j + 1]``.
        row: ``[E]`` the row of each slot.
        slot: ``[E]`` the same edge's slot in the row walk.
        edge: ``[E]`` the same edge's number in the caller's order.
    """

    ptr: Tensor
    row: Tensor
    slot: Tensor
    edge: Tensor


class Graph:
    """A multiset of (row, column) pairs: row i, the query, attends to column j, the key.

    Six nodes in two graphs: 0-3 (node 3 is isolated) and 4-5. The caller lists five edges,
    PyG style, source (key) above target (query); the edge 1 -> 0 is there twice::

        edge      0  1  2  3  4
        source    1  2  1  5  0          rows:   0 attends to 1, 1
        target    0  1  0  4  2                  1 attends to 2
                                                 2 attends to 0
                                                 4 attends to 5

        row_ptr     [0, 2, 3, 4, 4, 5, 5]   row i owns the slots row_ptr[i]:row_ptr[i + 1]
        col         [1, 1, 2, 0, 5]         the column of each slot
        edge        [0, 2, 1, 4, 3]         the caller's number of the edge in each slot
        graph_ptr   [0, 4, 6]               graph g owns the rows graph_ptr[g]:graph_ptr[g + 1]

        columns.ptr   [0, 1, 3, 4, 4, 4, 5]   column j owns the slots ptr[j]:ptr[j + 1]
        columns.row   [2, 0, 0, 1, 4]         the row of each slot
        columns.slot  [3, 0, 1, 2, 4]         where the same edge stands in the row walk
        columns.edge  [4, 0, 2, 1, 3]         the caller's number of the same edge

    Edge tensors are always given and returned in the caller's order; ``edge`` is how the
    kernels get there. Duplicates and self loops are kept and count as given; none is added.
    Isolated rows, no edges and no nodes are all valid. Indices are int32 while they fit.

    Build one with :meth:`from_edge_index`, :meth:`from_csr`, :meth:`from_dense`,
    :meth:`from_scipy`, :meth:`from_pyg` or :meth:`batch`; the fields are for reading. A graph that
    is made under ``torch.inference_mode()`` may be trained with. If compiled code makes it there,
    its ``copy.copy`` may, once it is taken outside compiled code.

    Attributes:
        num_rows, num_cols: Queries and keys; equal unless the graph is bipartite.
        row_ptr, col, edge: The row walk (CSR), above.
        graph_ptr, col_graph_ptr: ``[G + 1]`` boundaries of the graphs of a batch, in rows and
            in columns (one tensor where the graph is square).
        choice: How kernels go through it, if :meth:`plan` has settled that; else None.
        order: ``[N]`` int64 where the graph was :meth:`reordered`: its node i is node
            ``order[i]`` of the graph as first built; else None.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> edge_index = torch.tensor([[1, 2, 1, 5, 0], [0, 1, 0, 4, 2]])
        >>> Graph.from_edge_index(edge_index, 6).col.tolist()
        [1, 1, 2, 0, 5]
    """

    num_rows: int
    num_cols: int
    row_ptr: Tensor  # [N_rows + 1]
    col: Tensor  # [E]
    edge: Tensor  # [E]
    graph_ptr: Tensor  # [G + 1]
    col_graph_ptr: Tensor  # [G + 1]
    choice: Plan | None
    order: Tensor | None  # [N]
    _cache: dict[Any, Any]

    # no dataclass: libraries rebuild those field by field, or refuse frozen ones
    def __init__(
        self,
        num_rows: int,
        num_cols: int,
        row_ptr: Tensor,
        col: Tensor,
        edge: Tensor,
        graph_ptr: Tensor,
        col_graph_ptr: Tensor,
        _cache: dict[Any, Any] | None = None,
        choice: Plan | None = None,
        order: Tensor | None = None,
    ):
        ends = normal(graph_ptr)
        fields = {
            "num_rows": num_rows,
            "num_cols": num_cols,
            "row_ptr": normal(row_ptr),
            "col": normal(col),
            "edge": normal(edge),
            "graph_ptr": ends,
            "col_graph_ptr": ends if col_graph_ptr is graph_ptr else normal(col_graph_ptr),
            "_cache": {} if _cache is None else _cache,
            "choice": choice,
            "order": None if order is None else normal(order),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise FrozenInstanceError(f"cannot set {name!r}: a Graph does not change")

    def __delattr__(self, name: str) -> NoReturn:
        raise FrozenInstanceError(f"cannot delete {name!r}: a Graph does not change")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or of a pickle."""
        vars(self).update(state)
        if any(x.is_inference() for x in self._tensors()):
            vars(self).update(vars(self._mapped(normal)))

    def _replace(self, **changes: Any) -> Graph:
        """A graph with other values of some fields, and the others of this one."""
        return Graph(**{**vars(self), **changes})

    @classmethod
    def from_edge_index(
        cls,
        edge_index: Tensor,
        num_nodes: int | tuple[int, int] | None = None,
        *,
        graph_ptr: Tensor | None = None,
    ) -> Graph:
        """From PyG's ``[2, E]`` index: ``edge_index[0]`` is the source (key), ``[1]`` the target.

        Args:
            edge_index: Integers, ``[2, E]``.
            num_nodes: Nodes, or ``(rows, columns)`` = (targets, sources) for a bipartite graph.
                Default: where ``graph_ptr`` ends, else the largest index plus one.
            graph_ptr: ``[G + 1]`` node boundaries of a batch of graphs (PyG's ``Batch.ptr``).

        Raises:
            TypeError: ``edge_index`` is not an integer tensor, or a size is no int.
            ValueError: A wrong shape, an index out of range, boundaries that do not fit, or an
                edge from one graph of the batch to another.
            RuntimeError: ``edge_index`` is on the meta device.
        """
        if hasattr(edge_index, "as_tensor"):  # PyG's EdgeIndex would leave its own types here
            edge_index = edge_index.as_tensor()
        check_index(edge_index, "edge_index")
        if edge_index.ndim != 2 or edge_index.shape[0] != 2:
            raise ValueError(f"edge_index must be [2, E], got {list(edge_index.shape)}")
        check_values(edge_index, "edge_index")
        if graph_ptr is not None:
            check_ptr(graph_ptr, "graph_ptr", "G + 1")
            check_device(graph_ptr, "graph_ptr", edge_index)
        if num_nodes is None and graph_ptr is not None:
            num_nodes = int(graph_ptr[-1])
        elif num_nodes is None:
            num_nodes = max(int(edge_index.max()) + 1, 0) if edge_index.numel() else 0
        sizes = num_nodes if isinstance(num_nodes, (tuple, list)) else (num_nodes, num_nodes)
        if len(sizes) != 2:
            raise ValueError(f"num_nodes must be an int or (rows, columns), got {len(sizes)} sizes")
        rows, cols = (size_of(n, "num_nodes") for n in sizes)
        if rows == cols:
            check_range(edge_index, cols, "edge_index", "nodes")
        else:
            check_range(edge_index[0], cols, "edge_index[0] (source)", "columns")
            check_range(edge_index[1], rows, "edge_index[1] (target)", "rows")
        graph = _build(edge_index[1], edge_index[0], rows, cols)
        if graph_ptr is None:
            return graph
        graph._check_square("graph_ptr")
        check_boundaries(graph_ptr, "graph_ptr", rows, "nodes")
        return _with_boundaries(graph, graph_ptr, graph_ptr)

    @classmethod
    def from_csr(cls, row_ptr: Tensor, col: Tensor, num_cols: int | None = None) -> Graph:
        """From compressed rows: row i attends to ``col[row_ptr[i]:row_ptr[i + 1]]``.

        The caller's edge order is the order of ``col``. ``num_cols`` defaults to the number of
        rows.
        """
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
        dtype = _index_dtype(rows, cols, col.shape[0])
        # a private copy: the graph must not change when the caller's tensors do
        edge = torch.arange(col.shape[0], dtype=dtype, device=col.device)
        row_ptr = row_ptr.to(dtype, copy=True)
        return _single(rows, cols, row_ptr, col.to(dtype, copy=True), edge)

    @classmethod
    def from_dense(cls, mask: Tensor) -> Graph:
        """From a boolean ``[rows, columns]`` mask: True where row i attends to column j.

        Edges are numbered in row-major order of the mask.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a boolean tensor, got {kind}")
        if mask.ndim != 2:
            raise ValueError(f"mask must be [rows, columns], got {list(mask.shape)}")
        check_values(mask, "mask")
        rows, cols = mask.shape
        row, col = mask.nonzero(as_tuple=True)  # in row order already
        dtype = _index_dtype(rows, cols, col.shape[0])
        edge = torch.arange(col.shape[0], dtype=dtype, device=col.device)
        return _single(rows, cols, _boundaries(row.to(dtype), rows), col.to(dtype), edge)

    @classmethod
    def from_scipy(cls, matrix: scipy.sparse.sparray | scipy.sparse.spmatrix) -> Graph:
        """From the stored entries of a scipy sparse matrix: row i attends to column j.

        Values are ignored, explicit zeros and duplicates are edges; edges are numbered in the
        order of ``matrix.tocoo()``.
        """
        if not hasattr(matrix, "tocoo"):
            raise TypeError(f"matrix must be a scipy sparse matrix, got {type(matrix).__name__}")
        if len(matrix.shape) != 2:
            raise ValueError(f"matrix must be [rows, columns], got {list(matrix.shape)}")
        coo = matrix.tocoo()
        row, col = torch.as_tensor(coo.row.copy()), torch.as_tensor(coo.col.copy())
        rows, cols = map(int, coo.shape)
        check_range(row, rows, "matrix", "rows")
        check_range(col, cols, "matrix", "columns")
        return _build(row, col, rows, cols)

    @classmethod
    def from_pyg(cls, data: Any) -> Graph:
        """From a ``torch_geometric.data.Data`` or ``Batch``, or ``hetero[relation]``.

        The boundaries of a batch are kept: those of a sorted ``batch``, else ``ptr``. Where both
        are there, ``ptr`` says how many graphs there are, for the last ones may have no nodes. A
        relation has rows of the target's type and columns of the source's. PyG keeps Graphs that
        are attributes of batched ``Data`` in a list, which :meth:`batch` takes.

        Raises:
            TypeError: There is no ``edge_index``, or ``batch`` or ``ptr`` does not hold integers.
            ValueError: ``batch`` is not sorted, it or ``ptr`` does not fit, or a number of nodes is
                not known; says what to do.
        """
        if getattr(data, "edge_index", None) is None:
            raise TypeError(
                f"data must have an edge_index, got {type(data).__name__} without one: use "
                "from_edge_index or from_csr, and data[relation] of a HeteroData"
            )
        check_index(data.edge_index, "edge_index")
        check_values(data.edge_index, "edge_index")
        rows, cols, row_ptr, col_ptr = sides_of_pyg(data)
        graph = cls.from_edge_index(data.edge_index, (rows, cols))
        if row_ptr is None or col_ptr is None:
            return graph
        return _with_boundaries(graph, row_ptr, col_ptr)

    @classmethod
    def batch(cls, graphs: Sequence[Graph]) -> Graph:
        """Block-diagonal union. Nodes and edges are numbered graph after graph.

        Graphs may be :meth:`reordered`, each in its own way, if all of them are square.
        """
        graphs = list(graphs)
        for i, g in enumerate(graphs):
            if not isinstance(g, Graph):
                raise TypeError(f"graphs[{i}] must be a Graph, got {type(g).__name__}")
            if g.device != graphs[0].device:
                raise ValueError(f"graphs[0] is on {graphs[0].device}, graphs[{i}] on {g.device}")
        if not graphs:
            zero = torch.zeros(1, dtype=torch.int32, device="cpu")
            none = zero[:0]
            return cls(0, 0, zero, none, none, zero, zero)
        device = graphs[0].device
        edges = [g.num_edges for g in graphs]
        rows, cols = sum(g.num_rows for g in graphs), sum(g.num_cols for g in graphs)
        dtype = _index_dtype(rows, cols, sum(edges))

        def join(parts: list[Tensor], sizes: list[int], lengths: list[int]) -> Tensor:
            shift = torch.tensor([0, *sizes[:-1]], device="cpu").cumsum(0).to(device)
            shift = shift.repeat_interleave(
                torch.tensor(lengths, device=device), output_size=sum(lengths)
            )
            return (torch.cat(parts).long() + shift).to(dtype)

        def join_ptr(parts: list[Tensor], sizes: list[int]) -> Tensor:
            body = join([p[1:] for p in parts], sizes, [p.shape[0] - 1 for p in parts])
            return torch.cat([body.new_zeros(1), body])

        bipartite = [i for i, g in enumerate(graphs) if g.graph_ptr is not g.col_graph_ptr]
        moved = [i for i, g in enumerate(graphs) if g.order is not None]
        if moved and bipartite:
            raise ValueError(
                f"graphs[{moved[0]}] is reordered but graphs[{bipartite[0]}] is bipartite: they "
                "have no order in common"
            )
        order, nodes = None, [g.num_rows for g in graphs]
        if moved:
            orders = [
                torch.arange(g.num_rows, device=device) if g.order is None else g.order
                for g in graphs
            ]
            order = join(orders, nodes, nodes).long()
        graph_ptr = join_ptr([g.graph_ptr for g in graphs], nodes)
        return cls(
            rows,
            cols,
            join_ptr([g.row_ptr for g in graphs], edges),
            join([g.col for g in graphs], [g.num_cols for g in graphs], edges),
            join([g.edge for g in graphs], edges, edges),
            graph_ptr,
            join_ptr([g.col_graph_ptr for g in graphs], [g.num_cols for g in graphs])
            if bipartite
            else graph_ptr,
            order=order,
        )

    @property
    def num_edges(self) -> int:
        return self.col.shape[0]

    @property
    def num_graphs(self) -> int:
        return self.graph_ptr.shape[0] - 1

    @property
    def num_nodes(self) -> int:
        """Nodes of a square graph; a bipartite one has ``num_rows`` and ``num_cols``."""
        self._check_square("num_nodes")
        return self.num_rows

    @property
    def device(self) -> torch.device:
        return self.col.device

    @property
    def row_degree(self) -> Tensor:
        """Edges of each row, ``[N_rows]``."""
        return self.row_ptr.diff()

    @property
    def col_degree(self) -> Tensor:
        """Edges of each column, ``[N_cols]``."""
        return self.columns.ptr.diff()

    @property
    def columns(self) -> ColumnWalk:
        """The column walk, sorted on first use and kept."""
        walk = self._cache.get("columns")
        if walk is None:
            row, slot, ptr = _group(self.col, self.row, self.num_cols)
            walk = ColumnWalk(ptr, row, slot, self.edge.index_select(0, slot))
            # torch.export traces with fake tensors: they must not outlive the trace
            if type(slot) is type(self.col):
                walk = self._kept("columns", walk)
        return walk

    def plan(
        self,
        path: Path | Literal["auto"] = "auto",
        *,
        height: int | None = None,
        width: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Graph:
        """The same graph with the way that Triton kernels go through it settled and prepared.

        ``"gather"`` loads a row of k and v for every edge. ``"windows"`` takes windows of
        ``height`` rows whose columns are loaded once and multiplied on tensor cores; it pays
        where rows share columns. ``"graphs"`` does so with whole graphs of a batch, of up to 128
        nodes. Both take an edge bias; with any other tensor on edges, and with dropout, attention
        gathers. Results agree to rounding, each is the same bit for bit every time. What is
        prepared is kept and shared with this graph: 24 bytes an edge at most, each way.

        Without a call of this, every attention chooses for itself: graphs of up to 65,536 edges,
        float32 and float64 and heads beyond 128 channels gather; otherwise a sample of the graph
        and a table decide, and ``repr`` says what was chosen and why. On a CPU there is one path:
        a graph planned for another is refused. Graphs made from this one choose anew. Call
        it before compiling or capturing a CUDA graph, where nothing can be measured any more:
        attention then takes what is prepared, else gathers rows as they stand.

        Args:
            path: ``"gather"``, ``"windows"``, ``"graphs"``; or ``"auto"``: the choice for
                ``width`` and ``dtype``, or, without a width, each attention's own.
            height: Rows of a window: 16, 32 or 64, the default.
            width, dtype: Of the heads, for ``"auto"``.

        Raises:
            TypeError: ``height`` or ``width`` is no int.
            ValueError: The path does not fit the graph; says why.
            RuntimeError: Its tables would not fit in memory, or the graph holds no values.

        Example:
            >>> import torch
            >>> from fastgt import Graph
            >>> graph = Graph.from_dense(torch.ones(3, 3, dtype=torch.bool)).plan("windows")
            >>> print(graph.choice)
            windows of 64 rows (named)
        """
        if path not in ("auto", *get_args(Path)):
            raise ValueError(f"path must be 'auto' or one of {list(get_args(Path))}, got {path!r}")
        height = None if height is None else size_of(height, "height")
        width = None if width is None else size_of(width, "width")
        if height is not None and height not in tiles.HEIGHTS:
            raise ValueError(f"height must be one of {list(tiles.HEIGHTS)}, got {height!r}")
        if height is not None and path not in ("windows", "graphs"):
            raise ValueError(f"height is for windows and graphs, got path={path!r}")
        if width is not None and not 1 <= width <= tiles.MAX_WIDTH:
            raise ValueError(f"width must be from 1 to {tiles.MAX_WIDTH}, got {width}")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
        if self.device.type == "meta":
            raise RuntimeError("a graph on the meta device has no values to plan with")
        graph = self._replace(choice=None)
        if path != "auto":
            graph = self._replace(
                choice=Plan(path, 0 if path == "gather" else height or 64, "named")
            )
        elif width is not None:
            graph = self._replace(choice=graph.choose(width, dtype))
        # without a choice, what gathering needs
        prepared = graph.choice or plans.SMALL
        graph.row_walk(prepared)
        graph.column_walk(prepared)
        return graph

    def choose(self, width: int, dtype: torch.dtype, *, edge_terms: bool = False) -> Plan:
        """How attention with heads of that width and dtype goes through the graph, and why.

        ``edge_terms``: with tensors on edges other than a bias, or dropout.
        """
        if edge_terms:
            return plans.EDGE_TERMS
        if self.choice is not None:
            return self.choice
        if self.num_edges <= plans.LAUNCH_BOUND:
            return plans.SMALL
        plan = self._cache.get((width, dtype))
        if plan is None:
            if not self._measurable():
                return plans.UNPREPARED
            walk = self.row_ptr, self.col, self.num_cols
            ends, whole = (self.graph_ptr, self.col_graph_ptr), [0, -1]
            plan = plans.choose(*walk, *ends, width, dtype)
            if plan.path == "graphs" and self._windows(plan.path, plan.height) is None:
                # an edge stands there twice, which windows across graphs can hold
                plan = plans.choose(*walk, ends[0][whole], ends[1][whole], width, dtype)
            # a choice that is kept is prepared: it may be compiled from now on
            try:
                if plan.height:
                    self._tables(plan)
            except RuntimeError as error:  # memory has shrunk since it was asked for
                plan = Plan("gather", 0, f"auto: {error}")
            self._cache[width, dtype] = plan
        return plan

    def _measurable(self) -> bool:
        """Whether there are values: not on the meta device, nor while somebody traces."""
        tracing = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        return not tracing and self.device.type != "meta"

    def row_walk(self, plan: Plan) -> tuple[Tensor, ...]:
        """The flat tensors that the kernels of that plan walk by rows."""
        walk = self.row_ptr, self.col, self.edge
        if plan.path == "gather":
            return *walk, *(self._buckets("row_buckets", self.row_ptr) or ())
        return *walk, *self._tables(plan)[0][2:]

    def column_walk(self, plan: Plan) -> tuple[Tensor, ...]:
        """The flat tensors that the kernels of that plan walk by columns."""
        if plan.path == "gather":
            ptr, row, _, edge = self.columns
            return ptr, row, edge, *(self._buckets("column_buckets", ptr) or ())
        return tuple(self._tables(plan)[1][2:])

    def _buckets(self, key: str, ptr: Tensor) -> Buckets | None:
        if key not in self._cache:
            small = self.num_edges <= tiles.SMALL_EDGES
            if small or not self._measurable():
                return None
            return self._kept(key, tiles.buckets(ptr))
        return self._cache[key]

    def _tables(self, plan: Plan) -> tuple[Windows, Windows]:
        tables = self._windows(plan.path, plan.height)
        if tables is None:
            raise ValueError(
                "path 'graphs' takes graphs without duplicate edges, and this one has some: "
                "use 'windows'"
            )
        return tables

    def _windows(self, path: str, height: int) -> tuple[Windows, Windows] | None:
        """Windows of rows and of columns; None where dense ones cannot hold the edges."""
        # by comparison: torch.compile(dynamic=True) has no text of the height, which is symbolic
        key = f"{path} {'16' if height == 16 else '32' if height == 32 else '64'}"
        if key in self._cache:
            return self._cache[key]
        ends = self.graph_ptr, self.col_graph_ptr
        plans.check_fits(path, height, self.num_edges, *ends, self.col.dtype)
        ptr, row, _, edge = self.columns
        rows: Windows | None
        columns: Windows | None
        if path == "graphs":
            rows = tiles.dense_windows(self.row_ptr, self.col, self.edge, *ends, height)
            columns = tiles.dense_windows(ptr, row, edge, *ends[::-1], height)
        else:
            rows = tiles.windows(self.row_ptr, self.col, self.edge, self.num_cols, height)
            columns = tiles.windows(ptr, row, edge, self.num_rows, height)
        if rows is None or columns is None:
            return None
        return self._kept(key, (rows, tiles.shared(columns, rows)))

    def _kept(self, key: str, tables: Any) -> Any:
        """Tables, from now on in the cache."""
        # compiled under inference_mode, they are inference tensors, and Dynamo cannot tell
        if torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return tables
        tables = _each(normal, tables)
        self._cache[key] = tables
        return tables

    @property
    def row(self) -> Tensor:
        """The row of each slot of the row walk, ``[E]``."""
        row = torch.arange(self.num_rows, dtype=self.col.dtype, device=self.device)
        return row.repeat_interleave(self.row_degree, output_size=self.num_edges)

    @property
    def edge_index(self) -> Tensor:
        """``[2, E]`` int64, in the caller's order: the source (key) above the target (query)."""
        ends = torch.stack([self.col, self.row]).long()
        return torch.empty_like(ends).index_copy_(1, self.edge.long(), ends)

    def to(
        self,
        device: torch.device | str | int | torch.dtype | Tensor | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
        copy: bool = False,
        *,
        memory_format: torch.memory_format | None = None,
    ) -> Graph:
        """The same graph on another device, with what was cached; itself if it is there already.

        The arguments are those of ``Tensor.to``: without a device the graph stays where it is, and
        a tensor stands for its device. A floating-point ``dtype`` changes nothing, for indices stay
        integers, nor does a ``memory_format``. A graph that goes to the CPU with
        ``non_blocking=True`` must not be used before the device has been waited for, as with
        tensors.
        """
        if isinstance(device, torch.dtype) and dtype is None:
            device, dtype = None, device
        if device is None or isinstance(device, Tensor):
            device = self.device if device is None else device.device
        if not isinstance(device, (torch.device, str, int)):
            raise TypeError(f"device must be a torch.device or its name, got {device!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(
                "dtype must be a floating-point torch.dtype, for a graph keeps its own index type, "
                f"got {dtype!r}"
            )
        if self.device.type == "meta" and torch.device(device).type != "meta":
            raise NotImplementedError(
                f"a graph on the meta device has no values to copy to {device}: keep the one that "
                "was moved there"
            )
        device = self.col.new_empty(0).to(device).device  # "cuda" means "cuda:0"
        if self.device == device:
            return self._mapped(torch.clone) if copy else self
        moved = self._mapped(lambda x: x.to(device, non_blocking=non_blocking))
        return moved._replace(
            # choices are made for a device, unless the user named one
            choice=self.choice if self.choice and self.choice.reason == "named" else None,
            _cache={key: x for key, x in moved._cache.items() if key.__class__ is str},
        )

    def cpu(self) -> Graph:
        """:meth:`to` the CPU."""
        return self.to("cpu")

    def cuda(
        self, device: torch.device | str | int | None = None, non_blocking: bool = False
    ) -> Graph:
        """:meth:`to` a CUDA device; default: the current one."""
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def pin_memory(self, device: torch.device | str | None = None) -> Graph:
        """The same graph in page-locked memory, from which a GPU can copy while others compute.

        PyTorch warns that a ``device`` is deprecated; it takes the current accelerator without one.
        """
        where = () if device is None else (device,)
        return self if self.is_pinned() else self._mapped(lambda x: x.pin_memory(*where))

    def is_pinned(self) -> bool:
        """Whether :meth:`pin_memory` would change nothing."""
        return all(x.is_pinned() for x in self._tensors() if x.numel())

    def share_memory_(self) -> Graph:
        """Moves the tensors to memory that processes share, in place; itself."""
        for x in self._tensors():
            x.share_memory_()
        return self

    def record_stream(self, stream: torch.Stream) -> None:
        """``Tensor.record_stream`` of every tensor: another stream uses them."""
        for x in self._tensors():
            x.record_stream(stream)

    def transpose(self) -> Graph:
        """Every edge the other way round; edges keep their numbers."""
        walk = self.columns
        # where each slot of this graph's row walk stands in its column walk
        place = torch.empty_like(walk.slot)
        place[walk.slot.long()] = torch.arange(
            self.num_edges, dtype=place.dtype, device=place.device
        )
        back = ColumnWalk(self.row_ptr, self.col, normal(place), self.edge)
        return Graph(
            self.num_cols,
            self.num_rows,
            walk.ptr,
            walk.row,
            walk.edge,
            self.col_graph_ptr,
            self.graph_ptr,
            {"columns": back},
            order=self.order,
        )

    def with_self_loops(self) -> Graph:
        """One more edge from every node to itself, numbered E, E + 1, ... after the others.

        A node that has a self loop already gets a second one. In a :meth:`reordered` graph too,
        edge E + i is that of node i of the graph as first built.
        """
        self._check_square("with_self_loops()")
        loop = self.undo_order(torch.arange(self.num_rows, device=self.device))
        source, target = self.edge_index
        graph = _build(
            torch.cat([target, loop]), torch.cat([source, loop]), self.num_rows, self.num_cols
        )
        ptr = self.graph_ptr.to(graph.col.dtype)  # the loops may be more than int32 counts
        return graph._replace(graph_ptr=ptr, col_graph_ptr=ptr, order=self.order)

    def reordered(self, order: Tensor | str) -> Graph:
        """Nodes renumbered: node i of the result is node ``order[i]`` of this graph.

        Attention may be faster where neighbours stand near each other, and gives the same values.
        :meth:`apply_order` brings node tensors into the graph's order and :meth:`undo_order`
        brings results back, from any number of reorderings at once; edges keep their numbers, so
        edge tensors stay as they are. In a batch every graph must keep its own range of nodes.

        Args:
            order: ``[N]`` integers, a permutation; or how to find one: ``"degree"``, ``"rcm"``,
                ``"metis"`` or ``"louvain"``, see :func:`fastgt.reordering.node_order`.

        Raises:
            TypeError, ValueError: ``order`` is no permutation of the nodes of each graph, nor the
                name of a method; or the graph is not square.
            ImportError: The method needs ``pip install "fastgt[reorder]"``.

        Example:
            >>> import torch
            >>> from fastgt import Graph, neighborhood_attention
            >>> graph = Graph.from_edge_index(torch.tensor([[2, 3, 0, 3, 1], [0, 1, 2, 2, 3]]))
            >>> near = graph.reordered("rcm")
            >>> x = torch.randn(4, 8, 16)
            >>> moved = near.apply_order(x)
            >>> out = near.undo_order(neighborhood_attention(moved, moved, moved, near))
            >>> torch.allclose(out, neighborhood_attention(x, x, x, graph), atol=1e-6)
            True
        """
        self._check_square("reordered()")
        if self.device.type == "meta":
            raise RuntimeError(
                "a graph on the meta device has no values to order: reorder it before it is moved"
            )
        if isinstance(order, str):
            order = node_order(order, self.row_ptr, self.col, self.graph_ptr)
        check_index(order, "order")
        n = self.num_rows
        if order.shape != (n,):
            raise ValueError(f"order must be [{n}], one entry a node, got {list(order.shape)}")
        if order.device != self.device:
            raise ValueError(f"order is on {order.device} but the graph is on {self.device}")
        check_range(order, n, "order", "nodes")
        order = order.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
        place = torch.full_like(order, -1)
        place[order] = torch.arange(n, device=self.device)
        if bool((place < 0).any()):
            missing = int((place < 0).nonzero()[0])
            raise ValueError(f"order is not a permutation: node {missing} of {n} is missing")
        if self.num_graphs > 1:
            graph_of = _owners(self.graph_ptr, n)
            astray = graph_of[order] != graph_of
            if bool(astray.any()):
                i = int(astray.nonzero()[0])
                raise ValueError(
                    f"order puts node {int(order[i])} of graph {int(graph_of[order[i]])} at {i}, "
                    f"in graph {int(graph_of[i])} of the batch"
                )
        source, target = self.edge_index
        graph = _build(place[target], place[source], n, n)
        if self.order is not None:
            order = self.order[order]
        ptr = self.graph_ptr
        return graph._replace(graph_ptr=ptr, col_graph_ptr=ptr, order=order)

    def apply_order(self, x: Tensor) -> Tensor:
        """A node tensor ``[N, ...]`` of the graph as first built, in the order of this graph.

        ``x`` itself where the graph was never :meth:`reordered`. Differentiable.
        """
        self._check_nodes(x, "x", "apply_order()")
        return x if self.order is None else x.index_select(0, self.order)

    def undo_order(self, y: Tensor) -> Tensor:
        """A node tensor ``[N, ...]`` of this graph, in the order of the graph as first built.

        ``y`` itself where the graph was never :meth:`reordered`. Differentiable.
        """
        self._check_nodes(y, "y", "undo_order()")
        return y if self.order is None else torch.empty_like(y).index_copy_(0, self.order, y)

    def __repr__(self) -> str:
        square = self.num_rows == self.num_cols
        size = f"N={self.num_rows}" if square else f"N={self.num_rows}x{self.num_cols}"
        if self.device.type == "meta":  # no values to describe
            return f"Graph({size}, E={self.num_edges}, meta)"
        # two walks may share a tensor: count each storage once
        held = {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self._tensors()
        }
        parts = [size, f"E={self.num_edges}"]
        if self.num_graphs != 1:
            parts.append(f"G={self.num_graphs}")
        if self.num_rows:
            degree = self.row_degree
            parts.append(
                f"degree mean {self.num_edges / self.num_rows:.1f} max {int(degree.max())}"
            )
            parts.append(f"{int((degree == 0).sum())} isolated rows")
        if self.order is not None:
            parts.append("reordered")
        index = str(self.col.dtype).removeprefix("torch.")
        parts += [index, f"{sum(held.values()) / 1e6:.1f} MB", str(self.device)]
        if self.choice is not None:
            edges = "; gather with edge vectors, gates, attributes or dropout"
            parts.append(f"plan {self.choice}{edges if self.choice.height else ''}")
        for key, plan in self._cache.items():
            if isinstance(plan, Plan) and self.choice is None:
                parts.append(f"plan for width {key[0]} {key[1]}: {plan}".replace("torch.", ""))
        return f"Graph({', '.join(parts)})"

    def _tensors(self) -> list[Tensor]:
        """All that it holds, what is cached too."""
        found: list[Tensor] = []
        _each(found.append, (*vars(self).values(), *self._cache.values()))
        return found

    def _mapped(self, f: Callable[[Tensor], Tensor]) -> Graph:
        """The same graph with ``f`` of every tensor; one tensor in two places stays one."""
        done: dict[int, Tensor] = {}

        def once(x: Tensor) -> Tensor:
            if id(x) not in done:
                done[id(x)] = normal(f(x))
            return done[id(x)]

        fields = {name: _each(once, x) for name, x in vars(self).items()}
        return Graph(**fields | {"_cache": {k: _each(once, x) for k, x in self._cache.items()}})

    def _check_nodes(self, x: Tensor, name: str, what: str) -> None:
        self._check_square(what)
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim == 0 or x.shape[0] != self.num_rows:
            n = self.num_rows
            raise ValueError(f"{name} must be [{n}, ...], one entry a node, got {list(x.shape)}")
        if x.device != self.device:
            raise ValueError(f"{name} is on {x.device} but the graph is on {self.device}")

    def _check_square(self, what: str) -> None:
        if self.num_rows != self.num_cols:
            raise ValueError(
                f"{what} needs a square graph, got {self.num_rows} rows and {self.num_cols} columns"
            )
        if self.graph_ptr is not self.col_graph_ptr:
            raise ValueError(f"{what} needs square graphs, got a batch of bipartite ones")


def _each(f: Callable[[Tensor], Any], x: Any) -> Any:
    """``f`` of every tensor in nested tuples, which keep their types."""
    if isinstance(x, Tensor):
        return f(x)
    if not isinstance(x, tuple):
        return x
    parts = [_each(f, part) for part in x]
    return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)


def _build(row: Tensor, col: Tensor, num_rows: int, num_cols: int) -> Graph:
    dtype = _index_dtype(num_rows, num_cols, row.shape[0])
    col, edge, row_ptr = _group(row.to(dtype), col.to(dtype), num_rows)
    return _single(num_rows, num_cols, row_ptr, col, edge)


def _group(key: Tensor, other: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stable sort by ``key``: the other ends, the order and the boundaries, in key's dtype."""
    ordered, order = torch.sort(key, stable=True)
    return other.index_select(0, order), order.to(key.dtype), _boundaries(ordered, size)


def _boundaries(ordered: Tensor, size: int) -> Tensor:
    """Where each of the keys 0 .. size - 1 begins in ``ordered``, and the end, in its dtype."""
    keys = torch.arange(size + 1, dtype=ordered.dtype, device=ordered.device)
    return torch.searchsorted(ordered, keys, out_int32=ordered.dtype == torch.int32)


def _single(num_rows: int, num_cols: int, row_ptr: Tensor, col: Tensor, edge: Tensor) -> Graph:
    graph_ptr = torch.tensor([0, num_rows], dtype=row_ptr.dtype, device=row_ptr.device)
    col_graph_ptr = graph_ptr
    if num_cols != num_rows:
        col_graph_ptr = torch.tensor([0, num_cols], dtype=row_ptr.dtype, device=row_ptr.device)
    return Graph(num_rows, num_cols, row_ptr, col, edge, graph_ptr, col_graph_ptr)


def _with_boundaries(graph: Graph, row_ptr: Tensor, col_ptr: Tensor) -> Graph:
    """The graph as a batch, with its boundaries in rows and in columns, which fit."""
    if row_ptr.shape != col_ptr.shape:
        raise ValueError(
            f"the targets are of {len(row_ptr) - 1} graphs but the sources of {len(col_ptr) - 1}"
        )
    ptr = row_ptr.to(graph.col.dtype, copy=True)
    own = ptr if row_ptr is col_ptr else col_ptr.to(graph.col.dtype, copy=True)
    graph = graph._replace(graph_ptr=ptr, col_graph_ptr=own)
    row_graph = _owners(ptr, graph.num_rows).repeat_interleave(
        graph.row_degree, output_size=graph.num_edges
    )
    outside = _owners(own, graph.num_cols).index_select(0, graph.col) != row_graph
    if bool(outside.any()):
        slot = int(outside.nonzero()[0])
        raise ValueError(
            f"edge_index: edge {int(graph.edge[slot])} joins node {int(graph.col[slot])} to node "
            f"{int(graph.row[slot])} of another graph of the batch"
        )
    return graph


def _owners(ptr: Tensor, size: int) -> Tensor:
    """The number of each node's graph, ``[N]``."""
    nodes = torch.arange(size, dtype=ptr.dtype, device=ptr.device)
    return torch.searchsorted(ptr, nodes, right=True) - 1


def _index_dtype(num_rows: int, num_cols: int, num_edges: int) -> torch.dtype:
    return torch.int32 if max(num_rows, num_cols, num_edges) <= _INT32_MAX else torch.int64


# torch.load of a saved graph works as it does for tensors
torch.serialization.add_safe_globals([Graph, ColumnWalk, Buckets, Windows, Plan])

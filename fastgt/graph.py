"""Who attends to whom: built once, immutable, shared by every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastgt import (
    graph_build,
    graph_from_pyg,
    graph_hetero,
    graph_order,
    graph_pytree,
    graph_sample,
)
from fastgt.graph_build import normal
from fastgt.graph_file import Saved
from fastgt.graph_hetero import Relation, Types
from fastgt.graph_sample import Sample
from fastgt.plans import Plan
from fastgt.prepared import Prepared

if TYPE_CHECKING:
    import scipy.sparse


class Graph(Saved):
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
    :meth:`from_scipy`, :meth:`from_pyg`, :meth:`from_hetero`, :meth:`complete` or :meth:`batch`;
    the fields are for reading. A graph that is made under ``torch.inference_mode()`` may be trained
    with. If compiled code makes it there, train with ``copy.copy(graph)``, made outside compiled
    code. It is a pytree: ``tree_map`` maps its tensors, and ``torch.export`` takes it as an input,
    with dynamic sizes (:mod:`fastgt.graph_pytree`).

    Attributes:
        num_rows, num_cols: Queries and keys; equal unless the graph is bipartite.
        row_ptr, col, edge: The row walk (CSR), above.
        graph_ptr, col_graph_ptr: ``[G + 1]`` boundaries of the graphs of a batch, in rows and
            in columns (one tensor where the graph is square).
        settled: The plan by which kernels go through it, if :meth:`plan` has settled that; else
            None, and each attention takes that of :meth:`plan_for`.
        prepared: What it keeps for its kernels beside the row walk.
        order: ``[N]`` int64 where the graph was :meth:`reordered`: its node i is node
            ``order[i]`` of the graph as first built; else None.
        types: Slices of rows, columns and edges by type and relation, in a graph
            :meth:`from_hetero` and what is the same with another plan, place or direction; else
            None.

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
    prepared: Prepared
    settled: Plan | None
    order: Tensor | None  # [N]
    types: Types | None

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
        prepared: Prepared | None = None,
        settled: Plan | None = None,
        order: Tensor | None = None,
        types: Types | None = None,
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
            "prepared": Prepared() if prepared is None else prepared,
            "settled": settled,
            "order": None if order is None else normal(order),
            "types": types,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

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
                Default: where ``graph_ptr`` ends, else what a ``torch_geometric.EdgeIndex`` has as
                ``sparse_size()``, else the largest index plus one.
            graph_ptr: ``[G + 1]`` node boundaries of a batch of graphs (PyG's ``Batch.ptr``).

        Raises:
            TypeError: ``edge_index`` is not an integer tensor, or a size is no int.
            ValueError: A wrong shape, an index out of range, boundaries that do not fit, or an
                edge from one graph of the batch to another.
            RuntimeError: ``edge_index`` is on the meta device.
        """
        return cls(*graph_build.from_edge_index(edge_index, num_nodes, graph_ptr))

    @classmethod
    def from_csr(cls, row_ptr: Tensor, col: Tensor, num_cols: int | None = None) -> Graph:
        """From compressed rows: row i attends to ``col[row_ptr[i]:row_ptr[i + 1]]``.

        The caller's edge order is the order of ``col``. ``num_cols`` defaults to the number of
        rows.
        """
        return cls(*graph_build.from_csr(row_ptr, col, num_cols))

    @classmethod
    def from_dense(cls, mask: Tensor) -> Graph:
        """From a boolean ``[rows, columns]`` mask: True where row i attends to column j.

        Edges are numbered in row-major order of the mask.
        """
        return cls(*graph_build.from_dense(mask))

    @classmethod
    def from_scipy(cls, matrix: scipy.sparse.sparray | scipy.sparse.spmatrix) -> Graph:
        """From the stored entries of a scipy sparse matrix: row i attends to column j.

        Values are ignored, explicit zeros and duplicates are edges; edges are numbered in the
        order of ``matrix.tocoo()``.
        """
        return cls(*graph_build.from_scipy(matrix))

    @classmethod
    def from_pyg(cls, data: Any) -> Graph:
        """From a ``torch_geometric.data.Data``, ``Batch``, ``HeteroData`` or ``hetero[relation]``.

        The boundaries of a batch are kept: those of a sorted ``batch``, else ``ptr``. Where both
        are there, ``ptr`` says how many graphs there are, for the last ones may have no nodes. A
        relation has rows of the target's type and columns of the source's. A whole ``HeteroData``
        is :meth:`from_hetero` of all its relations. PyG keeps Graphs that
        are attributes of batched ``Data`` in a list, which :meth:`batch` takes.

        Edges are those of ``edge_index``, in its order, else those of ``adj_t``: row i attends to
        column j where ``adj_t[i, j]`` is stored. ``adj_t`` is a ``torch_sparse.SparseTensor`` or
        ``torch.sparse_csr``, ``sparse_csc`` or ``sparse_coo``. Its edges are numbered row by row:
        edge tensors stand as ``value()`` of a SparseTensor does, or as ``values()`` of
        ``adj_t.to_sparse_csr()``.

        Raises:
            TypeError: There is no ``edge_index`` and no ``adj_t``, one is of another type, or
                ``batch`` or ``ptr`` does not hold integers.
            ValueError: ``batch`` is not sorted, it or ``ptr`` does not fit, they disagree, or a
                number of nodes is not known or not that of ``adj_t``; says what to do.
        """
        graph, types = graph_from_pyg.from_pyg(data)
        return cls(*graph, types=types)

    @classmethod
    def from_hetero(
        cls,
        edge_index_dict: Mapping[Relation, Any],
        num_nodes: Mapping[str, int] | None = None,
        columns: Literal["relations", "types"] = "relations",
    ) -> Graph:
        """One graph of several relations: a target's softmax is over its edges of all of them.

        Rows are the nodes of all types that are targets, type after type, and columns the sources
        of all relations. Edges are numbered relation after relation. ``graph.types`` says where
        each of them stands. With ``columns="relations"`` every relation has columns of its own,
        for HGT makes other keys of a node for each. With ``"types"`` relations share the columns
        of a type. A batch is one graph, for nodes of one type stand together.

        Args:
            edge_index_dict: By ``(source type, name, target type)``, what :meth:`from_edge_index`
                or, as ``adj_t``, :meth:`from_pyg` takes.
            num_nodes: By type. What sparse matrices and ``EdgeIndex`` know may be left out.
            columns: ``"relations"`` or ``"types"``.

        Raises:
            TypeError: A relation's name or edges are of another type.
            ValueError: Edges do not fit, or sizes disagree or are not known.

        Source: Hu et al., Heterogeneous Graph Transformer, 2020, equations 3 to 5.

        Example:
            >>> import torch
            >>> from fastgt import Graph, neighborhood_attention
            >>> writes, cites = ("author", "writes", "paper"), ("paper", "cites", "paper")
            >>> edges = {writes: torch.tensor([[0, 1], [0, 1]]), cites: torch.tensor([[0], [1]])}
            >>> graph = Graph.from_hetero(edges, {"author": 2, "paper": 3})
            >>> graph.num_rows, graph.num_cols, graph.types.columns[cites]
            (3, 5, slice(2, 5, None))
            >>> nodes = {"author": torch.randn(2, 8, 16), "paper": torch.randn(3, 8, 16)}
            >>> q = torch.cat([nodes[name] for name in graph.types.rows])
            >>> k = torch.cat([nodes[source] for source, _, _ in graph.types.columns])
            >>> out = neighborhood_attention(q, k, k, graph)
            >>> {name: out[rows].shape for name, rows in graph.types.rows.items()}
            {'paper': torch.Size([3, 8, 16])}
        """
        graph, types = graph_hetero.from_hetero(edge_index_dict, num_nodes, columns)
        return cls(*graph, types=types)

    @classmethod
    def complete(cls, offsets: Tensor, key_offsets: Tensor | None = None) -> Graph:
        """Every node attends to all nodes of its graph, itself too, or to all keys of it.

        Edges are numbered graph after graph, row by row.

        Args:
            offsets: ``[G + 1]`` boundaries of the graphs in rows, from 0.
            key_offsets: Those in columns, where columns are other nodes than rows.

        Example:
            >>> import torch
            >>> from fastgt import Graph
            >>> Graph.complete(torch.tensor([0, 1, 3])).edge_index.tolist()
            [[0, 1, 2, 1, 2], [0, 1, 1, 2, 2]]
        """
        return cls(*graph_build.complete(offsets, key_offsets))

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
        parts = [g._structure for g in graphs]
        order = graph_order.joined_orders(parts, [g.order for g in graphs])
        return cls(*graph_build.joined(parts), order=order)

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
    def row_degree(self) -> Tensor:
        """Edges of each row, ``[N_rows]``."""
        return self.row_ptr.diff()

    @property
    def col_degree(self) -> Tensor:
        """Edges of each column, ``[N_cols]``."""
        return self.columns.ptr.diff()

    @property
    def row(self) -> Tensor:
        """The row of each slot of the row walk, ``[E]``."""
        return self._structure.row

    @property
    def edge_index(self) -> Tensor:
        """``[2, E]`` int64, in the caller's order: the source (key) above the target (query)."""
        return self._structure.edge_index

    def transpose(self) -> Graph:
        """Every edge the other way round; edges keep their numbers."""
        walk = self.columns
        ends = self.col_graph_ptr, self.graph_ptr
        kept = Prepared(columns=walk.of_transpose(self._structure))
        rows, cols = self.num_cols, self.num_rows
        types = None if self.types is None else self.types.of_transpose()
        fields = walk.ptr, walk.row, walk.edge, *ends, kept
        return Graph(rows, cols, *fields, order=self.order, types=types)

    def with_self_loops(self) -> Graph:
        """One more edge from every node to itself, numbered E, E + 1, ... after the others.

        A node that has a self loop already gets a second one. In a :meth:`reordered` graph too,
        edge E + i is that of node i of the graph as first built.
        """
        self._check_square("with_self_loops()")
        loop = self.undo_order(torch.arange(self.num_rows, device=self.device))
        source, target = self.edge_index
        ends = torch.cat([target, loop]), torch.cat([source, loop])
        graph = graph_build.from_pairs(*ends, self.num_rows, self.num_cols)
        ptr = self.graph_ptr.to(graph.col.dtype)  # the loops may be more than int32 counts
        return Graph(*graph._replace(graph_ptr=ptr, col_graph_ptr=ptr), order=self.order)

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
        order = graph_order.permutation(order, self._structure)
        graph = graph_order.renumbered(self._structure, order)
        return Graph(*graph, order=order if self.order is None else self.order[order])

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

    def sample(
        self,
        seeds: Tensor,
        fanouts: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        replace: bool = False,
    ) -> Sample:
        """Neighbours of ``seeds``, theirs, and so on: a bipartite block of edges for each layer.

        A block has at most ``fanout`` edges of each of its rows, every set of so many alike
        likely. Rows of a block are the first of its columns: the seeds, then the other nodes of
        earlier blocks. Drawing costs no more than looking at all edges of these rows.

        Args:
            seeds: ``[S]`` integers, the nodes that outputs are for, none twice.
            fanouts: Edges of a row in the last block, in the one before it, ...; -1 takes all.
            generator: On the graph's device. The same state gives the same sample.
            replace: Draws each edge anew: one may be there several times.

        Raises:
            TypeError: ``seeds`` or ``fanouts`` are no integers, or ``generator`` is none.
            ValueError: A seed is no node, or is there twice; or the graph is not square.

        Source: Hamilton et al., Inductive Representation Learning on Large Graphs, 2017,
        algorithm 2.

        Example:
            >>> import torch
            >>> from fastgt import Graph, aggregate
            >>> graph = Graph.from_edge_index(torch.randint(1000, (2, 20_000)), 1000)
            >>> x = torch.randn(1000, 8)
            >>> blocks, n_id, e_id = graph.sample(torch.tensor([7, 3]), (15, 10))
            >>> h = x[n_id]
            >>> for block in blocks:
            ...     h = h[: block.num_rows] + aggregate(h, block, reduce="mean")
            >>> h.shape, n_id[:2].tolist()
            (torch.Size([2, 8]), [7, 3])
        """
        found = graph_sample.sample(self._structure, seeds, fanouts, generator, replace)
        blocks, n_id, e_id = found
        return Sample(tuple(Graph(*block) for block in blocks), n_id, tuple(e_id))

    def _check_nodes(self, x: Tensor, name: str, what: str) -> None:
        self._check_square(what)
        graph_order.check_nodes(x, name, self.num_rows, self.device)

    def _check_square(self, what: str) -> None:
        if self.num_rows != self.num_cols or self.graph_ptr is not self.col_graph_ptr:
            graph_build.check_square(self._structure, what)


# torch.load of a saved graph works as it does for tensors
torch.serialization.add_safe_globals([Graph])
graph_pytree.register(Graph)

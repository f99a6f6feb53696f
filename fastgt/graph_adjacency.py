"""Edges as PyG keeps them: an index, or a sparse matrix of PyTorch or torch_sparse."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgt.graph_build import (
    Structure,
    check_index,
    check_values,
    from_csr,
    group,
    index_dtype,
    sparse_sizes,
)


class Edges(NamedTuple):
    """The edges of a ``Data`` or of a relation, and what they say of the number of nodes."""

    name: str
    index: Any  # [2, E] edge_index, or a sparse matrix
    graph: Structure | None  # of a sparse matrix
    rows: int | None
    cols: int | None

    @property
    def device(self) -> torch.device:
        return self.index.device if self.graph is None else self.graph.col.device


def read_edges(x: Any, name: str, matrix: bool = False) -> Edges:
    """Of an index, or of a sparse matrix, which ``x`` must be where ``matrix`` is set."""
    if matrix or is_adjacency(x):
        graph = from_adjacency(x, name)
        return Edges(name, x, graph, graph.num_rows, graph.num_cols)
    check_index(x, name)
    check_values(x, name)
    return Edges(name, x, None, *sparse_sizes(x))


def is_adjacency(x: Any) -> bool:
    """Whether ``x`` is a sparse matrix, and no index of edges."""
    if isinstance(x, Tensor):
        return x.layout != torch.strided
    return hasattr(x, "csr") and hasattr(x, "sparse_sizes")


def from_adjacency(x: Any, name: str) -> Structure:
    """Row i attends to column j for every entry ``x[i, j]``, of whatever value.

    Edges are numbered row by row, as the entries of CSR. Entries that stand there twice are two
    edges, in the order in which they stand.
    """
    if not is_adjacency(x):
        kind = "a dense tensor" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{name} must be a sparse matrix, of torch.sparse_csr, torch.sparse_csc or "
            f"torch.sparse_coo or a torch_sparse.SparseTensor, got {kind}"
        )
    if not isinstance(x, Tensor):
        row_ptr, col, _ = x.csr()
        return from_csr(row_ptr, col, int(x.sparse_sizes()[1]))
    check_values(x, name)
    if x.layout == torch.sparse_csr:
        row_ptr, col = x.crow_indices(), x.col_indices()
        _check_matrix(x, name, row_ptr.ndim == 1)
        return from_csr(row_ptr, col, x.shape[1])
    if x.layout == torch.sparse_csc:
        col_ptr, row = x.ccol_indices(), x.row_indices()
        _check_matrix(x, name, col_ptr.ndim == 1)
        turned = from_csr(col_ptr, row, x.shape[0])
        return _row_major(turned.col, turned.row, x)
    if x.layout == torch.sparse_coo:
        _check_matrix(x, name, x.sparse_dim() == 2)
        row, col = x._indices()  # what merges no duplicates
        if not x.is_coalesced():
            col, order = torch.sort(col, stable=True)
            row = row.index_select(0, order)
        return _row_major(row, col, x)
    raise TypeError(f"{name} must be torch.sparse_csr, sparse_csc or sparse_coo, got {x.layout}")


def _row_major(row: Tensor, col: Tensor, x: Tensor) -> Structure:
    """Of entries whose columns do not decrease within a row."""
    dtype = index_dtype(x.shape[0], x.shape[1], row.shape[0])
    col, _, row_ptr, _ = group(row, col, x.shape[0], dtype)
    return from_csr(row_ptr, col, x.shape[1])


def _check_matrix(x: Tensor, name: str, is_matrix: bool) -> None:
    if not is_matrix:
        raise ValueError(f"{name} must be [targets, sources], got {list(x.shape)}")

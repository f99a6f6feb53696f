"""Singular vectors of a graph's normalised adjacency, as tokens of nodes without features."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastgt.graph import Graph
from fastgt.ops.aggregate import aggregate
from fastgt.ops.checks import check_graph, integer


@torch.no_grad()
def svd_tokens(
    graph: Graph,
    dim: int,
    *,
    iterations: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Tokens of nodes from a randomised, truncated SVD of every graph of the batch.

        A' = D_r^-1/2 A D_c^-1/2 ~ U S V^T,    E = (U + V) S^1/2,    or    E = [U S^1/2; V S^1/2]

    A_ij is the number of edges j -> i, duplicates and self loops as given. D_r and D_c count the
    edges of rows and of columns. The first form is of square graphs. The second one is of bipartite
    graphs: tokens of the rows, then those of the columns.

    What is unique: columns of U and V have a common sign, which is arbitrary, and those of one
    singular value may be rotated together. E E^T does not depend on either, as long as singular
    value ``dim`` is above the next one. For a symmetric A it is 4 times the part of A' with
    positive eigenvalues: where an eigenvalue is negative, U and V cancel. The seed and the
    numbering of the nodes decide signs and rotations. OpenGraph draws new tokens again and again.

    A graph of fewer than ``dim`` rows or columns has as many singular values as it can; the other
    channels are 0. A graph without edges has tokens of 0.

    The range of A' is found from random vectors, by ``iterations`` steps of subspace iteration. A'
    is never made: each step is a product with a sparse matrix, in O(E dim) time, and a QR in
    O(N dim^2). Memory is about 7 times that of the tokens, and O(E). Runs on the graph's device;
    random vectors are drawn on the CPU.

    Args:
        graph: Any; a bipartite one must be a single graph.
        dim: Width of the tokens.
        iterations: Steps of subspace iteration; 0 for none. More bring E nearer to the exact SVD.
        seed: Of the random vectors; each graph of a batch has those that it has alone.
        dtype: float32 or float64, of the computation and of the result.

    Returns:
        ``[N, dim]``, or ``[N_rows + N_cols, dim]``, on the graph's device.

    Raises:
        TypeError, ValueError: An argument does not fit; its name and both numbers are given.

    Source:
        Xia et al., OpenGraph, arXiv 2403.01121, its graph tokenizer, as in their code. Halko et
        al., arXiv 0909.4061, algorithm 4.4.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.encodings import svd_tokens
        >>> path = Graph.from_edge_index(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> tokens = svd_tokens(path, 4)
        >>> tokens.shape, (tokens @ tokens.T).diagonal().round(decimals=3).tolist()
        (torch.Size([3, 4]), [1.0, 2.0, 1.0])
    """
    check_graph(graph)
    dim, iterations = integer("dim", dim, 1), integer("iterations", iterations, 0)
    seed = integer("seed", seed)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    square = graph.num_rows == graph.num_cols
    if not square and graph.num_graphs != 1:
        raise ValueError(f"a bipartite graph must be a single one, got {graph.num_graphs}")
    nodes = graph.num_rows + (0 if square else graph.num_cols)
    tokens = torch.zeros(nodes, dim, dtype=dtype, device=graph.device)
    for first, last in pairwise(graph.graph_ptr.tolist()):
        if last > first:
            one = graph if graph.num_graphs == 1 else _part(graph, first, last)
            with torch.autocast(graph.device.type, enabled=False):  # no QR takes half precision
                rows, cols = _factors(one, dim, iterations, seed, dtype)
            tokens[first:last, : rows.shape[1]] = rows.add_(cols) if square else rows
            if not square:
                tokens[last:, : cols.shape[1]] = cols
    return tokens


def adjacency_weights(
    graph: Graph, *, present: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The entries of ``A' = D_r^-1/2 A D_c^-1/2`` as weights of edges.

        w_ij = p_ij / sqrt(sum_j p_ij sum_i p_ij)

    Args:
        graph: Any.
        present: ``[E]`` bool, p: False takes an edge away, from the degrees too. None: all are
            there.
        dtype: Of the result.

    Returns:
        ``[E]`` in the caller's edge order.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.encodings.singular_vectors import adjacency_weights
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 0], [1, 1, 2]]), 3)
        >>> [round(x, 3) for x in adjacency_weights(graph).tolist()]
        [0.5, 0.707, 0.707]
    """
    check_graph(graph)
    source, target = graph.edge_index
    if present is None:
        rows, cols = graph.row_degree.long(), graph.col_degree.long()
    else:
        if not isinstance(present, Tensor) or present.dtype != torch.bool:
            found = present.dtype if isinstance(present, Tensor) else type(present).__name__
            raise TypeError(f"present must be a tensor of bool, got {found}")
        if present.shape != (graph.num_edges,):
            raise ValueError(f"present must be [E] = [{graph.num_edges}], got {[*present.shape]}")
        there = present.long()
        rows = there.new_zeros(graph.num_rows).index_add_(0, target, there)
        cols = there.new_zeros(graph.num_cols).index_add_(0, source, there)
    # in half precision, products of degrees would be infinite
    degrees = (rows[target] * cols[source]).to(torch.promote_types(dtype, torch.float32))
    weight = degrees.clamp(min=1).rsqrt()
    return (weight if present is None else weight.where(present, 0)).to(dtype)


def _factors(
    graph: Graph, dim: int, iterations: int, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """U S^1/2 [N_rows, rank] and V S^1/2 [N_cols, rank]."""
    rank = min(dim, graph.num_rows, graph.num_cols)
    weight, back = adjacency_weights(graph, dtype=dtype), graph.transpose()

    def times(x: Tensor) -> Tensor:  # A' x
        return torch.linalg.qr(aggregate(x, graph, edge_weight=weight)).Q

    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(graph.num_cols, rank, generator=generator, dtype=dtype, device="cpu")
    basis = times(start.to(graph.device))
    for _ in range(iterations):
        basis = times(torch.linalg.qr(aggregate(basis, back, edge_weight=weight)).Q)
    # A'^T Q = P R and R = X S Y^T, so that A' ~ Q Q^T A' = (Q Y) S (P X)^T
    other, small = torch.linalg.qr(aggregate(basis, back, edge_weight=weight))
    x, s, y = torch.linalg.svd(small)
    root = s.sqrt()
    return basis @ (y.mT * root), other @ (x * root)


def _part(graph: Graph, first: int, last: int) -> Graph:
    """The graph of a square batch that has these nodes."""
    ptr = graph.row_ptr[first : last + 1].long()
    slots = slice(int(ptr[0]), int(ptr[-1]))
    return Graph.from_csr(ptr - ptr[0], graph.col[slots].long() - first, last - first)

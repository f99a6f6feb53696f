"""Positional encodings: where a node stands in its graph, computed once before training."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh, splu
from torch import Tensor

from fastgt.graph import Graph

_DENSE = 512  # nodes up to which numpy.linalg.eigh is as fast as Lanczos
_RESTARTS = 50
_SHIFT = 1e-10  # L is singular, L + _SHIFT is not; about the gap of a path of 200,000 nodes
# where the Krylov space is exhausted (complete graphs), newer scipy draws a vector: by this seed
_SEED = {"rng": 0} if "rng" in inspect.signature(eigsh).parameters else {}
_Pairs = tuple[np.ndarray, np.ndarray]  # eigenvalues [k], eigenvectors [n, k]


def laplacian_pe(
    graph: Graph, k: int, *, symmetrize: bool = False, return_eigenvalues: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Laplacian eigenvectors 1 to k of every graph of the batch; the first, trivial, is skipped.

        L = I - D^-1/2 A D^-1/2,    D_ii = max(1, sum_j A_ij),    L u_n = lambda_n u_n

    with 0 <= lambda_0 <= lambda_1 <= ... <= 2. A_ij is the number of edges j -> i, duplicates and
    self loops as given. D is the in-degree clipped at 1, as in the authors' code: an isolated node
    has eigenvalue 1, not 0.

    A graph's columns are orthonormal; the entry of largest magnitude (the first of those equal
    to 1e-6) is positive. Within a repeated eigenvalue the basis is arbitrary but always the same.
    Eigenvalue 0 occurs once per component with an edge: its vectors are sqrt(D) on one component
    each, the largest first. That one is skipped, the others are ordinary columns. More than k
    components leave no room for anything else: take the largest, or make them a batch.

    Solved per component in float64 on the CPU: dense up to 512 nodes (or 4k), then by Lanczos
    in O(N k + E) memory, or by factorising L where Lanczos is slow (paths, grids, roads).

    Args:
        graph: Square, A symmetric.
        k: Eigenvectors per graph; one of n <= k nodes has n - 1, then columns of zeros.
        symmetrize: Replace A by max(A, A^T): an edge one way goes both ways.
        return_eigenvalues: Also return lambda_1 to lambda_k.

    Returns:
        ``[N, k]`` float32 on the graph's device; the eigenvalues ``[G, k]``, 0 for padding.

    Raises:
        TypeError, ValueError: ``k`` is no int or negative; the graph not square, A not symmetric.
        RuntimeError: The solver did not converge; names the graph, its nodes and k.

    Source:
        Dwivedi and Bresson, arXiv 2012.09699, their code's data/molecules.py.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.encodings import laplacian_pe
        >>> path = Graph.from_edge_index(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> pe, eigenvalues = laplacian_pe(path, 2, return_eigenvalues=True)
        >>> pe.shape, [round(x, 4) for x in eigenvalues[0].tolist()]
        (torch.Size([3, 2]), [1.0, 2.0])
    """
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    a = _adjacency(graph, symmetrize)
    degree = a.sum(axis=1).clip(1)
    scale = sp.diags_array(1 / np.sqrt(degree))
    m = sp.csr_array(scale @ a @ scale)
    vectors = np.zeros((graph.num_rows, k), dtype=np.float32)
    values = np.zeros((graph.num_graphs, k), dtype=np.float32)
    for g, (start, end) in enumerate(pairwise(graph.graph_ptr.tolist())):
        if k == 0 or end - start < 2:
            continue
        try:
            pairs = _eigenpairs(m[start:end, start:end], degree[start:end], k)
        except (RuntimeError, MemoryError) as error:
            raise RuntimeError(
                f"laplacian_pe: no convergence in graph {g} ({end - start} nodes) with k={k}"
            ) from error
        for column, (value, nodes, u) in enumerate(pairs):
            # entries equal but for rounding are a tie, or the sign would depend on the machine
            largest = u[abs(u) >= (1 - 1e-6) * abs(u).max()]
            vectors[start + nodes, column] = u * np.sign(largest[0])
            values[g, column] = value
    pe = torch.from_numpy(vectors).to(graph.device)
    return (pe, torch.from_numpy(values).to(graph.device)) if return_eigenvalues else pe


def flip_signs(pe: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """``pe [N, k]`` with one random sign per eigenvector, the same for all nodes of the batch.

    The sign of an eigenvector means nothing; the authors draw new ones for every batch in
    training (``generator``'s, or PyTorch's) and none in evaluation.

    Example:
        >>> import torch
        >>> from fastgt.encodings import flip_signs
        >>> flip_signs(torch.ones(5, 3)).abs().sum()
        tensor(15.)
    """
    if pe.ndim != 2 or not pe.is_floating_point():
        raise ValueError(f"pe must be [N, k] floating point, got {list(pe.shape)} {pe.dtype}")
    device = pe.device if generator is None else generator.device
    bits = torch.randint(2, (pe.shape[1],), generator=generator, device=device)
    return pe * (2 * bits - 1).to(pe)


def _adjacency(graph: Graph, symmetrize: bool) -> sp.csr_array:
    if not isinstance(graph, Graph):
        raise TypeError(f"graph must be a fastgt.Graph, got {type(graph).__name__}")
    n = graph.num_rows
    if n != graph.num_cols:
        raise ValueError(f"graph must be square, got {n} rows and {graph.num_cols} columns")
    # copies: duplicates are summed in place, and the graph's memory is not ours to write
    col, row_ptr = (x.cpu().numpy().copy() for x in (graph.col, graph.row_ptr))
    a = sp.csr_array((np.ones(len(col)), col, row_ptr), shape=(n, n))
    a.sum_duplicates()
    if symmetrize:
        return sp.csr_array(a.maximum(a.T))
    one_way = (a - a.T).tocoo()
    if one_way.nnz:
        i, j = (int(x[0]) for x in one_way.coords)
        found = f"{a[j, i]:.0f} edges from node {i} to {j} but {a[i, j]:.0f} back"
        raise ValueError(f"graph must be symmetric, has {found}; symmetrize=True makes it so")
    return a


def _eigenpairs(m: sp.csr_array, degree: np.ndarray, k: int) -> list[tuple]:
    """(value, nodes, entries) of pairs 1 to k, or n - 1, of I - m with m = D^-1/2 A D^-1/2."""
    label = connected_components(m, directed=False)[1]
    lowest = np.zeros(label.max() + 1)  # of each component
    lowest[label[m.sum(axis=1) == 0]] = 1
    free = k + 1 - int((lowest == 0).sum())  # how many pairs above 0 are wanted
    pairs = []
    for c in np.lexsort((-np.bincount(label), lowest))[: k + 1]:
        nodes = np.flatnonzero(label == c)
        trivial = np.sqrt(degree[nodes] / degree[nodes].sum())
        pairs.append((lowest[c], nodes, trivial))
        if (count := min(free, len(nodes) - 1)) > 0:
            inner = m if len(nodes) == len(degree) else m[nodes][:, nodes]
            w, u = _component(inner, trivial, count)
            pairs += [(x, nodes, y) for x, y in zip(w.clip(0), u.T, strict=True)]
    return sorted(pairs, key=lambda pair: pair[0])[1 : k + 1]


def _component(m: sp.csr_array, trivial: np.ndarray, k: int) -> _Pairs:
    """The k < n lowest pairs of I - m, but the trivial one, for a connected graph."""
    n = len(trivial)
    if n <= max(_DENSE, 4 * k):
        # the trivial vector, moved from 0 to 3, beyond all others, cannot mix with a tiny gap
        w, u = np.linalg.eigh(np.eye(n) - m.toarray() + 3 * np.outer(trivial, trivial))
        return w[:k], u[:, :k]
    try:
        mu, u = _largest(m.dot, trivial, k)
        return 1 - mu, u
    except ArpackError:
        # Lanczos is slow where gaps are small; so are the cuts then, and the factors stay sparse
        shifted = sp.csc_matrix((1 + _SHIFT) * sp.eye_array(n) - m)
        lu = splu(shifted, "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        mu, u = _largest(lu.solve, trivial, k)
        return 1 / mu - _SHIFT, u


def _largest(apply: Callable[[np.ndarray], np.ndarray], trivial: np.ndarray, k: int) -> _Pairs:
    """The k largest eigenpairs, in descending order, of a symmetric operator off ``trivial``.

    Lanczos may miss copies of a repeated eigenvalue (equal chains hanging off one hub): what was
    found is deflated and the rest searched again until nothing larger turns up.
    """
    n, v0 = len(trivial), np.random.default_rng(0).standard_normal(len(trivial))
    mu, u, count = np.zeros(0), np.zeros((n, 0)), k
    while True:
        known = np.column_stack([trivial, u])

        def deflated(x: np.ndarray, known: np.ndarray = known) -> np.ndarray:
            inside = known.T @ x
            y = apply(x - known @ inside)
            return y - known @ (known.T @ y + 3 * inside)

        operator = LinearOperator((n, n), deflated, dtype=np.float64)
        options = dict(v0=v0, ncv=min(n, max(2 * count, 40)), maxiter=_RESTARTS, **_SEED)
        w, v = eigsh(operator, count, which="LA", **options)
        if len(mu) and w[0] <= mu[k - 1] + 1e-12 * max(1, mu[0]):
            return mu[:k], u[:, :k]
        mu, u, count = np.append(mu, w), np.column_stack([u, v]), 1
        order = np.argsort(-mu, kind="stable")
        mu, u = mu[order], u[:, order]

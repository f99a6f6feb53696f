"""Laplacian encodings, as they are computed once before training."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastgt.graph import Graph

if TYPE_CHECKING:
    import scipy.sparse as sp

_DENSE = 512  # nodes up to which numpy.linalg.eigh is as fast as Lanczos
_RESTARTS = 50
_PATIENCE = 1000  # restarts where factors would not fit
_ROUNDS = 30  # of elimination, after which an expander's remainder is nearly complete
_SHIFT = 1e-10  # L is singular, L + _SHIFT is not; about the gap of a path of 200,000 nodes
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
    each, the largest first. That one is skipped, the others are ordinary columns. Where several
    components are the largest, sqrt(D) on all of them is skipped, and what is orthogonal to it
    comes first. More than k components leave no room for anything else: take the largest, or make
    them a batch.

    Other numbers of the nodes permute the rows, up to the sign of a column and the basis of a
    repeated eigenvalue. Where column k ends within one, which of its vectors are there depends on
    the numbers: take k where the eigenvalues have a gap.

    Solved per component in float64 on the CPU, in O(N k + E) memory: dense up to 512 nodes (or
    4k), then by Lanczos, or by factorising L where Lanczos is slow and the factor stays sparse
    (paths, grids, roads). Needs scipy.

    Args:
        graph: Square, A symmetric.
        k: Eigenvectors per graph; one of n <= k nodes has n - 1, then columns of zeros.
        symmetrize: Replace A by max(A, A^T): an edge one way goes both ways.
        return_eigenvalues: Also return lambda_1 to lambda_k.

    Returns:
        ``[N, k]`` float32 on the graph's device; the eigenvalues ``[G, k]``, 0 for padding.

    Raises:
        TypeError, ValueError: ``k`` is no int or negative; the graph not square, A not symmetric.
        ImportError: scipy is not there.
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
    if isinstance(k, (bool, np.bool_)) or not hasattr(k, "__index__"):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    k = operator.index(k)
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    try:
        import scipy.sparse as sp
    except ImportError as error:
        raise ImportError("laplacian_pe needs scipy, which is not installed") from error
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
    import scipy.sparse as sp

    # copies: duplicates are summed in place, and the graph's memory is not ours to write
    col, row_ptr = (x.cpu().numpy().copy() for x in (graph.col, graph.row_ptr))
    a = sp.csr_array((np.ones(len(col)), col, row_ptr), shape=(n, n))
    a.sum_duplicates()
    if symmetrize:
        return sp.csr_array(a.maximum(a.T))
    one_way = (a - a.T).tocoo()
    if one_way.nnz:
        i, j = (int(x[0]) for x in one_way.coords)
        edges = f"{a[j, i]:.0f} edges from node {i} to {j} but {a[i, j]:.0f} back"
        raise ValueError(f"graph must be symmetric, has {edges}; symmetrize=True makes it so")
    return a


def _eigenpairs(m: sp.csr_array, degree: np.ndarray, k: int) -> list[tuple]:
    """(value, nodes, entries) of pairs 1 to k, or n - 1, of I - m with m = D^-1/2 A D^-1/2."""
    from scipy.sparse.csgraph import connected_components

    label = connected_components(m, directed=False)[1]
    lowest = np.zeros(label.max() + 1)  # of each component
    lowest[label[m.sum(axis=1) == 0]] = 1
    free = k + 1 - int((lowest == 0).sum())  # how many pairs above 0 are wanted
    sizes = np.bincount(label)
    chosen = np.lexsort((-sizes, lowest))[: k + 1]
    largest = np.flatnonzero((lowest == 0) & (sizes == sizes[chosen[0]]))
    pairs = []
    if len(largest) > 1:
        pairs += [(0.0, *pair) for pair in _together(np.isin(label, largest), label, degree, k)]
    for c in chosen:
        nodes = np.flatnonzero(label == c)
        trivial = np.sqrt(degree[nodes] / degree[nodes].sum())
        if len(largest) < 2 or c not in largest:
            pairs.append((lowest[c], nodes, trivial))
        if (count := min(free, len(nodes) - 1)) > 0:
            inner = m if len(nodes) == len(degree) else m[nodes][:, nodes]
            w, u = _component(inner, trivial, count)
            pairs += [(x, nodes, y) for x, y in zip(w.clip(0), u.T, strict=True)]
    return sorted(pairs, key=lambda pair: pair[0])[1 : k + 1]


def _together(
    inside: np.ndarray, label: np.ndarray, degree: np.ndarray, k: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """An orthonormal basis of sqrt(D) on equally large components, sqrt(D) on all of them first.

    Vector j > 0 is sqrt(D) on component j against that on those before, each weighted so that it is
    orthogonal to the first.
    """
    nodes = np.flatnonzero(inside)
    at = np.unique(label[nodes], return_inverse=True)[1]
    root = np.sqrt(degree[nodes])
    volume = np.bincount(at, degree[nodes])
    before = np.cumsum(volume)
    basis = [(nodes, root / np.sqrt(before[-1]))]
    for j in range(1, min(len(volume), k + 1)):
        some = at <= j
        share = np.where(at[some] == j, -1 / volume[j], 1 / before[j - 1])
        u = root[some] * share
        basis.append((nodes[some], u / np.linalg.norm(u)))
    return basis


def _component(m: sp.csr_array, trivial: np.ndarray, k: int) -> _Pairs:
    """The k < n lowest pairs of I - m, but the trivial one, for a connected graph."""
    import scipy.sparse as sp
    from scipy.sparse.linalg import ArpackError, splu

    n = len(trivial)
    if n <= max(_DENSE, 4 * k):
        # the trivial vector, moved from 0 to 3, beyond all others, cannot mix with a tiny gap
        w, u = np.linalg.eigh(np.eye(n) - m.toarray() + 3 * np.outer(trivial, trivial))
        return w[:k], u[:, :k]
    basis = max(2 * k, 40)
    try:
        mu, u = _largest(m.dot, trivial, k, basis, _RESTARTS)
        return 1 - mu, u
    except ArpackError:
        if not _stays_sparse(m, n * basis + m.nnz):
            mu, u = _largest(m.dot, trivial, k, 2 * basis, _PATIENCE)
            return 1 - mu, u
    # Lanczos is slow where gaps are small; so are the cuts then, mostly, and the factors sparse
    shifted = sp.csc_matrix((1 + _SHIFT) * sp.eye_array(n) - m)
    lu = splu(shifted, "MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    mu, u = _largest(lu.solve, trivial, k, basis, _RESTARTS)
    return 1 / mu - _SHIFT, u


def _stays_sparse(m: sp.csr_array, room: int) -> bool:
    """Whether a Cholesky factor of I - m is about as large as ``room`` entries.

    Nodes of low degree that are not neighbours are eliminated together, in pattern only: each
    leaves its neighbours joined. Entries of the factor so far and edges that are left stay within
    ``room``, or this ends. Grids and roads take 20 to 30 entries a node in all rounds, and twice
    that to the end; an expander's remainder grows together.
    """
    import scipy.sparse as sp

    a = sp.csr_array((np.ones(m.nnz, np.float32), m.indices, m.indptr), shape=m.shape)
    rng, entries = np.random.default_rng(0), 0
    for _ in range(_ROUNDS):
        n, degree = a.shape[0], np.diff(a.indptr)
        if not n:
            break
        low = degree <= max(1.2 * degree.min() + 1, np.quantile(degree, 0.3))
        # of neighbours that are both low, the one of higher rank
        rank = np.where(low, 1 + rng.permutation(n), 0)
        owner = np.repeat(np.arange(n), degree)
        beaten = owner[(rank[a.indices] > rank[owner])]
        low[beaten] = False
        entries += int(degree[low].sum() + low.sum())
        # each product below has at most so many entries
        if entries + int((degree[low].astype(np.int64) ** 2).sum()) // 2 > room:
            return False
        rest = a[np.flatnonzero(~low)]
        spokes = rest[:, np.flatnonzero(low)]
        joined = sp.coo_array(rest[:, np.flatnonzero(~low)] + spokes @ spokes.T)
        i, j = joined.coords
        apart = i != j
        ones = np.ones(int(apart.sum()), np.float32)
        a = sp.csr_array(sp.coo_array((ones, (i[apart], j[apart])), shape=joined.shape))
        if entries + a.nnz // 2 > room:
            return False
    return True


def _largest(
    apply: Callable[[np.ndarray], np.ndarray],
    trivial: np.ndarray,
    k: int,
    basis: int,
    restarts: int,
) -> _Pairs:
    """The k largest eigenpairs, in descending order, of a symmetric operator off ``trivial``.

    Lanczos may miss copies of a repeated eigenvalue (equal chains hanging off one hub): what was
    found is deflated and the rest searched again until nothing larger turns up.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    n, v0 = len(trivial), np.random.default_rng(0).standard_normal(len(trivial))
    # where the Krylov space is exhausted (complete graphs), newer scipy draws a vector: by this
    seed = {"rng": 0} if "rng" in inspect.signature(eigsh).parameters else {}
    mu, u, count = np.zeros(0), np.zeros((n, 0)), k
    while True:
        known = np.column_stack([trivial, u])

        def deflated(x: np.ndarray, known: np.ndarray = known) -> np.ndarray:
            inside = known.T @ x
            y = apply(x - known @ inside)
            return y - known @ (known.T @ y + 3 * inside)

        linear = LinearOperator((n, n), deflated, dtype=np.float64)
        options = dict(v0=v0, ncv=min(n, basis), maxiter=restarts, **seed)
        w, v = eigsh(linear, count, which="LA", **options)
        if len(mu) and w[0] <= mu[k - 1] + 1e-12 * max(1, mu[0]):
            return mu[:k], u[:, :k]
        mu, u, count = np.append(mu, w), np.column_stack([u, v]), 1
        order = np.argsort(-mu, kind="stable")
        mu, u = mu[order], u[:, order]

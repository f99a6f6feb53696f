"""The lowest eigenpairs of the Laplacian of one large connected graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import scipy.sparse as sp

Pairs = tuple[np.ndarray, np.ndarray]  # eigenvalues [k], eigenvectors [n, k]
_Operator = Callable[[np.ndarray], np.ndarray]

_RESTARTS = 300
_STEPS = 2000  # of conjugate gradients
_ROOM = 80  # entries of a factor for each node
_EVEN = 4  # largest over mean degree up to which Lanczos on L itself may be fast


def lowest(laplacian: sp.csr_array, trivial: np.ndarray, bound: float, k: int) -> Pairs:
    """The k lowest pairs of L but the trivial one, in ascending order.

    Lanczos on the inverse of L, where L has a sparse factor: paths, trees, grids, roads. Else
    Lanczos on bound - L, which takes about sqrt(bound / gap) steps. Where these are too many, or
    degrees too uneven, the inverse again: with a factor of the part of L that has a sparse one,
    and conjugate gradients on the rest. Every stage has so many steps and no more, and no factor
    more than 80 entries a node.

    Args:
        laplacian: L of a connected graph of n nodes, or ``D^-1/2 L D^-1/2``.
        trivial: ``[n]``, the unit vector with L u = 0.
        bound: No eigenvalue is larger.
        k: At most n / 4.

    Raises:
        RuntimeError: No stage converged within its steps.
    """
    from scipy.sparse.linalg import ArpackError

    basis = max(2 * k, 40)
    eliminated, core, sparse = _elimination(laplacian)
    if sparse and (solve := _factor(laplacian, bound)) is not None:
        mu, u = _largest(solve, trivial, k, basis)
        return 1 / mu, u
    if bound <= 2 * _EVEN * laplacian.diagonal().mean():
        try:
            mu, u = _largest(lambda x: bound * x - laplacian @ x, trivial, k, basis)
            return bound - mu, u
        except ArpackError:
            pass  # small gaps: long paths that hang off an expander, mostly
    mu, u = _largest(_inverse(laplacian, trivial, eliminated, core), trivial, k, basis)
    return 1 / mu, u


def _elimination(laplacian: sp.csr_array) -> tuple[np.ndarray, np.ndarray, bool]:
    """-> nodes in an order in which L has a sparse factor, those left, whether all of L has one.

    Nodes of low degree that are not neighbours are eliminated together, in pattern only: each
    leaves its neighbours joined. What is left of an expander grows together. So all of L has a
    sparse factor if the last quarter of its nodes has hardly more edges after a round than before.
    """
    n = laplacian.shape[0]
    rng, entries, left = np.random.default_rng(0), 0, np.arange(n)
    gone = [left[:0]]
    a = _pattern(laplacian)
    room = _ROOM // 4 * n + a.nnz
    while len(left) > 1:
        degree = np.diff(a.indptr).astype(np.int64)
        low = degree <= max(1.2 * degree.min() + 1, np.quantile(degree, 0.3))
        # of neighbours that are both low, the one of higher rank
        rank = np.where(low, 1 + rng.permutation(len(left)), 0)
        owner = np.repeat(np.arange(len(left)), degree)
        low[owner[rank[a.indices] > rank[owner]]] = False
        entries += int(degree[low].sum() + low.sum())
        few = 64 * low.sum() < len(left)  # all are neighbours
        # the product below has at most so many entries
        if few or entries + int((degree[low] ** 2).sum()) // 2 > room:
            return np.concatenate(gone), left, False
        rest = a[np.flatnonzero(~low)]
        spokes = rest[:, np.flatnonzero(low)]
        joined = _pattern(rest[:, np.flatnonzero(~low)] + spokes @ spokes.T)
        if 4 * len(left) <= n:
            return np.concatenate(gone), left, joined.nnz <= 1.08 * a.nnz
        gone.append(left[low])
        left, a = left[~low], joined
    return np.concatenate(gone), left, True


def _pattern(laplacian: sp.csr_array) -> sp.csr_array:
    """A one at every edge, without the diagonal, in arrays of its own."""
    import scipy.sparse as sp

    i, j = laplacian.tocoo().coords
    apart = i != j
    ones = np.ones(int(apart.sum()), np.float32)
    return sp.csr_array(sp.coo_array((ones, (i[apart], j[apart])), shape=laplacian.shape))


def _factor(laplacian: sp.csr_array, bound: float) -> _Operator | None:
    """x -> y with L y = x, up to the trivial vector, for x orthogonal to it; None without room.

    One node's y is 0. An incomplete factorisation that may drop nothing but for want of room is
    the factor, unless it dropped something: then it does not solve.
    """
    import scipy.sparse as sp
    from scipy.sparse.linalg import spilu

    n, ground = laplacian.shape[0], int(np.diff(laplacian.indptr).argmax())
    others = np.delete(np.arange(n), ground)
    f = sp.csc_matrix(laplacian[others][:, others])
    lu = spilu(
        f,
        drop_tol=0,
        fill_factor=max(1, _ROOM * n / f.nnz),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
    right = np.random.default_rng(0).standard_normal(n - 1)
    y = lu.solve(right)
    scale = bound * np.linalg.norm(y) + np.linalg.norm(right)
    if not np.linalg.norm(f @ y - right) <= 1e-11 * scale:
        return None
    return lambda x: np.insert(lu.solve(np.delete(x, ground)), ground, 0.0)


def _inverse(
    laplacian: sp.csr_array, trivial: np.ndarray, eliminated: np.ndarray, core: np.ndarray
) -> _Operator:
    """x -> y with L y = x, up to the trivial vector, for x orthogonal to it.

        L = [[F, B], [B^T, C]],    S = C - B^T F^-1 B,
        S y_C = x_C - B^T F^-1 x_F,    y_F = F^-1 (x_F - B y_C)

    F is the block of the nodes that are eliminated. It has an inverse, because the graph is
    connected and the core is not empty. The first system is solved by conjugate gradients.
    """
    import scipy.sparse as sp
    from scipy.sparse.linalg import LinearOperator, cg, splu

    outer = sp.csr_array(laplacian[eliminated])
    f, b = sp.csc_matrix(outer[:, eliminated]), sp.csr_array(outer[:, core])
    c = sp.csr_array(laplacian[core][:, core])
    # the order is kept, or the factor would have other entries
    options = {"SymmetricMode": True}
    lu = splu(f, "NATURAL", diag_pivot_thresh=0.0, options=options) if len(eliminated) else None

    def inner(x: np.ndarray) -> np.ndarray:
        return x if lu is None else lu.solve(x)

    null = trivial[core] / np.linalg.norm(trivial[core])
    weight = 1 / c.diagonal()

    def off(x: np.ndarray) -> np.ndarray:  # what rounding leaves along the null vector stays
        return x - null * (null @ x)

    schur = LinearOperator(c.shape, lambda x: off(c @ x - b.T @ inner(b @ x)), dtype=np.float64)
    jacobi = LinearOperator(c.shape, lambda x: weight * x, dtype=np.float64)

    def solve(x: np.ndarray) -> np.ndarray:
        y = np.empty(len(x))
        right = off(x[core] - b.T @ inner(x[eliminated]))
        y[core], steps = cg(schur, right, rtol=1e-12, atol=0, maxiter=_STEPS, M=jacobi)
        if steps:
            raise RuntimeError(f"no convergence in {_STEPS} steps of conjugate gradients")
        y[eliminated] = inner(x[eliminated] - b @ y[core])
        return y

    return solve


def _largest(apply: _Operator, trivial: np.ndarray, k: int, basis: int) -> Pairs:
    """The k largest eigenpairs, in descending order, of a positive operator off ``trivial``.

    Lanczos may miss copies of a repeated eigenvalue (equal chains hanging off one hub): what was
    found is deflated and the rest searched again until nothing larger turns up.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    n, v0 = len(trivial), np.random.default_rng(0).standard_normal(len(trivial))
    # where the Krylov space is exhausted (complete graphs), newer scipy draws a vector: by this
    seed = {"rng": 0} if "rng" in inspect.signature(eigsh).parameters else {}
    mu, u, count = np.zeros(0), np.zeros((n, 0)), k
    for _ in range(k + 2):  # every search but the first and the last moves a pair out of the k
        known = np.column_stack([trivial, u])

        def deflated(x: np.ndarray, known: np.ndarray = known) -> np.ndarray:
            y = apply(x - known @ (known.T @ x))
            return y - known @ (known.T @ y)

        linear = LinearOperator((n, n), deflated, dtype=np.float64)
        options = dict(v0=v0, ncv=min(n, basis), maxiter=_RESTARTS, **seed)
        w, v = eigsh(linear, count, which="LA", **options)
        if len(mu) and w[0] <= mu[k - 1] + 1e-12 * mu[0]:
            return mu[:k], u[:, :k]
        mu, u, count = np.append(mu, w), np.column_stack([u, v]), 1
        order = np.argsort(-mu, kind="stable")
        mu, u = mu[order], u[:, order]
    raise RuntimeError(f"more than {k} copies of an eigenvalue turned up")

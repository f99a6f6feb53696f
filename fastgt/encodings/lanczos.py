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

_RESTARTS = 1000  # products end before, but where the graph is small
_WORK = 6e10  # entries that a filter multiplies: about two minutes on one core
_CALL = 10_000  # what a product takes beside its entries, in entries
_PRODUCTS = 16_000  # of a filter, where _WORK has fewer: graphs of over 3 million edges
_SOLUTIONS = 60  # least by conjugate gradients
_ROOM = 80  # entries of a factor for each node
_MORE = 8  # eigenvalues below the cut of a filter that are not wanted
_GAIN = 4.0  # cosh of it is what a filter makes of the lowest eigenvalue


def lowest(laplacian: sp.csr_array, trivial: np.ndarray, bound: float, k: int) -> Pairs:
    """The k lowest pairs of L but the trivial one, in ascending order.

    Lanczos on the inverse of L, where L has a sparse factor: paths, trees, grids, roads. Else
    Lanczos on a polynomial of L. Where gaps are too small for that, the inverse again: with a
    factor of the part of L that has a sparse one, and conjugate gradients on the rest. The
    filter multiplies 6e10 entries at most, or 16,000 times with L, the gradients half of that, and
    no factor has more than 80 entries a node.

    Args:
        laplacian: L of a connected graph of n nodes, or ``D^-1/2 L D^-1/2``.
        trivial: ``[n]``, the unit vector with L u = 0.
        bound: No eigenvalue is larger.
        k: At most n / 4.

    Raises:
        RuntimeError: No stage converged within its work.
    """
    from scipy.sparse.linalg import ArpackError

    basis = max(2 * k, 40)
    eliminated, core, sparse = _elimination(laplacian)
    if sparse and (solve := _factor(laplacian, bound)) is not None:
        mu, u = _largest(solve, trivial, k, basis)
        return 1 / mu, u
    try:
        return _filtered(laplacian, trivial, bound, k, basis)
    except (ArpackError, _UnsolvedError):
        # small gaps: long paths that hang off an expander; or hubs, in D - A
        inverse = _inverse(laplacian, trivial, eliminated, core)
    mu, u = _largest(inverse, trivial, k, basis)
    return 1 / mu, u


class _UnsolvedError(RuntimeError):
    """A stage did not converge within its work."""


def _filtered(
    laplacian: sp.csr_array, trivial: np.ndarray, bound: float, k: int, basis: int
) -> Pairs:
    """Lanczos on a polynomial that is large at the lowest eigenvalues only.

        p(L) = T_d(M),    M = (c + b - 2 L) / (b - c),    T_d(M) = 2 M T_d-1(M) - T_d-2(M)

    Chebyshev's T_d stays within [-1, 1] where L has its eigenvalues from c to the bound b, and
    grows below c. Steps of Lanczos on p(L) are fewer by d than on L, and so are the basis'
    orthogonalisations and restarts, which lose what the products have found.

    c is a Ritz value, and so no less than the eigenvalue of its rank. Each is found with the
    filter of the one before, from L itself on, until it hardly falls. b is the largest Ritz value
    of the first, 1 % and twice its residual, where that is less than ``bound``.

    Source:
        Zhou and Saad, SIAM J. Matrix Anal. Appl. 29 (2007), a Chebyshev-Davidson algorithm.
    """
    rng, n = np.random.default_rng(0), len(trivial)
    left = _limit(laplacian.nnz + 4 * n)
    cut, degree, start = bound, 1, rng.standard_normal(n)
    centre, scaled = bound, laplacian  # of a filter of degree 1: bound - L

    def spend(products: int) -> None:
        nonlocal left
        left -= products
        if left < 0:
            raise _UnsolvedError("no convergence within the products of a filter")

    def apply(x: np.ndarray) -> np.ndarray:
        spend(degree)
        before, y = x, centre * x - scaled @ x
        for _ in range(degree - 1):
            before, y = y, 2 * (centre * y - scaled @ y) - before
        return y

    while True:
        v = _krylov(apply, trivial, start, basis, rng)
        spend(basis)
        w, s = np.linalg.eigh(v @ (laplacian @ v.T))
        if degree == 1:
            top = s[:, -1] @ v
            residual = np.linalg.norm(laplacian @ top - w[-1] * top)
            bound = min(bound, float(1.01 * w[-1] + 2 * residual))
        last, cut = cut, float(w[k + _MORE])
        start = s[:, :k].sum(1) @ v
        above = 2 * (cut - w[0]) / (bound - cut)
        # equal eigenvalues, in complete graphs: nothing to part
        degree = 1 if above < 1e-8 else int(np.ceil(_GAIN / np.arccosh(1 + above)))
        scaled = laplacian * (2 / (bound - cut))
        centre = (bound + cut) / (bound - cut)
        if cut > 0.75 * last:
            break
    _, u = _largest(apply, trivial, k, basis, start)
    w = (u * (laplacian @ u)).sum(0)
    if w.max() > cut:
        raise _UnsolvedError("an eigenvalue lies above the bound of a filter")
    order = np.argsort(w, kind="stable")
    return w[order], u[:, order]


def _krylov(
    apply: _Operator, trivial: np.ndarray, start: np.ndarray, m: int, rng: np.random.Generator
) -> np.ndarray:
    """``[m, n]``, orthonormal rows off ``trivial``: start, A start, ... A^(m-1) start."""
    v = np.empty((m + 1, len(trivial)))
    v[0] = trivial
    for j in range(1, m + 1):
        y = start if j == 1 else apply(v[j - 1])
        size = np.linalg.norm(y)
        for _ in range(2):
            y = y - (v[:j] @ y) @ v[:j]
        if np.linalg.norm(y) <= 1e-10 * size:  # the space is exhausted
            y = rng.standard_normal(len(trivial))
            for _ in range(2):
                y = y - (v[:j] @ y) @ v[:j]
        v[j] = y / np.linalg.norm(y)
    return v[1:]


def _limit(entries: int) -> int:
    """How many products a stage has, of so many entries each."""
    return max(_PRODUCTS, int(_WORK / (entries + _CALL)))


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

    # a step costs about as much again for the vectors, and the factor's entries twice
    inside = 0 if lu is None else 4 * (lu.L.nnz + lu.U.nnz)
    limit = _limit(laplacian.nnz + inside + 12 * len(trivial) + 2 * _CALL) // 2
    left = limit

    schur = LinearOperator(c.shape, lambda x: off(c @ x - b.T @ inner(b @ x)), dtype=np.float64)
    jacobi = LinearOperator(c.shape, lambda x: weight * x, dtype=np.float64)

    def step(_: np.ndarray) -> None:
        nonlocal left
        left -= 1

    def solve(x: np.ndarray) -> np.ndarray:
        nonlocal left
        y = np.empty(len(x))
        right = off(x[core] - b.T @ inner(x[eliminated]))
        each = min(left, limit // _SOLUTIONS)
        y[core], failed = cg(
            schur, right, rtol=1e-12, atol=0, maxiter=each, M=jacobi, callback=step
        )
        if failed or each == 0:  # of no steps, scipy says that they converged
            raise _UnsolvedError(f"no convergence in {limit} steps of conjugate gradients")
        y[eliminated] = inner(x[eliminated] - b @ y[core])
        return y

    return solve


def _largest(
    apply: _Operator,
    trivial: np.ndarray,
    k: int,
    basis: int,
    start: np.ndarray | None = None,
) -> Pairs:
    """The k largest eigenpairs, in descending order, of a positive operator off ``trivial``.

    Lanczos may miss copies of a repeated eigenvalue (equal chains hanging off one hub): what was
    found is deflated and the rest searched again until nothing larger turns up. A search is coarse
    first: a Ritz value's error is about the square of its vector's.
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
        options = dict(ncv=min(n, basis), maxiter=_RESTARTS, which="LA", **seed)
        if len(mu):
            w, v = eigsh(linear, count, v0=v0, tol=1e-8, **options)
            if w[0] <= mu[k - 1] + 1e-12 * mu[0]:
                return mu[:k], u[:, :k]
            first = v[:, 0]
        else:
            first = v0 if start is None else start
        w, v = eigsh(linear, count, v0=first, **options)
        mu, u, count = np.append(mu, w), np.column_stack([u, v]), 1
        order = np.argsort(-mu, kind="stable")
        mu, u = mu[order], u[:, order]
    raise _UnsolvedError(f"more than {k} copies of an eigenvalue turned up")

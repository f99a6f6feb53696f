"""How much heat is left where it was, some time after."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastgt.encodings.size_order import Block, SizeOrder, progress_of, size_order, undirected
from fastgt.graph import Graph
from fastgt.ops.checks import number

_DENSE = 512  # nodes up to which all eigenvectors are computed
_ROOM = 2**20  # entries of the Laplacians of small graphs at once
_LARGE_ROOM = 2**22  # entries of the columns of a large graph that are computed at once
_ZERO = 1e-8  # the authors'; the least eigenvalue above 0 of so few nodes is larger


def heat_kernel_pe(
    graph: Graph, times: Sequence[float], *, symmetrize: bool = False, progress: bool = False
) -> Tensor:
    """The diagonals of the heat kernel, without what stays for ever.

        pe_it = sum_{k: lambda_k > 0} exp(-t lambda_k) u_ki^2,    L = D - A,    L u_k = lambda_k u_k

    A_ij is the number of edges between i and j, D its row sums; self loops cancel. The eigenvectors
    of eigenvalue 0 are constant on a component of the graph, and are left out: of n nodes they hold
    1 / n of the heat.

    Computed in float64 on the CPU. Graphs of up to 512 nodes are decomposed whole, many at once. In
    larger ones exp(-t L) is a series of Chebyshev polynomials, cut off below 1e-12, whose columns
    are computed in slices: in memory of O(E) and about 0.2 GB, in time of O(n E sqrt(t d)) for the
    longest time and the largest degree. Needs scipy.

    Args:
        graph: Square, A symmetric.
        times: Not negative, in any order.
        symmetrize: Replace A by max(A, A^T): an edge one way goes both ways.
        progress: Show a bar. Needs tqdm.

    Returns:
        ``[N, len(times)]`` float32 on the graph's device.

    Raises:
        TypeError, ValueError: A time is no number, negative or not finite; the graph not square, A
            not symmetric.
        ImportError: scipy, or tqdm for ``progress``, is not there.

    Source:
        Rampasek et al., arXiv 2205.12454, in whose code it is HKdiagSE.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.encodings import heat_kernel_pe
        >>> pair = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]))
        >>> heat_kernel_pe(pair, [0, 0.5])  # exp(-2 t) / 2
        tensor([[0.5000, 0.1839],
                [0.5000, 0.1839]])
    """
    found_times = np.array([number("times", t) for t in times], np.float64)
    for t in found_times:
        if not (math.isfinite(t) and t >= 0):
            raise ValueError(f"times must be finite and not negative, got {t}")
    order = undirected(size_order(graph, "heat_kernel_pe"), symmetrize)
    pe = np.zeros((graph.num_rows, len(found_times)))
    with progress_of("heat_kernel_pe", graph.num_rows, progress) as done:
        for block in order.blocks(_ROOM, equal=True) if len(found_times) else ():
            found = pe[block.first : block.last]
            if block.width > _DENSE:
                for some, part in _large(order, block, found_times):
                    found[some] = part
                    done(len(part))
                continue
            # of torch: it is 1.5 times as fast as NumPy's
            w, u = torch.linalg.eigh(torch.from_numpy(order.laplacians(block)))
            left = torch.exp(-w[..., None] * torch.from_numpy(found_times)) * (w > _ZERO)[..., None]
            found[:] = (u.square() @ left).flatten(0, 1).numpy()
            done(len(found))
    return order.given_order(pe, graph)


def _large(order: SizeOrder, block: Block, times: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """The nodes of one graph in slices, and their part of the result.

        exp(-t L) = sum_k c_tk T_k(M),    M = 2 L / b - 1,    b >= lambda

    T_2k = 2 T_k T_k - 1 and T_2k+1 = 2 T_k T_k+1 - T_1 have diagonals of what is there half way.
    """
    import scipy.sparse as sp
    from scipy.sparse.csgraph import connected_components
    from scipy.special import ive

    a = order.within(block, order.a.data)
    n, degree = block.width, a.sum(axis=1)
    bound = max(2 * float(degree.max()), 1.0)
    m = sp.csr_array(sp.diags_array(2 * degree / bound - 1) - 2 / bound * a)
    z = times * bound / 2
    # beyond, what is left of the series is below exp(-40)
    k = np.arange(int(math.sqrt(80 * z.max()) + 42))
    c = ive(k, z[:, None]) * np.where(k, 2, 1) * (-1.0) ** k  # [times, terms]
    label = connected_components(a, directed=False)[1]
    for_ever = 1 / np.bincount(label)[label]
    first_moment = m.diagonal()
    width = max(1, _LARGE_ROOM // n)
    for first in range(0, n, width):
        some = slice(first, min(first + width, n))
        nodes = np.arange(n)[some]
        before = np.zeros((n, len(nodes)))
        before[nodes, np.arange(len(nodes))] = 1
        x = m @ before
        one, moment = np.ones(len(nodes)), first_moment[some]
        found = np.outer(one, c[:, 0]) + np.outer(moment, c[:, 1])
        for even in range(2, len(k), 2):
            found += np.outer(2 * np.einsum("ij,ij->j", x, x) - one, c[:, even])
            before, x = x, 2 * (m @ x) - before
            if even + 1 < len(k):
                found += np.outer(2 * np.einsum("ij,ij->j", before, x) - moment, c[:, even + 1])
        yield some, (found - for_ever[some, None]).clip(0)

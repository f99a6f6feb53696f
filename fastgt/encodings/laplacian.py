"""Laplacian encodings, as they are computed once before training."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgt.encodings.laplacian_components import batch_eigenpairs
from fastgt.encodings.size_order import both_ways
from fastgt.graph import Graph
from fastgt.ops.checks import check_square

if TYPE_CHECKING:
    import scipy.sparse as sp


def laplacian_pe(
    graph: Graph, k: int, *, symmetrize: bool = False, return_eigenvalues: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Laplacian eigenvectors 1 to k of every graph of the batch; the first, trivial, is skipped.

        L = I - D^-1/2 A D^-1/2,    D_ii = max(1, sum_j A_ij),    L u_n = lambda_n u_n

    with 0 <= lambda_0 <= lambda_1 <= ... <= 2. A_ij is the number of edges j -> i, duplicates and
    self loops as given. D is the in-degree clipped at 1, as in the authors' code: an isolated node
    has eigenvalue 1, not 0.

    What :func:`laplacian_eigenpairs` says of signs, repeated eigenvalues, components and the
    numbers of nodes holds here too. Eigenvalue 0 occurs once per component with an edge, and the
    first of those is skipped. More than k components leave no room for anything else: take the
    largest, or make them a batch.

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
    vectors, values, _ = _solved("laplacian_pe", graph, k, "sym", 1, symmetrize)
    pe = torch.from_numpy(vectors).to(graph.device)
    return (pe, torch.from_numpy(values).to(graph.device)) if return_eigenvalues else pe


class LaplacianEigenpairs(NamedTuple):
    """Eigenvectors of nodes and eigenvalues of graphs."""

    vectors: Tensor  # [N, k]
    values: Tensor  # [G, k]


def laplacian_eigenpairs(
    graph: Graph,
    k: int,
    *,
    normalization: Literal["sym"] | None = None,
    skip_trivial: bool = False,
    fill: float = float("nan"),
    symmetrize: bool = False,
) -> LaplacianEigenpairs:
    """The k lowest eigenpairs of the Laplacian of every graph of the batch.

        L = D - A,    or with "sym"    L = I - D^-1/2 A D^-1/2,    L u_n = lambda_n u_n

    with 0 <= lambda_0 <= lambda_1 <= ... A_ij is the number of edges j -> i, duplicates as given.
    D is the in-degree. Self loops cancel in D - A. With "sym" they count, and D is clipped at 1:
    an isolated node has eigenvalue 1, and in D - A 0.

    A graph's columns are orthonormal. Of u and -u it is the one whose sorted entries are larger,
    at the first that differs: so the entry of largest magnitude is positive. Where u has every
    entry with both signs, the entries are first multiplied with a hash of what is around a node.

    Components: each has one lowest pair, the eigenvector 1 (with "sym" D^1/2) on it. The largest
    one's comes first: most nodes, then largest volume (the sum of D), then a hash of what is around
    its nodes up to 8 hops away. Components that all of this leaves equal share their columns: the
    first is the vector on all of them, the others set one against those before it.

    Other numbers of the nodes permute the rows of a column with a simple eigenvalue. Its sign
    may differ only if some renumbering of the graph (or one that the hash cannot tell from such)
    turns u into -u: no rule could keep it then. Of a repeated eigenvalue, columns 0 to k - 1 span
    the same space, if all its vectors are among them, or in those skipped. No basis of it is the
    same under every renumbering, so that its columns are other ones. Where column k - 1 ends within
    one, which of its vectors are there depends on the numbers: take k where eigenvalues have a gap.

    Solved per component in float64 on the CPU, in O(N k + E) memory: dense up to 512 nodes (or 4k),
    equal sizes together, then by Lanczos on L or on its inverse. Needs scipy.

    Args:
        graph: Square, A symmetric.
        k: Eigenpairs of a graph.
        normalization: None for D - A.
        skip_trivial: Leave out the first pair: eigenpairs 1 to k.
        fill: For pairs that a graph of fewer nodes does not have.
        symmetrize: Replace A by max(A, A^T): an edge one way goes both ways.

    Returns:
        ``vectors [N, k]`` and ``values [G, k]``, float32 on the graph's device: what
        :class:`fastgt.models.GraphGPS` takes as ``lap_vectors`` and ``lap_values``.

    Raises:
        TypeError, ValueError: ``k`` is no int or negative; the graph not square, A not symmetric;
            ``normalization`` is none of the two.
        ImportError: scipy is not there.
        RuntimeError: The solver did not converge; names the graph, the nodes and k.

    Source:
        Rampasek et al., arXiv 2205.12454, their code's transform/posenc_stats.py, which has no
        rule for signs and repeated eigenvalues, and with "sym" leaves self loops out.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.encodings import laplacian_eigenpairs
        >>> path = Graph.from_edge_index(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> pairs = laplacian_eigenpairs(path, 4)
        >>> [round(x, 4) for x in pairs.values[0].tolist()], pairs.vectors.shape
        ([0.0, 1.0, 3.0, nan], torch.Size([3, 4]))
    """
    if normalization not in (None, "sym"):
        raise ValueError(f'normalization must be None or "sym", got {normalization!r}')
    skip = int(skip_trivial)
    solved = _solved("laplacian_eigenpairs", graph, k, normalization, skip, symmetrize)
    vectors, values, there = (torch.from_numpy(x).to(graph.device) for x in solved)
    absent = ~there.repeat_interleave(graph.graph_ptr.diff(), 0, output_size=graph.num_rows)
    return LaplacianEigenpairs(vectors.masked_fill(absent, fill), values.masked_fill(~there, fill))


def _solved(
    name: str, graph: Graph, k: int, normalization: str | None, skip: int, symmetrize: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if isinstance(k, (bool, np.bool_)) or not hasattr(k, "__index__"):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    k = operator.index(k)
    if k < 0:
        raise ValueError(f"k must not be negative, got {k}")
    try:
        import scipy.sparse  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{name} needs scipy, which is not installed") from error
    a = _adjacency(graph, symmetrize)
    graph_ptr = graph.graph_ptr.cpu().numpy()
    try:
        return batch_eigenpairs(a, graph_ptr, k, normalized=normalization == "sym", skip=skip)
    except RuntimeError as error:
        raise RuntimeError(f"{name}: {error}") from error


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
    n = check_square(graph)
    import scipy.sparse as sp

    # copies: duplicates are summed in place, and the graph's memory is not ours to write
    col, row_ptr = (x.cpu().numpy().copy() for x in (graph.col, graph.row_ptr))
    a = sp.csr_array((np.ones(len(col)), col, row_ptr), shape=(n, n))
    return both_ways(a, np.arange(n), symmetrize)

"""Positions of nodes of large graphs: random vectors, spread along the edges."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.graph import Graph
from fastgt.ops.aggregate import aggregate
from fastgt.ops.checks import check_square, integer

_ROUNDING = 1e-5  # of sums, times what is summed


def random_projection_pe(graph: Graph, dim: int, *, steps: int = 3, seed: int = 0) -> Tensor:
    """Rows of the first powers of the adjacency, projected to ``dim`` random directions.

        U_0 ~ N(0, 1),    U_s = A' U_s-1,    A'_ij = (A + I)_ij / sqrt(r_i c_j)
        pe  = norm(sum_s norm(U_s)),    s = 1, ..., steps

    r_i sums row i of A + I and c_j its column j; norm takes the mean of every column to 0 and its
    variance to 1, and a column that is constant, but for rounding, to 0. Nodes whose walks of few
    steps end at the same nodes are close. It takes O(steps E dim) and no training, where node2vec,
    which LargeGT's authors use, takes hours.

    Args:
        graph: Square.
        dim: Directions; 0 gives no columns.
        steps: One at least.
        seed: Of the directions.

    Returns:
        ``[N, dim]`` float32 on the graph's device.

    Raises:
        TypeError, ValueError: An argument does not fit.

    Source:
        Zhang et al., Billion-scale Network Embedding with Iterative Random Projection, arXiv
        1805.02396, algorithm 1, with the adjacency normalized and with norms.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.encodings import random_projection_pe
        >>> path = Graph.from_edge_index(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> random_projection_pe(path, 4).shape
        torch.Size([3, 4])
    """
    n = check_square(graph)
    dim, steps = integer("dim", dim, 0), integer("steps", steps, 1)
    generator = torch.Generator().manual_seed(integer("seed", seed))
    drawn = torch.randn(n, dim, generator=generator, dtype=torch.float32, device="cpu")
    u = drawn.to(graph.device)
    rows, columns = (
        (degree + 1).float().rsqrt()[:, None] for degree in (graph.row_degree, graph.col_degree)
    )
    total = torch.zeros_like(u)
    for _ in range(steps):
        scale = u.square().mean(0).sqrt()
        u = u * columns
        with torch.autocast(graph.device.type, enabled=False):
            u = rows * (aggregate(u, graph) + u) if dim else u
        total += _norm(u, scale)
    return _norm(total, torch.ones_like(total[:1]))


def _norm(x: Tensor, scale: Tensor) -> Tensor:
    """Columns that differ by no more than what rounding numbers of that scale does become 0."""
    centred = x - x.mean(0)
    deviation = centred.square().mean(0).sqrt()
    return torch.where(deviation > _ROUNDING * scale, centred / deviation, 0)

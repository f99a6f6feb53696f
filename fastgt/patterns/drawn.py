"""Patterns that are drawn: random columns of each row, and expanders."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.graph import Graph
from fastgt.graph_build import owners
from fastgt.ops.checks import check_generator, integer
from fastgt.patterns.build import boundaries, from_rows
from fastgt.patterns.permutations import draw_table


def random(
    n: int | Tensor, degree: int, *, generator: torch.Generator | None = None, graphs: int = 1
) -> Graph:
    """Every node attends to random nodes of its graph; all sets of them are equally likely.

    The edges are ``{(i, j): j in S_i}``, with ``S_i`` a set of ``degree`` nodes, of which i may be
    one. With N nodes these are ``N degree`` edges. The pattern is symmetric only by chance. Graphs
    of a batch differ.

    Drawn on the CPU, in ``O(N degree^2)`` time and ``O(N degree)`` memory.

    Args:
        n: Nodes of a graph, or ``[G + 1]`` boundaries of a batch.
        degree: From 0 to the nodes of each graph.
        generator: On the CPU. The same state gives the same pattern. None takes PyTorch's own.
        graphs: How many graphs of n nodes the batch has.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named, with both numbers.

    Source:
        Zaheer et al., Big Bird, arXiv 2007.14062, section 2, for random attention; Floyd's
        algorithm in Bentley, Programming Pearls, CACM 30(9), 1987, for sets.

    Example:
        >>> import torch
        >>> from fastgt.patterns import random
        >>> random(100, 3, generator=torch.Generator().manual_seed(0)).num_edges
        300
    """
    degree, offsets = integer("degree", degree, 0), boundaries(n, graphs)
    check_generator(generator)
    sizes = offsets.diff()
    small = ((sizes > 0) & (sizes < degree)).nonzero()
    if len(small):
        g = int(small[0])
        raise ValueError(f"degree={degree} is larger than the {int(sizes[g])} nodes of graph {g}")
    owner = owners(offsets.cpu(), int(offsets[-1]))
    size, first = sizes.cpu()[owner], offsets.cpu()[owner]
    chance = torch.rand(len(owner), degree, generator=generator, dtype=torch.float64, device="cpu")
    chosen = torch.empty(len(owner), degree, dtype=torch.int64, device="cpu")
    for t in range(degree):
        last = size - degree + t  # nodes 0 to last are drawn from; who is there already gives last
        drawn = (chance[:, t] * (last + 1)).long().minimum(last)
        again = (chosen[:, :t] == drawn[:, None]).any(1)
        chosen[:, t] = torch.where(again, last, drawn)
    col = (chosen.sort(1).values + first[:, None]).flatten().to(offsets.device)
    return from_rows(offsets.new_full((len(owner),), degree), col, offsets)


def expander(
    n: int | Tensor,
    degree: int,
    *,
    cycles: bool = False,
    seed: int | Tensor = 0,
    tries: int = 100,
    graphs: int = 1,
) -> Graph:
    """A sparse graph on which walks reach every node soon: the union of some permutations.

    The edges are ``{(i, s_p(i)), (s_p(i), i): p < degree}`` without self loops and duplicates. The
    permutations ``s_p`` of each graph are drawn until the spectral gap is near the largest
    (:func:`fastgt.models.expander_table`). With N nodes these are ``2 N degree`` edges, less those
    that are left out. A graph of n nodes has all ``n (n - 1)`` pairs where n is no more than 10 or
    ``degree``. The pattern is symmetric.

    Drawn on the CPU, in O(degree N) memory.

    Args:
        n: Nodes of a graph, or ``[G + 1]`` boundaries of a batch.
        degree: Permutations, 1 or more.
        cycles: Draw Hamiltonian cycles only, and no other permutations.
        seed: One for each graph, ``[G]`` int64: what is drawn depends on that and on the graph's
            size alone. An int stands for ``seed + g``.
        tries: Draws of a graph at most; the best is kept.
        graphs: How many graphs of n nodes the batch has.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named.

    Source:
        Shirzad et al., Exphormer, arXiv 2303.06147, section 3 and appendix C.

    Example:
        >>> from fastgt.patterns import expander
        >>> graph = expander(1000, 3)
        >>> 5900 < graph.num_edges <= 6000, int(graph.row_degree.max())
        (True, 6)
    """
    offsets = boundaries(n, graphs)
    table = draw_table(offsets, degree, cycles, seed, multiset=False, tries=tries)
    ptr = offsets.cpu()
    node = torch.arange(len(table), device="cpu")[:, None].expand_as(table)
    first = ptr[owners(ptr, len(table))][:, None].expand_as(table)
    there = table >= 0
    one, other = node[there], (table + first)[there]
    row, col = torch.cat([one, other]), torch.cat([other, one])
    order = (row * max(len(table), 1) + col).argsort()
    degrees = torch.bincount(row, minlength=len(table))
    return from_rows(degrees.to(offsets.device), col[order].to(offsets.device), offsets)

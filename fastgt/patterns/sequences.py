"""Patterns of sequences: a band around the diagonal, and what came before."""

from __future__ import annotations

from torch import Tensor

from fastgt.graph import Graph
from fastgt.graph_build import owners
from fastgt.ops.checks import integer
from fastgt.patterns.build import boundaries, from_rows, ranges


def band(n: int | Tensor, before: int, after: int, *, graphs: int = 1) -> Graph:
    """Every node attends to itself, to some nodes before it and to some after it.

    The edges are ``{(i, j): i - before <= j <= i + after}`` within each graph. With
    ``b = min(before, n - 1)`` and ``a = min(after, n - 1)`` a graph of n nodes has
    ``n (b + a + 1) - (b (b + 1) + a (a + 1)) / 2`` of them. The pattern is symmetric where
    ``before`` equals ``after``. Windows are cut at the ends of a sequence: those of
    :func:`neighborhood` are moved inwards there.

    Args:
        n: Nodes of a graph, or ``[G + 1]`` boundaries of a batch.
        before, after: How many nodes on each side, 0 or more.
        graphs: How many graphs of n nodes the batch has.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named.

    Source:
        Beltagy et al., Longformer, arXiv 2004.05150, section 3.1.

    Example:
        >>> from fastgt.patterns import band
        >>> band(4, 1, 1).col.tolist()
        [0, 1, 0, 1, 2, 1, 2, 3, 2, 3]
    """
    before, after = integer("before", before, 0), integer("after", after, 0)
    offsets = boundaries(n, graphs)
    owner = owners(offsets, int(offsets[-1]))
    begin, end = offsets[:-1][owner], offsets[1:][owner]
    node = owner.new_ones(len(owner)).cumsum(0) - 1
    first = (node - min(before, len(node))).maximum(begin)
    count = (node + min(after, len(node)) + 1).minimum(end) - first
    return from_rows(count, ranges(first, count), offsets)


def causal(n: int | Tensor, *, window: int | None = None, graphs: int = 1) -> Graph:
    """Every node attends to itself and to those before it, or to the last ones of them.

    The edges are ``{(i, j): 0 <= i - j < window}`` within each graph. A graph of n nodes has
    ``n (n + 1) / 2`` of them, and with ``w = min(window, n)`` it has ``n w - w (w - 1) / 2``. The
    pattern is not symmetric.

    Args:
        n: Nodes of a graph, or ``[G + 1]`` boundaries of a batch.
        window: How many nodes one attends to at most, itself among them; None for all.
        graphs: How many graphs of n nodes the batch has.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named.

    Source:
        Vaswani et al., Attention Is All You Need, arXiv 1706.03762, section 3.2.3; Child et al.,
        Sparse Transformers, arXiv 1904.10509, for the window.

    Example:
        >>> from fastgt.patterns import causal
        >>> causal(3).col.tolist(), causal(3, window=2).col.tolist()
        ([0, 0, 1, 0, 1, 2], [0, 0, 1, 1, 2])
    """
    before = 2**62 if window is None else integer("window", window, 1) - 1
    return band(n, before, 0, graphs=graphs)

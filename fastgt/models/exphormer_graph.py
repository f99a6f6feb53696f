"""Who attends to whom in Exphormer: a graph's own edges, an expander's and those of virtual nodes.

An expander is the union of permutations of a graph's nodes, walked both ways
(:mod:`fastgt.patterns.permutations`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgt.graph import Graph
from fastgt.ops.checks import check_square, integer, readable
from fastgt.patterns.permutations import draw_table


def expander_table(
    graph: Graph,
    degree: int,
    *,
    cycles: bool = False,
    seed: int | Tensor = 0,
    multiset: bool = False,
    tries: int = 100,
) -> Tensor:
    """The edges of an expander on every graph of a batch, computed once before training.

    Every node i has edges to ``out[i]`` and back. Nodes are numbered within their graph, and -1
    stands for no edge: so the rows of a graph may be stored, and batched, like any features of
    nodes. Graphs of 10 nodes or fewer, or of no more than ``degree``, get all pairs.

    The released code leaves self loops and duplicate edges out of a list, and then stores the list
    from before. Here they are left out, and a node may have fewer than ``2 * degree`` edges;
    ``multiset=True`` keeps them, as released.

    Computed on the CPU, for all graphs at once, in O(degree N) memory.

    Args:
        graph: Square; its edges play no part.
        degree: Permutations d, 1 at least.
        cycles: Draw Hamiltonian cycles through all nodes, in the place of any permutations.
        seed: One for each graph, ``[G]`` int64: what is drawn depends on that and on the graph's
            size alone. An int stands for ``seed + g``.
        multiset: Keep self loops and duplicates.
        tries: Draws of a graph at most; the best is kept.

    Returns:
        ``[N, max(degree, 5)]`` int64 on the graph's device, -1 behind the permutations.

    Source:
        Shirzad et al., arXiv 2303.06147, section 3 and appendix C, and their code.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models.exphormer_graph import expander_table
        >>> graph = Graph.complete(torch.tensor([0, 20, 23]))
        >>> found = expander_table(graph, 3)
        >>> found.shape, found[20:].tolist()
        (torch.Size([23, 5]), [[1, -1, -1, -1, -1], [2, -1, -1, -1, -1], [0, -1, -1, -1, -1]])
    """
    check_square(graph)
    table = draw_table(graph.graph_ptr, degree, cycles, seed, multiset, tries)
    return table.to(graph.device)


class Pattern(NamedTuple):
    """A batch's attention pattern.

    Attributes:
        graph: Over the N nodes and V G virtual nodes: virtual node v of graph g is node
            ``N + v G + g``.
        sizes: Edges of each kind, which stand one kind after another: the graph's own, the
            expander's, and from nodes to their virtual node v and back, v after v.
        virtual_nodes: V, of each graph.
    """

    graph: Graph
    sizes: tuple[int, ...]
    virtual_nodes: int


def exphormer_pattern(graph: Graph, expander: Tensor | None, virtual_nodes: int) -> Pattern:
    """The edges of a batch, of its expander and of its virtual nodes as one Graph.

    Args:
        graph: Square.
        expander: ``[N, W]`` integers, as :func:`expander_table` gives; None for none.
        virtual_nodes: Of each graph, 0 or more.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named.

    Example:
        >>> import torch
        >>> from fastgt import Graph
        >>> from fastgt.models.exphormer_graph import expander_table, exphormer_pattern
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]), 3)
        >>> pattern = exphormer_pattern(graph, expander_table(graph, 3), 1)
        >>> pattern.sizes, pattern.graph.num_nodes
        ((2, 6, 3, 3), 4)
    """
    n, g, device = check_square(graph), graph.num_graphs, graph.device
    virtual_nodes = integer("virtual_nodes", virtual_nodes, 0)
    parts = [graph.edge_index]
    if expander is not None:
        parts.append(_both_ways(expander, graph))
    node = torch.arange(n, device=device)
    number = torch.arange(g, device=device)
    owner = number.repeat_interleave(graph.graph_ptr.diff(), output_size=n)
    for v in range(virtual_nodes):
        virtual = owner + (n + v * g)
        parts += [torch.stack([node, virtual]), torch.stack([virtual, node])]
    sizes = [x.shape[1] for x in parts]
    if expander is None:
        sizes.insert(1, 0)
    pattern = Graph.from_edge_index(torch.cat(parts, 1), n + virtual_nodes * g)
    return Pattern(pattern, tuple(sizes), virtual_nodes)


def _both_ways(expander: Tensor, graph: Graph) -> Tensor:
    """``[N, W]`` numbers within graphs -> ``[2, X]`` edges of the batch, then all of them back."""
    n = graph.num_rows
    if not isinstance(expander, Tensor):
        raise TypeError(f"expander must be a tensor of integers, got {type(expander).__name__}")
    if expander.is_floating_point() or expander.is_complex() or expander.dtype == torch.bool:
        raise TypeError(f"expander must hold integers, got {expander.dtype}")
    if expander.ndim != 2 or expander.shape[0] != n:
        raise ValueError(f"expander must be [N, W] = [{n}, W], got {list(expander.shape)}")
    if expander.device != graph.device:
        raise ValueError(f"expander is on {expander.device} but graph is on {graph.device}")
    count = graph.graph_ptr.diff().long()
    first = graph.graph_ptr[:-1].long().repeat_interleave(count, output_size=n)[:, None]
    local = expander.long()
    if readable(local):
        size = count.repeat_interleave(count, output_size=n)[:, None]
        wrong = ((local < -1) | (local >= size)).nonzero()
        if len(wrong):
            i, column = wrong[0].tolist()
            raise ValueError(
                f"expander must be from -1 to {int(size[i]) - 1} in a graph of {int(size[i])} "
                f"nodes, got {int(local[i, column])} at [{i}, {column}]"
            )
    node = torch.arange(n, device=graph.device)[:, None].expand_as(local)
    there = local >= 0
    source, target = node[there], (local + first)[there]
    return torch.stack([torch.cat([source, target]), torch.cat([target, source])])

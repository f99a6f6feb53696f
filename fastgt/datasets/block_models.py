"""PATTERN and CLUSTER: stochastic block models, drawn by the published procedure."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.datasets import archive
from fastgt.datasets.graph_set import GraphSet
from fastgt.ops.checks import integer

LOW, HIGH = 5, 35  # a community has LOW to HIGH - 1 nodes
COMMUNITIES = 6  # of a graph; in PATTERN the first one is the pattern
PATTERNS, SIGNALS = 100, 3


def pattern(graphs: int = 10_000, seed: int = 0) -> GraphSet:
    """PATTERN: which nodes of a graph belong to a pattern that is hidden in it.

    There are 100 patterns of 5 to 34 nodes: random graphs with edges of probability .5 and signals
    of nodes in {0, 1, 2}. A graph has one of them and five communities of 5 to 34 nodes with random
    signals, with edges of probability .5 within, .35 across and .5 between the pattern and other
    nodes. Nodes stand in random order. A node's type is its signal, its class whether it is of the
    pattern. Each edge stands both ways; ``edge_index`` is int16.

    Args:
        graphs: To train on, as many of each pattern; a fifth of that each to validate and to test.
        seed: Of patterns and graphs. The same one gives the same set.

    Raises:
        ValueError: ``graphs`` is no positive multiple of 500.

    Source:
        Dwivedi et al., arXiv 2003.00982, and their code's generator.

    Example:
        >>> from fastgt.datasets import pattern
        >>> few = pattern(graphs=500, seed=1)
        >>> len(few), few.node_types, few.classes
        (700, (3,), 2)
    """
    each = _multiple(graphs, 5 * PATTERNS) // PATTERNS
    draw = torch.Generator().manual_seed(seed)
    size = torch.randint(LOW, HIGH, (PATTERNS,), generator=draw)
    inner = torch.rand(PATTERNS, _pairs(HIGH - 1), generator=draw) < 0.5
    signal = torch.randint(SIGNALS, (PATTERNS, HIGH - 1), generator=draw)

    counts = [each, each // 5, each // 5]
    which = torch.cat([torch.arange(PATTERNS).repeat_interleave(count) for count in counts])
    sizes = torch.randint(LOW, HIGH, (len(which), COMMUNITIES), generator=draw)
    sizes[:, 0] = size[which]
    chance = torch.full((COMMUNITIES, COMMUNITIES), 0.35).fill_diagonal_(0.5)
    chance[0] = chance[:, 0] = 0.5

    block = _blocks(sizes)
    node_ptr = archive.ptr(sizes.sum(1))
    owner = torch.arange(len(sizes)).repeat_interleave(node_ptr.diff())
    node = torch.randint(SIGNALS, block.shape, generator=draw)
    hidden = block == 0
    place = torch.arange(len(block)) - node_ptr[owner]
    node[hidden] = signal[which[owner[hidden]], place[hidden]]
    return _shuffled(
        (sizes, node, hidden.long()),
        _edges(sizes, chance, draw, inner[which]),
        [PATTERNS * count for count in counts],
        draw,
        title="PATTERN, drawn anew",
        classes=2,
        node_types=(SIGNALS,),
    )


def cluster(graphs: int = 10_000, seed: int = 0) -> GraphSet:
    """CLUSTER: which community of a graph a node belongs to.

    A graph has six communities of 5 to 34 nodes, with edges of probability .55 within and .25
    across. Nodes stand in random order. One random node of community r has type r + 1, all others
    have type 0. A node's class is its community. Each edge stands both ways; ``edge_index`` is
    int16.

    Args:
        graphs: To train on; a tenth of that each to validate and to test.
        seed: The same one gives the same set.

    Raises:
        ValueError: ``graphs`` is no positive multiple of 10.

    Source:
        Dwivedi et al., arXiv 2003.00982, and their code's generator.

    Example:
        >>> from fastgt.datasets import cluster
        >>> few = cluster(graphs=100, seed=1)
        >>> len(few), few.node_types, few.classes
        (120, (7,), 6)
    """
    _multiple(graphs, 10)
    draw = torch.Generator().manual_seed(seed)
    counts = [graphs, graphs // 10, graphs // 10]
    sizes = torch.randint(LOW, HIGH, (sum(counts), COMMUNITIES), generator=draw)
    chance = torch.full((COMMUNITIES, COMMUNITIES), 0.25).fill_diagonal_(0.55)
    block = _blocks(sizes)
    node = torch.zeros_like(block)
    known = (torch.rand(sizes.shape, generator=draw, dtype=torch.float64) * sizes).long()
    begin = archive.ptr(sizes.flatten())[:-1].view_as(sizes)
    node[begin + known] = torch.arange(COMMUNITIES) + 1
    return _shuffled(
        (sizes, node, block),
        _edges(sizes, chance, draw),
        counts,
        draw,
        title="CLUSTER, drawn anew",
        classes=COMMUNITIES,
        node_types=(COMMUNITIES + 1,),
    )


def _multiple(graphs: int, of: int) -> int:
    graphs = integer("graphs", graphs, 1)
    if graphs % of:
        raise ValueError(f"graphs must be a multiple of {of}, got {graphs}")
    return graphs


def _pairs(nodes: int) -> int:
    return nodes * (nodes - 1) // 2


def _blocks(sizes: Tensor) -> Tensor:
    """The community of each node, ``[N]``."""
    return torch.arange(COMMUNITIES).repeat(len(sizes)).repeat_interleave(sizes.flatten())


# the pairs of a graph of n nodes are the first n (n - 1) / 2, whatever n is
_ROW, _COL = torch.tril_indices(COMMUNITIES * (HIGH - 1), COMMUNITIES * (HIGH - 1), -1)
_AT_ONCE = 200  # graphs: their pairs stay in a cache


def _edges(
    sizes: Tensor, chance: Tensor, draw: torch.Generator, inner: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-> pairs of nodes that have an edge, ``[2, E / 2]``, and how many each graph has, ``[G]``.

    Args:
        sizes: Of communities, ``[G, 6]``.
        chance: Of an edge, by the communities of its ends, ``[6, 6]``.
        inner: Whether the pairs of the first community have edges, ``[G, 34 * 33 / 2]``.
    """
    found, count = [], []
    for some in torch.arange(len(sizes)).split(_AT_ONCE):
        nodes = sizes[some].sum(1)
        block = _blocks(sizes[some])
        pairs = nodes * (nodes - 1) // 2
        graph = torch.arange(len(some)).repeat_interleave(pairs)
        pair = torch.arange(len(graph)) - archive.ptr(pairs)[graph]
        begin = archive.ptr(nodes)[graph]
        row, col = _ROW[pair], _COL[pair]
        kind = block[begin + row] * COMMUNITIES + block[begin + col]
        there = torch.rand(len(kind), generator=draw) < chance.flatten()[kind]
        if inner is not None:
            first = kind == 0
            there[first] = inner[some[0] + graph[first], pair[first]]
        found.append(torch.stack([row[there], col[there]]).short())
        count.append(graph[there].bincount(minlength=len(some)))
    return torch.cat(found, 1), torch.cat(count)


def _shuffled(
    nodes: tuple[Tensor, Tensor, Tensor],
    edges: tuple[Tensor, Tensor],
    counts: list[int],
    draw: torch.Generator,
    *,
    title: str,
    classes: int,
    node_types: tuple[int, ...],
) -> GraphSet:
    """The set, with the nodes of each graph in random order and each edge both ways.

    Args:
        nodes: Sizes of communities, and types and classes of nodes.
        edges: As of :func:`_edges`.
        counts: Graphs of each split.
    """
    (sizes, node, y), (pairs, count) = nodes, edges
    node_ptr = archive.ptr(sizes.sum(1))
    owner = torch.arange(len(sizes)).repeat_interleave(node_ptr.diff())
    order = torch.randperm(len(owner), generator=draw)
    order = order[owner[order].argsort(stable=True)]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - node_ptr[owner]
    place = place.short()
    edge_index = torch.empty(2, 2 * pairs.shape[1], dtype=torch.int16)
    edge_ptr = archive.ptr(2 * count)
    for some in torch.arange(len(sizes)).split(_AT_ONCE):
        begin = node_ptr[some].repeat_interleave(count[some])
        span = slice(int(edge_ptr[some[0]]), int(edge_ptr[some[-1] + 1]))
        ends = place[begin + pairs[:, span.start // 2 : span.stop // 2]]
        edge_index[:, span] = torch.stack([ends, ends.flip(0)], 2).flatten(1)
    splits = torch.arange(len(sizes)).split(counts)
    return GraphSet(
        node[order],
        None,
        edge_index,
        node_ptr,
        edge_ptr,
        y[order],
        dict(zip(("train", "val", "test"), splits, strict=True)),
        y_per="node",
        title=title,
        classes=classes,
        node_types=node_types,
    )

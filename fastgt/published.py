"""Graphs like those that speeds of GPU kernels are published on, made here: no file is needed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.graph import Graph


def igb_small() -> Graph:
    """As many nodes and edges as IGB-small (Khatua et al., KDD 2023), citations at random: the
    n-th most cited node is drawn with probability proportional to n^-0.5."""
    generator = torch.Generator().manual_seed(0)
    nodes, edges = 1_000_000, 12_070_502
    target = torch.randperm(nodes, generator=generator)[_ranks(generator, nodes, edges, 0.5)]
    source = torch.randint(nodes, (edges,), generator=generator)
    return Graph.from_edge_index(torch.stack([source, target]), nodes)


def github() -> Graph:
    """As many nodes as MUSAE's GitHub (Rozemberczki et al., 2019), about as many edges, each both
    ways, and a hub of 9,000: both ends are drawn with probability proportional to n^-0.8."""
    generator = torch.Generator().manual_seed(0)
    nodes, drawn = 37_700, 315_000
    name = torch.randperm(nodes, generator=generator)
    source, target = (name[_ranks(generator, nodes, drawn, 0.8)] for _ in range(2))
    return Graph.from_edge_index(_both_ways(source, target, nodes), nodes)


def pascalvoc() -> Graph:
    """1,024 images of about as many superpixels and edges as PascalVOC-SP (Dwivedi et al., NeurIPS
    2022): regions on a grid, which touch those above, below and beside them and, across each
    corner, one of two. Numbered row by row, as a segmenter does; every 16th image is another."""
    generator = torch.Generator().manual_seed(0)
    graphs = []
    for _ in range(64):
        height = int(torch.randint(18, 25, (), generator=generator))
        width = int(torch.randint(20, 27, (), generator=generator))
        grid = torch.arange(height * width).view(height, width)
        corner = torch.rand(height - 1, width - 1, generator=generator) < 0.5
        pairs = [
            (grid[:, :-1], grid[:, 1:]),
            (grid[:-1], grid[1:]),
            (
                torch.where(corner, grid[:-1, :-1], grid[:-1, 1:]),
                torch.where(corner, grid[1:, 1:], grid[1:, :-1]),
            ),
        ]
        source, target = (torch.cat([pair[i].flatten() for pair in pairs]) for i in range(2))
        nodes = height * width
        graphs.append(Graph.from_edge_index(_both_ways(source, target, nodes), nodes))
    return Graph.batch(graphs * 16)


def h_to_h(levels: int = 6) -> Graph:
    """The multi-scale mesh of weather models (Lam et al., Science 2023): an icosahedron whose
    triangles are cut in four, six times over; the edges of all seven meshes, each both ways."""
    # one pole, two rings of five and the other pole
    up, down = torch.arange(1, 6), torch.arange(6, 11)
    next_up, next_down = up.roll(-1), down.roll(-1)
    north, south = torch.zeros(5, dtype=torch.int64), torch.full((5,), 11)
    triangles = [
        *((north, up, next_up), (up, down, next_up)),
        *((next_up, down, next_down), (south, next_down, down)),
    ]
    face = torch.cat([torch.stack(x, 1) for x in triangles])  # [20, 3]
    nodes, edges = 12, []
    for level in range(levels + 1):
        a, b, c = face.unbind(1)
        pair = torch.stack([torch.cat([a, b, c]), torch.cat([b, c, a])]).sort(0).values
        key, middle = (pair[0] * nodes + pair[1]).unique(return_inverse=True)
        edges.append(torch.stack([key // nodes, key % nodes]))
        if level == levels:
            break
        ab, bc, ca = (nodes + middle).chunk(3)
        parts = (a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)
        face = torch.cat([torch.stack(part, 1) for part in parts])
        nodes += len(key)
    source, target = torch.cat(edges, 1)
    return Graph.from_edge_index(_both_ways(source, target, nodes), nodes)


def _ranks(generator: torch.Generator, nodes: int, count: int, power: float) -> Tensor:
    """Numbers below ``nodes``, n with probability proportional to (n + 1)^-power."""
    share = torch.arange(1, nodes + 1, dtype=torch.float64).pow(-power).cumsum(0)
    point = torch.rand(count, generator=generator, dtype=torch.float64) * share[-1]
    return torch.searchsorted(share, point).clamp(max=nodes - 1)


def _both_ways(source: Tensor, target: Tensor, nodes: int) -> Tensor:
    """Every edge once in each direction, without self loops."""
    other = source != target
    source, target = source[other], target[other]
    both = torch.cat([target * nodes + source, source * nodes + target]).unique()
    return torch.stack([both % nodes, both // nodes])

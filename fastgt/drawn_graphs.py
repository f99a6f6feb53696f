"""Graphs that are drawn, always the same ones: block models, grids, clouds, meshes, R-MAT."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgt import files
from fastgt.graph import Graph
from fastgt.patterns import band


def pattern() -> Graph:
    """Dwivedi et al., arXiv 2003.00982, PATTERN: five communities and a pattern, shuffled."""

    def chance(block: Tensor) -> Tensor:
        pattern = block == 5
        within = (block[:, None] == block) | pattern | pattern[:, None]
        return torch.where(within, 0.5, 0.35)

    return _block_models(chance)


def cluster() -> Graph:
    """Dwivedi et al., arXiv 2003.00982, CLUSTER: six communities, shuffled."""
    return _block_models(lambda block: torch.where(block[:, None] == block, 0.55, 0.25))


def _block_models(chance: Callable[[Tensor], Tensor]) -> Graph:
    """32 graphs of six blocks of 5 to 34 nodes; edges with the chance that the blocks give."""
    generator = torch.Generator().manual_seed(0)
    graphs = []
    for _ in range(32):
        sizes = torch.randint(5, 35, (6,), generator=generator)
        block = torch.arange(6).repeat_interleave(sizes)
        block = block[torch.randperm(len(block), generator=generator)]
        probability = chance(block)
        upper = (torch.rand(probability.shape, generator=generator) < probability).triu(1)
        graphs.append(Graph.from_dense(upper | upper.T))
    return Graph.batch(graphs)


def superpixels() -> Graph:
    """Centres on a jittered grid, numbered row by row as a segmenter does; 8 nearest each."""
    generator = torch.Generator().manual_seed(0)
    graphs = []
    for _ in range(32):
        height = int(torch.randint(18, 24, (), generator=generator))
        width = int(torch.randint(20, 28, (), generator=generator))
        grid = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        centre = grid + torch.rand(grid.shape, generator=generator, dtype=torch.float64)
        distance = (centre[:, None] - centre).square().sum(-1).fill_diagonal_(torch.inf)
        nearest = distance.topk(8, largest=False).indices
        target = torch.arange(len(grid)).repeat_interleave(8)
        edge_index = torch.stack([nearest.flatten(), target])
        graphs.append(Graph.from_edge_index(edge_index, len(grid)))
    return Graph.batch(graphs)


def points() -> Graph:
    """Eight clouds of 1,024 points in a cube; each attends to its 16 nearest, itself among them."""
    generator = torch.Generator().manual_seed(0)
    graphs = []
    for _ in range(8):
        point = torch.rand(1024, 3, generator=generator, dtype=torch.float64)
        nearest = torch.cdist(point, point).topk(16, largest=False).indices
        target = torch.arange(1024).repeat_interleave(16)
        graphs.append(Graph.from_edge_index(torch.stack([nearest.flatten(), target]), 1024))
    return Graph.batch(graphs)


def banded() -> Graph:
    """A sequence whose places attend to the 16 before and after them, and to themselves."""
    return band(2**14, 16, 16)


def complete() -> Graph:
    """64 graphs of 64 nodes that all attend to all."""
    return Graph.batch([Graph.from_dense(torch.ones(64, 64, dtype=torch.bool))] * 64)


def rmat(levels: int) -> Callable[[], Graph]:
    """Chakrabarti et al., SDM 2004, with Graph500's probabilities .57, .19, .19, .05: 16 edges a
    node before duplicates are left out."""

    def load() -> Graph:
        generator = torch.Generator().manual_seed(0)
        source = target = torch.zeros(16 << levels, dtype=torch.int64)
        for _ in range(levels):
            point = torch.rand(source.shape, generator=generator, dtype=torch.float64)
            quadrant = torch.bucketize(point, point.new_tensor([0.57, 0.76, 0.95]))
            source, target = 2 * source + quadrant // 2, 2 * target + quadrant % 2
        both = (target << levels | source).unique()
        edge_index = torch.stack([both & ((1 << levels) - 1), both >> levels])
        return Graph.from_edge_index(edge_index, 1 << levels)

    return load


def write_rmat(path: str | os.PathLike[str], levels: int, edges: int, seed: int = 0) -> None:
    """As :func:`rmat`, of any number of edges, to a ``.npy`` ``[2, E]``: sources above targets.

    The edges are in no order, and duplicates and self loops stay. Takes memory for a million edges.
    The probabilities are rounded to multiples of 2^-16.
    """
    if not 1 <= levels <= 62:
        raise ValueError(f"levels must be from 1 to 62, got {levels}")
    if edges < 0:
        raise ValueError(f"edges must not be negative, got {edges}")
    kind = np.dtype(np.int32 if levels < 32 else np.int64)
    above = [round(65536 * x) for x in (0.57, 0.76, 0.95)]  # which of four quadrants
    chunk = 1 << 20
    with files.replacing(Path(path)) as file:
        said = {"descr": kind.str, "fortran_order": False, "shape": (2, edges)}
        np.lib.format.write_array_header_1_0(file, said)
        begin = file.tell()
        for first in range(0, edges, chunk):
            count = min(chunk, edges - first)
            generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, first]))
            source, target = np.zeros((2, count), dtype=kind)
            for _ in range(levels):
                point = generator.integers(65536, size=count, dtype=np.uint16)
                below = point >= above[1]
                right = (point >= above[0]) ^ below ^ (point >= above[2])
                source, target = 2 * source + below, 2 * target + right
            for end, x in enumerate((source, target)):
                file.seek(begin + (end * edges + first) * kind.itemsize)
                file.write(x.astype(kind, copy=False).tobytes())


def mesh() -> Graph:
    """A Delaunay triangulation, nodes in random order; each edge both ways."""
    from scipy.spatial import Delaunay

    nodes = 2**14
    points = torch.rand(nodes, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    corners = torch.from_numpy(Delaunay(points.numpy()).simplices).long()
    source, target = torch.cat([corners[:, pair] for pair in ([0, 1], [1, 2], [2, 0])]).T
    both = torch.cat([target * nodes + source, source * nodes + target]).unique()
    return Graph.from_edge_index(torch.stack([both % nodes, both // nodes]), nodes)

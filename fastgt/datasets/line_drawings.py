"""Pairs of line drawings with known matches, drawn at random."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastgt.datasets import archive
from fastgt.datasets.graph_set import GraphSet
from fastgt.ops.checks import integer, number

TRIES = 40, 80  # points of a drawing, least and most, before those too near to others go
DISTANCE = 0.08  # the least between two points of a drawing of extent 1
LINES = 0.6  # share of a triangulation's edges that are lines
ALONE = 0.1  # share of the points that only the first graph of a pair has, and only the second
TURN, SHIFT = math.radians(10), 0.1  # the most that the second graph is turned and moved by


def drawn_lines(pairs: int = 8_000, seed: int = 0, noise: float = 0.02) -> GraphSet:
    """Pairs of graphs of one line drawing: which node of the first is which node of the second.

    A drawing is made at random: points in a square of extent 1, no two nearer than 0.08, and as
    lines 6 of 10 edges of their Delaunay triangulation. A pair has two graphs of one drawing, which
    are graphs 2p and 2p + 1 of the set. A tenth of the points is in the first graph only, a tenth
    in the second only; lines between the points of a graph are its edges, each both ways. The
    second graph is turned by up to 10 degrees and moved by up to a tenth of the extent in both
    directions; then a random number with the standard deviation ``noise`` is added to every
    coordinate. The nodes of both graphs are in random order, so that it does not tell what matches.
    To take mutual nearest neighbours for matches finds 47 % of them, and 99 % once the second graph
    is turned and moved back.

    A node has its coordinates, ``[N, 2]``, from the middle of the square. ``y`` of a node is the
    number of its match within the other graph, or -1.

    Args:
        pairs: How many to train on, a multiple of 10. There are a tenth of that each to validate
            and to test.
        seed: From 0. The same one gives the same set.
        noise: Not negative.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named.
        ImportError: scipy is absent.

    Example:
        >>> from fastgt.datasets import drawn_lines
        >>> few = drawn_lines(pairs=10, seed=1)
        >>> len(few), few.node.shape[1], {name: len(x) for name, x in few.splits.items()}
        (24, 2, {'train': 20, 'val': 2, 'test': 2})
    """
    pairs, noise = integer("pairs", pairs, 1), number("noise", noise)
    if pairs % 10:
        raise ValueError(f"pairs must be a multiple of 10, got {pairs}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be finite and not negative, got {noise}")
    draw = np.random.default_rng(integer("seed", seed, 0))
    counts = [2 * pairs, pairs // 5, pairs // 5]
    graphs = [graph for _ in range(sum(counts) // 2) for graph in _pair(draw, noise)]
    nodes, lines, y = (list(parts) for parts in zip(*graphs, strict=True))
    return GraphSet(
        torch.from_numpy(np.concatenate(nodes)).float(),
        None,
        torch.from_numpy(np.concatenate(lines, 1)).short(),
        _ptr([len(x) for x in nodes]),
        _ptr([x.shape[1] for x in lines]),
        torch.from_numpy(np.concatenate(y)).short(),
        dict(zip(("train", "val", "test"), torch.arange(sum(counts)).split(counts), strict=True)),
        y_per="node",
        title="line drawings, drawn",
    )


_Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]  # coordinates [n, 2], edges [2, e], matches [n]


def _pair(draw: np.random.Generator, noise: float) -> tuple[_Drawn, _Drawn]:
    points, lines = _drawing(draw)
    n = len(points)
    where = draw.permutation(n)
    alone = round(ALONE * n)
    first, second = (draw.permutation(where[part]) for part in (slice(alone, n), slice(n - alone)))
    angle = draw.uniform(-TURN, TURN)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    moved = points @ turn.T + draw.uniform(-SHIFT, SHIFT, 2) + draw.normal(0, noise, (n, 2))
    places = _places(first, n), _places(second, n)
    return (
        (points[first], _edges(lines, places[0]), places[1][first]),
        (moved[second], _edges(lines, places[1]), places[0][second]),
    )


def _drawing(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """-> points ``[n, 2]`` and lines ``[2, e]``, each one way."""
    from scipy.spatial import Delaunay

    points = draw.uniform(-0.5, 0.5, (draw.integers(TRIES[0], TRIES[1] + 1), 2))
    distance = np.linalg.norm(points[:, None] - points, axis=2)
    near = np.tril(distance < DISTANCE, -1)  # to one before it, whether that stays or not
    points = points[~near.any(1)]
    corners = Delaunay(points).simplices  # [triangles, 3]
    sides = np.concatenate([corners[:, [0, 1]], corners[:, [1, 2]], corners[:, [2, 0]]])
    sides = np.unique(np.sort(sides, 1), axis=0)
    return points, sides[draw.random(len(sides)) < LINES].T


def _places(chosen: np.ndarray, n: int) -> np.ndarray:
    """Of each of n points, its number among those that are chosen; -1 for others."""
    places = np.full(n, -1)
    places[chosen] = np.arange(len(chosen))
    return places


def _edges(lines: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Lines between the points of a graph, both ways."""
    ends = places[lines]
    ends = ends[:, (ends >= 0).all(0)]
    return np.concatenate([ends, ends[::-1]], 1)


def _ptr(counts: list[int]) -> Tensor:
    return archive.ptr(torch.tensor(counts))

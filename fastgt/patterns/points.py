"""Patterns of points in space: the nearest ones, those within a radius, balls of equal size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgt.graph import Graph
from fastgt.ops.checks import check_float, integer, number
from fastgt.patterns.build import from_rows, parts
from fastgt.patterns.groups import check_divides, sets

if TYPE_CHECKING:
    from scipy.spatial import cKDTree

_ROOM = 2**20  # candidates at once
_FARTHEST = 1e150  # of a coordinate from 0: squares of distances must not overflow


def knn(
    points: Tensor,
    k: int,
    *,
    queries: Tensor | None = None,
    offsets: Tensor | None = None,
    query_offsets: Tensor | None = None,
    partial: bool = False,
) -> Graph:
    """Every query attends to its k nearest points; without queries, every point does.

    The edges are ``{(i, j): fewer than k points of the graph are before j for i}``. A point is
    before j where its distance to i is less, or the same and its number lower. Distances are
    Euclidean, in float64. With M queries these are ``M k`` edges. A point is its own nearest one,
    unless another in the same place has a lower number. The pattern is not symmetric in general.

    Computed on the CPU, by scipy's k-d tree: O(N log N) where few places are equally far.

    Args:
        points: ``[N, dimensions]``, no coordinate farther than 1e150 from 0.
        k: From 0 to the number of points of each graph.
        queries: ``[M, dimensions]``, the rows of the graph; its columns are the points.
        offsets: ``[G + 1]`` boundaries of a batch, in points.
        query_offsets: Those in queries.
        partial: Let a graph have fewer than k points; its queries attend to all of them.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named, with both numbers.

    Source:
        Zhao et al., Point Transformer, arXiv 2012.09164, section 3.

    Example:
        >>> import torch
        >>> from fastgt.patterns import knn
        >>> knn(torch.tensor([[0.0], [1.0], [3.0], [3.5]]), 2).col.view(4, 2).tolist()
        [[0, 1], [0, 1], [2, 3], [2, 3]]
    """
    k = integer("k", k, 0)
    space = _space(points, queries, offsets, query_offsets)
    degree, cols = [], []
    for g, (known, asked, first) in enumerate(space.graphs()):
        if k > len(known) and len(asked) and not partial:
            raise ValueError(
                f"k={k} is larger than the {len(known)} points of graph {g}: partial=True lets "
                "queries attend to all of them"
            )
        many = min(k, len(known))
        degree.append(np.full(len(asked), many))
        if many:
            kept = _first_of_a_place(known, many)
            best = kept[_nearest(known[kept], asked, many)]
            cols.append(np.sort(best, axis=1).ravel() + first)
    return space.graph(degree, cols)


def radius(
    points: Tensor,
    r: float,
    *,
    most: int | None = None,
    queries: Tensor | None = None,
    offsets: Tensor | None = None,
    query_offsets: Tensor | None = None,
) -> Graph:
    """Every query attends to all points within r of it; without queries, every point does.

    The edges are ``{(i, j): |x_i - y_j|^2 <= r^2}`` within each graph, in float64. With ``most``,
    only the nearest are kept, in the order of :func:`knn`: ``sum_i min(c_i, most)`` edges, with c_i
    points within reach of i. The pattern is symmetric without ``most`` and queries. A query may
    have no edge.

    Computed on the CPU, by scipy's k-d tree, in memory linear in the pairs within reach.

    Args:
        points: ``[N, dimensions]``.
        r: Finite, 0 or more.
        most: Edges of a query at most, 0 or more; None for all.
        queries, offsets, query_offsets: As for :func:`knn`.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named.

    Source:
        Qi et al., PointNet++, arXiv 1706.02413, section 3.2.

    Example:
        >>> import torch
        >>> from fastgt.patterns import radius
        >>> radius(torch.tensor([[0.0], [1.0], [3.0]]), 2.0).col.tolist()
        [0, 1, 0, 1, 2, 1, 2]
        >>> radius(torch.tensor([[0.0], [1.0], [3.0]]), 2.0, most=1).col.tolist()
        [0, 1, 2]
    """
    r = number("r", r)
    if not 0 <= r < math.inf:
        raise ValueError(f"r must be finite and not negative, got {r}")
    most = None if most is None else integer("most", most, 0)
    space = _space(points, queries, offsets, query_offsets)
    degree, cols = [], []
    for known, asked, first in space.graphs():
        row, col, distance = _within(known, asked, r)
        if most is not None:
            order = np.lexsort((col, distance, row))
            row, col = row[order], col[order]
            count = np.bincount(row, minlength=len(asked))
            rank = np.arange(len(row)) - (np.cumsum(count) - count)[row]
            row, col = row[rank < most], col[rank < most]
        degree.append(np.bincount(row, minlength=len(asked)))
        cols.append(col[np.lexsort((col, row))] + first)
    return space.graph(degree, cols)


def balls(
    points: Tensor, size: int, *, offsets: Tensor | None = None, partial: bool = False
) -> Graph:
    """Leaves of a ball tree, all of the same size; inside a leaf all attend to all.

    The points of a graph are cut in two, each part again, until a part has ``size`` points. A part
    of b leaves is cut along the axis on which its points spread the most, the first of several. Its
    first ``ceil(b / 2)`` leaves get the points with the lowest coordinates, and where these are
    equal the lowest numbers. The edges are ``{(i, j): i and j are in one leaf}``, as many as those
    of :func:`sets`. The pattern is symmetric.

    Computed on the CPU, in O(N log^2 N).

    Args:
        points: ``[N, dimensions]``.
        size: Points of a leaf, 1 at least.
        offsets: ``[G + 1]`` boundaries of a batch.
        partial: Let the last leaf of a graph be smaller. If not, ``size`` has to divide the points
            of each graph.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named, with both numbers.

    Source:
        Zhdanov et al., Erwin, arXiv 2502.17019, section 3.1, where points are a power of 2 times
        ``size``, after padding.

    Example:
        >>> import torch
        >>> from fastgt.patterns import balls
        >>> balls(torch.tensor([[5.0], [1.0], [4.0], [2.0]]), 2).col.view(4, 2).tolist()
        [[0, 2], [1, 3], [0, 2], [1, 3]]
    """
    size = integer("size", size, 1)
    place = _checked("points", points)
    ptr = parts(offsets, len(place), points.device, "offsets")
    if not partial:
        check_divides(size, ptr)
    order = torch.from_numpy(_ball_order(place, size, ptr.cpu().numpy()))
    return sets(order.to(points.device), size, offsets=ptr, partial=partial)


class _Space(NamedTuple):
    """Points and queries of a batch, as float64 arrays, with their boundaries."""

    points: np.ndarray
    queries: np.ndarray
    point_ptr: Tensor
    query_ptr: Tensor
    square: bool

    def graphs(self) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Of each graph: its points, its queries and the number of its first point."""
        p, q = self.point_ptr.tolist(), self.query_ptr.tolist()
        for g in range(len(p) - 1):
            yield self.points[p[g] : p[g + 1]], self.queries[q[g] : q[g + 1]], p[g]

    def graph(self, degree: list[np.ndarray], cols: list[np.ndarray]) -> Graph:
        empty = np.zeros(0, dtype=np.int64)
        rows = torch.from_numpy(np.concatenate([empty, *degree]))
        col = torch.from_numpy(np.concatenate([empty, *cols]))
        device = self.point_ptr.device
        ends = None if self.square else self.point_ptr
        return from_rows(rows.to(device), col.to(device), self.query_ptr, ends)


def _space(
    points: Tensor, queries: Tensor | None, offsets: Tensor | None, query_offsets: Tensor | None
) -> _Space:
    known = _checked("points", points)
    point_ptr = parts(offsets, len(known), points.device, "offsets")
    if queries is None:
        if query_offsets is not None:
            raise ValueError("query_offsets needs queries, which is None")
        return _Space(known, known, point_ptr, point_ptr, True)
    asked = _checked("queries", queries)
    if queries.device != points.device:
        raise ValueError(f"queries is on {queries.device} but points is on {points.device}")
    if asked.shape[1] != known.shape[1]:
        raise ValueError(f"queries has {asked.shape[1]} dimensions but points has {known.shape[1]}")
    if (offsets is None) != (query_offsets is None):
        missing = "query_offsets" if query_offsets is None else "offsets"
        raise ValueError(f"offsets and query_offsets go together, but {missing} is None")
    query_ptr = parts(query_offsets, len(asked), points.device, "query_offsets")
    if len(query_ptr) != len(point_ptr):
        raise ValueError(
            f"offsets are of {len(point_ptr) - 1} graphs but query_offsets of {len(query_ptr) - 1}"
        )
    return _Space(known, asked, point_ptr, query_ptr, False)


def _checked(name: str, points: Tensor) -> np.ndarray:
    """``[N, dimensions]`` numbers whose distances are finite, in float64."""
    check_float(name, points)
    if points.ndim != 2 or points.shape[1] == 0:
        raise ValueError(f"{name} must be [N, dimensions], got {list(points.shape)}")
    found = points.detach().cpu().double().numpy()
    wrong = np.argwhere(~np.isfinite(found))
    if len(wrong):
        i, a = wrong[0].tolist()
        raise ValueError(f"{name} must be finite, got {found[i, a]} at [{i}, {a}]")
    wrong = np.argwhere(np.abs(found) > _FARTHEST)
    if len(wrong):
        i, a = wrong[0].tolist()
        raise ValueError(
            f"{name} must be from -{_FARTHEST:g} to {_FARTHEST:g}, got {found[i, a]:g} at "
            f"[{i}, {a}]"
        )
    return found


def _first_of_a_place(points: np.ndarray, k: int) -> np.ndarray:
    """The numbers of points, in order, but for those with k others before them in their place."""
    order = np.lexsort(points.T)  # stable: in a place by number
    place = points[order]
    begins = np.ones(len(points), dtype=bool)
    begins[1:] = (place[1:] != place[:-1]).any(1)
    at = np.arange(len(points))
    rank = at - np.maximum.accumulate(np.where(begins, at, 0))
    return np.sort(order[rank < k])


def _nearest(known: np.ndarray, asked: np.ndarray, k: int) -> np.ndarray:
    """``[M, k]``, the numbers of the nearest points, in any order."""
    from scipy.spatial import cKDTree

    tree, more = cKDTree(known), min(k + 1, len(known))
    distance, found = _ask(tree, asked, more)
    if more == k:
        return found
    best = found[:, :k].copy()
    # where the next one is as far as the last, the tree does not say which of them it gives
    tied = np.flatnonzero(distance[:, k - 1] == distance[:, k])
    while len(tied):
        more = min(2 * more, len(known))
        left = []
        for part in np.array_split(tied, -(-len(tied) * more // _ROOM)):
            distance, found = _ask(tree, asked[part], more)
            order = np.lexsort((found, distance), axis=1)[:, :k]
            best[part] = np.take_along_axis(found, order, axis=1)
            if more < len(known):
                left.append(part[distance[:, k - 1] == distance[:, -1]])
        tied = np.concatenate(left) if left else tied[:0]
    return best


def _ask(tree: cKDTree, asked: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and numbers of the k nearest, ``[M, k]``, the nearest first."""
    distance, found = tree.query(asked, k)
    return distance.reshape(len(asked), k), found.reshape(len(asked), k)


def _within(
    known: np.ndarray, asked: np.ndarray, r: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and distances of all pairs that are not farther than r."""
    from scipy.spatial import cKDTree

    if not len(known) or not len(asked):
        none = np.zeros(0, dtype=np.int64)
        return none, none, np.zeros(0)
    pairs = cKDTree(asked).sparse_distance_matrix(cKDTree(known), r, output_type="ndarray")
    return pairs["i"], pairs["j"], pairs["v"]


def _ball_order(points: np.ndarray, size: int, ptr: np.ndarray) -> np.ndarray:
    """``[N]``, the points of each graph, leaf after leaf."""
    order = np.arange(len(points))
    start = ptr[:-1][np.diff(ptr) > 0]
    count = np.diff(ptr)[np.diff(ptr) > 0]
    leaves = -(-count // size)
    while leaves.max(initial=1) > 1:
        part = np.repeat(np.arange(len(start)), count)
        at = points[order]
        spread = np.maximum.reduceat(at, start) - np.minimum.reduceat(at, start)
        key = np.take_along_axis(at, spread.argmax(1)[part, None], 1)[:, 0]
        order = order[np.lexsort((order, key, part))]
        first, rest = leaves - leaves // 2, leaves // 2
        taken = np.minimum(first * size, count)
        both = np.stack([taken, count - taken], 1).ravel()
        start = np.stack([start, start + taken], 1).ravel()[both > 0]
        leaves = np.stack([first, rest], 1).ravel()[both > 0]
        count = both[both > 0]
    return order

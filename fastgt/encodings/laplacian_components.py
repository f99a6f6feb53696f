"""Eigenpairs of the Laplacians of a batch, from those of its connected components."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastgt.encodings.lanczos import lowest

if TYPE_CHECKING:
    import scipy.sparse as sp

_DENSE = 512  # nodes up to which numpy.linalg.eigh is as fast as Lanczos
_STACK = 1 << 22  # entries of a stack of dense matrices
_HOPS = 8


@dataclass(frozen=True)
class Components:
    """Connected components, in an order that does not depend on the numbers of the nodes.

    Lowest eigenvalue first, then most nodes, largest volume, a hash of the surroundings of its
    nodes. Components that nothing of this tells apart are a group.

    Attributes:
        nodes: ``[N]``, those of a component together.
        ptr: ``[C + 1]``, where a component's nodes begin.
        label: ``[N]``, the component of a node.
        graph: ``[C]``
        lowest: ``[C]``, the lowest eigenvalue.
        volume: ``[C]``, the sum of squares of its vector.
        group: ``[C]``, numbered in order.
        member: ``[C]``, the place in the group, by the first node.
        members: ``[C]``, of its group.
    """

    nodes: np.ndarray
    ptr: np.ndarray
    label: np.ndarray
    graph: np.ndarray
    lowest: np.ndarray
    volume: np.ndarray
    group: np.ndarray
    member: np.ndarray
    members: np.ndarray


class _Block(NamedTuple):
    """Pairs of components of n nodes each, but the lowest."""

    which: np.ndarray  # [B]
    values: np.ndarray  # [B, J]
    vectors: np.ndarray  # [B, n, J]


def batch_eigenpairs(
    a: sp.csr_array, graph_ptr: np.ndarray, k: int, *, normalized: bool, skip: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenpairs skip to skip + k - 1 of every graph -> vectors, values, which of them exist.

    Args:
        a: ``[N, N]``, symmetric, without entries between graphs.
        graph_ptr: ``[G + 1]``
        k: Pairs of a graph.
        normalized: ``I - D^-1/2 A D^-1/2`` with D clipped at 1, or ``D - A``.
        skip: How many of the lowest are left out.

    Returns:
        ``[N, k]`` and ``[G, k]`` float32, 0 where there is no pair; ``[G, k]`` bool.
    """
    import scipy.sparse as sp

    n, num_graphs = a.shape[0], len(graph_ptr) - 1
    vectors = np.zeros((n, k), np.float32)
    values, there = np.zeros((num_graphs, k), np.float32), np.zeros((num_graphs, k), bool)
    if n == 0 or k == 0:
        return vectors, values, there
    graph_of = np.repeat(np.arange(num_graphs), np.diff(graph_ptr))
    degree = a.sum(axis=1)
    mass = degree.clip(1) if normalized else np.ones(n)
    root = np.sqrt(mass)
    colours = _colours(a)
    parts = _components(a, graph_of, mass, colours, normalized)
    bound = np.full(num_graphs, 2.0)
    if normalized:
        laplacian = sp.eye_array(n) - sp.diags_array(1 / root) @ a @ sp.diags_array(1 / root)
    else:
        laplacian = sp.diags_array(degree) - a
        np.maximum.at(bound, graph_of, 2 * degree)
    # no more pairs above 0 than there is room for
    zeros = np.bincount(parts.graph[parts.lowest == 0], minlength=num_graphs)
    count = np.minimum((k + skip - zeros)[parts.graph], np.diff(parts.ptr) - 1).clip(0)
    blocks = _blocks(sp.csr_array(laplacian), parts, count, root, colours, bound)

    value = np.concatenate([parts.lowest, *(x.values.ravel() for x in blocks)])
    owner = [np.repeat(x.which, x.values.shape[1]) for x in blocks]
    which = np.concatenate([np.arange(len(parts.graph)), *owner])
    index = np.concatenate(
        [parts.member, *(np.tile(np.arange(x.values.shape[1]), len(x.which)) for x in blocks)]
    )
    upper = np.arange(len(value)) >= len(parts.graph)
    column = _columns(value, parts.graph[which], upper, parts.group[which], index, bound) - skip
    column[(column >= k) | (upper & (index >= count[which]))] = -1
    kept = column >= 0
    values[parts.graph[which[kept]], column[kept]] = value[kept].clip(0)
    there[parts.graph[which[kept]], column[kept]] = True
    _write_lowest(vectors, parts, graph_of, root, column[: len(parts.graph)])
    done = len(parts.graph)
    for block in blocks:
        place = column[done : done + block.values.size].reshape(block.values.shape)
        done += block.values.size
        rows = parts.ptr[block.which][:, None] + np.arange(block.vectors.shape[1])  # [B, n]
        for j, to in enumerate(place.T):
            some = to >= 0
            vectors[parts.nodes[rows[some]], to[some][:, None]] = block.vectors[some, :, j]
    return vectors, values, there


def _columns(
    value: np.ndarray,
    graph: np.ndarray,
    upper: np.ndarray,
    group: np.ndarray,
    index: np.ndarray,
    bound: np.ndarray,
) -> np.ndarray:
    """The rank of every pair in its graph.

    Values that rounding may have parted are equal: among those, the lowest pairs of components
    come first, then the order of the components decides.
    """
    by_value = np.lexsort((value, graph))
    v, g = value[by_value], graph[by_value]
    apart = np.diff(v, prepend=0) > 1e-10 * abs(v) + 1e-13 * bound[g]
    cluster = np.empty(len(v), np.int64)
    cluster[by_value] = np.cumsum(apart | (np.diff(g, prepend=-1) != 0))
    order = np.lexsort((index, group, upper, cluster))
    first = np.searchsorted(g, np.arange(len(bound)))  # graph ascends in both orders
    rank = np.empty(len(v), np.int64)
    rank[order] = np.arange(len(v)) - first[graph[order]]
    return rank


def _colours(a: sp.csr_array) -> np.ndarray:
    """``[N]`` uint64: a hash of what a node's surroundings look like, up to 8 hops away.

    Refinement of colours (Weisfeiler and Lehman): a node's new colour is made of its own and of
    the sum of its neighbours'. Whole numbers, so that no order of summation changes it.
    """
    import scipy.sparse as sp

    counts = sp.csr_array((a.data.astype(np.uint64), a.indices, a.indptr), shape=a.shape)
    colour = np.ones(a.shape[0], np.uint64)
    for _ in range(_HOPS):
        colour = _mixed(_mixed(colour) + counts @ colour)
    return colour


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _components(
    a: sp.csr_array,
    graph_of: np.ndarray,
    mass: np.ndarray,
    colours: np.ndarray,
    normalized: bool,
) -> Components:
    from scipy.sparse.csgraph import connected_components

    label = connected_components(a, directed=False)[1]
    nodes = np.argsort(label, kind="stable")
    sizes = np.bincount(label)
    ptr = np.append(0, np.cumsum(sizes))
    graph = graph_of[nodes[ptr[:-1]]]
    edges = np.add.reduceat(np.diff(a.indptr)[nodes], ptr[:-1])
    least = ((edges == 0) & normalized).astype(np.float64)
    volume = np.add.reduceat(mass[nodes], ptr[:-1])  # whole numbers, so that equal ones are
    code = np.add.reduceat(_mixed(colours)[nodes], ptr[:-1])
    keys = (code, -volume, -sizes, least, graph)
    order = np.lexsort(keys)
    new = np.zeros(len(order), bool)
    for key in keys:
        new[1:] |= key[order][1:] != key[order][:-1]
    group, member = np.empty_like(order), np.empty_like(order)
    group[order] = np.cumsum(new)
    first = np.flatnonzero(np.append(True, new[1:]))
    member[order] = np.arange(len(order)) - first[group[order]]
    members = np.bincount(group)[group]
    return Components(nodes, ptr, label, graph, least, volume, group, member, members)


def _write_lowest(
    vectors: np.ndarray,
    parts: Components,
    graph_of: np.ndarray,
    root: np.ndarray,
    column: np.ndarray,
) -> None:
    """The lowest pairs of components: with v = root on one of them, and 0 on the others,

        u_0 = sum_i v_i / c,    u_j = (j v_j - sum_{i<j} v_i) / c

    over the members of a group, normalised. All members have the same norm.
    """
    k = vectors.shape[1]
    for q in range(k):
        at = np.flatnonzero(column == q)  # one component a graph at most stands for the pair
        pair = np.full(graph_of[-1] + 1, -1)
        pair[parts.graph[at]] = at
        of_node = pair[graph_of]
        own = parts.group[parts.label] == np.where(of_node >= 0, parts.group[of_node], -1)
        some = np.flatnonzero(own)
        part, j = parts.label[some], parts.member[of_node[some]]
        i = parts.member[part]
        share = np.select([j == 0, i < j, i == j], [1.0, -1.0, j], 0.0)
        norm = np.sqrt(np.where(j == 0, parts.members[part], j * (j + 1)) * parts.volume[part])
        vectors[some, q] = share * root[some] / norm


def _blocks(
    laplacian: sp.csr_array,
    parts: Components,
    count: np.ndarray,
    root: np.ndarray,
    colours: np.ndarray,
    bound: np.ndarray,
) -> list[_Block]:
    """Pairs above the lowest of all components that have any, those of equal size together."""
    sizes = np.diff(parts.ptr)
    apart = len(sizes) > 1
    inner = laplacian[parts.nodes][:, parts.nodes] if apart else laplacian
    root, weight = root[parts.nodes], (colours[parts.nodes] >> np.uint64(11)) / 2.0**53
    dense = (count > 0) & (sizes <= np.maximum(_DENSE, 4 * count))
    blocks = []
    for n in np.unique(sizes[dense]).tolist():
        same = np.flatnonzero(dense & (sizes == n))
        for some in np.array_split(same, -(-len(same) * n * n // _STACK)):
            rows = parts.ptr[some][:, None] + np.arange(n)  # [B, n]
            trivial = root[rows] / np.sqrt(parts.volume[some])[:, None]
            # the trivial vector, moved beyond all others, cannot mix with a tiny gap
            beyond = trivial * np.sqrt(bound[parts.graph[some]] + 1)[:, None]
            stack = _stack(inner, parts.ptr[some], n) + beyond[:, :, None] * beyond[:, None]
            w, u = np.linalg.eigh(stack)
            most = int(count[some].max())
            blocks.append(_Block(some, w[:, :most], _oriented(u[:, :, :most], weight[rows])))
    for c in np.flatnonzero((count > 0) & ~dense).tolist():
        start, end, g = int(parts.ptr[c]), int(parts.ptr[c + 1]), int(parts.graph[c])
        trivial = root[start:end] / np.sqrt(parts.volume[c])
        part = inner[start:end, start:end] if apart else inner
        try:
            value, vector = lowest(part, trivial, float(bound[g]), int(count[c]))
        except (RuntimeError, MemoryError) as error:
            raise RuntimeError(
                f"no convergence in graph {g}, in a component of {end - start} nodes,"
                f" for {count[c]} eigenpairs"
            ) from error
        u = _oriented(vector[None], weight[None, start:end])
        blocks.append(_Block(np.array([c]), value[None], u))
    return blocks


def _stack(laplacian: sp.csr_array, start: np.ndarray, n: int) -> np.ndarray:
    """``[B, n, n]``: the diagonal blocks of n rows from each of ``start [B]``."""
    dense = np.zeros((len(start), n, n))
    rows = (start[:, None] + np.arange(n)).ravel()
    lengths = np.diff(laplacian.indptr)[rows]
    before = np.cumsum(lengths) - lengths
    at = np.repeat(laplacian.indptr[rows] - before, lengths) + np.arange(lengths.sum())
    row = np.repeat(np.arange(len(rows)), lengths)
    dense.reshape(-1, n)[row, laplacian.indices[at] - start[row // n]] = laplacian.data[at]
    return dense


def _oriented(u: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """``u [B, n, J]`` with signs that do not depend on the numbers of nodes, where any can.

    Of u and -u the one whose sorted entries are larger, at the first that differs; or those times
    ``weight [B, n]``, where u has every entry with both signs; or else the one whose first entry
    of largest magnitude is positive. Entries equal but for rounding are equal.
    """
    largest = abs(u).max(axis=1, keepdims=True)
    sign = _larger(u, largest)
    left = np.flatnonzero((sign == 0).any(axis=(1, 2)))
    if len(left):
        some, top = u[left], largest[left]
        first = (abs(some) >= (1 - 1e-6) * top).argmax(axis=1)[:, None]
        by_number = np.sign(np.take_along_axis(some, first, 1))
        by_weight = _larger(some * weight[left, :, None], top)
        by_weight = np.where(by_weight == 0, by_number, by_weight)
        sign[left] = np.where(sign[left] == 0, by_weight, sign[left])
    return u * sign


def _larger(x: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """``[B, 1, J]``: 1 where sorted x is larger than sorted -x at the first difference, -1, 0."""
    ascending = np.sort(x, axis=1)
    more = ascending[:, ::-1] + ascending
    clear = abs(more) > 1e-6 * largest
    first = clear.argmax(axis=1)[:, None]
    return np.sign(np.take_along_axis(np.where(clear, more, 0), first, 1))

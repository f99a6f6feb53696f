"""Expanders as unions of permutations, drawn until they are good enough.

An expander of degree d is the union of d permutations s_p of a graph's nodes, walked both ways:
i - s_p(i). Every node has 2d edges of it. The first eigenvalue above 0 of its Laplacian is

    lambda_2 = 2d - mu_2,    mu_2 the second eigenvalue of A = sum_p P_p + P_p^T

and is 2d - 2 sqrt(2d - 1) at most for large graphs (Alon and Boppana). Permutations are drawn anew
where it is more than 0.1 below that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgt.ops.checks import integer
from fastgt.ops.segment_pool import segment_sum
from fastgt.philox import words

_COMPLETE = 10  # nodes up to which a graph gets all pairs
_HALF = _COMPLETE // 2  # of a complete graph's edges, those that each node has forwards
_STEPS = 100  # of Lanczos
_CUTS = 64  # of an interval at once, four times over


def draw_table(
    graph_ptr: Tensor, degree: int, cycles: bool, seed: int | Tensor, multiset: bool, tries: int
) -> Tensor:
    """The nodes that each node has an edge to, ``[N, max(degree, 5)]`` int64 on the CPU.

    Numbered within graphs, -1 for none; the way back is an edge too. Arguments are those of
    :func:`fastgt.models.expander_table`.
    """
    degree, tries = integer("degree", degree, 1), integer("tries", tries, 1)
    ptr = graph_ptr.long().cpu()
    with torch.device("cpu"):  # whatever torch.set_default_device says
        out = _drawn(ptr, degree, cycles, _seeds(seed, len(ptr) - 1), tries)
        return out if multiset else _simple(out, ptr)


def _drawn(ptr: Tensor, degree: int, cycles: bool, seeds: Tensor, tries: int) -> Tensor:
    """Permutations of large graphs, and all pairs of small ones: ``[N, max(degree, 5)]``."""
    sizes, n = ptr.diff(), int(ptr[-1])
    out = torch.full((n, max(degree, _HALF)), -1)
    small = sizes <= max(_COMPLETE, degree)
    best = torch.full((len(sizes),), -math.inf, dtype=torch.float64)
    bound = max(0.0, 2 * degree - 2 * math.sqrt(2 * degree - 1) - 0.1)
    pending = (~small).nonzero().flatten()
    for attempt in range(tries):
        if not len(pending):
            break
        places, offsets = _owned(ptr, pending)
        sigma = _permutations(seeds[pending], offsets, degree, attempt, cycles)
        value = 2 * degree - _second_eigenvalue(sigma, offsets)
        better = value > best[pending]
        count = offsets.diff()
        first = offsets[:-1].repeat_interleave(count)
        kept = better.repeat_interleave(count)
        out[places[kept], :degree] = (sigma - first).T[kept]
        best[pending] = torch.where(better, value, best[pending])
        pending = pending[best[pending] < bound]
    return _complete(out, ptr, small.nonzero().flatten())


def _seeds(seed: int | Tensor, graphs: int) -> Tensor:
    if not isinstance(seed, Tensor):
        return integer("seed", seed) + torch.arange(graphs)
    if seed.dtype != torch.int64 or seed.shape != (graphs,):
        raise ValueError(
            f"seed must be [G] = [{graphs}] int64, got {list(seed.shape)} {seed.dtype}"
        )
    return seed.cpu()


def _owned(ptr: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The nodes of the chosen graphs, and where each graph's begin among them."""
    start, count = ptr[chosen], ptr.diff()[chosen]
    offsets = torch.cat([count.new_zeros(1), count.cumsum(0)])
    shift = (start - offsets[:-1]).repeat_interleave(count)
    return torch.arange(int(offsets[-1])) + shift, offsets


def _permutations(
    seeds: Tensor, offsets: Tensor, degree: int, attempt: int, cycles: bool
) -> Tensor:
    """``[degree, N]``: permutations of the nodes of each graph, numbered through the batch."""
    local, key, graph_of = _places(offsets, seeds)
    where = local[None].expand(degree, -1)
    number = torch.arange(degree)[:, None].expand_as(where)
    random, *_ = words(key, where, torch.full_like(where, attempt), number)
    order = (graph_of << 32 | random).sort(dim=1, stable=True).indices
    if not cycles:
        return order
    # the node before each, the last before the first
    before = torch.arange(len(local)) - 1
    first = offsets[:-1][offsets.diff() > 0]
    before[first] = offsets[1:][offsets.diff() > 0] - 1
    return torch.empty_like(order).scatter_(1, order, order[:, before])


def _places(offsets: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By node: its number in its graph, that graph's seed, and that graph."""
    count = offsets.diff()
    graph_of = torch.arange(len(count)).repeat_interleave(count)
    return torch.arange(len(graph_of)) - offsets[graph_of], seeds[graph_of], graph_of


def _second_eigenvalue(sigma: Tensor, offsets: Tensor) -> Tensor:
    """mu_2 of each graph, ``[G]`` float64, by Lanczos off the constant vectors.

    From below: too low by 3e-4 in a graph of 50,000 nodes with degree 3, by less in smaller ones.
    """
    degree, n = sigma.shape
    count = offsets.diff()
    inverse = torch.empty_like(sigma).scatter_(1, sigma, torch.arange(n).expand_as(sigma))
    both = torch.cat([sigma, inverse])
    local, _, graph_of = _places(offsets, count)

    def sums(x: Tensor) -> Tensor:
        return segment_sum(x, offsets)

    def centred(x: Tensor) -> Tensor:
        return x - (sums(x) / count)[graph_of]

    # the same start whatever else is in the batch
    random, *_ = words(torch.zeros(1, dtype=torch.int64), local, 0 * local, 0 * local)
    v = centred(random.double() / 2**32 - 0.5)
    v, before = v / sums(v * v).sqrt()[graph_of], torch.zeros_like(v)
    beta = torch.zeros(len(count), dtype=torch.float64)
    alphas, betas = [], []
    for _ in range(min(_STEPS, int(count.max()) - 1)):
        w = centred(v[both].sum(0)) - beta[graph_of] * before
        alpha = sums(v * w)
        w = w - alpha[graph_of] * v
        # where a graph's space is exhausted, nothing goes on, and what follows is below all else
        alphas.append(torch.where(sums(v * v) > 0.5, alpha, -2.0 * degree))
        beta = sums(w * w).sqrt()
        beta = torch.where(beta > 1e-10 * degree, beta, 0)
        betas.append(beta)
        before, v = v, torch.where(beta > 0, 1 / beta, 0)[graph_of] * w
    return _largest(torch.stack(alphas), torch.stack(betas)[:-1], 2.0 * degree)


def _largest(alpha: Tensor, beta: Tensor, bound: float) -> Tensor:
    """The largest eigenvalue of each tridiagonal matrix, ``[T, G]`` and ``[T - 1, G]`` -> ``[G]``.

    None is above x where all pivots of x - T are positive (Sturm).
    """
    # a graph in two parts has the bound itself
    low = torch.full_like(alpha[0], -1.01 * bound)
    high = -low
    cuts = torch.linspace(0, 1, _CUTS + 1, dtype=alpha.dtype)[:, None]
    for _ in range(4):
        x = low + cuts * (high - low)
        pivot = x - alpha[0]
        above = pivot > 0
        for a, b in zip(alpha[1:], beta, strict=True):
            pivot = x - a - b * b / torch.where(pivot == 0, 1e-300, pivot)
            above = above & (pivot > 0)
        first = above.to(torch.int64).argmax(0).clamp(min=1)
        low, high = (x.gather(0, at[None])[0] for at in (first - 1, first))
    return (low + high) / 2


def _complete(out: Tensor, ptr: Tensor, chosen: Tensor) -> Tensor:
    """All pairs of these graphs, each once: of node i, those to the half of the nodes after it."""
    places, offsets = _owned(ptr, chosen)
    local, size, _ = _places(offsets, offsets.diff())
    step = torch.arange(1, out.shape[1] + 1)
    last = (size[:, None] - 1) // 2
    # across an even circle the first half of the nodes has the pair
    across = (2 * step == size[:, None]) & (local[:, None] < step)
    there = (step <= last) | across
    out[places] = torch.where(there, (local[:, None] + step) % size[:, None].clamp(min=1), -1)
    return out


def _simple(out: Tensor, ptr: Tensor) -> Tensor:
    """Without self loops, and without edges that are there before, either way round."""
    n = len(out)
    count = ptr.diff()
    first = ptr[:-1].repeat_interleave(count)[:, None]
    node = torch.arange(n)[:, None]
    other = out + first
    key = torch.minimum(node, other) * n + torch.maximum(node, other)
    key = torch.where((out < 0) | (node == other), -1, key).flatten()
    ordered, at = key.sort(stable=True)
    again = torch.zeros_like(key, dtype=torch.bool)
    again[at[1:]] = ordered[1:] == ordered[:-1]
    return out.masked_fill((again | (key < 0)).view_as(out), -1)

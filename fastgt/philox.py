"""Random numbers that counters give. Which weights dropout keeps is a function of seed, edge and
head alone, so that it can be had again anywhere, in any order, by any rank, and is the same for
every implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 2**24  # dropout probabilities are multiples of 1 / LEVELS
_CHUNK = 2**16  # counters at a time: what stays in a core's cache
_LOW = 0xFFFFFFFF


class DropoutSeed(NamedTuple):
    """A seed of dropout for edges or heads that are some of a larger call's: head h of edge e is
    dropped as head ``first_head + h`` of edge ``edge_numbers[e]`` of that call is.

    Attributes:
        seed: As ``dropout_seed`` alone: an int, one int64, or None to draw one.
        edge_numbers: ``[E]`` int64, none below 0: by which dropout knows the edges; None: by their
            own numbers.
        first_head: From 0 to 2^31 - 1.

    Example:
        >>> import torch
        >>> from fastgt import DropoutSeed, Graph, neighborhood_attention
        >>> whole = Graph.from_edge_index(torch.tensor([[1, 0, 2, 1], [0, 1, 1, 2]]))
        >>> q, k, v = torch.randn(3, 3, 4, 16)
        >>> out = neighborhood_attention(q, k, v, whole, dropout_p=0.5, dropout_seed=7)
        >>> part = Graph.from_edge_index(torch.tensor([[0, 2], [0, 0]]), (1, 3))  # of row 1
        >>> seed = DropoutSeed(7, torch.tensor([1, 2]))
        >>> row = neighborhood_attention(q[1:2], k, v, part, dropout_p=0.5, dropout_seed=seed)
        >>> torch.equal(row, out[1:2])
        True
    """

    seed: int | Tensor | None
    edge_numbers: Tensor | None = None
    first_head: int = 0


class PairDropoutSeed(NamedTuple):
    """A seed of dropout for pairs or heads that are some of a larger call's: head h of the pair of
    query i and key j is dropped as head ``first_head + h`` of pair ``query_numbers[i] +
    key_numbers[j]`` of that call is.

    Attributes:
        seed: As ``dropout_seed`` alone: an int, one int64, or None to draw one.
        query_numbers: ``[N]`` int64, none below 0; None, as key_numbers: pairs have their own.
        key_numbers: ``[M]`` int64, none below 0.
        first_head: From 0 to 2^31 - 1.

    Example:
        >>> import torch
        >>> from fastgt import PairDropoutSeed, global_attention
        >>> q, k, v = torch.randn(3, 5, 4, 16)
        >>> out = global_attention(q, k, v, dropout_p=0.5, dropout_seed=7)
        >>> seed = PairDropoutSeed(7, torch.tensor([10]), torch.arange(5))  # of query 2
        >>> ends = torch.tensor([0, 5])
        >>> row = global_attention(
        ...     q[2:3], k, v, key_offsets=ends, dropout_p=0.5, dropout_seed=seed
        ... )
        >>> torch.allclose(row, out[2:3], atol=1e-6)
        True
    """

    seed: int | Tensor | None
    query_numbers: Tensor | None = None
    key_numbers: Tensor | None = None
    first_head: int = 0


def threshold(p: float) -> int:
    """A weight is kept where its 24 random bits are not below this."""
    return round(p * LEVELS)


def kept(
    seed: Tensor,
    edges: int,
    heads: int,
    p: float,
    *,
    first: int = 0,
    numbers: Tensor | None = None,
    first_head: int = 0,
) -> Tensor:
    """-> ``[E, H]`` bool: head h of edge e is kept with probability 1 - p. The edges are those of
    ``numbers [E]`` int64, or those from number ``first`` on. Heads count from ``first_head`` on.

    Word ``h % 4`` of Philox-4x32-10 at the counter ``(e mod 2^32, e // 2^32, h // 4, 0)`` with the
    64 bits of ``seed`` as its key; its upper 24 bits are compared.

    Source:
        Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011, section 4.3.
    """
    before, within = first_head // 4, first_head % 4
    blocks = -(-(within + heads) // 4)
    limit, step = threshold(p), max(1, _CHUNK // max(1, blocks))
    block = torch.arange(before, before + blocks, device=seed.device)

    def part(start: int, stop: int) -> Tensor:
        if numbers is None:
            edge = torch.arange(first + start, first + stop, device=seed.device)
        else:
            edge = numbers[start:stop]
        edge = edge[:, None].expand(-1, blocks)
        found = words(seed, edge & _LOW, edge >> 32, block.expand_as(edge))
        bits = torch.stack([(word >> 8) >= limit for word in found], 2).flatten(1)
        return bits[:, within : within + heads]

    # a compiler would unroll a loop, for one number of edges
    if torch.compiler.is_compiling() or edges <= step:
        return part(0, edges)
    starts = range(0, edges, step)
    return torch.cat([part(start, min(start + step, edges)) for start in starts])


def words(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> tuple[Tensor, ...]:
    """Four words of 32 bits, each in an int64, of a key or of one for each counter; the fourth
    counter is 0."""
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # products of 64 bits, wrapped to signed ones
        c0, c2 = ((b >> 32) & _LOW) ^ c1 ^ k0, ((a >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = b & _LOW, a & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3

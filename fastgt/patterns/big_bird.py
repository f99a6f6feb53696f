"""BigBird's pattern of blocks: global ones, neighbours, and some that are drawn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastgt.graph import Graph
from fastgt.ops.checks import check_generator, integer
from fastgt.patterns.build import boundaries, from_blocks


def big_bird(
    n: int | Tensor,
    block: int,
    *,
    window: int = 3,
    globals: int = 1,
    random: int = 3,
    generator: torch.Generator | None = None,
    graphs: int = 1,
) -> Graph:
    """Blocks of consecutive nodes attend to global blocks, to those around them and to drawn ones.

    Let ``b(i)`` be the block of node i. Of the B blocks of a graph the first ``globals`` and the
    last ``globals`` are global. The edges are::

        {(i, j): b(i) or b(j) is global, or |b(i) - b(j)| <= (window - 1) / 2, or b(j) in R_b(i)}

    ``R_b`` are ``random`` distinct blocks of those left, or all of them if fewer are left. Let all
    B blocks be whole, g of them global, and let c_b be how many of the others are around block b,
    itself among them. Then there are ``block^2 (g B + sum_b (g + c_b + min(random, B - g - c_b)))``
    edges, where the sum is over blocks that are not global: at most
    ``n block (2 g + window + random)`` for n nodes.
    The pattern is symmetric where ``random`` is 0.

    Which blocks are drawn depends on the generator, on the place of a block and on B alone: equal
    graphs of a batch are equal. The pattern has no tokens beside the nodes: :func:`global_tokens`
    adds some.

    Args:
        n: Nodes of a graph, or ``[G + 1]`` boundaries of a batch.
        block: Nodes of a block; the last of a graph may be smaller.
        window: Blocks that one attends to around it, itself among them: an odd number.
        globals: Global blocks at each end of a graph, 0 or more.
        random: Blocks that are drawn for a block, 0 or more.
        generator: On the CPU. The same state gives the same pattern. None takes PyTorch's own.
        graphs: How many graphs of n nodes the batch has.

    Raises:
        TypeError, ValueError: An argument does not fit; it is named.

    Source:
        Zaheer et al., Big Bird: Transformers for Longer Sequences, arXiv 2007.14062, section 2.

    Example:
        >>> import torch
        >>> from fastgt.patterns import big_bird
        >>> pattern = big_bird(60, 3, generator=torch.Generator().manual_seed(0))
        >>> pattern.row_degree[::15].tolist()
        [60, 24, 24, 24]
    """
    offsets, window = boundaries(n, graphs), integer("window", window, 1)
    if window % 2 == 0:
        raise ValueError(f"window must be odd, got {window}")
    check_generator(generator)
    block, ends = integer("block", block, 1), integer("globals", globals, 0)
    random = integer("random", random, 0)
    # without blocks to draw the generator is left as it is
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu")) if random else 0
    return blocks_pattern(offsets, block, window // 2, ends, random, seed)


def blocks_pattern(
    offsets: Tensor, block: int, side: int, ends: int, random: int, seed: int
) -> Graph:
    """The pattern of a batch: ``side`` blocks on each side, ``ends`` global ones at each end.

    Every place of a block and every number of blocks has blocks drawn by ``seed``.
    """
    counts = -(-offsets.diff() // block)  # [G]
    # more than there are blocks says no more, and takes no more memory
    most = int(counts.max()) if len(counts) else 0
    side, ends, random = (min(x, most) for x in (side, ends, random))
    before = counts.cumsum(0) - counts
    total = int(counts.sum())
    owner = torch.arange(len(counts), device=offsets.device)
    owner = owner.repeat_interleave(counts, output_size=total)
    place, count = torch.arange(total, device=offsets.device) - before[owner], counts[owner]
    first = offsets[owner] + place * block
    ptr = torch.cat([first, offsets[-1:]])
    row, col = _pairs(place, count, side, ends, _drawn(place, count, side, ends, random, seed))
    col = col + (before[owner])[row]
    order = (row * max(total, 1) + col).argsort()
    return from_blocks(row[order], col[order], ptr, ptr, offsets, None)


def _pairs(
    place: Tensor, count: Tensor, side: int, ends: int, drawn: Tensor
) -> tuple[Tensor, Tensor]:
    """Blocks numbered over the batch -> those that attend, and the places of what each attends to.

    place, count ``[B]``; drawn ``[B, random]``, -1 for none.
    """
    outer = (place < ends) | (place >= count - ends)
    whole = outer.nonzero()[:, 0]
    size = count[whole]
    row = whole.repeat_interleave(size)
    begin = (size.cumsum(0) - size).repeat_interleave(size)
    col = torch.arange(len(row), device=row.device) - begin
    i, last = place[~outer, None], count[~outer, None]
    end = torch.arange(ends, device=row.device)
    near = i + torch.arange(-side, side + 1, device=row.device)
    # the global blocks stand there already
    near = near.masked_fill((near < ends) | (near >= last - ends), -1)
    near = torch.cat([end.expand(len(i), -1), near, last - 1 - end, drawn[~outer]], 1)
    others = (~outer).nonzero()[:, 0][:, None].expand_as(near)
    there = near >= 0
    return torch.cat([row, others[there]]), torch.cat([col, near[there]])


def _drawn(place: Tensor, count: Tensor, side: int, ends: int, random: int, seed: int) -> Tensor:
    """``[B, random]`` places of distinct blocks out of sight of each block, -1 for none."""
    i = place
    left = (i - side - ends).clamp(min=0)
    size = left + (count - ends - side - 1 - i).clamp(min=0)  # how many can be drawn
    largest = int(count.max()) if len(count) else 0
    # numbers of a place do not depend on how many places follow
    uniform = np.random.Generator(np.random.PCG64(seed)).random((largest, random))
    chance = torch.from_numpy(uniform).to(place.device)[i]  # [B, random]
    none = largest + 1
    chosen = size.new_zeros(len(i), 0)
    for k in range(random):
        rank = (chance[:, k] * (size - k)).long()
        for other in chosen.unbind(1):  # ascending
            rank = rank + (rank >= other)
        rank = torch.where(k < size, rank, none)
        chosen = torch.cat([chosen, rank[:, None]], 1).sort(1).values
    after = chosen - left[:, None] + i[:, None] + side + 1
    place = torch.where(chosen < left[:, None], chosen + ends, after)
    return place.masked_fill(chosen == none, -1)

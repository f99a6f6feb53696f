"""Neighbours of seeds, drawn layer by layer: the blocks that a model of a large graph trains on."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastgt.cpu import graph_sample as cpu
from fastgt.graph_build import (
    Structure,
    check_device,
    check_index,
    check_range,
    check_square,
    index_dtype,
    single,
)

if TYPE_CHECKING:
    from fastgt.graph import Graph

# numbers a row up to which drawing them one after another is faster than sorting all candidates
FEW = 64
# nodes for each that is looked at, up to which a table of all of them is faster than a sort
DENSE = 16


class Sample(NamedTuple):
    """What :meth:`fastgt.Graph.sample` gives.

    Attributes:
        blocks: One for each layer, in the order in which layers run. Rows of a block are the first
            of its columns, and the columns of the next block. Rows of the last one are the seeds.
            Each draws for all of its rows anew. Those of a batch are one graph each.
        n_id: ``[N_cols]`` int64, the node that each column of the first block is.
        e_id: For each block ``[E]`` int64, the number in the whole graph of each of its edges.
    """

    blocks: tuple[Graph, ...]
    n_id: Tensor
    e_id: tuple[Tensor, ...]


def sample(
    graph: Structure,
    seeds: Tensor,
    fanouts: Sequence[int],
    generator: torch.Generator | None,
    replace: bool,
) -> tuple[list[Structure], Tensor, list[Tensor]]:
    """Blocks, the nodes of the first one's columns, and edges, from the inputs to the seeds."""
    if graph.col.is_meta:
        raise RuntimeError("a graph on the meta device has no edges to sample")
    check_square(graph, "sample()")
    counts = _checked_fanouts(fanouts)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    nodes = _checked_seeds(seeds, graph)
    blocks, edges = [], []
    for fanout in counts:
        row_ptr, col, number = _drawn(graph, nodes, fanout, generator, replace)
        rows = len(nodes)
        nodes, col = _numbered(nodes, col, graph.num_rows)
        dtype = index_dtype(rows, len(nodes), len(col))
        edge = torch.arange(len(col), dtype=dtype, device=col.device)
        blocks.append(single(rows, len(nodes), row_ptr.to(dtype), col.to(dtype), edge))
        edges.append(number)
    return blocks[::-1], nodes, edges[::-1]


def _drawn(
    graph: Structure, nodes: Tensor, fanout: int, generator: torch.Generator | None, replace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> where the edges of each node begin, the other end of each, and its number."""
    if (replace or fanout <= FEW) and cpu.can_draw(graph.row_ptr, nodes):
        walk = graph.row_ptr, graph.col, graph.edge
        return cpu.draw(walk, nodes, fanout, generator, replace)
    row_ptr, slot = _slots(graph.row_ptr, nodes, fanout, generator, replace)
    col, edge = (x.index_select(0, slot) for x in (graph.col, graph.edge))
    return row_ptr, col, edge.long()


def _slots(
    row_ptr: Tensor, nodes: Tensor, fanout: int, generator: torch.Generator | None, replace: bool
) -> tuple[Tensor, Tensor]:
    """-> where the drawn edges of each node begin, and their slots in the graph's row walk."""
    begin = row_ptr.index_select(0, nodes).long()
    degree = row_ptr.index_select(0, nodes + 1).long() - begin
    if fanout < 0:
        count, drawn = degree, torch.zeros_like(degree, dtype=torch.bool)
    elif replace:
        drawn = degree > 0
        count = drawn.long() * fanout
    else:
        drawn = degree > fanout
        count = degree.clamp(max=fanout)
    ptr = torch.cat([count.new_zeros(1), count.cumsum(0)])
    total = int(ptr[-1])
    # as if all edges of a node were taken, or its first ones
    shift = (begin - ptr[:-1]).repeat_interleave(count, output_size=total)
    slot = torch.arange(total, device=nodes.device) + shift
    row = drawn.nonzero().flatten()
    if len(row) and fanout:
        picks = _picks(degree[row], fanout, generator, replace)
        place = ptr[row] + torch.arange(fanout, device=row.device)[:, None]
        slot[place] = begin[row] + picks
    return ptr, slot


def _picks(degree: Tensor, fanout: int, generator: torch.Generator | None, replace: bool) -> Tensor:
    """``[fanout, R]`` numbers below the degree of each row, all different unless they may repeat.

    Few are drawn as Floyd does (Bentley and Floyd, A sample of brilliance, 1987): number k is below
    degree - fanout + k + 1, or is that bound if it was drawn before. Of many, every candidate gets
    a random number, and those with the smallest are taken.
    """

    def random(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=degree.device, dtype=torch.float64)

    if replace:
        return torch.minimum((random(fanout, len(degree)) * degree).long(), degree - 1)
    if fanout <= FEW:
        draws = random(fanout, len(degree))
        picks = torch.empty_like(draws, dtype=torch.int64)
        for k in range(fanout):
            last = degree - fanout + k
            pick = torch.minimum((draws[k] * (last + 1)).long(), last)
            picks[k] = torch.where((picks[:k] == pick).any(0), last, pick)
        return picks
    total = int(degree.sum())
    begin = degree.cumsum(0) - degree
    row = torch.arange(len(degree), device=degree.device)
    row = row.repeat_interleave(degree, output_size=total)
    # stable, for a sum that is rounded up to the next row stays in its own
    _, order = torch.sort(row + random(total), stable=True)
    return order[begin + torch.arange(fanout, device=degree.device)[:, None]] - begin


def _numbered(nodes: Tensor, col: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """-> ``nodes``, then those of ``col`` that are not among them, in order; ``col`` as places.

    ``col`` itself may be written to.
    """
    known = torch.arange(len(nodes), device=nodes.device)
    dense = num_nodes <= DENSE * (len(nodes) + len(col))
    if dense and cpu.can_draw(col, nodes):
        return cpu.renumber(nodes, col, num_nodes), col
    col = col.long()
    if dense:
        there = torch.zeros(num_nodes, dtype=torch.bool, device=nodes.device)
        there[col] = True
        there[nodes] = False
        new = there.nonzero().flatten()
        place = torch.empty(num_nodes, dtype=torch.int64, device=nodes.device)
        place[nodes] = known
        place[new] = torch.arange(len(new), device=nodes.device) + len(nodes)
        return torch.cat([nodes, new]), place.index_select(0, col)
    distinct, which = torch.unique(torch.cat([nodes, col]), return_inverse=True)
    place = torch.full_like(distinct, -1)
    place[which[: len(nodes)]] = known
    is_new = place < 0
    new = distinct[is_new]
    place[is_new] = torch.arange(len(new), device=nodes.device) + len(nodes)
    return torch.cat([nodes, new]), place.index_select(0, which[len(nodes) :])


def _checked_fanouts(fanouts: Sequence[int]) -> list[int]:
    if isinstance(fanouts, (int, str, Tensor)) or not hasattr(fanouts, "__len__"):
        raise TypeError(
            f"fanouts must be a sequence of ints, one a layer, got {type(fanouts).__name__}"
        )
    counts = []
    for i, x in enumerate(fanouts):
        if isinstance(x, bool) or not hasattr(x, "__index__"):
            raise TypeError(f"fanouts[{i}] must be an int, got {type(x).__name__}")
        counts.append(operator.index(x))
        if counts[-1] < -1:
            raise ValueError(f"fanouts[{i}] must be -1, for all edges, or more, got {counts[-1]}")
    if not counts:
        raise ValueError("fanouts must have an int for each layer, got none")
    return counts


def _checked_seeds(seeds: Tensor, graph: Structure) -> Tensor:
    check_index(seeds, "seeds")
    if seeds.ndim != 1:
        raise ValueError(f"seeds must be [S], got {list(seeds.shape)}")
    check_device(seeds, "seeds", graph.col.device, "the graph")
    check_range(seeds, graph.num_rows, "seeds", "nodes")
    seeds = seeds.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
    ordered = seeds.sort().values
    twice = ordered[1:] == ordered[:-1]
    if bool(twice.any()):
        raise ValueError(f"seeds has node {int(ordered[1:][twice][0])} more than once")
    return seeds

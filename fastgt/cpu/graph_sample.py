"""Neighbours of some nodes, drawn at random, on a CPU: ``graph_sample.cpp``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgt.cpu.graph import can_group
from fastgt.cpu.library import kernels


def can_draw(row_ptr: Tensor, nodes: Tensor) -> bool:
    """Whether there are kernels, and values that they can read: not while a call is traced."""
    return can_group(row_ptr, nodes)


def draw(
    walk: tuple[Tensor, Tensor, Tensor],
    nodes: Tensor,
    fanout: int,
    generator: torch.Generator | None,
    replace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> where the edges of each node begin, the other end of each, and its number.

    ``walk`` is the graph's ``row_ptr, col, edge``. All are int64, but for the other ends, which are
    in the graph's index type.
    """
    row_ptr, col, edge = (x.contiguous() for x in walk)
    nodes = nodes.contiguous()
    ptr, count = nodes.new_empty(len(nodes) + 1), nodes.new_empty(1)
    call = _Call(
        rows=len(nodes),
        fanout=fanout,
        replace=replace,
        wide=col.dtype == torch.int64,
        row_ptr=row_ptr,
        col=col,
        edge=edge,
        nodes=nodes,
        ptr=ptr,
        total=count,
    )
    _run("measure", call)
    edges, drawing = int(ptr[-1]), int(count)
    draws = None
    if drawing:
        shape = fanout, drawing
        draws = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float64)
    source, number = col.new_empty(edges), nodes.new_empty(edges)
    call = call._replace(edges=edges, drawing=drawing, draws=draws, source=source, number=number)
    _run("draw", call)
    return ptr, source, number


def renumber(nodes: Tensor, source: Tensor, num_nodes: int) -> Tensor:
    """-> ``nodes``, then those of ``source`` that are not among them, in order.

    ``source`` gets their places, and keeps its memory.
    """
    nodes = nodes.contiguous()
    found = nodes.new_empty(len(nodes) + min(len(source), num_nodes))
    count = nodes.new_empty(1)
    call = _Call(
        rows=len(nodes),
        edges=len(source),
        num_nodes=num_nodes,
        wide=source.dtype == torch.int64,
        nodes=nodes,
        source=source,
        total=count,
        seen=torch.empty(num_nodes, dtype=torch.uint8, device="cpu"),
        place=source.new_empty(num_nodes),
        found=found,
    )
    _run("renumber", call)
    return found[: int(count)].clone()  # what is beyond would stay in memory


class _Call(NamedTuple):
    """The fields of ``GraphSampleCall``; what a function does not read is absent."""

    rows: int
    edges: int = 0
    num_nodes: int = 0
    fanout: int = 0
    replace: bool = False
    drawing: int = 0
    wide: bool = False
    row_ptr: Tensor | None = None
    col: Tensor | None = None
    edge: Tensor | None = None
    nodes: Tensor | None = None
    ptr: Tensor | None = None
    draws: Tensor | None = None
    source: Tensor | None = None
    number: Tensor | None = None
    total: Tensor | None = None
    seen: Tensor | None = None
    place: Tensor | None = None
    found: Tensor | None = None


def _run(function: str, call: _Call) -> None:
    fields = (x.data_ptr() if isinstance(x, Tensor) else int(x or 0) for x in call)
    kernels().run("graph_sample", function, *fields)

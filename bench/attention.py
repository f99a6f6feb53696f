"""Neighbourhood attention against what users would otherwise run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgt import Graph, neighborhood_attention, plans, reference
from fastgt.bench import peer_paths, peers
from fastgt.bench.harness import Case, Provider
from fastgt.bench.roofline import Work, passes
from fastgt.testing import PROBLEMS

CHUNK = 2**28  # numbers of an [E, H, D] tensor that the definition may make


def case(
    problem: str,
    *,
    heads: int = 8,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    peer_path: Path | None = None,
    paths: Sequence[str] = (),
) -> Case:
    """Softmax over each node's edges, of queries, keys and values drawn at random. ``paths``:
    "gather", "windows" or "graphs", each a provider beside the one that chooses for itself."""
    graph = load(problem, device)
    rows, cols = (graph.num_rows, heads, width), (graph.num_cols, heads, width)
    q, k, v, do = draw([rows, cols, cols, rows], dtype, device)
    providers: dict[str, Callable[[], Provider]] = {
        "fastgt": lambda: Provider(lambda q, k, v: neighborhood_attention(q, k, v, graph))
    }
    for path in paths:
        providers[f"fastgt, {path}"] = lambda path=path: _planned(graph, path, width, dtype)
    for name, peer in peers.ATTENTION.items():
        providers[name] = lambda peer=peer: Provider(peer(graph))
    for name, found in peer_paths.ATTENTION.items() if peer_path else ():
        providers[name] = lambda found=found: Provider(found(graph, peer_path))
    return Case(
        shape=shape(problem, graph, heads, width, dtype),
        inputs={"q": q, "k": k, "v": v},
        upstream=do,
        definition=lambda dtype: Provider(functools.partial(_definition, graph=graph)),
        providers=providers,
        work=_work(graph, heads * width, heads, dtype.itemsize),
    )


def _planned(graph: Graph, path: Any, width: int, dtype: torch.dtype) -> Provider:
    height = None if path == "gather" else plans.tallest(width, dtype.itemsize)
    planned = graph.plan(path, height=height)
    return Provider(lambda q, k, v: neighborhood_attention(q, k, v, planned))


def load(problem: str, device: torch.device | str) -> Graph:
    """The graph, with the walk over columns that backwards take: made once for a graph."""
    graph = PROBLEMS[problem].load().to(device)
    graph.columns  # noqa: B018
    return graph


def draw(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device | str
) -> list[Tensor]:
    """Normal numbers, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*x, generator=generator).to(device, dtype) for x in shapes]


def shape(problem: str, graph: Graph, heads: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """The columns that say what was run."""
    return {
        "problem": problem,
        "rows": graph.num_rows,
        "edges": graph.num_edges,
        "graphs": graph.num_graphs,
        "heads": heads,
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "node_order": "as loaded",
    }


def _definition(q: Tensor, k: Tensor, v: Tensor, *, graph: Graph) -> Tensor:
    """The reference; of a large graph some rows at a time, recomputed in the backward."""
    size = max(1, CHUNK // (q.shape[1] * max(q.shape[2], v.shape[2])))  # edges
    if graph.num_edges <= size:
        return reference.neighborhood_attention(q, k, v, graph)
    ends = torch.arange(size, graph.num_edges, size, device=graph.device)
    cuts = torch.searchsorted(graph.row_ptr.long(), ends, right=True) - 1
    bounds = [0, *cuts.unique().tolist(), graph.num_rows]
    outs = []
    for begin, end in pairwise(bounds):
        if begin == end:
            continue
        first, last = graph.row_ptr[begin], graph.row_ptr[end]
        part = Graph.from_csr(
            graph.row_ptr[begin : end + 1] - first, graph.col[first:last], graph.num_cols
        )
        some = functools.partial(reference.neighborhood_attention, graph=part)
        outs.append(checkpoint(some, q[begin:end], k, v, use_reentrant=False))
    return torch.cat(outs)


def table_rows(graph: Graph) -> int:
    """Rows that edges point at while a kernel goes through them: those of the largest graph."""
    return int(graph.col_graph_ptr.diff().max()) if graph.num_graphs else 0


def _work(graph: Graph, channels: int, heads: int, item: int) -> dict[str, Work]:
    """q, k, v, o and the log-sum-exp once, and a row of k and v for every edge; backward also do
    and gradients, and for every edge a row of k and v once more, and one of q and do. The first
    row of k and v that an edge fetches is among those that move once."""
    nodes, edges = graph.num_rows + graph.num_cols, graph.num_edges
    index = graph.col.element_size() * (edges + graph.num_rows)
    stat = 4 * heads * graph.num_rows
    rows = 2 * nodes * channels * item
    row = channels * item
    table = 2 * table_rows(graph) * row
    by_row, by_column = (2 * max(0, edges - n) * row for n in (graph.num_cols, graph.num_rows))
    forward = Work(rows + stat + index, by_row, 4 * edges * channels, table, row)
    backward = Work(
        2 * rows + stat + 2 * index, by_row + by_column, 10 * edges * channels, table, row
    )
    return passes(forward, backward)

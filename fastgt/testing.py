"""Random graphs, named problems and the accuracy gate: what tests and benchmarks have in common."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from fastgt import drawn_graphs, published, real_graphs, tiles
from fastgt.graph import Graph
from fastgt.prepared import Prepared

Kind = Literal["uniform", "power_law", "hub"]


def random_edge_index(
    seed: int,
    rows: int,
    edges: int,
    *,
    cols: int | None = None,
    kind: Kind = "uniform",
    isolated: int = 0,
) -> Tensor:
    """Random edges, always the same ones for the same arguments.

    Self loops and duplicates occur, as they do in a multigraph.

    Args:
        seed: Of the generator.
        rows: Targets.
        edges: Number of edges; none are made where there is no row or no column left.
        cols: Sources; default ``rows``.
        kind: ``"uniform"``: both ends uniform. ``"power_law"``: the n-th most popular target is
            drawn with probability proportional to n^-0.75. ``"hub"``: half of the edges share
            one target, and half of all edges one source.
        isolated: So many rows, chosen at random, receive no edge.

    Returns:
        ``[2, E]`` int64 on the CPU, source above target.

    Example:
        >>> from fastgt.testing import random_edge_index
        >>> random_edge_index(0, 5, 9).shape
        torch.Size([2, 9])
    """
    generator = torch.Generator().manual_seed(seed)
    cols = rows if cols is None else cols
    targets = torch.randperm(rows, generator=generator)[max(isolated, 0) :]
    if not len(targets) or not cols or not edges:
        return torch.zeros(2, 0, dtype=torch.int64)
    source = torch.randint(cols, (edges,), generator=generator)
    if kind == "power_law":
        # through the inverse of the distribution: multinomial is limited to 2^24 categories
        share = torch.arange(1, len(targets) + 1, dtype=torch.float64).pow(-0.75).cumsum(0)
        point = torch.rand(edges, generator=generator, dtype=torch.float64) * share[-1]
        place = torch.searchsorted(share, point).clamp(max=len(targets) - 1)
    else:
        place = torch.randint(len(targets), (edges,), generator=generator)
    if kind == "hub":
        half = torch.rand(2, edges, generator=generator) < 0.5
        place[half[0]] = 0
        source[half[1]] = source[0].item()
    return torch.stack([source, targets[place]])


def random_graph(
    seed: int,
    rows: int,
    edges: int,
    *,
    cols: int | None = None,
    kind: Kind = "uniform",
    isolated: int = 0,
    device: torch.device | str = "cpu",
) -> Graph:
    """The graph of :func:`random_edge_index`; bipartite where ``cols`` is given.

    Example:
        >>> from fastgt.testing import random_graph
        >>> random_graph(0, 5, 9, kind="hub").num_edges
        9
    """
    edge_index = random_edge_index(seed, rows, edges, cols=cols, kind=kind, isolated=isolated)
    size = rows if cols is None else (rows, cols)
    return Graph.from_edge_index(edge_index.to(device), size)


def random_batch(
    seed: int, sizes: Sequence[tuple[int, int]], *, device: torch.device | str = "cpu"
) -> Graph:
    """A batch of uniform random graphs; ``sizes`` are their (nodes, edges), zeros welcome.

    Example:
        >>> from fastgt.testing import random_batch
        >>> random_batch(0, [(4, 9), (0, 0), (3, 5)]).num_graphs
        3
    """
    return Graph.batch(
        [random_graph(seed + i, n, e, device=device) for i, (n, e) in enumerate(sizes)]
    )


def with_index_dtype(graph: Graph, dtype: torch.dtype) -> Graph:
    """The same graph with its indices in ``dtype``: int64 as for a graph beyond 2^31."""
    graph_ptr = graph.graph_ptr.to(dtype)
    square = graph.graph_ptr is graph.col_graph_ptr
    return graph._replace(
        row_ptr=graph.row_ptr.to(dtype),
        col=graph.col.to(dtype),
        edge=graph.edge.to(dtype),
        graph_ptr=graph_ptr,
        col_graph_ptr=graph_ptr if square else graph.col_graph_ptr.to(dtype),
        prepared=Prepared(),
    )


def with_buckets(graph: Graph, few: int, segment: int) -> Graph:
    """The same graph, whose rows and columns are in buckets however few its edges are.

    Args:
        graph: Any.
        few: Edges up to which a row shares a program with others.
        segment: Edges of a row that one program takes.
    """
    rows, columns = (
        tiles.buckets(ptr, few, segment) or () for ptr in (graph.row_ptr, graph.columns.ptr)
    )
    prepared = replace(graph.prepared, row_buckets=rows, column_buckets=columns)
    return graph._replace(prepared=prepared)


@dataclass(frozen=True)
class Problem:
    """A graph with a name, loaded when asked for.

    Attributes:
        name: Its key in :data:`PROBLEMS`.
        load: Gives the :class:`fastgt.Graph`, on the CPU. Raises FileNotFoundError where the
            data is absent.
    """

    name: str
    load: Callable[[], Graph]


def _power_law() -> Graph:
    return random_graph(0, 20_000, 300_000, kind="power_law")


def _tiny() -> Graph:
    return random_batch(0, [(6, 14), (5, 9)])


def _molecules() -> Graph:
    return random_batch(0, [(23, 50)] * 128)


def _uniform(degree: int) -> Callable[[], Graph]:
    return lambda: random_graph(0, 2**14, degree << 14)


PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        Problem("power_law", _power_law),  # 20,000 nodes, 300,000 edges: the target on a CPU
        Problem("molecules", _molecules),  # as many and as large as a batch of ZINC
        Problem("pattern", drawn_graphs.pattern),  # a batch of 32 stochastic block models
        Problem("cluster", drawn_graphs.cluster),
        Problem("superpixels", drawn_graphs.superpixels),  # a batch of 32 images
        Problem("points", drawn_graphs.points),
        Problem("banded", drawn_graphs.banded),
        Problem("complete", drawn_graphs.complete),
        Problem("rmat", drawn_graphs.rmat(15)),  # directed, no duplicates, vertices as generated
        Problem("mesh", drawn_graphs.mesh),  # a Delaunay triangulation, nodes in random order
        # like those that speeds of GPU kernels are published on
        Problem("igb_small", published.igb_small),
        Problem("github", published.github),
        Problem("pascalvoc", published.pascalvoc),  # a batch of 1,024 images
        Problem("h_to_h", published.h_to_h),
        Problem("tiny", _tiny),  # what Triton's interpreter is through with in a second
        Problem("cora", real_graphs.undirected("cora")),
        Problem("citeseer", real_graphs.undirected("citeseer")),
        Problem("amazon_computers", real_graphs.undirected("amazon_computers")),
        Problem("debian", real_graphs.undirected("debian")),
        Problem("tolokers", real_graphs.undirected("tolokers", "edges", "node_labels")),
        Problem("minesweeper", real_graphs.undirected("minesweeper", "edges", "node_labels")),
        Problem("actor", real_graphs.undirected("actor", "edges", "node_labels")),
        Problem("squirrel", real_graphs.squirrel),  # directed
        Problem("moby", real_graphs.moby),
        Problem("zinc", real_graphs.zinc),  # a batch of 128 molecules
        Problem("molhiv", real_graphs.molhiv),  # likewise
        Problem("dd", real_graphs.dd),  # a batch of 64 proteins
        # parallel branches are parallel edges
        Problem("power10k", real_graphs.power_grid("power10k")),
        Problem("power70k", real_graphs.power_grid("power70k")),
        Problem("flights", real_graphs.flights),  # directed: 600,000 flights between 229 airports
        # ever more nodes of one mean degree: 30,000 to 130 million edges
        Problem("rmat_11", drawn_graphs.rmat(11)),
        Problem("rmat_13", drawn_graphs.rmat(13)),
        Problem("rmat_17", drawn_graphs.rmat(17)),
        Problem("rmat_19", drawn_graphs.rmat(19)),
        Problem("rmat_21", drawn_graphs.rmat(21)),
        Problem("rmat_23", drawn_graphs.rmat(23)),
        # ever more edges of 16,384 nodes
        Problem("degree_4", _uniform(4)),
        Problem("degree_16", _uniform(16)),
        Problem("degree_64", _uniform(64)),
        Problem("degree_256", _uniform(256)),
    )
}
"""Named graphs, synthetic and real; undirected ones have every edge in both directions, once.

Real graphs are read from the folder that the environment variable ``FASTGT_DATA`` names; ``debian``
ships in the package.
"""

SCALING = {
    "nodes": ("rmat_11", "rmat_13", "rmat", "rmat_17", "rmat_19", "rmat_21", "rmat_23"),
    "edges": ("degree_4", "degree_16", "degree_64", "degree_256"),
}
"""Problems that grow: in nodes at one mean degree, and in edges between so many nodes."""


def assert_as_accurate(
    actual: Tensor,
    eager: Tensor,
    oracle: Tensor,
    name: str,
    factor: float = 2.0,
    terms: Tensor | None = None,
) -> None:
    """Fail unless ``actual`` errs at most ``factor`` times as much as plain PyTorch does.

    The bound on |actual - oracle| is::

        factor * max |eager - oracle| + 16 eps(dtype) max(1, max |oracle|, terms)

    so the tolerance comes from the arithmetic and from nothing else. NaN must stand where the
    oracle has NaN and nowhere else, infinities likewise and with their sign.

    Args:
        actual: What is judged.
        eager: The same quantity by the plain definition in the same dtype.
        oracle: The same quantity in float64.
        name: Of the quantity, for the message.
        factor: 2 for outputs, 3 for gradients.
        terms: Per element, the size of what it is the difference of, for a quantity that may
            cancel to far less: there a few roundings of plain PyTorch are no measure of the next.

    Raises:
        AssertionError: With the worst coordinate and what stands there in all three.
    """
    assert actual.dtype == eager.dtype, f"{name}: {actual.dtype}, eager {eager.dtype}"
    assert actual.shape == eager.shape == oracle.shape, (
        f"{name}: {list(actual.shape)}, eager {list(eager.shape)}, oracle {list(oracle.shape)}"
    )
    if not actual.numel():
        return
    # where they are: on a GPU, a million rows are not fetched to be judged
    judged, plain, truth = (x.detach().to(actual.device).double() for x in (actual, eager, oracle))
    finite = truth.isfinite()
    zero = torch.zeros((), device=actual.device)
    error = torch.where(finite, (judged - truth).abs(), zero)
    # NaN and infinities are compared as they are; what is too large for the dtype is one there
    rounded = truth.to(actual.dtype).double()
    alike = (judged == truth) | (judged == rounded) | (judged.isnan() & truth.isnan())
    error = torch.where(alike, zero, torch.where(finite, error, torch.inf))
    error = error.nan_to_num(nan=torch.inf)
    # where eager itself overflows it sets no standard
    eager_error = torch.where(finite & plain.isfinite(), (plain - truth).abs(), zero).max()
    largest = torch.where(finite, truth.abs(), zero).max().clamp(min=1.0)
    if terms is not None:
        largest = torch.maximum(largest, terms.detach().to(actual.device).double().abs())
    bound = factor * eager_error + 16 * torch.finfo(actual.dtype).eps * largest.expand_as(error)
    worst = int((error / bound).argmax())
    place = [int(i) for i in np.unravel_index(worst, tuple(actual.shape))]
    off, allowed = error.flatten()[worst], bound.flatten()[worst]
    assert off <= allowed, (
        f"{name} is off by {off:.3e}, allowed {allowed:.3e} (eager {eager_error:.3e}), at "
        f"{place}: {judged.flatten()[worst]} instead of {truth.flatten()[worst]}, eager "
        f"{plain.flatten()[worst]}"
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that the library asks for uninitialised starts as NaN, or as an absurd integer."""
    asked = (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    )
    # torch.device("meta") looks once for the functions that make tensors: before any is poisoned
    _device_constructors()
    with ExitStack() as stack:
        # where it is poisoned already, this module would count as the one that asks
        for owner, name in () if hasattr(torch.empty, "__wrapped__") else asked:
            poisoned = _poisoned(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, poisoned))
        yield


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def empty(*args: Any, **kwargs: Any) -> Tensor:
        x = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():  # what follows cannot be traced
            return x
        if sys._getframe(1).f_globals.get("__name__", "").split(".")[0] != "fastgt":
            return x
        if x.is_floating_point() or x.is_complex():
            return x.fill_(float("nan"))
        return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max // 2)

    return empty

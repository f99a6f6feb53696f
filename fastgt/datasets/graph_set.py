"""Many graphs in flat arrays, and batches that are cut out of them without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastgt.datasets import archive
from fastgt.datasets.loader import loader
from fastgt.graph import Graph
from fastgt.ops.checks import integer

Per = Literal["node", "graph", "pair"]


class Encoded(NamedTuple):
    """One encoding of every graph of a set.

    Attributes:
        values: ``[N, ...]``, ``[G, ...]`` or ``[P, ...]``; P sums the squares of the graphs' nodes.
        per: What its rows belong to.
    """

    values: Tensor
    per: Per


class Batch(NamedTuple):
    """Some graphs as one: what a model takes, and what it should find.

    Attributes:
        graph: The batch; edges stand as :meth:`fastgt.Graph.from_edge_index` was given them.
        node: ``[N]`` or ``[N, columns]`` integer types, or ``[N, F]`` features.
        edge: As node, ``[E, ...]``; None where edges carry nothing.
        y: ``[B, ...]`` of graphs, or ``[N, ...]`` of nodes.
        encodings: Keyword arguments of the model's ``forward``.
    """

    graph: Graph
    node: Tensor
    edge: Tensor | None
    y: Tensor
    encodings: dict[str, Tensor]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on that device; does not wait for copies of pinned memory if asked so."""

        def moved(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        return Batch(
            self.graph.to(device, non_blocking=non_blocking),
            moved(self.node),
            None if self.edge is None else moved(self.edge),
            moved(self.y),
            {name: moved(x) for name, x in self.encodings.items()},
        )


@dataclass(frozen=True)
class GraphSet:
    """Graph after graph in flat arrays, on a CPU.

    Attributes:
        node: ``[N, ...]`` integer types, or features.
        edge: ``[E, ...]`` integer types, or features; None where edges carry nothing.
        edge_index: ``[2, E]`` integers, source above target, numbered within each graph.
        node_ptr, edge_ptr: ``[G + 1]`` int64; graph g owns the nodes
            ``node_ptr[g]:node_ptr[g + 1]`` and likewise its edges.
        y: ``[G, ...]`` of graphs, or ``[N, ...]`` of nodes.
        splits: Numbers of graphs in ``"train"``, ``"val"`` and ``"test"``.
        y_per: What ``y`` belongs to.
        encodings: By the name of the argument that a model takes.
        title: What results on it are called.
        classes: How many ``y`` tells apart; 0 where its numbers are to be predicted.
        node_types, edge_types: How many types there are in each column; () for features, or
            for edges that carry nothing.

    Raises:
        TypeError: ``edge_index``, boundaries or splits are no integers.
        ValueError: The arrays do not fit each other; says which.

    Example:
        >>> import torch
        >>> from fastgt.datasets import GraphSet
        >>> two = GraphSet(
        ...     node=torch.tensor([0, 1, 5]),
        ...     edge=torch.tensor([1, 1]),
        ...     edge_index=torch.tensor([[0, 1], [1, 0]]),
        ...     node_ptr=torch.tensor([0, 1, 3]),
        ...     edge_ptr=torch.tensor([0, 0, 2]),
        ...     y=torch.tensor([0.5, 2.0]),
        ...     splits={"train": torch.tensor([0, 1])},
        ... )
        >>> two.batch(torch.tensor([1, 0, 1])).node.tolist()
        [1, 5, 0, 1, 5]
    """

    node: Tensor
    edge: Tensor | None
    edge_index: Tensor
    node_ptr: Tensor
    edge_ptr: Tensor
    y: Tensor
    splits: dict[str, Tensor]
    y_per: Literal["node", "graph"] = "graph"
    encodings: dict[str, Encoded] = field(default_factory=dict)
    title: str = ""
    classes: int = 0
    node_types: tuple[int, ...] = ()
    edge_types: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, x in {
            "edge_index": self.edge_index,
            "node_ptr": self.node_ptr,
            "edge_ptr": self.edge_ptr,
            **{f"splits[{name!r}]": x for name, x in self.splits.items()},
        }.items():
            if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
                raise TypeError(f"{name} must hold integers, got {x.dtype}")
        if self.edge_index.ndim != 2 or len(self.edge_index) != 2:
            raise ValueError(f"edge_index must be [2, E], got {list(self.edge_index.shape)}")
        graphs, nodes, edges = len(self), len(self.node), self.edge_index.shape[1]
        archive.check_ptr("node_ptr", self.node_ptr, graphs, nodes)
        archive.check_ptr("edge_ptr", self.edge_ptr, graphs, edges)
        wanted = {"y": (self.y, nodes if self.y_per == "node" else graphs)}
        if self.edge is not None:
            wanted["edge"] = self.edge, edges
        for name, encoded in self.encodings.items():
            rows = {"node": nodes, "graph": graphs, "pair": int(self._pair_ptr()[-1])}
            wanted[f"encodings[{name!r}]"] = encoded.values, rows[encoded.per]
        for name, (x, count) in wanted.items():
            if len(x) != count:
                raise ValueError(f"{name} must have {count} rows, got {len(x)}")
        for name, x in self.splits.items():
            _check_graphs(f"splits[{name!r}]", x, graphs)
        self._check_edges()

    @staticmethod
    def from_pyg(splits: Mapping[str, Iterable[Any]], **options: Any) -> GraphSet:
        """Of torch-geometric's data sets: see :func:`fastgt.datasets.from_pyg.graph_set`."""
        from fastgt.datasets.from_pyg import graph_set

        return graph_set(splits, **options)

    def __len__(self) -> int:
        return len(self.node_ptr) - 1

    def batch(self, graphs: Tensor) -> Batch:
        """Those graphs, ``[B]`` integers, in that order; any may occur more than once."""
        nodes, edges = _Cut(self.node_ptr, graphs), _Cut(self.edge_ptr, graphs)
        ends = edges.of(self.edge_index, 1).long()
        edges.add(ends, nodes.begin[:-1])
        graph = Graph.from_edge_index(ends, int(nodes.begin[-1]), graph_ptr=nodes.begin)
        cuts = self._cuts(graphs, nodes)
        return Batch(
            graph,
            nodes.of(self.node),
            None if self.edge is None else edges.of(self.edge),
            cuts[self.y_per].of(self.y),
            {name: cuts[x.per].of(x.values) for name, x in self.encodings.items()},
        )

    def loader(
        self,
        split: str | Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        workers: int = 0,
        generator: torch.Generator | None = None,
        drop_last: bool = False,
        pin_memory: bool | None = None,
    ) -> DataLoader[Batch]:
        """Batches of a split, one after the other, without padding.

        It draws random numbers for the order alone. Batches are the same for any number of
        workers.

        Args:
            split: Its name; or numbers of graphs ``[B]``, in the order that they are wanted in. A
                pass that was stopped goes on with what is left of its order.
            batch_size: Graphs of a batch; the last one has what is left.
            shuffle: In a new random order at every pass.
            workers: Processes that cut batches out; with 0 this one does it.
            generator: Of the order. None: PyTorch's own.
            drop_last: Leave the last batch out where it has fewer graphs.
            pin_memory: Copy batches to page-locked memory, from which ``Batch.to`` with
                ``non_blocking=True`` does not wait. None: where there is a CUDA device.

        Raises:
            ValueError: There is no such split, or it has no such graphs; or ``batch_size`` is not
                positive or ``workers`` negative.
        """
        if isinstance(split, str):
            if split not in self.splits:
                raise ValueError(f"split must be one of {list(self.splits)}, got {split!r}")
            graphs = self.splits[split]
        else:
            graphs = split
            _check_graphs("split", graphs, len(self))
        return loader(
            self,
            graphs,
            integer("batch_size", batch_size, 1),
            shuffle=shuffle,
            workers=integer("workers", workers, 0),
            generator=generator,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        )

    def subset(self, graphs: Tensor) -> GraphSet:
        """Those graphs alone, ``[B]`` integers, numbered in that order; splits have what is left.

        A graph that occurs more than once is there as often.
        """
        _check_graphs("graphs", graphs, len(self))
        nodes, edges = _Cut(self.node_ptr, graphs), _Cut(self.edge_ptr, graphs)
        cuts = self._cuts(graphs, nodes)
        return replace(
            self,
            node=nodes.of(self.node),
            edge=None if self.edge is None else edges.of(self.edge),
            edge_index=edges.of(self.edge_index, 1),
            node_ptr=nodes.begin,
            edge_ptr=edges.begin,
            y=cuts[self.y_per].of(self.y),
            splits={
                name: torch.isin(graphs, split).nonzero()[:, 0]
                for name, split in self.splits.items()
            },
            encodings={
                name: Encoded(cuts[x.per].of(x.values), x.per) for name, x in self.encodings.items()
            },
        )

    def with_encodings(self, encodings: dict[str, Encoded]) -> GraphSet:
        """The set with these encodings besides its own."""
        return replace(self, encodings={**self.encodings, **encodings})

    def digest(self) -> str:
        """Sixteen letters that change with the data and the splits: encodings do not count."""
        return digest(
            [
                ("node", self.node),
                ("edge", self.edge),
                ("edge_index", self.edge_index),
                ("node_ptr", self.node_ptr),
                ("edge_ptr", self.edge_ptr),
                (self.y_per, self.y),
                *self.splits.items(),
            ]
        )

    def _cuts(self, graphs: Tensor, nodes: _Cut) -> dict[str, _Cut]:
        """What the graphs have of an array, by what the array's rows belong to."""
        cuts = {"node": nodes, "graph": _Cut(torch.arange(len(self) + 1), graphs)}
        if any(x.per == "pair" for x in self.encodings.values()):
            cuts["pair"] = _Cut(self._pair_ptr(), graphs)
        return cuts

    def _pair_ptr(self) -> Tensor:
        return archive.ptr(self.node_ptr.diff().square())

    def _check_edges(self) -> None:
        """Refuse an edge that leaves its graph; some graphs at a time, in little memory."""
        size, count = self.node_ptr.diff(), self.edge_ptr.diff()
        for first in range(0, len(self), _GRAPHS):
            some = slice(first, first + _GRAPHS)
            begin, end = self.edge_ptr[first], self.edge_ptr[first : first + _GRAPHS + 1][-1]
            ends = self.edge_index[:, begin:end]
            wrong = ((ends < 0) | (ends >= size[some].repeat_interleave(count[some]))).any(0)
            if wrong.any():
                edge = int(begin) + int(wrong.nonzero()[0])
                graph = int(torch.searchsorted(self.edge_ptr, edge, right=True)) - 1
                raise ValueError(
                    f"edge {edge} is {self.edge_index[:, edge].tolist()} but its graph, {graph}, "
                    f"has {int(size[graph])} nodes"
                )


_GRAPHS = 1000
_LARGE = 256  # rows of a graph, on the mean, from which copying its slice beats gathering rows


class _Cut:
    """What the chosen graphs own of arrays with these boundaries, one graph after the other.

    Attributes:
        begin: Where each graph begins in what is cut out, ``[B + 1]``.
    """

    def __init__(self, ptr: Tensor, graphs: Tensor):
        first = ptr[graphs]
        self.count = ptr[graphs + 1] - first
        self.begin = archive.ptr(self.count)
        total = int(self.begin[-1])
        self.spans: list[tuple[int, int]] | None = None
        if total >= _LARGE * max(len(graphs), 1):
            self.spans = list(zip(first.tolist(), self.count.tolist(), strict=True))
        else:
            shift = (first - self.begin[:-1]).repeat_interleave(self.count, output_size=total)
            self.place = torch.arange(total) + shift

    def of(self, x: Tensor, dim: int = 0) -> Tensor:
        """That part of an array, whose rows go along ``dim``."""
        if self.spans is None:
            return x.index_select(dim, self.place)
        return torch.cat([x.narrow(dim, first, count) for first, count in self.spans], dim)

    def add(self, x: Tensor, numbers: Tensor) -> None:
        """To all that a graph has in ``x`` ``[2, E]``, its number; in place."""
        if self.spans is None:
            x += numbers.repeat_interleave(self.count, output_size=x.shape[1])
            return
        for part, number in zip(x.split(self.count.tolist(), 1), numbers.tolist(), strict=True):
            part += number


def _check_graphs(name: str, graphs: Tensor, count: int) -> None:
    if graphs.ndim != 1:
        raise ValueError(f"{name} must be [B], got {list(graphs.shape)}")
    if len(graphs) and not 0 <= int(graphs.min()) <= int(graphs.max()) < count:
        found = f"{int(graphs.min())} to {int(graphs.max())}"
        raise ValueError(f"{name} has graphs from {found}, there are {count}")


def digest(arrays: Iterable[tuple[str, Tensor | None]]) -> str:
    """Sixteen letters that change with the names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, x in arrays:
        found.update(f"{name} {None if x is None else (x.dtype, list(x.shape))};".encode())
        if x is not None:
            found.update(x.contiguous().cpu().numpy().reshape(-1).view("uint8").data)
    return found.hexdigest()[:16]

"""A Graph as a node of PyTorch's pytrees: ``torch.export`` takes it as an input, ``tree_map`` maps
its tensors.

Leaves are those that a graph is made of, and nothing that was prepared: whatever a graph has been
used for, it has the same structure. Sizes are shapes of leaves, so that they may be dynamic. A
graph that gets its own leaves back is the same object, with what it has prepared.

A square graph has the leaves row_ptr ``[N + 1]``, graph_ptr ``[G + 1]``, col ``[E]`` and edge
``[E]``, and order ``[N]`` where it was reordered. Before col, a bipartite one has ``[N_cols, 0]``,
which has a shape and no values, and col_graph_ptr ``[G + 1]``. Between these two, a graph with
types has such a shape for each entry of ``rows``, ``columns`` and ``edges``. A process needs
``import fastgt`` before it loads a program.

Example:
    >>> import torch
    >>> from torch.export import Dim, export
    >>> from fastgt import Graph, aggregate
    >>> class Sum(torch.nn.Module):
    ...     def forward(self, x, graph):
    ...         return aggregate(x, graph)
    >>> graph = Graph.complete(torch.tensor([0, 2, 3]))  # two, for 1 would be a constant
    >>> rows, edges, graphs = Dim("rows"), Dim("edges"), Dim("graphs")
    >>> leaves = [{0: rows + 1}, {0: graphs + 1}, {0: edges}, {0: edges}]
    >>> shapes = {"x": {0: rows}, "graph": leaves}
    >>> program = export(Sum(), (torch.ones(3, 2), graph), dynamic_shapes=shapes)
    >>> program.module()(torch.ones(5, 2), Graph.complete(torch.tensor([0, 4, 5])))[3:].tolist()
    [[4.0, 4.0], [1.0, 1.0]]
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastgt.graph_hetero import Types, types_of_sizes

if TYPE_CHECKING:
    from fastgt.graph import Graph


Names = tuple[tuple[Any, ...], ...]


class GraphSpec:
    """What a graph has besides leaves. Who it was is no part of the structure, and not compared.

    Attributes:
        square: Whether columns are rows; else they have leaves of their own.
        ordered: Whether there is a leaf for ``order``.
        types: The names in each part of the graph's types, if it has some.
        origin: The graph that was flattened, while it lives.
    """

    def __init__(
        self,
        square: bool,
        ordered: bool,
        types: Names | None,
        origin: weakref.ref[Graph] | None = None,
    ):
        self.square, self.ordered, self.types, self.origin = square, ordered, types, origin

    @property
    def sizes(self) -> list[str]:
        """Leaves that stand for a number."""
        parts = zip(Types._fields, self.types or (), strict=False)
        of_types = [f"{part}_{i:05}" for part, names in parts for i in range(len(names))]
        return [*([] if self.square else ["num_cols"]), *of_types]

    @property
    def names(self) -> list[str]:
        """What each leaf is."""
        # torch.export takes "col" for that in "col_graph_ptr", unless the longer name comes first
        bipartite = [] if self.square else ["col_graph_ptr"]
        ordered = ["order"] if self.ordered else []
        return ["row_ptr", "graph_ptr", *self.sizes, *bipartite, "col", "edge", *ordered]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GraphSpec) and self.__reduce__() == other.__reduce__()

    def __hash__(self) -> int:
        return hash(self.__reduce__()[1])

    def __repr__(self) -> str:
        return f"GraphSpec(square={self.square}, ordered={self.ordered}, types={self.types})"

    def __reduce__(self) -> tuple:
        return GraphSpec, (self.square, self.ordered, self.types)


def register(kind: type[Graph]) -> None:
    """Make a node of the class. Programs that were exported know it as ``fastgt.Graph``."""
    pytree.register_pytree_node(
        kind,
        _flatten,
        lambda leaves, spec: _unflatten(kind, list(leaves), spec),
        serialized_type_name="fastgt.Graph",
        flatten_with_keys_fn=_flatten_with_keys,
        to_dumpable_context=_to_dumpable,
        from_dumpable_context=_from_dumpable,
    )


def _flatten(graph: Graph) -> tuple[list[Any], GraphSpec]:
    if not isinstance(graph.col, Tensor):
        held = vars(graph)
        return [held[name] for name in held["spec"].names], held["spec"]
    square, types = graph.graph_ptr is graph.col_graph_ptr, graph.types
    names = None if types is None else tuple(map(tuple, types))
    origin = None if torch.compiler.is_compiling() else weakref.ref(graph)
    spec = GraphSpec(square, graph.order is not None, names, origin)
    numbers = [] if square else [graph.num_cols]
    numbers += [x.stop - x.start for part in types or () for x in part.values()]
    sizes = dict(zip(spec.sizes, graph.prepared.sizes_of(graph.col, numbers), strict=True))
    return [sizes[name] if name in sizes else getattr(graph, name) for name in spec.names], spec


def _unflatten(kind: type[Graph], leaves: list[Any], spec: GraphSpec) -> Graph:
    fields = dict(zip(spec.names, leaves, strict=True))
    sizes = [fields.pop(name) for name in spec.sizes]
    origin = None if spec.origin is None else spec.origin()
    if origin is not None and all(getattr(origin, name) is x for name, x in fields.items()):
        return origin
    if not (_are_tensors(fields.values(), 1) and _are_tensors(sizes, 2)):
        # maps and exports make others of leaves for themselves: dims, shapes, or None
        graph = object.__new__(kind)
        vars(graph).update(zip(spec.names, leaves, strict=True), spec=spec)
        return graph
    numbers = [x.shape[0] for x in sizes]
    rows = fields["row_ptr"].shape[0] - 1
    cols = rows if spec.square else numbers.pop(0)
    types = None if spec.types is None else types_of_sizes(spec.types, numbers)
    settled = None
    if origin is not None and type(fields["col"]) is Tensor:
        named = origin.settled is not None and origin.settled.reason == "named"
        settled = origin.settled if named else None
    if spec.square:
        fields["col_graph_ptr"] = fields["graph_ptr"]
    return kind(num_rows=rows, num_cols=cols, settled=settled, types=types, **fields)


def _are_tensors(leaves: Iterable[Any], ndim: int) -> bool:
    return all(isinstance(x, Tensor) and x.ndim == ndim for x in leaves)


def _flatten_with_keys(graph: Graph) -> tuple[list[tuple[pytree.KeyEntry, Any]], GraphSpec]:
    leaves, spec = _flatten(graph)
    keys = (pytree.GetAttrKey(name) for name in spec.names)
    return list(zip(keys, leaves, strict=True)), spec


def _to_dumpable(spec: GraphSpec) -> dict[str, Any]:
    return {"square": spec.square, "ordered": spec.ordered, "types": spec.types}


def _from_dumpable(dumped: dict[str, Any]) -> GraphSpec:
    types = dumped["types"]
    if types is not None:  # JSON makes lists of tuples
        types = tuple(
            tuple(tuple(name) if isinstance(name, list) else name for name in part)
            for part in types
        )
    return GraphSpec(dumped["square"], dumped["ordered"], types)

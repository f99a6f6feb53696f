"""A Graph as a node of PyTorch's pytrees: ``torch.export`` takes it as an input, ``tree_map`` maps
its tensors.

Leaves are those that a graph is made of, and nothing that was prepared: whatever a graph has been
used for, it has the same structure. Sizes are shapes of leaves, so that they may be dynamic. A
graph that gets its own leaves back is the same object, with what it has prepared.

A square graph has the leaves row_ptr ``[N + 1]``, graph_ptr ``[G + 1]``, col ``[E]`` and edge
``[E]``, and order ``[N]`` where it was reordered. Before col, a bipartite one has ``[N_cols, 0]``,
which has a shape and no values, and col_graph_ptr ``[G + 1]``. A process needs
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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastgt.graph_hetero import Types, types_from_lists, types_to_lists

if TYPE_CHECKING:
    from fastgt.graph import Graph


class GraphSpec:
    """What a graph has besides leaves. Who it was is no part of the structure, and not compared.

    Attributes:
        square: Whether columns are rows; else they have leaves of their own.
        ordered: Whether there is a leaf for ``order``.
        types: Those of the graph.
        origin: The graph that was flattened, while it lives.
    """

    def __init__(
        self,
        square: bool,
        ordered: bool,
        types: Types | None,
        origin: weakref.ref[Graph] | None = None,
    ):
        self.square, self.ordered, self.types, self.origin = square, ordered, types, origin

    @property
    def names(self) -> list[str]:
        """What each leaf is."""
        # torch.export takes "col" for that in "col_graph_ptr", unless the longer name comes first
        bipartite = [] if self.square else ["num_cols", "col_graph_ptr"]
        ordered = ["order"] if self.ordered else []
        return ["row_ptr", "graph_ptr", *bipartite, "col", "edge", *ordered]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GraphSpec) and self.__reduce__() == other.__reduce__()

    def __hash__(self) -> int:
        return hash((self.square, self.ordered))

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
        spec = vars(graph)["spec"]
        return [getattr(graph, name) for name in spec.names], spec
    spec = GraphSpec(
        graph.graph_ptr is graph.col_graph_ptr,
        graph.order is not None,
        graph.types,
        None if torch.compiler.is_compiling() else weakref.ref(graph),
    )
    leaves = [getattr(graph, name) for name in spec.names]
    if not spec.square:
        leaves[spec.names.index("num_cols")] = graph.prepared.width_of(graph.col, graph.num_cols)
    return leaves, spec


def _unflatten(kind: type[Graph], leaves: list[Any], spec: GraphSpec) -> Graph:
    fields = dict(zip(spec.names, leaves, strict=True))
    origin = None if spec.origin is None else spec.origin()
    if origin is not None and all(
        getattr(origin, name) is x for name, x in fields.items() if name != "num_cols"
    ):
        return origin
    columns = fields.pop("num_cols", None)
    if not all(isinstance(x, Tensor) and x.ndim == 1 for x in fields.values()):
        return _of_others(kind, fields, columns, spec)
    rows = fields["row_ptr"].shape[0] - 1
    settled = None
    if origin is not None and type(fields["col"]) is Tensor:
        named = origin.settled is not None and origin.settled.reason == "named"
        settled = origin.settled if named else None
    if spec.square:
        fields["col_graph_ptr"] = fields["graph_ptr"]
    cols = rows if spec.square else columns.shape[0]
    return kind(num_rows=rows, num_cols=cols, settled=settled, types=spec.types, **fields)


def _of_others(kind: type[Graph], fields: dict[str, Any], columns: Any, spec: GraphSpec) -> Graph:
    """What maps and exports make of leaves for themselves: it holds dims, shapes, or None."""
    graph = object.__new__(kind)
    vars(graph).update(fields, num_cols=columns, spec=spec)
    return graph


def _flatten_with_keys(graph: Graph) -> tuple[list[tuple[pytree.KeyEntry, Any]], GraphSpec]:
    leaves, spec = _flatten(graph)
    keys = (pytree.GetAttrKey(name) for name in spec.names)
    return list(zip(keys, leaves, strict=True)), spec


def _to_dumpable(spec: GraphSpec) -> dict[str, Any]:
    types = None if spec.types is None else types_to_lists(spec.types)
    return {"square": spec.square, "ordered": spec.ordered, "types": types}


def _from_dumpable(dumped: dict[str, Any]) -> GraphSpec:
    types = None if dumped["types"] is None else types_from_lists(dumped["types"])
    return GraphSpec(dumped["square"], dumped["ordered"], types)

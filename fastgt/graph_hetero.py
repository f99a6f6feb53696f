"""One Graph of several types of nodes and of relations between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch

from fastgt.graph_adjacency import Edges, read_edges
from fastgt.graph_build import Structure, check_edge_index, check_range, from_pairs, size_of

Relation = tuple[str, str, str]  # type of sources, name, type of targets


class Types(NamedTuple):
    """Where the nodes of each type and the edges of each relation stand.

    Attributes:
        rows: By type of targets, in the order of ``num_nodes``.
        columns: By relation, or by type of sources.
        edges: By relation, in the order in which they were given.
    """

    rows: dict[str, slice]
    columns: dict[Any, slice]
    edges: dict[Relation, slice]

    def of_transpose(self) -> Types:
        return self._replace(rows=self.columns, columns=self.rows)


def types_to_lists(types: Types) -> list[list[list[Any]]]:
    """As JSON has them: in each part, the name, where it begins and where it ends."""
    return [[[name, x.start, x.stop] for name, x in part.items()] for part in types]


def types_from_lists(parts: list[list[list[Any]]]) -> Types:
    """Of :func:`types_to_lists`, after JSON has made lists of tuples."""
    made: list[Any] = [
        {tuple(name) if isinstance(name, list) else name: slice(*ends) for name, *ends in part}
        for part in parts
    ]
    return Types(*made)


def types_of_sizes(names: tuple[tuple[Any, ...], ...], sizes: list[int]) -> Types:
    """Of the names in each part, and their sizes one after another."""
    rest = iter(sizes)
    rows, columns, edges = (_parts({name: next(rest) for name in part}) for part in names)
    return Types(rows, columns, edges)


def from_hetero(
    edge_index_dict: Mapping[Relation, Any],
    num_nodes: Mapping[str, int] | None,
    columns: Literal["relations", "types"],
) -> tuple[Structure, Types]:
    if not isinstance(edge_index_dict, Mapping):
        raise TypeError(f"edge_index_dict must be a dict, got {type(edge_index_dict).__name__}")
    if num_nodes is not None and not isinstance(num_nodes, Mapping):
        raise TypeError(f"num_nodes must be a dict, got {type(num_nodes).__name__}")
    edges = {}
    for relation, x in edge_index_dict.items():
        name = f"edge_index_dict[{relation!r}]"
        if not (isinstance(relation, tuple) and len(relation) == 3):
            raise TypeError(f"{name}: a relation is (source type, name, target type)")
        edges[relation] = read_edges(x, name)
    given = {kind: size_of(n, f"num_nodes[{kind!r}]") for kind, n in (num_nodes or {}).items()}
    return joined_relations(edges, given, columns, "name it in num_nodes")


def joined_relations(
    edges: Mapping[Relation, Edges], num_nodes: Mapping[str, int], columns: str, advice: str
) -> tuple[Structure, Types]:
    """``advice`` is for a type whose number of nodes is not known; {} stands for the type."""
    if columns not in ("relations", "types"):
        raise ValueError(f"columns must be 'relations' or 'types', got {columns!r}")
    if not edges:
        raise ValueError("edge_index_dict must have a relation, got none")
    sizes = _sizes(edges, num_nodes, advice)
    targets, sources = ({relation[side] for relation in edges} for side in (2, 0))
    rows = _parts({kind: n for kind, n in sizes.items() if kind in targets})
    by_type = {kind: n for kind, n in sizes.items() if kind in sources}
    by_relation = {relation: sizes[relation[0]] for relation in edges}
    cols = _parts(by_relation if columns == "relations" else by_type)
    first = next(iter(edges.values()))
    ends = []
    for relation, part in edges.items():
        source, _, target = relation
        if part.device != first.device:
            raise ValueError(f"{part.name} is on {part.device}, {first.name} on {first.device}")
        if part.graph is None:
            index = check_edge_index(part.index, part.name)
            check_range(index[0], sizes[source], f"{part.name}[0]", f"nodes of {source!r}")
            check_range(index[1], sizes[target], f"{part.name}[1]", f"nodes of {target!r}")
        else:
            index = part.graph.edge_index
        column = cols[relation if columns == "relations" else source].start
        # in int64, which no sum of sizes leaves
        ends.append(torch.stack([index[0].long() + column, index[1].long() + rows[target].start]))
    numbers = {relation: x.shape[1] for relation, x in zip(edges, ends, strict=True)}
    col, row = torch.cat(ends, 1)
    graph = from_pairs(row, col, _total(rows), _total(cols))
    if graph.num_rows == graph.num_cols and list(rows) != list(cols):
        # as many of both, and not the same nodes
        graph = graph._replace(col_graph_ptr=graph.graph_ptr.clone())
    return graph, Types(rows, cols, _parts(numbers))


def _sizes(
    edges: Mapping[Relation, Edges], num_nodes: Mapping[str, int], advice: str
) -> dict[str, int]:
    """Nodes of each type of the relations. An ``EdgeIndex`` is asked where nobody else knows."""
    said = {kind: (n, "num_nodes") for kind, n in num_nodes.items()}
    for exact in (True, False):
        asked = set(said)
        for (source, _, target), part in edges.items():
            for kind, n in ((source, part.cols), (target, part.rows)):
                if n is None or (part.graph is not None) is not exact:
                    continue
                if kind in asked and not exact:
                    continue
                before, who = said.setdefault(kind, (n, part.name))
                if before != n:
                    raise ValueError(
                        f"{part.name} has {n} nodes of {kind!r} but {who} has {before}"
                    )
    for source, _, target in edges:
        for kind in (source, target):
            if kind not in said:
                hint = advice.format(kind)
                raise ValueError(f"the number of nodes of {kind!r} is not known: {hint}")
    return {kind: n for kind, (n, _) in said.items()}


def _parts(sizes: Mapping[Any, int]) -> dict[Any, slice]:
    begin, parts = 0, {}
    for name, size in sizes.items():
        parts[name] = slice(begin, begin + size)
        begin += size
    return parts


def _total(parts: Mapping[Any, slice]) -> int:
    return max((part.stop for part in parts.values()), default=0)


# torch.load of a saved graph works as it does for tensors
torch.serialization.add_safe_globals([Types, slice])

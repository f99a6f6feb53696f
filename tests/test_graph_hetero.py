"""Graph.from_hetero: one graph of several relations, and the attention of HGT on it."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_cases import assert_same
from torch import Tensor
from torch.nn.functional import gelu

from fastgt import Graph, neighborhood_attention

WRITES, CITES, REVIEWS = (
    ("author", "writes", "paper"),
    ("paper", "cites", "paper"),
    ("paper", "read_by", "author"),
)
SIZES = {"venue": 3, "paper": 5, "author": 4}
EDGES = {
    WRITES: torch.tensor([[0, 1, 1, 3], [0, 0, 4, 3]]),
    CITES: torch.tensor([[4, 1, 1, 0, 2], [1, 1, 1, 3, 3]]),
    REVIEWS: torch.tensor([[4, 0], [1, 2]]),
}


def by_hand(columns: str) -> tuple[list[int], list[int]]:
    """Sources and targets of all edges, by loops over lists."""
    row = {"paper": 0, "author": 5}
    by_relation = {WRITES: 0, CITES: 4, REVIEWS: 9}
    source, target = [], []
    for relation, ends in EDGES.items():
        for j, i in ends.t().tolist():
            column = row[relation[0]] if columns == "types" else by_relation[relation]
            source.append(j + column)
            target.append(i + row[relation[2]])
    return source, target


@pytest.mark.parametrize(("columns", "count"), [("relations", 14), ("types", 9)])
def test_all_relations_are_one_graph(columns: Any, count: int) -> None:
    graph = Graph.from_hetero(EDGES, SIZES, columns)
    assert (graph.num_rows, graph.num_cols, graph.num_edges) == (9, count, 11)
    assert graph.edge_index.tolist() == list(by_hand(columns))
    types = graph.types
    assert types is not None
    # in the order of num_nodes; nothing goes to venues, or comes from them
    assert list(types.rows.items()) == [("paper", slice(0, 5)), ("author", slice(5, 9))]
    assert list(types.edges.values()) == [slice(0, 4), slice(4, 9), slice(9, 11)]
    assert list(types.edges) == list(EDGES)
    if columns == "types":
        assert types.columns == types.rows
        assert graph.num_nodes == 9  # the same nodes on both sides
    else:
        assert list(types.columns) == list(EDGES)
        assert list(types.columns.values()) == [slice(0, 4), slice(4, 9), slice(9, 14)]


def test_as_many_rows_as_columns_are_not_the_same_nodes() -> None:
    graph = Graph.from_hetero({WRITES: torch.tensor([[0], [1]])}, {"author": 2, "paper": 2})
    assert graph.num_rows == graph.num_cols
    with pytest.raises(ValueError, match="needs square graphs"):
        graph.with_self_loops()


def test_relations_keep_their_edge_tensors_apart() -> None:
    graph = Graph.from_hetero(EDGES, SIZES)
    assert graph.types is not None
    for relation, part in graph.types.edges.items():
        column = graph.types.columns[relation].start
        row = graph.types.rows[relation[2]].start
        ends = graph.edge_index[:, part] - torch.tensor([[column], [row]])
        assert torch.equal(ends, EDGES[relation])


def test_types_travel_with_the_graph(tmp_path: Path) -> None:
    graph = Graph.from_hetero(EDGES, SIZES)
    torch.save(graph, tmp_path / "graph.pt")
    others = [
        copy.copy(graph),
        copy.deepcopy(graph),
        pickle.loads(pickle.dumps(graph)),
        torch.load(tmp_path / "graph.pt"),
        graph.to("meta"),
        graph.plan("gather"),
        graph.transpose().transpose(),
    ]
    assert [other.types for other in others] == [graph.types] * len(others)
    turned = graph.transpose().types
    assert graph.types is not None
    assert turned == (graph.types.columns, graph.types.rows, graph.types.edges)
    for plain in (
        Graph.batch([graph, graph]),
        Graph.from_hetero(EDGES, SIZES, "types").with_self_loops(),
        Graph.from_hetero(EDGES, SIZES, "types").reordered("degree"),
        Graph.from_edge_index(EDGES[CITES]),
    ):
        assert plain.types is None


def sparse(relation: tuple[str, str, str], sizes: tuple[int, int]) -> Tensor:
    ends = EDGES[relation].flip(0)
    return torch.sparse_coo_tensor(ends, torch.ones(ends.shape[1]), sizes, check_invariants=True)


def test_sparse_matrices_say_how_many_nodes_there_are() -> None:
    edges = EDGES | {WRITES: sparse(WRITES, (5, 4))}
    graph = Graph.from_hetero(edges, {"paper": 5})
    order = [0, 1, 3, 2]  # row by row
    expected = EDGES | {WRITES: EDGES[WRITES][:, order]}
    # types that num_nodes does not have come after the others
    assert_same(graph, Graph.from_hetero(expected, {"paper": 5, "author": 4}))
    assert graph.types == Graph.from_hetero(expected, {"paper": 5, "author": 4}).types


def test_an_edge_index_of_pyg_is_asked_where_nobody_else_knows() -> None:
    EdgeIndex = pytest.importorskip("torch_geometric.edge_index").EdgeIndex
    edges = {key: EdgeIndex(x) for key, x in EDGES.items()}
    edges[WRITES] = EdgeIndex(EDGES[WRITES], sparse_size=(6, 5))
    graph = Graph.from_hetero(edges, {"paper": 5})
    assert_same(graph, Graph.from_hetero(EDGES, {"paper": 5, "author": 6}))
    assert all(type(x) is Tensor for x in graph._tensors())
    graph = Graph.from_hetero(edges, {"paper": 8, "author": 4})
    assert_same(graph, Graph.from_hetero(EDGES, {"paper": 8, "author": 4}))
    edges[REVIEWS] = EdgeIndex(EDGES[REVIEWS], sparse_size=(5, 7))
    with pytest.raises(ValueError, match=r"'read_by', .* has 7 nodes of 'author' but .* has 6"):
        Graph.from_hetero(edges, {"paper": 5})


REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "no relation": ({}, SIZES, ValueError, "edge_index_dict must have a relation"),
    "a list": ([], SIZES, TypeError, "edge_index_dict must be a dict, got list"),
    "a number": (EDGES, 9, TypeError, "num_nodes must be a dict, got int"),
    "a name": (
        {"cites": EDGES[CITES]},
        SIZES,
        TypeError,
        r"edge_index_dict\['cites'\]: a relation is \(source type, name, target type\)",
    ),
    "half a size": (EDGES, {"paper": 5.0}, TypeError, r"num_nodes\['paper'\] must be an int"),
    "unknown": (
        EDGES,
        {"paper": 5},
        ValueError,
        "number of nodes of 'author' is not known: name it in num_nodes",
    ),
    "source": (
        EDGES,
        {"paper": 5, "author": 3},
        ValueError,
        r"'writes', 'paper'\)\]\[0\] has index 3 but the graph has 3 nodes of 'author'",
    ),
    "target": (
        EDGES,
        {"paper": 4, "author": 4},
        ValueError,
        r"'writes', 'paper'\)\]\[1\] has index 4 but the graph has 4 nodes of 'paper'",
    ),
    "num_nodes": (
        EDGES | {CITES: sparse(CITES, (6, 6))},
        SIZES,
        ValueError,
        r"'cites', 'paper'\)\] has 6 nodes of 'paper' but num_nodes has 5",
    ),
    "two relations": (
        {WRITES: sparse(WRITES, (5, 4)), CITES: sparse(CITES, (6, 6))},
        None,
        ValueError,
        r"'cites', 'paper'\)\] has 6 nodes of 'paper' but edge_index_dict.*'writes'.* has 5",
    ),
    "shape": ({CITES: torch.ones(3, 2).long()}, SIZES, ValueError, r"\)\] must be \[2, E\]"),
    "floats": ({CITES: torch.ones(2, 2)}, SIZES, TypeError, r"\)\] must hold integers"),
    "devices": (
        EDGES | {CITES: EDGES[CITES].to("meta")},
        SIZES,
        RuntimeError,
        r"'cites', 'paper'\)\] is on the meta device",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_relations_that_do_not_fit_are_refused(name: str) -> None:
    edges, sizes, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        Graph.from_hetero(edges, sizes)


def test_columns_are_of_relations_or_of_types() -> None:
    with pytest.raises(ValueError, match="columns must be 'relations' or 'types', got 'nodes'"):
        Graph.from_hetero(EDGES, SIZES, "nodes")  # type: ignore[arg-type]


def hetero_data() -> Any:
    data = pytest.importorskip("torch_geometric.data").HeteroData()
    for kind, n in SIZES.items():
        data[kind].x = torch.randn(n, 6, dtype=torch.float64)
    for relation, ends in EDGES.items():
        data[relation].edge_index = ends
    return data


def test_hetero_data_is_the_graph_of_its_relations() -> None:
    data = hetero_data()
    graph = Graph.from_pyg(data)
    expected = Graph.from_hetero(EDGES, SIZES)
    assert_same(graph, expected)
    assert graph.types == expected.types
    del data[WRITES].edge_index
    data[WRITES].adj_t = sparse(WRITES, (5, 4))
    by_row = EDGES | {WRITES: EDGES[WRITES][:, [0, 1, 3, 2]]}
    assert_same(Graph.from_pyg(data), Graph.from_hetero(by_row, SIZES))


def test_a_batch_of_hetero_data_is_one_graph() -> None:
    batch = pytest.importorskip("torch_geometric.data").Batch
    data = hetero_data()
    graph = Graph.from_pyg(batch.from_data_list([data, data]))
    assert (graph.num_rows, graph.num_edges, graph.num_graphs) == (18, 22, 1)
    q, k = torch.randn(9, 1, 4), torch.randn(14, 1, 4)
    one = Graph.from_pyg(data)
    assert one.types is not None
    assert graph.types is not None
    twice = [torch.cat([k[part], k[part]]) for part in one.types.columns.values()]
    rows = [torch.cat([q[part], q[part]]) for part in one.types.rows.values()]
    k_twice = torch.cat(twice)
    out = neighborhood_attention(torch.cat(rows), k_twice, k_twice, graph)
    alone = neighborhood_attention(q, k, k, one)
    for kind, part in graph.types.rows.items():
        first, second = out[part].chunk(2)
        torch.testing.assert_close(first, alone[one.types.rows[kind]])
        torch.testing.assert_close(second, first)


@pytest.mark.filterwarnings("ignore:Unable to accurately infer")
def test_hetero_data_that_are_refused() -> None:
    data = hetero_data()
    del data["author"].x
    with pytest.raises(ValueError, match=r"'author' is not known: set data\['author'\]\.num_nodes"):
        Graph.from_pyg(data)
    data["author"].num_nodes = 4
    data[CITES].edge_index = EDGES[CITES] + 3
    with pytest.raises(ValueError, match=r"data\[\('paper', 'cites', .* has 5 nodes of 'paper'"):
        Graph.from_pyg(data)
    del data[CITES].edge_index
    data[CITES].weight = torch.ones(5)
    with pytest.raises(TypeError, match=r"data\[\('paper', 'cites', 'paper'\)\] must have an edge"):
        Graph.from_pyg(data)
    with pytest.raises(ValueError, match="data must have a relation"):
        Graph.from_pyg(type(data)())


def hgt(conv: Any, x_dict: dict[str, Tensor], graph: Graph) -> dict[str, Tensor]:
    """``HGTConv.forward`` with its attention by :func:`neighborhood_attention`."""
    types, heads = graph.types, conv.heads
    assert types is not None
    queries, keys, values = {}, {}, {}
    for kind, x in conv.kqv_lin(x_dict).items():
        k, q, v = x.view(len(x), 3, heads, -1).unbind(1)
        keys[kind], queries[kind], values[kind] = k, q, v
    k, v = [], []
    for relation in types.columns:
        number = conv.edge_types_map[relation]
        which = torch.arange(heads) * len(conv.edge_types) + number
        prior = conv.p_rel["__".join(relation)].view(heads, 1)
        source = relation[0]
        key = torch.einsum("nhd,hde->nhe", keys[source], conv.k_rel.weight[which])
        k.append(key * prior)
        v.append(torch.einsum("nhd,hde->nhe", values[source], conv.v_rel.weight[which]))
    q = torch.cat([queries[kind] for kind in types.rows])
    out = neighborhood_attention(q, torch.cat(k), torch.cat(v), graph).flatten(1)
    found = conv.out_lin({kind: gelu(out[part]) for kind, part in types.rows.items()})
    for kind, y in found.items():
        if y.shape == x_dict[kind].shape:
            alpha = conv.skip[kind].sigmoid()
            found[kind] = alpha * y + (1 - alpha) * x_dict[kind]
    return found


@pytest.mark.parametrize("width", [6, 8])  # with the skip connection, and without
def test_attention_is_that_of_pygs_hgt(width: int) -> None:
    nn = pytest.importorskip("torch_geometric.nn")
    data = hetero_data()
    torch.manual_seed(0)
    conv = nn.HGTConv(6, width, data.metadata(), heads=2).double()
    for p in conv.p_rel.values():
        torch.nn.init.uniform_(p, 0.5, 2.0)
    x_dict = {kind: x.requires_grad_() for kind, x in data.x_dict.items()}
    inputs = dict(conv.named_parameters()) | x_dict
    found = []
    for out in (conv(x_dict, data.edge_index_dict), hgt(conv, x_dict, Graph.from_pyg(data))):
        assert set(out) == {"paper", "author"}
        loss = sum((y * y.sin()).sum() for y in out.values())
        grads = torch.autograd.grad(
            loss, list(inputs.values()), allow_unused=True, materialize_grads=True
        )
        found.append(out | {f"d{name}": g for name, g in zip(inputs, grads, strict=True)})
    for name, x in found[0].items():
        torch.testing.assert_close(found[1][name], x, msg=lambda m, name=name: f"{name}: {m}")
    assert found[0]["dk_rel.weight"].any()

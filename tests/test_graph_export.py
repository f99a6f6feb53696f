"""A Graph as a node of pytrees: mapped, and an input of programs that torch.export makes."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_cases import SIX, assert_same
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import fastgt
from fastgt import Graph, aggregate, linear_attention, neighborhood_attention, plans, tiles
from fastgt.testing import random_edge_index

PTR = torch.tensor([0, 4, 6])
HETERO = {("a", "to", "b"): SIX, ("b", "to", "b"): SIX[:, :2]}


def batch() -> Graph:
    return Graph.from_edge_index(SIX, graph_ptr=PTR)


GRAPHS: dict[str, Callable[[], Graph]] = {
    "square": lambda: Graph.from_edge_index(SIX, 6),
    "batch": batch,
    "reordered": lambda: batch().reordered(torch.tensor([1, 0, 2, 3, 5, 4])),
    "bipartite": lambda: Graph.from_edge_index(SIX, (6, 7)),
    "as many rows as columns": lambda: Graph.complete(PTR, torch.tensor([0, 1, 6])),
    "hetero": lambda: Graph.from_hetero(HETERO, {"a": 6, "b": 7}),
    "no nodes": lambda: Graph.batch([]),
}
EVERY = pytest.mark.parametrize("name", GRAPHS)


def fields(graph: Graph) -> list[Any]:
    return [graph.order if graph.order is None else graph.order.tolist(), graph.types]


@EVERY
def test_a_graph_of_mapped_tensors(name: str) -> None:
    graph = GRAPHS[name]()
    twin = pytree.tree_map(torch.clone, {"graph": [graph]})["graph"][0]
    assert type(twin) is Graph
    assert twin is not graph
    assert_same(twin, graph)
    assert fields(twin) == fields(graph)
    assert (twin.graph_ptr is twin.col_graph_ptr) == (graph.graph_ptr is graph.col_graph_ptr)
    assert type(twin.num_cols) is int
    moved = pytree.tree_map(lambda x: x.to("meta"), graph)
    assert {x.device.type for x in moved._tensors()} == {"meta"}


@EVERY
def test_the_structure_does_not_depend_on_what_was_prepared(name: str) -> None:
    graph = GRAPHS[name]()
    before = pytree.tree_structure(graph)
    leaves = [x.shape for x in pytree.tree_leaves(graph)]
    for used in (graph.plan("gather"), graph.plan("windows"), copy.deepcopy(graph)):
        _ = used.columns
        assert pytree.tree_structure(used) == before
        assert hash(pytree.tree_structure(used).context) == hash(before.context)
        assert [x.shape for x in pytree.tree_leaves(used)] == leaves


def test_what_differs_is_another_structure() -> None:
    specs = [pytree.tree_structure(make()) for make in GRAPHS.values()]
    kinds = {name: [a == b for b in specs] for name, a in zip(GRAPHS, specs, strict=True)}
    same = {"square", "batch", "no nodes"}
    for name, equal in kinds.items():
        bipartite = {"bipartite", "as many rows as columns"}
        expected = next((x for x in (same, bipartite) if name in x), {name})
        assert {other for other, x in zip(GRAPHS, equal, strict=True) if x} == expected


@EVERY
def test_a_graph_that_gets_its_own_leaves_is_the_same(name: str) -> None:
    graph = GRAPHS[name]()
    leaves, spec = pytree.tree_flatten([graph, torch.ones(2)])
    assert pytree.tree_unflatten(leaves, spec)[0] is graph
    # a structure keeps no graph alive
    kept = copy.deepcopy(graph)
    del graph
    assert_same(pytree.tree_unflatten(leaves, spec)[0], kept)


def test_a_plan_that_was_named_stays() -> None:
    named, found = batch().plan("windows"), batch().plan("auto", width=16)
    assert pytree.tree_map(torch.clone, named).settled == named.settled
    assert found.settled is not None
    assert pytree.tree_map(torch.clone, found).settled is None


@EVERY
def test_structures_travel(name: str) -> None:
    spec = pytree.tree_structure((GRAPHS[name](), 1))
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    assert "fastgt.Graph" in json.dumps(pytree.treespec_dumps(spec))
    for other in (pickle.loads(pickle.dumps(spec)), copy.deepcopy(spec)):
        assert other == spec


@EVERY
def test_leaves_may_become_anything(name: str) -> None:
    graph = GRAPHS[name]()
    shapes = pytree.tree_map(lambda x: tuple(x.shape), graph)
    assert type(shapes) is Graph
    assert shapes.row_ptr == (graph.num_rows + 1,)
    assert "row_ptr=(" in repr(shapes)
    # as many leaves, one for one
    assert pytree.tree_structure(pytree.tree_map(len, graph)) == pytree.tree_structure(graph)
    numbers = pytree.tree_map(lambda x: x.numel(), graph)
    paired = pytree.tree_map(lambda x, n: x.numel() == n, graph, numbers)
    assert all(pytree.tree_leaves(paired))


def test_leaves_have_names() -> None:
    for name, expected in (
        ("square", ["row_ptr", "graph_ptr", "col", "edge"]),
        ("reordered", ["row_ptr", "graph_ptr", "col", "edge", "order"]),
        (
            "bipartite",
            ["row_ptr", "graph_ptr", "num_cols", "col_graph_ptr", "col", "edge"],
        ),
    ):
        found, _ = pytree.tree_flatten_with_path(GRAPHS[name]())
        assert [path[0].name for path, _ in found] == expected


class Layers(nn.Module):
    def forward(self, x: Tensor, edge_bias: Tensor, graph: Graph) -> Tensor:
        heads = x.view(-1, 2, 4)
        out = neighborhood_attention(heads, heads, heads, graph, edge_bias=edge_bias)
        out = out + linear_attention(heads, heads, heads, graph.graph_ptr)
        return aggregate(out.flatten(1), graph, edge_value=edge_bias.sum(1, True).expand(-1, 8))


def given(sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Graph]:
    parts = [Graph.from_edge_index(random_edge_index(i, n, e), n) for i, (n, e) in enumerate(sizes)]
    graph = Graph.batch(parts)
    generator = torch.Generator().manual_seed(graph.num_rows)
    shapes = (graph.num_rows, 8), (graph.num_edges, 2)
    x, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, bias, graph


ROWS, ALL, COUNT = Dim("rows", min=2), Dim("edges", min=2), Dim("graphs")
SHAPES: dict[str, tuple] = {
    "named": ({0: ROWS}, {0: ALL}, [{0: ROWS + 1}, {0: COUNT + 1}, {0: ALL}, {0: ALL}]),
    "auto": ({0: Dim.AUTO}, {0: Dim.AUTO}, [{0: Dim.AUTO}] * 4),
}
EXAMPLE = [(11, 29), (8, 14)]
OTHERS = [[(5, 7)], [(20, 70), (4, 0), (9, 31)], [(150, 900)]]
FRESH = """
import sys
import torch
import fastgt
program, calls = sys.argv[1:]
run = torch.export.load(program).module()
for given, expected in torch.load(calls):
    torch.testing.assert_close(run(*given), expected)
    print(given[2].num_rows, given[2].num_graphs)
"""


@pytest.mark.parametrize("shapes", SHAPES)
def test_a_program_runs_on_other_graphs_in_a_fresh_process(shapes: str, tmp_path: Path) -> None:
    layers = Layers()
    program = torch.export.export(layers, given(EXAMPLE), dynamic_shapes=SHAPES[shapes])
    torch.export.save(program, tmp_path / "layers.pt2")
    calls = [given(sizes) for sizes in OTHERS]
    torch.save([(call, layers(*call)) for call in calls], tmp_path / "calls.pt")
    run = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path / "layers.pt2", tmp_path / "calls.pt"],
        capture_output=True,
        text=True,
    )
    assert run.stdout == "5 1\n33 3\n150 1\n", run.stdout + run.stderr


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("impl", ["cpp", "triton"])
def test_no_number_of_edges_is_compared(
    impl: str, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "LAUNCH_BOUND", 40)
    monkeypatch.setattr(tiles, "SMALL_EDGES", 40)
    with fastgt.implementation(impl):  # type: ignore[arg-type]
        program = torch.export.export(
            Layers(), given(EXAMPLE), dynamic_shapes=SHAPES["named"], strict=strict
        )
    run = program.module()
    for sizes in (EXAMPLE, [(5, 7)], [(20, 70), (9, 31)]):
        call = given(sizes)
        torch.testing.assert_close(run(*call), Layers()(*call))


class Across(nn.Module):
    def forward(self, q: Tensor, k: Tensor, graph: Graph) -> Tensor:
        out = neighborhood_attention(q, k, k, graph)
        return graph.undo_order(out) if graph.order is not None else out


def test_columns_that_are_other_nodes_than_rows() -> None:
    cols = Dim("cols", min=2)
    leaves = [{0: ROWS + 1}, {}, {0: cols}, {}, {0: ALL}, {0: ALL}]
    shapes = ({0: ROWS}, {0: cols}, leaves)

    def call(rows: int, cols: int, edges: int) -> tuple[Tensor, Tensor, Graph]:
        ends = torch.randint(min(rows, cols), (2, edges))
        graph = Graph.from_edge_index(ends, (rows, cols))
        return torch.randn(rows, 1, 4), torch.randn(cols, 1, 4), graph

    run = torch.export.export(Across(), call(7, 9, 12), dynamic_shapes=shapes).module()
    for sizes in ((7, 9, 12), (31, 5, 40), (3, 20, 9)):
        inputs = call(*sizes)
        torch.testing.assert_close(run(*inputs), Across()(*inputs))
    square = torch.randn(4, 1, 4)
    with pytest.raises(ValueError, match="GraphSpec"):
        run(square, square, Graph.from_edge_index(SIX[:, :3], 4))


class ByType(nn.Module):
    def forward(self, nodes: dict[str, Tensor], bias: Tensor, graph: Graph) -> dict[str, Tensor]:
        types = graph.types
        assert types is not None
        q = torch.cat([nodes[kind] for kind in types.rows])
        k = torch.cat([nodes[source] * (i + 1) for i, (source, _, _) in enumerate(types.columns)])
        parts = [bias[part] * (i + 1) for i, part in enumerate(types.edges.values())]
        out = neighborhood_attention(q, k, k, graph, edge_bias=torch.cat(parts))
        return {kind: out[part] for kind, part in types.rows.items()}


def test_types_are_of_any_size() -> None:
    def call(a: int, b: int, edges: tuple[int, int, int]) -> tuple:
        sizes = {"a": a, "b": b}
        relations = ("a", "to", "b"), ("b", "to", "b"), ("b", "to", "a")
        ends = {
            (source, name, target): torch.stack(
                [torch.randint(sizes[source], (n,)), torch.randint(sizes[target], (n,))]
            )
            for (source, name, target), n in zip(relations, edges, strict=True)
        }
        graph = Graph.from_hetero(ends, sizes)
        nodes = {kind: torch.randn(n, 1, 4) for kind, n in sizes.items()}
        return nodes, torch.randn(graph.num_edges, 1), graph

    example = call(4, 7, (9, 12, 5))
    count = len(pytree.tree_leaves(example[2]))
    assert count == 6 + 2 + 3 + 3
    size = {0: Dim.AUTO}
    shapes = ({"a": size, "b": size}, size, [size] * count)
    run = torch.export.export(ByType(), example, dynamic_shapes=shapes).module()
    for inputs in (example, call(13, 5, (30, 4, 17)), call(6, 40, (3, 80, 11))):
        torch.testing.assert_close(run(*inputs), ByType()(*inputs))


def test_an_order_is_an_input_too() -> None:
    shapes = ({0: ROWS}, {0: ROWS}, [{0: ROWS + 1}, {}, {0: ALL}, {0: ALL}, {0: ROWS}])

    def call(rows: int, edges: int) -> tuple[Tensor, Tensor, Graph]:
        graph = Graph.from_edge_index(random_edge_index(0, rows, edges), rows)
        x = torch.randn(rows, 1, 4)
        return x, x, graph.reordered(torch.randperm(rows))

    run = torch.export.export(Across(), call(7, 12), dynamic_shapes=shapes).module()
    inputs = call(13, 40)
    torch.testing.assert_close(run(*inputs), Across()(*inputs))


def test_exporting_leaves_nothing_in_the_graph() -> None:
    x, bias, graph = given(EXAMPLE)
    torch.export.export(Layers(), (x, bias, graph), dynamic_shapes=SHAPES["auto"])
    assert {type(y) for y in graph._tensors()} == {Tensor}
    assert not graph.prepared.plans
    x.requires_grad_()
    Layers()(x, bias, graph).sum().backward()
    assert x.grad is not None

"""Shortest paths against a search in loops; degrees against counts."""

from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from encoding_cases import both_ways, molecules, one_way

from fastgt import Graph
from fastgt.encodings import degrees, paths, shortest_paths
from fastgt.testing import with_index_dtype

KINDS = 5


def types(graph: Graph, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, KINDS, (graph.num_edges,), generator=generator).to(dtype)


def literal(graph: Graph, kind: list[int]) -> list[list[int] | None]:
    """The types along the path of each pair, or None: the lowest last edge of the shortest."""
    edges, found = graph.edge_index.T.tolist(), []
    for first, last in pairwise(graph.graph_ptr.tolist()):
        for start in range(first, last):
            way, reached = {start: []}, {start}
            while reached:
                new = {}
                for number, (source, target) in enumerate(edges):
                    if source in reached and target not in way and target not in new:
                        new[target] = [*way[source], kind[number]]
                way.update(new)
                reached = set(new)
            found += [way.get(j) for j in range(first, last)]
    return found


def check(graph: Graph, distance: int, dtype: torch.dtype = torch.int64) -> None:
    kind = types(graph, dtype)
    lengths, found = shortest_paths(graph, kind, distance)
    assert lengths.dtype == torch.int64
    assert found.dtype == dtype
    wanted = literal(graph, kind.tolist())
    assert found.shape == (len(wanted), distance)
    cut = [None if path is None else path[: distance - 1] for path in wanted]
    assert lengths.tolist() == [distance if path is None else len(path) for path in cut]
    padded = [(path or []) + [0] * (distance - len(path or [])) for path in cut]
    assert found.tolist() == padded


@pytest.mark.parametrize("distance", [2, 3, 20])
@pytest.mark.parametrize("make", [one_way, both_ways])
def test_a_search_in_loops(make, distance):
    graph = make()
    check(graph, distance)
    assert distance == 20 or any(
        path is not None and len(path) > distance for path in literal(graph, [1] * 10**3)
    )


@pytest.mark.parametrize("edges", [1, 2, 3, 4, 19, 20])
@pytest.mark.parametrize("make", [one_way, both_ways])
def test_the_first_edges_alone(make, edges):
    graph = make()
    for distance in {max(edges, 2), 4, 20}:
        if edges > distance:
            continue
        lengths, found = shortest_paths(graph, types(graph), distance)
        again, cut = shortest_paths(graph, types(graph), distance, edges=edges)
        assert torch.equal(again, lengths)
        assert torch.equal(cut, found[:, :edges])


@pytest.mark.parametrize("room", [1, 10, 30])
def test_whatever_is_searched_at_once(room):
    with mock.patch.object(paths, "_ROOM", room):
        check(one_way(), 4)
        check(both_ways(), 4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_types_keep_their_dtype(dtype):
    check(one_way(), 4, dtype)


def test_molecules():
    try:
        graph = molecules(30)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    check(graph, 20)


def test_the_lowest_last_edge_is_taken():
    """Two paths 0 -> 3 of two edges; that over 2 has the lower last edge."""
    edges = torch.tensor([[0, 0, 2, 1], [1, 2, 3, 3]])
    lengths, found = shortest_paths(Graph.from_edge_index(edges), torch.tensor([1, 2, 3, 4]), 3)
    assert lengths[3] == 2
    assert found[3].tolist() == [2, 3, 0]


def test_graphs_without_nodes_or_edges():
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    none = torch.zeros(0, dtype=torch.int64)
    for n, wanted in ((0, []), (1, [0]), (2, [0, 3, 3, 0])):
        lengths, found = shortest_paths(Graph.from_edge_index(nothing, n), none, 3)
        assert lengths.tolist() == wanted
        assert found.tolist() == [[0, 0, 0]] * n**2


def test_same_with_other_indices_and_devices(device):
    graph = one_way().to(device)
    kind = types(graph).to(device)
    found = shortest_paths(graph, kind, 5)
    assert all(x.device == graph.device for x in found)
    again = shortest_paths(with_index_dtype(graph, torch.int64), kind, 5)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_progress_is_told(capsys):
    pytest.importorskip("tqdm")
    graph = one_way()
    with mock.patch.object(paths, "_ROOM", 40):
        shortest_paths(graph, types(graph), 3, progress=True)
    assert f"{graph.num_rows}.0/{graph.num_rows}.0" in capsys.readouterr().err


def test_more_than_fits_is_refused_before_it_is_taken():
    n = 2_000_000
    graph = Graph.from_edge_index(torch.zeros(2, 1, dtype=torch.int64), n)
    with pytest.raises(
        ValueError, match=r"shortest_paths takes 96,000\.0 GB for graphs of up to 2,000,000 nodes"
    ):
        shortest_paths(graph, torch.zeros(1, dtype=torch.int64), distance=2)
    with pytest.raises(ValueError, match=r"shortest_paths takes 36,000\.0 GB"):
        shortest_paths(graph, torch.zeros(1, dtype=torch.uint8), distance=511, edges=1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"distance": 1}, ValueError, "distance must be 2 at least, got 1"),
        ({"edges": 0}, ValueError, "edges must be positive, got 0"),
        ({"edges": 4}, ValueError, "edges must be distance=3 at most, got 4"),
        ({"edges": 2.5}, TypeError, "edges must be an int, got float"),
        ({"distance": 2.5}, TypeError, "distance must be an int, got float"),
        ({"edge_type": None}, TypeError, "edge_type must be a tensor of integers, got NoneType"),
        ({"edge_type": torch.ones(3)}, TypeError, "edge_type must hold integers .* torch.float32"),
        (
            {"edge_type": torch.ones(4, dtype=torch.int64)},
            ValueError,
            r"edge_type must be \[E\] = \[3\] integers, got \[4\]",
        ),
        ({"edge_type": torch.tensor([1, -2, 0])}, ValueError, "must not be negative, got -2"),
        ({"graph": torch.zeros(2, 3)}, TypeError, r"graph must be a fastgt\.Graph, got Tensor"),
        (
            {"graph": Graph.from_dense(torch.ones(1, 3, dtype=torch.bool))},
            ValueError,
            "graph must be square, got 1 rows and 3 columns",
        ),
    ],
)
def test_wrong_inputs_are_named(changes, error, message):
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]), 3)
    given = {"graph": graph, "edge_type": torch.tensor([1, 2, 3]), "distance": 3}
    with pytest.raises(error, match=message):
        shortest_paths(**(given | changes))


def test_degrees(device):
    graph = one_way().to(device)
    edges, n = graph.edge_index.tolist(), graph.num_rows
    wanted = [[edges[1].count(i), edges[0].count(i)] for i in range(n)]
    found = degrees(graph)
    assert found.dtype == torch.int64
    assert found.device == graph.device
    assert found.tolist() == wanted
    assert degrees(Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.int64), 0)).shape == (0, 2)
    with pytest.raises(TypeError, match=r"graph must be a fastgt\.Graph, got ndarray"):
        degrees(np.zeros((2, 2)))

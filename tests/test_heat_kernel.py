"""Heat kernels against an exponential of each graph's dense Laplacian."""

from unittest import mock

import numpy as np
import pytest
import torch
from encoding_cases import both_ways, dense, molecules, one_way
from scipy.linalg import expm
from scipy.sparse.csgraph import connected_components

from fastgt import Graph
from fastgt.encodings import heat_kernel, heat_kernel_pe
from fastgt.testing import with_index_dtype

TIMES = (3, 0.25, 0, 16.5, 1)


def literal(matrices: list[np.ndarray], times) -> np.ndarray:
    """diag(exp(-t L)) minus what is left in the end: 1 / n of each component of n nodes."""
    parts = [np.zeros((0, len(times)))]
    for a in matrices:
        laplacian = np.diag(a.sum(1)) - a
        label = connected_components(a)[1] if len(a) else np.zeros(0, int)
        left = [1 / (label == label[i]).sum() for i in range(len(a))]
        found = np.zeros((len(a), len(times)))
        for column, t in enumerate(times):
            found[:, column] = np.diag(expm(-t * laplacian)) - left
        parts.append(found)
    return np.concatenate(parts)


def check(graph: Graph, times=TIMES) -> None:
    found = heat_kernel_pe(graph, times)
    assert found.dtype == torch.float32
    wanted = literal(dense(graph), times)
    assert found.shape == wanted.shape
    assert np.allclose(found.double().numpy(), wanted, rtol=1e-6, atol=1e-11)


def large(**rooms):
    return mock.patch.multiple(heat_kernel, _DENSE=0, **rooms)


def test_an_exponential_of_dense_matrices():
    check(both_ways())
    check(both_ways(), [])


@pytest.mark.parametrize("room", [1, 100, 10**6])
def test_whatever_is_computed_at_once(room):
    with mock.patch.object(heat_kernel, "_ROOM", room):
        check(both_ways())
    with large(_LARGE_ROOM=room, _ROOM=1):
        check(both_ways())


@pytest.mark.parametrize("times", [[0], [1e-3], [200.0], [0, 5, 1000]])
def test_series_of_any_length(times):
    with large(_ROOM=1):
        check(both_ways(), times)


def test_molecules():
    try:
        graph = molecules(60)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    check(graph, range(1, 17))
    with large(_ROOM=1):
        check(graph, range(1, 17))


def test_a_graph_of_many_nodes():
    """Both ways of computing it agree, on a tree of more nodes than are decomposed."""
    n = heat_kernel._DENSE + 90
    edges = torch.tensor([[i, (i - 1) // 2] for i in range(1, n)]).T
    graph = Graph.from_edge_index(torch.cat([edges, edges.flip(0)], 1), n)
    found = heat_kernel_pe(graph, [0.5, 8])
    with mock.patch.object(heat_kernel, "_DENSE", n):
        torch.testing.assert_close(found, heat_kernel_pe(graph, [0.5, 8]), rtol=1e-6, atol=1e-9)


def test_one_way_edges():
    with pytest.raises(ValueError, match="symmetric, has 2 edges from node 1 to 2 but 0 back"):
        heat_kernel_pe(one_way(), [1])
    found = heat_kernel_pe(one_way(), TIMES, symmetrize=True)
    wanted = literal([np.maximum(a, a.T) for a in dense(one_way())], TIMES)
    assert np.allclose(found.double().numpy(), wanted, rtol=1e-6, atol=1e-11)


def test_it_names_the_nodes_of_the_batch():
    """The second graph is the smaller one, and so the first that is computed."""
    edges = torch.tensor([[0, 1, 3, 3], [1, 0, 4, 4]])
    graph = Graph.from_edge_index(edges, graph_ptr=torch.tensor([0, 3, 5]))
    with pytest.raises(ValueError, match="2 edges from node 3 to 4 but 0 back"):
        heat_kernel_pe(graph, [1])


def test_graphs_without_nodes_or_edges():
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    for n in (0, 1, 4, 600):
        found = heat_kernel_pe(Graph.from_edge_index(nothing, n), [0, 1])
        assert found.shape == (n, 2)
        assert found.double().numpy().max(initial=0) < 1e-12


def test_same_bits_with_other_indices_and_devices(device):
    graph = both_ways().to(device)
    found = heat_kernel_pe(graph, TIMES)
    assert found.device == graph.device
    assert torch.equal(found, heat_kernel_pe(with_index_dtype(graph, torch.int64), TIMES))


def test_progress_is_told(capsys):
    pytest.importorskip("tqdm")
    graph = both_ways()
    heat_kernel_pe(graph, [1], progress=True)
    with large(_LARGE_ROOM=20, _ROOM=1):
        heat_kernel_pe(graph, [1], progress=True)
    assert capsys.readouterr().err.count(f"{graph.num_rows}.0/{graph.num_rows}.0") == 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"times": [1, -2]}, ValueError, "times must be finite and not negative, got -2.0"),
        ({"times": [np.inf]}, ValueError, "times must be finite and not negative, got inf"),
        ({"times": ["a"]}, TypeError, "times must be a number, got str"),
        ({"graph": torch.zeros(2, 1)}, TypeError, r"graph must be a fastgt\.Graph, got Tensor"),
        (
            {"graph": Graph.from_dense(torch.ones(2, 3, dtype=torch.bool))},
            ValueError,
            "graph must be square, got 2 rows and 3 columns",
        ),
    ],
)
def test_wrong_inputs_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        heat_kernel_pe(**({"graph": both_ways(), "times": [1]} | changes))

"""Electrostatic encodings against loops over the pseudo-inverse of each graph's Laplacian."""

from unittest import mock

import numpy as np
import pytest
import torch
from encoding_cases import both_ways, dense, molecules, one_way

from fastgt import Graph
from fastgt.encodings import electrostatic, electrostatic_pe
from fastgt.testing import with_index_dtype


def literal(matrices: list[np.ndarray]) -> np.ndarray:
    rows = [np.zeros((0, 10))]
    for a in matrices:
        n = len(a)
        a = a - np.diag(np.diag(a))
        inverse = np.linalg.pinv(np.diag(a.sum(1)) - a, rcond=1e-10)
        v = np.array([[inverse[i, j] - inverse[j, j] for j in range(n)] for i in range(n)])
        for j in range(n):
            row = []
            for x in (v[:, j], v[j, :]):
                mean = sum(x) / n
                variance = sum((x - mean) ** 2) / (n - 1) if n > 1 else 0
                row += [min(x), max(x), mean, variance**0.5]
            share = [a[i, j] / max(a[i].sum(), 1) for i in range(n)]
            row.append(sum(share[i] * v[i, j] for i in range(n)))
            share = a[j] / max(a[j].sum(), 1)
            row.append(sum(share[i] * v[j, i] for i in range(n)))
            rows.append(np.array([row]))
    return np.concatenate(rows)


def check(graph: Graph) -> None:
    found, wanted = electrostatic_pe(graph), literal(dense(graph))
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    assert np.allclose(found.double().numpy(), wanted, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("room", [1, 100, 10**6])
def test_loops_over_a_pseudo_inverse(room):
    with mock.patch.object(electrostatic, "_ROOM", room):
        check(both_ways())


def test_molecules():
    try:
        graph = molecules(20)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    check(graph)
    assert electrostatic_pe(graph)[:, [1, 5]].abs().max() < 1e-12


def test_one_way_edges():
    with pytest.raises(ValueError, match="symmetric, has 2 edges from node 1 to 2 but 0 back"):
        electrostatic_pe(one_way())
    found = electrostatic_pe(one_way(), symmetrize=True)
    wanted = literal([np.maximum(a, a.T) for a in dense(one_way())])
    assert np.allclose(found.double().numpy(), wanted, rtol=1e-6, atol=1e-10)


def test_graphs_without_nodes_or_edges():
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    for n in (0, 1, 4):
        found = electrostatic_pe(Graph.from_edge_index(nothing, n))
        assert found.shape == (n, 10)
        assert not found.any()


def test_same_bits_with_other_indices_and_devices(device):
    graph = both_ways().to(device)
    found = electrostatic_pe(graph)
    assert found.device == graph.device
    assert torch.equal(found, electrostatic_pe(with_index_dtype(graph, torch.int64)))


def test_progress_is_told(capsys):
    pytest.importorskip("tqdm")
    graph = both_ways()
    electrostatic_pe(graph, progress=True)
    assert f"{graph.num_rows}.0/{graph.num_rows}.0" in capsys.readouterr().err


def test_a_graph_that_is_too_large_is_refused():
    n = 2_000_000
    graph = Graph.from_edge_index(torch.zeros(2, 1, dtype=torch.int64), n)
    with pytest.raises(
        ValueError, match=r"electrostatic_pe takes 192,000\.0 GB for graphs of up to 2,000,000 node"
    ):
        electrostatic_pe(graph)


@pytest.mark.parametrize(
    ("graph", "error", "message"),
    [
        (torch.zeros(2, 1), TypeError, r"graph must be a fastgt\.Graph, got Tensor"),
        (
            Graph.from_dense(torch.ones(2, 3, dtype=torch.bool)),
            ValueError,
            "graph must be square, got 2 rows and 3 columns",
        ),
    ],
)
def test_wrong_inputs_are_named(graph, error, message):
    with pytest.raises(error, match=message):
        electrostatic_pe(graph)

"""Probabilities of return against powers of dense matrices."""

import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from encoding_cases import both_ways, dense, molecules, one_way

from fastgt import Graph
from fastgt.encodings import random_walk, random_walk_pe
from fastgt.testing import with_index_dtype


def literal(graph: Graph, steps: int) -> np.ndarray:
    """Diagonals of (D^-1 A)^t, graph by graph."""
    parts = [np.zeros((0, steps))]
    for a in dense(graph):
        degree = a.sum(1)
        p = a / np.where(degree > 0, degree, 1)[:, None]
        power, columns = np.eye(len(a)), np.zeros((len(a), steps))
        for t in range(steps):
            power = power @ p
            columns[:, t] = np.diag(power)
        parts.append(columns)
    return np.concatenate(parts)


def check(graph: Graph, steps: int) -> None:
    found, wanted = random_walk_pe(graph, steps), literal(graph, steps)
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    # rounded once, to float32
    assert np.allclose(found.double().numpy(), wanted, rtol=1e-7, atol=1e-15)


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 20])
@pytest.mark.parametrize("make", [one_way, both_ways])
def test_powers_of_dense_matrices(make, steps):
    check(make(), steps)


@pytest.mark.parametrize("room", [1, 100, 10**6])
@pytest.mark.parametrize("make", [one_way, both_ways])
def test_whatever_is_computed_at_once(make, room):
    with mock.patch.object(random_walk, "_ROOM", room):
        check(make(), 5)


@pytest.mark.parametrize("density", [0, 0.3, 1])
@pytest.mark.parametrize("room", [1, 30, 10**6])
@pytest.mark.parametrize("make", [one_way, both_ways])
def test_slices_of_large_graphs(make, room, density):
    rooms = {"_SPARSE_ROOM": room, "_DENSE_ROOM": room // 2}
    with mock.patch.multiple(random_walk, **rooms, _SPARSE=0, _DENSITY=density, _ROOM=1):
        check(make(), 9)


def test_molecules():
    try:
        graph = molecules(200)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    check(graph, 20)
    # a ring of benzene returns after two steps with probability 1/2 where no branch leaves it
    assert (random_walk_pe(graph, 3)[:, 0] == 0).all()


def test_it_is_that_of_torch_geometric():
    pytest.importorskip("torch_geometric")
    from torch_geometric.data import Data
    from torch_geometric.transforms import AddRandomWalkPE

    generator = torch.Generator().manual_seed(0)
    # without duplicates, of which torch-geometric forgets all but one
    edges = torch.randint(0, 30, (2, 70), generator=generator).unique(dim=1)
    graph = Graph.from_edge_index(edges, 30)
    data = Data(edge_index=edges, num_nodes=30)
    theirs = AddRandomWalkPE(6, attr_name="pe")(data).pe
    torch.testing.assert_close(random_walk_pe(graph, 6), theirs)


def test_graphs_without_nodes_or_edges():
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    assert random_walk_pe(Graph.from_edge_index(nothing, 0), 3).shape == (0, 3)
    assert random_walk_pe(Graph.from_edge_index(nothing, 1), 3).tolist() == [[0, 0, 0]]
    assert not random_walk_pe(Graph.from_edge_index(nothing, 700), 3).any()
    loop = Graph.from_edge_index(torch.zeros(2, 1, dtype=torch.int64), 1)
    assert random_walk_pe(loop, 3).tolist() == [[1, 1, 1]]


def test_other_numbers_of_nodes_permute_the_rows():
    graph = one_way()
    single = Graph.from_edge_index(graph.edge_index, graph.num_rows)
    order = torch.from_numpy(np.random.default_rng(0).permutation(graph.num_rows))
    moved = random_walk_pe(single.reordered(order), 8)
    torch.testing.assert_close(moved, random_walk_pe(single, 8)[order], rtol=1e-6, atol=1e-12)


def test_same_bits_every_time_and_the_graph_is_left_alone(device):
    graph = one_way().to(device)
    kept = graph.col.clone(), graph.row_ptr.clone()
    found = random_walk_pe(graph, 6)
    assert found.device == graph.device
    assert torch.equal(found, random_walk_pe(with_index_dtype(graph, torch.int64), 6))
    assert torch.equal(graph.col, kept[0])
    assert torch.equal(graph.row_ptr, kept[1])


def test_a_large_graph_takes_no_square_of_its_nodes():
    """100,000 nodes, in a process whose peak grows by 1 GB at most; a matrix would take 80."""
    code = (
        "import resource, torch\n"
        "from fastgt import Graph\nfrom fastgt.encodings import random_walk_pe\n"
        "import scipy.sparse\n"
        "n = 100_000\n"
        "i = torch.arange(n)\n"
        "one = torch.stack([i, (i + 1) % n])\n"
        "g = Graph.from_edge_index(torch.cat([one, one.flip(0)], 1), n)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak()\n"
        "pe = random_walk_pe(g, 4)\n"
        "print(pe.unique(dim=0).tolist())\n"
        "print(peak() - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    values, grown = run.stdout.splitlines()
    assert values == "[[0.0, 0.5, 0.0, 0.375]]", run.stderr
    assert float(grown) < 1000


def test_progress_is_told(capsys):
    pytest.importorskip("tqdm")
    graph = one_way()
    random_walk_pe(graph, 3, progress=True)
    assert f"{graph.num_rows}.0/{graph.num_rows}.0" in capsys.readouterr().err
    with mock.patch.multiple(random_walk, _SPARSE=0, _SPARSE_ROOM=30, _ROOM=1):
        random_walk_pe(graph, 3, progress=True)
    assert f"{graph.num_rows}.0/{graph.num_rows}.0" in capsys.readouterr().err
    random_walk_pe(graph, 3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"steps": 2.0}, TypeError, "steps must be an int, got float"),
        ({"steps": True}, TypeError, "steps must be an int, got bool"),
        ({"steps": -1}, ValueError, "steps must not be negative, got -1"),
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
        random_walk_pe(**({"graph": one_way(), "steps": 2} | changes))


def test_without_scipy():
    code = (
        "import sys; sys.modules['scipy'] = None\n"
        "import torch, fastgt\nfrom fastgt.encodings import random_walk_pe\n"
        "g = fastgt.Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]))\n"
        "try: random_walk_pe(g, 1)\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "random_walk_pe needs scipy, which is not installed\n", run.stderr

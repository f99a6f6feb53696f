"""fastgt.distributed.edge_list and ``fastgt partition``: a graph of a file that is sorted on disk
is the graph that memory would hold."""

import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgt import Graph
from fastgt.cli import main
from fastgt.distributed import edge_list_graph, partition, read_part
from fastgt.distributed.part import cut
from fastgt.distributed.partition_files import read_meta
from fastgt.drawn_graphs import write_rmat

module = sys.modules["fastgt.distributed.edge_list"]


def save(path, ends, form):
    """The edges in a file of some form -> the argument that says so."""
    if form in ("int32", "int64"):
        ends.T.astype(form).tofile(path)
        return {"pairs": form}
    if form == "columns":
        np.save(path, np.asfortranarray(ends))
    else:
        np.save(path, ends.astype(form))
    return {}


@given(
    seed=st.integers(0, 2**31),
    nodes=st.integers(1, 12),
    edges=st.integers(0, 60),
    power=st.sampled_from([1, 4]),
    in_order=st.booleans(),
    form=st.sampled_from(["<i4", "<i8", ">i8", "<u2", "columns", "int32", "int64"]),
    chunk=st.integers(1, 40),
    sized=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_it_is_the_graph_of_memory(
    tmp_path_factory, seed, nodes, edges, power, in_order, form, chunk, sized
):
    folder = tmp_path_factory.mktemp("edges")
    generator = torch.Generator().manual_seed(seed)
    ends = (torch.rand(2, edges, generator=generator) ** power * nodes).long()
    if in_order:
        ends = ends[:, ends[1].sort(stable=True).indices]
    options = save(folder / "list.npy", ends.numpy(), form)
    size = nodes if sized else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        found = edge_list_graph(folder / "list.npy", folder / "sorted", size, **options)
    expected = Graph.from_edge_index(ends, size)
    assert found.num_rows == expected.num_rows
    for name in ("row_ptr", "col", "edge", "graph_ptr"):
        x, y = getattr(found, name), getattr(expected, name)
        assert x.dtype == y.dtype
        assert torch.equal(x, y), name
    assert sorted(x.name for x in (folder / "sorted").iterdir()) == ["col.npy", "edge.npy"]
    shutil.rmtree(folder)


def test_the_partition_of_a_file_is_that_of_memory(tmp_path):
    write_rmat(tmp_path / "list.npy", 10, 20_000)
    graph = edge_list_graph(tmp_path / "list.npy", tmp_path / "sorted")
    ends = torch.from_numpy(np.load(tmp_path / "list.npy"))
    expected = Graph.from_edge_index(ends)
    assert torch.equal(partition(graph, 7, "ldg"), partition(expected, 7, "ldg"))


def test_a_list_that_holds_no_edges_of_nodes_is_refused(tmp_path):
    path = tmp_path / "list.npy"
    for array, nodes, said in (
        (np.zeros((3, 4), dtype=np.int32), None, r"must hold an array \[2, E\], got \[3, 4\]"),
        (np.zeros((2, 4)), None, "must hold integers, got float64"),
        (np.array([[0, 1], [2, -3]]), None, "the target of edge 1 is -3, which is none of the"),
        (np.array([[0, 9], [2, 3]]), 5, "the source of edge 1 is 9, .* of which there are 5"),
        (np.array([[0, 4], [5, 3]]), 5, "the target of edge 0 is 5, .* of which there are 5"),
    ):
        np.save(path, array)
        with pytest.raises(ValueError, match=said):
            edge_list_graph(path, tmp_path / "sorted", nodes)
    path.write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"list\.npy cannot be read as a \.npy array"):
        edge_list_graph(path, tmp_path / "sorted")
    with pytest.raises(ValueError, match="has 8 bytes, which are not whole pairs of 16"):
        edge_list_graph(path, tmp_path / "sorted", pairs="int64")
    with pytest.raises(ValueError, match="pairs must be 'int32' or 'int64', got 'int16'"):
        edge_list_graph(path, tmp_path / "sorted", pairs="int16")


def test_rmat_has_its_probabilities_and_is_the_same_again(tmp_path):
    path = tmp_path / "list.npy"
    edges = (1 << 20) + 12_345  # more than a chunk
    write_rmat(path, 3, edges, seed=4)
    first = np.load(path)
    assert first.shape == (2, edges)
    assert first.dtype == np.int32
    cell = np.bincount(8 * first[0] + first[1], minlength=64).reshape(8, 8) / edges
    once = np.array([[0.57, 0.19], [0.19, 0.05]])
    expected = np.kron(np.kron(once, once), once)
    assert np.abs(cell - expected).max() < 5 * np.sqrt(0.19 / edges)
    write_rmat(path, 3, edges, seed=4)
    assert np.array_equal(np.load(path), first)
    write_rmat(path, 3, edges, seed=5)
    assert not np.array_equal(np.load(path), first)
    write_rmat(path, 32, 10)
    assert np.load(path).dtype == np.int64
    with pytest.raises(ValueError, match="levels must be from 1 to 62, got 0"):
        write_rmat(path, 0, 1)
    with pytest.raises(ValueError, match="edges must not be negative, got -1"):
        write_rmat(path, 3, -1)


def small():
    generator = torch.Generator().manual_seed(0)
    return Graph.from_edge_index(torch.randint(50, (2, 300), generator=generator), 50)


@pytest.mark.parametrize("form", ["graph", "npy", "npz", "pairs of npz"])
def test_the_command_writes_parts_and_prints_the_report(tmp_path, capsys, form):
    graph = small()
    path = tmp_path / {"graph": "a.fastgt", "npy": "a.npy"}.get(form, "a.npz")
    source, target = graph.edge_index
    if form == "graph":
        graph.save(path)
    elif form == "npy":
        np.save(path, graph.edge_index.numpy())
    else:
        both = torch.cat([graph.edge_index, torch.stack([target, source])], 1).unique(dim=1)
        graph = Graph.from_edge_index(both[:, (both[1] * 50 + both[0]).sort().indices], 50)
        ends = torch.stack([source, target]).numpy()
        if form == "npz":
            np.savez(path, edge_index=ends, y=np.zeros(50))
        else:
            np.savez(path, edges=ends.T, num_nodes=50)
    output = tmp_path / "parts"
    command = ["partition", str(path), "--parts", "3", "--method", "hash", "--seed", "5"]
    assert main([*command, "--output", str(output), "--network", "nvlink4"]) == 0
    said = capsys.readouterr().out
    assert "3 ranks" in said
    assert "a model of nvlink4, not measured" in said
    assert said.endswith(f"wrote 3 parts to {output}\n")
    part = partition(graph, 3, "hash", seed=5)
    assert read_meta(output).parts == 3
    for rank in range(3):
        found, expected = read_part(output, rank), cut(graph, part, part, rank, 3)
        assert torch.equal(found.edge, expected.edge)
        assert torch.equal(found.col, expected.col)
    assert main(command) == 0
    assert "wrote" not in capsys.readouterr().out


def test_the_command_says_what_is_wrong_with_a_file(tmp_path, capsys):
    wrong = {
        "a.npz": f"{tmp_path}/a.npz must have edge_index [2, E] or edges [E, 2], and num_nodes",
        "b.npz": f"{tmp_path}/b.npz cannot be read as a .npz",
        "c.fastgt": "c.fastgt cannot be read as a graph",
        "d.npy": "No such file",
    }
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    (tmp_path / "b.npz").write_bytes(b"no archive")
    (tmp_path / "c.fastgt").write_bytes(b"no graph")
    for name, said in wrong.items():
        assert main(["partition", str(tmp_path / name), "--parts", "2"]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["partition", "a.npz", "--parts", "0"])

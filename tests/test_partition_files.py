"""Parts in a folder: what is read is what was written, or is refused and says why."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgt import Graph
from fastgt.distributed import (
    partition,
    read_part,
    read_pyg_partition,
    read_tensors,
    write_partitions,
)
from fastgt.distributed.part import cut
from fastgt.distributed.partition_files import read_meta

SAVED = {"x": (5,), "edge_attr": (2, 3), "y": ()}


def example(seed=0, nodes=12, edges=40, parts=3):
    generator = torch.Generator().manual_seed(seed)
    graph = Graph.from_edge_index(torch.randint(nodes, (2, edges), generator=generator), nodes)
    part = torch.randint(parts, (nodes,), generator=generator)
    tensors = {
        name: torch.randn(edges if "edge" in name else nodes, *shape, generator=generator)
        for name, shape in SAVED.items()
    }
    return graph, part, tensors


def same(one, two):
    """Whether two parts have the same fields."""
    flat = [[*x[:2], *x.whole, *x[3:]] for x in (one, two)]
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(*flat, strict=True)
    )


@st.composite
def cases(draw):
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    parts, rows = draw(st.integers(1, 4)), draw(st.integers(0, 10))
    square = draw(st.booleans())
    cols = rows if square else draw(st.integers(1, 8).filter(lambda n: n != rows))
    edges = draw(st.integers(0, 30)) if rows else 0

    def below(n, size):
        return torch.randint(max(n, 1), (size,), generator=generator)

    ends = torch.stack([below(cols, edges), below(rows, edges)])
    graph = Graph.from_edge_index(ends, (rows, cols))
    if draw(st.booleans()):
        graph = Graph.batch([graph, graph])
    row_part = below(parts, graph.num_rows)
    return graph, row_part, row_part if square else below(parts, graph.num_cols), parts


@given(cases(), st.sampled_from([torch.float64, torch.bfloat16, torch.int8, torch.bool]))
@settings(deadline=None, max_examples=20)
def test_what_is_read_is_the_part_and_its_tensors(tmp_path_factory, case, dtype):
    graph, row_part, col_part, parts = case
    folder = tmp_path_factory.mktemp("parts")
    square = col_part is row_part
    sizes = {"x": graph.num_rows, "edge_attr": graph.num_edges, "x_col": graph.num_cols}
    tensors = {name: (torch.arange(2 * n) % 3).view(n, 2).to(dtype) for name, n in sizes.items()}
    given_ = row_part if square else (row_part, col_part)
    write_partitions(folder, graph, given_, parts=parts, **tensors)
    for rank in range(parts):
        expected = cut(graph, row_part, col_part, rank, parts)
        part = read_part(folder, rank)
        assert same(part, expected)
        assert (part.cols is part.rows) == square
        found = read_tensors(folder, rank)
        places = {"x": part.rows, "edge_attr": part.edge, "x_col": part.cols}
        assert list(found) == list(tensors)
        for name, x in found.items():
            assert x.dtype == dtype
            assert torch.equal(x, tensors[name][places[name]])
    shutil.rmtree(folder)


def test_tensors_stay_in_their_files(tmp_path):
    graph, part, tensors = example()
    write_partitions(tmp_path, graph, part, **tensors)
    x = read_tensors(tmp_path, 0, ["x"])["x"]
    mapped = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "part-0" / "tensors" / "x.npy") in mapped
    x.zero_()  # in this process alone
    assert torch.equal(read_tensors(tmp_path, 0)["x"], tensors["x"][part == 0])


def test_a_partition_is_replaced_and_its_hash_is_that_of_the_graph_and_its_ranks(tmp_path):
    graph, part, tensors = example()
    write_partitions(tmp_path, graph, part, **tensors)
    first = read_meta(tmp_path)
    assert first.tensors == ["x", "edge_attr", "y"]
    write_partitions(tmp_path, graph, part, x=tensors["x"])
    second = read_meta(tmp_path)
    assert second.partition == first.partition
    assert second.tensors == ["x"]
    with pytest.raises(ValueError, match=r"has no tensor 'y'; it has \['x'\]"):
        read_tensors(tmp_path, 0, ["y"])
    write_partitions(tmp_path, graph, part.flip(0))
    assert read_meta(tmp_path).partition != first.partition
    assert read_tensors(tmp_path, 0) == {}


def test_half_written_folders_are_refused(tmp_path, monkeypatch):
    graph, part, tensors = example()
    with pytest.raises(ValueError, match="holds no partition, or one that was not written to the"):
        read_part(tmp_path, 0)
    write_partitions(tmp_path, graph, part, **tensors)
    # the disk is full at the last part of another writing
    import fastgt.distributed.partition_files as module

    save = np.save

    def full(file, array, **options):
        if "part-2" in str(file.name):
            raise OSError(28, "No space left on device")
        save(file, array, **options)

    monkeypatch.setattr(module.np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_partitions(tmp_path, graph, part.flip(0), **tensors)
    with pytest.raises(ValueError, match="holds no partition, or one that was not written to the"):
        read_part(tmp_path, 0)


def test_parts_of_two_partitions_are_not_mixed(tmp_path):
    graph, part, tensors = example()
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    write_partitions(one, graph, part, **tensors)
    write_partitions(two, graph, part.flip(0), **tensors)
    write_partitions(three, graph, part, x=tensors["x"] + 1)
    hashes = [read_meta(folder).partition for folder in (one, two)]
    shutil.copytree(two / "part-1", one / "part-1", dirs_exist_ok=True)
    said = f"part-1 is of partition {hashes[1]}, but .*one holds partition {hashes[0]}.*mixed"
    with pytest.raises(ValueError, match=said):
        read_part(one, 1)
    assert len(read_part(one, 0).rows)  # the others are whole
    shutil.copytree(three / "part-1", one / "part-1", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="is of another writing of this partition"):
        read_tensors(one, 1)
    shutil.copy(two / "part-2" / "row.npy", one / "part-2" / "row.npy")
    with pytest.raises(ValueError, match=r"part-2/row.npy .*of another partition"):
        read_part(one, 2)


def test_what_is_cut_short_or_absent_is_refused_with_both_sizes(tmp_path):
    graph, part, tensors = example()
    write_partitions(tmp_path, graph, part, **tensors)
    path = tmp_path / "part-0" / "edge.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=f"has {len(whole) - 5} bytes instead of {len(whole)}"):
        read_part(tmp_path, 0)
    path.unlink()
    with pytest.raises(ValueError, match=r"edge\.npy is absent: the partition is not whole"):
        read_part(tmp_path, 0)
    (tmp_path / "part-1" / "part.json").unlink()
    with pytest.raises(ValueError, match=r"part\.json is absent: the partition is not whole"):
        read_part(tmp_path, 1)
    with pytest.raises(ValueError, match="rank 3 is none of the 3 parts"):
        read_part(tmp_path, 3)


@given(st.data())
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_flipped_bit_goes_unseen(tmp_path, data):
    folder = tmp_path / "parts"
    if not folder.exists():
        graph, part, tensors = example()
        write_partitions(folder, graph, part, **tensors)
    mine = [x for x in sorted(folder.rglob("*.*")) if x.is_file() and "part-" not in str(x)]
    mine += [x for x in sorted((folder / "part-1").rglob("*.*")) if x.is_file()]
    path = data.draw(st.sampled_from(mine))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, 8 * len(whole) - 1))
    flipped = bytearray(whole)
    flipped[place // 8] ^= 1 << place % 8
    path.write_bytes(flipped)
    try:
        with pytest.raises(ValueError, match=r"damaged|mixed|cannot be read|not written|version"):
            read_part(folder, 1), read_tensors(folder, 1)
    finally:
        path.write_bytes(whole)


def test_a_file_of_another_program_or_version_is_refused(tmp_path):
    graph, part, _ = example()
    (tmp_path / "meta.json").write_text('{"made by": "another program"}')
    with pytest.raises(ValueError, match="was not written by write_partitions"):
        write_partitions(tmp_path, graph, part)
    assert "another program" in (tmp_path / "meta.json").read_text()
    with pytest.raises(ValueError, match="not written by write_partitions"):
        read_part(tmp_path, 0)
    (tmp_path / "meta.json").write_text("[1]")
    with pytest.raises(ValueError, match="cannot be read"):
        read_part(tmp_path, 0)


def test_tensors_that_do_not_fit_are_refused(tmp_path):
    graph, part, tensors = example()
    for bad, kind, said in (
        ({"x": tensors["x"][:-1]}, ValueError, r"x must be \[12, \.\.\.\].*nodes, got \[11, 5\]"),
        ({"edge_w": torch.ones(12)}, ValueError, r"edge_w must be \[40, \.\.\.\].*edges.*\[12\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[12, \.\.\.\].*got \[\]"),
        ({"x": [1.0] * 12}, TypeError, "x must be a tensor, got list"),
        ({"x": tensors["x"].to_sparse()}, TypeError, "x must be a dense tensor"),
        ({"../x": tensors["x"]}, ValueError, "'../x' must be a name of letters"),
    ):
        with pytest.raises(kind, match=said):
            write_partitions(tmp_path, graph, part, **bad)
    assert not (tmp_path / "meta.json").exists()
    with pytest.raises(ValueError, match=r"part must be \[12\].*got \[11\]"):
        write_partitions(tmp_path, graph, part[1:])
    write_partitions(tmp_path, graph, part)
    with pytest.raises(TypeError, match="several names, got the str 'x'"):
        read_tensors(tmp_path, 0, "x")


def write_like_pyg(root, graph, part, x, edge_attr):
    """Files as torch_geometric's Partitioner writes them: nodes in any order within a part, edges
    by target, features of edges in a defaultdict."""
    source, target = graph.edge_index
    for rank in range(int(part.max()) + 1):
        folder = root / f"part_{rank}"
        folder.mkdir(parents=True)
        nodes = (part == rank).nonzero().flatten().flip(0)
        edge = (part[target] == rank).nonzero().flatten().flip(0)
        edge = edge[target[edge].sort(stable=True).indices]
        size = (len(part), len(part))
        ends = {"edge_id": edge, "row": source[edge], "col": target[edge], "size": size}
        torch.save(ends, folder / "graph.pt")
        torch.save({"global_id": nodes, "feats": {"x": x[nodes]}}, folder / "node_feats.pt")
        feats = defaultdict()
        feats.update({"global_id": edge, "feats": {"edge_attr": edge_attr[edge]}})
        torch.save(feats, folder / "edge_feats.pt")
    torch.save(part, root / "node_map.pt")
    torch.save(part[target], root / "edge_map.pt")
    meta = {"num_parts": rank + 1, "node_types": None, "edge_types": None, "node_offset": None}
    meta |= {"is_hetero": False, "is_sorted": True}
    (root / "META.json").write_text(json.dumps(meta))


@given(seed=st.integers(0, 2**31), parts=st.integers(1, 4))
@settings(deadline=None, max_examples=8)
def test_a_partition_of_pyg_is_the_same_part(tmp_path_factory, seed, parts):
    graph, _, tensors = example(seed)
    part = partition(graph, parts, "hash", seed=seed)
    root = tmp_path_factory.mktemp("pyg")
    write_like_pyg(root, graph, part, tensors["x"], tensors["edge_attr"])
    for rank in range(int(part.max()) + 1):
        found, features = read_pyg_partition(root, rank)
        expected = cut(graph, part, part, rank, int(part.max()) + 1)
        assert same(found, expected)
        assert torch.equal(features["x"], tensors["x"][found.rows])
        assert torch.equal(features["edge_attr"], tensors["edge_attr"][found.edge])
    shutil.rmtree(root)


def test_a_partition_of_pyg_is_read_where_its_classes_are_allowed(tmp_path):
    graph, part, tensors = example()
    write_like_pyg(tmp_path, graph, part, tensors["x"], tensors["edge_attr"])
    with torch.serialization.safe_globals([defaultdict]):  # as torch_geometric does
        before = set(torch.serialization.get_safe_globals())
        found, features = read_pyg_partition(tmp_path, 0)
        assert set(torch.serialization.get_safe_globals()) == before
    assert torch.equal(features["edge_attr"], tensors["edge_attr"][found.edge])


def test_a_partition_of_pyg_that_does_not_fit_is_refused(tmp_path):
    graph, part, tensors = example()
    with pytest.raises(ValueError, match=r"no META\.json"):
        read_pyg_partition(tmp_path, 0)
    write_like_pyg(tmp_path, graph, part, tensors["x"], tensors["edge_attr"])
    with pytest.raises(ValueError, match="rank 3 is none of the 3 parts"):
        read_pyg_partition(tmp_path, 3)
    other = tmp_path / "part_1" / "graph.pt"
    path = tmp_path / "part_0" / "graph.pt"
    whole = path.read_bytes()
    shutil.copy(other, path)
    with pytest.raises(ValueError, match=r"node_map\.pt gives to rank 1, not 0"):
        read_pyg_partition(tmp_path, 0)
    fewer = torch.load(other) | {
        name: x[1:] for name, x in torch.load(other).items() if name != "size"
    }
    torch.save(fewer, other)
    ours = int((part[graph.edge_index[1]] == 1).sum())
    with pytest.raises(ValueError, match=f"has {ours - 1} edges, .* gives rank 1 {ours}"):
        read_pyg_partition(tmp_path, 1)
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"graph\.pt cannot be read"):
        read_pyg_partition(tmp_path, 0)
    path.write_bytes(whole)
    features = tmp_path / "part_0" / "node_feats.pt"
    torch.save({"global_id": torch.tensor([0]), "feats": {"x": torch.ones(1)}}, features)
    with pytest.raises(ValueError, match="has features of 1 nodes, the rank has"):
        read_pyg_partition(tmp_path, 0)
    (tmp_path / "META.json").write_text('{"num_parts": 3, "is_hetero": true}')
    with pytest.raises(ValueError, match="heterogeneous"):
        read_pyg_partition(tmp_path, 0)

"""Graph.save and Graph.load: what comes back, what is mapped, and what is refused."""

import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_cases import SIX, Sorts, assert_same, cases, examples, few
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgt import Graph, graph_file, neighborhood_attention
from fastgt.prepared import ColumnWalk
from fastgt.testing import with_index_dtype

PTR = torch.tensor([0, 4, 6])
HETERO = {("a", "to", "b"): SIX, ("b", "to", "b"): SIX[:, :2]}
GRAPHS: dict[str, Callable[[], Graph]] = {
    "batch": lambda: Graph.from_edge_index(SIX, graph_ptr=PTR),
    "reordered": lambda: Graph.from_edge_index(SIX, graph_ptr=PTR).reordered("degree"),
    "as many rows as columns": lambda: Graph.complete(PTR, torch.tensor([0, 1, 6])),
    "hetero": lambda: Graph.from_hetero(HETERO, {"a": 6, "b": 6}),
    "no nodes": lambda: Graph.batch([]),
    "no edges": lambda: Graph.from_edge_index(SIX[:, :0], (3, 4)),
    "planned": lambda: Graph.from_edge_index(SIX, 6).plan("windows"),
}
BOTH = pytest.mark.parametrize("columns", [False, True])


@pytest.mark.parametrize("mmap", [False, True])
@BOTH
@pytest.mark.parametrize("name", GRAPHS)
def test_what_is_saved_is_loaded(name: str, columns: bool, mmap: bool, tmp_path: Path) -> None:
    graph = GRAPHS[name]()
    graph.save(tmp_path / "graph", columns=columns)
    with Sorts() as sorts:
        twin = Graph.load(tmp_path / "graph", mmap)
    assert sorts.count == 0
    assert (twin.prepared.columns is not None) == columns
    assert (twin.graph_ptr is twin.col_graph_ptr) == (graph.graph_ptr is graph.col_graph_ptr)
    assert twin.types == graph.types
    assert (twin.order is None) == (graph.order is None)
    if graph.order is not None and twin.order is not None:
        assert torch.equal(twin.order, graph.order)
    assert_same(twin, graph)
    assert twin.settled is None
    assert os.listdir(tmp_path) == ["graph"]


@settings(few, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases(), st.booleans())
def test_every_graph(tmp_path: Path, case: Any, columns: bool) -> None:
    graph = case.graph()
    graph.save(str(tmp_path / "graph"), columns=columns)
    assert_same(Graph.load(str(tmp_path / "graph")), graph)


def large() -> Graph:
    return Graph.from_edge_index(torch.randint(0, 1000, (2, 50_000)), 1000)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says what is mapped")
def test_tensors_stay_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "graph"
    large().save(path)

    def mapped() -> bool:
        return str(path) in Path("/proc/self/maps").read_text()

    graph = Graph.load(path, mmap=False)
    assert not mapped()
    graph = Graph.load(path)
    assert mapped()
    x = torch.randn(1000, 1, 4, requires_grad=True)
    neighborhood_attention(x, x, x, graph).sum().backward()
    graph.col[0] = 0  # a page of its own: the file stays as it is
    assert_same(Graph.load(path), Graph.load(path, mmap=False))


def test_a_file_holds_no_more_than_the_graph(tmp_path: Path) -> None:
    graph = large()
    wide = torch.cat([graph.col, graph.col, graph.col])
    part = graph._replace(col=wide[: graph.num_edges])
    part.save(tmp_path / "part")
    graph.save(tmp_path / "graph")
    assert os.path.getsize(tmp_path / "part") == os.path.getsize(tmp_path / "graph")
    assert os.path.getsize(tmp_path / "graph") < 2 * 4 * 50_000 + 20_000


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "graph"
    before = Graph.from_edge_index(SIX, 6)
    before.save(path)
    held = Graph.load(path)  # mapped while the file is replaced

    def broken(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", broken)
        with pytest.raises(OSError, match="no space left"):
            large().save(path)
    assert os.listdir(tmp_path) == ["graph"]
    assert_same(Graph.load(path), before)
    large().save(path)
    assert Graph.load(path).num_rows == 1000
    assert_same(held, before)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    graph = Graph.from_edge_index(SIX, 6)
    with pytest.raises(RuntimeError, match="meta device has no values to save"):
        graph.to("meta").save(tmp_path / "graph")
    with pytest.raises(FileNotFoundError):
        graph.save(tmp_path / "absent" / "graph")
    with pytest.raises(OSError, match="/dev/null is a device or a pipe"):
        graph.save("/dev/null")
    assert not os.listdir(tmp_path)


def test_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other"
    with pytest.raises(FileNotFoundError, match="other"):
        Graph.load(path)
    for content in (b"", b"some text", b"PK\x03\x04 no archive"):
        path.write_bytes(content)
        for mmap in (False, True):
            with pytest.raises(ValueError, match="other cannot be read as a graph"):
                Graph.load(path, mmap)
    for saved in ({"weight": torch.ones(2)}, torch.ones(2), [1]):
        torch.save(saved, path)
        with pytest.raises(ValueError, match=r"other holds no graph: it was not written by Graph"):
            Graph.load(path)
    torch.save(Path, path)  # of no type that a file of tensors may hold
    with pytest.raises(ValueError, match="other cannot be read as a graph"):
        Graph.load(path)


@BOTH
def test_every_damaged_byte_of_a_tensor_is_seen(columns: bool, tmp_path: Path) -> None:
    path = tmp_path / "graph"
    graph = Graph.from_edge_index(SIX, graph_ptr=PTR).reordered("degree")
    graph.save(path, columns=columns)
    whole = path.read_bytes()
    held = [getattr(graph, name) for name in ("row_ptr", "col", "edge", "graph_ptr", "order")]
    held += graph.columns if columns else []
    for x in held:
        content = x.numpy().tobytes()
        place = whole.find(content)
        assert place > 0
        for i in range(0, len(content), 3):
            damaged = bytearray(whole)
            damaged[place + i] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="graph"):
                Graph.load(path)
    for size in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="graph cannot be read as a graph"):
            Graph.load(path)


def test_sizes_are_looked_at_without_a_check_and_values_are_not(tmp_path: Path) -> None:
    path = tmp_path / "graph"
    content = content_of(path)
    assert_same(Graph.load(path, check=False), Graph.load(path))
    content["tensors"]["col"][0] = 3  # another graph, whose sum is not in the file
    torch.save(content, path)
    with pytest.raises(ValueError, match="graph holds no graph: col is damaged: its CRC is 0x"):
        Graph.load(path)
    assert Graph.load(path, check=False).col[0] == 3
    for name in set(content["tensors"]) - {"graph_ptr"}:  # of as many graphs as it says
        wrong = content["tensors"] | {name: content["tensors"][name][:-1]}
        torch.save(content | {"tensors": wrong}, path)
        with pytest.raises(ValueError, match=r"graph holds no graph: .* must be \[\d+\] of torch"):
            Graph.load(path, check=False)
        wrong[name] = content["tensors"][name].short()
        torch.save(content | {"tensors": wrong}, path)
        with pytest.raises(ValueError, match=r"graph holds no graph: .*torch\.int16"):
            Graph.load(path, check=False)


def content_of(path: Path) -> dict[str, Any]:
    graph = Graph.from_edge_index(SIX, graph_ptr=PTR).reordered(torch.tensor([1, 0, 2, 3, 5, 4]))
    graph.save(path, columns=True)
    return torch.load(path)


INT = torch.int32
WRONG: dict[str, tuple[str, Any, str]] = {
    "row_ptr decreases": ("row_ptr", [0, 2, 1, 4, 4, 5, 5], "row_ptr decreases from 2 to 1 at 2"),
    "row_ptr ends": ("row_ptr", [0, 1, 2, 3, 4, 4, 4], "row_ptr ends at 4 but there are 5 edges"),
    "row_ptr's size": ("row_ptr", [0, 5], r"row_ptr must be \[7\] of .* got \[2\]"),
    "col": ("col", [1, 1, 2, 0, 6], "col has index 6 but the graph has 6 columns"),
    "edge": ("edge", [0, 2, 1, 4, 4], "edge has not every number below 5"),
    "edge's range": ("edge", [0, 2, 1, 4, -3], "edge has index -3"),
    "edge's size": ("edge", [0, 2, 1, 3], r"edge must be \[5\] of .* got \[4\]"),
    "graph_ptr": ("graph_ptr", [0, 4, 7], "graph_ptr ends at 7 but there are 6 nodes"),
    "between graphs": ("graph_ptr", [0, 1, 6], "of another graph of the batch"),
    "order": ("order", [1, 1, 2, 3, 5, 4], "order is not a permutation"),
    "column walk": ("columns.row", [0, 1, 2, 0, 4], "columns.row is not of the same edges"),
    "column slots": ("columns.slot", [0, 0, 1, 2, 4], "columns.slot has not every number"),
    "column pointers": ("columns.ptr", [0, 1, 2, 3, 4, 5, 5], "columns.ptr is not of the same"),
    "column edges": ("columns.edge", [0, 1, 2, 3, 4], "columns.edge is not of the same edges"),
    "another tensor": ("weight", [0], "unexpected keyword argument 'weight'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_graphs_that_are_none_are_refused_by_name(name: str, tmp_path: Path) -> None:
    field, values, message = WRONG[name]
    path = tmp_path / "graph"
    content = content_of(path)
    dtype = torch.int64 if field == "order" else INT
    content["tensors"][field] = torch.tensor(values, dtype=dtype)
    # as of a program that writes such files itself
    content["crc32"][field] = zlib.crc32(content["tensors"][field].numpy())
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"graph holds no graph: .*{message}"):
        Graph.load(path)


@pytest.mark.usefixtures("compiled_kernels")
@examples
@given(cases(), st.sampled_from([torch.int32, torch.int64]), st.data())
def test_cpp_finds_sound_what_has_no_fault(case: Any, dtype: torch.dtype, data: Any) -> None:
    graph = with_index_dtype(case.graph(), dtype)
    arrays = {name: getattr(graph, name).clone() for name in ("row_ptr", "col", "edge")}
    arrays |= {f"columns.{name}": x.clone() for name, x in graph.columns._asdict().items()}
    field = data.draw(st.sampled_from(["none", *(name for name, x in arrays.items() if len(x))]))
    if field != "none":
        place = data.draw(st.integers(0, len(arrays[field]) - 1))
        extremes = st.sampled_from([torch.iinfo(dtype).min, torch.iinfo(dtype).max])
        arrays[field][place] = data.draw(st.integers(-2, graph.num_edges + 2) | extremes)
    walk = [arrays.pop(name) for name in ("row_ptr", "col", "edge")]
    damaged = graph._structure._replace(row_ptr=walk[0], col=walk[1], edge=walk[2])
    sizes = graph.num_rows, graph.num_cols
    for columns in ((), tuple(arrays.values())):
        try:
            graph_file._check_walks(damaged, ColumnWalk(*columns) if columns else None)
            sound = True
        except ValueError:
            sound = False
        assert graph_file.cpu.is_sound(*sizes, walk, columns) == sound
        assert sound or field != "none"


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize(
    "wrong",
    [
        {"row_ptr": [0, 3, 1, 3]},
        {"row_ptr": [1, 2, 2, 3]},
        {"edge": [0, 1, 1]},
        {"ptr": [0, 3, 1, 3]},
        {"slot": [0, 0, 2], "number": [0, 0, 2]},  # an edge that is there twice, once in its place
    ],
)
def test_cpp_finds_faults_that_hide(wrong: dict[str, list[int]]) -> None:
    right = {"row_ptr": [0, 2, 2, 3], "col": [0, 0, 2], "edge": [0, 1, 2]}
    right |= {"ptr": [0, 2, 2, 3], "row": [0, 0, 2], "slot": [0, 1, 2], "number": [0, 1, 2]}
    for arrays, sound in ((right, True), (right | wrong, False)):
        given = [torch.tensor(x) for x in arrays.values()]
        assert graph_file.cpu.is_sound(3, 3, given[:3], given[3:]) == sound
        if wrong.keys() <= {"row_ptr", "col", "edge"}:
            assert graph_file.cpu.is_sound(3, 3, given[:3], ()) == sound


def test_a_sound_file_is_looked_at_once(
    compiled_kernels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large().save(tmp_path / "graph", columns=True)
    monkeypatch.delattr(graph_file, "_check_walks")
    assert Graph.load(tmp_path / "graph").num_rows == 1000


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 2, "its version is 2, this fastgt reads 1"),
        ("num_rows", 5, r"row_ptr must be \[6\] of .* got \[7\]"),
        ("num_cols", -1, "num_cols must not be negative"),
        ("num_cols", 1.5, "num_cols must be an int"),
        ("types", [[["a", 0, 6]], [["a", 0, 6]], [["r", 0, 4]]], "types.edges ends at 4, .* has 5"),
        (
            "types",
            [[["a", 1, 6]], [["a", 0, 6]], []],
            r"types.rows has slice\(1, 6, None\) after 0",
        ),
        ("tensors", {}, "graph_ptr"),
        ("crc32", {}, "row_ptr"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    field: str, value: Any, message: str, tmp_path: Path
) -> None:
    content = content_of(tmp_path / "graph")
    torch.save(content | {field: value}, tmp_path / "graph")
    with pytest.raises(ValueError, match=f"graph holds no graph: .*{message}"):
        Graph.load(tmp_path / "graph")


@pytest.mark.parametrize("mmap", [False, True])
def test_a_file_that_is_cut_short_is_refused(mmap: bool, tmp_path: Path) -> None:
    path = tmp_path / "graph"
    Graph.complete(torch.tensor([0, 6])).save(path)
    whole = path.read_bytes()
    for left in (0, 10, len(whole) // 2, len(whole) - 3, len(whole) - 1):
        path.write_bytes(whole[:left])
        with pytest.raises(ValueError, match="cannot be read as a graph"):
            Graph.load(path, mmap)

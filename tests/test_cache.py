"""Encodings on disk: what they are found by, and that no damage goes unseen."""

import subprocess
import sys

import pytest
import torch
from encoding_cases import both_ways, one_way

from fastgt import Graph
from fastgt.encodings import (
    Cache,
    degrees,
    laplacian_eigenpairs,
    laplacian_pe,
    random_walk_pe,
    shortest_paths,
)
from fastgt.testing import with_index_dtype

calls = []


def counted(graph, first=1, *, second=None, progress=False):
    calls.append((first, second))
    return torch.arange(graph.num_rows, dtype=torch.float32) + len(calls)


def given(graph, x):
    return x


def nothing(graph):
    return (torch.zeros(1), None)


def single(graph):
    return (graph.col,)


@pytest.fixture(autouse=True)
def no_calls():
    calls.clear()


def only_file(folder):
    (path,) = folder.iterdir()
    return path


def test_what_was_computed_is_read(tmp_path):
    graph, folder = both_ways(), tmp_path / "new" / "folder"
    cache = Cache(folder)
    types = torch.ones(graph.num_edges, dtype=torch.int8)
    for function, *arguments in (
        (random_walk_pe, 4),
        (laplacian_pe, 3),
        (laplacian_eigenpairs, 3),
        (shortest_paths, types, 3),
    ):
        first, second = cache(function, graph, *arguments), cache(function, graph, *arguments)
        assert type(first) is type(second)
        first, second = (x if isinstance(x, tuple) else (x,) for x in (first, second))
        for a, b in zip(first, second, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    assert len(list(folder.iterdir())) == 4


def test_arguments_count_however_they_are_given(tmp_path):
    graph, cache = one_way(), Cache(tmp_path)
    first = cache(counted, graph)
    for arguments, named in (((1,), {}), ((), {"first": 1}), ((1,), {"progress": True})):
        assert torch.equal(cache(counted, graph, *arguments, **named), first)
    other_dtype = with_index_dtype(graph, torch.int64)
    assert torch.equal(cache(counted, other_dtype, second=None), first)
    assert len(calls) == 1
    different = [2, 1.0, True, "1", None, (1,), (1, 1), torch.tensor(1), torch.tensor([1])]
    different += [torch.tensor([1], dtype=torch.int32), ((1,), 1), (1, (1,))]
    for x in different:
        for named in {"first": x}, {"second": x}:
            before = len(calls)
            cache(counted, graph, **named)
            known = named == {"second": None}  # the default
            assert len(calls) == before + 1 - known, x


def test_the_graph_counts(tmp_path):
    cache = Cache(tmp_path)
    edges = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 2]])
    graphs = [
        Graph.from_edge_index(edges, 4),
        Graph.from_edge_index(edges, 5),
        Graph.from_edge_index(edges[:, [1, 0, 2, 3]], 4),
        Graph.from_edge_index(edges, 4, graph_ptr=torch.tensor([0, 2, 4])),
        Graph.from_edge_index(edges, 4, graph_ptr=torch.tensor([0, 2, 4, 4])),
        Graph.from_edge_index(edges, (4, 5)),
    ]
    for graph in graphs + graphs:
        cache(counted, graph)
    assert len(calls) == len(graphs)


@pytest.mark.parametrize(
    "x",
    [
        torch.tensor(2.5),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.randn(3, 4).T,
        torch.randn(5).bfloat16(),
        torch.tensor([torch.nan, torch.inf, -0.0]),
    ],
)
def test_all_tensors_come_back_bit_for_bit(tmp_path, x):
    graph, cache = one_way(), Cache(tmp_path)
    cache(given, graph, x)
    found = cache(given, graph, x)
    assert found is not x
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    same = [y.contiguous().view(-1).view(torch.uint8) for y in (found, x)]
    assert torch.equal(*same)


def test_results_are_on_the_graphs_device(tmp_path, device):
    graph, cache = both_ways().to(device), Cache(tmp_path)
    for _ in range(2):
        assert cache(random_walk_pe, graph, 2).device == graph.device


def test_every_flipped_bit_and_every_cut_is_named(tmp_path):
    graph, cache = Graph.from_edge_index(torch.tensor([[0], [1]])), Cache(tmp_path)
    cache(counted, graph)
    path = only_file(tmp_path)
    whole = path.read_bytes()
    message = rf"{path} is damaged \(.*\): delete it, and it is computed anew"
    for place in range(len(whole)):
        for bit in (1, 2, 64):
            changed = bytearray(whole)
            changed[place] ^= bit
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=message):
                cache(counted, graph)
        path.write_bytes(whole[:place])
        with pytest.raises(ValueError, match=message):
            cache(counted, graph)
    path.write_bytes(whole + b"0")
    with pytest.raises(ValueError, match=message):
        cache(counted, graph)
    path.unlink()
    cache(counted, graph)
    assert len(calls) == 2


def test_a_header_that_asks_for_more_than_there_is(tmp_path):
    graph, cache = one_way(), Cache(tmp_path)
    cache(counted, graph)
    path = only_file(tmp_path)
    whole, n = path.read_bytes(), graph.num_rows
    path.write_bytes(whole.replace(b"[%d]" % n, b"[%d]" % 10**15))
    with pytest.raises(ValueError, match=r"has [\d,]+ bytes instead of 4,000,000,000,000,"):
        cache(counted, graph)


def test_a_file_under_another_name_is_named(tmp_path):
    graph, cache = one_way(), Cache(tmp_path)
    cache(counted, graph, 1)
    first = only_file(tmp_path)
    cache(counted, graph, 2)
    (second,) = set(tmp_path.iterdir()) - {first}
    first.replace(second)
    with pytest.raises(ValueError, match=rf"{second} is damaged \(it belongs to other arguments"):
        cache(counted, graph, 2)


WRITER = (
    "import sys, os, torch\nfrom fastgt import Graph\n"
    "from fastgt.encodings import Cache, cache, degrees\n"
    "i = torch.arange(20_000)\n"
    "g = Graph.from_edge_index(torch.stack([i, (i + 1) % 20_000]))\n"
)


def ring() -> Graph:
    i = torch.arange(20_000)
    return Graph.from_edge_index(torch.stack([i, (i + 1) % 20_000]))


def test_a_process_that_ends_half_way_leaves_no_file(tmp_path):
    code = WRITER + (
        "whole = cache._bytes\n"
        "def ends(x):\n"
        "    if x.shape == (20_000, 2): os._exit(3)\n"
        "    return whole(x)\n"
        "cache._bytes = ends\n"
        "Cache(sys.argv[1])(degrees, g)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert run.returncode == 3, run.stderr
    left = only_file(tmp_path)
    assert left.suffix == ".partial"
    found = [Cache(tmp_path)(degrees, ring()) for _ in range(2)]
    assert (found[0] == 1).all()
    assert torch.equal(*found)
    assert len([path for path in tmp_path.iterdir() if path != left]) == 1


def test_processes_that_write_at_once(tmp_path):
    """This one and another, which also take each other's files away."""
    code = WRITER + (
        "print('begins', flush=True)\n"
        "for _ in range(200):\n"
        "    assert (Cache(sys.argv[1])(degrees, g) == 1).all()\n"
        "    for path in Cache(sys.argv[1]).folder.glob('*.encoding'):\n"
        "        path.unlink(missing_ok=True)\n"
        "print('done')\n"
    )
    command = [sys.executable, "-c", code, tmp_path]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as other:
        assert other.stdout.readline() == "begins\n", other.stderr.read()
        cache, graph = Cache(tmp_path), ring()
        while other.poll() is None:
            assert (cache(degrees, graph) == 1).all()
            for path in tmp_path.glob("*.encoding"):
                path.unlink(missing_ok=True)
        assert other.stdout.read() == "done\n", other.stderr.read()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (lambda graph: graph.col, (), "function must be one of a module, .* got <function"),
        (counted, ({1: 2},), "first must be a number, .* got dict"),
        (nothing, (), r"a tensor or a tuple of two or more, gave \(Tensor, NoneType\)"),
        (single, (), r"single must give a tensor or a tuple of two or more, gave \(Tensor\)"),
        (random_walk_pe, (), "missing a required argument: 'steps'"),
    ],
)
def test_what_cannot_be_kept_is_named(tmp_path, function, arguments, message):
    with pytest.raises(TypeError, match=message):
        Cache(tmp_path)(function, one_way(), *arguments)
    assert not list(tmp_path.iterdir())


def test_an_edge_index_is_not_a_graph(tmp_path):
    with pytest.raises(TypeError, match=r"graph must be a fastgt\.Graph, got Tensor"):
        Cache(tmp_path)(random_walk_pe, torch.zeros(2, 1, dtype=torch.int64), 2)

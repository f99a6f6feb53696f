"""Sampled nodes: their distribution, their files, and what interrupts or damages these."""

import itertools
import multiprocessing
import os
import time

import numpy as np
import pytest
import torch

from fastgt import Graph, files
from fastgt.datasets import block_file, sample_tokens
from fastgt.datasets.block_file import BlockFile
from fastgt.datasets.sampled_tokens import _Rows, draw
from fastgt.testing import random_graph

# 0 <- 1, 1 (twice), 0; 1 <- 2; 2 <- 0, 1, 3; 3 <- 3; 4 alone; 5 <- 4
EDGES = torch.tensor([[1, 1, 0, 2, 0, 1, 3, 3, 4], [0, 0, 0, 1, 2, 2, 2, 3, 5]])
NODES, COPIES = 6, 6000


def paths(graph):
    """The multiset of each node, in the order of rows."""
    near = [[] for _ in range(graph.num_rows)]
    row_ptr, col = graph.row_ptr.tolist(), graph.col.tolist()
    for i in range(graph.num_rows):
        near[i] = col[row_ptr[i] : row_ptr[i + 1]]
    return [near[i] + [k for j in near[i] for k in near[j]] for i in range(graph.num_rows)]


def rows_of(graph, seed):
    return _Rows(graph.row_ptr.long(), graph.col.long(), seed)


def copies():
    one = Graph.from_edge_index(EDGES, NODES)
    return one, Graph.batch([one] * COPIES)


def chi_square(counts, shares):
    expected = np.array(shares) / sum(shares) * sum(counts)
    return float(((np.array(counts) - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("seed", [0, 5])
def test_every_part_of_the_multiset_is_as_likely(seed):
    """Pairs of entries of nodes with five entries and more, in 6,000 copies of a graph."""
    one, many = copies()
    found = draw(rows_of(many, seed), 0, many.num_rows, 2).view(COPIES, NODES, 2) % NODES
    for node, multiset in enumerate(paths(one)):
        if len(multiset) < 2:
            continue
        kinds = sorted(set(itertools.combinations(sorted(multiset), 2)))
        shares = [
            sum(tuple(sorted(pair)) == kind for pair in itertools.combinations(multiset, 2))
            for kind in kinds
        ]
        drawn = found[:, node].sort(1).values.tolist()
        counts = [sum(tuple(pair) == kind for pair in drawn) for kind in kinds]
        assert sum(counts) == COPIES
        # beyond the 0.9999 quantile, by Wilson and Hilferty
        free = max(1, len(kinds) - 1)
        limit = free * (1 - 2 / (9 * free) + 3.72 * (2 / (9 * free)) ** 0.5) ** 3
        assert chi_square(counts, shares) <= limit, (node, counts, shares)


def test_nodes_without_paths_draw_from_the_whole_graph():
    graph = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.long), 3000)
    found = draw(rows_of(graph, 1), 0, 3000, 4)
    assert all(len(set(row)) == 4 for row in found.tolist())
    counts = found.flatten().bincount(minlength=3000)
    assert chi_square(counts.tolist(), [1] * 3000) < 3000 + 4 * (2 * 3000) ** 0.5
    assert counts.max() < 20


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_no_entry_is_drawn_twice_or_all_are_in_turn(count):
    graph = random_graph(0, 50, 200)
    for row, multiset in zip(
        draw(rows_of(graph, 3), 0, 50, count).tolist(), paths(graph), strict=True
    ):
        if not multiset:
            continue
        if len(multiset) < count:
            assert row == [multiset[i % len(multiset)] for i in range(count)]
        else:
            assert all(row.count(node) <= multiset.count(node) for node in row)


def test_a_hub_of_many_paths():
    """Each of 300 leaves reaches 300 leaves by the hub: 90,300 entries of the hub's 2 hops."""
    leaf = torch.arange(1, 301)
    edges = torch.cat([torch.stack([leaf, 0 * leaf]), torch.stack([0 * leaf, leaf])], 1)
    graph = Graph.from_edge_index(edges, 301)
    found = draw(rows_of(graph, 0), 0, 301, 50)
    assert (found[0] == 0).sum() > 10  # half of the hub's entries are itself
    assert all(len(set(row[row > 0].tolist())) == (row > 0).sum() for row in found[1:])


@pytest.mark.parametrize("nodes", [1, 3])
def test_graphs_smaller_than_the_samples(nodes, tmp_path):
    graph = Graph.from_edge_index(torch.zeros(2, 0, dtype=torch.long), nodes)
    found = sample_tokens(graph, 6, tmp_path / "ids").array
    assert found.shape == (nodes, 5)
    assert found.tolist() == [[i % nodes for i in range(5)]] * nodes


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(block_file, "_BLOCK", 4 * 9 * 20)  # 20 rows of 9 ids


@pytest.fixture
def graph():
    return random_graph(1, 230, 900)


def content(path):
    return path.read_bytes()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.usefixtures("small_blocks")
def test_what_is_drawn_does_not_depend_on_processes_and_blocks(graph, workers, tmp_path):
    alone = sample_tokens(graph, 10, tmp_path / "alone", seed=7)
    assert alone.blocks == 12
    shared = sample_tokens(graph, 10, tmp_path / "shared", seed=7, workers=workers)
    assert content(tmp_path / "alone") == content(tmp_path / "shared")
    whole = draw(rows_of(graph, 7), 0, 230, 9)
    assert np.array_equal(shared.array, whole.numpy())
    other = sample_tokens(graph, 10, tmp_path / "other", seed=8)
    assert not np.array_equal(shared.array, other.array)


@pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="there is no forkserver"
)
@pytest.mark.usefixtures("small_blocks")
def test_workers_that_a_server_forks(graph, tmp_path, monkeypatch):
    """As they are by default on Linux from Python 3.14 on."""
    context = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(multiprocessing, "get_context", lambda: context)
    found = sample_tokens(graph, 10, tmp_path / "ids", workers=2)
    assert np.array_equal(found.array, draw(rows_of(graph, 0), 0, 230, 9).numpy())


def sample_slowly(graph, path, workers):
    torch.set_num_threads(1)
    write = BlockFile.write

    def slow(file, block, rows):
        write(file, block, rows)
        time.sleep(0.2)

    BlockFile.write = slow
    sample_tokens(graph, 10, path, workers=workers)


@pytest.fixture
def begun(graph, tmp_path):
    """A process that has written a few blocks, killed in the end."""
    started = []

    def begin(workers):
        path = tmp_path / "ids"
        context = multiprocessing.get_context("fork")
        process = context.Process(target=sample_slowly, args=(graph, path, workers))
        process.start()
        started.append(process)
        while not path.exists() or len(BlockFile(path).missing()) > 9:
            assert process.is_alive()
            time.sleep(0.01)
        return path, process

    yield begin
    for process in started:
        process.kill()
        process.join()


def free(path):
    """Wait until no worker has the file any more."""
    while True:
        try:
            with files.lock(path):
                return
        except RuntimeError:
            time.sleep(0.05)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.usefixtures("small_blocks")
def test_goes_on_after_a_kill(graph, begun, workers, tmp_path, monkeypatch):
    path, process = begun(workers)
    process.kill()
    process.join()
    free(path)
    left = BlockFile(path).missing()
    assert 0 < len(left) <= 9
    with pytest.raises(ValueError, match=f"ids lacks {len(left)} of 12 blocks"):
        BlockFile(path).check_complete()
    written, write = [], BlockFile.write

    def counted(file, block, rows):
        written.append(block)
        write(file, block, rows)

    monkeypatch.setattr(BlockFile, "write", counted)
    sample_tokens(graph, 10, path)
    assert written == left
    sample_tokens(graph, 10, tmp_path / "whole")
    assert content(path) == content(tmp_path / "whole")


@pytest.mark.usefixtures("small_blocks")
def test_a_worker_that_ends_early_is_told(graph, tmp_path, monkeypatch):
    write = BlockFile.write

    def failing(file, block, rows):
        if block == 5:
            os._exit(3)
        write(file, block, rows)

    monkeypatch.setattr(BlockFile, "write", failing)
    with pytest.raises(RuntimeError, match=r"a process that samples .*ids ended with 3"):
        sample_tokens(graph, 10, tmp_path / "ids", workers=2)
    monkeypatch.setattr(BlockFile, "write", write)
    assert 5 in BlockFile(tmp_path / "ids").missing()
    found = sample_tokens(graph, 10, tmp_path / "ids", workers=2)
    assert np.array_equal(found.array, draw(rows_of(graph, 0), 0, 230, 9).numpy())


@pytest.mark.usefixtures("small_blocks")
def test_two_samplings_of_one_file_do_not_mix(graph, begun):
    path, _ = begun(0)
    with pytest.raises(RuntimeError, match="ids is in use by process"):
        sample_tokens(graph, 10, path)


def change(path, place, to):
    content = bytearray(path.read_bytes())
    assert content[place] != to
    content[place] = to
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (3, "its header is no header of fastgt's"),
        (40, "its header is no header of fastgt's"),
        (4096 + 35, "rows 20 to 39 are not those of its sum"),
        (8192 + 100, "rows 0 to 19 are not those of its sum"),
        (-1, "rows 220 to 229 are not those of its sum"),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_a_damaged_file_is_refused_by_name(graph, place, message, tmp_path):
    path = tmp_path / "ids"
    sample_tokens(graph, 10, path)
    change(path, place, 0xFE)
    with pytest.raises(ValueError, match=f"ids is damaged .{message}"):
        sample_tokens(graph, 10, path)


@pytest.mark.parametrize("length", [0, 100, 4096, -1])
def test_a_file_that_was_cut_short_is_refused_by_name(graph, length, tmp_path):
    path = tmp_path / "ids"
    sample_tokens(graph, 10, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"ids is damaged .*delete it, and it is made anew"):
        sample_tokens(graph, 10, path)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_of_another_file_are_refused(graph, tmp_path):
    """Rows and sums of one seed under the header of another."""
    for seed in (1, 2):
        sample_tokens(graph, 10, tmp_path / f"ids{seed}", seed=seed)
    header, rest = content(tmp_path / "ids1")[:4096], content(tmp_path / "ids2")[4096:]
    (tmp_path / "ids1").write_bytes(header + rest)
    with pytest.raises(ValueError, match=r"ids1 is damaged .rows 0 to 19"):
        sample_tokens(graph, 10, tmp_path / "ids1", seed=1)


def test_a_file_of_something_else_is_refused(graph, tmp_path):
    path = tmp_path / "ids"
    sample_tokens(graph, 10, path, seed=1)
    before = content(path)
    for other, samples, seed, message in (
        (graph, 10, 2, "was made with seed=1, not 2"),
        (graph, 11, 1, "was made with samples=10, not 11"),
        (random_graph(2, 230, 900), 10, 1, "was made with graph=[0-9a-f]{16}, not [0-9a-f]{16}"),
    ):
        with pytest.raises(ValueError, match=f"{path} {message}: name another folder"):
            sample_tokens(other, samples, path, seed=seed)
    assert content(path) == before


def test_what_is_refused(graph, tmp_path):
    for call, error, message in (
        ((graph.edge_index, 5), TypeError, "graph must be a fastgt.Graph, got Tensor"),
        ((graph, 1), ValueError, "samples must be 2 at least.*got 1"),
        ((graph, 2.5), TypeError, "samples must be an int, got float 2.5"),
        ((Graph.from_edge_index(EDGES, (6, 7)), 5), ValueError, "got 6 rows and 7 columns"),
        ((Graph.from_edge_index(EDGES[:, :0], 0), 5), ValueError, "graph has no nodes"),
    ):
        with pytest.raises(error, match=message):
            sample_tokens(*call, tmp_path / "ids")
    assert not (tmp_path / "ids").exists()


def test_twenty_five_million_tokens_an_hour(tmp_path):
    """Far more, in one process of those that share a machine."""
    graph = random_graph(0, 4000, 40_000)
    start = time.process_time()
    sample_tokens(graph, 51, tmp_path / "ids")
    assert 4000 * 50 / (time.process_time() - start) > 25e6 / 3600

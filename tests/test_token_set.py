"""Features after some steps, tokens of a batch against loops, and what a loader takes."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgt import Graph, files
from fastgt.datasets import TokenSet, block_file, hop_features, sample_tokens, token_set
from fastgt.datasets.block_file import BlockFile
from fastgt.datasets.token_set import shuffled
from fastgt.testing import random_graph

NODES, FEATURES, SAMPLES = 90, 4, 6
FP64 = torch.float64


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(block_file, "_BLOCK", 400)


@pytest.fixture
def graph():
    """Directed, with self loops, edges that are there twice and nodes alone."""
    edges = random_graph(1, NODES - 2, 300).edge_index
    some = edges[:, :40]
    return Graph.from_edge_index(torch.cat([edges, some, some[:1].repeat(2, 1)], 1), NODES)


@pytest.fixture
def x():
    return torch.randn(NODES, FEATURES, generator=torch.Generator().manual_seed(0))


def literal_hops(graph, x):
    a = np.eye(graph.num_rows)
    for source, target in graph.edge_index.T.tolist():
        a[target, source] += 1
    a = a / np.sqrt(a.sum(1, keepdims=True)) / np.sqrt(a.sum(0))
    x = x.double().numpy()
    return [x, a @ x, a @ a @ x]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.float32, 1e-6), (FP64, 1e-14)]
)
@pytest.mark.usefixtures("small_blocks")
def test_features_are_those_of_a_dense_matrix(graph, x, dtype, tolerance, tmp_path):
    x = x.to(dtype)
    made = hop_features(graph, x, tmp_path)
    assert made[1].blocks > 1
    for file, wanted in zip(made, literal_hops(graph, x), strict=True):
        assert file.array.dtype == x.numpy().dtype
        assert np.allclose(file.array, wanted, rtol=tolerance, atol=tolerance)


def test_autocast_changes_no_features(graph, x, tmp_path):
    alone = hop_features(graph, x, tmp_path / "alone")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = hop_features(graph, x, tmp_path / "cast")
    for a, b in zip(alone, cast, strict=True):
        assert np.array_equal(a.array, b.array)


def test_of_edges_both_ways_it_is_the_authors_matrix(x, tmp_path):
    """D1 and D2 of their data_utils.py, of rows and columns the other way round."""
    edges = random_graph(2, NODES, 200).edge_index
    graph = Graph.from_edge_index(torch.cat([edges, edges.flip(0)], 1), NODES)
    a = np.eye(NODES)
    for source, target in graph.edge_index.T.tolist():
        a[target, source] += 1
    d1, d2 = np.diag(a.sum(1) ** -0.5), np.diag(a.sum(0) ** -0.5)
    _, one, _ = hop_features(graph, x.double(), tmp_path)
    assert np.allclose(one.array, d2 @ (a @ d1) @ x.double().numpy(), rtol=1e-13)


@pytest.mark.usefixtures("small_blocks")
def test_features_go_on_where_they_were_interrupted(graph, x, tmp_path, monkeypatch):
    write, left = BlockFile.write, []

    def interrupted(file, block, rows):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        write(file, block, rows)

    monkeypatch.setattr(BlockFile, "write", interrupted)
    for _ in range(2):
        left += [0] * 5
        with pytest.raises(KeyboardInterrupt):
            hop_features(graph, x, tmp_path / "parts")
    left += [0] * 2
    made = hop_features(graph, x, tmp_path / "parts")  # the last 2 of 12 blocks
    assert sum(file.blocks for file in made) == 12
    monkeypatch.setattr(BlockFile, "write", write)
    for file, whole in zip(made, hop_features(graph, x, tmp_path / "whole"), strict=True):
        assert file.path.read_bytes() == whole.path.read_bytes()


@pytest.fixture
def tokens(graph, x, tmp_path):
    return TokenSet.make(graph, x, tmp_path / "tokens", samples=SAMPLES, seed=3)


def test_a_batch_is_what_loops_collect(graph, x, tokens):
    hops = literal_hops(graph, x)
    nodes = torch.tensor([5, 0, 89, 5], dtype=torch.int32)
    found = tokens.batch(nodes)
    assert found.tokens.shape == (4, 3 * SAMPLES, FEATURES)
    assert torch.equal(found.nodes, nodes.long())
    for row, i in zip(found.tokens, nodes.tolist(), strict=True):
        ids = [i, *tokens.ids.array[i].tolist()]
        wanted = np.concatenate([hop[ids] for hop in hops])
        assert np.allclose(row, wanted, atol=1e-6)
    assert (len(tokens), tokens.samples, tokens.features) == (NODES, SAMPLES, FEATURES)
    assert tokens.batch(nodes[:0]).tokens.shape == (0, 3 * SAMPLES, FEATURES)


def test_what_is_there_is_read_while_another_has_the_folder(graph, x, tokens, tmp_path):
    """Trainings that share their tokens begin at once, and from a folder that is read alone."""
    folder = tmp_path / "tokens"
    with files.lock(folder), files.lock(folder / "ids"):
        again = TokenSet.make(graph, x, folder, samples=SAMPLES, seed=3)
        nodes = torch.arange(9)
        assert torch.equal(again.batch(nodes).tokens, tokens.batch(nodes).tokens)
        (folder / "hop2").unlink()
        with pytest.raises(RuntimeError, match="tokens is in use by"):
            TokenSet.make(graph, x, folder, samples=SAMPLES, seed=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_node_once_in_each_pass(tokens, workers):
    loader = tokens.loader(
        batch_size=16, shuffle=True, workers=workers, generator=torch.Generator().manual_seed(1)
    )
    assert len(loader) == 6
    orders = []
    for _ in range(2):
        batches = list(loader)
        assert [len(batch.nodes) for batch in batches] == [16] * 5 + [10]
        for batch in batches:
            assert torch.equal(batch.tokens, tokens.batch(batch.nodes).tokens)
        orders.append(torch.cat([batch.nodes for batch in batches]))
        assert torch.equal(orders[-1].sort().values, torch.arange(NODES))
    assert not torch.equal(*orders)
    alone = tokens.loader(batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(1))
    again = [torch.cat([batch.nodes for batch in alone]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(orders, again, strict=True))


def test_some_nodes_in_their_order(tokens):
    nodes = torch.tensor([7, 3, 80, 3, 4])
    found = [batch.nodes.tolist() for batch in tokens.loader(nodes, batch_size=2, drop_last=True)]
    assert found == [[7, 3], [80, 3]]
    shuffled_ = next(iter(tokens.loader(nodes, batch_size=5, shuffle=True))).nodes
    assert torch.equal(shuffled_.sort().values, nodes.sort().values)
    assert not list(tokens.loader(nodes[:0], batch_size=2, shuffle=True))


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000])
def test_a_shuffle_is_a_permutation(count):
    places = torch.arange(count)
    first = shuffled(places, count, torch.tensor([1]))
    assert torch.equal(first.sort().values, places)
    # any part alone
    assert torch.equal(shuffled(places[1::2], count, torch.tensor([1])), first[1::2])
    if count > 3:
        assert not torch.equal(first, shuffled(places, count, torch.tensor([2])))


def test_shuffles_take_every_number_everywhere():
    """Where 7 numbers go under 350 keys: chi-square of 7 x 7 counts is near its mean, 36."""
    places, counts = torch.arange(7), torch.zeros(7, 7)
    for key in range(350):
        counts[places, shuffled(places, 7, torch.tensor([key]))] += 1
    assert float(((counts - 50) ** 2 / 50).sum()) < 75  # beyond the 0.9999 quantile


def resident():
    """Bytes of this process in memory, without and with pages of files."""
    told = Path("/proc/self/status").read_text()
    named = dict(line.split(":", 1) for line in told.splitlines())
    return [int(named[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")]


def written(folder, nodes):
    """A set of that many nodes, with ids and features made up."""
    about = {"graph": "0" * 16}
    place = np.arange(nodes)
    ids = BlockFile.prepared(
        folder / "ids",
        about | {"what": "sampled nodes", "seed": 0, "samples": 4},
        (nodes, 3),
        np.int32,
    )
    about |= {"what": "features", "features": "f"}
    hops = [
        BlockFile.prepared(folder / f"hop{h}", about | {"hop": h}, (nodes, 64), np.float32)
        for h in range(3)
    ]
    for block in range(ids.blocks):
        first, last = ids.span(block)
        ids.write(block, (place[first:last, None] * [3, 5, 7] + 1) % nodes)
    for hop in hops:
        for block in range(hop.blocks):
            first, last = hop.span(block)
            hop.write(block, np.broadcast_to(place[first:last, None] % 1000, (last - first, 64)))
    return TokenSet(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_nodes(tmp_path, monkeypatch):
    """68 MB of files, which are read all over, and of which 8 MB stay."""
    monkeypatch.setattr(token_set, "_RELEASE", 2**23)
    tokens = written(tmp_path, 80_000)
    before, most, seen = resident(), [0, 0], []
    for batch in itertools.islice(tokens.loader(batch_size=16, shuffle=True), 400):
        seen.append(batch.nodes)
        assert torch.equal(batch.tokens[:, 0, 0].long(), batch.nodes % 1000)
        most = [max(a, b - c) for a, b, c in zip(most, resident(), before, strict=True)]
    seen = torch.cat(seen).unique()
    assert len(seen) == 6400
    assert (seen // 10_000).unique().tolist() == list(range(8))
    assert most[0] < 16 * 2**20
    assert most[1] < 40 * 2**20


def test_sets_that_do_not_fit_are_refused_by_name(graph, x, tokens, tmp_path):
    folder = tmp_path / "tokens"
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "ids").write_bytes((folder / "ids").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"hop0 is absent: TokenSet\.make writes it"):
        TokenSet(tmp_path / "half")
    other = random_graph(5, NODES, 10)
    sample_tokens(other, SAMPLES, tmp_path / "other" / "ids")
    hop_features(graph, x, tmp_path / "other")
    with pytest.raises(ValueError, match=r"hop0 is of the graph .* and .*ids of .*make them anew"):
        TokenSet(tmp_path / "other")
    (tmp_path / "other" / "ids").unlink()
    sample_tokens(graph, SAMPLES, tmp_path / "other" / "ids")
    hop_features(graph, x + 1, tmp_path / "third")
    (tmp_path / "third" / "hop1").rename(tmp_path / "other" / "hop1")
    with pytest.raises(ValueError, match=r"hop1 is of other features than .*hop0"):
        TokenSet(tmp_path / "other")
    with pytest.raises(ValueError, match=r"hop0 was made with features=.*, not .*name another"):
        hop_features(graph, x + 1, folder)
    content = bytearray((folder / "hop2").read_bytes())
    content[-3] ^= 1
    (folder / "hop2").write_bytes(content)
    with pytest.raises(ValueError, match=r"hop2 is damaged .rows 0 to 89"):
        TokenSet(folder)
    assert len(TokenSet(folder, check=False)) == NODES


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        ("ids", "hop0", "ids was made with what=features, not sampled nodes"),
        ("hop0", "ids", "hop0 was made with what=sampled nodes, not features"),
        ("hop1", "hop2", "hop1 was made with hop=2, not 1"),
    ],
)
def test_a_file_in_the_place_of_another_is_refused(tokens, name, other, message, tmp_path):
    folder = tmp_path / "tokens"
    (folder / name).write_bytes((folder / other).read_bytes())
    with pytest.raises(ValueError, match=message):
        TokenSet(folder)


def test_what_is_refused(graph, x, tokens, tmp_path):
    for nodes, error, message in (
        (torch.tensor([0, NODES]), ValueError, "nodes must be from 0 to 89, got 90 at 1"),
        (torch.tensor([-1]), ValueError, "nodes must be from 0 to 89, got -1 at 0"),
        (torch.ones(2), TypeError, "nodes must hold integers .*, got torch.float32"),
        (torch.ones(2, dtype=torch.bool), TypeError, "got torch.bool"),
        ([1], TypeError, "nodes must be a tensor of integers, got list"),
        (torch.tensor([[1]]), ValueError, r"nodes must be \[B\], got \[1, 1\]"),
    ):
        with pytest.raises(error, match=message):
            tokens.batch(nodes)
        with pytest.raises(error, match=message):
            tokens.loader(nodes, batch_size=2)
    with pytest.raises(ValueError, match="batch_size must be positive, got 0"):
        tokens.loader(batch_size=0)
    for given, error, message in (
        (x.long(), TypeError, "x must be float16, float32 or float64, got int64"),
        (x[:5], ValueError, r"x must be \[N, F\] = \[90, F\], got \[5, 4\]"),
        (x.tolist(), TypeError, "x must be float16, float32 or float64, got list"),
    ):
        with pytest.raises(error, match=message):
            hop_features(graph, given, tmp_path / "no")
    with pytest.raises(TypeError, match=r"graph must be a fastgt.Graph, got Tensor"):
        hop_features(graph.edge_index, x, tmp_path / "no")
    assert not (tmp_path / "no").exists()

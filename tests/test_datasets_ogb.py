"""OGB's data sets, of the files that its package downloads."""

import numpy as np
import pytest
import raw_data_sets as raw
import torch

from fastgt.datasets import load
from fastgt.datasets.molhiv import ATOMS, BONDS


def molecules():
    draw = np.random.default_rng(0)
    nodes, edges = np.array([3, 1, 4, 2]), np.array([2, 0, 5, 1])
    size = nodes.repeat(edges)
    return {
        "raw/num-node-list": nodes,
        "raw/num-edge-list": edges,
        "raw/edge": draw.integers(0, 10**6, (8, 2)) % size[:, None],
        "raw/node-feat": draw.integers(0, ATOMS, (10, 9)),
        "raw/edge-feat": draw.integers(0, BONDS, (8, 3)),
        "raw/graph-label": np.array([0, 1, 0, 1]),
        "split/scaffold/train": np.array([3, 0]),
        "split/scaffold/valid": np.array([1]),
        "split/scaffold/test": np.array([2]),
    }


def papers():
    draw = np.random.default_rng(0)
    return {
        "raw/edge": np.array([[0, 1], [1, 2], [2, 1], [4, 0]]),
        "raw/node-feat": draw.normal(size=(5, 128)).round(3),
        "raw/node-label": np.array([0, 39, 2, 3, 4]),
        "split/time/train": np.array([4, 0]),
        "split/time/valid": np.array([1]),
        "split/time/test": np.array([2]),
    }


def test_molecules_of_their_files(tmp_path):
    tables = molecules()
    raw.write_ogb(tmp_path, "ogbg-molhiv", tables)
    data = load("ogb:ogbg-molhiv", tmp_path)
    nodes, edges = 0, 0
    for g in range(4):
        batch = data.batch(torch.tensor([g]))
        n, e = tables["raw/num-node-list"][g], tables["raw/num-edge-list"][g]
        assert batch.node.tolist() == tables["raw/node-feat"][nodes : nodes + n].tolist()
        ends = tables["raw/edge"][edges : edges + e]
        both = [pair for i, j in ends.tolist() for pair in ([i, j], [j, i])]
        assert batch.graph.edge_index.T.tolist() == both
        kinds = tables["raw/edge-feat"][edges : edges + e]
        assert batch.edge.tolist() == [row for row in kinds.tolist() for _ in range(2)]
        assert batch.y.tolist() == [tables["raw/graph-label"][g]]
        nodes, edges = nodes + n, edges + e
    assert {name: x.tolist() for name, x in data.splits.items()} == {
        "train": [3, 0],
        "val": [1],
        "test": [2],
    }


def test_papers_of_their_files(tmp_path):
    tables = papers()
    raw.write_ogb(tmp_path, "ogbn-arxiv", tables)
    data = load("ogb:ogbn-arxiv", tmp_path)
    assert data.graph.edge_index.tolist() == [[1, 4, 0, 2, 1, 0], [0, 0, 1, 1, 2, 4]]
    torch.testing.assert_close(data.node, torch.from_numpy(tables["raw/node-feat"]).float())
    assert data.y.tolist() == tables["raw/node-label"].tolist()
    assert {name: x.nonzero()[:, 0].tolist() for name, x in data.splits[0].items()} == {
        "train": [0, 4],
        "val": [1],
        "test": [2],
    }


@pytest.mark.parametrize(
    ("stem", "change", "message"),
    [
        ("raw/node-feat", lambda x: x + 200, r"node-feat has types beyond those of OGB, \(119, 4"),
        ("raw/edge-feat", lambda x: x[:, :2], "edge-feat must have 3 columns, got 2"),
        ("raw/num-node-list", lambda x: x + 1, "node_ptr must rise from 0 to 10 in 4 steps"),
        ("raw/edge", lambda x: x + 4, r"edge 0 is \[., .\] but its graph, 0, has 3 nodes"),
        ("split/scaffold/test", lambda x: x + 9, "has graphs from 11 to 11, there are 4"),
        ("split/scaffold/test", lambda x: x[:0], "test.csv.gz is empty"),
    ],
)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_damaged_molecules_are_refused(tmp_path, stem, change, message):
    tables = molecules()
    tables[stem] = change(tables[stem])
    raw.write_ogb(tmp_path, "ogbg-molhiv", tables)
    with pytest.raises(ValueError, match=f"ogbg_molhiv is damaged: .*{message}"):
        load("ogb:ogbg-molhiv", tmp_path)


def test_papers_beyond_the_graph_are_refused(tmp_path):
    raw.write_ogb(tmp_path, "ogbn-arxiv", papers() | {"split/time/valid": np.array([5])})
    with pytest.raises(ValueError, match="damaged: split valid has nodes beyond 0 to 4"):
        load("ogb:ogbn-arxiv", tmp_path)


@pytest.mark.parametrize("kind", ["truncated", "text", "words"])
def test_damaged_files_are_refused(tmp_path, kind):
    raw.write_ogb(tmp_path, "ogbn-arxiv", papers())
    path = tmp_path / "ogbn_arxiv" / "raw" / "node-feat.csv.gz"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "text":
        path.write_bytes(b"1,2,3")
    else:
        import gzip

        path.write_bytes(gzip.compress(b"one,two\n"))
    with pytest.raises(ValueError, match=r"damaged: node-feat\.csv\.gz cannot be read"):
        load("ogb:ogbn-arxiv", tmp_path)


def test_files_that_are_absent(tmp_path):
    with pytest.raises(FileNotFoundError, match="ogb:ogbn-arxiv needs the folder of its files"):
        load("ogb:ogbn-arxiv")
    how = r"ogb\.graphproppred\.PygGraphPropPredDataset\('ogbg-molhiv', root='.*'\) downloads it"
    with pytest.raises(FileNotFoundError, match=how):
        load("ogb:ogbg-molhiv", tmp_path)

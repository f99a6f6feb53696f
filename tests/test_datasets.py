"""Data sets of files: what is read, and what is refused."""

import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from fastgt import Graph
from fastgt.datasets import DATASETS, Encoded, GraphSet, NodeSet, graph_set, load
from fastgt.datasets.node_graphs import class_splits, sgformer_split
from fastgt.real_graphs import open_data

pytestmark = pytest.mark.usefixtures("one_thread")


def loaded(name):
    """The set and the arrays of its file; the test is skipped where that is absent."""
    try:
        with open_data(re.sub("_(drawn|sgformer)$", "", name)) as file:
            return load(name), dict(file)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def small():
    """Four graphs of 2, 0, 3 and 1 nodes with every sort of encoding."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.tensor([2, 0, 3, 1])
    return GraphSet(
        node=torch.arange(6),
        edge=torch.arange(5) + 10,
        edge_index=torch.tensor([[0, 1, 2, 0, 0], [1, 0, 0, 0, 0]]),
        node_ptr=torch.tensor([0, 2, 2, 5, 6]),
        edge_ptr=torch.tensor([0, 2, 2, 4, 5]),
        y=torch.arange(4.0),
        splits={"train": torch.tensor([3, 0]), "val": torch.tensor([2])},
        encodings={
            "of_node": Encoded(torch.randn(6, 2, generator=draw), "node"),
            "of_graph": Encoded(torch.randn(4, 3, generator=draw), "graph"),
            "of_pair": Encoded(torch.arange(int(sizes.square().sum())), "pair"),
        },
    )


def ones(data, g):
    """What belongs to a graph of the set, by plain slices."""
    nodes, edges = (slice(*x[g : g + 2].tolist()) for x in (data.node_ptr, data.edge_ptr))
    begin = int(data.node_ptr.diff()[:g].square().sum())
    pairs = slice(begin, begin + (nodes.stop - nodes.start) ** 2)
    rows = {"node": nodes, "graph": slice(g, g + 1), "pair": pairs}
    return {
        "node": data.node[nodes],
        "edge": None if data.edge is None else data.edge[edges],
        "edge_index": data.edge_index[:, edges].long(),
        "y": data.y[rows[data.y_per]],
        **{name: x.values[rows[x.per]] for name, x in data.encodings.items()},
    }


def assert_batch(data, graphs, batch):
    """The batch is those graphs, one after the other."""
    parts = [ones(data, g) for g in graphs]
    begin = np.cumsum([0, *(len(part["node"]) for part in parts)])
    assert batch.graph.graph_ptr.tolist() == begin.tolist()
    found = {
        "node": batch.node,
        "edge": batch.edge,
        "edge_index": batch.graph.edge_index,
        "y": batch.y,
        **batch.encodings,
    }
    for part, first in zip(parts, begin, strict=False):
        part["edge_index"] = part["edge_index"] + int(first)
    for name, x in found.items():
        if x is None:
            assert data.edge is None
            continue
        assert torch.equal(
            x,
            torch.cat(
                [part[name] for part in parts],
                -1 if x.ndim == 1 else (1 if name == "edge_index" else 0),
            ),
        ), name


@pytest.mark.parametrize("large", [1, 1000])
def test_batches_are_their_graphs_one_by_one(large, monkeypatch):
    """Rows are gathered, or slices copied where graphs are large."""
    monkeypatch.setattr(graph_set, "_LARGE", large)
    data = small()
    for graphs in ([0], [1], [3, 2, 1, 0], [2, 2, 1, 2], [1, 1]):
        assert_batch(data, graphs, data.batch(torch.tensor(graphs)))
    of_nodes = replace(data, y=torch.arange(6) * 2, y_per="node", edge=None, encodings={})
    assert_batch(of_nodes, [3, 0], of_nodes.batch(torch.tensor([3, 0])))
    narrow = replace(data, edge_index=data.edge_index.to(torch.uint8))
    assert_batch(narrow, 120 * [2], narrow.batch(torch.tensor(120 * [2])))  # ends above 255
    none = data.batch(torch.tensor([], dtype=torch.int64))
    assert none.graph.num_nodes == none.graph.num_edges == len(none.y) == 0


@pytest.mark.parametrize("large", [1, 1000])
def test_a_subset_is_its_graphs(large, monkeypatch):
    monkeypatch.setattr(graph_set, "_LARGE", large)
    data = small()
    chosen = torch.tensor([3, 1, 2, 3])
    part = data.subset(chosen)
    assert len(part) == 4
    for i, g in enumerate(chosen.tolist()):
        mine, its = ones(part, i), ones(data, g)
        assert all(torch.equal(mine[name], its[name]) for name in its)
    assert {name: x.tolist() for name, x in part.splits.items()} == {"train": [0, 3], "val": [2]}
    with pytest.raises(ValueError, match="graphs has graphs from 0 to 4, there are 4"):
        data.subset(torch.tensor([0, 4]))


def test_the_digest_changes_with_the_data_alone():
    data = small()
    assert data.digest() == small().digest() == data.with_encodings({}).digest()
    changed = {
        "node": data.node.flip(0),
        "edge": None,
        "y": data.y.double(),
        "edge_index": data.edge_index.flip(0),
        "splits": {"train": torch.tensor([0, 3]), "val": torch.tensor([2])},
    }
    digests = {replace(data, **{name: x}).digest() for name, x in changed.items()}
    assert len(digests | {data.digest()}) == len(changed) + 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"edge_index": torch.zeros(3, 5).long()}, ValueError, r"edge_index must be \[2, E\]"),
        ({"edge_index": torch.zeros(2, 5)}, TypeError, "edge_index must hold integers, got .*32"),
        (
            {"edge_index": torch.tensor([[0, 1, 2, 0, 0], [1, 0, 0, 3, 0]])},
            ValueError,
            r"edge 3 is \[0, 3\] but its graph, 2, has 3 nodes",
        ),
        (
            {"edge_index": torch.tensor([[0, -1, 2, 0, 0], [1, 0, 0, 0, 0]])},
            ValueError,
            r"edge 1 is \[-1, 0\] but its graph, 0, has 2 nodes",
        ),
        ({"edge_ptr": torch.tensor([0, 2, 1, 4, 5])}, ValueError, "edge_ptr must rise from 0 to 5"),
        ({"node_ptr": torch.tensor([0, 2, 5, 6])}, ValueError, "edge_ptr must rise .* in 3 steps"),
        ({"edge": torch.zeros(4)}, ValueError, "edge must have 5 rows, got 4"),
        ({"y": torch.zeros(6)}, ValueError, "y must have 4 rows, got 6"),
        ({"splits": {"val": torch.tensor([4])}}, ValueError, "has graphs from 4 to 4, there are 4"),
        ({"splits": {"val": torch.ones(4).bool()}}, TypeError, r"splits\['val'\] must hold int"),
        (
            {"encodings": {"pe": Encoded(torch.zeros(4, 2), "node")}},
            ValueError,
            r"encodings\['pe'\] must have 6 rows, got 4",
        ),
    ],
)
def test_sets_that_do_not_fit_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        replace(small(), **change)


def test_node_sets_that_do_not_fit_are_refused():
    graph = Graph.from_edge_index(torch.tensor([[0, 1], [1, 2]]), 3)
    mask = torch.tensor([True, True, False])
    data = NodeSet(graph, torch.zeros(3, 4), None, torch.tensor([0, 1, -1]), [{"train": mask}])
    assert replace(data, node=data.node + 1).digest() != data.digest()
    for change, error, message in (
        ({"graph": graph.edge_index}, TypeError, "graph must be a Graph, got Tensor"),
        ({"node": torch.zeros(2, 4)}, ValueError, "node must have 3 rows, got 2"),
        ({"edge": torch.zeros(3)}, ValueError, "edge must have 2 rows, got 3"),
        ({"splits": [{"test": mask[:2]}]}, ValueError, r"splits\[0\]\['test'\] must be \[3\]"),
        ({"splits": [{"test": mask.long()}]}, TypeError, "must be of bool, got torch.int64"),
        ({"splits": [{"test": ~mask}], "classes": 2}, ValueError, "whose class is unknown"),
    ):
        with pytest.raises(error, match=message):
            replace(data, **change)


def test_zinc_is_its_file():
    data, file = loaded("zinc12k")
    assert {name: len(x) for name, x in data.splits.items()} == {
        "train": 10_000,
        "val": 1_000,
        "test": 1_000,
    }
    first = 0
    for split, graphs in data.splits.items():
        ptr, ends = file[f"{split}_node_ptr"], file[f"{split}_edge_ptr"]
        for i in (0, 7, len(graphs) - 1):
            mine = ones(data, int(graphs[i]))
            edges = slice(*ends[i : i + 2])
            assert mine["node"].tolist() == file[f"{split}_atom"][slice(*ptr[i : i + 2])].tolist()
            assert mine["edge"].tolist() == file[f"{split}_bond"][edges].tolist()
            assert mine["edge_index"].tolist() == file[f"{split}_edge_local"][:, edges].tolist()
            assert mine["y"].tolist() == file[f"{split}_y"][i : i + 1].tolist()
        first += len(graphs)
    assert (data.node_types, data.edge_types, data.classes) == ((28,), (4,), 0)
    guess = data.y[data.splits["train"]].median()
    error = (data.y[data.splits["test"]] - guess).abs().mean().item()
    assert error == pytest.approx(1.556, abs=1e-3)


def test_dd_is_its_file():
    data, file = loaded("dd")
    assert sorted(torch.cat(list(data.splits.values())).tolist()) == list(range(1178))
    assert [len(x) for x in data.splits.values()] == [944, 117, 117]
    ptr, owner = file["node_ptr"], np.searchsorted(file["node_ptr"], file["edge_index"][1], "right")
    for g in (0, 500, 1177):
        mine = ones(data, g)
        assert (mine["node"] + 1).tolist() == file["node_label"][ptr[g] : ptr[g + 1]].tolist()
        assert torch.equal(
            mine["edge_index"] + int(ptr[g]),
            torch.from_numpy(file["edge_index"][:, owner == g + 1]).long(),
        )
        assert int(mine["y"]) + 1 == file["y"][g]
    # the file has one class after the other
    assert all(0.3 < data.y[x].double().mean() < 0.6 for x in data.splits.values())


@pytest.mark.parametrize(
    ("name", "edges", "splits"),
    [
        ("cora", 10_556, [(140, 500, 1000)]),
        ("citeseer", 9_104, [(120, 500, 1000)]),
        ("cora_drawn", 10_556, 10 * [(140, 500, 1000)]),
        ("citeseer_drawn", 9_104, 10 * [(120, 500, 1000)]),
        ("cora_sgformer", 10_556, [(140, 500, 1000)]),
        ("citeseer_sgformer", 9_104, None),
        ("amazon_computers", 491_722, 10 * [(8251, 2750, 2751)]),
        ("tolokers", 1_038_000, 10 * [(5879, 2939, 2940)]),
        ("minesweeper", 78_804, 10 * [(5000, 2500, 2500)]),
        ("actor", 53_318, 10 * [(3648, 2432, 1520)]),
        ("squirrel_filtered", 93_996, None),
    ],
)
def test_node_sets_are_their_files(name, edges, splits):
    data, file = loaded(name)
    given = file["edges"].T if "edges" in file else file["edge_index"]
    pairs = {(i, j) for i, j in given.T.tolist() if i != j}
    pairs |= {(j, i) for i, j in pairs}
    assert data.graph.num_edges == edges
    assert set(map(tuple, data.graph.edge_index.T.tolist())) == pairs
    y = file["node_labels"] if "node_labels" in file else file["y"]
    assert data.y.tolist() == y.tolist()
    assert int(data.y.max()) + 1 == data.classes
    found = [tuple(int(x.sum()) for x in split.values()) for split in data.splits]
    if splits is not None:
        assert found == splits
    assert len({tuple(split["train"].nonzero()[:, 0].tolist()) for split in data.splits}) == len(
        data.splits
    )
    for split in data.splits:
        assert int(sum(x.int() for x in split.values()).max()) == 1  # no node is in two parts
    if "train_masks" in file:
        assert torch.equal(data.node, torch.from_numpy(file["node_features"]))
        for part in ("train", "val", "test"):
            masks = torch.stack([split[part] for split in data.splits])
            assert np.array_equal(masks.numpy(), file[f"{part}_masks"])
    else:
        for i in (0, 5, len(y) - 1):
            words = file["x_indices"][slice(*file["x_indptr"][i : i + 2])]
            assert data.node[i].nonzero()[:, 0].tolist() == sorted(words.tolist())
        sums = data.node.sum(1)
        if name.startswith(("cora", "citeseer")):
            torch.testing.assert_close(sums, (sums > 0).float())
        else:
            assert data.node.unique().tolist() == [0, 1]


def test_packages_have_dependencies_both_ways():
    data = load("debian")
    with open_data("debian") as file:
        given, kind = torch.from_numpy(file["edge_index"]).long(), file["edge_type"]
    assert torch.equal(data.graph.edge_index, torch.cat([given, given.flip(0)], 1))
    assert data.edge.tolist() == [*kind.tolist(), *(kind + 8).tolist()]
    assert data.edge_types == (16,)
    assert [int(x.sum()) for x in data.splits[0].values()] == [31_725, 15_878, 15_833]


def grid_arrays():
    draw = np.random.default_rng(0)
    bus = draw.normal(size=(8, 12)).astype(np.float32)
    bus[:, 0] = [1, 2, 3, 1, 1, 1, 2, 1]
    bus[:, 3] = 5
    return {
        "edge_index": np.array([[0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]]),
        "branch": draw.normal(size=(7, 9)).astype(np.float32),
        "bus": bus,
        "gen_pq": draw.normal(size=(8, 2)).astype(np.float32),
    }


def test_a_power_grid_has_what_a_power_flow_is_given(tmp_path):
    arrays = grid_arrays()
    np.savez(tmp_path / "power10k.npz", **arrays)
    data = load("power10k", tmp_path)
    bus, branch = arrays["bus"].astype(float), arrays["branch"].astype(float)
    assert data.node[:, :3].argmax(1).tolist() == [0, 1, 2, 0, 0, 0, 1, 0]
    held = np.where(bus[:, 0] > 1, bus[:, 6], 1)
    given = np.column_stack([bus[:, [1, 2, 3, 4, 8]], arrays["gen_pq"][:, 0], held])
    expected = (given - given.mean(0)) / np.where(given.std(0) > 0, given.std(0), 1)
    np.testing.assert_allclose(data.node[:, 3:], expected, atol=1e-6)
    assert not data.node[:, 5].any()  # one value everywhere
    there = (branch - branch.mean(0)) / branch.std(0)
    np.testing.assert_allclose(data.edge[:, :9], np.concatenate([there, there]), atol=1e-6)
    assert data.edge[:, 9].tolist() == [1] * 7 + [-1] * 7
    both = np.concatenate([arrays["edge_index"], arrays["edge_index"][::-1]], 1)
    assert data.graph.edge_index.tolist() == both.tolist()
    trained = data.y[data.splits[0]["train"]]
    torch.testing.assert_close(trained.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(trained.std(0, unbiased=False), torch.ones(2))
    correlation = np.corrcoef(data.y[:, 1], bus[:, 7])[0, 1]
    assert correlation == pytest.approx(1)
    assert [int(x.sum()) for x in data.splits[0].values()] == [4, 2, 2]


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("bus", lambda x: x[:, :11], "bus must be finite numbers in 12 columns"),
        ("branch", lambda x: x * np.inf, "branch must be finite numbers in 9 columns"),
        ("branch", lambda x: x[:6], "branch must have 7 rows, got 6"),
        ("gen_pq", lambda x: x[:6], "gen_pq must have 8 rows, got 6"),
        ("bus", lambda x: x + 3, "bus has types beyond 1 to 3"),
        ("edge_index", lambda x: x + 1, "edge_index has nodes from 1 to 8, there are 8"),
    ],
)
def test_damaged_power_grids_are_refused(tmp_path, key, change, message):
    arrays = grid_arrays()
    arrays[key] = change(arrays[key])
    np.savez(tmp_path / "power70k.npz", **arrays)
    with pytest.raises(ValueError, match=rf"power70k\.npz is damaged: .*{message}"):
        load("power70k", tmp_path)


def test_power_grids_are_their_files():
    data, file = loaded("power10k")
    assert data.graph.num_edges == 2 * file["edge_index"].shape[1] == 25_412
    assert (data.node.shape, data.edge.shape) == ((10_000, 10), (25_412, 10))
    assert data.y.isfinite().all()


def test_names_and_files_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"name must be one of zinc12k, dd, .*, got 'zinc'"):
        load("zinc")
    with pytest.raises(FileNotFoundError, match=r"cora\.npz is absent: --data names cora\.npz"):
        load("cora", tmp_path)
    monkeypatch.setenv("FASTGT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"actor\.npz is absent: set FASTGT_DATA"):
        load("actor")
    assert "debian" in DATASETS


def heterophilous_arrays():
    masks = np.zeros((2, 6), dtype=bool)
    masks[:, :2] = True
    return {
        "node_features": np.ones((6, 3), dtype=np.float32),
        "node_labels": np.array([0, 1, 2, 3, 4, 0]),
        "edges": np.array([[0, 1], [1, 2], [2, 1], [5, 5]]),
        "train_masks": masks,
        "val_masks": np.roll(masks, 2, 1),
        "test_masks": np.roll(masks, 4, 1),
    }


def test_a_small_file_in_the_authors_layout(tmp_path):
    np.savez(tmp_path / "actor.npz", **heterophilous_arrays())
    for folder in (tmp_path, tmp_path / "actor.npz", str(tmp_path)):
        data = load("actor", folder)
        assert data.graph.edge_index.tolist() == [[1, 0, 2, 1, 5], [0, 1, 1, 2, 5]]
        assert len(data.splits) == 2


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("node_labels", lambda x: x + 1, "node_labels has values beyond -1 to 4"),
        ("node_labels", lambda x: x[:0], "node_labels must have a node at least"),
        ("node_labels", lambda x: x.astype(float), r"node_labels is \[6\] float64"),
        ("edges", lambda x: x + 1, "edge_index has nodes from 1 to 6, there are 6"),
        ("edges", lambda x: x[:, :1], r"edge_index must be \[2, E\], got \[1, 4\]"),
        ("node_features", lambda x: x[:5], "node must have 6 rows, got 5"),
        ("node_features", lambda x: x[0], r"node_features is \[3\] float32"),
        ("val_masks", lambda x: x[:1], r"val_masks must be \[2, 6\] bool, got \[1, 6\] bool"),
        ("test_masks", lambda x: x.astype(int), r"test_masks must be \[2, 6\] bool"),
    ],
)
def test_damaged_node_sets_are_refused(tmp_path, key, change, message):
    arrays = heterophilous_arrays()
    arrays[key] = change(arrays[key])
    np.savez(tmp_path / "actor.npz", **arrays)
    with pytest.raises(ValueError, match=rf"actor\.npz is damaged: .*{message}"):
        load("actor", tmp_path)


@pytest.mark.parametrize("kind", ["truncated", "flipped", "no archive", "missing"])
def test_damaged_archives_are_refused(tmp_path, kind):
    path = tmp_path / "actor.npz"
    arrays = heterophilous_arrays()
    if kind == "missing":
        del arrays["edges"]
    np.savez(path, **arrays)
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        content = content[: len(content) // 2]
    elif kind == "flipped":
        content[150:180] = bytes(30)
    elif kind == "no archive":
        content = b"no archive at all"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"actor\.npz is damaged: "):
        load("actor", tmp_path)


def citation_arrays():
    return {
        "edge_index": np.array([[0, 1, 1, 2], [1, 0, 2, 2]], dtype=np.int32),
        "y": np.array([0, 6, -1], dtype=np.int16),
        "split_public": np.array([0, 2, -1], dtype=np.int8),
        "x_indptr": np.array([0, 2, 3, 3], dtype=np.int32),
        "x_indices": np.array([0, 3, 1], dtype=np.uint16),
        "x_shape": np.array([3, 4]),
    }


def test_citations_lose_loops_and_get_both_ways(tmp_path):
    np.savez(tmp_path / "cora.npz", **citation_arrays())
    data = load("cora", tmp_path)
    assert data.graph.edge_index.tolist() == [[1, 0, 2, 1], [0, 1, 1, 2]]
    assert data.node.tolist() == [[0.5, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert {k: x.nonzero()[:, 0].tolist() for k, x in data.splits[0].items()} == {
        "train": [0],
        "val": [],
        "test": [1],
    }


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("x_indptr", [0, 2, 1, 3], "x_indptr must rise from 0 to 3"),
        ("x_indices", [0, 4, 1], "x_indices has values beyond 0 to 3"),
        ("x_shape", [5, 4], r"x_shape must be \[3, F\], got \[5, 4\]"),
        ("split_public", [0, 1], r"split_public must be \[3\], got \[2\]"),
        ("split_public", [0, 1, 2], "has nodes whose class is unknown"),
        ("y", [0, 7, 1], "y has values beyond -1 to 6"),
    ],
)
def test_damaged_citations_are_refused(tmp_path, key, value, message):
    np.savez(tmp_path / "cora.npz", **citation_arrays() | {key: np.array(value)})
    with pytest.raises(ValueError, match=rf"cora\.npz is damaged: .*{message}"):
        load("cora", tmp_path)


def test_drawn_splits_train_on_as_many_nodes_of_every_class():
    y = torch.tensor([0, 1, 2, -1] * 30)
    splits = class_splits(y, 4, 30, 40, 3)
    assert splits[0]["train"].tolist() == class_splits(y, 4, 30, 40, 1)[0]["train"].tolist()
    for split in splits:
        assert y[split["train"]].bincount().tolist() == [4, 4, 4]
        assert [int(x.sum()) for x in split.values()] == [12, 30, 40]
        together = torch.stack([x.int() for x in split.values()]).sum(0)
        assert int(together.max()) == 1
        assert not together[y < 0].any()
    assert not torch.equal(splits[0]["test"], splits[1]["test"])
    with pytest.raises(ValueError, match=r"30 and 49 nodes .* must be left, 78 are"):
        class_splits(y, 4, 30, 49, 1)


def test_the_split_of_sgformer_is_that_of_its_authors_draws():
    """By Python lists and the global generator, in the order of their code."""
    y = torch.tensor([2, 0, 1, -1, 2] * 30)
    torch.manual_seed(123)
    train, others = [], []
    for label in (0, 1, 2):
        nodes = [i for i, x in enumerate(y.tolist()) if max(x, 0) == label]
        nodes = [nodes[i] for i in torch.randperm(len(nodes)).tolist()]
        train, others = train + nodes[:4], others + nodes[4:]
    others = [others[i] for i in torch.randperm(len(others)).tolist()]
    found = sgformer_split(y, 4, 30, 40)
    for name, part in (("train", train), ("val", others[:30]), ("test", others[30:70])):
        assert found[name].nonzero()[:, 0].tolist() == sorted(i for i in part if y[i] >= 0)
    with pytest.raises(ValueError, match=r"30 and 109 nodes .* must be left, 138 are"):
        sgformer_split(y, 4, 30, 109)


def test_random_splits_are_disjoint_and_the_same_every_time(tmp_path):
    count = 40
    arrays = citation_arrays() | {
        "y": np.arange(count) % 10,
        "x_indptr": np.arange(count + 1),
        "x_indices": np.arange(count) % 7,
        "x_shape": np.array([7, count]),
    }
    np.savez(tmp_path / "amazon_computers.npz", **arrays)
    data = load("amazon_computers", tmp_path)
    torch.manual_seed(5)
    assert data.digest() == load("amazon_computers", tmp_path).digest()
    for split in data.splits:
        assert [int(x.sum()) for x in split.values()] == [24, 8, 8]
        assert bool(sum(x.int() for x in split.values()).eq(1).all())
    trained = [split["train"].tolist() for split in data.splits]
    assert all(a != b for a, b in pairwise(trained))

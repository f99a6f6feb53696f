"""Sets of torch-geometric's objects, and of the files that it and OGB download."""

import json
from itertools import chain

import pytest
import raw_data_sets as raw
import torch

from fastgt import cli
from fastgt.datasets import GraphSet, NodeSet, load

Data = pytest.importorskip("torch_geometric.data").Data
SPLITS = ("train", "val", "test")
pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(seed, node, edge, y, *, most=6, count=4):
    """Graphs of 1 to ``most`` nodes, as dicts of what these functions draw of sizes."""
    draw = torch.Generator().manual_seed(seed)
    graphs = []
    for _ in range(count):
        n = int(torch.randint(1, most, (), generator=draw))
        e = int(torch.randint(0, 8, (), generator=draw))
        graph = {
            "x": node(n, draw),
            "edge_index": torch.randint(n, (2, e), generator=draw),
            "y": y(n, draw),
        }
        if edge is not None:
            graph["edge_attr"] = edge(e, draw)
        graphs.append(graph)
    return graphs


def integers(high, *shape):
    return lambda n, draw: torch.randint(high, (n, *shape), generator=draw)


def numbers(*shape):
    return lambda n, draw: torch.randn(n, *shape, generator=draw)


def of_graph(high):
    return lambda n, draw: torch.randint(high, (1,), generator=draw)


def assert_graphs(data, splits, node=lambda g: g["x"], edge=lambda g: g["edge_attr"]):
    """The set's graphs are these dicts; ``node`` and ``edge`` say what nodes and edges have."""
    for split, graphs in splits.items():
        chosen = data.splits[split]
        assert len(chosen) == len(graphs)
        for i, graph in zip(chosen, graphs, strict=True):
            batch = data.batch(i[None])
            assert torch.equal(batch.graph.edge_index, graph["edge_index"])
            assert batch.graph.num_nodes == len(graph["x"])
            assert torch.equal(batch.node, node(graph))
            if batch.edge is not None:
                assert torch.equal(batch.edge, edge(graph))
            assert torch.equal(batch.y, graph["y"])


def three(*args, **options):
    return {split: drawn(i, *args, **options) for i, split in enumerate(SPLITS)}


def test_graphs_with_types():
    splits = three(integers(5, 1), integers(3), of_graph(2))
    objects = {split: [Data(**g) for g in graphs] for split, graphs in splits.items()}
    data = GraphSet.from_pyg(objects, title="drawn", node_types=[28])
    assert_graphs(data, splits, node=lambda g: g["x"][:, 0])
    assert (data.node_types, data.edge_types, data.classes) == ((28,), (3,), 2)
    assert (data.title, len(data)) == ("drawn", 12)


def test_graphs_with_features_and_labels_of_nodes():
    splits = three(numbers(4), numbers(), integers(3))
    objects = {split: [Data(**g) for g in graphs] for split, graphs in splits.items()}
    data = GraphSet.from_pyg(objects, y_per="node")
    assert_graphs(data, splits, edge=lambda g: g["edge_attr"][:, None])
    assert (data.node_types, data.edge_types, data.classes) == ((), (), 3)
    # of one number a graph, given in any of three ways
    for y in (torch.tensor([[0.5]]), torch.tensor([0.5]), 0.5):
        one = GraphSet.from_pyg({"test": [Data(**objects["val"][0].to_dict() | {"y": y})]})
        assert one.y.tolist() == [0.5]
        assert one.classes == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "graph 1 of 'val' has no x"),
        ({"y": None}, "graph 1 of 'val' has no y"),
        ({"edge_attr": None}, "graph 1 of 'val' has no edge_attr unlike the first"),
        ({"edge_attr": torch.zeros(99)}, "edge_attr of graph 1 of 'val' must have . rows, got 99"),
        ({"y": torch.zeros(2)}, "y of graph 1 of 'val' must have 1 rows with y_per='graph'"),
        ({"x": torch.zeros(9, 2)}, "x of graph 1 of 'val' is .9, 2. torch.float32, unlike"),
        ({"x": torch.full((9, 1), 28)}, "x has types beyond 0 to 27 in column 0"),
        ({"x": torch.full((9, 1), -1)}, "x has types beyond 0 to 27 in column 0"),
        ({"edge_index": torch.full((2, 1), 9)}, "but its graph, 5, has .* nodes|edge_attr of"),
    ],
)
def test_graphs_that_do_not_fit_are_refused(change, message):
    splits = three(integers(5, 1), integers(3), of_graph(2))
    objects = {split: [Data(**g) for g in graphs] for split, graphs in splits.items()}
    objects["val"][1] = Data(**splits["val"][1] | change)
    with pytest.raises(ValueError, match=message):
        GraphSet.from_pyg(objects, node_types=(28,))


def test_empty_splits_and_other_types_are_refused():
    with pytest.raises(ValueError, match="there is no graph in the splits"):
        GraphSet.from_pyg({"train": []})
    objects = [Data(**g) for g in drawn(0, numbers(2), None, of_graph(2))]
    with pytest.raises(ValueError, match=r"x must hold integers, which are types, got torch.fl"):
        GraphSet.from_pyg({"train": objects}, node_types=(3, 3))
    objects = [Data(**g) for g in drawn(0, integers(2, 3), None, of_graph(2))]
    with pytest.raises(ValueError, match="x must have 2 columns of types, got 3"):
        GraphSet.from_pyg({"train": objects}, node_types=(3, 3))


def test_one_graph_with_masks():
    (graph,) = drawn(0, numbers(4), integers(5), integers(3), most=30, count=1)
    n = len(graph["x"])
    masks = {f"{s}_mask": torch.rand(n, 2) < 0.5 for s in SPLITS}
    data = NodeSet.from_pyg(Data(**graph, **masks), title="drawn")
    assert torch.equal(data.graph.edge_index, graph["edge_index"])
    assert torch.equal(data.node, graph["x"])
    assert torch.equal(data.edge, graph["edge_attr"])
    assert torch.equal(data.y, graph["y"])
    assert (data.classes, data.edge_types) == (int(graph["y"].max()) + 1, (5,))
    for i in range(2):
        for split in SPLITS:
            assert torch.equal(data.splits[i][split], masks[f"{split}_mask"][:, i])
    one = NodeSet.from_pyg(Data(**graph | {"y": graph["y"][:, None]}), splits=[])
    assert torch.equal(one.y, graph["y"])
    with pytest.raises(ValueError, match="data has no train_mask: give the splits"):
        NodeSet.from_pyg(Data(**graph))
    with pytest.raises(ValueError, match="data has no y"):
        NodeSet.from_pyg(Data(**graph | {"y": None}))


def pairs(edge_index):
    return sorted(map(tuple, edge_index.T.tolist()))


def test_zinc_of_its_raw_files(tmp_path):
    raw.write_zinc(tmp_path / "ZINC", {"train": 8, "val": 3, "test": 4})
    data, ours = load("pyg:ZINC", tmp_path), load("zinc12k")
    assert (data.node_types, data.edge_types, data.classes) == ((28,), (4,), 0)
    for split, graphs in data.splits.items():
        for i, graph in enumerate(graphs):
            one, other = data.batch(graph[None]), ours.batch(ours.splits[split][i][None])
            assert torch.equal(one.node, other.node)
            assert torch.equal(one.y, other.y)
            bonds, others = (
                sorted([*p, t] for p, t in zip(b.graph.edge_index.T.tolist(), b.edge, strict=True))
                for b in (one, other)
            )
            assert bonds == others
    assert load("pyg:ZINC", tmp_path).digest() == data.digest()  # of the processed files


def test_cora_of_its_raw_files(tmp_path):
    raw.write_cora(tmp_path)
    data, ours = load("pyg:Cora", tmp_path), load("cora")
    assert pairs(data.graph.edge_index) == pairs(ours.graph.edge_index)
    torch.testing.assert_close(data.node, ours.node)
    assert torch.equal(data.y, ours.y)
    assert all(torch.equal(x, data.splits[0][s]) for s, x in ours.splits[0].items())


def test_tolokers_of_its_raw_files(tmp_path):
    raw.write_tolokers(tmp_path, 500)
    data, ours = load("pyg:Tolokers", tmp_path), load("tolokers")
    edge_index = ours.graph.edge_index
    kept = edge_index[:, (edge_index < 500).all(0)]
    assert pairs(data.graph.edge_index) == pairs(kept)
    assert torch.equal(data.node, ours.node[:500])
    assert len(data.splits) == 10
    for mine, whole in zip(data.splits, ours.splits, strict=True):
        assert all(torch.equal(x, whole[s][:500]) for s, x in mine.items())


def test_a_model_of_nodes_trains_on_what_was_downloaded(tmp_path):
    """SGFormer for an epoch, of Cora's raw files and of the file that was made of them."""
    raw.write_cora(tmp_path)
    found = []
    for data, folder in (("pyg:Cora", ["--data", str(tmp_path)]), ("cora", [])):
        output = tmp_path / data.replace(":", "-")
        command = ["train", "sgformer", data, *folder, "--epochs", "1", "--output", str(output)]
        assert cli.main([*command, "--device", "cpu"]) == 0
        (row,) = json.loads((output / "result.json").read_text())
        found.append((row["parameters"], row["val"], row["test"]))
    assert found[0] == pytest.approx(found[1], abs=5e-3)


@pytest.mark.parametrize(("name", "types"), [("PATTERN", 3), ("CLUSTER", 7)])
def test_block_models_of_their_raw_files(tmp_path, name, types):
    def one_hot(n, draw):
        return torch.eye(types)[torch.randint(types, (n,), generator=draw)]

    splits = three(one_hot, None, integers(2))
    raw.write_benchmark(tmp_path, name, list(splits.values()))
    data = load(f"pyg:{name}", tmp_path)
    assert_graphs(data, splits, node=lambda g: g["x"].argmax(1))
    assert (data.y_per, data.node_types, data.edge) == ("node", (types,), None)


def test_images_of_their_raw_files(tmp_path):
    splits = three(numbers(3), numbers(), of_graph(10))
    draw = torch.Generator().manual_seed(9)
    for graph in chain(*splits.values()):
        graph["pos"] = torch.randn(len(graph["x"]), 2, generator=draw)
    raw.write_benchmark(tmp_path, "CIFAR10", list(splits.values()))
    data = load("pyg:CIFAR10", tmp_path)
    assert_graphs(
        data,
        splits,
        node=lambda g: torch.cat([g["x"], g["pos"]], 1),
        edge=lambda g: g["edge_attr"][:, None],
    )
    assert data.node.shape[1] == 5


def test_long_range_of_their_raw_files(tmp_path):
    keys = ("x", "edge_attr", "edge_index", "y")

    def write(name, splits):
        tuples = {
            s: [tuple(g[key] for key in keys) for g in graphs] for s, graphs in splits.items()
        }
        raw.write_long_range(tmp_path, name, tuples)

    def labels(n, draw):
        return torch.randn(1, 10, generator=draw)

    splits = three(integers(2, 9), integers(2, 3), labels)
    write("Peptides-func", splits)
    data = load("pyg:Peptides-func", tmp_path)
    assert_graphs(data, splits)
    assert (len(data.node_types), len(data.edge_types), data.classes) == (9, 3, 0)
    splits = three(numbers(14), numbers(2), integers(21))
    write("PascalVOC-SP", splits)
    data = load("pyg:PascalVOC-SP", tmp_path)
    assert_graphs(data, splits)
    assert data.y_per == "node"


def test_files_that_are_absent_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pyg:ZINC needs the folder .*: name it by --data"):
        load("pyg:ZINC")
    call = r"torch_geometric\.datasets\.ZINC\('.*ZINC', subset=True\) downloads them"
    with pytest.raises(FileNotFoundError, match=f"files of pyg:ZINC are absent in .*: {call}"):
        load("pyg:ZINC", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"Planetoid\('.*', name='Cora'\) downloads"):
        load("pyg:Cora", tmp_path)
    splits = three(numbers(3), None, integers(2))
    raw.write_benchmark(tmp_path, "PATTERN", list(splits.values()))
    path = tmp_path / "PATTERN" / "raw" / "PATTERN_v2.pt"
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"a file of pyg:PATTERN in .* is damaged: "):
        load("pyg:PATTERN", tmp_path)


def test_torch_geometric_that_is_absent_is_said(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch_geometric.datasets", None)
    with pytest.raises(ImportError, match=r'read by torch-geometric: pip install "fastgt\[pyg\]"'):
        load("pyg:ZINC", tmp_path)

"""What a recipe's model is given: a limited set, encodings, features in the place of types."""

from dataclasses import replace

import pytest
import torch
from train_cases import HELD_OUT, TRAIN, command, write

from fastgt import Graph, cli
from fastgt.datasets import NodeSet, load
from fastgt.encodings import (
    Cache,
    electrostatic_pe,
    heat_kernel_pe,
    laplacian_eigenpairs,
    laplacian_pe,
    random_walk_pe,
    shortest_paths,
)
from fastgt.models import expander_table
from fastgt.training import optimization
from fastgt.training.inputs import prepared
from fastgt.training.published_recipes import MODELS, RECIPES
from fastgt.training.settings import changed


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"))


@pytest.fixture
def made(data, tmp_path):
    """-> the set of some settings of GraphGPS on molecules."""

    def make(*settings, model="graph_gps"):
        recipe = changed(RECIPES[model, "zinc12k"], settings)
        return prepared(recipe, load("zinc12k", data), Cache(tmp_path / "encodings"))

    return make


def test_a_limit_keeps_the_first_graphs_to_train_on_and_all_others(made, data):
    whole, limited = load("zinc12k", data), made("limit=30")
    assert {name: len(x) for name, x in limited.splits.items()} == {
        "train": 30,
        "val": HELD_OUT,
        "test": HELD_OUT,
    }
    assert len(limited) == 30 + 2 * HELD_OUT
    for name, chosen in limited.splits.items():
        batch, expected = limited.batch(chosen), whole.batch(whole.splits[name][: len(chosen)])
        assert torch.equal(batch.y, expected.y)
        assert torch.equal(batch.node, expected.node)
        assert torch.equal(batch.graph.edge_index, expected.graph.edge_index)
    assert len(made(f"limit={10 * TRAIN}")) == len(whole)


def test_encodings_are_those_that_the_config_asks_for(made):
    chosen = torch.tensor([7, 0, 199, 7])
    some = made("path_distance=4", "walk_steps=6").batch(chosen)
    assert some.encodings.keys() == {"walk_pe", "pair_distance", "pair_edges"}
    expected = random_walk_pe(some.graph, 6)
    torch.testing.assert_close(some.encodings["walk_pe"], expected, rtol=1e-6, atol=1e-7)
    lengths, types = shortest_paths(some.graph, some.edge, 4)
    assert torch.equal(some.encodings["pair_distance"], lengths)
    assert torch.equal(some.encodings["pair_edges"].long(), types)
    pairs = ["walk_steps=0", "walk_dim=0", "lap_pe=4", "lap_dim=8"]
    lap = made(*pairs).batch(chosen)
    assert lap.encodings.keys() == {"lap_vectors", "lap_values"}
    vectors, values = laplacian_eigenpairs(lap.graph, 4)
    torch.testing.assert_close(lap.encodings["lap_values"], values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lap.encodings["lap_vectors"].abs(), vectors.abs(), rtol=0, atol=1e-3)
    stable = made("walk_steps=0", "walk_dim=0", "stable_pe=3", "local=gatedgcn").batch(chosen)
    assert stable.encodings.keys() == {"lap_vectors"}
    assert stable.encodings["lap_vectors"].shape[1] == 3
    more = ["sign_pe=3", "sign_dim=4", "heat_times=5", "heat_dim=4", "electrostatic_dim=4"]
    other = made("walk_steps=0", "walk_dim=0", *more).batch(chosen)
    assert other.encodings.keys() == {"lap_vectors", "heat_pe", "electrostatic_pe"}
    assert other.encodings["lap_vectors"].shape[1] == 3
    expected = heat_kernel_pe(other.graph, [1, 2, 3, 4, 5])
    torch.testing.assert_close(other.encodings["heat_pe"], expected, rtol=1e-5, atol=1e-6)
    expected = electrostatic_pe(other.graph)
    torch.testing.assert_close(other.encodings["electrostatic_pe"], expected, rtol=1e-4, atol=1e-5)
    eigen = made(model="edge_graph_transformer").batch(chosen)
    expected = laplacian_pe(eigen.graph, 8)
    # the largest entries of an eigenvector may be equal: then its sign is no one's
    torch.testing.assert_close(eigen.encodings["pe"].abs(), expected.abs(), rtol=1e-4, atol=1e-4)
    assert made("pe_dim=0", model="edge_graph_transformer").batch(chosen).encodings == {}


def test_types_become_features_where_the_config_has_those(made, data):
    found = made("node_types=()", "node_features=28").node
    assert torch.equal(found.argmax(1), load("zinc12k", data).node)
    assert found.dtype == torch.float32
    assert found.sum(1).eq(1).all()


def test_types_in_several_columns_stand_beside_each_other(data, tmp_path):
    recipe = changed(RECIPES["gtsp", "molhiv"], ["node_features=31", "walk_steps=2"])
    molecules = load("zinc12k", data)
    second = torch.arange(len(molecules.node)) % 3
    two = replace(molecules, node=torch.stack([molecules.node.long(), second], 1))
    two = replace(two, node_types=(28, 3))
    found = prepared(recipe, two, Cache(tmp_path))
    assert torch.equal(found.node[:, :28].argmax(1), molecules.node.long())
    assert torch.equal(found.node[:, 28:].argmax(1), second)
    assert found.node.sum(1).eq(2).all()
    assert found.edge is None
    with pytest.raises(ValueError, match=r"the sum of .* 2 columns, \(28, 3\), got 30"):
        prepared(changed(recipe, ["node_features=30"]), two, Cache(tmp_path))
    with pytest.raises(ValueError, match=r"types of nodes must be below \(20,\), got 27"):
        prepared(changed(recipe, ["node_features=20"]), molecules, Cache(tmp_path))


def test_encodings_of_models_that_have_their_own(made, data, tmp_path):
    chosen = torch.tensor([7, 0, 199, 7])
    some = made("expander_degree=2", "stable_pe=3", model="exphormer")
    batch = some.batch(chosen)
    assert batch.encodings.keys() == {"expander", "lap_vectors"}
    whole = some.batch(torch.arange(len(some)))
    assert torch.equal(whole.encodings["expander"], expander_table(whole.graph, 2))
    slim = made("path_edges=3", model="graphormer").batch(chosen)
    lengths, types = shortest_paths(slim.graph, slim.edge, 39)
    assert torch.equal(slim.encodings["pair_distance"], lengths)
    assert torch.equal(slim.encodings["pair_edges"].long(), types[:, :3])
    san = made(model="san").batch(chosen)
    _, values = laplacian_eigenpairs(san.graph, 10, normalization="sym")
    torch.testing.assert_close(
        san.encodings["lap_values"], values, rtol=1e-5, atol=1e-5, equal_nan=True
    )
    for base, names in (("gps", {"walk_pe"}), ("graphormer", {"pair_distance"})):
        recipe = changed(RECIPES["gtsp", "dd"], [f"base={base}"])
        found = prepared(recipe, load("zinc12k", data), Cache(tmp_path)).batch(chosen)
        assert found.encodings.keys() == names
        if base == "graphormer":
            alike = torch.zeros(found.graph.num_edges, dtype=torch.uint8)
            lengths, _ = shortest_paths(found.graph, alike, 20)
            assert torch.equal(found.encodings["pair_distance"], lengths)


def test_types_of_edges_on_paths_do_not_wrap(data, tmp_path):
    """Those of many kinds are kept; one that the config does not know is refused, not narrowed."""
    molecules = load("zinc12k", data)
    molecules = replace(molecules, edge=molecules.edge + 256)
    settings = ("path_distance=4", "limit=2", "walk_steps=0", "walk_dim=0")
    recipe = changed(RECIPES["graph_gps", "zinc12k"], [*settings, "edge_types=300"])
    found = prepared(recipe, molecules, Cache(tmp_path)).batch(torch.tensor([0]))
    assert found.encodings["pair_edges"].max() >= 256
    recipe = changed(RECIPES["graph_gps", "zinc12k"], settings)
    with pytest.raises(ValueError, match="edge must be from 0 to 3, got 25"):
        prepared(recipe, molecules, Cache(tmp_path))


def test_edges_carry_nothing_where_the_config_has_no_types(made):
    assert made("edge_types=()", "local=gin").edge is None
    assert made().edge is not None


def test_features_and_loops_are_as_the_recipe_says(tmp_path):
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 1, 2, 1], [1, 0, 1, 1, 2]]), 4)
    node = torch.tensor([[0.0, 3.0], [1.0, 1.0], [0.0, 0.0], [0.5, 0.0]])
    given = NodeSet(graph, node, None, torch.zeros(4, dtype=torch.long), [])
    for features, expected in (
        ("given", node),
        ("binary", (node != 0).float()),
        ("rows", torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.0, 0.0], [0.5, 0.0]])),
    ):
        recipe = replace(RECIPES["sgformer", "cora"], features=features)
        found = prepared(recipe, given, Cache(tmp_path))
        assert torch.equal(found.node, expected)
        assert found.graph is graph
    looped = prepared(RECIPES["polynormer", "tolokers"], given, Cache(tmp_path)).graph
    edges = sorted(map(tuple, looped.edge_index.T.tolist()))
    assert edges == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (3, 3)]


def test_attention_may_have_a_weight_decay_of_its_own():
    recipe = RECIPES["sgformer", "cora"]
    kind = MODELS["sgformer"]
    model = kind.make(recipe.config)
    groups = optimization.optimizer(recipe, model, kind.attention).param_groups
    assert [group["weight_decay"] for group in groups] == [1e-3, 5e-4]
    names = {id(x): name for name, x in model.named_parameters()}
    found = [{names[id(x)].partition(".")[0] for x in group["params"]} for group in groups]
    assert found == [{"embed", "layers"}, {"convolutions", "readout"}]
    assert sum(len(group["params"]) for group in groups) == len(names)
    with pytest.raises(ValueError, match="attention_decay must be none: graph_gps has one"):
        optimization.optimizer(replace(RECIPES["graph_gps", "dd"], attention_decay=0.1), model)


def test_pairs_need_one_column_of_types(data, tmp_path):
    recipe = changed(RECIPES["graph_gps", "zinc12k"], ["path_distance=4"])
    molecules = load("zinc12k", data)
    two = replace(molecules, edge=molecules.edge[:, None].expand(-1, 2))
    with pytest.raises(ValueError, match=r"one column of types, got \[\d+, 2\]"):
        prepared(recipe, two, Cache(tmp_path))


def test_encodings_that_are_damaged_on_disk_are_named(data, tmp_path, capsys):
    arguments = command(data, tmp_path / "run", "walk_steps=4", "walk_dim=4", model="graph_gps")
    assert cli.main([*arguments, "--epochs", "1", "--encodings", str(tmp_path / "kept")]) == 2
    assert "warmup must be below epochs=1" in capsys.readouterr().err
    arguments += ["warmup=0", "epochs=1", "--encodings", str(tmp_path / "kept")]
    assert cli.main(arguments) == 0
    assert not (tmp_path / "run" / "encodings").exists()
    (kept,) = (tmp_path / "kept").iterdir()
    content = bytearray(kept.read_bytes())
    content[-5] ^= 1
    kept.write_bytes(content)
    assert cli.main(arguments) == 2
    assert f"{kept} is damaged" in capsys.readouterr().err

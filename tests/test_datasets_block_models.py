"""PATTERN and CLUSTER as they are drawn: what is random, how often, and what is not."""

import pytest
import torch

from fastgt.datasets import cluster, load, pattern

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def patterns():
    return pattern(graphs=500, seed=3)


@pytest.fixture(scope="module")
def clusters():
    return cluster(graphs=500, seed=3)


def matrices(data):
    """-> adjacency, types and classes of each graph."""
    for g in range(len(data)):
        nodes, edges = (slice(*x[g : g + 2].tolist()) for x in (data.node_ptr, data.edge_ptr))
        size = nodes.stop - nodes.start
        adjacency = torch.zeros(size, size, dtype=torch.int64)
        source, target = data.edge_index[:, edges].long()
        adjacency.index_put_((target, source), torch.tensor(1), accumulate=True)
        yield adjacency, data.node[nodes], data.y[nodes]


@pytest.mark.parametrize("name", ["patterns", "clusters"])
def test_edges_go_both_ways_once_without_loops(name, request):
    for adjacency, _, _ in matrices(request.getfixturevalue(name)):
        assert torch.equal(adjacency, adjacency.T)
        assert int(adjacency.max()) == 1
        assert not adjacency.diagonal().any()


def rates(data, pairs):
    """Share of the pairs of nodes, by what ``pairs`` tells of a graph, that have an edge."""
    found = {}
    for adjacency, _, y in matrices(data):
        off = ~torch.eye(len(y), dtype=torch.bool)
        for name, mask in pairs(y).items():
            have, are = found.get(name, (0, 0))
            mask = mask & off
            found[name] = have + int(adjacency[mask].sum()), are + int(mask.sum())
    return {name: have / are for name, (have, are) in found.items()}


def test_edges_of_clusters_have_the_published_probabilities(clusters):
    found = rates(clusters, lambda y: {"in": y[:, None] == y, "across": y[:, None] != y})
    # 600 graphs: some 400,000 pairs within and 2,000,000 across count in each sum
    assert found["in"] == pytest.approx(0.55, abs=0.005)
    assert found["across"] == pytest.approx(0.25, abs=0.002)


def test_edges_of_patterns_have_the_published_probabilities(patterns):
    found = rates(
        patterns,
        lambda y: {
            "inside": (y[:, None] & y).bool(),
            "joined": y[:, None] != y,
            "outside": ~(y[:, None] | y).bool(),
        },
    )
    # of 100 patterns, each of which is fixed
    assert found["inside"] == pytest.approx(0.5, abs=0.02)
    assert found["joined"] == pytest.approx(0.5, abs=0.003)
    # five communities: .5 within, a share of E[s^2] / (E[s^2] + 4 E[s]^2), and .35 across
    squares = sum(s * (s - 1) for s in range(5, 35)) / 30
    within = squares / (squares + 4 * 19.5**2)
    assert found["outside"] == pytest.approx(0.35 + 0.15 * within, abs=0.003)


def test_a_pattern_is_the_same_in_all_of_its_graphs(patterns):
    """But for the order of its nodes: degrees by signal are compared."""
    seen = []
    for adjacency, node, y in matrices(patterns):
        inside = y.bool()
        degrees = adjacency[inside][:, inside].sum(1)
        seen.append(sorted(zip(node[inside].tolist(), degrees.tolist(), strict=True)))
    of_split = [seen[x[0] : x[-1] + 1] for x in patterns.splits.values()]
    kinds = [list(map(tuple, split[:: len(split) // 100])) for split in of_split]
    assert len(set(kinds[0])) == 100
    assert kinds[0] == kinds[1] == kinds[2]
    assert of_split[0][0:5] == 5 * [of_split[0][0]]
    orders = {tuple(y.tolist()) for _, _, y in list(matrices(patterns))[:5]}
    assert len(orders) == 5  # but not where it stands


def test_one_node_of_each_community_is_named(clusters):
    first = []
    for _, node, y in matrices(clusters):
        named = node > 0
        assert sorted(node[named].tolist()) == [1, 2, 3, 4, 5, 6]
        assert torch.equal(node[named], y[named] + 1)
        sizes = y.bincount(minlength=6)
        assert 5 <= int(sizes.min()) <= int(sizes.max()) < 35
        first.append(int(named.nonzero()[0]))
    assert len(set(first)) > 20  # they stand anywhere


def test_sizes_are_about_the_published():
    """Those of 14,000 and of 12,000 graphs are 118.9 / 6,079 and 117.2 / 4,302."""
    for data, nodes, edges in (
        (load("pattern_small"), 118.9, 6079),
        (load("cluster_small"), 117.2, 4302),
    ):
        assert len(data.node) / len(data) == pytest.approx(nodes, rel=0.03)
        assert data.edge_index.shape[1] / len(data) == pytest.approx(edges, rel=0.04)
        assert data.y_per == "node"
        batch = data.batch(data.splits["test"][:3])
        assert batch.graph.num_nodes == len(batch.node) == len(batch.y)
        assert batch.graph.edge_index.dtype == torch.int64
    assert [len(x) for x in load("pattern_small").splits.values()] == [1000, 200, 200]
    assert [len(x) for x in load("cluster_small").splits.values()] == [1000, 100, 100]


@pytest.mark.parametrize("draw", [pattern, cluster])
def test_a_seed_gives_the_same_set(draw):
    torch.manual_seed(0)
    one = draw(graphs=500, seed=1)
    state = torch.get_rng_state()
    assert draw(graphs=500, seed=1).digest() == one.digest()
    assert torch.equal(torch.get_rng_state(), state)
    assert draw(graphs=500, seed=2).digest() != one.digest()


def test_numbers_of_graphs_that_are_refused():
    with pytest.raises(ValueError, match="graphs must be a multiple of 500, got 700"):
        pattern(graphs=700)
    with pytest.raises(ValueError, match="graphs must be a multiple of 10, got 15"):
        cluster(graphs=15)
    with pytest.raises(ValueError, match="graphs must be positive, got 0"):
        cluster(graphs=0)


@pytest.mark.parametrize("name", ["pattern", "cluster", "pattern_small", "cluster_small"])
def test_a_drawn_set_refuses_a_folder(name, tmp_path):
    with pytest.raises(ValueError, match="drawn and has no file"):
        load(name, tmp_path)

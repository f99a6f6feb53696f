"""Pairs of line drawings as they are drawn: what matches, what moved, and how far."""

from itertools import pairwise

import pytest
import torch

from fastgt.datasets import drawn_lines

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = 100


@pytest.fixture(scope="module")
def data():
    return drawn_lines(PAIRS, seed=3)


@pytest.fixture(scope="module")
def still():
    return drawn_lines(PAIRS, seed=3, noise=0)


def drawings(data):
    """-> coordinates, edges and matches of each graph."""
    cuts = zip(pairwise(data.node_ptr.tolist()), pairwise(data.edge_ptr.tolist()), strict=True)
    for nodes, edges in cuts:
        nodes, edges = slice(*nodes), slice(*edges)
        yield data.node[nodes].double(), data.edge_index[:, edges].long(), data.y[nodes].long()


def pairs(data):
    graphs = list(drawings(data))
    return zip(graphs[::2], graphs[1::2], strict=True)


def test_matches_are_mutual_and_a_tenth_has_none(data):
    alone = []
    for (_, _, first), (_, _, second) in pairs(data):
        have = (first >= 0).nonzero()[:, 0]
        assert torch.equal(second[first[have]], have)
        assert int((second >= 0).sum()) == len(have) > 10
        points = len(first) + int((second < 0).sum())
        assert int((first < 0).sum()) == int((second < 0).sum()) == round(0.1 * points)
        alone.append(1 - len(have) / len(first))
    assert sum(alone) / len(alone) == pytest.approx(1 / 9, abs=0.01)


def test_lines_between_points_of_both_graphs_are_in_both(data):
    for (_, lines, y), (_, others, _) in pairs(data):
        common = y[lines]
        common = {tuple(x) for x in common[:, (common >= 0).all(0)].T.tolist()}
        kept = {y for y in y.tolist() if y >= 0}
        assert common == {(a, b) for a, b in others.T.tolist() if a in kept and b in kept}


def test_edges_go_both_ways_once_and_do_not_cross(data):
    def side(a, b, c):
        return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])

    edges = 0
    for graph, (points, lines, _) in enumerate(drawings(data)):
        ends = [tuple(x) for x in lines.T.tolist()]
        assert len(set(ends)) == len(ends)
        assert {(b, a) for a, b in ends} == set(ends)
        assert all(a != b for a, b in ends)
        edges += len(ends)
        if graph % 20:  # of the first graphs, which have no noise, some
            continue
        p = points.tolist()
        for i, (a, b) in enumerate(ends):
            for c, d in ends[:i]:
                if len({a, b, c, d}) == 4:
                    apart = side(p[a], p[b], p[c]) * side(p[a], p[b], p[d]) > 0
                    assert apart or side(p[c], p[d], p[a]) * side(p[c], p[d], p[b]) > 0
    assert 2 < edges / len(data.node) < 4  # of a node; of a triangulation just below 6


def test_points_keep_their_distance(data):
    for (points, _, _), _ in pairs(data):
        assert points.abs().max() <= 0.5
        distance = torch.cdist(points, points).fill_diagonal_(1)
        assert distance.min() >= 0.08 - 1e-6


def moved(data):
    """Of each pair, the angle and the shift that fit best, and what is left: (angle, shift, [n, 2])

    Source: Kabsch's algorithm.
    """
    for (first, _, y), (second, _, _) in pairs(data):
        have = y >= 0
        a, b = first[have], second[y[have]]
        u, _, vt = torch.linalg.svd((a - a.mean(0)).T @ (b - b.mean(0)))
        turn = u @ vt  # of rows
        yield torch.atan2(turn[0, 1], turn[0, 0]), b.mean(0) - a.mean(0) @ turn, b - a @ turn


def test_second_graphs_are_turned_and_moved(still):
    angles, shifts = [], []
    for angle, shift, rest in moved(still):
        assert (rest - shift).abs().max() < 1e-6
        angles.append(angle)
        shifts.append(shift)
    angles, shifts = torch.stack(angles).rad2deg(), torch.stack(shifts)
    assert 8 < angles.abs().max() <= 10
    assert 0.08 < shifts.abs().max() <= 0.1
    assert angles.mean().abs() < 2
    assert shifts.mean(0).abs().max() < 0.02


def test_noise_is_as_wide_as_it_is_said_to_be(data, still):
    rest = torch.cat([rest - shift for _, shift, rest in moved(data)])
    # the fit takes three of some 50 numbers
    assert rest.std() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(data.y, still.y)
    noise = (data.node - still.node)[data.node != still.node]
    assert len(noise) == pytest.approx(len(data.node), rel=0.02)  # two of each node of the second
    assert noise.std() == pytest.approx(0.02, rel=0.05)


def test_nearest_neighbours_find_the_matches_only_after_the_way_back(data):
    found = {"as it stands": 0, "moved back": 0}
    have = 0
    for ((first, _, y), (second, _, _)), (angle, shift, _) in zip(
        pairs(data), moved(data), strict=True
    ):
        turn = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).view(2, 2)
        have += int((y >= 0).sum())
        for name, points in (("as it stands", first), ("moved back", first @ turn + shift)):
            distance = torch.cdist(points, second)
            near, back = distance.argmin(1), distance.argmin(0)
            mutual = back[near] == torch.arange(len(near))
            found[name] += int((mutual & (near == y)).sum())
    assert found["as it stands"] / have == pytest.approx(0.47, abs=0.05)
    assert found["moved back"] / have > 0.98


def test_the_order_of_nodes_tells_nothing(data):
    """Neither what matches nor who has no match."""
    same, have, places = 0, 0, []
    for (_, _, y), _ in pairs(data):
        same += int((y == torch.arange(len(y))).sum())
        have += int((y >= 0).sum())
        places.append((y < 0).nonzero()[:, 0] / (len(y) - 1))
    assert same / have < 2 / 30
    assert torch.cat(places).mean() == pytest.approx(0.5, abs=0.05)


def test_a_seed_gives_the_same_set():
    sets = [drawn_lines(10, seed=seed) for seed in (0, 0, 1)]
    digests = [x.digest() for x in sets]
    assert digests[0] == digests[1] != digests[2]
    assert {name: x.tolist() for name, x in sets[0].splits.items()} == {
        "train": list(range(20)),
        "val": [20, 21],
        "test": [22, 23],
    }


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"pairs": 15}, ValueError, "pairs must be a multiple of 10, got 15"),
        ({"pairs": 0}, ValueError, "pairs must be positive, got 0"),
        ({"pairs": 10.0}, TypeError, "pairs must be an int, got float 10.0"),
        ({"seed": -1}, ValueError, "seed must not be negative, got -1"),
        ({"seed": None}, TypeError, "seed must be an int, got NoneType"),
        ({"noise": -0.1}, ValueError, "noise must be finite and not negative, got -0.1"),
        ({"noise": "2%"}, TypeError, "noise must be a number, got str"),
    ],
)
def test_wrong_arguments_are_named(given, error, message):
    with pytest.raises(error, match=message):
        drawn_lines(**{"pairs": 10} | given)

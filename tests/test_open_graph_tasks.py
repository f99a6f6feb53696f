"""Classes as nodes of the graph, both sides of a bipartite one, and how links are ranked."""

import math

import pytest
import torch
from attention_cases import DEVICE

from fastgt import Graph
from fastgt.encodings import svd_tokens
from fastgt.models import both_sides, class_scores, draw_negatives, rank_links, with_class_nodes
from fastgt.models.open_graph import topology_encoding
from fastgt.models.open_graph_tasks import edges_between
from fastgt.testing import random_graph

pytestmark = pytest.mark.usefixtures("one_thread")


def graph_of(edges, nodes=None):
    index = torch.tensor(edges, dtype=torch.long, device=DEVICE).reshape(-1, 2).T
    return Graph.from_edge_index(index, nodes)


def test_labelled_nodes_are_joined_to_their_classes():
    graph = graph_of([(0, 1), (1, 0), (4, 4), (0, 1)], 5)
    y = torch.tensor([2, 0, -1, 1, 0], device=DEVICE)
    labelled = torch.tensor([True, True, False, True, False], device=DEVICE)
    found = with_class_nodes(graph, y, labelled, 3)
    assert found.num_nodes == 8
    wanted = [(0, 1), (1, 0), (4, 4), (0, 1), (0, 7), (1, 5), (3, 6), (7, 0), (5, 1), (6, 3)]
    assert found.edge_index.T.tolist() == [list(edge) for edge in wanted]
    for dtype in (torch.int32, torch.uint8):
        again = with_class_nodes(graph, y.to(dtype), labelled, 3)
        assert torch.equal(again.edge_index, found.edge_index)


def test_classes_that_do_not_fit_are_refused():
    graph, y = graph_of([(0, 1), (1, 0)], 4), torch.tensor([0, 1, 1, 2], device=DEVICE)
    everyone = torch.ones(4, dtype=torch.bool, device=DEVICE)
    first = everyone.clone()
    first[3] = False
    for changes, error, message in (
        ({"labelled": first}, ValueError, "class 2 of 3 has no labelled node"),
        ({"labelled": ~everyone}, ValueError, "class 0 of 3 has no labelled node"),
        ({"classes": 2}, ValueError, "y must be from 0 to 1 where labelled, got 0 to 2"),
        ({"y": y - 1}, ValueError, "y must be from 0 to 2 where labelled, got -1 to 1"),
        ({"y": y.float()}, TypeError, r"y must be a tensor of integers, got torch\.float32"),
        ({"y": y.tolist()}, TypeError, "y must be a tensor of integers, got list"),
        ({"y": y[1:]}, ValueError, r"y must be \[N\] = \[4\], got \[3\]"),
        ({"labelled": y}, TypeError, r"labelled must be a tensor of bool, got torch\.int64"),
        ({"labelled": everyone[1:]}, ValueError, r"labelled must be \[N\] = \[4\], got \[3\]"),
        ({"graph": graph.edge_index}, TypeError, r"graph must be a fastgt\.Graph, got Tensor"),
        ({"graph": graph_of([(0, 1)], (3, 4))}, ValueError, "graph must be square, got 3 rows"),
        (
            {"graph": Graph.batch([graph_of([(0, 1)], 2)] * 2)},
            ValueError,
            "graph must be a single one, got a batch of 2",
        ),
    ):
        given = {"graph": graph, "y": y, "labelled": everyone, "classes": 3}
        with pytest.raises(error, match=message):
            with_class_nodes(**given | changes)


def test_scores_are_dot_products_with_class_nodes():
    x = torch.randn(7, 4, dtype=torch.float64)
    found = class_scores(x, 3)
    wanted = [[float((x[i] * x[4 + c]).sum()) for c in range(3)] for i in range(4)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x must be \[N \+ 3, dim\], got \[2, 4\]"):
        class_scores(x[:2], 3)
    with pytest.raises(TypeError, match=r"x must be float16.* got torch\.int64"):
        class_scores(x.long(), 3)


def test_communities_are_told_apart_by_one_label_each():
    """Without any training: what the tokens and the topology encoder alone can do."""
    generator = torch.Generator().manual_seed(0)
    of = torch.arange(4).repeat_interleave(30)
    share = torch.where(of[:, None] == of, 0.4, 0.01)
    upper = (torch.rand(120, 120, generator=generator) < share).triu(1)
    graph = Graph.from_dense((upper | upper.T).to(DEVICE))
    labelled = torch.zeros(120, dtype=torch.bool)
    labelled[::30] = True
    joined = with_class_nodes(graph, of, labelled, 4)
    x = topology_encoding(svd_tokens(joined, 64), joined)
    right = (class_scores(x, 4).argmax(1).cpu() == of)[~labelled]
    assert right.double().mean() > 0.95


def test_both_sides_of_a_bipartite_graph():
    likes = graph_of([(0, 2), (3, 1), (0, 2)], (3, 4))
    found = both_sides(likes)
    assert found.num_nodes == 7
    wanted = [(3, 2), (6, 1), (3, 2), (2, 3), (1, 6), (2, 3)]
    assert found.edge_index.T.tolist() == [list(edge) for edge in wanted]
    tokens = svd_tokens(likes, 5)
    assert topology_encoding(tokens, found).shape == (7, 5)
    assert both_sides(graph_of([], (2, 3))).num_edges == 0
    with pytest.raises(TypeError, match=r"graph must be a fastgt\.Graph, got Tensor"):
        both_sides(likes.edge_index)
    with pytest.raises(ValueError, match="graph must be a single one, got a batch of 2"):
        both_sides(Graph.batch([likes, likes]))


def test_edges_between_pairs_are_found_either_way():
    edges = [(0, 1), (1, 0), (2, 3), (3, 3), (0, 1), (1, 2)]
    graph = graph_of(edges, 5)
    first, second = (torch.tensor(x, device=DEVICE) for x in ([1, 3, 4, 0], [0, 3, 2, 2]))
    assert edges_between(graph, first, second).tolist() == [True, True, False, True, True, False]
    assert not edges_between(graph, first[:0], second[:0]).any()


def test_negatives_are_any_nodes_that_are_no_neighbours():
    """Node 0 has an edge from all but node 6, so that rejection seldom finds it."""
    edges = [(j, 0) for j in range(1, 200) if j != 6] + [(0, 1), (2, 1), (2, 1), (3, 3)]
    graph = graph_of(edges, 200)
    torch.manual_seed(0)
    row = torch.tensor([0, 1, 3] * 2000, device=DEVICE)
    found = draw_negatives(graph, row).view(-1, 3).T.cpu()
    assert (found[0] == 6).all()
    for place, beside in ((1, {0, 1, 2}), (2, {3})):
        count = torch.bincount(found[place], minlength=200)
        assert not count[list(beside)].any()
        assert (count > 0).sum() >= 190
        assert count.max() < 40
    assert not len(draw_negatives(graph, row[:0]))


def test_a_row_without_negatives_is_refused():
    graph = graph_of([(1, 0), (2, 0), (0, 1)], 3)
    with pytest.raises(ValueError, match="node 0 has edges from all others: it has no negative"):
        draw_negatives(graph, torch.tensor([1, 0], device=DEVICE))
    with pytest.raises(ValueError, match="row must be from 0 to 2, got 3 at "):
        draw_negatives(graph, torch.tensor([0, 3], device=DEVICE))
    with pytest.raises(TypeError, match=r"row must hold integers .*, got torch\.float32"):
        draw_negatives(graph, torch.tensor([0.0], device=DEVICE))
    with pytest.raises(ValueError, match=r"row must be on .*, got meta"):
        draw_negatives(graph, torch.tensor([0], device="meta"))


def ranked(rows, cols, known, hidden, k):
    """Row by row, with a sorted list."""
    recalls, gains = [], []
    for i in range(len(rows)):
        targets = {j for j, row in hidden if row == i}
        if not targets:
            continue
        seen = {j for j, row in known if row == i}
        score = {j: float((rows[i] * cols[j]).sum()) for j in range(len(cols)) if j not in seen}
        top = sorted(score, key=lambda j: -score[j])[:k]
        recalls.append(len(targets & set(top)) / len(targets))
        gain = sum(1 / math.log2(rank + 2) for rank, j in enumerate(top) if j in targets)
        gains.append(gain / sum(1 / math.log2(r + 2) for r in range(min(k, len(targets)))))
    return sum(recalls) / len(recalls), sum(gains) / len(gains)


@pytest.mark.parametrize("shape", [(300, 40), (9, 12)])
def test_links_are_ranked_row_by_row(shape):
    """More rows than are computed at once; rows that know nearly all columns; duplicates."""
    generator = torch.Generator().manual_seed(0)
    rows, cols = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in shape)
    draw = torch.rand(shape, generator=generator)
    known, hidden = (draw < 0.3), (draw > 0.8)
    known[0], hidden[0], hidden[1] = True, False, False
    known[0, 3:5] = False
    hidden[0, 3:6] = True  # column 5 is known as well: it is no candidate
    parts = [x.nonzero().flip(1).tolist() for x in (known, hidden)]
    parts[1].append(parts[1][0])
    ks = (1, 5, 12)
    found = rank_links(
        rows.to(DEVICE), cols.to(DEVICE), *(graph_of(x, shape) for x in parts), ks=ks
    )
    for k, ranking in zip(ks, found, strict=True):
        assert tuple(ranking) == pytest.approx(ranked(rows, cols, *parts, k), rel=1e-12)


def test_what_cannot_be_ranked_is_refused():
    x, graph = torch.randn(5, 3, device=DEVICE), random_graph(0, 5, 9, device=DEVICE)
    none, other = graph_of([], 5), graph_of([(0, 1)], 4)
    for changes, error, message in (
        ({"hidden": none}, ValueError, "hidden has no edges: there is nothing to find"),
        (
            {"known": other},
            ValueError,
            "known must have 5 rows and 5 columns, got 4 rows and 4 columns",
        ),
        ({"known": graph.edge_index}, TypeError, r"graph must be a fastgt\.Graph, got Tensor"),
        ({"ks": (2, 6)}, ValueError, r"ks must be from 1 to 5, the columns, got \[2, 6\]"),
        ({"ks": ()}, ValueError, r"ks must be from 1 to 5, the columns, got \[\]"),
        ({"ks": (0,)}, ValueError, "k must be positive, got 0"),
        ({"cols": x[:, 1:]}, ValueError, r"must be \[_, dim\], got \[5, 3\] and \[5, 2\]"),
        ({"cols": x.half()}, TypeError, r"cols must be torch\.float32 as rows, got torch\.float16"),
        ({"rows": x.long()}, TypeError, r"rows must be float16.* got torch\.int64"),
    ):
        given = {"rows": x, "cols": x, "known": graph, "hidden": graph, "ks": (2,)}
        with pytest.raises(error, match=message):
            rank_links(**given | changes)
    # what is hidden and known at once is never found
    assert rank_links(x, x, graph, graph, (5,))[0] == (0, 0)

"""Reorderings: permutations of each graph, the same every time, that attention does not notice."""

import copy
import json
import pickle
import random
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from graph_cases import SIX, Case, assert_same, cases, check, few, joined
from hypothesis import given
from hypothesis import strategies as st

from fastgt import AuxRequest, Graph, neighborhood_attention
from fastgt.bench import reordering as bench
from fastgt.graph_build import owners
from fastgt.reordering import node_order
from fastgt.testing import PROBLEMS, Problem, random_batch, random_graph
from fastgt.tiles import density

PACKAGES = {"metis": "pymetis", "louvain": "igraph"}
METHODS = [
    pytest.param(name, marks=pytest.mark.skipif(not find_spec(package), reason=f"no {package}"))
    for name, package in PACKAGES.items()
]
each_method = pytest.mark.parametrize("method", ["degree", "rcm", *METHODS])
clustering = pytest.mark.parametrize("method", METHODS)
batches = st.lists(cases(square=True), min_size=1, max_size=4)


def order_of(graph: Graph, method: str) -> torch.Tensor:
    return node_order(method, graph.row_ptr, graph.col, graph.graph_ptr)


def check_order(graph: Graph, order: torch.Tensor) -> None:
    assert order.dtype == torch.int64
    for begin, end in zip(graph.graph_ptr[:-1].tolist(), graph.graph_ptr[1:].tolist(), strict=True):
        assert sorted(order[begin:end].tolist()) == list(range(begin, end))


def shuffled(edge_index: torch.Tensor, n: int) -> Graph:
    """Symmetric, nodes in random order."""
    place = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    edge_index = place[edge_index]
    return Graph.from_edge_index(torch.cat([edge_index, edge_index.flip(0)], 1), n)


def path(n: int) -> Graph:
    nodes = torch.arange(n)
    return shuffled(torch.stack([nodes[:-1], nodes[1:]]), n)


def grid(side: int) -> Graph:
    node = torch.arange(side * side).view(side, side)
    across = torch.stack([node[:, :-1].flatten(), node[:, 1:].flatten()])
    down = torch.stack([node[:-1].flatten(), node[1:].flatten()])
    return shuffled(torch.cat([across, down], 1), side * side)


def communities() -> Graph:
    """32 of 64 nodes, nine edges in ten inside one."""
    generator = torch.Generator().manual_seed(0)
    n, edges = 2048, 16_384
    source = torch.randint(n, (edges,), generator=generator)
    near = source // 64 * 64 + torch.randint(64, (edges,), generator=generator)
    far = torch.randint(n, (edges,), generator=generator)
    inside = torch.rand(edges, generator=generator) < 0.9
    return shuffled(torch.stack([source, torch.where(inside, near, far)]), n)


def bandwidth(graph: Graph) -> int:
    return int((graph.row - graph.col).abs().max())


@each_method
@few
@given(batches)
def test_a_permutation_of_every_graph(method: str, parts: list[Case]) -> None:
    graph = Graph.batch([part.graph() for part in parts])
    check_order(graph, order_of(graph, method))


@each_method
@few
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 200)), max_size=5))
def test_larger_graphs_of_a_batch(method: str, sizes: list[tuple[int, int]]) -> None:
    graph = random_batch(0, sizes)
    check_order(graph, order_of(graph, method))


@each_method
def test_graphs_with_nothing_to_order(method: str) -> None:
    none = torch.zeros(2, 0, dtype=torch.int64)
    for graph in (Graph.batch([]), Graph.from_edge_index(none, 0)):
        assert order_of(graph, method).shape == (0,)
    for n in (1, 50):
        assert order_of(Graph.from_edge_index(none, n), method).tolist() == list(range(n))
        loops = Graph.from_edge_index(torch.arange(n).repeat(2, 1), n)
        check_order(loops, order_of(loops, method))


@each_method
def test_ten_thousand_small_graphs(method: str) -> None:
    one = random_batch(0, [(9, 20)] * 100)
    graph = Graph.batch([one] * 100)
    check_order(graph, order_of(graph, method))


@each_method
def test_the_same_every_time(method: str) -> None:
    graph = random_graph(0, 400, 3000, kind="power_law", isolated=20)
    first = order_of(graph, method)
    random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(order_of(graph, method), first)
    edges = torch.randperm(graph.num_edges)
    listed = Graph.from_edge_index(graph.edge_index[:, edges], 400)
    assert torch.equal(order_of(listed, method), first)
    wide = node_order(method, graph.row_ptr.long(), graph.col.long(), graph.graph_ptr.long())
    assert torch.equal(wide, first)


def test_louvain_leaves_the_callers_random_numbers_alone() -> None:
    igraph = pytest.importorskip("igraph")
    graph = communities()
    state = random.getstate()
    order_of(graph, "louvain")
    assert random.getstate() == state
    igraph.Graph.Erdos_Renyi(10, 0.5)  # igraph draws from Python's random again
    assert random.getstate() != state


@each_method
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda(method: str) -> None:
    graph = communities()
    order = order_of(graph.to("cuda"), method)
    assert order.is_cuda
    assert torch.equal(order.cpu(), order_of(graph, method))
    away = graph.to("cuda").reordered(method)
    assert_same(away.to("cpu"), graph.reordered(method))
    x = torch.randn(graph.num_nodes, 3, device="cuda")
    assert torch.equal(away.undo_order(away.apply_order(x)), x)


def test_degree_counts_both_ways_and_keeps_ties() -> None:
    # degrees 3, 4, 2, 0, 1, 2: a self loop counts on both sides, as does a duplicate edge
    edge_index = torch.tensor([[1, 1, 5, 2, 1], [0, 0, 5, 1, 4]])
    graph = Graph.from_edge_index(torch.cat([edge_index, torch.tensor([[0], [2]])], 1), 6)
    assert order_of(graph, "degree").tolist() == [1, 0, 2, 5, 4, 3]


@pytest.mark.parametrize("graph", [path(500), grid(24)], ids=["path", "grid"])
def test_rcm_reduces_the_bandwidth(graph: Graph) -> None:
    near = graph.reordered("rcm")
    best = 1 if graph.num_nodes == 500 else 24
    assert best <= bandwidth(near) <= 2 * best - 1 < bandwidth(graph) / 5


def test_rcm_takes_hubs_in_linear_time() -> None:
    # sorted by insertion as scipy does, the neighbours of this hub take some 10^11 steps
    n = 600_000
    generator = torch.Generator().manual_seed(0)
    star = torch.stack([torch.zeros(n - 1, dtype=torch.int64), torch.arange(1, n)])
    others = torch.randint(1, n, (2, n), generator=generator)
    graph = Graph.from_edge_index(torch.cat([star, others], 1), n)
    check_order(graph, order_of(graph, "rcm"))


@clustering
def test_communities_share_windows(method: str) -> None:
    graph = communities()
    near = graph.reordered(method)
    for height, least in ((16, 2.5), (64, 5.0)):
        before = density(graph.row_ptr, graph.col, graph.num_cols, height)
        assert density(near.row_ptr, near.col, near.num_cols, height) > least > 1.5 * before


@each_method
@few
@given(batches, st.integers(0, 2**31))
def test_attention_does_not_notice(method: str, parts: list[Case], seed: int) -> None:
    graph = Graph.batch([part.graph() for part in parts])
    near = graph.reordered(method)
    generator = torch.Generator().manual_seed(seed)
    n, e = graph.num_nodes, graph.num_edges
    q, k, v, do = torch.randn(4, n, 2, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(e, 2, generator=generator, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, bias)]

    def attend(g: Graph) -> tuple[torch.Tensor, ...]:
        moved = (g.apply_order(x) for x in leaves[:3])
        request = AuxRequest(weights=True)
        o, aux = neighborhood_attention(*moved, g, edge_bias=bias, return_aux=request)
        o = g.undo_order(o)
        return o, aux.weights, *torch.autograd.grad(o, leaves, do)

    for actual, expected in zip(attend(near), attend(graph), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@few
@given(batches, st.integers(0, 2**31))
def test_orders_compose(parts: list[Case], seed: int) -> None:
    case = joined(parts)
    graph = Graph.batch([part.graph() for part in parts])
    assert graph.order is None
    generator = torch.Generator().manual_seed(seed)
    graph_of = owners(graph.graph_ptr, graph.num_nodes)
    by_hand = torch.randperm(case.rows, generator=generator)
    by_hand = by_hand[torch.argsort(graph_of[by_hand], stable=True)]
    once, twice = graph.reordered("rcm"), graph.reordered("rcm").reordered(by_hand)
    assert torch.equal(twice.order, once.order[by_hand])
    assert_same(graph.reordered(twice.order), twice)
    x = torch.randn(case.rows, 3)
    assert torch.equal(twice.apply_order(x), x[twice.order])
    assert torch.equal(twice.undo_order(twice.apply_order(x)), x)
    assert torch.equal(twice.apply_order(twice.undo_order(x)), x)
    place = twice.undo_order(torch.arange(case.rows)).tolist()
    source, target = [place[j] for j in case.source], [place[i] for i in case.target]
    check(twice, Case(*case.size, source, target, case.ends))
    back = twice.reordered(twice.undo_order(torch.arange(case.rows)))
    assert_same(back, graph)
    assert torch.equal(back.apply_order(x), x)


def same(a: Graph, b: Graph) -> None:
    assert_same(a, b)
    assert torch.equal(a.order, b.order)


@few
@given(batches)
def test_the_order_is_kept(parts: list[Case]) -> None:
    graph = Graph.batch([part.graph() for part in parts])
    near = graph.reordered("rcm")
    order = near.order
    turned, moved = near.transpose(), graph.transpose().reordered(order)
    assert torch.equal(turned.edge_index, moved.edge_index)
    assert torch.equal(turned.order, order)
    # loops are edges of the graph as first built: their numbers do not depend on the order
    same(near.with_self_loops(), graph.with_self_loops().reordered(order))
    single = [part.graph() for part in parts]
    mixed = [g if i % 2 else g.reordered("rcm") for i, g in enumerate(single)]
    x = torch.randn(graph.num_nodes, 2)
    whole = Graph.batch(mixed)
    same(whole, graph.reordered(whole.order))
    pieces = x.split([g.num_nodes for g in single])
    expected = [g.apply_order(piece) for g, piece in zip(mixed, pieces, strict=True)]
    assert torch.equal(whole.apply_order(x), torch.cat(expected))
    same(
        Graph.batch([whole, near]),
        Graph.batch([graph, graph]).reordered(
            torch.cat([whole.order, near.order + graph.num_nodes])
        ),
    )


def test_the_order_is_copied_saved_moved_and_shown(tmp_path: Path) -> None:
    graph = Graph.from_edge_index(SIX, 6, graph_ptr=torch.tensor([0, 4, 6]))
    mine = torch.tensor([3, 2, 1, 0, 5, 4])
    near = graph.reordered(mine)
    kept = mine.clone()
    mine.zero_()
    assert torch.equal(near.order, kept)
    torch.save(near, tmp_path / "graph.pt")
    for twin in (
        copy.copy(near),
        copy.deepcopy(near),
        pickle.loads(pickle.dumps(near)),
        torch.load(tmp_path / "graph.pt"),
        near.plan("gather"),
    ):
        same(twin, near)
    assert near.to("meta").order.device.type == "meta"
    assert graph.to("meta").order is None
    assert near.reordered(near.order.int()).order.dtype == torch.int64
    assert "isolated rows, reordered, int32" in repr(near)
    assert "reordered" not in repr(graph)


def test_a_graph_never_reordered_returns_the_tensor_itself() -> None:
    graph, x = Graph.from_edge_index(SIX, 6), torch.randn(6, 2)
    assert graph.apply_order(x) is x
    assert graph.undo_order(x) is x


@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 2, 3), (6, 0)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32, torch.bool])
def test_any_node_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    near = Graph.from_edge_index(SIX, 6).reordered("rcm")
    x = torch.randn(shape).to(dtype)
    for laid in (x, x.t().contiguous().t() if x.ndim == 2 else x):
        assert torch.equal(near.apply_order(laid), x[near.order])
        assert torch.equal(near.undo_order(near.apply_order(laid)), x)


def test_gradients_of_both_directions() -> None:
    near = Graph.from_edge_index(SIX, 6).reordered("rcm")
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    for f in (near.apply_order, near.undo_order):
        assert torch.autograd.gradcheck(f, x)
        assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("near", [True, False], ids=["reordered", "as built"])
def test_node_tensors_that_do_not_fit(near: bool) -> None:
    graph = Graph.from_edge_index(SIX, 6)
    graph = graph.reordered("rcm") if near else graph
    for f, name in ((graph.apply_order, "x"), (graph.undo_order, "y")):
        for shape, said in (((5, 3), r"\[5, 3\]"), ((7,), r"\[7\]"), ((), r"\[\]")):
            with pytest.raises(ValueError, match=rf"^{name} must be \[6, .*{said}"):
                f(torch.zeros(shape))
        with pytest.raises(ValueError, match=f"{name} is on meta.*cpu"):
            f(torch.zeros(6, 3, device="meta"))
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
            f([0.0] * 6)


def test_refusals() -> None:
    graph, bipartite = Graph.from_edge_index(SIX, 6), Graph.from_edge_index(SIX, (6, 7))
    with pytest.raises(ValueError, match=r"degree.*rcm.*metis.*louvain.*got 'rmc'"):
        graph.reordered("rmc")
    with pytest.raises(ValueError, match=r"reordered\(\) needs a square graph"):
        bipartite.reordered("rcm")
    with pytest.raises(ValueError, match=r"apply_order\(\) needs a square graph"):
        bipartite.apply_order(torch.zeros(6))
    with pytest.raises(ValueError, match=r"graphs\[1\] is reordered but graphs\[2\] is bipartite"):
        Graph.batch([graph, graph.reordered("rcm"), bipartite])


@pytest.mark.parametrize("name", PACKAGES)
def test_absent_packages_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(ImportError, match=rf'{PACKAGES[name]}: pip install "fastgt\[reorder\]"'):
        Graph.from_edge_index(SIX, 6).reordered(name)


@pytest.fixture
def problem(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(PROBLEMS, "tiny", Problem("tiny", lambda: grid(12)))
    return "tiny"


def test_the_benchmarks_rows(
    problem: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pymetis", None)
    path = tmp_path / "new" / "rows.json"
    options = ["--method", "rcm", "--method", "metis", "--repeats", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["bench", "--problem", problem, *options])
    bench.main()
    loaded, rcm, metis = json.loads(path.read_text())
    assert [row["node_order"] for row in (loaded, rcm, metis)] == ["as loaded", "rcm", "metis"]
    assert loaded["match"] is rcm["match"] is True
    assert rcm["rho64"] > 1.5 * loaded["rho64"]
    assert rcm["both_s"] > 0
    assert loaded["both_x"] == 1
    assert rcm["reorder_s"] > 0
    assert metis["match"] is None
    assert {"commit", "device", "torch", "date"} <= loaded.keys() & metis.keys()
    assert "fastgt[reorder]" in capsys.readouterr().out


def test_an_order_that_changes_the_result_is_not_timed(
    problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Graph, "undo_order", lambda self, y: y)
    loaded, rcm = bench.run(problem, ("rcm",), repeats=1)
    assert loaded["match"]
    assert rcm["match"] is False
    assert "both_s" not in rcm
    assert "o is off" in bench.show([loaded, rcm])

"""fastgt.distributed.partition and report: each node has one rank, edges are balanced, and what is
reported is what ranks exchange."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastgt import Graph
from fastgt.distributed import partition, report
from fastgt.distributed.part import cut

module = sys.modules["fastgt.distributed.partition"]
METHODS = "metis", "ldg", "contiguous", "hash"
COSTS = st.sampled_from([0, 1, 12, 2**20])


@st.composite
def graphs(draw):
    """Square or bipartite, one or a batch, with hubs, loops, duplicates and isolated nodes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = draw(st.integers(0, 30))
    square = draw(st.booleans())
    cols = rows if square else draw(st.integers(1, 20))
    edges = draw(st.integers(0, 120)) if rows else 0
    power = draw(st.sampled_from([1, 3]))

    def below(n):
        point = torch.rand(edges, generator=generator, dtype=torch.float64)
        return (point**power * max(n, 1)).long()

    ends = torch.stack([below(cols), below(rows)])
    graph = Graph.from_edge_index(ends, (rows, cols))
    if square and draw(st.booleans()):
        graph = Graph.batch([graph, Graph.from_edge_index(ends.flip(1), rows), graph])
    return graph


def is_square(graph):
    return graph.num_rows == graph.num_cols


def pair(part):
    return part if isinstance(part, tuple) else (part, part)


@given(graphs(), st.integers(1, 9), st.sampled_from(METHODS), st.integers(-5, 2**70))
def test_every_node_gets_one_rank_and_the_same_again(graph, parts, method, seed):
    found = partition(graph, parts, method, seed=seed)
    # a bipartite graph that happens to have as many columns as rows is one of nodes
    assert isinstance(found, tuple) == (not is_square(graph))
    for part, size in zip(pair(found), (graph.num_rows, graph.num_cols), strict=True):
        assert part.shape == (size,)
        assert part.dtype == torch.int64
        assert ((part >= 0) & (part < parts)).all()
    again = partition(graph, parts, method, seed=seed)
    assert all(torch.equal(x, y) for x, y in zip(pair(found), pair(again), strict=True))


def ldg(graph, parts, row_cost=0):
    """The equation, rank by rank: Stanton and Kliot's, with costs for nodes in the capacity."""
    owner = [None] * graph.num_cols
    rows = owner if is_square(graph) else [None] * graph.num_rows
    cost, members = [0] * parts, [0] * parts
    capacity = 1.05 * (graph.num_edges + row_cost * graph.num_rows) / parts
    ptr = graph.row_ptr.tolist()
    for v in range(graph.num_rows):
        reads = graph.col[ptr[v] : ptr[v + 1]].tolist()
        if reads or row_cost:
            scores = []
            for p in range(parts):
                common = sum(owner[u] == p for u in reads)
                scores.append((-common * (1 - cost[p] / capacity), cost[p], members[p], p))
            best = min(scores)[-1]
        else:
            best = min((members[p], cost[p], p) for p in range(parts))[-1]
        rows[v] = best
        if rows is not owner:
            for u in reads:
                if owner[u] is None:
                    owner[u] = best
        cost[best] += len(reads) + row_cost
        members[best] += 1
    unread = [u for u in range(graph.num_cols) if owner[u] is None]
    for i, u in enumerate(unread):
        owner[u] = i * parts // len(unread)
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(owner, dtype=torch.int64)


@given(graphs(), st.integers(1, 9), st.integers(1, 50), COSTS)
def test_ldg_on_a_cpu_is_its_equation_in_chunks_of_any_size(graph, parts, chunk, row_cost):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        found = pair(partition(graph, parts, "ldg", row_cost=row_cost))
    expected = ldg(graph, parts, row_cost)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@given(graphs(), st.integers(1, 6))
def test_ldg_on_a_cpu_of_int64_indices_is_that_of_int32(graph, parts):
    wide = Graph(
        graph.num_rows,
        graph.num_cols,
        *(x.long() for x in (graph.row_ptr, graph.col, graph.edge)),
        *([graph.graph_ptr] * 2 if is_square(graph) else (graph.graph_ptr, graph.col_graph_ptr)),
    )
    found, expected = pair(partition(wide, parts, "ldg")), pair(partition(graph, parts, "ldg"))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@given(graphs(), st.integers(1, 9), COSTS)
def test_ldg_and_contiguous_ranges_balance_costs_up_to_a_row(graph, parts, row_cost):
    costs = graph.row_degree.long() + row_cost
    most = int(costs.max()) if graph.num_rows else 0
    for method, slack in (("ldg", 1.05), ("contiguous", 1.0)):
        rows = pair(partition(graph, parts, method, row_cost=row_cost))[0]
        of_ranks = torch.zeros(parts, dtype=torch.int64).index_add_(0, rows, costs)
        assert int(of_ranks.max()) <= slack * int(costs.sum()) / parts + most


def test_metis_balances_what_a_row_costs_beside_its_edges():
    hub = torch.cat([torch.stack([torch.arange(1, 200), torch.zeros(199).long()])] * 2, 1)
    path = torch.stack([torch.arange(1, 400), torch.arange(399)])
    graph = Graph.from_edge_index(torch.cat([hub, path, path.flip(0)], 1), 400)
    by_edges, by_both = (partition(graph, 2, row_cost=cost) for cost in (0, 1000))
    assert abs(int(by_both.bincount()[0]) - 200) <= 6
    assert abs(int(by_edges.bincount()[0]) - 200) > 30


@given(graphs(), st.integers(1, 9))
def test_contiguous_ranges_do_not_go_back(graph, parts):
    for part in pair(partition(graph, parts, "contiguous")):
        assert (part.diff() >= 0).all()


def test_contiguous_ranges_without_edges_have_equally_many_nodes():
    graph = Graph.from_edge_index(torch.empty(2, 0, dtype=torch.int64), 6)
    assert partition(graph, 3, "contiguous").tolist() == [0, 0, 1, 1, 2, 2]
    assert partition(graph, 3, "metis").tolist() == [0, 0, 1, 1, 2, 2]
    assert partition(graph, 3, "ldg").bincount().tolist() == [2, 2, 2]


def split_mix(x):
    """SplitMix64 with Python's integers, masked."""
    mask = 2**64 - 1
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


@given(st.integers(1, 40), st.integers(1, 2**31 - 1), st.integers(-3, 2**66))
@example(3, 7, 0)
def test_hash_is_split_mix_on_every_machine(nodes, parts, seed):
    graph = Graph.from_edge_index(torch.empty(2, 0, dtype=torch.int64), nodes)
    golden = 0x9E3779B97F4A7C15
    expected = [
        (split_mix((v + 1 + seed) * golden % 2**64) >> 32) * parts >> 32 for v in range(nodes)
    ]
    assert partition(graph, parts, "hash", seed=seed).tolist() == expected


def test_hash_of_one_seed_is_not_that_of_another():
    graph = Graph.from_edge_index(torch.empty(2, 0, dtype=torch.int64), 10_000)
    first, second = (partition(graph, 8, "hash", seed=seed) for seed in (0, 1))
    assert (first == second).float().mean() < 0.2
    assert first.bincount().max() < 1.1 * 10_000 / 8


def clusters(count, size):
    """Cliques in random order, joined to a ring."""
    generator = torch.Generator().manual_seed(0)
    name = torch.randperm(count * size, generator=generator)
    whole = Graph.complete(torch.arange(0, count * size + 1, size)).edge_index
    ring = torch.arange(count) * size
    ends = torch.cat([whole, torch.stack([ring, ring.roll(1)])], 1)
    return Graph.from_edge_index(name[ends], count * size), name


def test_metis_and_ldg_find_clusters():
    graph, _ = clusters(4, 32)
    halo = {m: int(report(graph, partition(graph, 4, m), parts=4).halo.sum()) for m in METHODS}
    assert halo["metis"] == 4  # each reads one node of the next
    assert halo["ldg"] < halo["hash"] / 4


def test_metis_balances_edges_not_nodes():
    """Rows of one half have many edges: ranks have other numbers of nodes, but as many edges."""
    generator = torch.Generator().manual_seed(0)
    many = torch.randint(100, (2, 4000), generator=generator)
    few = torch.randint(100, 1000, (2, 4000), generator=generator)
    graph = Graph.from_edge_index(torch.cat([many, few], 1), 1000)
    found = report(graph, partition(graph, 2, "metis"))
    assert found.balance < 1.05
    assert int(found.rows.max()) > 2 * int(found.rows.min())


@pytest.mark.parametrize("method", METHODS)
def test_more_ranks_than_nodes_leave_ranks_without_rows(method):
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
    part = partition(graph, 8, method)
    found = report(graph, part, parts=8)
    assert int(found.rows.sum()) == 3
    assert int((found.rows == 0).sum()) >= 5
    assert len(part.unique()) > 1


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_without_nodes_has_a_partition(method):
    graph = Graph.batch([])
    assert partition(graph, 2, method).shape == (0,)
    assert str(report(graph, partition(graph, 2, method), parts=2))


def test_metis_that_is_not_installed_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymetis", None)
    graph = Graph.complete(torch.tensor([0, 4]))
    with pytest.raises(ImportError, match=r"'metis' needs pymetis: pip install \"fastgt\[reorder"):
        partition(graph, 2)


def test_bad_arguments_of_a_partition_are_refused():
    graph = Graph.complete(torch.tensor([0, 4]))
    for bad, kind, said in (
        ((graph.edge_index, 2), TypeError, "graph must be a Graph, got Tensor"),
        ((graph, 0), ValueError, "parts must be from 1 to 2\\^31 - 1, got 0"),
        ((graph, 2.0), TypeError, "parts must be an int, got float"),
        ((graph, 2, "spectral"), ValueError, "method must be one of .*'spectral'"),
    ):
        with pytest.raises(kind, match=said):
            partition(*bad)
    with pytest.raises(TypeError, match="seed must be an int, got float"):
        partition(graph, 2, "hash", seed=0.5)
    with pytest.raises(TypeError, match="row_cost must be an int, got float"):
        partition(graph, 2, row_cost=0.5)
    for bad, said in (
        (-1, "not be negative, got -1"),
        (2**20 + 1, "be at most 2\\^20, got 1048577"),
    ):
        with pytest.raises(ValueError, match=f"row_cost must {said}"):
            partition(graph, 2, row_cost=bad)
    with pytest.raises(RuntimeError, match="meta device"):
        partition(graph.to("meta"), 2, "hash")


def test_your_own_partition_is_checked():
    graph = Graph.complete(torch.tensor([0, 4]))
    wide = Graph.from_edge_index(torch.tensor([[0], [1]]), (2, 3))
    one, two = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1])
    for args, parts, kind, said in (
        ((graph, one[:3]), None, ValueError, r"part must be \[4\].*got \[3\]"),
        ((graph, one.float()), None, TypeError, "part must hold integers.*float32"),
        ((graph, one - 1), None, ValueError, "part has index -1"),
        ((graph, one + 2), 2, ValueError, "part has index 2 .* ranks, of which there are 2"),
        ((graph, (one, one)), None, TypeError, r"one tensor \[4\].*got 2 tensors"),
        ((graph, [0, 0, 1, 1]), None, TypeError, r"one tensor \[4\].*got 4 tensors"),
        ((wide, two), None, TypeError, r"pair \(rows \[2\], columns \[3\]\).*got one tensor"),
        ((wide, (two, two)), None, ValueError, r"part\[1\] \(columns\) must be \[3\].*\[2\]"),
        ((two, two), None, TypeError, "graph must be a Graph, got Tensor"),
    ):
        with pytest.raises(kind, match=said):
            report(*args, parts=parts)
    assert report(graph, one.to(torch.uint8)).rows.tolist() == [4]


@given(graphs(), st.integers(1, 6), st.integers(0, 2**31))
@settings(deadline=None)
def test_a_report_counts_what_ranks_hold_and_exchange(graph, parts, seed):
    generator = torch.Generator().manual_seed(seed)
    row_part = torch.randint(parts, (graph.num_rows,), generator=generator)
    col_part = row_part
    if not is_square(graph):
        col_part = torch.randint(parts, (graph.num_cols,), generator=generator)
    given_ = row_part if col_part is row_part else (row_part, col_part)
    found = report(graph, given_, parts=parts, width=3, dtype=torch.float64)
    shares = [cut(graph, row_part, col_part, p, parts) for p in range(parts)]
    reads = np.array([[len(x) for x in s.halo.split(s.halo_ptr.diff().tolist())] for s in shares])
    assert found.rows.tolist() == [len(s.rows) for s in shares]
    assert found.cols.tolist() == [len(s.cols) for s in shares]
    assert found.edges.tolist() == [len(s.edge) for s in shares]
    assert found.halo.tolist() == reads.sum(1).tolist()
    assert found.sent.tolist() == reads.sum(0).tolist()
    assert found.cut.tolist() == [int((s.col >= len(s.cols)).sum()) for s in shares]
    assert found.peers.tolist() == ((reads + reads.T) > 0).sum(1).tolist()
    assert found.bytes_received.tolist() == (24 * reads.sum(1)).tolist()
    assert int(found.bytes_sent.sum()) == int(found.bytes_received.sum())


def test_seconds_are_those_of_the_network():
    graph = Graph.from_edge_index(torch.tensor([[1, 2, 2, 3, 0], [0, 0, 1, 2, 3]]))
    found = report(graph, torch.tensor([0, 0, 1, 2]), width=1000, network="ethernet-10g")
    # rank 0 reads node 2, rank 1 node 3, rank 2 node 0: each sends and receives 4,000 bytes
    assert found.seconds.tolist() == pytest.approx([4000 / 1.25e9 + 2 * 30e-6] * 3)
    text = str(found)
    assert "ethernet-10g, not measured" in text
    assert "balance 1.800" in text
    assert text.splitlines()[1].split() == ["0", "2", "3", "1", "2", "0.0", "0.0", "63.2"]
    for option, kind, said in (
        ({"network": "pigeon"}, ValueError, "network must be one of .*'pigeon'"),
        ({"width": 0}, ValueError, "width must be 1 channel or more, got 0"),
        ({"dtype": "fp32"}, TypeError, "dtype must be a torch.dtype, got str"),
    ):
        with pytest.raises(kind, match=said):
            report(graph, torch.tensor([0, 0, 1, 2]), **option)


def test_a_table_of_many_ranks_shows_the_first_and_the_slowest():
    graph = Graph.complete(torch.tensor([0, 64]))
    part = torch.arange(64)
    part[60:] = 50
    lines = str(report(graph, part, parts=64)).splitlines()
    ranks = [line.split()[0] for line in lines[1:-4]]
    assert ranks[:8] == [str(p) for p in range(8)]
    assert "50" in ranks
    assert len(ranks) <= 16

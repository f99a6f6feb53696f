"""fastgt.distributed.part: shares of a graph hold each of its edges once, and know whose columns
they read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgt import Graph
from fastgt.distributed import DistributedGraph
from fastgt.distributed.part import cut, graphs_of


@st.composite
def cut_graphs(draw):
    """A graph, square or not, one or a batch, and which rank owns each row and column."""
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    parts = draw(st.integers(1, 5))
    rows = draw(st.integers(0, 12))
    edges = draw(st.integers(0, 40)) if rows else 0
    square = draw(st.booleans())
    cols = rows if square else draw(st.integers(1, 9))

    def below(n, size):
        return torch.randint(max(n, 1), (size,), generator=generator)

    ends = torch.stack([below(cols, edges), below(rows, edges)])
    graph = Graph.from_edge_index(ends, (rows, cols))
    if square and draw(st.booleans()):
        graph = Graph.batch([graph, Graph.from_edge_index(ends.flip(1), rows), graph])
    row_part = below(parts, graph.num_rows)
    col_part = row_part if square else below(parts, graph.num_cols)
    return graph, row_part, col_part, parts


@given(cut_graphs())
def test_every_edge_lies_with_its_row_once(case):
    graph, row_part, col_part, parts = case
    source, target = graph.edge_index
    seen = torch.zeros(graph.num_edges, dtype=torch.int64)
    for rank in range(parts):
        part = cut(graph, row_part, col_part, rank, parts)
        assert torch.equal(part.rows, (row_part == rank).nonzero().flatten())
        assert torch.equal(part.rows[part.row], target[part.edge])
        columns = torch.cat([part.cols, part.halo])
        assert torch.equal(columns[part.col], source[part.edge])
        seen[part.edge] += 1
    assert torch.equal(seen, torch.ones_like(seen))


@given(cut_graphs())
def test_a_halo_is_what_edges_read_of_other_ranks_and_no_more(case):
    graph, row_part, col_part, parts = case
    for rank in range(parts):
        part = cut(graph, row_part, col_part, rank, parts)
        read = part.col[part.col >= len(part.cols)] - len(part.cols)
        assert torch.equal(read.unique(), torch.arange(len(part.halo)))
        for p in range(parts):
            theirs = part.halo[part.halo_ptr[p] : part.halo_ptr[p + 1]]
            assert (col_part[theirs] == p).all()
            assert torch.equal(theirs, theirs.unique())
        assert part.halo_ptr[rank] == part.halo_ptr[rank + 1]


@given(cut_graphs())
def test_edges_of_interior_rows_come_first_row_by_row(case):
    graph, row_part, col_part, parts = case
    for rank in range(parts):
        part = cut(graph, row_part, col_part, rank, parts)
        first, late = part.row[: part.interior], part.row[part.interior :]
        assert (part.col[: part.interior] < len(part.cols)).all()
        assert (first.diff() >= 0).all()
        assert (late.diff() >= 0).all()
        assert not set(first.tolist()) & set(late.tolist())
        outside = part.row[part.col >= len(part.cols)]
        assert set(late.tolist()) == set(outside.tolist())


@given(cut_graphs())
def test_nodes_know_their_graph_of_the_batch(case):
    graph, row_part, col_part, parts = case
    of_node = torch.searchsorted(graph.graph_ptr, torch.arange(graph.num_rows), right=True) - 1
    for rank in range(parts):
        part = cut(graph, row_part, col_part, rank, parts)
        rows, cols, halo = graphs_of(part)
        assert rows[-1] == len(part.rows)
        assert cols[-1] == len(part.cols)
        graphs = torch.arange(graph.num_graphs)
        assert torch.equal(of_node[part.rows], graphs.repeat_interleave(rows.diff()))
        if col_part is row_part:
            assert torch.equal(of_node[part.halo], halo)


def test_the_example_of_the_docstring():
    graph = Graph.from_edge_index(torch.tensor([[2, 1, 0, 0], [0, 0, 1, 2]]), 3)
    owners = torch.tensor([0, 0, 1])
    part = cut(graph, owners, owners, 0, 2)
    assert part.edge.tolist() == [2, 0, 1]
    assert (part.row.tolist(), part.col.tolist()) == ([1, 0, 0], [0, 2, 1])
    assert (part.halo.tolist(), part.interior) == ([2], 1)
    assert part.cols is part.rows


@pytest.mark.parametrize("parts", [1, 3])
def test_a_rank_without_rows(parts):
    graph = Graph.from_edge_index(torch.tensor([[0, 1], [1, 0]]), 2)
    owners = torch.zeros(2, dtype=torch.int64)
    part = cut(graph, owners, owners, parts - 1, parts)
    assert len(part.edge) == (2 if parts == 1 else 0)
    assert part.halo_ptr.tolist() == [0] * (parts + 1)


def test_a_share_prints_its_sizes():
    graph = Graph.from_edge_index(torch.tensor([[2, 1, 0, 0], [0, 0, 1, 2]]), 3)
    shard = DistributedGraph.from_graph(graph, torch.zeros(3, dtype=torch.int64))
    assert repr(shard) == "DistributedGraph(rank 0 of 1, n=3, e=4, h=0, cpu)"

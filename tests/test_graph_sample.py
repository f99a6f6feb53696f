"""Graph.sample: blocks are parts of the graph, as many edges as asked for, all alike likely."""

from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import torch
from graph_cases import SIX, Case, Sorts, assert_same, cases, examples, few
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

from fastgt import Graph, graph_sample, neighborhood_attention
from fastgt.graph_sample import Sample
from fastgt.testing import PROBLEMS, random_edge_index, with_index_dtype


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def never(*given: Tensor) -> bool:
    return False


@pytest.fixture(params=["cpp", "one after another", "sorted"])
def drawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way to draw."""
    if request.param == "cpp":
        return
    monkeypatch.setattr(graph_sample.cpu, "can_draw", never)
    if request.param == "sorted":
        monkeypatch.setattr(graph_sample, "FEW", 0)


def check(found: Sample, graph: Graph, seeds: list[int], fanouts: list[int], replace: bool) -> None:
    """What a sample promises, by loops over lists."""
    source, target = graph.edge_index.tolist()
    degree = Counter(target)
    nodes = found.n_id.tolist()
    assert found.n_id.dtype == torch.int64
    assert nodes[: len(seeds)] == seeds
    assert len(set(nodes)) == len(nodes)
    assert len(found.blocks) == len(found.e_id) == len(fanouts)
    rows = len(seeds)
    # from the seeds outwards
    for block, e_id, fanout in zip(found.blocks[::-1], found.e_id[::-1], fanouts, strict=True):
        assert block.num_rows == rows
        assert rows <= block.num_cols <= len(nodes)
        assert block.edge.tolist() == list(range(block.num_edges))
        assert e_id.dtype == torch.int64
        columns, ends = block.edge_index.tolist()
        for j, i, e in zip(columns, ends, e_id.tolist(), strict=True):
            assert (nodes[j], nodes[i]) == (source[e], target[e])
        for i, count in zip(nodes[:rows], block.row_degree.tolist(), strict=True):
            if fanout == -1:
                assert count == degree[i]
            elif replace:
                assert count == (fanout if degree[i] else 0)
            else:
                assert count == min(fanout, degree[i])
        if not replace:
            assert len(set(e_id.tolist())) == len(e_id)
        # new columns are there for an edge, and in order
        assert set(range(rows, block.num_cols)) <= set(columns)
        assert nodes[rows : block.num_cols] == sorted(nodes[rows : block.num_cols])
        rows = block.num_cols
    assert rows == len(nodes)


fanouts = st.lists(st.sampled_from([-1, 0, 1, 2, 3, 5, 70]), min_size=1, max_size=3)


@pytest.mark.usefixtures("drawn")
@examples
@given(cases(square=True), fanouts, st.booleans(), st.randoms())
def test_blocks_are_parts_of_the_graph(
    case: Case, fanouts: list[int], replace: bool, random: Any
) -> None:
    graph = case.graph()
    seeds = random.sample(range(case.rows), random.randint(0, case.rows))
    given = torch.tensor(seeds, dtype=torch.int64)
    found = graph.sample(given, fanouts, generator=generator(), replace=replace)
    check(found, graph, seeds, fanouts, replace)


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("fanout", [3, 100])
def test_of_a_hub_every_edge_is_as_likely(fanout: int) -> None:
    degree, count = 200, 400
    graph = Graph.complete(torch.tensor([0, count]), torch.tensor([0, degree]))
    row_ptr, col, _ = graph_sample._drawn(
        graph._structure, torch.arange(count), fanout, generator(), replace=False
    )
    assert row_ptr.diff().tolist() == [fanout] * count
    seen = torch.bincount(col, minlength=degree)
    # as a binomial of count draws with fanout / degree: five deviations for each of 200 edges
    share = fanout / degree
    deviation = (count * share * (1 - share)) ** 0.5
    assert (seen - count * share).abs().max() < 5 * deviation


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("fanout", [1, 2, 3, 4])
def test_every_set_of_edges_is_as_likely(fanout: int) -> None:
    degree, count = 5, 4000
    graph = Graph.complete(torch.tensor([0, count]), torch.tensor([0, degree]))
    _, col, _ = graph_sample._drawn(
        graph._structure, torch.arange(count), fanout, generator(), replace=False
    )
    seen = Counter(tuple(sorted(row)) for row in col.view(count, fanout).tolist())
    sets = list(combinations(range(degree), fanout))
    assert set(seen) == set(sets)
    share = 1 / len(sets)
    deviation = (count * share * (1 - share)) ** 0.5
    assert max(abs(seen[x] - count * share) for x in sets) < 4 * deviation


@pytest.mark.usefixtures("drawn")
def test_edges_that_may_repeat_are_drawn_one_by_one() -> None:
    count, degree = 3000, 3
    graph = Graph.complete(torch.tensor([0, count]), torch.tensor([0, degree]))
    nodes = torch.arange(count)
    _, col, _ = graph_sample._drawn(graph._structure, nodes, 2, generator(), replace=True)
    seen = Counter(map(tuple, col.view(count, 2).tolist()))
    deviation = (count / 9 * 8 / 9) ** 0.5
    assert len(seen) == 9
    assert max(abs(n - count / 9) for n in seen.values()) < 4 * deviation


def large() -> Graph:
    hub = torch.stack([torch.arange(2000), torch.zeros(2000).long()])
    return Graph.from_edge_index(torch.cat([random_edge_index(0, 2000, 20_000), hub], 1), 2000)


@pytest.mark.parametrize("replace", [False, True])
def test_a_sample_is_that_of_its_generator(replace: bool) -> None:
    graph, seeds = large(), torch.tensor([0, 5, 1999])
    first, second, third = (
        graph.sample(seeds, (15, 100), generator=generator(i), replace=replace) for i in (3, 3, 4)
    )
    assert torch.equal(first.n_id, second.n_id)
    for a, b, x, y in zip(first.blocks, second.blocks, first.e_id, second.e_id, strict=True):
        assert_same(a, b)
        assert torch.equal(x, y)
    assert not torch.equal(first.e_id[1], third.e_id[1])
    check(first, graph, seeds.tolist(), [15, 100], replace)
    torch.manual_seed(1)
    a = graph.sample(seeds, [5], replace=replace).e_id[0]
    b = graph.sample(seeds, [5], replace=replace).e_id[0]
    torch.manual_seed(1)
    assert torch.equal(graph.sample(seeds, [5], replace=replace).e_id[0], a)
    assert not torch.equal(a, b)


@pytest.mark.usefixtures("compiled_kernels")
@examples
@given(cases(square=True), fanouts, st.booleans(), st.booleans())
def test_cpp_draws_what_plain_pytorch_draws(
    case: Case, fanouts: list[int], replace: bool, wide: bool
) -> None:
    graph = with_index_dtype(case.graph(), torch.int64 if wide else torch.int32)
    seeds = torch.randperm(case.rows)[: case.rows // 2 + 1]
    found = []
    for plain in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if plain:
                patch.setattr(graph_sample.cpu, "can_draw", never)
            found.append(graph.sample(seeds, fanouts, generator=generator(), replace=replace))
    a, b = found
    assert torch.equal(a.n_id, b.n_id)
    assert a.n_id.untyped_storage().nbytes() == a.n_id.nbytes
    for x, y, e, f in zip(a.blocks, b.blocks, a.e_id, b.e_id, strict=True):
        assert_same(x, y)
        assert e.dtype == f.dtype
        assert torch.equal(e, f)


@few
@given(cases(square=True), fanouts)
def test_a_table_of_nodes_and_a_sort_number_alike(case: Case, fanouts: list[int]) -> None:
    graph, seeds = case.graph(), torch.arange(0, case.rows, 2)
    found = []
    for dense in (0, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graph_sample, "DENSE", dense)
            found.append(graph.sample(seeds, fanouts, generator=generator()))
    assert found[0].n_id.tolist() == found[1].n_id.tolist()
    for a, b in zip(found[0].blocks, found[1].blocks, strict=True):
        assert_same(a, b)


def test_a_row_of_a_whole_neighbourhood_is_that_of_the_graph() -> None:
    graph = large()
    x, bias = torch.randn(2000, 2, 4), torch.randn(graph.num_edges, 2)
    seeds = torch.tensor([1500, 0, 3])
    found = graph.sample(seeds, (-1, -1))

    def layer(h: Tensor, block: Graph, bias: Tensor) -> Tensor:
        return neighborhood_attention(h[: block.num_rows], h, h, block, edge_bias=bias)

    whole = layer(layer(x, graph, bias), graph, bias)
    h = x[found.n_id]
    for block, e_id in zip(found.blocks, found.e_id, strict=True):
        h = layer(h, block, bias[e_id])
    torch.testing.assert_close(h, whole[seeds])


@pytest.mark.parametrize("sizes", [(15, 10), (100, 10)])
def test_of_a_graph_with_hubs(sizes: tuple[int, int]) -> None:
    graph = PROBLEMS["debian"].load()
    degree = graph.row_degree.long()
    hub = int(degree.argmax())
    assert degree[hub] > 20_000
    others = torch.randperm(graph.num_rows, generator=generator())[:1024]
    seeds = torch.cat([torch.tensor([hub]), others[others != hub]])
    found = graph.sample(seeds, sizes, generator=generator())
    edge_index, rows = graph.edge_index, len(seeds)
    assert torch.equal(found.n_id[:rows], seeds)
    assert len(found.n_id.unique()) == len(found.n_id)
    for block, e_id, fanout in zip(found.blocks[::-1], found.e_id[::-1], sizes, strict=True):
        assert block.num_rows == rows
        assert torch.equal(found.n_id[block.edge_index], edge_index[:, e_id])
        assert torch.equal(block.row_degree.long(), degree[found.n_id[:rows]].clamp(max=fanout))
        assert len(e_id.unique()) == len(e_id)
        rows = block.num_cols
    assert rows == len(found.n_id)


def test_gradients_flow_through_blocks_to_their_nodes() -> None:
    graph = large()
    found = graph.sample(torch.tensor([1500, 3]), (4, 3), generator=generator())
    x = torch.randn(2000, 1, 4, requires_grad=True)
    h = x[found.n_id]
    for block in found.blocks:
        h = neighborhood_attention(h[: block.num_rows], h, h, block) + h[: block.num_rows]
    h.square().sum().backward()
    assert x.grad is not None
    reached = x.grad.abs().sum((1, 2)).nonzero().flatten()
    assert set(reached.tolist()) <= set(found.n_id.tolist())
    assert {1500, 3} <= set(reached.tolist())


def test_nothing_is_sorted_but_seeds() -> None:
    graph, seeds = large(), torch.arange(100)
    with Sorts() as sorts:
        graph.sample(seeds, (15, 10))
    assert sorts.count == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_seeds_of_any_integers_are_the_callers(dtype: torch.dtype) -> None:
    graph = Graph.from_edge_index(SIX, 6)
    seeds = torch.tensor([2, 0], dtype=dtype)
    found = graph.sample(seeds, [0])
    assert found.n_id.tolist() == [2, 0]
    seeds.zero_()
    assert found.n_id.tolist() == [2, 0]
    assert found.blocks[0].num_nodes == 2  # no other columns: square


def test_a_graph_of_int64() -> None:
    graph = with_index_dtype(large(), torch.int64)
    found = graph.sample(torch.tensor([0, 7]), (5, 5), generator=generator())
    check(found, graph, [0, 7], [5, 5], False)
    assert found.blocks[0].col.dtype == torch.int32


def test_a_sample_is_moved_by_tree_map() -> None:
    found = large().sample(torch.tensor([0, 7]), (5, 5))
    moved = tree_map(lambda x: x.to("meta"), found)
    assert type(moved) is Sample
    assert {block.device.type for block in moved.blocks} == {"meta"}


def test_samples_train_when_made_in_inference_mode() -> None:
    with torch.inference_mode():
        found = large().sample(torch.tensor([0, 7]), (5, 5))
    x = torch.randn(found.blocks[0].num_cols, 1, 4, requires_grad=True)
    q = x[: found.blocks[0].num_rows]
    neighborhood_attention(q, x, x, found.blocks[0]).sum().backward()
    assert x.grad is not None


SEEDS = torch.tensor([0, 2])
REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "twice": (torch.tensor([4, 2, 4]), [2], ValueError, "seeds has node 4 more than once"),
    "range": (torch.tensor([6]), [2], ValueError, "seeds has index 6 but the graph has 6 nodes"),
    "negative": (torch.tensor([-1]), [2], ValueError, "seeds has index -1"),
    "mask": (torch.ones(6).bool(), [2], TypeError, "seeds must hold integers .* got torch.bool"),
    "list": ([0, 2], [2], TypeError, "seeds must be a tensor of integers, got list"),
    "shape": (SEEDS[None], [2], ValueError, r"seeds must be \[S\], got \[1, 2\]"),
    "device": (SEEDS.to("meta"), [2], ValueError, "seeds is on meta, the graph on cpu"),
    "no layer": (SEEDS, [], ValueError, "fanouts must have an int for each layer"),
    "an int": (SEEDS, 5, TypeError, "fanouts must be a sequence of ints, one a layer, got int"),
    "below": (SEEDS, [3, -2], ValueError, r"fanouts\[1\] must be -1, .* got -2"),
    "float": (SEEDS, [3.0], TypeError, r"fanouts\[0\] must be an int, got float"),
    "bool": (SEEDS, [True], TypeError, r"fanouts\[0\] must be an int, got bool"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    seeds, fanouts, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        Graph.from_edge_index(SIX, 6).sample(seeds, fanouts)


def test_graphs_that_cannot_be_sampled_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sample\(\) needs a square graph, got 6 rows and 7"):
        Graph.from_edge_index(SIX, (6, 7)).sample(SEEDS, [2])
    graph = Graph.from_edge_index(SIX, 6).to("meta")
    with pytest.raises(RuntimeError, match="meta device has no edges to sample"):
        graph.sample(SEEDS.to("meta"), [2])


def test_a_generator_is_one():
    graph = Graph.complete(torch.tensor([0, 6]))
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, got int"):
        graph.sample(torch.tensor([0]), [2], generator=3)

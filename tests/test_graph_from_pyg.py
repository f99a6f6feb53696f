"""Graph.from_pyg: the boundaries of batches, with and without ptr, and relations of HeteroData."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import SIX, assert_same
from torch import Tensor

from fastgt import Graph, linear_attention, neighborhood_attention, segment_mean

pyg = pytest.importorskip("torch_geometric.data")
BATCH = torch.tensor([0, 0, 0, 0, 1, 1])


def batched(batch: Tensor | None, **more: Any) -> Any:
    return pyg.Data(x=torch.arange(6.0)[:, None], edge_index=SIX, batch=batch, **more)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_boundaries_come_from_a_sorted_batch(dtype: torch.dtype) -> None:
    graph = Graph.from_pyg(batched(BATCH.to(dtype)))
    assert_same(graph, Graph.from_edge_index(SIX, graph_ptr=torch.tensor([0, 4, 6])))
    assert graph.graph_ptr is graph.col_graph_ptr
    means = segment_mean(torch.arange(6.0)[:, None], graph.graph_ptr)
    assert means.tolist() == [[1.5], [4.5]]
    q, k, v = torch.randn(3, 6, 2, 4)
    alone = linear_attention(q[:4], k[:4], v[:4])
    torch.testing.assert_close(linear_attention(q, k, v, graph.graph_ptr)[:4], alone)


@pytest.mark.parametrize(
    ("more", "ends"),
    [
        ({}, [0, 0, 4, 4, 4, 6]),
        ({"num_graphs": 5}, [0, 0, 4, 4, 4, 6]),
        ({"num_graphs": 7}, [0, 0, 4, 4, 4, 6, 6, 6]),
        ({"batch_size": 6}, [0, 0, 4, 4, 4, 6, 6]),  # as of a NeighborLoader
        ({"batch_size": torch.tensor(6)}, [0, 0, 4, 4, 4, 6, 6]),
    ],
)
def test_graphs_without_nodes_are_graphs(more: dict, ends: list[int]) -> None:
    graph = Graph.from_pyg(batched(torch.tensor([1, 1, 1, 1, 4, 4]), **more))
    assert graph.graph_ptr.tolist() == ends


def test_batch_comes_before_ptr_which_says_how_many_graphs_there_are() -> None:
    data = batched(BATCH, ptr=torch.tensor([0, 5, 7, 7, 9]))  # of a batch that had more nodes
    assert Graph.from_pyg(data).graph_ptr.tolist() == [0, 4, 6, 6, 6]
    data = batched(None, ptr=torch.tensor([0, 0, 4, 6, 6]))
    assert Graph.from_pyg(data).graph_ptr.tolist() == [0, 0, 4, 6, 6]


@pytest.mark.parametrize(
    ("ptr", "message"),
    [
        ([0, 3, 6], r"graph 0 has 4 nodes by data\.batch but 3 by data\.ptr"),
        ([0, 9, 10], r"graph 1 has 2 nodes by data\.batch but 1 by data\.ptr"),
    ],
)
def test_a_batch_and_a_ptr_that_disagree_are_refused(ptr: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Graph.from_pyg(batched(BATCH, ptr=torch.tensor(ptr)))


def pair() -> Any:
    """Graphs of two and of three nodes, with a self loop each."""
    loop = torch.zeros(2, 1, dtype=torch.long)
    return pyg.Batch.from_data_list(
        [pyg.Data(x=torch.zeros(n, 1), edge_index=loop, num_nodes=n) for n in (2, 3)]
    )


@pytest.mark.parametrize(
    ("kept", "ends"),
    [([1, 2, 4], [0, 1, 3]), ([0, 1], [0, 2, 2]), ([2, 3], [0, 0, 2]), ([], [0, 0, 0])],
)
def test_a_subgraph_of_a_batch_keeps_its_graphs(kept: list[int], ends: list[int]) -> None:
    data = pair().subgraph(torch.tensor(kept, dtype=torch.long))
    assert data.ptr.tolist() == [0, 2, 5]  # PyG leaves it as it was
    assert Graph.from_pyg(data).graph_ptr.tolist() == ends


def test_a_subgraph_that_mixes_the_graphs_of_a_batch_is_refused() -> None:
    data = pair().subgraph(torch.tensor([0, 2, 1, 3, 4]))
    with pytest.raises(
        ValueError, match=r"data\.batch is not sorted: node 1 is of graph 1, node 2 "
    ):
        Graph.from_pyg(data)


@pytest.mark.parametrize(
    ("ptr", "error", "message"),
    [
        ([0, 4, 7], ValueError, r"data\.ptr ends at 7 but there are 6 nodes"),
        ([1, 6], ValueError, r"data\.ptr must start at 0, got 1"),
        ([0, 5, 4, 6], ValueError, r"data\.ptr decreases from 5 to 4 at 2"),
        ([], ValueError, r"data\.ptr must be \[G \+ 1\], got \[0\]"),
        ([0.0, 6.0], TypeError, r"data\.ptr must hold integers .* got torch.float32"),
    ],
)
def test_a_ptr_that_does_not_fit_is_refused(
    ptr: list, error: type[Exception], message: str
) -> None:
    dtype = torch.float32 if error is TypeError else torch.long
    data = pyg.Data(x=torch.zeros(6, 1), edge_index=SIX, ptr=torch.tensor(ptr, dtype=dtype))
    with pytest.raises(error, match=message):
        Graph.from_pyg(data)


@pytest.mark.parametrize("name", ["ptr", "batch"])
def test_boundaries_on_another_device_are_refused(name: str) -> None:
    data = pair()
    data[name] = data[name].to("meta")
    with pytest.raises(ValueError, match=rf"data\.{name} is on meta, edge_index on cpu"):
        Graph.from_pyg(data)
    with pytest.raises(RuntimeError, match="edge_index is on the meta device"):
        Graph.from_pyg(data.to("meta"))


def test_nothing_but_a_batch_of_no_nodes() -> None:
    none = pyg.Data(edge_index=SIX[:, :0], batch=torch.empty(0, dtype=torch.long), num_nodes=0)
    assert Graph.from_pyg(none).num_graphs == 0
    empty = pyg.Data(edge_index=SIX[:, :0], num_nodes=0)
    batch = pyg.Batch.from_data_list([empty, empty])
    del batch.ptr
    assert Graph.from_pyg(batch).graph_ptr.tolist() == [0, 0, 0]


def test_what_pygs_pooling_leaves_keeps_its_graphs() -> None:
    pooling = pytest.importorskip("torch_geometric.nn").TopKPooling(1, ratio=0.5)
    x, edge_index, _, batch, *_ = pooling(torch.randn(6, 1), SIX, batch=BATCH)
    graph = Graph.from_pyg(pyg.Data(x=x, edge_index=edge_index, batch=batch))
    assert graph.graph_ptr.tolist() == [0, 2, 3]


def test_an_unsorted_batch_is_refused_and_what_the_message_says_helps() -> None:
    order = torch.tensor([0, 4, 1, 5, 2, 3])
    place = torch.empty_like(order)
    place[order] = torch.arange(6)
    data = pyg.Data(x=order.float()[:, None], edge_index=place[SIX], batch=BATCH[order])
    with pytest.raises(
        ValueError, match=r"data\.batch is not sorted: node 1 is of graph 1, node 2 "
    ):
        Graph.from_pyg(data)
    data = data.subgraph(data.batch.argsort(stable=True))
    assert data.x.flatten().tolist() == list(range(6))
    assert Graph.from_pyg(data).graph_ptr.tolist() == [0, 4, 6]


@pytest.mark.parametrize(
    ("batch", "more", "error", "message"),
    [
        (BATCH.float(), {}, TypeError, r"data\.batch must be .* integers, got torch.float32"),
        (BATCH.tolist(), {}, TypeError, r"data\.batch must be .* integers, got list"),
        (BATCH[:5], {}, ValueError, r"data\.batch must be \[6\].* got \[5\]"),
        (BATCH[:, None], {}, ValueError, r"data\.batch must be \[6\].* got \[6, 1\]"),
        (BATCH - 1, {}, ValueError, r"data\.batch has graph -1"),
        (BATCH, {"num_graphs": 1}, ValueError, r"batch has graph 1 but data\.num_graphs is 1"),
        (
            BATCH,
            {"ptr": torch.tensor([0, 6])},
            ValueError,
            r"graph 1 but the number .* data\.ptr is 1",
        ),
        (torch.arange(6), {}, ValueError, r"edge 0 joins node 1 to node 0 of another graph"),
    ],
)
def test_batches_that_do_not_fit_are_refused(
    batch: Any, more: dict, error: type[Exception], message: str
) -> None:
    data = batched(batch, **more)
    data.num_nodes = 6
    with pytest.raises(error, match=message):
        Graph.from_pyg(data)


WRITES = torch.tensor([[0, 1, 1, 2, 3], [0, 0, 1, 3, 4]])  # authors of papers


def papers(sizes: bool = True) -> Any:
    data = pyg.HeteroData()
    data["author", "writes", "paper"].edge_index = WRITES
    data["paper", "cites", "paper"].edge_index = torch.tensor([[0, 4], [1, 2]])
    if sizes:
        data["author"].x, data["paper"].num_nodes = torch.ones(4, 3), 5
    return data


def test_a_relation_of_hetero_data() -> None:
    data = papers()
    graph = Graph.from_pyg(data["author", "writes", "paper"])
    assert_same(graph, Graph.from_edge_index(WRITES, (5, 4)))
    cites = Graph.from_pyg(data["paper", "cites", "paper"])
    assert cites.num_nodes == 5
    q, k = torch.randn(5, 1, 4), torch.randn(4, 1, 4)
    assert neighborhood_attention(q, k, k, graph).shape == (5, 1, 4)


@pytest.mark.parametrize("without_ptr", [False, True])
def test_a_relation_of_a_batch_of_hetero_data_keeps_its_graphs(without_ptr: bool) -> None:
    batch = pyg.Batch.from_data_list([papers(), papers()])
    if without_ptr:
        del batch["author"].ptr, batch["paper"].ptr
    single = papers()
    for relation in [("author", "writes", "paper"), ("paper", "cites", "paper")]:
        graph = Graph.from_pyg(batch[relation])
        one = Graph.from_pyg(single[relation])
        assert_same(graph, Graph.batch([one, one]))
        square = relation[0] == relation[2]
        assert (graph.graph_ptr is graph.col_graph_ptr) is square


def test_as_many_nodes_of_two_types_are_not_one_type() -> None:
    data = papers()
    data["author"].num_nodes = 5
    data["author"].batch = torch.tensor([0, 0, 0, 0, 2])
    data["paper"].batch = torch.tensor([0, 0, 0, 0, 0])
    graph = Graph.from_pyg(data["author", "writes", "paper"])
    # the last graph has an author and no paper
    assert graph.graph_ptr.tolist() == [0, 5, 5, 5]
    assert graph.col_graph_ptr.tolist() == [0, 4, 4, 5]


def without(kind: str) -> Any:
    data = papers()
    data["author"].batch = torch.zeros(4, dtype=torch.long)
    data["paper"].batch = torch.zeros(5, dtype=torch.long)
    del data[kind].batch
    return data


def crossing() -> Any:
    data = papers()
    data["author"].batch, data["paper"].batch = torch.tensor([0, 0, 0, 1]), torch.zeros(5).long()
    return data


HETERO: dict[str, tuple[Callable[[], Any], str]] = {
    "sizes": (
        lambda: papers(sizes=False),
        r"number of nodes of data\['author'\] is not known: set data\['author'\]\.num_nodes",
    ),
    "one is no batch": (
        lambda: without("paper"),
        r"data\['paper'\] has neither ptr nor batch, but data\['author'\] has",
    ),
    "the other is no batch": (
        lambda: without("author"),
        r"data\['author'\] has neither ptr nor batch, but data\['paper'\] has",
    ),
    "between graphs": (crossing, r"edge 4 joins node 3 to node 4 of another graph"),
}


@pytest.mark.filterwarnings("ignore:Unable to accurately infer")
@pytest.mark.parametrize("name", HETERO)
def test_relations_that_are_refused(name: str) -> None:
    make, message = HETERO[name]
    data = make()
    with pytest.raises(ValueError, match=message):
        Graph.from_pyg(data["author", "writes", "paper"])


def test_data_without_edges_are_refused() -> None:
    with pytest.raises(TypeError, match=r"data must have an edge_index or an adj_t, got Data"):
        Graph.from_pyg(pyg.Data(x=torch.ones(2, 1)))


def test_a_relation_of_data_that_are_gone_is_refused() -> None:
    relation = papers()["author", "writes", "paper"]
    gc.collect()
    with pytest.raises(ValueError, match=r"the HeteroData of .*writes.* is gone: keep it"):
        Graph.from_pyg(relation)

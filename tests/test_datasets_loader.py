"""Batches of a set of graphs, cut out here or by other processes."""

import pytest
import torch

from fastgt.datasets import Encoded, GraphSet

pytestmark = pytest.mark.usefixtures("one_thread")


def graphs(count=23):
    """Graphs of 0 to 6 nodes with random edges and every sort of encoding."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.randint(0, 7, (count,), generator=draw)
    edges = torch.randint(0, 12, (count,), generator=draw) * (sizes > 0)
    size = sizes.repeat_interleave(edges)
    n, e = int(sizes.sum()), len(size)
    return GraphSet(
        node=torch.arange(n),
        edge=torch.randn(e, 2, generator=draw),
        edge_index=(torch.rand(2, e, generator=draw) * size).long(),
        node_ptr=torch.tensor([0, *sizes.cumsum(0)]),
        edge_ptr=torch.tensor([0, *edges.cumsum(0)]),
        y=torch.arange(count),
        splits={"train": torch.arange(count - 1, 2, -1), "val": torch.arange(3)},
        encodings={
            "pe": Encoded(torch.randn(n, 4, generator=draw), "node"),
            "distance": Encoded(torch.arange(int(sizes.square().sum())), "pair"),
        },
    )


def tensors(batch):
    return {
        "node": batch.node,
        "edge": batch.edge,
        "y": batch.y,
        "edge_index": batch.graph.edge_index,
        "graph_ptr": batch.graph.graph_ptr,
        **batch.encodings,
    }


def assert_same(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        a, b = tensors(a), tensors(b)
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype, name
            assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_has_every_graph_once(workers):
    data = graphs()
    chunks = data.splits["train"].split(4)
    batches = data.loader("train", 4, workers=workers)
    assert len(batches) == len(chunks) == 5
    assert_same(batches, [data.batch(chunk) for chunk in chunks])
    shuffled = list(data.loader("train", 7, shuffle=True, workers=workers))
    assert [len(batch.y) for batch in shuffled] == [7, 7, 6]
    found = torch.cat([batch.y for batch in shuffled])
    assert sorted(found.tolist()) == list(range(3, 23))
    assert found.tolist() != data.splits["train"].tolist()
    whole = data.loader("train", 7, drop_last=True, workers=workers)
    assert len(whole) == 2
    assert_same(whole, [data.batch(chunk) for chunk in data.splits["train"].split(7)[:2]])


def test_batches_are_the_same_for_any_number_of_workers():
    data = graphs()

    def passes(workers):
        draw = torch.Generator().manual_seed(4)
        batches = data.loader("train", 3, shuffle=True, workers=workers, generator=draw)
        return [*batches, *batches]  # the second pass has another order

    alone = passes(0)
    assert_same(passes(2), alone)
    assert [b.y.tolist() for b in alone[:7]] != [b.y.tolist() for b in alone[7:]]


@pytest.mark.parametrize("workers", [0, 2])
def test_only_the_order_draws_random_numbers(workers):
    data = graphs()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(data.loader("train", 4, workers=workers))
    list(data.loader("train", 4, workers=workers, shuffle=True, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)
    list(data.loader("train", 4, workers=workers, shuffle=True))
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.randperm(20)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_pass_goes_on_where_it_was_stopped():
    data = graphs()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
    whole = list(data.loader(order, 5))
    assert_same(data.loader(order[10:], 5, workers=2), whole[2:])


def test_a_batch_of_another_process_can_be_used():
    """Its graph has what it needs, and a copy on a device is the same batch."""
    data = graphs()
    for batch, own in zip(data.loader("train", 8, workers=2), data.loader("train", 8), strict=True):
        assert torch.equal(batch.graph.row_ptr, own.graph.row_ptr)
        assert torch.equal(batch.graph.edge, own.graph.edge)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        assert_same([batch.to(device, non_blocking=True).to("cpu")], [own])


def test_what_is_refused():
    data = graphs()
    for arguments, message in (
        (("test", 4), r"split must be one of \['train', 'val'\], got 'test'"),
        ((torch.tensor([0, 23]), 4), "split has graphs from 0 to 23, there are 23"),
        ((torch.zeros(2, 2).long(), 4), r"split must be \[B\], got \[2, 2\]"),
        (("val", 0), "batch_size must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            data.loader(*arguments)
    with pytest.raises(ValueError, match="workers"):
        data.loader("val", 1, workers=-1)
    assert list(data.loader(torch.tensor([], dtype=torch.int64), 4)) == []

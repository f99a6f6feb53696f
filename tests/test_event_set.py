"""Timed events: what a batch knows, which pairs stand against it, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastgt.datasets import EventSet, flights
from fastgt.datasets.event_set import chronological
from fastgt.real_graphs import open_data

pytestmark = pytest.mark.usefixtures("one_thread")
NODES, EVENTS = 9, 240
KINDS = ("random", "historical", "inductive")


def drawn(seed=0, events=EVENTS):
    """Some pairs are frequent, several events share a time, and a late pair is new."""
    draws = torch.Generator().manual_seed(seed)
    source, target = (
        (NODES * torch.rand(events, generator=draws) ** 2).long().clamp(max=NODES - 1)
        for _ in range(2)
    )
    time = torch.randint(events // 3, (events,), generator=draws).sort().values
    edge = torch.randn(events, 2, generator=draws)
    return EventSet(source, target, time, NODES, chronological(time), edge)


def every_batch(data, size=7, history=20):
    for split in data.splits:
        for number in range(data.batches(split, size)):
            yield split, data.batch(split, number, size=size, history=history)


def test_splits_are_in_the_order_of_time_and_share_no_time():
    data = drawn()
    (begin, val), (val_begin, test), (test_begin, end) = data.splits.values()
    assert (begin, val, test, end) == (0, val_begin, test_begin, len(data))
    assert data.time[val - 1] < data.time[val]
    assert data.time[test - 1] < data.time[test]
    assert abs(val / len(data) - 0.7) < 0.05
    assert abs(test / len(data) - 0.85) < 0.05
    with pytest.raises(ValueError, match=r"val and test must leave .*, got 0\.5 and 0\.5"):
        chronological(data.time, 0.5, 0.5)


def test_all_events_of_one_time_stand_in_one_split():
    time = torch.zeros(10, dtype=torch.int64)
    assert chronological(time) == {"train": (0, 10), "val": (10, 10), "test": (10, 10)}


def test_batches_are_all_events_of_a_split_in_order():
    data = drawn()
    for split, (first, last) in data.splits.items():
        parts = [batch.events.time for name, batch in every_batch(data) if name == split]
        assert torch.equal(torch.cat(parts), data.time[first:last])


def test_history_is_the_last_events_before_the_first_that_is_predicted():
    data = drawn()
    for _, batch in every_batch(data):
        before = [i for i in range(len(data)) if data.time[i] < data.time[batch.first]][-20:]
        for found, all_of in zip(
            batch.history, (data.source, data.target, data.time), strict=False
        ):
            assert torch.equal(found, all_of[before])
        assert torch.equal(batch.history.edge, data.edge[before])
        assert batch.now == data.time[batch.first]
        assert (batch.history.time < batch.events.time.min()).all()
    assert len(data.batch("train", 0, size=7, history=20).history.time) == 0


def test_a_batch_moves_with_its_history():
    data = drawn()
    here = data.batch("val", 1, size=7, history=20)
    batch = here.to("meta")
    for kind in KINDS:
        assert torch.equal(data.negatives(batch, kind), data.negatives(here, kind))
    for events in (batch.events, batch.history):
        assert [x.device.type for x in events] == 4 * ["meta"]
    assert replace(drawn(), edge=None).batch("val", 1, size=7, history=20).to("meta").now


def test_history_without_features():
    data = replace(drawn(), edge=None)
    assert data.batch("val", 1, size=7, history=20).history.edge is None


def pairs_of(x):
    return list(map(tuple, x.T.tolist()))


def seen(data, first, last):
    return set(zip(data.source[first:last].tolist(), data.target[first:last].tolist(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_negatives_have_no_event_at_the_time_of_the_batch(kind):
    """And they are of their kind, as sets of pairs tell it."""
    data = drawn()
    targets = set(data.target.tolist())
    for split, batch in every_batch(data):
        found = pairs_of(data.negatives(batch, kind))
        times = batch.events.time
        now = ((data.time >= times[0]) & (data.time <= times[-1])).nonzero().flatten()
        present = seen(data, int(now[0]), int(now[-1]) + 1)
        assert len(found) == batch.last - batch.first
        assert not present & set(found)
        known = seen(data, 0, batch.known)
        if kind == "inductive":
            known -= seen(data, 0, data.splits[split][0])
        hard = 0 if kind == "random" else min(len(known - present), len(found))
        assert set(found[:hard]) <= known - present
        assert len(set(found[:hard])) == hard
        assert [i for i, _ in found[hard:]] == batch.events.source[hard:].tolist()
        assert {j for _, j in found[hard:]} <= targets


def test_kinds_of_negatives_differ_where_they_should():
    data = drawn()
    batch = data.batch("test", 2, size=7, history=20)
    new = seen(data, 0, batch.known) - seen(data, 0, data.splits["test"][0])
    assert new  # else the batch tells nothing of inductive negatives
    old = seen(data, 0, batch.known) - new
    inductive, historical = (set(pairs_of(data.negatives(batch, k))) for k in KINDS[:0:-1])
    assert historical & old
    assert inductive & new


@pytest.mark.parametrize("kind", KINDS)
def test_negatives_depend_on_the_seed_and_the_batch_alone(kind):
    data, other = drawn(), drawn()
    batch = data.batch("test", 1, size=7, history=20)
    wanted = data.negatives(batch, kind, seed=3)
    for _, again in every_batch(other):
        other.negatives(again, kind)
    torch.manual_seed(5)
    assert torch.equal(other.negatives(batch, kind, seed=3), wanted)
    assert any(not torch.equal(data.negatives(batch, kind, seed=s), wanted) for s in range(4, 8))


def test_random_negatives_are_drawn_alike():
    """Each target that is free is as likely as any other."""
    data = drawn()
    batch = data.batch("test", 1, size=7, history=20)
    drawn_targets = torch.cat([data.negatives(batch, "random", seed=s)[1, :1] for s in range(900)])
    count = torch.bincount(drawn_targets, minlength=NODES)
    free = count > 0
    assert free.sum() >= 4
    expected = 900 / int(free.sum())
    assert ((count[free] - expected).abs() < 5 * expected**0.5).all()


def test_pairs_are_counted_among_the_events_before():
    data = drawn()
    every = torch.cartesian_prod(torch.arange(NODES), torch.arange(NODES)).T
    for begin, end in ((0, 0), (0, 100), (37, 100), (0, EVENTS)):
        events = list(zip(data.source.tolist(), data.target.tolist(), strict=True))[begin:end]
        wanted = [events.count(pair) for pair in pairs_of(every)]
        assert data.times_seen(every, end, begin).tolist() == wanted
        assert data.times_seen(every.to(torch.uint8), end, begin).tolist() == wanted
    beyond = torch.tensor([[NODES - 1], [NODES - 1]])
    few = EventSet(data.source[:1] * 0, data.target[:1] * 0, data.time[:1], NODES, {})
    assert few.times_seen(beyond, 1).tolist() == [0]
    # the number of a pair is beyond int32
    far = replace(few, source=few.source + 90_000, num_nodes=100_000)
    assert far.times_seen(torch.tensor([[90_000], [0]], dtype=torch.int32), 1).tolist() == [1]


def changed_later(data, batch):
    """The same set but for what happens at the time of the batch's first event or after it.

    The events to predict stay where they are: they are what is asked."""
    draws = torch.Generator().manual_seed(9)
    fields = {}
    for name in ("source", "target"):
        x = getattr(data, name).clone()
        later = torch.arange(len(data)) >= batch.known
        later[batch.first : batch.last] = False
        x[later] = torch.randint(NODES, (int(later.sum()),), generator=draws)
        fields[name] = x
    edge = data.edge.clone()
    edge[batch.known :] = torch.randn(len(data) - batch.known, 2, generator=draws)
    return replace(data, edge=edge, **fields)


def test_what_happens_later_changes_no_history():
    data = drawn()
    # an event of the same time stands before the batch
    split, batch = next((s, b) for s, b in every_batch(data) if 30 < b.known < b.first)
    number = (batch.first - data.splits[split][0]) // 7
    other = changed_later(data, batch)
    assert not torch.equal(other.source, data.source)
    again = other.batch(split, number, size=7, history=20)
    for found, wanted in zip(again.history, batch.history, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(
        other.times_seen(batch.pairs, batch.known), data.times_seen(batch.pairs, batch.known)
    )


def test_the_digest_changes_with_the_events():
    data = drawn()
    assert data.digest() == drawn().digest()
    others = [
        drawn(1),
        replace(data, edge=None),
        replace(data, time=data.time.float()),
        replace(data, splits=chronological(data.time, 0.3, 0.1)),
        replace(data, num_nodes=NODES + 1),
    ]
    assert len({x.digest() for x in [data, *others]}) == 1 + len(others)


def test_what_does_not_fit_is_refused_by_name():
    data = drawn()
    back = data.time.clone()
    back[50] = back[49] - 1
    beyond, below = data.source.clone(), data.target.clone()
    beyond[7], below[5] = NODES, -1
    for fields, error, message in (
        (
            {"time": back},
            ValueError,
            f"time must not go back: event 50 is at {back[50]} and event 49 at {back[49]}",
        ),
        ({"source": beyond}, ValueError, "source must be from 0 to 8, got 9 at event 7"),
        ({"target": below}, ValueError, "target must be from 0 to 8, got -1 at event 5"),
        ({"source": data.source.numpy()}, TypeError, "source must be a tensor, got ndarray"),
        ({"time": data.time.tolist()}, TypeError, "time must be a tensor, got list"),
        ({"edge": data.edge.numpy()}, TypeError, "edge must be a tensor, got ndarray"),
        ({"splits": None}, TypeError, "splits must be a dict, got NoneType"),
        ({"splits": {"train": 9}}, TypeError, r"splits\['train'\] must be a pair .*, got 9"),
        ({"source": data.source.int()}, TypeError, "source must be int64, got torch.int32"),
        ({"source": data.source.numpy()}, TypeError, "source must be a tensor, got ndarray"),
        ({"time": data.time.tolist()}, TypeError, "time must be a tensor, got list"),
        ({"edge": data.edge.tolist()}, TypeError, "edge must be a tensor, got list"),
        ({"time": data.time[0]}, ValueError, r"time must be \[E\], got \[\]"),
        ({"time": data.time > 3}, TypeError, "time must hold integers or .*, got torch.bool"),
        ({"time": data.time / 0}, ValueError, "time must be finite, got nan"),
        ({"target": data.target[1:]}, ValueError, r"target must be \[E\] = \[240\], got \[239\]"),
        (
            {"edge": data.edge[1:]},
            ValueError,
            r"edge must be \[E, F\] = \[240, F\], got \[239, 2\]",
        ),
        ({"edge": data.edge.long()}, TypeError, "edge must be floating point, got torch.int64"),
        ({"num_nodes": 0}, ValueError, "num_nodes must be positive, got 0"),
        ({"num_nodes": 2**32}, ValueError, "num_nodes must be 2147483648 at most, got 4294967296"),
        (
            {"splits": {"train": (0, 241)}},
            ValueError,
            r"splits\['train'\] must be within 0 to 240, got 0 to 241",
        ),
    ):
        with pytest.raises(error, match=message):
            replace(data, **fields)
    for call, message in (
        (lambda: data.batch("dev", 0, size=7, history=5), "split must be one of .*, got 'dev'"),
        (lambda: data.batch("val", 99, size=7, history=5), "number must be from 0 to 4 .* got 99"),
        (lambda: data.batch("val", 0, size=7, history=0), "history must be positive, got 0"),
        (lambda: data.batches("val", 0), "size must be positive, got 0"),
        (
            lambda: data.negatives(data.batch("val", 0, size=7, history=5), "hard"),
            "kind must be one of .*, got 'hard'",
        ),
        (
            lambda: data.times_seen(torch.tensor([[1], [9]]), 5),
            "pairs must be from 0 to 8, got 9 at 1",
        ),
        (
            lambda: data.times_seen(torch.tensor([1, 2]), 5),
            r"pairs must be \[2, B\], .*, got \[2\]",
        ),
        (
            lambda: data.times_seen(torch.tensor([[1], [2]]), 241),
            "events must be within 0 to 240, got 0 to 241",
        ),
        (
            lambda: data.times_seen(torch.tensor([[1], [2]]), 5, -1),
            "events must be within 0 to 240, got -1 to 5",
        ),
        (
            lambda: data.times_seen(torch.tensor([[1], [2]]), 5, 6),
            "events must be within 0 to 240, got 6 to 5",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for pairs, message in (
        ([[1], [2]], "pairs must be a tensor of integers, got list"),
        (torch.ones(2, 1), "pairs must hold integers .*, got torch.float32"),
    ):
        with pytest.raises(TypeError, match=message):
            data.times_seen(pairs, 5)


def test_a_source_that_reaches_every_target_at_once_has_no_negative():
    source = torch.zeros(3, dtype=torch.int64)
    data = EventSet(source, torch.arange(3), source, 3, {"train": (0, 3)})
    with pytest.raises(ValueError, match="source 0 has an event with each of the 3 targets"):
        data.negatives(data.batch("train", 0, size=3, history=1), "random")


def write_flights(folder, **changes):
    draws = np.random.default_rng(0)
    arrays = {
        "src": draws.integers(0, 6, 50).astype(np.int16),
        "dst": draws.integers(0, 6, 50).astype(np.int16),
        "t_minutes": np.sort(draws.integers(0, 30, 50)).astype(np.int32),
        "distance": draws.integers(21, 4962, 50).astype(np.int16),
        "airports": np.array(["ABE", "ABI", "ABQ", "ACV", "ADK", "ADQ"]),
    }
    np.savez(folder / "flights.npz", **arrays | changes)


def test_flights_of_a_file(tmp_path):
    write_flights(tmp_path)
    data = flights(str(tmp_path))
    with np.load(tmp_path / "flights.npz") as file:
        assert data.source.tolist() == file["src"].tolist()
        assert data.target.tolist() == file["dst"].tolist()
        assert data.time.tolist() == file["t_minutes"].tolist()
        torch.testing.assert_close(
            data.edge[:, 0], torch.from_numpy(file["distance"] / 1e3).float()
        )
    assert data.num_nodes == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t_minutes": np.arange(50)[::-1]}, "time must not go back: event 1 is at 48"),
        ({"dst": np.full(50, 6)}, "target must be from 0 to 5, got 6 at event 0"),
        ({"src": np.arange(49) % 6}, r"source must be \[E\] = \[50\], got \[49\]"),
        ({"src": np.zeros(50)}, r"src is \[50\] float64"),
        ({"airports": np.arange(6)}, r"airports is \[6\] int64"),
    ],
)
def test_damaged_flights_are_refused_with_the_file(tmp_path, changes, message):
    write_flights(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"flights\.npz is damaged: " + message):
        flights(tmp_path)


def test_absent_flights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"flights\.npz is absent"):
        flights(tmp_path)


def test_the_real_flights():
    try:
        with open_data("flights") as file:
            airports = file["airports"]
    except FileNotFoundError as error:
        pytest.skip(str(error))
    data = flights()
    assert len(data) == 600_000
    assert data.num_nodes == len(airports) == 229
    assert [last - first for first, last in data.splits.values()] == [420_000, 90_000, 90_000]
    batch = data.batch("test", 100, size=200, history=4096)
    assert (batch.history.time < batch.now).all()
    assert len(batch.history.time) == 4096
    assert 0 < (data.times_seen(batch.pairs, batch.known) > 0).float().mean() <= 1

"""Graph.plan: what is chosen and why, what is kept, moved and shared, what is refused."""

import copy
import io
import json
import pickle
import re
from collections.abc import Callable
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental import _config as shape_config

from fastgt import Graph, neighborhood_attention, plans, tiles
from fastgt.plans import Plan
from fastgt.prepared import Prepared
from fastgt.testing import random_graph, with_buckets
from fastgt.tiles import Windows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PATHS = [("gather", None), ("windows", 16), ("windows", 32), ("windows", 64), ("windows", None)]
PATHS += [("graphs", 16), ("graphs", None)]


def complete(*sizes: int) -> Graph:
    """A batch of complete graphs."""
    ones = (torch.ones(n, n, dtype=torch.bool, device=DEVICE) for n in sizes)
    return Graph.batch([Graph.from_dense(x) for x in ones])


def paired(columns: int = 60, times: int = 2) -> Graph:
    """128 rows: every column of a window of 64 rows has ``times`` edges there, so that is rho64."""
    column = torch.arange(columns).repeat_interleave(times)
    row = torch.arange(columns * times) % 64
    both = torch.stack([torch.cat([column, column]), torch.cat([row, row + 64])])
    return Graph.from_edge_index(both.to(DEVICE), 128)


def walks(graph: Graph) -> list[torch.Tensor]:
    assert graph.settled is not None
    return [*graph.row_walk(graph.settled), *graph.column_walk(graph.settled)]


def held(graph: Graph) -> set[int]:
    """The tables of windows that a graph keeps."""
    pairs = graph.prepared.windows.values()
    return {id(t) for pair in pairs for w in pair for t in w if isinstance(t, torch.Tensor)}


def same_fields(a: Prepared, b: Prepared) -> bool:
    """Whether the same is prepared in both."""
    names = [
        {name: value is None for name, value in vars(x).items()}
        | {"windows": x.windows.keys(), "plans": x.plans.keys()}
        for x in (a, b)
    ]
    return names[0] == names[1]


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of more than 100 edges are not small, and nobody measured the device."""
    monkeypatch.setattr(plans, "capability", lambda device: "none")
    monkeypatch.setattr(plans, "LAUNCH_BOUND", 100)
    monkeypatch.setattr(tiles, "SMALL_EDGES", 50)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts other rows, (capability, dtype, width, rho64), in the place of plans.json."""

    def replace(*rows: tuple) -> None:
        names = ("capability", "dtype", "width", "rho64")
        told = [dict(zip(names, row, strict=True)) for row in rows]
        told = [dict(row, op="attention", source=f"told {i}") for i, row in enumerate(told)]
        monkeypatch.setattr(plans, "_table", lambda: told)

    return replace


@pytest.mark.parametrize(("path", "height"), PATHS)
def test_a_named_path_is_taken(path: str, height: int | None) -> None:
    graph = complete(5, 0, 3)
    planned = graph.plan(path, height=height)
    tall = 0 if path == "gather" else height or 64
    assert planned.settled == Plan(path, tall, "named")
    assert planned.plan_for(1, FP32) is planned.settled
    of = f" of {tall} rows" if tall else ""
    besides = "; gather with edge vectors, gates, attributes or dropout" if tall else ""
    assert repr(planned).endswith(f", plan {path}{of} (named){besides})")
    assert graph.settled is None
    assert "plan" not in repr(graph)
    keys = {x.height for pair in graph.prepared.windows.values() for x in pair}
    assert keys == ({tall} if tall else set())
    assert {x.dense for pair in graph.prepared.windows.values() for x in pair} <= {path == "graphs"}


@pytest.mark.parametrize("path", ["windows", "graphs"])
def test_what_the_kernels_walk(path: str) -> None:
    # several windows each way; no edge twice
    graph = random_graph(3, 40, 300, cols=20, device=DEVICE)
    graph = Graph.from_edge_index(graph.edge_index.unique(dim=1).flip(1), (40, 20))
    planned = graph.plan(path, height=16)
    rows, columns = planned.row_walk(planned.settled), planned.column_walk(planned.settled)
    ends, walk = (graph.graph_ptr, graph.col_graph_ptr), graph.columns
    by_row, by_column = (graph.row_ptr, graph.col, graph.edge), (walk.ptr, walk.row, walk.edge)
    if path == "graphs":
        tables = (
            tiles.dense_windows(*by_row, *ends, 16),
            tiles.dense_windows(*by_column, *ends[::-1], 16),
        )
    else:
        tables = tiles.windows(*by_row, 20, 16), tiles.windows(*by_column, 40, 16)
    for actual, expected in ((rows, [*by_row, *tables[0][2:]]), (columns, tables[1][2:])):
        assert len(actual) == len(expected)
        for x, y in zip(actual, expected, strict=True):
            assert torch.equal(x, y)


def test_a_plan_replaces_the_one_before(bound: None, table: Callable) -> None:
    table(("any", "bfloat16", 16, 1.5))
    named = paired().plan("windows", height=16)
    assert named.plan("gather").settled == Plan("gather", 0, "named")
    assert named.plan().settled is None
    assert named.plan(width=8).settled.path == "gather"
    chosen = named.plan(width=64).settled
    assert chosen == Plan("windows", 64, "auto: rho64 2.00 >= 1.5, told 0")


def test_a_planned_graph_shares_what_is_prepared() -> None:
    graph = random_graph(0, 40, 200, device=DEVICE)
    first = graph.plan("windows")
    tables = walks(first)
    again = graph.plan("windows")
    for other in (again, first.plan("windows"), graph.plan("windows", height=64)):
        assert all(x is y for x, y in zip(walks(other), tables, strict=True))
    assert graph.columns is first.columns
    assert graph.plan("windows", height=16).row_walk(Plan("windows", 16, ""))[3] is not tables[3]
    # the other paths and heights leave it alone
    graph.plan("gather")
    assert all(x is y for x, y in zip(walks(first), tables, strict=True))


@pytest.mark.parametrize("path", ["gather", "windows", "graphs"])
def test_both_directions_are_prepared(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SMALL_EDGES", 0)
    graph = complete(7, 4)
    planned = graph.plan(path)
    kept = copy.deepcopy(graph.prepared)
    walks(planned)
    assert same_fields(graph.prepared, kept), "nothing was left to prepare"
    if path == "gather":
        assert None not in (kept.columns, kept.row_buckets, kept.column_buckets)


@pytest.mark.parametrize("path", ["windows", "graphs"])
def test_a_symmetric_graph_holds_its_tables_once(path: str) -> None:
    graph = complete(7, 4).plan(path)
    rows, columns = walks(graph)[3:8], walks(graph)[8:]
    for x, y in zip(rows[:4], columns[:4], strict=True):
        assert x is y
    assert not torch.equal(rows[4], columns[4])
    # five tables, and one more for the numbers of the columns' edges
    assert len(held(graph)) == 6


def test_repr_counts_the_tables() -> None:
    graph = random_graph(0, 500, 20_000, device=DEVICE)
    _ = graph.columns

    def size(g: Graph) -> float:
        return float(re.search(r"([\d.]+) MB", repr(g))[1])

    plain, planned = size(graph), size(graph.plan("windows"))
    assert plain < planned <= plain + 2 * 24e-6 * 20_000
    assert size(graph) == planned


def test_auto_without_a_width_leaves_the_choice_to_attention() -> None:
    graph = complete(6)
    for planned in (graph.plan(), graph.plan("auto"), graph.plan("windows").plan("auto")):
        assert planned.settled is None
        assert "plan" not in repr(planned)


def test_small_graphs_are_gathered() -> None:
    graph = complete(6).plan(width=64)
    assert graph.settled is plans.SMALL
    assert repr(graph).endswith("plan gather (auto: at most 65536 edges))")
    assert graph.plan_for(64, FP32) is plans.SMALL
    assert complete(6).plan_for(64, BF16) is plans.SMALL
    assert not graph.prepared.plans


def test_the_bound_of_small_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = paired()
    for bound, small in ((graph.num_edges, True), (graph.num_edges - 1, False)):
        monkeypatch.setattr(plans, "LAUNCH_BOUND", bound)
        assert (graph.plan_for(64, BF16) is plans.SMALL) == small


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.usefixtures("bound")
def test_windows_from_the_threshold_on(dtype: torch.dtype, table: Callable) -> None:
    name = str(dtype).removeprefix("torch.")
    assert tiles.density(paired().row_ptr, paired().col, 128) == 2.0
    for rho, path in ((1.9, "windows"), (2.0, "windows"), (2.1, "gather")):
        table(("any", name, 16, rho), ("any", name, 256, 0.0), ("any", "float32", 16, 0.0))
        plan = paired().plan_for(64, dtype)
        sign = ">=" if path == "windows" else "<"
        height = 64 if path == "windows" else 0
        assert plan == Plan(path, height, f"auto: rho64 2.00 {sign} {rho}, told 0")


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.usefixtures("bound")
def test_the_table_that_ships(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    least = {row["width"]: row["rho64"] for row in plans._table() if row["dtype"] == name}
    for width in range(min(least), 257):
        below = max(w for w in least if w <= width)
        assert plans._least_rho(width, dtype, "none")[0] == least[below]
    assert plans._least_rho(min(least) - 1, dtype, "none")[0] is None
    for times in (1, 2, 3, 4, 6):
        path = "windows of 64 rows" if times >= least[64] else "gather"
        text = repr(paired(times=times).plan(width=64, dtype=dtype))
        assert f"plan {path} (auto: rho64 {times}.00 " in text


def test_a_measured_device_outranks_the_model(table: Callable) -> None:
    table(
        ("any", "bfloat16", 16, 3.0), ("sm_90", "bfloat16", 64, 5.0), ("any", "bfloat16", 64, 2.0),
        ("sm_90", "bfloat16", 16, None), ("sm_80", "float16", 16, 1.0),
    )  # fmt: skip
    least = plans._least_rho
    assert least(64, BF16, "sm_90") == (5.0, "told 1")
    assert least(32, BF16, "sm_90") == (None, "told 3")
    assert least(64, BF16, "sm_80") == (2.0, "told 2")
    assert least(63, BF16, "none") == (3.0, "told 0")
    assert least(64, FP16, "sm_80") == (1.0, "told 4")
    assert least(64, FP16, "sm_90") == (None, "no tensor-core path for width 64 float16")
    assert least(8, BF16, "none") == (None, "no tensor-core path for width 8 bfloat16")


@pytest.mark.usefixtures("bound")
def test_a_table_may_say_never(table: Callable) -> None:
    table(("any", "bfloat16", 16, None))
    assert paired().plan_for(64, BF16) == Plan("gather", 0, "auto: told 0")


@pytest.mark.parametrize("dtype", [FP32, torch.float64], ids=str)
@pytest.mark.usefixtures("bound")
def test_other_dtypes_are_gathered(dtype: torch.dtype) -> None:
    graph = complete(20, 20)
    name = str(dtype).removeprefix("torch.")
    reason = f"auto: no tensor-core path for width 64 {name}"
    assert graph.plan_for(64, dtype) == Plan("gather", 0, reason)
    assert f"plan for width 64 {name}: gather ({reason})" in repr(graph)


@pytest.mark.usefixtures("bound")
def test_dense_batches_of_small_graphs(table: Callable) -> None:
    table(("any", "bfloat16", 16, 20.0))
    twenty = complete(20, 20, 0, 20)
    reason = "auto: 20.0 edges a column >= 20.0, told 0"
    assert twenty.plan_for(64, BF16) == Plan("graphs", 64, reason)
    assert {w.dense for pair in twenty.prepared.windows.values() for w in pair} == {True}
    # a window of the whole batch sees every column of its graphs once: as dense
    assert complete(20, 20, 19).plan_for(64, BF16).path == "gather"
    table(("any", "bfloat16", 16, 1.5))
    assert complete(128, 2).plan_for(64, BF16).path == "graphs"
    assert complete(129, 2).plan_for(64, BF16).path == "windows"
    assert complete(60).plan_for(64, BF16).path == "windows", "one graph is no batch"
    tall = Graph.from_edge_index(torch.cartesian_prod(torch.arange(129), torch.arange(3)).T)
    wide = [Graph.from_edge_index(tall.edge_index, (3, 129)), Graph.from_dense(_ones(4, 4).cpu())]
    assert Graph.batch(wide).plan_for(64, BF16).path != "graphs", "keys count too"


def _ones(n: int, m: int) -> torch.Tensor:
    return torch.ones(n, m, dtype=torch.bool, device=DEVICE)


@pytest.mark.usefixtures("bound")
def test_sparse_batches_are_not_dense(table: Callable) -> None:
    table(("any", "bfloat16", 16, 5.0))
    ring = torch.stack([torch.arange(100), (torch.arange(100) + 1) % 100])
    graph = Graph.batch([Graph.from_edge_index(ring, 100)] * 4)
    assert graph.plan_for(64, BF16).path == "gather"


@pytest.mark.usefixtures("bound")
def test_a_dense_batch_with_an_edge_twice() -> None:
    whole = complete(20, 20)
    again = torch.cat([whole.edge_index, whole.edge_index[:, :1]], 1)
    graph = Graph.from_edge_index(again, 40, graph_ptr=whole.graph_ptr)
    assert graph.plan_for(64, BF16)[:2] == ("windows", 64)  # which can hold it twice
    assert graph.plan(width=64).settled.path == "windows"


@pytest.mark.usefixtures("bound")
def test_choices_are_made_once(monkeypatch: pytest.MonkeyPatch, table: Callable) -> None:
    table(("any", "bfloat16", 16, 1.7), ("any", "bfloat16", 128, 4.5))
    calls, best_plan = [], plans.best_plan

    def spy(*args):  # type: ignore[no-untyped-def]
        calls.append(args[-2:])
        return best_plan(*args)

    monkeypatch.setattr(plans, "best_plan", spy)
    graph = paired(times=4)
    for _ in range(2):
        for width, dtype in ((64, BF16), (64, FP32), (128, BF16)):
            first = graph.plan_for(width, dtype)
            assert graph.plan_for(width, dtype) is first
            assert graph.plan(width=width, dtype=dtype).settled is first
    assert calls == [(64, BF16), (64, FP32), (128, BF16)]
    text = repr(graph)
    for width, name, path in (
        (64, "bfloat16", "windows of 64 rows (auto: rho64 4.00 >= 1.7"),
        (64, "float32", "gather (auto: no tensor-core path"),
        (128, "bfloat16", "gather (auto: rho64 4.00 < 4.5, told 1)"),
    ):
        assert f"plan for width {width} {name}: {path}" in text
    assert repr(graph.plan("gather")).endswith("plan gather (named))")  # and nothing else of plans


def test_tables_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, bound: None) -> None:
    monkeypatch.setattr(plans, "free_memory", lambda device: 1000)
    for path in ("windows", "graphs"):
        graph = complete(20, 20)
        with pytest.raises(RuntimeError, match=rf"{path}.* 0\.0 GB .*0\.0 GB are free"):
            graph.plan(path)
        assert not held(graph)
        chosen = graph.plan(width=64)
        assert chosen.settled.path == "gather"
        assert "plan gather (auto: path 'graphs' needs about 0.0 GB" in repr(chosen)
    graph = paired(times=4)
    assert "plan gather (auto: path 'windows' needs about" in repr(graph.plan(width=64))
    assert graph.plan_for(64, BF16).path == "gather"
    graph.plan("gather")
    # what is prepared already needs no more memory
    monkeypatch.undo()
    ready = paired(times=4).plan("windows")
    monkeypatch.setattr(plans, "free_memory", lambda device: 0)
    ready.plan("windows")


def test_both_numbers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "free_memory", lambda device: 3_000_000_000)
    ptr = torch.tensor([0, 100, 200])
    with pytest.raises(RuntimeError, match=r"'windows' needs about 120\.0 GB .* 3\.0 GB are free"):
        plans.check_fits("windows", 64, 10**9, ptr, ptr, torch.int32)
    plans.check_fits("windows", 64, 10**7, ptr, ptr, torch.int32)
    # entries of graphs: those of 400,000 windows of 100 columns each, both ways
    ptr = torch.arange(0, 20_000_001, 100)
    plans.check_fits("graphs", 64, 10**6, ptr, ptr, torch.int32)
    with pytest.raises(RuntimeError, match=r"'graphs' needs about 4\.6 GB"):
        plans.check_fits("graphs", 16, 10**6, ptr, ptr, torch.int32)


@pytest.mark.usefixtures("bound")
def test_to_moves_tables_and_forgets_choices() -> None:
    source = paired(times=4)
    source.plan("windows", height=32)
    source.plan_for(64, BF16)
    graph = source.plan("windows", height=16)
    away = graph.to("meta")
    assert away.settled == graph.settled
    assert list(away.prepared.plans) == []
    assert list(graph.prepared.plans) == [(64, BF16)]
    for height in (16, 32):
        plan = Plan("windows", height, "")
        for walk in (Graph.row_walk, Graph.column_walk):
            moved = walk(away, plan)
            assert all(x.device.type == "meta" for x in moved)
            assert [x.shape for x in moved] == [x.shape for x in walk(graph, plan)]
    undecided = source.to("meta")
    assert undecided.settled is None
    assert undecided.plan_for(64, BF16) is plans.UNPREPARED
    assert "meta" in repr(undecided)


def test_to_keeps_together_what_is_shared() -> None:
    graph = complete(7, 4).plan("windows")
    away = graph.to("meta")
    assert len(held(away)) == len(held(graph)) == 6
    assert all(x is y for x, y in zip(walks(away)[3:7], walks(away)[8:12], strict=True))
    assert away.graph_ptr is away.col_graph_ptr


def test_to_moves_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SMALL_EDGES", 0)
    hub = torch.zeros(2, 600, dtype=torch.int64, device=DEVICE)
    graph = Graph.from_edge_index(hub, 3).plan("gather")
    assert len(walks(graph)) == 14
    assert [x.shape for x in walks(graph.to("meta"))] == [x.shape for x in walks(graph)]
    flat = complete(3).plan("gather")  # rows as they stand: nothing to move but that answer
    assert len(walks(flat)) == len(walks(flat.to("meta"))) == 6


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_to_the_host_and_back() -> None:
    graph = paired(times=4).plan("windows")
    back = graph.to("cpu").to(DEVICE)
    assert all(torch.equal(x, y) for x, y in zip(walks(back), walks(graph), strict=True))


def _saved(graph: Graph) -> Graph:
    file = io.BytesIO()
    torch.save(graph, file)
    file.seek(0)
    return torch.load(file)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda graph: pickle.loads(pickle.dumps(graph)),
    "torch.save": _saved,
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize(("path", "height"), PATHS[:2] + PATHS[-2:])
@pytest.mark.usefixtures("bound")
def test_copies_keep_plans_and_tables(path: str, height: int | None, copied: str) -> None:
    graph = complete(12, 9)
    graph.plan_for(64, BF16)
    graph = graph.plan(path, height=height)
    twin = COPIES[copied](graph)
    assert twin.settled == graph.settled
    assert type(twin.settled) is Plan
    assert repr(twin) == repr(graph)
    assert same_fields(twin.prepared, graph.prepared)
    assert twin.plan_for(64, BF16) == graph.plan_for(64, BF16)
    assert twin.plan().plan_for(64, BF16) == graph.plan().plan_for(64, BF16)
    assert {type(w) for pair in twin.prepared.windows.values() for w in pair} <= {Windows}
    for x, y in zip(walks(twin), walks(graph), strict=True):
        assert torch.equal(x, y)
        assert x is not y
    assert len(held(twin)) == len(held(graph))
    assert not held(twin) & held(graph)


def test_derived_graphs_are_not_planned() -> None:
    graph = complete(5).plan("windows")
    for derived in (
        graph.transpose(),
        graph.with_self_loops(),
        graph.reordered(torch.arange(5, device=DEVICE)),
        Graph.batch([graph, graph]),
    ):
        assert derived.settled is None
        assert not held(derived)


# --- refusals

_GRAPH = complete(3)
REFUSALS = {
    "path": (lambda: _GRAPH.plan("fast"), ValueError, r"path.*'auto'.*'windows'.*'fast'"),
    "path None": (lambda: _GRAPH.plan(None), ValueError, r"path.*None"),
    "height 8": (lambda: _GRAPH.plan("windows", height=8), ValueError, r"height.*16, 32, 64.*8"),
    "height 0": (lambda: _GRAPH.plan("windows", height=0), ValueError, r"height.*16, 32, 64.*0"),
    "height -16": (lambda: _GRAPH.plan("windows", height=-16), ValueError, r"height.*-16"),
    "height '64'": (lambda: _GRAPH.plan("windows", height="64"), TypeError, r"height.*str"),
    "height True": (lambda: _GRAPH.plan("windows", height=True), TypeError, r"height.*bool"),
    "height 64.0": (lambda: _GRAPH.plan("windows", height=64.0), TypeError, r"height.*float"),
    "gather's": (lambda: _GRAPH.plan("gather", height=64), ValueError, r"height.*path='gather'"),
    "auto's": (lambda: _GRAPH.plan(height=64, width=64), ValueError, r"height.*path='auto'"),
    "width": (lambda: _GRAPH.plan(width="64"), TypeError, r"width.*str"),
    "width -1": (lambda: _GRAPH.plan(width=-1), ValueError, r"width.*-1"),
    "large": (lambda: complete(2, 129).plan("graphs"), ValueError, r"graphs.* 128 .* has 129"),
    "wide": (lambda: wide().plan("graphs"), ValueError, r"graphs.* 128 .* has 130"),
    "tall": (lambda: wide().transpose().plan("graphs"), ValueError, r"graphs.* 128 .* has 130"),
    "twice": (lambda: repeated().plan("graphs"), ValueError, r"'graphs'.* without duplicate"),
    "meta": (lambda: _GRAPH.to("meta").plan("windows"), RuntimeError, r"meta.*no values"),
    "meta auto": (lambda: _GRAPH.to("meta").plan(width=64), RuntimeError, r"meta.*no values"),
}


def wide() -> Graph:
    return random_graph(0, 2, 5, cols=130, device=DEVICE)


def repeated() -> Graph:
    return Graph.from_edge_index(torch.zeros(2, 2, dtype=torch.int64, device=DEVICE), 1)


def test_sizes_of_numpy_are_taken() -> None:
    plan = _GRAPH.plan("windows", height=np.int64(16)).settled
    assert type(plan.height) is int
    assert plan == _GRAPH.plan("windows", height=16).settled
    assert _GRAPH.plan(width=np.int32(64)).settled == _GRAPH.plan(width=64).settled


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    act, error, message = REFUSALS[name]
    with pytest.raises(error, match=message):
        act()


def test_windows_take_what_graphs_refuse() -> None:
    for graph in (complete(2, 129), wide(), repeated()):
        assert graph.plan("windows").settled.path == "windows"
    assert complete(2, 128).plan("graphs").settled.path == "graphs"


class Inputs(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def inputs(graph: Graph, width: int = 8, dtype: torch.dtype = FP32) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    rows = (graph.num_rows, graph.num_cols, graph.num_cols)
    x = (torch.randn(n, 2, width, generator=generator, dtype=torch.float64) for n in rows)
    return Inputs(*(t.to(DEVICE, dtype).requires_grad_() for t in x))


@pytest.mark.skipif(DEVICE != "cpu", reason="impl='cpp' runs on CPU tensors")
def test_the_cpu_path_refuses_a_plan_that_it_has_not() -> None:
    graph = complete(5, 3)
    x = inputs(graph)
    expected = neighborhood_attention(*x, graph, impl="cpp")
    for path in ("windows", "graphs"):
        planned = graph.plan(path)
        for impl in ("cpp", None):
            message = rf"planned for '{path}'.*impl='cpp' .*graph\.plan\(\)"
            with pytest.raises(RuntimeError, match=message):
                neighborhood_attention(*x, planned, impl=impl)
        actual = neighborhood_attention(*x, planned, impl="reference")
        torch.testing.assert_close(actual, expected)
        again = neighborhood_attention(*x, planned.plan(), impl="cpp")
        assert torch.equal(again, expected)
    for planned in (graph.plan("gather"), graph.plan(width=64)):
        assert torch.equal(neighborhood_attention(*x, planned, impl="cpp"), expected)


@pytest.mark.parametrize(
    ("dtype", "width", "height"),
    [(torch.float64, 65, "16"), (FP32, 65, "32"), (torch.float64, 256, "path='gather'")],
    ids=str,
)
def test_windows_of_heads_too_wide_are_refused(dtype: torch.dtype, width: int, height: str) -> None:
    pytest.importorskip("triton")
    graph = complete(3)
    x = inputs(graph, width, dtype)
    with pytest.raises(RuntimeError, match=rf"'windows' with height 64 .* plan for .*{height}"):
        neighborhood_attention(*x, graph.plan("windows"), impl="triton")
    fitting = (
        graph.plan("windows", height=int(height)) if height.isdigit() else graph.plan("gather")
    )
    actual, expected = (
        neighborhood_attention(*x, fitting, impl=i) for i in ("triton", "reference")
    )
    torch.testing.assert_close(actual, expected)


def test_attention_takes_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    import fastgt.ops.attention as ops

    taken, fwd = [], ops.attention_fwd

    def spy(path, height, *args):  # type: ignore[no-untyped-def]
        taken.append((path, height))
        return fwd(path, height, *args)

    monkeypatch.setattr(ops, "attention_fwd", spy)
    graph = complete(5, 3)
    x = inputs(graph)
    expected = neighborhood_attention(*x, graph, impl="reference")
    for path, height in PATHS:
        o = neighborhood_attention(*x, graph.plan(path, height=height), impl="triton")
        torch.testing.assert_close(o, expected)
        assert taken[-1] == (path, 0 if path == "gather" else height or 64)
    monkeypatch.setattr(plans, "LAUNCH_BOUND", 10)
    monkeypatch.setattr(plans, "_least_rho", lambda *args: (1.0, "told"))
    neighborhood_attention(*x, graph, impl="triton")
    assert taken[-1] == ("graphs", 64)
    assert "plan for width 8 float32: graphs of 64 rows" in repr(graph)


EMPTY = {
    "no nodes": lambda: Graph.from_dense(_ones(0, 0)),
    "no graphs": lambda: Graph.batch([]).to(DEVICE),
    "no rows": lambda: Graph.from_dense(_ones(0, 3)),
    "no columns": lambda: Graph.from_dense(_ones(3, 0)),
    "no edges": lambda: Graph.from_dense(~_ones(3, 4)),
    "empty graphs": lambda: complete(0, 2, 0, 3, 0),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize(("path", "height"), PATHS)
def test_empty_graphs_have_plans(path: str, height: int | None, name: str) -> None:
    pytest.importorskip("triton")
    graph = EMPTY[name]().plan(path, height=height)
    x = inputs(graph)
    outputs = [neighborhood_attention(*x, graph, impl=impl) for impl in ("triton", "reference")]
    grads = [torch.autograd.grad(o.square().sum(), x) for o in outputs]
    for a, b in zip((outputs[0], *grads[0]), (outputs[1], *grads[1]), strict=True):
        torch.testing.assert_close(a, b)


def hubs(n: int, degrees: list[int], seed: int) -> Graph:
    """Row i has degrees[i] edges, and so has column i; the other rows and columns have few."""
    target = torch.arange(len(degrees)).repeat_interleave(torch.tensor(degrees))
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(len(degrees), n, target.shape, generator=generator)
    both = torch.stack([torch.cat([source, target]), torch.cat([target, source])])
    return Graph.from_edge_index(both.to(DEVICE), n)


def several(kind: str) -> list[Graph]:
    """Three graphs, prepared: the first has no hub, or a single window, and fillers instead."""
    if kind == "buckets":
        drawn = ((14, [5, 1, 2]), (11, [3, 12, 6]), (15, [11, 21, 5]))
        return [
            with_buckets(hubs(n, degrees, i), few=4, segment=9)
            for i, (n, degrees) in enumerate(drawn)
        ]
    if kind == "graphs":
        batches = [(5,), (3, 18), (3, 4, 6)]
        return [complete(*sizes).plan("graphs", height=16) for sizes in batches]
    sizes = [(9, 40), (21, 51), (35, 61)]
    graphs = [random_graph(i, *size, kind="hub", device=DEVICE) for i, size in enumerate(sizes)]
    for graph in graphs:
        if kind == "windows":
            graph.plan("windows", height=16)
        elif kind == "chosen":
            assert graph.plan_for(8, FP32).path == "windows"
    return [graph.plan("windows", height=16) if kind == "windows" else graph for graph in graphs]


@pytest.mark.parametrize("kind", ["cold", "chosen", "buckets", "windows", "graphs"])
def test_one_compilation_serves_every_graph(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if kind in ("cold", "chosen"):
        monkeypatch.setattr(plans, "LAUNCH_BOUND", 10)
        monkeypatch.setattr(tiles, "SMALL_EDGES", 10)
        monkeypatch.setattr(plans, "_least_rho", lambda *args: (0.1, "told"))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(neighborhood_attention, fullgraph=True, dynamic=True, backend=counter)
    path = {"cold": "gather", "buckets": "gather", "graphs": "graphs"}.get(kind, "windows")
    counts = []
    # sizes that happen to be equal would be taken for one number
    with shape_config.patch(use_duck_shape=False):
        for graph in several(kind):
            x = inputs(graph)
            results = []
            for f in (compiled, neighborhood_attention):
                o = f(*x, graph, impl="triton")
                results.append([o, *torch.autograd.grad(o.square().sum(), x)])
            for a, b in zip(*results, strict=True):
                if kind == "cold":  # eager chooses windows
                    torch.testing.assert_close(a, b)
                else:
                    assert torch.equal(a, b)
            counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts == counts[:1] * 3
    assert f"attention_fwd.default('{path}'," in counter.graphs[0].print_readable(False)


def test_the_table_is_well_formed() -> None:
    rows = json.loads((files("fastgt.data") / "plans.json").read_text())
    assert rows == plans._table()
    keys = [(r["op"], r["capability"], r["dtype"], r["width"]) for r in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        assert set(row) == {"op", "capability", "dtype", "width", "rho64", "source"}
        assert row["op"] == "attention"
        assert re.fullmatch(r"any|sm_\d+|gfx[0-9a-f]+", row["capability"])
        assert row["dtype"] in ("float16", "bfloat16", "float32", "float64")
        assert type(row["width"]) is int
        assert 1 <= row["width"] <= 256
        assert row["rho64"] is None or (isinstance(row["rho64"], float) and row["rho64"] > 0)
        assert isinstance(row["source"], str)
        assert row["source"].strip()
        assert ("measured" in row["source"]) or row["capability"] == "any"
    # every width that has a row somewhere has one for devices that nobody measured
    for dtype in ("float16", "bfloat16"):
        modelled = {w for _, of, name, w in keys if (of, name) == ("any", dtype)}
        assert 16 in modelled
        assert {w for *_, name, w in keys if name == dtype} <= modelled

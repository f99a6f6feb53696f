"""The benchmark's own honesty: peers compute the same thing, wrong ones are not timed."""

import ast
import copy
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastgt import Graph, reference, tiles
from fastgt.bench import (
    attention,
    harness,
    linear_attention,
    masked_heads,
    memory,
    peers,
    roofline,
    table,
    timing,
    tune,
)
from fastgt.bench.operators import OPERATORS
from fastgt.testing import Problem, assert_as_accurate, random_batch, random_graph

CPU = torch.device("cpu")


@pytest.fixture
def problem(monkeypatch):
    tiny = Problem("tiny", lambda: random_graph(0, 50, 300, isolated=3))
    monkeypatch.setitem(attention.PROBLEMS, "tiny", tiny)
    return "tiny"


def compare(problem, **how):
    return {
        row["provider"]: row for row in harness.compare(attention.case(problem), repeats=1, **how)
    }


GRAPHS = {
    "bipartite, repeated edges": lambda: random_graph(1, 30, 120, cols=20),
    "isolated rows": lambda: random_graph(0, 50, 300, isolated=3),
    "a batch with an empty graph": lambda: random_batch(0, [(7, 30), (0, 0), (12, 20), (1, 1)]),
    "each edge once": lambda: Graph.from_dense(torch.rand(40, 40) < 0.2),
    "columns out of order": lambda: Graph.from_csr(
        torch.tensor([0, 3, 3]), torch.tensor([1, 2, 0]), 3
    ),
}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", peers.ATTENTION)
def test_peers_compute_the_same_attention(name, graph):
    """Or say what they cannot do."""
    torch.manual_seed(0)
    made = GRAPHS[graph]()
    q, k, v = (torch.randn(n, 3, 8) for n in (made.num_rows, made.num_cols, made.num_cols))
    try:
        attend = peers.ATTENTION[name](made)
        out = attend(q, k, v)
    except ImportError as error:
        pytest.skip(str(error))
    except (NotImplementedError, MemoryError) as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        known = {"torch.sparse": "stands there twice", "sdpa, by graph": "not a batch of graphs"}
        assert known.get(name, refused) in refused
        assert name not in ("pyg", "pyg, compiled", "gather-scatter", "sdpa, dense mask")
        pytest.skip(refused)
    plain, wide = (
        reference.neighborhood_attention(q.to(t), k.to(t), v.to(t), made)
        for t in (torch.float32, torch.float64)
    )
    assert_as_accurate(out, plain, wide, name)


@pytest.mark.parametrize("clamp", [None, 0.5])
def test_the_demo_s_peer_takes_a_bias_and_a_clamp(clamp):
    graph, bias = random_graph(1, 30, 120, cols=20), torch.randn(120, 3)
    q, k, v = (torch.randn(n, 3, 8) for n in (30, 20, 20))
    out = peers.gather_scatter(q, k, v, graph.edge_index, edge_bias=bias, logit_clamp=clamp)
    plain, wide = (
        reference.neighborhood_attention(
            *(x.to(t) for x in (q, k, v)), graph, edge_bias=bias.to(t), logit_clamp=clamp
        )
        for t in (torch.float32, torch.float64)
    )
    assert_as_accurate(out, plain, wide, "gather-scatter")


def test_pyg_peer_is_transformer_conv():
    conv_module = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    graph = random_graph(2, 25, 90)
    conv = conv_module.TransformerConv(12, 4, heads=3, root_weight=False)
    x = torch.randn(25, 12)
    q, k, v = (f(x).view(25, 3, 4) for f in (conv.lin_query, conv.lin_key, conv.lin_value))
    expected = conv(x, graph.edge_index)
    torch.testing.assert_close(peers.pyg(graph)(q, k, v).flatten(1), expected)


@pytest.mark.parametrize("name", [name for name, x in OPERATORS.items() if not x.epochs])
def test_every_operator_s_providers_agree(name, monkeypatch):
    """But for torch-geometric's Performer, which counts padding; and all are listed."""
    if name in ("performer", "transformer_conv"):
        pytest.importorskip("torch_geometric")  # they are layers of fastgt.pyg
    for problem in ("tiny", "ragged"):
        batch = Problem(problem, lambda: random_batch(0, [(7, 30), (12, 40), (3, 0)]))
        monkeypatch.setitem(attention.PROBLEMS, problem, batch)
    monkeypatch.setattr(linear_attention, "RAGGED", "none")
    operator = OPERATORS[name]
    case = operator.case("tiny", **operator.options(peer_path=Path("nowhere")))
    assert list(case.providers) == [operator.first, *operator.peers]
    rows = harness.compare(case, repeats=1)
    for row in rows:
        if name == "performer" and row["provider"] == "pyg":
            assert row["match"] is False
        elif row["match"] is None:
            assert re.search("not found|stands there twice|not installed", row["error"]), row
        else:
            assert row["match"], row
            assert row["forward_s"] > 0
            assert row["forward_x"] > 0
            assert row["provider"] == "flex attention" or {"backward_s", "both_x"} <= row.keys()


def test_rows_are_complete(problem):
    for row in compare(problem).values():
        assert {"commit", "device", "torch", "triton", "date", "node_order", "edges"} <= row.keys()
        if row["match"] and "backward_error" not in row:
            assert row["both_s"] >= row["backward_s"] > 0
            assert row["both_peak_bytes"] >= row["forward_peak_bytes"] > 0
            assert row["copy_bytes_per_s"] > 0
            assert row["both_roofline"] > 0


def test_a_provider_that_disagrees_is_reported_and_not_timed(problem, monkeypatch):
    monkeypatch.setitem(peers.ATTENTION, "gather-scatter", planted(lambda out: out * 1.001))
    row = compare(problem)["gather-scatter"]
    assert row["match"] is False
    assert "output is off by" in row["error"]
    assert "forward_s" not in row
    assert "MISMATCH: output is off" in table.table([row])


def test_a_provider_whose_gradients_disagree_is_not_timed_either(problem, monkeypatch):
    def wrong(out):
        out.register_hook(lambda grad: grad * 1.001) if out.requires_grad else None
        return out

    monkeypatch.setitem(peers.ATTENTION, "gather-scatter", planted(wrong))
    row = compare(problem)["gather-scatter"]
    assert row["match"] is False
    assert "q is off by" in row["error"]


def planted(change):
    """A peer that is right but for that."""

    def peer(graph):
        attend = peers.composed(graph)
        return lambda q, k, v: change(attend(q, k, v))

    return peer


@pytest.mark.parametrize("when", ["prepared", "called"])
def test_a_provider_that_fails_says_so_and_the_run_goes_on(problem, monkeypatch, when):
    def failing(graph):
        if when == "prepared":
            raise MemoryError("no room")
        return lambda q, k, v: torch.empty(10**15)

    monkeypatch.setitem(peers.ATTENTION, "gather-scatter", failing)
    rows = compare(problem)
    row = rows["gather-scatter"]
    assert row["match"] is None
    expected = "MemoryError: no room" if when == "prepared" else "can't allocate memory"
    assert expected in row["error"]
    assert "forward_s" not in row
    assert rows["fastgt"]["both_s"] > 0
    assert expected in table.table(list(rows.values()))


def test_what_is_timed_without_gradients_is_verified_so(problem, monkeypatch):
    wrong = planted(lambda out: out if out.requires_grad else out * 0)
    monkeypatch.setitem(peers.ATTENTION, "gather-scatter", wrong)
    row = compare(problem)["gather-scatter"]
    assert row["match"] is False
    assert "output is off by" in row["error"]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_who_writes_into_its_inputs_is_told_and_harms_nobody(problem, monkeypatch, where):
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.mul_(2) / 2

    def writer(graph):
        attend = peers.composed(graph)

        def call(q, k, v):
            if where == "backward":
                return Backward.apply(attend(q, k, v))
            out = attend(q, k, v)
            v.data.mul_(2)
            return out

        return call

    monkeypatch.setitem(peers.ATTENTION, "pyg", writer)
    rows = compare(problem)
    assert rows["pyg"]["match"] is False
    # before its backward, it is wrong already: the second call sees other values
    expected = {"forward": "output is off", "backward": "it writes into its inputs"}[where]
    assert expected in rows["pyg"]["error"]
    assert rows["gather-scatter"]["match"]


def test_the_first_provider_must_have_a_backward(problem, monkeypatch):
    monkeypatch.setattr(
        attention,
        "neighborhood_attention",
        lambda q, k, v, graph: peers.composed(graph)(q.detach(), k.detach(), v.detach()),
    )
    row = compare(problem, only=["gather-scatter"])["fastgt"]
    assert row["match"] is None
    assert "does not require grad" in row["error"]


@pytest.mark.parametrize("error", [KeyError, AssertionError, FileNotFoundError, ZeroDivisionError])
def test_whatever_a_peer_raises_is_its_own(problem, monkeypatch, error):
    def failing(graph):
        raise error("ptxas")

    monkeypatch.setitem(peers.ATTENTION, "gather-scatter", failing)
    rows = compare(problem)
    assert rows["gather-scatter"]["match"] is None
    assert error.__name__ in rows["gather-scatter"]["error"]
    assert rows["fastgt"]["match"]


@pytest.mark.parametrize("calls", [3, 5, 8])  # verified twice, then timed forward, then both
def test_a_provider_that_fails_while_timed_leaves_the_others(problem, monkeypatch, calls):
    monkeypatch.setattr(timing, "SAMPLE", 0)
    left = [calls]

    def tires(out):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("tired")
        return out

    monkeypatch.setitem(peers.ATTENTION, "gather-scatter", planted(tires))
    rows = compare(problem)
    assert rows["gather-scatter"]["error"] == "while timed: RuntimeError: tired"
    assert rows["gather-scatter"]["match"] is None
    assert "forward_s" not in rows["gather-scatter"]
    assert rows["gather-scatter"]["edges"] == 300
    assert {"both_s", "both_peak_bytes", "commit"} <= rows["fastgt"].keys()


def test_a_provider_without_a_backward_has_its_forward_timed(problem, monkeypatch):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no way back")

    monkeypatch.setitem(peers.ATTENTION, "gather-scatter", planted(Fails.apply))
    row = compare(problem)["gather-scatter"]
    assert row["match"]
    assert row["forward_s"] > 0
    assert "both_s" not in row
    assert "gather-scatter has no backward here: RuntimeError: no way back" in table.table([row])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux would kill the process")
def test_more_memory_than_there_is_fails_at_once():
    size = memory.available() + 2**30
    with memory.allocation_limit(CPU), pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(size, dtype=torch.uint8)
    small = memory.available() // 2
    with memory.allocation_limit(CPU):
        assert len(torch.empty(small, dtype=torch.uint8)) == small


@pytest.mark.parametrize("peer", ["sdpa, dense mask", "sdpa, by graph", "flex attention"])
def test_dense_masks_that_do_not_fit_are_refused(peer, monkeypatch):
    monkeypatch.setattr(peers, "DENSE_BYTES", 100)
    with pytest.raises(MemoryError, match="a dense matrix of nodes by nodes would take"):
        peers.ATTENTION[peer](random_batch(0, [(7, 30), (12, 20)]))


def test_a_dense_backward_that_does_not_fit_leaves_the_forward(problem, monkeypatch):
    monkeypatch.setattr(peers, "DENSE_BYTES", 100)
    once = Problem("once", lambda: Graph.from_dense(torch.eye(40, dtype=torch.bool)))
    monkeypatch.setitem(attention.PROBLEMS, "once", once)
    row = compare("once", only=["torch.sparse"])["torch.sparse"]
    assert row["match"]
    assert row["forward_s"] > 0
    assert "a dense matrix of nodes by nodes" in row["backward_error"]


def test_absent_peers_are_listed(problem, monkeypatch):
    def missing(graph):
        raise ImportError("No module named 'torch_geometric'")

    monkeypatch.setitem(peers.ATTENTION, "pyg", missing)
    row = compare(problem, only=["pyg"])["pyg"]
    assert row["match"] is None
    assert row["error"].startswith("not installed: No module named")


def test_large_graphs_are_verified_some_rows_at_a_time(monkeypatch):
    graph = random_graph(3, 40, 500, isolated=5)
    q, k, v = torch.randn(3, 40, 2, 4, dtype=torch.float64)
    upstream = torch.randn(40, 2, 4, dtype=torch.float64)

    def evaluate():
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention._definition(*inputs, graph=graph)
        return out, *torch.autograd.grad(out, inputs, upstream)

    whole = evaluate()
    monkeypatch.setattr(attention, "CHUNK", 2 * 4 * 30)  # 30 edges
    monkeypatch.setattr(attention, "checkpoint", counted := mock.Mock(wraps=attention.checkpoint))
    for part, expected in zip(evaluate(), whole, strict=True):
        torch.testing.assert_close(part, expected)
    assert counted.call_count > 10


def test_the_roofline_is_the_larger_of_bytes_and_products():
    rates = {"copy_bytes_per_s": 100.0, "matmul_flops_per_s": 1000.0}
    work = roofline.Work(once=200, gathered=0, flops=500)
    found = roofline.roofline(work, 4.0, rates)
    assert found["roofline"] == 2.0 / 4.0  # the bytes take two seconds, the products half of one
    assert found["bytes_per_s"] == 50
    assert found["flops_per_byte"] == 2.5
    fetching = roofline.roofline(
        work._replace(gathered=300), 4.0, rates | {"gather_bytes_per_s": 300.0}
    )
    assert fetching["roofline"] == 3.0 / 4.0  # one second more
    assert fetching["bytes_per_s"] == 125
    assert roofline.roofline(work._replace(flops=4000), 4.0, rates)["roofline"] == 1
    assert roofline.roofline(work._replace(flops=4001), 4.0, rates) == {}  # so much was not done
    measured = roofline.measured_rates(CPU, torch.float32, 3_000_000)
    assert measured == roofline.measured_rates(CPU, torch.float32, 4_000_000)  # of one bucket
    assert "gather_bytes_per_s" not in measured  # nothing is fetched again
    small, large = (
        roofline.measured_rates(
            CPU, torch.float32, 3_000_000, work._replace(gathered=1, table=table, row=512)
        )["gather_bytes_per_s"]
        for table in (1 << 16, 1 << 28)
    )
    assert small > large  # a cache gives sooner than memory
    assert 1e8 < measured["copy_bytes_per_s"] < 1e13
    assert 1e8 < measured["matmul_flops_per_s"] < 1e14


def test_peak_memory_counts_what_is_held_at_once():
    def fn():
        x = torch.ones(1_000_000)  # 4 MB
        del x
        y = torch.ones(2_000_000)  # 8 MB
        return y, torch.ones(500_000)  # 2 MB

    assert memory.peak_extra_memory(fn, CPU) == pytest.approx(10e6, rel=0.01)


def test_providers_take_turns_in_both_orders():
    order = []
    providers = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = timing.measure(providers, CPU, repeats=2, sample=0)
    assert order == ["a", "b", "a", "b", "b", "a"]  # once to warm up
    assert [len(t) for t in times.values()] == [2, 2]
    assert timing.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2.0


def test_long_calls_are_timed_less_often(monkeypatch):
    monkeypatch.setattr(timing, "LONG", 0.05)
    calls = {"slow": lambda: time.sleep(0.02), "fast": lambda: None}
    times = timing.measure(calls, CPU, repeats=5, sample=0)
    assert [len(t) for t in times.values()] == [3, 5]
    assert timing.ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0, 1e9]) == 2.0


def test_short_calls_are_timed_several_at_once():
    calls = []
    times = timing.measure({"short": lambda: calls.append(1)}, CPU, repeats=3, sample=1e-3)
    assert len(times["short"]) == 3
    assert len(calls) > 100
    assert all(0 < t < 1e-4 for t in times["short"])


def test_attention_makes_no_tensor_of_edges_by_width():
    """The operator's peak stays far below one [E, H, D] tensor, forward and backward."""
    from fastgt import neighborhood_attention

    nodes, edges, heads, width = 200, 40_000, 4, 32
    graph = Graph.from_edge_index(torch.randint(nodes, (2, edges)), nodes)
    graph.columns  # noqa: B018
    inputs = [torch.randn(nodes, heads, width, requires_grad=True) for _ in range(3)]

    def both():
        return torch.autograd.grad(neighborhood_attention(*inputs, graph).sum(), inputs)

    both()
    peak = memory.peak_extra_memory(both, CPU)
    assert peak < 4 * edges * heads * width / 4


def test_masked_heads_are_held_against_a_model_without_them(problem):
    case = masked_heads.case(problem, heads=4, width=8, active=(1, 4))
    rows = harness.compare(case, repeats=1)
    assert [row["provider"] for row in rows] == ["no gate", "1 of 4", "4 of 4"]
    for row in rows:
        assert row["match"]
        assert row["both_s"] > 0
        assert row["both_peak_bytes"] >= row["forward_peak_bytes"] > 0
    assert rows[0]["forward_x"] == 1


def test_heads_that_are_not_masked_as_said_are_a_mismatch(problem, monkeypatch):
    real = masked_heads.HeadGate
    monkeypatch.setattr(masked_heads, "HeadGate", lambda mask: real(mask * 1.001))
    monkeypatch.setattr(masked_heads, "prune_heads", _without_scale)
    case = masked_heads.case(problem, heads=2, width=4, active=(1,))
    rows = harness.compare(case, repeats=1)
    assert [row["match"] for row in rows] == [True, False]
    assert "forward_s" not in rows[1]


def _without_scale(module):
    from fastgt import prune_heads
    from fastgt.nn import HeadGate

    module = copy.deepcopy(module)
    if module.head_gate is not None:
        module.head_gate = HeadGate(module.head_gate() != 0)
    return prune_heads(module)


def test_host_cost_is_measured_without_a_gpu():
    pytest.importorskip("triton")
    code = "from fastgt.bench import launch; print(launch.run(repeats=1, rounds=1))"
    env = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    costs = ast.literal_eval(run.stdout)
    assert list(costs) == ["forward, no_grad", "forward", "forward and backward"]
    assert all(cost > 0 for cost in costs.values())


def test_tuning_finds_where_windows_begin_to_win(monkeypatch):
    """With times that follow a model: gathering costs an edge 1, windows a column 2."""
    assert tune.threshold([(1.2, 0.8), (2.0, 1.1), (1.7, 0.9), (3.5, 1.5)]) == 2.0
    assert tune.threshold([(1.2, 1.1), (2.0, 0.9), (3.5, 1.5)]) == 3.5  # from there on, not once
    assert tune.threshold([(1.2, 0.8), (2.0, 0.9)]) is None
    for rho in (1.4, 3.5, 14.0):
        graph = tune.graph_of_density(rho, 2**14)
        found = tiles.density(graph.row_ptr, graph.col, graph.num_cols)
        assert found == pytest.approx(rho, rel=0.05)

    monkeypatch.setattr(
        tune.timing, "measure", lambda plans, device, repeats: {name: [name] for name in plans}
    )
    seen = []
    monkeypatch.setattr(tune.timing, "ratio", lambda slow, fast: seen[-1] / 2)
    real = tiles.density
    monkeypatch.setattr(tune.tiles, "density", lambda *args: seen.append(real(*args)) or seen[-1])
    rows = tune.tune(torch.device("cpu"), rows=640)
    assert {(row["dtype"], row["width"]) for row in rows} == {
        (dtype, width) for dtype in ("bfloat16", "float16", "float32") for width in tune.WIDTHS
    }
    for row in rows:
        assert row["rho64"] == min(round(x, 2) for x in seen if x > 2)
        assert row["source"].startswith("measured on ")
    other = {"op": "attention", "capability": "sm_90", "dtype": "bfloat16", "width": 16}
    assert tune.merged([other, dict(rows[0], rho64=9)], rows) == [other, *rows]


def test_tiles_are_verified_and_timed(monkeypatch, capsys):
    """Forward and backward with the tile; what does not compile has its reason."""
    pytest.importorskip("triton")
    from fastgt.kernels import attention as kernels
    from fastgt.kernels import attention_backward as backward  # before its plan is another

    plan, plans = kernels.attention_plan, []

    def attention_plan(*args):
        plans.append(plan(*args))
        if plans[-1].meta["num_warps"] == 2 * usual:
            raise RuntimeError("out of resource: shared memory")
        return plans[-1]

    usual = kernels.attention_tile(2, 16, 4).num_warps
    rows_of = kernels.attention_tile(2, 16, 4).block_r
    monkeypatch.setattr(kernels, "attention_plan", attention_plan)
    monkeypatch.setattr(backward, "attention_plan", attention_plan)
    monkeypatch.setattr(tune, "CHANGES", ({}, {"block_r": 2, "block_n": 2}, {"num_warps": 2}))
    monkeypatch.setattr(
        tune.timing,
        "measure",
        lambda calls, device, repeats: {name: [float(len(name))] for name in calls},
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    graph = tune.graph_of_density(3.5, 64, device)
    how = torch.float32, "triton", tune.CHANGES, 5
    same, larger, failing = tune._time_tiles("gather", graph, 2, 16, *how)
    assert [call.meta["T"].BLOCK_R for call in plans[:-1]] == [rows_of] * 3 + [2 * rows_of] * 3
    assert same["match"]
    assert larger["match"]
    assert same["x"] == 1
    assert larger["both_s"] == len(str(tune.CHANGES[1])) == 2 * larger["x"]
    assert "out of resource" in failing["error"]
    assert "both_s" not in failing

    monkeypatch.setattr(tune, "DTYPES", (torch.float32,))
    monkeypatch.setattr(tune, "WIDTHS", (16,))
    found = tune.tune_tiles(device, heads_by_width=16, rows=64, impl="triton")
    assert [row["path"] for row in found] == ["gather"] * 3 + ["windows"] * 3
    assert all(row["match"] is not False for row in found)
    assert "gather, float32 16: {}, 1.0x" in capsys.readouterr().out

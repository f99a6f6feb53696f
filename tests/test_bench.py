"""The benchmark's own honesty: peers compute the same thing, wrong ones are not timed."""

import ast
import copy
import functools
import json
import os
import subprocess
import sys

import pytest
import torch

from fastgt import Graph, tiles
from fastgt.bench import attention, harness, masked_heads, peers, render, tune
from fastgt.testing import Problem, assert_as_accurate, random_graph

CPU = torch.device("cpu")


@pytest.fixture
def problem(monkeypatch):
    tiny = Problem("tiny", lambda: random_graph(0, 50, 300, isolated=3))
    monkeypatch.setitem(attention.PROBLEMS, "tiny", tiny)
    return "tiny"


def require(name):
    package = {"pyg": "torch_geometric", "torch-scatter": "torch_scatter"}.get(name)
    if package:
        pytest.importorskip(package)


@pytest.mark.parametrize("name", peers.ATTENTION)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("clamp", [None, 0.5])
def test_peers_compute_the_same_attention(name, bias, clamp):
    require(name)
    from fastgt import reference

    graph = random_graph(1, 30, 120, cols=20)
    q, k, v = (torch.randn(n, 3, 8) for n in (30, 20, 20))
    edge_bias = torch.randn(120, 3) if bias else None
    call = functools.partial(peers.attention(name), q, k, v, graph.edge_index)
    if name.startswith("sdpa") and clamp is not None:
        with pytest.raises(NotImplementedError, match="clamps no logits"):
            call(logit_clamp=clamp)
        return
    out = call(edge_bias=edge_bias, logit_clamp=clamp)

    def definition(dtype):
        return reference.neighborhood_attention(
            q.to(dtype),
            k.to(dtype),
            v.to(dtype),
            graph,
            edge_bias=edge_bias if edge_bias is None else edge_bias.to(dtype),
            logit_clamp=clamp,
        )

    assert_as_accurate(out, definition(torch.float32), definition(torch.float64), name)


def test_pyg_peer_is_transformer_conv():
    conv_module = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    graph = random_graph(2, 25, 90)
    conv = conv_module.TransformerConv(12, 4, heads=3, root_weight=False)
    x = torch.randn(25, 12)
    q, k, v = (f(x).view(25, 3, 4) for f in (conv.lin_query, conv.lin_key, conv.lin_value))
    expected = conv(x, graph.edge_index)
    torch.testing.assert_close(peers.pyg(q, k, v, graph.edge_index).flatten(1), expected)


def test_rows_are_complete_and_written(problem, tmp_path, capsys, monkeypatch):
    path = tmp_path / "new" / "rows.json"
    monkeypatch.setattr(
        "sys.argv", ["bench", "--problem", problem, "--repeats", "1", "--json", str(path)]
    )
    attention.main()
    rows = json.loads(path.read_text())
    assert rows[0]["provider"] == "fastgt"
    assert {row["provider"] for row in rows} == {"fastgt", *peers.ATTENTION}
    for row in rows:
        if row["match"]:
            assert row["both_s"] > 0
            assert row["both_peak_bytes"] >= row["forward_peak_bytes"] > 0
        assert {"commit", "device", "torch", "triton", "date", "node_order"} <= row.keys()
    assert "fastgt" in capsys.readouterr().out


def test_a_provider_that_disagrees_is_reported_and_not_timed(problem, monkeypatch):
    def wrong(q, k, v, edge_index):
        return peers.gather_scatter(q, k, v, edge_index) * 1.001

    monkeypatch.setitem(peers.ATTENTION, "gather-scatter", wrong)
    rows = {row["provider"]: row for row in attention.run(problem, repeats=1)}
    assert rows["gather-scatter"]["match"] is False
    assert "forward_s" not in rows["gather-scatter"]
    assert "False" in attention.show(list(rows.values()))


@pytest.mark.parametrize("when", ["at once", "in the backward"])
def test_a_provider_that_fails_says_so_and_the_run_goes_on(problem, monkeypatch, when):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no room")

    def failing(q, k, v, edge_index):
        if when == "at once":
            raise MemoryError("no room")
        return Fails.apply(peers.gather_scatter(q, k, v, edge_index))

    monkeypatch.setitem(peers.ATTENTION, "gather-scatter", failing)
    rows = {row["provider"]: row for row in attention.run(problem, repeats=1)}
    assert rows["gather-scatter"]["match"] is None
    assert "Error: no room" in rows["gather-scatter"]["error"]
    assert "forward_s" not in rows["gather-scatter"]
    assert rows["fastgt"]["both_s"] > 0
    assert "no room" in attention.show(list(rows.values()))
    assert "| gather-scatter | not run |" in render._table(list(rows.values()))


def test_dense_masks_that_do_not_fit_are_refused(problem, monkeypatch):
    monkeypatch.setattr(peers, "DENSE_BYTES", 1000)
    rows = {row["provider"]: row for row in attention.run(problem, repeats=1)}
    assert "the dense mask would take" in rows["sdpa, dense mask"]["error"]


def test_absent_peers_are_listed(problem, monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(peers, "attention", missing)
    rows = attention.run(problem, repeats=1)
    absent = [row["error"] for row in rows if row["match"] is None]
    assert absent == ["not installed"] * len(peers.ATTENTION)


def test_peak_memory_counts_what_is_held_at_once():
    def fn():
        x = torch.ones(1_000_000)  # 4 MB
        del x
        y = torch.ones(2_000_000)  # 8 MB
        return y, torch.ones(500_000)  # 2 MB

    assert harness.peak_extra_memory(fn, CPU) == pytest.approx(10e6, rel=0.01)


def test_providers_take_turns_in_both_orders():
    order = []
    providers = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = harness.measure(providers, CPU, repeats=2)
    assert order == ["a", "b", "a", "b", "b", "a"]  # once to warm up
    assert [len(t) for t in times.values()] == [2, 2]
    assert harness.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2.0


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
    peak = harness.peak_extra_memory(both, CPU)
    assert peak < 4 * edges * heads * width / 4


def test_tables_are_made_from_result_files(tmp_path, monkeypatch, problem):
    rows = attention.run(problem, repeats=1)
    (tmp_path / "tiny.json").write_text(json.dumps(rows))
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    readme = "before\n<!-- table tiny -->\nold\n<!-- end -->\nafter"
    text = render.rendered(readme)
    assert text.startswith("before\n<!-- table tiny -->\n`tiny`: 50 nodes, 300 edges")
    assert "| fastgt | yes |" in text
    assert "old" not in text
    assert render.rendered(text) == text


def test_masked_heads_are_verified_timed_and_rendered(tmp_path, capsys, monkeypatch):
    path = tmp_path / "masked.json"
    sizes = [
        "--nodes",
        "60",
        "--edges",
        "300",
        "--heads",
        "4",
        "--width",
        "8",
        "--active",
        "1",
        "4",
    ]
    monkeypatch.setattr("sys.argv", ["bench", *sizes, "--repeats", "1", "--json", str(path)])
    masked_heads.main()
    assert "1 of 4" in capsys.readouterr().out
    rows = json.loads(path.read_text())
    assert [row["active"] for row in rows] == ["no gate", "1 of 4", "4 of 4"]
    for row in rows:
        assert row["match"]
        assert row["both_s"] > 0
        assert row["both_peak_bytes"] >= row["forward_peak_bytes"] > 0
    assert rows[0]["forward_share"] == 1
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    text = render.rendered("<!-- table masked -->\n<!-- end -->")
    assert text.count("| yes |") == 3
    assert "60 nodes, 300 edges, H=4, D=8" in text


def test_heads_that_are_not_masked_as_said_are_a_mismatch(monkeypatch):
    real = masked_heads.HeadGate
    monkeypatch.setattr(masked_heads, "HeadGate", lambda mask: real(mask * 1.001))
    monkeypatch.setattr(masked_heads, "prune_heads", _without_scale)
    rows = masked_heads.run(nodes=40, edges=200, heads=2, width=4, active=(1,), repeats=1)
    assert [row["match"] for row in rows] == [True, False]
    assert "forward_s" not in rows[1]
    assert "MISMATCH" in masked_heads.show(rows)


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
        tune.harness, "measure", lambda plans, device: {name: [name] for name in plans}
    )
    seen = []
    monkeypatch.setattr(tune.harness, "ratio", lambda slow, fast: seen[-1] / 2)
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

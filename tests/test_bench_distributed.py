"""The benchmark of ranks: what it measures is what it says, and what it simulates is a formula."""

import json
import math
import sys

import pytest
import render
import render_ranks
import torch

from fastgt import Graph
from fastgt.bench import distributed, scaling
from fastgt.bench.distributed import Run
from fastgt.bench.scaling import Rates, Setting
from fastgt.distributed import partition, report
from fastgt.distributed.report import NETWORKS
from fastgt.testing import PROBLEMS, Problem, random_graph

SETTING = Setting(dim=8, heads=2, layers=2)
RATES = Rates("a rank", edge=2e-6, node=3e-6, item=4, network="ethernet-10g", source="a test")


@pytest.fixture
def small(monkeypatch):
    """Problems of names that every process knows, cut small."""
    graph = random_graph(0, 300, 1500)
    monkeypatch.setitem(PROBLEMS, "rmat", Problem("rmat", lambda: graph))
    monkeypatch.setattr(scaling, "RANKS", (2, 4))
    monkeypatch.setattr(scaling, "WEAK", {2: 5, 8: 7})
    return "rmat"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured on Linux")
def test_ranks_send_the_bytes_of_the_formula_and_reach_the_same_loss():
    runs = [Run(1, steps=2), Run(2, "hash", steps=2)]
    one, two = rows = distributed.measured("rmat_11", SETTING, runs)
    assert [row["sent_bytes"] for row in rows] == [row["formula_bytes"] for row in rows]
    graph = PROBLEMS["rmat_11"].load()
    found = report(graph, partition(graph, 2, "hash"), width=8)
    assert two["sent_bytes"] == 2 * SETTING.layers * int(found.bytes_sent.sum()) > 0
    assert one["sent_bytes"] == 0
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for row in rows:
        assert 0 < row["step_least_s"] <= row["step_s"]
        assert row["peak_bytes"] > row["imported_bytes"] > 1e7
    assert one["peak_x"] == one["step_x"] == 1
    assert distributed.show(rows).count("a step") == 2


def test_bytes_that_differ_from_the_formula_are_an_error():
    one = {"seconds": [1.0], "imported": 1, "peak": 2, "sent": 8, "formula": 12, "loss": 0.5}
    graph = random_graph(0, 4, 4)
    with pytest.raises(RuntimeError, match="rank 0 sent 8 bytes in a step and the formula has 12"):
        distributed._row("cora", graph, SETTING, Run(1), [one], [one])


def test_partitions_say_what_report_says(small):
    rows = distributed.partitions(small, (3,), SETTING)
    assert [row["method"] for row in rows] == ["metis", "ldg", "contiguous", "hash"]
    graph = PROBLEMS[small].load()
    for row in rows:
        found = report(graph, partition(graph, 3, row["method"]), parts=3)
        assert row["halo"] == int(found.halo.sum())
        assert row["halo_most"] == int(found.halo.max())
        assert row["cut"] == int(found.cut.sum()) / graph.num_edges
        assert row["balance"] == found.balance
        assert row["partition_s"] > 0


def test_interior_edges_are_those_of_rows_that_read_own_columns():
    graph = Graph.from_edge_index(torch.tensor([[2, 1, 0, 0, 2], [0, 0, 1, 2, 2]]), 3)
    owners = torch.tensor([0, 0, 1])
    # node 0 reads node 2: its two edges are no interior edges, nor are those of node 2
    assert scaling.interior_edges(graph, owners, 2).tolist() == [1, 0]
    assert scaling.interior_edges(graph, torch.zeros(3, dtype=torch.int64), 1).tolist() == [5]


def test_a_simulated_step_is_the_slowest_rank_of_the_equations():
    # edges of the first nodes are cut, those of the others are not: the slowest rank hides least
    here = torch.arange(300)
    mixed = random_graph(0, 150, 900).edge_index
    graph = Graph.from_edge_index(torch.cat([torch.stack([here.roll(1), here]), mixed], 1), 300)
    owners = here * 4 // 300
    found = report(graph, owners, parts=4, width=SETTING.dim)
    inside = scaling.interior_edges(graph, owners, 4)
    network = NETWORKS["ethernet-10g"]
    steps, plain = [], []
    for rank in range(4):
        compute = int(found.edges[rank]) * 2e-6 + int(found.rows[rank]) * 3e-6
        most = max(int(found.sent[rank]), int(found.halo[rank])) * SETTING.dim * 4
        one = most / network.bandwidth + int(found.peers[rank]) * network.latency
        exchange = 2 * SETTING.layers * one
        steps.append(compute + exchange - min(exchange, int(inside[rank]) * 2e-6))
        plain.append(compute + exchange)
    parameters = 8 * SETTING.layers * SETTING.dim**2
    gradients = 2 * 3 / 4 * parameters * 4 / network.bandwidth + 2 * 2 * network.latency
    seconds = scaling.step_seconds(found, inside, RATES, SETTING)
    assert seconds["step_s"] == pytest.approx(max(steps) + gradients)
    assert seconds["step_plain_s"] == pytest.approx(max(plain) + gradients)
    assert max(plain) - max(steps) < max(b - a for a, b in zip(steps, plain, strict=True)) - 1e-6
    half = RATES._replace(item=2)
    assert scaling.step_seconds(found, inside, half, SETTING)["exchange_s"] < seconds["exchange_s"]


def test_rates_of_a_gpu_are_those_of_its_data_sheet():
    rates = scaling.stated_rates("H200", SETTING)
    assert rates.edge == SETTING.layers * 6 * 2 * SETTING.dim / 4.3e12
    assert rates.node > SETTING.layers * 60 * 2 * SETTING.dim / 4.3e12


def test_simulated_rows_are_rendered_and_drawn(small, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    devices = [RATES, scaling.stated_rates("H200", SETTING)]
    rows = scaling.simulated([small], devices, SETTING)
    strong = [row for row in rows if row["scaling"] == "strong"]
    assert len(strong) == 2 * 3 * 2
    for row in rows:
        alone = row["rows"] * row["node_s"] + row["edges"] * row["edge_s"]
        if row["scaling"] == "weak":
            assert row["alone_s"] == pytest.approx(alone / row["parts"])
            assert row["efficiency"] == pytest.approx(row["alone_s"] / row["step_s"])
        else:
            assert row["alone_s"] == pytest.approx(alone)
            assert row["efficiency"] == pytest.approx(alone / row["parts"] / row["step_s"])
        assert 0 < row["efficiency"] <= 1
    made = scaling.plot(rows, tmp_path / "plots")
    assert {path.name for path in made} == {"strong.png", "strong.svg", "weak.png", "weak.svg"}
    again = scaling.plot(rows, tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in made]
    monkeypatch.setattr(render_ranks, "SHOWN", (2,))
    (tmp_path / "distributed.json").write_text(json.dumps(rows))
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    page = "<!-- ranks simulated -->\n<!-- end -->\n<!-- ranks measured -->\n<!-- end -->\n"
    text = render.rendered(page)
    assert "Simulated. a rank with ethernet-10g: a test" in text
    assert "| `rmat` | strong | 2 | metis |" in text
    assert "| `rmat` | strong | 4 |" not in text
    assert "| `rmat_7` | weak | 8 | hash |" in text
    assert "Nothing has been measured." in text
    assert render.rendered(text) == text


def test_measured_rows_are_rendered_beside_the_target():
    of_machine = {"device": "a CPU, 2 threads", "torch": "2.13", "date": "today", "commit": "abc"}
    row = {
        "kind": "measured",
        "problem": "debian",
        "rows": 10,
        "edges": 20,
        **SETTING._asdict(),
        **Run(1, steps=2, threads=2)._asdict(),
        "method": None,
        "step_s": 2.0,
        "peak_bytes": 1e9,
        "kept_bytes": 1.5e9,
        "sent_bytes": 0,
        "formula_bytes": 0,
        "step_x": 1.0,
        "peak_x": 1.0,
    } | of_machine
    two = row | {"parts": 2, "threads": 1, "peak_x": 0.6, "step_x": 1.1, "sent_bytes": 1234}
    worse = two | {"overlap": False, "peak_x": 0.7, "formula_bytes": 1234}
    text = render_ranks.of_kind("measured", [row, two, worse])
    assert "| 1 x 2 |  | 2.000 s | 1000 MB |" in text
    assert (
        "| 2 x 1 | on | 2.000 s (1.10x) | 1000 MB (60%) | at most 65%: met | 1500 MB | 1,234 |"
        in text
    )
    assert "at most 65%: missed | 1500 MB | 1,234 | 1,234 |" in text
    cut = {"parts": 8, "method": "ldg", "halo": 5000, "halo_most": 900, "cut": 0.25}
    cut |= {"balance": 1.05, "balance_rows": 1.5, "partition_s": 0.5, "kind": "partition"}
    text = render_ranks.of_kind("partition", [row | cut])
    assert "| 8 | ldg | 5,000 | 900 | 25.0% | 1.05 | 1.50 | 0.50 |" in text


def test_a_rate_is_what_edges_add_to_a_step(monkeypatch):
    graph = random_graph(0, 1000, 400_000)
    monkeypatch.setitem(PROBLEMS, "tiny", Problem("tiny", lambda: graph))
    found = distributed.rates("tiny", SETTING, repeats=3)
    assert 0 < found.edge < 1e-3
    assert 0 < found.node < 1e-1
    assert "tiny" in found.source
    assert math.isfinite(found.edge + found.node)

"""What tools/seeds.py measures of an example, on examples of a few nodes."""

import json
import sys
from pathlib import Path

import pytest
import render
import seeds
import torch
from torch import Tensor

from fastgt import Graph

EXAMPLE = '''"""A made-up one."""

import torch
from fastgt import Graph

PATTERN = "pairs"
OPERATOR = "{operator}"


def paper_size():
    return {graph}, 2, 4
'''
PAIRS = "Graph.from_edge_index(torch.tensor([[0, 3, 3, 0, 1, 2, 1, 2], [0, 3, 0, 3, 1, 2, 2, 1]]))"
COMPLETE = "Graph.complete(torch.tensor([0, 3, 4]), torch.tensor([0, 2, 7]))"
SETS = "Graph.from_edge_index(torch.tensor([[0, 2, 0, 2, 1], [2, 0, 0, 2, 1]]))"
SQUARE = "Graph.complete(torch.tensor([0, 3, 4]))"


def write(folder: Path, name: str, graph: str, operator: str = "neighborhood_attention") -> Path:
    path = folder / f"{name}.py"
    path.write_text(EXAMPLE.format(operator=operator, graph=graph))
    return path


def inputs(graph: Graph, heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = graph.num_rows, graph.num_cols, graph.num_cols
    return [
        torch.randn(n, heads, 4, generator=generator, dtype=torch.float64).requires_grad_()
        for n in sizes
    ]


def by_hand(q: Tensor, k: Tensor, v: Tensor, graph: Graph) -> Tensor:
    out = []
    for i in range(graph.num_rows):
        j = graph.edge_index[0][graph.edge_index[1] == i]
        weight = (q[i] * k[j]).sum(-1).div(2).softmax(0)  # [E_i, H]
        out.append((weight[..., None] * v[j]).sum(0))
    return torch.stack(out)


def test_a_row_has_sizes_times_and_memory(tmp_path):
    row = seeds.measured(write(tmp_path, "pairs", PAIRS), repeats=1)
    expected = {
        "seed": "pairs",
        "pattern": "pairs",
        "operator": "neighborhood_attention",
        "rows": 4,
        "columns": 4,
        "graphs": 1,
        "edges": 8,
        "share": 0.5,
        "heads": 2,
        "width": 4,
    }
    assert row.items() >= expected.items()
    for provider in ("fastgt", "sorted", "dense", "blocks"):
        found = row[provider]
        assert 0 < found["forward_s"] < found["both_s"] + 0.1
        assert found["both_peak_bytes"] >= found["forward_peak_bytes"] >= 4 * 2 * 4 * 4
    assert {"date", "device", "commit", "torch"} <= set(row)


@pytest.mark.parametrize(
    ("graph", "names"),
    [
        (PAIRS, ["neighborhood_attention", "dense", "sorted", "blocks"]),
        (SETS, ["neighborhood_attention", "dense", "sorted"]),
        (COMPLETE, ["neighborhood_attention", "global_attention", "dense"]),
        (SQUARE, ["neighborhood_attention", "global_attention", "dense", "sorted"]),
    ],
)
def test_providers_are_softmax_attention(graph, names):
    graph = eval(graph, {"Graph": Graph, "torch": torch})
    label = seeds.blocks(graph)
    assert (label is None) == ("sorted" not in names)
    known = {
        "dense": lambda: seeds.dense(graph),
        "sorted": lambda: seeds.sorted_blocks(label),
        "blocks": lambda: seeds.equal_blocks(label),
    }
    for name in names:
        same_as_by_hand(known[name]() if name in known else seeds.ours(graph, name), graph)


def same_as_by_hand(call: seeds.Attend, graph: Graph) -> None:
    x = inputs(graph)
    found, right = call(*x), by_hand(*x, graph)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(right.shape, dtype=right.dtype)
    found, right = (torch.autograd.grad(y, x, upstream) for y in (found, right))
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "edges",
    [
        [[0, 1, 1, 2, 2, 0], [0, 0, 1, 1, 2, 2]],
        [[0, 1, 0, 1, 2, 3, 2, 1], [0, 0, 1, 1, 2, 2, 3, 3]],
        [[0, 0, 1, 2], [0, 1, 2, 2]],
    ],
)
def test_what_is_not_made_of_complete_blocks_has_none(edges):
    assert seeds.blocks(Graph.from_edge_index(torch.tensor(edges))) is None


def test_sets_of_other_sizes_are_no_batch_of_blocks(tmp_path):
    row = seeds.measured(write(tmp_path, "sets", SETS), repeats=1)
    assert row["sorted"]["both_s"] > 0
    assert "blocks" not in row
    assert "sorted" not in seeds.measured(write(tmp_path, "all", SQUARE), repeats=1)


@pytest.mark.parametrize("operator", ["linear_attention", "channelwise_attention"])
def test_other_functions_are_timed_and_not_compared(tmp_path, operator):
    row = seeds.measured(write(tmp_path, "other", SQUARE, operator), repeats=1)
    assert row["fastgt"]["both_s"] > 0
    assert row["dense"]["both_s"] > 0


def test_where_dense_attention_is_the_choice_there_is_nothing_of_ours(tmp_path):
    row = seeds.measured(write(tmp_path, "plain", COMPLETE, seeds.DENSE), repeats=1)
    assert "fastgt" not in row
    assert row["dense"]["both_s"] > 0


def test_a_mask_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(seeds, "MASK_BYTES", 15)
    row = seeds.measured(write(tmp_path, "pairs", PAIRS), repeats=1)
    assert row["dense"] == {"refused": "a mask of 0.0 GB"}
    assert row["fastgt"]["both_s"] > 0


def test_who_asks_for_more_memory_than_there_is_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(seeds, "dense", lambda graph: lambda q, k, v: torch.empty(1 << 46))
    row = seeds.measured(write(tmp_path, "pairs", PAIRS), repeats=1)
    assert row["dense"] == {"refused": "more memory than there is"}
    assert row["fastgt"]["both_s"] > 0

    def broken(q, k, v):
        raise RuntimeError("a fault of another kind")

    monkeypatch.setattr(seeds, "dense", lambda graph: broken)
    with pytest.raises(RuntimeError, match="another kind"):
        seeds.measured(write(tmp_path, "pairs", PAIRS), repeats=1)


def test_an_operator_that_errs_is_not_timed(tmp_path, monkeypatch):
    right = seeds.dense
    monkeypatch.setattr(
        seeds, "neighborhood_attention", lambda q, k, v, graph: 1.01 * right(graph)(q, k, v)
    )
    with pytest.raises(AssertionError):
        seeds.measured(write(tmp_path, "pairs", PAIRS), repeats=1)


@pytest.mark.parametrize(
    ("graph", "operator", "said"),
    [
        (PAIRS, "no_attention", "OPERATOR must be one of neighborhood_attention, .*'no_attention'"),
        ("Graph.from_edge_index(torch.tensor([[0], [0]]), 2)", "neighborhood_attention", "a mask"),
        ("Graph.from_edge_index(torch.tensor([[0, 0], [0, 0]]))", "neighborhood_attention", "once"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, graph, operator, said):
    with pytest.raises(ValueError, match=said):
        seeds.measured(write(tmp_path, "bad", graph, operator), repeats=1)


def test_the_command_writes_rows_and_the_table_shows_them(tmp_path, monkeypatch):
    write(tmp_path, "pairs", PAIRS)
    write(tmp_path, "plain", COMPLETE, seeds.DENSE)
    monkeypatch.setattr(seeds, "SEEDS", tmp_path)
    monkeypatch.setattr(seeds, "RESULTS", tmp_path / "seeds.json")
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    marker = "<!-- seeds -->\n<!-- end -->"
    assert "No seed has been measured" in render.rendered(marker)
    for name in ("plain", "pairs", "plain"):
        monkeypatch.setattr(sys, "argv", ["seeds.py", name, "--repeats", "1"])
        seeds.main()
    rows = json.loads((tmp_path / "seeds.json").read_text())
    assert [row["seed"] for row in rows] == ["pairs", "plain"]
    lines = render.rendered(marker).splitlines()
    assert lines[5].startswith(
        "| [pairs](../examples/seeds/pairs.py) | pairs | `neighborhood_attention` | 4 | 8 | 50% |"
    )
    assert "| [plain](../examples/seeds/plain.py) |" in lines[6]
    assert "| 4 to 7 | 11 | 100% | 2 x 4 |  |" in lines[6]
    monkeypatch.setattr(sys, "argv", ["seeds.py", "unknown"])
    with pytest.raises(SystemExit):
        seeds.main()


def test_the_fastest_is_named_with_how_much_longer_another_takes(tmp_path, monkeypatch):
    def took(seconds):
        parts = {f"{part}_{x}": 0.0 for part in ("forward", "both") for x in ("s", "spread")}
        return parts | {"both_s": seconds, "both_peak_bytes": 2e6}

    base = {
        "pattern": "p",
        "operator": "o",
        "rows": 9,
        "columns": 9,
        "edges": 81,
        "share": 0.0123,
        "heads": 1,
        "width": 2,
        "device": "a CPU, 2 threads",
        "torch": "2.13.0",
        "date": "2026-11-29",
        "commit": "abc",
    }
    rows = [
        base | {"seed": "a", "fastgt": took(1.0), "dense": took(3.0), "blocks": took(2.0)},
        base | {"seed": "b", "fastgt": took(1.5), "sorted": took(0.8), "blocks": took(0.5)},
        base | {"seed": "c", "fastgt": took(1.5), "dense": {"refused": "a mask of 9.1 GB"}},
        base | {"seed": "d", "dense": took(1.5)},
    ]
    (tmp_path / "seeds.json").write_text(json.dumps(rows))
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    lines = render.rendered("<!-- seeds -->\n<!-- end -->").splitlines()[5:]
    ends = [line.split("|")[-2].strip() for line in lines if line.startswith("| [")]
    assert ends == ["fastgt, 2.0x", "blocks, 3.0x", "fastgt", "dense"]
    assert "| 1.23% |" in lines[0]
    assert "| a mask of 9.1 GB |" in lines[2]


def test_the_page_is_rendered_from_the_results():
    page = (seeds.ROOT / "docs" / "gallery.md").read_text()
    assert "<!-- seeds -->" in page
    assert render.rendered(page) == page, "run `python tools/render.py`"


def test_every_example_says_what_it_is():
    for path in seeds.SEEDS.glob("*.py"):
        seed = seeds.load(path)
        assert seed.__doc__, path
        assert isinstance(seed.PATTERN, str)
        assert seed.OPERATOR == seeds.DENSE or seeds.ours(
            Graph.complete(torch.tensor([0, 1])), seed.OPERATOR
        )
        graph, heads, width = seed.paper_size()
        assert isinstance(graph, Graph)
        assert graph.num_edges > 0
        assert isinstance(heads, int)
        assert isinstance(width, int)

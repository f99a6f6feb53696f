"""The figures of docs/concepts.md show what the library makes of the page's graphs."""

import re
from itertools import pairwise
from pathlib import Path

import concepts as tool
import pytest

from fastgt import Graph

figures = pytest.importorskip("matplotlib.figure")
PAGE = (Path(__file__).parent.parent / "docs" / "concepts.md").read_text()


def texts(name: str) -> list[str]:
    """All words and numbers of a figure, in the order in which they are drawn."""
    figure = figures.Figure()
    tool.DRAWINGS[name][0](figure)
    return [
        x for axes in figure.axes for x in [axes.get_title(), *(t.get_text() for t in axes.texts)]
    ]


def test_every_figure_is_shown_and_committed():
    assert set(re.findall(r"\]\(figures/concepts/(\w+)\.png\)", PAGE)) == set(tool.DRAWINGS)
    assert {path.stem for path in tool.FIGURES.glob("*.png")} == set(tool.DRAWINGS)


@pytest.mark.parametrize("name", tool.DRAWINGS)
def test_a_figure_is_small_and_drawn_the_same(name):
    committed = (tool.FIGURES / f"{name}.png").read_bytes()
    assert len(committed) < 60_000
    new = tool.drawn(name)
    assert new.startswith(b"\x89PNG")
    assert new == tool.drawn(name)
    size = slice(16, 24)  # width and height of a PNG
    assert new[size] == committed[size], "run `python tools/concepts.py`"
    assert int.from_bytes(new[16:20]) == tool.WIDTH * 200


def test_the_example_is_the_graph_of_the_page():
    block = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
    names = {}
    exec(block, names)
    assert names["graph"].edge_index.tolist() == tool.example().edge_index.tolist()
    assert names["graph"].num_rows == tool.example().num_rows


def test_slots_have_the_numbers_of_the_graph():
    graph, found = tool.example(), texts("edge_order")
    source, target = graph.edge_index.tolist()
    lines = [range(5), source, target, graph.edge.tolist(), graph.col.tolist()]
    assert [x for x in found if x.isdigit()] == [str(x) for line in lines for x in line]
    assert f"row_ptr = {graph.row_ptr.tolist()}" in found
    assert [x for x in found if re.fullmatch(r"row \d", x)] == ["row 0", "row 1", "row 2", "row 4"]


def test_walks_have_one_writer_for_each_slot():
    columns, found = tool.example().columns, texts("walks")
    assert [x for x in found if re.fullmatch(r"column \d", x)] == [
        f"column {j}" for j, (a, b) in enumerate(pairwise(columns.ptr.tolist())) if a < b
    ]
    lines = [tool.example().edge, tool.example().col, columns.edge, columns.row]
    numbers = [str(x) for line in lines for x in line.tolist()]
    assert [x for x in found if x.isdigit()] == numbers


def test_the_plan_counts_loaded_keys():
    """By windows: of 16 rows, two lines of pixels, the distinct columns."""
    graph = tool.image()
    rows = range(graph.num_rows)
    columns = [graph.col[graph.row_ptr[i] : graph.row_ptr[i + 1]].tolist() for i in rows]
    loads = sum(len({j for row in columns[i : i + 16] for j in row}) for i in range(0, 64, 16))
    assert loads < graph.num_edges / 4
    found = texts("plan")
    assert f"gather\n{graph.num_edges} keys are loaded" in found
    assert f"windows of 16\n{loads} keys are loaded" in found


def test_the_batch_is_told_by_its_boundaries():
    batch = Graph.batch(tool.molecules())
    assert f"their batch, graph_ptr = {batch.graph_ptr.tolist()}" in texts("batch")

"""Figures of docs/concepts.md, drawn from graphs and plans of the library.

``python tools/concepts.py`` draws them into ``docs/figures/concepts``, a PNG each. What stands in
a figure is read from a :class:`fastgt.Graph`. The same code gives the same bytes with the same
matplotlib. The figures are 3.8 inches wide, so that a phone shows their letters at full size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from figures import png, write_changed

from fastgt import Graph, patterns, tiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = Path(__file__).parent.parent / "docs" / "figures" / "concepts"
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#9d755d")  # of rows
WIDTH = 3.8
SMALL, LARGE = 7, 8  # points
HEIGHT = 16  # rows of a window


def run() -> None:
    """Draw what is not drawn yet, or otherwise."""
    for name in DRAWINGS:
        write_changed(FIGURES / f"{name}.png", drawn(name))


def drawn(name: str) -> bytes:
    """A figure as a PNG."""
    from matplotlib.figure import Figure

    draw, height = DRAWINGS[name]
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    draw(figure)
    return png(figure, 200)


def example() -> Graph:
    """The graph of the page: six nodes, of which one attends to node 1 twice."""
    edge_index = torch.tensor([[1, 2, 1, 5, 0], [0, 1, 0, 4, 2]])
    return Graph.from_edge_index(edge_index, num_nodes=6)


def image() -> Graph:
    """8 x 8 pixels, each of which attends to the 3 x 3 around it."""
    return patterns.neighborhood((8, 8), 3)


def molecules() -> list[Graph]:
    """A ring of six, a path of four and a star of five, each edge both ways."""
    ring = [(i, (i + 1) % 6) for i in range(6)]
    path = [(i, i + 1) for i in range(3)]
    star = [(0, i) for i in range(1, 5)]
    graphs = []
    for pairs, nodes in ((ring, 6), (path, 4), (star, 5)):
        one_way = torch.tensor(pairs).T
        graphs.append(Graph.from_edge_index(torch.cat([one_way, one_way.flip(0)], 1), nodes))
    return graphs


def _rows_and_columns(figure: Figure) -> None:
    """Nodes and edges beside rows and columns; an edge has its number in both."""
    graph = example()
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    _nodes(left, graph, numbers=True)
    left.set_title("edges, from source to target", fontsize=LARGE)
    cells: dict[tuple[int, int], list[int]] = {}
    source, target = graph.edge_index.tolist()
    for e in range(graph.num_edges):
        cells.setdefault((target[e], source[e]), []).append(e)
    for (i, j), edges in cells.items():
        _cell(right, j, i, COLOURS[i], ", ".join(map(str, edges)))
    _matrix(right, graph)
    right.set_title("rows attend to columns", fontsize=LARGE)


def _edge_order(figure: Figure) -> None:
    """The caller's edges above the slots that they stand in."""
    graph = example()
    axes = figure.subplots()
    source, target = graph.edge_index.tolist()
    edges = list(range(graph.num_edges))
    colours = [COLOURS[i] for i in target]
    _strip(axes, 0, {"edge": edges, "source": source, "target": target}, colours)
    place = graph.edge.tolist()
    _strip(axes, 4.4, {"edge": place, "col": graph.col.tolist()}, [colours[e] for e in place])
    for slot, e in enumerate(place):
        axes.plot([e + 0.5, slot + 0.5], [3.05, 4.35], color=colours[e], linewidth=1.2)
    _brackets(axes, 6.5, graph.row_ptr.tolist(), "row")
    axes.text(0, -0.35, "as the caller gave them", fontsize=LARGE)
    axes.text(0, 8.2, f"row_ptr = {graph.row_ptr.tolist()}", fontsize=LARGE, va="center")
    _finish(axes, graph.num_edges, 8.6)


def _walks(figure: Figure) -> None:
    """The row walk of the forward above the column walk of the gradients of k and v."""
    graph = example()
    axes = figure.subplots()
    colours = [COLOURS[i] for i in graph.edge_index[1].tolist()]
    edges, columns = graph.edge.tolist(), graph.columns
    _strip(axes, 0, {"edge": edges, "col": graph.col.tolist()}, [colours[e] for e in edges])
    _brackets(axes, 2.1, graph.row_ptr.tolist(), "row")
    axes.text(0, -0.35, "row walk: each row writes its output", fontsize=LARGE)
    edges = columns.edge.tolist()
    _strip(axes, 5.2, {"edge": edges, "row": columns.row.tolist()}, [colours[e] for e in edges])
    _brackets(axes, 7.3, columns.ptr.tolist(), "column")
    axes.text(0, 4.85, "column walk: each column writes dk and dv", fontsize=LARGE)
    _finish(axes, graph.num_edges, 8.6)


def _plan(figure: Figure) -> None:
    """What is loaded by edges, and by windows of 16 rows."""
    from matplotlib.colors import to_rgb

    graph = image().plan("windows", height=HEIGHT)
    assert graph.settled is not None
    table = tiles.windows(graph.row_ptr, graph.col, graph.edge, graph.num_cols, HEIGHT)
    source, target = graph.edge_index
    left, right = figure.subplots(1, 2, sharey=True)
    pixels = torch.ones(graph.num_rows, graph.num_cols, 3)
    loads = 0
    for k, (first, last, start, stop, _) in enumerate(table.window.tolist()):
        loaded = table.col[start:stop].long()
        loads += len(loaded)
        pixels[first:last, loaded] = 0.65 + 0.35 * torch.tensor(to_rgb(COLOURS[k % 6]))
    pixels[target, source] = torch.tensor(to_rgb("0.3"))
    right.imshow(pixels.tolist())
    for first, last, *_ in table.window.tolist():
        if first < last:
            right.axhline(last - 0.5, color="0.5", linewidth=0.6)
    right.set_title(f"windows of {graph.settled.height}\n{loads} keys are loaded", fontsize=LARGE)
    pixels = torch.ones(graph.num_rows, graph.num_cols, 3)
    pixels[target, source] = torch.tensor(to_rgb("0.3"))
    left.imshow(pixels.tolist())
    left.set_title(f"gather\n{graph.num_edges} keys are loaded", fontsize=LARGE)
    for axes in (left, right):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("column", fontsize=LARGE)
    left.set_ylabel("row", fontsize=LARGE)


def _batch(figure: Figure) -> None:
    """Three graphs beside the one of which they are the blocks."""
    graphs = molecules()
    batch = Graph.batch(graphs)
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.1))
    for g, graph in enumerate(graphs):
        _nodes(left, graph, centre=(0, -2.9 * g), colour=COLOURS[g])
    left.set_title("three graphs", fontsize=LARGE)
    source, target = batch.edge_index.tolist()
    ends = batch.graph_ptr.tolist()
    owner = [g for g, (a, b) in enumerate(pairwise(ends)) for _ in range(a, b)]
    for j, i in zip(source, target, strict=True):
        _cell(right, j, i, COLOURS[owner[i]])
    for begin, end in pairwise(ends):
        box = [begin, end, end, begin, begin], [begin, begin, end, end, begin]
        right.plot(*box, color="0.4", linewidth=0.8)
    _matrix(right, batch, ends)
    right.set_title(f"their batch, graph_ptr = {ends}", fontsize=LARGE)


def _nodes(
    axes: Axes,
    graph: Graph,
    centre: tuple[float, float] = (0, 0),
    colour: str | None = None,
    numbers: bool = False,
) -> None:
    """Nodes on a circle; edges with numbers are arrows in the colour of the row, others lines."""
    count = graph.num_rows
    angles = [math.pi / 2 - 2 * math.pi * i / count for i in range(count)]
    places = [(centre[0] + math.cos(a), centre[1] + math.sin(a)) for a in angles]
    seen: dict[tuple[int, int], int] = {}
    for e, (j, i) in enumerate(graph.edge_index.T.tolist()):
        times = seen[j, i] = seen.get((j, i), -1) + 1
        bend = 0.25 - 0.6 * times if numbers else 0.0
        (x, y), (u, v) = places[j], places[i]
        style = {
            "arrowstyle": "-|>" if numbers else "-",
            "connectionstyle": f"arc3,rad={bend}",
            "color": colour or COLOURS[i],
            "shrinkA": 7 if numbers else 0,
            "shrinkB": 7 if numbers else 0,
            "linewidth": 1.1,
        }
        axes.annotate("", (u, v), (x, y), arrowprops=style)
        if numbers:
            # the middle of the bent arrow
            middle = (x + u) / 2 + bend / 2 * (v - y), (y + v) / 2 - bend / 2 * (u - x)
            box = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"}
            axes.text(*middle, str(e), fontsize=SMALL, ha="center", va="center", bbox=box)
    for i, (x, y) in enumerate(places):
        tone = colour or COLOURS[i]
        axes.plot(x, y, "o", color=tone, markersize=13 if numbers else 5)
        if numbers:
            axes.text(
                x, y, str(i), color="white", ha="center", va="center_baseline", fontsize=LARGE
            )
    axes.set_aspect("equal")
    axes.margins(0.15)
    axes.axis("off")


def _matrix(axes: Axes, graph: Graph, ends: list[int] | None = None) -> None:
    """All pairs, with a line between any two."""
    axes.set_xlim(0, graph.num_cols)
    axes.set_ylim(graph.num_rows, 0)
    axes.set_aspect("equal")
    axes.set_xlabel("column (key)", fontsize=LARGE)
    axes.set_ylabel("row (query)", fontsize=LARGE)
    if ends is None:
        places = range(graph.num_rows)
        axes.set_xticks([x + 0.5 for x in places], [str(x) for x in places], fontsize=SMALL)
        axes.set_yticks([x + 0.5 for x in places], [str(x) for x in places], fontsize=SMALL)
        for x in places:
            axes.axvline(x, color="0.85", linewidth=0.6)
            axes.axhline(x, color="0.85", linewidth=0.6)
    else:
        axes.set_xticks(ends, [str(x) for x in ends], fontsize=SMALL)
        axes.set_yticks(ends, [str(x) for x in ends], fontsize=SMALL)
    axes.tick_params(length=0)


def _cell(axes: Axes, x: float, y: float, colour: str, text: str = "") -> None:
    """A filled square at column x and row y."""
    axes.fill([x, x + 1, x + 1, x], [y, y, y + 1, y + 1], color=colour, linewidth=0)
    axes.text(x + 0.5, y + 0.5, text, color="white", ha="center", va="center", fontsize=LARGE)


def _strip(axes: Axes, top: float, lines: dict[str, list[int]], colours: list[str]) -> None:
    """Lines of cells, one under the other; the first is filled."""
    for k, (name, values) in enumerate(lines.items()):
        y = top + k
        axes.text(-0.2, y + 0.5, name, fontsize=LARGE, ha="right", va="center")
        for x, (value, colour) in enumerate(zip(values, colours, strict=True)):
            face = colour if k == 0 else "white"
            axes.fill([x, x + 1, x + 1, x], [y, y, y + 1, y + 1], facecolor=face, edgecolor=colour)
            ink = "white" if k == 0 else "black"
            axes.text(
                x + 0.5, y + 0.5, str(value), color=ink, ha="center", va="center", fontsize=LARGE
            )


def _brackets(axes: Axes, y: float, ptr: list[int], name: str) -> None:
    """Under the slots, which row or column has them; those without any are left out."""
    for i, (begin, end) in enumerate(pairwise(ptr)):
        if begin < end:
            x = [begin + 0.08, begin + 0.08, end - 0.08, end - 0.08]
            axes.plot(x, [y, y + 0.25, y + 0.25, y], color="0.3", linewidth=0.9)
            middle = (begin + end) / 2
            axes.text(middle, y + 0.4, f"{name} {i}", fontsize=SMALL, ha="center", va="top")


def _finish(axes: Axes, count: int, bottom: float) -> None:
    axes.set_xlim(-1.2, count + 0.05)
    axes.set_ylim(bottom, -1)
    axes.axis("off")


DRAWINGS: dict[str, tuple[Callable[[Figure], None], float]] = {
    "rows_and_columns": (_rows_and_columns, 2.1),
    "edge_order": (_edge_order, 2.5),
    "walks": (_walks, 2.4),
    "plan": (_plan, 2.3),
    "batch": (_batch, 2.6),
}

if __name__ == "__main__":
    run()

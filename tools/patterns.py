"""Pictures of fastgt.patterns for docs/patterns.md: who attends to whom, of every pattern.

``python tools/patterns.py`` draws them into ``docs/figures``, a PNG each. The same code gives the
same bytes with the same matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from figures import png, write_changed
from torch import Tensor

from fastgt import Graph, patterns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
COLOURS = ("C0", "C1", "C2")


class Picture(NamedTuple):
    """A pattern, where its nodes are, and the nodes whose neighbours are shown."""

    graph: Callable[[], Graph]
    shape: tuple[int, int] | None = None  # of a grid
    points: Callable[[], Tensor] | None = None
    chosen: tuple[int, ...] = ()


def run() -> None:
    """Draw what is not drawn yet, or otherwise."""
    for name in PICTURES:
        write_changed(FIGURES / f"{name}.png", drawn(name))


def drawn(name: str) -> bytes:
    """The picture of a pattern as a PNG."""
    from matplotlib.figure import Figure

    picture = PICTURES[name]
    graph = picture.graph()
    both = picture.shape is not None or picture.points is not None
    figure = Figure(figsize=(4.4, 2.3) if both else (2.3, 2.3), layout="constrained")
    *left, right = figure.subplots(1, 2 if both else 1, squeeze=False)[0]
    if picture.shape is not None:
        _grid(left[0], graph, picture.shape, picture.chosen)
    elif picture.points is not None:
        _points(left[0], graph, picture.points(), picture.chosen)
    _pairs(right, graph, picture.chosen)
    return png(figure, 100)


def _grid(axes: Axes, graph: Graph, shape: tuple[int, int], chosen: tuple[int, ...]) -> None:
    """Squares of a grid: some nodes, and those that they attend to in the same colour."""
    from matplotlib.colors import to_rgb

    height, width = shape
    image = torch.ones(height * width, 3)
    for i, colour in zip(chosen, COLOURS, strict=False):
        tone = torch.tensor(to_rgb(colour))
        image[_columns(graph, i)] = 0.5 + 0.5 * tone
        image[i] = tone
    axes.imshow(image.view(height, width, 3).tolist())
    axes.set_xticks([x - 0.5 for x in range(width + 1)], [])
    axes.set_yticks([y - 0.5 for y in range(height + 1)], [])
    axes.grid(color="0.75", linewidth=0.6)
    axes.tick_params(length=0)
    axes.set_title("nodes", fontsize=8)


def _points(axes: Axes, graph: Graph, points: Tensor, chosen: tuple[int, ...]) -> None:
    """Points and all edges, some nodes with theirs in colour."""
    from matplotlib.collections import LineCollection

    source, target = graph.edge_index
    ends = torch.stack([points[target], points[source]], 1)
    axes.add_collection(LineCollection(ends.tolist(), color="0.85", linewidth=0.5))
    axes.plot(*points.T.tolist(), "o", color="0.5", markersize=2)
    for i, colour in zip(chosen, COLOURS, strict=False):
        mine = ends[target == i].tolist()
        axes.add_collection(LineCollection(mine, color=colour, linewidth=1.0))
        axes.plot(*points[i].tolist(), "o", color=colour, markersize=5)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title("points", fontsize=8)


def _pairs(axes: Axes, graph: Graph, chosen: tuple[int, ...]) -> None:
    """Rows and columns of all pairs, the edges filled."""
    from matplotlib.colors import to_rgb

    image = torch.ones(graph.num_rows, graph.num_cols, 3)
    source, target = graph.edge_index
    image[target, source] = torch.tensor(to_rgb("0.35"))
    for i, colour in zip(chosen, COLOURS, strict=False):
        image[i, _columns(graph, i)] = torch.tensor(to_rgb(colour))
    axes.imshow(image.tolist())
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("column (key)", fontsize=7)
    axes.set_ylabel("row (query)", fontsize=7)
    axes.set_title(f"{graph.num_edges} of {graph.num_rows * graph.num_cols} pairs", fontsize=8)


def _columns(graph: Graph, i: int) -> list[int]:
    return graph.col[graph.row_ptr[i] : graph.row_ptr[i + 1]].tolist()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _cloud() -> Tensor:
    return torch.rand(48, 2, generator=_generator())


def _scores(*shape: int) -> Tensor:
    return torch.rand(shape, generator=_generator())


PICTURES = {
    "windows": Picture(lambda: patterns.windows((8, 8), 4, shift=2), (8, 8), None, (1, 27, 63)),
    "dilated": Picture(lambda: patterns.dilated((8, 8), 2, 2), (8, 8), None, (0, 27, 60)),
    "stripes": Picture(lambda: patterns.stripes((8, 8), 2, 0), (8, 8), None, (3, 44)),
    "axial": Picture(lambda: patterns.axial((8, 8), 1), (8, 8), None, (3, 44)),
    "neighborhood": Picture(lambda: patterns.neighborhood((8, 8), 3), (8, 8), None, (0, 28, 47)),
    "band": Picture(lambda: patterns.band(32, 3, 3)),
    "causal": Picture(lambda: patterns.causal(32, window=12)),
    "global_tokens": Picture(lambda: patterns.global_tokens(patterns.band(28, 2, 2), 4)),
    "random": Picture(lambda: patterns.random(32, 4, generator=_generator())),
    "expander": Picture(lambda: patterns.expander(32, 2)),
    "big_bird": Picture(lambda: patterns.big_bird(32, 2, random=2, generator=_generator())),
    "top_k": Picture(lambda: patterns.top_k(_scores(16, 32), 6)),
    "top_blocks": Picture(lambda: patterns.top_blocks(_scores(8, 8), 3, 4)),
    "knn": Picture(lambda: patterns.knn(_cloud(), 5), None, _cloud, (3, 17)),
    "radius": Picture(lambda: patterns.radius(_cloud(), 0.2), None, _cloud, (3, 17)),
    "balls": Picture(lambda: patterns.balls(_cloud(), 6), None, _cloud, (3, 17)),
    "groups": Picture(lambda: patterns.groups(torch.arange(32) % 5)),
    "sets": Picture(lambda: patterns.sets(torch.arange(32), 10, partial=True)),
    "fold_heads": Picture(
        lambda: patterns.fold_heads([patterns.causal(16), patterns.band(16, 1, 1)])
    ),
}

if __name__ == "__main__":
    run()

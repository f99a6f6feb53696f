"""Rows of results as plots, each a PNG and an SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgt import files
from fastgt.bench import table
from fastgt.testing import SCALING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
MOST = 24  # problems in one figure of bars


def plot(rows: Rows, folder: Path) -> list[Path]:
    """-> paths of what the rows are enough for: speed-ups, memory and the roofline of every
    operator, and how time and memory grow with nodes or with edges."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    if len({row["device"] for row in rows}) > 1:
        raise ValueError("rows of several devices are not drawn together")
    for operator in dict.fromkeys(row["operator"] for row in rows):
        mine = [row for row in rows if row["operator"] == operator and row["match"]]
        mine = [row for row in mine if row["dtype"] == mine[0]["dtype"]]
        grown = {name for names in SCALING.values() for name in names} - {"rmat"}
        usual = [row for row in mine if row["problem"] not in grown]
        for kind, figure in _figures(operator, mine, usual):
            for suffix, content in png_and_svg(figure):
                paths.append(folder / f"{operator}-{kind}.{suffix}")
                files.write(paths[-1], content)
    return paths


def png_and_svg(figure: Figure) -> Iterator[tuple[str, bytes]]:
    """-> suffixes and files: the same figure gives the same bytes."""
    from matplotlib import rc_context

    for suffix in ("png", "svg"):
        with rc_context({"svg.hashsalt": "fastgt"}):
            date = {"Date": None} if suffix == "svg" else None
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=110, metadata=date)
        yield suffix, buffer.getvalue()


def _figures(operator: str, mine: Rows, usual: Rows) -> Iterator[tuple[str, Figure]]:
    colours = {provider: f"C{i % 10}" for i, provider in enumerate(_providers(mine))}
    shapes: dict[str, list[tuple[int, int]]] = {}
    for row in usual:
        shapes.setdefault(row["problem"], []).append((row["heads"], row["width"]))
    # each problem as it was measured first, and those that were measured in several shapes
    first = table.usual(usual)
    for kind, rows in (("speedup", first), ("shapes", _everywhere(usual, shapes))):
        peers = _providers(rows)[1:]
        if not rows or rows[0]["provider"] not in ("fastgt", "no gate"):
            continue  # there is nothing to compare with
        if any(row["provider"] in peers and "both_x" in row for row in rows):
            yield kind, _speed_ups(operator, rows, colours)
    if len({row["problem"] for row in first if "both_peak_bytes" in row}) > 1:
        yield "memory", _memory(operator, first, colours)
    if any("both_roofline" in row for row in mine):
        yield "roofline", _roofline(operator, mine, colours)
    for what, names in SCALING.items():
        grown = [row for row in mine if row["problem"] in names]
        if len({row["problem"] for row in grown}) > 1:
            yield f"scaling-{what}", _scaling(operator, grown, what, colours)


def _everywhere(rows: Rows, shapes: dict[str, list[tuple[int, int]]]) -> Rows:
    """Problems that were measured in several shapes, one after the other, with the providers that
    all of them have."""
    several = [name for name, found in shapes.items() if len(set(found)) > 1]
    found = sorted(
        (row for row in rows if row["problem"] in several),
        key=lambda row: several.index(row["problem"]),
    )
    places = {_place(row) for row in found}
    return [
        row
        for row in found
        if places == {_place(x) for x in found if x["provider"] == row["provider"]}
    ]


def _speed_ups(operator: str, rows: Rows, colours: dict[str, str]) -> Figure:
    """How many times longer each peer takes than the first provider, forward and backward."""
    mine, *peers = _providers([row for row in rows if "both_x" in row])
    places = list(dict.fromkeys(_place(row) for row in rows))[:MOST]
    figure, axes = _figure(operator, rows, max(6.0, 2.5 + 0.7 * len(places)))
    width = 0.84 / len(peers)
    for i, peer in enumerate(peers):
        found = {_place(row): row.get("both_x") for row in rows if row["provider"] == peer}
        heights = [found.get(place) or math.nan for place in places]
        at = [j + (i - (len(peers) - 1) / 2) * width for j in range(len(places))]
        # from 1: what takes less time hangs below
        axes.bar(at, [x - 1 for x in heights], width, 1, label=peer, color=colours[peer])
    axes.axhline(1, color=colours[mine], linewidth=1.2)
    _logarithmic(axes.yaxis)
    axes.set_ylabel(f"times as long as {mine}\n(forward and backward)")
    axes.set_xticks(range(len(places)), _short(places), rotation=30, ha="right", fontsize=8)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    return figure


def _memory(operator: str, rows: Rows, colours: dict[str, str]) -> Figure:
    """Peak memory of forward and backward over the sizes of problems."""
    figure, axes = _figure(operator, rows)
    size = "edges" if "edges" in rows[0] else "rows"
    _points(axes, rows, size, "both_peak_bytes", 1e-6, colours, "o")
    axes.set_ylabel("peak memory, MB (forward and backward)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    return figure


def _scaling(operator: str, rows: Rows, what: str, colours: dict[str, str]) -> Figure:
    """Time and memory of problems that grow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    first = rows[0]
    grown = "R-MAT, 12 to 16 edges a node" if what == "nodes" else f"{first['rows']:,} nodes"
    shape = f"H={first['heads']}, D={first['width']}"
    figure.suptitle(f"{_title(operator, rows)}\n{grown}, {shape}", fontsize=9)
    size = "rows" if what == "nodes" else "edges"
    for axes, column, scale, label in zip(
        figure.subplots(1, 2),
        ("both_s", "both_peak_bytes"),
        (1e3, 1e-6),
        ("forward and backward, ms", "peak memory, MB"),
        strict=True,
    ):
        _points(axes, rows, size, column, scale, colours, "o-")
        axes.set_ylabel(label)
        axes.legend(fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _points(
    axes: Axes,
    rows: Rows,
    size: str,
    column: str,
    scale: float,
    colours: dict[str, str],
    style: str,
) -> None:
    for provider in _providers(rows):
        points = sorted(
            (row[size], row[column] * scale)
            for row in rows
            if row["provider"] == provider and column in row
        )
        if points:
            across, up = zip(*points, strict=True)
            axes.plot(across, up, style, markersize=4, label=provider, color=colours[provider])
    axes.set_xscale("log")
    _logarithmic(axes.yaxis)
    axes.set_xlabel("nodes" if size == "rows" else size)


def _roofline(operator: str, rows: Rows, colours: dict[str, str]) -> Figure:
    """Operations a second over operations a byte, under what this device copied and multiplied."""
    figure, axes = _figure(operator, rows)
    known = [row for row in rows if "both_roofline" in row]
    for provider in _providers(known):
        mine = [row for row in known if row["provider"] == provider]
        across = [row["both_flops_per_byte"] for row in mine]
        up = [row["both_flops_per_s"] / 1e9 for row in mine]
        axes.plot(across, up, "o", markersize=3, label=provider, color=colours[provider])
    reached = [row["both_flops_per_byte"] for row in known]
    ends = min(reached) / 2, max(reached) * 2
    copies = [row["copy_bytes_per_s"] for row in known]
    products = max(row["matmul_flops_per_s"] for row in known)
    for copy, style, label in (
        (min(copies), "-", "slowest copy"),
        (max(copies), ":", "fastest copy (in cache)"),
    ):
        bend = sorted({*ends, min(max(products / copy, ends[0]), ends[1])})
        roof = [min(products, copy * x) / 1e9 for x in bend]
        axes.plot(bend, roof, style, color="black", linewidth=1, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations for each byte that moves at least once")
    axes.set_ylabel("GFLOP/s (forward and backward)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    return figure


def _logarithmic(axis: Axis) -> None:
    """With ticks that are numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.axes.set_yscale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda x, place: f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _figure(operator: str, rows: Rows, wide: float = 5.5) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.set_title(_title(operator, rows), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _title(operator: str, rows: Rows) -> str:
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    first = rows[0]
    return f"{operator}, {first['dtype']}\n{first['device']}, {first['date']}, commit {commits}"


def _providers(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["provider"] for row in rows))


def _place(row: dict[str, Any]) -> str:
    return f"{row['problem']} {row['heads']}x{row['width']}"


def _short(places: list[str]) -> list[str]:
    """Without the heads where those are the same everywhere."""
    problems, shapes = zip(*(place.split() for place in places), strict=True)
    return list(problems) if len(set(shapes)) == 1 else places

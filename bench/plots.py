"""Rows of results as plots, each a PNG and an SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgt.testing import SCALING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
MOST = 24  # problems in one figure of bars


def plot(rows: Rows, folder: Path) -> list[Path]:
    """-> paths of what the rows are enough for: speed-ups, memory and the roofline of every
    operator, and how time and memory grow with nodes or with edges."""
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for operator in dict.fromkeys(row["operator"] for row in rows):
        mine = [row for row in rows if row["operator"] == operator and row["match"]]
        grown = {name for names in SCALING.values() for name in names} - {"rmat"}
        usual = [row for row in mine if row["problem"] not in grown]
        for kind, figure in _figures(operator, mine, usual):
            for suffix in ("png", "svg"):
                paths.append(folder / f"{operator}-{kind}.{suffix}")
                # the same rows give the same bytes
                with rc_context({"svg.hashsalt": "fastgt"}):
                    date = {"Date": None} if suffix == "svg" else None
                    figure.savefig(paths[-1], dpi=110, metadata=date)
    return paths


def _figures(operator: str, mine: Rows, usual: Rows) -> Iterator[tuple[str, Figure]]:
    shapes: dict[str, list[tuple[int, int]]] = {}
    for row in usual:
        shapes.setdefault(row["problem"], []).append((row["heads"], row["width"]))
    # each problem as it was measured first, and those that were measured in several shapes
    first = [row for row in usual if shapes[row["problem"]][0] == (row["heads"], row["width"])]
    several = [row for row in usual if len(set(shapes[row["problem"]])) > 1]
    for kind, rows in (("speedup", first), ("shapes", several)):
        peers = _providers(rows)[1:]
        if any(row["provider"] in peers and "both_x" in row for row in rows):
            yield kind, _speed_ups(operator, rows)
    if len({row["problem"] for row in first if "both_peak_bytes" in row}) > 1:
        yield "memory", _memory(operator, first)
    if any("both_roofline" in row for row in mine):
        yield "roofline", _roofline(operator, mine)
    for what, names in SCALING.items():
        grown = [row for row in mine if row["problem"] in names]
        if len({row["problem"] for row in grown}) > 1:
            yield f"scaling-{what}", _scaling(operator, grown, what)


def _speed_ups(operator: str, rows: Rows) -> Figure:
    """How many times longer each peer takes than the first provider, forward and backward."""
    mine, *peers = _providers([row for row in rows if "both_x" in row])
    places = list(dict.fromkeys(_place(row) for row in rows))[:MOST]
    figure, axes = _figure(operator, rows, 2.5 + 0.7 * len(places))
    width = 0.84 / len(peers)
    for i, peer in enumerate(peers):
        found = {_place(row): row.get("both_x") for row in rows if row["provider"] == peer}
        heights = [found.get(place) or math.nan for place in places]
        at = [j + (i - (len(peers) - 1) / 2) * width for j in range(len(places))]
        # from 1: what takes less time hangs below
        axes.bar(at, [x - 1 for x in heights], width, 1, label=peer, color=f"C{i + 1}")
    axes.axhline(1, color="C0", linewidth=1.2)
    axes.set_yscale("log")
    axes.set_ylabel(f"forward and backward, times {mine}'s")
    axes.set_xticks(range(len(places)), _short(places), rotation=30, ha="right", fontsize=8)
    figure.legend(loc="outside lower center", ncols=4, fontsize=7)
    return figure


def _memory(operator: str, rows: Rows) -> Figure:
    """Peak memory of forward and backward over the sizes of problems."""
    figure, axes = _figure(operator, rows)
    _curves(axes, rows, "edges" if "edges" in rows[0] else "rows", "both_peak_bytes", 1e-6)
    axes.set_ylabel("peak memory of forward and backward, MB")
    return figure


def _scaling(operator: str, rows: Rows, what: str) -> Figure:
    """Time and memory of problems that grow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(_title(operator, rows), fontsize=9)
    size = "rows" if what == "nodes" else "edges"
    for axes, column, scale, label in zip(
        figure.subplots(1, 2),
        ("both_s", "both_peak_bytes"),
        (1e3, 1e-6),
        ("forward and backward, ms", "peak memory, MB"),
        strict=True,
    ):
        _curves(axes, rows, size, column, scale)
        axes.set_ylabel(label)
    return figure


def _curves(axes: Axes, rows: Rows, size: str, column: str, scale: float) -> None:
    for i, provider in enumerate(_providers(rows)):
        points = sorted(
            (row[size], row[column] * scale)
            for row in rows
            if row["provider"] == provider and column in row
        )
        if points:
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=provider, color=f"C{i}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("nodes" if size == "rows" else size)
    axes.legend(fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _roofline(operator: str, rows: Rows) -> Figure:
    """Operations a second over operations a byte, under what this device copied and multiplied."""
    figure, axes = _figure(operator, rows)
    known = [row for row in rows if "both_roofline" in row]
    for i, provider in enumerate(_providers(known)):
        mine = [row for row in known if row["provider"] == provider]
        across = [row["both_flops_per_byte"] for row in mine]
        axes.plot(
            across,
            [row["both_flops_per_s"] / 1e9 for row in mine],
            "o",
            markersize=3,
            label=provider,
            color=f"C{i}",
        )
    reached = [row["both_flops_per_byte"] for row in known]
    ends = min(reached) / 2, max(reached) * 2
    # the slowest and the fastest copy among the problems: out of memory, or within a cache
    copies = [row["copy_bytes_per_s"] for row in known]
    products = max(row["matmul_flops_per_s"] for row in known)
    for copy, style in ((min(copies), "-"), (max(copies), ":")):
        bend = sorted({*ends, min(max(products / copy, ends[0]), ends[1])})
        roof = [min(products, copy * x) / 1e9 for x in bend]
        axes.plot(bend, roof, style, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte that must move")
    axes.set_ylabel("GFLOP/s, forward and backward")
    axes.legend(fontsize=7)
    return figure


def _figure(operator: str, rows: Rows, wide: float = 5.5) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.set_title(_title(operator, rows), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _title(operator: str, rows: Rows) -> str:
    said = [rows[0]["dtype"], rows[0]["device"], rows[0]["date"], f"commit {rows[0]['commit']}"]
    return f"{operator}, {', '.join(said)}"


def _providers(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["provider"] for row in rows))


def _place(row: dict[str, Any]) -> str:
    return f"{row['problem']} {row['heads']}x{row['width']}"


def _short(places: list[str]) -> list[str]:
    """Without the heads where those are the same everywhere."""
    problems, shapes = zip(*(place.split() for place in places), strict=True)
    return list(problems) if len(set(shapes)) == 1 else places

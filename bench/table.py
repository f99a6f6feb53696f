"""Rows of results as a table for a terminal, and what must be said beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastgt.terminal import wrapped

Rows = list[dict[str, Any]]
LONGEST_NAME = 21  # what leaves figures within the columns of a terminal
SPREAD = 0.1  # of a median, beyond which it is told
PARTS = ("forward", "backward", "both", "epoch", "inference")


def table(rows: Rows) -> str:
    """A line a provider: times, in brackets as multiples of the first one's; the peak memory of
    forward and of both; bytes a second that both move, and their share of the roofline."""
    if "batches" in rows[0]:
        return _epochs(rows)
    wide = _wide(rows)
    modelled = any("both_roofline" in row or "forward_roofline" in row for row in rows)
    head = f"{'':{wide}} {'forward ms':>17} {'backward ms':>17} {'both ms':>17} {'peak MB':>13}"
    lines = [head + (f" {'GB/s':>5} {'roof':>4}" if modelled else "")]
    for row in rows:
        if not row["match"]:
            lines.append(_failure(row, wide))
            continue
        cells = [_time(row, part) for part in PARTS[:3]]
        cells.append(f"{'/'.join(_memory(row, part) for part in ('forward', 'both')):>13}")
        if modelled:
            part = "both" if "both_s" in row else "forward"
            known = f"{part}_roofline" in row
            speed = _digits(row[f"{part}_bytes_per_s"] / 1e9) if known else "-"
            cells.append(f"{speed:>5}")
            cells.append(f"{row[f'{part}_roofline']:4.0%}" if known else f"{'-':>4}")
        lines.append(_line(row, wide, cells))
    return "\n".join([*lines, *map(wrapped, _remarks(rows))])


def size(row: dict[str, Any]) -> str:
    parts = [f"{row['rows']:,} nodes"]
    parts += [f"{row[key]:,} {key}" for key in ("edges", "graphs") if row.get(key, 1) != 1]
    return ", ".join([*parts, f"H={row['heads']}, D={row['width']}, {row['dtype']}"])


def compared(rows: Rows, before: Rows) -> Iterator[str]:
    """Medians beside those of an earlier run."""
    earlier = {key(row): row for row in before}
    for row in rows:
        then = earlier.get(key(row))
        if then is None or not (row["match"] and then["match"]):
            continue
        ratios = [
            f"{part} {row[f'{part}_s'] / then[f'{part}_s']:.2f}x"
            for part in PARTS
            if f"{part}_s" in row and f"{part}_s" in then
        ]
        where = "" if row["device"] == then["device"] else f", on {then['device']} then"
        commit = then["commit"]
        yield f"  {row['provider']} takes, of its time at {commit}{where}: {', '.join(ratios)}"


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a row of another run the same measurement."""
    names = ("operator", "problem", "dtype", "heads", "width", "batches", "provider")
    return tuple(row.get(x) for x in names)


def usual(rows: Rows) -> Rows:
    """Of every operator's problems the dtype and heads that they were measured with first."""
    shapes: dict[tuple, tuple] = {}
    names = ("dtype", "heads", "width")
    for row in rows:
        shapes.setdefault((row["operator"], row["problem"]), tuple(row[x] for x in names))
    return [
        row
        for row in rows
        if shapes[row["operator"], row["problem"]] == tuple(row[x] for x in names)
    ]


def _epochs(rows: Rows) -> str:
    """Of models: seconds of an epoch of training and of inference, and an epoch's peak memory."""
    wide = _wide(rows)
    first = rows[0]
    lines = [
        f"{first['batches']} batches, {first['layers']} layers, {first['parameters']:,} parameters",
        f"{'':{wide}} {'training epoch s':>20} {'inference s':>20} {'peak MB':>9}",
    ]
    for row in rows:
        if not row["match"]:
            lines.append(_failure(row, wide))
            continue
        times = [
            f"{row[f'{part}_s']:11.3f} "
            f"{'(' + format(row[f'{part}_x'], '.2f') + 'x)' if f'{part}_x' in row else '':>8}"
            for part in ("epoch", "inference")
        ]
        lines.append(_line(row, wide, [*times, f"{_memory(row, 'epoch'):>9}"]))
    return "\n".join([*lines, *map(wrapped, _remarks(rows))])


def _wide(rows: Rows) -> int:
    """Of the column of names: longer ones have a line of their own."""
    names = [row["provider"] for row in rows]
    return max((len(name) for name in names if len(name) <= LONGEST_NAME), default=0)


def _line(row: dict[str, Any], wide: int, cells: list[str]) -> str:
    name = row["provider"]
    if len(name) <= wide:
        return " ".join([f"{name:{wide}}", *cells])
    return "\n".join([name, " ".join([" " * wide, *cells])])


def _failure(row: dict[str, Any], wide: int) -> str:
    what = "MISMATCH: " if row["match"] is False else ""
    return wrapped(f"{row['provider']:{wide}} {what}{row['error'].splitlines()[0]}", " " * 4)


def _remarks(rows: Rows) -> Iterator[str]:
    for row in rows:
        if "backward_error" in row:
            yield f"  {row['provider']} has no backward here: {row['backward_error']}"
        wide = {part: row.get(f"{part}_spread", 0.0) for part in PARTS}
        told = [f"{part} {spread:.0%}" for part, spread in wide.items() if spread > SPREAD]
        if told:
            yield f"  {row['provider']}: times spread, of their median, by {', '.join(told)}"
        for part in ("forward", "both"):
            if f"{part}_wall_s" in row:
                replay = row.get(f"{part}_replay_s")
                graph = f"{replay * 1e3:.3f} ms" if replay else row[f"{part}_replay_error"]
                yield (
                    f"  {row['provider']}, {part}: wall {row[f'{part}_wall_s'] * 1e3:.3f} ms, "
                    f"kernels {row[f'{part}_kernel_s'] * 1e3:.3f} ms, graph replay {graph}"
                )


def _time(row: dict[str, Any], part: str) -> str:
    if f"{part}_s" not in row:
        return f"{'-':>17}"
    times = f"({_digits(row[f'{part}_x'], 2, 100)}x)" if f"{part}_x" in row else ""
    return f"{_digits(row[f'{part}_s'] * 1e3, 2):>8} {times:>8}"


def _memory(row: dict[str, Any], part: str) -> str:
    peak = row.get(f"{part}_peak_bytes")
    return "-" if peak is None else _digits(peak / 1e6)


def _digits(x: float, after: int = 1, below: float = 1000) -> str:
    """Digits after the point are for numbers below that one."""
    return f"{x:.{after if x < below else 0}f}"

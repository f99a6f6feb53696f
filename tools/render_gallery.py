"""The table of ``examples/seeds`` from the rows that ``tools/seeds.py`` measured."""

from __future__ import annotations

from typing import Any

from render_cells import Rows, machine, time

PROVIDERS = ("fastgt", "sorted", "dense", "blocks")


def gallery(rows: Rows) -> str:
    """A line for each example: its pattern, and what it takes beside dense attention."""
    lines = [
        machine(rows),
        "",
        "| seed | pattern | operator | nodes | edges | of all pairs | heads x width | fastgt "
        "| sorted | dense | blocks | fastest |",
        f"|{'---|' * 12}",
    ]
    for row in rows:
        nodes = f"{row['rows']:,}"
        if row["columns"] != row["rows"]:
            nodes += f" to {row['columns']:,}"
        cells = [
            f"[{row['seed']}](../examples/seeds/{row['seed']}.py)",
            row["pattern"],
            f"`{row['operator']}`",
            nodes,
            f"{row['edges']:,}",
            f"{row['share']:.2%}" if row["share"] < 0.1 else f"{row['share']:.0%}",
            f"{row['heads']} x {row['width']}",
            *(_provider(row.get(name)) for name in PROVIDERS),
            _fastest(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _provider(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if "refused" in found:
        return found["refused"]
    times = " / ".join(time(found, part, 1) for part in ("forward", "both"))
    return f"{times}, {found['both_peak_bytes'] / 1e6:.1f} MB"


def _fastest(row: dict[str, Any]) -> str:
    """Whose forward and backward is, and how many times longer fastgt's or the next one's is."""
    times = {
        name: row[name]["both_s"] for name in PROVIDERS if name in row and "both_s" in row[name]
    }
    first = min(times, key=times.__getitem__)
    others = [time for name, time in times.items() if name != first]
    other = times.get("fastgt") if first != "fastgt" else min(others, default=None)
    return first if other is None else f"{first}, {other / times[first]:.1f}x"

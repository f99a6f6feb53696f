"""README tables from result files, so that no figure is typed by hand.

``python -m fastgt.bench.render`` rewrites, in ``README.md``, what stands between
``<!-- table NAME -->`` and ``<!-- end -->`` from ``bench/results/NAME.json``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


def rendered(readme: str) -> str:
    """The text with every table made anew."""

    def table(match: re.Match) -> str:
        rows = json.loads((RESULTS / f"{match[1]}.json").read_text())
        return f"<!-- table {match[1]} -->\n{_table(rows)}\n<!-- end -->"

    return re.sub(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", table, readme, flags=re.DOTALL)


def _table(rows: list[dict[str, Any]]) -> str:
    if "ratio_to_design" in rows[0]:
        return _traffic(rows)
    if "reorder_s" in rows[0]:
        return _reordering(rows)
    if "active" in rows[0]:
        return _masked_heads(rows)
    if "pruned" in rows[0]:
        return _pruned(rows)
    if len({row["problem"] for row in rows}) > 5:
        return _overview(rows)
    lines = []
    problem = None
    for row in rows:
        key = [row.get(x) for x in ("problem", "rows", "edges", "heads", "width", "dtype")]
        if key != problem:
            problem = key
            parts = f"{row['edges']:,} edges" if "edges" in row else f"{row['graphs']} graphs"
            lines += [
                "" if lines else None,
                f"`{row['problem']}`: {row['rows']:,} nodes, {parts}, "
                f"H={row['heads']}, D={row['width']}, {row['dtype']}; {row['device']}, "
                f"torch {row['torch']}, {row['date']}, commit {row['commit']}.",
                "",
                "| attention | agrees | forward | forward + backward | peak extra memory |",
                "|---|---|---|---|---|",
            ]
        lines.append(_line(row))
    return "\n".join(line for line in lines if line is not None)


def _line(row: dict[str, Any]) -> str:
    if not row["match"]:
        agrees = "no" if row["match"] is False else "not run"
        return f"| {row['provider']} | {agrees} | {row['error'].splitlines()[0]} | | |"
    cells = [row["provider"], "yes"]
    for part in ("forward", "both"):
        seconds, times = row[f"{part}_s"], row[f"{part}_x"]
        cells.append(f"{seconds * 1e3:.0f} ms ({times:.1f}x)")
    forward, both = row["forward_peak_bytes"] / 1e6, row["both_peak_bytes"] / 1e6
    cells.append(f"{forward:.0f} / {both:.0f} MB")
    return f"| {' | '.join(cells)} |"


def _overview(rows: list[dict[str, Any]]) -> str:
    """One line a problem: ours, and how many times longer PyG takes."""
    first = rows[0]
    lines = [
        f"H={first['heads']}, D={first['width']}, {first['dtype']}; {first['device']}, "
        f"torch {first['torch']}, {first['date']}, commit {first['commit']}.",
        "",
        "| graph | nodes | edges | forward | forward + backward | PyG: forward | both | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ours = {row["problem"]: row for row in rows if row["provider"] == "fastgt"}
    for row in rows:
        if row["provider"] != "pyg":
            continue
        mine = ours[row["problem"]]
        cells = [f"`{row['problem']}`", f"{row['rows']:,}", f"{row['edges']:,}"]
        cells += [f"{mine[part] * 1e3:.1f} ms" for part in ("forward_s", "both_s")]
        cells += [f"{row[part]:.1f}x" for part in ("forward_x", "both_x")]
        cells.append(f"{row['both_peak_bytes'] / mine['both_peak_bytes']:.0f}x")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _traffic(rows: list[dict[str, Any]]) -> str:
    """Predicted times of the two paths on one device, heads of 128 channels."""
    lines = [
        "| graph | edges | rho16 / rho64 | gather | windows or graphs |",
        "|---|---|---|---|---|",
    ]
    shape = [row for row in rows if row["width"] == 128]
    for name in dict.fromkeys(row["problem"] for row in shape):
        found: dict[str, dict[str, Any]] = {}
        for row in shape:
            if row["problem"] == name:
                tiled = row["plan"].startswith(("windows", "graphs"))
                found["windows" if tiled else "gather"] = row
        row = next(iter(found.values()))
        cells = [f"`{name}`", f"{row['edges']:,}", f"{row['rho16']:.1f} / {row['rho64']:.1f}"]
        for path in ("gather", "windows"):
            ms = found[path]["predicted_ms"]["H200"] if path in found else None
            cells.append(f"{ms['forward']:.3f} / {ms['backward']:.3f} ms" if ms else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _reordering(rows: list[dict[str, Any]]) -> str:
    """rho64 in every order, and what finding the order costs."""
    orders = list(dict.fromkeys(row["node_order"] for row in rows))
    first = rows[0]
    lines = [
        f"{first['device']}, {first['date']}, commit {first['commit']}.",
        "",
        f"| graph | {' | '.join(orders)} |",
        f"|---|{'---|' * len(orders)}",
    ]
    for name in dict.fromkeys(row["problem"] for row in rows):
        found = {row["node_order"]: row for row in rows if row["problem"] == name}
        cells = [f"`{name}`"]
        for order in orders:
            row = found.get(order)
            cost = f" ({row['reorder_s']:.2f} s)" if row and row["reorder_s"] else ""
            cells.append(f"{row['rho64']:.2f}{cost}" if row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _masked_heads(rows: list[dict[str, Any]]) -> str:
    """Times with some of the heads, and their shares of the time with all of them."""
    first = rows[0]
    lines = [
        f"{first['rows']:,} nodes, {first['edges']:,} edges, H={first['heads']}, "
        f"D={first['width']}, {first['dtype']}; {first['device']}, torch {first['torch']}, "
        f"{first['date']}, commit {first['commit']}.",
        "",
        "| active heads | agrees | forward | forward + backward | peak extra memory |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if not row["match"]:
            lines.append(f"| {row['active']} | no | {row['error'].splitlines()[0]} | | |")
            continue
        cells = [row["active"], "yes"]
        for part in ("forward", "both"):
            cells.append(f"{row[f'{part}_s'] * 1e3:.0f} ms ({row[f'{part}_share']:.2f})")
        forward, both = (row[f"{part}_peak_bytes"] / 1e6 for part in ("forward", "both"))
        lines.append(f"| {' | '.join([*cells, f'{forward:.0f} / {both:.0f} MB'])} |")
    return "\n".join(lines)


def _pruned(rows: list[dict[str, Any]]) -> str:
    """Models with heads pruned, beside the dense one; times as shares of its own too."""
    first = rows[0]
    lines = [
        f"{first['device']}, torch {first['torch']}, {first['date']}, commit {first['commit']}.",
        "",
        "| heads pruned | parameters | test accuracy | epoch | inference: gates / removed "
        "| peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = {k: row[k] / first[k] for k in ("train_epoch_s", "inference_s", "step_peak_bytes")}
        cells = [f"{row['pruned']:.0%}", f"{row['parameters']:,}", f"{row['test_accuracy']:.3f}"]
        cells += [
            f"{row['train_epoch_s']:.2f} s ({share['train_epoch_s']:.2f})",
            f"{row['inference_s']:.2f} / {row['removed_inference_s']:.2f} s "
            f"({share['inference_s']:.2f})",
            f"{row['step_peak_bytes'] / 1e6:.0f} MB ({share['step_peak_bytes']:.2f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))

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
    lines = []
    problem = None
    for row in rows:
        key = [row[name] for name in ("problem", "rows", "edges", "heads", "width", "dtype")]
        if key != problem:
            problem = key
            lines += [
                "" if lines else None,
                f"`{row['problem']}`: {row['rows']:,} nodes, {row['edges']:,} edges, "
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
        return f"| {row['provider']} | no | {row['error'].splitlines()[0]} | | |"
    cells = [row["provider"], "yes"]
    for part in ("forward", "both"):
        seconds, times = row[f"{part}_s"], row[f"{part}_x"]
        cells.append(f"{seconds * 1e3:.0f} ms ({times:.1f}x)")
    forward, both = row["forward_peak_bytes"] / 1e6, row["both_peak_bytes"] / 1e6
    cells.append(f"{forward:.0f} / {both:.0f} MB")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rendered(path.read_text()))

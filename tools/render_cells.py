"""What cells and captions of rendered tables say of a row."""

from __future__ import annotations

from typing import Any

from fastgt.bench.table import SPREAD

Rows = list[dict[str, Any]]


def machine(rows: Rows) -> str:
    """All of them that the rows name."""
    names = ("device", "torch", "date", "commit")
    device, torch, date, commit = (
        ", ".join(dict.fromkeys(str(row[name]) for row in rows)) for name in names
    )
    return f"{device}; torch {torch}; {date}; commit {commit}."


def time(row: dict[str, Any], part: str, digits: int) -> str:
    """Marked where the times spread."""
    if f"{part}_s" not in row:
        return ""
    mark = "~" if row.get(f"{part}_spread", 0.0) > SPREAD else ""
    factor = f" ({row[f'{part}_x']:.{digits}f}x)" if f"{part}_x" in row else ""
    return f"{mark}{ms(row[f'{part}_s'])}{factor}"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.{1 if seconds < 0.1 else 0}f} ms"

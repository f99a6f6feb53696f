"""What the package sets out to reach, held against rows of results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from fastgt.bench.table import usual

Rows = list[dict[str, Any]]


class Target(NamedTuple):
    """A factor to a provider's row, in time or in memory.

    Attributes:
        device: "cpu" or "cuda".
        operator, provider: Of the row.
        column: ``forward_x`` or ``both_x``: how many times longer it takes than the first
            provider; ``memory_x``: how many times its memory.
        bound: At least; for masked heads at most.
        problems: Where; everywhere if empty.
    """

    device: str
    operator: str
    provider: str
    column: str
    bound: float
    problems: tuple[str, ...] = ()

    @property
    def at_most(self) -> bool:
        return self.operator == "masked_heads"


LAUNCH_US = 40  # of the host, of a forward on a batch of molecules
_POWER_LAW = ("power_law",)
TARGETS = (
    Target("cpu", "attention", "pyg", "forward_x", 4, _POWER_LAW),
    Target("cpu", "attention", "pyg", "both_x", 4, _POWER_LAW),
    Target("cpu", "attention", "pyg", "memory_x", 5, _POWER_LAW),
    Target("cpu", "transformer_conv", "pyg", "both_x", 4, _POWER_LAW),
    Target("cpu", "performer", "pyg, padded keys zeroed", "both_x", 3, ("ragged",)),
    # the share of active heads and a tenth
    *(
        Target(device, "masked_heads", f"{active} of 8", part, active / 8 + 0.1, _POWER_LAW)
        for device in ("cpu", "cuda")
        for active in (1, 2, 4, 6)
        for part in ("forward_x", "both_x")
    ),
    Target("cuda", "attention", "anemoi", "both_x", 1.5),
    Target("cuda", "attention", "turbo-gnn", "both_x", 1.3),
    Target("cuda", "attention", "pyg", "both_x", 10),
    Target("cuda", "attention", "pyg, compiled", "both_x", 3),
    Target("cuda", "attention", "flex attention", "both_x", 1, ("pattern", "cluster")),
    Target("cuda", "performer", "pyg, padded keys zeroed", "both_x", 10),
)


def reached(rows: Rows, device: str) -> Iterator[tuple[Target, str, float, bool]]:
    """-> for every target whose rows are there: it, the problem that is farthest from it, what was
    measured there, and whether that is enough."""
    rows = usual(rows)
    for target in TARGETS:
        if target.device != device:
            continue
        found = [
            (_factor(row, rows, target.column), row["problem"])
            for row in rows
            if row["operator"] == target.operator
            and row["provider"] == target.provider
            and (not target.problems or row["problem"] in target.problems)
        ]
        known = [(factor, problem) for factor, problem in found if factor is not None]
        if known:
            factor, problem = max(known) if target.at_most else min(known)
            enough = factor <= target.bound if target.at_most else factor >= target.bound
            yield target, problem, factor, enough


def lines(rows: Rows, device: str) -> Iterator[str]:
    """The same, a line a target."""
    for target, problem, factor, enough in reached(rows, device):
        sign = "<=" if target.at_most else ">="
        yield (
            f"{'met' if enough else 'MISSED'}: {target.operator}, {problem}, {target.provider}, "
            f"{target.column}: {factor:.3g}, target {sign} {target.bound:.3g}"
        )


def _factor(row: dict[str, Any], rows: Rows, column: str) -> float | None:
    if column != "memory_x":
        return row.get(column)
    if "both_peak_bytes" not in row:
        return None
    same = ("operator", "problem", "dtype", "heads", "width")
    for other in rows:
        if other["provider"] == "fastgt" and all(other.get(x) == row.get(x) for x in same):
            return row["both_peak_bytes"] / other["both_peak_bytes"]
    return None

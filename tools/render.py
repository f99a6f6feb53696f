"""Tables and plots of the README and the docs from result files: no figure is typed by hand.

``python tools/render.py`` rewrites, in ``README.md`` and ``docs``, what stands between a marker and
``<!-- end -->``, from ``bench/results/FILE.json``, and draws the plots of benchmark results for
the docs, in ``docs/figures/plots``:

- ``<!-- table FILE OPERATOR PROBLEM ... -->``: every provider on those problems;
- ``<!-- overview FILE OPERATOR PEER; PEER; ... -->``: a line a problem, and how many times longer
  those peers take;
- ``<!-- operators FILE -->``: a line a problem of all other operators;
- ``<!-- models FILE -->``: epochs of models;
- ``<!-- targets FILE -->``: what was set out to be reached;
- ``<!-- devices -->``: targets and attention on every GPU that there is a file of;
- ``<!-- trainings -->``: what trained models reached, from ``trainings.json``;
- ``<!-- results MODEL -->``: sizes and results of one model, published and here;
- ``<!-- sizes MODEL NAME ... -->``: parameters of published settings;
- ``<!-- seeds -->``: attention of ``examples/seeds`` beside dense attention, from ``seeds.json``;
- ``<!-- ranks KIND -->``: graphs on several ranks, from ``distributed.json``;
- ``<!-- table FILE -->``: rows of another kind.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from render_cells import Rows, machine, ms, time
from render_front import front
from render_gallery import gallery
from render_models import results, sizes, trained_alike, with_deviation
from render_ranks import of_kind
from zinc_errors import table as by_ring

from fastgt import files
from fastgt.bench import table, targets
from fastgt.bench.table import SPREAD, usual
from fastgt.testing import SCALING

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PLOTS = ROOT / "docs" / "figures" / "plots"
PLOTTED = ("attention", "transformer_conv", "performer", "masked_heads")


def run() -> None:
    """Rewrite the README of the checkout, its docs and its plots."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text()
        if (new := rendered(text)) != text:
            files.write(page, new.encode())
            print(page)
    from fastgt.bench import scaling
    from fastgt.bench.plots import plot

    for drawn in scaling.plot(_of_ranks(), PLOTS / "distributed"):
        print(drawn)
    for path in sorted(RESULTS.glob("*.json")):
        rows = json.loads(path.read_text())
        mine = [row for row in rows if row.get("operator") in PLOTTED]
        for drawn in plot(mine, PLOTS / path.stem) if mine else []:
            print(drawn)
    if (cpu := RESULTS / "cpu.json").exists():
        print(front(json.loads(cpu.read_text()), PLOTS.parent / "front.png"))


def rendered(readme: str) -> str:
    """The text with every table made anew."""

    def table(match: re.Match) -> str:
        if match[1] == "devices":
            return f"<!-- devices -->\n{_devices()}\n<!-- end -->"
        if match[1] == "trainings":
            return f"<!-- trainings -->\n{_trainings()}\n<!-- end -->"
        if match[1] == "seeds":
            return f"<!-- seeds -->\n{_seeds()}\n<!-- end -->"
        if match[1].startswith("ranks "):
            return f"<!-- {match[1]} -->\n{of_kind(match[1].split()[1], _of_ranks())}\n<!-- end -->"
        if match[1].startswith("results "):
            made = results(match[1].split()[1], _trained())
            return f"<!-- {match[1]} -->\n{made}\n<!-- end -->"
        if match[1].startswith("sizes "):
            _, model, *names = match[1].split()
            return f"<!-- {match[1]} -->\n{sizes(model, names)}\n<!-- end -->"
        kind, file, *rest = match[1].split(maxsplit=2)
        rows = json.loads((RESULTS / f"{file}.json").read_text())
        return f"<!-- {match[1]} -->\n{KINDS[kind](rows, *rest)}\n<!-- end -->"

    kinds = "|".join(KINDS)
    named = rf"(?:{kinds}|sizes) [^>]+?"
    marker = rf"<!-- (devices|trainings|seeds|(?:ranks|results) \w+|{named}) -->\n.*?<!-- end -->"
    return re.sub(marker, table, readme, flags=re.DOTALL)


def _table(rows: Rows, chosen: str = "") -> str:
    if chosen:
        operator, *problems = chosen.split()
        rows = [row for row in rows if row["operator"] == operator]
        rows = [row for row in rows if not problems or row["problem"] in problems]
        rows = usual(rows)
        return _masked_heads(rows) if operator == "masked_heads" else _providers(rows)
    if "ratio_to_design" in rows[0]:
        return _traffic(rows)
    if "reorder_s" in rows[0]:
        return _reordering(rows)
    if "rings" in rows[0]:
        return by_ring(rows)
    if "microseconds" in rows[0]:
        return _launch(rows)
    return _pruned(rows)


def _providers(rows: Rows) -> str:
    """Every provider on every problem."""
    lines: list[str] = []
    problem = None
    for row in rows:
        if row["problem"] != problem:
            problem = row["problem"]
            lines += [
                *([""] if lines else []),
                f"`{problem}`: {table.size(row)}; {machine(rows)}",
                "",
                "| provider | agrees | forward | backward | both | peak extra memory | roofline |",
                "|---|---|---|---|---|---|---|",
            ]
        lines.append(_line(row))
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    if not row["match"]:
        agrees = "no" if row["match"] is False else "not run"
        return f"| {row['provider']} | {agrees} | {_why(row)} | | | | |"
    cells = [row["provider"], "yes"]
    for part in ("forward", "backward", "both"):
        cells.append(time(row, part, 1))
    peaks = [row.get(f"{part}_peak_bytes") for part in ("forward", "both")]
    cells.append(" / ".join("" if x is None else f"{x / 1e6:.0f}" for x in peaks) + " MB")
    share = row.get("both_roofline", row.get("forward_roofline"))
    cells.append("" if share is None else f"{share:.1%}")
    return f"| {' | '.join(cells)} |"


def _why(row: dict[str, Any]) -> str:
    """Without coordinates, which are in the result file."""
    return row["error"].splitlines()[0].partition(" (eager")[0]


def _overview(rows: Rows, chosen: str) -> str:
    """One line a problem: ours, and how many times longer some peers take."""
    operator, _, names = chosen.partition(" ")
    peers = [name.strip() for name in names.split(";")]
    rows = usual([row for row in rows if row["operator"] == operator])
    grown = {problem for problems in SCALING.values() for problem in problems}
    rows = [row for row in rows if row["problem"] not in grown]  # they are drawn
    first = rows[0]
    lines = [
        f"H={first['heads']}, D={first['width']}, {first['dtype']}; {machine(rows)}",
        "",
        f"| graph | nodes | edges | forward | both | {' | '.join(peers)} | memory, {peers[0]} |",
        f"|---|---|---|---|---|{'---|' * (len(peers) + 1)}",
    ]
    for problem in dict.fromkeys(row["problem"] for row in rows):
        found = {row["provider"]: row for row in rows if row["problem"] == problem}
        mine = found["fastgt"]
        cells = [f"`{problem}`", f"{mine['rows']:,}", f"{mine['edges']:,}"]
        cells += [ms(mine[part]) if part in mine else "-" for part in ("forward_s", "both_s")]
        cells += [_factors(found.get(name, {})) for name in peers]
        peak = found.get(peers[0], {}).get("both_peak_bytes")
        known = peak is not None and "both_peak_bytes" in mine
        cells.append(f"{peak / mine['both_peak_bytes']:.0f}x" if known else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _factors(row: dict[str, Any]) -> str:
    if not row.get("match"):
        return "no" if row.get("match") is False else "-"
    return f"{_factor(row, 'forward')} / {_factor(row, 'both')}"


def _factor(row: dict[str, Any], part: str) -> str:
    if f"{part}_x" not in row:
        return "-"
    x, mark = row[f"{part}_x"], "~" if row.get(f"{part}_spread", 0.0) > SPREAD else ""
    return f"{mark}{x:.{1 if x >= 0.1 else 2}f}x"


def _operators(rows: Rows) -> str:
    """One line a problem of every operator but attention, with all its peers."""
    rows = usual(
        [
            row
            for row in rows
            if row["operator"] not in ("attention", "masked_heads") and "batches" not in row
        ]
    )
    lines = [
        machine(rows),
        "",
        "| operator | problem | forward | both | peers: forward / both "
        "| peak memory of the first that ran |",
        "|---|---|---|---|---|---|",
    ]
    for operator, problem in dict.fromkeys((row["operator"], row["problem"]) for row in rows):
        mine, *peers = (
            row for row in rows if (row["operator"], row["problem"]) == (operator, problem)
        )
        told = [f"{row['provider']} {_factors(row)}" for row in peers]
        peaks = [row["both_peak_bytes"] for row in peers if "both_peak_bytes" in row]
        known = peaks and "both_peak_bytes" in mine
        memory = f"{peaks[0] / mine['both_peak_bytes']:.1f}x" if known else ""
        times = [ms(mine[part]) if part in mine else "-" for part in ("forward_s", "both_s")]
        cells = [operator, f"`{problem}`", *times, "; ".join(told), memory]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _targets(rows: Rows) -> str:
    """Every target of this device, met or not."""
    device = "cuda" if "threads" not in rows[0]["device"] else "cpu"
    lines = ["| operator | problem | against | measured | target | |", "|---|---|---|---|---|---|"]
    what = {"forward_x": "forward", "both_x": "both", "memory_x": "memory"}
    for target, problem, factor, enough in targets.reached(rows, device):
        sign = "at most" if target.at_most else "at least"
        lines.append(
            f"| {target.operator} | `{problem}` | {target.provider}, {what[target.column]} "
            f"| {factor:.2f}x | {sign} {target.bound:.3g}x | {'met' if enough else 'missed'} |"
        )
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


def _launch(rows: Rows) -> str:
    """What a call costs the host."""
    first = rows[0]
    lines = [
        f"Kernels for {first['target']}, triton {first['triton']}; {machine(rows)}",
        "",
        "| call | microseconds of the host | target | |",
        "|---|---|---|---|",
    ]
    for row in rows:
        bound = enough = ""
        if "backward" not in row["call"]:
            bound = f"at most {targets.LAUNCH_US}"
            enough = "met" if row["microseconds"] <= targets.LAUNCH_US else "missed"
        lines.append(f"| {row['call']} | {row['microseconds']:.1f} | {bound} | {enough} |")
    return "\n".join(lines)


def _masked_heads(rows: Rows) -> str:
    """Times with some of the heads, and their shares of the time with all of them."""
    lines = [
        f"{table.size(rows[0])}; {machine(rows)}",
        "",
        "| active heads | agrees | forward | both | peak extra memory |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if not row["match"]:
            lines.append(f"| {row['provider']} | no | {_why(row)} | | |")
            continue
        cells = [row["provider"], "yes"]
        for part in ("forward", "both"):
            cells.append(time(row, part, 2))
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


def _models(rows: Rows) -> str:
    """Seconds of a training epoch and of an inference of models."""
    rows = [row for row in rows if "batches" in row]
    lines = [
        machine(rows),
        "",
        "| model | data | provider | agrees | training epoch | inference |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["operator"], f"`{row['problem']}`", row["provider"]]
        if row["match"]:
            cells += ["yes", *(time(row, part, 1) for part in _PASSES)]
        else:
            cells += ["no", _why(row), ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _devices() -> str:
    """Of every GPU that there is a result file of: targets, and attention against its peers."""
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        rows = json.loads(path.read_text())
        if rows and "operator" in rows[0] and "threads" not in rows[0]["device"]:
            mine = [row for row in rows if row["operator"] == "attention"]
            met = _targets(rows)
            peers = dict.fromkeys(row["provider"] for row in mine if row["provider"] != "fastgt")
            parts += [f"**{rows[0]['device']}**", met]
            if peers:
                parts.append(_overview(mine, f"attention {'; '.join(peers)}"))
    return "\n\n".join(parts) or "No GPU has been measured."


def _trainings() -> str:
    """A line for each model and data: what it reached, what was published, what that took."""
    rows = _trained()
    if not rows:
        return "No training has been run to its end."
    lines = [
        machine(rows),
        "",
        "| model | data | metric | test | published | runs | epochs | epoch | memory | parameters "
        "| `fastgt train` with |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for alike in dict.fromkeys(map(trained_alike, rows)):
        mine = [x for x in rows if trained_alike(x) == alike]
        first, published = mine[0], mine[0]["published"]
        told = "none"
        if published is not None:
            told = with_deviation(published["value"], published["deviation"])
            told += f" ({published['source']})"
        tests = [x["test"] for x in mine]
        deviation = statistics.stdev(tests) if len(tests) > 1 else None
        cells = [
            f"`{alike[0]}`",
            first["title"],
            first["metric"],
            with_deviation(statistics.mean(tests), deviation),
            told,
            str(len(mine)),
            str(round(statistics.mean(x["epochs"] for x in mine))),
            f"{statistics.median(x['epoch_s'] for x in mine):.3g} s",
            f"{max(x['peak_bytes'] for x in mine) / 1e6:.0f} MB",
            f"{first['parameters']:,}",
            f"`{' '.join(alike[:2])} {first['options']}`".replace(" `", "`"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _seeds() -> str:
    path = RESULTS / "seeds.json"
    if not path.exists():
        return "No seed has been measured."
    return gallery(json.loads(path.read_text()))


def _trained() -> Rows:
    path = RESULTS / "trainings.json"
    return json.loads(path.read_text()) if path.exists() else []


def _of_ranks() -> Rows:
    path = RESULTS / "distributed.json"
    return json.loads(path.read_text()) if path.exists() else []


_PASSES = ("epoch", "inference")
KINDS: dict[str, Callable[..., str]] = {
    "table": _table,
    "overview": _overview,
    "operators": _operators,
    "targets": _targets,
    "models": _models,
}


if __name__ == "__main__":
    run()

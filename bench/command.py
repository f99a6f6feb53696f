"""``fastgt bench``: operators against what users would otherwise run, on named problems.

Every provider is checked against the float64 definition before it is timed, in turns with the
others. Rows are written as they are measured: an interrupted run keeps what it has.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgt import files
from fastgt.bench import attention, linear_attention, masked_heads, transformer_conv
from fastgt.bench.peers import ATTENTION
from fastgt.testing import PROBLEMS

Rows = list[dict[str, Any]]
SPREAD = 0.1  # of a median, beyond which the table says so


@dataclass(frozen=True)
class Operator:
    """One benchmark.

    Attributes:
        run: From a problem's name, peers, device and repeats to rows.
        show: Rows as a table.
        problems: Those it has; all, unless told otherwise.
        usual, quick: Those that run where none is named.
    """

    run: Callable[..., Rows]
    show: Callable[[Rows], str]
    problems: tuple[str, ...]
    usual: tuple[str, ...]
    quick: tuple[str, ...]


_GRAPHS = ("zinc", "cora", "citeseer", "actor", "squirrel", "minesweeper", "power10k", "debian")
_MADE = ("molecules", "power_law", "pattern")
OPERATORS = {
    "attention": Operator(
        lambda problem, peers, **how: attention.run(problem, only=peers, **how),
        attention.show,
        tuple(PROBLEMS),
        (*_MADE, *_GRAPHS, "amazon_computers", "tolokers", "dd"),
        ("molecules", "power_law", *_GRAPHS[:6]),
    ),
    "transformer_conv": Operator(
        lambda problem, peers, **how: transformer_conv.run(problem, **how),
        transformer_conv.show,
        tuple(PROBLEMS),
        ("molecules", "power_law", "zinc", "cora"),
        ("molecules", "cora"),
    ),
    "linear_attention": Operator(
        lambda problem, peers, **how: linear_attention.run(**how),
        linear_attention.show,
        ("ragged",),
        ("ragged",),
        ("ragged",),
    ),
    "masked_heads": Operator(
        lambda problem, peers, **how: masked_heads.run(**how),
        masked_heads.show,
        ("power_law",),
        ("power_law",),
        ("power_law",),
    ),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "operators",
        nargs="*",
        type=_one_of("operator", OPERATORS),
        metavar="operator",
        help=f"{', '.join(OPERATORS)}; default: all",
    )
    parser.add_argument(
        "--problems",
        nargs="+",
        type=_one_of("problem", {**PROBLEMS, "ragged": None}),
        metavar="NAME",
        help="real graphs are files in the folder that FASTGT_DATA names; default: those of each "
        "operator",
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        type=_one_of("peer", ATTENTION),
        metavar="NAME",
        help=f"of attention, which alone runs then: {', '.join(map(repr, ATTENTION))}; default: "
        "all",
    )
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=9, help="default: %(default)s")
    parser.add_argument(
        "--quick", action="store_true", help="fewer problems, three repeats: minutes"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw speed-ups into this folder")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="rows of an earlier run, from --json"
    )


def run(args: argparse.Namespace) -> int:
    if args.plot is not None:
        import matplotlib  # noqa: F401  an absent extra must show before minutes of measuring
    if args.repeats < 1:
        raise ValueError(f"--repeats must be positive, got {args.repeats}")
    before = None if args.compare is None else _read(args.compare)
    found: Rows = []
    for name, problem in _chosen(args):
        operator = OPERATORS[name]
        how = {"device": args.device, "repeats": 3 if args.quick else args.repeats}
        try:
            rows = operator.run(problem, args.peers, **how)
        except FileNotFoundError as error:
            print(f"\n{name}, {problem}: skipped: {error}")
            continue
        rows = [{"operator": name} | row for row in rows]
        print(f"\n{name}, {problem}: {_size(rows[0])}")
        print(operator.show(rows))
        for line in [*_spreads(rows), *_compared(rows, before or [])]:
            print(line)
        found += rows
        _write(found, args)
    if not found:
        raise RuntimeError("nothing was measured")
    if args.plot is not None:
        for path in plot(found, args.plot):
            print(path)
    return 0


def _chosen(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    # peers can be chosen of attention alone
    for name in args.operators or (["attention"] if args.peers else OPERATORS):
        operator = OPERATORS[name]
        if args.peers and name != "attention":
            raise ValueError(f"--peers are those of attention, and {name} has its own")
        wanted = args.problems or (operator.quick if args.quick else operator.usual)
        for problem in wanted:
            if problem in operator.problems:
                yield name, problem
            elif args.operators:
                raise ValueError(
                    f"{name} has no problem {problem!r}: it has {', '.join(operator.problems)}"
                )


def _size(row: dict[str, Any]) -> str:
    parts = [f"{row['rows']:,} nodes"]
    parts += [f"{row[key]:,} {key}" for key in ("edges", "graphs") if key in row]
    return ", ".join([*parts, f"H={row['heads']}, D={row['width']}, {row['dtype']}"])


def _who(row: dict[str, Any]) -> str:
    return row.get("provider") or row["active"]


def _spreads(rows: Rows) -> Iterator[str]:
    for row in rows:
        for part in ("forward", "both"):
            spread = row.get(f"{part}_spread", 0.0)
            if spread > SPREAD:
                yield f"  {_who(row)}, {part}: times spread by {spread:.0%} of their median"


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return (*(row.get(x) for x in ("operator", "problem", "dtype", "heads", "width")), _who(row))


def _compared(rows: Rows, before: Rows) -> Iterator[str]:
    """Medians beside those of an earlier run."""
    earlier = {_key(row): row for row in before}
    for row in rows:
        then = earlier.get(_key(row))
        if then is None or not (row["match"] and then["match"]):
            continue
        parts = [
            f"{part} {row[f'{part}_s'] / then[f'{part}_s']:.2f}x" for part in ("forward", "both")
        ]
        where = "" if row["device"] == then["device"] else f", on {then['device']} then"
        commit = then["commit"]
        yield f"  {_who(row)} takes, of its time at {commit}{where}: {', '.join(parts)}"


def _read(path: Path) -> Rows:
    try:
        rows = json.loads(path.read_text())
        if not isinstance(rows, list) or not all(
            isinstance(x, dict) and {"operator", "match", "device", "commit"} <= x.keys()
            for x in rows
        ):
            raise ValueError("it holds no rows of this command")
    except (OSError, ValueError) as error:
        raise ValueError(f"--compare {path}: {error}") from error
    return rows


def _write(rows: Rows, args: argparse.Namespace) -> None:
    if args.json is not None:
        _put(args.json, json.dumps(rows, indent=1) + "\n")
    if args.csv is not None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        buffer = io.StringIO()
        table = csv.DictWriter(buffer, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        _put(args.csv, buffer.getvalue())


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, text.encode())


def plot(rows: Rows, folder: Path) -> list[Path]:
    """Bars of how many times longer each peer takes than fastgt, forward and backward: a PNG and an
    SVG for each operator that has peers which were timed."""
    from matplotlib.figure import Figure

    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(row["operator"] for row in rows):
        mine = [row for row in rows if row["operator"] == name and "both_x" in row]
        mine = [row for row in mine if row["provider"] != "fastgt"]
        if not mine:
            continue
        problems = list(dict.fromkeys(row["problem"] for row in mine))
        peers = list(dict.fromkeys(row["provider"] for row in mine))
        figure = Figure(figsize=(2 + 1.1 * len(problems), 3.6), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(peers)
        for i, peer in enumerate(peers):
            found = {row["problem"]: row["both_x"] for row in mine if row["provider"] == peer}
            heights = [found.get(problem, math.nan) for problem in problems]
            places = [j + (i - (len(peers) - 1) / 2) * width for j in range(len(problems))]
            bars = axes.bar(places, heights, width, label=peer)
            axes.bar_label(bars, fmt="{:.1f}", fontsize=7)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(problems)), problems)
        axes.set_yscale("log")
        axes.set_ylabel("times fastgt's")
        first = mine[0]
        axes.set_title(
            f"{name}, forward and backward, {first['dtype']}, {first['device']}, "
            f"commit {first['commit']}",
            fontsize=9,
        )
        axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        for kind in ("png", "svg"):
            paths.append(folder / f"{name}.{kind}")
            figure.savefig(paths[-1], dpi=130)
    return paths


def _one_of(what: str, names: Sequence[str] | dict[str, Any]) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text in names:
            return text
        near = difflib.get_close_matches(text, names, 1, 0.5)
        hint = f": did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"no {what} is called {text!r}{hint}")

    return check

"""``fastgt bench``: operators against what users would otherwise run, on named problems.

Every provider is checked against the float64 definition before it is timed, in turns with the
others. Rows are written as they are measured: an interrupted run keeps what it has, and goes on
from there with ``--resume``.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from fastgt import files
from fastgt.bench import harness, table, targets
from fastgt.bench.operators import EXTERNAL, OPERATORS, SHAPES, Operator
from fastgt.options import device_named, one_of
from fastgt.terminal import STDOUT, text_on_stderr, wrapped
from fastgt.testing import PROBLEMS, SCALING

Rows = list[dict[str, Any]]
DTYPES = ("fp32", "fp16", "bf16")
_TEXTS = ("operator", "problem", "provider", "dtype", "device", "commit", "date")
_FIRST = {operator.first for operator in OPERATORS.values()}
PEERS = list(dict.fromkeys(peer for operator in OPERATORS.values() for peer in operator.peers))


class _Choice(NamedTuple):
    operator: str
    problem: str
    repeats: int
    options: dict[str, Any]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "operators",
        nargs="*",
        type=one_of("operator", OPERATORS),
        metavar="operator",
        help=f"{', '.join(OPERATORS)}; default: all",
    )
    parser.add_argument(
        "--problems",
        nargs="+",
        type=one_of("problem", [*PROBLEMS, "ragged"]),
        metavar="NAME",
        help="real graphs are files in the folder that FASTGT_DATA names; default: those of each "
        "operator",
    )
    parser.add_argument(
        "--scaling",
        choices=SCALING,
        help="problems that grow, in nodes or in edges; --most ends them",
    )
    parser.add_argument(
        "--most", type=int, default=2_000_000, help="edges of --scaling; default: %(default)s"
    )
    parser.add_argument(
        "--peers",
        nargs="+",
        type=one_of("peer", PEERS),
        metavar="NAME",
        help=f"{', '.join(map(repr, PEERS))}; default: all of an operator",
    )
    parser.add_argument(
        "--peer-path",
        type=Path,
        metavar="DIR",
        help="where sources of other GPU kernels are checked out: anemoi-core, turbo-gnn, "
        "flash-bidirectional-linear-attention",
    )
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="default: %(default)s")
    parser.add_argument("--heads", type=int, help="default: each operator's own, mostly 8")
    parser.add_argument("--width", type=int, help="of a head; default: each operator's, mostly 16")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=one_of("shape", SHAPES),
        metavar="NAME",
        help="heads and width of published models: "
        + ", ".join(f"{name} {h}x{d}" for name, (h, d) in SHAPES.items()),
    )
    parser.add_argument("--repeats", type=int, default=9, help="default: %(default)s")
    parser.add_argument(
        "--quick", action="store_true", help="fewer problems, three repeats: minutes"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the rows to this file; -: to stdout, at the end",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that --json's file has, go on"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument(
        "--plot", type=Path, metavar="DIR", help="draw speed-ups, scaling, memory and the roofline"
    )
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="rows of an earlier run, from --json"
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="measure on --device which path attention takes through a graph, and write the table "
        "of plans, and seconds of other tiles to the file of --json; no benchmark runs",
    )


def run(args: argparse.Namespace) -> int:
    as_json = args.json == STDOUT
    if args.tune:
        from fastgt.bench import tune

        if as_json:
            raise ValueError("--tune writes tables to files: name one with --json")
        tune.run(args.device, args.json)
        return 0
    if args.plot is not None:
        import matplotlib  # noqa: F401  an absent extra must show before minutes of measuring
    _check(args)
    with ExitStack() as locks:
        for path in (None if as_json else args.json, args.csv, args.plot):
            if path is not None:  # another run's rows would be lost without a word
                locks.enter_context(files.lock(path))
        with text_on_stderr(as_json):
            found = _run(args)
            wrong = [x for x in found if x["match"] is not True and x["provider"] in _FIRST]
            for row in wrong:
                where = f"{row['operator']}, {row['problem']}: {row['provider']}"
                print(wrapped(f"{where}: {row['error']}"))
    if as_json:
        print(json.dumps(found, indent=1))
    return 1 if wrong else 0


def _run(args: argparse.Namespace) -> Rows:
    """All rows, those that were there before too."""
    before = [] if args.compare is None else _read(args.compare, "--compare")
    where = harness.environment(device_named(args.device))
    kept = _kept(args, where)
    found = list(kept)
    chosen = [x for x in _chosen(args) if not _has(kept, x, where, args)]
    what = [where["device"], f"torch {where['torch']}", f"commit {where['commit']}"]
    print(wrapped(", ".join(what)))
    if kept:
        print(f"{args.json} has {len(kept)} rows; {len(chosen)} problems are left", flush=True)
    for number, choice in enumerate(chosen, 1):
        rows = _measure(choice, args, f"{number}/{len(chosen)}")
        if rows is None:
            continue
        new = {table.key(row) for row in rows}
        found = [row for row in found if table.key(row) not in new] + rows
        _write(found, args)  # before it is told: nobody may be there to hear
        print("\n" + wrapped(f"{choice.operator}, {choice.problem}: {table.size(rows[0])}"))
        print(table.table(rows), flush=True)
        for line in table.compared(rows, before):
            print(wrapped(line))
    if not found:
        raise RuntimeError("nothing was measured")
    told = list(targets.lines(found, args.device.partition(":")[0]))
    if told:
        print("\n".join(["", f"targets, of {len(found)} rows:", *map(wrapped, told)]))
    if args.plot is not None:
        from fastgt.bench.plots import plot

        for path in plot(found, args.plot):
            print(path)
    return found


def _measure(choice: _Choice, args: argparse.Namespace, where: str) -> Rows | None:
    """Its rows; None, with the reason printed, where the problem is not there or does not fit."""
    from tqdm import tqdm

    operator = OPERATORS[choice.operator]
    peers = len(operator.peers) if args.peers is None else len(args.peers)
    with tqdm(total=peers + 3, leave=False, disable=None) as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers' deprecations and betas

        def tell(what: str) -> None:
            bar.set_description(f"{where} {choice.operator}, {choice.problem}: {what}")
            bar.update()

        try:
            tell("loading")
            if operator.epochs is not None:
                rows = operator.epochs(
                    choice.problem,
                    only=args.peers,
                    repeats=choice.repeats,
                    batches=2 if args.quick else 8,
                    **choice.options,
                )
            else:
                case = operator.case(choice.problem, **choice.options)
                rows = harness.compare(case, repeats=choice.repeats, only=args.peers, tell=tell)
        except (FileNotFoundError, ImportError) as error:
            why = f"skipped: {error}"
        except ValueError as error:  # widths that an operator does not have, and the like
            why = f"refused: {error}"
        except (MemoryError, RuntimeError) as error:
            if not _of_memory(error):
                raise
            why = f"does not fit: {harness.reason(error)}"
        else:
            return [{"operator": choice.operator} | row for row in rows]
    print("\n" + wrapped(f"{choice.operator}, {choice.problem}: {why}"), flush=True)
    return None


def _of_memory(error: Exception) -> bool:
    said = str(error)
    return isinstance(error, MemoryError) or any(
        what in said for what in ("out of memory", "can't allocate memory")
    )


def _check(args: argparse.Namespace) -> None:
    for name in ("repeats", "heads", "width", "most"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be positive, got {value}")
        if value is not None and value > 2**31 - 1:
            raise ValueError(f"--{name} must be at most {2**31 - 1}, got {value}")
    if args.shapes and (args.heads or args.width):
        raise ValueError("--shapes names heads and widths: leave --heads and --width out")
    if args.scaling and args.problems:
        raise ValueError("--scaling names problems: leave --problems out")
    if args.resume and args.json in (None, STDOUT):
        raise ValueError("--resume goes on with the rows of a file: name it with --json")
    if args.peer_path is not None and not args.peer_path.is_dir():
        raise ValueError(f"--peer-path {args.peer_path}: no such folder")
    # before minutes of measuring
    for option in ("json", "csv", "plot"):
        path = getattr(args, option)
        if path is None or (option == "json" and path == STDOUT):
            continue
        folder = path if option == "plot" else path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--{option} {path}: {error.strerror}") from error
        if option != "plot" and path.is_dir():
            raise ValueError(f"--{option} {path}: it is a folder")


def _chosen(args: argparse.Namespace) -> Iterator[_Choice]:
    for name in args.operators or OPERATORS:
        operator = OPERATORS[name]
        wanted = args.problems or (operator.quick if args.quick else operator.usual)
        if args.scaling:
            wanted = [p for p in SCALING[args.scaling] if _edges(p) <= args.most]
        if args.peers and not set(args.peers) & set(operator.peers):
            if args.operators:
                raise ValueError(f"{name} has no such peer: it has {_list(operator.peers)}")
            continue
        missing = set(args.peers or ()) & set(operator.peers) & EXTERNAL
        if missing and args.peer_path is None:
            raise ValueError(f"--peers {_list(missing)}: name their folder with --peer-path")
        shapes = [(args.heads, args.width)]
        if args.shapes and operator.takes("width"):
            shapes = [SHAPES[x] for x in args.shapes]
        elif args.operators and (args.shapes or not _sized(operator, args)):
            raise ValueError(f"{name} has heads and widths of its own")
        elif args.shapes:
            continue
        repeats = 2 if args.quick else 5
        if operator.epochs is None:
            repeats = 3 if args.quick else args.repeats
        for problem in wanted:
            if problem not in operator.problems:
                if args.operators:
                    names = _list(operator.problems)
                    raise ValueError(f"{name} has no problem {problem!r}: it has {names}")
                continue
            for heads, width in shapes:
                options = operator.options(
                    heads=heads,
                    width=width,
                    dtype=_dtype(args.dtype),
                    device=device_named(args.device),
                    peer_path=args.peer_path,
                )
                yield _Choice(name, problem, repeats, options)


def _sized(operator: Operator, args: argparse.Namespace) -> bool:
    """Whether it takes the sizes that were given."""
    given = [name for name in ("heads", "width") if getattr(args, name) is not None]
    return all(operator.takes(name) for name in given)


def _edges(problem: str) -> int:
    """About how many a growing problem has."""
    kind, _, number = problem.partition("_")
    return (16 << int(number or 15)) if kind == "rmat" else int(number) << 14


def _list(names: Collection[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _dtype(name: str) -> Any:
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]


def _kept(args: argparse.Namespace, where: dict[str, str]) -> Rows:
    """The rows to go on from, of the same device."""
    if not args.resume or not args.json.exists():
        return []
    rows = _read(args.json, "--resume")
    others = {row["device"] for row in rows} - {where["device"]}
    if others:
        raise ValueError(
            f"--resume: {args.json} has rows of {', '.join(sorted(others))}, and this is "
            f"{where['device']}: name another file"
        )
    return rows


def _has(rows: Rows, choice: _Choice, where: dict[str, str], args: argparse.Namespace) -> bool:
    """Whether all of it is there, from this commit; what is not committed does not count, for the
    rows themselves may be that."""
    same = {
        "operator": choice.operator,
        "problem": choice.problem,
        "dtype": str(choice.options["dtype"]).removeprefix("torch."),
        **OPERATORS[choice.operator].sizes(choice.options),
    }
    commit = where["commit"].removesuffix("-dirty")
    operator = OPERATORS[choice.operator]
    peers = set(operator.peers) - (EXTERNAL if args.peer_path is None else set())
    wanted = {operator.first, *(peers if args.peers is None else peers & set(args.peers))}
    there = {
        row["provider"]
        for row in rows
        if same.items() <= row.items()
        and row["commit"].removesuffix("-dirty") == commit
        and row["repeats"] >= choice.repeats
        and (args.quick or row.get("batches") != 2)
    }
    return wanted <= there


def _read(path: Path, option: str) -> Rows:
    try:
        rows = json.loads(path.read_text())
        if not isinstance(rows, list) or not all(map(_is_row, rows)):
            raise ValueError("it holds no rows of this command")
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} {path}: {error}") from error
    return rows


def _is_row(row: Any) -> bool:
    """Whether all is there that is gone by here."""
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(name), str) for name in _TEXTS)
        and all(isinstance(row.get(name), int) for name in ("rows", "heads", "width", "repeats"))
        and row.get("match") in (True, False, None)
        and (row["match"] is True or isinstance(row.get("error"), str))
        and all(_positive(x) for name, x in row.items() if name.endswith(("_s", "_x", "_bytes")))
    )


def _positive(x: Any) -> bool:
    return isinstance(x, (int, float)) and x > 0


def _write(rows: Rows, args: argparse.Namespace) -> None:
    if args.json not in (None, STDOUT):
        _put(args.json, json.dumps(rows, indent=1) + "\n")
    if args.csv is not None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        _put(args.csv, buffer.getvalue())


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, text.encode())

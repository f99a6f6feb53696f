"""What every kernel configuration takes on GPUs that need not be here, from compiling it.

``fastgt report kernels`` compiles ahead of time (``fastgt.kernels.ahead``), minutes for a target:
bytes loaded for an edge (windows: for an entry of one head; combining: for a segment) against what
the design loads, 16-byte loads, the bytes of a row that a thread of the loop takes at once, tensor-
core instructions and those of them that are Hopper's wgmma, registers, spilled bytes, shared
memory, and warps that one processor holds. Nothing is launched: it says what a kernel asks for,
not how long it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from fastgt import files
from fastgt.terminal import STDOUT, text_on_stderr

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        choices=TARGETS,
        nargs="+",
        default=["sm_90"],
        metavar="NAME",
        help=f"{', '.join(TARGETS)}; default: sm_90",
    )
    parser.add_argument("--only", default="", help="configurations with this in their name")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the figures to this file, one line a kernel; -: to stdout",
    )


def run(args: argparse.Namespace) -> int:
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    from fastgt.kernels.ahead import compile_ahead
    from fastgt.kernels.cases import CASES

    found = {}
    for target in args.target:

        def tell(case: str, target: str = target) -> None:
            print(f"compiling {case} for {target}", file=sys.stderr, flush=True)

        found[target] = compile_ahead(target, args.only, tell)
        if not found[target]:
            names = ", ".join(CASES)
            raise ValueError(f"--only {args.only}: no configuration has that in its name: {names}")
        with text_on_stderr(args.json == STDOUT):
            print(show(target, found[target]), end="\n\n", flush=True)
    if args.json == STDOUT:
        print(written(found), end="")
    elif args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        files.write(args.json, written(found).encode())
    return 0


def written(figures: dict[str, dict[str, dict[str, int]]]) -> str:
    """The figures of targets as JSON, one line a kernel."""
    targets = []
    for target, kernels in figures.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(k)}" for name, k in kernels.items())
        targets.append(f" {json.dumps(target)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(targets) + "\n}\n"


def show(target: str, kernels: dict[str, dict[str, int]]) -> str:
    """One target's figures as a table for a terminal."""
    from fastgt.kernels.resources import PROCESSORS

    most = 4 * PROCESSORS[target].warps
    names = [name.partition("/") for name in kernels]
    wide = max(len(kernel.removesuffix("_kernel")) for _, _, kernel in names)
    lines = [
        f"{target:{wide}}  {'bytes':>5} {'design':>6} {'ratio':>5} {'16 B':>4} {'row':>3} "
        f"{'dots':>4} {'wgmma':>5} {'regs':>4} {'stack':>5} {'shared':>6} {'warps':>8}"
    ]
    before = None
    for (case, _, kernel), k in zip(names, kernels.values(), strict=True):
        if case != before:
            lines.append(case)
        before = case
        design = k.get("step_bytes_design")
        ratio = f"{k['step_bytes'] / design:5.2f}" if design else "     "
        lines.append(
            f" {kernel.removesuffix('_kernel'):{wide}} {k['step_bytes']:5} {design or '':6} "
            f"{ratio} {k['wide_loads']:4} {k['row_load']:3} {k['tensor_core_products']:4} "
            f"{k['wgmma']:5} {k['registers']:4} {k['stack']:5} {k['shared']:6} "
            f"{k['resident_warps']:2} of {most}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments(parser)
    try:
        run(parser.parse_args())
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

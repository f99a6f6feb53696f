"""``make pyg-tests SRC=checkout``: torch-geometric's own tests on the layers of fastgt.pyg.

``checkout`` is a checkout of torch-geometric's sources. Test files that import a layer which
fastgt.pyg has are copied with that import from fastgt.pyg and nothing else changed, and run, full
tests as torch-geometric calls them included. Counts are printed, for the copies and, with
``--beside``, for the files as they are. Other options go to pytest.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


def main(argv: Sequence[str] | None = None) -> int:
    """-> exit status: 0 if no test fails; with ``--beside``, if none does that passes as it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--beside", action="store_true", help="the files as they are, too")
    args, options = parser.parse_known_args(argv)
    if not (args.checkout / "test" / "nn").is_dir():
        raise SystemExit(f"{args.checkout} has no test/nn: it is no checkout of torch-geometric")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(args.checkout / "test", copy / "test")
        # markers and filters of warnings
        shutil.copy(args.checkout / "pyproject.toml", copy)
        files = [path for path in sorted((copy / "test").rglob("test_*.py")) if names(path)]
        theirs = run(copy, files, options) if args.beside else None
        for path in files:
            substitute(path)
        ours = run(copy, files, options)
    print(f"{len(files)} files on fastgt.pyg: {ours.counts}")
    failed = ours.failed
    if theirs is not None:
        print(f"{len(files)} files as they are: {theirs.counts}")
        failed = failed - theirs.failed
        print("\n".join(f"only on fastgt.pyg: {name}" for name in sorted(failed)))
    return 1 if failed or not ours.counts else 0


def layers() -> set[str]:
    """The classes that fastgt.pyg has under torch-geometric's names."""
    import torch_geometric.nn
    import torch_geometric.nn.attention

    import fastgt.pyg

    where = torch_geometric.nn, torch_geometric.nn.attention
    return {name for name in fastgt.pyg.__all__ if any(hasattr(x, name) for x in where)}


def imports(path: Path) -> list[ast.ImportFrom]:
    """The imports of torch-geometric's layers, by name."""
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch_geometric.nn")
    ]


def names(path: Path) -> set[str]:
    """The layers of fastgt.pyg that a file imports from torch-geometric."""
    return {alias.name for node in imports(path) for alias in node.names} & layers()


def substitute(path: Path) -> None:
    """Import from fastgt.pyg what it has."""
    ours, lines = layers(), path.read_text().splitlines(keepends=True)
    for node in reversed(imports(path)):
        kept = [x for x in node.names if x.name not in ours]
        taken = [x for x in node.names if x.name in ours]
        if not taken:
            continue
        space = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [
            f"{space}from {module} import {', '.join(map(ast.unparse, some))}\n"
            for module, some in ((node.module, kept), ("fastgt.pyg", taken))
            if some
        ]
    path.write_text("".join(lines))


class Ran(NamedTuple):
    """What pytest said."""

    counts: str  # "" if it came to no end
    failed: set[str]


def run(folder: Path, files: Sequence[Path], options: Sequence[str]) -> Ran:
    """Run the tests of these files."""
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no")
    environment = os.environ | {"FULL_TEST": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*command, "-o", "addopts=", "-m", "not rag and not dataset", *options, *map(str, files)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    counts, failed = "", set()
    for line in process.stdout:
        print(line, end="", flush=True)
        if re.match(r"\d+ \w+, .* in [\d.]+s", line) or re.match(r"\d+ passed", line):
            counts = line.strip()
        elif found := re.match(r"(?:FAILED|ERROR) (\S+)", line):
            failed.add(found[1])
    process.wait()
    return Ran(counts, failed)


if __name__ == "__main__":
    sys.exit(main())

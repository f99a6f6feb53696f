"""What the programs of ``examples/`` print, in docs/examples.md, and outputs in their notebook.

``python tools/example_outputs.py`` runs all of them and writes what they say. The page has a link
to each program and, after it, a block of text with its output.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PAGE = ROOT / "docs" / "examples.md"
NOTEBOOK = EXAMPLES / "first_steps.ipynb"
PROGRAM = re.compile(r"\]\(\.\./examples/(\w+)\.py\)(.*?```text\n)(.*?)```", re.DOTALL)


def main() -> None:
    def with_output(found: re.Match) -> str:
        return found[0][: found.start(3) - found.start()] + printed(found[1]) + "```"

    PAGE.write_text(PROGRAM.sub(with_output, PAGE.read_text()))
    done = executed(json.loads(NOTEBOOK.read_text()))
    NOTEBOOK.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n")


def outputs() -> dict[str, str]:
    """Of each program, what the page says that it prints."""
    return {name: text for name, _, text in PROGRAM.findall(PAGE.read_text())}


def printed(name: str, *launcher: str) -> str:
    """What a program prints, on one thread."""
    ended = subprocess.run(
        [sys.executable, *launcher, EXAMPLES / f"{name}.py"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def executed(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of its cells, run one after another.

    What cells set of PyTorch, seeds and the form of printed tensors, ends with the notebook.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    cells, number = [], 0
    try:
        with torch.random.fork_rng():
            for cell in notebook["cells"]:
                if cell["cell_type"] == "code":
                    number += 1
                    found = _outputs("".join(cell["source"]), number, names)
                    cell = cell | {"execution_count": number, "outputs": found}
                cells.append(cell)
    finally:
        torch.set_printoptions(profile="default")
    return notebook | {"cells": cells}


def _outputs(source: str, number: int, names: dict[str, Any]) -> list[dict[str, Any]]:
    """What a cell prints, and its last line's value where that is an expression."""
    body = ast.parse(source)
    last = body.body.pop() if isinstance(body.body[-1], ast.Expr) else None
    said, place = io.StringIO(), f"<cell {number}>"
    with contextlib.redirect_stdout(said):
        exec(compile(body, place, "exec"), names)
        value = eval(compile(ast.Expression(last.value), place, "eval"), names) if last else None
    found: list[dict[str, Any]] = []
    if text := said.getvalue():
        lines = text.splitlines(keepends=True)
        found.append({"name": "stdout", "output_type": "stream", "text": lines})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        kind = {"execution_count": number, "output_type": "execute_result"}
        found.append({"data": data, "metadata": {}, **kind})
    return found


if __name__ == "__main__":
    main()

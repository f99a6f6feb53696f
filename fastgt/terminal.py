"""What commands print: lines of 100 columns, or JSON alone."""

from __future__ import annotations

import sys
import textwrap
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path

COLUMNS = 100
STDOUT = Path("-")  # as the FILE of an option


def wrapped(line: str, indent: str = "  ") -> str:
    """As many lines as 100 columns take, the later ones indented. A word that is longer, as a path
    may be, stays whole.

    Example:
        >>> [len(line) for line in wrapped(30 * "too large ").splitlines()]
        [99, 95, 97, 11]
    """
    return textwrap.fill(
        line,
        COLUMNS,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def text_on_stderr(moved: bool) -> AbstractContextManager:
    """Where ``moved``, what is printed inside goes to stderr, so that stdout has JSON alone."""
    return redirect_stdout(sys.stderr) if moved else nullcontext()

"""Docstrings as the site's generator reads them: a griffe extension.

Docstrings here have roles of Sphinx, ``::`` before indented blocks, and ``Example:`` before what a
test runs. The site has links, indented blocks and ``Examples:``.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parent.parent
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?\.?([\w.]+)`")


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)
        if obj.is_function:
            obj.overloads = None  # type: ignore[attr-defined]  # the last signature has them all


def readable(text: str) -> str:
    """The docstring in Markdown of Google's style.

    Example:
        >>> readable("As :func:`fastgt.aggregate` does::")
        'As [`aggregate`][fastgt.aggregate] does:'
        >>> readable("Example:\\n    >>> 1")
        'Examples:\\n    >>> 1'
    """
    text = _ROLE.sub(_link, text)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


@cache
def told() -> frozenset[str]:
    """The names that the pages of ``docs/api`` have."""
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    found = (re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE) for page in pages)
    return frozenset(name for names in found for name in names)


def _link(match: re.Match) -> str:
    """To what stands on a page, or to a method of it; else the word alone."""
    name = match[1]
    if name in told() or name.rpartition(".")[0] in told():
        return f"[`{name.removeprefix('fastgt.')}`][{name}]"
    return f"`{name}`"

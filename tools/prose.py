"""The documents in plain English: sentences that are short, and words of the glossary.

``python tools/prose.py`` names every sentence of the README and of ``docs/*.md`` that has more than
``LONGEST`` words, and every word that another one stands for here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LONGEST = 30
# one word, one meaning: docs/glossary.md
INSTEAD = {
    r"\bheads? mask(s)?\b": "head gate",
    r"\bthose that there are\b": "name them",
    r"\butiliz": "use",
    r"\bleverag": "use",
    r"\bvertex|\bvertices\b": "node",
    r"\bdestination nodes?\b": "row, or target in from_edge_index",
    r"\be\.g\.": "for example",
    r"\bi\.e\.": "that is",
}


def main() -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = [line for page in pages for line in problems(page)]
    print("\n".join(found) or f"{len(pages)} pages: nothing to change")
    sys.exit(bool(found))


def problems(page: Path) -> Iterator[str]:
    """``PAGE: what is wrong: the sentence``."""
    for sentence in sentences(page.read_text()):
        words = len(re.findall(r"[\w'-]+", sentence))
        if words > LONGEST:
            yield f"{page.name}: {words} words: {sentence}"
        for pattern, instead in INSTEAD.items():
            if match := re.search(pattern, sentence, re.IGNORECASE):
                yield f"{page.name}: {match[0]!r}, say {instead!r}: {sentence}"


def sentences(text: str) -> Iterator[str]:
    """What is prose in a page: no code, formulas, tables, headings, targets or rendered parts."""
    text = re.sub(r"```.*?```|<!-- .*?-->.*?<!-- end -->", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\$\$.*?\$\$", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"`[^`]*`|\$[^$\n]+\$", "X", text)
    for block in re.split(r"\n\s*\n|\n(?=[-*] )", text):
        lines = [line for line in block.splitlines() if not re.match(r"\s*[|#>]", line)]
        prose = re.sub(r"\s+", " ", " ".join(lines)).strip("-* ")
        for sentence in re.split(r"(?<=[.!?:;])\s+(?=[A-Z\[`(*])", prose):
            if sentence:
                yield sentence


if __name__ == "__main__":
    main()

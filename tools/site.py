"""What ``mkdocs build`` does beside its plugins: the front page and the links out of the site.

``README.md`` is the front page, and ``CONTRIBUTING.md`` and ``CHANGELOG.md`` are pages too. A link
to a file of the checkout that is no page, to an example for one, becomes text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


# pages that stand beside docs/ in a checkout
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the front page and what else stands beside the docs."""
    from mkdocs.structure.files import File

    for name, page in OUTSIDE.items():
        text = (ROOT / name).read_text().replace("](docs/", "](")
        for other, its_page in OUTSIDE.items():
            text = text.replace(f"]({other}", f"]({its_page}")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Make text of links to files of the checkout that are no pages."""

    def link(match: re.Match) -> str:
        target = match[2].partition("#")[0]
        outside = page.file.src_uri in OUTSIDE.values()
        place = ROOT / target if outside else (ROOT / "docs" / page.file.src_uri).parent / target
        place = place.resolve()
        # what is there, and no page; a link that leads nowhere is left for mkdocs to refuse
        if target and place.exists() and not place.is_relative_to(ROOT / "docs"):
            return match[1]
        return match[0]

    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s:]+)\)", link, markdown)

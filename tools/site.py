"""What ``mkdocs build`` does beside its plugins: the front page, links out of the site, formulas.

``README.md`` is the front page, and ``CONTRIBUTING.md`` and ``CHANGELOG.md`` are pages too, as is
the notebook of ``examples/``. On the page of the examples, the code of each stands below the words
on it. A link to a file of the checkout that is no page becomes text, and so does one to the
repository's own site, as the changelog has for every version. Formulas of TeX become MathML, which
browsers draw without a script.
"""

from __future__ import annotations

import html
import json
import os
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
    notebook = json.loads((ROOT / "examples" / "first_steps.ipynb").read_text())
    files.append(File.generated(config, "first-steps.md", content=_page_of(notebook)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put code below the words on an example, and make text of links to what is no page."""
    if page.file.src_uri == "examples.md":
        markdown = re.sub(
            r"\]\(\.\./(examples/\w+\.py)\).*?\n\n",
            lambda words: f"{words[0]}{_block('python', (ROOT / words[1]).read_text(), words[1])}",
            markdown,
            flags=re.DOTALL,
        )
        markdown = markdown.replace("```text\n", '```text title="prints"\n')
    folder = (ROOT / "docs" / page.file.src_uri).parent

    def link(match: re.Match) -> str:
        target, anchor, place_in_it = match[2].partition("#")
        outside = page.file.src_uri in OUTSIDE.values()
        place = ((ROOT if outside else folder) / target).resolve()
        if place.parent == ROOT and not outside and place.name in OUTSIDE:
            its_page = os.path.relpath(ROOT / "docs" / OUTSIDE[place.name], folder)
            return f"[{match[1]}]({its_page}{anchor}{place_in_it})"
        # what is there, and no page; a link that leads nowhere is left for mkdocs to refuse
        if target and place.exists() and not place.is_relative_to(ROOT / "docs"):
            return match[1]
        return match[0]

    markdown = re.sub(r"^\[[^\]]+\]: \.\./\.\./\S+\n?", "", markdown, flags=re.MULTILINE)
    return re.sub(r"(?<!!)\[([^\]]*)\]\(([^)\s:]+)\)", link, markdown)


def _page_of(notebook: dict[str, Any]) -> str:
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(_block("python", source) if cell["cell_type"] == "code" else source + "\n")
        for output in cell.get("outputs", []):
            said = output["text"] if "text" in output else output["data"]["text/plain"]
            parts.append(_block("text", "".join(said)))
    return "\n".join(parts)


def _block(language: str, text: str, title: str = "") -> str:
    head = f'{language} title="{title}"' if title else language
    return f"```{head}\n{text.rstrip()}\n```\n\n"


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Make MathML of what arithmatex found between dollars."""
    return re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', _formula, html, flags=re.DOTALL
    )


def _formula(match: re.Match) -> str:
    from latex2mathml.converter import convert

    source = html.unescape(match[2]).strip()
    block = match[1] == "div"
    made = convert(source, display="block" if block else "inline")
    # what the converter does not know stays there as it was
    if unknown := re.search(r">(\\\w*|&)<", made):
        raise ValueError(f"{unknown[1]} cannot be made MathML, in {source!r}")
    return f'<div class="math">{made}</div>' if block else made

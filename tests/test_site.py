"""The site: its formulas, its search, its pictures, and that it builds strictly."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgt import models
from fastgt.training.published_recipes import MODELS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def hooks():
    """``tools/site.py``, whose name Python's own ``site`` has too."""
    spec = importlib.util.spec_from_file_location("hooks_of_the_site", ROOT / "tools" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a strict build; a link that leads nowhere ends it."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("latex2mathml")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    settings = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_a_formula_becomes_mathml():
    pytest.importorskip("latex2mathml")
    inline = r'<p>of <span class="arithmatex">\(x_i &lt; 2\)</span> and</p>'
    made = hooks().on_page_content(inline, None, None, None)
    assert made.startswith("<p>of <math")
    assert "<msub><mi>x</mi><mi>i</mi></msub>" in made
    assert "<mo>&#x0003C;</mo><mn>2</mn>" in made
    assert "arithmatex" not in made
    lines = r"\begin{align*} a &amp;= b \\ c &amp;= d \end{align*}"
    block = f'<div class="arithmatex">\\[\n{lines}\n\\]</div>'
    made = hooks().on_page_content(block, None, None, None)
    assert made.startswith('<div class="math"><math')
    assert made.count("<mtr>") == 2


def test_a_formula_that_cannot_be_drawn_ends_the_build():
    pytest.importorskip("latex2mathml")
    for source in (r"a \nosuchsign b", r"\begin{aligned} a &amp;= b \end{aligned}"):
        with pytest.raises(ValueError, match="cannot be made MathML"):
            hooks().on_page_content(f'<div class="arithmatex">\\[{source}\\]</div>', 0, 0, 0)


def test_links_out_of_the_docs():
    def made(source: str, text: str) -> str:
        page = SimpleNamespace(file=SimpleNamespace(src_uri=source))
        return hooks().on_page_markdown(text, page, None, None)

    assert made("numerics.md", "[a](../CONTRIBUTING.md#b)") == "[a](contributing.md#b)"
    assert made("api/pyg.md", "[a](../../CHANGELOG.md)") == "[a](../changelog.md)"
    assert made("numerics.md", "[a](../examples/attention.py)") == "a"
    assert made("numerics.md", "[a](edges.md) [b](#c)") == "[a](edges.md) [b](#c)"
    assert made("numerics.md", "[a](../absent.md)") == "[a](../absent.md)"  # mkdocs refuses it
    assert made("contributing.md", "[a](docs/../Makefile)") == "a"


def test_the_search_splits_identifiers():
    separator = re.search(r"^      separator: '(.*)'$", (ROOT / "mkdocs.yml").read_text(), re.M)[1]

    def words(text: str) -> list[str]:
        return [word for word in re.split(separator, text) if word]

    assert words("edge_bias") == ["edge", "bias"]
    assert words("(q, edge_bias=bias)") == ["q", "edge", "bias", "bias"]
    assert words("fastgt.TransformerConv") == ["fastgt", "Transformer", "Conv"]
    assert words("version 0.1") == ["version", "0.1"]


def test_pages_have_no_formulas_or_dollars_left(built):
    pages = sorted(built.rglob("*.html"))
    assert len(pages) > 30
    assert not [page for page in pages if 'class="arithmatex"' in page.read_text()]
    assert (built / "models.html").read_text().count("<math") > 40


def test_the_search_finds_an_argument(built):
    """Pages with all words of the question, as the search splits both."""
    index = json.loads((built / "search" / "search_index.json").read_text())
    separator = index["config"]["separator"]

    def words(text: str) -> set[str]:
        plain = re.sub(r"<[^>]+>", " ", text)
        return {word.lower() for word in re.split(separator, plain) if word}

    asked = words("edge_bias")
    assert asked == {"edge", "bias"}
    found = {x["location"] for x in index["docs"] if asked <= words(x["title"] + " " + x["text"])}
    assert "api/operators.html#fastgt.neighborhood_attention" in found
    assert any(place.startswith("edges.html") for place in found)


def test_the_site_needs_no_network(built):
    """No script, style, font or picture of another host."""
    for page in built.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]+(?:src|href)="(\w+://[^"]+)',
            page.read_text(),
        )
        assert not loaded, page


def test_the_page_of_models_has_every_model():
    """With a link to its entry, and its sizes and results, where there are recipes."""
    page = (DOCS / "models.md").read_text()
    classes = {name for name in models.__all__ if isinstance(getattr(models, name), type)}
    made = {name for name in classes if issubclass(getattr(models, name), torch.nn.Module)}
    assert len(made) > 15
    assert not {name for name in made if not re.search(rf"\b{name}\b", page)}
    assert set(re.findall(r"^<!-- results (\w+) -->$", page, re.MULTILINE)) == set(MODELS)


def test_every_picture_is_shown():
    """Plots are made of every result file, and pages show some of them."""
    pages = [ROOT / "README.md", *DOCS.rglob("*.md")]
    links = (re.findall(r"figures/([\w/.-]+\.(?:png|svg))", page.read_text()) for page in pages)
    shown = {name for names in links for name in names}
    there = {str(path.relative_to(DOCS / "figures")) for path in (DOCS / "figures").rglob("*.*")}
    assert {x for x in there if not x.startswith("plots/")} <= shown <= there

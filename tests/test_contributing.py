"""What CONTRIBUTING.md and docs/glossary.md name is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
MOST_PLACES = 6  # that a new edge term touches
CODE = re.compile(r"`([^`]+)`")


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", CONTRIBUTING, re.DOTALL | re.MULTILINE)[1]


def items(text: str) -> list[str]:
    return re.findall(r"^\d+\. (.*?)(?=^\d+\. |^\n|\Z)", text, re.DOTALL | re.MULTILINE)


def sources() -> str:
    folders = ("fastgt", "kernels", "bench", "tests")
    files = (p for folder in folders for p in sorted((ROOT / folder).rglob("*.*")))
    return "\n".join(p.read_text() for p in files if p.suffix in (".py", ".cpp", ".h"))


def test_the_places_of_an_edge_term_are_few_and_exist():
    places = items(section("Add an edge term"))
    print(f"a new edge term touches {len(places)} places, {MOST_PLACES} allowed")
    assert 0 < len(places) <= MOST_PLACES, f"{len(places)} places of at most {MOST_PLACES}"
    for place in places:
        file = ""
        for name in CODE.findall(place):
            if "/" in name:
                file = name
                assert (ROOT / file).is_file(), file
            elif name.isidentifier():
                assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), f"{file} has no {name}"


def test_files_that_contributing_names_exist():
    for name in CODE.findall(CONTRIBUTING):
        if re.fullmatch(r"[\w/]+\.(py|cpp|h|json|md)", name) and "STEM" not in name:
            assert (ROOT / name).is_file(), name


def test_targets_that_contributing_names_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", CONTRIBUTING):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_words_of_the_glossary_are_those_of_the_code():
    rows = re.findall(r"^\| (.*) \|$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    words = [[cell.strip() for cell in row.split(" | ")] for row in rows[2:]]
    assert len(words) > 30
    assert len({word for word, *_ in words}) == len(words)
    code = sources()
    for word, meaning, kind, names in words:
        assert meaning.endswith("."), word
        assert kind, word
        for name in CODE.findall(names):
            assert re.search(rf"\b{name}\b", code), f"{word}: no {name} in the code"

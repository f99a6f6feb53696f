"""What a release says of itself: one version, a changelog of one form, and what workflows call."""

import datetime
import re
import tomllib
from pathlib import Path

import pytest

import fastgt

ROOT = Path(__file__).parent.parent
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
# https://keepachangelog.com/en/1.1.0
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def text(name: str) -> str:
    return (ROOT / name).read_text()


def releases() -> list[tuple[str, str]]:
    """-> version and date, the newest first."""
    return re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (.+)$", CHANGELOG, re.MULTILINE)


def test_the_version_has_one_place():
    project = tomllib.loads(text("pyproject.toml"))
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "fastgt.__version__"}
    found = re.findall(r'^__version__ = "(.+)"$', text("fastgt/__init__.py"), re.MULTILINE)
    assert found == [fastgt.__version__]


def test_the_documents_have_the_version():
    version, date = releases()[0]
    assert version == fastgt.__version__
    assert f"\nversion: {version}\n" in text("CITATION.cff")
    assert f"\ndate-released: {date}\n" in text("CITATION.cff")
    assert f"\nVersion {version.rpartition('.')[0]}. " in text("README.md")
    assert f"  version = {{{version}}},\n  year = {{{date[:4]}}},\n" in text("README.md")


def test_the_changelog_keeps_to_its_form():
    heads = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    assert heads == ["[Unreleased]", *(f"[{version}] - {date}" for version, date in releases())]
    dates = [datetime.date.fromisoformat(date) for _, date in releases()]
    assert dates == sorted(dates, reverse=True)
    for section in re.split(r"^## ", CHANGELOG, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.*)$", section, re.MULTILINE)
        assert kinds == [kind for kind in KINDS if kind in kinds], section.partition("\n")[0]
        assert kinds or section.startswith("[Unreleased]")
        before = section.partition("### ")[0].partition("\n")[2]
        assert "- " not in before, "an entry without a kind"


def test_every_version_of_the_changelog_is_a_link():
    links = dict(re.findall(r"^\[(.+)\]: (\S+)$", CHANGELOG, re.MULTILINE))
    assert list(links) == ["Unreleased", *(version for version, _ in releases())]
    assert links["Unreleased"].endswith(f"v{fastgt.__version__}...HEAD")
    for version, _ in releases():
        assert links[version].endswith(f"v{version}")


def test_workflows_call_make_and_nothing_else():
    targets = re.findall(r"^([a-z-]+(?: [a-z-]+)*):", text("Makefile"), re.MULTILINE)
    known = {name for line in targets for name in line.split()}
    commands = [x for path in WORKFLOWS for x in re.findall(r"\brun: (.*)", path.read_text())]
    assert len(commands) >= 6
    called = set()
    for command in commands:
        match = re.fullmatch(r"make ([\w-]+)(\$\{\{ matrix\.versions \}\})?", command)
        assert match, command
        called |= {match[1] + x for x in (("lowest", "highest") if match[2] else ("",))}
    assert called <= known
    assert {"check", "test", "docs", "sdist", "wheels", "matrix-lowest"} <= called


def test_make_knows_no_file_of_the_name_of_a_target():
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", text("Makefile"), re.MULTILINE)[1]
    names = phony.replace("\\\n", " ").split()
    for target in ("docs", "sdist", "wheels", "check", "test"):
        assert target in names


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_yaml(path):
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(path.read_text())
    assert workflow["name"] == path.stem
    for job in workflow["jobs"].values():
        assert any("run" in step for step in job["steps"])
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])

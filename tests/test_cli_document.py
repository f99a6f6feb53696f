"""docs/command-line.md says what the parser has, and every command of the documents is one."""

import re
import shlex
from pathlib import Path

import pytest
from test_cli_json import commands

from fastgt import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE = (ROOT / "docs" / "command-line.md").read_text()


def told() -> list[tuple[str, str]]:
    """-> every command in a block of the documents, with its page."""
    lines = []
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            whole = block.replace("\\\n", " ")
            lines += [(x, page.name) for x in whole.splitlines() if re.search("(^|-m )fastgt ", x)]
    return lines


def test_the_page_has_the_exit_statuses():
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", PAGE, re.MULTILINE)
    epilog = re.findall(r"^  (\d+) +(.*)$", cli.STATUSES, re.MULTILINE)
    assert [(status, when.replace(r"\|", "|")) for status, when in rows] == epilog
    assert len(rows) == 5


def test_the_page_has_every_command():
    found = re.findall(r"^\| `(fastgt [\w ]+)` \|", PAGE, re.MULTILINE)
    assert sorted(found) == sorted(x.prog for x in commands(cli._parser()))


@pytest.mark.parametrize(("line", "page"), told())
def test_every_command_of_the_documents_is_one(line, page):
    command = re.split(r"\s#|[|>]", line)[0].partition("fastgt ")[2]
    args = cli._parser().parse_args(shlex.split(command))
    assert args.run is not None


def test_there_are_commands_to_try():
    assert len(told()) > 12
    assert {"README.md", "command-line.md", "training.md"} <= {page for _, page in told()}

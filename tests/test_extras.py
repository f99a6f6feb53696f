"""Packages of extras: who needs one that is absent says which extra installs it."""

import sys
import tomllib
from pathlib import Path

import pytest
import torch

from fastgt import Graph, cli
from fastgt.distributed import partition
from fastgt.extras import require

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "command",
    [
        "train graph_transformer pattern_small",
        "train graph_classifier dd --prune heads=0.5",
        "demo",
    ],
)
@pytest.mark.parametrize("package", ["matplotlib", "tqdm"])
def test_commands_that_draw(command, package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 1
    told = capsys.readouterr().err
    name = " ".join(word for word in command.split() if word in ("train", "demo", "--prune"))
    assert told == f'fastgt: fastgt {name} needs {package}: pip install "fastgt[demo]"\n'
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call",
    [
        lambda graph: graph.reordered("metis"),
        lambda graph: partition(graph, 2, method="metis"),
    ],
)
def test_methods_of_metis(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymetis", None)
    graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
    with pytest.raises(ImportError, match=r'needs pymetis: pip install "fastgt\[reorder\]"'):
        call(graph)


def test_a_package_that_is_there():
    assert require("torch", "anything", "demo") is torch


def test_the_extras_have_what_is_asked_of_them():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, packages in (("demo", ["matplotlib", "tqdm"]), ("reorder", ["pymetis", "igraph"])):
        named = " ".join(project["optional-dependencies"][extra])
        assert all(package in named for package in packages)

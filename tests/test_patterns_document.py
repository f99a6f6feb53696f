"""docs/patterns.md has every pattern of the package, with its picture and a line of use."""

import re
from pathlib import Path

import patterns as tool
import pytest
import torch

from fastgt import Graph, patterns

pytest.importorskip("matplotlib")
PAGE = (Path(__file__).parent.parent / "docs" / "patterns.md").read_text()
HELPERS = {"fold", "unfold"}  # of tensors


def test_every_pattern_has_a_picture_and_is_used():
    makers = set(patterns.__all__) - HELPERS
    assert set(tool.PICTURES) == makers
    assert set(re.findall(r"!\[\w+\]\(figures/(\w+)\.png\)", PAGE)) == makers
    assert makers <= {path.stem for path in tool.FIGURES.glob("*.png")}
    blocks = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    assert all(re.search(rf"\b{name}\(", blocks) for name in patterns.__all__)


def test_pictures_are_small():
    for name in tool.PICTURES:
        path = tool.FIGURES / f"{name}.png"
        assert path.stat().st_size < 30_000, path


@pytest.mark.parametrize("name", ["windows", "causal", "knn"])
def test_a_picture_is_drawn_the_same(name):
    """One of each kind: a grid, a sequence, points."""
    first = tool.drawn(name)
    assert first.startswith(b"\x89PNG")
    assert first == tool.drawn(name)
    graphs = [tool.PICTURES[name].graph() for _ in range(2)]
    assert isinstance(graphs[0], Graph)
    assert torch.equal(graphs[0].col, graphs[1].col)

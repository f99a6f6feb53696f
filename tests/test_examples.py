"""The programs of examples/ that need nothing but fastgt run, and say what they are for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ["attention", "edge_term", "masked_heads", "ragged", "two_ranks"]


def run(*command):
    ended = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs(name):
    path = EXAMPLES / f"{name}.py"
    assert run(path)
    text = path.read_text()
    assert f"    python examples/{name}.py\n" in text
    assert len(text.splitlines()) <= 60


@pytest.mark.skipif(sys.platform == "win32", reason="gloo and torchrun")
def test_two_ranks_learn_what_one_learns():
    path = EXAMPLES / "two_ranks.py"
    one, two = (
        [float(x) for x in re.findall(r"loss ([\d.]+)", run(*command, path))]
        for command in ([], ["-m", "torch.distributed.run", "--nproc-per-node", "2"])
    )
    assert len(one) == 5
    assert two == pytest.approx(one, abs=2e-5)

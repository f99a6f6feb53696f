"""The programs and the notebook of examples/ print what stands on their page and in their cells."""

import copy
import json
import re
import sys

import example_outputs
import pytest
import torch

NAMES = sorted(path.stem for path in example_outputs.EXAMPLES.glob("*.py"))
NEEDS = {"pyg_swap": "torch_geometric"}
SHARE = 0.25  # by which what was learned may differ on another machine
NUMBER = re.compile(r"(-?\d[\d,]*(?:\.\d+)?)( ms)?")


def differences(found: str, expected: str) -> list[str]:
    """Between two outputs: words and whole numbers are equal, others alike, times are any."""
    if NUMBER.sub("#", found) != NUMBER.sub("#", expected):
        return [f"{found!r} instead of {expected!r}"]
    wrong = []
    for (x, unit), (y, _) in zip(NUMBER.findall(found), NUMBER.findall(expected), strict=True):
        a, b = (float(number.replace(",", "")) for number in (x, y))
        last = 10.0 ** -len(y.partition(".")[2]) if "." in y else 0
        allowed = max(SHARE * abs(b), 2 * last) if last else 0
        if not unit and abs(a - b) > allowed:
            wrong.append(f"{x} instead of {y}")
    return wrong


def numbers(pattern: str, name: str) -> list[float]:
    """What the page says that a program prints there."""
    found = re.findall(pattern, example_outputs.outputs()[name])
    assert found, pattern
    return [float(x) for match in found for x in ([match] if isinstance(match, str) else match)]


def test_differences_are_seen():
    expected = "step 10: loss 0.50 of 1,000, 3 ms"
    assert not differences("step 10: loss 0.55 of 1,000, 9 ms", expected)
    assert differences("step 10: loss 0.80 of 1,000, 3 ms", expected) == ["0.80 instead of 0.50"]
    assert differences("step 11: loss 0.50 of 1,000, 3 ms", expected) == ["11 instead of 10"]
    assert differences("step 10: loss 0.50 of 1,001, 3 ms", expected)
    assert differences("step 10: error 0.50 of 1,000, 3 ms", expected)
    assert not differences("[0.382, -0.000]", "[0.382, 0.000]")
    assert differences("[0.382, 0.100]", "[0.382, -0.100]")


def test_the_page_has_every_program():
    assert sorted(example_outputs.outputs()) == NAMES
    assert all(example_outputs.outputs().values())


@pytest.mark.parametrize("name", NAMES)
def test_a_program_prints_what_the_page_says(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    assert not differences(example_outputs.printed(name), example_outputs.outputs()[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_program_is_short_and_says_how_it_is_run(name):
    text = (example_outputs.EXAMPLES / f"{name}.py").read_text()
    assert re.match(r'"""[A-Z].*\.\n\n    ', text)
    assert f"    python examples/{name}.py\n" in text
    assert 30 <= len(text.splitlines()) <= 60


def test_what_the_page_says_bears_the_programs_out():
    """Its outputs are those of a run, by the test above: here is what they have to show."""
    first, *_, last = numbers(r"loss ([\d.]+)", "attention")
    assert last < 1e-3 < first
    first, last = numbers(r"loss ([\d.]+)", "edge_term")
    assert last < 0.8 * first
    assert "gradients reach the points: True" in example_outputs.outputs()["edge_term"]
    assert example_outputs.outputs()["masked_heads"].count("the same outputs: True") == 2
    whole, masked, smaller = numbers(r"([\d.]+) ms", "masked_heads")
    assert max(masked, smaller) < whole
    deviation, first, _, last = numbers(r"(?:new molecules|\+-) ([\d.]+)", "molecules")
    assert last < first / 4 < deviation / 4
    theirs, ours = numbers(r"steps: ([\d.]+) and ([\d.]+)", "pyg_swap")
    assert ours == pytest.approx(theirs, abs=2e-5)
    largest, right = numbers(r"(\d+)%", "sampling")
    assert right > 4 * largest
    assert numbers(r"([\d.]+)% of", "ragged")[0] > 90


@pytest.mark.skipif(sys.platform == "win32", reason="gloo and torchrun")
def test_two_ranks_learn_what_one_learns():
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    found = re.findall(r"loss ([\d.]+)", example_outputs.printed("two_ranks", *launcher))
    expected = numbers(r"loss ([\d.]+)", "two_ranks")
    assert len(expected) == 5
    assert [float(x) for x in found] == pytest.approx(expected, abs=2e-5)


@pytest.mark.usefixtures("one_thread")
def test_the_notebook_has_the_outputs_of_its_cells():
    notebook = json.loads(example_outputs.NOTEBOOK.read_text())
    assert {cell["cell_type"] for cell in notebook["cells"]} == {"markdown", "code"}
    stored = [text for cell in notebook["cells"] for text in outputs(cell)]
    blank = copy.deepcopy(notebook)
    for cell in blank["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
    done = example_outputs.executed(blank)
    found = [text for cell in done["cells"] for text in outputs(cell)]
    assert len(found) == len(stored) > 8
    for one, other in zip(found, stored, strict=True):
        assert not differences(one, other)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert "metadata" in cell
            assert cell["execution_count"]


def test_what_a_notebook_sets_ends_with_it():
    source = ["import torch\n", "torch.manual_seed(0)\n", "torch.set_printoptions(precision=2)\n"]
    cells = [{"cell_type": "code", "source": [*source, "torch.tensor(1 / 3)"], "outputs": []}]
    before = torch.get_rng_state()
    done = example_outputs.executed({"cells": cells})
    assert list(outputs(done["cells"][0])) == ["tensor(0.33)"]
    assert repr(torch.tensor(1 / 3)) == "tensor(0.3333)"
    assert torch.equal(torch.get_rng_state(), before)


def outputs(cell):
    for output in cell.get("outputs", []):
        yield "".join(output["text"] if "text" in output else output["data"]["text/plain"])

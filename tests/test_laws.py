"""Which operators obey which laws, read from the files that try them."""

import inspect
import re
from pathlib import Path

import laws

# OP.obeys(laws.LAW, ...), OP.check(LAW, ...) and laws.LAW(OP, ...)
BY_OP = re.compile(r"\b([A-Z_]+)\.(?:obeys|check)\(\s*(?:laws\.)?(\w+)")
BY_LAW = re.compile(r"\blaws\.(\w+)\(\s*([A-Z_]+),")


def table() -> dict[str, set[str]]:
    """The operators of each law."""
    found = {
        name: set()
        for name, law in inspect.getmembers(laws, inspect.isfunction)
        if "op" in inspect.signature(law).parameters and law.__module__ == laws.__name__
    }
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        text = path.read_text()
        pairs = [*BY_LAW.findall(text), *((law, op) for op, law in BY_OP.findall(text))]
        for law, op in pairs:
            if law in found:
                found[law].add(op)
    return found


def test_each_law_is_that_of_several_operators():
    """What one of them alone obeys stands in that one's file."""
    few = {law: ops for law, ops in table().items() if len(ops) < 2}
    assert not few


def test_a_law_says_in_words_what_it_is():
    for name in table():
        assert inspect.getdoc(getattr(laws, name)), name


if __name__ == "__main__":
    for law, ops in table().items():
        print(f"{law}: {', '.join(sorted(ops))}")

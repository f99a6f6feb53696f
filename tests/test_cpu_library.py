"""The compiled kernels as a library: built, found, checked, refused."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastgt
from fastgt import Graph, cli, segment_softmax
from fastgt.cpu import library
from fastgt.ops import implementation

ROOT = Path(__file__).parent.parent
FOLDER = Path(library.__file__).parent
MOST_BYTES = 2_000_000  # of a library
GRAPH = Graph.from_edge_index(torch.tensor([[0, 1, 1], [1, 0, 1]]))
REASON = "the CPU kernels were not built: no compiler"
CAPABILITIES = {"v4": "avx512", "v3": "avx2", "baseline": "default"}


@pytest.fixture
def copied(compiled_kernels, monkeypatch, tmp_path) -> Path:
    """A folder of its own with the library of this CPU and all sources."""
    files = [compiled_kernels.path, *(ROOT / "fastgt" / "cpu").glob("*.cpp")]
    for file in [*files, *(ROOT / "fastgt" / "cpu").glob("*.h")]:
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    return tmp_path / compiled_kernels.path.name


def load() -> library.Library | str:
    return library.load.__wrapped__()  # without what is remembered


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: REASON)
    implementation._warn_once.cache_clear()
    yield
    implementation._warn_once.cache_clear()


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, cwd=ROOT.anchor
    )
    assert ended.returncode == 0, ended.stderr
    return ended


# ---- what is refused


@pytest.mark.parametrize("suffix", ["cpp", "h"])
def test_a_library_of_other_sources_is_refused(copied, suffix):
    assert isinstance(load(), library.Library)
    source = next(copied.parent.glob(f"*.{suffix}"))
    source.write_text(source.read_text() + "\n")
    assert load() == (
        f"the CPU kernels cannot be loaded: {copied.name} was built from other sources: "
        "run pip install -e . again"
    )


def test_a_library_of_another_version_is_refused(copied, monkeypatch):
    monkeypatch.setattr(fastgt, "__version__", "0.0.9")
    said = load()
    assert f"{copied.name} is of fastgt 0.1.0, not 0.0.9" in said


def test_a_library_without_its_sources_is_loaded(copied):
    """As it is installed."""
    for source in [*copied.parent.glob("*.cpp"), *copied.parent.glob("*.h")]:
        source.unlink()
    assert isinstance(load(), library.Library)


@pytest.mark.parametrize("content", [b"", b"no library" * 1000])
def test_a_file_that_is_no_library_is_refused(copied, content):
    copied.write_bytes(content)
    assert load().startswith(f"the CPU kernels cannot be loaded: {copied}")


def test_a_library_that_lacks_what_the_loader_asks_for_is_refused(copied):
    copied.unlink()
    copied.symlink_to(torch._C.__file__)
    assert "the CPU kernels cannot be loaded" in load()
    assert "fastgt_version" in load()


def test_where_nothing_was_built_the_reason_is_told(copied):
    copied.unlink()
    assert f"the CPU kernels were not built: {copied} does not exist" in load()
    (copied.parent / "not_built.txt").write_text("c++ failed\nfatal error\n")
    said = load()
    assert said.startswith("the CPU kernels were not built: c++ failed\nfatal error\n")
    assert "C++17 compiler" in said


def test_a_call_of_another_size_is_refused():
    kernels = library.Library(library.kernels().path)  # one that has called nothing
    said = rf"{kernels.path.name}: segment_softmax takes \d+ bytes, .* gives 16: install"
    with pytest.raises(RuntimeError, match=said):
        kernels.run("segment_softmax", "fwd", 1, 2)


@pytest.mark.parametrize(("op", "function"), [("nothing", "fwd"), ("segment_softmax", "nothing")])
def test_an_unknown_call_is_refused(compiled_kernels, op, function):
    with pytest.raises(RuntimeError, match=f"{compiled_kernels.path.name} has no {op}_{function}"):
        compiled_kernels.run(op, function, 1)


# ---- where there are none


def test_cpp_without_kernels_raises_the_reason(without_kernels):
    with pytest.raises(RuntimeError, match=f"impl='cpp' cannot run: {REASON}"):
        segment_softmax(torch.ones(3), GRAPH, impl="cpp")
    with (
        fastgt.implementation("cpp"),
        pytest.raises(RuntimeError, match=f"impl='cpp' cannot run: {REASON}"),
    ):
        segment_softmax(torch.ones(3), GRAPH)


def test_without_kernels_the_definition_runs_and_a_warning_says_why_once(without_kernels):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert segment_softmax(torch.zeros(3), GRAPH).tolist() == [0.5, 1.0, 0.5]
    assert [str(w.message) for w in said] == [
        f"fastgt runs its slow reference on this CPU: {REASON}"
    ]


@pytest.mark.filterwarnings("ignore:fastgt runs its slow reference")
def test_without_kernels_a_whole_function_compiles(without_kernels):
    _compiles(None)


@pytest.mark.parametrize("impl", [None, "cpp"])
def test_a_whole_function_compiles(compiled_kernels, impl):
    _compiles(impl)


def _compiles(impl):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def twice(x):
        return 2 * segment_softmax(x, GRAPH, impl=impl)

    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    torch.testing.assert_close(twice(x), 2 * segment_softmax(x, GRAPH, impl="reference"))
    twice(x).sum().backward()


def test_doctor_names_the_variant_and_its_width(compiled_kernels, capsys):
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"kernels of the variant {library.variant()}" in said
    assert f"vectors of {compiled_kernels.vector_bytes} bytes" in said
    assert re.search(r"^neighborhood_attention +cpp +[\d.]+ ms, as defined$", said, re.MULTILINE)


def test_doctor_tells_as_json_which_implementation_runs_every_operator(compiled_kernels, capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cpu"]["kernels"] == library.variant()
    assert {x["impl"] for x in found["operators"].values()} == {"cpp"}
    assert all(x["right"] for x in found["operators"].values())


def test_doctor_says_why_there_are_none(without_kernels, capsys):
    assert cli.main(["doctor"]) == 1
    assert f"no kernels, the slow reference runs: {REASON}" in capsys.readouterr().out


def test_doctor_tells_wrong_kernels(compiled_kernels, monkeypatch, capsys):
    run = library.Library.run

    def wrong(self, op, function, *values):
        if op == "segment_softmax" and values[4] is not None:
            return values[4].zero_()
        return run(self, op, function, *values)

    monkeypatch.setattr(library.Library, "run", wrong)
    assert cli.main(["doctor"]) == 1
    assert re.search(r"^segment_softmax +cpp +WRONG: ", capsys.readouterr().out, re.MULTILINE)


def test_tests_that_need_kernels_are_skipped_where_there_are_none():
    """By conftest.py: where "cpp" is a parameter, and where a fixture or the test asks for it."""
    tests = [
        "test_segment_softmax.py::test_softmax_of_minus_infinity",
        "test_cpu_library.py::test_libraries_are_small",
        "test_cpu_library.py::test_a_call_of_another_size_is_refused",
    ]
    code = (
        "import sys, pytest\n"
        "from fastgt.cpu import library\n"
        f"library.load = lambda: {REASON!r}\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', 'not triton', *sys.argv[1:]]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *(f"tests/{test}" for test in tests)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(rf"test_segment_softmax.py:\d+: {REASON}", ended.stdout), ended.stdout
    assert re.search(rf"SKIPPED \[2\] \S+conftest.py:\d+: {REASON}", ended.stdout), ended.stdout


# ---- the build


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What setup.py builds from, and a library of an earlier build."""
    pytest.importorskip("setuptools", "77")
    (tmp_path / "fastgt" / "cpu").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fastgt/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for file in (ROOT / "fastgt" / "cpu").glob("*.[ch]*"):
        shutil.copy(file, tmp_path / "fastgt" / "cpu")
    (tmp_path / "fastgt" / "cpu" / "kernels_baseline.so").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("false", "false failed\n"),
        ("no-such-compiler", "No such file or directory: 'no-such-compiler'"),
        ("'c++", "No closing quotation"),
        (f"'{sys.executable}' -c 'import sys; sys.exit(\"no such flag\")'", "\nno such flag\n"),
    ],
)
def test_where_the_compiler_fails_the_installation_goes_on_and_the_reason_is_kept(
    checkout, compiler, reason
):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    ended = subprocess.run(
        command, cwd=checkout, capture_output=True, text=True, env=os.environ | {"CXX": compiler}
    )
    assert ended.returncode == 0, ended.stderr
    assert reason in (checkout / "fastgt" / "cpu" / "not_built.txt").read_text()
    assert "fastgt: the CPU kernels were not built" in ended.stderr
    assert not list(checkout.rglob("*.so")), "of an earlier build"


def test_libraries_are_small(compiled_kernels):
    sizes = {
        path.name: path.stat().st_size for path in compiled_kernels.path.parent.glob("kernels_*.so")
    }
    print(sizes)
    assert max(sizes.values()) <= MOST_BYTES, sizes


# ---- the variants

_VARIANT = """
import sys, torch
from fastgt import Graph, segment_softmax
from fastgt.cpu import library
library.kernels()
generator = torch.Generator().manual_seed(0)
graph = Graph.from_edge_index(torch.randint(30, (2, 500), generator=generator), 30)
found = []
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    # PyTorch's normal numbers depend on the instructions
    x, dy = torch.randint(-9000, 9000, (2, 500, 21), generator=generator).to(dtype) / 3000
    y = segment_softmax(x.requires_grad_(), graph, impl="cpp")
    y.backward(dy)
    found += [y.detach(), x.grad]
torch.save((library.variant(), found, open("/proc/self/maps").read()), sys.argv[1])
"""


def _runnable() -> list[str]:
    variants = list(CAPABILITIES)
    return variants[variants.index(library.variant()) :]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="lists what a process has loaded")
def test_every_variant_gives_the_same_and_no_other_one_is_loaded(compiled_kernels, tmp_path):
    first = None
    for variant in _runnable():
        path = tmp_path / variant
        code = _VARIANT.replace("sys.argv[1]", repr(str(path)))
        run(code, ATEN_CPU_CAPABILITY=CAPABILITIES[variant])
        name, found, maps = torch.load(path)
        assert name == variant
        loaded = {line.rpartition("/")[2] for line in maps.splitlines() if "kernels_" in line}
        assert loaded == {f"kernels_{variant}.so"}
        first = first or found
        for a, b in zip(found, first, strict=True):
            rounding = 4 * torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)


@pytest.mark.parametrize(
    ("machine", "capability", "variant"),
    [
        ("x86_64", "AVX512", "v4"),
        ("x86_64", "AVX2", "v3"),
        ("AMD64", "DEFAULT", "baseline"),
        ("x86_64", "something new", "baseline"),
        ("aarch64", "SVE256", "baseline"),
        ("arm64", "DEFAULT", "baseline"),
    ],
)
def test_the_variant_is_what_pytorch_knows_of_the_cpu(monkeypatch, machine, capability, variant):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert library.variant() == variant


def test_the_process_computes_with_denormal_numbers_as_before(compiled_kernels):
    said = run(
        "import numpy, torch\n"
        "from fastgt.cpu import library\n"
        "def small():\n"
        "    x = torch.full((100_000,), 1e-40)\n"
        "    return bool((x * 1 != 0).all()), bool(numpy.float32(1e-40) * numpy.float32(1) != 0)\n"
        "before = small()\n"
        "library.kernels()\n"
        "print(before, small())\n"
    ).stdout
    assert said == "(True, True) (True, True)\n"


def test_kernels_need_no_library_of_python_or_pytorch(compiled_kernels, tmp_path):
    """So that one build serves every version: it is loaded into a process that has neither."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler")
    source, program = tmp_path / "open.c", tmp_path / "open"
    source.write_text(
        "#include <dlfcn.h>\nint main(int n, char** a) { return !dlopen(a[1], RTLD_NOW); }\n"
    )
    subprocess.run([compiler, source, "-o", program, "-ldl"], check=True)
    assert subprocess.run([program, compiled_kernels.path]).returncode == 0

"""What users install: the wheel, in an environment that has nothing of this checkout.

It is built from the source distribution, which therefore has all that a build needs.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastgt

HERE = Path(__file__).parent
ROOT = HERE.parent
CLIENTS = ["typed_client.py", "typed_aux.py"]
MOST_SDIST, MOST_WHEEL = 3_000_000, 5_500_000  # bytes, of which Debian's graph has 1,870,022
pytestmark = pytest.mark.slow
SHIPPED = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
SHIPPED += ("fastgt", "kernels", "bench", "tests")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built from a copy: building writes beside its sources."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    source.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    ended = run([sys.executable, "-c", code], source)
    assert ended.returncode == 0, ended.stderr
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    return build(sdist, tmp_path_factory.mktemp("wheel"))


def build(sdist: Path, folder: Path, **environment: str) -> Path:
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(sdist)]
    ended = run(command, folder, **environment)
    assert ended.returncode == 0, ended.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """-> the Python of an environment with the wheel, and with the packages of this one."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    # after the wheel, and read without the .pth files in it, which name this checkout
    packages = [path for path in map(Path, sys.path) if (path / "torch").is_dir()]
    (site / "packages.pth").write_text("".join(f"{path}\n" for path in packages))
    return python


def run(command: list, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=os.environ | environment
    )


def test_the_first_example_of_the_readme_runs_from_the_wheel(installed, tmp_path):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    code = example + "import fastgt; print(out.shape, fastgt.__file__)"
    ended = run([installed, "-c", code], tmp_path)
    shape, _, file = ended.stdout.partition(") ")
    assert shape == "torch.Size([6, 8, 16]", ended.stderr
    assert Path(file.strip()).is_relative_to(installed.parent.parent)


@pytest.mark.parametrize("command", ["demo", "train", "bench", "doctor", "report kernels"])
def test_the_commands_are_installed(installed, tmp_path, command):
    ended = run([installed.parent / "fastgt", *command.split(), "--help"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert f"usage: fastgt {command}" in ended.stdout


def test_the_wheel_has_what_users_run_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"fastgt/py.typed", "fastgt/data/plans.json", "fastgt/kernels/attention.py"} <= names
    inside = {name for name in names if not name.startswith("fastgt-")}
    assert {name.partition("/")[0] for name in inside} == {"fastgt"}
    tests = [name for name in inside if "test_" in name or "conftest" in name]
    assert not tests
    assert not [name for name in inside if "results/" in name or "render" in name]


def test_what_an_index_of_packages_checks(sdist, wheel, tmp_path):
    """``twine`` reads the metadata and renders the README, the other looks at the wheel's files."""
    for module, command in (
        ("twine", ["twine", "check", "--strict", sdist, wheel]),
        ("check_wheel_contents", ["check_wheel_contents", wheel]),
    ):
        pytest.importorskip(module)
        ended = run([sys.executable, "-m", *command], tmp_path)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "WARNING" not in ended.stdout + ended.stderr


def test_sizes_and_names_of_what_is_released(sdist, wheel):
    for path, most in ((sdist, MOST_SDIST), (wheel, MOST_WHEEL)):
        assert path.name.startswith(f"fastgt-{fastgt.__version__}")
        size = path.stat().st_size
        print(f"{path.name} has {size:,} bytes, {most:,} allowed")
        assert size <= most, path.name
    metadata = read(wheel, f"fastgt-{fastgt.__version__}.dist-info/METADATA")
    assert f"\nVersion: {fastgt.__version__}\n" in metadata
    assert "\nDescription-Content-Type: text/markdown\n" in metadata
    assert read(wheel, "fastgt/py.typed") == (ROOT / "fastgt" / "py.typed").read_text()


def test_the_sdist_has_what_a_build_needs_and_no_build(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "fastgt" / "cpu").glob("*.[ch]*")}
    assert {"setup.py", "pyproject.toml", "fastgt/cpu/library.cpp", *sources} <= names
    built = (".so", "not_built.txt", ".pyc")
    assert not [name for name in names if name.endswith(built) or name.startswith("tests")]


def test_the_wheel_has_kernels_for_every_python_of_this_platform(wheel):
    why_not_built = read(wheel, "fastgt/cpu/not_built.txt")
    if why_not_built:
        pytest.skip(why_not_built.partition("\n")[0])
    tag = wheel.stem.split("-", 2)[2]
    assert re.fullmatch(r"py3-none-(linux|macosx)_\w+", tag)
    names = set(zipfile.ZipFile(wheel).namelist())
    found = {name for name in names if name.endswith(".so")}
    variants = ("baseline", "v3", "v4") if tag.endswith("x86_64") else ("baseline",)
    assert found == {f"fastgt/cpu/kernels_{variant}.so" for variant in variants}
    assert not [name for name in names if name.endswith((".cpp", ".h"))]


def test_the_kernels_of_the_wheel_run(wheel, installed, tmp_path):
    if why_not_built := read(wheel, "fastgt/cpu/not_built.txt"):
        pytest.skip(why_not_built.partition("\n")[0])
    ended = run([installed.parent / "fastgt", "doctor"], tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert str(installed.parent.parent) in ended.stdout


def test_without_a_compiler_the_wheel_is_for_every_platform_and_says_why(sdist, tmp_path):
    wheel = build(sdist, tmp_path, CXX="no-such-compiler")
    assert wheel.stem.endswith("-py3-none-any")
    assert "no-such-compiler" in read(wheel, "fastgt/cpu/not_built.txt")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def read(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name).decode() if name in archive.namelist() else ""


@pytest.mark.parametrize("client", CLIENTS)
def test_mypy_sees_the_exact_types(installed, tmp_path, client):
    pytest.importorskip("mypy")
    cache = tmp_path / "cache"
    if (ROOT / ".mypy_cache").is_dir():  # PyTorch takes a minute: once for this checkout
        shutil.copytree(ROOT / ".mypy_cache", cache)
    options = ["--python-executable", installed, "--cache-dir", cache]
    options += ["--config-file", ROOT / "pyproject.toml"]
    ended = run([sys.executable, "-m", "mypy", *options, HERE / client], tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("client", CLIENTS)
def test_pyright_sees_the_exact_types(installed, tmp_path, client):
    pytest.importorskip("basedpyright", reason="pyright's build that is whole in its wheel")
    options = ["--pythonpath", installed, "--level", "error"]
    ended = run([sys.executable, "-m", "basedpyright", *options, HERE / client], tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr

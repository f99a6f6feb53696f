"""What users install: the wheel, in an environment that has nothing of this checkout."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent
CLIENTS = ["typed_client.py", "typed_aux.py"]
pytestmark = pytest.mark.slow
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "fastgt", "kernels", "bench")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: building writes beside its sources."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(source)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
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


def run(command: list, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_the_first_example_of_the_readme_runs_from_the_wheel(installed, tmp_path):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    code = example + "import fastgt; print(out.shape, fastgt.__file__)"
    ended = run([installed, "-c", code], tmp_path)
    shape, _, file = ended.stdout.partition(") ")
    assert shape == "torch.Size([6, 8, 16]", ended.stderr
    assert Path(file.strip()).is_relative_to(installed.parent.parent)


@pytest.mark.parametrize("command", ["demo", "train zinc", "train dd", "bench", "report kernels"])
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
    assert not [name for name in inside if "results" in name or "render" in name]


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

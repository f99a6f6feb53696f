"""``make matrix``: the tests of versions, with the lowest and the highest versions declared.

``python tests/matrix/run.py lowest highest`` makes an environment of this Python for each name,
from the requirements beside this file. There it runs ``tests/test_versions.py`` on this
checkout, and tests of compiled code, which versions of Dynamo guard in different ways. An
environment takes several gigabytes, since PyTorch brings CUDA along. It is kept in the user's
cache folder, under its Python and its requirements, and serves every checkout.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgt-matrix"
TESTS = (
    "tests/test_versions.py",
    "tests/test_plan.py::test_one_compilation_serves_every_graph[chosen]",
    "tests/test_cpu_library.py::test_a_whole_function_compiles",
    "tests/test_cpu_library.py::test_without_kernels_a_whole_function_compiles",
)
SAY = (
    "import platform, numpy, scipy, torch, triton;"
    "print(f'Python {platform.python_version()}, torch {torch.__version__}, triton "
    "{triton.__version__}, numpy {numpy.__version__}, scipy {scipy.__version__}')"
)


def main(argv: Sequence[str] | None = None) -> int:
    """-> exit status: 0 if the tests passed everywhere."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(path.stem for path in HERE.glob("*.txt"))
    parser.add_argument("names", nargs="+", choices=names)
    parser.add_argument("--cache", type=Path, default=CACHE, help="default: %(default)s")
    args, pytest_options = parser.parse_known_args(argv)
    failed = []
    for name in args.names:
        begin = time.monotonic()
        python = environment(HERE / f"{name}.txt", args.cache)
        made = time.monotonic()
        print(f"\n{name}: ", end="", flush=True)
        subprocess.run([python, "-c", SAY], check=True, cwd=HERE)
        tests = (python, "-m", "pytest", "-q", *TESTS, *pytest_options)
        if subprocess.run(tests, cwd=ROOT).returncode:
            failed.append(name)
        end = time.monotonic()
        print(f"{name}: {made - begin:.0f} s to install, {end - made:.0f} s to test", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def environment(requirements: Path, cache: Path) -> Path:
    """-> the Python of an environment with these packages and this checkout's fastgt."""
    packages = _packages(requirements, cache)
    own = ROOT / ".venv" / "matrix" / packages.name
    python = own / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", own], check=True)
        site = next(own.glob("lib/python*/site-packages"))
        shared = next(packages.glob("lib/python*/site-packages"))
        (site / "packages.pth").write_text(f"{shared}\n")
    pip = (packages / "bin" / "python", "-m", "pip", "--python", python, "install", "--quiet")
    subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)
    return python


def _packages(requirements: Path, cache: Path) -> Path:
    """-> the folder of a finished environment, made only if there is none."""
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache / f"{requirements.stem}-python{version}-{digest}"
    finished = folder / "finished"
    if not finished.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = (folder / "bin" / "python", "-m", "pip", "install", "--quiet")
        subprocess.run([*pip, "--upgrade", "pip"], check=True)
        subprocess.run([*pip, "--requirement", requirements], check=True)
        finished.touch()
    return folder


if __name__ == "__main__":
    sys.exit(main())

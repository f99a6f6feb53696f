"""Builds the compiled CPU kernels: plain shared libraries beside fastgt/cpu/library.py.

They include no header of Python or PyTorch, so that one build serves every version of both. Where
there is no compiler, or it fails, the installation goes on without them and says why.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FOLDER = Path("fastgt", "cpu")
SOURCES = sorted((ROOT / FOLDER).glob("*.cpp"))
HEADERS = sorted((ROOT / FOLDER).glob("*.h"))
INIT = (ROOT / "fastgt" / "__init__.py").read_text()
VERSION = re.findall(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[0]
NOT_BUILT = "not_built.txt"
EXTRA = ("CXXFLAGS", "ARCHFLAGS")  # flags from outside: the second says for which Mac

# -ffast-math would set flush-to-zero for the whole process, -march=native run on one machine only
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
# what is built for: on a Mac it may be another machine than this one
MACHINE = sysconfig.get_platform().rpartition("-")[2].replace("universal2", platform.machine())
VARIANTS: dict[str, list[str]] = {"baseline": []}
if MACHINE in ("x86_64", "amd64"):
    VARIANTS |= {
        "v3": ["-march=x86-64-v3"],
        "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    }


def digest() -> str:
    """Of the sources; fastgt/cpu/library.py computes the same."""
    text = b"".join(path.read_bytes() for path in sorted([*SOURCES, *HEADERS]))
    return hashlib.sha256(text).hexdigest()[:12]


class BuildKernels(build_ext):
    """One library a variant, all objects side by side."""

    def get_ext_filename(self, name: str) -> str:
        return str(Path(*name.split("."))) + ".so"

    def run(self) -> None:
        folder = self.folder()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NOT_BUILT).unlink(missing_ok=True)
        try:
            self.build_all(folder)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            reason = str(error)
            if isinstance(error, subprocess.CalledProcessError):
                lines = error.stderr.strip().splitlines()
                command = shlex.join(error.cmd)
                reason = "\n".join([f"{error.cmd[0]} failed", *lines[:20], command])
            for variant in VARIANTS:
                library(folder, variant).unlink(missing_ok=True)
            (folder / NOT_BUILT).write_text(reason + "\n")
            print(f"fastgt: the CPU kernels were not built: {reason}", file=sys.stderr)

    def folder(self) -> Path:
        return ROOT / FOLDER if self.inplace else Path(self.build_lib, FOLDER)

    def build_all(self, folder: Path) -> None:
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        extra = [x for name in EXTRA for x in shlex.split(os.environ.get(name, ""))]
        strip = ["-Wl,-s"] if sys.platform == "linux" and "-g" not in extra else []
        temp = Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        version = f'-DFASTGT_VERSION="{VERSION} {digest()}"'

        def compiled(variant: str, source: Path) -> str:
            target = temp / f"{source.stem}-{variant}.o"
            flags = [*FLAGS, *VARIANTS[variant], *extra, version]
            checked([*compiler, *flags, "-c", str(source), "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool, cancelled_after(pool):
            jobs = {v: [pool.submit(compiled, v, s) for s in SOURCES] for v in VARIANTS}
            for variant in VARIANTS:
                objects = [job.result() for job in jobs[variant]]
                path = library(folder, variant)
                made = path.with_suffix(".new")  # a process that runs keeps the file it has
                checked([*compiler, "-shared", *strip, *extra, *objects, "-o", str(made)])
                made.replace(path)

    def get_outputs(self) -> list[str]:
        folder = self.folder()
        made = [library(folder, variant) for variant in VARIANTS]
        return [str(path) for path in [*made, folder / NOT_BUILT] if path.exists()]


@contextmanager
def cancelled_after(pool: ThreadPoolExecutor) -> Iterator[None]:
    """After an error, what waits in the pool does not begin."""
    try:
        yield
    finally:
        pool.shutdown(cancel_futures=True)


def library(folder: Path, variant: str) -> Path:
    return folder / f"kernels_{variant}.so"


def checked(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")


class Wheel(bdist_wheel):
    """For every Python 3: of this platform, or of any where nothing was built."""

    def get_tag(self) -> tuple[str, str, str]:
        made = self.get_finalized_command("build_ext").get_outputs()
        if not any(path.endswith(".so") for path in made):
            self.root_is_pure = True
            return "py3", "none", "any"
        return "py3", "none", super().get_tag()[2].replace("universal2", MACHINE)


def extension(variant: str) -> Extension:
    sources, headers = ([str(path.relative_to(ROOT)) for path in x] for x in (SOURCES, HEADERS))
    return Extension(f"fastgt.cpu.kernels_{variant}", sources, depends=headers)


setup(
    ext_modules=[extension(variant) for variant in VARIANTS],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)

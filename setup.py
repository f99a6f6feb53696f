"""Builds the compiled CPU kernels: plain shared libraries beside fastgt/cpu/library.py.

They include no header of Python or PyTorch, so that one build serves every version of both. Where
there is no compiler, or it fails, the installation goes on without them and says why.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
FOLDER = Path("fastgt", "cpu")
SOURCES = sorted((ROOT / FOLDER).glob("*.cpp"))
HEADERS = sorted((ROOT / FOLDER).glob("*.h"))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
NOT_BUILT = "not_built.txt"

# -ffast-math would set flush-to-zero for the whole process, -march=native run on one machine only
FLAGS = (
    "-std=c++17 -O2 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math"
    " -ffp-contract=fast -Wall -Wextra -Wno-psabi"
).split()
VARIANTS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
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
        folder = ROOT / FOLDER if self.inplace else Path(self.build_lib, FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NOT_BUILT).unlink(missing_ok=True)
        try:
            self.build_all(folder)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = str(error)
            if isinstance(error, subprocess.CalledProcessError):
                lines = error.stderr.strip().splitlines()
                reason = "\n".join([f"{shlex.join(error.cmd)} failed:", *lines[:20]])
            for extension in self.extensions:
                self.library(folder, extension).unlink(missing_ok=True)
            (folder / NOT_BUILT).write_text(reason + "\n")
            print(f"fastgt: the CPU kernels were not built: {reason}", file=sys.stderr)

    def library(self, folder: Path, extension: Extension) -> Path:
        return folder / f"{extension.name.rpartition('.')[2]}.so"

    def build_all(self, folder: Path) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        temp = Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        version = f'-DFASTGT_VERSION="{VERSION} {digest()}"'

        def compiled(variant: str, source: Path) -> str:
            target = temp / f"{source.stem}-{variant}.o"
            flags = [*FLAGS, *VARIANTS[variant], *extra, version]
            checked([*compiler, *flags, "-c", str(source), "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = {v: [pool.submit(compiled, v, s) for s in SOURCES] for v in VARIANTS}
            for extension in self.extensions:
                objects = [job.result() for job in jobs[extension.variant]]
                library = str(self.library(folder, extension))
                strip = ["-Wl,-s"] if sys.platform == "linux" else []
                checked([*compiler, "-shared", *strip, *extra, *objects, "-o", library])

    def get_outputs(self) -> list[str]:
        folder = ROOT / FOLDER if self.inplace else Path(self.build_lib, FOLDER)
        made = [self.library(folder, extension) for extension in self.extensions]
        return [str(path) for path in [*made, folder / NOT_BUILT] if path.exists()]


def checked(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class Wheel(bdist_wheel):
    """For every Python 3 of this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Kernels(Extension):
    def __init__(self, variant: str):
        sources = [str(path.relative_to(ROOT)) for path in SOURCES]
        super().__init__(f"fastgt.cpu.kernels_{variant}", sources)
        self.depends = [str(path.relative_to(ROOT)) for path in HEADERS]
        self.variant = variant


setup(
    ext_modules=[Kernels(variant) for variant in VARIANTS],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)

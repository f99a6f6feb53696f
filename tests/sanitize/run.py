"""``make sanitize``: the operators' tests on kernels that watch themselves, with GCC on Linux.

``python tests/sanitize/run.py address threads`` builds the package into a folder for each name,
with AddressSanitizer and UndefinedBehaviorSanitizer or with ThreadSanitizer in its kernels, and
runs tests on it. The kernels of this checkout stay as they are. Tasks are small there, so that
small problems have several. ``address`` runs the variant of this CPU, then the baseline, since
partial loads by intrinsics are not watched. Other options go to pytest.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "sanitize"
TESTS = (
    *("aggregate", "aggregate_execution", "aggregate_low_rank", "gated_aggregate"),
    *("segment_softmax", "segment_pool"),
    *("attention", "attention_edges", "attention_edges_execution", "attention_execution"),
    *("attention_gate", "attention_gradients", "attention_windows", "magnitudes"),
    *(
        "channelwise_attention",
        "channelwise_execution",
        "channelwise_gate",
        "channelwise_gradients",
    ),
    *("additive_attention", "additive_execution"),
    *("head_projection", "global_attention", "linear_attention", "linear_gate"),
    *("graph_file", "graph_sample", "partition", "row_dropout"),
)
CHOSEN = "(cpp or threads or cpu) and not memory and not compil"
FLAGS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "threads": "-fsanitize=thread",
}
RUNTIMES = {"address": ("libasan.so", "libubsan.so", "libstdc++.so"), "threads": ("libtsan.so",)}
# Python and PyTorch keep memory to the end; their own code is not watched
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1",
}


def main(argv: Sequence[str] | None = None) -> int:
    """-> exit status: 0 if no sanitizer and no test found a fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", choices=list(FLAGS))
    parser.add_argument("--tests", nargs="+", default=[f"tests/test_{stem}.py" for stem in TESTS])
    args, pytest_options = parser.parse_known_args(argv)
    failed = []
    for name in args.names:
        package = build(name)
        for capability in (None, "default") if name == "address" else (None,):
            if test(name, package, capability, [*args.tests, *pytest_options]):
                failed.append(f"{name} ({capability or 'variant of this CPU'})")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def build(name: str) -> Path:
    """-> the folder of a package whose kernels have the sanitizer."""
    folder = BUILD / name
    flags = f"{FLAGS[name]} -O1 -g -fno-omit-frame-pointer"
    build = ("build", "--build-base", folder, "--build-lib", folder / "package")
    environment = os.environ | {"CXXFLAGS": f"{flags} -DFASTGT_TASK=16"}
    command = (sys.executable, "setup.py", "--quiet", *build)
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    package = folder / "package"
    not_built = package / "fastgt" / "cpu" / "not_built.txt"
    if not_built.exists():
        raise SystemExit(f"the CPU kernels were not built: {not_built.read_text()}")
    if name == "threads":
        threads = ("-std=c++17", "-fPIC", "-shared", HERE / "threads.cpp")
        made = ("-o", package / "libthreads.so")
        subprocess.run((*_compiler(), *shlex.split(flags), *threads, *made), check=True)
    return package


def test(name: str, package: Path, capability: str | None, pytest_options: list[str]) -> int:
    """-> exit status of the tests."""
    environment = os.environ | OPTIONS
    # ahead of what pip installed, and of the plugin beside this file
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (package, HERE)))
    environment["LD_PRELOAD"] = " ".join(map(_runtime, RUNTIMES[name]))
    environment |= {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "passive"}
    if capability:
        environment["ATEN_CPU_CAPABILITY"] = capability
    # the sanitizer writes to the process's own stderr and ends it
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--capture=sys", "-k", CHOSEN]
    if name == "threads":
        options += ["-p", "plain_threads"]
    command = [sys.executable, "-P", "-m", "pytest", *options, *pytest_options]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def _runtime(library: str) -> str:
    command = (*_compiler(), f"-print-file-name={library}")
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        raise SystemExit(f"{shlex.join(command)} finds none: sanitizers need GCC's {library}")
    return path


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "c++")


if __name__ == "__main__":
    sys.exit(main())

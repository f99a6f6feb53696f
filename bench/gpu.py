"""What a GPU is for, in one go: ``make gpu``, or ``python -m fastgt.bench.gpu`` in an environment
that has the test extra.

It looks at the environment, runs every test file compiled, the demo, and the benchmark with all
peers found, and makes the README's tables and plots anew. Whatever is done is written down in the
``--state`` folder, under the commit: stopped after ``--minutes``, or by an accident, the same
command goes on with what is left, and says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastgt import files
from fastgt.bench import harness
from fastgt.bench.render import RESULTS, ROOT, slug

DTYPES = ("bf16", "fp32")
LEAST = 20  # seconds that a step is worth beginning with


@dataclass(frozen=True)
class Step:
    """A command, run in the checkout; cut off, it is begun again."""

    name: str
    command: tuple[str, ...]


def main(argv: Sequence[str] | None = None, run: Callable[..., int] | None = None) -> int:
    """-> exit status: 0 all is done, 1 something failed, 3 time is up and more is left."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="default: %(default)s")
    parser.add_argument("--state", type=Path, default=Path("runs/gpu"), help="default: %(default)s")
    parser.add_argument("--peer-path", type=Path, help="see fastgt bench")
    parser.add_argument("--device", default="cuda", help="default: %(default)s")
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    device = torch.device(args.device)
    for line in _environment(device):
        print(line)
    run = run or _run
    # results that are written make the tree dirty, and are no other code
    commit = harness.environment(device)["commit"].removesuffix("-dirty")
    state = args.state / f"{commit}.json"
    done: dict[str, Any] = json.loads(state.read_text()) if state.exists() else {}
    steps = _steps(device, args.peer_path)
    for step in steps:
        if done.get(step.name) == "passed":
            continue
        left = end - time.monotonic()
        if left < LEAST:
            break
        print(f"\n{step.name}", flush=True)
        status = run(step.command, left)
        done[step.name] = {0: "passed", None: "cut off"}.get(status, "failed")
        args.state.mkdir(parents=True, exist_ok=True)
        files.write(state, (json.dumps(done, indent=1) + "\n").encode())
    failed = [step.name for step in steps if done.get(step.name) == "failed"]
    left_over = [step.name for step in steps if done.get(step.name, "cut off") == "cut off"]
    print(f"\n{len(steps) - len(failed) - len(left_over)} of {len(steps)} steps passed")
    for what, names in (("failed", failed), ("left for the next call", left_over)):
        if names:
            print(f"{what}: {', '.join(names)}")
    return 1 if failed else 3 if left_over else 0


def _environment(device: torch.device) -> list[str]:
    """What the results will be of; RuntimeError where there is no such GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise RuntimeError(f"--device {device}: needs a GPU, and there is none of that name")
    import triton

    free, total = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    return [
        f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}, "
        f"{free / 1e9:.0f} of {total / 1e9:.0f} GB free",
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}",
    ]


def _steps(device: torch.device, peer_path: Path | None) -> list[Step]:
    """The benchmark's main operator before the tests: its figures are what cannot be had
    elsewhere; then the tests, file by file, and the others."""
    python = sys.executable
    peers = ("--peer-path", str(peer_path)) if peer_path else ()
    results = RESULTS / f"{slug(device)}.json"

    def bench(name: str, *options: str) -> Step:
        where = ("--device", str(device), "--json", str(results), "--resume", *peers)
        command = (python, "-m", "fastgt", "bench", *options, *where)
        return Step(f"benchmark: {name}", command)

    pytest = (python, "-m", "pytest", "-q", "-x")
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    return [
        *(bench(f"attention, {dtype}", "attention", "--dtype", dtype) for dtype in DTYPES),
        *(Step(f"tests: {x.name}", (*pytest, str(x))) for x in tests),
        Step("tests: every benchmark once", (*pytest, str(ROOT / "bench"), "--benchmark-disable")),
        Step("demo", (python, "-m", "fastgt", "demo", "--output", str(RESULTS / "demo-gpu.png"))),
        bench("all operators"),
        bench("scaling", "attention", "--scaling", "nodes", "--most", "200000000"),
        Step("README", (python, "-m", "fastgt", "bench", "--render")),
    ]


def _run(command: Sequence[str], seconds: float) -> int | None:
    """-> its exit status; None where it was cut off after so many seconds."""
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
        return None
    except BaseException:
        process.kill()
        raise


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, ImportError) as error:
        sys.exit(f"fastgt.bench.gpu: {error}")

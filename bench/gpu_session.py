"""The steps of a GPU session, each within its time, each with its file."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastgt import files
from fastgt.bench import gpu_benchmarks as benchmarks
from fastgt.bench import gpu_correctness, gpu_pack, gpu_predict, harness
from fastgt.bench.gpu_benchmarks import Benchmark, Where
from fastgt.bench.gpu_pool import Outcome, Pool, Task

Rows = list[dict[str, Any]]
Groups = list[list[Task]]
# seconds of each step; what one leaves is the next one's, and the last has all the rest
STEPS = {
    "environment": 30.0,
    "correctness": 180.0,
    "attention": 240.0,
    "linear": 90.0,
    "launch": 30.0,
    "plans": float("inf"),
}
WORST = {None: 0, 3: 1, 1: 2}  # of exit statuses
COMPILING = 0.5  # of a step's time, at most, before anything is timed
BETWEEN = 1.0  # seconds between two writes of a file
LOG = 8_000_000  # characters, at most


def run(args: argparse.Namespace) -> int:
    """The steps that ``args`` name; see ``gpu.py``."""
    carried: dict[str, Any] | None = None
    if args.carried is not None:
        carried = gpu_pack.check(args.carried)
    if args.minutes <= 0:
        raise ValueError(f"--minutes must be positive, got {args.minutes:g}")
    if not args.rehearse and not torch.cuda.is_available():
        raise RuntimeError("this needs a GPU, and PyTorch finds none here (--rehearse needs none)")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("this needs the package triton, which is missing")
    folder = Path(tempfile.mkdtemp(prefix="fastgt-workers-"))
    pool = Pool(folder)
    try:
        return _Session(args, carried, pool).run(args.steps)
    finally:
        pool.close()
        shutil.rmtree(folder, ignore_errors=True)


class _Session:
    def __init__(self, args: argparse.Namespace, carried: dict[str, Any] | None, pool: Pool):
        self.small, self.out, self.pool = args.rehearse, args.out, pool
        self.end = time.monotonic() + 60 * args.minutes
        self.cores = len(os.sched_getaffinity(0))
        peers = None
        self.settings = {"TRITON_INTERPRET": "1" if self.small else "0"}
        self.commit = harness.commit()
        if carried is not None:
            self.settings["FASTGT_DATA"] = str((args.carried / "data").resolve())
            peers = str((args.carried / "peers").resolve())
            if self.commit == harness.UNKNOWN:
                self.commit = gpu_pack.commit(carried)
        self.where = Where("cpu" if self.small else "cuda", peers, self.small)
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = self.out / "log.txt"
        self.log.write_text("")

    def run(self, steps: Sequence[str]) -> int:
        self.say(f"{'rehearsal' if self.small else 'GPU session'}, commit {self.commit}")
        self.say(f"python {sys.version.split()[0]}, torch {torch.__version__}, {self.cores} cores")
        for package, loss in _NEEDED_FOR.items():
            if harness.version(package) == "absent":
                self.say(f"{package} is absent: {loss}")
        chosen = {name: seconds for name, seconds in STEPS.items() if name in steps}
        if self.small:
            for line in gpu_predict.lines(self.pool, chosen):
                self.say(line)
        statuses = [self.step(name) for name in chosen]
        return max(statuses, key=WORST.__getitem__) or 0

    def step(self, name: str) -> int | None:
        """-> its part of the exit status."""
        begun = time.monotonic()
        until = self.end if self.small else min(self.end, begun + STEPS[name])
        result = _Result(self.out / f"{name}.json", name, self.commit)
        before, groups, alone = getattr(self, f"_{name}")()
        self.say(f"\n{name}: {sum(map(len, groups))} tasks, {max(0, until - begun):.0f} s at most")
        if before:
            compiled = min(until, begun + COMPILING * (until - begun))
            for outcome in self.tasks(before, self.cores, compiled):
                if outcome.error:
                    self.say(f"  compiling {outcome.task.name}: {outcome.error}")
            result.compiled_s = time.monotonic() - begun
        over = set()
        for outcome in self.tasks(groups, 1 if alone else self.cores, until):
            over.add(outcome.task.name)
            self.note(name, outcome, result)
        result.left += [t.name for group in groups for t in group if t.name not in over]
        result.write(time.monotonic() - begun, done=True)
        for line in result.lines():
            self.say(line)
        return 1 if result.wrong else 3 if result.left else None

    def tasks(self, groups: Groups, workers: int, until: float) -> Iterable[Outcome]:
        if self.small:  # an interpreter has no such times
            groups = [[task._replace(seconds=600.0) for task in group] for group in groups]
        # workers share the cores, and each would take them all
        more = {"OMP_NUM_THREADS": "1"} if workers > 1 else {}
        for outcome in self.pool.run(groups, workers, until, self.settings | more):
            if outcome.output:
                self.record(f"--- {outcome.task.name}: {outcome.error}\n{outcome.output}\n")
            yield outcome

    def note(self, step: str, outcome: Outcome, result: _Result) -> None:
        """The rows of an outcome, or why there are none."""
        rows = outcome.value or []
        if step == "correctness":
            rows = _checked(outcome)
        elif outcome.error:
            rows = _crashed(outcome)
        if outcome.error and (not rows or outcome.error == "time was up"):
            result.left.append(f"{outcome.task.name}: {outcome.error}")
            rows = []
        result.add(rows)
        if step != "correctness":
            for row in rows or [{"match": None, "error": outcome.error}]:
                self.say(f"  {outcome.task.name}: {_short(row)}")
        else:
            for row in rows:
                if row["match"] is not True or not row["same_bits"]:
                    self.say(f"  {outcome.task.name}: {_short(row)}")

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.record(f"{line}\n")

    def record(self, text: str) -> None:
        if self.log.stat().st_size < LOG:
            with self.log.open("a") as file:
                file.write(text)

    # each: groups that compile, groups that count, and whether those have the device alone

    def _environment(self) -> tuple[Groups, Groups, bool]:
        return [], [[Task("ceilings", benchmarks.environment, (self.where,), 30.0)]], True

    def _correctness(self) -> tuple[Groups, Groups, bool]:
        groups = [
            [
                Task(
                    f"{variant}, {problem}, {str(dtype).removeprefix('torch.')}",
                    gpu_correctness.check,
                    (problem, variant, dtype, self.where.device, self.small),
                )
                for problem, variant, dtype in group
            ]
            for group in gpu_correctness.groups(self.small)
        ]
        return [], groups, False

    def _attention(self) -> tuple[Groups, Groups, bool]:
        return self._benchmarks(benchmarks.ATTENTION)

    def _linear(self) -> tuple[Groups, Groups, bool]:
        return self._benchmarks(benchmarks.LINEAR)

    def _benchmarks(self, chosen: Sequence[Benchmark]) -> tuple[Groups, Groups, bool]:
        if self.small:
            chosen = benchmarks.rehearsed(chosen)
        before = [
            [Task(f"{kind}, {provider}", benchmarks.prepare, (kind, provider, self.where), 120.0)]
            for kind in benchmarks.kinds(chosen)
            for provider in benchmarks.providers(kind)
        ]
        # what compiles longest first; an interpreter compiles nothing, but the way is gone
        before.sort(key=lambda group: group[0].args[1] not in benchmarks.COMPILED)
        before = before[-1:] if self.small else before
        return before, [[_measured(x, (), self.where) for x in chosen]], True

    def _launch(self) -> tuple[Groups, Groups, bool]:
        tasks = [Task("calls", benchmarks.launches, (self.where,))]
        for operator in ("attention", "linear_attention"):
            tasks.append(Task(f"{operator}, captured", benchmarks.captured, (operator, self.where)))
        return [], [tasks], True

    def _plans(self) -> tuple[Groups, Groups, bool]:
        before, tasks = [], []
        for name, function, args in benchmarks.tuned(self.small):
            few, many = benchmarks.TUNED_ROWS[self.small]
            before.append([Task(name, function, (*args, few, self.where), 120.0)])
            tasks.append(Task(name, function, (*args, many, self.where), 120.0))
        return before[:1] if self.small else before, [tasks], True


class _Result:
    """The file of a step: what it came to so far, complete whenever it is read."""

    def __init__(self, path: Path, step: str, commit: str):
        self.path, self.step, self.commit = path, step, commit
        self.rows: Rows = []
        self.left: list[str] = []
        self.compiled_s = 0.0
        self.begun = self.written = time.monotonic()
        self.write(0.0)

    @property
    def wrong(self) -> Rows:
        """Rows of ours that are not right."""
        return [row for row in self.rows if _is_wrong(row)]

    def add(self, rows: Rows) -> None:
        for row in rows:
            if row.get("commit") == harness.UNKNOWN:
                row["commit"] = self.commit
        self.rows += rows
        if time.monotonic() - self.written > BETWEEN:
            self.write(time.monotonic() - self.begun)

    def write(self, seconds: float, done: bool = False) -> None:
        content = {
            "step": self.step,
            "commit": self.commit,
            "state": "cut off" if not done else "time was up" if self.left else "done",
            "seconds": round(seconds, 1),
            "compiled_s": round(self.compiled_s, 1),
            "left": self.left,
            "rows": self.rows,
        }
        files.write(self.path, (json.dumps(content, indent=1) + "\n").encode())
        self.written = time.monotonic()

    def lines(self) -> list[str]:
        told = [
            f"{self.step}: {len(self.rows)} rows, {len(self.wrong)} wrong; "
            f"{time.monotonic() - self.begun:.0f} s, {self.compiled_s:.0f} s of them compiling"
        ]
        if self.left:
            told.append(f"{self.step}: {len(self.left)} tasks left, first {self.left[0]}")
        return told


def _is_wrong(row: dict[str, Any]) -> bool:
    """Of what is ours and must be right; peers and tiles may fail, a path may not fit a graph."""
    if "variant" in row:
        return row["match"] is not True or not row["same_bits"]
    if row.get("provider") in ("fastgt", "no gate"):
        return row["match"] is not True
    ours = "change" not in row and row.get("provider", "fastgt").startswith("fastgt")
    return ours and row.get("match") is False


def _checked(outcome: Outcome) -> Rows:
    """The row of a check, or that of one that came to nothing."""
    if outcome.value is not None:
        return [{"same_bits": False} | outcome.value]
    problem, variant, dtype, *_ = outcome.task.args
    operator, _, name = variant.partition(", ")
    what = {"operator": operator, "variant": name, "problem": problem}
    dtype = str(dtype).removeprefix("torch.")
    return [what | {"dtype": dtype, "match": None, "same_bits": False, "error": outcome.error}]


def _measured(benchmark: Benchmark, without: tuple[str, ...], where: Where) -> Task:
    def again(outcome: Outcome) -> Task | None:
        """Without the peer that it died of."""
        who = _culprit(outcome)
        if who not in benchmark.peers or outcome.error == "time was up":
            return None
        return _measured(benchmark, (*without, who), where)

    return Task(str(benchmark), benchmarks.measure, (benchmark, without, where), 120.0, again)


def _culprit(outcome: Outcome) -> str:
    """Who was at work when it ended."""
    told = [x for x in outcome.told if isinstance(x, str)]
    return told[-1] if told else ""


def _crashed(outcome: Outcome) -> Rows:
    """The row of who made a benchmark end."""
    who = _culprit(outcome)
    columns = next((x for x in outcome.told if isinstance(x, dict)), None)
    if columns is None or not who:
        return []
    return [columns | {"provider": who, "match": None, "error": f"crashed: {outcome.error}"}]


def _short(row: dict[str, Any]) -> str:
    """A row in a line."""
    said = [str(row[name]) for name in ("provider", "call", "path", "width") if name in row]
    if row.get("error"):
        said.append(str(row["error"]).splitlines()[0])
    for name in ("forward_s", "both_s", "replay_s"):
        if name in row:
            said.append(f"{name.removesuffix('_s')} {row[name] * 1e3:.3f} ms")
    for name in ("both_x", "both_roofline", "microseconds", "rho64", "x"):
        if row.get(name) is not None:
            said.append(f"{name} {row[name]:.3g}")
    return ", ".join(said)


_NEEDED_FOR = {
    "torch_geometric": "its peers and the layers of fastgt.pyg are left out",
    "torch_scatter": "it is no peer here",
    "scipy": "no step needs it",
}

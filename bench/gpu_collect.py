"""Committed results from what a GPU session brought home."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from fastgt import files
from fastgt.bench import gpu_session, table, tune
from fastgt.bench.harness import slug_of

Rows = list[dict[str, Any]]
NOT_RUN = "not run"


def collect(folder: Path, results: Path, plans: Path | None = None) -> Iterator[str]:
    """Write the rows of the session's files into those of its device; -> what was written::

        attention.json, linear.json    results/DEVICE.json, in the place of the same measurements
        launch.json                    results/launch-DEVICE.json
        plans.json                     the package's table of plans, and results/tiles-DEVICE.json
        correctness.json               results/correctness-DEVICE.json: counts, and what was wrong
        environment.json               beside those, in that file

    Args:
        folder: The session's ``--out``.
        results: The folder of committed results.
        plans: The table of plans; the package's own if None.

    A step without a file, for time was up before it, has no rows.

    Raises:
        ValueError: There is no such file, one is damaged, or they are not of one GPU.
    """
    steps = {name: _read(folder / f"{name}.json", name) for name in gpu_session.STEPS}
    rows = {name: step["rows"] for name, step in steps.items()}
    if all(step["state"] == NOT_RUN for step in steps.values()):
        names = ", ".join(f"{name}.json" for name in steps)
        raise ValueError(f"--collect {folder}: it holds none of {names}")
    device = _device(folder, rows)
    name = slug_of(device)

    benchmarks, alone = _compared([*rows["attention"], *rows["linear"]])
    for row in alone:
        yield f"{row['operator']}, {row['problem']}: left out: {row['provider']} stands alone"
    if benchmarks:
        path = results / f"{name}.json"
        new = {table.key(row) for row in benchmarks}
        old = json.loads(path.read_text()) if path.exists() else []
        yield _write(path, [row for row in old if table.key(row) not in new] + benchmarks)
    launches = [_launched(row) for row in rows["launch"]]
    for row in launches:
        if row.get("match") is False or "microseconds" not in row:
            yield f"{row['call']}: {row['error']}"
    timed = [row for row in launches if "microseconds" in row]
    if timed:
        yield _write(results / f"launch-{name}.json", timed)
    measured = [row for row in rows["plans"] if "rho64" in row]
    if measured:
        path = plans or Path(str(resources("fastgt.data") / "plans.json"))
        merged = tune.merged(json.loads(path.read_text()), measured)
        tune.write_plans(path, merged)
        yield f"{path}: {len(measured)} plans of {device}"
    tiles = [row for row in rows["plans"] if "change" in row]
    if tiles:
        yield _write(results / f"tiles-{name}.json", tiles)
    yield _write(results / f"correctness-{name}.json", _summary(steps))
    for step, content in steps.items():
        state = content["state"]
        yield f"{step}: {state} in {content['seconds']} s, {len(content['left'])} tasks left"


def _read(path: Path, step: str) -> dict[str, Any]:
    if not path.is_file():
        return {"state": NOT_RUN, "seconds": 0.0, "left": [], "rows": [], "commit": None}
    try:
        content = json.loads(path.read_text())
        if content["step"] != step or not isinstance(content["rows"], list):
            raise ValueError("it is no file of that step")
        _ = content["state"], content["seconds"], content["left"], content["commit"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--collect {path.parent}: {path.name} is damaged: {error}") from error
    return content


def _device(folder: Path, rows: dict[str, Rows]) -> str:
    devices = {row["device"] for step in rows.values() for row in step if "device" in row}
    if len(devices) != 1:
        raise ValueError(f"--collect {folder}: rows of {len(devices)} devices: {sorted(devices)}")
    device = devices.pop()
    if "threads" in device:
        raise ValueError(f"--collect {folder}: this was a rehearsal, on {device}: nothing to keep")
    return device


def _compared(rows: Rows) -> tuple[Rows, Rows]:
    """Rows beside one of ours; and others, of a benchmark that ended when it had crashed once."""

    def of(row: dict[str, Any]) -> tuple:
        return table.key(row)[:-1]

    ours = {of(row) for row in rows if row["provider"] in ("fastgt", "no gate")}
    return [x for x in rows if of(x) in ours], [x for x in rows if of(x) not in ours]


def _launched(row: dict[str, Any]) -> dict[str, Any]:
    """With a time for each: a captured call has that of a replay."""
    replay = {"microseconds": row["replay_s"] * 1e6} if "replay_s" in row else {}
    return replay | {"target": row["device"]} | row


def _summary(steps: dict[str, dict[str, Any]]) -> Rows:
    """A row for each operator, variant and dtype: how many problems, how many right, and those
    that are not; after a row of the machine and what every step took."""
    commits = {content["commit"] for content in steps.values()} - {None}
    machine: dict[str, Any] = {"commit": ", ".join(sorted(commits))}
    for row in steps["environment"]["rows"]:
        machine |= row
    machine["seconds"] = {step: content["seconds"] for step, content in steps.items()}
    machine["left"] = {step: len(content["left"]) for step, content in steps.items()}
    found: dict[tuple, dict[str, Any]] = {}
    for row in steps["correctness"]["rows"]:
        what = row["operator"], row["variant"], row["dtype"]
        names = ("checked", "variant", "dtype")
        mine = found.setdefault(
            what, dict(zip(names, what, strict=True)) | {"problems": 0, "right": 0, "wrong": []}
        )
        mine["problems"] += 1
        if row["match"] is True and row["same_bits"]:
            mine["right"] += 1
        else:
            mine["wrong"].append({k: row.get(k) for k in ("problem", "error", "same_bits")})
    return [machine, *found.values()]


def _write(path: Path, rows: Rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, (json.dumps(rows, indent=1) + "\n").encode())
    return f"{path}: {len(rows)} rows"

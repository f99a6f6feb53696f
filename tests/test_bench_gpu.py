"""The GPU session without a GPU: rehearsed in Triton's interpreter, and the times of a device."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import fastgt
from fastgt.bench import (
    device_time,
    gpu,
    gpu_benchmarks,
    gpu_correctness,
    gpu_problems,
    gpu_session,
)
from fastgt.bench.gpu_pool import Outcome, Task

FILES = {f"{step}.json" for step in gpu_session.STEPS} | {"log.txt"}


def start(*options, module=False):
    """The session as on a machine where nothing is installed: the script of the checkout."""
    script = ["-m", "fastgt.bench.gpu"] if module else [str(gpu.ROOT / "bench" / "gpu.py")]
    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, *script, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=gpu.ROOT.anchor,
        env=environment,
    )


def read(folder, step):
    return json.loads((folder / f"{step}.json").read_text())


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """-> what it printed, and its folder."""
    out = tmp_path_factory.mktemp("rehearsal")
    process = start("--rehearse", "--out", str(out), "--minutes", "30")
    printed = process.communicate(timeout=1800)[0]
    assert process.returncode == 0, printed
    return printed, out


def test_a_rehearsal_goes_through_every_step(rehearsal, compiled_kernels):
    printed, out = rehearsal
    assert {x.name for x in out.iterdir()} == FILES
    assert len(FILES) <= 8
    for step in gpu_session.STEPS:
        content = read(out, step)
        assert content["state"] == "done", step
        assert content["left"] == []
        assert content["rows"], step
    checked = read(out, "correctness")["rows"]
    assert {f"{x['operator']}, {x['variant']}" for x in checked} == set(gpu_correctness._VARIANTS)
    assert {x["dtype"] for x in checked} == {"float32", "bfloat16", "float16"}
    assert all(x["match"] is True and x["same_bits"] for x in checked)
    timed = [row for step in ("attention", "linear") for row in read(out, step)["rows"]]
    assert {row["operator"] for row in timed} == set(gpu_benchmarks.CASES)
    assert all(row["both_s"] > 0 for row in timed if row["provider"] in ("fastgt", "no gate"))
    assert all(row["commit"] == read(out, "environment")["commit"] for row in timed)
    calls = {row["call"]: row for row in read(out, "launch")["rows"]}
    assert calls["forward, no_grad"]["microseconds"] > 0
    assert "needs a GPU" in calls["forward and backward of attention, captured"]["error"]
    kinds = [set(row) & {"rho64", "change"} for row in read(out, "plans")["rows"]]
    assert {"rho64"} in kinds
    assert {"change"} in kinds
    assert f"correctness: {len(gpu_correctness.VARIANTS)} rows, 0 wrong; " in printed
    assert printed in (out / "log.txt").read_text()


def test_a_rehearsal_predicts_the_time_on_the_device(rehearsal):
    printed, _ = rehearsal
    found = {
        line.split()[0]: line.split()[1:] for line in printed.splitlines() if " kernels, " in line
    }
    assert list(found) == list(gpu_session.STEPS)
    kernels, checks = int(found["correctness"][0]), int(found["correctness"][2])
    assert checks == sum(map(len, gpu_correctness.groups(False)))
    assert 500 < kernels < 3000
    assert int(found["plans"][0]) > 100
    total = next(line for line in printed.splitlines() if line.startswith("  together"))
    assert float(total.split()[-2]) < 11


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = ["make", "-s", "gpu", f"PYTHON={sys.executable}", f"OUT={tmp_path / 'out'}"]
    run = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    lines = [line for line in run.stderr.splitlines() if not line.startswith("make")]
    assert lines == [
        "fastgt.bench.gpu: this needs a GPU, and PyTorch finds none here (--rehearse needs none)"
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rehearse", "--minutes", "0"], "--minutes must be positive, got 0"),
        (["--rehearse", "--carried", "nowhere"], "--carried nowhere: manifest.json is missing"),
    ],
)
def test_what_cannot_begin_says_why(capsys, options, message):
    assert gpu.main(options) == 2
    assert message in capsys.readouterr().err


def test_without_torch_it_says_so_in_one_line(tmp_path):
    run = subprocess.run(
        [sys.executable, "-S", str(gpu.ROOT / "bench" / "gpu.py")],
        capture_output=True,
        text=True,
        env={k: x for k, x in os.environ.items() if k != "PYTHONPATH"},
    )
    assert run.returncode == 2
    assert run.stderr == "fastgt.bench.gpu: No module named 'torch'\n"


def test_killed_it_leaves_whole_files(tmp_path):
    process = start("--rehearse", "--steps", "launch", "plans", "--out", str(tmp_path))
    until = time.monotonic() + 600
    while not (tmp_path / "launch.json").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert read(tmp_path, "launch")["state"] == "cut off"
    assert not list(tmp_path.glob("*.partial*"))


def test_scipy_is_not_needed():
    code = (
        "import sys; sys.modules['scipy'] = None\n"
        "from fastgt.bench import gpu, gpu_session\n"
        "from fastgt.testing import PROBLEMS\n"
        "for x in gpu_session.benchmarks.ATTENTION[1:5]: PROBLEMS[x.problem].load()\n"
        "print('all there')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "all there\n", run.stderr


def test_there_are_thirty_problems_and_every_operator():
    assert len(gpu_problems.PROBLEMS) == len(gpu_correctness._PROBLEMS) == 30
    covered = {how.operator for how in gpu_correctness.VARIANTS}
    # two that are sums over the same kernels as segment_mean, and what is no operator
    others = {"segment_sum", "virtual_node", "implementation", "prune_heads"}
    others |= {"Graph", "Aux", "AuxRequest", "DropoutSeed", "PairDropoutSeed"}
    others |= {"accelerate", "restore"}
    assert covered | others == set(fastgt.__all__)
    assert {how.plan for how in gpu_correctness.VARIANTS} == {"gather", "windows", "graphs"}


@pytest.mark.parametrize("number", range(len(gpu_problems.PROBLEMS)))
def test_every_problem_and_every_way_are_right_in_the_interpreter(number):
    """At the size of a rehearsal, some ways a problem: another one's are the next ones."""
    problem = gpu_problems.PROBLEMS[number].name
    dtype = gpu_correctness.DTYPES[number % 3]
    graph = gpu_correctness._graph(problem, "cpu", True)
    ways = gpu_correctness.VARIANTS[number:] + gpu_correctness.VARIANTS[:number]
    for how in [how for how in ways if how.fits(graph, 8, dtype)][:2]:
        name = f"{how.operator}, {how.name}"
        row = gpu_correctness.check(problem, name, dtype, "cpu", True, tell=None)
        assert row["match"] is True, row
        assert row["same_bits"]


def test_checks_are_right_at_the_size_of_a_session(monkeypatch):
    """What is expected of the device, by what computes on a CPU: it has no plans, and adds up a
    hub's thousands of edges one by one, where kernels take 512 at a time."""
    call = gpu_correctness._call

    def by_torch(problem, how, graph, dtype, impl):
        how = how._replace(plan="gather")
        return call(problem, how, graph, dtype, "cpp" if impl == "triton" else impl)

    monkeypatch.setattr(gpu_correctness, "_call", by_torch)
    groups = list(gpu_correctness.groups(False))
    kinds = {way for group in groups for _, way, _ in group}
    assert kinds == set(gpu_correctness._VARIANTS)
    for number, group in enumerate(groups[::17]):
        problem, way, dtype = group[number % len(group)]
        if gpu_correctness._VARIANTS[way].plan == "gather" and "hub" not in problem:
            row = gpu_correctness.check(problem, way, dtype, "cpu", False, tell=None)
            assert row["match"] is True, row
            assert row["same_bits"]


def test_a_wrong_kernel_and_moving_bits_are_told(monkeypatch):
    args = "band", "aggregate, sum", torch.float32, "cpu", True
    real = fastgt.aggregate
    off = [0.0]

    def aggregate(x, *, impl, **how):
        out = real(x, impl=impl, **how)
        return out if impl == "reference" else out + off[0]

    monkeypatch.setattr(fastgt, "aggregate", aggregate)
    assert gpu_correctness.check(*args, tell=None)["same_bits"]
    off[0] = 0.1
    row = gpu_correctness.check(*args, tell=None)
    assert row["match"] is False
    assert "output is off by" in row["error"]
    assert gpu_session._is_wrong(row | {"same_bits": False})

    def moving(x, *, impl, **how):
        off[0] += 1e-7
        return (
            aggregate(x, impl=impl, **how)
            if impl == "reference"
            else real(x, impl=impl, **how) * (1 + off[0])
        )

    off[0] = 0.0
    monkeypatch.setattr(fastgt, "aggregate", moving)
    row = gpu_correctness.check(*args, tell=None)
    assert row["match"] is True
    assert row["same_bits"] is False
    assert gpu_session._is_wrong(row)


def test_kernels_are_counted_without_being_compiled():
    code = (
        "import torch\n"
        "from fastgt import neighborhood_attention as na\n"
        "from fastgt.bench.gpu_count import counted\n"
        "from fastgt.testing import random_graph\n"
        "def call(width):\n"
        "    x = torch.randn(50, 2, width, requires_grad=True)\n"
        "    na(x, x, x, random_graph(0, 50, 300), impl='triton').sum().backward()\n"
        "with counted() as kernels:\n"
        "    call(16); once = len(kernels)\n"
        "    call(16); again = len(kernels)\n"
        "    call(32); other = len(kernels)\n"
        "print(once, again, other)\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert run.stdout == "3 3 6\n", run.stderr


def test_a_benchmark_goes_on_without_the_peer_that_it_died_of():
    benchmark = gpu_benchmarks.ATTENTION[0]
    where = gpu_benchmarks.Where("cuda", None, False)
    task = gpu_session._measured(benchmark, (), where)
    columns = {"operator": "attention", "problem": "h_to_h", "repeats": 9}
    told = [columns, "fastgt", "pyg", "flex attention"]
    outcome = Outcome(task, error="its process ended with -6", told=told)
    again = task.again(outcome)
    assert again.args == (benchmark, ("flex attention",), where)
    (row,) = gpu_session._crashed(outcome)
    assert row == columns | {
        "provider": "flex attention",
        "match": None,
        "error": "crashed: its process ended with -6",
    }
    outcome = Outcome(again, error="its process ended with -6", told=[columns, "pyg"])
    assert again.again(outcome).args[1] == ("flex attention", "pyg")
    # ours is compared with: without it there is nothing to say, and it is told
    outcome = Outcome(task, error="its process ended with -6", told=[columns, "fastgt"])
    assert task.again(outcome) is None
    (row,) = gpu_session._crashed(outcome)
    assert gpu_session._is_wrong(row)
    assert not gpu_session._is_wrong(row | {"provider": "flex attention"})


def test_a_check_that_crashed_has_its_row():
    args = "hub", "aggregate, sum", torch.float16, "cuda", False
    outcome = Outcome(Task("a", gpu_correctness.check, args), error="its process ended with -6")
    (row,) = gpu_session._checked(outcome)
    assert (row["operator"], row["variant"], row["dtype"]) == ("aggregate", "sum", "float16")
    assert gpu_session._is_wrong(row)


def test_attention_is_timed_by_each_path():
    where = gpu_benchmarks.Where("cpu", None, True)
    case = gpu_benchmarks._case(
        gpu_benchmarks.rehearsed(gpu_benchmarks.ATTENTION)[0]._replace(problem="molecules"), where
    )
    assert {"fastgt, gather", "fastgt, windows", "fastgt, graphs"} < set(case.providers)


class FakeCuda:
    """The calls of ``torch.cuda`` that timing makes, in order; a call takes a millisecond."""

    def __init__(self):
        self.log, self.now = [], 0.0
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                self.at = cuda.now
                cuda.log.append("record")

            def synchronize(self):
                cuda.log.append("synchronize")

            def elapsed_time(self, other):
                return other.at - self.at

        class Flushed:
            def zero_(self):
                cuda.log.append("flush")
                cuda.now += 100

        self.Event, self.Flushed = Event, Flushed

    def call(self, milliseconds, name="call"):
        self.log.append(name)
        self.now += milliseconds


def test_a_call_is_timed_by_events_after_the_cache_is_emptied(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Event", fake.Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(device_time.torch, "empty", lambda *size, **how: fake.Flushed())
    clock = device_time.clock(torch.device("cuda"))

    def step(between):
        fake.call(2, "forward")
        between()
        fake.call(3, "backward")

    assert clock(step) == (0.002, 0.005)
    assert fake.log == [
        *("flush", "record", "forward", "record", "backward", "record", "synchronize")
    ]
    assert clock(lambda between: fake.call(4)) == (0.004,)


def test_a_call_that_cannot_be_captured_says_so(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: fake.log.append("synchronize"))
    monkeypatch.setattr(device_time, "_kernels", lambda call, device: 1e-3)

    def refuses(call, device):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(device_time, "_replay", refuses)
    row = device_time.measure("both", lambda: fake.call(0), torch.device("cuda"))
    assert row["both_kernel_s"] == 1e-3
    assert row["both_replay_error"] == "operation not permitted when stream is capturing"
    assert row["both_wall_s"] > 0
    assert fake.log[:4] == ["synchronize", "call", "synchronize", "synchronize"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_wall_kernel_and_replay_times_of_a_product():
    x = torch.rand(2048, 2048, device="cuda")
    row = device_time.measure("forward", lambda: x @ x, x.device)
    assert 0 < row["forward_kernel_s"] < row["forward_wall_s"]
    assert 0 < row["forward_replay_s"] < row["forward_wall_s"]
    (seconds,) = device_time.clock(x.device)(lambda between: x @ x)
    assert seconds > 0.5 * row["forward_kernel_s"]

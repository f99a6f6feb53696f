"""What a GPU session does, with commands that are looked at and not run."""

import json
import sys
from pathlib import Path

import pytest
import torch

from fastgt.bench import device_time, gpu


@pytest.fixture
def session(monkeypatch, tmp_path):
    """-> a session whose commands end as ``statuses`` says, 0 if it is silent; what ran."""
    monkeypatch.setattr(gpu, "_environment", lambda device: ["a GPU"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(
        gpu.harness, "environment", lambda device: {"commit": "abc-dirty", "device": "a GPU"}
    )
    ran = []
    statuses = {}

    def run(command, seconds):
        ran.append(" ".join(command))
        assert 0 < seconds <= 600
        return next((s for part, s in statuses.items() if part in ran[-1]), 0)

    def session(*options):
        ran.clear()
        return gpu.main(["--state", str(tmp_path), *options], run), list(ran)

    session.statuses, session.state = statuses, tmp_path / "abc.json"
    return session


def test_everything_is_run_once(session, capsys):
    status, ran = session("--peer-path", "peers")
    assert status == 0
    assert "pytest -q -x" in ran[2]
    tests = [command for command in ran if "pytest" in command]
    assert len(tests) == len(list((gpu.ROOT / "tests").glob("test_*.py"))) + 1
    assert f"{gpu.ROOT / 'bench'} --benchmark-disable" in tests[-1]
    attention = next(command for command in ran if "bench attention --dtype bf16" in command)
    assert "--device cuda --json" in attention
    assert "nvidia-h100-80gb-hbm3.json --resume --peer-path peers" in attention
    assert any("fastgt demo" in command for command in ran)
    assert ran[-1].endswith("fastgt bench --render")
    assert f"{len(ran)} of {len(ran)} steps passed" in capsys.readouterr().out
    assert session() == (0, [])  # and not again


def test_what_was_cut_off_or_failed_is_run_again(session, capsys):
    session.statuses |= {"test_graph.py": 1, "all operators": 1, "fastgt demo": None}
    status, ran = session()
    assert status == 1
    out = capsys.readouterr().out
    assert "failed: tests: test_graph.py" in out
    assert "left for the next call: demo" in out
    assert json.loads(session.state.read_text())["demo"] == "cut off"
    session.statuses.clear()
    status, again = session()
    assert status == 0
    assert len(again) == 2
    assert len(ran) > len(again)


def test_no_step_begins_when_time_is_up(session, capsys):
    status, ran = session("--minutes", "0.1")
    assert status == 3
    assert ran == []
    assert "left for the next call: benchmark: attention, bf16" in capsys.readouterr().out


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="needs a GPU, and there is none"):
        gpu.main([])


def test_commands_are_cut_off_in_time(tmp_path):
    assert gpu._run([sys.executable, "-c", "pass"], 60) == 0
    assert gpu._run([sys.executable, "-c", "raise SystemExit(7)"], 60) == 7
    mark = Path(tmp_path / "mark")
    code = f"import time; time.sleep(30); open({str(mark)!r}, 'w')"
    assert gpu._run([sys.executable, "-c", code], 0.2) is None
    assert not mark.exists()


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

"""Tasks in processes of their own: what one does to its process costs that task alone."""

import os
import time

import pytest
import torch
from pool_tasks import die, double, fail, identity, setting, sick, sleep

from fastgt.bench import gpu_pool
from fastgt.bench.gpu_pool import Pool, Task


@pytest.fixture
def outcomes(tmp_path):
    """-> runs groups; -> outcomes by their tasks' names, in order."""
    pool = Pool(tmp_path)

    def run(*groups, workers=2, seconds=300, **how):
        found = list(pool.run(groups, workers, time.monotonic() + seconds, **how))
        assert len({outcome.task.name for outcome in found}) == len(found)
        assert not pool.busy
        return {outcome.task.name: outcome for outcome in found}

    yield run
    pool.close()


def test_a_crash_costs_one_task(outcomes):
    found = outcomes(
        [Task("1", double, (1,)), Task("dies", die), Task("2", double, (2,))],
        [Task("fails", fail), Task("3", double, (3,)), Task("sick", sick), Task("me", identity)],
    )
    assert [found[name].value for name in "123"] == [2, 4, 6]
    assert found["dies"].error == "its process ended with -11"
    assert found["dies"].told == ["dying"]
    assert "last words" in found["dies"].output
    assert found["fails"].error == "ValueError: no such thing"
    assert found["sick"].error == "an illegal memory access was encountered"
    assert found["2"].told == ["doubling 2"]
    assert found["me"].value not in (None, os.getpid())
    assert all(outcome.error == "" for name, outcome in found.items() if outcome.value is not None)


def test_who_takes_too_long_is_ended(outcomes):
    begun = time.monotonic()
    found = outcomes([Task("slow", sleep, seconds=4.0), Task("1", double, (1,))])
    assert found["slow"].error == "not done after 4 s"
    assert found["1"].value == 2
    assert time.monotonic() - begun < 300


def test_nothing_begins_once_time_is_up(outcomes):
    assert outcomes([Task("1", double, (1,))], seconds=-1) == {}
    found = outcomes([Task("slow", sleep), Task("1", double, (1,))], seconds=8)
    assert set(found) == {"slow"}
    assert found["slow"].error == "time was up"


def test_another_task_is_tried_where_one_fails(outcomes):
    def again(outcome):
        assert outcome.error
        return Task("instead", double, (5,))

    found = outcomes([Task("dies", die, (), 60.0, again), Task("1", double, (1,))])
    assert found["instead"].value == 10
    assert list(found) == ["dies", "instead", "1"]


def test_workers_are_kept_for_tasks_of_their_settings(outcomes):
    group = [Task(str(i), identity) for i in range(3)]
    found = outcomes(group, workers=1)
    assert len({found[str(i)].value for i in range(3)}) == 1
    assert outcomes([Task("later", identity)])["later"].value == found["0"].value
    settings = {"FASTGT_TEST_OF_A_SETTING": "here"}
    other = outcomes([Task("set", setting), Task("me", identity)], settings=settings)
    assert other["set"].value == "here"
    assert other["me"].value != found["0"].value
    assert "FASTGT_TEST_OF_A_SETTING" not in os.environ


@pytest.mark.parametrize("well", [True, False])
def test_a_device_that_does_not_answer_is_heard_of(monkeypatch, well):
    def synchronize():
        if not well:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    if well:
        gpu_pool.check_device()
        return
    with pytest.raises(gpu_pool.Sick, match="illegal memory access was encountered"):
        gpu_pool.check_device()

"""Tasks in processes of their own: whatever becomes of one costs that one alone.

A wrong address on a GPU leaves its whole process useless, a loop without end one that never
answers. Workers are processes that take a group of tasks at a time, one after the other; who dies,
or takes too long, is replaced, and its group goes on after the task that it died of.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

TAIL = 4_000  # characters of what a worker wrote, that are kept when it dies


class Task(NamedTuple):
    """A call: ``function(*args, tell)``, in a worker.

    Attributes:
        name: Of the task, for people.
        function: At the top of a module. What it tells is kept in :attr:`Outcome.told`.
        args: Picklable.
        seconds: After so many it is ended.
        again: Of an outcome with an error: what is tried next, if anything.
    """

    name: str
    function: Callable[..., Any]
    args: tuple = ()
    seconds: float = 60.0
    again: Callable[[Outcome], Task | None] = lambda outcome: None


@dataclass
class Outcome:
    """What became of a task.

    Attributes:
        value: What it returned; None where there is an ``error``.
        error: Why it returned nothing.
        told: What it told on the way, in order.
        seconds: That it took.
        output: The end of what its worker wrote, of one that died.
    """

    task: Task
    value: Any = None
    error: str = ""
    told: list[Any] = field(default_factory=list)
    seconds: float = 0.0
    output: str = ""


class Sick(Exception):
    """The device does not answer this process any more."""


class Pool:
    """Workers, kept for further tasks until :meth:`close`: each takes seconds to start.

    Args:
        folder: For what workers write.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.idle: list[_Worker] = []
        self.busy: list[_Worker] = []

    def run(
        self,
        groups: Iterable[Sequence[Task]],
        workers: int,
        until: float,
        settings: dict[str, str] | None = None,
    ) -> Iterator[Outcome]:
        """-> outcomes as they come in, of all tasks that began before ``until``, by
        :func:`time.monotonic`. Those that have not ended then are ended; those that have not begun
        have no outcome.

        Args:
            groups: Each is one worker's, tasks in this order.
            workers: Processes at once, at most.
            until: When all must be over.
            settings: Environment variables of the workers.
        """
        left = deque(deque(group) for group in groups if group)
        try:
            while left or self.busy:
                while left and len(self.busy) < workers and time.monotonic() < until:
                    self._start(left.popleft(), settings or {})
                if not self.busy:
                    return
                ends = min(until, *(worker.ends for worker in self.busy))
                channels = {worker.channel: worker for worker in self.busy}
                heard = connection.wait(list(channels), max(0.0, ends - time.monotonic()))
                for channel in heard:
                    worker = channels[channel]  # type: ignore[index]
                    outcome = worker.hear()
                    if outcome is not None:
                        yield outcome
                        self._next(worker, left, until)
                now = time.monotonic()
                for worker in [w for w in self.busy if w.ends <= now or until <= now]:
                    late = worker.ends <= now
                    limit = f"not done after {worker.task.seconds:g} s"
                    yield worker.end(limit if late else "time was up")
                    self._next(worker, left, until)
        finally:
            for worker in self.busy:
                worker.stop()
            self.busy.clear()

    def close(self) -> None:
        for worker in self.idle:
            worker.stop()
        self.idle.clear()

    def _start(self, group: deque[Task], settings: dict[str, str]) -> None:
        fitting = [worker for worker in self.idle if worker.settings == settings]
        if fitting:
            self.idle.remove(fitting[0])
        worker = fitting[0] if fitting else _Worker(self.folder, settings)
        self.busy.append(worker)
        worker.take(group)

    def _next(self, worker: _Worker, left: deque[deque[Task]], until: float) -> None:
        """What a worker does whose task is over: the next of its group, or another group."""
        rest = worker.rest
        again = worker.task.again(worker.outcome) if worker.outcome.error else None
        if again is not None:
            rest.appendleft(again)
        if worker.alive and rest and time.monotonic() < until:
            worker.take(rest)
            return
        self.busy.remove(worker)
        if rest:
            left.appendleft(rest)
        if worker.alive:
            self.idle.append(worker)


class _Worker:
    """A process and the way to it; ``rest`` are the tasks of its group after this one."""

    def __init__(self, folder: Path, settings: dict[str, str]):
        context = multiprocessing.get_context("spawn")  # a fork has no CUDA
        self.settings = settings
        self.channel, theirs = context.Pipe()
        self.log = folder / f"worker-{time.monotonic_ns()}.txt"
        self.process = context.Process(target=_serve, args=(theirs, str(self.log)), daemon=True)
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)  # torch and Triton look when they are imported
        try:
            self.process.start()
        finally:
            for name, text in before.items():
                if text is None:
                    del os.environ[name]
                else:
                    os.environ[name] = text
        theirs.close()
        self.alive = True

    def take(self, group: deque[Task]) -> None:
        self.task, self.rest = group.popleft(), group
        self.began = time.monotonic()
        self.ends = self.began + self.task.seconds
        self.outcome = Outcome(self.task)
        with contextlib.suppress(OSError):  # it is gone: to be heard as any other end
            self.channel.send(self.task[1:3])

    def hear(self) -> Outcome | None:
        """The outcome, once it is there."""
        try:
            kind, value = self.channel.recv()
        except (EOFError, OSError):
            self.process.join(10)
            return self.end(f"its process ended with {self.process.exitcode}")
        if kind == "told":
            self.outcome.told.append(value)
            return None
        if kind == "sick":
            return self.end(value)
        setattr(self.outcome, kind, value)
        return self._over()

    def end(self, why: str) -> Outcome:
        """End the process; it is dead, or must be."""
        self.stop()
        self.outcome.error, self.outcome.output = why, _tail(self.log)
        return self._over()

    def stop(self) -> None:
        self.alive = False
        self.channel.close()
        if self.process.is_alive():
            self.process.kill()
        self.process.join(10)

    def _over(self) -> Outcome:
        self.outcome.seconds = time.monotonic() - self.began
        return self.outcome


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-TAIL:] if path.exists() else ""


def _serve(channel: connection.Connection, log: str) -> None:
    """The worker: a task, its outcome, and so on."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(file, stream)
    while True:
        try:
            function, args = channel.recv()
        except EOFError:
            return

        def tell(what: Any) -> None:
            check_device()
            channel.send(("told", what))

        try:
            value = function(*args, tell)
            check_device()
        except Sick as error:
            channel.send(("sick", str(error)))
            return
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines()
            message = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
            try:
                check_device()
            except Sick:
                channel.send(("sick", message))
                return
            channel.send(("error", message))
        else:
            channel.send(("value", value))
        _let_go()


def _let_go() -> None:
    """Of memory that the next task, or another process, may want."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def check_device() -> None:
    """Hear of errors that the device has not told yet.

    Raises:
        Sick: There was one: nothing works in this process any more.
    """
    import torch

    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            lines = str(error).strip().splitlines()
            raise Sick(lines[0] if lines else type(error).__name__) from error

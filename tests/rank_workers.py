"""Ranks of torch.distributed that stay: each runs what a test sends it, among the first P."""

import pickle
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 4
PATIENCE = 60  # seconds a test waits for a rank


class Ranks:
    """``run(P, f, *args)`` gives ``[f(group, *args) of rank 0, ...]``, in P processes with gloo."""

    def __init__(self, folder: Path):
        context = mp.get_context("spawn")
        self._ends, self._processes = [], []
        for rank in range(SIZE):
            end, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, str(folder / "store"), theirs), daemon=True
            )
            process.start()
            self._ends.append(end)
            self._processes.append(process)

    def run(self, size, function, *args):
        """Raises a RankError with what each rank raised, if any did."""
        answers = self.answers(size, function, *args)
        if any(isinstance(x, Raised) for x in answers):
            raise RankError(answers)
        return answers

    def answers(self, size, function, *args):
        """Of each rank, its result or what it Raised."""
        for end in self._ends[:size]:
            _send(end, (size, function, args))
        answers = []
        for rank, end in enumerate(self._ends[:size]):
            if not end.poll(PATIENCE):
                self.close()
                raise TimeoutError(f"rank {rank} of {size} did not answer in {PATIENCE} s")
            answers.append(pickle.loads(end.recv_bytes()))
        return answers

    def close(self):
        for process in self._processes:
            process.kill()


class Raised:
    """An exception of a rank."""

    def __init__(self, error: Exception):
        self.kind, self.message = type(error).__name__, str(error)
        self.trace = traceback.format_exc()

    def __repr__(self):
        return f"{self.kind}: {self.message}"


class RankError(Exception):
    def __init__(self, answers):
        self.answers = answers
        traces = [x.trace if isinstance(x, Raised) else "" for x in answers]
        super().__init__("\n".join(f"rank {i}: {x}" for i, x in enumerate(traces) if x))


def _serve(rank, store, end):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=SIZE,
        timeout=timedelta(seconds=PATIENCE // 2),
    )
    groups = {size: dist.new_group(range(size)) for size in range(1, SIZE + 1)}
    sys.path.append(str(Path(__file__).parents[1]))  # pytest calls a file tests.test_it
    while True:
        message = end.recv_bytes()
        try:
            size, function, args = pickle.loads(message)
            answer = function(groups[size], *args)
        except Exception as error:
            answer = Raised(error)
        _send(end, answer)


def _send(end, message):
    """By value: ``end.send`` would put each tensor into a file of shared memory."""
    end.send_bytes(pickle.dumps(message))

"""All ranks of a graph in one process, one after another, for what does not fit in memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastgt.distributed.file_memory import FileMemory
from fastgt.distributed.group import Group
from fastgt.distributed.partition import checked_parts
from fastgt.distributed.turns import TurnGroup, Turns

Result = TypeVar("Result")


def in_turn(
    function: Callable[..., Result],
    parts: int,
    folder: str | os.PathLike[str],
    /,
    *args: Any,
) -> list[Result]:
    """``[function(group, *args) of rank 0, ...]``: what P processes give, in this one alone.

    Ranks are threads that take turns. One runs until it needs what other ranks have not computed
    yet, as in the exchange of a layer; then it waits. So a graph in P parts is trained on one
    machine by the code that trains it on P, where it is loaded with
    :func:`fastgt.distributed.load_partition`.

    What operations give, in the forward and in the backward, is written to files and mapped into
    memory. A rank that waits leaves its tensors there: memory is what one rank touches between two
    collectives. Tensors of less than 64 KB, and those of a GPU, stay where they are. With
    ``check=False``, ``load_partition`` saves a change of turns in every operator.

    Every rank has PyTorch's generator of the CPU as this process has it now, as processes have that
    seed it alike. Afterwards it is as rank 0 left it. NumPy's and Python's generators are shared.

    Args:
        function: Takes its rank's :class:`fastgt.distributed.Group`, which
            ``load_partition``, ``DistributedGraph``, ``sync_parameters`` and ``sync_gradients``
            take for ``group``. It makes its own model: each rank has one, as a process has.
        parts: How many ranks.
        folder: Of a disk with room for all tensors of all ranks at once; is made if need be.
        args: All ranks get the same objects.

    Returns:
        What ``function`` gave, by rank. Large tensors are still mapped from files without a name.

    Raises:
        RuntimeError: A rank failed, with its number and its message; the exception itself is the
            cause. All others end at their next collective. Or this is no POSIX system.
        OSError: The folder cannot be written to.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from fastgt import Graph, aggregate
        >>> from fastgt.distributed import in_turn, load_partition, write_partitions
        >>> graph = Graph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]))
        >>> def step(group, parts):
        ...     shard, tensors = load_partition(parts, group)
        ...     return aggregate(tensors["x"], shard)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     x = torch.tensor([[1.0], [2.0], [3.0]])
        ...     write_partitions(folder, graph, torch.tensor([0, 1, 1]), x=x)
        ...     in_turn(step, 2, folder, folder)
        [tensor([[3.]]), tensor([[1.],
                [2.]])]
    """
    if not callable(function):
        raise TypeError(f"function must be callable, got {type(function).__name__}")
    parts = checked_parts(parts)
    if os.name != "posix":
        raise RuntimeError(f"in_turn maps files as POSIX systems do, and this is {os.name!r}")
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    turns, grad = Turns(parts), torch.is_grad_enabled()
    results: list[Any] = [None] * parts

    def run(rank: int) -> None:
        error: BaseException | None = None
        memory = FileMemory(place)
        group: Group = TurnGroup(turns, rank, memory)
        try:
            turns.enter(rank)
            with torch.set_grad_enabled(grad), memory:
                results[rank] = function(group, *args)
            memory.put_away()
        except BaseException as raised:  # the caller gets it
            error = raised
        turns.end(rank, error)

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank} of {parts}")
        for rank in range(parts)
    ]
    for thread in threads:
        thread.start()
    turns.begin()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # an interrupt: threads would outlive it
        turns.failure = -1, error
        turns.stop()
        raise
    torch.set_rng_state(turns.random[0])
    if turns.failure is not None:
        number, cause = turns.failure
        said = f"rank {number} of {parts}: {type(cause).__name__}: {cause}"
        raise RuntimeError(said) from cause
    return results

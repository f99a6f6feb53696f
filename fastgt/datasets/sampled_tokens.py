"""For every node, other nodes at one and two steps from it, drawn once and kept on disk.

The neighbours of node i are those that row i attends to, and its paths are its neighbours and
theirs: a multiset of d_i + sum_j d_j nodes, where d_i is the degree of i and j runs over its
neighbours. A node counts as often as paths lead to it, i itself too. For every node K - 1 entries
are drawn from that multiset, without replacement where it has as many; where it has fewer they are
all taken, and repeated; where it has none, nodes of the whole graph are drawn.

The number of a path says which it is, by the sums of degrees along a row: so A A is never computed,
and a hub costs no more than another node. What is drawn for a node depends on the seed and the node
alone, whatever the blocks and the processes.

In the released code a node at two steps counts once, for entries of a sparse product are distinct.
That takes all of A A in memory. Here it counts once a path, as in the powers of a random walk.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import ExitStack
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgt import files
from fastgt.datasets.block_file import BlockFile, graph_digest
from fastgt.graph import Graph
from fastgt.ops.checks import check_square, integer
from fastgt.philox import words

_ROWS = 2**19  # ids that are drawn at once
_POLL = 0.2  # seconds


def sample_tokens(
    graph: Graph,
    samples: int,
    path: str | os.PathLike[str],
    *,
    seed: int = 0,
    workers: int = 0,
    progress: bool = False,
) -> BlockFile:
    """Draw ``samples - 1`` nodes for every node, and keep them in a file: ``[N, samples - 1]``.

    Interrupted, it goes on with what was not written when it is called again. Called once more, it
    checks what is there, which other processes may do at the same time.

    Args:
        graph: Square.
        samples: K of the model: the node itself is the first, and is not in the file.
        path: Of the file; its folder is made.
        seed: Of the draws.
        workers: Processes that draw; 0 for this one alone.
        progress: Show a bar. Needs tqdm.

    Raises:
        TypeError, ValueError: ``graph`` is no Graph, or not square, ``samples`` is below 2, or the
            graph has no nodes.
        ValueError: The file was made of another graph, with other samples or another seed, or it is
            damaged; its path is given.
        RuntimeError: A worker ended before its work did, or another process writes the file.

    Source:
        Dwivedi et al., Graph Transformers for Large Graphs, arXiv 2312.11109, section 3.2, and
        their code.

    Example:
        >>> import tempfile, torch
        >>> from fastgt import Graph
        >>> from fastgt.datasets import sample_tokens
        >>> path = Graph.from_edge_index(torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sample_tokens(path, 5, f"{folder}/ids").array.tolist()
        [[1, 0, 2, 1], [0, 2, 1, 1], [1, 0, 2, 1]]
    """
    n = check_square(graph)
    samples = integer("samples", samples, 1)
    if samples < 2:
        raise ValueError(f"samples must be 2 at least, the node and another, got {samples}")
    if n == 0:
        raise ValueError("graph has no nodes")
    seed, workers = integer("seed", seed), integer("workers", workers, 0)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.int32 if n <= 2**31 else np.int64
    about = {"what": "sampled nodes", "graph": graph_digest(graph), "seed": seed}
    made = partial(BlockFile.prepared, path, about | {"samples": samples}, (n, samples - 1), dtype)
    if BlockFile.complete(path):
        return made()
    with ExitStack() as stack:
        stack.enter_context(files.lock(path))
        file = made()
        missing, shown = file.missing(), None
        if progress:
            from tqdm import tqdm

            done = file.blocks - len(missing)
            bar = tqdm(total=file.blocks, initial=done, desc="sample_tokens", unit=" blocks")
            shown = stack.enter_context(bar)
        of = _Rows(graph.row_ptr.cpu().long(), graph.col.cpu().long(), seed)
        if workers and len(missing) > 1:
            _share_out(file, of, missing, min(workers, len(missing)), shown)
        else:
            for block in missing:
                file.write(block, of.drawn(file, block))
                if shown is not None:
                    shown.update()
    file.check_complete()
    return file


class _Rows(NamedTuple):
    """What draws are made of."""

    row_ptr: Tensor  # [N + 1] int64
    col: Tensor  # [E] int64
    seed: int

    def drawn(self, file: BlockFile, block: int) -> np.ndarray:
        """The rows of a block."""
        first, last = file.span(block)
        count = file.shape[1]
        step = max(1, _ROWS // count)
        parts = [
            draw(self, start, min(start + step, last), count) for start in range(first, last, step)
        ]
        return torch.cat(parts).numpy()


def draw(of: _Rows, first: int, last: int, count: int) -> Tensor:
    """Nodes for each node from ``first`` to ``last - 1``: ``[last - first, count]`` int64."""
    row_ptr, col, seed = of
    n = len(row_ptr) - 1
    edges = row_ptr[first : last + 1] - row_ptr[first]  # where the edges of each row begin
    near = col[row_ptr[first] : row_ptr[last]]
    # paths that begin with the edges before each
    before = torch.cat([near.new_zeros(1), (row_ptr[near + 1] - row_ptr[near]).cumsum(0)])
    degree = edges.diff()
    paths = degree + before[edges[1:]] - before[edges[:-1]]
    alone = paths == 0
    size = paths.masked_fill(alone, n)
    number = _subsets(size, count, torch.arange(first, last), seed)  # [rows, count]
    place = number - degree[:, None]
    step = place.clamp(min=0) + before[edges[:-1], None]
    # on rows without paths it is no path's number
    edge = (torch.searchsorted(before, step, right=True) - 1).clamp(0, max(0, len(near) - 1))
    one = edges[:-1, None] + number
    if not len(near):
        return number
    two = row_ptr[near[edge]] + step - before[edge]
    found = torch.where(
        place < 0, near[one.clamp(max=len(near) - 1)], col[two.clamp(max=len(col) - 1)]
    )
    return torch.where(alone[:, None], number, found)


def _subsets(size: Tensor, count: int, node: Tensor, seed: int) -> Tensor:
    """``count`` numbers below each of ``size``: distinct, or all in turn where there are fewer.

    Each subset is as likely as any other: Floyd's algorithm, for all rows at once.

    Source:
        Bentley and Floyd, Programming pearls: a sample of brilliance, CACM 30 (9), 1987.
    """
    key = torch.tensor([seed])
    turn = torch.arange(count)[:, None]
    low, high = (x.expand(count, -1) for x in (node & 0xFFFFFFFF, node >> 32))
    a, b, *_ = words(key, low, high, turn.expand_as(low))
    share = ((a >> 5 << 26) + (b >> 6)).double() * 2.0**-53  # [count, rows], below 1
    found = torch.empty(count, len(size), dtype=torch.int64)
    for t in range(count):
        last = size - count + t
        number = (share[t] * (last + 1)).long()
        taken = (found[:t] == number).any(0)
        found[t] = torch.where(taken, last, number)
    return torch.where(size < count, turn % size, found).T.contiguous()


def _share_out(file: BlockFile, of: _Rows, missing: list[int], workers: int, shown: Any) -> None:
    """Blocks in turn to each of the workers: hubs may lie side by side."""
    context = multiprocessing.get_context()
    processes = [
        context.Process(target=_work, args=(file, of, missing[i::workers]), daemon=True)
        for i in range(workers)
    ]
    try:
        for process in processes:
            process.start()
        left = {process.sentinel: process for process in processes}
        while left:
            for sentinel in wait(list(left), timeout=_POLL):
                process = left.pop(sentinel)  # type: ignore[arg-type]
                process.join()
                if process.exitcode:
                    raise RuntimeError(
                        f"a process that samples {file.path} ended with {process.exitcode}: what "
                        "is written stays, and the same call goes on from there"
                    )
            if shown is not None:
                shown.update(file.blocks - len(file.missing()) - shown.n)
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _work(file: BlockFile, of: _Rows, blocks: list[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()  # the system's is another where a server forks
    assert parent is not None
    for block in blocks:
        if not parent.is_alive():
            return  # killed, it could end nobody
        file.write(block, of.drawn(file, block))

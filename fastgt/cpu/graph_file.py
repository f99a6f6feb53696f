"""Whether the arrays of a file are those of a graph, on a CPU: ``graph_file.cpp``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgt.cpu.graph import can_group
from fastgt.cpu.library import kernels


def is_sound(
    num_rows: int, num_cols: int, walk: Sequence[Tensor], columns: Sequence[Tensor]
) -> bool:
    """Whether indices are in range and both walks have the same edges; False where nobody can say.

    ``walk`` is the graph's ``row_ptr, col, edge``, ``columns`` its column walk or empty. Their
    shapes fit. One pass on one thread, which costs less than to look for the first fault.
    """
    if not can_group(walk[0], walk[1]):
        return False
    arrays = [x.contiguous() for x in (*walk, *columns)]
    edges = len(arrays[1])
    seen, sound = (torch.empty(n, dtype=torch.uint8, device="cpu") for n in (edges, 1))
    kernels().run(
        "graph_file",
        "check",
        num_rows,
        num_cols,
        edges,
        int(arrays[0].dtype == torch.int64),
        *(x.data_ptr() for x in arrays),
        *([0] * (7 - len(arrays))),
        seen.data_ptr(),
        sound.data_ptr(),
    )
    return bool(sound)

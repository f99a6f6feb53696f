"""Rows of a stream that are shared out to ranks, on a CPU: ``partition.cpp``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgt.cpu.library import kernels


class State(NamedTuple):
    """What is known after some rows.

    Attributes:
        row_part, col_part: ``[N_rows]`` and ``[N_cols]`` int32, the rank of each, -1 where it has
            none yet; one tensor where columns are the same nodes as rows.
        cost, members: ``[P]`` int64, what the rows of each rank cost, and how many they are.
    """

    row_part: Tensor
    col_part: Tensor
    cost: Tensor
    members: Tensor


def stream(
    state: State, first: int, row_ptr: Tensor, col: Tensor, row_cost: int, capacity: float
) -> None:
    """Gives the next rows their ranks, in ``state``.

    Args:
        state: Of the rows before, or of none.
        first: The number of the first row.
        row_ptr, col: ``[n + 1]`` and ``[e]``, of one index type. The edges of row i stand in
            ``col`` at ``row_ptr[i] - row_ptr[0]`` and after.
        row_cost: Edges that a row costs as much as, beside its own.
        capacity: The cost of a rank at which it attracts no more rows.

    Raises:
        RuntimeError: There are no compiled kernels; says why.
    """
    parts = len(state.cost)
    work = [torch.empty(n, dtype=torch.int64, device="cpu") for n in (parts, 2 * parts, 2 * parts)]
    count = torch.zeros(parts, dtype=torch.int64, device="cpu")
    arrays = row_ptr.contiguous(), col.contiguous(), *state, count, *work
    kernels().run(
        "partition",
        "stream",
        len(row_ptr) - 1,
        first,
        parts,
        int(state.row_part is not state.col_part),
        int(col.dtype == torch.int64),
        row_cost,
        float(capacity),
        *(x.data_ptr() for x in arrays),
    )

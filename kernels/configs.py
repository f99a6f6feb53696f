"""Tile shapes, chosen from buckets: never from raw N or E, so that no batch recompiles a kernel.

The tables follow from counting registers (16 to 32 accumulators a thread) and have not been
tuned on a device.
"""

from typing import NamedTuple

import triton

# channels (heads x padded width) of one program, as fp32 words -> (edges in flight, warps)
_FORWARD = {32: (16, 1), 64: (16, 2), 128: (16, 4), 256: (8, 4), 512: (8, 8), 1024: (8, 8)}
_BACKWARD = {32: (16, 1), 64: (16, 2), 128: (16, 4), 256: (8, 4), 512: (8, 8), 1024: (8, 16)}


class Tile(NamedTuple):
    """What one program owns and holds: rows, edges in flight per row, heads; and its warps."""

    block_r: int
    block_e: int
    block_h: int
    num_warps: int


def attention_tile(
    heads: int, width: int, words: int, edges: int, rows: int, *, backward: bool
) -> Tile:
    """Tile of one pass over ``edges`` edges of ``rows`` rows.

    ``width`` is the padded head width, ``words`` the accumulator's size in 4-byte words. Rows of
    few edges share a program; heads are split over programs beyond 1,024 words.
    """
    table = _BACKWARD if backward else _FORWARD
    widest = max(table)
    block_h = min(triton.next_power_of_2(heads), max(1, widest // (width * words)))
    channels = block_h * width * words
    slots, num_warps = table[min(bucket for bucket in table if bucket >= channels)]
    mean_degree = -(-edges // max(rows, 1))
    block_e = min(slots, max(4, triton.next_power_of_2(mean_degree)))
    return Tile(slots // block_e, block_e, block_h, num_warps)

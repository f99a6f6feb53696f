"""Tile shapes, chosen from buckets: never from raw N or E, so that no batch recompiles a kernel.

The sizes follow from counting: two 16-byte loads of k and of v in flight for each thread of a
32-lane warp (one on a 64-lane warp), and no register spilled. They have not been tuned on a
device.
"""

from functools import cache
from typing import NamedTuple

# channels (heads x padded width) of one program -> edges in flight
_SLOTS = {8: 64, 16: 32, 128: 16, 256: 8, 1024: 4}
_BYTES_PER_WARP = 32 * 32
_MAX_WARPS = 16


class Tile(NamedTuple):
    """What one program owns and holds: rows, edges in flight per row, heads; and its warps."""

    block_r: int
    block_e: int
    block_h: int
    num_warps: int


def attention_tile(heads: int, width: int, itemsize: int, edges: int, rows: int) -> Tile:
    """Tile of a pass over ``edges`` edges of ``rows`` rows; ``width`` is the padded head width.

    Rows of few edges share a program; heads are split over programs beyond 1,024 channels (512
    in float64).
    """
    return _tile(heads, width, itemsize, power_of_2(-(-edges // max(rows, 1))))


def power_of_2(n: int) -> int:
    """The next one, 1 for 0. Triton's own costs 4 microseconds a call on the host, this 0.1."""
    return 1 << max(n - 1, 0).bit_length()


@cache
def _tile(heads: int, width: int, itemsize: int, degree: int) -> Tile:
    widest = max(_SLOTS) // (2 if itemsize == 8 else 1)
    block_h = min(power_of_2(heads), max(1, widest // width))
    channels = block_h * width
    slots = _SLOTS[min(bucket for bucket in _SLOTS if bucket >= channels)]
    block_e = min(slots, max(4, degree))
    num_warps = min(_MAX_WARPS, max(1, slots * channels * itemsize // _BYTES_PER_WARP))
    return Tile(slots // block_e, block_e, block_h, num_warps)

"""Tile shapes, chosen from buckets: never from raw N or E, so that no batch recompiles a kernel.

The sizes follow from counting: two 16-byte loads of k and of v in flight for each thread of a
32-lane warp (one on a 64-lane warp), and no register spilled. They have not been tuned on a
device.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
from triton.runtime import driver

# channels (heads x padded width) of one program -> edges in flight
_SLOTS = {8: 64, 16: 32, 128: 16, 256: 8, 1024: 4}
_BYTES_PER_WARP = 32 * 32
_MAX_WARPS = 16
_BLOCK_E = 4
FILLERS = 2  # entries at the end of every table of buckets, see fastgt/tiles.py


class Tile(NamedTuple):
    """What one program owns and holds: rows, edges in flight per row, heads; and its warps."""

    block_r: int
    block_e: int
    block_h: int
    num_warps: int


@cache
def attention_tile(
    heads: int, width: int, itemsize: int, terms: bool = False, lanes: int = 32
) -> Tile:
    """Tile of a pass over the edges; ``width`` is the padded head width.

    Rows of few edges share a program, four edges of each at a time; heads are split over programs
    beyond 1,024 channels (512 in float64). With edge ``terms`` a lane holds several tiles instead
    of two, so each gets half as large: by twice the warps up to 8, else by half the edges. Warps
    of 64 ``lanes`` have halved them already.
    """
    widest = max(_SLOTS) // (2 if itemsize == 8 else 1) // (2 if terms else 1)
    block_h = min(power_of_2(heads), max(1, widest // width))
    channels = block_h * width
    slots = _SLOTS[min(bucket for bucket in _SLOTS if bucket >= channels)]
    if itemsize == 8:
        slots = max(_BLOCK_E, slots // 2)
    num_warps = min(_MAX_WARPS, max(1, slots * channels * itemsize // _BYTES_PER_WARP))
    if terms and lanes == 32 and num_warps < 8:
        num_warps *= 2
    elif terms and lanes == 32:
        slots = max(_BLOCK_E, slots // 2)
    return Tile(slots // _BLOCK_E, _BLOCK_E, block_h, num_warps)


class WindowTile(NamedTuple):
    """Columns of one step, warps, and loads in flight ahead of it."""

    block_n: int
    num_warps: int
    num_stages: int


# (bytes of a head's channels, pass) -> columns of a step, warps: what no target spills, but for
# 256 channels of 16 bits and float32's 128 and more in the backward
_WINDOW_TILES = {
    (128, "fwd"): (64, 4),
    (256, "fwd"): (32, 4),
    (1024, "fwd"): (16, 8),
    (128, "bwd"): (32, 4),
    (256, "bwd"): (16, 8),
    (1024, "bwd"): (16, 8),
}


@cache
def window_tile(direction: str, width: int, itemsize: int, edges: bool) -> WindowTile:
    """Tile of the "fwd" or "bwd" passes over windows, whatever their height.

    Where edge tensors are read or written too (``edges``), half as many columns: finding the edges
    takes registers.
    """
    size = width * itemsize
    key = min((k for k in _WINDOW_TILES if k[0] >= size and k[1] == direction), default=None)
    block_n, num_warps = _WINDOW_TILES[key or (1024, direction)]
    if edges:
        block_n = max(16, block_n // 2)
    # beyond 256 bytes, loads ahead would take the shared memory of a whole processor
    return WindowTile(block_n, num_warps, 2 if size <= 256 else 1)


class GlobalTile(NamedTuple):
    """Nodes that a program owns and those of one step, channels of a slice, warps, and loads in
    flight ahead."""

    block_m: int
    block_n: int
    channels: int
    num_warps: int
    num_stages: int


# (bytes of a number, channels) -> of the "fwd", "dq" and "dkv" passes: what no target spills
_GLOBAL_TILES = {
    (2, 64): (
        GlobalTile(64, 64, 64, 4, 2),
        GlobalTile(64, 32, 64, 4, 2),
        GlobalTile(64, 32, 64, 4, 2),
    ),
    (2, 128): (
        GlobalTile(64, 32, 128, 4, 2),
        GlobalTile(64, 32, 128, 8, 1),
        GlobalTile(64, 32, 128, 8, 1),
    ),
    (2, 512): (GlobalTile(16, 16, 256, 8, 1),) * 3,
    (4, 32): (
        GlobalTile(64, 32, 32, 4, 2),
        GlobalTile(64, 32, 32, 4, 1),
        GlobalTile(64, 32, 32, 8, 1),
    ),
    (4, 64): (
        GlobalTile(32, 32, 64, 4, 1),
        GlobalTile(32, 16, 64, 4, 1),
        GlobalTile(32, 16, 64, 4, 1),
    ),
    (4, 128): (GlobalTile(16, 16, 128, 8, 1),) * 3,
    (4, 512): (GlobalTile(16, 16, 64, 4, 1),) * 3,
    (8, 32): (
        GlobalTile(32, 32, 32, 8, 1),
        GlobalTile(32, 32, 32, 8, 1),
        GlobalTile(32, 16, 32, 8, 1),
    ),
    (8, 512): (GlobalTile(16, 16, 64, 8, 1),) * 3,
}
_PASSES = ("fwd", "dq", "dkv")


@cache
def global_tile(direction: str, width: int, itemsize: int, numbered: bool) -> GlobalTile:
    """Tile of the "fwd", "dq" or "dkv" pass of global attention.

    Where pairs are asked for their numbers, half as many nodes a step and more warps: the numbers
    take registers. Heads of 256 bytes and more have half as many nodes a program too, or slices of
    256 bytes where these are 16.
    """
    key = min(k for k in _GLOBAL_TILES if k[0] == itemsize and k[1] >= width)
    tile = _GLOBAL_TILES[key][_PASSES.index(direction)]
    if not numbered:
        return tile
    block_m, block_n, channels, _, stages = tile
    if channels * itemsize >= 256:
        channels = channels if block_m > 16 else 256 // itemsize
        block_m = max(16, block_m // 2)
    return GlobalTile(block_m, max(16, block_n // 2), channels, 8, stages)


class LinearTile(NamedTuple):
    """Nodes and features of a tile, channels of a product, and warps."""

    block_n: int
    block_m: int
    channels: int
    num_warps: int


# (bytes of a number, channels) -> of passes over pieces of graphs, through their state, and over
# whole small graphs, in the quadratic form: what no target spills
_LINEAR_TILES = {
    (2, 64): (LinearTile(32, 32, 64, 4), LinearTile(16, 32, 64, 4)),
    (2, 128): (LinearTile(32, 32, 64, 4), LinearTile(16, 16, 64, 4)),
    (2, 256): (LinearTile(32, 16, 32, 8), LinearTile(16, 16, 64, 4)),
    (4, 64): (LinearTile(32, 32, 64, 8), LinearTile(16, 16, 16, 4)),
    (4, 128): (LinearTile(32, 16, 32, 8), LinearTile(16, 16, 32, 8)),
    (4, 256): (LinearTile(16, 16, 32, 4), LinearTile(16, 16, 32, 8)),
    (8, 64): (LinearTile(16, 32, 32, 4), LinearTile(16, 32, 16, 4)),
    (8, 256): (LinearTile(16, 16, 16, 8), LinearTile(16, 16, 16, 8)),
}


@cache
def linear_tile(
    features: int, width: int, value_width: int, itemsize: int, whole: bool
) -> LinearTile:
    """Tile of linear attention: ``width`` of the inputs that are projected, 1 where none are."""
    widest = max(width, value_width)
    key = min(key for key in _LINEAR_TILES if key[0] == itemsize and key[1] >= widest)
    tile = _LINEAR_TILES[key][whole]
    return tile._replace(block_m=min(tile.block_m, max(16, power_of_2(features))))


class ProjectionTile(NamedTuple):
    """Nodes, channels of heads and other channels of a tile, warps, and loads in flight ahead."""

    block_n: int
    block_j: int
    block_c: int
    num_warps: int
    num_stages: int


_PROJECTION_TILES = {
    2: ProjectionTile(64, 64, 64, 4, 3),
    4: ProjectionTile(64, 64, 32, 8, 2),
    8: ProjectionTile(32, 32, 16, 4, 1),
}


def projection_tile(itemsize: int) -> ProjectionTile:
    """Tile of projections into and out of heads."""
    return _PROJECTION_TILES[itemsize]


def power_of_2(n: int) -> int:
    """The next one, 1 for 0. Triton's own costs 4 microseconds a call on the host, this 0.1."""
    return 1 << max(n - 1, 0).bit_length()


def accumulator(x: torch.Tensor) -> torch.dtype:
    """What sums over ``x`` are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dot_dtype(x: torch.Tensor) -> str:
    """What tiles of ``x`` are multiplied in: its own, but for bfloat16 in the interpreter, which
    holds it as integers."""
    if x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return "float32"
    return str(x.dtype).removeprefix("torch.")


def dot_precision(x: torch.Tensor) -> str:
    """Products of float32: three of TF32's on NVIDIA's tensor cores, where plain ones would not
    use them and spill registers; AMD's matrix cores take float32 as it is."""
    if x.dtype != torch.float32 or triton.knobs.runtime.interpret:
        return "ieee"
    return "tf32x3" if driver.active.get_current_target().backend == "cuda" else "ieee"


def linear_precision(x: torch.Tensor) -> str:
    """Products of linear attention, whose states outgrow 16 bits: in float32, rounded for 16-bit
    inputs to TF32's ten bits where tensor cores have it."""
    if x.element_size() > 2 or triton.knobs.runtime.interpret:
        return dot_precision(x)
    return "tf32" if driver.active.get_current_target().backend == "cuda" else "ieee"


def warp_lanes() -> int:
    """Of the GPU that kernels are launched on."""
    if triton.knobs.runtime.interpret:
        return 32
    return driver.active.get_current_target().warp_size


def alignment(tensors: tuple[torch.Tensor, ...]) -> int:
    """Channels that every row and head of all [N, H, D] tensors starts at a multiple of, up to 16
    bytes."""
    return alignment_of([x.stride() for x in tensors], tensors[0].element_size())


def alignment_of(strides: list[tuple[int, int, int]], itemsize: int) -> int:
    """``alignment`` of tensors of these strides."""
    align = 16 // itemsize
    for node, head, channel in strides:
        align = math.gcd(align, node, head) if channel == 1 else 1
    return align


def clamps(low: float, high: float) -> bool:
    return low > -math.inf or high < math.inf


def log(eps: float) -> float:
    return math.log(eps) if eps else -math.inf


def stride(x: torch.Tensor | None) -> tuple[int, ...]:
    """Of an edge or row tensor [E, H] that may be absent."""
    return (0, 0) if x is None else x.stride()

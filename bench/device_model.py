"""How bytes and operations of a kernel become seconds of a GPU that need not be here.

H200's memory and tensor cores were measured, not by this benchmark: 4.3 of the datasheet's 4.8 TB/s
and 790 of its 989 TFLOP/s. Of the other devices there are datasheets only: 90 % of their bandwidth
and 80 % of their rate are taken, as on H200. L2 bandwidths are assumed throughout; a processor
makes 16 exponentials a clock on all of them, by the vendors' manuals.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Device(NamedTuple):
    """Bytes and operations a second; ``match`` is in the name that the driver gives."""

    match: str
    memory: float
    l2: float
    cache: int  # bytes
    tensor: float  # in 16 bits
    exponentials: float
    source: str


_SM90, _SM80, _CDNA3 = 132 * 16 * 1.83e9, 108 * 16 * 1.41e9, 304 * 16 * 2.1e9
DEVICES = {
    "H200": Device("H200", 4.3e12, 5.5e12, 60_000_000, 790e12, _SM90, "measured elsewhere"),
    "H100": Device(
        "H100 80GB HBM3",
        0.9 * 3.35e12,
        5.5e12,
        50_000_000,
        0.8 * 989e12,
        _SM90,
        "NVIDIA H100 datasheet, SXM",
    ),
    "A100": Device(
        "A100-SXM4-80GB",
        0.9 * 2.039e12,
        4.0e12,
        40_000_000,
        0.8 * 312e12,
        _SM80,
        "NVIDIA A100 datasheet, SXM, 80 GB",
    ),
    # the cache is AMD's Infinity Cache, 17.2 TB/s at most; 4 MB of L2 on each die come before it
    "MI300X": Device(
        "MI300X",
        0.9 * 5.3e12,
        10e12,
        256_000_000,
        0.8 * 1307e12,
        _CDNA3,
        "AMD MI300X datasheet",
    ),
}


@dataclass(frozen=True, eq=False)
class Visits:
    """The nodes whose rows a kernel gathers, in order."""

    nodes: Tensor
    _misses: dict[int, int] = field(default_factory=dict)

    def misses(self, capacity: int) -> int:
        """How many of them are not among the ``capacity`` nodes visited last."""
        if not self._misses:
            self._misses[-1] = self.nodes.unique().numel()
        capacity = min(capacity, self._misses[-1])
        if capacity == self._misses[-1]:
            return capacity  # each comes once
        if capacity not in self._misses:
            self._misses[capacity] = _lru_misses(self.nodes, capacity)
        return self._misses[capacity]


def _lru_misses(nodes: Tensor, capacity: int) -> int:
    held: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for node in nodes.tolist():
        if node in held:
            held.move_to_end(node)
            continue
        misses += 1
        held[node] = None
        if len(held) > capacity:
            held.popitem(last=False)
    return misses


@dataclass(frozen=True, eq=False)
class Kernel:
    """What one kernel moves.

    Attributes:
        once: Bytes read or written once.
        gathered: Bytes of rows asked of L2.
        again: Bytes of tables that other heads read again.
        row: Bytes of a gathered row, all heads.
        visits: In which order rows are gathered.
        exponentials: One for each logit, and one more to rescale a lane's sum.
        flops: On tensor cores.
        rate: Of those, against that of 16 bits.
    """

    name: str
    once: int
    gathered: int = 0
    again: int = 0
    row: int = 0
    visits: Visits = field(default_factory=lambda: Visits(torch.empty(0, dtype=torch.int64)))
    exponentials: int = 0
    flops: int = 0
    rate: float = 1.0

    @property
    def compulsory(self) -> int:
        """Bytes that memory moves where every gathered row stays in the cache."""
        return self.once + self.row * self.visits.misses(2**62)

    def missed(self, device: Device) -> int:
        """Gathered bytes that come from memory."""
        return self.row * self.visits.misses(device.cache // self.row) if self.row else 0

    def limits(self, device: Device) -> dict[str, float]:
        """Seconds that each part of the device needs."""
        return {
            "L2": (self.once + self.gathered + self.again) / device.l2,
            "memory": (self.once + self.missed(device)) / device.memory,
            "tensor": self.flops / (device.tensor * self.rate),
            "exp": self.exponentials / device.exponentials,
        }

    def seconds(self, device: Device) -> float:
        return max(self.limits(device).values())

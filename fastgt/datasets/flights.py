"""Flights between airports, as timed events."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fastgt.datasets import archive
from fastgt.datasets.event_set import EventSet, chronological

_KEYS = {"src": "iu", "dst": "iu", "t_minutes": "iu", "distance": "iu", "airports": "U"}
MILES = 1000.0  # distances are in thousands


def flights(folder: str | Path | None = None) -> EventSet:
    """600,000 flights between 229 airports of the United States, of ``flights.npz``.

    A flight is an event at the minute of its departure, with its distance in thousands of miles.
    The earliest 70 % of them train, the next 15 % validate and the last 15 % test. Those of one
    minute stay together. The file's delays are left out: they are not known yet when the next
    flights leave.

    Args:
        folder: The folder of the file, or the file. None: the folder that ``FASTGT_DATA`` names.

    Raises:
        FileNotFoundError: The file is absent.
        ValueError: It is damaged, goes back in time or names an airport that is not there; says
            how.
    """
    name, arrays = archive.read(None if folder is None else Path(folder), "flights", _KEYS)
    with archive.checking(name):
        return _events(arrays)


def _events(arrays: Mapping[str, np.ndarray]) -> EventSet:
    for key, kinds in _KEYS.items():
        archive.check_array(key, arrays[key], 1, kinds)
    source, target, time, distance = (
        torch.from_numpy(arrays[key].astype(np.int64)) for key in list(_KEYS)[:4]
    )
    return EventSet(
        source,
        target,
        time,
        len(arrays["airports"]),
        chronological(time),
        (distance[:, None] / MILES).float(),
        title="flights",
    )

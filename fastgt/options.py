"""What the options of the command lines say."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def device_named(name: str) -> torch.device:
    """The device of an option ``--device``.

    Raises:
        ValueError: It is neither a CPU nor CUDA.
        RuntimeError: This PyTorch sees no CUDA device.
    """
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name}")
    import torch

    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"--device {device}: this PyTorch sees no CUDA device")
    return device


def up_to(most: int) -> Callable[[str], int]:
    """A reader of whole numbers from 1 to ``most``."""

    def check(text: str) -> int:
        # numbers of thousands of digits are not read at all
        if not text.isdecimal() or (len(text) < 20 and int(text) < 1):
            raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
        if len(text) >= 20 or int(text) > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {text}")
        return int(text)

    return check


def one_of(what: str, names: Collection[str]) -> Callable[[str], str]:
    """A reader of one of many names, which a usage line would not hold."""

    def check(text: str) -> str:
        if text in names:
            return text
        near = difflib.get_close_matches(text, names, 1, 0.5)
        hint = f": did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"no {what} is called {text!r}{hint}")

    return check


def shares(text: str) -> list[float]:
    """The shares of heads in ``heads=SHARE,SHARE``."""
    what, _, numbers = text.partition("=")
    if what != "heads":
        raise argparse.ArgumentTypeError(f"only heads can be pruned here, got {text!r}")
    given: list[float] = []
    for number in numbers.split(","):
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not 0 < share < 1:
            raise argparse.ArgumentTypeError(
                f"a share of heads must be between 0 and 1, got {number!r} in {text!r}"
            )
        if share in given:
            raise argparse.ArgumentTypeError(f"{number} is there twice in {text!r}")
        given.append(share)
    return given


def numbers(text: str) -> list[int]:
    """Whole numbers in ``0-3,7``."""
    given: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = [first, last] if dash else [first]
        if not all(x.isdecimal() and len(x) < 10 for x in ends) or int(ends[0]) > int(ends[-1]):
            raise argparse.ArgumentTypeError(f"must be numbers as 0-3,7, got {text!r}")
        if int(ends[-1]) - int(ends[0]) >= 10_000:
            raise argparse.ArgumentTypeError(f"must be 10,000 numbers at most, got {text!r}")
        given += range(int(ends[0]), int(ends[-1]) + 1)
    return given


def hours(text: str) -> float:
    """A positive number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return number

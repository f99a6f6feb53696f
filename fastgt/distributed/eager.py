"""What torch.compile leaves alone: collectives, of which it would make others on some ranks."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def eager(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, before which a compiled program ends and after which another one begins.

    ``torch.compile`` puts collectives of its own in the place of those that it finds. Ranks have
    shapes of their own, and compile anew, or give up, at different calls. They would wait for each
    other in different collectives. With ``fullgraph=True`` such a program is refused.
    """
    disabled: list[Callable[Arguments, Result]] = []

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if "torch._dynamo" not in sys.modules:  # nothing compiles, and importing it takes a second
            return function(*args, **kwargs)
        if not disabled:
            reason = f"{function.__qualname__} waits for other ranks, which may not be compiled"
            disabled.append(torch.compiler.disable(function, reason=reason))
        return disabled[0](*args, **kwargs)

    return call

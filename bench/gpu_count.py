"""How many kernels calls compile, without compiling one: Triton is asked what it would compile."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from torch import Tensor


@contextmanager
def counted(target: str = "sm_90") -> Iterator[set[tuple[str, str]]]:
    """Within it Triton's kernels are neither compiled nor launched, on CPU tensors too; the set
    gets the name and the key of each. What they would have written stays as it is.

    Example::

        with counted() as kernels:
            neighborhood_attention(q, k, v, graph, impl="triton")
        len(kernels)
    """
    import triton
    from triton.runtime import driver

    from fastgt.kernels.ahead import TARGETS, _Driver

    kernels: set[tuple[str, str]] = set()

    def note(*, key: str, fn: Any, **rest: Any) -> bool:
        kernels.add((fn.name, str(key)))
        return True  # there is nothing to be done

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", _Driver(TARGETS[target])))
        stack.enter_context(mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note))
        for name, module in list(sys.modules.items()):
            if name.startswith("fastgt.ops.") and hasattr(module, "require_triton"):
                stack.enter_context(mock.patch.object(module, "require_triton", _allow))
        yield kernels


def _allow(x: Tensor) -> None:
    """CPU tensors are as good as any where nothing is launched."""


def count(calls: list[tuple[Callable[..., Any], tuple]], tell: Callable[[Any], None]) -> int:
    """Kernels that all the calls compile together."""
    with counted() as kernels:
        for function, args in calls:
            function(*args)
    return len(kernels)

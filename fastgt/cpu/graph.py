"""Edges grouped by one of their ends, on a CPU: ``graph.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgt.cpu import library


def can_group(key: Tensor, other: Tensor) -> bool:
    """Whether there are kernels, and values that they can read: not while a call is traced."""
    plain = type(key) is Tensor and type(other) is Tensor and key.device.type == "cpu"
    tracing = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    if not plain or tracing or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return key.dtype in (torch.int32, torch.int64) and not isinstance(library.load(), str)


def group(
    key: Tensor, other: Tensor, size: int, dtype: torch.dtype, number: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Stable sort by ``key``: -> the other ends, the order, the boundaries and ``number``."""
    key, other = key.contiguous(), other.to(key.dtype).contiguous()
    number = None if number is None else number.contiguous()
    ends, order = key.new_empty(key.shape, dtype=dtype), key.new_empty(key.shape, dtype=dtype)
    numbers = None if number is None else torch.empty_like(order)
    ptr = key.new_empty(size + 1, dtype=dtype)
    results = (ptr, ends, order, numbers)
    library.kernels().run(
        "graph",
        "group",
        key.shape[0],
        size,
        int(key.dtype == torch.int64),
        int(dtype == torch.int64),
        *(0 if x is None else x.data_ptr() for x in (key, other, number, *results)),
    )
    return ends, order, ptr, numbers

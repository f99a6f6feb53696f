"""Operators over the graphs of a batch whose nodes lie on several ranks, by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastgt.distributed.global_attention import global_attention
from fastgt.distributed.linear_attention import linear_attention, sgformer_attention
from fastgt.distributed.segment_pool import segment_max, segment_mean, segment_sum, virtual_node

_OVER_GRAPHS = (
    global_attention,
    linear_attention,
    segment_max,
    segment_mean,
    segment_sum,
    sgformer_attention,
    virtual_node,
)
OPERATORS: dict[str, Callable[..., Any]] = {op.__name__: op for op in _OVER_GRAPHS}

"""The registered ops of neighborhood_attention: their schemas, what fake tensors get from them, and
the launchers that they call.

``path`` is "cpp" (on a CPU) or one of Triton's, ``height`` that of its windows, 0 without; the
walks are what it goes through. The other arguments are the fields of types in
``fastgt/contract.py``, one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgt.contract import (
    Dropout,
    EdgeTerms,
    HeadMask,
    Inputs,
    Logit,
    PerInput,
    Results,
    Saved,
    Switches,
    Upstream,
)
from fastgt.ops.checks import accumulator
from fastgt.ops.implementation import require_triton
from fastgt.signature import Signature, results_schema

FORWARD = Signature(Inputs, Logit, EdgeTerms, HeadMask, Dropout, Switches)
BACKWARD = Signature(Upstream, Saved, Inputs, Logit, EdgeTerms, HeadMask, Dropout, Switches)
torch.library.define(
    "fastgt::attention_fwd",
    f"(str path, int height, Tensor[] row_walk, {FORWARD.schema}) -> ({results_schema(Results)})",
)
torch.library.define(
    "fastgt::attention_bwd",
    "(str path, int height, Tensor[] row_walk, Tensor[] column_walk, bool[] needs,"
    f" {BACKWARD.schema}) -> ({', '.join(f'Tensor? d{name}' for name in PerInput._fields)})",
)


@torch.library.register_fake("fastgt::attention_fwd")
def _(path: str, height: int, row_walk: Any, *flat: Any) -> tuple[Tensor | None, ...]:
    inputs, _, terms, _, _, switches = FORWARD.split(flat)
    (n, heads, d), edges = inputs.q.shape, row_walk[1].shape[0]
    q, wide = inputs.q, accumulator(inputs.q)
    return (
        q.new_empty(n, heads, inputs.v.shape[2]),
        q.new_empty(n, heads, dtype=wide),
        q.new_empty(edges, heads) if switches.make_weights else None,
        q.new_empty(edges, heads, d) if switches.make_scores else None,
        q.new_empty(n, heads, terms.attr.shape[1], dtype=wide) if switches.make_attr_o else None,
    )


@torch.library.register_fake("fastgt::attention_bwd")
def _(
    path: str, height: int, row_walk: Any, column_walk: Any, needs: Any, *flat: Any
) -> tuple[Tensor | None, ...]:
    _, _, inputs, _, terms, *_ = BACKWARD.split(flat)
    tensors = zip((*inputs, *terms), needs, strict=True)
    return tuple(x.new_empty(x.shape) if need else None for x, need in tensors)


def _launch_fwd(path: str, height: int, row_walk: Any, *flat: Any) -> tuple[Tensor | None, ...]:
    call = inputs, logit, terms, mask, _, switches = FORWARD.split(flat)
    if path == "cpp":
        from fastgt.cpu import attention

        return attention.attention_fwd(row_walk, *call)
    require_triton(inputs.q)
    if height:
        from fastgt.kernels.attention_windows import windows_fwd

        dense = path == "graphs"
        return windows_fwd(row_walk, height, dense, inputs, logit, terms, mask, switches)
    from fastgt.kernels.attention import attention_fwd

    return attention_fwd(row_walk, *call)


def _launch_bwd(
    path: str, height: int, row_walk: Any, column_walk: Any, needs: Any, *flat: Any
) -> tuple[Tensor | None, ...]:
    upstream, saved, *call = BACKWARD.split(flat)
    walks = row_walk, column_walk
    if path == "cpp":
        from fastgt.cpu import attention

        return attention.attention_bwd(*walks, PerInput(*needs), upstream, saved, *call)
    if height:
        from fastgt.kernels.attention_windows_backward import windows_bwd

        dense = path == "graphs"
        return windows_bwd(*walks, height, dense, needs, upstream, saved, *call[:4])
    from fastgt.kernels.attention_backward import attention_bwd

    return attention_bwd(*walks, needs, upstream, saved, *call)


torch.library.impl("fastgt::attention_fwd", "CompositeExplicitAutograd", _launch_fwd)
torch.library.impl("fastgt::attention_bwd", "CompositeExplicitAutograd", _launch_bwd)

attention_fwd = torch.ops.fastgt.attention_fwd.default
attention_bwd = torch.ops.fastgt.attention_bwd.default

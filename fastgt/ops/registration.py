"""Registered ops whose launcher and fake take typed values.

The first argument of every such op is the implementation that runs, "cpp" or "triton".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastgt.signature import Signature


def register(
    name: str,
    arguments: Signature,
    results: str,
    *,
    launch: Callable[..., Any],
    fake: Callable[..., Any],
) -> Any:
    """Define ``fastgt::name`` on every device, and give it.

    Args:
        name: The op's name.
        arguments: The types of the others; ``launch`` and ``fake`` take one value of each.
        results: The schema of what comes back.
        launch: Runs the op, without gradients; takes the implementation first.
        fake: Makes results of the right shapes, without values.
    """
    op = f"fastgt::{name}"
    torch.library.define(op, f"(str impl, {arguments.schema}) -> {results}")

    def run(impl: str, *flat: Any) -> Any:
        values = arguments.split(flat)
        if not torch.is_grad_enabled():
            return launch(impl, *values)
        with torch.no_grad():  # called by an exported module, gradients may be on
            return launch(impl, *values)

    def shaped(impl: str, *flat: Any) -> Any:
        return fake(*arguments.split(flat))

    torch.library.impl(op, "CompositeExplicitAutograd", run)
    torch.library.register_fake(op, shaped)
    return getattr(torch.ops.fastgt, name).default

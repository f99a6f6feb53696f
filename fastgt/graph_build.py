"""What a Graph is built from: tensors that may be kept."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(x: Tensor) -> Tensor:
    """``x``; where it is an inference tensor, a copy that autograd may save for a backward.

    What is made under ``torch.inference_mode()``, and kept, is trained with afterwards.
    """
    # Dynamo does not trace the question
    if torch.compiler.is_compiling() or not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()

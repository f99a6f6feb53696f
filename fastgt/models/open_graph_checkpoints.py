"""The authors' OpenGraph, as its parameters are named here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor


def open_graph_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ``state_dict`` of the authors' model, as it is named here.

    Their files hold a whole module, which needs their code to be read: ``state`` is what its
    ``state_dict()`` gives.

    Raises:
        ValueError: A name is none of their model's; it is given.

    Source:
        Xia et al., arXiv 2403.01121, their code's ``link_prediction/model.py``.

    Example:
        >>> import torch
        >>> from fastgt.models import open_graph_state_dict
        >>> name = "graphTransformer.gt_layers.2.layer_norm1.bias"
        >>> list(open_graph_state_dict({name: torch.zeros(1024)}))
        ['layers.2.norm1.bias']
    """
    found: dict[str, Tensor] = {}
    for name, x in state.items():
        match = re.fullmatch(r"graphTransformer\.gt_layers\.(\d+)\.(.+)[._](weight|bias)", name)
        if match is not None and match[2] == "multi_head_attention.in_proj":
            for part, weight in zip("qkv", x.chunk(3), strict=True):
                found[f"layers.{match[1]}.attention.{part}.weight"] = weight
        elif match is not None and match[2] in _NAMES:
            found[f"layers.{match[1]}.{_NAMES[match[2]]}.{match[3]}"] = x
        else:
            raise ValueError(f"{name!r} is no parameter of an OpenGraph")
    return found


# what the authors call a part -> what it is here
_NAMES = {
    "multi_head_attention.out_proj": "attention.out",
    "dense_layers.0.linear": "ffn.0",
    "dense_layers.1.linear": "ffn.2",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
}

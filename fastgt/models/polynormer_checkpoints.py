"""Checkpoints of the authors' Polynormer, and of torch-geometric's, for the model here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from fastgt.models.authors_checkpoints import by_heads
from fastgt.models.polynormer_config import PolynormerConfig

# what the authors or torch-geometric call a part -> what it is here
_NAMES = {
    r"lin_in\.(\w+)": r"embed.0.\1",
    r"h_lins\.(\d+)\.(\w+)": r"layers.\1.h.0.\2",
    r"local_convs\.(\d+)\.lin(?:_src)?\.weight": r"layers.\1.local.lin.weight",
    r"local_convs\.(\d+)\.att_src": r"layers.\1.local.source",
    r"local_convs\.(\d+)\.att_dst": r"layers.\1.local.target",
    r"local_convs\.(\d+)\.bias": r"layers.\1.local.bias",
    r"lins\.(\d+)\.(\w+)": r"layers.\1.own.\2",
    r"lns\.(\d+)\.(\w+)": r"layers.\1.norm.\2",
    r"pre_lns\.(\d+)\.(\w+)": r"layers.\1.pre_norm.\2",
    r"post_bns\.(\d+)\.(\w+)": r"layers.\1.after.0.\2",
    r"ln\.(\w+)": r"norm.\1",
    r"pred_local\.(\w+)": r"local_readout.\1",
    r"pred_global\.(\w+)": r"readout.\1",
    r"global_attn\.lin_out\.(\w+)": r"global_out.0.0.\1",
    r"global_attn\.(\d+)\.lin_out\.(\w+)": r"global_out.\1.0.\2",
    r"global_attn\.([hqkv])_lins\.(\d+)\.(\w+)": r"global_layers.\2.\1.\3",
    r"global_attn\.(\d+)\.([hqkv])(?:_lins)?\.(\w+)": r"global_layers.\1.\2.\3",
    r"global_attn\.lns\.(\d+)\.(\w+)": r"global_layers.\1.norm.\2",
    r"global_attn\.(\d+)\.lns\.(\w+)": r"global_layers.\1.norm.\2",
}


def polynormer_state_dict(
    state: Mapping[str, Tensor], config: PolynormerConfig
) -> dict[str, Tensor]:
    """The ``state_dict`` of the authors' Polynormer, or of torch-geometric's, as named here.

    It loads into a :class:`Polynormer` of that configuration. In the global attention heads lie
    side by side here, and the heads of a channel there: weights are reordered.

    Torch-geometric's settings are ``beta=0.9``, ``learn_beta=False``, ``local_norm=True``,
    ``input_layer=False``, ``shared_query=False``, ``qkv_bias=False``, ``shared_output=False`` and
    ``eps=1e-6``, with ``local="gcn"``. It returns the logarithms of a softmax of what the model
    here gives. Its ``lin_in`` is not used there, and is left out here. With more than one head its
    global layers are narrower than what they are given, and cannot run.

    Args:
        state: Of the authors' model, of theirs for large graphs, or of
            ``torch_geometric.nn.models.Polynormer``.
        config: Of the model here.

    Raises:
        ValueError: A name is none of these models'; it is given.

    Source:
        Deng et al., arXiv 2403.01232, and their code; ``torch_geometric.nn.models.Polynormer``.

    Example:
        >>> import torch
        >>> from fastgt.models import PolynormerConfig, polynormer_state_dict
        >>> config = PolynormerConfig.published("minesweeper")
        >>> list(polynormer_state_dict({"lns.0.bias": torch.zeros(512)}, config))
        ['layers.0.norm.bias']
    """
    found: dict[str, Tensor] = {}
    for name, x in state.items():
        if name.startswith("lin_in.") and not config.input_layer:
            continue
        if name in ("betas", "global_attn.betas"):
            part = "layers" if name == "betas" else "global_layers"
            for i, row in enumerate(x):
                value = row if part == "layers" else by_heads(row, config.heads, 0)
                found[f"{part}.{i}.beta.value"] = value
            continue
        ours = _renamed(name)
        if ours.startswith("global_layers."):
            x = by_heads(x, config.heads, 0)
        elif re.match(r"global_out\.\d+\.0\.weight", ours):
            x = by_heads(x, config.heads, 1)
        elif ours.endswith((".source", ".target")):
            x = x.squeeze(0)
        found[ours] = x
    return found


def _renamed(name: str) -> str:
    for theirs, ours in _NAMES.items():
        if (match := re.fullmatch(theirs, name)) is not None:
            return match.expand(ours)
    raise ValueError(f"{name!r} is no parameter of a Polynormer")

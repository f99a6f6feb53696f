"""Checkpoints of AnimeInbet's correspondence transformer for the model here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from fastgt.models.authors_checkpoints import by_heads
from fastgt.models.correspondence import CorrespondenceTransformerConfig

# what the authors call a part -> what it is here; a layer of an MLP is every third of theirs
_NAMES = {
    r"kenc\.encoder\.(\d+)\.(\w+)": r"embed.layers.\1.\2",
    r"tenc\.encoder\.(\d+)\.(\w+)": r"embed_pe.layers.\1.\2",
    r"gnn\.(layers\.\d+)\.mlp\.(\d+)\.(\w+)": r"\1.mlp.layers.\2.\3",
    r"gnn\.(layers\.\d+)\.attn\.proj\.0\.(\w+)": r"\1.q.\2",
    r"gnn\.(layers\.\d+)\.attn\.proj\.1\.(\w+)": r"\1.k.\2",
    r"gnn\.(layers\.\d+)\.attn\.proj\.2\.(\w+)": r"\1.v.\2",
    r"gnn\.(layers\.\d+)\.attn\.merge\.(\w+)": r"\1.merge.\2",
    r"final_proj\.(\w+)": r"out.\1",
    r"bin_score": r"dustbin",
}


def correspondence_state_dict(
    state: Mapping[str, Tensor], config: CorrespondenceTransformerConfig
) -> dict[str, Tensor]:
    """The authors' ``state_dict``, under the names that it has here.

    It loads into a :class:`CorrespondenceTransformer` of that configuration. In an attention the
    channels of a head lie side by side here, and the heads of a channel there: weights are
    reordered. The convolutions that make descriptors of an image are left out. A file of the
    authors' training has the ``state_dict`` as its entry ``"model"``, with ``"module."`` before
    every name where they trained on several devices: that is taken off.

    Args:
        state: Of ``SuperGlueT``.
        config: Of the model here.

    Raises:
        ValueError: A name is not theirs; it is given.

    Source:
        Siyao et al., arXiv 2309.16643, and their code.

    Example:
        >>> import torch
        >>> from fastgt.models import CorrespondenceTransformerConfig, correspondence_state_dict
        >>> config = CorrespondenceTransformerConfig.published("mixamo_line")
        >>> state = {"gnn.layers.0.mlp.3.weight": torch.zeros(128, 256, 1)}
        >>> {name: x.shape for name, x in correspondence_state_dict(state, config).items()}
        {'layers.0.mlp.layers.1.weight': torch.Size([128, 256])}
    """
    found: dict[str, Tensor] = {}
    for name, x in state.items():
        name = name.removeprefix("module.")
        if name.startswith("vertex_desc."):
            continue
        ours = _renamed(name)
        if ours.endswith(".weight"):
            x = x.squeeze(2)  # of a convolution over one node
        if re.fullmatch(r"layers\.\d+\.[qkv]\.\w+", ours):
            x = by_heads(x, config.heads, 0)
        elif re.fullmatch(r"layers\.\d+\.merge\.weight", ours):
            x = by_heads(x, config.heads, 1)
        found[ours] = x
    return found


def _renamed(name: str) -> str:
    for theirs, ours in _NAMES.items():
        if (match := re.fullmatch(theirs, name)) is not None:
            return re.sub(
                r"(embed|embed_pe|mlp)\.layers\.(\d+)",
                lambda m: f"{m[1]}.layers.{int(m[2]) // 3}",
                match.expand(ours),
            )
    raise ValueError(f"{name!r} is no parameter of the authors' correspondence transformer")

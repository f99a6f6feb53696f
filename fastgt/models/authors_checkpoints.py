"""Checkpoints of the authors' code as state dicts of the models here."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# what the authors call a part -> what it is here; the first that fits, at the name's place
_GRAPH_TRANSFORMER = {
    r"embedding_h\.": "embed.",
    r"embedding_e\.": "embed_edge.",
    r"embedding_lap_pos_enc\.": "embed_pe.",
    r"(layers\.\d+)\.attention\.([QKV])\.": r"\1.attention.\2.",
    r"(layers\.\d+)\.attention\.proj_e\.": r"\1.attention.gate.",
    r"(layers\.\d+)\.O(_h)?\.": r"\1.attention.out.",
    r"(layers\.\d+)\.O_e\.": r"\1.attention.edge_out.",
    r"(layers\.\d+)\.(?:batch|layer)_norm([12])(?:_h)?\.": r"\1.norm\2.",
    r"(layers\.\d+)\.(?:batch|layer)_norm([12])_e\.": r"\1.edge_norm\2.",
    r"(layers\.\d+)\.FFN(?:_h)?_layer([12])\.": r"\1.ffn.\2.",
    r"(layers\.\d+)\.FFN_e_layer([12])\.": r"\1.edge_ffn.\2.",
    r"MLP_layer\.FC_layers\.(\d+)\.": r"readout.\1.",
}


def graph_transformer_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' ``state_dict`` of a Graph Transformer, under the names that it has here.

    It loads into a :class:`fastgt.models.GraphTransformer` or
    :class:`fastgt.models.EdgeGraphTransformer` of the same sizes and norms. A file of the authors'
    training is the ``state_dict`` itself.

    Args:
        state: ``graphtransformer``'s ``GraphTransformerNet``, for nodes or with edge features.

    Raises:
        ValueError: A name is none of these models', as that of encodings by Weisfeiler-Lehman
            roles, which they do not have; it is given.

    Source:
        Dwivedi and Bresson, arXiv 2012.09699, and their code.

    Example:
        >>> import torch
        >>> from fastgt.models import graph_transformer_state_dict
        >>> list(graph_transformer_state_dict({"layers.0.O_h.bias": torch.zeros(64)}))
        ['layers.0.attention.out.bias']
    """
    return {_renamed(name): x for name, x in state.items()}


def by_heads(x: Tensor, heads: int, dim: int) -> Tensor:
    """Channels of that dimension from ``[D, H]`` to ``[H, D]``."""
    return x.unflatten(dim, (-1, heads)).transpose(dim, dim + 1).flatten(dim, dim + 1)


def _renamed(name: str) -> str:
    for theirs, ours in _GRAPH_TRANSFORMER.items():
        found = re.match(theirs, name)
        if found is None:
            continue
        part = found.expand(ours)
        # activations and dropout have numbers here
        part = re.sub(r"ffn\.([12])\.", lambda m: f"ffn.{3 * (int(m[1]) - 1)}.", part)
        part = re.sub(r"readout\.(\d+)\.", lambda m: f"readout.{2 * int(m[1])}.", part)
        part = re.sub(r"attention\.([QKV])\.", lambda m: f"attention.{m[1].lower()}.", part)
        return part + name[found.end() :]
    raise ValueError(f"{name!r} is no parameter of a Graph Transformer with Laplacian encodings")

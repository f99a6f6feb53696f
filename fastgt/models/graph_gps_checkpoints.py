"""Checkpoints of the authors' GraphGPS, and of torch-geometric's layer, for the models here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

_ENCODER = r"encoder\.node_encoder\.(?:encoder\d\.)?"
_LAYER = r"(layers\.\d+)\."
_FREQUENCIES = _ENCODER + r"pe_encoder\.layers\.(\d+)\."
_SIGN_NET = _ENCODER + r"sign_inv_net\."
# what the authors call a part -> what it is here; the first that fits the whole name
_NAMES = {
    _ENCODER + r"linear_x\.(\w+)": r"embed.lin.\1",
    _ENCODER + r"linear_A\.(\w+)": r"embed_lap.phi.0.\1",
    # activations have even numbers there, and the first linear layer stands outside
    _ENCODER + r"pe_encoder\.(\d*[13579])\.(\w+)": r"embed_lap.phi.<\1+1>.\2",
    _FREQUENCIES + r"self_attn\.out_proj\.(\w+)": r"embed_lap.layers.\1.attention.out.\2",
    _FREQUENCIES + r"linear1\.(\w+)": r"embed_lap.layers.\1.ffn.0.\2",
    _FREQUENCIES + r"linear2\.(\w+)": r"embed_lap.layers.\1.ffn.3.\2",
    _FREQUENCIES + r"(norm[12]\.\w+)": r"embed_lap.layers.\1.\2",
    # linear layers, ReLU and norms take turns here
    _SIGN_NET + r"enc\.layers\.(\d+)\.nn\.lins\.(\d)\.(\w+)": r"embed_sign.phi.\1.<3*\2>.\3",
    _SIGN_NET + r"enc\.layers\.(\d+)\.nn\.bns\.0\.(\w+)": r"embed_sign.phi.\1.2.\2",
    _SIGN_NET + r"enc\.bns\.(\d+)\.(\w+)": r"embed_sign.norms.\1.\2",
    _SIGN_NET + r"rho\.lins\.(\d+)\.(\w+)": r"embed_sign.rho.<3*\1>.\2",
    _SIGN_NET + r"rho\.bns\.(\d+)\.(\w+)": r"embed_sign.rho.<3*\1+2>.\2",
    _ENCODER + r"raw_norm\.(\w+)": r"embed_walk.norm.\1",
    _ENCODER + r"pe_encoder\.(weight|bias)": r"embed_walk.lin.\1",
    _ENCODER + r"0\.spatial_encoder\.weight": "pair_bias.length.weight",
    _ENCODER + r"0\.edge_encoder\.weight": "pair_bias.edge.weight",
    _ENCODER + r"0\.edge_dis_encoder\.weight": "pair_bias.hop.weight",
    _ENCODER + r"[01]\.in_degree_encoder\.weight": "embed_degree.reaching.weight",
    _ENCODER + r"[01]\.out_degree_encoder\.weight": "embed_degree.leaving.weight",
    _ENCODER + r"linear_encoder_eigenvec\.(\w+)": r"embed_stable.lin.\1",
    _ENCODER + r"atom_embedding_list\.(\d+)\.weight": r"embed.embed.\1.weight",
    r"encoder\.edge_encoder\.bond_embedding_list\.(\d+)\.weight": r"embed_edge.embed.\1.weight",
    _LAYER + r"local_model\.nn\.([02])\.(\w+)": r"\1.local.mlp.\2.\3",
    # GENConv's MLP has a dropout, which has no place here
    _LAYER + r"local_model\.mlp\.([01])\.(\w+)": r"\1.local.mlp.\2.\3",
    _LAYER + r"local_model\.mlp\.4\.weight": r"\1.local.mlp.3.weight",
    _LAYER + r"local_model\.aggr_module\.t": r"\1.local.temperature",
    _LAYER + r"local_model\.mlp_r_ij\.([02])\.(\w+)": r"\1.local.factor.\2.\3",
    _LAYER + r"local_model\.A\.(\w+)": r"\1.local.own.\2",
    _LAYER + r"local_model\.B\.(\w+)": r"\1.local.value.\2",
    _LAYER + r"local_model\.C\.(\w+)": r"\1.local.gate.\2",
    _LAYER + r"local_model\.D\.(\w+)": r"\1.local.gate_row.\2",
    _LAYER + r"local_model\.E\.(\w+)": r"\1.local.gate_col.\2",
    _LAYER + r"local_model\.bn_node_x\.(\w+)": r"\1.local.norm.\2",
    _LAYER + r"local_model\.bn_edge_e\.(\w+)": r"\1.local.edge_norm.\2",
    _LAYER + r"local_model\.lin(?:_src)?\.(weight|bias)": r"\1.local.lin.\2",
    _LAYER + r"local_model\.edge_encoder\.(\w+)": r"\1.local.edge.\2",
    _LAYER + r"local_model\.pre_nns\.0\.0\.bias": r"\1.local.row.bias",
    _LAYER + r"local_model\.post_nns\.0\.0\.(\w+)": r"\1.local.post.\2",
    _LAYER + r"local_model\.lin_edge\.weight": r"\1.local.lin_edge.weight",
    _LAYER + r"local_model\.att_src": r"\1.local.source",
    _LAYER + r"local_model\.att_dst": r"\1.local.target",
    _LAYER + r"local_model\.att_edge": r"\1.local.edge",
    _LAYER + r"local_model\.bias": r"\1.local.bias",
    _LAYER + r"self_attn\.to_([qkv])\.weight": r"\1.attention.\2.weight",
    _LAYER + r"self_attn\.(?:to_out|out_proj)\.(\w+)": r"\1.attention.out.\2",
    _LAYER + r"self_attn\.fast_attention\.projection_matrix": r"\1.attention.projection",
    _LAYER + r"norm1_local\.(\w+)": r"\1.local_norm.\2",
    _LAYER + r"norm1_attn\.(\w+)": r"\1.attention_norm.\2",
    _LAYER + r"norm2\.(\w+)": r"\1.norm.\2",
    _LAYER + r"ff_linear1\.(\w+)": r"\1.ffn.0.\2",
    _LAYER + r"ff_linear2\.(\w+)": r"\1.ffn.3.\2",
    r"post_mp\.FC_layers\.(\d+)\.(\w+)": r"readout.layers.\1.\2",
    r"post_mp\.layer_post_mp\.model\.0\.Layer_(\d+)\.layer\.model\.(\w+)": r"readout.layers.\1.\2",
}
_CONV = {
    r"conv\.": "local_model.",
    r"attn\.": "self_attn.",
    r"mlp\.0\.": "ff_linear1.",
    r"mlp\.3\.": "ff_linear2.",
    r"norm1\.(?:module\.)?": "norm1_local.",
    r"norm2\.(?:module\.)?": "norm1_attn.",
    r"norm3\.(?:module\.)?": "norm2.",
}


def graph_gps_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' ``state_dict`` of a GraphGPS model, under the names that it has here.

    It loads into a :class:`fastgt.models.GraphGPS` of the same settings. A file of the authors'
    training has it as ``"model_state"``. Names may begin with ``model.`` or not. What nothing uses
    there is left out: the norm of a branch that a layer does not have, and the encoder of edges
    beside GCN or no message passing. Beside GIN that encoder cannot be told from GINE's: take its
    one or two entries ``embed_edge...`` out.

    Args:
        state: GraphGPS's ``GPSModel``, in local models GCN, GIN, GINE, GENConv, GAT, PNA and
            CustomGatedGCN, with a Transformer, biased or not, or a Performer, and encoders
            TypeDict, Linear, Atom, Bond, DummyEdge, LapPE, SignNet, RWSE (linear),
            EquivStableLapPE and GraphormerBias without a token.

    Raises:
        ValueError: A name is none of these models'; it is given. Or GIN's epsilon is not 0, which
            none of the authors' models has.

    Source:
        Rampasek et al., arXiv 2205.12454, and their code.

    Example:
        >>> import torch
        >>> from fastgt.models import graph_gps_state_dict
        >>> list(graph_gps_state_dict({"model.layers.0.ff_linear1.bias": torch.zeros(128)}))
        ['layers.0.ffn.0.bias']
    """
    theirs = {name.removeprefix("model."): x for name, x in state.items()}
    found: dict[str, Tensor] = {}
    for name, x in theirs.items():
        if _used(name, theirs):
            found.update(_here(name, x, theirs))
    return found


def gps_conv_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The ``state_dict`` of a ``torch_geometric.nn.GPSConv``, as a ``GraphGPSLayer`` names it.

    The layer here has the same kind of message passing. Its norm is ``"batch"``, or ``"graph"`` for
    ``norm="layer_norm"``. Both layers give the same numbers, that of torch-geometric called with a
    batch vector: without one, its ``layer_norm`` adds the epsilon to a deviation.

    Args:
        state: Of a ``GPSConv`` of ``attn_type="multihead"`` around no layer, a ``GCNConv``, a
            ``GINConv`` or ``GINEConv`` with a network of Linear, ReLU, Linear, a ``GENConv`` or a
            ``GATConv``.

    Raises:
        ValueError: A name is none of these; it is given, as those of torch-geometric's Performer,
            which has other random features.

    Example:
        >>> import torch
        >>> from fastgt.models import gps_conv_state_dict
        >>> list(gps_conv_state_dict({"norm3.module.bias": torch.zeros(64)}))
        ['norm.bias']
    """
    theirs = {}
    for name, x in state.items():
        for part, authors in _CONV.items():
            if (match := re.match(part, name)) is not None:
                theirs[f"layers.0.{authors}{name[match.end() :]}"] = x
                break
        else:
            raise ValueError(f"{name!r} is no parameter of a GPSConv that has its like here")
    return {name.removeprefix("layers.0."): x for name, x in graph_gps_state_dict(theirs).items()}


def _used(name: str, theirs: Mapping[str, Tensor]) -> bool:
    if (match := re.match(_LAYER + r"norm1_(local|attn)\.", name)) is not None:
        branch = {"local": "local_model", "attn": "self_attn"}[match[2]]
        return any(other.startswith(f"{match[1]}.{branch}.") for other in theirs)
    if name.startswith("encoder.edge_encoder."):
        with_edges = _LAYER + r"local_model\.(nn|C|lin_edge|edge_encoder|mlp)\."
        return any(re.match(with_edges, other) for other in theirs)
    return True


def _here(name: str, x: Tensor, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if (match := re.fullmatch(_LAYER + r"self_attn\.in_proj_(weight|bias)", name)) is not None:
        layer, kind = match.groups()
        return {
            f"{layer}.attention.{part}.{kind}": y for part, y in zip("qkv", x.chunk(3), strict=True)
        }
    if (match := re.fullmatch(_FREQUENCIES + r"self_attn\.in_proj_(\w+)", name)) is not None:
        layer, kind = match.groups()
        return {
            f"embed_lap.layers.{layer}.attention.{part}.{kind}": y
            for part, y in zip("qkv", x.chunk(3), strict=True)
        }
    if (match := re.fullmatch(_ENCODER + r"linear_A\.(\w+)", name)) is not None and any(
        re.match(_FREQUENCIES, other) for other in theirs
    ):
        return {f"embed_lap.lin.{match[1]}": x}
    if (match := re.fullmatch(_LAYER + r"local_model\.pre_nns\.0\.0\.weight", name)) is not None:
        parts = ("row", "col", "of_edge")
        return {
            f"{match[1]}.local.{part}.weight": y
            for part, y in zip(parts, x.chunk(3, 1), strict=True)
        }
    if re.fullmatch(_LAYER + r"local_model\.aggr_module\.avg_deg_(lin|log)", name) is not None:
        return {}  # of scalers that are not there
    of_gin = rf"{_LAYER}local_model\.eps|{_SIGN_NET}enc\.layers\.\d+\.eps"
    if re.fullmatch(of_gin, name) is not None:
        if torch.count_nonzero(x):
            raise ValueError(f"{name!r} must be 0, got {x.tolist()}")
        return {}
    if re.fullmatch(_LAYER + r"local_model\.lin_dst\.weight", name) is not None:
        if not torch.equal(x, theirs[name.replace("lin_dst", "lin_src")]):
            raise ValueError(f"{name!r} must be that of lin_src: a layer here has one of both")
        return {}
    if (ours := _plain_encoder(name, theirs)) is not None:
        return {ours: x}
    if (
        match := re.fullmatch(r"post_mp\.layer_post_mp\.model\.([01])\.model\.(\w+)", name)
    ) is not None:
        hidden = r"post_mp\.layer_post_mp\.model\.0\.Layer_\d+\.layer\.model\.weight"
        last = sum(re.fullmatch(hidden, other) is not None for other in theirs)
        return {f"readout.layers.{last}.{match[2]}": x}
    for pattern, ours in _NAMES.items():
        if (match := re.fullmatch(pattern, name)) is not None:
            ours = re.sub(r"<(.*?)>", lambda m: _place(m[1]), match.expand(ours))
            return {ours: x.squeeze(0) if re.search(r"att_\w+$", name) else x}
    raise ValueError(f"{name!r} is no parameter of a GraphGPS model that has its like here")


def _place(sum_: str) -> str:
    """``"a*n+b"``, or a part of it, as a number."""
    product, _, more = sum_.partition("+")
    return str(math.prod(map(int, product.split("*"))) + int(more or 0))


def _plain_encoder(name: str, theirs: Mapping[str, Tensor]) -> str | None:
    """An embedding of types, or a linear layer, which has a bias."""
    nodes = re.fullmatch(r"(encoder\.node_encoder\.(?:encoder1\.)?encoder)\.(weight|bias)", name)
    edges = re.fullmatch(r"(encoder\.edge_encoder\.encoder)\.(weight|bias)", name)
    match = nodes or edges
    if match is None:
        return None
    linear = f"{match[1]}.bias" in theirs
    part = "embed" if nodes else "embed_edge"
    return f"{part}.lin.{match[2]}" if linear else f"{part}.embed.0.{match[2]}"

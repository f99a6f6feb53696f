"""What users would otherwise run: neighbourhood attention composed from gathers and scatters.

Every peer takes q ``[N_rows, H, D]``, k ``[N_cols, H, D]``, v ``[N_cols, H, Dv]`` and PyG's
``edge_index`` and materialises several tensors of size edges x heads x width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gather_scatter(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge_index: Tensor,
    *,
    edge_bias: Tensor | None = None,
    logit_clamp: float | None = None,
) -> Tensor:
    """Plain PyTorch: gather q and k, softmax by scatter, gather v, ``index_add``."""
    source, target = edge_index
    logit = _logits(q, k, edge_index, edge_bias, logit_clamp)  # [E, H]
    index = target[:, None].expand_as(logit)
    top = logit.new_full(q.shape[:2], -torch.inf)
    top = top.scatter_reduce(0, index, logit.detach(), "amax")
    p = (logit - top[target]).exp()
    total = p.new_zeros(q.shape[:2]).index_add(0, target, p)
    weight = p / total[target]
    out = v.new_zeros(q.shape[0], *v.shape[1:])
    return out.index_add(0, target, weight[..., None] * v[source])


def pyg(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge_index: Tensor,
    *,
    edge_bias: Tensor | None = None,
    logit_clamp: float | None = None,
) -> Tensor:
    """``torch_geometric``'s softmax and scatter, as ``TransformerConv`` composes them."""
    from torch_geometric.utils import scatter, softmax

    source, target = edge_index
    logit = _logits(q, k, edge_index, edge_bias, logit_clamp)
    weight = softmax(logit, target, num_nodes=q.shape[0])
    return scatter(weight[..., None] * v[source], target, dim=0, dim_size=q.shape[0])


def torch_scatter(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge_index: Tensor,
    *,
    edge_bias: Tensor | None = None,
    logit_clamp: float | None = None,
) -> Tensor:
    """``torch_scatter``'s softmax and sum."""
    from torch_scatter import scatter_add, scatter_softmax

    source, target = edge_index
    logit = _logits(q, k, edge_index, edge_bias, logit_clamp)
    weight = scatter_softmax(logit, target, dim=0, dim_size=q.shape[0])
    return scatter_add(weight[..., None] * v[source], target, dim=0, dim_size=q.shape[0])


ATTENTION = {"pyg": pyg, "torch-scatter": torch_scatter, "gather-scatter": gather_scatter}


def _logits(
    q: Tensor, k: Tensor, edge_index: Tensor, edge_bias: Tensor | None, logit_clamp: float | None
) -> Tensor:
    source, target = edge_index
    logit = (q[target] * k[source]).sum(-1) / math.sqrt(q.shape[-1])
    if logit_clamp is not None:
        logit = logit.clamp(-logit_clamp, logit_clamp)
    return logit if edge_bias is None else logit + edge_bias


def attention(name: str):  # type: ignore[no-untyped-def]
    """The peer of that name; ImportError where its package is absent."""
    if name == "torch-scatter":
        import torch_scatter as _
    elif name == "pyg":
        import torch_geometric as _  # noqa: F401
    return ATTENTION[name]

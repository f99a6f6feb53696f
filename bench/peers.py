"""What users would otherwise run: neighbourhood attention composed from gathers and scatters, which
materialises several tensors of size edges x heads x width, or dense attention under a mask.

Every peer takes q ``[N_rows, H, D]``, k ``[N_cols, H, D]``, v ``[N_cols, H, Dv]`` and PyG's
``edge_index``.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


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


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    edge_index: Tensor,
    *,
    edge_bias: Tensor | None = None,
    logit_clamp: float | None = None,
) -> Tensor:
    """PyTorch's dense attention under a mask, which is made once for a graph without a bias.

    Raises:
        MemoryError: The mask would take more than ``DENSE_BYTES``.
        NotImplementedError: There is a clamp.
    """
    if logit_clamp is not None:
        raise NotImplementedError("scaled_dot_product_attention clamps no logits")
    rows, cols = q.shape[0], k.shape[0]
    size = rows * cols * q.element_size() * (1 if edge_bias is None else q.shape[1])
    if size > DENSE_BYTES:
        raise MemoryError(f"the dense mask would take {size / 1e9:.1f} GB")
    if edge_bias is None:
        mask, alone = _dense_mask(edge_index, rows, cols, q.dtype)
    else:
        mask, alone = _mask(edge_index, rows, cols, edge_bias)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    # a mask of four dimensions: PyTorch's fused kernels take no other
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask[None])[0].transpose(0, 1)
    return out.masked_fill(alone, 0)


DENSE_BYTES = 2**30


@functools.lru_cache(maxsize=1)
def _dense_mask(
    edge_index: Tensor, rows: int, cols: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    one = torch.zeros(edge_index.shape[1], 1, dtype=dtype, device=edge_index.device)
    return _mask(edge_index, rows, cols, one)


def _mask(edge_index: Tensor, rows: int, cols: int, bias: Tensor) -> tuple[Tensor, Tensor]:
    """-> [H, N_rows, N_cols] to be added to the logits, an edge that stands there twice counting
    so; and which rows have no edge: [N_rows, 1, 1]. Those attend to everything, for a softmax
    over nothing is NaN."""
    source, target = edge_index
    sums = bias.new_zeros(rows, cols, bias.shape[1])
    sums = sums.index_put((target, source), bias.exp(), accumulate=True).permute(2, 0, 1)
    alone = torch.ones(rows, dtype=torch.bool, device=bias.device).index_fill(0, target, False)
    return sums.log().masked_fill(alone[None, :, None], 0), alone[:, None, None]


ATTENTION = {
    "pyg": pyg,
    "torch-scatter": torch_scatter,
    "gather-scatter": gather_scatter,
    "sdpa, dense mask": sdpa,
}


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

"""The meaning of ``linear_attention`` and ``sgformer_attention``."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None = None,
    *,
    feature_map: str = "elu",
    projection: Tensor | None = None,
    eps: float = 1e-6,
    normalize: bool = True,
    head_gate: Tensor | None = None,
    dense_gate_grad: bool = False,
) -> Tensor:
    """See :func:`fastgt.linear_attention`."""
    bounds = [0, len(q)] if offsets is None else offsets.tolist()
    keep = None
    if head_gate is not None:
        sizes = torch.tensor(bounds, device=q.device).diff()
        graph_of = torch.arange(len(sizes), device=q.device).repeat_interleave(sizes)
        if not dense_gate_grad or head_gate.dtype == torch.bool:
            mask = torch.atleast_2d(head_gate.detach() != 0)
            keep = mask.expand(len(sizes), -1)[graph_of][..., None]  # [N, H, 1]
            q, k, v = (torch.where(keep, x, 0) for x in (q, k, v))
    dtype, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    # a graph's sums of finite numbers overflow float16
    q, k, v = (x.to(wide) for x in (q, k, v))
    outs = [v[:0]]
    for begin, end in pairwise(bounds):
        if begin == end:
            continue
        f = features(q[begin:end], feature_map, projection, stabilise_over=(2,))  # [n, H, M]
        g = features(k[begin:end], feature_map, projection, stabilise_over=(0, 2))
        state = torch.einsum("nhm,nhd->hmd", g, v[begin:end])
        out = torch.einsum("nhm,hmd->nhd", f, state)
        if normalize:
            out = out / (torch.einsum("nhm,hm->nh", f, g.sum(0)) + eps)[..., None]
        outs.append(out)
    whole = torch.cat(outs).to(dtype)
    if keep is not None:
        whole = torch.where(keep, whole, 0)
    if head_gate is None or head_gate.dtype == torch.bool:
        return whole
    wide = torch.promote_types(wide, head_gate.dtype)
    gate = head_gate.to(wide)
    if keep is not None:
        # no gradient of masked heads, whatever stands upstream
        gate = gate.masked_fill(head_gate.detach() == 0, 0)
    if gate.ndim == 2 and offsets is not None:
        gate = gate[graph_of]
    return (whole.to(wide) * gate[..., None]).to(dtype)


def sgformer_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None = None, *, norms: str = "graph"
) -> Tensor:
    """See :func:`fastgt.sgformer_attention`."""
    bounds = [0, len(q)] if offsets is None else offsets.tolist()
    dtype, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    outs = [v[:0].to(wide)]
    for begin, end in pairwise(bounds):
        qs, ks, vs = (x[begin:end].to(wide) for x in (q, k, v))
        over = (0, 1, 2) if norms == "graph" else (2,)
        qs, ks = _unit(qs, over), _unit(ks, over)
        n = end - begin
        numerator = torch.einsum("nhc,hcd->nhd", qs, torch.einsum("nhc,nhd->hcd", ks, vs)) + n * vs
        outs.append(numerator / (torch.einsum("nhc,hc->nh", qs, ks.sum(0)) + n)[..., None])
    return torch.cat(outs).to(dtype)


def _unit(x: Tensor, over: tuple[int, ...]) -> Tensor:
    """x by its norm over these dimensions; zeros stay."""
    square = x.square().sum(over, keepdim=True)
    tiny = torch.finfo(x.dtype).tiny
    return x * torch.where(square > tiny, square.clamp(min=tiny).rsqrt(), 0)


def features(
    x: Tensor,
    name: str,
    projection: Tensor | None,
    stabilise_over: tuple[int, ...],
    top: Tensor | None = None,
) -> Tensor:
    """phi(x), [n, H, D] -> [n, H, M]. The constant that keeps exp() in range is ``top``, else the
    largest product over these dimensions."""
    if name == "identity":
        return x
    if name == "relu":
        return x.relu()
    if name == "elu":
        # exp() of large x is not to overflow, and its gradient at 0 is 1
        return torch.where(x > 0, x + 1, torch.where(x > 0, 0, x).exp())
    if name == "sigmoid":
        return x.sigmoid()
    assert projection is not None
    m, d = projection.shape
    product = x @ projection.to(x.dtype).mT
    if name == "relu_random":
        return product.relu() + 1e-3
    product = product * d**-0.25
    half = x.square().sum(-1, keepdim=True) * (d**-0.5 / 2)
    if top is None:
        top = product.detach().amax(stabilise_over, keepdim=True)
    return ((product - half - top).exp() + 1e-4) * m**-0.5

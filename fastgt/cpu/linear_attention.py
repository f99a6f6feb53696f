"""Linear attention on a CPU, some graphs at a time.

Graphs of about the same size are multiplied side by side, filled up to the largest of them with
rows that count for nothing; a graph that is too large comes in slices of its nodes, whose states
are added in order. Features, states and products of one such group fit a cache and are gone before
the next: the working memory beside the result does not depend on N. A group of graphs with fewer
nodes than a state has rows, about, is multiplied in the quadratic form, phi(q) phi(k)^T first.
The symbols are those of ``fastgt.linear_attention``; v' is [v, 1] and S' = [S, z].
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastgt.contract import Features, Inputs, NeedQKV, Quotient, Ragged
from fastgt.cpu.sparse import accumulator

_NUMBERS = 2**18  # features of a group
_FILL = 0.75  # of the largest graph of a group has the smallest, at least


class Group(NamedTuple):
    """B graphs side by side, or a slice of one; T rows each."""

    rows: Tensor  # [B * H * T] rows of x [N * H, .], of active heads
    batch: int  # B * H
    length: int  # T
    padding: Tensor | None  # [B * H, T, 1] bool: not a node
    nodes: Tensor | None  # which of rows are nodes; None: all


# called by an exported module, gradients may be on; and autocast, which would round the products
@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def linear_attention_fwd(
    inputs: Inputs, features: Features, ragged: Ragged, quotient: Quotient
) -> tuple[Tensor, Tensor]:
    """-> o [N, H, DV], and nothing for the backward."""
    q, _, v = inputs
    out = q.new_empty(v.shape) if ragged.mask is None else q.new_zeros(v.shape)
    phi = Phi(features, q)
    # looked through row by row: a copy is made once, not for every group
    q, k, v = (x.contiguous() for x in inputs)
    for groups in _groups(q, ragged, phi.width, v.shape[2]):
        top = phi.top(k, groups)
        if len(groups) == 1 and _quadratic(groups[0].length, phi.width, v.shape[2]):
            (group,) = groups
            f, g = phi(_take(q, group)), phi(_take(k, group), top)
            _put(out, group, _divided(f @ g.mT @ _values(v, group, quotient.normalize), quotient))
            continue
        state = _state(phi, k, v, groups, top, quotient.normalize)
        for group in groups:
            _put(out, group, _divided(phi(_take(q, group)) @ state, quotient))
    return out, q.new_empty(0, q.shape[1], dtype=accumulator(q))


@torch.no_grad()
@torch.autocast("cpu", enabled=False)
def linear_attention_bwd(
    do: Tensor,
    inputs: Inputs,
    features: Features,
    ragged: Ragged,
    quotient: Quotient,
    needs: NeedQKV,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv; empty where not needed.

    With o' = phi(q) S', do' its gradient and dS' = phi(q)^T do':

        dphi(q) = do' S'^T,   dphi(k) = v' dS'^T,   dv' = phi(k) dS'
    """
    dq, dk, dv = (
        (x.new_empty if ragged.mask is None else x.new_zeros)(x.shape if need else (0,))
        for x, need in zip(inputs, needs, strict=True)
    )
    need_q, need_k, need_v = needs
    phi, width = Phi(features, inputs.q), inputs.v.shape[2]
    do, q, k, v = (x.contiguous() for x in (do, *inputs))
    for groups in _groups(q, ragged, phi.width, width):
        top = phi.top(k, groups)
        if len(groups) == 1 and _quadratic(groups[0].length, phi.width, width):
            (group,) = groups
            qs = _take(q, group)
            f, f_inner = phi.both(qs)
            ks, g, g_inner, vs = _keys(phi, k, v, group, top, quotient.normalize)
            a = f @ g.mT
            flow = _upstream(do, group, a @ vs, quotient)
            da = flow @ vs.mT
            if need_q:
                _put(dq, group, phi.gradient(da @ g, qs, f, f_inner))
            if need_k:
                _put(dk, group, phi.gradient(da.mT @ f, ks, g, g_inner))
            if need_v:
                _put(dv, group, (a.mT @ flow)[..., :width])
            continue
        # slices of a graph are made anew, what is whole is kept meanwhile
        if len(groups) > 1:
            whole, state = None, _state(phi, k, v, groups, top, quotient.normalize)
        else:
            whole = _keys(phi, k, v, groups[0], top, quotient.normalize)
            state = whole[1].mT @ whole[3]
        dstate: Tensor | None = None
        for group in groups:
            qs = _take(q, group)
            f, inner = phi.both(qs)
            flow = _upstream(do, group, f @ state, quotient)
            if need_q:
                _put(dq, group, phi.gradient(flow @ state.mT, qs, f, inner))
            if need_k or need_v:
                product = f.mT @ flow
                dstate = product if dstate is None else dstate.add_(product)
        if dstate is None:
            continue
        for group in groups:
            ks, g, inner, vs = whole or _keys(phi, k, v, group, top, quotient.normalize)
            if need_k:
                _put(dk, group, phi.gradient(vs @ dstate.mT, ks, g, inner))
            if need_v:
                _put(dv, group, g @ dstate[..., :width])
    return dq, dk, dv


class Phi:
    """A feature map of rows [B, T, D] -> [B, T, M], and its gradient."""

    def __init__(self, features: Features, q: Tensor):
        (name, projection), self.d = features, q.shape[2]
        self.name = name
        self.width = self.d
        if projection is not None:
            self.width = projection.shape[0]
            self.projection = projection.to(accumulator(q))
            if name == "softmax":
                self.projection = self.projection * self.d**-0.25

    def __call__(self, x: Tensor, top: Tensor | None = None) -> Tensor:
        if self.name == "identity":
            return x
        if self.name == "relu":
            return x.relu()
        if self.name == "elu":
            return torch.where(x > 0, x + 1, x.exp())
        if self.name == "sigmoid":
            return x.sigmoid()
        inner = self._inner(x, top)
        if self.name == "relu_random":
            return inner.add_(1e-3)
        return inner.add_(1e-4).mul_(self.width**-0.5)

    def both(self, x: Tensor, top: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The features, and what their gradient needs besides."""
        if self.name not in ("softmax", "relu_random"):
            return self(x), None
        inner = self._inner(x, top)
        if self.name == "relu_random":
            return inner + 1e-3, inner
        return (inner + 1e-4).mul_(self.width**-0.5), inner

    def gradient(self, dphi: Tensor, x: Tensor, phi: Tensor, inner: Tensor | None) -> Tensor:
        """Of x, for that of the features."""
        if self.name == "identity":
            return dphi
        if self.name == "relu":
            return torch.ops.aten.threshold_backward(dphi, x, 0.0)
        if self.name == "elu":
            return dphi * phi.clamp(max=1.0)
        if self.name == "sigmoid":
            return dphi * phi * (1 - phi)
        assert inner is not None
        if self.name == "relu_random":
            return torch.ops.aten.threshold_backward(dphi, inner, 0.0) @ self.projection
        flow = (dphi * inner).mul_(self.width**-0.5)
        return flow @ self.projection - x * flow.sum(-1, keepdim=True).mul_(self.d**-0.5)

    def top(self, k: Tensor, groups: list[Group]) -> Tensor | None:
        """The stabiliser of a graph's keys, [B, 1, 1]: the largest product with the projection."""
        if self.name != "softmax":
            return None
        tops = [(_take(k, group) @ self.projection.mT).amax((1, 2), True) for group in groups]
        return torch.stack(tops).amax(0)

    def _inner(self, x: Tensor, top: Tensor | None) -> Tensor:
        inner = x @ self.projection.mT
        if self.name == "relu_random":
            return inner.relu_()
        top = inner.amax(-1, keepdim=True) if top is None else top
        half = x.square().sum(-1, keepdim=True).mul_(self.d**-0.5 / 2)
        return inner.sub_(half + top).exp_()


def _groups(q: Tensor, ragged: Ragged, m: int, d: int) -> Iterator[list[Group]]:
    """Graphs that are multiplied together: of each set of active heads, those that have it."""
    (n, heads, _), mask = q.shape, ragged.mask
    offsets = torch.tensor([0, n]) if ragged.offsets is None else ragged.offsets.long()
    starts, sizes = offsets[:-1], offsets.diff()
    if mask is None:
        yield from _graphs(starts, sizes, torch.arange(heads), heads, m, d)
        return
    sets, which = mask.expand(len(sizes), -1).unique(dim=0, return_inverse=True)
    for i, active in enumerate(sets):
        mine = which == i
        if active.any():
            active = active.nonzero().squeeze(1)
            yield from _graphs(starts[mine], sizes[mine], active, heads, m, d)


def _graphs(
    starts: Tensor, sizes: Tensor, active: Tensor, of: int, m: int, d: int
) -> Iterator[list[Group]]:
    """Groups of these graphs, largest first, and of the heads ``active`` of so many; a list has
    several slices of one graph, which has a state: one that has none, in the quadratic form, stays
    whole."""
    heads = len(active)
    order = sizes.argsort(descending=True, stable=True)
    ordered: list[int] = sizes[order].tolist()
    limit = max(1, _NUMBERS // max(1, heads * m))
    i = 0
    while i < len(ordered) and ordered[i]:
        largest = ordered[i]
        first = starts[order[i]]
        if largest > limit and not _quadratic(largest, m, d):
            slices = torch.arange(largest).split(limit)
            yield [_group(first + part[None], active, of, None) for part in slices]
            i += 1
            continue
        least = max(1, int(_FILL * largest))
        j = bisect.bisect_right(ordered, -least, i, key=lambda size: -size)
        j = min(j, i + max(1, limit // largest))
        within, counts = torch.arange(largest), sizes[order[i:j]]
        # a filler is a copy of its own graph's last node
        at = torch.minimum(within, counts[:, None] - 1) + starts[order[i:j]][:, None]
        padding = None if ordered[j - 1] == largest else within >= counts[:, None]
        yield [_group(at, active, of, padding)]
        i = j


def _group(at: Tensor, active: Tensor, of: int, padding: Tensor | None) -> Group:
    """``at`` [B, T]: the nodes; of their heads those that are active."""
    (batch, count), heads = at.shape, len(active)
    rows = (at[:, None] * of + active[:, None]).flatten()
    nodes = None
    if padding is not None:
        padding = padding[:, None].expand(-1, heads, -1).reshape(batch * heads, count, 1)
        nodes = (~padding).flatten().nonzero().squeeze(1)
    return Group(rows, batch * heads, count, padding, nodes)


def _state(
    phi: Phi, k: Tensor, v: Tensor, groups: list[Group], top: Tensor | None, ones: bool
) -> Tensor:
    """S' of every graph and head, [B, M, DV + 1]."""
    products = (phi(_take(k, x), top).mT @ _values(v, x, ones) for x in groups)
    return functools.reduce(Tensor.add_, products)


def _keys(
    phi: Phi, k: Tensor, v: Tensor, group: Group, top: Tensor | None, ones: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Keys, their features with what the gradient of these needs, and v'."""
    ks = _take(k, group)
    return ks, *phi.both(ks, top), _values(v, group, ones)


def _quadratic(length: int, m: int, d: int) -> bool:
    return length * (m + d) < 2 * m * d


def _take(x: Tensor, group: Group) -> Tensor:
    """[B * H, T, D] of x [N, H, D]."""
    taken = x.view(-1, x.shape[2]).index_select(0, group.rows).to(accumulator(x))
    return taken.view(group.batch, group.length, x.shape[2])


def _values(v: Tensor, group: Group, ones: bool) -> Tensor:
    """v', zero where there is no node; without the last column unless ``ones``."""
    taken = _take(v, group)
    if ones:
        taken = torch.nn.functional.pad(taken, (0, 1), value=1.0)
    return taken if group.padding is None else taken.masked_fill_(group.padding, 0.0)


def _divided(out: Tensor, quotient: Quotient) -> Tensor:
    return out[..., :-1] / (out[..., -1:] + quotient.eps) if quotient.normalize else out


def _upstream(do: Tensor, group: Group, out: Tensor, quotient: Quotient) -> Tensor:
    """do', zero where there is no node."""
    flow = _take(do, group)
    if quotient.normalize:
        share = 1 / (out[..., -1:] + quotient.eps)
        flow *= share
        # out is not needed any more: its last column, the denominator, becomes that of do'
        torch.sum(flow * out[..., :-1], -1, keepdim=True, out=out[..., -1:])
        out[..., -1:].mul_(share).neg_()
        out[..., :-1] = flow
        flow = out
    return flow if group.padding is None else flow.masked_fill_(group.padding, 0.0)


def _put(out: Tensor, group: Group, x: Tensor) -> None:
    """Inverse of ``_take``."""
    rows, x = group.rows, x.flatten(0, 1)
    if group.nodes is not None:
        rows, x = rows.index_select(0, group.nodes), x.index_select(0, group.nodes)
    out.view(-1, out.shape[2]).index_copy_(0, rows, x.to(out.dtype))

"""What edges have besides a bias, for some heads at a time."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgt.contract import Dropout, EdgeTerms, Logit
from fastgt.cpu.sparse import Edges, Walk, per_edge, sddmm, spmm, stack
from fastgt.philox import LEVELS, kept, threshold


class KeptWeights(NamedTuple):
    """The weights that dropout keeps, and what these grow by."""

    mask: Tensor  # [E, H] bool
    growth: float


def kept_weights(dropout: Dropout, edges: int, heads: int) -> KeptWeights | None:
    if dropout.seed is None:
        return None
    growth = LEVELS / max(1, LEVELS - threshold(dropout.p))
    return KeptWeights(kept(dropout.seed, edges, heads, dropout.p), growth)


class OnEdges(NamedTuple):
    """What edges have besides a bias."""

    terms: EdgeTerms
    key_is_value: bool
    kept: KeptWeights | None


class Head:
    """Queries, keys and edge terms of some heads, one below the other, edges in row order.

    Where a gate or scores go channel by channel, products of size [E, D] are made; else logits are
    sums of sampled products, of q with keys, of q with edge keys, and of attr_q with attributes.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        walk: Walk,
        own: Walk,
        n: int,
        edges: Edges,
        heads: slice,
        on_edges: OnEdges,
        with_scores: bool,
    ):
        self.q, self.k, self.walk, self.own = q, k, walk, own
        self.n, self.row, self.attr = n, edges.row, edges.attr
        self.by_channel = with_scores
        self.gate: Any = None
        self.factor: Any = None
        self.key: Any = None
        self.value: Any = None
        self.attr_q: Any = None
        self.kept: Any = None
        terms, dropout = on_edges.terms, on_edges.kept
        wide, count = q.dtype, walk.other.shape[0]
        if terms.attr is not None:
            # an edge's row of a tensor that all heads share
            shared = count == len(edges)
            self.common = own if shared else own._replace(other=own.other % len(edges))
        if terms.gate is not None:
            gate = slots(terms.gate, edges.edge, heads, wide)
            self.gate, self.factor = (gate, None) if terms.gate.ndim == 3 else (None, gate)
            self.by_channel = with_scores or self.gate is not None
        if terms.key is not None:
            self.key = slots(terms.key, edges.edge, heads, wide)
        if on_edges.key_is_value:
            self.value = self.key
        elif terms.value is not None:
            self.value = slots(terms.value, edges.edge, heads, wide)
        if terms.attr_q is not None:
            self.attr_q = stack(terms.attr_q, heads, wide)
        if dropout is not None:
            self.kept = slots(dropout.mask, edges.edge, heads, wide).mul_(dropout.growth)

    def logits(self, bias: Tensor | None, logit: Logit) -> tuple[Tensor, Tensor | None]:
        """clamp(scale q . k) + bias of every edge, and which ones the clamp let through."""
        scale, low, high, _ = logit
        if self.by_channel:
            self.spread = per_edge(self.q, self.row, self.n)
            self.ungated = self.k.index_select(0, self.walk.other)
            if self.key is not None:
                self.ungated += self.key
            self.keys = self.ungated if self.gate is None else self.ungated * self.gate
            self.products = self.spread * self.keys
            s = self.products.sum(1).mul_(scale)
        else:
            s = sddmm(self.q, self.k, self.walk, scale)
            if self.key is not None:
                sddmm(self.q, self.key, self.own, scale, onto=s)
            if self.attr_q is not None:
                sddmm(self.attr_q, self.attr, self.common, scale, onto=s)
        self.unfactored, through = s, None
        if self.factor is not None:
            s = s * self.factor
        if low > -math.inf or high < math.inf:
            through = (s >= low) & (s <= high)
            s = s.clamp_(low, high)
        if bias is not None:
            s += bias
        return s, through

    def scores(self, scale: float) -> Tensor:
        """The terms of the logits' sums, [E, D]."""
        scores = self.products * scale
        return scores if self.factor is None else scores.mul_(self.factor[:, None])

    def dropped(self, p: Tensor) -> Tensor:
        return p if self.kept is None else p * self.kept

    def take(self, ds: Tensor, dscores: Tensor | None, scale: float) -> None:
        """The gradients of the logits [E] before the bias, and of the scores [E, D] if any."""
        if self.factor is not None:
            self.dfactor = ds * self.unfactored
            if dscores is not None:
                self.dfactor += (dscores * self.products).sum(1).mul_(scale)
        rate = ds.new_full((1,), scale) if self.factor is None else self.factor * scale
        self.ds = ds * rate
        self.dproducts = self.ds[:, None]
        if dscores is not None:
            self.dproducts = (dscores * rate[:, None]).add_(self.dproducts)

    def dq(self) -> Tensor:
        if self.by_channel:
            return spmm(self.own, None, self.dproducts * self.keys)
        out = spmm(self.walk, self.ds, self.k)
        return out if self.key is None else out.add_(spmm(self.own, self.ds, self.key))

    def dk(self, cols: Walk, slot: Tensor) -> Tensor:
        if self.by_channel:
            return spmm(cols._replace(other=slot), None, self.dkey())
        return spmm(cols, self.ds.index_select(0, slot), self.q)

    def dkey(self) -> Tensor:
        flow = self._dungated()
        return flow if self.gate is None else flow * self.gate

    def dgate(self) -> Tensor:
        return self._dungated() * self.ungated

    def _dungated(self) -> Tensor:
        q = self.spread if self.by_channel else per_edge(self.q, self.row, self.n)
        return self.dproducts * q


def attributes(terms: EdgeTerms, edge: Tensor, wide: torch.dtype) -> Tensor | None:
    """In row order."""
    return None if terms.attr is None else terms.attr.index_select(0, edge).to(wide)


def slots(x: Tensor, edge: Tensor, heads: slice, wide: torch.dtype) -> Tensor:
    """``x [E, H, ...]`` of some heads, in row order, one head below the other: a copy."""
    return x[:, heads].index_select(0, edge).to(wide).transpose(0, 1).flatten(0, 1)

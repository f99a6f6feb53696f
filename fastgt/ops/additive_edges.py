"""additive_attention's attributes for Triton's kernels, which take an edge key: their product with
its weight, and the gradients of both from the key's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastgt.contract import AdditiveNeeds, AdditiveTerms, HeadMask
from fastgt.ops.wide_product import wide_product


def with_product(terms: AdditiveTerms, mask: HeadMask) -> AdditiveTerms:
    """The same without attributes: what they add to the keys is part of the edge key [E, H, D]."""
    if terms.attr is None:
        return terms
    product = _product(terms.attr, _unmasked(terms.key_weight, mask))
    key = product if terms.key is None else product.add_(terms.key)
    return AdditiveTerms(key, None, None, terms.bias)


def attribute_gradients(
    dkey: Tensor, terms: AdditiveTerms, mask: HeadMask, needs: AdditiveNeeds
) -> list[Tensor | None]:
    """-> those of the attributes and of their weight, None where not needed."""
    attr, weight = terms.attr, _unmasked(terms.key_weight, mask)
    assert attr is not None
    flat = dkey.flatten(1)
    dattr: Tensor | None = None
    dweight: Tensor | None = None
    if needs.need_attr:
        dattr = wide_product(flat[:, None], weight.flatten(1).t()[None])[:, 0].to(attr.dtype)
    if needs.need_key_weight:
        dweight = wide_product(attr.t()[:, None], flat[None]).view(weight.shape).to(weight.dtype)
    return [dattr, dweight]


def _product(attr: Tensor, weight: Tensor) -> Tensor:
    """attr [E, C] times weight [C, H, D], in the accumulator's precision."""
    product: Any = wide_product(attr[:, None], weight.flatten(1)[None])
    return product.unflatten(2, weight.shape[1:])[:, 0]


def _unmasked(weight: Tensor | None, mask: HeadMask) -> Tensor:
    """With 0 in heads that are masked everywhere: 0 * NaN is not 0."""
    assert weight is not None
    return weight if mask.rows is None else weight.masked_fill(~mask.rows.any(0)[:, None], 0)

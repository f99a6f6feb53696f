"""The meaning of every operator in plain PyTorch: same names, same signatures, slow on purpose.

Everything here is differentiable, any number of times, by autograd alone. ``impl`` is left out:
these are what ``impl="reference"`` runs, but for checks and autocast.
"""

from fastgt.reference.additive_attention import additive_attention, masked_additive_attention
from fastgt.reference.aggregate import aggregate
from fastgt.reference.attention import masked_attention, neighborhood_attention
from fastgt.reference.channelwise_attention import (
    channelwise_attention,
    masked_channelwise_attention,
)
from fastgt.reference.gated_aggregate import gated_aggregate
from fastgt.reference.global_attention import global_attention, masked_global_attention
from fastgt.reference.head_projection import head_projection
from fastgt.reference.linear_attention import linear_attention, sgformer_attention
from fastgt.reference.segment_pool import segment_max, segment_mean, segment_sum, virtual_node
from fastgt.reference.segment_softmax import segment_softmax

__all__ = [
    "additive_attention",
    "aggregate",
    "channelwise_attention",
    "gated_aggregate",
    "global_attention",
    "head_projection",
    "linear_attention",
    "masked_additive_attention",
    "masked_attention",
    "masked_channelwise_attention",
    "masked_global_attention",
    "neighborhood_attention",
    "segment_max",
    "segment_mean",
    "segment_softmax",
    "segment_sum",
    "sgformer_attention",
    "virtual_node",
]

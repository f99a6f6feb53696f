"""fastgt: attention kernels that graph transformers run on."""

from fastgt.contract import Aux, AuxRequest
from fastgt.drop_in import accelerate, restore
from fastgt.graph import Graph
from fastgt.ops.additive_attention import additive_attention
from fastgt.ops.aggregate import aggregate
from fastgt.ops.attention import neighborhood_attention
from fastgt.ops.channelwise_attention import channelwise_attention
from fastgt.ops.flops import register_formulas as _register_formulas
from fastgt.ops.gated_aggregate import gated_aggregate
from fastgt.ops.global_attention import global_attention
from fastgt.ops.head_projection import head_projection
from fastgt.ops.implementation import implementation
from fastgt.ops.linear_attention import linear_attention, sgformer_attention
from fastgt.ops.segment_pool import segment_max, segment_mean, segment_sum, virtual_node
from fastgt.ops.segment_softmax import segment_softmax
from fastgt.philox import DropoutSeed, PairDropoutSeed
from fastgt.pruning import prune_heads

_register_formulas()

__version__ = "0.1.0"
__all__ = [
    "Aux",
    "AuxRequest",
    "DropoutSeed",
    "Graph",
    "PairDropoutSeed",
    "accelerate",
    "additive_attention",
    "aggregate",
    "channelwise_attention",
    "gated_aggregate",
    "global_attention",
    "head_projection",
    "implementation",
    "linear_attention",
    "neighborhood_attention",
    "prune_heads",
    "restore",
    "segment_max",
    "segment_mean",
    "segment_softmax",
    "segment_sum",
    "sgformer_attention",
    "virtual_node",
]

"""fastgt: attention kernels that graph transformers run on."""

from fastgt.graph import Graph
from fastgt.ops._impl import implementation
from fastgt.ops.aggregate import aggregate, gated_aggregate, segment_softmax
from fastgt.ops.attention import neighborhood_attention
from fastgt.ops.channelwise_attention import channelwise_attention

__version__ = "0.1.0"
__all__ = [
    "Graph",
    "aggregate",
    "channelwise_attention",
    "gated_aggregate",
    "implementation",
    "neighborhood_attention",
    "segment_softmax",
]

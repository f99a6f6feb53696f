"""fastgt: attention kernels that graph transformers run on."""

from fastgt.graph import Graph
from fastgt.ops._impl import implementation
from fastgt.ops.attention import neighborhood_attention

__version__ = "0.1.0"
__all__ = ["Graph", "implementation", "neighborhood_attention"]

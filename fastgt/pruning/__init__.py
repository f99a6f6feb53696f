"""Taking away what a model does not need: tokens, heads, layers and weights.

Each piece stands by itself, and any of them go together.
"""

from fastgt.pruning.heads import HeadSparsity, prune_heads
from fastgt.pruning.layers import DropPath, SkipLayer, prune_layers
from fastgt.pruning.tokens import KeptTokens, TokenPruning
from fastgt.pruning.weights import GradualPruning

__all__ = [
    "DropPath",
    "GradualPruning",
    "HeadSparsity",
    "KeptTokens",
    "SkipLayer",
    "TokenPruning",
    "prune_heads",
    "prune_layers",
]

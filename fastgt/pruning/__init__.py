"""Taking away what a model does not need: heads."""

from fastgt.pruning.heads import HeadSparsity, prune_heads

__all__ = ["HeadSparsity", "prune_heads"]

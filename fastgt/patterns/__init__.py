"""Patterns of attention as graphs: windows, stripes, sequences, nearest points, chosen pairs.

Every function returns a :class:`fastgt.Graph`, built once and shared by all layers. It takes time
and memory linear in the edges: no function makes a mask of all pairs, but those that are given a
score for each pair. Each row's edges stand in the order of their columns, and edges are numbered
row after row, where nothing else is said. No edge is there twice.
"""

from fastgt.patterns.big_bird import big_bird
from fastgt.patterns.chosen import top_blocks, top_k
from fastgt.patterns.drawn import expander, random
from fastgt.patterns.grids import axial, dilated, neighborhood, stripes, windows
from fastgt.patterns.groups import groups, sets
from fastgt.patterns.heads import fold, fold_heads, unfold
from fastgt.patterns.points import balls, knn, radius
from fastgt.patterns.sequences import band, causal
from fastgt.patterns.tokens import global_tokens

__all__ = [
    "axial",
    "balls",
    "band",
    "big_bird",
    "causal",
    "dilated",
    "expander",
    "fold",
    "fold_heads",
    "global_tokens",
    "groups",
    "knn",
    "neighborhood",
    "radius",
    "random",
    "sets",
    "stripes",
    "top_blocks",
    "top_k",
    "unfold",
    "windows",
]

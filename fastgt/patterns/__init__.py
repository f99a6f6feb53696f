"""Patterns of attention as graphs: windows, stripes, sequences, nearest points, chosen pairs.

Every function returns a :class:`fastgt.Graph`, built once and shared by all layers. Memory is
linear in the edges. So is time, apart from sorting and from what a function says of itself. Only
:func:`top_k` and :func:`top_blocks`, which are given a score for each pair, make a mask of all
pairs. Where a function says nothing else, edges are numbered row after row, and within a row by
column. No edge occurs twice. A pattern is symmetric if node j attends to node i whenever node i
attends to node j.
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

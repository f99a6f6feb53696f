"""Encodings: where a node stands in its graph, computed once before training."""

from fastgt.encodings.laplacian import flip_signs, laplacian_pe
from fastgt.encodings.random_walk import random_walk_pe

__all__ = ["flip_signs", "laplacian_pe", "random_walk_pe"]

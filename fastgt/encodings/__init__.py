"""Encodings: where a node stands in its graph, computed once before training."""

from fastgt.encodings.cache import Cache
from fastgt.encodings.electrostatic import electrostatic_pe
from fastgt.encodings.heat_kernel import heat_kernel_pe
from fastgt.encodings.laplacian import (
    LaplacianEigenpairs,
    flip_signs,
    laplacian_eigenpairs,
    laplacian_pe,
)
from fastgt.encodings.paths import degrees, shortest_paths
from fastgt.encodings.random_projection import random_projection_pe
from fastgt.encodings.random_walk import random_walk_pe
from fastgt.encodings.singular_vectors import svd_tokens

__all__ = [
    "Cache",
    "LaplacianEigenpairs",
    "degrees",
    "electrostatic_pe",
    "flip_signs",
    "heat_kernel_pe",
    "laplacian_eigenpairs",
    "laplacian_pe",
    "random_projection_pe",
    "random_walk_pe",
    "shortest_paths",
    "svd_tokens",
]
